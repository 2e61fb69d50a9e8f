r"""DPM-Solver-v3: the split of the ODE into a linear and a learnt part is fitted to the model.

Notation: $y = x/\alpha$, $s = \sigma/\alpha$; $l(\lambda)$, $\varsigma(\lambda)$ (`s` of the
statistics) and $b(\lambda)$ are statistics of a model, scalars or one value per coordinate, with
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
from jaxdiff._array import ScalarLike
from jaxdiff._host import host64, is_concrete
from jaxdiff.process import AbstractProcess
from jaxdiff.solvers.engine import AbstractGridSolver, Row, State
from jaxdiff.solvers.exponential import transfer
from jaxdiff.solvers.multistep import limit, step_length
from jaxdiff.solvers.quadrature import history, integral, integrals, log_snr_step
from jaxdiff.solvers.terms import View

__all__ = ["Curves", "DPMSolverV3", "Statistics", "Values"]

_SLACK = 1e-3  # how far a grid may leave the statistics, in log-SNR: the round-off of its ends


class Curves(NamedTuple):
    """Statistics of one coordinate as functions of log-SNR: values and slopes at equal nodes."""

    lams: Array
    L: Array
    l: Array  # noqa: E741
    S: Array
    s: Array
    c: Array
    b: Array

    def at(self, lam: Array) -> "Values":
        r"""Return the functions at log-SNRs of any one shape.

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
        l = l + bend * (self.L[i + 1] - self.L[i])  # noqa: E741
        return Values(
            L=cubic(self.L, self.l),
            l=l,
            S=cubic(self.S, self.s),
            c=cubic(self.c, self.s * self.c + self.b),
        )


class Values(NamedTuple):
    r"""Values of $L$, $L' = l$, $S$ and $c$."""

    L: Array
    l: Array  # noqa: E741
    S: Array
    c: Array


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
            L, S = (jnp.cumsum(jnp.pad(areas(f), (1, 0))) for f in (l, s))
            growth = jnp.exp(jnp.diff(S))
            forced = cell / 2 * (growth * b[:-1] + b[1:])

            def join(first: Any, then: Any) -> Any:
                return first[0] * then[0], then[0] * first[1] + then[1]

            c = jax.lax.associative_scan(join, (growth, forced))[1]
            return Curves(lams, L, l, S, s, jnp.pad(c, (1, 0)), b)

        tables = [
            jnp.asarray(a) if np.ndim(a) == 1 else jnp.asarray(a).reshape(len(lams), -1).T
            for a in (self.l, self.s, self.b)
        ]
        return self.each(one, ("l", "l", "b"), _AXES)(*tables)


_AXES = Curves._make(("", "l", "l", "l", "l", "b", "b"))


def _log_snrs(process: AbstractProcess, ts: Array) -> Array:
    return jax.vmap(process.lam)(ts)


def _start(process: AbstractProcess, ts: Array) -> tuple[Array, Array]:
    r"""Return $\lambda_0$ and h of the step from `ts[1]` to `ts[0]`; made up where it has none."""
    lams, _ = history(process, ts, 1)
    h, _ = step_length(process, ts)
    return lams[0], jnp.where(h > 0, h, 1.0)  # before the first step nothing can be corrected


def _alpha0(process: AbstractProcess, ts: Array) -> Array:
    r"""Return $\alpha_0$, to divide by: 1 where the step has no log-SNR."""
    _, finite = step_length(process, ts)
    return jnp.where(finite, process.alpha(ts[1]), 1.0)


def _kept(process: AbstractProcess, ts: Array, curves: Curves) -> Array:
    r"""Return what the step keeps of x, $\frac{\alpha_1}{\alpha_0}e^{L_0 - L_1}$."""
    lam0, h = _start(process, ts)
    L0, L1 = curves.at(lam0).L, curves.at(lam0 + h).L
    return process.alpha(ts[0]) / _alpha0(process, ts) * jnp.exp(L0 - L1)


def _forced(process: AbstractProcess, ts: Array, curves: Curves) -> Array:
    r"""Return what the step adds whatever f, $-\alpha_1\int e^{L - L_1} c\,d\lambda$."""
    lam0, h = _start(process, ts)
    alpha1, L1 = process.alpha(ts[0]), curves.at(lam0 + h).L

    def integrand(r: Array) -> Array:
        at = curves.at(lam0 + r)
        return -alpha1 * jnp.exp(at.L - L1) * at.c

    return integral(integrand, h)


def _weights(
    process: AbstractProcess, ts: Array, curves: Curves, nodes: Array, count: Any, pseudo: bool
) -> Array:
    r"""Return the factors of $f_j - c_j$ in the step from `ts[1]` to `ts[0]`.

    $$ w_j = -\alpha_1 e^{-S_j}\int e^{L - L_1 + S}\,\ell_j\,d\lambda, $$

    of the first `count` of `nodes`, log-SNRs with $\lambda_0$ first; 0 of the others.
    """
    lam0, h = _start(process, ts)
    alpha1, L1, S0 = process.alpha(ts[0]), curves.at(lam0 + h).L, curves.at(lam0).S

    def kernel(r: Array) -> Array:  # with S - S_0, that no factor overflows
        at = curves.at(lam0 + r)
        return -alpha1 * jnp.exp(at.L - L1 + at.S - S0)

    if pseudo:
        integrated = _divided(kernel, h, nodes, count)
    else:
        integrated = integrals(kernel, lambda lam: lam, lam0, h, nodes, count)
    S = curves.at(jnp.where(jnp.arange(len(nodes)) < count, nodes, lam0)).S
    return jnp.exp(S0 - S) * integrated


def _correction(
    process: AbstractProcess, ts: Array, curves: Curves, most: Any, pseudo: bool
) -> Array:
    r"""Return what the $w_j$ of the nodes `ts` gain once $f_1$, that of `ts[0]`, is known too."""
    nodes, count = history(process, ts, most)
    lam0, h = _start(process, ts)
    longer = jnp.concatenate([nodes[:1], (lam0 + h)[None], nodes[1:]])
    new = _weights(process, ts, curves, longer, count + 1, pseudo)
    old = _weights(process, ts, curves, nodes, count, pseudo)
    w0, w1, older = new[:1], new[1:2], new[2:]
    return jnp.concatenate([w1, w0, older]) - jnp.pad(old, (1, 0))


def _offsets(process: AbstractProcess, ts: Array, curves: Curves, weights: Array) -> Array:
    r"""Return the $c_j$ of the nodes `ts[1:]` whose weight is not 0."""
    lams, _ = history(process, ts, len(ts) - 1)
    return curves.at(jnp.where(weights == 0, lams[0], lams)).c


def _covered(process: AbstractProcess, ts: Array, curves: Curves) -> Array:
    r"""Return whether the statistics reach over the step; beyond them they say nothing."""
    lam0, h = _start(process, ts)
    low, high = curves.lams[0] - _SLACK, curves.lams[-1] + _SLACK
    return (lam0 >= low) & (lam0 + h <= high)


class _Split(NamedTuple):
    r"""A row for $f_0 = (1 - l_0)\,s_0\hat\epsilon - l_0 m$ and older f, with what it adds to x."""

    row: Row
    l: Array  # noqa: E741
    s: Array
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
        most, before = (
            limit(self.p, jnp.asarray(left) + k, self.lower_order_final) for k in (0, 1)
        )
        corrected = self._corrected(process, ts, n)

        def one(curves: Curves) -> tuple[Array, ...]:
            kept = _kept(process, ts, curves)
            nodes, count = history(process, ts[:-1] if self.corrector else ts, most)
            w = _weights(process, ts, curves, nodes, count, self.pseudo)
            if self.corrector:
                change = _correction(process, ts[1:], curves, before, self.pseudo)
                w = jnp.pad(w, (0, 1)) + jnp.where(corrected, kept * change, 0.0)
            offset = _forced(process, ts, curves) - jnp.sum(w * _offsets(process, ts, curves, w))
            # In differences f_j - f_0 the factor of f_0 = (1 - l_0) x / alpha_0 - m is sum(w).
            l0 = curves.at(_start(process, ts)[0]).l
            decay = kept + jnp.sum(w) * (1 - l0) / _alpha0(process, ts)
            decay = jnp.where(_covered(process, ts, curves), decay, jnp.nan)
            return decay, -jnp.sum(w), w[1:], offset, l0

        fitted = self.statistics
        parts = fitted.each(one, (_AXES,), ("l", "l", "l", "b", "l"))(fitted.curves())
        return self._shaped(process, ts, *parts)

    def _corrected(self, process: AbstractProcess, ts: Array, n: ScalarLike) -> Array:
        """Return whether the step that led here is corrected: there is one, finite, not skipped."""
        n = jnp.asarray(n)
        if not self.corrector:
            return jnp.zeros_like(n, bool)
        taken = (n > 0) & (ts[2] > ts[1]) & jnp.isfinite(log_snr_step(process, ts[2], ts[1]))
        for step in self.skip:
            taken = taken & (n - 1 != step)
        return taken

    def _shaped(
        self,
        process: AbstractProcess,
        ts: Array,
        decay: Array,
        gain: Array,
        weights: Array,
        offset: Array,
        l: Array,  # noqa: E741
    ) -> _Split:
        """Give coordinates the shape of the state; a step of infinite length is that of DDIM."""
        shape, shape_b = np.shape(self.statistics.l)[1:], np.shape(self.statistics.b)[1:]
        _, finite = step_length(process, ts)
        decay_ddim, gain_ddim, _ = transfer(process, ts[1], ts[0])
        row = Row(
            jnp.where(finite, decay, decay_ddim).reshape(shape),
            jnp.where(finite, gain, gain_ddim).reshape(shape),
            tuple(jnp.where(finite, w, 0.0).reshape(shape) for w in weights.T),
        )
        offset = jnp.where(finite, offset, 0.0).reshape(shape_b)
        alpha = process.alpha(ts[1])
        s = jnp.where(alpha > 0, process.sigma(ts[1]) / jnp.where(alpha > 0, alpha, 1.0), 0.0)
        return _Split(row, l.reshape(shape), s, offset)

    def advance(
        self, at: View, row: _Split, t: Array, x: Array, state: State
    ) -> tuple[Array, Array, Any]:
        """Step with the values of f."""
        m, eps = at.field.denoiser.pair(t[0], x, at.field.cond)
        f = ((1 - row.l) * row.s * eps - row.l * m).astype(x.dtype)
        x1 = row.row.decay * x + row.row.gain * m + row.offset
        for w, older in zip(row.row.weights, state.history, strict=True):
            x1 = x1 + w * (older - f)
        return x1, f, state.extra


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
