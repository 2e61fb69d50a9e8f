"""Solves of Gaussian paths: what of a denoiser, a solver and a grid is decided before tracing."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdiff import _check, grids
from jaxdiff._array import Cond, time_dtype
from jaxdiff._host import host64, is_concrete
from jaxdiff._keys import INIT, SOLVER, stream
from jaxdiff._sampler import Samples, State, prepare
from jaxdiff._status import SUCCESS, or_nan, status
from jaxdiff._steps import DiffraxSolve, bounded, check_loop
from jaxdiff.process import AbstractProcess, check_path, vanishing
from jaxdiff.score import AbstractDenoiser
from jaxdiff.solvers._reversal import ReversibleAdjoint, arrive, step_pair, travel, travel_back
from jaxdiff.solvers.engine import AbstractGridSolver
from jaxdiff.solvers.reversible import AbstractReversible, Inverted, kind
from jaxdiff.solvers.terms import (
    AdditiveNoise,
    Clock,
    ClockName,
    GridBrownian,
    pf_ode,
    reverse_sde,
)

Engine: TypeAlias = Literal["scan", "diffrax"]
Values: TypeAlias = Array | np.ndarray


class GridSolve(DiffraxSolve):
    r"""A solver of jaxdiff or diffrax on the PF-ODE or the reverse SDE, from node to node.

    Attributes:
        scales: state / x at all nodes; None for 1.
        last: factor and time of a final step $x = c\,m$; None without one.
        path: makes the Brownian path of a sample from a key; None for one keyed by the grid.
        controller: chooses the steps of each sample; None on a fixed grid.
        adjoint: for the diffrax engine.
    """

    scales: Values | None
    last: tuple[Any, Any] | None
    path: Callable[[Any], dfx.AbstractBrownianPath] | None
    controller: dfx.AbstractStepSizeController | None
    adjoint: dfx.AbstractAdjoint | None
    max_steps: int = eqx.field(static=True)
    clock: ClockName = eqx.field(static=True)
    engine: Engine = eqx.field(static=True)

    @property
    def last_time(self) -> Any:
        """Time of the step $x = c m$."""
        return None if self.last is None else self.last[1]

    @property
    def adaptive(self) -> bool:
        """Whether steps are each sample's own."""
        return self.controller is not None

    @property
    def hookable(self) -> bool:
        """Not inside diffrax's own loop."""
        return self.engine == "scan"

    def path_of(self, model: Any) -> Any:
        """Return the process."""
        return model.process

    def terms(self, denoiser: AbstractDenoiser, key: Any, cond: Cond) -> Any:
        """Return the equation, with the noise of one sample."""
        if not self.stochastic:
            return pf_ode(denoiser, self.clock, cond)  # type: ignore[arg-type]
        own = stream(key, SOLVER)
        if self.path is None:
            path: Any = GridBrownian(key=own, nodes=jnp.asarray(self.nodes), shape=self.start)
        else:
            path = self.path(own)
        if self.clock == "u":
            return reverse_sde(denoiser, path, cond)
        return dfx.MultiTerm(pf_ode(denoiser, self.clock, cond), AdditiveNoise(path))

    def _scaled(self, n: Any, x: Array) -> Array:
        return x if self.scales is None else (x * jnp.asarray(self.scales)[n]).astype(x.dtype)

    def _begin(self, model: Any, key: Any, init: Any) -> Array:
        """Return x at the first node."""
        if init is not None:
            return jnp.asarray(init, self.start.dtype)
        t0, own = jnp.asarray(self.ts)[0], stream(key, INIT)
        return model.process.prior(own, self.start.shape, t=t0, dtype=self.start.dtype)

    def init(self, model: Any, key: Any, cond: Cond, init: Any) -> State:
        """Scale the sample to the clock and let the solver begin."""
        y = self._scaled(0, self._begin(model, key, init))
        return self.begin(self.terms(model, key, cond), y)

    def x(self, n: Any, state: State) -> Array:
        """Leave the units of the clock."""
        if self.scales is None:
            return state.y
        return (state.y / jnp.asarray(self.scales)[n]).astype(state.y.dtype)

    def replace(self, n: Any, state: State, x: Array) -> State:
        """Return to the units of the clock."""
        return super().replace(n, state, self._scaled(n, x))

    def end(self, model: Any, key: Any, state: State, cond: Cond) -> tuple[Array, Any]:
        """Step to x = c m where one is due."""
        return self._clean(model, self.x(self.steps, state), state.nfe, cond)

    def _clean(self, model: Any, x: Array, nfe: Any, cond: Cond) -> tuple[Array, Any]:
        if self.last is None:
            return x, nfe
        m = model(jnp.asarray(self.ts)[-1], x, cond)
        x = (jnp.asarray(self.last[0]) * m).astype(x.dtype)
        return x, jnp.where(nfe < 0, nfe, nfe + 1)

    def run(self, model: Any, key: Any, cond: Cond, init: Any, nudges: Any = None) -> Samples:
        """Make all steps, in the one loop or in diffrax's."""
        if self.engine == "scan" or not self.steps:
            return super().run(model, key, cond, init, nudges)
        y0 = self._scaled(0, self._begin(model, key, init))
        terms, nodes = self.terms(model, key, cond), jnp.asarray(self.nodes)
        if self.controller is None:
            controller, most = dfx.StepTo(nodes), self.steps
            # one checkpoint per step: diffrax's logarithmic default was measured 2-8x slower
            adjoint = dfx.RecursiveCheckpointAdjoint(checkpoints=most)
            saved = dfx.SaveAt(t0=True, steps=True)
        else:
            controller, most, saved = self.controller, self.max_steps, dfx.SaveAt(ts=nodes)
            adjoint = dfx.RecursiveCheckpointAdjoint()
        solution = dfx.diffeqsolve(
            terms,
            self.solver,
            nodes[0],
            nodes[-1],
            None,
            y0,
            saveat=saved if self.trajectory else dfx.SaveAt(t1=True),
            stepsize_controller=controller,
            adjoint=adjoint if self.adjoint is None else self.adjoint,
            max_steps=most,
            throw=False,
        )
        ys: Any = solution.ys
        nfe = self.cost(solution.stats["num_steps"])
        state = State(ys[-1], None, solution.result, nfe)
        x, nfe = self.end(model, key, state, cond)
        out = self._settle(x, nfe, state)
        if not self.trajectory:
            return out
        path = jax.vmap(lambda n, y: self.x(n, state._replace(y=y)))(jnp.arange(len(nodes)), ys)
        return self._with_path(out, path, x)


class PairSolve(GridSolve):
    """A reversible solver: what is stepped, forwards and backwards, is its pair of states."""

    solver: AbstractReversible

    @property
    def hookable(self) -> bool:
        """A pair has no room for another x."""
        return False

    @property
    def reversible(self) -> bool:
        """Whether the solver's parameters leave something to invert."""
        try:
            self.solver.check_reversible("")
        except ValueError:
            return False
        return True

    def table(self) -> Any:
        """Return the coefficients of every step and its two times."""
        ts = jnp.asarray(self.ts)
        return jax.tree.map(jnp.asarray, self.solver.rows), jnp.stack([ts[:-1], ts[1:]], axis=1)

    def init(self, model: Any, key: Any, cond: Cond, init: Any) -> State:
        """Begin with the pair of an inversion, or with one made of x alone."""
        if isinstance(init, Inverted):
            return State((init.pair[0], init.pair[1]), None, SUCCESS, jnp.asarray(0))
        x = self._begin(model, key, init)
        pair = (x, x)
        if self.steps:
            first = jax.tree.map(lambda a: jnp.asarray(a)[0], self.solver.rows)
            pair = self.solver.depart(first, x)
        return State(pair, None, SUCCESS, jnp.asarray(0))

    def step(self, model: Any, n: Any, row: Any, key: Any, state: State, cond: Cond) -> State:
        """Step the pair."""
        (row, t), shared = row, (self.solver, model, cond)
        pair = step_pair(shared, row, t, state.y)
        return state._replace(y=pair, nfe=state.nfe + self.cost(n + 1) - self.cost(n))

    def x(self, n: Any, state: State) -> Array:
        """Show the first of the pair."""
        if not self.steps:
            return state.y[0]
        c0, c1 = jnp.asarray(self.solver.rows.c0), jnp.asarray(self.solver.rows.c1)
        units = jnp.append(c0, c1[-1])
        return self.solver.show(state.y[0], units[n]).astype(self.start.dtype)

    def replace(self, n: Any, state: State, x: Array) -> State:
        """Refuse: x is one half of a pair."""
        expected = "one whose state is x alone: x is half of the pair of a reversible solver"
        raise _check.bad("replace", "sampler", expected, type(self.solver).__name__)

    def run(self, model: Any, key: Any, cond: Cond, init: Any, nudges: Any = None) -> Samples:
        """Make all steps; with `ReversibleAdjoint`, in a loop whose derivative keeps no states."""
        if not isinstance(self.adjoint, ReversibleAdjoint):
            return super().run(model, key, cond, init, nudges)
        n = self.begins(init)
        rows, ts = jax.tree.map(lambda a: jnp.asarray(a)[n:], (self.solver.rows, self.ts))
        if isinstance(init, Inverted):
            pair = init.pair[0], init.pair[1]
        else:  # in numbers, of which there are derivatives
            x = self._begin(model, key, init)
            pair = self.solver.smooth.depart(jax.tree.map(lambda a: a[0], rows), x)
        pair, numbers = travel(self.solver, model, cond, rows, ts, pair)
        nfe = self.cost(self.steps) - self.cost(n)
        x = (numbers[0] / rows.c1[-1]).astype(self.start.dtype)
        state = State(pair, None, SUCCESS, nfe)
        return self._settle(*self._clean(model, x, nfe, cond), state)

    def pack(self, x: Array, state: State) -> tuple[Array, dict[str, Array]]:
        """Hand out the pair, from which `invert` goes back."""
        return x, {"pair": jnp.stack(state.y)} if self.steps else {}

    def admit(self, where: str, init: Any, lead: tuple[int, ...] = ()) -> Any:
        """Check that an inversion was made by this solver, along this grid."""
        if not isinstance(init, Inverted):
            return super().admit(where, init, lead)
        if kind(self.solver) != init.method:
            expected = "the one that `init` was inverted by, with the same options"
            raise _check.bad(where, "solver", expected, repr(self.solver))
        if self.steps != init.step + init.steps:
            expected = f"the {init.step + init.steps + 1} nodes that `init` was inverted along"
            raise _check.bad(where, "ts", expected, f"{self.steps + 1}")
        shape = (*lead, 2, *self.start.shape)
        if init.pair.shape != shape:
            raise _check.bad(where, "init.pair", f"of shape {shape}", f"{init.pair.shape}")
        return init

    def admit_back(self, where: str, x: Array, pair: Any, freeze: Any) -> int:
        """Check the arguments of `invert`; return the step to stop before."""
        self.solver.check_reversible(where)
        _check.number(where, "freeze", freeze, 0, 1)
        if not is_concrete(freeze):
            raise _check.bad(where, "freeze", "known before tracing", freeze)
        if self.last is not None:
            expected = "a time with sigma > 0: the last step to sigma = 0 forgets the state"
            raise _check.bad(where, "ts[-1]", expected, f"t={float(self.last[1])!r}")
        step = round(float(freeze) * self.steps) + self.solver.lag
        if step >= self.steps:
            left = f"more than {self.solver.lag} of the {self.steps} steps of ts"
            expected = f"so small that {left} are left"
            raise _check.bad(where, "freeze", expected, f"{freeze!r}")
        if x.shape != self.start.shape:
            raise _check.bad(where, "x", f"of shape {self.start.shape}", x.shape)
        if pair is not None:
            like = jax.ShapeDtypeStruct((2, *x.shape), x.dtype)
            expected = jax.eval_shape(self.solver.store, like)
            if pair.shape != expected.shape or pair.dtype != expected.dtype:
                got = f"a pair of {pair.dtype}{list(pair.shape)}"
                raise _check.bad(where, "x", "one result of this sampler", got)
        return step

    def inverse(self, model: Any, step: int, x: Array, pair: Any, cond: Cond) -> Inverted:
        """Run the steps backwards, down to the one with number `step`."""
        solver, ts = self.solver, jnp.asarray(self.ts)
        rows, nfe = jax.tree.map(jnp.asarray, solver.rows), solver.cost(self.steps - step)
        if pair is None:
            pair, nfe = arrive(solver, model, cond, rows, ts, x), nfe + solver.arrival
        else:
            pair = pair[0], pair[1]
        pair = travel_back(solver, model, cond, rows, ts, pair, step)
        noise = solver.show(pair[solver.lag], rows.c0[step - solver.lag])
        pair = jnp.stack(pair)
        result = status(SUCCESS, solver.load(pair, x.dtype), noise)
        noise = or_nan(result, noise).astype(x.dtype)
        left = self.steps - step
        return Inverted(noise, pair, result, jnp.asarray(nfe), step, left, kind(solver))


class _Same(AbstractProcess):
    """A process that is another one until a subclass says otherwise."""

    process: AbstractProcess

    @property
    def t_min(self) -> Any:
        return self.process.t_min

    @property
    def t_max(self) -> Any:
        return self.process.t_max

    def log_alpha(self, t: Any) -> Array:
        return jnp.log(self.alpha(t))

    def log_sigma(self, t: Any) -> Array:
        return jnp.log(self.sigma(t))

    def t_of_lam(self, lam: Any) -> Array:
        return self.process.t_of_lam(lam)


class _Snapped(_Same):
    """A process whose scales are exactly 0 where they are no more than round-off."""

    def alpha(self, t: Any) -> Array:
        alpha = self.process.alpha(t)
        return jnp.where(vanishing(alpha, self.process.sigma(t))[0], 0.0, alpha)

    def sigma(self, t: Any) -> Array:
        sigma = self.process.sigma(t)
        return jnp.where(vanishing(self.process.alpha(t), sigma)[1], 0.0, sigma)


class _Cleaned(_Same):
    """A process with clean data, alpha = 1 and sigma = 0, below one of its times."""

    end: Any

    def _at(self, t: Any, clean: float, of: Callable[[Any], Array]) -> Array:
        return jnp.where(t < self.end, clean, of(jnp.maximum(t, self.end)))

    def log_alpha(self, t: Any) -> Array:
        return self._at(t, 0.0, self.process.log_alpha)

    def log_sigma(self, t: Any) -> Array:
        return self._at(t, -jnp.inf, self.process.log_sigma)

    def alpha(self, t: Any) -> Array:
        return self._at(t, 1.0, self.process.alpha)

    def sigma(self, t: Any) -> Array:
        return self._at(t, 0.0, self.process.sigma)


@prepare.register
def _(
    model: AbstractDenoiser,
    start: jax.ShapeDtypeStruct,
    *,
    solver: Any,
    ts: Any,
    denoise: bool = False,
    trajectory: bool = False,
    engine: Engine | None = None,
    equation: Literal["ode", "sde"] | None = None,
    clock: ClockName | None = None,
    noise: Callable[[Any], dfx.AbstractBrownianPath] | None = None,
    controller: dfx.AbstractStepSizeController | None = None,
    adjoint: dfx.AbstractAdjoint | None = None,
    max_steps: int = 4096,
) -> GridSolve:
    """Check the arguments of a solve and compute all that its samples share."""
    where, process, dtype = "sampler", model.process, time_dtype(start.dtype)
    _check_kinds(where, solver, controller, adjoint, noise, max_steps)
    _check_adjoint(where, solver, adjoint, trajectory, engine)
    ts = grids.check(process, ts, where=where, dtype=dtype)
    ours = isinstance(solver, AbstractGridSolver)
    if not type(process).__module__.startswith("jaxdiff."):
        check_path(process, where)  # ours are tested
    last: Any = (1.0, ts[-1]) if denoise else None
    no_signal, no_noise, alpha, stepped = _ends(process, ts, dtype)
    if no_signal and model.needs_signal:
        expected = "a time with alpha > 0: a network that predicts eps or score says nothing there"
        raise _check.bad(where, "ts[0]", expected, f"t={float(ts[0])!r}; start below it")
    if no_noise:
        last = None
        if not (ours and solver.finite_end):
            # The exact limit of every exponential method: x = alpha m. No clock reaches sigma = 0.
            last, ts = (alpha, ts[-1]), ts[:-1]
    nodes = ts
    if last is not None and ours and solver.finite_end:
        last, stepped = None, _Cleaned(process=stepped, end=ts[-1])  # type: ignore[reportCallIssue]
        join = np.append if isinstance(ts, np.ndarray) else jnp.append
        ts, nodes = join(ts, ts[-1]), join(ts, ts[-1] - 1)
    if ours:
        _left_out(where, solver, equation=equation, clock=clock, controller=controller)
        _check.choice(where, "engine", engine, (None, "scan", "diffrax"))
        if nodes.shape[0] > 1:
            solver = solver.tabulate(stepped, nodes, more=int(last is not None))
            if is_concrete(solver.rows):
                _finite_rows(where, solver, nodes)
        stochastic, name = solver.stochastic, "u" if noise is not None else "t"
    else:
        stochastic, name = _their_clock(where, solver, equation, clock, controller)
    engine = _engine(where, solver, engine, controller, adjoint)
    _check_noise(where, process, solver, stochastic, noise, controller)
    scales = None
    if name != "t":
        nodes, scales = host64(_readings, Clock(stepped, name), nodes)
        if is_concrete(nodes, scales) and not (np.isfinite(nodes).all() and np.all(scales > 0)):
            expected = f"a time that {type(solver).__name__} can start at"
            got = f"t={float(ts[0])!r}, where clock {name!r} has no finite state; start below it"
            got += "" if stochastic else " or choose another clock"
            raise _check.bad(where, "ts[0]", expected, got)
    family: type[GridSolve] = GridSolve
    if isinstance(solver, AbstractReversible) and engine == "scan":
        family = PairSolve
        if not trajectory and solver.smooth is not solver:
            adjoint = ReversibleAdjoint()  # rounding has no slope of its own
    solver, ts, nodes, scales, last = _cast((bounded(solver), ts, nodes, scales, last), dtype)
    return family(
        solver=solver,
        ts=ts,
        nodes=nodes,
        scales=scales,
        last=last,
        path=noise,
        controller=controller,
        adjoint=adjoint,
        max_steps=max_steps,
        clock=name,
        stochastic=stochastic,
        engine=engine,
        start=start,
        trajectory=trajectory,
        live=not is_concrete(process),
    )


def _check_kinds(
    where: str, solver: Any, controller: Any, adjoint: Any, noise: Any, max_steps: Any
) -> None:
    if not isinstance(solver, dfx.AbstractSolver):
        raise _check.bad(where, "solver", "a jaxdiff or diffrax solver, as DDIM()", repr(solver))
    check_loop(where, controller, adjoint, max_steps)
    if noise is not None and not callable(noise):
        expected = "a function from a key to a diffrax Brownian path in clock 'u'"
        raise _check.bad(where, "noise", expected, type(noise).__name__)


def _check_adjoint(where: str, solver: Any, adjoint: Any, trajectory: bool, engine: Any) -> None:
    if not isinstance(adjoint, ReversibleAdjoint):
        return
    if not isinstance(solver, AbstractReversible):
        expected = "a reversible one for ReversibleAdjoint(), as SymmetricLeapfrog()"
        raise _check.bad(where, "solver", expected, type(solver).__name__)
    solver.check_reversible(where)
    if trajectory or engine == "diffrax":
        got = "trajectory=True" if trajectory else "engine='diffrax'"
        expected = "left out: ReversibleAdjoint() keeps no states and runs in the scan engine"
        raise _check.bad(where, got.split("=")[0], expected, got)


def _check_noise(
    where: str, process: AbstractProcess, solver: Any, stochastic: bool, noise: Any, controller: Any
) -> None:
    if stochastic and not process.has_sde:
        expected = f"deterministic, since {type(process).__name__} has no reverse SDE"
        raise _check.bad(where, "solver", expected, repr(solver))
    if noise is not None and not stochastic:
        expected = f"left out, since {type(solver).__name__} solves the ODE"
        raise _check.bad(where, "noise", expected, "a path")
    if stochastic and noise is None and controller is not None:
        expected = "given under a controller: key -> diffrax.VirtualBrownianTree in clock 'u'"
        raise _check.bad(where, "noise", expected, None)


def _left_out(where: str, solver: Any, **options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            expected = f"left out, since {type(solver).__name__} decides it"
            raise _check.bad(where, name, expected, repr(value))


def _their_clock(
    where: str, solver: Any, equation: Any, clock: Any, controller: Any
) -> tuple[bool, ClockName]:
    """Return whether a solver of diffrax gets the SDE, and the clock it runs in."""
    _check.choice(where, "equation", equation, (None, "ode", "sde"))
    stochastic = equation == "sde"
    if equation is None:
        stochastic = isinstance(solver, dfx.AbstractSRK)
    _check.choice(
        where, "clock", clock, (None, "u") if stochastic else (None, "r", "s", "lam", "t")
    )
    default = "u" if stochastic else "r" if controller is None else "lam"
    return stochastic, clock or default


def _engine(where: str, solver: Any, engine: Any, controller: Any, adjoint: Any) -> Engine:
    """Return the loop that a solve runs in: the plain scan, unless diffrax's is needed."""
    _check.choice(where, "engine", engine, (None, "scan", "diffrax"))
    # the derivative of a stochastic Runge-Kutta method in a plain scan was measured far slower
    theirs = adjoint is not None and not isinstance(adjoint, ReversibleAdjoint)
    needed = controller is not None or theirs
    if engine == "scan" and needed:
        expected = "'diffrax' under a controller or with an adjoint of diffrax"
        raise _check.bad(where, "engine", expected, repr(engine))
    return engine or ("diffrax" if needed or isinstance(solver, dfx.AbstractSRK) else "scan")


def _cast(tree: Any, dtype: Any) -> Any:
    """Return all floating arrays in a dtype; NumPy stays NumPy, which needs no kernel launch."""

    def one(value: Any) -> Any:
        floats = isinstance(value, jax.Array | np.ndarray | np.generic)
        floats = floats and jnp.issubdtype(value.dtype, jnp.floating)
        return value.astype(dtype) if floats else value

    return jax.tree.map(one, tree)


def _scales(process: AbstractProcess, ts: Values) -> tuple[Array, ...]:
    both = [(process.alpha(t), process.sigma(t)) for t in (ts[0], ts[-1])]
    return both[0] + both[1]


def _ends(process: AbstractProcess, ts: Values, dtype: Any) -> tuple[bool, bool, Any, Any]:
    """Say whether a grid starts without signal and ends without noise.

    Also return alpha at its end, and the process with scales of exactly 0 where they count as 0.
    What cannot be known, since it is traced, counts as neither.
    """
    if is_concrete(process, ts):
        scales = host64(_scales, process, ts)
    else:
        with jax.ensure_compile_time_eval():  # where no traced parameter enters
            scales = _scales(process, ts)
        scales = tuple(np.asarray(a) if is_concrete(a) else a for a in scales)
    alpha0, sigma0, alpha, sigma = scales
    known = is_concrete(alpha0, sigma0), is_concrete(alpha, sigma)
    no_signal = bool(known[0] and vanishing(alpha0, sigma0)[0])
    no_noise = bool(known[1] and vanishing(alpha, sigma)[1])
    rough = (no_signal and alpha0 != 0) or (no_noise and sigma != 0)
    if rough:
        process = _Snapped(process=process)  # type: ignore[reportCallIssue]
    return no_signal, no_noise, _cast(alpha, dtype), process


def _readings(clock: Clock, ts: Array) -> tuple[Array, Array]:
    return jax.vmap(clock.of_t)(ts), jax.vmap(lambda t: jnp.asarray(clock.scale(t)))(ts)


def _finite_rows(where: str, solver: AbstractGridSolver, ts: Any) -> None:
    finite = [np.isfinite(a).reshape(a.shape[0], -1).all(1) for a in jax.tree.leaves(solver.rows)]
    good = np.all(finite, axis=0)
    if not good.all():
        t = float(ts[int(np.argmin(good))])
        expected = f"times from which {type(solver).__name__} has a finite step"
        raise _check.bad(where, "ts", expected, f"t={t!r}, at an infinite log-SNR")
