"""Transport distances between sets of samples."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, Real

from jaxdiff import _check
from jaxdiff._array import Scalar

__all__ = ["quantile_distance", "sliced_wasserstein"]


def quantile_distance(
    x: Real[ArrayLike, " n"], y: Real[ArrayLike, " m"], p: float = 2.0
) -> Float[Array, ""]:
    r"""Return $W_p^p$ of two samples on the line, $\int_0^1 |F_x^{-1} - F_y^{-1}|^p\,dq$, exactly.

    Args:
        x: first sample, (n,).
        y: second sample, (m,), of any size.
        p: order, at least 1.
    """
    dtype = jnp.promote_types(jnp.result_type(x, y), jnp.float32)
    x, y = (jnp.sort(jnp.asarray(a, dtype)) for a in (x, y))
    if x.ndim != 1 or y.ndim != 1:
        raise _check.bad("quantile_distance", "x and y", "of shape (n,)", f"{x.shape}, {y.shape}")
    n, m = x.shape[0], y.shape[0]
    # Both quantile functions are constant between the merged levels i/n and j/m.
    levels = jnp.sort(jnp.concatenate([jnp.arange(n + 1) / n, jnp.arange(1, m) / m]))
    middle = (levels[1:] + levels[:-1]) / 2
    i = jnp.minimum((middle * n).astype(int), n - 1)
    j = jnp.minimum((middle * m).astype(int), m - 1)
    return jnp.sum((levels[1:] - levels[:-1]) * jnp.abs(x[i] - y[j]) ** p).astype(x.dtype)


def sliced_wasserstein(
    key: PRNGKeyArray,
    x: Real[ArrayLike, "n *dims"],
    y: Real[ArrayLike, "m *dims"],
    *,
    projections: int = 512,
    p: float = 2.0,
) -> Scalar:
    r"""Estimate the sliced Wasserstein distance of two sets of samples.

    $$ SW_p(x, y) = \left(E_{\theta \sim U(S^{d-1})}\,W_p^p(\theta\cdot x, \theta\cdot y)
                    \right)^{1/p} $$

    Exact in each direction, Monte Carlo over directions. Cost: O(projections (n + m) (d + log n)).

    Args:
        key: for the directions; the same key compares on the same directions.
        x: first set, (n, *dims).
        y: second set, (m, *dims).
        projections: number of directions.
        p: order, at least 1.

    Returns:
        The distance in the units of `x`, ().

    Raises:
        ValueError: if the sets do not hold samples of one shape.

    References:
        Bonneel, Rabin, Peyre, Pfister 2015, "Sliced and Radon Wasserstein Barycenters of Measures".
    """
    _check.whole("sliced_wasserstein", "projections", projections, 1)
    _check.number("sliced_wasserstein", "p", p, 1, math.inf)
    key = _check.key("sliced_wasserstein", "key", key)
    x, y = _check.two_sets("sliced_wasserstein", x, y)
    theta = jax.random.normal(key, (projections, x.shape[1]), x.dtype)
    theta = theta / jnp.linalg.norm(theta, axis=1, keepdims=True)

    def along(direction: Array) -> Array:
        project = lambda z: jnp.matmul(z, direction, precision="highest")  # noqa: E731
        return quantile_distance(project(x), project(y), p)

    return jnp.mean(jax.lax.map(along, theta, batch_size=32)) ** (1 / p)
