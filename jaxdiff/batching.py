"""Many samples of one sequence: vectorised, in chunks, each a function of the key and its index."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from jaxdiff import _check
from jaxdiff._keys import stream


def _chunk(
    rows: Int[Array, " chunk"],
    one: Callable[..., Any],
    key: PRNGKeyArray | None,
    each: tuple[Any, ...],
    start: Any,
) -> Any:
    """Draw the samples of the given rows of this call."""

    def at(row: Array, each: tuple[Any, ...]) -> Any:
        own = None if key is None else stream(key, start + row.astype(jnp.uint32))
        return one(own, *each)

    return eqx.filter_vmap(at)(rows, jax.tree.map(lambda a: jnp.asarray(a)[rows], each))


def run_chunks(
    rows: Int[Array, "chunks chunk"],
    one: Callable[..., Any],
    key: PRNGKeyArray | None,
    each: tuple[Any, ...],
    start: Any,
) -> Any:
    """Run one chunk of rows after the other; the result has one row for each of them."""
    if rows.shape[0] == 1:
        return _chunk(rows[0], one, key, each, start)
    out = jax.lax.map(lambda r: _chunk(r, one, key, each, start), rows)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), out)


_run_chunks = eqx.filter_jit(run_chunks)


def chunks(where: str, num: int, chunk: int | None) -> np.ndarray:
    """Return the rows of every chunk, (chunks, width); the last one repeats the last row."""
    _check.whole(where, "num", num, 1)
    width = num if chunk is None else chunk
    _check.whole(where, "chunk", width, 1)
    count = -(-num // width)
    return np.minimum(np.arange(count * width), num - 1).reshape(count, width).astype(np.int32)


def many(
    where: str,
    one: Callable[..., Any],
    key: PRNGKeyArray | None,
    *each: Any,
    num: int,
    start: Any = 0,
    chunk: int | None = None,
    progress: bool = False,
) -> Any:
    """Run `one(fold_in(key, i), *each_i)` for `num` indices, in chunks of one vectorised program.

    Args:
        where: name of the calling function, for messages.
        one: draws one sample; a pytree (as `equinox.Partial`), so that its program is kept.
        key: a threefry key, or None if nothing is random.
        *each: pytrees whose leaves have leading axis `num`, one row per sample.
        num: how many.
        start: index of the first, 0 or more; may be traced.
        chunk: how many at once; all of them by default.
        progress: show a bar over the chunks.
    """
    rows: Any = chunks(where, num, chunk)
    args = (one, key, each, _check.start(start))
    if progress:
        from tqdm.auto import tqdm

        bar = tqdm(rows[:, None], desc=where, unit="chunk")
        pieces = [jax.block_until_ready(_run_chunks(r, *args)) for r in bar]
        out = jax.tree.map(lambda *a: jnp.concatenate(a), *pieces)
    else:
        out = _run_chunks(rows, *args)
    return jax.tree.map(lambda a: a[:num], out)
