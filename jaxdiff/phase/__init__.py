"""Phase-space Langevin diffusion (CLD, PSLD): its processes, denoisers, solvers and sampling.

A package of its own, with the entry points of `jaxdiff.sampling`: here the two scales of a Gaussian
path are 2x2 matrices that do not commute, noise has no log-SNR to step in, and what is integrated,
(2, *dims), is not what is sampled, (*dims,). None of that fits `AbstractProcess` or its solvers.
"""

from jaxdiff.phase.denoiser import AbstractDenoiser, Denoiser, Lifted
from jaxdiff.phase.process import CLD, PSLD, LinearSDE
from jaxdiff.phase.sampling import draw, sample
from jaxdiff.phase.solvers import (
    GDDIM,
    SSCS,
    AbstractPhaseSolver,
    Conjugate,
    Euler,
    EulerMaruyama,
    Heun,
    Rotation,
    Splitting,
    Stage,
)

__all__ = [
    "CLD",
    "GDDIM",
    "PSLD",
    "SSCS",
    "AbstractDenoiser",
    "AbstractPhaseSolver",
    "Conjugate",
    "Denoiser",
    "Euler",
    "EulerMaruyama",
    "Heun",
    "Lifted",
    "LinearSDE",
    "Rotation",
    "Splitting",
    "Stage",
    "draw",
    "sample",
]
