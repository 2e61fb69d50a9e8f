"""The tables that tests are parametrised over: a new process or solver is one more row."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff import Denoiser, fisher, process, solvers

PROCESSES = {
    "VP": process.VP(),
    "SubVP": process.SubVP(),
    "Cosine": process.Cosine(),
    "VE": process.VE(),
    "EDM": process.EDM(),
    "Rectified": process.Rectified(),
    "Discrete": process.Discrete(np.linspace(1e-4, 0.02, 1000)),
}


def each(table, name="case"):
    """Parametrise an argument over the values of a table, named by its keys."""
    return pytest.mark.parametrize(name, [pytest.param(v, id=k) for k, v in table.items()])


each_process = each(PROCESSES, "path")


def inner_times(path, n=33, low=1e-3, high=1e-3):
    """Times across the process, kept off ends where log-SNR is infinite."""
    span = path.t_max - path.t_min
    u = np.linspace(0.0, 1.0, n)
    return (path.t_min + low * span) + u * span * (1 - low - high)


# Statistics of a model that is best extrapolated as it is.
FLAT = solvers.Statistics(np.linspace(-12, 12, 5), *np.array([1.0, 0.0, 0.0])[:, None] * np.ones(5))

# Every solver of ours: (instance, order on the PF-ODE or None, evaluations per step).
_RK4, _WARM = solvers.RungeKutta("rk4"), solvers.WarmStart
SOLVERS = {
    "DDIM": (solvers.DDIM(), 1, 1),
    "DPMpp2M": (solvers.DPMpp2M(), 2, 1),
    "DPMpp2M(heun)": (solvers.DPMpp2M("heun"), 2, 1),
    "DPMpp3M(released)": (solvers.DPMpp3M(released=True), 2, 1),
    "DPMpp3M(warm)": (_WARM(solvers.DPMpp3M(), solvers.ExponentialRK(3)), 3, None),
    "UniP(2, bh1)": (solvers.UniPC(2, "bh1", corrector=False), 2, 1),
    "UniP(3, warm)": (_WARM(solvers.UniPC(3, corrector=False), solvers.ExponentialRK(3)), 3, None),
    "UniC(2)": (solvers.UniPC(2, predictor=False), 2, 1),
    "UniPC(1)": (solvers.UniPC(1), 2, 1),
    "UniPC(2, bh1)": (solvers.UniPC(2, "bh1"), 3, 1),
    "UniPC(2, eps)": (solvers.UniPC(2, output="eps"), 3, 1),
    "UniPC(3)": (solvers.UniPC(3), 4, 1),
    "UniPC(3, eps, warm)": (_WARM(solvers.UniPC(3, output="eps"), _RK4), 4, None),
    "DEIS(2, t)": (solvers.DEIS(2), 2, 1),
    "DEIS(2, angle)": (solvers.DEIS(2, "angle"), 2, 1),
    "DEIS(4, t, warm)": (_WARM(solvers.DEIS(4), _RK4), 4, None),
    "DEIS(4, s, warm)": (_WARM(solvers.DEIS(4, "s"), _RK4), 4, None),
    "DEIS(4, lam, warm)": (_WARM(solvers.DEIS(4, "lam"), _RK4), 4, None),
    "PNDM": (solvers.PNDM(), 2, 1),
    "PLMS": (_WARM(solvers.PNDM(), solvers.Heun(), 1), 2, None),
    "F-PNDM": (_WARM(solvers.PNDM(), solvers.PseudoRK4(), 3), 2, None),
    "Heun": (solvers.Heun(), 2, 2),
    "RK(midpoint, r)": (solvers.RungeKutta("midpoint", "r"), 2, 2),
    "RK(kutta3, s)": (solvers.RungeKutta("kutta3"), 3, 3),
    "RK(rk4, s)": (_RK4, 4, 4),
    "RK(euler, t)": (solvers.RungeKutta("euler", "t"), 1, 1),
    "RK(midpoint, t)": (solvers.RungeKutta("midpoint", "t"), 2, 2),
    "RK(heun, t)": (solvers.RungeKutta("heun", "t"), 2, 2),
    "DPM-Solver-2": (solvers.ExponentialRK(2, "eps"), 2, 2),
    "DPM-Solver-3": (solvers.ExponentialRK(3, "eps"), 3, 3),
    "DPM-Solver++(2S)": (solvers.ExponentialRK(2, r=(0.4,)), 2, 2),
    "DPM-Solver++(3S)": (solvers.ExponentialRK(3), 3, 3),
    "DDIM(eta=0.5)": (solvers.DDIM(eta=0.5), None, 1),
    "DDIM(eta=1)": (solvers.DDIM(eta=1.0), None, 1),
    "EulerMaruyama(u)": (solvers.EulerMaruyama("u"), None, 1),
    "EulerMaruyama(t)": (solvers.EulerMaruyama("t"), None, 1),
}
# Those whose rows are more than a `Row`, or whose noise is tested in a file of its own.
OTHERS = {
    "DPMpp2MSDE": (solvers.DPMpp2MSDE(), None, 1),
    "SASolver": (solvers.SASolver(), None, 1),
    "ERSDE": (solvers.ERSDE(), None, 1),
    "ReverseDiffusion": (solvers.ReverseDiffusion(), None, 1),
    "DPMppSDE": (solvers.DPMppSDE(), None, 2),
    "SEEDS": (solvers.SEEDS(3), None, 3),
    "Churn": (solvers.Churn(), None, 2),
    "SplitNoise": (solvers.SplitNoise(), None, 1),
    "HeavyBall": (solvers.HeavyBall(solvers.DPMpp2M()), 1, 1),
    "GHVB": (solvers.GHVB(3), 2, 1),
    "LML(noise)": (solvers.LML(solvers.DDIM()), None, 1),
    "LML(DPMpp2M)": (solvers.LML(solvers.DPMpp2M(), c=0.3), 1, 1),
    "LML(velocity)": (solvers.LML(solvers.RungeKutta("euler", "t")), None, 1),
    "Secant": (solvers.Secant(), 2, 1),
    "Secant(3)": (solvers.Secant(3), 1, 1),
    "LocalGaussian": (solvers.LocalGaussian(fisher.Curvature("jvp")), 1, 1),
    "DPMSolverV3": (solvers.DPMSolverV3(FLAT), 4, 1),
    "BELM": (solvers.BELM(), 2, 1),
    "BDIA": (solvers.BDIA(), 2, 1),
    "SymmetricLeapfrog": (solvers.SymmetricLeapfrog(), 2, 1),
    "SymmetricLeapfrog(bits)": (solvers.SymmetricLeapfrog(bits=20), None, 1),
    "VelocityLeapfrog": (solvers.VelocityLeapfrog(), 2, 1),
    "EDICT": (solvers.EDICT(), 1, 2),
    "McCallumFoster": (solvers.McCallumFoster(solvers.Heun()), 2, 4),
}
# What only `jaxdiff.sampler` takes: solvers with a hook between their steps.
HOOKED = {"Langevin": (solvers.Between(solvers.DPMpp2M(), solvers.Langevin()), None, None)}
DETERMINISTIC = {name: row for name, row in (SOLVERS | OTHERS).items() if row[1] is not None}
# Those that see the path through log-SNR only: x/alpha does not depend on it, one atom is exact.
EXPONENTIAL = {
    name: row
    for name, row in DETERMINISTIC.items()
    if ", t)" not in name and ", t," not in name
    if name not in ("F-PNDM", "BDIA", "VelocityLeapfrog", "EDICT", "LML(DPMpp2M)")
}


class MLP(eqx.Module):
    """A network of two layers; `traces` counts how often it is traced."""

    w1: jax.Array
    w2: jax.Array
    traces: list = eqx.field(static=True, default_factory=list)

    def __call__(self, t, x, cond=None):
        self.traces.append(1)
        features = jnp.concatenate([x, jnp.stack([t, jnp.ones_like(t)]).astype(x.dtype)])
        hidden = jnp.tanh(jnp.matmul(self.w1, features))
        out = jnp.matmul(self.w2, hidden)
        return out if cond is None else out + cond

    def __hash__(self):
        return id(self)


class Counter(list):
    """A static field that is no other's equal: its programs are its own."""

    def __eq__(self, other):
        return self is other

    def __hash__(self):
        return id(self)


def mlp(seed=0, dtype=np.float32, traces=None, d=2, width=64):
    """A denoiser of `MLP`, which appends to `traces` at each trace."""
    rng = np.random.default_rng(seed)
    w1, w2 = rng.normal(size=(width, d + 2)), rng.normal(size=(d, width)) / width
    w1, w2 = jnp.asarray(w1, dtype), jnp.asarray(w2, dtype)
    return Denoiser(
        PROCESSES["VP"], MLP(w1, w2, Counter() if traces is None else traces), predicts="x0"
    )
