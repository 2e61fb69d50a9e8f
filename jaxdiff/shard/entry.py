"""`sample`, `log_prob` and `invert` over a mesh, and `sample` under `jax.pmap`.

Sample $i$ has the noise of sample $i$ of `jaxdiff.sample`, whatever the devices: its key is a
function of its index. Only the arithmetic may round differently, where a backend picks another
kernel for another batch size. The compiled program exchanges nothing between samples.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, Real

from jaxdiff import _check, exact
from jaxdiff._array import Cond, time_dtype
from jaxdiff.batching import chunks, run_chunks
from jaxdiff.fisher.heads import AbstractTrace
from jaxdiff.inversion import invert_as_planned, plan_invert, sample_and_pair
from jaxdiff.likelihood import LogProb, log_prob_of, plan_log_prob
from jaxdiff.sampling import Samples, plan_samples
from jaxdiff.score import AbstractDenoiser, floating
from jaxdiff.shard.mesh import block, many
from jaxdiff.solvers.plan import Engine, Options
from jaxdiff.solvers.reversible import AbstractReversible, Inverted
from jaxdiff.solvers.terms import ClockName


def sample(
    mesh: Mesh,
    key: PRNGKeyArray | None,
    denoiser: AbstractDenoiser,
    shape: tuple[int, ...],
    *,
    num: int,
    solver: dfx.AbstractSolver,
    ts: Real[ArrayLike, " nodes"] | Sequence[Any],
    axis: str = "batch",
    cond: Cond = None,
    init: Float[Any, "num *dims"] | Inverted | None = None,
    start: Any = 0,
    chunk: int | None = None,
    progress: bool = False,
    denoise: bool = False,
    trajectory: bool = False,
    engine: Engine | None = None,
    equation: Literal["ode", "sde"] | None = None,
    clock: ClockName | None = None,
    controller: dfx.AbstractStepSizeController | None = None,
    adjoint: dfx.AbstractAdjoint | None = None,
    max_steps: int = 4096,
    dtype: Any = None,
) -> Samples:
    r"""Draw `jaxdiff.sample(key, ...)` on the devices of a mesh.

    Each device along `axis` draws a block of indices; a failed or slow sample concerns its own
    device only. Parameters of the network may be sharded over the other axes of the mesh: they stay
    where they are, and the compiler makes the network run there.

    Args:
        mesh: `jax.make_mesh((jax.device_count(),), ("batch",), axis_types=(AxisType.Auto,))`, or
            one with more axes; may span processes, each of which then makes this same call.
        key: as for `jaxdiff.sample`, as is all that follows.
        denoiser: what to sample from; leaves that are not on the mesh are copied to all of it.
        shape: shape of one sample, `(*dims,)`.
        num: how many samples, a multiple of the size of `axis`.
        solver: as in `draw`.
        ts: as in `draw`.
        axis: name of the axis of the mesh that shares the samples.
        cond: conditions, every leaf with leading axis `num`.
        init: starting states, (num, *dims), or a vectorised `Inverted`.
        start: index of the first sample.
        chunk: samples per vectorised program of one device; all of its block by default.
        progress: show a bar over the chunks.
        denoise: as in `draw`.
        trajectory: as in `draw`.
        engine: as in `draw`.
        equation: as in `draw`.
        clock: as in `draw`.
        controller: as in `draw`.
        adjoint: as in `draw`.
        max_steps: as in `draw`.
        dtype: as in `draw`.

    Returns:
        `Samples` with `x: (num, *dims)`, sharded over `axis`; `shard.gather` brings it home.

    Raises:
        ValueError: as `jaxdiff.sample`, and if `num` does not divide, `axis` is not of the mesh,
            or an axis of the mesh is not `AxisType.Auto`.

    Example:
        >>> import jaxdiff as jd
        >>> kinds = (jax.sharding.AxisType.Auto,)
        >>> mesh = jax.make_mesh((jax.device_count(),), ("batch",), axis_types=kinds)
        >>> vp = jd.process.VP()
        >>> unit = jd.exact.gaussian(vp, jnp.zeros(2), 1.0)
        >>> out = sample(mesh, jax.random.key(0), unit, (2,), num=8 * jax.device_count(),
        ...              solver=jd.solvers.DDIM(), ts=vp.grid(5))
        >>> jd.shard.gather(out).x.shape == (8 * jax.device_count(), 2)
        True
    """
    options = Options(denoise, trajectory, engine, equation, clock, controller, adjoint, max_steps)
    one, key, each = plan_samples(
        "shard.sample", key, denoiser, shape, num, solver, ts, cond, init, dtype, options
    )
    rest = dict(num=num, start=start, chunk=chunk, progress=progress)
    return many("shard.sample", mesh, axis, one, key, *each, **rest)  # type: ignore[arg-type]


def _likelihood(
    denoiser: Any, plan: Any, trace: Any, terminal: Any, debias: int, key: Any, x: Any, cond: Cond
) -> LogProb:
    return log_prob_of(key, denoiser, x, plan, trace, cond, terminal, debias)


def log_prob(
    mesh: Mesh,
    denoiser: AbstractDenoiser,
    x: Float[ArrayLike, "num *dims"],
    *,
    ts: Real[ArrayLike, " nodes"] | Sequence[Any],
    axis: str = "batch",
    solver: dfx.AbstractSolver | None = None,
    cond: Cond = None,
    trace: AbstractTrace | None = None,
    key: PRNGKeyArray | None = None,
    start: Any = 0,
    chunk: int | None = None,
    progress: bool = False,
    debias: int = 0,
    controller: dfx.AbstractStepSizeController | None = None,
    terminal: exact.AbstractExact | None = None,
    adjoint: dfx.AbstractAdjoint | None = None,
    max_steps: int = 4096,
) -> LogProb:
    r"""Return the likelihoods of many samples, each `jaxdiff.log_prob`, over a mesh.

    Sample i has the key `fold_in(key, start + i)`. Arguments are those of `jaxdiff.log_prob`, with
    a leading axis of `x` and of every leaf of `cond`, and those of `shard.sample` that say how.

    Returns:
        `LogProb` with a leading axis, sharded over `axis`.

    Raises:
        ValueError: as `jaxdiff.log_prob` and `shard.sample`.
    """
    where = "shard.log_prob"
    x = floating(x)
    if x.ndim < 1:
        raise _check.bad(where, "x", "many samples, of shape (num, *dims)", x.shape)
    x, num = x.astype(time_dtype(x.dtype)), len(x)
    options = Options(False, False, None, "ode", "lam", controller, adjoint, max_steps)
    plan, trace, key = plan_log_prob(
        where, denoiser, x.dtype, ts, solver, trace, key, debias, terminal, options
    )
    _check.rows(where, "cond", cond, num)
    one = eqx.Partial(_likelihood, denoiser, plan, trace, terminal, debias)
    rest = dict(num=num, start=start, chunk=chunk, progress=progress)
    return many(where, mesh, axis, one, key, x, cond, **rest)  # type: ignore[arg-type]


def _backwards(
    denoiser: Any, plan: Any, step: int, key: Any, x: Any, pair: Any, cond: Cond
) -> Inverted:
    return invert_as_planned(denoiser, plan, step, x, pair, cond)


def invert(
    mesh: Mesh,
    denoiser: AbstractDenoiser,
    x: Float[ArrayLike, "num *dims"] | Samples,
    *,
    solver: AbstractReversible,
    ts: Real[ArrayLike, " nodes"] | Sequence[Any],
    axis: str = "batch",
    cond: Cond = None,
    freeze: float | int = 0.0,
    chunk: int | None = None,
    progress: bool = False,
) -> Inverted:
    r"""Invert many samples, each as `jaxdiff.invert`, over a mesh.

    The result is what `shard.sample` takes as `init`. Arguments are those of `jaxdiff.invert`, with
    a leading axis of `x` and of every leaf of `cond`, and those of `shard.sample` that say how.

    Returns:
        `Inverted` with a leading axis, sharded over `axis`.

    Raises:
        ValueError: as `jaxdiff.invert` and `shard.sample`.
    """
    where = "shard.invert"
    x, pair = sample_and_pair(where, x)
    if x.ndim < 1:
        raise _check.bad(where, "x", "many samples, of shape (num, *dims)", x.shape)
    like = lambda a: None if a is None else jax.ShapeDtypeStruct(a.shape[1:], a.dtype)  # noqa: E731
    plan, step = plan_invert(where, denoiser, like(x), like(pair), solver, ts, freeze)
    _check.rows(where, "cond", cond, len(x))
    one = eqx.Partial(_backwards, denoiser, plan, step)
    rest = dict(num=len(x), chunk=chunk, progress=progress)
    return many(where, mesh, axis, one, None, x, pair, cond, **rest)  # type: ignore[arg-type]


@functools.cache
def _pmapped(devices: tuple[Any, ...]) -> Any:
    def device(index: Array, rows: Any, one: Any, key: Any, each: Any, start: Any) -> Any:
        return run_chunks(rows, one, key, each, start + index)

    axes = (0, None, None, None, eqx.if_array(0), None)
    return eqx.filter_pmap(device, in_axes=axes, devices=list(devices))  # type: ignore[call-overload]


def pmap_sample(
    key: PRNGKeyArray | None,
    denoiser: AbstractDenoiser,
    shape: tuple[int, ...],
    *,
    num: int,
    solver: dfx.AbstractSolver,
    ts: Real[ArrayLike, " nodes"] | Sequence[Any],
    devices: Sequence[Any] | None = None,
    cond: Cond = None,
    init: Float[Any, "num *dims"] | Inverted | None = None,
    start: Any = 0,
    chunk: int | None = None,
    denoise: bool = False,
    trajectory: bool = False,
    engine: Engine | None = None,
    equation: Literal["ode", "sde"] | None = None,
    clock: ClockName | None = None,
    controller: dfx.AbstractStepSizeController | None = None,
    adjoint: dfx.AbstractAdjoint | None = None,
    max_steps: int = 4096,
    dtype: Any = None,
) -> Samples:
    """Draw the samples of `shard.sample` under `jax.pmap`, for programs that are written with it.

    Arguments are those of `shard.sample`, but for `devices`, the local ones by default. New code
    does better with a mesh.

    Returns:
        `Samples` whose leaves have the axes (devices, num // devices, ...), as of `jax.pmap`.

    Raises:
        ValueError: as `shard.sample`.
    """
    where = "shard.pmap_sample"
    chosen = tuple(jax.local_devices() if devices is None else devices)
    options = Options(denoise, trajectory, engine, equation, clock, controller, adjoint, max_steps)
    one, key, each = plan_samples(
        where, key, denoiser, shape, num, solver, ts, cond, init, dtype, options
    )
    n = block(where, num, len(chosen))
    rows = jnp.asarray(chunks(where, n, chunk))
    index = jnp.arange(len(chosen), dtype=jnp.uint32) * np.uint32(n)
    fold = lambda a: jnp.asarray(a).reshape(len(chosen), n, *jnp.shape(a)[1:])  # noqa: E731
    each = jax.tree.map(fold, each)
    out = _pmapped(chosen)(index, rows, one, key, each, _check.start(start))
    return out if rows.size == n else jax.tree.map(lambda a: a[:, :n], out)
