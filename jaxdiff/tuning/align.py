r"""Align Your Steps: the grid that minimises a bound on the divergence between path measures.

Notation: $y = \alpha^2/\sigma^2$ is the signal-to-noise ratio, increasing along the grid,
$\bar\sigma = y^{-1/2}$, and $m_i = m(t_i, x_{t_i})$. Over a step an exponential solver of first
order runs the reverse SDE with the denoiser frozen at its start; by Girsanov's theorem its law over
paths is at a Kullback-Leibler divergence from that of the model of at most (the KLUB)

$$ K = \frac12\sum_i\int_{y_i}^{y_{i+1}} E\,\|m(t_y, x_{t_y}) - m_i\|^2\,dy, $$

where $x_{t_y}$ is data at ratio $y$ and $x_{t_i}$ is made of it by more noise. A node sees only its
two neighbours. A solver of another noise level $\tau$ has $(1 + \tau^2)^2/(4\tau^2)$ times the
bound of $\tau = 1$, which is this one, and so the same best grid. Gaussian data of deviation $c$ in
$d$ dimensions has

$$ K = \frac d2\sum_i\left(a_i - \log(1 + a_i)\right), \qquad
   a_i = \frac{c^2(y_{i+1} - y_i)}{1 + c^2y_i}, $$

least where $\log(1 + c^2 y)$ is uniform. The integral is estimated with $y$ drawn as this law has
it, proportional to $\rho(y) = y/(1 + c^2y) - y_i/(1 + c^2y_i)$: for such data a constant integrand.

References:
    Sabour, Fidler, Kreis 2024 (2404.14507); the sampling of y and the descent, its appendix.
"""

from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, Real

from jaxdiff import _check, grids
from jaxdiff._array import Cond, Scalar, ScalarLike, time_dtype
from jaxdiff._host import is_concrete
from jaxdiff._keys import stream
from jaxdiff.process import AbstractProcess, gaussian_only
from jaxdiff.score import AbstractDenoiser, floating

__all__ = ["align_your_steps", "average", "klub", "rows_of"]

_GOLDEN = (5**0.5 - 1) / 2


def _excess(p: Array) -> Array:
    r"""Return $p - \log(1 + p)$ without cancellation."""
    small = p < 0.01
    series = p**2 * (1 / 2 - p * (1 / 3 - p * (1 / 4 - p * (1 / 5 - p / 6))))
    return jnp.where(small, series, p - jnp.log1p(jnp.where(small, 1.0, p)))


def _excess_inverse(q: Array) -> Array:
    r"""Return the $p > 0$ with $p - \log(1 + p) = q$: Newton, from an upper bound."""
    p = q + jnp.sqrt(2 * q)  # Chatzigeorgiou 2013 (1601.04895)
    for _ in range(5):
        p = p - (_excess(p) - q) * (1 + p) / p
    return p


def average(
    one: Callable[..., Array],
    key: PRNGKeyArray,
    data: Array,
    cond: Cond,
    chunk: int | None,
) -> Array:
    """Return the mean over the data of `one(fold_in(key, i), i, x0_i, cond_i)`."""
    n = data.shape[0]
    rows = (jnp.arange(n), data, jax.tree.map(jnp.asarray, cond))
    each = jax.lax.map(
        lambda row: one(stream(key, row[0]), *row), rows, batch_size=n if chunk is None else chunk
    )
    return jnp.mean(each, axis=0)


def _interval(
    denoiser: AbstractDenoiser, t0: Array, t1: Array, scale: Array, key: Any, rows: Any, chunk: Any
) -> Scalar:
    """Return the term of the bound that belongs to the step from `t0` to `t1`."""
    process, data, cond = denoiser.process, *rows
    y0, y1, c2 = process.snr(t0), process.snr(t1), scale**2
    kappa = c2 / (1 + c2 * y0)
    whole = _excess(kappa * (y1 - y0))  # c^4 times the integral of rho
    # Quantiles of y by an additive recurrence from a random start: each uniform, together even.
    recurrence = jnp.asarray(np.modf(_GOLDEN * np.arange(len(data)))[0], t0.dtype)
    start = jax.random.uniform(stream(key, len(data)), (), t0.dtype)
    half = jnp.asarray(0.5 * jnp.finfo(t0.dtype).eps, t0.dtype)

    def one(key: PRNGKeyArray, i: Array, x0: Array, cond: Cond) -> Scalar:
        quantile = jnp.maximum(jnp.mod(recurrence[i] + start, 1.0), half)
        p = _excess_inverse(quantile * whole)
        z = p / kappa  # y - y0
        rho = z / ((1 + c2 * y0) ** 2 * (1 + p))
        t = process.t_of_lam(0.5 * jnp.log(y0 + z))
        near, far = jax.random.normal(key, (2, *x0.shape), x0.dtype)
        alpha, sigma = process.alpha(t), process.sigma(t)
        x = (alpha * x0 + sigma * near).astype(x0.dtype)
        added = process.sigma(t0) * jnp.sqrt(z / (y0 + z))
        noisier = (process.alpha(t0) / alpha * x + added * far).astype(x0.dtype)
        change = (denoiser(t, x, cond) - denoiser(t0, noisier, cond)).astype(t0.dtype)
        return jnp.sum(change**2) / rho

    return 0.5 * whole / c2**2 * average(one, key, data, cond, chunk)


def _terms(
    denoiser: AbstractDenoiser, ts: Array, scale: Array, key: Any, rows: Any, chunk: Any
) -> Array:
    def term(at: tuple[Array, Array, Array]) -> Scalar:
        i, t0, t1 = at
        return _interval(denoiser, t0, t1, scale, stream(key, i), rows, chunk)

    return jax.lax.map(term, (jnp.arange(len(ts) - 1), ts[:-1], ts[1:]))


_terms_jit = eqx.filter_jit(_terms)


def rows_of(where: str, denoiser: Any, data: Any, cond: Cond, chunk: Any) -> tuple[Array, Cond]:
    """Return the data, one row per sample, with its conditions, or raise ValueError."""
    if not isinstance(denoiser, AbstractDenoiser):
        raise _check.bad(where, "denoiser", "a jaxdiff denoiser", type(denoiser).__name__)
    data = floating(data)
    if data.ndim < 1 or data.shape[0] == 0:
        raise _check.bad(where, "data", "samples of shape (n, *dims), n >= 1", data.shape)
    if chunk is not None:
        _check.whole(where, "chunk", chunk, 1)
    for leaf in jax.tree.leaves(cond):
        if jnp.shape(leaf)[:1] != data.shape[:1]:
            got = f"a leaf of shape {jnp.shape(leaf)}"
            raise _check.bad(where, "cond", f"leaves with leading axis {len(data)}", got)
    return data, cond


def _grid(where: str, process: AbstractProcess, ts: Any, scale: Any, dtype: Any) -> Any:
    _check.number(where, "scale", scale, float(np.finfo(np.float32).tiny), 1e300)
    instead = "the bound is one of a reverse SDE, which it has not"
    gaussian_only(where, "the process of the denoiser", process, instead)
    ts = grids.check(process, ts, where=where, dtype=dtype)
    if is_concrete(ts, process) and not process.sigma(ts[-1]) > 0:
        got = f"{ts[-1]:.9g}, where the bound is infinite"
        raise _check.bad(where, "ts", "a grid that ends at sigma > 0", got)
    return ts


def klub(
    key: PRNGKeyArray,
    denoiser: AbstractDenoiser,
    data: Real[ArrayLike, "n *dims"],
    *,
    ts: Real[Any, " nodes"] | Sequence[Any],
    cond: Cond = None,
    scale: ScalarLike = 0.5,
    chunk: int | None = None,
) -> Float[Array, " steps"]:
    r"""Estimate the bound of the module's head, step by step.

    $$ K_i = \frac12\int_{y_i}^{y_{i+1}} E\,\|m(t_y, x_{t_y}) - m_i\|^2\,dy $$

    Unbiased, from one ratio y per sample and step. Its sum bounds the divergence of DDPM-like
    sampling, in nats; it ranks grids for stochastic solvers of first order, and is a poor judge of
    the ODE: its best grid has steps at large noise that a deterministic solver pays for.

    Cost: two evaluations per sample and step, no autodiff.

    Args:
        key: one draw per sample and step; the same key compares grids under the same noise.
        denoiser: the model.
        data: clean samples, (n, *dims).
        ts: grid, (nodes,), ending at sigma > 0; it may start at alpha = 0. May be traced.
        cond: conditions, every leaf with leading axis n.
        scale: standard deviation c of the data, for the law of y: it changes the variance only.
        chunk: samples per vectorised program; all by default.

    Returns:
        The terms $K_i$, (steps,); the bound is their sum.

    Raises:
        ValueError: if an argument is wrong, or `ts` ends at sigma = 0.

    References:
        Sabour, Fidler, Kreis 2024 (2404.14507), section 3.
    """
    rows = rows_of("klub", denoiser, data, cond, chunk)
    key = _check.key("klub", "key", key)
    dtype = time_dtype(rows[0].dtype)
    ts = _grid("klub", denoiser.process, ts, scale, dtype)
    return _terms_jit(denoiser, jnp.asarray(ts, dtype), jnp.asarray(scale, dtype), key, rows, chunk)


@eqx.filter_jit
def _sweep(
    denoiser: AbstractDenoiser,
    ts: Array,
    colours: Array,
    fractions: Array,
    zoom: Array,
    scale: Array,
    key: Any,
    rows: Any,
    chunk: Any,
) -> tuple[Array, Scalar]:
    """Move the nodes of each colour in turn to their best candidates; return the bound, too."""
    process = denoiser.process

    def best(ts: Array, i: Array) -> Array:
        before, now, after = ts[i - 1], ts[i], ts[i + 1]
        theta = jnp.arctan(jnp.exp(-jax.vmap(process.lam)(jnp.stack([before, now, after]))) / scale)
        room = jnp.where(fractions > 0, theta[0] - theta[1], theta[1] - theta[2])
        moved = theta[1] + zoom * fractions * room
        times = jax.vmap(process.t_of_lam)(-jnp.log(scale * jnp.tan(moved)))
        times = jnp.where(fractions == 0, now, times).astype(ts.dtype)

        def cost(t: Array) -> Scalar:
            left = _interval(denoiser, before, t, scale, stream(key, i - 1), rows, chunk)
            return left + _interval(denoiser, t, after, scale, stream(key, i), rows, chunk)

        return times[jnp.argmin(jax.lax.map(cost, times))]

    def move(ts: Array, colour: Array) -> tuple[Array, None]:
        return ts.at[colour].set(jax.lax.map(lambda i: best(ts, i), colour)), None

    ts, _ = jax.lax.scan(move, ts, colours)
    return ts, jnp.sum(_terms(denoiser, ts, scale, key, rows, chunk))


def align_your_steps(
    key: PRNGKeyArray,
    denoiser: AbstractDenoiser,
    data: Real[ArrayLike, "n *dims"],
    *,
    ts: Real[Any, " nodes"] | Sequence[Any],
    subdivide: int = 0,
    cond: Cond = None,
    scale: ScalarLike = 0.5,
    candidates: int = 11,
    sweeps: int = 300,
    tol: ScalarLike = 1e-2,
    chunk: int | None = None,
    progress: bool = False,
) -> Float[np.ndarray, " more"]:
    r"""Tune the inner nodes of a grid to a model by coordinate descent on its bound `klub`.

    A sweep moves every node to the best of `candidates` places between its neighbours, equally
    spaced in $\arctan(\bar\sigma/c)$ on either side of where it is, first the odd nodes and then
    the even ones. Three sweeps, over the whole room, a quarter and a sixteenth of it, are a cycle.
    The noise is drawn once, so that the bound never grows. Then `subdivide` times: halve every
    step (`grids.refine`) and tune the new nodes only.

    The best grid of the bound is not that of the samples: descent is stopped early on purpose, when
    a cycle gains less than `tol` of the bound. Published: 10 steps from the EDM grid, then two
    subdivisions; `grids.interpolate` makes other numbers of steps of the result.

    Cost: about `4 * candidates * nodes` evaluations per sample and sweep, no autodiff.

    Args:
        key: the noise.
        denoiser: the model.
        data: clean samples, (n, *dims); published: n = 8192.
        ts: where to start, (nodes,), ending at sigma > 0; its ends stay.
        subdivide: how often to halve the steps afterwards.
        cond: conditions, every leaf with leading axis n.
        scale: standard deviation c of the data.
        candidates: places per node and sweep, the present one included; odd, at least 3.
        sweeps: at most so many per level.
        tol: stop when a cycle gains less than this share of the bound; at least 0.
        chunk: samples per vectorised program; all by default.
        progress: show a bar over the sweeps (needs tqdm).

    Returns:
        The grid, float64, of `2**subdivide` times as many steps.

    Raises:
        ValueError: if an argument is wrong, or the bound is not finite on the data.

    Example:
        >>> import jaxdiff as jd
        >>> edm = jd.process.EDM(sigma_min=0.02, sigma_max=20.0)
        >>> unit = jd.exact.gaussian(edm, jnp.zeros(1), 0.25)
        >>> key = jax.random.key(0)
        >>> data = 0.5 * jax.random.normal(key, (256, 1))
        >>> align_your_steps(key, unit, data, ts=edm.grid(3)).shape
        (4,)

    References:
        Sabour, Fidler, Kreis 2024 (2404.14507).
    """
    where = "align_your_steps"
    rows = rows_of(where, denoiser, data, cond, chunk)
    process, dtype = denoiser.process, time_dtype(rows[0].dtype)
    if not is_concrete(denoiser, ts, data):
        raise _check.bad(where, "denoiser, ts, data", "concrete", "a traced one; not inside jit")
    for argument, value, least in (
        ("subdivide", subdivide, 0),
        ("candidates", candidates, 3),
        ("sweeps", sweeps, 1),
    ):
        _check.whole(where, argument, value, least)
    if candidates % 2 == 0:
        raise _check.bad(where, "candidates", "odd: as many on either side", candidates)
    _check.number(where, "tol", tol, 0, 1e300)
    key = _check.key(where, "key", key)
    nodes: Any = _grid(where, process, ts, scale, dtype)
    fractions = np.arange(-(candidates // 2), candidates // 2 + 1) / (candidates // 2 + 1)
    fractions = fractions[np.argsort(np.abs(fractions), kind="stable")]  # where it is wins a tie
    rest = (jnp.asarray(scale, dtype), key, rows, chunk)
    for level in range(subdivide + 1):
        # No node of a colour is a neighbour of another; a short one goes round again.
        nodes = grids.refine(process, nodes) if level else nodes
        odd, even = np.arange(1, len(nodes) - 1, 2), np.arange(2, len(nodes) - 1, 2)
        both = len(even) > 0 and level == 0  # later the even nodes are the old ones
        colours = np.stack([odd, np.resize(even, len(odd))] if both else [odd])
        if len(odd):
            name = f"{where}: {len(nodes) - 1} steps"
            nodes = _descend(name, denoiser, nodes, colours, fractions, sweeps, tol, progress, rest)
    return nodes


def _descend(
    name: str,
    denoiser: AbstractDenoiser,
    ts: np.ndarray,
    colours: np.ndarray,
    fractions: np.ndarray,
    sweeps: int,
    tol: Any,
    progress: bool,
    rest: tuple[Any, ...],
) -> np.ndarray:
    """Sweep until a cycle gains less than `tol` of the bound."""
    bar: Any = range(sweeps)
    if progress:
        from tqdm.auto import tqdm

        bar = tqdm(bar, desc=name, unit="sweep")
    start = now = jnp.asarray(ts, rest[0].dtype)
    moves = (jnp.asarray(colours), jnp.asarray(fractions, now.dtype))
    last = float(jnp.sum(_terms_jit(denoiser, now, *rest)))
    if not np.isfinite(last):
        raise _check.bad(name, "the bound", "finite on the data", last)
    for k in bar:
        zoom = jnp.asarray(4.0 ** -(k % 3), now.dtype)
        now, bound = _sweep(denoiser, now, *moves, zoom, *rest)
        if progress:
            bar.set_postfix(bound=float(bound))
        if k % 3 == 2:
            if not last - float(bound) > tol * last:
                break
            last = float(bound)
    tuned = np.where(np.asarray(now == start), ts, np.asarray(now, np.float64))  # ends are exact
    return np.asarray(grids.check(denoiser.process, tuned, where=name))
