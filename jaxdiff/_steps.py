"""Solves whose steps are those of a diffrax solver, ours or diffrax's, from node to node."""

import abc
import dataclasses
from typing import Any

import diffrax as dfx
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jaxdiff import _check
from jaxdiff._array import Cond
from jaxdiff._sampler import AbstractSolve, State
from jaxdiff._status import SUCCESS, first_failure
from jaxdiff.solvers.engine import AbstractGridSolver


class DiffraxSolve(AbstractSolve):
    """One step of diffrax per interval; subclasses write `terms` and `init`.

    Attributes:
        solver: with its rows where it is one of jaxdiff.
        nodes: the times of the terms, (steps + 1,).
    """

    solver: Any
    nodes: Any

    @abc.abstractmethod
    def terms(self, model: Any, key: PRNGKeyArray | None, cond: Cond) -> Any:
        """Return the equation of one sample, with its noise."""

    def begin(self, terms: Any, y: Array) -> State:
        """Return the state of a solver that has made no step."""
        inner, nodes = None, jnp.asarray(self.nodes)
        if self.steps:
            inner = (self.solver.init(terms, nodes[0], nodes[1], y, None), jnp.asarray(False))
        return State(y, inner, SUCCESS, self.cost(0) * (self.steps > 0))

    def cost(self, steps: Any) -> Array:
        """Return the number of network evaluations in so many steps."""
        return jnp.asarray(evaluations(self.solver, jnp.asarray(steps, int)))

    def table(self) -> Any:
        """Return where the steps start and where they end."""
        nodes = jnp.asarray(self.nodes)
        return nodes[:-1], nodes[1:]

    def step(
        self, model: Any, n: Any, row: Any, key: PRNGKeyArray | None, state: State, cond: Cond
    ) -> State:
        """Make one step of diffrax."""
        inner, jumped = state.inner
        if isinstance(self.solver, AbstractGridSolver):
            inner = inner._replace(step=jnp.asarray(n, inner.step.dtype))
        terms, (t0, t1) = self.terms(model, key, cond), row
        y, _, _, inner, result = self.solver.step(terms, t0, t1, state.y, None, inner, jumped)
        nfe = state.nfe + self.cost(n + 1) - self.cost(n)
        return State(y, (inner, jnp.asarray(False)), first_failure(state.result, result), nfe)

    def x(self, n: Any, state: State) -> Array:
        """Return the state itself."""
        return state.y

    def replace(self, n: Any, state: State, x: Array) -> State:
        """Put another sample in; the solver is told that its state jumped."""
        inner = state.inner and (state.inner[0], jnp.asarray(True))
        return state._replace(y=x.astype(state.y.dtype), inner=inner)


def check_loop(where: str, controller: Any, adjoint: Any, max_steps: Any) -> None:
    """Raise ValueError unless these are what diffrax's own loop takes, or None."""
    _check.whole(where, "max_steps", max_steps, 1)
    kinds = (
        ("controller", controller, dfx.AbstractStepSizeController),
        ("adjoint", adjoint, dfx.AbstractAdjoint),
    )
    for name, value, kind in kinds:
        if value is not None and not isinstance(value, kind):
            raise _check.bad(where, name, f"an instance of diffrax.{kind.__name__}", repr(value))


def bounded(solver: Any) -> Any:
    """Return a solver whose stages are scanned in the way that is cheap to differentiate."""
    if isinstance(solver, dfx.AbstractRungeKutta) and solver.scan_kind is None:
        return dataclasses.replace(solver, scan_kind="bounded")
    return solver


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
