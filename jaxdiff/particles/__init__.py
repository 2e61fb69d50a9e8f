"""Monte Carlo on densities and scores: chains and populations of samples."""

from jaxdiff.particles.annealing import annealed
from jaxdiff.particles.chain import (
    AbstractDensity,
    AbstractTarget,
    Chain,
    Info,
    Kernel,
    run,
    target,
)
from jaxdiff.particles.langevin import (
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
