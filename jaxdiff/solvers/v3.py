r"""DPM-Solver-v3: the split of the ODE into a linear and a learnt part is fitted to the model.

Notation: $y = x/\alpha$, $s = \sigma/\alpha$; $l(\lambda)$, $\varsigma(\lambda)$ (`s` in code) and
$b(\lambda)$ are statistics of a model, scalars or one value per coordinate, with
$L' = l$ and $S' = \varsigma$. The PF-ODE is $dy/d\lambda = -s\hat\epsilon$, hence for any $l$

$$ \frac{dy}{d\lambda} = -l\,y - f, \qquad
   f = \frac{\sigma\hat\epsilon - l\,x}{\alpha} = (1-l)\,s\,\hat\epsilon - l\,m. $$

Along a path $f' \approx \varsigma f + b$. With $c' = \varsigma c + b$ that says
$f = c + e^{S}g$ with a $g$ that hardly changes, and it is $g$ that is extrapolated:

$$ x_1 = \frac{\alpha_1}{\alpha_0}e^{L_0 - L_1}x_0 - \alpha_1\int_{\lambda_0}^{\lambda_1}
         e^{L - L_1}\Big[c + \sum_j e^{S - S_j}\ell_j\,(f_j - c_j)\Big]d\lambda. $$

$l = 1$, $\varsigma = b = 0$ is data prediction ($f = -m$); $l = 0$, $\varsigma = -1$, $b = 0$ is
noise prediction ($f = s\hat\epsilon$). The published form names $B = \int e^{-S}b$; ours is
$c = e^S B$, up to a multiple of $e^S$ that $g$ absorbs, and does not overflow.
"""

import math
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from jaxdiff import _check
from jaxdiff._types import ScalarLike, host64, is_concrete
from jaxdiff.process import AbstractProcess
from jaxdiff.solvers.engine import AbstractGridSolver, Row, State
from jaxdiff.solvers.exponential import transfer
from jaxdiff.solvers.multistep import limit, step_length
from jaxdiff.solvers.quadrature import history, integral, integrals, log_snr_step
from jaxdiff.solvers.terms import View

_SLACK = 1e-3  # how far a grid may leave the statistics, in log-SNR: the round-off of its ends


class Curves(NamedTuple):
    """Statistics of one coordinate as functions of log-SNR: values and slopes at equal nodes."""

    lams: Array
    big_l: Array
    l: Array  # noqa: E741
    big_s: Array
    s: Array
    c: Array
    b: Array

    def at(self, lam: Array) -> tuple[Array, Array, Array, Array]:
        r"""Return $L$, $L' = l$, $S$ and $c$ at log-SNRs of any one shape.

        By cubic Hermite interpolation, so that $l$ is the slope of $L$ exactly: then the split of
        the ODE is exact whatever the statistics, and they only decide how well $g$ is extrapolated.
        Beyond the nodes the end values hold, for what is computed and dropped.
        """
        lam = jnp.clip(lam, self.lams[0], self.lams[-1])
        cell = self.lams[1] - self.lams[0]
        i = jnp.clip((lam - self.lams[0]) // cell, 0, len(self.lams) - 2).astype(int)
        u = (lam - self.lams[0]) / cell - i
        values = (1 - u) ** 2 * (1 + 2 * u), u**2 * (3 - 2 * u)
        slopes = cell * u * (1 - u) ** 2, -cell * u**2 * (1 - u)

        def cubic(value: Array, slope: Array) -> Array:
            return (
                values[0] * value[i]
                + values[1] * value[i + 1]
                + slopes[0] * slope[i]
                + slopes[1] * slope[i + 1]
            )

        bend = 6 * u * (1 - u) / cell
        l = (1 - u) * (1 - 3 * u) * self.l[i] + u * (3 * u - 2) * self.l[i + 1]  # noqa: E741
        l = l + bend * (self.big_l[i + 1] - self.big_l[i])  # noqa: E741
        return (
            cubic(self.big_l, self.l),
            l,
            cubic(self.big_s, self.s),
            cubic(self.c, self.s * self.c + self.b),
        )


class Statistics(eqx.Module):
    r"""What `DPMSolverV3` knows of a model; see `jaxdiff.tuning.model_statistics`.

    Attributes:
        lams: equally spaced log-SNRs, increasing, (k,).
        l: the linear part $l$, (k,) or, with one value per coordinate, (k, *dims).
        s: the growth rate $\varsigma$, of the shape of `l`.
        b: the offset $b$, of the shape of `l`; (k, *dims) too beside shared `l` and `s`.

    Raises:
        ValueError: if a shape does not fit or `lams` are not equally spaced.
    """

    lams: Float[ArrayLike, " k"]
    l: Float[ArrayLike, "k *_"]  # noqa: E741
    s: Float[ArrayLike, "k *_"]
    b: Float[ArrayLike, "k *dims"]

    def __check_init__(self) -> None:
        lams, l, s, b = (np.shape(a) for a in (self.lams, self.l, self.s, self.b))  # noqa: E741
        if len(lams) != 1 or lams[0] < 2:
            raise _check.bad("Statistics", "lams", "of shape (k,), k of at least 2", lams)
        if s != l or l[:1] != lams or (l != lams and b != l) or b[:1] != lams:
            expected = f"of shape {lams} or ({lams[0]}, *dims), with l and s alike"
            raise _check.bad("Statistics", "l, s, b", expected, (l, s, b))
        if is_concrete(self.lams):
            gaps = np.diff(np.asarray(self.lams))
            if not (gaps[0] > 0 and np.allclose(gaps, gaps[0], rtol=1e-3)):
                raise _check.bad("Statistics", "lams", "increasing, equally spaced", self.lams)

    def each(self, fn: Any, axes: Any, out: Any) -> Any:
        """Map a function over coordinates, as far as there are any.

        Leaves of `axes` and `out` say what has coordinates: "l" where l has, "b" where b has, ""
        nothing.
        """
        known = {
            "l": 0 if np.ndim(self.l) > 1 else None,
            "b": 0 if np.ndim(self.b) > 1 else None,
            "": None,
        }
        if known["b"] is None:
            return fn
        return jax.vmap(fn, *(jax.tree.map(known.__getitem__, a) for a in (axes, out)))

    def curves(self) -> Curves:
        r"""Integrate the statistics: leaves (k,), or (coordinates, k) where they have coordinates.

        By the trapezoid with its end correction, of fourth order. For $c$, from node to node,
        $c_{i+1} = e^{S_{i+1} - S_i}c_i + \int e^{S_{i+1} - S}b$, so that only differences of S
        are exponentiated.
        """
        lams = jnp.asarray(self.lams)
        cell = (lams[-1] - lams[0]) / (len(lams) - 1)

        def areas(f: Array) -> Array:
            slope: Any = jnp.gradient(f)
            return cell * ((f[1:] + f[:-1]) / 2 - (slope[1:] - slope[:-1]) / 12)

        def one(l: Array, s: Array, b: Array) -> Curves:  # noqa: E741
            big_l, big_s = (jnp.cumsum(jnp.pad(areas(f), (1, 0))) for f in (l, s))
            growth = jnp.exp(jnp.diff(big_s))
            forced = cell / 2 * (growth * b[:-1] + b[1:])

            def join(first: Any, then: Any) -> Any:
                return first[0] * then[0], then[0] * first[1] + then[1]

            c = jax.lax.associative_scan(join, (growth, forced))[1]
            return Curves(lams, big_l, l, big_s, s, jnp.pad(c, (1, 0)), b)

        tables = [
            jnp.asarray(a) if np.ndim(a) == 1 else jnp.asarray(a).reshape(len(lams), -1).T
            for a in (self.l, self.s, self.b)
        ]
        return self.each(one, ("l", "l", "b"), _AXES)(*tables)


_AXES = Curves._make(("", "l", "l", "l", "l", "b", "b"))


def _log_snrs(process: AbstractProcess, ts: Array) -> Array:
    return jax.vmap(process.lam)(ts)


class _Split(NamedTuple):
    r"""A row with $l$ and $s$ of the current node, and what is added to the state."""

    row: Row
    l: Array  # noqa: E741
    ratio: Array
    offset: Array


class DPMSolverV3(AbstractGridSolver):
    r"""DPM-Solver-v3: a multistep predictor-corrector in the parameterisation of the model itself.

    The module's equation, with the polynomial through the last p values (predictor) and once more,
    with the new value included, when the next step starts (corrector, without another evaluation,
    as in `UniPC`). A corrected state keeps its $f$. Order p, and p + 1 with the corrector; 2 at
    most in pseudo mode. Few steps are its domain: at 5 and 10, on a mixture in the plane, p = 3 had
    a third and two fifths of the error of `UniPC(2)`.

    Cost: one network evaluation per step. Values per coordinate make rows of the size of the state.

    Args:
        statistics: of the model.
        p: number of values extrapolated, 1, 2 or 3.
        corrector: whether to correct each step but the last.
        pseudo: take derivatives from divided differences alone,
            $g^{(k)} \approx k!\,g[\lambda_0, \dots, \lambda_{-k}]$: proposed for 5
            steps; there it helped the predictor alone, not with the corrector (our measurement).
        skip: steps, counted from 0, that are not corrected.
        lower_order_final: lower the order of the last steps to 1.

    Raises:
        ValueError: if an argument is none of these, or a grid leaves the range of the statistics.

    References:
        Zheng et al. 2023 (2310.13268), eq. 7 to 15 and algorithm 1.
    """

    statistics: Statistics
    p: int = eqx.field(static=True, default=3)
    corrector: bool = eqx.field(static=True, default=True)
    pseudo: bool = eqx.field(static=True, default=False)
    skip: tuple[int, ...] = eqx.field(static=True, default=())
    lower_order_final: bool = eqx.field(static=True, default=False)
    output = "f"

    def __check_init__(self) -> None:
        if not isinstance(self.statistics, Statistics):
            expected = "a Statistics, as of tuning.model_statistics"
            raise _check.bad("DPMSolverV3", "statistics", expected, self.statistics)
        _check.choice("DPMSolverV3", "p", self.p, (1, 2, 3))

    @property
    def memory(self) -> int:
        """The p - 1 older values of the predictor, and one more for the corrector."""
        return self.p if self.corrector else self.p - 1

    @property
    def claimed_order(self) -> int:
        """The order of the predictor, and one more for the corrector."""
        order = self.p + 1 if self.corrector else self.p
        return min(order, 2) if self.pseudo else order

    def tabulate(self, process: AbstractProcess, ts: Any, *, more: int = 0) -> AbstractGridSolver:
        """Return this solver with its rows, after checking that the statistics cover the grid."""
        lams = host64(_log_snrs, process, ts)
        if is_concrete(lams, self.statistics):
            lams = np.asarray(lams)[np.isfinite(lams)]
            low, *_, high = np.asarray(self.statistics.lams).tolist()
            if len(lams) and not (low - _SLACK <= lams.min() and lams.max() <= high + _SLACK):
                expected = f"at log-SNRs in [{low:.6g}, {high:.6g}], as the statistics"
                got = f"log-SNRs in [{lams.min():.6g}, {lams.max():.6g}]"
                raise _check.bad("DPMSolverV3", "ts", expected, got)
        return super().tabulate(process, ts, more=more)

    def row(self, process: AbstractProcess, ts: Array, n: ScalarLike, left: ScalarLike) -> _Split:
        """Correct the step that led here, then predict."""
        most = limit(self.p, left, self.lower_order_final)
        used = jnp.asarray(self.corrector and jnp.asarray(n) > 0)
        if self.corrector:
            used = used & (ts[2] > ts[1]) & jnp.isfinite(log_snr_step(process, ts[2], ts[1]))
            for step in self.skip:
                used = used & (jnp.asarray(n) - 1 != step)
        before = limit(self.p, jnp.asarray(left) + 1, self.lower_order_final)

        def one(curves: Curves) -> tuple[Array, ...]:
            predictor = ts[:-1] if self.corrector else ts
            weights, free = _weights(process, predictor, most, curves, self.pseudo)
            lams, _ = history(process, ts, most)
            h, finite = step_length(process, ts)
            big_l, l, _, _ = curves.at(jnp.stack([lams[0], lams[0] + h]))  # noqa: E741
            alpha0, alpha1 = process.alpha(ts[1]), process.alpha(ts[0])
            kept = alpha1 / jnp.where(finite, alpha0, 1.0) * jnp.exp(big_l[0] - big_l[1])
            if self.corrector:
                plan = before, curves, self.pseudo
                new = _weights(process, ts[1:], *plan, corrector=True)[0]
                old = _weights(process, ts[1:], *plan)[0]
                change = new - jnp.pad(old, (1, 0))
                change = jnp.where(used, kept * change, 0.0)
                weights = jnp.pad(weights, (0, 1)) + change
            # Offsets c_j of the nodes; their log-SNRs are those that the weights were made with.
            nodes, _ = history(process, ts, self.memory + 1)
            c = curves.at(jnp.where(weights == 0, nodes[0], nodes))[3]
            offset = free - jnp.sum(weights * c)
            # f_0 = (1 - l) x / alpha - m
            total = jnp.sum(weights)
            decay = kept + total * (1 - l[0]) / jnp.where(finite, alpha0, 1.0)
            low, high = curves.lams[0] - _SLACK, curves.lams[-1] + _SLACK
            inside = (lams[0] >= low) & (lams[0] + h <= high)
            decay = jnp.where(inside, decay, jnp.nan)  # the statistics say nothing there
            return decay, -total, weights[1:], offset, l[0]

        fitted = self.statistics
        one = fitted.each(one, (_AXES,), ("l", "l", "l", "b", "l"))
        decay, gain, weights, offset, l = one(fitted.curves())  # noqa: E741
        shape = np.shape(fitted.l)[1:]
        _, finite = step_length(process, ts)
        first = transfer(process, ts[1], ts[0])
        decay, gain = (
            jnp.where(finite, a, b).reshape(shape)
            for a, b in zip((decay, gain), first, strict=False)
        )
        weights = tuple(jnp.where(finite, w, 0.0).reshape(shape) for w in weights.T)
        offset = jnp.where(finite, offset, 0.0).reshape(np.shape(fitted.b)[1:])
        alpha = process.alpha(ts[1])
        ratio = jnp.where(alpha > 0, process.sigma(ts[1]) / jnp.where(alpha > 0, alpha, 1.0), 0.0)
        return _Split(Row(decay, gain, weights), l.reshape(shape), ratio, offset)

    def advance(
        self, at: View, row: _Split, t: Array, x: Array, state: State
    ) -> tuple[Array, Array, Any]:
        """Step with the values of f."""
        m, eps = at.field.denoiser.pair(t[0], x, at.field.cond)
        f = ((1 - row.l) * row.ratio * eps - row.l * m).astype(x.dtype)
        x1 = row.row.decay * x + row.row.gain * m + row.offset
        for w, older in zip(row.row.weights, state.history, strict=True):
            x1 = x1 + w * (older - f)
        return x1, f, state.extra


def _weights(
    process: AbstractProcess,
    ts: Array,
    most: Any,
    curves: Curves,
    pseudo: bool,
    *,
    corrector: bool = False,
) -> tuple[Array, Array]:
    r"""Return the weights of $f_j - c_j$ in the step from `ts[1]` to `ts[0]`, and that of $c$.

    $$ w_j = -\alpha_1 e^{-S_j}\int e^{L - L_1 + S}\,\ell_j\,d\lambda, \qquad
       -\alpha_1\int e^{L - L_1} c\,d\lambda, $$

    of the nodes `ts[1:]`, or with the corrector of `ts`, as far as they count.
    """
    lams, count = history(process, ts, most)
    h, _ = step_length(process, ts)
    h = jnp.where(h > 0, h, 1.0)  # before the first step nothing can be corrected
    alpha1, lam1 = process.alpha(ts[0]), lams[0] + h
    big_l1 = curves.at(lam1)[0]
    big_s0 = curves.at(lams[0])[2]

    def kernel(r: Array) -> Array:
        big_l, _, big_s, _ = curves.at(lams[0] + r)
        return -alpha1 * jnp.exp(big_l - big_l1 + big_s - big_s0)

    nodes = lams
    if corrector:
        nodes, count = jnp.concatenate([lams[:1], lam1[None], lams[1:]]), count + 1
    if pseudo:
        weights = _divided(kernel, h, nodes, count)
    else:
        weights = integrals(kernel, lambda lam: lam, lams[0], h, nodes, count)
    big_s = curves.at(jnp.where(jnp.arange(len(nodes)) < count, nodes, lams[0]))[2]
    weights = weights * jnp.exp(big_s0 - big_s)
    if corrector:
        weights = jnp.concatenate([weights[1:2], weights[:1], weights[2:]])

    def constant(r: Array) -> Array:
        big_l, _, _, c = curves.at(lams[0] + r)
        return -alpha1 * jnp.exp(big_l - big_l1) * c

    return weights, integral(constant, h)


def _divided(kernel: Any, h: Any, nodes: Array, count: Any) -> Array:
    r"""Return the weights of $\sum_k r^k\,g[\lambda_0, \dots, \lambda_{-k}]$, as `integrals`."""
    total = jnp.zeros(len(nodes))
    for k in range(len(nodes)):
        moment = integral(lambda r, k=k: kernel(r) * r**k, h)
        part = []
        for j in range(k + 1):
            gaps = [nodes[j] - nodes[i] for i in range(k + 1) if i != j]
            part.append(math.prod(jnp.where(k < count, gap, 1.0) for gap in gaps))
        row = jnp.stack([moment / jnp.asarray(p, moment.dtype) for p in part])
        total = total + jnp.where(k < count, jnp.pad(row, (0, len(nodes) - k - 1)), 0.0)
    return total
