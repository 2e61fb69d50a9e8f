"""Determinants, eigenpairs, ranks and local dimension, against dense linear algebra."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from helpers import PROCESSES

import jaxdiff as jd
from jaxdiff import exact
from jaxdiff.fisher.heads import Hutchinson, intrinsic_dimension
from jaxdiff.fisher.operators import fisher, posterior_cov
from jaxdiff.linalg.diag_low_rank import DiagLowRank
from jaxdiff.linalg.spectrum import effective_rank, eigsh, logdet

VP = PROCESSES["VP"]
KEY = jax.random.key(0)


def psd(seed=0, d=12, dtype=None):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(d, d)) / d**0.5
    return jnp.asarray(root @ root.T + 0.1 * np.eye(d), dtype)


def tagged(matrix):
    return lx.MatrixLinearOperator(matrix, lx.positive_semidefinite_tag)


def network():
    """A network that is the exact noise of a mixture, in (2, 3) arrays."""
    rng = np.random.default_rng(1)
    known = exact.mixture(VP, np.ones(3), rng.normal(size=(3, 2, 3)), 0.2)
    return known, jd.Denoiser(VP, lambda t, x, cond: known.eps(t, x), "eps")


# --- The determinant. ----------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_logdet_by_quadrature(shift):
    a = psd()
    want = np.linalg.slogdet(np.asarray(a) + shift * np.eye(12))[1]
    value, error = jax.jit(lambda key: logdet(tagged(a), key, probes=200, shift=shift))(KEY)
    assert 0 < error < 0.5 and abs(value - want) < 4 * error
    few = logdet(tagged(a), KEY, probes=200, order=8, shift=shift)[0]
    assert abs(few - value) < 0.01  # the same probes, so only the quadrature differs


def test_one_probe_is_matfrees_integrand():
    from matfree import decomp, funm

    a = psd()
    for order in (3, 12):
        keys = jax.random.split(KEY, 2)
        vs = [jax.random.rademacher(k, (12,), float) for k in keys]
        integrand = funm.monte_carlo_funm_sym_logdet(decomp.tridiag_sym(order))
        want = np.mean([integrand(lambda s: a @ s, v) for v in vs])
        np.testing.assert_allclose(logdet(tagged(a), KEY, probes=2, order=order)[0], want)


def test_logdet_of_a_posterior_of_arrays():
    known, model = network()
    x = jnp.arange(6.0).reshape(2, 3) / 6
    exactly = posterior_cov(known, 0.4, x)
    want = np.linalg.slogdet(exactly.as_matrix())[1]
    for operator in (exactly, posterior_cov(model, 0.4, x, symmetrise=True)):
        value, error = logdet(operator, KEY, probes=16)
        assert abs(value - want) < 4 * error + 1e-9


def test_logdet_is_exact_for_low_rank_and_for_multiples_of_the_identity():
    u = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 3)))
    a = DiagLowRank(jnp.asarray(0.5), u, jnp.asarray([1.0, 0.2]))
    value, error = logdet(a, shift=0.1)
    want = np.linalg.slogdet(np.asarray(a.as_matrix()) + 0.1 * np.eye(6))[1]
    np.testing.assert_allclose(value, want, rtol=1e-13)
    assert error == 0
    value, error = logdet(tagged(0.3 * jnp.eye(9)), KEY, probes=3, shift=0.2)
    np.testing.assert_allclose(value, 9 * np.log(0.5), rtol=1e-13)
    assert error < 1e-13


@pytest.mark.slow
def test_the_derivative_of_logdet():
    a, b = psd(0), psd(1)
    scaled = lambda c: logdet(tagged(a + c * b), KEY, probes=400)[0]  # noqa: E731
    want = np.trace(np.linalg.solve(a, b))
    got = jax.jit(jax.grad(scaled))(0.0)
    # v . A^-1 B v over Rademacher v: variance 2 (|S|_F^2 - |diag S|^2), S its symmetric part
    s = np.linalg.solve(a, b)
    s = (s + s.T) / 2
    error = np.sqrt(2 * (np.sum(s**2) - np.sum(np.diag(s) ** 2)) / 400)
    assert abs(got - want) < 4 * error and error < 0.1 * want
    # where all eigenvalues are one, and by the shift
    same = lambda c: logdet(tagged(c * jnp.eye(9)), KEY, probes=2, shift=c)[0]  # noqa: E731
    np.testing.assert_allclose(jax.grad(same)(0.5), 9 / 0.5, rtol=1e-12)
    known, _ = network()
    x, v = jnp.arange(6.0).reshape(2, 3) / 6, jnp.ones((2, 3))
    mean = lambda x: logdet(posterior_cov(known, 0.4, x), KEY, probes=400)[0]  # noqa: E731
    dense = lambda x: jnp.linalg.slogdet(posterior_cov(known, 0.4, x).as_matrix())[1]  # noqa: E731
    got, want = (jnp.sum(jax.grad(f)(x) * v) for f in (mean, dense))
    assert abs(got - want) < 0.1 * abs(want)


def test_logdet_of_an_indefinite_operator_is_nan():
    assert np.isnan(logdet(tagged(-psd()), KEY)[0])
    low = DiagLowRank(jnp.asarray(1.0), jnp.eye(4)[:1], jnp.asarray([-2.0]))
    assert np.isnan(logdet(low)[0])


# --- Eigenpairs. ---------------------------------------------------------------------------------


def test_the_top_eigenvalue_in_ten_products():
    """Section 9.9: of R in 48 dimensions, to 7e-7."""
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(500, 48)) * np.linspace(0.2, 1.5, 48)[None]
    denoiser = exact.empirical(VP, atoms, chunk=100)
    t = VP.t_of_lam(-1.5)
    x = VP.alpha(t) * atoms[0] + VP.sigma(t) * rng.normal(size=48)
    cov = posterior_cov(denoiser, t, x)
    values, vectors = np.linalg.eigh(cov.as_matrix())
    pairs = jax.jit(lambda: eigsh(cov, 1, steps=10))()
    assert abs(pairs.values[0] / values[-1] - 1) < 7e-7
    assert abs(pairs.values[0] - values[-1]) <= pairs.residuals[0]  # the theorem it is there for
    more = eigsh(cov, 3, steps=30)
    np.testing.assert_allclose(more.values, values[:-4:-1], rtol=1e-8)
    overlap = np.abs(np.sum(np.asarray(more.vectors) * vectors.T[:-4:-1], axis=1))
    np.testing.assert_allclose(overlap, 1, rtol=1e-6)
    assert np.all(more.residuals < 1e-3 * more.values) and np.all(
        more.residuals[0] < pairs.residuals[0]
    )


def test_eigenpairs_of_arrays_repeated_and_of_a_network():
    known, model = network()
    x = jnp.arange(6.0).reshape(2, 3) / 6
    want = np.linalg.eigvalsh(posterior_cov(known, 0.4, x).as_matrix())[::-1]
    pairs = eigsh(posterior_cov(model, 0.4, x, symmetrise=True), 6)
    assert pairs.vectors.shape == (6, 2, 3)
    np.testing.assert_allclose(pairs.values, want, rtol=1e-9)
    double = tagged(jnp.diag(jnp.asarray([2.0, 2.0, 1.0, 0.0, 0.0])))
    pairs = eigsh(double, 3)
    np.testing.assert_allclose(pairs.values, [2, 2, 1], rtol=1e-13)
    np.testing.assert_allclose(pairs.residuals, 0, atol=1e-13)
    indefinite = lx.MatrixLinearOperator(jnp.diag(jnp.asarray([-5.0, 3.0])), lx.symmetric_tag)
    np.testing.assert_allclose(eigsh(indefinite, 2).values, [3, -5], rtol=1e-13)


def test_eigenvalues_under_grad_and_vmap():
    known, _ = network()
    x, v = jnp.arange(6.0).reshape(2, 3) / 6, jnp.ones((2, 3))
    top = lambda x: eigsh(posterior_cov(known, 0.4, x), 1).values[0]  # noqa: E731
    dense = lambda x: jnp.linalg.eigvalsh(posterior_cov(known, 0.4, x).as_matrix())[-1]  # noqa: E731
    got, want = (jnp.sum(jax.jit(jax.grad(f))(x) * v) for f in (top, dense))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    xs = jnp.stack([x, x + 0.2])
    np.testing.assert_allclose(jax.vmap(top)(xs), [dense(y) for y in xs], rtol=1e-9)


# --- Ranks and dimension. ------------------------------------------------------------------------


def test_effective_rank():
    projection = tagged(jnp.diag(jnp.asarray([1.0] * 4 + [0.0] * 5)))
    np.testing.assert_allclose(effective_rank(projection)[0], 4, rtol=1e-13)
    a = psd()
    p = np.linalg.eigvalsh(a)
    p = p / p.sum()
    want = 1 / np.sum(p**2)
    value, error = jax.jit(lambda: effective_rank(tagged(a)))()
    np.testing.assert_allclose(value, want, rtol=1e-12)
    assert error == 0 and want <= np.exp(-np.sum(p * np.log(p)))  # that of Roy and Vetterli
    value, error = effective_rank(tagged(a), KEY, probes=400)
    assert 0 < error < 0.1 * want and abs(value - want) < 4 * error
    u = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 3)))
    low = DiagLowRank(jnp.asarray(0.5), u, jnp.asarray([1.0, 0.2, 0.1]))
    dense = effective_rank(tagged(low.as_matrix()))[0]
    np.testing.assert_allclose(effective_rank(low)[0], dense, rtol=1e-12)
    known, _ = network()
    x, v = jnp.arange(6.0).reshape(2, 3) / 6, jnp.ones((2, 3))
    rank = lambda x: effective_rank(posterior_cov(known, 0.4, x))[0]  # noqa: E731
    slope = (rank(x + 1e-5 * v) - rank(x - 1e-5 * v)) / 2e-5
    np.testing.assert_allclose(jnp.sum(jax.grad(rank)(x) * v), slope, rtol=1e-6)


def test_intrinsic_dimension_of_a_mixture_on_four_dimensions():
    """B2 (11): a 4-dimensional mixture in 20 dimensions, within 0.05 at sbar = 0.03."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(20, 4)))[0]
    means, scales = rng.normal(size=(5, 4)) @ basis.T, rng.uniform(0.3, 1.0, (5, 4))
    covs = np.einsum("ij,kj,lj->kil", basis, scales**2, basis) + 1e-12 * np.eye(20)[None]
    denoiser = exact.mixture(VP, np.ones(5), means, covs)
    which = rng.integers(5, size=32)
    x0 = means[which] + (rng.normal(size=(32, 4)) * scales[which]) @ basis.T
    noise = rng.normal(size=(32, 20))

    def mean(sbar, **arguments):
        t = VP.t_of_lam(-np.log(sbar))
        x = VP.alpha(t) * x0 + VP.sigma(t) * noise
        keys = jax.random.split(KEY, 32)
        one = lambda x, key: intrinsic_dimension(  # noqa: E731
            denoiser, t, x, key=key, **arguments
        )
        return jnp.mean(jax.jit(jax.vmap(one))(x, keys))

    assert abs(mean(0.03) - 4) < 0.05
    assert mean(0.3) < 3.9  # and there it is not yet seen
    assert abs(mean(0.03, estimator=Hutchinson(64)) - mean(0.03)) < 4 * np.sqrt(8 / (32 * 64))
    t = VP.t_of_lam(1.0)
    x = jnp.asarray(x0[0])
    r = intrinsic_dimension(denoiser, t, x)
    f = fisher(denoiser, t, x, method="exact").as_matrix()
    np.testing.assert_allclose(r, 20 - VP.sigma(t) ** 2 * np.trace(f), rtol=1e-10)
    slope = jax.grad(lambda x: intrinsic_dimension(denoiser, t, x))(x)
    assert np.all(np.isfinite(slope)) and np.any(slope != 0)


@pytest.mark.slow
def test_float32():
    low, wide = psd(dtype=jnp.float32), psd()
    for got, want, tolerance in (
        (logdet(tagged(low), KEY, probes=8), logdet(tagged(wide), KEY, probes=8), 1e-4),
        (eigsh(tagged(low), 2).values, eigsh(tagged(wide), 2).values, 1e-5),
        (effective_rank(tagged(low)), effective_rank(tagged(wide)), 1e-5),
        (
            jax.grad(lambda c: logdet(tagged(c * low), KEY)[0])(jnp.float32(1)),
            jax.grad(lambda c: logdet(tagged(c * wide), KEY)[0])(1.0),
            1e-4,
        ),
    ):
        assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(got))
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)


def test_errors(as_users_see_it):
    plain, good = lx.MatrixLinearOperator(psd()), tagged(psd())
    for call, said in [
        (lambda: logdet(plain, KEY), "logdet: operator must be tagged symmetric"),
        (lambda: logdet(psd(), KEY), "logdet: operator must be tagged symmetric"),
        (lambda: logdet(good), "logdet: key must be a key"),
        (lambda: logdet(good, KEY, probes=1), "logdet: probes must be"),
        (lambda: logdet(good, KEY, order=13), "order must be at most the dimension 12, got 13"),
        (lambda: eigsh(plain, 2), "eigsh: operator must be tagged symmetric"),
        (lambda: eigsh(good, 0), "eigsh: k must be"),
        (lambda: eigsh(good, 5, steps=4), "eigsh: k must be at most 4"),
        (lambda: eigsh(good, 5, steps=13), "eigsh: steps must be at most the dimension 12"),
        (lambda: effective_rank(plain), "effective_rank: operator must be tagged symmetric"),
        (lambda: effective_rank(good, probes=3), "effective_rank: key must be a key"),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
