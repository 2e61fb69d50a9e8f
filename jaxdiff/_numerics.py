"""Roots, lengths and eigenvectors that can be differentiated, batched and sharded anywhere."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def safe_sqrt(square: Array) -> Array:
    """Return the root, 0 below 0, whose derivative at 0 is 0 and not infinite."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def norm(a: Array) -> Array:
    """Return the length along the last axis, whose derivative at 0 is 0 and not NaN."""
    return safe_sqrt(jnp.sum(a**2, axis=-1))


@jax.custom_batching.custom_vmap
def _eigh(a: Array) -> tuple[Array, Array]:
    values, vectors = jnp.linalg.eigh(a)
    return values, vectors


@_eigh.def_vmap
def _(size: int, batched: Any, a: Array) -> Any:
    # On the CPU a batch is decomposed on the threads that run the program, and waits for them: two
    # at once, in one program or on two devices, can wait for ever (seen with jaxlib 0.10.2).
    one_by_one = lambda a: jax.lax.map(_eigh, a)  # noqa: E731
    together = lambda a: tuple(jnp.linalg.eigh(a))  # noqa: E731
    return jax.lax.platform_dependent(a, cpu=one_by_one, default=together), (True, True)


@jax.custom_jvp
def eigh(a: Float[Array, "k k"]) -> tuple[Float[Array, " k"], Float[Array, "k k"]]:
    """Return eigenvalues in ascending order and eigenvectors as columns, of a symmetric matrix.

    Derivatives of eigenvectors treat equal eigenvalues as uncoupled: right where the matrix does
    not depend on the variable, or keeps them equal; elsewhere they do not exist.
    """
    if len(a) == 1:
        return a[0], jnp.ones_like(a)
    return _eigh(a)


@eigh.defjvp
def _(primals: Any, tangents: Any) -> Any:
    values, vectors = eigh(*primals)
    dot = lambda a, b: jnp.matmul(a, b, precision="highest")  # noqa: E731
    change = dot(dot(vectors.T, tangents[0]), vectors)
    gaps = values[None] - values[:, None]
    tiny = jnp.finfo(values.dtype).eps * jnp.max(jnp.abs(values))
    apart = jnp.abs(gaps) > tiny
    turn = jnp.where(apart, change / jnp.where(apart, gaps, 1.0), 0.0)
    return (values, vectors), (jnp.diagonal(change), dot(vectors, turn))
