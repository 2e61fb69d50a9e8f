r"""The sampler: a solve, prepared, as a pure function of one sample.

All that is decided before tracing (grid, clock, coefficients, checks) is made once, by `sampler`.
What is left is a pytree that maps a key to a sample. Sample $i$ of a sequence is a function of its
key `fold_in(key, i)` only: its starting noise comes from stream 0, the noise of its steps from
stream 1, that of hooks from stream 3.

A family of models supplies `prepare`, which returns an `AbstractSolve`: how a sample begins, steps
and ends. Loops, batches, devices, files and checks are written once, for all of them.
"""

import abc
import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray, PyTree, Real

from jaxdiff import _check
from jaxdiff._array import Cond, ScalarLike
from jaxdiff._host import is_concrete
from jaxdiff._keys import HOOK, stream
from jaxdiff._loop import over_steps
from jaxdiff._prepared import Prepared, call, hold_still
from jaxdiff._status import SUCCESS, or_nan, status
from jaxdiff.score import floating
from jaxdiff.solvers.hooks import Between, Hook
from jaxdiff.solvers.reversible import Inverted
from jaxdiff.solvers.terms import ClockName


class Samples(eqx.Module):
    """The result of a sampler (no leading axis) or of `sample` (leading axis n).

    Attributes:
        x: samples, (n, *dims); NaN where the solve failed.
        result: a `diffrax.RESULTS` per sample.
        nfe: network evaluations per sample, (n,); -1 where the solver does not tell.
        aux: `"trajectory"` (n, nodes, *dims) and `"ts"` (n, nodes) if they were asked for; and what
            a family adds: the `"pair"` (n, 2, *dims) of a reversible solver, from which `invert`
            goes back, or the `"momentum"` (n, *dims) of phase space.
    """

    x: Float[Array, "..."]
    result: dfx.RESULTS
    nfe: Int[Array, "..."]
    aux: dict[str, Array]


class State(NamedTuple):
    """What a sample carries from step to step.

    Keys, conditions and the number of the step are arguments, and not in here: resampling copies
    states, and must not copy keys.

    Attributes:
        y: the state in the units of the solver.
        inner: whatever else the solver remembers.
        result: a `diffrax.RESULTS`.
        nfe: network evaluations so far, (); -1 where the solver does not tell.
    """

    y: Any
    inner: Any
    result: Any
    nfe: Any


class AbstractSolve(eqx.Module):
    """A solve of one sample, prepared by a family: how it begins, steps and ends.

    Subclasses write `path_of`, `init`, `step`, `x`, `replace` and, where there is more to do than
    to read x, `end` and `pack`. The model is an argument of each: a solve holds coefficients only.

    Attributes:
        ts: the nodes that are stepped through, (steps + 1,).
        start: shape and dtype of what a sample starts from, the `init` of a sampler.
        stochastic: whether steps draw noise.
        trajectory: whether all states are returned.
        live: whether coefficients were made of traced numbers, so that derivatives reach the
            path through them.
        hooks: what is called after each step, in order: see `solvers.Between`.
    """

    ts: Any = eqx.field(kw_only=True)
    start: jax.ShapeDtypeStruct = eqx.field(static=True, kw_only=True)
    stochastic: bool = eqx.field(static=True, kw_only=True)
    trajectory: bool = eqx.field(static=True, kw_only=True)
    live: bool = eqx.field(static=True, kw_only=True)
    hooks: tuple[Hook, ...] = eqx.field(default=(), kw_only=True)

    @property
    def steps(self) -> int:
        """Number of steps, without the one that `end` may make."""
        return np.shape(self.ts)[0] - 1

    @property
    def last_time(self) -> Any:
        """Time to which `end` makes a step of its own; None where it makes none."""
        return None

    @property
    def adaptive(self) -> bool:
        """Whether a controller chooses the steps, for each sample its own."""
        return False

    @property
    def hookable(self) -> bool:
        """Whether x can be replaced between steps."""
        return True

    @abc.abstractmethod
    def path_of(self, model: Any) -> PyTree:
        """Return the part of a model that coefficients are made of: its process."""

    @abc.abstractmethod
    def init(self, model: Any, key: PRNGKeyArray | None, cond: Cond, init: Any) -> State:
        """Return the first state: from `init`, or from a draw where it is None."""

    def table(self) -> PyTree:
        """Return what each step reads, with a leading axis of steps."""
        return ()

    @abc.abstractmethod
    def step(
        self, model: Any, n: Any, row: Any, key: PRNGKeyArray | None, state: State, cond: Cond
    ) -> State:
        """Make step `n`, from node n to node n + 1, with its `row` of the table."""

    @abc.abstractmethod
    def x(self, n: Any, state: State) -> Array:
        """Return the sample, of the shape of `start`, in a state at node `n`."""

    @abc.abstractmethod
    def replace(self, n: Any, state: State, x: Array) -> State:
        """Return the state at node `n` with another sample in it."""

    def end(
        self, model: Any, key: PRNGKeyArray | None, state: State, cond: Cond
    ) -> tuple[Array, Any]:
        """Return the sample at the end, and the number of evaluations in all."""
        return self.x(self.steps, state), state.nfe

    def pack(self, x: Array, state: State) -> tuple[Array, dict[str, Array]]:
        """Return what users see of a sample: x and whatever stands beside it in `aux`."""
        return x, {}

    @property
    def draws(self) -> bool:
        """Whether a key is needed even where the start is given."""
        return self.stochastic or any(getattr(hook, "stochastic", False) for hook in self.hooks)

    def move(
        self, model: Any, n: Any, key: Any, state: State, cond: Cond, row: Any = None
    ) -> State:
        """Make step `n` and call the hooks; a loop has the row at hand."""
        if row is None:
            row = jax.tree.map(lambda a: a[n], self.table())
        if not self.hooks:
            return self.step(model, n, row, key, state, cond)
        x0, state = self.x(n, state), self.step(model, n, row, key, state, cond)
        times, last = jnp.asarray(self.ts)[jnp.stack([n, n + 1])], self.last_time is None
        for level, hook in enumerate(self.hooks):

            def call_it(state: State, level: int = level, hook: Any = hook) -> State:
                x1 = self._hook(level, hook, model, n, times, x0, self.x(n + 1, state), key, cond)
                return self.replace(n + 1, state._replace(nfe=_more(state.nfe, hook)), x1)

            if last and not getattr(hook, "last", True):
                state = jax.lax.cond(n < self.steps - 1, call_it, lambda state: state, state)
            else:
                state = call_it(state)
        return state

    def close(
        self, model: Any, key: PRNGKeyArray | None, state: State, cond: Cond
    ) -> tuple[Array, Any]:
        """End, and call the hooks if that was a step."""
        x1, nfe = self.end(model, key, state, cond)
        if not self.hooks or self.last_time is None:
            return x1, nfe
        n, x0 = self.steps, self.x(self.steps, state)
        times = jnp.stack([jnp.asarray(self.ts)[-1], jnp.asarray(self.last_time)])
        for level, hook in enumerate(self.hooks):
            if getattr(hook, "last", True):
                x1 = self._hook(level, hook, model, n, times, x0, x1, key, cond)
                nfe = _more(nfe, hook)
        return x1, nfe

    def _hook(
        self, level: int, hook: Any, model: Any, n: Any, times: Array, x0: Array, x1: Array,
        key: PRNGKeyArray | None, cond: Cond,
    ) -> Array:  # fmt: skip
        own = None if key is None else stream(stream(stream(key, HOOK), level), n)
        x1 = jnp.asarray(hook(model, (times[0], times[1]), x0, x1, own, cond))
        if x1.shape != x0.shape:
            raise _check.bad("Between", "what hook returns", f"of shape {x0.shape}", x1.shape)
        return x1.astype(x0.dtype)

    def finish(self, model: Any, key: PRNGKeyArray | None, state: State, cond: Cond) -> Samples:
        """Return the result of a state after all steps."""
        return self._settle(*self.close(model, key, state, cond), state)

    def _settle(self, x: Array, nfe: Any, state: State) -> Samples:
        result = status(state.result, x)
        x, aux = self.pack(or_nan(result, x), state)
        return Samples(x, result, jnp.asarray(nfe), aux)

    def begins(self, init: Any) -> int:
        """Return the number of the first step."""
        return init.step if isinstance(init, Inverted) else 0

    def admit(self, where: str, init: Any, lead: tuple[int, ...] = ()) -> Any:
        """Return a checked `init`, with leading axes `lead`, or raise ValueError."""
        return init if init is None else self._array(where, "init", init, lead)

    def admit_x(self, where: str, x: Any) -> Array:
        """Return a checked sample, or raise ValueError."""
        return self._array(where, "x", x, ())

    def _array(self, where: str, name: str, value: Any, lead: tuple[int, ...]) -> Array:
        shape = (*lead, *self.start.shape)
        try:
            value = value if isinstance(value, jax.Array) else jnp.asarray(value)
        except (TypeError, ValueError):
            raise _check.bad(where, name, f"an array of shape {shape}", repr(value)) from None
        if value.shape != shape:
            raise _check.bad(where, name, f"of shape {shape}", f"shape {value.shape}")
        return value

    def run(
        self, model: Any, key: PRNGKeyArray | None, cond: Cond, init: Any, nudges: Any = None
    ) -> Samples:
        """Begin, make all steps, and end.

        `nudges`, (nodes, *dims), are added to the states at all nodes, and the one after the last
        to the sample: with zeros, the derivative by them is that by the states.
        """
        first, state = self.begins(init), self.init(model, key, cond, init)
        see = self.x if self.trajectory or nudges is not None else None

        def nudge(n: Any, state: State) -> State:
            return state if nudges is None else self.replace(n, state, self.x(n, state) + nudges[n])

        def step(n: Any, state: State, row: Any) -> State:
            return nudge(n + 1, self.move(model, n, key, state, cond, row))

        state = nudge(first, state)
        x0 = None if see is None else self.x(first, state)
        state, xs = over_steps(step, state, first, self.steps, see, self.table())
        x, nfe = self.close(model, key, state, cond)
        if nudges is not None and self.last_time is not None:
            x = x + nudges[-1]
        out = self._settle(x, nfe, state)
        return out if x0 is None else self._with_path(out, jnp.concatenate([x0[None], xs]), x)

    def _with_path(self, out: Samples, path: Array, x: Array) -> Samples:
        first = np.shape(self.ts)[0] - len(path)
        ts = jnp.asarray(self.ts)[first:]
        if self.last_time is not None:
            path, ts = jnp.concatenate([path, x[None]]), jnp.append(ts, self.last_time)
        return eqx.tree_at(lambda out: out.aux, out, out.aux | {"trajectory": path, "ts": ts})


def _more(nfe: Any, hook: Any) -> Any:
    """Add the evaluations of a hook, unless nobody knows those of the solver."""
    return jnp.where(nfe < 0, nfe, nfe + getattr(hook, "evaluations", 0))


class Sampler(Prepared):
    """A prepared solve: a pure function of a key, a condition and a start. Made by `sampler`.

    Works under `jit`, `vmap`, `grad`, `pmap` and sharding. Its arrays, those of the network among
    them, are arguments of the compiled program: new values compile nothing.

    Attributes:
        model: what is sampled from.
        solve: how.
    """

    model: Any
    solve: AbstractSolve

    def __call__(self, key: PRNGKeyArray | None, cond: Cond = None, init: Any = None) -> Samples:
        r"""Draw one sample.

        Args:
            key: a threefry key from `jax.random.key`; None if nothing random is left to draw.
            cond: condition passed to the network.
            init: what to start from, (*dims,) (in phase space position and momentum, (2, *dims)),
                instead of a draw; or the result of `invert`.

        Returns:
            `Samples` with `x: (*dims,)`. Nothing raises inside jit: a failed solve gives NaN and a
            `result`, which `check` turns into an error.

        Raises:
            ValueError: if `key` is missing or not threefry, or `init` does not fit.
        """
        if init is not None or not _check.is_key(key):  # what most calls are needs no other look
            key, init = _admit("sampler", self, key, init)
        return call(run_one, self, key, cond, init)

    def init(self, key: PRNGKeyArray | None, cond: Cond = None, init: Any = None) -> State:
        """Return the state before the first step; arguments as of a call."""
        if isinstance(init, Inverted):
            expected = "an array: pairs go through a call"
            raise _check.bad("sampler.init", "init", expected, "the result of invert")
        self._on_a_grid("sampler.init")
        key, init = _admit("sampler.init", self, key, init)
        return call(_init, self, key, cond, init)

    def step(
        self, n: int | Int[Array, ""], key: PRNGKeyArray | None, state: State, cond: Cond = None
    ) -> State:
        """Return the state after step `n`, which is 0 for the first and below `steps`."""
        self._on_a_grid("sampler.step")
        if is_concrete(n) and not 0 <= int(n) < self.steps:
            raise _check.bad("sampler.step", "n", f"from 0 to {self.steps - 1}", n)
        key = _check.needed_key("sampler.step", key, self.solve.draws)
        return call(_step, self, n, key, state, cond)

    def finish(self, key: PRNGKeyArray | None, state: State, cond: Cond = None) -> Samples:
        """Return the result of a state after all steps, making the step to sigma = 0."""
        key = _check.needed_key("sampler.finish", key, self.solve.draws)
        return call(_finish, self, key, state, cond)

    @property
    def steps(self) -> int:
        """Number of steps.

        Raises:
            ValueError: if steps are chosen by a controller, for each sample its own.
        """
        self._on_a_grid("sampler.steps")
        return self.solve.steps

    def _on_a_grid(self, where: str) -> None:
        if self.solve.adaptive:
            expected = "left out: its steps are each sample's own, and there is no step n"
            raise _check.bad(where, "controller", expected, "a sampler with one")

    def x(self, n: int | Int[Array, ""], state: State) -> Array:
        """Return the sample in a state at node `n`, before step n: (*dims,)."""
        return call(_x, self, n, state)

    def replace(self, n: int | Int[Array, ""], state: State, x: Float[Any, "*dims"]) -> State:
        """Return the state at node `n` with another sample in it.

        Raises:
            ValueError: if the solver is reversible: its state is a pair, of which x is one half; or
                if `x` is not of the shape of a sample.
        """
        x = self.solve.admit_x("sampler.replace", x)
        return call(_replace, self, n, state, x)

    def invert(self, x: Any, cond: Cond = None, *, freeze: float | int = 0.0) -> Inverted:
        r"""Run the steps of a reversible solver backwards, from data to noise.

        The way back is `sampler(None, cond, init=inverted)`, and it ends at `x` exactly: up to
        rounding, which grows as `jaxdiff.solvers.reversible` says. Of a sample that this sampler
        returned, the round trip the other way is exact too: give the `Samples` and not only `x`,
        for they hold the pair. Many: `jd.many(sampler.invert, x, cond)`.

        Cost: the network evaluations of the same steps forwards, and one more for the pair of a
        given `x`; no autodiff.

        Args:
            x: a sample at the last node, (*dims,), or the result of this sampler.
            cond: condition passed to the network.
            freeze: share of the steps, the noisiest, to leave out, in [0, 1): stop before them.

        Returns:
            `Inverted`, of which `x` is the state at the noise end. Nothing raises inside jit: a
            failed inversion gives NaN and a `result`, which `check` turns into an error.

        Raises:
            ValueError: if the solver has no inverse or forgets the state at sigma = 0, `freeze`
                leaves less than a step each way, or `x` does not fit.

        Example:
            >>> import jaxdiff as jd
            >>> vp = jd.process.VP()
            >>> two = jd.exact.mixture(vp, [0.5, 0.5], [[-1.0], [1.0]], 0.01)
            >>> leapfrog = jd.solvers.SymmetricLeapfrog()
            >>> trip = jd.sampler(two, (1,), solver=leapfrog, ts=vp.grid(50, "logsnr"))
            >>> noise = trip.invert(jnp.array([1.1]))
            >>> bool(abs(trip(None, init=noise).x[0] - 1.1) < 1e-5)
            True

        References:
            Wang et al. 2024 (2410.07273), algorithm 1; Wallace et al. 2022 (2211.12446).
        """
        inverse = getattr(self.solve, "inverse", None)
        if inverse is None:
            expected = "one with a reversible solver, as SymmetricLeapfrog()"
            name = type(getattr(self.solve, "solver", self.solve)).__name__
            raise _check.bad("invert", "sampler", expected, name)
        x, pair = _sample_and_pair("invert", x)
        step = self.solve.admit_back("invert", x, pair, freeze)  # type: ignore[attr-defined]
        return call(_inverter(step), self, x, pair, cond)

    def with_model(self, model: Any) -> "Sampler":
        """Return this sampler of another model of the same process, with nothing prepared anew.

        Raises:
            ValueError: if the process is another, or being traced.
        """
        ours, theirs = self.solve.path_of(self.model), self.solve.path_of(model)
        if not is_concrete(ours, theirs) or eqx.tree_equal(ours, theirs) is not True:
            expected = "of the process that the sampler was prepared for"
            raise _check.bad("with_model", "model", expected, repr(theirs))
        return Sampler(model, self.solve)


def _admit(where: str, self: Sampler, key: Any, init: Any) -> tuple[Any, Any]:
    init = self.solve.admit(where, init)
    return _check.needed_key(where, key, init is None or self.solve.draws), init


def _held(self: Sampler) -> Any:
    """Return the model, its process closed to derivatives that would miss the coefficients."""
    path = () if self.solve.live else self.solve.path_of(self.model)
    return hold_still(self.model, path)


def run_one(self: Sampler, key: Any, cond: Cond, init: Any) -> Samples:
    """Draw one sample, unchecked, inside a program."""
    return self.solve.run(_held(self), key, cond, init)


def _init(self: Sampler, key: Any, cond: Cond, init: Any) -> State:
    return self.solve.init(_held(self), key, cond, init)


def _step(self: Sampler, n: Any, key: Any, state: State, cond: Cond) -> State:
    return self.solve.move(_held(self), n, key, state, cond)


def _finish(self: Sampler, key: Any, state: State, cond: Cond) -> Samples:
    return self.solve.finish(_held(self), key, state, cond)


def _x(self: Sampler, n: Any, state: State) -> Array:
    return self.solve.x(n, state)


def _replace(self: Sampler, n: Any, state: State, x: Array) -> State:
    return self.solve.replace(n, state, x)


def _sample_and_pair(where: str, x: Any) -> tuple[Array, Array | None]:
    """Return a sample, and its pair of states where it is the result of a reversible solver."""
    if not isinstance(x, Samples):
        return floating(x), None
    if "pair" not in x.aux:
        expected = "an array, or a result of a sampler with a reversible solver"
        raise _check.bad(where, "x", expected, f"Samples with aux {sorted(x.aux)}")
    return floating(x.x), x.aux["pair"]


@functools.cache
def _inverter(step: int) -> Any:
    def _invert(self: Sampler, x: Array, pair: Any, cond: Cond) -> Inverted:
        return self.solve.inverse(_held(self), step, x, pair, cond)  # type: ignore[attr-defined]

    return _invert


@functools.singledispatch
def prepare(model: Any, start: jax.ShapeDtypeStruct, *, solver: Any, ts: Any) -> AbstractSolve:
    """Return the solve of a model; a family registers its own, with the options that it knows.

    Args:
        model: what to sample from.
        start: shape and dtype of a sample.
        solver: a solver of the family.
        ts: the grid.

    Raises:
        ValueError: naming the first argument that is wrong.
    """
    expected = "a model that jaxdiff can sample from, as Denoiser(process, net)"
    raise _check.bad("sampler", "model", expected, repr(model))


_DEFAULTS: dict[str, Any] = dict(
    denoise=False,
    trajectory=False,
    engine=None,
    equation=None,
    clock=None,
    noise=None,
    diffusion=None,
    controller=None,
    adjoint=None,
    max_steps=4096,
)


def sampler(
    model: Any,
    shape: tuple[int, ...],
    *,
    solver: Any,
    ts: Real[ArrayLike, " nodes"] | Sequence[Any],
    denoise: bool = False,
    trajectory: bool = False,
    engine: Literal["scan", "diffrax"] | None = None,
    equation: Literal["ode", "sde"] | None = None,
    clock: ClockName | None = None,
    noise: Callable[[PRNGKeyArray], dfx.AbstractBrownianPath] | None = None,
    diffusion: ScalarLike | Callable[[Any], Any] | None = None,
    controller: dfx.AbstractStepSizeController | None = None,
    adjoint: dfx.AbstractAdjoint | None = None,
    max_steps: int = 4096,
    dtype: Any = None,
) -> Sampler:
    r"""Prepare a solve from `ts[0]` (noise) to `ts[-1]` (data), once for all samples.

    $$ x_{t_0} \sim N(0, \sigma(t_0)^2 I), \qquad x_{t_{i+1}} = \mathrm{solver}(x_{t_i}) $$

    A solver of jaxdiff decides between the PF-ODE and the reverse SDE by itself; one of diffrax
    solves the PF-ODE, unless it is a stochastic Runge-Kutta method or `equation="sde"`. On a fixed
    grid all run in one plain scan. How a solve ends where sigma vanishes at `ts[-1]` is the
    solver's to say: BELM, BDIA, EDICT and VelocityLeapfrog have a finite step there, and all others
    the exact limit of exponential methods, $x = \alpha\,m$.

    Coefficients are made here. For a gradient by a parameter of the process, of the grid or of the
    solver, call this inside the function that is differentiated.

    Cost of a sample: as many network evaluations as `nfe` says; no autodiff. Memory does not grow
    with the number of steps unless `trajectory` or a gradient is asked for.

    Args:
        model: a `Denoiser`, or a model of `jaxdiff.phase`, `jaxdiff.interpolants`, or any other
            that has registered itself with `prepare`.
        shape: shape of one sample, `(*dims,)`.
        solver: an instance, `jaxdiff.solvers.DDIM()` or `diffrax.Tsit5()`, or one of the family, as
            `phase.Rotation()`; or `solvers.Between(solver, hook)`.
        ts: strictly decreasing times inside the process, (nodes,); see `process.grid`. A traced
            grid must not end at sigma = 0 for a solver of diffrax: no clock reaches it.
        denoise: finish with one more evaluation, $x = m(t_N, x)$: a step to sigma = 0.
        trajectory: also return the states at all nodes, in `aux`.
        engine: `"scan"` or `"diffrax"` (`diffrax.diffeqsolve`); the results are equal, and for a
            reversible solver, which steps its pair only in the scan, equal to rounding.
        equation: `"ode"` or `"sde"`, for solvers of diffrax.
        clock: clock of the PF-ODE for solvers of diffrax: `"r"` on a fixed grid, `"lam"` under a
            controller, by default.
        noise: from a key to a Brownian path in clock `"u"`, of the shape of a sample, instead of
            one keyed by the grid; under a controller, a `diffrax.VirtualBrownianTree`.
        diffusion: of interpolants only, $e \ge 0$: a number or a function of the time; see there.
        controller: a diffrax step-size controller, for solvers of diffrax; `ts` then gives the
            two ends and the times of `trajectory`.
        adjoint: a diffrax adjoint, for the diffrax engine; or, for a reversible solver,
            `solvers.ReversibleAdjoint()`, whose memory does not grow with the number of steps.
        max_steps: bound on the steps under a controller.
        dtype: dtype of the sample; the default float.

    Returns:
        The `Sampler`.

    Raises:
        ValueError: if an argument is wrong: `ts` is not a grid of the process, a solver cannot
            start at `ts[0]`, an option is not one of this kind of model.

    Example:
        >>> import jaxdiff as jd
        >>> vp = jd.process.VP()
        >>> unit = jd.exact.gaussian(vp, jnp.zeros(2), 1.0)
        >>> ddim = sampler(unit, (2,), solver=jd.solvers.DDIM(), ts=vp.grid(5))
        >>> one = ddim(jax.random.key(0))
        >>> one.x.shape, int(one.nfe)
        ((2,), 5)
    """
    where, given = "sampler", locals()
    shape, dtype = _check.dims(where, "shape", shape), _check.floating_dtype(where, dtype)
    options = {name: given[name] for name in _DEFAULTS if _changed(given[name], _DEFAULTS[name])}
    family = prepare.dispatch(type(model))
    known = inspect.signature(family).parameters
    for name in options:
        if family is not prepare.dispatch(object) and name not in known:
            expected = f"left out: {type(model).__name__} has no such option"
            raise _check.bad(where, name, expected, repr(options[name]))
    hooks = []
    while isinstance(solver, Between):
        hooks.append(solver.hook)
        solver = solver.solver
    start = jax.ShapeDtypeStruct(shape, dtype)
    solve = prepare(model, start, solver=solver, ts=ts, **options)
    if hooks and not solve.hookable:
        expected = "left out: no hook fits between the steps of a controller or a reversible solver"
        raise _check.bad(where, "solver (Between)", expected, repr(hooks[0]))
    return Sampler(model, dataclasses.replace(solve, hooks=tuple(reversed(hooks))))


def _changed(value: Any, default: Any) -> bool:
    same = value is default or (isinstance(value, bool | int) and value == default)
    return not same


def check(samples: PyTree) -> Any:
    """Return `samples`, or raise on the host if any of them failed.

    Args:
        samples: a result of a sampler, of `sample`, of a likelihood, or any other with a field
            `result`.

    Raises:
        RuntimeError: naming how many samples failed, which, and why.
        ValueError: if `samples` is no result, or is being traced.
    """
    known = isinstance(getattr(samples, "result", None), dfx.RESULTS)
    if not known or not is_concrete(samples):
        got = "a traced one; call it outside jit" if known else samples
        raise _check.bad("check", "samples", "a result of a sampler or a likelihood", got)
    codes = np.ravel(jax.tree.leaves(samples.result)[0])
    failed = np.ravel(samples.result != SUCCESS)
    if not failed.any():
        return samples
    reasons = []
    for code in np.unique(codes[failed]):
        i = int(np.argmax(codes == code))
        item = jax.tree.map(lambda a, i=i: np.asarray(np.ravel(a)[i]), samples.result)
        reasons.append(f"{dfx.RESULTS[item].strip()} ({int((codes == code).sum())} samples)")
    raise RuntimeError(
        f"check: {failed.sum()} of {failed.size} samples failed, first at index "
        f"{np.flatnonzero(failed)[0]}: " + "; ".join(reasons)
    )
