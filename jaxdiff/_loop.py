"""The one loop over the steps of a solve."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def over_steps(
    step: Callable[..., Any],
    state: Any,
    first: int,
    stop: int,
    see: Callable[[Any, Any], Any] | None = None,
    table: Any = None,
) -> tuple[Any, Any]:
    """Return the state after `step(n, state)` for n from `first` to `stop - 1`, and what is seen.

    `see(n, state)` looks at the state at every node after the first. With a `table`, whose leaves
    have a leading axis of all steps, it is `step(n, state, row)`. A derivative keeps the states,
    and the activations of one network evaluation at a time.
    """
    if first == stop:  # trace no step: there may be no coefficients to make it with
        seen = None if see is None else see(first, state)
        return state, jax.tree.map(lambda a: a[None][:0], seen)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(carry: Any, row: Any) -> tuple[Any, Any]:
        n, state = carry
        state = step(n, state) if table is None else step(n, state, row)
        return (n + 1, state), None if see is None else see(n + 1, state)

    # counted in the carry: a row of numbers would be memory that grows with the steps
    rows = jax.tree.map(lambda a: a[first:stop], table)
    (_, state), seen = jax.lax.scan(body, (jnp.asarray(first), state), rows, stop - first)
    return state, seen
