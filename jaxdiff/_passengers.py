r"""The PF-ODE with a passenger: a quantity that rides along and is driven by the state.

Notation: $h = \sqrt{\alpha^2 + \sigma^2}$, $y = x/h$, $\lambda = \log(\alpha/\sigma)$. In this
clock the coefficients of the drift are bounded by 1,

$$ dy/d\lambda = \frac{\alpha\sigma}{h^3}(\sigma m - \alpha\hat\epsilon), \qquad
   dp/d\lambda = \mathrm{passenger}(\lambda, x, p). $$

A likelihood is a passenger (the trace of the covariance of the noise), and so are the Jacobian of
the flow map (a matrix) and the gradient of a loss (a covector, on the way back).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdiff import _check, grids
from jaxdiff._host import host64, is_concrete
from jaxdiff._loop import over_steps
from jaxdiff._status import SUCCESS, first_failure
from jaxdiff._steps import bounded, check_loop
from jaxdiff.process import AbstractProcess
from jaxdiff.score import AbstractDenoiser
from jaxdiff.solvers.engine import AbstractGridSolver
from jaxdiff.solvers.terms import log_snr_drift


class At(NamedTuple):
    """Where a passenger is: time, scales, and the state in units of x; and which step it is."""

    t: Any
    alpha: Any
    sigma: Any
    h: Any
    x: Array
    step: Any


class Ride(eqx.Module):
    r"""The vector field of the state and its passenger.

    Attributes:
        process: the Gaussian path.
        passenger: from where it is and its value to $(m, \hat\epsilon)$ and its slope.
    """

    process: AbstractProcess
    passenger: Callable[[At, Any], tuple[Array, Array, Any]]

    def at(self, lam: Any, y: Array, step: Any = None) -> At:
        """Return where a state is."""
        t = self.process.t_of_lam(lam)
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        h = jnp.hypot(alpha, sigma)
        return At(t, alpha, sigma, h, (h * y).astype(y.dtype), step)

    def __call__(self, lam: Any, state: tuple[Array, Any], step: Any = None) -> tuple[Array, Any]:
        """Return the slopes of both."""
        y, value = state
        at = self.at(lam, y, step)
        m, eps, slope = self.passenger(at, value)
        cast = lambda d, v: d.astype(v.dtype)  # noqa: E731
        drift = log_snr_drift(at.alpha, at.sigma, m, eps)
        return drift.astype(y.dtype), jax.tree.map(cast, slope, value)


class Road(eqx.Module):
    r"""The grid of a ride and how it is travelled, decided before tracing.

    Attributes:
        ts: strictly decreasing times of finite log-SNR, (nodes,).
        lams: their log-SNRs.
        scales: $h$ at both ends, noise first.
        sigmas: $\sigma$ at both ends.
        live: whether it was read off traced numbers, so that derivatives reach the process.
    """

    ts: Any
    lams: Any
    scales: Any
    sigmas: Any
    solver: dfx.AbstractSolver
    controller: dfx.AbstractStepSizeController | None
    adjoint: dfx.AbstractAdjoint | None
    max_steps: int = eqx.field(static=True)
    live: bool = eqx.field(static=True)

    def cast(self, dtype: Any) -> "Road":
        """Return the road in the dtype of a state."""
        names = ("ts", "lams", "scales", "sigmas")
        cast = {name: jnp.asarray(getattr(self, name), dtype) for name in names}
        return dataclasses.replace(self, **cast)


def _readings(process: AbstractProcess, ts: Array) -> tuple[Array, Array, Array]:
    ends = jnp.stack([ts[0], ts[-1]])
    alpha, sigma = jax.vmap(lambda t: (process.alpha(t), process.sigma(t)))(ends)
    return jax.vmap(process.lam)(ts), jnp.hypot(alpha, sigma), sigma


def road(
    where: str,
    denoiser: Any,
    ts: Any,
    solver: Any = None,
    controller: Any = None,
    adjoint: Any = None,
    max_steps: Any = 4096,
    *,
    dtype: Any = None,
) -> Road:
    """Check the arguments that all rides share, and read the clock.

    Raises:
        ValueError: naming the first that is wrong.
    """
    if not isinstance(denoiser, AbstractDenoiser):
        raise _check.bad(where, "denoiser", "a jaxdiff denoiser", repr(denoiser))
    solver = dfx.Tsit5() if solver is None else solver
    wrong = (AbstractGridSolver, dfx.AbstractItoSolver, dfx.AbstractSRK)
    if not isinstance(solver, dfx.AbstractSolver) or (
        isinstance(solver, wrong) and not isinstance(solver, dfx.Euler)
    ):
        expected = "an ODE solver of diffrax, as diffrax.Tsit5()"
        raise _check.bad(where, "solver", expected, repr(solver))
    check_loop(where, controller, adjoint, max_steps)
    ts = grids.check(denoiser.process, ts, where=where, dtype=dtype)
    lams, scales, sigmas = host64(_readings, denoiser.process, ts)
    if is_concrete(lams):
        for i, advice in ((0, "start below it"), (-1, "end above it")):
            if not np.isfinite(lams[i]):
                got = f"t={float(ts[i])!r}; {advice}"
                raise _check.bad(where, f"ts[{i}]", "a time of finite log-SNR (sigma > 0)", got)
    live = not is_concrete(denoiser.process, ts)
    return Road(ts, lams, scales, sigmas, solver, controller, adjoint, max_steps, live)


def ride(
    road: Road, field: Ride, start: Any, *, back: bool = False, fresh: bool = False, see: Any = None
) -> tuple[Any, Any, Any, Any]:
    """Travel a road, from noise to data or `back`; return end, what is seen, status and steps.

    On a fixed grid by single steps, each of which knows its number; with `fresh` none of them goes
    on from an evaluation of the one before. Log-SNRs to `see` states at, and a controller, need
    the loop of diffrax.
    """
    lams = road.lams[::-1] if back else road.lams
    n, solver, term = lams.shape[0] - 1, road.solver, dfx.ODETerm(field)
    if road.controller is None and road.adjoint is None and see is None:
        solver = bounded(solver)
        inner = solver.init(term, lams[0], lams[1], start, jnp.asarray(0))

        def step(i: Any, carry: Any) -> Any:
            state, inner, result = carry
            args = (lams[i], lams[i + 1], state, i, inner, jnp.asarray(fresh))
            state, _, _, inner, new = solver.step(term, *args)
            return state, inner, first_failure(result, new)

        (end, _, result), _ = over_steps(step, (start, inner, SUCCESS), 0, n)
        return end, None, result, jnp.asarray(n)
    if road.controller is None:
        controller, most = dfx.StepTo(lams), n
        # one checkpoint per step: diffrax's logarithmic default was measured 2-8x slower
        adjoint: Any = dfx.RecursiveCheckpointAdjoint(checkpoints=n)
    else:
        controller, most = road.controller, road.max_steps
        adjoint = dfx.RecursiveCheckpointAdjoint()
    solution = dfx.diffeqsolve(
        term,
        solver,
        lams[0],
        lams[-1],
        None,
        start,
        saveat=dfx.SaveAt(t1=True) if see is None else dfx.SaveAt(ts=see, t1=True),
        stepsize_controller=controller,
        adjoint=adjoint if road.adjoint is None else road.adjoint,
        max_steps=most,
        throw=False,
    )
    end = jax.tree.map(lambda a: a[-1], solution.ys)
    seen = None if see is None else jax.tree.map(lambda a: a[:-1], solution.ys)
    return end, seen, solution.result, solution.stats["num_steps"]
