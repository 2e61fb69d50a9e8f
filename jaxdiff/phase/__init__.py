"""Phase-space Langevin diffusion (CLD, PSLD): its processes, denoisers and solvers.

A package of its own, whose models `jaxdiff.sampler` takes as any other: here the two scales of a
Gaussian path are 2x2 matrices that do not commute, noise has no log-SNR to step in, and what is
integrated, (2, *dims), is not what is sampled, (*dims,). None of that fits `AbstractProcess` or its
solvers.

A sampler of phase space starts from position and momentum, `init: (2, *dims)`; its result has the
position in `x` and the momentum in `aux["momentum"]`.
"""

from jaxdiff.phase import _prepare  # noqa: F401, so that models can prepare themselves
from jaxdiff.phase.denoiser import AbstractDenoiser, Denoiser, Lifted
from jaxdiff.phase.process import CLD, PSLD, LinearSDE
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
]
