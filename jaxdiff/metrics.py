"""What a sampler is judged by: distances between sets of samples."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

from jaxdiff import _check
from jaxdiff._array import Scalar

__all__ = ["energy_distance", "nearest_distance"]


def _reduce_distances(x: Array, y: Array, reduce: Callable[[Array], Array]) -> Array:
    """Apply a reduction to the distances of each row of `x` to all rows of `y`, in O(n) memory."""

    def one(row: Array) -> Array:
        return reduce(jnp.sqrt(jnp.sum((y - row[None]) ** 2, axis=1)))

    return jax.lax.map(one, x, batch_size=min(32, x.shape[0]))


def energy_distance(x: Real[ArrayLike, "n *dims"], y: Real[ArrayLike, "m *dims"]) -> Scalar:
    r"""Estimate the energy distance of two sets of samples, without bias.

    $$ D = 2E|X - Y| - E|X - X'| - E|Y - Y'| \ge 0 $$

    with zero only for equal laws. Pairs of a sample with itself are left out, so that two sets
    from one law give 0 in expectation (and may give less than 0). Cost: O((n + m)^2 d).

    Args:
        x: first set, (n, *dims), n >= 2.
        y: second set, (m, *dims), m >= 2.

    Returns:
        The distance in the units of `x`, ().

    Raises:
        ValueError: if the sets do not hold two samples or more of one shape.

    References:
        Szekely, Rizzo 2013, "Energy statistics: a class of statistics based on distances".
    """
    x, y = _check.two_sets("energy_distance", x, y)
    n, m = x.shape[0], y.shape[0]
    if min(n, m) < 2:
        raise _check.bad("energy_distance", "x and y", "two samples or more", f"{n} and {m}")
    cross = jnp.sum(_reduce_distances(x, y, jnp.sum)) / (n * m)
    within_x = jnp.sum(_reduce_distances(x, x, jnp.sum)) / (n * (n - 1))
    within_y = jnp.sum(_reduce_distances(y, y, jnp.sum)) / (m * (m - 1))
    return 2 * cross - within_x - within_y


def nearest_distance(
    x: Real[ArrayLike, "n *dims"], y: Real[ArrayLike, "m *dims"]
) -> Float[Array, " n"]:
    r"""Return the distance of each sample to its nearest neighbour in `y`.

    A model that memorises has samples much nearer to its training data than held-out data are.

    Args:
        x: samples, (n, *dims).
        y: reference set, (m, *dims).

    Returns:
        $\min_j |x_i - y_j|$, (n,).

    Raises:
        ValueError: if the sets do not hold samples of one shape.
    """
    return _reduce_distances(*_check.two_sets("nearest_distance", x, y), jnp.min)
