"""Roots and lengths: their values and derivatives, where the plain ones have infinite slope."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxdiff._numerics import norm, safe_sqrt


def test_the_root_has_no_slope_at_zero():
    square = jnp.array([-1.0, 0.0, 1e-12, 4.0])
    np.testing.assert_array_equal(safe_sqrt(square), [0, 0, 1e-6, 2])
    slopes = jax.vmap(jax.grad(safe_sqrt))(square)
    np.testing.assert_allclose(slopes, [0, 0, 5e5, 0.25], rtol=1e-12)


def test_the_length_has_no_slope_at_zero():
    rows = jnp.array([[0.0, 0.0], [3.0, -4.0]])
    np.testing.assert_array_equal(norm(rows), [0, 5])
    np.testing.assert_allclose(jax.vmap(jax.grad(norm))(rows), [[0, 0], [0.6, -0.8]], rtol=1e-15)
