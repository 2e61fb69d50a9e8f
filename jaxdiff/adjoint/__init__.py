"""Gradients of a loss on the sample with respect to the noise, without a tape; and their use."""

from jaxdiff.adjoint.continuous import continuous_gradient
from jaxdiff.adjoint.discrete import terminal_gradient
from jaxdiff.adjoint.problem import Gradient
from jaxdiff.adjoint.steering import OptimisedNoise, guide, optimise_noise

__all__ = [
    "Gradient",
    "OptimisedNoise",
    "continuous_gradient",
    "guide",
    "optimise_noise",
    "terminal_gradient",
]
