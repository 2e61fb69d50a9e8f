r"""PFGM++: Poisson flow with $D$ augmented dimensions, a heavy-tailed relative of `EDM`.

Notation: $N$ data dimensions, $r = \sigma\sqrt D$, time $t = \sigma$. Data $y$ are blurred by

$$ p_r(x | y) \propto (|x - y|^2 + r^2)^{-(N+D)/2}, $$

a Student t law with $D$ degrees of freedom and scale $\sigma$: $x = y + \sigma\,z/\sqrt w$ with
$z \sim N(0, I)$ and $w \sim \Gamma(D/2)/(D/2)$. It tends to the Gaussian of `EDM` as
$D \to \infty$, with an error of order $1/D$. With $m = E[y | x]$ under this kernel and
$\hat\epsilon = (x - m)/\sigma$, the field lines of the Poisson field of the data obey

$$ \frac{dx}{dr} = \frac{x - m}{r} \quad\Longleftrightarrow\quad
   \frac{dx}{d\sigma} = \hat\epsilon, $$

the PF-ODE of `EDM`: every deterministic solver, the likelihood by a derivative of the network, and
networks of every prediction but `"score"` work on the process `PFGMpp` as they are. What does not
carry over is $-\hat\epsilon/\sigma$ as a score, and with it the reverse SDE, Langevin corrections,
Fisher information and the closed forms of `jaxdiff.exact`: all would hold up to $O(1/D)$ only, and
are refused. `Empirical.score` is the true one, and a target of `jaxdiff.particles`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.scipy.special import betaln, gammaln
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, Real

from jaxdiff import _check, exact, streaming
from jaxdiff._array import Cond, Scalar, ScalarLike, time_dtype
from jaxdiff._host import host64, is_concrete
from jaxdiff.process import EDM
from jaxdiff.score import AbstractDenoiser, floating

__all__ = ["Empirical", "PFGMpp", "empirical"]


def _log_constant(D: ScalarLike, n: int) -> Scalar:
    r"""Return $\log[\Gamma(\tfrac{n+D}2)/\Gamma(\tfrac D2)] - \tfrac n2\log(\pi D)$."""
    # betaln keeps the ratio where the two log-gammas, each huge, would cancel.
    D = jnp.asarray(D, jnp.result_type(D, float))
    ratio = gammaln(jnp.asarray(n / 2, D.dtype)) - betaln(n / 2, D / 2)
    return jnp.asarray(ratio - n / 2 * jnp.log(math.pi * D))


class PFGMpp(EDM):
    r"""The process of PFGM++: `EDM` with a Student t kernel of `D` degrees of freedom.

    $$ x_t = x_0 + \sigma\,\epsilon, \qquad \epsilon = z/\sqrt w, \qquad
       E|\epsilon|^2 = \frac{N D}{D - 2} \ (D > 2) $$

    Small D is robust to errors of the network, large D is easy to train. Hyper-parameters of `EDM`
    carry over at equal sigma. The bound of `leak` holds as it is, since the kernel is a mixture of
    Gaussians with $E\,w = 1$.

    Attributes:
        D: number of augmented dimensions, positive, not necessarily whole.
        sigma_min: smallest time.
        sigma_max: largest time.

    Raises:
        ValueError: if `D` is not positive and finite.

    Example:
        >>> PFGMpp(D=128).grid(2).round(3).tolist()
        [80.0, 2.515, 0.002]

    References:
        Xu et al. 2023 (2302.04265), eq. 5 to 8 and section 3.2.
    """

    has_sde: ClassVar[bool] = False
    kernel: ClassVar[str] = "student"

    D: ScalarLike = eqx.field(kw_only=True)

    def __check_init__(self) -> None:
        if is_concrete(self.D) and not 0 < float(self.D) < math.inf:
            raise _check.bad("PFGMpp", "D", "positive and finite", repr(self.D))

    def r(self, t: ScalarLike) -> Scalar:
        r"""Return the augmented coordinate $r = \sigma\sqrt D$."""
        return self.sigma(t) * jnp.sqrt(self.D)

    def _stretch(self, key: PRNGKeyArray, dtype: Any) -> Array:
        r"""Draw $1/\sqrt w$. Nothing is clipped: $\log w$ is drawn, not $w$."""
        half = jnp.asarray(self.D, time_dtype(dtype)) / 2
        return jnp.exp((jnp.log(half) - jax.random.loggamma(key, half, (), half.dtype)) / 2)

    def noise(
        self, key: PRNGKeyArray, shape: tuple[int, ...], *, dtype: Any = None
    ) -> Float[Array, "*dims"]:
        r"""Draw the heavy-tailed $\epsilon = z/\sqrt w$, by one normal and one gamma draw.

        A network that regresses $\epsilon$, or $x_0$, learns $\hat\epsilon$, or $m$.
        """
        normal, mixing = jax.random.split(key)
        z = super().noise(normal, shape, dtype=dtype)
        return (self._stretch(mixing, z.dtype) * z).astype(z.dtype)

    def prior(
        self, key: PRNGKeyArray, shape: tuple[int, ...], *, t: Any = None, dtype: Any = None
    ) -> Float[Array, "*dims"]:
        """Draw from the kernel centred at 0, at `t_max` by default."""
        normal, mixing = jax.random.split(key)
        z = super().prior(normal, shape, t=t, dtype=dtype)
        return (self._stretch(mixing, z.dtype) * z).astype(z.dtype)

    def prior_log_prob(
        self, x: Float[ArrayLike, "*dims"], *, t: ScalarLike | None = None
    ) -> Scalar:
        r"""Return the log density of the kernel centred at 0, in nats, at `t_max` by default.

        $$ \log\frac{\Gamma(\frac{N+D}2)}{\Gamma(\frac D2)\,(\pi D)^{N/2}\sigma^N}
           - \frac{N+D}2\log\left(1 + \frac{|x|^2}{D\sigma^2}\right) $$
        """
        x = floating(x)
        wide, n = x.astype(time_dtype(x.dtype)), x.size
        sigma = jnp.asarray(self.sigma(self.t_max if t is None else t), wide.dtype)
        tail = _log_tail(self.D, n, jnp.sum((wide / sigma) ** 2))
        constant = jnp.asarray(host64(_log_constant, self.D, n), wide.dtype)
        return (tail + constant - n * jnp.log(sigma)).astype(x.dtype)


def _log_tail(D: ScalarLike, n: int, squares: Array) -> Array:
    r"""Return $-\tfrac{n+D}2\log(1 + |\epsilon|^2/D)$."""
    D = jnp.asarray(D, squares.dtype)
    return -(n + D) / 2 * jnp.log1p(squares / D)


class Empirical(AbstractDenoiser):
    r"""Exact denoiser of a data set under the kernel of PFGM++: build it with `empirical`.

    $$ m = \sum_i w_i y_i, \qquad w_i \propto p_i\,(|x - y_i|^2 + r^2)^{-(N+D)/2} $$

    Cost: one streamed pass over the data by differences, O(N d); memory O(chunk d).

    Attributes:
        process: the process, which holds `D`.
        atoms, log_weights, centre, shape: as in `jaxdiff.exact.Empirical`.
    """

    process: PFGMpp
    atoms: Real[Array, "chunks chunk d"]
    log_weights: Float[Array, "chunks chunk"]
    centre: Float[Array, " d"]
    shape: tuple[int, ...] = eqx.field(static=True)

    @property
    def needs_noise(self) -> bool:
        """True: at sigma = 0 every point is an atom or has no probability."""
        return True

    def _moments(self, t: ScalarLike, x: Array) -> tuple[streaming.Moments, Array]:
        """Return mass and mean of the centred data, and centred x."""
        if x.shape != self.shape:
            raise _check.bad("empirical", "x", f"one sample of shape {self.shape}", x.shape)
        dtype = time_dtype(x.dtype)
        sigma, D = self.process.sigma(jnp.asarray(t, dtype)), jnp.asarray(self.process.D, dtype)
        flat = x.reshape(-1).astype(dtype) - self.centre.astype(dtype)
        start = streaming.nothing(1.0, sigma, flat, jnp.zeros((0, flat.size), dtype))

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def add(total: streaming.Moments, piece: tuple[Array, Array]) -> Any:
            atoms, log_p = streaming.widen(piece[0], dtype), piece[1].astype(dtype)
            squares = jnp.sum(((flat[None] - atoms) / sigma) ** 2, axis=-1)
            logits = log_p + _log_tail(D, flat.size, squares)
            top = jax.lax.stop_gradient(jnp.max(logits))
            weights = jnp.exp(logits - jnp.where(jnp.isfinite(top), top, 0))
            mass = jnp.sum(weights)
            shares = weights / jnp.where(mass > 0, mass, 1)  # a chunk may have no weight at all
            mean = jnp.matmul(shares, atoms, precision="highest")
            return streaming.merge(total, start._replace(top=top, mass=mass, mean=mean)), None

        return jax.lax.scan(add, start, (self.atoms, self.log_weights))[0], flat

    def pair(
        self, t: ScalarLike, x: Float[ArrayLike, "*dims"], cond: Cond = None
    ) -> tuple[Float[Array, "*dims"], Float[Array, "*dims"]]:
        r"""Return $(m, \hat\epsilon)$ from one pass over the data."""
        x = floating(x)
        total, flat = self._moments(t, x)
        eps = (flat - total.mean) / self.process.sigma(jnp.asarray(t, flat.dtype))
        m = total.mean + self.centre.astype(flat.dtype)
        return m.reshape(x.shape).astype(x.dtype), eps.reshape(x.shape).astype(x.dtype)

    def score(
        self, t: ScalarLike, x: Float[ArrayLike, "*dims"], cond: Cond = None
    ) -> Float[Array, "*dims"]:
        r"""Return $\nabla\log p_r(x)$: not $-\hat\epsilon/\sigma$, which it tends to as D grows."""
        return jax.grad(self.log_density, argnums=1)(t, floating(x))

    def log_density(self, t: ScalarLike, x: Float[ArrayLike, "*dims"]) -> Scalar:
        r"""Return $\log p_r(x)$ in nats, the density of data blurred by the kernel."""
        total, flat = self._moments(t, floating(x))
        constant = jnp.asarray(host64(_log_constant, self.process.D, flat.size), flat.dtype)
        sigma = self.process.sigma(jnp.asarray(t, flat.dtype))
        return jnp.asarray(total.log_mass + constant - flat.size * jnp.log(sigma))


def empirical(
    process: PFGMpp,
    data: Float[ArrayLike, "n *dims"] | Sequence[Any],
    weights: Float[ArrayLike, " n"] | Sequence[Any] | None = None,
    *,
    chunk: int = 1024,
) -> Empirical:
    r"""Build the exact denoiser of a data set under the kernel of PFGM++.

    Args:
        process: the process.
        data: atoms $y_i$, (N, *dims).
        weights: $p_i$, (N,), not negative; equal by default.
        chunk: atoms per step of the streamed pass; memory per sample is O(chunk d).

    Raises:
        ValueError: if `process` is no `PFGMpp`, or as `jaxdiff.exact.empirical`.

    Example:
        >>> two = empirical(PFGMpp(D=8), [[-1.0], [1.0]])
        >>> two(1.0, jnp.zeros(1)).tolist()
        [0.0]
    """
    if not isinstance(process, PFGMpp):
        raise _check.bad("pfgm.empirical", "process", "a PFGMpp", type(process).__name__)
    return Empirical(process, *exact.atoms_of("empirical", data, weights, chunk))
