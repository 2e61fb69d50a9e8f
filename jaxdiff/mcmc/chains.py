"""A Markov chain: what moves it, and how it runs.

A kernel is a pair of pure functions `init(x) -> state` and `step(key, state) -> (state, info)`, the
form of blackjax's sampling algorithms, so that its tools run these as well. It moves one sample of
any shape, in float32 or wider; many chains are `jax.vmap` of `run`.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from jaxdiff import _check
from jaxdiff._array import Scalar, time_dtype
from jaxdiff._keys import stream
from jaxdiff.score import floating

__all__ = ["Chain", "Info", "Kernel", "like", "positive", "run", "start"]


class Kernel(NamedTuple):
    """A Markov kernel.

    Attributes:
        init: `init(x, key=None) -> state`, from a sample (*dims,); where the state has a velocity,
            a key draws it, and without one it is 0.
        step: `step(key, state) -> (state, info)`. Every state has the sample in `x`.
    """

    init: Callable[..., Any]
    step: Callable[..., Any]


class Info(NamedTuple):
    """What a step tells of itself.

    Attributes:
        acceptance: probability with which its proposal is accepted, (); 1 where none is made.
        jump: squared distance from the state before, (): the mean over a chain, to be made large.
    """

    acceptance: Scalar
    jump: Scalar


def positive(where: str, **values: Any) -> None:
    """Raise ValueError unless every value is a positive, finite number; traced ones pass."""
    for name, value in values.items():
        _check.number(where, name, value, sys.float_info.min, sys.float_info.max)


def start(x: Any) -> Array:
    """Return the first sample of a chain, in float32 or wider."""
    x = floating(x)
    return x.astype(time_dtype(x.dtype))


def like(x: Array, *values: Any) -> tuple[Array, ...]:
    """Return numbers in the dtype of `x`, which they must not widen."""
    return tuple(jnp.asarray(value, x.dtype) for value in values)


class Chain(NamedTuple):
    """What `run` returns.

    Attributes:
        x: the last sample, (*dims,), or those after every step, (steps, *dims).
        state: the last state of the kernel.
        info: `Info` of every step, leaves (steps,).
    """

    x: Float[Array, "..."]
    state: Any
    info: Any


def run(
    key: PRNGKeyArray,
    kernel: Kernel,
    x: Float[ArrayLike, "*dims"],
    steps: int,
    *,
    trajectory: bool = False,
) -> Chain:
    """Run one chain.

    The key of step k is `fold_in(key, k)`. Many chains are
    `jax.vmap(lambda key, x: run(key, kernel, x, steps))(keys, xs)`, compiled by `jax.jit` around.

    Args:
        key: a threefry key.
        kernel: a kernel.
        x: where to start, (*dims,). A velocity starts at 0.
        steps: number of steps.
        trajectory: keep the samples after every step, and not only the last.

    Returns:
        `Chain`.

    Raises:
        ValueError: if `key` is not one threefry key, `kernel` has no `init` and `step`, or `steps`
            is not a positive whole number.
    """
    key = _check.key("run", "key", key)
    if not (hasattr(kernel, "init") and hasattr(kernel, "step")):
        raise _check.bad("run", "kernel", "a pair (init, step), as of ula(...)", repr(kernel))
    _check.whole("run", "steps", steps, 1)

    def body(state: Any, k: Array) -> tuple[Any, Any]:
        state, info = kernel.step(stream(key, k), state)
        return state, (state.x if trajectory else None, info)

    state, (xs, info) = jax.lax.scan(body, kernel.init(x), jnp.arange(steps))
    return Chain(xs if trajectory else state.x, state, info)
