"""Summaries of pieces of a data set: exact merging, accuracy at every noise level, and memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from helpers import PROCESSES

from jaxdiff import exact, streaming

RNG = np.random.default_rng(0)
N, K = 23, 2


def problem(d, sigma=0.6, alpha=0.8, seed=0):
    """A data set in pieces' order, weights, a noisy sample of it and two directions."""
    rng = np.random.default_rng(seed)
    atoms, log_p = rng.normal(size=(N, d)), np.log(rng.uniform(0.1, 1.0, N))
    x = alpha * atoms[3] + sigma * rng.normal(size=d)
    return alpha, sigma, x, rng.normal(size=(K, d)), atoms, log_p


def truth(alpha, sigma, x, vs, atoms, log_p):
    """Log-mass, mean, residual and covariance products, by SciPy in one piece."""
    noise = (x[None] - alpha * atoms) / sigma
    logits = log_p - 0.5 * (noise**2).sum(1)
    w = scipy.special.softmax(logits)
    cov = np.cov(atoms.T, aweights=w, ddof=0)
    r = w @ ((noise - (w @ noise)[None]) ** 2).sum(1)
    return scipy.special.logsumexp(logits), w @ atoms, r, vs @ cov


def piece(parts, rows, before=None):
    alpha, sigma, x, vs, atoms, log_p = jax.tree.map(jnp.asarray, parts)
    before = streaming.nothing(alpha, sigma, x, vs) if before is None else before
    return streaming.summarise(alpha, sigma, x, vs, atoms[rows], log_p[rows], before)


def whole(parts, chunk):
    alpha, sigma, x, vs, atoms, log_p = jax.tree.map(jnp.asarray, parts)
    pad = -len(atoms) % chunk
    atoms = jnp.pad(atoms, ((0, pad), (0, 0))).reshape(-1, chunk, x.size)
    log_p = jnp.pad(log_p, (0, pad), constant_values=-jnp.inf).reshape(-1, chunk)
    return streaming.known(streaming.pass_over(alpha, sigma, x, vs, atoms, log_p))


def deviations(total, expected):
    """Errors of log-mass, mean, residual and products, each on its own scale.

    The posterior of isolated atoms collapses: then r is 0, but known to d round-offs only, and the
    products likewise in units of sigma^2/alpha^2.
    """
    got = (total.log_mass, total.mean, total.residual, total.products)
    d = total.mean.size
    scales = (d, np.abs(expected[1]).max(), d, d / total.ratio)
    return np.array(
        [
            np.abs(np.asarray(a, float) - b).max() / max(np.abs(b).max(), scale)
            for a, b, scale in zip(got, expected, scales, strict=True)
        ]
    )


def assert_is(total, expected, tolerance):
    errors = deviations(total, expected)
    assert np.all(errors < tolerance), errors


def assert_same(a, b, tolerance=1e-12):
    assert_is(a, (b.log_mass, b.mean, b.residual, b.products), tolerance)
    np.testing.assert_allclose(a.along, b.along, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("d", [3, 40])  # by differences, and by products of matrices
@pytest.mark.parametrize("chunk", [1, 4, N])
@pytest.mark.parametrize("sigma", [0.02, 0.3, 5.0])
def test_posterior_in_any_chunking_is_the_dense_softmax(d, chunk, sigma):
    parts = problem(d, sigma)
    assert_is(whole(parts, chunk), truth(*parts), 1e-13)


@pytest.mark.parametrize("d", [3, 40])
@pytest.mark.parametrize("cuts", [(1, 2), (7, 11), (11, 22)])
def test_merge_is_associative_and_commutative(d, cuts):
    parts = problem(d, 2.0)
    a, b, c = (piece(parts, rows) for rows in np.split(np.arange(N), cuts))
    left = streaming.merge(streaming.merge(a, b), c)
    assert_same(left, streaming.merge(a, streaming.merge(b, c)))
    assert_same(left, streaming.merge(c, streaming.merge(b, a)))
    assert_is(left, truth(*parts), 1e-12)


def test_nothing_is_neutral_bitwise():
    parts = problem(3)
    some = piece(parts, np.arange(5))
    alpha, sigma, x, vs, atoms, log_p = parts
    unweighted = piece((alpha, sigma, x, vs, atoms, log_p - np.inf), np.arange(4))
    empty = streaming.nothing(alpha, sigma, jnp.asarray(x), jnp.asarray(vs))
    for none in (unweighted, empty):
        assert none.mass == 0 and none.top == -np.inf
        for merged in (streaming.merge(some, none), streaming.merge(none, some)):
            jax.tree.map(np.testing.assert_array_equal, merged, some)
        nothing = streaming.merge(none, none)
        assert nothing.mass == 0 and np.isfinite(nothing.mean).all()


@pytest.mark.parametrize("d", [3, 40])
def test_entries_without_weight_do_not_count(d):
    alpha, sigma, x, vs, atoms, log_p = problem(d)
    far = np.concatenate([atoms, 1e6 + atoms[:3]])
    padded = (alpha, sigma, x, vs, far, np.append(log_p, np.full(3, -np.inf)))
    assert_is(piece(padded, np.arange(N + 3)), truth(alpha, sigma, x, vs, atoms, log_p), 1e-9)


@pytest.mark.parametrize("shift", [-1e8, 1e8])
def test_extreme_log_weights_neither_overflow_nor_vanish(shift):
    parts = problem(3)
    alpha, sigma, x, vs, atoms, log_p = parts
    heavy = piece((alpha, sigma, x, vs, atoms, log_p + shift), np.arange(9))
    light = piece((alpha, sigma, x, vs, atoms, log_p + shift - 1e6), np.arange(9, N))
    expected = truth(alpha, sigma, x, vs, atoms[:9], log_p[:9])
    for merged in (streaming.merge(heavy, light), streaming.merge(light, heavy)):
        assert_is(merged, (expected[0] + shift, *expected[1:]), 1e-7)


def clustered(offset, sigma, seed=1):
    """2,000 atoms in 10 narrow clusters, as data near a manifold: many atoms share the mass."""
    rng = np.random.default_rng(seed)
    centres, d = rng.normal(size=(10, 64)), 64
    atoms = centres[rng.integers(0, 10, 2000)] + 0.2 * sigma * rng.normal(size=(2000, d)) + offset
    x = atoms[0] + sigma * rng.normal(size=d)
    return 1.0, sigma, x, rng.normal(size=(K, d)), atoms, np.zeros(2000)


def errors(parts):
    """Relative errors in float32 against float64 on the same rounded numbers."""
    low = jax.tree.map(np.float32, parts)
    expected = truth(*jax.tree.map(np.float64, low))
    total = whole(low, 256)
    assert total.mean.dtype == jnp.float32
    relative = np.abs(np.asarray(total.products, float) - expected[3]).max()
    return *deviations(total, expected), relative / np.abs(expected[3]).max()


@pytest.mark.parametrize("sigma", [0.2, 0.5, 1.0, 2.0])
def test_float32_keeps_the_spread_of_centred_data(sigma):
    assert max(errors(problem(40, sigma))[:4]) < 2e-6


def test_float32_where_many_atoms_share_the_mass_at_small_sigma(monkeypatch):
    # cancellation of |x|^2 costs u |x|^2/sigma^2 ~ 1e-7 * 64/1e-6 ~ 8 in the logarithm of a weight
    accurate = errors(clustered(0.0, 1e-3))
    print(accurate)
    assert max(accurate[:2]) < 1e-6
    assert max(accurate[2:]) < 2e-3  # u |x|/sigma in each noise: x itself is rounded by as much
    monkeypatch.setattr(streaming, "_TOLERANCE", np.inf)
    careless = errors(clustered(0.0, 1e-3))
    print(careless)
    assert careless[4] > 100 * accurate[4]


def test_a_common_offset_costs_nothing():
    _, width, x, vs, atoms, _ = clustered(100.0, 0.3)
    low = [np.float32(a) for a in (atoms, x, vs)]
    path = PROCESSES["EDM"]
    got = exact.empirical(path, low[0], chunk=256).posterior(np.float32(width), *low[1:])
    wide = [np.float64(a) for a in low]
    expected = truth(1.0, np.float64(np.float32(width)), wide[1], wide[2], wide[0], np.zeros(2000))
    np.testing.assert_allclose(got.mean, expected[1], rtol=1e-6)
    assert abs(got.residual - expected[2]) < 1e-5 * 64
    assert np.abs(got.products - expected[3]).max() < 1e-5 * 64 * width**2


def test_derivatives_of_a_merge_are_those_of_the_whole():
    parts = jax.tree.map(jnp.asarray, problem(40, 1.5))
    alpha, sigma, x, vs, atoms, log_p = parts

    def merged(x):
        parts = (alpha, sigma, x, vs, atoms, log_p)
        total = functools.reduce(streaming.merge, (piece(parts, s) for s in cuts))
        return total.log_mass + total.mean.sum() + total.residual + total.products.sum()

    def dense(x):
        logits = log_p - 0.5 * jnp.sum((x[None] - alpha * atoms) ** 2, 1) / sigma**2
        w = jax.nn.softmax(logits)
        mean = w @ atoms
        spread = atoms - mean[None]
        products = jnp.einsum("n,nd,ne,ke->kd", w, spread, spread, vs)
        r = alpha**2 / sigma**2 * jnp.sum(w * jnp.sum(spread**2, 1))
        return jax.nn.logsumexp(logits) + mean.sum() + r + products.sum()

    cuts = (slice(0, 1), slice(1, 9), slice(9, N))
    np.testing.assert_allclose(merged(x), dense(x), rtol=1e-12)
    expected = jax.jit(jax.grad(dense))(x)
    np.testing.assert_allclose(jax.jit(jax.grad(merged))(x), expected, rtol=1e-9, atol=1e-11)
    forward = jax.jvp(merged, (x,), (vs[0],))[1]
    np.testing.assert_allclose(forward, jnp.dot(expected, vs[0]), rtol=1e-9)


def temporary(n, batch=None, dtype=np.float32, d=64, chunk=128):
    """Bytes of scratch memory that the compiled posterior needs for a data set of n atoms."""
    denoiser = exact.empirical(PROCESSES["VP"], jnp.zeros((n, d), dtype), chunk=chunk)
    one = lambda d, x: d.posterior(0.5, x, x[None])  # noqa: E731
    if batch is not None:
        one = jax.vmap(one, in_axes=(None, 0))
    x = jnp.zeros((d,) if batch is None else (batch, d), jnp.float32)
    return jax.jit(one).lower(denoiser, x).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.optimised
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@pytest.mark.parametrize("batch", [None, 8])
def test_memory_does_not_grow_with_the_data(batch, dtype):
    small, large = (temporary(n, batch, dtype) for n in (128 * 16, 128 * 256))
    assert large <= small + 1024, (small, large)


def test_queries_and_atoms_meet_in_matrix_products_only():
    # differences of all queries and atoms of a chunk would be batch * chunk * d numbers
    batch, d, chunk = 64, 64, 1024
    assert temporary(4 * chunk, batch, chunk=chunk) < batch * chunk * d


def test_the_residual_is_right_far_from_the_data():
    rng = np.random.default_rng(5)
    atoms, direction = (rng.normal(size=shape) for shape in ((100, 64), (64,)))
    for reach, sigma in ((10, 0.1), (100, 10.0), (1000, 1.0)):
        parts = (1.0, sigma, reach * direction, np.zeros((0, 64)), atoms, np.zeros(100))
        low = jax.tree.map(np.float32, parts)
        wide = jax.tree.map(np.float64, low)
        noise = (wide[2] - wide[4]) / wide[1]
        w = scipy.special.softmax(-0.5 * (noise**2).sum(1))
        r = w @ ((noise - (w @ noise)[None]) ** 2).sum(1)
        assert abs(whole(low, 32).residual - r) < 1e-2 * r + 1e-5


def test_the_derivative_with_respect_to_sigma_survives_cancellation():
    rng = np.random.default_rng(6)
    atoms, noise = rng.uniform(-1, 1, (50, 400)).astype(np.float32), rng.normal(size=400)
    denoiser = exact.empirical(PROCESSES["EDM"], atoms)
    for sigma in (0.002, 0.02):  # sigma d log q / d sigma = |eps|^2 - d by one atom
        x = jnp.asarray(atoms[3] + sigma * noise, jnp.float32)
        slope = jax.grad(lambda t, x=x: denoiser.log_density(t, x))(jnp.float32(sigma))
        eps = (np.float64(x) - atoms[3]) / np.float64(np.float32(sigma))
        np.testing.assert_allclose(sigma * slope, (eps**2).sum() - 400, rtol=1e-4, atol=1e-2)


def test_where_every_weight_underflows_nothing_is_known():
    denoiser = exact.empirical(PROCESSES["EDM"], np.ones((3, 64), np.float32))
    known = denoiser.posterior(np.float32(0.002), np.full(64, 1e17, np.float32))
    assert known.log_density == -np.inf
    assert np.isnan(known.mean).all() and np.isnan(known.residual)


@pytest.mark.optimised
def test_a_reverse_derivative_keeps_no_chunk():
    def temporary(n):
        denoiser = exact.empirical(PROCESSES["VP"], jnp.zeros((n, 64), jnp.float32), chunk=128)
        x = jnp.zeros(64, jnp.float32)
        grad = jax.jit(jax.grad(lambda x, d: jnp.sum(d(0.5, x) ** 2)))
        return grad.lower(x, denoiser).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary(128 * 16), temporary(128 * 256)
    assert large - small < 240 * 4 * 64 * 8  # a few vectors for each chunk, not the chunk
