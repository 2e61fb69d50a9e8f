"""What a chain samples from: a log density, or the law of a denoiser at one time."""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff import _check
from jaxdiff._array import Cond, Scalar, ScalarLike
from jaxdiff.exact import AbstractExact
from jaxdiff.score import AbstractDenoiser, check_score

__all__ = ["AbstractDensity", "AbstractTarget", "ExactMarginal", "Marginal", "target"]


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
        ValueError: if `law` is neither, `t` is missing or not one time, `t` or `cond` is given for
            a log density, or (when called) the log density is not one number.

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
