r"""One engine for every solver on a grid: a step is a row of coefficients.

Notation: a step goes from time $t_0$ to $t_1 < t_0$, with older nodes $t_{-1}, t_{-2}, \dots$;
$h = \lambda_1 - \lambda_0 > 0$. In the clocks of `terms` the equations have no linear part, so a
linear method is

$$ x_1 = d\,x_0 + \sum_j w_j\,m_j + c\,z $$

where the decay $d$, weights $w_j$ and noise $c$ depend on the nodes only: a solver is a function
from nodes to a row. On a known grid the rows are built once, in float64; under an arbitrary
step-size controller they are built in the step. Short histories are zero weights, never branches.
"""

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff._types import Scalar, ScalarLike, host64, time_dtype
from jaxdiff.process import AbstractProcess
from jaxdiff.solvers.terms import View, view


class Row(NamedTuple):
    """The coefficients of one step.

    Attributes:
        decay: factor of the current state, ().
        weights: factors of the current and older network outputs, (memory + 1,) for a multistep
            method.
        noise: factor of a standard normal, (); 0 for a deterministic method.
    """

    decay: Scalar
    weights: Float[Array, " w"]
    noise: ScalarLike = 0.0


class State(NamedTuple):
    """What a solver carries from step to step.

    Attributes:
        step: number of steps made, int32 ().
        nodes: older times (not clock readings), newest first, (memory,).
        history: older network outputs, newest first, a tuple of `memory` arrays like the state.
    """

    step: Array
    nodes: Float[Array, " memory"]
    history: tuple[Array, ...]


def _tabulate(solver: "AbstractGridSolver", process: AbstractProcess, ts: Array) -> Row:
    steps = jnp.arange(ts.shape[0] - 1)
    older = [jnp.maximum(steps - j, 0) for j in range(solver.memory + 1)]
    windows = jnp.stack([ts[steps + 1], *(ts[i] for i in older)], axis=1)
    return jax.vmap(lambda window, n: solver.row(process, window, n))(windows, steps)


class AbstractGridSolver(dfx.AbstractItoSolver):
    """A solver that is a row of coefficients per step; subclasses write `row`.

    Works on the terms of `pf_ode` (deterministic) and `reverse_sde` (stochastic) in any clock, in
    `diffrax.diffeqsolve` and in the plain scan of `jaxdiff.draw`, with the same `step`.

    Attributes:
        rows: the coefficients of every step of a known grid, made by `tabulate`; None to build
            each row inside its step.
        memory: number of older network outputs in use.
        evaluations: denoiser evaluations per step.
        stochastic: whether steps add noise.
    """

    rows: eqx.AbstractVar[Row | None]
    memory: ClassVar[int] = 0
    evaluations: ClassVar[int] = 1
    claimed_order: ClassVar[int] = 1

    term_structure: ClassVar[Any] = dfx.AbstractTerm
    interpolation_cls: ClassVar[Any] = dfx.LocalLinearInterpolation

    @property
    def stochastic(self) -> bool:
        """Whether steps add noise."""
        return False

    @abc.abstractmethod
    def row(self, process: AbstractProcess, ts: Float[Array, " nodes"], n: Any) -> Row:
        """Return the coefficients of step `n`, counted from 0.

        Args:
            process: the Gaussian path.
            ts: the next node, the current one and `memory` older ones; where fewer than `memory`
                exist, the first node again.
            n: number of steps made before this one, ().
        """

    def advance(self, at: View, row: Row, t: Array, x: Array, state: State) -> tuple[Array, Array]:
        """Make one step from `x` at times `t = (t0, t1)`; return the next `x` and its output."""
        m = at.field.denoiser(t[0], x, at.field.cond)
        outputs = (m, *state.history)
        x1 = row.decay * x + sum(w * f for w, f in zip(row.weights, outputs, strict=True))
        if self.stochastic:
            x1 = x1 + row.noise * at.normal(state.step, x)
        return x1, m

    def tabulate(self, process: AbstractProcess, ts: Any) -> "AbstractGridSolver":
        """Return this solver with the rows of a known grid, computed in float64.

        Use it with a step-size controller that steps to exactly these times.
        """
        return dataclasses.replace(self, rows=host64(_tabulate, self, process, ts))

    def order(self, terms: Any) -> int:
        """Return the order of convergence on a smooth grid, as claimed."""
        return self.claimed_order

    def strong_order(self, terms: Any) -> float:
        """Return the pathwise order of convergence for additive noise."""
        return 1.0

    def init(self, terms: Any, t0: Any, t1: Any, y0: Array, args: Any) -> State:
        """Return an empty history: zeros, whose weights are zero until they are filled."""
        at = view(terms, t0, t1)
        nodes = jnp.broadcast_to(at.field.clock.t(at.c0), (self.memory,))
        return State(jnp.zeros((), jnp.int32), nodes, (jnp.zeros_like(y0),) * self.memory)

    def step(
        self,
        terms: Any,
        t0: Any,
        t1: Any,
        y0: Array,
        args: Any,
        solver_state: State,
        made_jump: Any,
    ) -> tuple[Array, None, dict[str, Array], State, Any]:
        """Make one step of diffrax."""
        state = solver_state
        at = view(terms, t0, t1)
        clock = at.field.clock
        t = jnp.stack([clock.t(at.c0), clock.t(at.c1)])
        if self.rows is None:
            window = jnp.concatenate([t[::-1], state.nodes])
            row = self.row(clock.process, window, state.step)
        else:
            row = jax.tree.map(lambda table: jnp.asarray(table)[state.step], self.rows)
        row = jax.tree.map(lambda value: jnp.asarray(value, time_dtype(y0.dtype)), row)
        x = (y0 / clock.scale(t[0])).astype(y0.dtype)
        x1, output = self.advance(at, row, t, x, state)
        y1 = (x1 * clock.scale(t[1])).astype(y0.dtype)
        state = State(
            state.step + 1,
            jnp.concatenate([t[:1], state.nodes])[: self.memory],
            (output, *state.history)[: self.memory],
        )
        return y1, None, dict(y0=y0, y1=y1), state, dfx.RESULTS.successful

    def func(self, terms: Any, t0: Any, y0: Array, args: Any) -> Array:
        """Return the vector field, for controllers that look at it."""
        return terms.vf(t0, y0, args)
