"""What can be decided about a solve before tracing: grid, clock, engine and coefficients."""

import dataclasses
from typing import Any, Literal, NamedTuple, TypeAlias

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdiff import _check, grids
from jaxdiff._types import host64, is_concrete, time_dtype
from jaxdiff.process import AbstractProcess
from jaxdiff.score import AbstractDenoiser
from jaxdiff.solvers.engine import AbstractGridSolver
from jaxdiff.solvers.reversible import AbstractReversible
from jaxdiff.solvers.terms import Clock, ClockName
from jaxdiff.solvers.travel import ReversibleAdjoint

Engine: TypeAlias = Literal["scan", "diffrax"]
Values: TypeAlias = Array | np.ndarray


class Options(NamedTuple):
    """The arguments that `draw` and `sample` share beside the mathematical ones."""

    denoise: bool
    trajectory: bool
    engine: Engine | None
    equation: Literal["ode", "sde"] | None
    clock: ClockName | None
    controller: dfx.AbstractStepSizeController | None
    adjoint: dfx.AbstractAdjoint | None
    max_steps: int


class Plan(eqx.Module):
    """Everything about a solve that does not depend on the sample, decided before tracing."""

    solver: dfx.AbstractSolver
    ts: Values  # the nodes that are stepped through
    nodes: Values  # the same, as the clock reads them
    scales: tuple[Values, Values]  # state / x at both ends
    last: tuple[Values, Values]  # factor and time of a final denoising step
    controller: dfx.AbstractStepSizeController | None
    adjoint: dfx.AbstractAdjoint | None
    clock: ClockName = eqx.field(static=True)
    stochastic: bool = eqx.field(static=True)
    denoise: bool = eqx.field(static=True)
    engine: Engine = eqx.field(static=True)
    trajectory: bool = eqx.field(static=True)
    max_steps: int = eqx.field(static=True)

    def after(self, step: int) -> "Plan":
        """Return the plan of a reversible solver that goes on from a pair at node `step`."""
        ts, nodes, rows = jax.tree.map(
            lambda a: a[step:], (self.ts, self.nodes, getattr(self.solver, "rows", None))
        )
        rows = rows._replace(first=0 * rows.first)  # no step starts from x alone
        solver = dataclasses.replace(self.solver, rows=rows)  # type: ignore[call-arg]
        return dataclasses.replace(self, solver=solver, ts=ts, nodes=nodes)


def plan_solve(
    where: str,
    denoiser: Any,
    solver: Any,
    ts: Any,
    dtype: Any,
    options: Options,
    *,
    own_noise: bool = False,
) -> Plan:
    """Check the arguments of a solve and compute all that its samples share.

    Args:
        where: name of the calling function, for messages.
        denoiser: the denoiser.
        solver: a solver of jaxdiff or diffrax.
        ts: the grid, (nodes,).
        dtype: dtype of the state.
        options: the remaining arguments.
        own_noise: whether a Brownian path is given: it reads clock `"u"`, while noise keyed by the
            step reads none.

    Raises:
        ValueError: naming the first argument that is wrong.
    """
    _check_kinds(where, denoiser, solver, options)
    process = denoiser.process
    ts = grids.check(process, ts, where=where, dtype=time_dtype(dtype))
    denoise, last, more = options.denoise, (1.0, ts[-1]), int(options.denoise)
    first, alpha, sigma = _ends(process, ts, time_dtype(dtype))
    if is_concrete(first) and first == 0 and denoiser.needs_signal:
        expected = "a time with alpha > 0: a network that predicts eps or score says nothing there"
        raise _check.bad(where, "ts[0]", expected, f"t={float(ts[0])!r}; start below it")
    if is_concrete(sigma) and sigma == 0:
        # The exact limit of every exponential method: x = alpha m. No clock reaches sigma = 0.
        denoise, last, ts, more = True, (alpha, ts[-1]), ts[:-1], 1
    if isinstance(solver, AbstractGridSolver):
        solver, engine, stochastic = _our_engine(where, process, solver, ts, options, more)
        clock: ClockName = "u" if stochastic and own_noise else "t"
    else:
        engine, stochastic, clock = _their_engine(where, solver, options)
    if stochastic and not process.has_sde:
        expected = f"deterministic, since {type(process).__name__} has no reverse SDE"
        raise _check.bad(where, "solver", expected, repr(solver))
    if own_noise and not stochastic:
        expected = f"left out, since {type(solver).__name__} solves the ODE"
        raise _check.bad(where, "noise", expected, "a path")
    if stochastic and not own_noise and options.controller is not None:
        expected = "given under a controller, a diffrax.VirtualBrownianTree in clock 'u'"
        raise _check.bad(where, "noise", expected, None)
    nodes, scales = ts, np.ones(2)
    if clock != "t":
        nodes, scales = host64(_clock_ends, Clock(process, clock), ts)
    if is_concrete(nodes, scales) and not (np.all(np.isfinite(nodes)) and np.all(scales > 0)):
        expected = f"a time that {type(solver).__name__} can start at"
        got = f"t={float(ts[0])!r}, where clock {clock!r} has no finite state; start below it"
        got += "" if stochastic else " or choose another clock"
        raise _check.bad(where, "ts[0]", expected, got)
    arrays, dtype = (ts, nodes, (scales[0], scales[1]), last), time_dtype(dtype)
    solver = jax.tree.map(lambda a: a.astype(dtype) if isinstance(a, np.ndarray) else a, solver)
    return Plan(
        solver,
        *jax.tree.map(lambda a: _cast(a, dtype), arrays),
        controller=options.controller,
        adjoint=_adjoint(solver, engine, options),
        clock=clock,
        stochastic=stochastic,
        denoise=denoise,
        engine=engine,
        trajectory=options.trajectory,
        max_steps=options.max_steps,
    )


def _check_kinds(where: str, denoiser: Any, solver: Any, options: Options) -> None:
    if not isinstance(denoiser, AbstractDenoiser):
        raise _check.bad(where, "denoiser", "a jaxdiff denoiser", repr(denoiser))
    if not isinstance(solver, dfx.AbstractSolver):
        raise _check.bad(where, "solver", "a jaxdiff or diffrax solver, as DDIM()", repr(solver))
    _check.whole(where, "max_steps", options.max_steps, 1)
    kinds = {"controller": dfx.AbstractStepSizeController, "adjoint": dfx.AbstractAdjoint}
    for name, kind in kinds.items():
        value = getattr(options, name)
        if value is not None and not isinstance(value, kind):
            raise _check.bad(where, name, f"an instance of diffrax.{kind.__name__}", repr(value))
    if isinstance(options.adjoint, ReversibleAdjoint):
        if not isinstance(solver, AbstractReversible):
            expected = "a reversible one for ReversibleAdjoint(), as SymmetricLeapfrog()"
            raise _check.bad(where, "solver", expected, type(solver).__name__)
        solver.check_reversible(where)
        if options.trajectory or options.engine == "diffrax":
            got = "trajectory=True" if options.trajectory else "engine='diffrax'"
            expected = "left out: ReversibleAdjoint() keeps no states and runs in the scan engine"
            raise _check.bad(where, got.split("=")[0], expected, got)


def _adjoint(solver: Any, engine: Engine, options: Options) -> Any:
    if engine == "scan" and not options.trajectory and isinstance(solver, AbstractReversible):
        if solver.smooth is not solver:  # rounding has no slope of its own
            return ReversibleAdjoint()
    return options.adjoint


def _cast(value: Any, dtype: Any) -> Any:
    # NumPy stays NumPy: jit takes it as it is, without a kernel launch of its own.
    return value.astype(dtype) if isinstance(value, jax.Array) else np.asarray(value, dtype)


def _scales(process: AbstractProcess, ts: Values) -> tuple[Array, Array, Array]:
    return process.alpha(ts[0]), process.alpha(ts[-1]), process.sigma(ts[-1])


def _ends(process: AbstractProcess, ts: Values, dtype: Any) -> tuple[Any, Any, Any]:
    """Return alpha at the start, alpha and sigma at the end: known under jit too where they can."""
    if is_concrete(process, ts):
        first, alpha, sigma = host64(_scales, process, ts)
    else:
        with jax.ensure_compile_time_eval():  # where no traced parameter enters
            ends = _scales(process, ts)
        first, alpha, sigma = (np.asarray(a) if is_concrete(a) else a for a in ends)
    return tuple(_cast(a, dtype) for a in (first, alpha, sigma))


def _clock_ends(clock: Clock, ts: Array) -> tuple[Array, Array]:
    return jax.vmap(clock.of_t)(ts), jnp.stack([clock.scale(ts[0]), clock.scale(ts[-1])])


def _our_engine(
    where: str, process: Any, solver: AbstractGridSolver, ts: Any, options: Options, more: int
) -> tuple[Any, Engine, bool]:
    for name in ("equation", "clock", "controller"):
        if getattr(options, name) is not None:
            expected = f"left out, since {type(solver).__name__} decides it"
            raise _check.bad(where, name, expected, repr(getattr(options, name)))
    _check.choice(where, "engine", options.engine, (None, "scan", "diffrax"))
    if ts.shape[0] > 1:
        solver = solver.tabulate(process, ts, more=more)
        if is_concrete(solver.rows):
            _finite_rows(where, solver, ts)
    return solver, options.engine or "scan", solver.stochastic


def _their_engine(
    where: str, solver: dfx.AbstractSolver, options: Options
) -> tuple[Engine, bool, ClockName]:
    _check.choice(where, "engine", options.engine, (None, "diffrax"))
    _check.choice(where, "equation", options.equation, (None, "ode", "sde"))
    stochastic = options.equation == "sde"
    if options.equation is None:
        stochastic = isinstance(solver, dfx.AbstractSRK)
    clocks = ("u",) if stochastic else ("r", "s", "lam", "t")
    _check.choice(where, "clock", options.clock, (None, *clocks))
    default = "u" if stochastic else "r" if options.controller is None else "lam"
    return "diffrax", stochastic, options.clock or default


def _finite_rows(where: str, solver: AbstractGridSolver, ts: Any) -> None:
    finite = [np.isfinite(a).reshape(a.shape[0], -1).all(1) for a in jax.tree.leaves(solver.rows)]
    good = np.all(finite, axis=0)
    if not good.all():
        t = float(ts[int(np.argmin(good))])
        expected = f"times from which {type(solver).__name__} has a finite step"
        raise _check.bad(where, "ts", expected, f"t={t!r}, at an infinite log-SNR")


def evaluations(solver: Any, steps: Any) -> Any:
    """Count denoiser evaluations in `steps` steps; -1 where diffrax does not say."""
    if isinstance(solver, AbstractGridSolver):
        return solver.cost(steps)
    if isinstance(solver, dfx.Euler):
        return steps
    if isinstance(solver, dfx.AbstractSRK) and solver.tableau.is_additive_noise():
        return len(solver.tableau.b_sol) * steps
    if isinstance(solver, dfx.AbstractERK) and isinstance(solver.tableau, dfx.ButcherTableau):
        stages = solver.tableau.num_stages
        return (stages - 1) * steps + 1 if solver.tableau.fsal else stages * steps
    return -jnp.ones_like(jnp.asarray(steps))
