"""Weights of exponential methods: phi functions and integrals of Lagrange polynomials."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdiff.solvers.quadrature import integrals, of_mean, of_noise, phi

POINTS, MASSES = np.polynomial.legendre.leggauss(60)
POINTS, MASSES = (POINTS + 1) / 2, MASSES / 2


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_phi_is_its_integral(k):
    r"""phi_k(z) = int_0^1 exp((1 - u) z) u^{k-1}/(k-1)! du, without cancellation near 0."""
    z = np.concatenate([s * np.logspace(-8, 1, 40) for s in (-1, 1)])
    inside = np.exp(np.outer(z, 1 - POINTS)) * POINTS ** (k - 1) / math.factorial(k - 1)
    np.testing.assert_allclose(jax.vmap(lambda z: phi(k, z))(z), inside @ MASSES, rtol=1e-13)
    slope = jax.vmap(jax.grad(lambda z: phi(k, z)))(jnp.asarray(z))
    np.testing.assert_allclose(slope, (inside * (1 - POINTS)) @ MASSES, rtol=1e-11)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_weights_integrate_polynomials_exactly(count):
    """Through `count` of four nodes; their sum is that of the frozen step."""
    lam0, h, nodes = -0.7, 0.9, np.array([-0.7, 0.2, -1.1, -2.4])
    for kernel in (of_mean(0.8, h), of_mean(0.8, h, 0.6), of_noise(0.3, h)):
        w = np.asarray(integrals(kernel, lambda lam: lam, lam0, h, list(nodes), jnp.asarray(count)))
        assert not w[count:].any()
        for power in range(count):
            inside = kernel(h * POINTS) * (lam0 + h * POINTS) ** power
            np.testing.assert_allclose(w @ nodes**power, h * inside @ MASSES, rtol=1e-12)
    total = 0.8 * (1 - np.exp(-(1 + 0.6**2) * h)), -0.3 * np.expm1(h)
    for kernel, expected in zip((of_mean(0.8, h, 0.6), of_noise(0.3, h)), total, strict=True):
        got = integrals(kernel, lambda lam: lam, lam0, h, list(nodes), jnp.asarray(count)).sum()
        np.testing.assert_allclose(got, expected, rtol=1e-13)
