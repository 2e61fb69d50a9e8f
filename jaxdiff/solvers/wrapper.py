"""A solver around another solver, for all that changes steps without making them."""

from typing import Any

import equinox as eqx
from jaxtyping import Array

from jaxdiff.process import AbstractProcess
from jaxdiff.solvers.engine import AbstractGridSolver, State
from jaxdiff.solvers.terms import View

__all__ = ["AbstractWrapper"]


class AbstractWrapper(AbstractGridSolver):
    """A solver that is `solver` until a subclass says otherwise.

    Attributes:
        solver: the solver inside.
    """

    solver: eqx.AbstractVar[AbstractGridSolver]

    @property
    def memory(self) -> int:
        """Of the solver."""
        return self.solver.memory

    @property
    def output(self) -> str:
        """Of the solver."""
        return self.solver.output

    @property
    def stochastic(self) -> bool:
        """Of the solver."""
        return self.solver.stochastic

    @property
    def claimed_order(self) -> int:
        """Of the solver."""
        return self.solver.claimed_order

    def begin(self, x: Array) -> Any:
        """Of the solver."""
        return self.solver.begin(x)

    def cost(self, steps: Any) -> Any:
        """Of the solver."""
        return self.solver.cost(steps)

    def row(self, process: AbstractProcess, ts: Array, n: Any, left: Any) -> Any:
        """Of the solver."""
        return self.solver.row(process, ts, n, left)

    def advance(
        self, at: View, row: Any, t: Array, x: Array, state: State
    ) -> tuple[Array, Array, Any]:
        """Of the solver."""
        return self.solver.advance(at, row, t, x, state)
