"""Monte Carlo on densities and scores: Markov chains."""

from jaxdiff.mcmc.annealing import annealed
from jaxdiff.mcmc.chains import Chain, Info, Kernel, run
from jaxdiff.mcmc.kernels import (
    Adjusted,
    Kinetic,
    Overdamped,
    Proposed,
    baoab,
    mala,
    newton,
    randomised_midpoint,
    ula,
    underdamped,
)
from jaxdiff.mcmc.targets import AbstractDensity, AbstractTarget, target

__all__ = [
    "AbstractDensity",
    "AbstractTarget",
    "Adjusted",
    "Chain",
    "Info",
    "Kernel",
    "Kinetic",
    "Overdamped",
    "Proposed",
    "annealed",
    "baoab",
    "mala",
    "newton",
    "randomised_midpoint",
    "run",
    "target",
    "ula",
    "underdamped",
]
