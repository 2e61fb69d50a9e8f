r"""Multistep solvers: the network output by extrapolation from older nodes, one evaluation a step.

Notation: $h = \lambda_1 - \lambda_0$, $\kappa$ is the gain of the step that freezes the output:
$\alpha_1(1 - e^{-h})$ of $m$, $-\sigma_1(e^h - 1)$ of $\hat\epsilon$; $o_0, o_{-1}, \dots$ are the
current and older outputs, of which the first steps of a run have fewer.

| solver | output | polynomial in | weights |
|---|---|---|---|
| `DPMpp2M`, `DPMpp3M` | $m$ | $\lambda$ | exact, or the released ones |
| `UniPC` | $m$ or $\hat\epsilon$ | $\lambda$ | exact, with a corrector that costs nothing |
| `DEIS` | $\hat\epsilon$ | $t$, $\sigma/\alpha$, $\lambda$ or $\alpha^2$ | exact |
| `PNDM` | $\hat\epsilon$ | the number of the step | constant |
"""

from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff import _check
from jaxdiff._array import ScalarLike
from jaxdiff.process import AbstractProcess
from jaxdiff.solvers.engine import AbstractGridSolver, Output, Row, State
from jaxdiff.solvers.exponential import transfer
from jaxdiff.solvers.quadrature import (
    Chi,
    clock,
    history,
    integrals,
    log_snr_step,
    of_mean,
    of_noise,
    phi,
)
from jaxdiff.solvers.terms import View
from jaxdiff.solvers.wrapper import AbstractWrapper

__all__ = [
    "DEIS",
    "PNDM",
    "DPMpp2M",
    "DPMpp3M",
    "UniPC",
    "WarmStart",
    "adams",
    "limit",
    "step_length",
]


def step_length(process: AbstractProcess, ts: Array) -> tuple[Array, Array]:
    """Return h, 1 where it is infinite, and whether it is finite."""
    h = log_snr_step(process, ts[1], ts[0])
    finite = jnp.isfinite(h)
    return jnp.where(finite, h, 1.0), finite


def adams(
    process: AbstractProcess, ts: Array, most: Any, output: Output = "x0", chi: Chi = "lam"
) -> Array:
    r"""Return the weights of older outputs in the exponential Adams-Bashforth step.

    $$ w_j = \int_0^h K(r)\,\ell_j(\chi(\lambda_0 + r))\,dr, \qquad j = 1, \dots $$

    through the current node and at most `most - 1` older ones, (len(ts) - 2,).
    """
    lams, count = history(process, ts, most)
    h, _ = step_length(process, ts)
    if output == "x0":
        kernel = of_mean(process.alpha(ts[0]), h)
    else:
        kernel = of_noise(process.sigma(ts[0]), h)
    weights = integrals(kernel, lambda lam: clock(process, chi, lam), lams[0], h, lams, count)
    return weights[1:]


def limit(order: int, left: ScalarLike, lower_order_final: bool) -> Any:
    """Return the number of outputs that a step may use, falling to 1 on the last step if asked."""
    return jnp.minimum(order, left) if lower_order_final else order


class DPMpp2M(AbstractGridSolver):
    r"""DPM-Solver++(2M): second order from one network evaluation per step.

    $$ x_1 = \frac{\sigma_1}{\sigma_0}x_0 + \alpha_1(1 - e^{-h})
             \left[m_0 + \frac{h}{2 h_{-1}}(m_0 - m_{-1})\right] $$

    The robust choice from 10 to 25 steps, on grids uniform in log-SNR. The first step, and a step
    to sigma = 0, are those of DDIM.

    Args:
        variant: `"midpoint"`, as above, or `"heun"`, which integrates the line through the two
            outputs exactly.
        lower_order_final: make the last step one of DDIM, for stability at 15 steps or fewer.

    Raises:
        ValueError: if `variant` is neither.

    References:
        Lu et al. 2022 (2211.01095), algorithm 2.
    """

    variant: Literal["midpoint", "heun"] = eqx.field(static=True, default="midpoint")
    lower_order_final: bool = eqx.field(static=True, default=False)
    memory = 1
    claimed_order = 2

    def __check_init__(self) -> None:
        _check.choice("DPMpp2M", "variant", self.variant, ("midpoint", "heun"))

    def row(self, process: AbstractProcess, ts: Array, n: ScalarLike, left: ScalarLike) -> Row:
        """Extrapolate the network output to the middle of the step, or over it."""
        decay, gain, _ = transfer(process, ts[1], ts[0])
        most = limit(2, left, self.lower_order_final)
        if self.variant == "heun":
            return Row(decay, gain, adams(process, ts, most))
        lams, count = history(process, ts, most)
        h, _ = step_length(process, ts)
        half = jnp.where(count > 1, h / (2 * (lams[0] - lams[1])), 0.0)
        return Row(decay, gain, (-gain * half,))


class DPMpp3M(AbstractGridSolver):
    r"""DPM-Solver++(3M): third order from one network evaluation per step.

    Integrates the parabola through the last three values of $m(\lambda)$ exactly. Published code
    halves its curvature term, which makes it second order; `released=True` does the same:

    $$ x_1 = \frac{\sigma_1}{\sigma_0}x_0 + \alpha_1\left[h\varphi_1 m_0 + h\varphi_2 D_1
             + h\varphi_3 D_2\right](-h), \quad D_1 \approx h m', \;
             D_2 \approx \tfrac12 h^2 m'' $$

    Args:
        released: whether to halve the curvature, as published code does.
        lower_order_final: lower the order of the last two steps to 2 and 1: better where they are
            long in log-SNR, as in 15 steps or fewer, or on uniform times of a flow.

    References:
        Lu et al. 2022 (2211.01095), appendix; the second order of the released form is our own
        measurement.
    """

    released: bool = eqx.field(static=True, default=False)
    lower_order_final: bool = eqx.field(static=True, default=False)
    memory = 2

    @property
    def claimed_order(self) -> int:
        """3, or 2 as released."""
        return 2 if self.released else 3

    def row(self, process: AbstractProcess, ts: Array, n: ScalarLike, left: ScalarLike) -> Row:
        """Extrapolate the network output by a parabola."""
        decay, gain, _ = transfer(process, ts[1], ts[0])
        most = limit(3, left, self.lower_order_final)
        if not self.released:
            return Row(decay, gain, adams(process, ts, most))
        lams, count = history(process, ts, most)
        h, _ = step_length(process, ts)
        gaps = (lams[:-1] - lams[1:]) / h
        # The line of two outputs is taken to the middle, as in 2M; the parabola is not.
        line = jnp.where(count == 2, -gain / (2 * gaps[0]), 0.0)
        size = process.alpha(ts[0]) * h
        bend = (size * phi(2, -h) * gaps[0] + size * phi(3, -h)) / (gaps[0] + gaps[1])
        first = (size * phi(2, -h) + bend) / gaps[0]
        one = jnp.where(count == 3, -first - bend / gaps[1], line)
        two = jnp.where(count == 3, bend / gaps[1], 0.0)
        return Row(decay, gain, (one, two))


class _Span(NamedTuple):
    """One step as its quadratures see it."""

    lams: Array  # of the nodes, newest first
    count: Array  # how many of them count
    h: Array
    size: Array  # alpha or sigma at the end


class UniPC(AbstractGridSolver):
    r"""UniPC-p: a multistep predictor and a corrector that re-uses the next evaluation.

    The predictor UniP-p integrates the polynomial through the last p outputs; once the network has
    been evaluated at the predicted state, the corrector UniC-p takes the same step again with that
    output included, one order higher, before the next step starts. The correction is a combination
    of outputs, so that it enters the next row and costs no evaluation; it is left out after the
    last step. Two shortcuts of the paper depend on the variant: the predictor at p = 2 and the
    corrector at p = 1 use $B/2$ for their one weight, with $B = h$ (`"bh1"`) or
    $B = e^h - 1$ (`"bh2"`), of $-h$ for $m$; every other weight does not depend on it. Order p + 1.

    Args:
        p: order of the predictor, 1, 2 or 3.
        variant: `"bh1"` or `"bh2"`.
        output: what is extrapolated, `"x0"` or `"eps"`.
        predictor: whether to predict with p outputs; False predicts by DDIM.
        corrector: whether to correct at all; False is UniP-p.
        skip: steps, counted from 0, that are not corrected: `(0,)` under strong guidance.
        lower_order_final: lower the order of the last steps to 1, as for `DPMpp3M`.

    Raises:
        ValueError: if an argument is none of these.

    References:
        Zhao et al. 2023 (2302.04867), eq. 3 to 9 and algorithms 1, 2.
    """

    p: int = eqx.field(static=True, default=2)
    variant: Literal["bh1", "bh2"] = eqx.field(static=True, default="bh2")
    output: Literal["x0", "eps"] = eqx.field(static=True, default="x0")
    predictor: bool = eqx.field(static=True, default=True)
    corrector: bool = eqx.field(static=True, default=True)
    skip: tuple[int, ...] = eqx.field(static=True, default=())
    lower_order_final: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        _check.choice("UniPC", "p", self.p, (1, 2, 3))
        _check.choice("UniPC", "variant", self.variant, ("bh1", "bh2"))
        _check.choice("UniPC", "output", self.output, ("x0", "eps"))

    @property
    def memory(self) -> int:
        """The p - 1 older outputs of the predictor, and one more for the corrector."""
        return self.p if self.corrector else self.p - 1

    @property
    def claimed_order(self) -> int:
        """The order of the predictor, and one more for the corrector."""
        predictor = self.p if self.predictor else 1
        return min(predictor, self.p) + 1 if self.corrector else predictor

    def _half(self, span: _Span) -> Array:
        r"""Return half of the gain with the paper's B in place of $h\varphi_1$."""
        z = -span.h if self.output == "x0" else span.h
        return -span.size * (z if self.variant == "bh1" else jnp.expm1(z)) / 2

    def _span(self, process: AbstractProcess, ts: Array, most: Any) -> _Span:
        """Return what predictor and corrector of the step `ts[1] -> ts[0]` share."""
        lams, count = history(process, ts, most)
        h, _ = step_length(process, ts)
        h = jnp.where(h > 0, h, 1.0)  # before the first step nothing can be corrected
        size = process.alpha(ts[0]) if self.output == "x0" else process.sigma(ts[0])
        return _Span(lams, count, h, size)

    def _weights(self, span: _Span, nodes: Any, count: Any) -> Array:
        kernel = (of_mean if self.output == "x0" else of_noise)(span.size, span.h)
        return integrals(kernel, lambda lam: lam, span.lams[0], span.h, nodes, count)

    def _predict(self, span: _Span) -> Array:
        lams, _, h, _ = span
        count = span.count if self.predictor else jnp.ones_like(span.count)
        weights = self._weights(span, lams, count)[1:]
        if self.p > 1:
            shortcut = self._half(span) * h / (lams[1] - lams[0])
            weights = weights.at[0].set(jnp.where(count == 2, shortcut, weights[0]))
        return weights

    def _correct(self, span: _Span, predicted: Array) -> Array:
        """Return what redoing a step adds, as weights of outputs from its end on.

        The outputs of the span are older than the one at its end, from which they differ.
        """
        exact = self._weights(span, [span.lams[0] + span.h, *span.lams], span.count + 1)
        new = jnp.where(span.count == 1, self._half(span), exact[0])
        change = exact[2:] - predicted  # of differences from the output at its start
        return jnp.concatenate([(-new - jnp.sum(change))[None], change])

    def row(self, process: AbstractProcess, ts: Array, n: ScalarLike, left: ScalarLike) -> Row:
        """Correct the step that led here, then predict."""
        decay, gain, _ = transfer(process, ts[1], ts[0])
        most = limit(self.p, left, self.lower_order_final)
        if not self.corrector:
            return Row(decay, gain, self._predict(self._span(process, ts, most)))
        last = limit(self.p, jnp.asarray(left) + 1, self.lower_order_final)
        spans = jax.vmap(lambda ts, most: self._span(process, ts, most))(
            jnp.stack([ts[:-1], ts[1:]]), jnp.stack([jnp.asarray(most), jnp.asarray(last)])
        )  # of the step to make, and of the one that led here
        weights, predicted = jax.vmap(self._predict)(spans)
        used = (jnp.asarray(n) > 0) & (ts[2] > ts[1]) & (process.alpha(ts[2]) > 0)
        for step in self.skip:
            used = used & (jnp.asarray(n) - 1 != step)
        # What is added to the state decays with it, the network output held as it is.
        kept = decay
        if self.output == "eps":
            kept = process.alpha(ts[0]) / jnp.where(used, process.alpha(ts[1]), 1.0)
        correction = self._correct(jax.tree.map(lambda a: a[1], spans), predicted)
        change = jnp.where(used, kept * correction, 0.0)
        return Row(decay, gain, jnp.pad(weights, (0, 1)) + change)


class DEIS(AbstractGridSolver):
    r"""Exponential Adams-Bashforth on the noise prediction, in a clock of choice.

    $$ x_1 = \frac{\alpha_1}{\alpha_0}x_0 + \alpha_1\sum_j \hat\epsilon_{-j}
             \int_{s_0}^{s_1}\ell_j(\chi)\,ds, \qquad s = \sigma/\alpha $$

    | chi | known as |
    |---|---|
    | `"t"` | tAB |
    | `"s"` | rhoAB, LMS, iPNDM with variable steps |
    | `"lam"` | lambda-AB |
    | `"angle"` | at order 2, the accelerated sampler of rate 1/T^2 |

    The first steps have the order of their history, which leaves order 2 in the limit unless
    `WarmStart` gives them a better one.

    Args:
        p: number of outputs, 1 to 4; the order of the method.
        chi: variable of the interpolating polynomial.
        lower_order_final: lower the order of the last steps to 1.

    Raises:
        ValueError: if an argument is none of these.

    References:
        Zhang, Chen 2022 (2204.13902); Li et al. 2024 (2403.03852) for `"angle"`.
    """

    p: int = eqx.field(static=True, default=4)
    chi: Chi = eqx.field(static=True, default="t")
    lower_order_final: bool = eqx.field(static=True, default=False)
    output = "eps"

    def __check_init__(self) -> None:
        _check.choice("DEIS", "p", self.p, (1, 2, 3, 4))
        _check.choice("DEIS", "chi", self.chi, ("t", "s", "lam", "angle"))

    @property
    def memory(self) -> int:
        """The p - 1 older outputs."""
        return self.p - 1

    @property
    def claimed_order(self) -> int:
        """The number of outputs."""
        return self.p

    def row(self, process: AbstractProcess, ts: Array, n: ScalarLike, left: ScalarLike) -> Row:
        """Extrapolate the noise prediction by a polynomial in chi."""
        decay, gain, _ = transfer(process, ts[1], ts[0])
        most = limit(self.p, left, self.lower_order_final)
        return Row(decay, gain, adams(process, ts, most, "eps", self.chi))


_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


class PNDM(AbstractGridSolver):
    r"""Pseudo numerical method: classical Adams-Bashforth weights, moved by the DDIM transfer.

    $$ x_1 = \frac{\alpha_1}{\alpha_0}x_0 - \sigma_1(e^h - 1)\,\hat\epsilon', \qquad
       \hat\epsilon' = \tfrac{1}{24}(55\hat\epsilon_0 - 59\hat\epsilon_{-1}
                        + 37\hat\epsilon_{-2} - 9\hat\epsilon_{-3}) $$

    The weights are those of equal steps in $\sigma/\alpha$, where the order is 4; on any other
    grid it is 2, with a small constant: among the best below ten evaluations on images. As it
    stands, the first steps use the outputs there are (iPNDM). `WarmStart(PNDM(), Heun(), 1)` is
    PLMS; `WarmStart(PNDM(), PseudoRK4(), 3)` is F-PNDM.

    Args:
        p: number of outputs, 1 to 4.

    Raises:
        ValueError: if `p` is not one of these.

    References:
        Liu et al. 2022 (2202.09778), eq. 9 to 12; iPNDM: Zhang, Chen 2022 (2204.13902).
    """

    p: int = eqx.field(static=True, default=4)
    output = "eps"

    def __check_init__(self) -> None:
        _check.choice("PNDM", "p", self.p, (1, 2, 3, 4))

    @property
    def memory(self) -> int:
        """The p - 1 older outputs."""
        return self.p - 1

    @property
    def claimed_order(self) -> int:
        """At most 2 on a general grid."""
        return min(self.p, 2)

    def row(self, process: AbstractProcess, ts: Array, n: ScalarLike, left: ScalarLike) -> Row:
        """Extrapolate the noise prediction as if the steps were equal."""
        decay, gain, _ = transfer(process, ts[1], ts[0])
        h, finite = step_length(process, ts)
        kappa = jnp.where(finite, -process.sigma(ts[0]) * jnp.expm1(h), 0.0)
        count = 1 + jnp.cumprod(ts[2:] > ts[1:-1]).sum()
        weights = jnp.zeros(self.memory)
        for q, bashforth in enumerate(_BASHFORTH[: self.p], 1):
            row = jnp.pad(jnp.asarray(bashforth[1:]), (0, self.p - q))
            weights = jnp.where(count == q, row, weights)
        return Row(decay, gain, kappa * weights)


class WarmStart(AbstractWrapper):
    """The first steps of a multistep solver by a single-step one, at the order of the rest.

    Cost: what the two cost.

    Args:
        solver: a multistep solver.
        starter: a solver that carries nothing from step to step, with the same output:
            `RungeKutta("rk4")`.
        steps: how many steps it makes; as many as the solver has history by default.

    Raises:
        ValueError: if the two do not fit.
    """

    solver: AbstractGridSolver
    starter: AbstractGridSolver
    steps: int | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        for name in ("solver", "starter"):
            if not isinstance(getattr(self, name), AbstractGridSolver):
                raise _check.bad("WarmStart", name, "a solver of jaxdiff", getattr(self, name))
        carries = self.starter.memory or jax.tree.leaves(self.starter.begin(jnp.zeros(1)))
        if carries or self.starter.output != self.solver.output:
            expected = f"one that carries nothing, and whose output is {self.solver.output!r}"
            raise _check.bad("WarmStart", "starter", expected, type(self.starter).__name__)
        if self.steps is not None:
            _check.whole("WarmStart", "steps", self.steps, 0)

    @property
    def _steps(self) -> int:
        return self.solver.memory if self.steps is None else self.steps

    @property
    def stochastic(self) -> bool:
        """Of either."""
        return self.solver.stochastic or self.starter.stochastic

    def cost(self, steps: Any) -> Any:
        """Return the evaluations of both."""
        first = jnp.minimum(steps, self._steps)
        return self.starter.cost(first) + self.solver.cost(steps - first)

    def row(self, process: AbstractProcess, ts: Array, n: ScalarLike, left: ScalarLike) -> Any:
        """Return the rows of both."""
        first = self.starter.row(process, ts[:2], n, left)
        return first, self.solver.row(process, ts, jnp.maximum(n - self._steps, 0), left)

    def advance(
        self, at: View, row: Any, t: Array, x: Array, state: State
    ) -> tuple[Array, Array, Any]:
        """Step by one of them; a real branch, since their costs differ."""

        def first(_: None) -> tuple[Array, Array, Any]:
            x1, output, _ = self.starter.advance(at, row[0], t, x, state._replace(history=()))
            return x1.astype(x.dtype), output, state.extra

        def rest(_: None) -> tuple[Array, Array, Any]:
            x1, output, extra = self.solver.advance(at, row[1], t, x, state)
            return x1.astype(x.dtype), output, extra

        return jax.lax.cond(state.step < self._steps, first, rest, None)
