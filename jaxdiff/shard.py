r"""The exact denoiser of a data set that lies on many devices.

Each device summarises its own atoms in one streamed pass, and the summaries are merged exactly:
see `jaxdiff.streaming`. So a data set need not fit the memory of one device, and `score`,
`posterior`, `fisher`, `trace` and covariance products cost one pass over a piece and four small
all-reduces.
"""

import functools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, ArrayLike, Float

from jaxdiff import _check, exact, streaming
from jaxdiff._array import Scalar, time_dtype
from jaxdiff._mesh import devices_of
from jaxdiff.process import AbstractProcess

__all__ = ["ShardedEmpirical", "empirical"]


class ShardedEmpirical(exact.Empirical):
    """An `exact.Empirical` whose chunks of atoms are sharded over an axis of a mesh.

    Build it with `shard.empirical`. Goes wherever an exact denoiser goes, in `jit`, `vmap`, `grad`,
    and in `jaxdiff.sample` on another axis of the same mesh.

    Attributes:
        mesh: the mesh that the atoms lie on.
        axis: the axis that they are sharded over.
    """

    mesh: Mesh = eqx.field(static=True)
    axis: str = eqx.field(static=True)

    def moments(self, alpha: Scalar, sigma: Scalar, x: Array, vs: Array) -> streaming.Moments:
        """Pass over the data, every device over its own, and merge."""
        # Inside another shard_map, the mesh is the one whose other axes are taken already.
        ambient: Any = jax.sharding.get_abstract_mesh()
        mesh = self.mesh if ambient.empty else ambient
        return _moments(mesh, self.axis, self.atoms, self.log_weights, alpha, sigma, x, vs)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _moments(mesh: Any, axis: str, *args: Any) -> streaming.Moments:
    def device(atoms: Array, logs: Array, alpha: Any, sigma: Any, x: Any, vs: Any) -> Any:
        part = streaming.pass_over(alpha, sigma, x, vs, atoms, logs)
        return streaming.all_reduce(part, axis)

    own, all_of = P(axis), P()
    return jax.shard_map(
        device,
        mesh=mesh,
        in_specs=(own, own, all_of, all_of, all_of, all_of),
        out_specs=all_of,
        axis_names={axis},
        check_vma=False,
    )(*args)


@jax.jit
def _centre(atoms: Array, log_weights: Array) -> tuple[Array, Array]:
    """Return the atoms less their mean where that is far off, and what was subtracted."""
    real = (log_weights > -jnp.inf)[..., None]
    wide = jnp.where(real, atoms.astype(time_dtype(atoms.dtype)), 0)
    n = jnp.sum(real)
    centre = jnp.sum(wide, (0, 1)) / n
    square, size = jnp.sum(centre**2), jnp.sum(wide**2) / n
    far = (2 * square > size) & (jnp.finfo(atoms.dtype).bits >= 32)  # as in exact.empirical
    centre = jnp.where(far, centre, 0)
    moved = jnp.where(real, atoms - centre[None, None].astype(atoms.dtype), 0)
    if atoms.dtype == jnp.bfloat16:
        moved = jax.lax.bitcast_convert_type(moved, jnp.uint16)
    return moved, centre


def empirical(
    process: AbstractProcess,
    data: Float[ArrayLike, "n *dims"] | Sequence[Any] | Any,
    weights: Float[ArrayLike, " n"] | Sequence[Any] | None = None,
    *,
    on: Mesh | NamedSharding,
    chunk: int = 1024,
) -> ShardedEmpirical:
    r"""Build the exact denoiser of a data set, sharded over an axis of a mesh.

    As `exact.empirical`, whose mathematics it shares. Every device is sent its own atoms only: with
    many processes each reads its part of `data`, which may be a `numpy.memmap`.

    Args:
        process: the Gaussian path.
        data: atoms $y_i$, (N, *dims): an array, or anything of NumPy's `shape`, `dtype`, slices.
        weights: $p_i$, (N,), not negative; equal by default.
        on: `NamedSharding(mesh, P("data"))` for the axis of the mesh that shares the atoms; or a
            mesh, as for `jaxdiff.sample`.
        chunk: atoms per step of the streamed pass.

    Raises:
        ValueError: as `exact.empirical`, and if `on` will not do.
    """
    where = "shard.empirical"
    mesh, axis = devices_of(where, on)
    size = mesh.shape[axis]
    _check.whole(where, "chunk", chunk, 1)
    if not isinstance(process, AbstractProcess):
        raise _check.bad(where, "process", "a jaxdiff process", type(process).__name__)
    table: Any = data if hasattr(data, "shape") and hasattr(data, "dtype") else np.asarray(data)
    if len(table.shape) < 1 or table.shape[0] == 0:
        raise _check.bad(where, "data", "of shape (N, *dims) with N >= 1", tuple(table.shape))
    floats = jnp.issubdtype(table.dtype, jnp.floating)
    dtype = jax.dtypes.canonicalize_dtype(table.dtype if floats else float)
    n, dims = table.shape[0], tuple(table.shape[1:])
    d = int(np.prod(dims))
    chunk = min(chunk, -(-n // size))
    chunks = -(-n // (chunk * size)) * size
    log_p = exact.log_weights(where, np.ones(n) if weights is None else weights, n)
    log_p = np.pad(np.asarray(log_p), (0, chunks * chunk - n), constant_values=-np.inf)

    def rows(index: Any) -> np.ndarray:
        first, last, _ = index[0].indices(chunks)
        part = np.asarray(table[first * chunk : min(last * chunk, n)], dtype).reshape(-1, d)
        if not np.all(np.isfinite(part)):
            raise _check.bad(where, "data", "finite", "NaN or infinity")
        return np.pad(part, ((0, (last - first) * chunk - len(part)), (0, 0))).reshape(-1, chunk, d)

    over = NamedSharding(mesh, P(axis))
    atoms = jax.make_array_from_callback((chunks, chunk, d), over, rows)
    known = log_p.reshape(chunks, chunk).astype(time_dtype(dtype))
    logs = jax.make_array_from_callback(known.shape, over, lambda index: known[index])
    atoms, centre = _centre(atoms, logs)
    return ShardedEmpirical(process, atoms, logs, centre, dims, mesh, axis)
