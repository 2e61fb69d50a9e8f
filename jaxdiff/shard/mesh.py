"""Many samples over a mesh: each device runs its own block of indices, and nothing is exchanged.

Notation: a mesh has an axis of samples, `axis`, of size D; device k of it has the indices
`start + k num/D, ..., start + (k + 1) num/D - 1`. All other axes of the mesh are left to the
compiler, so that a network whose parameters are sharded over them runs sharded.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, PRNGKeyArray, PyTree

from jaxdiff import _check
from jaxdiff.batching import chunks, run_chunks


def axis_size(where: str, mesh: Any, axis: Any) -> int:
    """Return the number of devices along an axis, or raise if they cannot share samples."""
    if not isinstance(mesh, Mesh):
        expected = "a jax.sharding.Mesh, as jax.make_mesh((jax.device_count(),), ('batch',))"
        raise _check.bad(where, "mesh", expected, repr(mesh))
    if axis not in mesh.axis_names:
        raise _check.bad(where, "axis", f"one of {mesh.axis_names}, the axes of the mesh", axis)
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        expected = "one whose axes are jax.sharding.AxisType.Auto: make_mesh(..., axis_types=...)"
        raise _check.bad(where, "mesh", expected, f"axis types {mesh.axis_types}")
    return mesh.shape[axis]


def block(where: str, num: int, size: int) -> int:
    """Return the number of samples of each device, or raise if they do not divide."""
    _check.whole(where, "num", num, 1)
    if num % size:
        more = -(-num // size) * size
        expected = f"a multiple of the {size} devices that share the samples, as {more}"
        raise _check.bad(where, "num", f"{expected} (keep the first {num})", num)
    return num // size


def place(mesh: Mesh, tree: PyTree, spec: P) -> PyTree:
    """Put arrays on the devices of a mesh, unless they are there already.

    With many processes, arrays of one process are taken to be the same in all.
    """
    sharding = NamedSharding(mesh, spec)

    def one(leaf: Any) -> Any:
        if not eqx.is_array(leaf) and not isinstance(leaf, np.ndarray | np.generic):
            return leaf
        if isinstance(leaf, Tracer):
            return leaf
        if isinstance(leaf, jax.Array) and getattr(leaf.sharding, "mesh", None) == mesh:
            return leaf
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = one(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    return jax.tree.map(one, tree)


@eqx.filter_jit
def _run(
    mesh: Mesh, axis: str, n: int, rows: Array, one: Any, key: Any, each: Any, start: Any
) -> Any:
    """Run the rows of its block on every device; `n` is the size of the block."""
    shared, static = eqx.partition((one, key, start), eqx.is_array)

    def device(index: Array, rows: Array, shared: Any, each: tuple[Any, ...]) -> Any:
        one, key, start = eqx.combine(shared, static)
        return run_chunks(rows, one, key, each, start + index[0])

    own = P(axis)
    index = jnp.arange(mesh.shape[axis], dtype=jnp.uint32) * np.uint32(n)
    return jax.shard_map(
        device,
        mesh=mesh,
        in_specs=(own, P(), P(), own),
        out_specs=own,
        axis_names={axis},
        check_vma=False,
    )(index, rows, shared, each)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _join(mesh: Mesh, axis: str, n: int, pieces: list[Any]) -> Any:
    """Put the pieces of every device's block together, on the device."""

    def device(pieces: list[Any]) -> Any:
        return jax.tree.map(lambda *a: jnp.concatenate(a)[:n], *pieces)

    return jax.shard_map(
        device, mesh=mesh, in_specs=P(axis), out_specs=P(axis), axis_names={axis}, check_vma=False
    )(pieces)


def many(
    where: str,
    mesh: Mesh,
    axis: str,
    one: Callable[..., Any],
    key: PRNGKeyArray | None,
    *each: Any,
    num: int,
    start: Any = 0,
    chunk: int | None = None,
    progress: bool = False,
) -> Any:
    """Run `one(fold_in(key, i), *each_i)` for `num` indices on the devices of a mesh.

    As `batching.many`, of which every device runs one; `chunk` is per device.
    """
    n = block(where, num, axis_size(where, mesh, axis))
    rows: Any = chunks(where, n, chunk)
    exact = rows.size == n
    one, key, start = place(mesh, (one, key, _check.start(start)), P())
    each = place(mesh, each, P(axis))
    if progress:
        from tqdm.auto import tqdm

        rows = tqdm(rows[:, None], desc=where, unit="chunk")
    else:
        rows = [rows]
    pieces = []
    with _nothing_but(mesh):
        for part in rows:
            pieces.append(_run(mesh, axis, n, place(mesh, part, P()), one, key, each, start))
            if progress:
                jax.block_until_ready(pieces[-1])
        return pieces[0] if len(pieces) == 1 and exact else _join(mesh, axis, n, pieces)


def _nothing_but(mesh: Mesh) -> Any:
    """Return a context without another mesh that the caller may be in."""
    ambient = jax.sharding.get_abstract_mesh()
    foreign = not ambient.empty and ambient != mesh.abstract_mesh
    return jax.set_mesh(mesh) if foreign else contextlib.nullcontext()


def gather(tree: PyTree) -> PyTree:
    """Bring a sharded result to the host, as NumPy arrays; with many processes, to all of them.

    Cost: one all-gather of every array where there are many processes, else a copy.

    Args:
        tree: a result of `shard.sample` or any other pytree of arrays.

    Returns:
        The same pytree with NumPy leaves.
    """

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array):
            return leaf
        if leaf.is_fully_addressable:
            return np.asarray(leaf)
        if leaf.is_fully_replicated:
            return np.asarray(leaf.addressable_data(0))
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(one, tree)
