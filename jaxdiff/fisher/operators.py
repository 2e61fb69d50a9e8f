r"""The diffusion Fisher and the posterior covariance of a denoiser, as lineax operators.

Notation: $F = -\nabla^2\log q_t(x)$, $C = Cov[x_0 | x_t = x]$ and $R = Cov[\epsilon | x_t = x]$
are one matrix in three scalings,

$$ C = \frac{\sigma^2}{\alpha}\frac{\partial m}{\partial x}, \qquad
   R = \frac{\alpha^2}{\sigma^2}\,C, \qquad
   F = \frac{I - R}{\sigma^2} = \frac1\sigma\frac{\partial\hat\epsilon}{\partial x}, $$

so a product with $F$ is a directional derivative of the network, a difference of two of its values,
or, where the data are known, a weighted sum of outer products: never a Hessian.

| method | cost of a product | autodiff | symmetric |
|---|---|---|---|
| `"jvp"` | 1 forward derivative (about 2 evaluations) | forward mode, no tape | no |
| `"fd"` | 1 evaluation (and 1 to build) | none | no |
| `"exact"` | vector operations on the mixture or the data | none | yes |

$R$ and $C$ are positive semidefinite, $F$ is not: between modes $R$ has eigenvalues above 1.
"""

from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from jaxdiff import _check, exact
from jaxdiff._types import Cond, Scalar, ScalarLike
from jaxdiff.score import AbstractDenoiser, floating

Method: TypeAlias = Literal["jvp", "fd", "exact"]


class _Jvp(eqx.Module):
    r"""$v \mapsto J v$ for the Jacobian of the noise prediction, by forward mode."""

    denoiser: AbstractDenoiser
    t: ScalarLike
    x: Array
    cond: Cond
    symmetrise: bool = eqx.field(static=True)

    def __call__(self, v: Array) -> Array:
        eps = lambda x: self.denoiser.eps(self.t, x, self.cond)  # noqa: E731
        forward = jax.jvp(eps, (self.x,), (v,))[1]
        if not self.symmetrise:
            return forward
        return 0.5 * (forward + jax.vjp(eps, self.x)[1](v)[0])


class _Difference(eqx.Module):
    r"""$v \mapsto J v$ by one forward difference, along $v$ at a length of its own."""

    denoiser: AbstractDenoiser
    t: ScalarLike
    x: Array
    cond: Cond
    eps: Array

    def __call__(self, v: Array) -> Array:
        norm = jnp.linalg.norm(v)
        # sqrt(round-off) times the length of the noise: truncation and rounding errors balance
        length = self.denoiser.process.sigma(self.t) * jnp.sqrt(v.size * jnp.finfo(v.dtype).eps)
        length = length.astype(v.dtype)
        step = length / jnp.where(norm > 0, norm, 1)
        moved = self.denoiser.eps(self.t, self.x + step * v, self.cond)
        return (moved - self.eps) / step


class _Scaled(eqx.Module):
    r"""$v \mapsto a v + b\,\mathrm{inner}(v)$."""

    inner: Any
    a: ScalarLike
    b: ScalarLike

    def __call__(self, v: Array) -> Array:
        return (self.a * v + self.b * self.inner(v)).astype(v.dtype)


def _noise_jacobian(
    denoiser: AbstractDenoiser, t: Any, x: Array, cond: Cond, method: Method, symmetrise: bool
) -> Any:
    r"""Return $v \mapsto (\partial\hat\epsilon/\partial x) v$ by the two network methods."""
    if method == "jvp":
        return _Jvp(denoiser, t, x, cond, symmetrise)
    if symmetrise:
        raise _check.bad("fisher", "symmetrise", "False for method='fd', which has no transpose", 1)
    return _Difference(denoiser, t, x, cond, denoiser.eps(t, x, cond))


def _operator(fn: Any, x: Array, *tags: object) -> lx.FunctionLinearOperator:
    return lx.FunctionLinearOperator(fn, jax.ShapeDtypeStruct(x.shape, x.dtype), frozenset(tags))


def _noise_covariance(denoiser: AbstractDenoiser, t: Any, x: Array) -> Any:
    assert isinstance(denoiser, exact.AbstractExact)  # by _known
    return denoiser.noise_covariance(t, x)


def _known(where: str, denoiser: AbstractDenoiser, method: str) -> None:
    if not isinstance(denoiser, AbstractDenoiser):
        raise _check.bad(where, "denoiser", "a jaxdiff denoiser", repr(denoiser))
    _check.choice(where, "method", method, ("jvp", "fd", "exact"))
    if method == "exact" and not isinstance(denoiser, exact.AbstractExact):
        expected = "'jvp' or 'fd', since this denoiser has no closed form"
        raise _check.bad(where, "method", expected, repr(method))


def fisher(
    denoiser: AbstractDenoiser,
    t: ScalarLike,
    x: Float[ArrayLike, "*dims"],
    cond: Cond = None,
    *,
    method: Method = "jvp",
    symmetrise: bool = False,
) -> lx.AbstractLinearOperator:
    r"""Return the diffusion Fisher $F = -\nabla^2\log q_t(x)$ as a linear operator.

    $$ F v = \frac1\sigma\frac{\partial\hat\epsilon}{\partial x}v
           = \frac{v - Rv}{\sigma^2}, \qquad R = Cov[\epsilon | x_t = x] $$

    Use `.mv(v)`, `.as_matrix()`, `.transpose()`, and `trace` and `solve` of this module. Tagged
    symmetric for `"exact"` and with `symmetrise`; the Jacobian of a learned network is not
    symmetric. Never tagged positive semidefinite, which it is not.

    Args:
        denoiser: the denoiser.
        t: time with sigma > 0, ().
        x: where, (*dims,).
        cond: condition passed to the denoiser.
        method: see the table of the module's head.
        symmetrise: take the symmetric part of a network's Jacobian: one more reverse-mode product
            each time (`"jvp"` only).

    Returns:
        An operator on arrays of shape (*dims,).

    Raises:
        ValueError: if `method` is unknown, or `"exact"` for a denoiser without a closed form.

    References:
        Wang et al. 2025, "Efficiently Access Diffusion Fisher" (2505.23264).
    """
    _known("fisher", denoiser, method)
    x = floating(x)
    sigma = denoiser.process.sigma(t)
    if method == "exact":
        inner = _noise_covariance(denoiser, t, x)
        return _operator(_Scaled(inner, 1 / sigma**2, -1 / sigma**2), x, lx.symmetric_tag)
    inner = _noise_jacobian(denoiser, t, x, cond, method, symmetrise)
    tags = (lx.symmetric_tag,) if symmetrise else ()
    return _operator(_Scaled(inner, 0.0, 1 / sigma), x, *tags)


def posterior_cov(
    denoiser: AbstractDenoiser,
    t: ScalarLike,
    x: Float[ArrayLike, "*dims"],
    cond: Cond = None,
    *,
    method: Method | None = None,
) -> lx.AbstractLinearOperator:
    r"""Return the posterior covariance $C = Cov[x_0 | x_t = x]$ as a linear operator.

    $$ C v = \frac{\sigma^2}{\alpha^2}\,R v = \frac{\sigma^2}{\alpha^2}
             \left(v - \sigma\frac{\partial\hat\epsilon}{\partial x}v\right) $$

    Tagged positive semidefinite for `"exact"` only. At small sigma the network methods subtract two
    nearly equal vectors where the posterior is narrow: relative to $\sigma^2/\alpha^2$, not to $C$,
    they are accurate to round-off.

    Args:
        denoiser: the denoiser.
        t: time with alpha > 0 and sigma > 0, ().
        x: where, (*dims,).
        cond: condition passed to the denoiser.
        method: as in `fisher`; `"exact"` where there is a closed form and `"jvp"` elsewhere by
            default.

    Returns:
        An operator on arrays of shape (*dims,).

    Raises:
        ValueError: as `fisher`.

    References:
        Wang et al. 2025 (2505.23264); second-order Tweedie, Efron 2011.
    """
    if method is None:
        method = "exact" if isinstance(denoiser, exact.AbstractExact) else "jvp"
    _known("posterior_cov", denoiser, method)
    x = floating(x)
    alpha, sigma = denoiser.process.alpha(t), denoiser.process.sigma(t)
    ratio = (sigma / alpha) ** 2
    if method == "exact":
        inner = _noise_covariance(denoiser, t, x)
        return _operator(_Scaled(inner, 0.0, ratio), x, lx.positive_semidefinite_tag)
    inner = _noise_jacobian(denoiser, t, x, cond, method, False)
    return _operator(_Scaled(inner, ratio, -ratio * sigma), x)


def trace(
    operator: lx.AbstractLinearOperator,
    key: PRNGKeyArray | None = None,
    *,
    probes: int | None = None,
) -> tuple[Scalar, Scalar]:
    r"""Return the trace of an operator and its standard error.

    Without `probes` it is exact: d products with the unit vectors. With probes it is Hutchinson's
    estimate with Rademacher vectors, unbiased, of standard error as returned:

    $$ \mathrm{tr}\,A \approx \frac1n\sum_{i=1}^n v_i^\top A v_i $$

    Args:
        operator: a square operator on arrays of any one shape.
        key: for the probes.
        probes: number of probes, at least 2; None for the exact trace.

    Returns:
        The trace and the standard error of its estimate (0 if exact), both ().

    Raises:
        ValueError: if `probes` is given without `key`, or is less than 2.

    References:
        Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix".
    """
    structure = operator.in_structure()
    if probes is None:
        d = structure.size
        products = jax.lax.map(
            lambda i: operator.mv(
                jnp.zeros(d, structure.dtype).at[i].set(1).reshape(structure.shape)
            ).reshape(-1)[i],
            jnp.arange(d),
        )
        return jnp.sum(products), jnp.zeros((), structure.dtype)
    _check.whole("trace", "probes", probes, 2)
    keys = jax.random.split(_check.key("trace", "key", key), probes)

    def one(key: PRNGKeyArray) -> Array:
        v = jax.random.rademacher(key, structure.shape, structure.dtype)
        return jnp.sum(v * operator.mv(v))

    values = jax.vmap(one)(keys)
    return jnp.mean(values), jnp.std(values, ddof=1) / jnp.sqrt(probes)


def solve(
    operator: lx.AbstractLinearOperator,
    v: Float[ArrayLike, "*dims"],
    *,
    shift: ScalarLike = 0.0,
    solver: lx.AbstractLinearSolver | None = None,
    rtol: float = 1e-6,
    atol: float = 1e-6,
    max_steps: int | None = None,
) -> Float[Array, "*dims"]:
    r"""Solve $(A + \delta I)\,s = v$ by products alone.

    Conjugate gradients where the operator is tagged positive semidefinite, GMRES elsewhere. Cost:
    one product per iteration.

    Args:
        operator: $A$, on arrays of shape (*dims,).
        v: right-hand side, (*dims,).
        shift: $\delta$, not negative for a positive semidefinite operator.
        solver: a lineax solver instead of the default.
        rtol: relative tolerance of the default solver.
        atol: absolute tolerance of the default solver.
        max_steps: bound on the iterations; `10 d` by default.

    Returns:
        $s$, (*dims,); NaN where the solver failed, since nothing may raise inside jit.
    """
    v = floating(v)
    shifted = _operator(_Scaled(operator.mv, shift, 1.0), v, *_tags(operator))
    if solver is None:
        steps = 10 * v.size if max_steps is None else max_steps
        method = lx.CG if lx.is_positive_semidefinite(operator) else lx.GMRES
        solver = method(rtol=rtol, atol=atol, max_steps=steps)
    out = lx.linear_solve(shifted, v, solver, throw=False)
    return jnp.where(out.result == lx.RESULTS.successful, out.value, jnp.nan)


def _tags(operator: lx.AbstractLinearOperator) -> tuple[object, ...]:
    if lx.is_positive_semidefinite(operator):
        return (lx.positive_semidefinite_tag,)  # and stays so under a shift that is not negative
    return (lx.symmetric_tag,) if lx.is_symmetric(operator) else ()
