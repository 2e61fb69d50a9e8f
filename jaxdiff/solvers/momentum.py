r"""Momentum: what moves the state is a running average, for the sake of stability.

Notation: $h = \lambda_1 - \lambda_0$; $\beta \in (0, 1]$ is the weight of the new term, so that
$\beta = 1$ is no momentum; $\nabla v_0 = v_0 - v_{-1}$; $T(x, e)$ is the DDIM transfer
$\frac{\alpha_1}{\alpha_0}x - \sigma_1(e^h - 1)e$. A multistep method extrapolates, which makes it
unstable where the network output changes fast (strong guidance, few steps); an average of past
outputs extends the interval of stability, at the price of order.

| solver | averaged | order |
|---|---|---|
| `HeavyBall` | what a solver extrapolates to | 1 |
| `GHVB` | the network output, with weights that undo the delay | $r$; 2 on a general grid |
"""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdiff import _check
from jaxdiff._array import Scalar, ScalarLike
from jaxdiff.process import AbstractProcess
from jaxdiff.solvers.engine import AbstractGridSolver, Row, State
from jaxdiff.solvers.exponential import transfer
from jaxdiff.solvers.multistep import step_length
from jaxdiff.solvers.terms import View
from jaxdiff.solvers.wrapper import AbstractWrapper

__all__ = ["GHVB", "HeavyBall", "adams_moments", "noise_gain"]


def _beta(where: str, beta: Any) -> None:
    _check.number(where, "beta", beta, np.finfo(float).tiny, 1)


def noise_gain(process: AbstractProcess, ts: Array) -> Array:
    r"""Return $-\sigma_1(e^h - 1)$, or 0 where h is infinite."""
    h, finite = step_length(process, ts)
    return jnp.where(finite, -process.sigma(ts[0]) * jnp.expm1(h), 0.0)


class _Averaged(NamedTuple):
    """The row of a wrapped solver, and what turns its step into one of the average."""

    row: Any
    decay: Scalar  # x1 = decay x + gain m
    gain: Scalar
    of_x: Scalar  # output = of_x x + of_m m
    of_m: Scalar
    move: Scalar  # d x1 / d output
    keep: Scalar  # 1 - beta; 0 on the first step


class HeavyBall(AbstractWrapper):
    r"""Heavy-ball momentum around a solver: average what each step extrapolates to.

    $$ v \leftarrow (1-\beta)\,v + \beta\,\bar o, \qquad x_1 = \text{DDIM step with output } v $$

    where $\bar o$ is the constant output with which the step of DDIM would be the solver's own:
    $m_0 + \frac{h}{2h_{-1}}(m_0 - m_{-1})$ for `DPMpp2M`, the combination of noise predictions for
    `PNDM`. On the first step $v = \bar o$. Order 1. On $y' = \mu y$ with steps k the interval of
    stability grows from $|k\mu| < 2$ to $2(2-\beta)/\beta$ around `DEIS(1)`, which is DDIM on the
    noise prediction, and from 1 to $(2-\beta)/\beta$ around `PNDM(2)`.

    Cost: that of the solver, and one more array.

    Args:
        solver: a deterministic solver of jaxdiff, whose output is `"x0"` or `"eps"`.
        beta: weight of the new term, in (0, 1].

    Raises:
        ValueError: if the solver is none of these or `beta` is outside its range.

    References:
        Wizadwongsa et al. 2023 (2307.11118); the intervals are our own derivation.
    """

    solver: AbstractGridSolver
    beta: ScalarLike = 0.8

    def __check_init__(self) -> None:
        known = isinstance(self.solver, AbstractGridSolver)
        if not known or self.solver.stochastic or self.solver.output not in ("x0", "eps"):
            expected = "a deterministic solver of jaxdiff with output 'x0' or 'eps'"
            raise _check.bad("HeavyBall", "solver", expected, self.solver)
        _beta("HeavyBall", self.beta)

    @property
    def claimed_order(self) -> int:
        """1, whatever the solver's."""
        return 1

    def begin(self, x: Array) -> Any:
        """Return the average, not yet begun, and what the solver carries."""
        return jnp.zeros_like(x), self.solver.begin(x)

    def row(
        self, process: AbstractProcess, ts: Array, n: ScalarLike, left: ScalarLike
    ) -> _Averaged:
        """Return the solver's row and the DDIM step."""
        row = self.solver.row(process, ts, n, left)
        decay, gain, _ = transfer(process, ts[1], ts[0])
        _, finite = step_length(process, ts)  # where h is infinite, the step is that of DDIM
        alpha, sigma = process.alpha(ts[1]), process.sigma(ts[1])
        of_x, of_m, move = jnp.zeros_like(gain), jnp.ones_like(gain), jnp.where(finite, gain, 0.0)
        if self.output == "eps":
            of_x, of_m, move = 1 / sigma, -alpha / sigma, noise_gain(process, ts)
        keep = jnp.where(jnp.asarray(n) == 0, 0.0, 1 - jnp.asarray(self.beta))
        return _Averaged(row, decay, gain, of_x, of_m, move, keep)

    def advance(
        self, at: View, row: _Averaged, t: Array, x: Array, state: State
    ) -> tuple[Array, Array, Any]:
        """Make the solver's step, then move it by the change of the average."""
        v, inner = state.extra
        x1, output, inner = self.solver.advance(at, row.row, t, x, state._replace(extra=inner))
        new = row.of_x * x + row.of_m * ((x1 - row.decay * x) / row.gain)
        v = (new + row.keep * (v - new)).astype(x.dtype)
        return x1 + row.move * (v - new), output, (v, inner)


def adams_moments(count: int) -> tuple[float, ...]:
    r"""Return $\gamma_k = \int_0^1 \binom{u+k-1}{k}du$: 1, 1/2, 5/12, 3/8, 251/720, ...

    The weights of $\nabla^k$ in an Adams-Bashforth step, by their generating function
    $\sum_{i \le k}\gamma_i/(k+1-i) = 1$.
    """
    gamma: list[float] = []
    for k in range(count):
        gamma.append(1.0 - sum(gamma[i] / (k + 1 - i) for i in range(k)))
    return tuple(gamma)


class GHVB(AbstractGridSolver):
    r"""Generalised heavy ball: momentum without loss of order.

    $$ v \leftarrow (1-\beta)\,v + \beta\,\hat\epsilon, \qquad
       \hat\epsilon' = \sum_{k=0}^{r-1} c_k\nabla^k v, \qquad
       c_k = \gamma_k + \frac{1-\beta}{\beta}\gamma_{k-1}, \qquad x_1 = T(x, \hat\epsilon'). $$

    The averaging is the operator $\hat\epsilon = [1 - (1-\beta)(1-\nabla)]\,v/\beta$; the weights
    are the Adams-Bashforth series $\sum_k\gamma_k\nabla^k$ of it, cut off after r terms. Known as
    the method of order $r - 1 + \beta$: `GHVB(2, 0.8)` is GHVB 1.8. `beta=1` is `PNDM(r)`. The
    order is r on a grid uniform in $\sigma/\alpha$, at most 2 on others. On $y' = \mu y$ with steps
    k the interval of stability is $|k\mu| < 2(2-\beta)/\beta$ for r = 1 and $2-\beta$ for r = 2.
    The first steps use the lower r that their history allows.

    Choose it where a multistep method leaves artefacts: r of 2 or 3, `beta` 0.8. One network
    evaluation per step.

    Args:
        r: number of terms, 1 to 4.
        beta: weight of the new output, in (0, 1].

    Raises:
        ValueError: if an argument is outside its range.

    References:
        Wizadwongsa et al. 2023 (2307.11118), section 4; the weights are derived as above.
    """

    r: int = eqx.field(static=True, default=2)
    beta: ScalarLike = 0.8
    output = "eps"

    def __check_init__(self) -> None:
        _check.choice("GHVB", "r", self.r, (1, 2, 3, 4))
        _beta("GHVB", self.beta)

    @property
    def memory(self) -> int:
        """The older averages in use; one at least, to average with."""
        return max(self.r - 1, 1)

    @property
    def claimed_order(self) -> int:
        """At most 2 on a general grid."""
        return min(self.r, 2)

    def row(
        self, process: AbstractProcess, ts: Array, n: ScalarLike, left: ScalarLike
    ) -> tuple[Row, Array]:
        r"""Return weights of the older $v$, and how much of the last one is kept."""
        decay, gain, _ = transfer(process, ts[1], ts[0])
        older = jnp.cumprod(ts[2:] > ts[1:-1]).sum()
        beta, gamma = jnp.asarray(self.beta), adams_moments(self.r)
        keep = jnp.where(older > 0, 1 - beta, 0.0)
        of_v = jnp.zeros(self.memory + 1).at[0].set(1.0)
        for k in range(1, self.r):
            c = gamma[k] + (1 - beta) / beta * gamma[k - 1]
            nabla = jnp.asarray([(-1.0) ** j * math.comb(k, j) for j in range(self.memory + 1)])
            of_v = of_v + jnp.where(k <= older, c, 0.0) * nabla
        # v_0 = eps + keep (v_-1 - eps), so that all of it is a difference from eps.
        weights = of_v[1:].at[0].add(keep * of_v[0])
        return Row(decay, gain, noise_gain(process, ts) * weights), keep

    def advance(
        self, at: View, row: tuple[Row, Array], t: Array, x: Array, state: State
    ) -> tuple[Array, Array, Any]:
        """Step, and remember the average in place of the output."""
        x1, eps, extra = super().advance(at, row[0], t, x, state)
        return x1, (eps + row[1] * (state.history[0] - eps)).astype(x.dtype), extra
