r"""A multiple of the identity and a few outer products: $A = s I + \sum_i w_i U_i U_i^\top$.

It is built once; products, diagonals, determinants and solves are then vector operations, exact to
round-off:

$$ (c I + U^\top W U)^{-1} v = \frac1c\left[v - U^\top W (c I + U U^\top W)^{-1} U v\right] $$
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float

from jaxdiff._array import Scalar, ScalarLike

__all__ = ["DiagLowRank", "determinant", "woodbury"]


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
