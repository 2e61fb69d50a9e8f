"""Clocks, diffrax terms and solvers: how a denoiser is turned into samples."""

from jaxdiff.solvers.engine import AbstractGridSolver as AbstractGridSolver
from jaxdiff.solvers.engine import Row as Row
from jaxdiff.solvers.exponential import DDIM as DDIM
from jaxdiff.solvers.exponential import DPMpp2M as DPMpp2M
from jaxdiff.solvers.singlestep import Heun as Heun
from jaxdiff.solvers.stochastic import EulerMaruyama as EulerMaruyama
from jaxdiff.solvers.terms import Clock as Clock
from jaxdiff.solvers.terms import Field as Field
from jaxdiff.solvers.terms import GridBrownian as GridBrownian
from jaxdiff.solvers.terms import pf_ode as pf_ode
from jaxdiff.solvers.terms import reverse_sde as reverse_sde
