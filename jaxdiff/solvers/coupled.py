r"""Reversible solvers that step two states at one node, each moved by the other.

Notation: as in `reversible`; the pair is $(x, y)$ or $(y, z)$ in units $c$ at the same node.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdiff import _check
from jaxdiff._array import Scalar, ScalarLike
from jaxdiff.process import AbstractProcess
from jaxdiff.solvers.engine import AbstractGridSolver, Row, State
from jaxdiff.solvers.reversible import AbstractReversible, Pair
from jaxdiff.solvers.terms import View

__all__ = ["EDICT", "McCallumFoster"]


class _Coupled(NamedTuple):
    first: Scalar
    c0: Scalar
    c1: Scalar
    mix: Scalar
    there: Any
    back: Any = ()


class EDICT(AbstractReversible):
    r"""Exact diffusion inversion by coupled transformations, on $\bar x = x/\alpha$.

    $$ x' = \bar x + B\,\hat\epsilon(\alpha_0\bar y), \quad
       y' = \bar y + B\,\hat\epsilon(\alpha_1 x'), \quad
       \bar x_1 = p\,x' + (1-p)\,y', \quad \bar y_1 = p\,y' + (1-p)\,\bar x_1 $$

    with $B = s_1 - s_0$ and both network outputs at the time where the step starts, though
    $\alpha_1 x'$ is a state of its end: as published. Order 1; two network evaluations per step.
    Inversion amplifies rounding by up to $p^{-2N}$. Here for comparison: at equal cost
    `SymmetricLeapfrog` is far more accurate.

    Args:
        p: weight of the mixing, in (0, 1].

    Raises:
        ValueError: if `p` is outside.

    References:
        Wallace, Gokul, Naik 2022 (2211.12446), eq. 12 to 16.
    """

    p: ScalarLike = 0.93
    evaluations = 2
    finite_end = True

    def __check_init__(self) -> None:
        _check.number("EDICT", "p", self.p, np.finfo(float).tiny, 1)

    def row(self, process: AbstractProcess, ts: Array, n: ScalarLike, left: ScalarLike) -> _Coupled:
        """Return the step of DDIM in x/alpha."""
        c0, c1 = 1 / process.alpha(ts[1]), 1 / process.alpha(ts[0])
        move = c1 * process.sigma(ts[0]) - c0 * process.sigma(ts[1])
        first = jnp.where(jnp.asarray(n) == 0, 1.0, 0.0)
        return _Coupled(first, c0, c1, jnp.asarray(self.p), move)

    def _move(self, at: View, row: _Coupled, t: Array, z: Array, c: Array) -> Array:
        return (row.there * at.field.denoiser.eps(t[0], self.show(z, c), at.field.cond)).astype(
            z.dtype
        )

    def forward(self, at: View, row: _Coupled, t: Array, pair: Pair) -> Pair:
        """Move each by the other, and mix."""
        (x, y), p = pair, row.mix
        x = x + self._move(at, row, t, y, row.c0)
        y = y + self._move(at, row, t, x, row.c1)
        x = (y + p * (x - y)).astype(y.dtype)
        return x, (x + p * (y - x)).astype(y.dtype)

    def backward(self, at: View, row: _Coupled, t: Array, pair: Pair) -> Pair:
        """Unmix, and move each by the other."""
        (x, y), p = pair, row.mix
        y = (x + (y - x) / p).astype(y.dtype)
        x = (y + (x - y) / p).astype(y.dtype)
        y = y - self._move(at, row, t, x, row.c1)
        return x - self._move(at, row, t, y, row.c0), y


class McCallumFoster(AbstractReversible):
    r"""Make a single-step solver reversible, at its order, for twice its cost.

    $$ y_1 = \zeta y + (1-\zeta) z + \Psi_h(z), \qquad z_1 = z - \Psi_{-h}(y_1) $$

    where $\Psi$ is the increment of the base solver on $x/\sqrt{\alpha\sigma}$, forwards from $z$
    and backwards from $y_1$. The choice at many evaluations, with `RungeKutta("rk4")`; at few it is
    poor.

    Args:
        base: a deterministic single-step solver: `RungeKutta`, `ExponentialRK`, `DDIM()`.
        zeta: coupling, in (0, 1]; less damps generation and makes inversion amplify rounding.

    Raises:
        ValueError: if `base` is none of these or `zeta` is outside.

    References:
        McCallum, Foster 2024 (2410.11648), eq. 3.
    """

    base: AbstractGridSolver
    zeta: ScalarLike = 0.999

    def __check_init__(self) -> None:
        base, known = self.base, isinstance(self.base, AbstractGridSolver)
        if (
            not known
            or base.stochastic
            or base.memory
            or jax.tree.leaves(base.begin(jnp.zeros(())))
        ):
            expected = "a deterministic single-step solver of jaxdiff"
            raise _check.bad("McCallumFoster", "base", expected, base)
        _check.number("McCallumFoster", "zeta", self.zeta, np.finfo(float).tiny, 1)

    @property
    def claimed_order(self) -> int:
        """Of the base."""
        return self.base.claimed_order

    def cost(self, steps: Any) -> Any:
        """Return twice that of the base."""
        return 2 * self.base.cost(steps)

    def row(self, process: AbstractProcess, ts: Array, n: ScalarLike, left: ScalarLike) -> _Coupled:
        """Return the rows of the base in both directions."""
        c0, c1 = (
            jnp.exp(-(process.log_alpha(t) + process.log_sigma(t)) / 2) for t in (ts[1], ts[0])
        )
        first = jnp.where(jnp.asarray(n) == 0, 1.0, 0.0)
        there, back = (self.base.row(process, nodes, n, left) for nodes in (ts[:2], ts[1::-1]))
        if isinstance(there, Row):  # its noise is that of a step forwards, and none is asked for
            there, back = there._replace(noise=()), back._replace(noise=())
        return _Coupled(first, c0, c1, jnp.asarray(self.zeta), there, back)

    def _move(self, at: View, row: _Coupled, t: Array, z: Array, sign: int) -> Array:
        base, c0, c1 = (row.there, row.c0, row.c1) if sign > 0 else (row.back, row.c1, row.c0)
        x = self.show(z, c0)
        state = State(jnp.zeros((), jnp.int32), jnp.zeros(0, t.dtype), (), self.base.begin(x))
        x1 = self.base.advance(at, base, t[::sign], x, state)[0]
        return (c1 * x1 - z).astype(z.dtype)

    def forward(self, at: View, row: _Coupled, t: Array, pair: Pair) -> Pair:
        """Step from the partner, then step the partner from the end."""
        y, z = pair
        y = (z + row.mix * (y - z) + self._move(at, row, t, z, 1)).astype(z.dtype)
        return y, z - self._move(at, row, t, y, -1)

    def backward(self, at: View, row: _Coupled, t: Array, pair: Pair) -> Pair:
        """Take the two back in the opposite order."""
        y, z = pair
        z = z + self._move(at, row, t, y, -1)
        return (z + (y - z - self._move(at, row, t, z, 1)) / row.mix).astype(z.dtype), z
