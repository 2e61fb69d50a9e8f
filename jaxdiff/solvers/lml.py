r"""Levenberg-Marquardt-Langevin: turn the direction of each step towards where it is heading.

Notation: $v$ is the direction of a step (a noise prediction, an increment or a velocity), $p$ that
of the step before, $u = v - \kappa(v - p)$, $n = |u|^2$, $\delta$ the damping, $\rho = \delta/n$,
$\beta = (u\cdot v)/n$, $d_\perp$ the part of $v - p$ orthogonal to $u$. All norms are over one
sample. The Hessian of $-\log q_t$ is modelled by $\delta I + u u^\top$; its inverse is applied to
$v$, as Levenberg and Marquardt damp Gauss and Newton, and the length of $v$ restored:

$$ w = \delta\,(\delta I + u u^\top)^{-1} v = v - \frac{u\,(u\cdot v)}{\delta + n}, \qquad
   v' = \frac{|v|}{|w|}\,w. $$

Two facts decide what that does. With $\kappa = 0$ it is the identity, whatever the damping: $u = v$
and $w$ is parallel to it. With $\kappa > 0$ it is an extrapolation that keeps the length,

$$ w \propto \kappa\,d_\perp + \frac{\rho}{1+\rho}\,\beta\,u \;\propto\; u + c\,d_\perp,
   \qquad c = \frac{\kappa\,(1 + \rho)}{\rho\,\beta} \approx \frac{\kappa\,n}{\delta}, $$

so the useful damping is proportional to $|v|^2$, to the dimension and to the squared step. The
parameter $c$ is free of all these: prefer it. The forms on the right do not cancel; the textbook
form loses $\log_{10}(n/\delta)$ digits, all of them in float32 at published settings.
"""

import sys
from typing import Any, Literal, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from jaxdiff import _check
from jaxdiff._array import Scalar, ScalarLike, time_dtype
from jaxdiff._host import is_concrete
from jaxdiff._numerics import norm
from jaxdiff.process import AbstractProcess
from jaxdiff.score import floating
from jaxdiff.solvers.engine import AbstractGridSolver, State
from jaxdiff.solvers.exponential import DDIM, transfer
from jaxdiff.solvers.terms import View
from jaxdiff.solvers.wrapper import AbstractWrapper

__all__ = ["DAMPING", "LML", "Placement", "turn"]

Placement: TypeAlias = Literal["noise", "increment", "velocity"]

# Published damping: by the number of evaluations on CIFAR-10 (DPM-Solver-3 in noise form), one
# value elsewhere. None comes with a kappa, and at kappa = 0 none has an effect.
DAMPING: dict[str, dict[int | None, float]] = {
    "cifar10": {
        **{5: 8e-4, 6: 8e-4, 7: 1e-3, 8: 1e-3, 9: 1e-3, 10: 8e-4},
        **{12: 1e-3, 15: 1e-3, 20: 5e-4, 30: 3e-4, 50: 1e-4, 100: 5e-5},
    },
    "celebahq": {None: 5e-3},
    "coco": {None: 1e-3},
    "t2i-compbench": {None: 6e-3},
    "controlnet": {None: 1e-3},
    "flux": {None: 1e-2},
}


def turn(
    v: Float[ArrayLike, "*dims"],
    p: Float[ArrayLike, "*dims"],
    *,
    kappa: ScalarLike = 1e-2,
    damping: ScalarLike | None = None,
    c: ScalarLike | None = None,
) -> Float[Array, "*dims"]:
    r"""Return the direction $v'$ of the module's head, of the length of $v$.

    By $w = \kappa d_\perp + \frac{\rho}{1+\rho}\beta u$ where `damping` is given, by
    $w = u + c\,d_\perp$ where `c` is. These are one direction, but for its sign where $\beta < 0$:
    $v$ and $p$ then nearly oppose each other, and $c > 0$ has no damping that belongs to it.

    Cost: three reductions and two linear combinations; no network evaluation, no autodiff.

    Args:
        v: current direction, (*dims,).
        p: previous one, (*dims,).
        kappa: share of `p` in $u$, from 0 to 1; 0 returns `v` itself.
        damping: $\delta$, 0 or more, in units of $|v|^2$.
        c: weight of the orthogonal difference, free of units; 0 returns `v` itself.

    Returns:
        $v'$, (*dims,), in the dtype of `v`, computed in float32 or better.

    Raises:
        ValueError: unless exactly one of `damping` and `c` is given, and the shapes agree.

    References:
        Wang et al. 2025 (2505.24222); the forms without cancellation are our own derivation.
    """
    if (damping is None) == (c is None):
        raise _check.bad("turn", "damping and c", "exactly one of them", (damping, c))
    v, p = floating(v), floating(p)
    if v.shape != p.shape:
        raise _check.bad("turn", "p", f"of shape {v.shape}, as v", p.shape)
    kind = time_dtype(v.dtype)
    wide, kappa = v.astype(kind), jnp.asarray(kappa, kind)
    change = wide - p.astype(kind)
    u = wide - kappa * change
    n = jnp.sum(u**2)
    along = jnp.sum(change * u) / jnp.where(n > 0, n, 1.0)
    across = change - along * u
    if damping is None:
        w, off = u + jnp.asarray(c, kind) * across, jnp.asarray(c) == 0
    else:
        delta, off = jnp.asarray(damping, kind), jnp.zeros((), bool)
        kept = delta / jnp.where(delta + n > 0, delta + n, 1.0)
        w = kappa * across + kept * (1 + kappa * along) * u
    length = norm(w.reshape(-1))
    out = w * (norm(wide.reshape(-1)) / jnp.where(length > 0, length, 1.0))
    same = off | (kappa == 0) | (length == 0)
    return jnp.where(same, wide, out).astype(v.dtype)


class _Turned(NamedTuple):
    """The row of a wrapped solver, and where its direction is."""

    row: Any
    of_x: Scalar  # v = of_x x + of_x1 x1 + of_output output
    of_x1: Scalar
    of_output: Scalar
    move: Scalar  # d x1 / d v
    active: Scalar  # 0 on the first step and in the frozen part


class LML(AbstractWrapper):
    r"""Levenberg-Marquardt-Langevin around a solver: `turn` the direction of each step.

    | placement | direction $v$ | the rest of the step | published for |
    |---|---|---|---|
    | `"noise"` | $\hat\epsilon$ in $\sqrt{\sigma_1^2 - c_\eta^2}\,\hat\epsilon$ | $\alpha_1 m + c_\eta z$ | DDIM |
    | `"increment"` | $x_1 - \frac{\sigma_1}{\sigma_0}x_0$ of an output $m$, $x_1 - \frac{\alpha_1}{\alpha_0}x_0$ of $\hat\epsilon$ | the linear part | DPM-Solver++, DPM-Solver |
    | `"velocity"` | $(x_1 - x_0)/(t_1 - t_0)$ | $x_0$ | flow-matching Euler |

    DPM-Solver multistep of order p in noise form is `DEIS(p, chi="lam")`, flow-matching Euler
    `RungeKutta("euler", "t")`. The first step, and steps in the frozen part, are those of the
    solver, bit by bit; so are all with `kappa=0` or `c=0`. The corrected method has order 1, or 0
    with placement `"noise"`, whose change of the state does not shrink with the step: there the
    useful sign of $c$ is negative, as the whole coefficient of $\hat\epsilon$ in the step is. It pays
    around solvers in noise form and flow-matching Euler, in 5 to 20 steps: `LML(DEIS(2, "lam"))`
    had .6 (VP) and .2 (Rectified) of the error of `DPMpp2M` on mixtures in 10 steps; around
    `DPMpp2M` it mostly hurts. Third-order methods go further in more steps.

    Cost: the solver's evaluations; one more array, three reductions.

    Args:
        solver: a deterministic solver of jaxdiff, or `DDIM(eta)`.
        damping: $\delta$, absolute, as published (see `DAMPING`): fit for one dimension, number of
            steps and guidance only.
        kappa: share of the previous direction in $u$, from 0 to 1.
        c: the scale-free weight instead of `damping`. By default .5 for a solver of order 1, .1
            for higher orders, -.25 with placement `"noise"`.
        freeze: share of the time range, from the noise end, in which nothing is turned.
        placement: which direction is turned; by default `"noise"` for `DDIM`, `"velocity"` where
            the solver's output is one, `"increment"` for all others.

    Raises:
        ValueError: if an argument is outside its range, both `damping` and `c` are given, the
            solver is stochastic (but for `DDIM`), or the placement does not fit it.

    References:
        Wang et al. 2025 (2505.24222); the parameter c is our own.
    """  # noqa: E501

    solver: AbstractGridSolver
    damping: float | Array | None = None
    kappa: float | Array = 1e-2
    c: float | Array | None = None
    freeze: float | Array = 0.0
    placement: Placement | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        known = isinstance(self.solver, AbstractGridSolver)
        if not known or (self.solver.stochastic and not isinstance(self.solver, DDIM)):
            expected = "a deterministic solver of jaxdiff, or DDIM(eta)"
            raise _check.bad("LML", "solver", expected, repr(self.solver))
        if self.damping is not None and self.c is not None:
            raise _check.bad("LML", "damping and c", "at most one of them", (self.damping, self.c))
        if self.damping is not None:
            _check.number("LML", "damping", self.damping, 0, sys.float_info.max)
        if self.c is not None:
            _check.number("LML", "c", self.c, -sys.float_info.max, sys.float_info.max)
        _check.number("LML", "kappa", self.kappa, 0, 1)
        _check.number("LML", "freeze", self.freeze, 0, 1)
        _check.choice("LML", "placement", self.placement, (None, "noise", "increment", "velocity"))
        fits = {"noise": isinstance(self.solver, DDIM), "velocity": self._is_velocity}
        if not fits.get(self.place, not self._is_velocity and not self.solver.stochastic):
            given = self.placement
            allowed = {"velocity": ("velocity",)}.get(self.solver.output, ("increment",))
            allowed = ("noise", *allowed) if isinstance(self.solver, DDIM) else allowed
            _check.choice("LML", f"placement (of {type(self.solver).__name__})", given, allowed)
            raise _check.bad("LML", "solver", "deterministic in placement 'increment'", self.solver)

    @property
    def _is_velocity(self) -> bool:
        return self.solver.output == "velocity"

    @property
    def place(self) -> Placement:
        """The placement, chosen by the solver unless it is given."""
        if self.placement is not None:
            return self.placement
        if isinstance(self.solver, DDIM):
            return "noise"
        return "velocity" if self._is_velocity else "increment"

    @property
    def weight(self) -> ScalarLike | None:
        """The weight c, chosen by placement and order unless it or a damping is given."""
        if self.c is not None or self.damping is not None:
            return self.c
        if self.place == "noise":
            return -0.25
        return 0.5 if self.solver.claimed_order == 1 else 0.1

    @property
    def claimed_order(self) -> int:
        """1, or 0 where the noise prediction is turned."""
        return 0 if self.place == "noise" else 1

    def begin(self, x: Array) -> Any:
        """Return the previous direction, not yet there, and what the solver carries."""
        return jnp.zeros(x.shape, time_dtype(x.dtype)), self.solver.begin(x)

    def row(self, process: AbstractProcess, ts: Array, n: ScalarLike, left: ScalarLike) -> _Turned:
        """Return the solver's row, and where in its step the direction is."""
        row, t1, t0 = self.solver.row(process, ts, n, left), ts[0], ts[1]
        alpha, sigma, one = process.alpha(t0), process.sigma(t0), jnp.ones_like(t0)
        of_x1, of_output, move = one, 0 * one, one
        if self.place == "noise":
            of_x, of_x1, of_output, move = 1 / sigma, 0 * one, -alpha / sigma, sigma * row.decay
        elif self.place == "velocity":
            of_x, of_x1, move = -1 / (t1 - t0), 1 / (t1 - t0), t1 - t0
        else:
            decay, _, _ = transfer(process, t0, t1)
            of_x = -decay
            if self.solver.output == "eps":  # from alpha = 0 both forms are the step of DDIM
                of_x = jnp.where(
                    alpha > 0, -process.alpha(t1) / jnp.where(alpha > 0, alpha, 1.0), of_x
                )
        gone = (jnp.asarray(process.t_max) - t0) / (jnp.asarray(process.t_max) - process.t_min)
        active = (jnp.asarray(n) > 0) & (gone >= jnp.asarray(self.freeze))
        active = active & (process.sigma(t1) > 0)  # a step there is x = alpha m
        return _Turned(row, of_x, of_x1, of_output, move, jnp.where(active, 1.0, 0.0))

    def advance(
        self, at: View, row: _Turned, t: Array, x: Array, state: State
    ) -> tuple[Array, Array, Any]:
        """Make the solver's step, then turn its direction."""
        p, inner = state.extra
        x1, output, inner = self.solver.advance(at, row.row, t, x, state._replace(extra=inner))
        if any(is_concrete(a) and np.asarray(a) == 0 for a in (self.kappa, self.weight)):
            return x1, output, (p, inner)
        x1 = jax.lax.optimization_barrier(x1)  # so that it is rounded as without what follows
        wide = lambda a: a.astype(p.dtype)  # noqa: E731
        v = row.of_x * wide(x) + row.of_x1 * wide(x1) + row.of_output * wide(output)
        turned = turn(v, p, kappa=self.kappa, damping=self.damping, c=self.weight)
        change = jnp.where(row.active > 0, turned - v, 0.0)
        return (x1 + row.move * change).astype(x1.dtype), output, (wide(v), inner)
