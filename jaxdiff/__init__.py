"""A functional sampling toolkit for score-based models in JAX."""

from jaxdiff import exact, fisher, grids, metrics, process, score, solvers, transport
from jaxdiff.sampling import Samples, check, draw, sample
from jaxdiff.score import Denoiser

__version__ = "0.1.0"

__all__ = [
    "Denoiser",
    "Samples",
    "check",
    "draw",
    "exact",
    "fisher",
    "grids",
    "metrics",
    "process",
    "sample",
    "score",
    "solvers",
    "transport",
]
