r"""The diffusion Fisher and the posterior covariance of a denoiser, as lineax operators.

Notation: $F = -\nabla^2\log q_t(x)$, $C = Cov[x_0 | x_t = x]$ and $R = Cov[\epsilon | x_t = x]$
are one matrix in three scalings,

$$ C = \frac{\sigma^2}{\alpha}\frac{\partial m}{\partial x}, \qquad
   R = \frac{\alpha^2}{\sigma^2}\,C, \qquad
   F = \frac{I - R}{\sigma^2} = \frac1\sigma\frac{\partial\hat\epsilon}{\partial x}, $$

so a product with $F$ is a directional derivative of the network, a difference of two of its values,
or, where the data are known, a weighted sum of outer products: never a Hessian.

| method | cost of a product | once, to build | autodiff | symmetric |
|---|---|---|---|---|
| `"jvp"` | 1 forward derivative (about 2 evaluations) | none | forward mode, no tape | no |
| the same, `symmetrise=True` | 1 forward and 1 reverse derivative | none | both modes | yes |
| `"fd"` | 1 evaluation | 1 evaluation | none | no |
| `"exact"`, a mixture | O(K d), or O(K d^2) with full covariances | as one product | none | yes |
| `"exact"`, a data set | a pass over the data, O(N d) | none | none | yes |
| `"neighbours"`, a data set | O(k d) for the k heaviest atoms | 2 passes | none | yes |
| `"lanczos"` | O(k d) | k products (exact, or symmetrised jvp) | as those | yes |

The first five are $F$ itself (`"fd"` to about half the digits that
`x` has beside $\sigma$), the last two low-rank
approximations of $R$, which leave the rest of $F$ isotropic: `neighbours` bounds what is left
out, `eigsh` shows how far the iteration has come. Their operators are `DiagLowRank`,
for which `solve`, `diagonal` and `logdet` are exact.

$R$ and $C$ are positive semidefinite, $F$ is not: between modes $R$ has eigenvalues above 1.
"""

from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from jaxdiff import _check, exact
from jaxdiff._array import Cond, ScalarLike
from jaxdiff.fisher.atoms import neighbours
from jaxdiff.linalg.diag_low_rank import DiagLowRank, woodbury
from jaxdiff.linalg.estimators import is_operator
from jaxdiff.linalg.spectrum import lanczos
from jaxdiff.process import gaussian_only
from jaxdiff.score import AbstractDenoiser, floating

__all__ = ["Method", "difference_step", "fisher", "posterior_cov", "solve"]

Method: TypeAlias = Literal["jvp", "fd", "exact", "neighbours", "lanczos"]

_LOW_RANK = ("neighbours", "lanczos")


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


def difference_step(sigma: ScalarLike, x: Array, eps: Array, v: Array) -> Array:
    r"""Return the factor of `v` in a forward difference of a denoiser at `x`, ().

    The step has the length $\sigma\sqrt{d\,u\max(1, s/\sigma)}$, $u$ being the round-off and $s$
    the size of a number in `x` or in its signal $x - \sigma\hat\epsilon$: there the error of
    truncation balances that of rounding, which is $u\max(1, s/\sigma)$ in $\hat\epsilon$.
    """
    size = lambda a: jnp.sqrt(jnp.mean(a**2))  # noqa: E731
    scale = jnp.maximum(size(x), size(x - sigma * eps))
    unit = jnp.finfo(v.dtype).eps * jnp.maximum(1, scale / sigma)
    norm = jnp.linalg.norm(v)
    step = sigma * jnp.sqrt(v.size * unit) / jnp.where(norm > 0, norm, 1)
    return jnp.asarray(step, v.dtype)


class _Difference(eqx.Module):
    r"""$v \mapsto J v$ by one forward difference, along $v$ at a length of its own."""

    denoiser: AbstractDenoiser
    t: ScalarLike
    x: Array
    cond: Cond
    eps: Array

    def __call__(self, v: Array) -> Array:
        step = difference_step(self.denoiser.process.sigma(self.t), self.x, self.eps, v)
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
    denoiser: AbstractDenoiser, t: Any, x: Array, cond: Cond, method: str, symmetrise: bool
) -> Any:
    r"""Return $v \mapsto (\partial\hat\epsilon/\partial x) v$ by the two network methods."""
    if method == "jvp":
        return _Jvp(denoiser, t, x, cond, symmetrise)
    return _Difference(denoiser, t, x, cond, denoiser.eps(t, x, cond))


def _operator(fn: Any, x: Array, *tags: object) -> lx.FunctionLinearOperator:
    structure = jax.eval_shape(lambda x: x, x)  # which inside shard_map says where x lies
    return lx.FunctionLinearOperator(fn, structure, frozenset(tags))


def _noise_covariance(denoiser: AbstractDenoiser, t: Any, x: Array) -> Any:
    assert isinstance(denoiser, exact.AbstractExact)  # by _known
    return denoiser.noise_covariance(t, x)


def _low_rank(
    denoiser: Any, t: Any, x: Array, cond: Cond, method: str, rank: Any, key: Any
) -> DiagLowRank:
    r"""Return $R$ on the heaviest atoms, or on a Krylov space."""
    if method == "neighbours":
        return neighbours(denoiser, t, x, rank=rank).covariance
    if isinstance(denoiser, exact.AbstractExact):
        full = _operator(_noise_covariance(denoiser, t, x), x, lx.positive_semidefinite_tag)
    else:  # Lanczos needs symmetry, which the Jacobian of a network has not
        jacobian = _Jvp(denoiser, t, x, cond, True)
        sigma = denoiser.process.sigma(t)
        full = _operator(_Scaled(jacobian, 1.0, -sigma), x, lx.symmetric_tag)
    return lanczos(full, rank, key=key)


def _affine(inner: DiagLowRank, a: Any, b: Any, *tags: object) -> DiagLowRank:
    """Return `a I + b A`."""
    a, b = (jnp.asarray(c, inner.weights.dtype) for c in (a, b))
    return DiagLowRank(a + b * inner.shift, inner.factors, b * inner.weights, frozenset(tags))


def _known(
    where: str, denoiser: AbstractDenoiser, method: str, symmetrise: bool, rank: Any
) -> None:
    if not isinstance(denoiser, AbstractDenoiser):
        raise _check.bad(where, "denoiser", "a jaxdiff denoiser", repr(denoiser))
    gaussian_only(where, "the process of the denoiser", denoiser.process)
    _check.choice(where, "method", method, ("jvp", "fd", "exact", *_LOW_RANK))
    if method == "exact" and not isinstance(denoiser, exact.AbstractExact):
        expected = "'jvp', 'fd' or 'lanczos', since this denoiser has no closed form"
        raise _check.bad(where, "method", expected, repr(method))
    if method == "neighbours" and not isinstance(denoiser, exact.Empirical):
        expected = "another, since this denoiser is not built from data by exact.empirical"
        raise _check.bad(where, "method", expected, repr(method))
    if method in _LOW_RANK:
        _check.whole(where, f"rank (with method={method!r})", rank, 1)
    elif rank is not None:
        raise _check.bad(where, "rank", f"None for method={method!r}", repr(rank))
    if symmetrise and method == "fd":
        expected = "False for method='fd', which has no transpose"
        raise _check.bad(where, "symmetrise", expected, symmetrise)


def fisher(
    denoiser: AbstractDenoiser,
    t: ScalarLike,
    x: Float[ArrayLike, "*dims"],
    cond: Cond = None,
    *,
    method: Method = "jvp",
    symmetrise: bool = False,
    rank: int | None = None,
    key: PRNGKeyArray | None = None,
) -> lx.AbstractLinearOperator:
    r"""Return the diffusion Fisher $F = -\nabla^2\log q_t(x)$ as a linear operator.

    $$ F v = \frac1\sigma\frac{\partial\hat\epsilon}{\partial x}v
           = \frac{v - Rv}{\sigma^2}, \qquad R = Cov[\epsilon | x_t = x] $$

    Use `.mv(v)`, `.as_matrix()`, `.transpose()`, and `trace`, `diagonal`, `solve`, `logdet` and
    `eigsh` of this package. Tagged symmetric in the rows of the module's table that say so; the
    Jacobian of a learned network is not symmetric. Never tagged positive semidefinite, which it is
    not.

    Args:
        denoiser: the denoiser.
        t: time with sigma > 0, ().
        x: where, (*dims,).
        cond: condition passed to the denoiser.
        method: see the table of the module's head.
        symmetrise: take the symmetric part of a network's Jacobian: one more reverse-mode product
            each time (`"jvp"`; the methods after `"fd"` are symmetric as they are).
        rank: k, for `"neighbours"` and `"lanczos"`.
        key: for the start of `"lanczos"`; a fixed one by default.

    Returns:
        An operator on arrays of shape (*dims,); a `DiagLowRank` with `rank`.

    Raises:
        ValueError: if `method` is unknown, or `"exact"` for a denoiser without a closed form, or
            `"neighbours"` for one that is no data set; if `rank` is missing or not for `method`;
            if `symmetrise` is asked of `"fd"`.

    References:
        Wang et al. 2025, "Efficiently Access Diffusion Fisher" (2505.23264).
    """
    _known("fisher", denoiser, method, symmetrise, rank)
    x = floating(x)
    sigma = denoiser.process.sigma(t)
    if method in _LOW_RANK:
        inner = _low_rank(denoiser, t, x, cond, method, rank, key)
        return _affine(inner, 1 / sigma**2, -1 / sigma**2)
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
    symmetrise: bool = False,
    rank: int | None = None,
    key: PRNGKeyArray | None = None,
) -> lx.AbstractLinearOperator:
    r"""Return the posterior covariance $C = Cov[x_0 | x_t = x]$ as a linear operator.

    $$ C v = \frac{\sigma^2}{\alpha^2}\,R v = \frac{\sigma^2}{\alpha^2}
             \left(v - \sigma\frac{\partial\hat\epsilon}{\partial x}v\right) $$

    Tagged positive semidefinite where it comes from a known density, by `"exact"`, `"neighbours"`
    or `"lanczos"`; a network's is symmetric at most. At small sigma the network methods subtract
    two nearly equal vectors where the posterior is narrow: relative to $\sigma^2/\alpha^2$, not to
    $C$, they are accurate to round-off.

    Args:
        denoiser: the denoiser.
        t: time with alpha > 0 and sigma > 0, ().
        x: where, (*dims,).
        cond: condition passed to the denoiser.
        method: as in `fisher`; `"exact"` where there is a closed form and `"jvp"` elsewhere by
            default.
        symmetrise: as in `fisher`.
        rank: as in `fisher`.
        key: as in `fisher`.

    Returns:
        An operator on arrays of shape (*dims,); a `DiagLowRank` with `rank`.

    Raises:
        ValueError: as `fisher`.

    References:
        Wang et al. 2025 (2505.23264); second-order Tweedie, Efron 2011.
    """
    if method is None:
        method = "exact" if isinstance(denoiser, exact.AbstractExact) else "jvp"
    _known("posterior_cov", denoiser, method, symmetrise, rank)
    x = floating(x)
    alpha, sigma = denoiser.process.alpha(t), denoiser.process.sigma(t)
    ratio = (sigma / alpha) ** 2
    if method in _LOW_RANK:
        inner = _low_rank(denoiser, t, x, cond, method, rank, key)
        return _affine(inner, 0.0, ratio, *inner.tags)
    if method == "exact":
        inner = _noise_covariance(denoiser, t, x)
        return _operator(_Scaled(inner, 0.0, ratio), x, lx.positive_semidefinite_tag)
    inner = _noise_jacobian(denoiser, t, x, cond, method, symmetrise)
    tags = (lx.symmetric_tag,) if symmetrise else ()
    return _operator(_Scaled(inner, ratio, -ratio * sigma), x, *tags)


def solve(
    operator: lx.AbstractLinearOperator,
    v: Float[ArrayLike, "*dims"],
    *,
    shift: ScalarLike = 0.0,
    solver: lx.AbstractLinearSolver | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    max_steps: int | None = None,
) -> Float[Array, "*dims"]:
    r"""Solve $(A + \delta I)\,s = v$ by products alone.

    Conjugate gradients where the operator is tagged positive semidefinite, GMRES elsewhere, one
    product per iteration; exactly, by the Woodbury formula, for a `DiagLowRank` (unless `solver` is
    given), where the tolerances do not count.

    Args:
        operator: $A$, on arrays of shape (*dims,).
        v: right-hand side, (*dims,).
        shift: $\delta$, not negative for a positive semidefinite operator.
        solver: a lineax solver instead of the default.
        rtol: relative tolerance of the default solver; 1e-6 in float64 and 1e-4 below by default.
        atol: absolute tolerance of the default solver, for $(A + \delta I)/q$ with
            $q = |(A + \delta I)v|/|v|$; `rtol` by default.
        max_steps: bound on the iterations; `10 d` by default.

    Returns:
        $s$, (*dims,); NaN where the solver failed, and so are its derivatives, since nothing may
        raise inside jit. Reverse-mode derivatives need a symmetric operator or one that can be
        transposed, as those of `"fd"` cannot.
    """
    is_operator("solve", operator)
    v = floating(v)
    if v.shape != operator.in_structure().shape:
        raise _check.bad("solve", "v", f"of shape {operator.in_structure().shape}", v.shape)
    if isinstance(operator, DiagLowRank) and solver is None:
        return woodbury(operator, v, shift)
    symmetric, tags = lx.is_symmetric(operator), _tags(operator)
    if solver is None:
        steps = 10 * v.size if max_steps is None else max_steps
        rtol = (1e-6 if jnp.finfo(v.dtype).bits > 32 else 1e-4) if rtol is None else rtol
        atol = rtol if atol is None else atol
        method = lx.CG if lx.is_positive_semidefinite(operator) else lx.GMRES
        solver = method(rtol=rtol, atol=atol, max_steps=steps)

    def run(product: Any, v: Array) -> Array:
        # In units of the operator: what lineax takes for a breakdown is not scale-free.
        unit = jnp.linalg.norm(product(v)) / jnp.linalg.norm(v)
        unit = jnp.where((unit > 0) & jnp.isfinite(unit), unit, 1).astype(v.dtype)
        scaled = _operator(_Scaled(product, 0.0, 1 / unit), v, *tags)
        out = lx.linear_solve(scaled, v / unit, solver, throw=False)
        return jnp.where(out.result == lx.RESULTS.successful, out.value, jnp.nan)

    # The derivatives that lineax itself would take raise where their own solves fail.
    shifted = _Scaled(operator.mv, shift, 1.0)
    back = run if symmetric or _transposes(shifted, v) else None
    return jax.lax.custom_linear_solve(shifted, v, run, back, symmetric=symmetric)


def _transposes(product: Any, v: Array) -> bool:
    """Say whether JAX can transpose a linear function; it cannot see that a difference is one."""
    try:
        jax.eval_shape(lambda v: jax.linear_transpose(product, v)(v), v)
    except Exception:
        return False
    return True


def _tags(operator: lx.AbstractLinearOperator) -> tuple[object, ...]:
    if lx.is_positive_semidefinite(operator):
        return (lx.positive_semidefinite_tag,)  # and stays so under a shift that is not negative
    return (lx.symmetric_tag,) if lx.is_symmetric(operator) else ()
