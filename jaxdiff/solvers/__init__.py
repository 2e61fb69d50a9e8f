"""Clocks, diffrax terms and solvers: how a denoiser is turned into samples.

Every solver takes every process, prediction type and grid (SDE solvers a grid of known steps):

| solvers | what they are |
|---|---|
| `DDIM(eta)` | first order; the step on which all others build |
| `DPMpp2M`, `DPMpp3M`, `UniPC`, `DEIS`, `PNDM`, `DPMSolverV3` | multistep: one evaluation a step |
| `WarmStart` | a better start for a multistep solver |
| `ExponentialRK` | single step: DPM-Solver-2, 3, ++2S, ++3S |
| `Heun`, `RungeKutta`, `PseudoRK4` | single step: several evaluations |
| `Secant`, `LocalGaussian` | exact for Gaussian data: curvature from past steps, or the Fisher |
| `HeavyBall`, `GHVB` | momentum around another solver, against artefacts of strong guidance |
| `LML` | Levenberg-Marquardt-Langevin around another, as published and scale-free |
| `EulerMaruyama` (DDPM), `ReverseDiffusion`, `DPMpp2MSDE`, `SASolver` | reverse SDE |
| `ERSDE`, `DPMppSDE`, `SEEDS` | reverse SDE |
| `Churn` (EDM), `SplitNoise` | noise around a step of another solver |
| `Between(solver, hook)` | a hook between the steps: `Langevin`, a projection, your own |
| `BELM`, `BDIA`, `SymmetricLeapfrog`, `VelocityLeapfrog` | reversible: pairs of nodes |
| `EDICT`, `McCallumFoster` | reversible: pairs of states at one node |
| `Fitted`, `Scheduled` | what `jaxdiff.tuning` makes |
| any of diffrax | ODE and additive-noise SDE, adaptive too |

Reversible solvers have `sampler.invert`, and `ReversibleAdjoint` for gradients in constant memory.

To add one, write the coefficients of a step from the nodes of the grid. Float64 tables, both
engines, `vmap` and gradients follow:

```python
>>> import jaxdiff as jd
>>> class Line(AbstractGridSolver):
...     '''DDIM's step with the network output from the line through the last two outputs.'''
...     memory = 1  # older outputs in use
...     claimed_order = 2
...     def row(self, process, ts, n, left):
...         decay, gain, _ = transfer(process, ts[1], ts[0])  # x1 = decay x0 + gain m0 + ...
...         lam = jax.vmap(process.lam)(ts)  # of the next, the current and the last node
...         reach = (lam[0] - lam[1]) / 2 / (lam[1] - lam[2])
...         return Row(decay, gain, (jnp.where(n > 0, -gain * reach, 0.0),))  # ... w (m_-1 - m0)
>>> vp, key = jd.process.VP(), jax.random.key(0)
>>> model, ts = jd.exact.gaussian(vp, jnp.zeros(2), 0.25), vp.grid(20, "logsnr")
>>> mine, known = (jd.sampler(model, (2,), solver=solver, ts=ts)(key).x
...                for solver in (Line(), DPMpp2M()))
>>> bool(jnp.allclose(mine, known, atol=1e-5))
True

```
"""

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
