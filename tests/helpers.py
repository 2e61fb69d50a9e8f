"""The tables that tests are parametrised over: a new process or solver is one more row."""

import numpy as np
import pytest

from jaxdiff import process, solvers

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


# Every solver of ours: (instance, order on the PF-ODE or None, evaluations per step).
SOLVERS = {
    "DDIM": (solvers.DDIM(), 1, 1),
    "DPMpp2M": (solvers.DPMpp2M(), 2, 1),
    "Heun": (solvers.Heun(), 2, 2),
    "DDIM(eta=0.5)": (solvers.DDIM(eta=0.5), None, 1),
    "DDIM(eta=1)": (solvers.DDIM(eta=1.0), None, 1),
    "EulerMaruyama(u)": (solvers.EulerMaruyama("u"), None, 1),
    "EulerMaruyama(t)": (solvers.EulerMaruyama("t"), None, 1),
}
DETERMINISTIC = {name: row for name, row in SOLVERS.items() if row[1] is not None}
