r"""Low-rank forms of the posterior covariance: `A v = shift v + sum_i weights_i U_i (U_i . v)`.

Notation: $R = Cov[\epsilon | x_t = x] = (\alpha/\sigma)^2\,C$ and $F = (I - R)/\sigma^2$. Where the
posterior sits on a few atoms, or stretches in a few directions, a short sum of outer products is
all of $R$. It is built once; products, diagonals, determinants and solves are then vector
operations, exact to round-off:

$$ (c I + U^\top W U)^{-1} v = \frac1c\left[v - U^\top W (c I + U U^\top W)^{-1} U v\right] $$

Two ways to the factors: the atoms nearest to $x$, with a bound on what is left out
(`neighbours`), and the directions found by the Lanczos iteration (`lanczos`).
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray

from jaxdiff import _check, exact
from jaxdiff._array import Scalar, ScalarLike, time_dtype
from jaxdiff._keys import INIT, PROBES, stream
from jaxdiff._numerics import eigh
from jaxdiff.score import floating
from jaxdiff.streaming import widen


class DiagLowRank(lx.AbstractLinearOperator):
    r"""The symmetric operator $A = s I + \sum_i w_i U_i U_i^\top$ on arrays of any one shape.

    Cost of a product: O(k d). The factors need not be orthogonal, nor the weights positive.

    Attributes:
        shift: $s$, ().
        factors: $U_i$, (k, *dims).
        weights: $w_i$, (k,).
        tags: lineax tags beyond symmetry, which always holds, such as
            `lineax.positive_semidefinite_tag`.
    """

    shift: Float[Array, ""]
    factors: Float[Array, "k *dims"]
    weights: Float[Array, " k"]
    tags: frozenset[object] = eqx.field(static=True, default=frozenset())

    @property
    def rows(self) -> Float[Array, "k d"]:
        """The factors as rows."""
        return self.factors.reshape(len(self.factors), self.in_size())

    def mv(self, vector: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
        """Return the product with `vector`, (*dims,), in its dtype."""
        v = vector.reshape(-1).astype(self.factors.dtype)
        along = self.weights * jnp.matmul(self.rows, v, precision="highest")
        out = self.shift * v + jnp.matmul(along, self.rows, precision="highest")
        return out.reshape(vector.shape).astype(vector.dtype)

    def as_matrix(self) -> Float[Array, "d d"]:
        """Return the dense matrix, (d, d)."""
        weighted = self.weights[:, None] * self.rows
        eye = jnp.eye(self.in_size(), dtype=self.factors.dtype)
        return self.shift * eye + jnp.matmul(self.rows.T, weighted, precision="highest")

    def transpose(self) -> "DiagLowRank":
        """Return the operator itself."""
        return self

    def in_structure(self) -> jax.ShapeDtypeStruct:
        """Return shape and dtype of the arrays that it acts on."""
        return jax.ShapeDtypeStruct(self.factors.shape[1:], self.factors.dtype)

    def out_structure(self) -> jax.ShapeDtypeStruct:
        """Return shape and dtype of its products."""
        return self.in_structure()


# What lineax asks of an operator. It is explicit already, so nothing is left to materialise.
for _ask in (lx.linearise, lx.materialise, lx.conj):
    _ask.register(DiagLowRank)(lambda operator: operator)
for _ask in (
    lx.is_diagonal,
    lx.is_tridiagonal,
    lx.is_lower_triangular,
    lx.is_upper_triangular,
    lx.has_unit_diagonal,
):
    _ask.register(DiagLowRank)(lambda operator: False)
lx.is_symmetric.register(DiagLowRank)(lambda operator: True)


@lx.is_positive_semidefinite.register(DiagLowRank)
def _(operator: Any) -> bool:
    return lx.positive_semidefinite_tag in operator.tags


@lx.is_negative_semidefinite.register(DiagLowRank)
def _(operator: Any) -> bool:
    return lx.negative_semidefinite_tag in operator.tags


@lx.diagonal.register(DiagLowRank)
def _(operator: Any) -> Array:
    return operator.shift + jnp.matmul(operator.weights, operator.rows**2, precision="highest")


@lx.tridiagonal.register(DiagLowRank)
def _(operator: Any) -> tuple[Array, Array, Array]:
    u, w = operator.rows, operator.weights
    beside = jnp.matmul(w, u[:, 1:] * u[:, :-1], precision="highest")
    return lx.diagonal(operator), beside, beside


def _core(operator: DiagLowRank, c: Array) -> Array:
    """Return the small matrix `c I + U U^T W`, (k, k)."""
    gram = jnp.matmul(operator.rows, operator.rows.T, precision="highest")
    return c * jnp.eye(len(gram), dtype=gram.dtype) + gram * operator.weights[None]


def woodbury(
    operator: DiagLowRank, v: Float[Array, "*dims"], shift: ScalarLike = 0.0
) -> Float[Array, "*dims"]:
    r"""Solve $(A + \delta I)\,s = v$ exactly, by the formula of the module's head.

    Cost: O(k^2 d + k^3), or O(k d^2 + d^3) with more factors than dimensions.

    Args:
        operator: $A$, on arrays of shape (*dims,).
        v: right-hand side, (*dims,).
        shift: $\delta$, ().

    Returns:
        $s$, (*dims,); not finite where $A + \delta I$ is singular.

    References:
        Woodbury 1950, "Inverting modified matrices".
    """
    flat = v.reshape(-1).astype(operator.factors.dtype)
    c = (operator.shift + shift).astype(flat.dtype)
    if len(operator.factors) >= flat.size:  # the dense system is the smaller one
        dense = operator.as_matrix() + jnp.asarray(shift, flat.dtype) * jnp.eye(
            flat.size, dtype=flat.dtype
        )
        return jnp.linalg.solve(dense, flat).reshape(v.shape).astype(v.dtype)
    along = jnp.matmul(operator.rows, flat, precision="highest")
    inner = operator.weights * jnp.linalg.solve(_core(operator, c), along)
    s = (flat - jnp.matmul(inner, operator.rows, precision="highest")) / c
    return s.reshape(v.shape).astype(v.dtype)


def determinant(operator: DiagLowRank, shift: ScalarLike = 0.0) -> Scalar:
    r"""Return $\log\det(A + \delta I)$ exactly, NaN where the determinant is not positive.

    $$ \log\det(c I + U^\top W U) = (d - k)\log c + \log\det(c I + U U^\top W) $$

    Cost: as `woodbury`.

    Args:
        operator: $A$.
        shift: $\delta$, ().
    """
    d, k, dtype = operator.in_size(), len(operator.factors), operator.factors.dtype
    if k >= d:
        delta = jnp.asarray(shift, dtype)
        sign, value = jnp.linalg.slogdet(operator.as_matrix() + delta * jnp.eye(d, dtype=dtype))
        return jnp.where(sign > 0, value, jnp.nan)
    c = (operator.shift + shift).astype(dtype)
    sign, value = jnp.linalg.slogdet(_core(operator, c))
    return jnp.where(sign > 0, value, jnp.nan) + (d - k) * jnp.log(c)


# --- The nearest atoms. --------------------------------------------------------------------------


class Neighbours(NamedTuple):
    r"""The posterior of a data set on its heaviest atoms.

    Attributes:
        covariance: $R_{in}$, the covariance of the noise on the kept atoms, of rank at most k - 1.
        dropped: posterior mass $p$ of the other atoms, ().
        bound: upper bound on $|R - R_{in}|_2$, ().
    """

    covariance: DiagLowRank
    dropped: Scalar
    bound: Scalar


def _query(where: str, denoiser: Any, t: Any, x: Any) -> Any:
    """Return `(atoms, log_p) -> (log-weights (n,), noise (n, d))`, or raise ValueError."""
    if not isinstance(denoiser, exact.Empirical):
        raise _check.bad(where, "denoiser", "exact.empirical(...)", type(denoiser).__name__)
    x = floating(x)
    if x.shape != denoiser.shape:
        raise _check.bad(where, "x", f"of shape {denoiser.shape}", x.shape)
    x = x.astype(time_dtype(x.dtype))
    t = jnp.asarray(t, x.dtype)
    alpha, sigma = denoiser.process.alpha(t), denoiser.process.sigma(t)
    flat = x.reshape(-1) - alpha * denoiser.centre.astype(x.dtype)

    def weigh(atoms: Array, log_p: Array) -> tuple[Array, Array]:
        noise = (flat[None] - alpha * widen(atoms, x.dtype)) / sigma
        return log_p.astype(x.dtype) - 0.5 * jnp.sum(noise**2, axis=-1), noise

    return weigh


def _pieces(denoiser: exact.Empirical) -> tuple[Array, Array, Array]:
    """Return the chunks to scan over: indices of their atoms, atoms, log-weights."""
    chunks, chunk, _ = denoiser.atoms.shape
    indices = jnp.arange(chunks * chunk).reshape(chunks, chunk)
    return indices, denoiser.atoms, denoiser.log_weights


def _heaviest(denoiser: exact.Empirical, weigh: Any, k: int) -> Int[Array, " k"]:
    """Return the indices of the `k` largest log-weights, keeping a running list of `k`."""

    def keep(best: tuple[Array, Array], piece: Any) -> tuple[tuple[Array, Array], None]:
        indices, atoms, log_p = piece
        # the placeholders of the start come last, so that at -inf they lose to real entries
        values = jnp.concatenate([weigh(atoms, log_p)[0], best[0]])
        top, which = jax.lax.top_k(values, k)
        return (top, jnp.concatenate([indices, best[1]])[which]), None

    pieces = _pieces(denoiser)
    dtype = jax.eval_shape(weigh, denoiser.atoms[0], denoiser.log_weights[0])[0].dtype
    nothing = (jnp.full(k, -jnp.inf, dtype), jnp.full(k, -1, pieces[0].dtype))
    return jax.lax.scan(keep, nothing, pieces)[0][1]


def neighbours(
    denoiser: exact.Empirical, t: ScalarLike, x: Float[ArrayLike, "*dims"], *, rank: int
) -> Neighbours:
    r"""Return the noise covariance of a data set on its `rank` heaviest atoms, and a bound.

    With $\delta_i = (x - \alpha y_i)/\sigma - \hat\epsilon_{in}$ and the weights renormalised over
    the kept atoms, $R_{in} = \sum_{i\in in} w_i\delta_i\delta_i^\top$. If the others have mass $p$,
    covariance $R_{out}$ and a mean at $D$ from that of the kept,

    $$ R = (1 - p) R_{in} + p R_{out} + p (1 - p) D D^\top, \qquad
       S = R_{out} + D D^\top = \frac1p\sum_{i\in out} w_i\,\delta_i\delta_i^\top, $$

    so $-p R_{in} \preceq R - R_{in} \preceq p S$ and therefore

    $$ |R - R_{in}|_2 \le \max\left(p\,\mathrm{tr} R_{in},\;
       \sum_{i\in out} w_i|\delta_i|^2\right). $$

    Both sums run over the atoms themselves: nothing is got by subtraction, so that $p$ and the
    bound are right however small. Choose `rank` from `effective_sample_size`.

    Cost: two streamed passes over the data; memory O((chunk + rank) d). The choice of the atoms is
    a constant for differentiation, all else is differentiable.

    Args:
        denoiser: built by `jaxdiff.exact.empirical`.
        t: time with sigma > 0, ().
        x: where, (*dims,).
        rank: how many atoms to keep, at most as many as there are in whole chunks; those without
            weight, such as padding, change nothing.

    Returns:
        `Neighbours`: the operator (float32 or wider), the dropped mass and the bound, in units of
        the noise; multiplied by $(\sigma/\alpha)^2$ they are those of $C$.

    Raises:
        ValueError: if `denoiser` is not a data set, or `rank` or `x` does not fit it.

    References:
        Wang et al. 2025 (2505.23264), the outer-product form.
    """
    _check.whole("neighbours", "rank", rank, 1)
    weigh = _query("neighbours", denoiser, t, x)
    chunks, chunk, d = denoiser.atoms.shape
    if rank > chunks * chunk:
        raise _check.bad("neighbours", "rank", "at most the number of atoms", rank)
    kept = jax.lax.stop_gradient(_heaviest(denoiser, weigh, rank))
    log_p = denoiser.log_weights.reshape(-1)[kept]
    log_w, noise = weigh(denoiser.atoms.reshape(-1, d)[kept], log_p)
    top = jax.lax.stop_gradient(jnp.max(log_w))  # the largest of all
    inside = jnp.exp(log_w - top)
    w = inside / jnp.sum(inside)
    mean = jnp.matmul(w, noise, precision="highest")
    delta = noise - mean[None]

    def rest(total: tuple[Array, Array], piece: Any) -> tuple[tuple[Array, Array], None]:
        indices, *chunk = piece
        log_w, noise = weigh(*chunk)
        outside = jnp.where(jnp.isin(indices, kept), 0, jnp.exp(log_w - top))
        square = jnp.sum((noise - mean[None]) ** 2, axis=-1)
        return (total[0] + jnp.sum(outside), total[1] + jnp.sum(outside * square)), None

    zero = jnp.zeros((), noise.dtype)
    mass, spread = jax.lax.scan(rest, (zero, zero), _pieces(denoiser))[0]
    total = mass + jnp.sum(inside)
    dropped = mass / total
    bound = jnp.maximum(dropped * jnp.sum(w[:, None] * delta**2), spread / total)
    factors = delta.reshape(rank, *denoiser.shape)
    tags = frozenset({lx.positive_semidefinite_tag})
    return Neighbours(DiagLowRank(zero, factors, w, tags), dropped, bound)


def effective_sample_size(
    denoiser: exact.Empirical, t: ScalarLike, x: Float[ArrayLike, "*dims"]
) -> Scalar:
    r"""Return $1/\sum_i w_i^2$, the number of atoms that the posterior of a data set sits on.

    Between 1 and N. A few times as many `neighbours` hold nearly all of the mass.

    Cost: one streamed pass over the data; memory O(chunk d).

    Args:
        denoiser: built by `jaxdiff.exact.empirical`.
        t: time with sigma > 0, ().
        x: where, (*dims,).

    Raises:
        ValueError: if `denoiser` is not a data set, or `x` does not fit it.

    References:
        Kong 1992, "A note on importance sampling using standardized weights".
    """
    weigh = _query("effective_sample_size", denoiser, t, x)

    def add(total: tuple[Array, Array, Array], piece: Any) -> Any:
        top, mass, squares = total
        log_w = weigh(*piece)[0]
        # the result does not depend on it; finite, for chunks in which no atom has weight
        new = jax.lax.stop_gradient(jnp.maximum(top, jnp.max(log_w)))
        w, shrink = jnp.exp(log_w - new), jnp.exp(top - new)
        return (new, shrink * mass + jnp.sum(w), shrink**2 * squares + jnp.sum(w**2)), None

    dtype = jax.eval_shape(weigh, denoiser.atoms[0], denoiser.log_weights[0])[0].dtype
    zero, lowest = jnp.zeros((), dtype), jnp.full((), jnp.finfo(dtype).min, dtype)
    pieces = (denoiser.atoms, denoiser.log_weights)
    _, mass, squares = jax.lax.scan(add, (lowest, zero, zero), pieces)[0]
    return mass**2 / squares


# --- The Lanczos iteration. ----------------------------------------------------------------------


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
