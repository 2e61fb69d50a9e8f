r"""What the spectrum of an operator says: low rank, determinant, top eigenpairs, effective rank.

Notation: $A$ is a symmetric operator on arrays of d elements, such as $R$, $C$ or $F$ of
`jaxdiff.fisher.operators`; `Q, T` are its Lanczos vectors and tridiagonal matrix. Everything here
is products with $A$; a `DiagLowRank` needs none.

| quantity | cost in products | error |
|---|---|---|
| `lanczos` | `rank` | none once `rank` exceeds the rank of $A$ |
| `logdet` | `probes * (order + 1)` | statistical, returned; falls exponentially in `order` |
| `eigsh` | `steps + k` | residual norms, returned |
| `effective_rank` | d, or `probes` | statistical, returned |
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PRNGKeyArray

from jaxdiff import _check
from jaxdiff._array import Scalar, ScalarLike, time_dtype
from jaxdiff._keys import INIT, PROBES, stream
from jaxdiff._numerics import eigh
from jaxdiff.linalg.diag_low_rank import DiagLowRank, determinant

__all__ = [
    "Eigenpairs",
    "effective_rank",
    "eigsh",
    "lanczos",
    "logdet",
    "ritz",
    "symmetric",
    "tridiagonalise",
]


def tridiagonalise(
    operator: lx.AbstractLinearOperator, v: Float[Array, " d"], steps: int
) -> tuple[Float[Array, "steps d"], Float[Array, "steps steps"]]:
    r"""Return orthonormal rows $Q$, the first along `v`, and tridiagonal $T = Q A Q^\top$.

    The Lanczos iteration with full reorthogonalisation: `steps` products and O(steps^2 d) vector
    work. Where it ends early, because the rows so far span an invariant subspace (for $A = c I$ or
    $A = 0$ after one step), it goes on with a new direction and a zero in $T$ instead of dividing
    by zero; $T$ stays exact, and repeated eigenvalues are found as often as they occur.

    Args:
        operator: $A$, symmetric, on arrays of d elements.
        v: start, (d,), not zero.
        steps: number of products, at most d.

    References:
        Lanczos 1950; Golub, van Loan, "Matrix Computations", 4th ed., section 10.3.
    """
    structure = operator.in_structure()
    tiny = 100 * jnp.finfo(v.dtype).eps  # less than this, relative to |A|, is round-off

    def product(q: Array) -> Array:
        full = operator.mv(q.reshape(structure.shape).astype(structure.dtype))
        return full.reshape(-1).astype(v.dtype)

    def orthogonal(w: Array, rows: Array) -> Array:
        along = jnp.matmul(rows, w, precision="highest")
        return w - jnp.matmul(along, rows, precision="highest")

    def step(carry: tuple[Array, ...], i: Array) -> tuple[tuple[Array, ...], tuple[Array, Array]]:
        rows, w, scale = carry
        q = w / jnp.linalg.norm(w)
        rows = rows.at[i].set(q)
        image = product(q)
        scale = jnp.maximum(scale, jax.lax.stop_gradient(jnp.sqrt(jnp.sum(image**2))))
        w = orthogonal(orthogonal(image, rows), rows)
        goes_on = jax.lax.stop_gradient(jnp.sqrt(jnp.sum(w**2))) > tiny * scale
        fresh = jax.random.normal(stream(jax.random.key(PROBES), i), w.shape, w.dtype)
        w = jnp.where(goes_on, w, fresh)
        beta = jnp.where(goes_on, jnp.linalg.norm(w), 0)
        alpha = jnp.sum(q * image)
        return (rows, orthogonal(w, rows), scale), (alpha, beta)

    zero = jnp.zeros((), v.dtype)
    start = (jnp.zeros((steps, v.size), v.dtype), v, zero)
    (rows, *_), (alphas, betas) = jax.lax.scan(step, start, jnp.arange(steps))
    beside = jnp.diag(betas[:-1], 1)
    return rows, jnp.diag(alphas) + beside + beside.T


def symmetric(where: str, operator: Any) -> jax.ShapeDtypeStruct:
    """Return the structure of a symmetric operator, or raise ValueError if it is not one."""
    if not isinstance(operator, lx.AbstractLinearOperator) or not lx.is_symmetric(operator):
        expected = "tagged symmetric (method='exact' or symmetrise=True)"
        raise _check.bad(where, "operator", expected, type(operator).__name__)
    return operator.in_structure()


def ritz(
    where: str, operator: lx.AbstractLinearOperator, steps: int, key: PRNGKeyArray | None
) -> tuple[Float[Array, " steps"], Float[Array, "steps d"]]:
    """Return Ritz values in ascending order and their orthonormal vectors as rows."""
    structure = operator.in_structure()
    key = jax.random.key(INIT) if key is None else _check.key(where, "key", key)
    v = jax.random.normal(key, (structure.size,), time_dtype(structure.dtype))
    rows, t = tridiagonalise(operator, v, steps)
    values, vectors = eigh(t)
    return values, jnp.matmul(vectors.T, rows, precision="highest")


def lanczos(
    operator: lx.AbstractLinearOperator, rank: int, *, key: PRNGKeyArray | None = None
) -> DiagLowRank:
    r"""Return the approximation $\sum_i \theta_i u_i u_i^\top$ by `rank` Lanczos products.

    The Ritz pairs $(\theta_i, u_i)$ of the Krylov space of a random vector: extreme eigenvalues
    converge first, so this suits operators with a few large eigenvalues, as $R$ has where the data
    lie near a low-dimensional set. Exact once `rank` exceeds the number of directions on which
    the operator does not vanish.

    The start is random on purpose, from a fixed key by default. A vector made of the state, such
    as the noise prediction, is left unchanged by every symmetry that leaves `x` unchanged; so is
    then all of its Krylov space, and directions that break the symmetry (between two modes that
    mirror each other, say) would never be seen. A normal vector has a part along each eigenvector
    with probability one.

    Derivatives pass through the iteration and exist where the Ritz values are distinct.

    Args:
        operator: a symmetric operator.
        rank: number of products, at most the dimension d.
        key: for the start; a fixed one by default.

    Returns:
        An operator with zero shift and orthonormal factors, tagged positive semidefinite if
        `operator` is.

    Raises:
        ValueError: if `operator` is not tagged symmetric, or `rank` is not in [1, d].

    References:
        Lanczos 1950; Saad 2011, "Numerical Methods for Large Eigenvalue Problems", chapter 6.
    """
    _check.whole("lanczos", "rank", rank, 1)
    d = symmetric("lanczos", operator).size
    if rank > d:
        raise _check.bad("lanczos", "rank", f"at most the dimension {d}", rank)
    values, rows = ritz("lanczos", operator, rank, key)
    tags = frozenset[object]()
    if lx.is_positive_semidefinite(operator):
        values = jnp.maximum(values, 0)  # what is below zero is round-off
        tags = frozenset({lx.positive_semidefinite_tag})
    factors = rows.reshape(rank, *operator.in_structure().shape)
    return DiagLowRank(jnp.zeros((), rows.dtype), factors, values, tags)


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
        key: for the random start (see `lanczos` for why it is random); a fixed one by
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
