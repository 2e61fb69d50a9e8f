"""Second-order information of a denoiser, without Hessians."""

from jaxdiff import streaming
from jaxdiff.fisher.endpoint import (
    endpoint_bound,
    endpoint_cov,
    fisher_of,
    gated_cov,
    isotropic_cov,
)
from jaxdiff.fisher.lowrank import DiagLowRank, effective_sample_size, lanczos, neighbours
from jaxdiff.fisher.newton import Curvature, Newton, RankOne, rank_one_divergence
from jaxdiff.fisher.operators import diagonal, fisher, posterior_cov, solve
from jaxdiff.fisher.spectrum import effective_rank, eigsh, intrinsic_dimension, logdet
from jaxdiff.fisher.trace import (
    AbstractTrace,
    ExactTrace,
    Hutchinson,
    HutchPP,
    TraceHead,
    matching_bound,
    trace,
)

__all__ = [
    "AbstractTrace",
    "Curvature",
    "DiagLowRank",
    "ExactTrace",
    "HutchPP",
    "Hutchinson",
    "Newton",
    "RankOne",
    "TraceHead",
    "diagonal",
    "effective_rank",
    "effective_sample_size",
    "eigsh",
    "endpoint_bound",
    "endpoint_cov",
    "fisher",
    "fisher_of",
    "gated_cov",
    "intrinsic_dimension",
    "isotropic_cov",
    "lanczos",
    "logdet",
    "matching_bound",
    "neighbours",
    "posterior_cov",
    "rank_one_divergence",
    "solve",
    "streaming",
    "trace",
]
