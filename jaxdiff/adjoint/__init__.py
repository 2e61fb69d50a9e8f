"""Gradients of a loss on the sample with respect to the noise, without a tape; and their use."""

from jaxdiff.adjoint.continuous import continuous_gradient
from jaxdiff.adjoint.rules import Pullback, WithCov, pullback
from jaxdiff.adjoint.steering import OptimisedNoise, guide, optimise_noise
from jaxdiff.adjoint.terminal import Gradient, terminal_gradient

__all__ = [
    "Gradient",
    "OptimisedNoise",
    "Pullback",
    "WithCov",
    "continuous_gradient",
    "guide",
    "optimise_noise",
    "pullback",
    "terminal_gradient",
]
