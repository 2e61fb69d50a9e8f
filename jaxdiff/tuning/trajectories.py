r"""GITS: the coarse grid that follows the trajectories of a model best, by dynamic programming.

Notation: $\bar\sigma = \sigma/\alpha$, $\bar x = x/\alpha$, and a fine grid
$\tau_0 > \dots > \tau_{K-1}$ with the states $x_i$ of a good solver on it. A long Euler step of the
PF-ODE from node i to node j, on any path, is

$$ \bar x_{i \to j} = \bar x_i + (\bar\sigma_j - \bar\sigma_i)\,\hat\epsilon_i
                    = m_i + \bar\sigma_j\,\hat\epsilon_i . $$

Trajectories of one model have nearly one shape, so the mean cost $C_{ij}$ of such steps over a few
hundred of them says what every coarse grid costs; the cheapest one of n steps is a shortest path,

$$ V_{i,1} = C_{i,K-1}, \qquad V_{i,k} = \min_{j > i}\; C_{ij} + \gamma\,V_{j,k-1}. $$

Step k weighs $\gamma^k$: above 1 late errors count more and nodes move to the data end, below 1
they pile up at the noise end.

References:
    Chen, Zhou, Wang, Shen, Lyu 2024 (2405.11326).
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Real

from jaxdiff import _check, grids
from jaxdiff._array import Cond, ScalarLike
from jaxdiff._many import sample
from jaxdiff._sampler import check, sampler
from jaxdiff.score import AbstractDenoiser
from jaxdiff.solvers import DPMpp2M

__all__ = ["Metric", "gits", "jump_costs", "shortest_path"]

Metric: TypeAlias = Literal["l1", "l2", "dev"]


def _norm(a: Array) -> Array:
    return jnp.sqrt(jnp.sum(a**2, axis=-1))


def _costs(
    denoiser: AbstractDenoiser, ts: Array, metric: Metric, xs: Array, cond: Cond
) -> Float[Array, "steps nodes"]:
    """Return the costs of one trajectory, (K - 1, K); those with j <= i mean nothing."""
    process = denoiser.process
    m, eps = jax.vmap(lambda t, x: denoiser.pair(t, x, cond))(ts[:-1], xs[:-1])
    m, eps, xs = (a.reshape(a.shape[0], -1).astype(ts.dtype) for a in (m, eps, xs))
    alpha = jax.vmap(process.alpha)(ts)
    sbar = jnp.exp(-jax.vmap(process.lam)(ts))
    flat = xs[1:] / alpha[1:, None]  # the first may be infinite, and no step ends there
    # The chord from the first state to the last, in a scale in which it stays finite.
    chord = xs[0] - alpha[0] * flat[-1]
    chord = chord / _norm(chord)

    def deviation(a: Array) -> Array:
        a = a - flat[-1][None]
        return _norm(a - (a @ chord)[:, None] * chord[None])

    def row(at: tuple[Array, Array]) -> Array:
        ahead = at[0][None] + sbar[1:, None] * at[1][None]
        if metric == "dev":
            return deviation(ahead) - deviation(flat)
        error = ahead - flat
        return jnp.sum(jnp.abs(error), axis=-1) if metric == "l1" else _norm(error)

    costs = jax.lax.map(row, (m, eps))
    return jnp.concatenate([jnp.zeros_like(costs[:, :1]), costs], axis=1)


@eqx.filter_jit
def _mean_costs(
    denoiser: AbstractDenoiser, ts: Array, metric: Metric, rows: Any, chunk: int
) -> Array:
    each = jax.lax.map(lambda row: _costs(denoiser, ts, metric, *row), rows, batch_size=chunk)
    return jnp.mean(each, axis=0)


def jump_costs(
    key: PRNGKeyArray,
    denoiser: AbstractDenoiser,
    shape: tuple[int, ...],
    *,
    ts: Real[Any, " nodes"] | Sequence[Any],
    num: int = 256,
    solver: dfx.AbstractSolver | None = None,
    metric: Metric = "l2",
    cond: Cond = None,
    chunk: int | None = None,
    progress: bool = False,
) -> Float[np.ndarray, "nodes nodes"]:
    r"""Return the mean cost $C_{ij}$ of an Euler step between any two nodes of a fine grid.

    | metric | cost of a step to $\bar x_{i \to j}$ |
    |---|---|
    | `"l1"` | $\|\bar x_{i \to j} - \bar x_j\|_1$ |
    | `"l2"` | $\|\bar x_{i \to j} - \bar x_j\|_2$ |
    | `"dev"` | how much farther than $\bar x_j$ it is from the chord of the trajectory |

    Cost: per trajectory of K nodes, K - 1 evaluations, and K - 1 times what a step of `solver`
    takes: 2(K - 1) in all for `DPMpp2M`. Long steps cost arithmetic only.

    Args:
        key: the starting noise of the trajectories.
        denoiser: the model.
        shape: shape of one sample, `(*dims,)`.
        ts: the fine grid, (K,); published: `process.grid(60, "edm")`.
        num: how many trajectories.
        solver: the teacher; `DPMpp2M` by default.
        metric: see the table; `"dev"`, the published default, may be negative.
        cond: conditions, every leaf with leading axis `num`.
        chunk: trajectories per vectorised program; all by default.
        progress: show a bar over the chunks of the teacher (needs tqdm).

    Returns:
        $C$, (K, K), float64, infinite where j <= i.

    Raises:
        ValueError: as `jaxdiff.sampler`, or if `metric` is unknown, or `"dev"` in one dimension,
            where a trajectory cannot leave its chord.
        RuntimeError: if the teacher fails.
    """
    _check.choice("jump_costs", "metric", metric, ("l1", "l2", "dev"))
    shape = _check.dims("jump_costs", "shape", shape)
    if metric == "dev" and math.prod(shape) == 1:
        raise _check.bad("jump_costs", "metric", "'l1' or 'l2' in one dimension", repr(metric))
    solver = DPMpp2M() if solver is None else solver
    solve = sampler(denoiser, shape, solver=solver, ts=ts, trajectory=True)
    teacher = check(sample(key, solve, num=num, cond=cond, chunk=chunk, progress=progress))
    xs = teacher.aux["trajectory"]
    nodes = teacher.aux["ts"][0]
    rows = (xs, jax.tree.map(jnp.asarray, cond))
    costs = _mean_costs(denoiser, nodes, metric, rows, num if chunk is None else chunk)
    out = np.full((len(nodes), len(nodes)), np.inf)
    above = np.triu_indices(len(nodes), 1)
    out[above] = np.asarray(costs, np.float64)[above]
    return out


def shortest_path(
    costs: Float[np.ndarray, "nodes nodes"], n: int, *, gamma: ScalarLike = 1.15
) -> np.ndarray:
    r"""Return the `n + 1` nodes of the cheapest path of `n` steps from the first to the last.

    $$ V_{i,1} = C_{i,K-1}, \qquad V_{i,k} = \min_{j > i}\; C_{ij} + \gamma\,V_{j,k-1} $$

    Args:
        costs: $C$, (K, K); entries with j <= i are not read.
        n: number of steps, from 1 to K - 1.
        gamma: discount, positive.

    Returns:
        Increasing indices, from 0 to K - 1.

    Raises:
        ValueError: if an argument is wrong.
    """
    size = np.shape(costs)[0]
    if np.shape(costs) != (size, size) or size < 2:
        raise _check.bad("shortest_path", "costs", "of shape (K, K), K >= 2", np.shape(costs))
    _check.whole("shortest_path", "n", n, 1)
    if n > size - 1:
        raise _check.bad("shortest_path", "n", f"at most {size - 1}, the steps of the fine grid", n)
    _check.number("shortest_path", "gamma", gamma, float(np.finfo(np.float64).tiny), 1e300)
    above = np.where(np.triu(np.ones((size, size), bool), 1), costs, np.inf)
    if np.any(np.isnan(above)):
        raise _check.bad("shortest_path", "costs", "numbers", "NaN")
    value, choices = above[:, -1], []
    for _ in range(n - 1):
        through = above + float(gamma) * value[None]
        choices.append(np.argmin(through, axis=1))
        value = np.min(through, axis=1)
    path = [0]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return np.array([*path, size - 1])


def gits(
    key: PRNGKeyArray,
    denoiser: AbstractDenoiser,
    shape: tuple[int, ...],
    *,
    ts: Real[Any, " nodes"] | Sequence[Any],
    n: int,
    gamma: ScalarLike = 1.15,
    num: int = 256,
    solver: dfx.AbstractSolver | None = None,
    metric: Metric = "l2",
    cond: Cond = None,
    chunk: int | None = None,
    progress: bool = False,
) -> Float[np.ndarray, " more"]:
    r"""Choose the `n + 1` nodes of a fine grid that follow the trajectories of a model best.

    `shortest_path` through `jump_costs`, which to call by themselves for several `n`. `gamma` is
    1.15 for models of pixels and 1.2 for text to image, as published; it is worth a sweep from 0.8.
    The steps are Euler's, and so the grid is for DDIM: a multistep solver may do better on
    `"logsnr"`, and does on sharply multimodal data.

    Cost: `num` times that of `jump_costs`, all in the teacher.

    Args:
        key: the starting noise of the trajectories.
        denoiser: the model.
        shape: shape of one sample, `(*dims,)`.
        ts: the fine grid, (K,); its ends are those of the result.
        n: number of steps, from 1 to K - 1.
        gamma: discount, positive.
        num: how many trajectories.
        solver: the teacher; `DPMpp2M` by default.
        metric: `"l1"`, `"l2"` or `"dev"`, see `jump_costs`.
        cond: conditions, every leaf with leading axis `num`.
        chunk: trajectories per vectorised program; all by default.
        progress: show a bar over the chunks of the teacher (needs tqdm).

    Returns:
        The grid, (n + 1,), float64.

    Raises:
        ValueError: as `jump_costs` and `shortest_path`.

    Example:
        >>> import jaxdiff as jd
        >>> edm = jd.process.EDM()
        >>> two = jd.exact.mixture(edm, [0.5, 0.5], [[-1.0, 0.0], [1.0, 0.0]], 0.01)
        >>> ts = gits(jax.random.key(0), two, (2,), ts=edm.grid(30), n=4, num=16)
        >>> ts.shape, float(ts[0]), float(ts[-1])
        ((5,), 80.0, 0.002)
    """
    process = getattr(denoiser, "process", None)
    if not isinstance(denoiser, AbstractDenoiser) or process is None:
        raise _check.bad("gits", "denoiser", "a jaxdiff denoiser", type(denoiser).__name__)
    fine = grids.check(process, ts, where="gits")
    _check.whole("gits", "n", n, 1)
    if n > len(fine) - 1:
        raise _check.bad("gits", "n", f"at most {len(fine) - 1}, the steps of ts", n)
    _check.number("gits", "gamma", gamma, float(np.finfo(np.float64).tiny), 1e300)
    costs = jump_costs(
        key,
        denoiser,
        shape,
        ts=fine,
        num=num,
        solver=solver,
        metric=metric,
        cond=cond,
        chunk=chunk,
        progress=progress,
    )
    return np.asarray(fine)[shortest_path(costs, n, gamma=gamma)]
