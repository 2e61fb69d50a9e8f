r"""Models of the posterior covariance that need no derivative: endpoints, traces, and both.

Notation: $C = Cov[x_0 | x_t = x]$, $m$ its mean, $R = (\alpha/\sigma)^2 C$ and $r = \mathrm{tr} R$;
$y$ is an endpoint, the clean sample at the data end of the trajectory through $x$.

| model | $C \approx$ | needs |
|---|---|---|
| raw endpoint (published) | $y y^\top - m m^\top$ | $y$ |
| centred endpoint | $(y - m)(y - m)^\top$ | $y$ |
| isotropic | $(\sigma/\alpha)^2\,\frac rd\,I$ | $r$ |
| gated | isotropic, and above some $\sigma$ in part centred endpoint | $y$ and $r$ |

Both endpoint models have expectation $C$ where $y$ is drawn from the posterior; the raw one is not
positive semidefinite, and its error grows with the distance of the data from the origin. The end of
an ODE trajectory is no such draw: at small sigma it is near $m$, and what it says of the width of
the posterior is an accident of the trajectory. There the trace is the better witness.
"""

from typing import Any, Literal, TypeAlias

import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, ArrayLike, Float

from jaxdiff import _check
from jaxdiff._array import Cond, Scalar, ScalarLike
from jaxdiff.linalg.diag_low_rank import DiagLowRank
from jaxdiff.linalg.estimators import is_operator
from jaxdiff.process import AbstractProcess, gaussian_only
from jaxdiff.score import AbstractDenoiser, floating

__all__ = ["Kind", "endpoint_bound", "endpoint_cov", "fisher_of", "gated_cov", "isotropic_cov"]

Kind: TypeAlias = Literal["centred", "raw"]


def _mean(
    where: str, denoiser: AbstractDenoiser, t: Any, x: Any, y: Any, cond: Cond, m: Any
) -> tuple[Array, Array]:
    """Return y and m as arrays of the shape of x, with m from the denoiser if it is not given."""
    if not isinstance(denoiser, AbstractDenoiser):
        raise _check.bad(where, "denoiser", "a jaxdiff denoiser", repr(denoiser))
    x, y = floating(x), floating(y)
    m = denoiser(t, x, cond) if m is None else floating(m)
    for name, value in (("y", y), ("m", m)):
        if value.shape != x.shape:
            raise _check.bad(where, name, f"of the shape of x, {x.shape}", value.shape)
    return y.astype(x.dtype), m.astype(x.dtype)


def endpoint_cov(
    denoiser: AbstractDenoiser,
    t: ScalarLike,
    x: Float[ArrayLike, "*dims"],
    y: Float[ArrayLike, "*dims"],
    cond: Cond = None,
    *,
    kind: Kind = "centred",
    m: Float[ArrayLike, "*dims"] | None = None,
) -> DiagLowRank:
    r"""Approximate the posterior covariance by one endpoint of the trajectory.

    $$ C \approx (y - m)(y - m)^\top \quad\text{(centred)}, \qquad
       C \approx y y^\top - m m^\top \quad\text{(raw, DF-EA)} $$

    Choose `"centred"`: the same expectation under the posterior, positive semidefinite (tagged so),
    and independent of the origin of the data. `"raw"` is the published one. Both are exact where
    the posterior is one point, and both leave out its width elsewhere: see `endpoint_bound`.
    Cost: one evaluation of the denoiser, none if `m` is given; products are inner products.

    Args:
        denoiser: the denoiser.
        t: time, ().
        x: where, (*dims,).
        y: endpoint, (*dims,).
        cond: condition passed to the denoiser.
        kind: `"centred"` or `"raw"`.
        m: the posterior mean at x where it is known already, (*dims,).

    Returns:
        An operator on arrays of shape (*dims,), of rank 1 or 2.

    Raises:
        ValueError: if `kind` is unknown, or `y` or `m` is not of the shape of `x`.

    References:
        Wang et al. 2025, "Efficiently Access Diffusion Fisher" (2505.23264), endpoint
        approximation.
    """
    _check.choice("endpoint_cov", "kind", kind, ("centred", "raw"))
    y, m = _mean("endpoint_cov", denoiser, t, x, y, cond, m)
    zero, one = jnp.zeros((), y.dtype), jnp.ones((1,), y.dtype)
    if kind == "raw":
        weights = jnp.concatenate([one, -one])
        return DiagLowRank(zero, jnp.stack([y, m]), weights)
    tags = frozenset({lx.positive_semidefinite_tag})
    return DiagLowRank(zero, (y - m)[None], one, tags)


def _one(where: str, r: Any) -> None:
    if jnp.ndim(r) != 0:
        raise _check.bad(where, "r", "one number, (); average the estimates", jnp.shape(r))


def isotropic_cov(
    process: AbstractProcess, t: ScalarLike, r: ScalarLike, x: Float[ArrayLike, "*dims"]
) -> DiagLowRank:
    r"""Approximate the posterior covariance by a multiple of the identity with the right trace.

    $$ C \approx \frac{\sigma^2}{\alpha^2}\,\frac rd\,I, \qquad r = \mathrm{tr}\,R $$

    No endpoint, no evaluation. `r = 0` is the model of a posterior that is one point.

    Args:
        process: the Gaussian path.
        t: time with alpha > 0, ().
        r: residual trace at x, or an estimate of it, ().
        x: the sample, (*dims,); only its shape and dtype are used.

    Returns:
        An operator on arrays of shape (*dims,). Not tagged positive semidefinite, since an
        estimate of r may be negative.
    """
    x = floating(x)
    _one("isotropic_cov", r)
    shift = jnp.asarray(jnp.exp(-2 * process.lam(t)) * r / x.size, x.dtype)
    # one factor of weight 0: linear algebra on empty matrices is not defined everywhere
    return DiagLowRank(shift, jnp.zeros((1, *x.shape), x.dtype), jnp.zeros((1,), x.dtype))


def gated_cov(
    denoiser: AbstractDenoiser,
    t: ScalarLike,
    x: Float[ArrayLike, "*dims"],
    y: Float[ArrayLike, "*dims"],
    r: ScalarLike,
    cond: Cond = None,
    *,
    m: Float[ArrayLike, "*dims"] | None = None,
    sigma_lo: ScalarLike = 0.9,
) -> DiagLowRank:
    r"""Approximate the posterior covariance by its trace, and by an endpoint at large sigma.

    With $e = y - m$, $\varrho = (\alpha/\sigma)^2|e|^2$ the trace that the endpoint claims, and
    $\hat\sigma = \sigma/\sqrt{\alpha^2 + \sigma^2}$,

    $$ C \approx \frac{\sigma^2}{\alpha^2}\,\frac{r - w\varrho}{d}\,I + w\,e e^\top, \qquad
       w = 1[\hat\sigma \ge \sigma_{lo}]\,\min(1, \max(r, 0)/\varrho) $$

    so that the trace of R is r for every endpoint, and what the endpoint claims beyond r is
    refused: positive semidefinite if r >= 0. Below the gate it is `isotropic_cov`. The best default
    without derivatives. Cost: as `endpoint_cov`.

    Args:
        denoiser: the denoiser.
        t: time with alpha > 0 and sigma > 0, ().
        x: where, (*dims,).
        y: endpoint, (*dims,).
        r: residual trace at x, or an estimate of it, ().
        cond: condition passed to the denoiser.
        m: the posterior mean at x where it is known already, (*dims,).
        sigma_lo: the gate, in units in which $\alpha^2 + \sigma^2 = 1$, in [0, 1].

    Returns:
        An operator on arrays of shape (*dims,). Tagged symmetric only: an estimate of r may
        be negative.

    Raises:
        ValueError: if `y` or `m` is not of the shape of `x`, or `sigma_lo` not in [0, 1].
    """
    _check.number("gated_cov", "sigma_lo", sigma_lo, 0, 1)
    _one("gated_cov", r)
    y, m = _mean("gated_cov", denoiser, t, x, y, cond, m)
    process, e = denoiser.process, y - m
    alpha, sigma, snr = process.alpha(t), process.sigma(t), process.snr(t)
    rho = snr * jnp.sum(e**2)
    share = jnp.minimum(1.0, jnp.maximum(r, 0.0) / jnp.where(rho > 0, rho, 1.0))
    open_ = (sigma >= sigma_lo * jnp.hypot(alpha, sigma)) & (rho > 0)
    w = jnp.where(open_, share, 0.0)
    shift = jnp.asarray((r - w * rho) / (snr * e.size), e.dtype)
    return DiagLowRank(shift, e[None], w[None].astype(e.dtype))


def fisher_of(
    cov: lx.AbstractLinearOperator, process: AbstractProcess, t: ScalarLike
) -> lx.AbstractLinearOperator:
    r"""Return the Fisher that belongs to an operator of the posterior covariance.

    $$ F = \frac{1}{\sigma^2}\left(I - \frac{\alpha^2}{\sigma^2}\,C\right) $$

    Args:
        cov: $C$ or a model of it, on arrays of any one shape.
        process: the Gaussian path.
        t: time with sigma > 0, ().

    Returns:
        An operator of the structure of `cov`: a `DiagLowRank` of a `DiagLowRank`. Symmetric if
        `cov` is.

    References:
        Wang et al. 2025 (2505.23264), outer-product form of the Fisher.
    """
    is_operator("fisher_of", cov)
    gaussian_only("fisher_of", "process", process)
    snr, scale = process.snr(t), process.sigma(t) ** 2
    structure = cov.in_structure()
    if isinstance(cov, DiagLowRank):
        shift, weights = (1 - snr * cov.shift) / scale, -snr * cov.weights / scale
        dtype = structure.dtype
        return DiagLowRank(shift.astype(dtype), cov.factors, weights.astype(dtype))

    def product(v: Array) -> Array:
        return ((v - snr * cov.mv(v)) / scale).astype(v.dtype)

    tags = frozenset({lx.symmetric_tag} if lx.is_symmetric(cov) else ())
    return lx.FunctionLinearOperator(product, structure, tags)


def endpoint_bound(
    process: AbstractProcess,
    t: ScalarLike,
    cov_norm: ScalarLike,
    y: Float[ArrayLike, "*dims"],
    m: Float[ArrayLike, "*dims"],
) -> Scalar:
    r"""Bound the error of the Fisher that an endpoint gives, in the spectral norm.

    $$ \|F_y - F\|_2 \le \frac{\alpha^2}{\sigma^4}
       \left(\|C\|_2 + |y - m|\,(|y| + |m|)\right) $$

    For both kinds of `endpoint_cov`. It says something where $|y - m| = o(\sigma^2)$ only, that is
    where the posterior has collapsed onto one atom: for data with a density it is as large as the
    isotropic part of F.

    Args:
        process: the Gaussian path.
        t: time with sigma > 0, ().
        cov_norm: $\|C\|_2$, or an upper bound, ().
        y: endpoint, (*dims,).
        m: posterior mean, (*dims,).

    Returns:
        The bound, ().
    """
    gaussian_only("endpoint_bound", "process", process)
    y, m = floating(y), floating(m)
    if y.shape != m.shape:
        raise _check.bad("endpoint_bound", "y", f"of the shape of m, {m.shape}", y.shape)
    norm = lambda v: jnp.linalg.norm(v.reshape(-1))  # noqa: E731
    spread = cov_norm + norm(y - m) * (norm(y) + norm(m))
    return process.snr(t) / process.sigma(t) ** 2 * spread
