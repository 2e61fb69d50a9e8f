r"""Newton's method for sampling: Langevin steps preconditioned by the diffusion Fisher.

Notation: $R = Cov[\epsilon | x_t = x]$ has eigenpairs $(r_i, e_i)$, so $\sigma^2 F = I - R$ has the
eigenvalues $a_i = 1 - r_i \le 1$. With a positive definite preconditioner $P(x)$ the diffusion

$$ dX = (P\,\nabla\log q_t + \Gamma)\,d\tau + \sqrt{2P}\,dW, \qquad
   \Gamma_i = \textstyle\sum_j \partial_j P_{ij} $$

leaves $q_t$ invariant; without $\Gamma$ it does not. `Newton` takes the damped inverse of the
Fisher, under which all directions of $q_t$ relax together, however unlike their variances are;
`RankOne` the model $\delta I + \hat\epsilon\hat\epsilon^\top$ of Levenberg-Marquardt-Langevin,
which knows no direction but that of the score. Both are rules `(denoiser, t, x, z, cond) -> x` for
one step with the normals z: `solvers.Langevin` takes them after each step of a sampler,
`mcmc.newton` at a fixed time.
"""

import sys
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, ArrayLike, Float

from jaxdiff import _check, exact
from jaxdiff._array import Cond, Scalar, ScalarLike, time_dtype
from jaxdiff._numerics import eigh
from jaxdiff.fisher.atoms import neighbours
from jaxdiff.fisher.operators import (
    _noise_covariance,
    _noise_jacobian,
    _operator,
    _Scaled,
    fisher,
)
from jaxdiff.linalg.estimators import diagonal
from jaxdiff.linalg.spectrum import ritz
from jaxdiff.process import gaussian_only
from jaxdiff.score import AbstractDenoiser, floating

Products: TypeAlias = Literal["exact", "jvp", "fd", "neighbours"]


__all__ = [
    "Curvature",
    "CurvatureFn",
    "Eigen",
    "Newton",
    "Products",
    "Proposal",
    "RankOne",
    "rank_one_divergence",
]


class Eigen(NamedTuple):
    r"""Eigenpairs of a symmetric operator that vanishes on the rest of the space.

    Attributes:
        values: $r_i$, (k,).
        vectors: $e_i$, orthonormal (or 0 with value 0), (k, *dims).
    """

    values: Float[Array, " k"]
    vectors: Float[Array, "k *dims"]

    def apply(self, inside: Array, outside: Array, v: Array) -> Array:
        r"""Return $c\,v + \sum_i (g_i - c)\,e_i (e_i\cdot v)$ for `inside` g and `outside` c."""
        rows = self.vectors.reshape(len(self.values), -1)
        flat = v.reshape(-1).astype(rows.dtype)
        along = (inside - outside) * jnp.matmul(rows, flat, precision="highest")
        return (outside * flat + jnp.matmul(along, rows, precision="highest")).reshape(v.shape)


@runtime_checkable
class CurvatureFn(Protocol):
    r"""Any function from a state to the eigenpairs of its noise covariance $R = I - \sigma^2 F$."""

    def __call__(self, denoiser: AbstractDenoiser, t: ScalarLike, x: Array, cond: Any, /) -> Eigen:
        """Return the eigenpairs at time `t`, (), and state `x`, (*dims,)."""
        ...


class Curvature(eqx.Module):
    r"""Eigenpairs of the noise covariance $R = I - \sigma^2 F$ at a state, as a function of it.

    | method | rank | cost of one call |
    |---|---|---|
    | `"exact"` | None, all d; or k by Lanczos | d or k products in closed form |
    | `"jvp"` | None, or k | d forward derivatives; k forward and k reverse ones |
    | `"fd"` | None, or k | 1 + d or 1 + k network evaluations |
    | `"neighbours"` | k atoms of a data set | 2 passes over the data |

    Where all d are asked for, the matrix of a network is symmetrised; with a rank the differences
    are taken as if they were symmetric. What k leaves out is treated as $r = 0$: directions with no
    data in them. By Lanczos, k are Ritz pairs of a random start, which are the largest eigenpairs
    only once k exceeds the rank of R, or nearly. Differentiable where eigenvalues are distinct.

    Args:
        method: where products come from.
        rank: k, or None.

    Raises:
        ValueError: when called, if the denoiser does not have the method, as `fisher`.
    """

    method: Products = eqx.field(static=True, default="jvp")
    rank: int | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        _check.choice("Curvature", "method", self.method, ("exact", "jvp", "fd", "neighbours"))
        if self.rank is not None or self.method == "neighbours":
            _check.whole("Curvature", "rank", self.rank, 1)

    def __call__(
        self, denoiser: AbstractDenoiser, t: ScalarLike, x: Float[ArrayLike, "*dims"], cond: Any
    ) -> Eigen:
        """Return the eigenpairs at time `t`, (), and state `x`, (*dims,)."""
        x = floating(x)
        self._check(denoiser, x.size)
        if self.method == "neighbours":
            assert self.rank is not None  # by __check_init__
            kept = neighbours(denoiser, t, x, rank=self.rank).covariance  # type: ignore[arg-type]
            weighted = jnp.sqrt(kept.weights)[:, None] * kept.rows
            values, small = eigh(jnp.matmul(weighted, weighted.T, precision="highest"))
            seen = values > jnp.finfo(values.dtype).eps * len(values) * values[-1]
            scale = jnp.where(seen, 1 / jnp.sqrt(jnp.where(seen, values, 1.0)), 0.0)
            rows = jnp.matmul((small * scale[None]).T, weighted, precision="highest")
            return Eigen(jnp.where(seen, values, 0.0), rows.reshape(-1, *x.shape))
        if self.method == "exact":
            product = _noise_covariance(denoiser, t, x)
        else:
            both = self.method == "jvp" and self.rank is not None
            jacobian = _noise_jacobian(denoiser, t, x, cond, self.method, both)
            product = _Scaled(jacobian, 1.0, -denoiser.process.sigma(t))
        operator = _operator(product, x, lx.symmetric_tag)
        if self.rank is None:
            columns = jax.vmap(lambda v: operator.mv(v.reshape(x.shape)).reshape(-1))
            matrix = columns(jnp.eye(x.size, dtype=x.dtype)).astype(time_dtype(x.dtype))
            values, vectors = eigh((matrix + matrix.T) / 2)
            rows = vectors.T
        else:
            values, rows = ritz("Curvature", operator, self.rank, None)
        return Eigen(values, rows.reshape(-1, *x.shape))

    def _check(self, denoiser: Any, d: int) -> None:
        if not isinstance(denoiser, AbstractDenoiser):
            raise _check.bad("Curvature", "denoiser", "a jaxdiff denoiser", repr(denoiser))
        gaussian_only("Curvature", "the process of the denoiser", denoiser.process)
        kinds = {"exact": exact.AbstractExact, "neighbours": exact.Empirical}
        if not isinstance(denoiser, kinds.get(self.method, AbstractDenoiser)):
            expected = "'jvp' or 'fd': this denoiser has no closed form or is no data set"
            raise _check.bad("Curvature", "method", expected, repr(self.method))
        most, what = d, "the dimension"
        if isinstance(denoiser, exact.Empirical) and self.method == "neighbours":
            most, what = denoiser.atoms.shape[0] * denoiser.atoms.shape[1], "the number of atoms,"
        if self.rank is not None and self.rank > most:
            raise _check.bad("Curvature", "rank", f"at most {what} {most}", self.rank)


def _relaxed(z: Array) -> Array:
    r"""Return $(e^z - 1)/z$, 1 at 0."""
    small = jnp.abs(z) < 1e-6
    return jnp.where(small, 1 + z / 2, jnp.expm1(z) / jnp.where(small, 1.0, z))


class Proposal(NamedTuple):
    """The normal law of one step: its mean and the square root of its covariance.

    Attributes:
        mean: (*dims,).
        eigen: the eigenvectors of the covariance.
        inside: standard deviations along them, (k,).
        outside: standard deviation across them, ().
    """

    mean: Float[Array, "*dims"]
    eigen: Eigen
    inside: Float[Array, " k"]
    outside: Scalar

    def at(self, z: Array) -> Array:
        """Return the state that the normals `z` lead to."""
        return self.mean + self.eigen.apply(self.inside, self.outside, z)

    def log_density(self, x: Array) -> Scalar:
        """Return the log density at `x` in nats, but for a constant."""
        z = self.eigen.apply(1 / self.inside, 1 / self.outside, x - self.mean)
        rest = x.size - len(self.inside)
        return -0.5 * jnp.sum(z**2) - jnp.sum(jnp.log(self.inside)) - rest * jnp.log(self.outside)


class Newton(eqx.Module):
    r"""One step of Langevin, preconditioned by the damped inverse of the diffusion Fisher.

    $$ P = \sigma^2\left((\sigma^2 F)^2 + \delta^2 I\right)^{-1/2}, \qquad
       x' = x + h\left[P\,\varphi(-hPF)\,\nabla\log q_t + \Gamma\right]
              + \sqrt{2h\,P\,\varphi(-2hPF)}\,z, \qquad \varphi(y) = \frac{e^y - 1}{y} $$

    as functions of the symmetric matrix F. Where F is positive, P is
    $\sigma^2(\sigma^2 F + \delta I)^{-1}$ within a factor of $\sqrt2$; between modes, where F has
    negative directions, it stays positive definite and smooth. With the exponential integrator and
    F constant in space, the step is the exact solution: a Gaussian is sampled without bias whatever
    `h`. The Euler integrator has $\varphi = 1$.

    $\Gamma$ is estimated by one difference along the normals that also drive the step, with an
    error of $O(\varepsilon^2)$ in the mean, $\varepsilon = \sigma/100$:
    $\Gamma \approx [P(x + \varepsilon z) - P(x - \varepsilon z)]\,z/(2\varepsilon)$. It is an even
    function of z, so uncorrelated with the noise.

    Small $\delta$ makes all directions equally fast, and P vary over distances of about
    $\delta\sigma$ where F changes its sign, which `h` has to resolve. On log-concave laws 0.01 is
    good. On a mixture whose modes are near each other compared with $\sigma$ the bias of the
    moments was 1% to 4% of their spread at $\delta = 0.5$ with h of 0.05 to 0.2, but larger than
    the spread itself at $\delta = 0.1$ with h of 0.2: there use the Metropolis rule of
    `mcmc.newton`, which has no bias whatever $\delta$ and h.

    Cost: a score, one curvature and, with `correct`, two more; eigenvectors in $O(d^3)$, or
    $O(k^2 d)$ with a rank.

    Args:
        curvature: where F comes from, any function `(denoiser, t, x, cond) -> Eigen`; all of it by
            default, by forward derivatives.
        step_size: h, positive.
        damping: least $\delta$, in units of $\sigma^2 F$ where there are no data; positive.
        condition: bound K on the condition number of P (more than 1). Damping and step are then
            adapted to the largest and least |eigenvalue| a and b of $\sigma^2 F$ at the state:
            $\delta^2$ is raised to $(a^2 - K^2 b^2)/(K^2 - 1)$, and `h` counts relaxation times of
            the fastest direction. None for neither.
        correct: whether $\Gamma$ is added. Without it the law is biased wherever F varies.
        integrator: `"exponential"` or `"euler"`.

    Raises:
        ValueError: if an argument is out of its range.

    References:
        Girolami, Calderhead 2011, "Riemann manifold Langevin and Hamiltonian Monte Carlo methods";
        Betancourt 2013 (1212.4693) for a smooth absolute value; Ozaki 1992 for the integrator; Wang
        et al. 2025 (2505.24222) for the damped inverse in diffusion models.
    """

    curvature: CurvatureFn = Curvature()
    step_size: float | Array = 0.1
    damping: float | Array = 0.5
    condition: float | Array | None = None
    correct: bool = eqx.field(static=True, default=True)
    integrator: Literal["exponential", "euler"] = eqx.field(static=True, default="exponential")

    def __check_init__(self) -> None:
        tiny, huge = sys.float_info.min, sys.float_info.max
        if not isinstance(self.curvature, CurvatureFn) or isinstance(self.curvature, type):
            expected = "a function of (denoiser, t, x, cond), as fisher.Curvature()"
            raise _check.bad("Newton", "curvature", expected, repr(self.curvature))
        _check.number("Newton", "step_size", self.step_size, tiny, huge)
        _check.number("Newton", "damping", self.damping, tiny, huge)
        if self.condition is not None:
            _check.number("Newton", "condition", self.condition, 1 + 1e-6, huge)
        _check.choice("Newton", "integrator", self.integrator, ("exponential", "euler"))

    def _scales(self, eigen: Eigen, d: int) -> tuple[Array, Array]:
        r"""Return the eigenvalues of $\sigma^2 F$ and $P/\sigma^2$, of the rest at the end."""
        a = jnp.append(1 - eigen.values, 1.0)
        square, delta = a**2, jnp.asarray(self.damping, a.dtype) ** 2
        if self.condition is None:
            return a, 1 / jnp.sqrt(square + delta)
        seen = square if len(eigen.values) < d else square[:-1]
        high, low, bound = jnp.max(seen), jnp.min(seen), jnp.asarray(self.condition, a.dtype) ** 2
        delta = jnp.maximum(delta, (high - bound * low) / (bound - 1))
        floor = jnp.asarray(self.damping, a.dtype) ** 2  # of the scale, where all of F vanishes
        return a, jnp.sqrt((high + delta) / ((high + floor) * (square + delta)))

    def proposal(
        self, denoiser: AbstractDenoiser, t: ScalarLike, x: Float[Array, "*dims"], cond: Cond = None
    ) -> Proposal:
        r"""Return the law of the step from `x`, (*dims,), without $\Gamma$."""
        return self._proposal(denoiser, t, x, cond, self.curvature(denoiser, t, x, cond))

    def _proposal(self, denoiser: Any, t: Any, x: Array, cond: Cond, eigen: Eigen) -> Proposal:
        sigma, h = denoiser.process.sigma(t), self.step_size
        a, p = self._scales(eigen, x.size)
        rate = h * a * p if self.integrator == "exponential" else 0 * a
        drift = h * sigma**2 * p * _relaxed(-rate)
        deviation = sigma * jnp.sqrt(2 * h * p * _relaxed(-2 * rate))
        mean = x + eigen.apply(drift[:-1], drift[-1], denoiser.score(t, x, cond))
        return Proposal(mean, eigen, deviation[:-1], deviation[-1])

    def __call__(
        self,
        denoiser: AbstractDenoiser,
        t: ScalarLike,
        x: Float[Array, "*dims"],
        z: Float[Array, "*dims"],
        cond: Cond = None,
    ) -> Float[Array, "*dims"]:
        """Return the next state from `x`, with the standard normals `z`, both (*dims,)."""
        dtype, wide = x.dtype, time_dtype(x.dtype)  # half precision has no room for a difference
        x, z = x.astype(wide), z.astype(wide)
        if not self.correct:
            return self.proposal(denoiser, t, x, cond).at(z).astype(dtype)
        sigma = denoiser.process.sigma(t)
        epsilon = sigma / 100

        def preconditioned(eigen: Eigen) -> Array:
            _, p = self._scales(eigen, x.size)
            return sigma**2 * eigen.apply(p[:-1], p[-1], z)

        points = jnp.stack([x, x + epsilon * z, x - epsilon * z]).astype(wide)
        eigens = jax.vmap(lambda x: self.curvature(denoiser, t, x, cond))(points)
        here, above, below = (jax.tree.map(lambda a, i=i: a[i], eigens) for i in range(3))
        change = preconditioned(above) - preconditioned(below)
        y = self._proposal(denoiser, t, x, cond, here).at(z)
        return (y + self.step_size * change / (2 * epsilon)).astype(dtype)


def rank_one_divergence(
    u: Float[Array, "*dims"],
    product: Float[Array, "*dims"],
    trace: ScalarLike,
    sigma: ScalarLike,
    damping: ScalarLike,
) -> Float[Array, "*dims"]:
    r"""Return $\Gamma = \mathrm{div}\,P$ of the rank-one preconditioner with $u = \hat\epsilon$.

    $$ P = I - \frac{u u^\top}{\delta + n}, \qquad
       \Gamma = -\sigma\,\frac{F u + \mathrm{tr}(F)\,u}{\delta + n}
                + 2\sigma\,\frac{u\,(u^\top F u)}{(\delta + n)^2}, \qquad n = |u|^2, $$

    since $\partial\hat\epsilon/\partial x = \sigma F$: no derivative but one product and a trace.

    Args:
        u: noise prediction, (*dims,).
        product: $F u$, (*dims,).
        trace: $\mathrm{tr}\,F$, ().
        sigma: $\sigma(t)$, ().
        damping: $\delta$, ().

    References:
        Our own derivation, for the preconditioner of Wang et al. 2025 (2505.24222).
    """
    total = damping + jnp.sum(u**2)
    along = jnp.sum(u * product)
    return jnp.asarray(-sigma * (product + trace * u) / total + 2 * sigma * u * along / total**2)


class RankOne(eqx.Module):
    r"""One Langevin step preconditioned by the rank-one model of the Hessian, with its correction.

    $$ P = I - \frac{u u^\top}{\delta + n}, \quad u = \hat\epsilon, \qquad
       x' = x + h\sigma^2\,(P\,\nabla\log q_t + \Gamma) + \sigma\sqrt{2hP}\,z $$

    with $\Gamma$ of `rank_one_divergence`. P has the eigenvalue 1 across $\hat\epsilon$ and
    $\delta/(\delta + n)$ along it: it slows the one direction that the score already has, and was
    never measured to be faster than $\delta = \infty$, which is plain Langevin. It is here to be
    compared with `Newton`.

    Cost: a score, one product with F and its trace: d more products, or closed form.

    Args:
        step_size: h, the step in units of $\sigma^2$, positive.
        damping: $\delta$, positive.
        method: of `fisher`, `"exact"`, `"jvp"` or `"fd"`.

    Raises:
        ValueError: if an argument is out of its range.

    References:
        Wang et al. 2025 (2505.24222).
    """

    step_size: float | Array = 0.1
    damping: float | Array = 1.0
    method: Literal["exact", "jvp", "fd"] = eqx.field(static=True, default="jvp")

    def __check_init__(self) -> None:
        for name in ("step_size", "damping"):
            low, high = sys.float_info.min, sys.float_info.max
            _check.number("RankOne", name, getattr(self, name), low, high)
        _check.choice("RankOne", "method", self.method, ("exact", "jvp", "fd"))

    def __call__(
        self,
        denoiser: AbstractDenoiser,
        t: ScalarLike,
        x: Float[Array, "*dims"],
        z: Float[Array, "*dims"],
        cond: Cond = None,
    ) -> Float[Array, "*dims"]:
        """Return the next state from `x`, with the standard normals `z`, both (*dims,)."""
        sigma, h, delta = denoiser.process.sigma(t), self.step_size, self.damping
        operator = fisher(denoiser, t, x, cond, method=self.method)
        u = denoiser.eps(t, x, cond)
        n, trace = jnp.sum(u**2), jnp.sum(diagonal(operator)[0])
        gamma = rank_one_divergence(u, operator.mv(u), trace, sigma, delta)
        kept = delta / (delta + n)
        along: Scalar = jnp.sum(u * z) / jnp.where(n > 0, n, 1.0)
        noise = z - u * along * (1 - jnp.sqrt(kept))
        step = h * sigma**2 * (-kept * u / sigma + gamma) + sigma * jnp.sqrt(2 * h) * noise
        return (x + step).astype(x.dtype)
