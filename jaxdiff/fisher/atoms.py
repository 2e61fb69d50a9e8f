r"""The posterior of a data set on its heaviest atoms: how many count, and what they hold.

Notation: $R = Cov[\epsilon | x_t = x] = (\alpha/\sigma)^2\,C$ and $F = (I - R)/\sigma^2$. Where the
posterior sits on a few atoms, a short sum of outer products is all of $R$ but for a part that
`neighbours` bounds.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, ArrayLike, Float, Int

from jaxdiff import _check, exact
from jaxdiff._array import Scalar, ScalarLike, time_dtype
from jaxdiff.linalg.diag_low_rank import DiagLowRank
from jaxdiff.score import floating
from jaxdiff.streaming import widen

__all__ = ["Neighbours", "effective_sample_size", "neighbours"]


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
