"""Many samples over a mesh: each device runs its own block of indices, and nothing is exchanged.

Notation: a mesh has an axis of samples, `axis`, of size D; device k of it has the indices
`start + k num/D, ..., start + (k + 1) num/D - 1`. All other axes of the mesh are left to the
compiler, so that a network whose parameters are sharded over them runs sharded.
"""

import contextlib
import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from jaxdiff import _check


def devices_of(where: str, on: Any) -> tuple[Mesh, str]:
    """Return a mesh and the axis of it that shares samples, or raise if they cannot be shared.

    The axis is that of a `NamedSharding(mesh, P("rows"))`; of a mesh it is `"batch"`, or the only
    one that there is.
    """
    if isinstance(on, NamedSharding):
        mesh, axis = on.mesh, on.spec[0] if len(on.spec) == 1 else None
        if not isinstance(mesh, Mesh) or not isinstance(axis, str):
            expected = "sharded over one axis of a mesh, as NamedSharding(mesh, P('rows'))"
            raise _check.bad(where, "on", expected, repr(on))
    elif isinstance(on, Mesh):
        mesh = on
        axis = "batch" if "batch" in mesh.axis_names else mesh.axis_names[0]
        if axis != "batch" and len(mesh.axis_names) > 1:
            expected = "a mesh with an axis 'batch', or NamedSharding(mesh, P(axis))"
            raise _check.bad(where, "on", expected, f"a mesh with axes {mesh.axis_names}")
    else:
        expected = "a jax.sharding.Mesh, as jax.make_mesh((jax.device_count(),), ('batch',))"
        raise _check.bad(where, "on", expected, repr(on))
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        expected = (
            "a mesh whose axes are jax.sharding.AxisType.Auto: make_mesh(..., axis_types=...)"
        )
        raise _check.bad(where, "on", expected, f"axis types {mesh.axis_types}")
    return mesh, axis


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


@functools.partial(jax.jit, static_argnums=(0, 1))
def pick(mesh: Mesh, axis: str, tree: PyTree, rows: Any) -> PyTree:
    """Return some rows of every device's block, the same ones of each."""

    def device(tree: PyTree, rows: Any) -> PyTree:
        return jax.tree.map(lambda a: a[rows], tree)

    return jax.shard_map(
        device,
        mesh=mesh,
        in_specs=(P(axis), P()),
        out_specs=P(axis),
        axis_names={axis},
        check_vma=False,
    )(tree, rows)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def join(mesh: Mesh, axis: str, n: int, pieces: list[Any]) -> Any:
    """Put the pieces of every device's block together, on the device."""

    def device(pieces: list[Any]) -> Any:
        return jax.tree.map(lambda *a: jnp.concatenate(a)[:n], *pieces)

    return jax.shard_map(
        device, mesh=mesh, in_specs=P(axis), out_specs=P(axis), axis_names={axis}, check_vma=False
    )(pieces)


def nothing_but(mesh: Mesh | None) -> Any:
    """Return a context without another mesh that the caller may be in."""
    if mesh is None:
        return contextlib.nullcontext()
    ambient = jax.sharding.get_abstract_mesh()
    foreign = not ambient.empty and ambient != mesh.abstract_mesh
    return jax.set_mesh(mesh) if foreign else contextlib.nullcontext()


def gather(tree: PyTree) -> PyTree:
    """Bring a sharded result to the host, as NumPy arrays; with many processes, to all of them.

    Cost: one all-gather of every array where there are many processes, else a copy.

    Args:
        tree: a result of `sample(..., on=mesh)` or any other pytree of arrays.

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
