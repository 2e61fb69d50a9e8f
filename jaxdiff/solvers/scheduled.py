r"""Solvers spelt as a table of choices: what every step does.

Notation: $o_j$ is $m$ or $\hat\epsilon$ at node j, $\lambda_1$ the next node. Every multistep step
of the exponential kind makes the same few choices, here integers in a `Schedule`:

| choice | values |
|---|---|
| `order` | number of outputs in the polynomial, 1 to 3 |
| `scaling` | how it is integrated: exactly, as UniPC's B1 or B2, or with the curvature halved |
| `output` | what is extrapolated: $m$ or $\hat\epsilon$ |
| `corrector` | outputs that correct the step beside the new one, 1 to 3; 0 for no correction |
| `start` | node from which the integral starts: the current one, or the one before |

`Scheduled` compiles any of them to rows of the engine, so that one program runs all.
"""

from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxdiff import _check
from jaxdiff._array import ScalarLike
from jaxdiff._host import is_concrete
from jaxdiff.process import AbstractProcess
from jaxdiff.solvers.engine import AbstractGridSolver, Row, State, combine
from jaxdiff.solvers.exponential import transfer
from jaxdiff.solvers.multistep import step_length
from jaxdiff.solvers.quadrature import history, integrals, log_snr_step, phi
from jaxdiff.solvers.terms import View

__all__ = ["OUTPUTS", "SCALINGS", "Schedule", "Scheduled"]

SCALINGS = ("exact", "bh1", "bh2", "damped")
OUTPUTS = ("x0", "eps")
_MOST = {"order": (1, 3), "scaling": (0, 3), "output": (0, 1), "corrector": (0, 3), "start": (0, 1)}


class Schedule(eqx.Module):
    """The choices of every step; see the module's table. `Schedule.of` spells known solvers.

    Attributes:
        order: (steps,), 1 to 3; the first steps use what history there is.
        scaling: (steps,), index into `SCALINGS`.
        output: (steps,), index into `OUTPUTS`.
        corrector: (steps,), 0 to 3; that of the last step has no effect.
        start: (steps,), 0 or 1.

    Raises:
        ValueError: if shapes differ or a value is out of range.
    """

    order: Int[Any, " steps"]
    scaling: Int[Any, " steps"]
    output: Int[Any, " steps"]
    corrector: Int[Any, " steps"]
    start: Int[Any, " steps"]

    def __check_init__(self) -> None:
        for name, (low, high) in _MOST.items():
            value = getattr(self, name)
            if np.ndim(value) != 1 or np.shape(value) != np.shape(self.order):
                raise _check.bad(
                    "Schedule", name, "of the shape (steps,) of order", np.shape(value)
                )
            if is_concrete(value) and not np.all((np.asarray(value) >= low) & (value <= high)):
                raise _check.bad("Schedule", name, f"whole numbers in [{low}, {high}]", value)

    @classmethod
    def of(
        cls,
        steps: int,
        order: int = 2,
        scaling: Literal["exact", "bh1", "bh2", "damped"] = "exact",
        output: Literal["x0", "eps"] = "x0",
        corrector: int = 0,
        start: int = 0,
    ) -> "Schedule":
        """Return the schedule that makes the same choices at every step.

        | solver | arguments |
        |---|---|
        | `DPMpp2M()` | `order=2, scaling="bh2"` |
        | `DPMpp3M()`, `DPMpp3M(released=True)` | `order=3`, and `scaling="damped"` |
        | `UniPC(p, variant, output)` | `order=p, scaling=variant, output=output, corrector=p` |
        | `DEIS(p, "lam")` | `order=p, output="eps"` |
        """
        _check.whole("Schedule.of", "steps", steps, 1)
        _check.choice("Schedule.of", "scaling", scaling, SCALINGS)
        _check.choice("Schedule.of", "output", output, OUTPUTS)
        row = (order, SCALINGS.index(scaling), OUTPUTS.index(output), corrector, start)
        return cls(*(np.full(steps, value, np.int32) for value in row))


class _Span(NamedTuple):
    r"""One step as its quadratures see it, with K and $\kappa$ of either output in one form.

    $$ K(r) = \text{size}\,e^{\pm(h + \text{back} - r)}, \qquad
       \kappa = \text{size}\,h\varphi_1(\pm h) \text{ without back} $$
    """

    lams: Array  # of the nodes `ts[1:]`, newest first
    count: Array  # how many of them count
    h: Array
    back: Array  # how far before the current node the integral starts
    size: Array  # alpha_1 of m, -sigma_1 of eps
    sign: Array  # -1 of m, 1 of eps


def _span(process: AbstractProcess, ts: Array, order: Any, output: Any, start: Any) -> _Span:
    """Return what the choices make of the step from `ts[1]` to `ts[0]`."""
    lams, count = history(process, ts, order)
    h, _ = step_length(process, ts)
    h = jnp.where(h > 0, h, 1.0)  # before the first step nothing can be corrected
    older = (start > 0) & (history(process, ts, 2)[1] > 1)
    back = jnp.where(older, lams[0] - lams[1], 0.0)
    size = jnp.where(output == 0, process.alpha(ts[0]), -process.sigma(ts[0]))
    return _Span(lams, count, h, back, size, jnp.where(output == 0, -1.0, 1.0))


def _exact(span: _Span, nodes: Array, count: Any) -> Array:
    r"""Return $w_j = \int K\,\ell_j\,d\lambda$ of the nodes, over the whole integral."""
    length = span.h + span.back
    kernel = lambda r: span.size * jnp.exp(span.sign * (length - r))  # noqa: E731
    return integrals(kernel, lambda lam: lam, span.lams[0] - span.back, length, nodes, count)


def _half(span: _Span, scaling: Any) -> Array:
    r"""Return $\kappa/2$ with UniPC's B for $h\varphi_1(\pm h)$: h as "bh1", itself otherwise."""
    z = span.sign * span.h
    b = jnp.where(scaling == 1, z, jnp.expm1(z))
    return span.sign * span.size * b / 2


def _line(exact: Array, half: Array, j: int, r: Any) -> Array:
    r"""Return the weights of $\kappa\,o_0 + \text{half}\cdot(o_j - o_0)/r$, with $o_0$ at 1.

    The line through two outputs, r steps apart, is taken to the middle of the step; $\kappa$ is the
    sum of the exact weights.
    """
    slope = half / r
    return jnp.zeros_like(exact).at[j].set(slope).at[1].set(jnp.sum(exact) - slope)


def _curve(span: _Span) -> Array:
    r"""Return the weights of $\text{size}\,h\varphi_3(\pm h)\,D_2$, half of the curvature, (3,).

    $$ D_2 = \frac{1}{a + b}\Big[\frac{o_0 - o_{-1}}{a} - \frac{o_{-1} - o_{-2}}{b}\Big], $$

    the second divided difference of three outputs, that are a and b steps apart.
    """
    a, b = (span.lams[0] - span.lams[1]) / span.h, (span.lams[1] - span.lams[2]) / span.h
    outer = span.size * span.h * phi(3, span.sign * span.h) / (a + b)
    return jnp.stack([outer / a, -outer / a - outer / b, outer / b])


def _extrapolate(
    process: AbstractProcess,
    ts: Array,
    order: Any,
    scaling: Any,
    output: Any,
    start: Any,
    *,
    new: bool,
) -> Array:
    r"""Return the weights of outputs in the integral that ends at `ts[0]`.

    Of the outputs at `ts[1:]`; with `new` the one at `ts[0]` counts too, beside `order` others.
    The first weight is of the output at `ts[0]`, 0 without `new`. All are exact, but in the step
    from the current node: two outputs as B1 or B2 have it (or damped, in a predictor, as B2), three
    that are damped.
    """
    span = _span(process, ts, order, output, start)
    lams, count, here = span.lams, span.count, span.back == 0
    half = _half(span, scaling)
    if new:
        exact = _exact(span, jnp.concatenate([(lams[0] + span.h)[None], lams]), count + 1)
        two = here & (count == 1) & ((scaling == 1) | (scaling == 2))
        return jnp.where(two, _line(exact, half, 0, 1.0), exact)
    exact = jnp.pad(_exact(span, lams, count), (1, 0))
    two, three = here & (count == 2) & (scaling > 0), here & (count == 3) & (scaling == 3)
    weights = jnp.where(two, _line(exact, half, 2, (lams[1] - lams[0]) / span.h), exact)
    return jnp.where(three, exact.at[1:4].add(-_curve(span)), weights)


class Scheduled(AbstractGridSolver):
    r"""The solver that a schedule spells.

    Step n extrapolates as entry n says; it is corrected, if entry n says so, when step n + 1
    starts. A step that starts at the older node starts from the state in which the network was
    evaluated there, $\alpha_{-1}m_{-1} + \sigma_{-1}\hat\epsilon_{-1}$, and hence knows nothing of
    corrections. Both outputs are remembered at three nodes. One network evaluation per step.

    Args:
        schedule: the choices, one row per step of the grid that it is used on.

    Raises:
        ValueError: if (when used) the grid has another number of steps.

    References:
        Liu et al. 2024 (2312.07243).
    """

    schedule: Schedule
    memory: ClassVar[int] = 3

    def begin(self, x: Array) -> Any:
        """Return the older noise predictions: none."""
        return (jnp.zeros_like(x),) * self.memory

    def tabulate(self, process: AbstractProcess, ts: Any, *, more: int = 0) -> AbstractGridSolver:
        """Return this solver with its rows, after counting its steps."""
        steps = np.shape(self.schedule.order)[0]
        if np.shape(ts)[0] - 1 + more != steps:
            got = f"{np.shape(ts)[0] - 1 + more} steps"
            raise _check.bad("Scheduled", "ts", f"a grid of {steps} steps, as the schedule", got)
        return super().tabulate(process, ts, more=more)

    def row(
        self, process: AbstractProcess, ts: Array, n: ScalarLike, left: ScalarLike
    ) -> tuple[Row, Array]:
        """Correct the step that led here, then predict; weights of both outputs."""
        decay, gain, _ = transfer(process, ts[1], ts[0])
        n = jnp.asarray(n)
        now = jax.tree.map(lambda a: jnp.asarray(a)[n], self.schedule)
        past = jax.tree.map(lambda a: jnp.asarray(a)[jnp.maximum(n - 1, 0)], self.schedule)
        plan = (now.order, now.scaling, now.output, now.start)
        weights = _extrapolate(process, ts[:-1], *plan, new=False)[1:]
        is_m = now.output == 0
        h_known = step_length(process, ts)[1]
        # From the older node: alpha m + sigma eps there in place of x_0.
        back = (now.start > 0) & (history(process, ts[:-1], 2)[1] > 1)
        t = jnp.where(back, ts[2], ts[1])
        alpha = jnp.where(process.alpha(t) > 0, process.alpha(t), 1.0)
        decays = jnp.where(
            is_m, process.sigma(ts[0]) / process.sigma(t), process.alpha(ts[0]) / alpha
        )
        older = jnp.where(back, decays, 0.0)
        of_m = jnp.where(is_m, weights, 0.0).at[1].add(older * process.alpha(t))
        of_eps = jnp.where(is_m, 0.0, weights).at[1].add(older * process.sigma(t))
        of_m, of_eps = (jnp.pad(w[1:], (0, 1)) for w in (of_m, of_eps))
        # The correction is a combination of outputs, which decays with the state.
        used = (n > 0) & (past.corrector > 0) & ~back & h_known & (ts[2] > ts[1])
        used = used & jnp.isfinite(log_snr_step(process, ts[2], ts[1]))
        choices = past.scaling, past.output, past.start
        change = _extrapolate(process, ts[1:], past.corrector, *choices, new=True)
        change = change - _extrapolate(process, ts[1:], past.order, *choices, new=False)
        change = jnp.where(used, decays * change[1:], 0.0)
        of_m = of_m + jnp.where(past.output == 0, change, 0.0)
        of_eps = of_eps + jnp.where(past.output == 1, change, 0.0)
        return Row(decay, gain, of_m), of_eps

    def advance(
        self, at: View, row: tuple[Row, Array], t: Array, x: Array, state: State
    ) -> tuple[Array, Array, Any]:
        """Step with both outputs and remember both."""
        m, eps = at.field.denoiser.pair(t[0], x, at.field.cond)
        x1 = combine(row[0], x, m, [m, *state.history], None)
        x1 = combine(Row(1.0, 0.0, row[1]), x1, m, [eps, *state.extra], None)
        return x1, m, (eps, *state.extra)[: self.memory]
