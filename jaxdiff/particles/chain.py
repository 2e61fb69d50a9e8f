"""A Markov chain: what it samples from, what moves it, and how it runs.

A kernel is a pair of pure functions `init(x) -> state` and `step(key, state) -> (state, info)`, the
form of blackjax's sampling algorithms, so that its tools run these as well. It moves one sample of
any shape, in float32 or wider; many chains are `jax.vmap` of `run`.
"""

import abc
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from jaxdiff import _check
from jaxdiff._types import Cond, Scalar, ScalarLike, stream, time_dtype
from jaxdiff.exact import AbstractExact
from jaxdiff.score import AbstractDenoiser, check_score, floating


class AbstractTarget(eqx.Module):
    """What a chain samples from: a score. Build one with `target`."""

    @abc.abstractmethod
    def score(self, x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
        r"""Return $\nabla\log\pi(x)$, (*dims,)."""


class AbstractDensity(AbstractTarget):
    """A target whose log density is known too, up to a constant."""

    @abc.abstractmethod
    def log_density(self, x: Float[Array, "*dims"]) -> Scalar:
        r"""Return $\log\pi(x)$ up to a constant, ()."""


class _Density(AbstractDensity):
    law: Callable[..., Any]

    def log_density(self, x: Float[Array, "*dims"]) -> Scalar:
        value = jnp.asarray(self.law(x))
        if value.shape != ():
            expected = "a log density that returns one number, ()"
            raise _check.bad("target", "law", expected, f"shape {value.shape}")
        return value

    def score(self, x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
        return jax.grad(self.log_density)(x)


class Marginal(AbstractTarget):
    r"""The law $q_t$ of a denoiser at one time."""

    denoiser: AbstractDenoiser
    t: ScalarLike
    cond: Cond

    def score(self, x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
        """Return the score, (*dims,)."""
        return self.denoiser.score(self.t, x, self.cond)


class ExactMarginal(Marginal, AbstractDensity):
    r"""The same for a denoiser whose density is known."""

    denoiser: AbstractExact

    def log_density(self, x: Float[Array, "*dims"]) -> Scalar:
        """Return the log density in nats, ()."""
        return self.denoiser.log_density(self.t, x)


def target(
    law: AbstractDenoiser | Callable[..., Any], t: ScalarLike | None = None, cond: Cond = None
) -> AbstractTarget:
    r"""Return the target of a chain: a log density, or the law $q_t$ of a denoiser.

    $$ s(x) = \nabla\log\pi(x) \text{ by autodiff}, \qquad
       s(x) = \nabla\log q_t(x) \text{ by the denoiser} $$

    A pytree, whose parameters and time may be traced. Exact denoisers give a log density too, which
    `mala` needs.

    Args:
        law: a log density `x -> ()`, up to a constant, or a denoiser.
        t: time of the denoiser with sigma > 0, (); none for a log density.
        cond: condition passed to the denoiser.

    Raises:
        ValueError: if `law` is neither or knows no true score, `t` is missing or not one time, `t`
            or `cond` is given for a log density, or (when called) the log density is not one
            number.

    Example:
        >>> target(lambda x: -jnp.sum(x**2)).score(jnp.ones(2)).tolist()
        [-2.0, -2.0]
    """
    if isinstance(law, AbstractDenoiser):
        if t is None or np.ndim(t) != 0:
            got = None if t is None else f"shape {np.shape(t)}"
            raise _check.bad("target", "t", "one time of the denoiser, ()", got)
        check_score("target", law)
        if isinstance(law, AbstractExact):
            return ExactMarginal(law, t, cond)
        return Marginal(law, t, cond)
    if not callable(law):
        raise _check.bad("target", "law", "a log density x -> () or a denoiser", repr(law))
    for name, value in (("t", t), ("cond", cond)):
        if value is not None:
            raise _check.bad("target", name, "left out for a log density", repr(value))
    return _Density(law)


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
