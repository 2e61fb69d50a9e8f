"""Argument checks: every error names the function, the argument, what was expected and got."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import PRNGKeyArray


def bad(where: str, argument: str, expected: str, got: Any) -> ValueError:
    """Build the ValueError that all modules raise for a wrong argument."""
    return ValueError(f"{where}: {argument} must be {expected}, got {got}")


def choice(where: str, argument: str, value: Any, options: Any) -> None:
    """Raise ValueError unless `value` is one of `options`."""
    if not any(value is o or (isinstance(value, str) and value == o) for o in options):
        raise bad(where, argument, "one of " + ", ".join(map(repr, options)), repr(value))


def whole(where: str, argument: str, value: Any, least: int) -> None:
    """Raise ValueError unless `value` is a Python whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise bad(where, argument, f"a whole number of at least {least}", repr(value))


def number(where: str, argument: str, value: Any, low: float | int, high: float | int) -> None:
    """Raise ValueError unless `value` is a real number in `[low, high]`; traced values pass."""
    if isinstance(value, Tracer):
        return
    try:
        good = np.ndim(value) == 0 and low <= float(value) <= high
    except (TypeError, ValueError):
        good = False
    if not good:
        limit = f"in [{low:g}, {high:g}]" if high < 1e300 else f"of at least {low:g}"
        finite = "finite " if high < np.inf else ""
        raise bad(where, argument, f"a {finite}number {limit}", repr(value))


def start(value: Any) -> Any:
    """Return the index of the first sample as uint32, or raise ValueError if it is no index."""
    if isinstance(value, Tracer | jax.Array | np.ndarray):
        if value.shape == () and jnp.issubdtype(value.dtype, jnp.integer):
            return jnp.asarray(value).astype(jnp.uint32)
        raise bad("sample", "start", "one whole number", f"{value.dtype}{list(value.shape)}")
    whole("sample", "start", value, 0)
    if value >= 2**32:
        raise bad("sample", "start", "less than 2**32", value)
    return np.uint32(value)


def dims(where: str, argument: str, shape: Any) -> tuple[int, ...]:
    """Return `shape` as a tuple, or raise ValueError if it is not a shape."""
    shape = tuple(shape) if isinstance(shape, (tuple, list)) else shape
    if not isinstance(shape, tuple) or not all(
        isinstance(n, (int, np.integer)) and n > 0 for n in shape
    ):
        raise bad(where, argument, "a tuple of positive whole numbers", repr(shape))
    return tuple(int(n) for n in shape)


def two_sets(where: str, x: Any, y: Any) -> tuple[jax.Array, jax.Array]:
    """Return two sets of samples as rows, or raise ValueError unless their samples match."""
    x, y = (jnp.asarray(a, jnp.promote_types(jnp.result_type(a), jnp.float32)) for a in (x, y))
    if x.ndim < 2:
        raise bad(where, "x", "samples of shape (n, *dims)", x.shape)
    if x.shape[1:] != y.shape[1:]:
        raise bad(where, "y", f"samples of the shape of x, {x.shape}", y.shape)
    return x.reshape(x.shape[0], -1), y.reshape(y.shape[0], -1)


@functools.cache
def _is_threefry(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jax.dtypes.prng_key) and "fry" in str(dtype)


def is_key(value: Any) -> bool:
    """Say whether a value is one typed threefry key."""
    return isinstance(value, jax.Array) and value.shape == () and _is_threefry(value.dtype)


def key(where: str, argument: str, value: Any) -> PRNGKeyArray:
    """Return a typed threefry key, or raise if `value` is not one.

    Only threefry gives the same draws under any batching (`rbg` differs under vmap).
    """
    if is_key(value):
        return value
    if isinstance(value, (jax.Array, np.ndarray)) and value.dtype == jnp.uint32:
        if value.shape == (2,):
            value = jax.random.wrap_key_data(jnp.asarray(value), impl="threefry2x32")
    if not isinstance(value, jax.Array) or not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        raise bad(where, argument, "a key from jax.random.key(seed)", type(value).__name__)
    if value.shape != ():
        raise bad(where, argument, "a single key of shape ()", f"keys of shape {value.shape}")
    impl = str(jax.random.key_impl(value))
    if "fry" not in impl:
        raise bad(where, argument, "a threefry key (its draws do not depend on batching)", impl)
    return value


def needed_key(where: str, value: Any, needed: bool) -> PRNGKeyArray | None:
    """Return a typed threefry key, or None if none is given and none is needed."""
    return None if value is None and not needed else key(where, "key", value)


def floating_dtype(where: str, dtype: Any) -> Any:
    """Return a floating dtype, the default float for None."""
    try:
        dtype = jnp.result_type(float if dtype is None else dtype)
    except TypeError:
        raise bad(where, "dtype", "a floating dtype", repr(dtype)) from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise bad(where, "dtype", "a floating dtype", dtype)
    return dtype


def rows(where: str, argument: str, tree: Any, num: int) -> None:
    """Raise ValueError unless every leaf has one row for each of `num` samples."""
    for leaf in jax.tree.leaves(tree):
        if jnp.shape(leaf)[:1] != (num,):
            got = f"a leaf of shape {jnp.shape(leaf)}"
            raise bad(where, argument, f"leaves with leading axis num={num}", got)
