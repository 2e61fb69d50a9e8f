r"""Many of one thing: vectorised, in chunks, over devices, each a function of its key and row.

Call $i$ is `fn(*each_i, key=fold_in(key, start + i))`: neither how many there are, nor the size of
a chunk, nor the devices enter. One program of one width runs all chunks, so that another number of
calls compiles nothing. Between widths a backend may pick another kernel and round differently.

Over a mesh each device has a block of rows, and the program exchanges nothing: a failed or slow
call concerns its own device only.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key, PRNGKeyArray, PyTree

from jaxdiff import _check
from jaxdiff import _mesh as meshes
from jaxdiff._array import Cond
from jaxdiff._host import is_concrete
from jaxdiff._keys import stream
from jaxdiff._prepared import call
from jaxdiff._sampler import Sampler, Samples, run_one
from jaxdiff.solvers.reversible import Inverted


def _rows(one: Callable[..., Any], fn: Any, key: Any, index: Array, each: PyTree) -> Any:
    """Make the calls with the given indices at once; two axes of indices, one after the other."""
    if index.ndim == 2:
        return jax.lax.map(lambda rest: _rows(one, fn, key, *rest), (index, each))

    def at(index: Array, each: PyTree) -> Any:
        return one(fn, None if key is None else stream(key, index), each)

    return jax.vmap(at)(index, each)


@functools.cache
def _here(one: Callable[..., Any]) -> Any:
    return functools.partial(_rows, one)


@functools.cache
def _over(one: Callable[..., Any], mesh: Mesh, axis: str) -> Any:
    """Return `_rows` in which every device along an axis takes its own part of the rows."""

    def spread(fn: Any, key: Any, index: Array, each: PyTree) -> Any:
        own = P(axis) if index.ndim == 1 else P(None, axis)
        leaves, tree = jax.tree.flatten(fn)
        arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]

        def device(arrays: Any, key: Any, index: Array, each: PyTree) -> Any:
            given = iter(arrays)
            own = [next(given) if isinstance(leaf, jax.Array) else leaf for leaf in leaves]
            return _rows(one, jax.tree.unflatten(tree, own), key, index, each)

        return jax.shard_map(
            device,
            mesh=mesh,
            in_specs=(P(), P(), own, own),
            out_specs=own,
            axis_names={axis},
            check_vma=False,
        )(arrays, key, index, each)

    return spread


def run(
    where: str,
    one: Callable[[Any, Any, Any], Any],
    fn: Any,
    each: PyTree,
    *,
    key: PRNGKeyArray | None,
    num: int,
    start: Any = 0,
    chunk: int | None = None,
    on: Mesh | NamedSharding | None = None,
    progress: bool = False,
) -> Any:
    """Return `one(fn, fold_in(key, start + i), each_i)` for `num` rows; the one runner.

    `one` is a function of a module: programs are kept for it.
    """
    _check.whole(where, "num", num, 1)
    start = _check.start(start)
    mesh, axis = (None, "") if on is None else meshes.devices_of(where, on)
    n = num if mesh is None else meshes.block(where, num, mesh.shape[axis])
    width = n if chunk is None else chunk
    _check.whole(where, "chunk", width, 1)
    width = min(width, n) if mesh is not None else width
    count, devices = -(-n // width), num // n
    # rows of every chunk, (count, devices * width); a chunk that is not full repeats its last row
    within = np.minimum(np.arange(count * width).reshape(count, 1, width), n - 1)
    rows = (within + n * np.arange(devices)[:, None]).reshape(count, -1)
    index = (start + rows.astype(np.uint32)).astype(np.uint32)
    method = _here(one) if mesh is None else _over(one, mesh, axis)
    if not is_concrete(fn, each, key, start):
        return _traced(method, fn, key, index, each, rows, (devices, num))
    bar: Any = range(count)
    if progress:
        from tqdm.auto import tqdm

        bar = tqdm(bar, desc=where, unit="chunk")
    full = count * width == n
    if mesh is not None:
        fn, key = meshes.place(mesh, (fn, key), P())
        each = meshes.place(mesh, each, P(axis))
    pieces = []
    with meshes.nothing_but(mesh):
        for k in bar:
            part, own = index[k], each
            if mesh is not None:
                part = meshes.place(mesh, part, P(axis))
                own = own if count == 1 else meshes.pick(mesh, axis, own, within[k, 0])
            elif not (full and count == 1):
                own = jax.tree.map(lambda a, k=k: _take(a, rows[k]), each)
            pieces.append(call(method, fn, key, part, own))
            if progress:
                jax.block_until_ready(pieces[-1])
        if len(pieces) == 1 and full:
            return pieces[0]
        if mesh is not None:
            return meshes.join(mesh, axis, n, pieces)
    return _joined(num, pieces)


def _take(a: Any, rows: np.ndarray) -> Any:
    return a[rows] if isinstance(a, np.ndarray) else jnp.asarray(a)[rows]


@functools.partial(jax.jit, static_argnums=0)
def _joined(num: int, pieces: list[Any]) -> Any:
    return jax.tree.map(lambda *a: jnp.concatenate(a)[:num], *pieces)


def _traced(
    method: Any, fn: Any, key: Any, index: Any, each: Any, rows: Any, sizes: tuple[int, int]
) -> Any:
    """Run all chunks in the program that is being traced."""
    devices, num = sizes
    if len(rows) == 1:
        index, rows = index[0], rows[0]
    each = jax.tree.map(lambda a: jnp.asarray(a)[rows], each)
    out = method(fn, key, jnp.asarray(index), each)

    def flat(a: Array) -> Array:
        count = len(rows) if rows.ndim == 2 else 1
        blocks = jnp.moveaxis(a.reshape(count, devices, -1, *a.shape[rows.ndim :]), 0, 1)
        blocks = blocks.reshape(devices, -1, *a.shape[rows.ndim :])
        return blocks[:, : num // devices].reshape(num, *a.shape[rows.ndim :])

    return jax.tree.map(flat, out)


def _without_key(fn: Any, key: Any, each: Any) -> Any:
    return fn(*each)


def _with_key(fn: Any, key: Any, each: Any) -> Any:
    return fn(*each, key=key)


def many(
    fn: Callable[..., Any],
    *each: PyTree,
    key: PRNGKeyArray | None = None,
    start: Any = 0,
    chunk: int | None = None,
    on: Mesh | NamedSharding | None = None,
    progress: bool = False,
) -> Any:
    """Call a function of one sample for every row of a data set.

    Call i is `fn(*each_i)`, or `fn(*each_i, key=fold_in(key, start + i))` where a key is given. For
    likelihoods, `jd.many(likelihood, x, cond, key=key)`; for inversions,
    `jd.many(sampler.invert, x, cond)`; for Markov chains, any pure function of their start.

    Programs are kept for `fn`: a pytree (a prepared function, its method, an `equinox.Partial`) is
    compiled once for all values of its arrays, a plain function once for each object.

    Args:
        fn: pure, from one row (and a key) to a pytree of arrays.
        *each: pytrees whose leaves have one leading axis, of the same length; None for nothing.
        key: a threefry key.
        start: index of the first row, 0 or more; may be traced. It enters the keys only.
        chunk: rows per vectorised program (and device), to bound memory; all of them by default.
        on: a mesh with an axis `"batch"`, or with one axis; or `NamedSharding(mesh, P("rows"))`.
            May span processes, each of which then makes this same call.
        progress: show a bar over the chunks (needs tqdm, and no tracing around this call).

    Returns:
        What `fn` returns, with a leading axis, sharded over the axis of the mesh where there is
        one; `jd.gather` brings it home.

    Raises:
        ValueError: if leaves differ in their leading axis, there is none, `chunk` is not positive,
            the rows do not divide among the devices, or the mesh will not do.

    Example:
        >>> square = lambda x: x**2
        >>> many(square, jnp.arange(3.0)).tolist()
        [0.0, 1.0, 4.0]
    """
    if not callable(fn):
        raise _check.bad("many", "fn", "a function of one row", repr(fn))
    leaves = jax.tree.leaves(each)
    if not leaves or not jnp.shape(leaves[0]):
        raise _check.bad("many", "each", "pytrees of arrays with a leading axis", each)
    num = jnp.shape(leaves[0])[0]
    _check.rows("many", "each", each, num)
    key = None if key is None else _check.key("many", "key", key)
    one = _without_key if key is None else _with_key
    rest = dict(key=key, num=num, start=start, chunk=chunk, on=on, progress=progress)
    return run("many", one, fn, each, **rest)  # type: ignore[arg-type]


def _sampled(sampler: Sampler, key: Any, each: Any) -> Samples:
    return run_one(sampler, key, *each)


def sample(
    key: PRNGKeyArray | None,
    sampler: Sampler,
    *,
    num: int,
    cond: Cond = None,
    init: Float[Any, "num *dims"] | Inverted | None = None,
    start: Any = 0,
    chunk: int | None = None,
    on: Mesh | NamedSharding | None = None,
    progress: bool = False,
) -> Samples:
    """Draw the samples `start, ..., start + num - 1` of the sequence that `key` names.

    Sample i is `sampler(fold_in(key, i), cond_i, init_i)`, whatever `num`, `chunk` and the devices
    are: its noise is bitwise the same, and only the arithmetic may round differently where a
    backend picks another kernel for another width.

    Args:
        key: a threefry key; None if nothing random is left to draw.
        sampler: a prepared solve, of `jaxdiff.sampler`.
        num: how many samples; on a mesh, a multiple of its devices.
        cond: conditions, every leaf with leading axis `num`.
        init: what to start from, (num, *dims), instead of draws; or what
            `jd.many(sampler.invert, x)` returned.
        start: index of the first sample, 0 or more; may be traced.
        chunk: samples per vectorised program and device, to bound memory; all by default.
        on: a mesh, as for `many`. Parameters of the network may be sharded over its other axes:
            they stay where they are, and the compiler makes the network run there.
        progress: show a bar over the chunks (needs tqdm, and no tracing around this call).

    Returns:
        `Samples` with `x: (num, *dims)`.

    Raises:
        ValueError: as a sampler and `many`, and if a leaf of `cond` has another leading axis.

    Example:
        >>> import jaxdiff as jd
        >>> vp = jd.process.VP()
        >>> unit = jd.exact.gaussian(vp, jnp.zeros(2), 1.0)
        >>> ddim = jd.sampler(unit, (2,), solver=jd.solvers.DDIM(), ts=vp.grid(5))
        >>> sample(jax.random.key(0), ddim, num=3).x.shape
        (3, 2)
    """
    where = "sample"
    key, each = admit(where, key, sampler, num, cond, init)
    rest = dict(key=key, num=num, start=start, chunk=chunk, on=on, progress=progress)
    return run(where, _sampled, sampler, each, **rest)  # type: ignore[arg-type]


def admit(where: str, key: Any, sampler: Any, num: Any, cond: Cond, init: Any) -> Any:
    """Check what many samples are drawn from; return the key, and what each has of its own."""
    if not isinstance(sampler, Sampler):
        expected = "a prepared solve, jd.sampler(model, shape, solver=..., ts=...)"
        raise _check.bad(where, "sampler", expected, repr(sampler))
    _check.whole(where, "num", num, 1)
    init = sampler.solve.admit(where, init, (num,))
    key = _check.needed_key(where, key, init is None or sampler.solve.draws)
    _check.rows(where, "cond", cond, num)
    return key, (cond, init)


def keys(key: PRNGKeyArray, start: Any = 0, num: int = 1) -> Key[Array, " num"]:
    """Return the keys of the samples `start, ..., start + num - 1` of the sequence of a key.

    `jax.vmap(sampler)(keys(key, 0, num))` draws what `sample(key, sampler, num=num)` does, and so
    does `jax.pmap(jax.vmap(sampler))` of the same keys with an axis of devices before them.

    Args:
        key: a threefry key.
        start: index of the first, 0 or more; may be traced.
        num: how many.

    Returns:
        Keys, (num,).

    Example:
        >>> keys(jax.random.key(0), 0, 8).reshape(2, 4).shape
        (2, 4)
    """
    key, start = _check.key("keys", "key", key), _check.start(start)
    _check.whole("keys", "num", num, 1)
    index = start + np.arange(num, dtype=np.uint32)
    return jax.vmap(lambda i: stream(key, i))(jnp.asarray(index, jnp.uint32))
