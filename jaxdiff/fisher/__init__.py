"""Second-order information of a denoiser, without Hessians."""

from jaxdiff.fisher.atoms import effective_sample_size, neighbours
from jaxdiff.fisher.curvature import (
    Curvature,
    CurvatureFn,
    Eigen,
    Newton,
    RankOne,
    rank_one_divergence,
)
from jaxdiff.fisher.endpoint import (
    endpoint_bound,
    endpoint_cov,
    fisher_of,
    gated_cov,
    isotropic_cov,
)
from jaxdiff.fisher.heads import (
    AbstractTrace,
    ExactTrace,
    Hutchinson,
    HutchPP,
    TraceHead,
    intrinsic_dimension,
    matching_bound,
)
from jaxdiff.fisher.operators import fisher, posterior_cov, solve
from jaxdiff.linalg.diag_low_rank import DiagLowRank
from jaxdiff.linalg.estimators import diagonal, trace
from jaxdiff.linalg.spectrum import effective_rank, eigsh, lanczos, logdet

__all__ = [
    "AbstractTrace",
    "Curvature",
    "CurvatureFn",
    "DiagLowRank",
    "Eigen",
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
    "trace",
]
