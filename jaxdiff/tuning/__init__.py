"""What is fitted to a model once and then used: grids, coefficients, statistics, schedules."""

from jaxdiff.tuning.coefficients import Fitted, distil, integration_approximation, subspace
from jaxdiff.tuning.gits import gits
from jaxdiff.tuning.kinetic import kinetic_grid
from jaxdiff.tuning.klub import align_your_steps, klub
from jaxdiff.tuning.search import (
    Distance,
    Found,
    Schedule,
    Scheduled,
    distance,
    search_grid,
    search_schedule,
)
from jaxdiff.tuning.statistics import model_statistics

__all__ = [
    "Distance",
    "Fitted",
    "Found",
    "Schedule",
    "Scheduled",
    "align_your_steps",
    "distance",
    "distil",
    "gits",
    "integration_approximation",
    "kinetic_grid",
    "klub",
    "model_statistics",
    "search_grid",
    "search_schedule",
    "subspace",
]
