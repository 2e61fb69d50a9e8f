r"""Statistics of a model that `DPMSolverV3` fits itself to, estimated once by Monte Carlo.

Notation as in `jaxdiff.solvers.v3`: $y = x/\alpha = m + q$ with $q = \sigma\hat\epsilon/\alpha$, so
that the PF-ODE is $dy/d\lambda = -q$. With $'$ the derivative in $\lambda$ along it and $w = -m'$,

$$ l = E\,\mathrm{diag}\Big(\sigma\frac{\partial\hat\epsilon}{\partial x}\Big), \qquad
   f = (1-l)\,q - l\,m, \qquad f' = w - (1-l)\,q - l'\,(q + m), $$
$$ s = \frac{\mathrm{Cov}(f, f')}{\mathrm{Var}(f)}, \qquad b = E f' - s\,E f. $$

All of it follows from $E\,\mathrm{diag}$ and the first and second moments of $(q, m, w)$ at each
$\lambda$, which one pass over samples collects. Written so, nothing large cancels at either end.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from jaxdiff import _check, grids
from jaxdiff._array import Cond
from jaxdiff._host import host64, is_concrete
from jaxdiff._keys import INIT, PROBES, stream
from jaxdiff.process import AbstractProcess
from jaxdiff.score import AbstractDenoiser, floating
from jaxdiff.solvers.v3 import Statistics

__all__ = ["model_statistics"]


def _nodes(process: AbstractProcess, ends: Array, count: Any) -> tuple[Array, Array]:
    low, high = jax.vmap(process.lam)(ends)
    lams = low + (high - low) * jnp.linspace(0, 1, len(count))
    return lams, jax.vmap(process.t_of_lam)(lams)


def _one(
    denoiser: AbstractDenoiser, t: Any, x0: Array, eps: Array, probe: Array, cond: Cond
) -> tuple[Array, Array]:
    r"""Return a sample of the diagonal and $(q, m, w)$, from one evaluation and two jvps."""
    process = denoiser.process
    alpha, sigma = process.alpha(t), process.sigma(t)
    x = (alpha * x0 + sigma * eps).astype(x0.dtype)
    (m, eps), push = jax.linearize(lambda t, x: denoiser.pair(t, x, cond), t, x)
    dt = 1 / jax.jvp(process.lam, (t,), (jnp.ones_like(t),))[1]  # per unit of log-SNR
    d_alpha, d_sigma = process.rates(t)
    dx = ((d_alpha * m + d_sigma * eps) * dt).astype(x.dtype)
    diagonal = probe * sigma * push(jnp.zeros_like(t), probe)[1]
    return diagonal, jnp.stack([sigma / alpha * eps, m, -push(dt, dx)[0]])


@eqx.filter_jit
def _moments(
    denoiser: AbstractDenoiser,
    ts: Array,
    data: Array,
    key: PRNGKeyArray,
    cond: Cond,
    chunk: int,
    pool: bool,
) -> Any:
    """Return means over samples, at every time: diagonals, first and second moments."""
    shape, dtype = data.shape[1:], data.dtype

    def pooled(a: Array) -> Array:
        return a.mean(tuple(range(a.ndim - len(shape), a.ndim)))

    def draw(i: Array, at: int, law: Any) -> Array:
        return law(stream(jax.random.fold_in(key, i), at), shape, dtype)

    def sample(t: Array, i: Array, x0: Array, cond: Cond) -> Any:
        # The same draws at every time, so that the statistics are smooth functions of it.
        eps, probe = draw(i, INIT, jax.random.normal), draw(i, PROBES, jax.random.rademacher)
        diagonal, z = _one(denoiser, t, x0, eps, probe, cond)
        squares = z[:, None] * z[None]
        return (pooled(diagonal), z, pooled(squares)) if pool else (diagonal, z, squares)

    rows = jnp.arange(len(data)).reshape(-1, chunk)

    def at(t: Array) -> Any:
        def add(total: Any, rows: Array) -> tuple[Any, None]:
            picked = data[rows], jax.tree.map(lambda a: jnp.asarray(a)[rows], cond)
            each = jax.vmap(sample, (None, 0, 0, 0))(t, rows, *picked)
            return jax.tree.map(lambda a, b: a + b.sum(0), total, each), None

        zero = jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype),
            jax.eval_shape(sample, t, rows[0, 0], data[0], jax.tree.map(lambda a: a[0], cond)),
        )
        total = jax.lax.scan(add, zero, rows)[0]
        return jax.tree.map(lambda a: a / len(data), total)

    return jax.lax.map(at, ts)


def model_statistics(
    key: PRNGKeyArray,
    denoiser: AbstractDenoiser,
    data: Float[ArrayLike, "n *dims"],
    *,
    nodes: int = 1200,
    samples: int = 1024,
    coordinatewise: bool = False,
    t_start: Any = None,
    t_end: Any = None,
    cond: Cond = None,
    chunk: int | None = None,
) -> Statistics:
    r"""Estimate the statistics of a model on states $\alpha x_0 + \sigma\epsilon$ of data.

    The module's equations, at log-SNRs equally spaced. The diagonal is by one Rademacher probe per
    sample; $q'$ is an exact derivative, in time too; $l'$ is by differences of $l$.

    Cost, once per model: `nodes * samples` evaluations of the network and twice as many forward
    derivatives. In float32, moments are summed in float32.

    Args:
        key: for the noise and the probes.
        denoiser: the model, guidance included.
        data: clean samples, (n, *dims); sample i uses row `i % n`.
        nodes: number of log-SNRs, at least 4.
        samples: number of samples at each, at least 2.
        coordinatewise: whether every coordinate has its own l and s; by default they are shared,
            and only b, which the mean of the data enters, has a value per coordinate.
        t_start: noise end, as for `process.grid`; where a grid starts at most.
        t_end: data end.
        cond: conditions, every leaf with leading axis `samples`.
        chunk: samples evaluated at once, a divisor of `samples`; all by default.

    Returns:
        Values in float64 on the host: l and s (nodes,), or (nodes, *dims) if `coordinatewise`; b
        (nodes, *dims).

    Raises:
        ValueError: if an argument is wrong, or the log-SNR is infinite at an end.

    References:
        Zheng et al. 2023 (2310.13268), section 3.1 and appendix.
    """
    where = "model_statistics"
    if not isinstance(denoiser, AbstractDenoiser):
        raise _check.bad(where, "denoiser", "a jaxdiff denoiser", repr(denoiser))
    _check.whole(where, "nodes", nodes, 4)
    _check.whole(where, "samples", samples, 2)
    chunk = samples if chunk is None else chunk
    _check.whole(where, "chunk", chunk, 1)
    if samples % chunk:
        raise _check.bad(where, "chunk", f"a divisor of samples={samples}", chunk)
    data = floating(data)
    if data.ndim < 1 or len(data) == 0:
        raise _check.bad(where, "data", "of shape (n, *dims) with n >= 1", data.shape)
    process = denoiser.process
    ends = [
        process.t_max if t_start is None else t_start,
        process.t_min if t_end is None else t_end,
    ]
    ends = grids.check(process, jnp.asarray(ends, float), where=where, argument="t_start, t_end")
    lams, ts = host64(_nodes, process, np.asarray(ends), np.zeros(nodes))
    if not is_concrete(ts) or not np.all(np.isfinite(lams)):
        expected = "known times of finite log-SNR; start below alpha = 0 and end above sigma = 0"
        raise _check.bad(where, "t_start, t_end", expected, ends)
    dtype = jnp.promote_types(data.dtype, jnp.float32)
    picked = data[jnp.arange(samples) % len(data)].astype(dtype)
    key = _check.key(where, "key", key)
    means = _moments(denoiser, jnp.asarray(ts, dtype), picked, key, cond, chunk, not coordinatewise)
    l, first, second = (np.asarray(a, np.float64) for a in means)  # noqa: E741
    return Statistics(lams, *_regress(lams, l, first, second, float(jnp.finfo(dtype).eps)))


def _regress(
    lams: np.ndarray,
    l: np.ndarray,  # noqa: E741
    first: np.ndarray,
    second: np.ndarray,
    tiny: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    r"""Return $(l, s, b)$ from the moments of $(q, m, w)$, (k, 3, *dims) and (k, 3, 3, ...).

    Where `l` and `second` are means over coordinates, so are l and s; covariances are about the
    mean of each coordinate. `tiny` is the relative error of a moment: where the variance of f is
    less than that of rounding, f is constant and s is 0.
    """
    slope, zero = np.gradient(l, lams, axis=0), np.zeros_like(l)
    of_f, of_f1 = np.stack([1 - l, -l, zero], 1), np.stack([l - 1 - slope, -slope, zero + 1], 1)
    products = first[:, :, None] * first[:, None]
    shared = tuple(range(second.ndim, products.ndim))
    cov = second - (products.mean(shared) if shared else products)
    covariance = np.einsum("ki...,kij...,kj...->k...", of_f, cov, of_f1)
    variance = np.einsum("ki...,kij...,kj...->k...", of_f, cov, of_f)
    rounding = 10 * tiny * np.einsum("ki...,kii...->k...", of_f**2, second)
    known = variance > rounding
    s = np.where(known, covariance / np.where(known, variance, 1.0), 0.0)
    ones = (1,) * len(shared)
    of_b = (of_f1 - s[:, None] * of_f).reshape(*of_f.shape, *ones)
    return l, s, (of_b * first).sum(1)
