"""What is fitted to a model once and then used: grids, coefficients, statistics, schedules."""

from jaxdiff.tuning.align import align_your_steps, klub
from jaxdiff.tuning.coefficients import distil, integration_approximation, subspace
from jaxdiff.tuning.kinetic import kinetic_grid
from jaxdiff.tuning.search import (
    Distance,
    Found,
    distance,
    search_grid,
    search_schedule,
)
from jaxdiff.tuning.statistics import model_statistics
from jaxdiff.tuning.trajectories import gits

__all__ = [
    "Distance",
    "Found",
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
