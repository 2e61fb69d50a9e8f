"""Clocks, diffrax terms and solvers: how a denoiser is turned into samples."""

from jaxdiff.solvers._reversal import ReversibleAdjoint
from jaxdiff.solvers.correctors import Churn, SplitNoise
from jaxdiff.solvers.coupled import EDICT, McCallumFoster
from jaxdiff.solvers.engine import AbstractGridSolver, Row, State, combine
from jaxdiff.solvers.exponential import DDIM, transfer
from jaxdiff.solvers.fitted import Fitted
from jaxdiff.solvers.hooks import Between, Hook, Langevin
from jaxdiff.solvers.lml import LML
from jaxdiff.solvers.momentum import GHVB, HeavyBall
from jaxdiff.solvers.multistep import DEIS, PNDM, DPMpp2M, DPMpp3M, UniPC, WarmStart
from jaxdiff.solvers.reversible import (
    BDIA,
    BELM,
    AbstractReversible,
    Inverted,
    SymmetricLeapfrog,
    VelocityLeapfrog,
)
from jaxdiff.solvers.scheduled import Schedule, Scheduled
from jaxdiff.solvers.secant import LocalGaussian, Secant
from jaxdiff.solvers.seeds import SEEDS, DPMppSDE
from jaxdiff.solvers.singlestep import ExponentialRK, Heun, PseudoRK4, RungeKutta
from jaxdiff.solvers.stochastic import (
    ERSDE,
    DPMpp2MSDE,
    EulerMaruyama,
    ReverseDiffusion,
    SASolver,
)
from jaxdiff.solvers.terms import (
    AdditiveNoise,
    Clock,
    Field,
    GridBrownian,
    View,
    pf_ode,
    reverse_sde,
    view,
)
from jaxdiff.solvers.v3 import DPMSolverV3, Statistics
from jaxdiff.solvers.wrapper import AbstractWrapper

__all__ = [
    "BDIA",
    "BELM",
    "DDIM",
    "DEIS",
    "EDICT",
    "ERSDE",
    "GHVB",
    "LML",
    "PNDM",
    "SEEDS",
    "AbstractGridSolver",
    "AbstractReversible",
    "AbstractWrapper",
    "AdditiveNoise",
    "Between",
    "Churn",
    "Clock",
    "DPMSolverV3",
    "DPMpp2M",
    "DPMpp2MSDE",
    "DPMpp3M",
    "DPMppSDE",
    "EulerMaruyama",
    "ExponentialRK",
    "Field",
    "Fitted",
    "GridBrownian",
    "HeavyBall",
    "Heun",
    "Hook",
    "Inverted",
    "Langevin",
    "LocalGaussian",
    "McCallumFoster",
    "PseudoRK4",
    "ReverseDiffusion",
    "ReversibleAdjoint",
    "Row",
    "RungeKutta",
    "SASolver",
    "Schedule",
    "Scheduled",
    "Secant",
    "SplitNoise",
    "State",
    "Statistics",
    "SymmetricLeapfrog",
    "UniPC",
    "VelocityLeapfrog",
    "View",
    "WarmStart",
    "combine",
    "pf_ode",
    "reverse_sde",
    "transfer",
    "view",
]
