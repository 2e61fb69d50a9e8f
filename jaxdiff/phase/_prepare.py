r"""Solves of phase space: every coefficient of a grid, tabulated before tracing.

The noise of stage j of step k comes from `fold_in(fold_in(stream 1, k), j)`.
"""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from jaxdiff import _check, grids
from jaxdiff._array import Cond, time_dtype
from jaxdiff._host import host64, is_concrete
from jaxdiff._keys import INIT, SOLVER, stream
from jaxdiff._sampler import AbstractSolve, State, prepare
from jaxdiff._status import SUCCESS
from jaxdiff.phase.denoiser import AbstractDenoiser, Head
from jaxdiff.phase.process import apply
from jaxdiff.phase.solvers import AbstractPhaseSolver, Stage


class PhaseSolve(AbstractSolve):
    """A solver of phase space on a grid: what is stepped is position and momentum, (2, *dims).

    Attributes:
        stages: of every step; leaves have a leading axis of steps.
        root: root of the covariance at `ts[0]`.
        last: the denoising step; None without one.
        memory: number of older predictions in use.
    """

    stages: tuple[Stage, ...]
    root: Any
    last: Stage | None
    memory: int = eqx.field(static=True)

    @property
    def last_time(self) -> Any:
        """The last node once more."""
        return None if self.last is None else jnp.asarray(self.ts)[-1]

    def path_of(self, model: Any) -> Any:
        """Return the process, and what a prediction means."""
        return model.head

    def init(self, model: Any, key: Any, cond: Cond, init: Any) -> State:
        """Draw position and momentum from the prior, or take those that are given."""
        if init is None:
            own, dtype = stream(key, INIT), self.start.dtype
            init = apply(jnp.asarray(self.root), jax.random.normal(own, self.start.shape, dtype))
        z = jnp.asarray(init).astype(self.start.dtype)
        history = (jnp.zeros_like(z),) * self.memory
        return State(z, history, SUCCESS, jnp.asarray(0))

    def table(self) -> Any:
        """Return the stages."""
        return jax.tree.map(jnp.asarray, self.stages)

    def step(self, model: Any, n: Any, row: Any, key: Any, state: State, cond: Cond) -> State:
        """Go through the stages."""
        own = None if key is None else jax.random.fold_in(stream(key, SOLVER), n)
        z, outputs = _advance(model, row, state.y, state.inner, own, cond)
        nfe = state.nfe + sum(stage.t is not None for stage in row)
        return State(z, outputs[: self.memory], state.result, nfe)

    def x(self, n: Any, state: State) -> Array:
        """Return position and momentum."""
        return state.y

    def replace(self, n: Any, state: State, x: Array) -> State:
        """Return the state with another position and momentum."""
        return state._replace(y=x.astype(state.y.dtype))

    def end(self, model: Any, key: Any, state: State, cond: Cond) -> tuple[Array, Any]:
        """Make the denoising step where one is asked for."""
        if self.last is None:
            return state.y, state.nfe
        last = jax.tree.map(jnp.asarray, self.last)
        return _advance(model, (last,), state.y, (), None, cond)[0], state.nfe + 1

    def pack(self, x: Array, state: State) -> tuple[Array, dict[str, Array]]:
        """Hand out the position, and the momentum beside it."""
        return x[0], {"momentum": x[1]}


@prepare.register
def _(
    model: AbstractDenoiser,
    start: jax.ShapeDtypeStruct,
    *,
    solver: Any,
    ts: Any,
    denoise: bool = False,
    trajectory: bool = False,
) -> PhaseSolve:
    """Check the arguments and tabulate the stages of all steps.

    `denoise` needs both halves of a prediction of noise, which is not what CLD trains.
    """
    where = "sampler"
    if not isinstance(solver, AbstractPhaseSolver):
        raise _check.bad(where, "solver", "one of jaxdiff.phase, as Rotation()", repr(solver))
    head, wide, name = model.head, time_dtype(start.dtype), type(solver).__name__
    ts = grids.check(head.process.times, ts, where=where, dtype=wide)
    if solver.stable_only and is_concrete(head.process):
        rates = np.linalg.eigvals(np.asarray(head.process.A)).real
        if not np.all(rates < 0):
            expected = f"stable for {name}, its eigenvalues having real parts < 0"
            raise _check.bad(where, "the drift A of the process", expected, rates.tolist())
    stages = solver.tabulate(head, ts)
    leaves = jax.tree.leaves(stages)
    if is_concrete(leaves) and not all(np.all(np.isfinite(leaf)) for leaf in leaves):
        expected = f"a grid on which {name} has finite coefficients"
        raise _check.bad(where, "ts", expected, ts)
    root, last = host64(_ends, head, ts)
    arrays = (stages, root, last if denoise else None, ts)
    *arrays, ts = jax.tree.map(lambda a: a.astype(wide), arrays)
    return PhaseSolve(
        *arrays,
        memory=solver.memory,
        ts=ts,
        start=jax.ShapeDtypeStruct((2, *start.shape), start.dtype),
        stochastic=any(stage.noise is not None for stage in stages),
        trajectory=trajectory,
        live=not is_concrete(head),
    )


def _ends(head: Head, ts: Array) -> tuple[Array, Stage]:
    state, weight = head.to_clean(ts[-1])
    return head.process.root(ts[0]), Stage(state, (weight,), ts[-1])


def _advance(
    denoiser: AbstractDenoiser,
    stages: tuple[Stage, ...],
    z: Array,
    outputs: tuple[Array, ...],
    key: PRNGKeyArray | None,
    cond: Cond,
) -> tuple[Array, tuple[Array, ...]]:
    """Make one step; return the next state and all predictions, newest first."""
    y = z
    for j, stage in enumerate(stages):
        if stage.t is not None:
            outputs = (denoiser.raw(stage.t, z, cond), *outputs)
        terms = [apply(stage.state, z)]
        terms += [] if stage.base is None else [apply(stage.base, y)]
        terms += [apply(w, o) for w, o in zip(stage.weights, outputs, strict=False)]
        if stage.noise is not None:
            assert key is not None
            noise = jax.random.normal(jax.random.fold_in(key, j), z.shape, z.dtype)
            terms.append(apply(stage.noise, noise))
        z = functools.reduce(jnp.add, terms).astype(z.dtype)
        if stage.t is None:
            y = z
    return z, outputs
