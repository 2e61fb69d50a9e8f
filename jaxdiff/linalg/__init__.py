"""Matrix-free linear algebra that knows no diffusion; `jaxdiff.fisher` offers what users need."""

from jaxdiff.linalg import diag_low_rank, estimators, spectrum

__all__ = ["diag_low_rank", "estimators", "spectrum"]
