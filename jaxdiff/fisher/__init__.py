"""Second-order information of a denoiser, without Hessians."""

from jaxdiff.fisher.operators import fisher, posterior_cov, solve, trace

__all__ = ["fisher", "posterior_cov", "solve", "trace"]
