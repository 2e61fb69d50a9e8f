"""A solver whose steps are corrected by fitted combinations of its outputs."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from jaxdiff import _check
from jaxdiff._array import ScalarLike
from jaxdiff._host import is_concrete
from jaxdiff.process import AbstractProcess
from jaxdiff.solvers.engine import AbstractGridSolver, State
from jaxdiff.solvers.terms import View
from jaxdiff.solvers.wrapper import AbstractWrapper

__all__ = ["Fitted"]


class Fitted(AbstractWrapper):
    r"""A solver with a table of fitted coefficients; made by `jaxdiff.tuning.distil` and others.

    $$ x_{i+1} = \Phi(x_i) + \sum_k\gamma_{i,k}\,o_{i-k} $$

    Cost: that of the solver; r + 1 outputs are remembered.

    Attributes:
        solver: the deterministic solver that is corrected.
        coefficients: $\gamma$, (steps, r + 1), of the current output first.
        ts: the grid that it was fitted on, (steps + 1,).
        errors: root mean square distances to the targets on the batch of the fit, before and after
            correction, (steps, 2).

    Raises:
        ValueError: if a shape does not fit, or (when used) on another grid.
    """

    solver: AbstractGridSolver
    coefficients: Float[ArrayLike, "steps terms"]
    ts: Float[ArrayLike, " nodes"]
    errors: Float[ArrayLike, "steps 2"] | None = None

    def __check_init__(self) -> None:
        if not isinstance(self.solver, AbstractGridSolver) or self.solver.stochastic:
            expected = "a deterministic solver of jaxdiff"
            raise _check.bad("Fitted", "solver", expected, self.solver)
        steps = np.shape(self.ts)[0] - 1
        if np.ndim(self.coefficients) != 2 or np.shape(self.coefficients)[0] != steps:
            got = np.shape(self.coefficients)
            raise _check.bad("Fitted", "coefficients", f"of shape ({steps}, terms)", got)

    @property
    def terms(self) -> int:
        """The number of outputs that are combined."""
        return np.shape(self.coefficients)[1]

    @property
    def memory(self) -> int:  # type: ignore[override]
        """What the solver remembers, and the older outputs of the table."""
        return max(self.solver.memory, self.terms - 1)

    def tabulate(self, process: AbstractProcess, ts: Any, *, more: int = 0) -> AbstractGridSolver:
        """Return this solver with its rows, after checking that the grid is its own."""
        known = is_concrete(ts, self.ts)
        if np.shape(ts) != np.shape(self.ts) or (
            known and not np.allclose(np.asarray(ts), np.asarray(self.ts), rtol=1e-5)
        ):
            raise _check.bad("Fitted", "ts", f"the grid of the fit, {self.ts}", ts)
        return super().tabulate(process, ts, more=more)

    def row(self, process: AbstractProcess, ts: Array, n: ScalarLike, left: ScalarLike) -> Any:
        """Return the solver's row, and the coefficients of this step."""
        row = self.solver.row(process, ts[: self.solver.memory + 2], n, left)
        return row, jnp.asarray(self.coefficients)[n]

    def advance(
        self, at: View, row: Any, t: Array, x: Array, state: State
    ) -> tuple[Array, Array, Any]:
        """Make the solver's step and add the combination."""
        row, coefficients = row
        inner = state._replace(history=state.history[: self.solver.memory])
        x1, output, extra = self.solver.advance(at, row, t, x, inner)
        for gamma, o in zip(coefficients, (output, *state.history), strict=False):
            x1 = x1 + gamma * o
        return x1, output, extra
