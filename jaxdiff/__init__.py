"""A functional sampling toolkit for score-based models in JAX."""

from jaxdiff import (
    adjoint,
    exact,
    fisher,
    grids,
    interpolants,
    inversion,
    mcmc,
    metrics,
    pfgm,
    phase,
    process,
    score,
    shard,
    solvers,
    streaming,
    transport,
    tuning,
)
from jaxdiff.adjoint import optimise_noise
from jaxdiff.inversion import Inverted, invert
from jaxdiff.likelihood import LogProb, bits_per_dim, dequantise, log_prob
from jaxdiff.sampling import Samples, check, draw, sample
from jaxdiff.score import Denoiser

__version__ = "0.1.0"

__all__ = [
    "Denoiser",
    "Inverted",
    "LogProb",
    "Samples",
    "adjoint",
    "bits_per_dim",
    "check",
    "dequantise",
    "draw",
    "exact",
    "fisher",
    "grids",
    "interpolants",
    "inversion",
    "invert",
    "log_prob",
    "mcmc",
    "metrics",
    "optimise_noise",
    "pfgm",
    "phase",
    "process",
    "sample",
    "score",
    "shard",
    "solvers",
    "streaming",
    "transport",
    "tuning",
]
