r"""What the spectrum of an operator says: determinant, top eigenpairs, ranks, local dimension.

Notation: $A$ is a symmetric operator on arrays of d elements, such as $R$, $C$ or $F$ of
`jaxdiff.fisher.operators`; `Q, T` are its Lanczos vectors and tridiagonal matrix. Everything here
is products with $A$; a `DiagLowRank` needs none.

| quantity | cost in products | error |
|---|---|---|
| `logdet` | `probes * (order + 1)` | statistical, returned; falls exponentially in `order` |
| `eigsh` | `steps + k` | residual norms, returned |
| `effective_rank` | d, or `probes` | statistical, returned |
| `intrinsic_dimension` | one trace | that of the estimator |
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from jaxdiff import _check
from jaxdiff._linalg import eigh
from jaxdiff._types import Cond, Scalar, ScalarLike, time_dtype
from jaxdiff.fisher.lowrank import DiagLowRank, determinant, ritz, symmetric, tridiagonalise
from jaxdiff.fisher.trace import AbstractTrace, ExactTrace
from jaxdiff.process import gaussian_only
from jaxdiff.score import AbstractDenoiser


def logdet(
    operator: lx.AbstractLinearOperator,
    key: PRNGKeyArray | None = None,
    *,
    probes: int = 16,
    order: int | None = None,
    shift: ScalarLike = 0.0,
) -> tuple[Scalar, Scalar]:
    r"""Return $\log\det(A + \delta I)$ and its standard error by stochastic Lanczos quadrature.

    $$ \log\det B = \mathrm{tr}\log B \approx \frac1n\sum_{i=1}^n v_i^\top \log(B)\,v_i, \qquad
       v^\top\log(B)\,v \approx |v|^2\,e_1^\top\log(T)\,e_1 $$

    with Rademacher $v$ and $T$ from `order` Lanczos steps started at $v$; the quadrature error
    falls off exponentially in `order`, at a rate set by the condition number. For a `DiagLowRank`
    it is exact, with no key.

    Its derivative is an estimate of the same quality of
    $d\log\det B = \mathrm{tr}\,B^{-1}\,dB$, namely the mean of $(B^{-1}v)^\top dB\,v$ with
    $B^{-1}v = |v|\,Q^\top T^{-1} e_1$: one more product per probe, and no derivative of the
    iteration, which fails where eigenvalues repeat.

    Args:
        operator: $A$, tagged symmetric, with $A + \delta I$ positive definite.
        key: for the probes.
        probes: n, at least 2.
        order: steps per probe, at most d; `min(d, 20)` by default.
        shift: $\delta$, ().

    Returns:
        The log-determinant and the standard error of its estimate (0 if exact), both (); NaN where
        $A + \delta I$ is seen to be not positive definite.

    Raises:
        ValueError: if `operator` is not tagged symmetric, or `probes` or `order` is out of range,
            or `key` is missing.

    References:
        Ubaru, Chen, Saad 2017, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature";
        Gardner et al. 2018 (1809.11165) for the derivative.
    """
    structure = symmetric("logdet", operator)
    d, dtype = structure.size, time_dtype(structure.dtype)
    if isinstance(operator, DiagLowRank):
        return determinant(operator, shift), jnp.zeros((), dtype)
    _check.whole("logdet", "probes", probes, 2)
    steps = min(d, 20) if order is None else order
    _check.whole("logdet", "order", steps, 1)
    if steps > d:
        raise _check.bad("logdet", "order", f"at most the dimension {d}", steps)
    keys = jax.random.split(_check.key("logdet", "key", key), probes)
    constant = _hold(operator)
    delta = jnp.asarray(shift, dtype)

    def one(key: PRNGKeyArray) -> Array:
        v = jax.random.rademacher(key, (d,), dtype)
        rows, t = tridiagonalise(constant, v, steps)
        values, vectors = eigh(t)
        values, first = values + jax.lax.stop_gradient(delta), vectors[0]
        quadratic = d * jnp.sum(first**2 * jnp.log(values))
        # s = B^-1 v, a constant; s . B v - its value adds the derivative and no value
        inverse = jnp.matmul(vectors, first / values, precision="highest")
        s = jax.lax.stop_gradient(d**0.5 * jnp.matmul(inverse, rows, precision="highest"))
        image = operator.mv(v.reshape(structure.shape).astype(structure.dtype))
        slope = jnp.sum(s * (image.reshape(-1).astype(dtype) + delta * v))
        return jax.lax.stop_gradient(quadratic) + slope - jax.lax.stop_gradient(slope)

    estimates = jax.vmap(one)(keys)
    return jnp.mean(estimates), jnp.std(estimates, ddof=1) / jnp.sqrt(probes)


def _hold(operator: lx.AbstractLinearOperator) -> Any:
    """Return the operator as a constant for differentiation."""
    return jax.tree.map(
        lambda a: jax.lax.stop_gradient(a) if eqx.is_inexact_array(a) else a, operator
    )


class Eigenpairs(NamedTuple):
    r"""The largest eigenvalues of an operator, as far as the iteration has found them.

    Attributes:
        values: $\lambda_i$, descending, (k,).
        vectors: $u_i$, orthonormal, (k, *dims).
        residuals: $|A u_i - \lambda_i u_i|$, (k,); each bounds the distance of $\lambda_i$ to an
            eigenvalue.
    """

    values: Float[Array, " k"]
    vectors: Float[Array, "k *dims"]
    residuals: Float[Array, " k"]


def eigsh(
    operator: lx.AbstractLinearOperator,
    k: int,
    *,
    key: PRNGKeyArray | None = None,
    steps: int | None = None,
) -> Eigenpairs:
    r"""Return the `k` algebraically largest eigenpairs of a symmetric operator, by Lanczos.

    Read `residuals` for convergence, and take more `steps` if they are too large; the error of an
    isolated eigenvalue is of order its residual squared. The values are Rayleigh quotients
    $u^\top A u$ with $u$ held constant, so that derivatives of simple eigenvalues are right
    ($d\lambda = u^\top dA\,u$); vectors and residuals have no derivative.

    Cost: `steps + k` products; memory O(steps d).

    Args:
        operator: $A$, tagged symmetric.
        k: number of pairs, at most `steps`.
        key: for the random start (see `lowrank.lanczos` for why it is random); a fixed one by
            default.
        steps: Lanczos steps, at most d; `min(d, max(2 k, 20))` by default.

    Raises:
        ValueError: if `operator` is not tagged symmetric, or `k` or `steps` is out of range.

    References:
        Lanczos 1950; Saad 2011, "Numerical Methods for Large Eigenvalue Problems", chapter 6.
    """
    structure = symmetric("eigsh", operator)
    _check.whole("eigsh", "k", k, 1)
    count = min(structure.size, max(2 * k, 20)) if steps is None else steps
    _check.whole("eigsh", "steps", count, 1)
    if count > structure.size:
        raise _check.bad("eigsh", "steps", f"at most the dimension {structure.size}", count)
    if k > count:
        raise _check.bad("eigsh", "k", f"at most {count}, the number of steps", k)
    _, rows = ritz("eigsh", _hold(operator), count, key)
    rows = rows[::-1][:k]
    vectors = rows.reshape(k, *structure.shape)
    images = jax.lax.map(operator.mv, vectors.astype(structure.dtype))
    images = images.reshape(k, -1).astype(rows.dtype)
    values = jnp.sum(rows * images, axis=1)
    off = jax.lax.stop_gradient(images - values[:, None] * rows)
    return Eigenpairs(values, vectors, jnp.linalg.norm(off, axis=1))


def effective_rank(
    operator: lx.AbstractLinearOperator,
    key: PRNGKeyArray | None = None,
    *,
    probes: int | None = None,
) -> tuple[Scalar, Scalar]:
    r"""Return the participation ratio of a positive semidefinite operator and its standard error.

    $$ \mathrm{rank}_{eff}\,A = \frac{(\mathrm{tr}\,A)^2}{\mathrm{tr}\,A^2} $$

    It is k for a projection on k directions, and between 1 and the rank always. With
    $p_i = \lambda_i/\mathrm{tr}\,A$ it is $1/\sum_i p_i^2$, a lower bound of the entropy version
    $e^{-\sum_i p_i\log p_i}$ of Roy and Vetterli, which needs the whole spectrum where this needs
    two traces.

    Cost: d products, or `probes`; none for a `DiagLowRank`. With probes it is the ratio of two
    estimates from the same products, $v\cdot A v$ and $|A v|^2$, with a bias of order 1/probes and
    the standard error to first order.

    Args:
        operator: $A$, tagged symmetric.
        key: for the probes.
        probes: number of Rademacher probes, at least 2; None for the exact traces.

    Returns:
        The effective rank and its standard error (0 if exact), both ().

    Raises:
        ValueError: if `operator` is not tagged symmetric, or `probes` is given without `key` or is
            less than 2.

    References:
        Roy, Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    structure = symmetric("effective_rank", operator)
    d, dtype = structure.size, time_dtype(structure.dtype)
    if probes is None and isinstance(operator, DiagLowRank):
        gram = jnp.matmul(operator.rows, operator.rows.T, precision="highest")
        s, w, size = operator.shift, operator.weights, jnp.diag(gram)
        first = d * s + jnp.sum(w * size)
        second = d * s**2 + 2 * s * jnp.sum(w * size) + jnp.sum(jnp.outer(w, w) * gram**2)
        return first**2 / second, jnp.zeros((), dtype)

    def moments(v: Array) -> tuple[Array, Array]:
        image = operator.mv(v.reshape(structure.shape).astype(structure.dtype))
        image = image.reshape(-1).astype(dtype)
        return jnp.sum(v * image), jnp.sum(image**2)

    if probes is None:
        unit = lambda i: jnp.zeros(d, dtype).at[i].set(1)  # noqa: E731
        a, b = jax.lax.map(lambda i: moments(unit(i)), jnp.arange(d))
        return jnp.sum(a) ** 2 / jnp.sum(b), jnp.zeros((), dtype)
    _check.whole("effective_rank", "probes", probes, 2)
    keys = jax.random.split(_check.key("effective_rank", "key", key), probes)
    a, b = jax.vmap(lambda key: moments(jax.random.rademacher(key, (d,), dtype)))(keys)
    ratio = jnp.mean(a) / jnp.mean(b)
    linear = 2 * ratio * a - ratio**2 * b  # the ratio to first order, probe by probe
    return jnp.mean(a) * ratio, jnp.std(linear, ddof=1) / jnp.sqrt(probes)


def intrinsic_dimension(
    denoiser: AbstractDenoiser,
    t: ScalarLike,
    x: Float[ArrayLike, "*dims"],
    cond: Cond = None,
    *,
    estimator: AbstractTrace | None = None,
    key: PRNGKeyArray | None = None,
) -> Scalar:
    r"""Return the local dimension of the data as the denoiser sees it near a noisy sample.

    $$ r = \mathrm{tr}\,Cov[\epsilon | x_t = x] = d - \sigma^2\,\mathrm{tr}\,F $$

    Directions in which the data have a density on the scale $\sigma/\alpha$ count 1, directions in
    which they do not extend count 0. It tends to the dimension of the data as $\sigma/\alpha$
    falls below the scale on which the set is curved or ends, and for data that are points, further
    down, to 0. Average over draws of $x_t$ around one $x_0$, or over data: one value varies,
    because $r$ is an expectation of the noise error at one state.

    Cost: one trace.

    Args:
        denoiser: the denoiser.
        t: time with small sigma / alpha > 0, ().
        x: noisy sample, (*dims,).
        cond: condition passed to the denoiser.
        estimator: of the trace; `ExactTrace()` by default.
        key: for an estimator that draws probes.

    References:
        Wang et al. 2025 (2505.23264) for the trace; Kamkari et al. 2024 (2406.03537) for the
        related estimate from the clean sample.
    """
    estimator = ExactTrace() if estimator is None else estimator
    for name, value, kind in (
        ("denoiser", denoiser, AbstractDenoiser),
        ("estimator", estimator, AbstractTrace),
    ):
        if not isinstance(value, kind):
            raise _check.bad("intrinsic_dimension", name, f"an {kind.__name__}", repr(value))
    gaussian_only("intrinsic_dimension", "the process of the denoiser", denoiser.process)
    return jnp.mean(estimator(denoiser, t, x, cond, key)[2])
