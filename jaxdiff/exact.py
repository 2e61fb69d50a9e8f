r"""Closed-form denoisers: Gaussian, mixture of Gaussians, and the Dirac mixture of a data set.

They are the ground truth of every test and benchmark, and good starting points for theory: no
network, no training, exact scores and densities at every noise level.
"""

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Real

from jaxdiff import _check, streaming
from jaxdiff._array import Cond, Scalar, ScalarLike, time_dtype
from jaxdiff._host import is_concrete
from jaxdiff.process import AbstractProcess, gaussian_only
from jaxdiff.score import AbstractDenoiser, floating

__all__ = [
    "AbstractExact",
    "Empirical",
    "Mixture",
    "Posterior",
    "atoms_of",
    "empirical",
    "gaussian",
    "log_weights",
    "mixture",
]


class Posterior(NamedTuple):
    r"""What is known of $x_0$ given $x_t = x$.

    Attributes:
        log_density: $\log q_t(x)$ in nats, ().
        mean: $m = E[x_0 | x_t]$, (*dims,).
        eps: $\hat\epsilon = E[\epsilon | x_t]$, (*dims,).
        residual: $r = \mathrm{tr}\,Cov[\epsilon | x_t] = d - \sigma^2\,\mathrm{tr}\,F$, ().
        products: $C v = Cov[x_0 | x_t]\,v$ of every direction asked for, (k, *dims).
    """

    log_density: Scalar
    mean: Float[Array, "*dims"]
    eps: Float[Array, "*dims"]
    residual: Scalar
    products: Float[Array, "k *dims"]


class AbstractExact(AbstractDenoiser):
    """A denoiser whose diffused density is known as well, and its second derivatives.

    Raises:
        ValueError: if the kernel of the process is not Gaussian.
    """

    def __check_init__(self) -> None:
        _process(type(self).__name__.lower(), self.process)

    @abc.abstractmethod
    def log_density(self, t: ScalarLike, x: Float[ArrayLike, "*dims"]) -> Scalar:
        r"""Return $\log q_t(x)$ in nats; its gradient is `score`."""

    @abc.abstractmethod
    def posterior(
        self,
        t: ScalarLike,
        x: Float[ArrayLike, "*dims"],
        vs: Float[ArrayLike, "k *dims"] | None = None,
    ) -> Posterior:
        r"""Return density, mean, residual trace and covariance products together.

        $$ r = E|\epsilon - \hat\epsilon|^2, \qquad C v = E[(x_0 - m)\,(x_0 - m)\cdot v] $$

        By sums of centred outer products: no derivative, no difference of raw second moments.

        Args:
            t: time with sigma > 0, ().
            x: noisy sample, (*dims,).
            vs: directions, (k, *dims); none by default.
        """

    @abc.abstractmethod
    def noise_covariance(
        self, t: ScalarLike, x: Float[ArrayLike, "*dims"]
    ) -> Callable[[Array], Array]:
        r"""Return $v \mapsto R v$ with $R = Cov[\epsilon | x_t = x]$, a pytree callable."""


class _MixtureCovariance(eqx.Module):
    r"""$v \mapsto$ covariance times $v$: within the components, and between their means."""

    weights: Array  # (K,)
    within: Array  # (K, d), the diagonals of the covariances in the eigenbasis of C_k
    between: Array  # (K, d), the means of the components less that of all
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

    def trace(self) -> Scalar:
        """Return the trace: nothing to multiply."""
        return jnp.sum(self.weights[:, None] * (self.within + self.between**2))


class _EmpiricalNoise(eqx.Module):
    """$R v$ of a data set, by a streamed pass."""

    denoiser: "Empirical"
    t: Any
    x: Array

    def __call__(self, v: Array) -> Array:
        total, *_ = self.denoiser.summarise(self.t, self.x, v[None])
        return (total.ratio * total.products[0]).reshape(v.shape).astype(v.dtype)


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

    @property
    def needs_noise(self) -> bool:
        """Whether a covariance is singular; False where the variances are traced."""
        return is_concrete(self.variances) and bool(np.any(np.asarray(self.variances) == 0))

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

    def _covariance(self, t: ScalarLike, x: Any, of_noise: bool) -> _MixtureCovariance:
        _, alpha, sigma, mu, precise, c, logits = self._parts(t, x)
        w, basis = jax.nn.softmax(logits), self.basis
        variances = (alpha**2 if of_noise else sigma**2) * c / (alpha**2 * c + sigma**2)
        means = sigma * precise if of_noise else alpha * c * precise
        if basis is not None:
            basis = basis.astype(mu.dtype)
            means = jnp.einsum("kij,kj->ki", basis, means, precision="highest")
            basis = jnp.broadcast_to(basis, (len(mu), *basis.shape[1:]))
        means = means if of_noise else mu + means
        mean = jnp.matmul(w, means, precision="highest")
        within = jnp.broadcast_to(variances, mu.shape)
        return _MixtureCovariance(w, within, means - mean[None], basis)

    def noise_covariance(
        self, t: ScalarLike, x: Float[ArrayLike, "*dims"]
    ) -> Callable[[Array], Array]:
        r"""Return $v \mapsto \sum_k w_k[\alpha^2 C_k S_k^{-1} v + \delta_k(\delta_k\cdot v)]$.

        With $\delta_k = \sigma S_k^{-1} z_k - \hat\epsilon$, the mean noise of a component less
        that of all. Cost of a product: O(K d), or O(K d^2) with full covariances.
        """
        return self._covariance(t, x, of_noise=True)

    def posterior(
        self,
        t: ScalarLike,
        x: Float[ArrayLike, "*dims"],
        vs: Float[ArrayLike, "k *dims"] | None = None,
    ) -> Posterior:
        r"""Return everything by sums over the components: see `AbstractExact.posterior`.

        $$ C = \sum_k w_k\left[\sigma^2 C_k S_k^{-1} + (m_k - m)(m_k - m)^\top\right] $$
        """
        x = floating(x)
        vs = _directions("mixture", vs, x)
        products = jax.vmap(self._covariance(t, x, of_noise=False))(vs)
        residual = self._covariance(t, x, of_noise=True).trace()
        return Posterior(self.log_density(t, x), *self.pair(t, x), residual, products)

    def log_density(self, t: ScalarLike, x: Float[ArrayLike, "*dims"]) -> Scalar:
        r"""Return $\log q_t(x)$ in nats."""
        x, *_, logits = self._parts(t, x)
        return jax.nn.logsumexp(logits) - 0.5 * x.size * math.log(2 * math.pi)


class Empirical(AbstractExact):
    r"""Exact denoiser of a data set: build it with `empirical`.

    $$ q_0 = \sum_i p_i\,\delta_{y_i}, \qquad m = \sum_i w_i y_i, \qquad
       w_i \propto p_i\,e^{-|x - \alpha y_i|^2 / 2\sigma^2} $$

    Cost: one streamed pass over the data, O(N d), whatever is asked for; memory O(chunk d). Under
    `jax.vmap` over `x` a pass is made of matrix products; see `jaxdiff.streaming`.

    Attributes:
        process: the Gaussian path.
        atoms: the data less `centre`, in equal chunks, (chunks, chunk, d); bfloat16 as its bits,
            see `streaming.widen`.
        log_weights: $\log p_i$, (chunks, chunk), `-inf` on padding.
        centre: what was subtracted from the data, so that less is rounded off, (d,).
        shape: shape of one sample.
    """

    process: AbstractProcess
    atoms: Real[Array, "chunks chunk d"]
    log_weights: Float[Array, "chunks chunk"]
    centre: Float[Array, " d"]
    shape: tuple[int, ...] = eqx.field(static=True)

    @property
    def needs_noise(self) -> bool:
        """True: at sigma = 0 every point is an atom or has no probability."""
        return True

    def summarise(
        self,
        t: ScalarLike,
        x: Float[ArrayLike, "*dims"],
        vs: Float[ArrayLike, "k *dims"] | None = None,
    ) -> tuple[streaming.Moments, Float[Array, " d"], Float[Array, " d"]]:
        r"""Return the moments of the centred data, with $m$ and $\hat\epsilon$, flat."""
        x, t = _sample("empirical", t, x, self.shape)
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        directions = _directions("empirical", vs, x).reshape(-1, x.size).astype(x.dtype)
        centre = self.centre.astype(x.dtype)
        flat = x.reshape(-1) - alpha * centre
        total = streaming.known(self.moments(alpha, sigma, flat, directions))
        return total, total.mean + centre, (flat - alpha * total.mean) / sigma

    def moments(self, alpha: Scalar, sigma: Scalar, x: Array, vs: Array) -> streaming.Moments:
        """Pass over the data: the summary of all atoms at a centred sample, (d,)."""
        return streaming.pass_over(alpha, sigma, x, vs, self.atoms, self.log_weights)

    def pair(
        self, t: ScalarLike, x: Float[ArrayLike, "*dims"], cond: Cond = None
    ) -> tuple[Float[Array, "*dims"], Float[Array, "*dims"]]:
        r"""Return $(m, \hat\epsilon)$ from one pass over the data."""
        x = floating(x)
        _, m, eps = self.summarise(t, x)
        return m.reshape(x.shape).astype(x.dtype), eps.reshape(x.shape).astype(x.dtype)

    def noise_covariance(
        self, t: ScalarLike, x: Float[ArrayLike, "*dims"]
    ) -> Callable[[Array], Array]:
        r"""Return $v \mapsto \sum_i w_i\,\delta_i(\delta_i\cdot v)$.

        With $\delta_i = (x - \alpha y_i)/\sigma - \hat\epsilon$. Cost of a product: one pass.
        """
        return _EmpiricalNoise(self, t, floating(x))

    def posterior(
        self,
        t: ScalarLike,
        x: Float[ArrayLike, "*dims"],
        vs: Float[ArrayLike, "k *dims"] | None = None,
    ) -> Posterior:
        """Return everything from one pass over the data: see `AbstractExact.posterior`."""
        x = floating(x)
        total, *pair = self.summarise(t, x, vs)
        m, eps = (a.reshape(x.shape).astype(x.dtype) for a in pair)
        products = total.products.reshape(-1, *x.shape).astype(x.dtype)
        log_density = self._log_density(total, self._sigma(t, x))
        return Posterior(log_density, m, eps, total.residual, products)

    def log_density(self, t: ScalarLike, x: Float[ArrayLike, "*dims"]) -> Scalar:
        r"""Return $\log q_t(x)$ in nats, for sigma > 0."""
        return self._log_density(self.summarise(t, x)[0], self._sigma(t, floating(x)))

    def _sigma(self, t: ScalarLike, x: Array) -> Scalar:
        return self.process.sigma(jnp.asarray(t, time_dtype(x.dtype)))

    def _log_density(self, total: streaming.Moments, sigma: Scalar) -> Scalar:
        return total.log_mass - total.mean.size * (jnp.log(sigma) + 0.5 * math.log(2 * math.pi))


def _directions(where: str, vs: Any, x: Array) -> Array:
    """Return the directions of covariance products, (k, *dims), or raise if they do not fit x."""
    vs = jnp.zeros((0, *x.shape), x.dtype) if vs is None else floating(vs)
    if vs.shape[1:] != x.shape:
        raise _check.bad(where, "vs", f"of shape (k, *{x.shape})", f"shape {vs.shape}")
    return vs


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
    instead = "the exact denoiser of data under PFGM++ is pfgm.empirical"
    gaussian_only(f"exact.{where}", "process", process, instead)


def _finite(where: str, argument: str, values: Array) -> None:
    if is_concrete(values) and not np.all(np.isfinite(values)):
        raise _check.bad(where, argument, "finite", "NaN or infinity")


def log_weights(where: str, weights: Any, n: int) -> Array:
    """Return the logarithms of weights, divided by their sum, or raise if they are none."""
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
        tiny = 10 * d * jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values))
        values = jnp.where(jnp.abs(values) <= tiny, 0, values)  # the round-off of a zero
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
        ValueError: if a shape does not fit, a weight is negative, a covariance is not positive
            semidefinite or the kernel of the process is not Gaussian.

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
    return Mixture(process, log_weights("mixture", weights, k), means, values, basis)


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
        ValueError: if `data` has no atom, `weights` does not fit, `chunk` is not positive, or the
            kernel of the process is not Gaussian (`jaxdiff.pfgm.empirical` is for PFGM++).
    """
    _process("empirical", process)
    return Empirical(process, *atoms_of("empirical", data, weights, chunk))


def atoms_of(
    where: str, data: Any, weights: Any, chunk: Any
) -> tuple[Array, Array, Array, tuple[int, ...]]:
    """Return the fields of an `Empirical` that follow its process, or raise if data do not fit."""
    _check.whole(where, "chunk", chunk, 1)
    data = jnp.asarray(data)
    data = data if jnp.issubdtype(data.dtype, jnp.floating) else data * 1.0
    if data.ndim < 1 or data.shape[0] == 0:
        raise _check.bad(where, "data", "of shape (N, *dims) with N >= 1", data.shape)
    _finite(where, "data", data)
    n, chunk = data.shape[0], min(chunk, data.shape[0])
    log_p = log_weights(where, jnp.ones(n) if weights is None else weights, n)
    pad = -n % chunk
    atoms = data.reshape(n, -1)
    centre = jnp.mean(atoms.astype(time_dtype(data.dtype)), axis=0)
    spread = jnp.mean(jnp.sum((atoms - centre[None]) ** 2, axis=-1))
    # Centring rounds the data, by less than the round-off that it saves only if they lie far off;
    # in 16 bits it would change them.
    far = (jnp.sum(centre**2) > spread) & (jnp.finfo(data.dtype).bits >= 32)
    centre = jnp.where(far, centre, 0)
    atoms = jnp.pad(atoms - centre[None].astype(data.dtype), ((0, pad), (0, 0)))
    if atoms.dtype == jnp.bfloat16:
        atoms = jax.lax.bitcast_convert_type(atoms, jnp.uint16)
    log_p = jnp.pad(log_p.astype(centre.dtype), (0, pad), constant_values=-jnp.inf)
    atoms = atoms.reshape(-1, chunk, atoms.shape[1])
    return atoms, log_p.reshape(-1, chunk), centre, data.shape[1:]
