"""Clocks, diffrax terms and solvers: how a denoiser is turned into samples."""

from jaxdiff.solvers.engine import AbstractGridSolver, Row
from jaxdiff.solvers.exponential import DDIM, DPMpp2M
from jaxdiff.solvers.singlestep import Heun
from jaxdiff.solvers.stochastic import EulerMaruyama
from jaxdiff.solvers.terms import AdditiveNoise, Clock, Field, GridBrownian, pf_ode, reverse_sde

__all__ = [
    "DDIM",
    "AbstractGridSolver",
    "AdditiveNoise",
    "Clock",
    "DPMpp2M",
    "EulerMaruyama",
    "Field",
    "GridBrownian",
    "Heun",
    "Row",
    "pf_ode",
    "reverse_sde",
]
