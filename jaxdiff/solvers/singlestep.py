r"""Single-step solvers: extra network evaluations inside the step, no memory between steps.

Notation: $h = \lambda_1 - \lambda_0$, $s = \sigma/\alpha$, $r = \alpha/\sigma$; stages $j$ at nodes
$q_j$ inside the step, with outputs $o_j$. Two families, each a table of numbers:

* `RungeKutta` applies a textbook tableau in a clock where the ODE has no linear part
  ($d(x/\alpha)/ds = \hat\epsilon$ or $d(x/\sigma)/dr = m$), or in time, on the velocity;
* `ExponentialRK` expands $\hat\epsilon$ or $m$ in $\lambda$ (DPM-Solver and DPM-Solver++).
"""

import itertools
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff import _check
from jaxdiff._array import Scalar, ScalarLike
from jaxdiff.process import AbstractProcess
from jaxdiff.solvers.engine import AbstractGridSolver, Output, Row
from jaxdiff.solvers.exponential import transfer
from jaxdiff.solvers.quadrature import log_snr_step, phi

__all__ = ["TABLEAUS", "ExponentialRK", "Heun", "PseudoRK4", "RungeKutta", "Tableau", "transfer_to"]

Tableau: TypeAlias = Literal["euler", "midpoint", "heun", "kutta3", "rk4"]

# order, nodes c of the stages after the first, rows of weights a, weights b.
TABLEAUS: dict[str, tuple[int, tuple[float, ...], tuple[tuple[float, ...], ...]]] = {
    "euler": (1, (), ((1.0,),)),
    "midpoint": (2, (1 / 2,), ((1 / 2,), (0.0, 1.0))),
    "heun": (2, (1.0,), ((1.0,), (1 / 2, 1 / 2))),
    "kutta3": (3, (1 / 2, 1.0), ((1 / 2,), (-1.0, 2.0), (1 / 6, 4 / 6, 1 / 6))),
    "rk4": (
        4,
        (1 / 2, 1 / 2, 1.0),
        ((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0), (1 / 6, 2 / 6, 2 / 6, 1 / 6)),
    ),
}


def transfer_to(process: AbstractProcess, t0: Any, t1: Any, weights: Any) -> Row:
    """Return the DDIM step with weights on differences of outputs."""
    decay, gain, _ = transfer(process, t0, t1)
    return Row(decay, gain, weights)


class RungeKutta(AbstractGridSolver):
    r"""An explicit Runge-Kutta method on the PF-ODE, in the clock of choice.

    $$ \hat x_i = x_0 + \Delta\sum_{j<i} a_{ij} k_j \text{ in the clock's state}, \qquad
       x_1 = x_0 + \Delta\sum_j b_j k_j $$

    | clock | slope k | known as |
    |---|---|---|
    | `"s"` | $\hat\epsilon$ | EDM's samplers, rhoRK of DEIS |
    | `"r"` | $m$ | the same in $\alpha/\sigma$ |
    | `"t"` | $dx/dt$ | the samplers of flow matching |

    One network evaluation per stage; no history. In `"s"` and `"r"`, steps from alpha = 0 or to
    sigma = 0 are those of DDIM; in `"t"`, a stage at sigma = 0 falls back on the first slope.

    Args:
        tableau: `"euler"`, `"midpoint"`, `"heun"`, `"kutta3"` or `"rk4"`, of order 1, 2, 2, 3, 4.
        clock: `"s"`, `"r"` or `"t"`.

    Raises:
        ValueError: if an argument is none of these.

    References:
        Karras et al. 2022 (2206.00364), algorithm 1; Zhang, Chen 2022 (2204.13902), rhoRK; Lipman
        et al. 2022 (2210.02747).
    """

    tableau: Tableau = eqx.field(static=True, default="rk4")
    clock: Literal["s", "r", "t"] = eqx.field(static=True, default="s")

    def __check_init__(self) -> None:
        _check.choice(type(self).__name__, "tableau", self.tableau, TABLEAUS)
        _check.choice(type(self).__name__, "clock", self.clock, ("s", "r", "t"))

    @property
    def evaluations(self) -> int:
        """The number of stages."""
        return len(TABLEAUS[self.tableau][2])

    @property
    def claimed_order(self) -> int:
        """The order of the tableau."""
        return TABLEAUS[self.tableau][0]

    @property
    def output(self) -> Output:
        """The slope in the clock."""
        outputs: dict[str, Output] = {"s": "eps", "r": "x0", "t": "velocity"}
        return outputs[self.clock]

    def row(self, process: AbstractProcess, ts: Array, n: ScalarLike, left: ScalarLike) -> Row:
        """Lay out the tableau over the step."""
        _, nodes, table = TABLEAUS[self.tableau]
        h = log_snr_step(process, ts[1], ts[0])
        finite = jnp.isfinite(h)
        if self.clock == "t":
            return self._in_time(process, ts, nodes, table)
        times = [ts[0] if c == 1 else self._between(process, ts, h, c) for c in nodes]
        times = [jnp.where(finite, t, ts[1]) for t in times]  # a network knows nothing at the ends
        rows = []
        for t, a in zip([*times, ts[0]], table, strict=True):
            # alpha (s_1 - s_0) and sigma (r_1 - r_0), over the whole step
            if self.clock == "s":
                span = process.alpha(t) * process.sigma(ts[0]) / process.alpha(ts[0])
                span = -span * jnp.expm1(jnp.where(finite, h, 0.0))
            else:
                span = (
                    process.sigma(t)
                    * process.alpha(ts[0])
                    / jnp.where(finite, process.sigma(ts[0]), 1.0)
                )
                span = -span * jnp.expm1(jnp.where(finite, -h, 0.0))
            rows.append(transfer_to(process, ts[1], t, tuple(span * w for w in a[1:])))
        return rows[-1]._replace(stages=tuple(zip(times, rows[:-1], strict=True)))

    def _between(self, process: AbstractProcess, ts: Array, h: Array, c: float) -> Scalar:
        """Return the time at which the clock has gone the share `c` of the step."""
        sign = -1.0 if self.clock == "s" else 1.0  # the clock is exp(sign lam)
        h = jnp.where(jnp.isfinite(h), h, 0.0)
        inside = (jnp.asarray(process.t_min) + process.t_max) / 2
        lam0 = process.lam(jnp.where(h == 0, inside, ts[1]))
        return process.t_of_lam(lam0 + sign * jnp.log1p(c * jnp.expm1(sign * h)))

    def _in_time(self, process: AbstractProcess, ts: Array, nodes: Any, table: Any) -> Row:
        t0, dt = ts[1], ts[0] - ts[1]
        (d_alpha, d_sigma), sigma = process.rates(t0), process.sigma(t0)
        slopes = d_sigma / sigma, d_alpha - process.alpha(t0) * d_sigma / sigma  # of x and m
        times = [t0 + c * dt for c in nodes]
        clean = [process.sigma(t) <= 0 for t in times]
        rows = []
        for c, a in zip([*nodes, 1.0], table, strict=True):
            weights = [jnp.where(bad, 0.0, dt * w) for w, bad in zip(a[1:], clean, strict=False)]
            rows.append(Row(1 + c * dt * slopes[0], c * dt * slopes[1], tuple(weights)))
        times = [jnp.where(bad, t0, t) for t, bad in zip(times, clean, strict=True)]
        return rows[-1]._replace(stages=tuple(zip(times, rows[:-1], strict=True)))


class Heun(RungeKutta):
    r"""Heun's method in EDM's form: the trapezoidal rule in $s = \sigma/\alpha$.

    $$ \hat x_1 = \alpha_1\left(\frac{x_0}{\alpha_0} + (s_1 - s_0)\,\hat\epsilon_0\right), \qquad
       x_1 = \hat x_1 + \tfrac12\alpha_1(s_1 - s_0)(\hat\epsilon_1 - \hat\epsilon_0) $$

    with $\hat\epsilon_1$ taken at $\hat x_1$, a DDIM step. Order 2; two network evaluations per
    step; no history. Steps from alpha = 0 or to sigma = 0 are those of DDIM.

    References:
        Karras et al. 2022 (2206.00364), algorithm 1, on a general path.
    """

    tableau: Tableau = eqx.field(static=True, default="heun")


class PseudoRK4(AbstractGridSolver):
    r"""Pseudo Runge-Kutta: the classical weights on noise predictions, moved by the DDIM transfer.

    The middle stages sit at the middle of the step in time. Order 2 in general; made to start
    `PNDM`, as `WarmStart(PNDM(), PseudoRK4(), 3)`. Four network evaluations per step.

    References:
        Liu et al. 2022 (2202.09778), eq. 10.
    """

    evaluations = 4
    claimed_order = 2
    output = "eps"

    def row(self, process: AbstractProcess, ts: Array, n: ScalarLike, left: ScalarLike) -> Row:
        """Move each weighted output by the transfer to the stage's own time."""
        _, nodes, table = TABLEAUS["rk4"]
        finite = jnp.isfinite(log_snr_step(process, ts[1], ts[0]))
        times = [ts[1] + c * (ts[0] - ts[1]) for c in nodes]
        rows = []
        for t, c, a in zip([*times, ts[0]], [*nodes, 1.0], table, strict=True):
            h = log_snr_step(process, ts[1], t)
            kappa = -process.sigma(t) * jnp.expm1(jnp.where(finite, h, 0.0)) / c
            rows.append(transfer_to(process, ts[1], t, tuple(kappa * w for w in a[1:])))
        times = [jnp.where(finite, t, ts[1]) for t in times]
        return rows[-1]._replace(stages=tuple(zip(times, rows[:-1], strict=True)))


class ExponentialRK(AbstractGridSolver):
    r"""DPM-Solver and DPM-Solver++, singlestep: the output expanded in $\lambda$ inside the step.

    With $z = h$, scale $-\sigma$ for $\hat\epsilon$ and $z = -h$, scale $\alpha$ for $m$, on top of
    the DDIM steps to each node:

    $$ p = 2:\quad x_1 \mathrel{+}= \frac{\mathrm{scale}_1 h\varphi_1(z)}{2r_1}(o_1 - o_0) $$
    $$ p = 3:\quad x_{q_2} \mathrel{+}= \mathrm{scale}_{q_2}\frac{r_2}{r_1}
                   r_2 h\varphi_2(r_2 z)(o_1 - o_0), \qquad
       x_1 \mathrel{+}= \frac{\mathrm{scale}_1 h\varphi_2(z)}{r_2}(o_2 - o_0) $$

    p network evaluations per step; no history.

    Args:
        p: order, 2 or 3.
        output: `"x0"` (DPM-Solver++, the stable choice) or `"eps"` (DPM-Solver).
        r: where in the step, in $\lambda$, the inner stages sit: (r_1,) or (r_1, r_2), increasing
            in (0, 1]; 1/2, and 1/3 and 2/3, by default.

    Raises:
        ValueError: if an argument is none of these.

    References:
        Lu et al. 2022 (2206.00927), algorithms 1 and 2; Lu et al. 2022 (2211.01095), algorithm 1.
    """

    p: int = eqx.field(static=True, default=2)
    output: Literal["x0", "eps"] = eqx.field(static=True, default="x0")
    r: tuple[float, ...] | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        _check.choice("ExponentialRK", "p", self.p, (2, 3))
        _check.choice("ExponentialRK", "output", self.output, ("x0", "eps"))
        r = self._r
        good = len(r) == self.p - 1 and all(0 < a <= 1 for a in r)
        if not good or any(b <= a for a, b in itertools.pairwise(r)):
            expected = f"{self.p - 1} increasing numbers in (0, 1]"
            raise _check.bad("ExponentialRK", "r", expected, self.r)

    @property
    def _r(self) -> tuple[float, ...]:
        defaults = {2: (1 / 2,), 3: (1 / 3, 2 / 3)}
        return defaults[self.p] if self.r is None else self.r

    @property
    def evaluations(self) -> int:
        """One for each order."""
        return self.p

    @property
    def claimed_order(self) -> int:
        """As many as evaluations."""
        return self.p

    def row(self, process: AbstractProcess, ts: Array, n: ScalarLike, left: ScalarLike) -> Row:
        """Expand the output in log-SNR."""
        r, h = self._r, log_snr_step(process, ts[1], ts[0])
        finite = jnp.isfinite(h)
        h = jnp.where(finite, h, 1.0)
        inside = (jnp.asarray(process.t_min) + process.t_max) / 2
        lam0 = process.lam(jnp.where(finite, ts[1], inside))
        times = [jnp.where(finite, process.t_of_lam(lam0 + a * h), ts[1]) for a in r]

        def weight(t: Any, k: int, share: float, factor: float) -> Array:
            z = -share * h if self.output == "x0" else share * h
            scale = process.alpha(t) if self.output == "x0" else -process.sigma(t)
            return jnp.where(finite, factor * scale * share * h * phi(k, z), 0.0)

        if self.p == 2:
            weights: list[Any] = [(), (weight(ts[0], 1, 1.0, 1 / (2 * r[0])),)]
        else:
            inner = weight(times[1], 2, r[1], r[1] / r[0])
            last = weight(ts[0], 2, 1.0, 1 / r[1])
            weights = [(), (inner,), (jnp.zeros_like(last), last)]
        rows = [
            transfer_to(process, ts[1], t, w) for t, w in zip([*times, ts[0]], weights, strict=True)
        ]
        return rows[-1]._replace(stages=tuple(zip(times, rows[:-1], strict=True)))
