r"""The trace and the diagonal of an operator: exactly by unit vectors, or by random probes."""

from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PRNGKeyArray

from jaxdiff import _check
from jaxdiff._array import Scalar, time_dtype
from jaxdiff.linalg.diag_low_rank import DiagLowRank

__all__ = ["LAWS", "Probe", "deflate", "diagonal", "dot", "draw", "is_operator", "trace"]

Probe: TypeAlias = Literal["rademacher", "gaussian"]

LAWS = ("rademacher", "gaussian")
_CHUNK = 16  # products that `diagonal` carries at once


def draw(key: PRNGKeyArray, probes: int, shape: tuple[int, ...], dtype: Any, kind: Probe) -> Array:
    """Draw probes, (probes, *shape), each from a key of its own."""
    law = jax.random.rademacher if kind == "rademacher" else jax.random.normal
    return jax.vmap(lambda key: law(key, shape, dtype))(jax.random.split(key, probes))


def dot(a: Array, b: Array) -> Array:
    """Return inner products over all axes but the first, in float32 or wider."""
    wide = time_dtype(a.dtype)
    return jnp.sum(a.astype(wide) * b.astype(wide), axis=tuple(range(1, a.ndim)))


def deflate(product: Any, sketch: Array, probes: Array) -> tuple[Scalar, Array]:
    r"""Return $\mathrm{tr}\,Q^\top A Q$ and the values $g_i^\top P A P g_i$, $P = I - QQ^\top$.

    Their sum has the right mean for any $Q$ that is independent of the probes, hence also with $Q$
    held fixed under differentiation (the derivative of QR does not exist at low rank).
    """
    k, shape = len(sketch), sketch.shape[1:]
    many = lambda rows: jax.vmap(product)(rows.reshape(-1, *shape)).reshape(rows.shape)  # noqa: E731
    rows = jax.lax.stop_gradient(many(sketch.reshape(k, -1)))
    wide = time_dtype(rows.dtype)
    basis = jnp.linalg.qr(rows.T.astype(wide))[0].T
    g = probes.reshape(k, -1).astype(wide)
    g = g - jnp.matmul(jnp.matmul(g, basis.T, precision="highest"), basis, precision="highest")
    both = jnp.concatenate([basis, g])
    values = dot(both, many(both.astype(rows.dtype)))
    return jnp.sum(values[: len(basis)]), values[len(basis) :]


def is_operator(where: str, operator: Any) -> None:
    """Raise ValueError unless `operator` is a square lineax operator."""
    if not isinstance(operator, lx.AbstractLinearOperator):
        raise _check.bad(where, "operator", "a lineax linear operator", type(operator).__name__)
    if operator.in_structure() != operator.out_structure():
        raise _check.bad(where, "operator", "square", operator.out_structure().shape)


def diagonal(
    operator: lx.AbstractLinearOperator,
    key: PRNGKeyArray | None = None,
    *,
    probes: int | None = None,
) -> tuple[Float[Array, "*dims"], Float[Array, "*dims"]]:
    r"""Return the diagonal of an operator and its standard error, element by element.

    Without `probes` it is exact: d products with the unit vectors, or none for a `DiagLowRank`.
    With Rademacher probes it is unbiased,

    $$ \mathrm{diag}\,A = E[v \odot A v] \approx \frac1n\sum_{i=1}^n v_i \odot A v_i, $$

    with a variance of element $j$ of $\frac1n\sum_{k\ne j} A_{jk}^2$ for a symmetric operator.

    Args:
        operator: a square operator on arrays of any one shape.
        key: for the probes.
        probes: number of probes n, at least 2; None for the exact diagonal.

    Returns:
        The diagonal and the standard error of its estimate (0 if exact), both (*dims,).

    Raises:
        ValueError: if `probes` is given without `key`, or is less than 2.

    References:
        Bekas, Kokiopoulou, Saad 2007, "An estimator for the diagonal of a matrix".
    """
    is_operator("diagonal", operator)
    structure = operator.in_structure()
    shape, dtype, d = structure.shape, structure.dtype, structure.size
    if probes is None:
        if isinstance(operator, DiagLowRank):
            exactly = lx.diagonal(operator)
        else:

            def entry(i: Array) -> Array:
                unit = jnp.zeros(d, dtype).at[i].set(1)
                return operator.mv(unit.reshape(shape)).reshape(-1)[i]

            exactly = jax.lax.map(entry, jnp.arange(d), batch_size=min(_CHUNK, d))
        return exactly.reshape(shape), jnp.zeros(shape, exactly.dtype)
    _check.whole("diagonal", "probes", probes, 2)
    keys = jax.random.split(_check.key("diagonal", "key", key), probes)
    v = jax.vmap(lambda key: jax.random.rademacher(key, shape, dtype))(keys)
    values = (v * jax.vmap(operator.mv)(v)).astype(time_dtype(dtype))
    return jnp.mean(values, axis=0), jnp.std(values, axis=0, ddof=1) / jnp.sqrt(probes)


def trace(
    operator: lx.AbstractLinearOperator,
    key: PRNGKeyArray | None = None,
    *,
    probes: int | None = None,
    kind: Probe = "rademacher",
    method: Literal["hutchinson", "hutch++"] = "hutchinson",
) -> tuple[Scalar, Scalar]:
    r"""Return the trace of an operator and its standard error.

    Without `probes` it is exact: d products with the unit vectors, or none for a `DiagLowRank`.
    With n probes it is unbiased, by Hutchinson's estimate (n products) or by Hutch++ (3n products):

    $$ \mathrm{tr}\,A \approx \frac1n\sum_{i=1}^n v_i^\top A v_i, \qquad
       \mathrm{tr}\,A \approx \mathrm{tr}(Q^\top A Q) + \frac1n\sum_{i=1}^n v_i^\top P A P v_i $$

    with $Q = \mathrm{orth}(A S)$ and $P = I - QQ^\top$. Choose as in `Hutchinson` and `HutchPP` of
    `jaxdiff.fisher`: Rademacher, never Gaussian; Hutch++ where the rank of the operator is below n.
    The standard error is that of the mean of the n (projected) probes.

    Args:
        operator: a square operator on arrays of any one shape.
        key: for the probes.
        probes: number of probes, at least 2; None for the exact trace.
        kind: law of the probes.
        method: the estimate.

    Returns:
        The trace and the standard error of its estimate (0 if exact), both ().

    Raises:
        ValueError: if `probes` is given without `key`, or is less than 2, or if `kind` or `method`
            is unknown.

    References:
        Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix"; Meyer,
        Musco, Musco, Woodruff 2021 (2010.09649).
    """
    _check.choice("trace", "kind", kind, LAWS)
    _check.choice("trace", "method", method, ("hutchinson", "hutch++"))
    is_operator("trace", operator)
    structure = operator.in_structure()
    shape, dtype = structure.shape, structure.dtype
    if probes is None:
        exactly = jnp.sum(diagonal(operator)[0].astype(time_dtype(dtype)))
        return exactly, jnp.zeros((), exactly.dtype)
    _check.whole("trace", "probes", probes, 2)
    key = _check.key("trace", "key", key)
    if method == "hutchinson":
        v = draw(key, probes, shape, dtype, kind)
        inside, values = 0.0, dot(v, jax.vmap(operator.mv)(v))
    else:
        draws = draw(key, 2 * probes, shape, dtype, kind)
        inside, values = deflate(operator.mv, draws[:probes], draws[probes:])
    return inside + jnp.mean(values), jnp.std(values, ddof=1) / jnp.sqrt(probes)
