r"""One pass over a data set: log-density and posterior means of its Dirac mixture, in any pieces.

Notation: atoms $y_i$ with weights $p_i$, $w_i \propto p_i\,N(x; \alpha y_i, \sigma^2 I)$. A piece
of the data is summarised by its largest log-weight, its mass and its weighted means; two summaries
merge exactly, so chunks of a scan and shards of a mesh give one answer.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxdiff._types import Scalar, ScalarLike


class Moments(NamedTuple):
    """What a piece of the data knows of the posterior at one point.

    Attributes:
        top: largest log-weight of the piece, ().
        mass: sum of the weights divided by `exp(top)`, ().
        mean: weighted means of whatever was summarised, a pytree without the leading axis.
    """

    top: Scalar
    mass: Scalar
    mean: PyTree[Float[Array, "..."]]


def summarise(log_weights: Float[Array, " n"], values: PyTree[Float[Array, "n ..."]]) -> Moments:
    """Summarise one piece of the data; entries of weight `-inf` do not count."""
    top = jax.lax.stop_gradient(jnp.max(log_weights))  # the result does not depend on it
    weights = jnp.exp(log_weights - _finite(top))
    mass = jnp.sum(weights)
    shares = weights / jnp.where(mass > 0, mass, 1)
    mean = jax.tree.map(lambda v: jnp.einsum("n,n...->...", shares, v, precision="highest"), values)
    return Moments(top, mass, mean)


def merge(a: Moments, b: Moments) -> Moments:
    """Combine the summaries of two disjoint pieces; associative and commutative to round-off."""
    top = jnp.maximum(a.top, b.top)
    mass_a = a.mass * jnp.exp(a.top - _finite(top))
    mass_b = b.mass * jnp.exp(b.top - _finite(top))
    mass = mass_a + mass_b
    share = mass_b / jnp.where(mass > 0, mass, 1)
    return Moments(top, mass, jax.tree.map(lambda m, n: m + share * (n - m), a.mean, b.mean))


def _finite(top: Array) -> Array:
    return jnp.where(jnp.isfinite(top), top, 0)


def posterior(
    alpha: ScalarLike,
    sigma: ScalarLike,
    x: Float[Array, " d"],
    atoms: Float[Array, "chunks chunk d"],
    log_weights: Float[Array, "chunks chunk"],
) -> Moments:
    r"""Summarise a data set at one noisy sample, one chunk at a time.

    Squared distances are sums of squared differences, never $|x|^2 - 2\alpha x\cdot y + \dots$,
    and the noise has a mean of its own: in float32 either cancellation is fatal once it is divided
    by a small sigma.

    Args:
        alpha: signal scale, ().
        sigma: noise scale, ().
        x: noisy sample, (d,).
        atoms: the data in equal chunks, (chunks, chunk, d).
        log_weights: $\log p_i$, (chunks, chunk); `-inf` marks padding.

    Returns:
        The summary of all atoms, whose means are $m = \sum_i w_i y_i$ and
        $\hat\epsilon = \sum_i w_i(x - \alpha y_i)/\sigma$; `top + log(mass)` is
        $\log\sum_i p_i e^{-|x - \alpha y_i|^2/2\sigma^2}$. Memory is O(chunk d), whatever
        the number of atoms.
    """

    def piece(chunk: Array, log_p: Array) -> Moments:
        chunk, log_p = chunk.astype(x.dtype), log_p.astype(x.dtype)  # here: never all the data
        noise = (x[None] - alpha * chunk) / sigma
        return summarise(log_p - 0.5 * jnp.sum(noise**2, axis=-1), (chunk, noise))

    if len(atoms) == 1:
        return piece(atoms[0], log_weights[0])
    zero = jnp.zeros_like(x)
    nothing = Moments(jnp.full((), -jnp.inf, x.dtype), jnp.zeros((), x.dtype), (zero, zero))
    return jax.lax.scan(
        lambda total, rest: (merge(total, piece(*rest)), None), nothing, (atoms, log_weights)
    )[0]
