"""A functional sampling toolkit for score-based models in JAX."""

from jaxdiff import (
    _gaussian,  # noqa: F401, so that denoisers can prepare themselves
    adjoint,
    exact,
    fisher,
    flow_map,
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
from jaxdiff._files import read, sample_to
from jaxdiff._likelihood import Likelihood, LogProb, bits_per_dim, dequantise, likelihood
from jaxdiff._many import keys, many, sample
from jaxdiff._mesh import gather
from jaxdiff._sampler import AbstractSolve, Sampler, Samples, State, check, prepare, sampler
from jaxdiff.adjoint import optimise_noise
from jaxdiff.score import Denoiser
from jaxdiff.solvers.reversible import Inverted

__version__ = "0.1.0"

__all__ = [
    "AbstractSolve",
    "Denoiser",
    "Inverted",
    "Likelihood",
    "LogProb",
    "Sampler",
    "Samples",
    "State",
    "adjoint",
    "bits_per_dim",
    "check",
    "dequantise",
    "exact",
    "fisher",
    "flow_map",
    "gather",
    "grids",
    "interpolants",
    "inversion",
    "keys",
    "likelihood",
    "many",
    "mcmc",
    "metrics",
    "optimise_noise",
    "pfgm",
    "phase",
    "prepare",
    "process",
    "read",
    "sample",
    "sample_to",
    "sampler",
    "score",
    "shard",
    "solvers",
    "streaming",
    "transport",
    "tuning",
]
