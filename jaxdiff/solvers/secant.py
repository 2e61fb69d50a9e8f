r"""Steps that are exact for Gaussian data: second order from curvature, or from secants of it.

Notation: $y = x/\alpha$, $s = \sigma/\alpha$, $u = (y - m)/s^2 = -\nabla\log$ of the law of $y$.
Where the data are Gaussian with mean $\mu$ and covariance $V$,

$$ m = \mu + V u, \qquad y_1 = y_0 + h(V)\,u_0, \qquad
   h(v) = \sqrt{(v + s_1^2)(v + s_0^2)} - (v + s_0^2), $$

the PF-ODE in closed form. $h(0) = s_0(s_1 - s_0)$ is the step of DDIM, for which the data are one
atom; the rest is $h(v) - h(0) = v\,H(v)$ with

$$ H(v) = \frac{(s_0 - s_1)^2}{\sqrt{(v + s_1^2)(v + s_0^2)} + v + s_0 s_1}. $$

The slope V of m over u does not depend on time: that is what makes states at unlike noise levels
comparable, and secants $(\Delta u, \Delta m)$ along a trajectory a quasi-Newton model of it.

| solver | V | cost beside one evaluation per step |
|---|---|---|
| `Secant(k)` | through the last k differences of (u, m) | none |
| `LocalGaussian(curvature)` | $s^2 R(I - R)^{-1}$, where $R = I - \sigma^2 F$ | a curvature |
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff import _check
from jaxdiff._array import Scalar, ScalarLike, time_dtype
from jaxdiff._numerics import eigh, norm
from jaxdiff.process import AbstractProcess
from jaxdiff.solvers.engine import AbstractGridSolver, State
from jaxdiff.solvers.exponential import transfer
from jaxdiff.solvers.multistep import step_length
from jaxdiff.solvers.quadrature import history
from jaxdiff.solvers.terms import View

__all__ = ["LocalGaussian", "Secant", "bend"]


class _Span(NamedTuple):
    """One step as both solvers see it."""

    decay: Scalar  # of DDIM
    gain: Scalar
    of_x: Scalar  # u = of_x x + of_m m
    of_m: Scalar
    alpha: Scalar  # at the end
    s0: Scalar
    s1: Scalar
    live: Scalar  # 1; 0 from alpha = 0 and to sigma = 0, where the step is that of DDIM


def _span(process: AbstractProcess, ts: Array) -> _Span:
    decay, gain, _ = transfer(process, ts[1], ts[0])
    alpha, sigma, end = process.alpha(ts[1]), process.sigma(ts[1]), process.alpha(ts[0])
    s0 = jnp.asarray(sigma / jnp.where(alpha > 0, alpha, 1.0))
    s1 = process.sigma(ts[0]) / end
    live = jnp.where((alpha > 0) & (s1 > 0), 1.0, 0.0)
    of_x, of_m = alpha / sigma**2, -((alpha / sigma) ** 2)
    return _Span(decay, gain, of_x, of_m, end, s0, jnp.where(s1 > 0, s1, s0), live)


def bend(v: Array, s0: ScalarLike, s1: ScalarLike) -> Array:
    """Return H(v) of the module's head, for v above -s1^2 and s0, s1 > 0."""
    return jnp.asarray(s0 - s1) ** 2 / (jnp.sqrt((v + s1**2) * (v + s0**2)) + v + s0 * s1)


_LEAST = -0.5  # of s_1^2: H is not real below v = -s_1^2


class Secant(AbstractGridSolver):
    r"""Quasi-Newton sampling: the Gaussian step with V through the last k secants.

    $$ x_1 = \text{DDIM} + \alpha_1\,\Delta M\,c, \qquad
       c = A^{-\top} H(A^{-1} S A^{-\top})\,A^{-1}\,\Delta U^\top u_0, \qquad
       A A^\top = \Delta U^\top\Delta U, \quad S = \mathrm{sym}(\Delta U^\top\Delta M) $$

    with the columns $\Delta u_j = u_0 - u_{-j}$ and $\Delta m_j$: V maps the one to the other and
    is 0 across them. It is symmetric and positive semidefinite for Gaussian data, for which the
    step is exact once k older evaluations exist, if V has k distinct eigenvalues (and 0).

    Other laws need safeguards, which `trust=False` leaves out. Where $m$ saturates, as it does on
    separate modes, the correction is cut to the length of that of `DPMpp2M`; where the secants have
    an eigenvalue below $-s_1^2/2$, which no Gaussian has, it is that of `DPMpp2M`. With k = 1 the
    two are parallel, so the step is a DPM-Solver++(2M) that extrapolates less where the sample says
    so, in $u$ rather than in log-SNR. Differences that others explain to round-off are left out.
    Order 2 with k = 1.

    Cost: one network evaluation per step, no autodiff; 2k older arrays, O(k^2 d).

    Args:
        k: number of secants, 1 to 4. One is robust; more pay where the data are nearly Gaussian.
        trust: whether the safeguards are used. Without them more than one secant amplifies
            round-off, and any law but a Gaussian: errors grow without bound.

    Raises:
        ValueError: if `k` is out of its range.

    References:
        Our own derivation; the closed form of the PF-ODE of a Gaussian is classical.
    """

    k: int = eqx.field(static=True, default=1)
    trust: bool = eqx.field(static=True, default=True)

    def __check_init__(self) -> None:
        _check.choice("Secant", "k", self.k, (1, 2, 3, 4))

    @property
    def memory(self) -> int:
        """The older evaluations."""
        return self.k

    @property
    def claimed_order(self) -> int:
        """2 with one secant, 1 with more."""
        return 2 if self.k == 1 else 1

    def begin(self, x: Array) -> Any:
        """Return the older u, not yet there."""
        return (jnp.zeros(x.shape, time_dtype(x.dtype)),) * self.k

    def row(
        self, process: AbstractProcess, ts: Array, n: ScalarLike, left: ScalarLike
    ) -> tuple[_Span, Array, Array]:
        """Return the step, which older evaluations are there, and the weight of 2M."""
        span, used = _span(process, ts), jnp.cumprod(ts[2:] > ts[1:-1]) > 0
        lams, count = history(process, ts, 2)
        h, _ = step_length(process, ts)
        reach = span.gain * jnp.where(count > 1, h / (2 * (lams[0] - lams[1])), 0.0)
        return span, span.live * used, reach

    def advance(
        self, at: View, row: tuple[_Span, Array, Array], t: Array, x: Array, state: State
    ) -> tuple[Array, Array, Any]:
        """Step by DDIM, and add what the secants say of the curvature."""
        span, used, reach = row
        m, _ = self.outputs(at.field.denoiser, t[0], x, at.field.cond)
        older = state.extra
        u = (span.of_x * x + span.of_m * m).astype(older[0].dtype)
        flat = lambda a: a.reshape(-1).astype(u.dtype)  # noqa: E731
        of_u = jnp.stack([flat(u - old) for old in older])
        of_m = jnp.stack([flat(m - old) for old in state.history])
        c, gaussian = self._coefficients(of_u, of_m, flat(u), span, used)
        change = span.alpha * jnp.matmul(c, of_m, precision="highest")
        if self.trust:
            length, most = norm(change), reach * norm(of_m[0])
            far = length > most
            change = change * jnp.where(far, most / jnp.where(far, length, 1.0), 1.0)
            change = jnp.where(gaussian, change, reach * of_m[0])
        x1 = span.decay * x + span.gain * m + change.reshape(x.shape)
        return x1, m, (u, *older)[: self.k]

    def _coefficients(self, of_u: Array, of_m: Array, u: Array, span: _Span, used: Array) -> Any:
        """Return the weights c, (k,), and whether V could be that of a Gaussian, nearly."""
        dot = lambda a, b: jnp.matmul(a, b, precision="highest")  # noqa: E731
        size = norm(of_u)
        scale = jnp.where(size > 0, used / jnp.where(size > 0, size, 1.0), 0.0)
        unit, image = scale[:, None] * of_u, scale[:, None] * of_m
        cross = dot(unit, image.T)
        values, vectors = eigh(dot(unit, unit.T))
        kept = values > 100 * jnp.finfo(u.dtype).eps * self.k
        root = jnp.where(kept, 1 / jnp.sqrt(jnp.where(kept, values, 1.0)), 0.0)
        inverse = root[:, None] * vectors.T  # of A
        curvature, turned = eigh(dot(dot(inverse, (cross + cross.T) / 2), inverse.T))
        least = _LEAST * span.s1**2
        weights = bend(jnp.maximum(curvature, least), span.s0, span.s1)
        along = dot(turned.T, dot(inverse, dot(unit, u)))
        return scale * dot(inverse.T, dot(turned, weights * along)), jnp.all(curvature >= least)


class LocalGaussian(AbstractGridSolver):
    r"""The Gaussian step with the covariance of the data as the diffusion Fisher sees it here.

    $$ x_1 = \text{DDIM} + \alpha_1\,V H(V)\,u_0, \qquad
       V = s_0^2\,R\,\left[\max(I - R, \delta)\right]^{-1}, \qquad R = I - \sigma^2 F $$

    Newton's method for the PF-ODE: one step is exact for Gaussian data, whatever their covariance
    and however long the step. Elsewhere of order 1, since what the Fisher does not say, how it
    changes along the way, is of first order; its error is that of the change of $\mathrm{tr} F$.
    The damping $\delta$ bounds V where q is flat or convex ($R \ge 1$, between modes).

    Cost: one network evaluation and one curvature per step: with `fisher.Curvature("jvp", k)`, k
    products and their transposes. `nfe` counts the evaluation.

    Args:
        curvature: `(denoiser, t, x, cond)` -> eigenpairs of R, as `fisher.Curvature`.
        damping: $\delta$, in (0, 1].

    Raises:
        ValueError: if an argument is out of its range.

    References:
        Our own derivation.
    """

    curvature: Callable[..., Any]
    damping: float | Array = 0.05

    def __check_init__(self) -> None:
        if not callable(self.curvature) or isinstance(self.curvature, type):
            expected = "a function of (denoiser, t, x, cond), as fisher.Curvature()"
            raise _check.bad("LocalGaussian", "curvature", expected, repr(self.curvature))
        _check.number("LocalGaussian", "damping", self.damping, sys.float_info.min, 1)

    def row(self, process: AbstractProcess, ts: Array, n: ScalarLike, left: ScalarLike) -> _Span:
        """Return the ends of the step."""
        return _span(process, ts)

    def advance(
        self, at: View, row: _Span, t: Array, x: Array, state: State
    ) -> tuple[Array, Array, Any]:
        """Step by DDIM, and add what the curvature says."""
        denoiser, cond = at.field.denoiser, at.field.cond
        m, _ = self.outputs(denoiser, t[0], x, cond)
        eigen = self.curvature(denoiser, t[0], x, cond)
        r = jnp.maximum(eigen.values, 0.0)
        v = row.s0**2 * r / jnp.maximum(1 - r, self.damping)
        u = row.live * (row.of_x * x + row.of_m * m)
        inside = v * bend(v, row.s0, row.s1)
        x1 = row.decay * x + row.gain * m + row.alpha * eigen.apply(inside, 0.0 * row.s0, u)
        return x1, m, state.extra
