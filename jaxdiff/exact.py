r"""Closed-form denoisers: Gaussian, mixture of Gaussians, and the Dirac mixture of a data set.

They are the ground truth of every test and benchmark, and good starting points for theory: no
network, no training, exact scores and densities at every noise level.
"""

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from jaxdiff import _check, streaming
from jaxdiff._types import Cond, Scalar, ScalarLike, is_concrete, time_dtype
from jaxdiff.process import AbstractProcess
from jaxdiff.score import AbstractDenoiser, floating


class AbstractExact(AbstractDenoiser):
    """A denoiser whose diffused density is known as well."""

    @abc.abstractmethod
    def log_density(self, t: ScalarLike, x: Float[ArrayLike, "*dims"]) -> Scalar:
        r"""Return $\log q_t(x)$ in nats; its gradient is `score`."""

    @abc.abstractmethod
    def noise_covariance(
        self, t: ScalarLike, x: Float[ArrayLike, "*dims"]
    ) -> Callable[[Array], Array]:
        r"""Return $v \mapsto R v$ with $R = Cov[\epsilon | x_t = x]$, a pytree callable.

        By sums of centred outer products: no derivative, and nothing is got by subtraction.
        """


class _MixtureNoise(eqx.Module):
    """$R v$ of a mixture: covariances within the components, and between their means."""

    weights: Array  # (K,)
    within: Array  # (K, d), the diagonals of Cov[eps | x, k] in the eigenbasis of C_k
    between: Array  # (K, d), E[eps | x, k] less their mean
    basis: Array | None

    def __call__(self, v: Array) -> Array:
        flat = v.reshape(-1).astype(self.within.dtype)
        rows = jnp.broadcast_to(flat, self.within.shape)
        if self.basis is None:
            inside = jnp.matmul(self.weights, self.within * rows, precision="highest")
        else:
            turned = jnp.einsum("kij,ki->kj", self.basis, rows, precision="highest")
            inside = jnp.einsum(
                "k,kij,kj->i", self.weights, self.basis, self.within * turned, precision="highest"
            )
        along = jnp.matmul(self.between, flat, precision="highest")
        across = jnp.matmul(self.weights * along, self.between, precision="highest")
        return (inside + across).reshape(v.shape).astype(v.dtype)


class _EmpiricalNoise(eqx.Module):
    """$R v$ of a data set, by one more streamed pass."""

    alpha: Array
    sigma: Array
    x: Array  # (d,)
    atoms: Array
    log_weights: Array
    log_total: Array  # of the unnormalised weights
    eps: Array  # (d,)

    def __call__(self, v: Array) -> Array:
        flat = v.reshape(-1).astype(self.x.dtype)

        def add(total: Array, piece: tuple[Array, Array]) -> tuple[Array, None]:
            chunk, log_p = (a.astype(self.x.dtype) for a in piece)
            noise = (self.x[None] - self.alpha * chunk) / self.sigma
            w = jnp.exp(log_p - 0.5 * jnp.sum(noise**2, axis=-1) - self.log_total)
            centred = noise - self.eps[None]
            along = jnp.matmul(centred, flat, precision="highest")
            return total + jnp.matmul(w * along, centred, precision="highest"), None

        total = jax.lax.scan(add, jnp.zeros_like(flat), (self.atoms, self.log_weights))[0]
        return total.reshape(v.shape).astype(v.dtype)


class Mixture(AbstractExact):
    r"""Exact denoiser of a Gaussian mixture: build it with `mixture` or `gaussian`.

    In the eigenbasis of $C_k$ (eigenvalues $c$), $S_k = \alpha^2 c + \sigma^2$,
    $z_k = x - \alpha\mu_k$, $w_k \propto \pi_k N(z_k; 0, S_k)$:

    $$ \hat\epsilon = \sigma\sum_k w_k S_k^{-1} z_k, \qquad
       m = \sum_k w_k\,(\mu_k + \alpha C_k S_k^{-1} z_k) $$

    Cost: O(K d), or O(K d^2) with full covariances. Finite wherever $S_k$ is.

    Attributes:
        process: the Gaussian path.
        log_weights: $\log\pi_k$, (K,).
        means: $\mu_k$, (K, *dims).
        variances: eigenvalues of $C_k$, (K or 1, d or 1).
        basis: eigenvectors of $C_k$ in columns, (K or 1, d, d), or None for the axes.
    """

    process: AbstractProcess
    log_weights: Float[Array, " k"]
    means: Float[Array, "k *dims"]
    variances: Float[Array, "rows cols"]
    basis: Float[Array, "rows d d"] | None

    def _parts(self, t: ScalarLike, x: Any) -> tuple[Array, ...]:
        x, t = _sample("mixture", t, x, self.means.shape[1:])
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        mu = self.means.reshape(len(self.means), -1).astype(x.dtype)
        z = x.reshape(1, -1) - alpha * mu
        if self.basis is not None:
            z = jnp.einsum("kij,ki->kj", self.basis.astype(x.dtype), z, precision="highest")
        c = self.variances.astype(x.dtype)
        s = alpha**2 * c + sigma**2
        quadratic = jnp.sum(z**2 / s + jnp.broadcast_to(jnp.log(s), z.shape), axis=-1)
        logits = self.log_weights.astype(x.dtype) - 0.5 * quadratic
        return x, alpha, sigma, mu, z / s, c, logits

    def _rotate_back(self, weights: Array, rows: Array) -> Array:
        if self.basis is None:
            return jnp.matmul(weights, rows, precision="highest")
        basis = self.basis.astype(rows.dtype)
        return jnp.einsum("k,kij,kj->i", weights, basis, rows, precision="highest")

    def pair(
        self, t: ScalarLike, x: Float[ArrayLike, "*dims"], cond: Cond = None
    ) -> tuple[Float[Array, "*dims"], Float[Array, "*dims"]]:
        r"""Return $(m, \hat\epsilon)$, each by its own sum: neither is got by subtraction."""
        dtype = floating(x).dtype
        x, alpha, sigma, mu, precise, c, logits = self._parts(t, x)
        w = jax.nn.softmax(logits)
        eps = sigma * self._rotate_back(w, precise)
        m = jnp.matmul(w, mu, precision="highest") + alpha * self._rotate_back(w, c * precise)
        return m.reshape(x.shape).astype(dtype), eps.reshape(x.shape).astype(dtype)

    def score(
        self, t: ScalarLike, x: Float[ArrayLike, "*dims"], cond: Cond = None
    ) -> Float[Array, "*dims"]:
        r"""Return $\nabla\log q_t(x) = -\sum_k w_k S_k^{-1} z_k$, finite at sigma = 0 too."""
        dtype = floating(x).dtype
        x, *_, precise, _, logits = self._parts(t, x)
        score = -self._rotate_back(jax.nn.softmax(logits), precise)
        return score.reshape(x.shape).astype(dtype)

    def noise_covariance(
        self, t: ScalarLike, x: Float[ArrayLike, "*dims"]
    ) -> Callable[[Array], Array]:
        r"""Return $v \mapsto \sum_k w_k[\alpha^2 C_k S_k^{-1} v + \delta_k(\delta_k\cdot v)]$.

        With $\delta_k = \sigma S_k^{-1} z_k - \hat\epsilon$, the mean noise of a component less
        that of all. Cost of a product: O(K d), or O(K d^2) with full covariances.
        """
        _, alpha, sigma, mu, precise, c, logits = self._parts(t, x)
        w = jax.nn.softmax(logits)
        means, basis = sigma * precise, self.basis
        if basis is not None:
            basis = basis.astype(mu.dtype)
            means = jnp.einsum("kij,kj->ki", basis, means, precision="highest")
            basis = jnp.broadcast_to(basis, (len(mu), *basis.shape[1:]))
        within = jnp.broadcast_to(alpha**2 * c / (alpha**2 * c + sigma**2), mu.shape)
        mean = jnp.matmul(w, means, precision="highest")
        return _MixtureNoise(w, within, means - mean[None], basis)

    def log_density(self, t: ScalarLike, x: Float[ArrayLike, "*dims"]) -> Scalar:
        r"""Return $\log q_t(x)$ in nats."""
        x, *_, logits = self._parts(t, x)
        return jax.nn.logsumexp(logits) - 0.5 * x.size * math.log(2 * math.pi)


class Empirical(AbstractExact):
    r"""Exact denoiser of a data set: build it with `empirical`.

    $$ q_0 = \sum_i p_i\,\delta_{y_i}, \qquad m = \sum_i w_i y_i, \qquad
       w_i \propto p_i\,e^{-|x - \alpha y_i|^2 / 2\sigma^2} $$

    Cost: one streamed pass over the data, O(N d); memory O(chunk d).

    Attributes:
        process: the Gaussian path.
        atoms: the data in equal chunks, (chunks, chunk, d).
        log_weights: $\log p_i$, (chunks, chunk), `-inf` on padding.
        shape: shape of one sample.
    """

    process: AbstractProcess
    atoms: Float[Array, "chunks chunk d"]
    log_weights: Float[Array, "chunks chunk"]
    shape: tuple[int, ...] = eqx.field(static=True)

    def _posterior(self, t: ScalarLike, x: Any) -> tuple[Array, Array, streaming.Moments]:
        x, t = _sample("empirical", t, x, self.shape)
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        flat = x.reshape(-1)
        return x, sigma, streaming.posterior(alpha, sigma, flat, self.atoms, self.log_weights)

    def pair(
        self, t: ScalarLike, x: Float[ArrayLike, "*dims"], cond: Cond = None
    ) -> tuple[Float[Array, "*dims"], Float[Array, "*dims"]]:
        r"""Return $(m, \hat\epsilon)$ from one pass over the data."""
        dtype = floating(x).dtype
        x, _, total = self._posterior(t, x)
        m, eps = total.mean
        return m.reshape(x.shape).astype(dtype), eps.reshape(x.shape).astype(dtype)

    def noise_covariance(
        self, t: ScalarLike, x: Float[ArrayLike, "*dims"]
    ) -> Callable[[Array], Array]:
        r"""Return $v \mapsto \sum_i w_i\,\delta_i(\delta_i\cdot v)$.

        With $\delta_i = (x - \alpha y_i)/\sigma - \hat\epsilon$. Cost: one streamed pass over the
        data now, and one for each product.
        """
        x, sigma, total = self._posterior(t, x)
        alpha = self.process.alpha(jnp.asarray(t, x.dtype))
        log_total = total.top + jnp.log(total.mass)
        return _EmpiricalNoise(
            alpha, sigma, x.reshape(-1), self.atoms, self.log_weights, log_total, total.mean[1]
        )

    def log_density(self, t: ScalarLike, x: Float[ArrayLike, "*dims"]) -> Scalar:
        r"""Return $\log q_t(x)$ in nats, for sigma > 0."""
        x, sigma, total = self._posterior(t, x)
        normaliser = x.size * (jnp.log(sigma) + 0.5 * math.log(2 * math.pi))
        return total.top + jnp.log(total.mass) - normaliser


def _sample(where: str, t: Any, x: Any, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Return the sample and its time in at least float32, or raise if they are not single ones."""
    x = floating(x)
    if x.shape != tuple(shape):
        raise _check.bad(where, "x", f"one sample of shape {tuple(shape)}", f"shape {x.shape}")
    if jnp.ndim(t) != 0:
        raise _check.bad(where, "t", "one time, (); use jax.vmap for more", jnp.shape(t))
    dtype = time_dtype(x.dtype)
    return x.astype(dtype), jnp.asarray(t, dtype)


def _process(where: str, process: Any) -> None:
    if not isinstance(process, AbstractProcess):
        raise _check.bad(where, "process", "a jaxdiff process", type(process).__name__)


def _finite(where: str, argument: str, values: Array) -> None:
    if is_concrete(values) and not np.all(np.isfinite(values)):
        raise _check.bad(where, argument, "finite", "NaN or infinity")


def _log_weights(where: str, weights: Any, n: int) -> Array:
    weights = jnp.asarray(weights, jnp.result_type(float))
    if weights.shape != (n,):
        raise _check.bad(where, "weights", f"of shape ({n},)", weights.shape)
    if is_concrete(weights) and not (np.all(weights >= 0) and 0 < float(jnp.sum(weights)) < np.inf):
        raise _check.bad(where, "weights", "not negative, finite and not all zero", weights)
    return jnp.log(weights) - jnp.log(jnp.sum(weights))


def _spectrum(
    where: str, argument: str, covs: Any, k: int, dims: tuple[int, ...]
) -> tuple[Array, Array | None]:
    """Return the eigenvalues and eigenvectors of covariances in any of the accepted shapes."""
    covs = jnp.asarray(covs, jnp.result_type(float))
    d = math.prod(dims)
    basis = None
    if covs.ndim == 0 or covs.shape in ((k,), (1,)):
        values = covs.reshape(-1, 1)
    elif covs.shape[0] in (k, 1) and covs.shape[1:] == dims:
        values = covs.reshape(covs.shape[0], d)
    elif covs.shape[0] in (k, 1) and covs.shape[1:] == (d, d):
        if is_concrete(covs) and not np.allclose(covs, jnp.swapaxes(covs, 1, 2), rtol=1e-5):
            raise _check.bad(where, argument, "symmetric", "a matrix that is not")
        values, basis = jnp.linalg.eigh(covs)
    else:
        expected = (
            f"of shape (), ({k},) isotropic, ({k}, {', '.join(map(str, dims))}) diagonal or "
            f"({k}, {d}, {d}) full, with 1 in place of {k} to share it"
        )
        raise _check.bad(where, argument, expected, covs.shape)
    if is_concrete(values) and not (np.all(np.isfinite(values)) and np.all(values >= 0)):
        raise _check.bad(where, argument, "finite and positive semidefinite", f"{values.min()}")
    return values, basis


def mixture(
    process: AbstractProcess,
    weights: Float[ArrayLike, " k"] | Sequence[Any],
    means: Float[ArrayLike, "k *dims"] | Sequence[Any],
    covs: Float[ArrayLike, "..."] | Sequence[Any],
) -> Mixture:
    r"""Build the exact denoiser of $q_0 = \sum_k \pi_k N(\mu_k, C_k)$.

    Args:
        process: the Gaussian path.
        weights: $\pi_k$, (K,), not negative; divided by their sum.
        means: $\mu_k$, (K, *dims).
        covs: covariances: `()` or `(K,)` isotropic variances, `(K, *dims)` diagonals,
            `(K, d, d)` full matrices with d = prod(dims); a leading 1 in place of K shares one.

    Raises:
        ValueError: if a shape does not fit, a weight is negative or a covariance is not positive
            semidefinite.

    Example:
        >>> from jaxdiff.process import VP
        >>> two = mixture(VP(), [0.5, 0.5], [[-1.0], [1.0]], 0.01)
        >>> bool(abs(two(0.5, jnp.zeros(1))[0]) < 1e-6)
        True
    """
    means = jnp.asarray(means, jnp.result_type(float))
    if means.ndim < 1:
        raise _check.bad("mixture", "means", "of shape (K, *dims)", means.shape)
    k = means.shape[0]
    _process("mixture", process)
    _finite("mixture", "means", means)
    values, basis = _spectrum("mixture", "covs", covs, k, means.shape[1:])
    return Mixture(process, _log_weights("mixture", weights, k), means, values, basis)


def gaussian(
    process: AbstractProcess,
    mean: Float[ArrayLike, "*dims"] | Sequence[Any],
    cov: Float[ArrayLike, "..."] | Sequence[Any],
) -> Mixture:
    r"""Build the exact denoiser of $q_0 = N(\mu, C)$: a mixture of one.

    Args:
        process: the Gaussian path.
        mean: $\mu$, (*dims,).
        cov: $C$: `()` isotropic variance, `(*dims,)` diagonal, or `(d, d)` full.

    Raises:
        ValueError: as `mixture`.
    """
    mean = jnp.asarray(mean, jnp.result_type(float))
    cov = jnp.asarray(cov, jnp.result_type(float))
    _process("gaussian", process)
    _finite("gaussian", "mean", mean)
    if cov.ndim == 0 or cov.shape == mean.shape or cov.ndim == 2:
        values, basis = _spectrum("gaussian", "cov", cov[None], 1, mean.shape)
        return Mixture(process, jnp.zeros(1, mean.dtype), mean[None], values, basis)
    raise _check.bad("gaussian", "cov", f"of shape (), {mean.shape} or (d, d)", cov.shape)


def empirical(
    process: AbstractProcess,
    data: Float[ArrayLike, "n *dims"] | Sequence[Any],
    weights: Float[ArrayLike, " n"] | Sequence[Any] | None = None,
    *,
    chunk: int = 1024,
) -> Empirical:
    r"""Build the exact denoiser of a data set: the score that a perfect memoriser would learn.

    Args:
        process: the Gaussian path.
        data: atoms $y_i$, (N, *dims).
        weights: $p_i$, (N,), not negative; equal by default.
        chunk: atoms per step of the streamed pass; memory per sample is O(chunk d).

    Raises:
        ValueError: if `data` has no atom, `weights` does not fit, or `chunk` is not positive.
    """
    _check.whole("empirical", "chunk", chunk, 1)
    _process("empirical", process)
    data = jnp.asarray(data)
    data = data if jnp.issubdtype(data.dtype, jnp.floating) else data * 1.0
    if data.ndim < 1 or data.shape[0] == 0:
        raise _check.bad("empirical", "data", "of shape (N, *dims) with N >= 1", data.shape)
    _finite("empirical", "data", data)
    n, chunk = data.shape[0], min(chunk, data.shape[0])
    log_p = _log_weights("empirical", jnp.ones(n) if weights is None else weights, n)
    pad = -n % chunk
    atoms = jnp.pad(data.reshape(n, -1), ((0, pad), (0, 0)))
    log_p = jnp.pad(log_p.astype(data.dtype), (0, pad), constant_values=-jnp.inf)
    shape = data.shape[1:]
    return Empirical(
        process, atoms.reshape(-1, chunk, atoms.shape[1]), log_p.reshape(-1, chunk), shape
    )
