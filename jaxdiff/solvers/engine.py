r"""One engine for every solver on a grid: a step is a row of coefficients.

Notation: a step goes from time $t_0$ to $t_1 < t_0$, with older nodes $t_{-1}, t_{-2}, \dots$;
$h = \lambda_1 - \lambda_0 > 0$; $z$ is standard normal. Every method of the field, multistep or
multistage, on the ODE or the SDE, is

$$ x_1 = d\,x_0 + g\,m_0 + \sum_j w_j\,(o_j - o_0) + \sum_k c_k z_k, $$

a step that freezes the network output $m_0$, and a combination of *differences* of outputs $o_j$
of older nodes and of inner stages, each stage being such a combination itself. What an output is
($m$, $\hat\epsilon$, or the velocity) is the solver's choice. The decay $d$, gain $g$, weights
$w_j$ and noise $c_k$ depend on the nodes only: a solver is a function from nodes to a row. Since
differences vanish where the network output is constant, a solver whose $d$ and $g$ are those of
DDIM is exact for a single atom of data on any grid.

On a known grid the rows are built once, in float64; under an arbitrary step-size controller they
are built in the step. Short histories are zero weights, never branches.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdiff._array import Cond, time_dtype
from jaxdiff._host import host64, is_concrete
from jaxdiff.process import AbstractProcess
from jaxdiff.score import AbstractDenoiser
from jaxdiff.solvers.terms import View, view

__all__ = ["ENDLESS", "AbstractGridSolver", "Output", "Row", "State", "combine"]

Output: TypeAlias = Literal["x0", "eps", "velocity"]
ENDLESS = 2**30  # steps left where nobody knows


class Row(NamedTuple):
    """The coefficients of one step (or of one inner stage).

    Attributes:
        decay: factor of the current state, ().
        gain: factor of the current posterior mean, ().
        weights: factors of the differences from the current output, first of older outputs, newest
            first, then of inner stages; missing ones at the end are zero.
        noise: factors of independent standard normals; none for a deterministic method.
        stages: inner stages in order: the time, and the row that leads there from the start of
            the step.
    """

    decay: Any
    gain: Any
    weights: Any = ()
    noise: Any = ()
    stages: tuple[tuple[Any, "Row"], ...] = ()


class State(NamedTuple):
    """What a solver carries from step to step.

    Attributes:
        step: number of steps made, int32 ().
        nodes: older times (not clock readings), newest first, (memory,).
        history: older network outputs, newest first, a tuple of `memory` arrays like the state.
        extra: whatever else a solver carries.
    """

    step: Array
    nodes: Float[Array, " memory"]
    history: tuple[Array, ...]
    extra: Any = ()


def _tabulate(
    solver: "AbstractGridSolver", process: AbstractProcess, ts: Array, more: int, known: bool
) -> Any:
    steps = jnp.arange(ts.shape[0] - 1)
    older = [jnp.maximum(steps - j, 0) for j in range(solver.memory + 1)]
    windows = jnp.stack([ts[steps + 1], *(ts[i] for i in older)], axis=1)
    left = steps.shape[0] + more - steps
    row = lambda window, n, left: solver.row(process, window, n, left)  # noqa: E731
    if known:  # on the host one after the other, which is less to trace and to compile
        return jax.lax.map(lambda args: row(*args), (windows, steps, left))
    return jax.vmap(row)(windows, steps, left)


def combine(row: Row, x: Array, m: Array, outputs: Sequence[Array], normals: Any) -> Array:
    """Return the new state: the module's equation, with `outputs[0]` the current one."""
    x1 = row.decay * x + row.gain * m
    for w, output in zip(row.weights, outputs[1:], strict=False):
        x1 = x1 + w * (output - outputs[0])
    for k, c in enumerate(row.noise):
        x1 = x1 + c * normals(k)
    return x1


class AbstractGridSolver(dfx.AbstractItoSolver):
    """A solver that is a row of coefficients per step; subclasses write `row`.

    Works on the terms of `pf_ode` (deterministic) and `reverse_sde` (stochastic) in any clock, in
    `diffrax.diffeqsolve` and in the plain scan of `jaxdiff.sampler`, with the same `step`.

    Attributes:
        rows: the coefficients of every step of a known grid, made by `tabulate`; None to build
            each row inside its step. By keyword only.
        memory: number of older network outputs in use.
        evaluations: denoiser evaluations per step.
        stochastic: whether steps add noise.
        claimed_order: order of convergence on a smooth grid.
        finite_end: whether a step to sigma = 0 is made by a row as any other. Elsewhere it is the
            limit of exponential methods, x = alpha m.
        output: what is remembered and compared: the posterior mean `"x0"`, the noise prediction
            `"eps"` or the velocity of the PF-ODE `"velocity"`.
    """

    rows: Any = eqx.field(default=None, kw_only=True)
    # No annotations: a subclass may write `memory = 1`, a property, or a field of the same name.
    memory = 0
    evaluations = 1
    claimed_order = 1
    output = "x0"
    stochastic = False
    finite_end = False

    term_structure: ClassVar[Any] = dfx.AbstractTerm
    interpolation_cls: ClassVar[Any] = dfx.LocalLinearInterpolation

    @abc.abstractmethod
    def row(self, process: AbstractProcess, ts: Float[Array, " nodes"], n: Any, left: Any) -> Any:
        """Return the coefficients of step `n` of this solver, counted from 0.

        Args:
            process: the Gaussian path.
            ts: the next node, the current one and `memory` older ones; where fewer than `memory`
                exist, the first node again.
            n: number of steps that this solver has made, (); under `WarmStart`, fewer than there
                are older nodes.
            left: number of steps from this one to the end, itself included, ().
        """

    def outputs(
        self, denoiser: AbstractDenoiser, t: Any, x: Array, cond: Cond
    ) -> tuple[Array, Array]:
        """Evaluate the network once; return the posterior mean and the solver's output."""
        if self.output == "x0":
            m = denoiser(t, x, cond)
            return m, m
        m, eps = denoiser.pair(t, x, cond)
        if self.output == "eps":
            return m, eps
        hold = jax.lax.optimization_barrier  # for rounding that is the same in every program
        d_alpha, d_sigma = hold(denoiser.process.rates(hold(t)))
        return m, (d_alpha * m + d_sigma * eps).astype(x.dtype)

    def advance(
        self, at: View, row: Any, t: Array, x: Array, state: State
    ) -> tuple[Array, Array, Any]:
        """Make one step from `x` at `t = (t0, t1)`; return the next `x`, output and extra."""
        denoiser, cond = at.field.denoiser, at.field.cond
        if not self.stochastic:
            row = row._replace(noise=())  # rows are built where a zero may be a traced number
        m, output = self.outputs(denoiser, t[0], x, cond)
        outputs = [output, *state.history]
        marks = (t[0], *(time for time, _ in row.stages), t[1])  # between which normals live

        def normals(k: int) -> Array:
            ends = (marks[k], marks[k + 1]) if row.stages else None
            return at.normal(state.step, x, use=k, ends=ends)

        for time, stage in row.stages:
            inner = combine(stage, x, m, outputs, normals).astype(x.dtype)
            outputs.append(self.outputs(denoiser, time, inner, cond)[1])
        return combine(row, x, m, outputs, normals), output, state.extra

    def begin(self, x: Array) -> Any:
        """Return the `extra` of the first step."""
        return ()

    def cost(self, steps: Any) -> Any:
        """Return the number of denoiser evaluations in `steps` steps."""
        return self.evaluations * steps

    def tabulate(self, process: AbstractProcess, ts: Any, *, more: int = 0) -> "AbstractGridSolver":
        """Return this solver with the rows of a known grid, computed in float64.

        Use it with a step-size controller that steps to exactly these times. `more` steps, made
        by somebody else, follow the last one.
        """
        known = is_concrete(self, process, ts)
        return dataclasses.replace(self, rows=host64(_tabulate, self, process, ts, more, known))

    def order(self, terms: Any) -> int:
        """Return the order of convergence on a smooth grid, as claimed."""
        return self.claimed_order

    def strong_order(self, terms: Any) -> float:
        """Return the pathwise order of convergence for additive noise."""
        return 1.0

    def init(self, terms: Any, t0: Any, t1: Any, y0: Array, args: Any) -> State:
        """Return an empty history: zeros, whose weights are zero until they are filled."""
        at = view(terms, t0, t1)
        t = at.field.clock.t(at.c0)
        nodes = jnp.broadcast_to(t, (self.memory,))
        x = (y0 / at.field.clock.scale(t)).astype(y0.dtype)
        history = (jnp.zeros_like(y0),) * self.memory
        return State(jnp.zeros((), jnp.int32), nodes, history, self.begin(x))

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
            row = self.row(clock.process, window, state.step, ENDLESS)
        else:
            row = jax.tree.map(lambda table: jnp.asarray(table)[state.step], self.rows)
        row = jax.tree.map(lambda value: jnp.asarray(value, time_dtype(y0.dtype)), row)
        x = (y0 / clock.scale(t[0])).astype(y0.dtype)
        x1, output, extra = self.advance(at, row, t, x, state)
        y1 = (x1 * clock.scale(t[1])).astype(y0.dtype)
        state = State(
            state.step + 1,
            jnp.concatenate([t[:1], state.nodes])[: self.memory],
            (output, *state.history)[: self.memory],
            extra,
        )
        return y1, None, dict(y0=y0, y1=y1), state, dfx.RESULTS.successful

    def func(self, terms: Any, t0: Any, y0: Array, args: Any) -> Array:
        """Return the vector field, for controllers that look at it."""
        return terms.vf(t0, y0, args)
