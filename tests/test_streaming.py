"""Summaries of pieces of a data set: exact merging, padding, extremes and memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from helpers import PROCESSES

from jaxdiff import exact, streaming

RNG = np.random.default_rng(0)
N, D = 23, 3
LOGITS = RNG.normal(size=N) * 30
VALUES = {"atom": RNG.normal(size=(N, D)), "square": RNG.normal(size=(N,)) ** 2}


def truth(logits, values):
    """Log-mass and weighted means, by SciPy in one piece."""
    w = scipy.special.softmax(logits)
    return scipy.special.logsumexp(logits), jax.tree.map(lambda v: np.tensordot(w, v, 1), values)


def piece(rows):
    return streaming.summarise(
        jnp.asarray(LOGITS[rows]), jax.tree.map(lambda v: jnp.asarray(v[rows]), VALUES)
    )


def assert_same(a, b, rtol=1e-13):
    assert np.isclose(a.top + np.log(a.mass), b.top + np.log(b.mass), rtol=rtol, atol=rtol)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol), a.mean, b.mean
    )


def test_summary_is_the_softmax_mean():
    got, (log_mass, mean) = piece(np.arange(N)), truth(LOGITS, VALUES)
    assert got.top == LOGITS.max()
    np.testing.assert_allclose(got.top + np.log(got.mass), log_mass, rtol=1e-14)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-13), got.mean, mean)


@pytest.mark.parametrize("cuts", [(1, 2), (7, 11), (11, 22)])
def test_merge_is_associative_and_commutative(cuts):
    a, b, c = (piece(rows) for rows in np.split(np.arange(N), cuts))
    left = streaming.merge(streaming.merge(a, b), c)
    right = streaming.merge(a, streaming.merge(b, c))
    assert_same(left, right)
    assert_same(left, streaming.merge(c, streaming.merge(b, a)))
    assert_same(left, piece(np.arange(N)))


def test_an_empty_piece_is_neutral_bitwise():
    some = piece(np.arange(5))
    none = streaming.summarise(
        jnp.full(4, -jnp.inf), jax.tree.map(lambda v: jnp.asarray(v[:4]), VALUES)
    )
    assert none.mass == 0 and none.top == -np.inf
    for merged in (streaming.merge(some, none), streaming.merge(none, some)):
        jax.tree.map(np.testing.assert_array_equal, merged, some)
    nothing = streaming.merge(none, none)
    assert nothing.mass == 0 and all(np.isfinite(v).all() for v in nothing.mean.values())


def test_entries_without_weight_do_not_count():
    rows = np.arange(6)
    padded = streaming.summarise(
        jnp.append(jnp.asarray(LOGITS[rows]), jnp.full(3, -jnp.inf)),
        jax.tree.map(lambda v: jnp.concatenate([v[rows], 1e6 + v[:3]]), VALUES),
    )
    assert_same(padded, piece(rows), 1e-14)


@pytest.mark.parametrize("shift", [-1e8, 1e8])
def test_extreme_log_weights_neither_overflow_nor_vanish(shift):
    values = jnp.array([[1.0], [2.0]])
    one = streaming.summarise(jnp.array([shift, shift]), values)
    np.testing.assert_allclose(one.mean, [1.5], rtol=1e-15)
    far = streaming.summarise(jnp.array([shift - 1e6, shift - 1e6]), 10 * values)
    for merged in (streaming.merge(one, far), streaming.merge(far, one)):
        assert merged.top + np.log(merged.mass) == pytest.approx(shift + np.log(2), rel=1e-15)
        np.testing.assert_allclose(merged.mean, [1.5], rtol=1e-15)


@pytest.mark.parametrize("chunk", [1, 4, N])
def test_posterior_in_any_chunking_is_the_dense_softmax(chunk):
    alpha, sigma, atoms, x = 0.8, 0.3, VALUES["atom"], np.array([0.3, -0.2, 0.5])
    log_p = np.log(RNG.uniform(0.5, 1.5, N))
    pad = -N % chunk
    total = streaming.posterior(
        alpha,
        sigma,
        jnp.asarray(x),
        jnp.pad(jnp.asarray(atoms), ((0, pad), (0, 0))).reshape(-1, chunk, D),
        jnp.pad(jnp.asarray(log_p), (0, pad), constant_values=-jnp.inf).reshape(-1, chunk),
    )
    noise = (x[None] - alpha * atoms) / sigma
    log_mass, (m, eps) = truth(log_p - 0.5 * (noise**2).sum(1), (atoms, noise))
    np.testing.assert_allclose(total.top + np.log(total.mass), log_mass, rtol=1e-13)
    np.testing.assert_allclose(total.mean[0], m, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(total.mean[1], eps, rtol=1e-12, atol=1e-13)


def test_derivatives_of_a_merge_are_those_of_the_whole():
    logits, values = jnp.asarray(LOGITS), jnp.asarray(VALUES["atom"])

    def merged(scale):
        pieces = [streaming.summarise(scale * logits[s], scale * values[s]) for s in cuts]
        total = functools.reduce(streaming.merge, pieces)
        return total.top + jnp.log(total.mass) + total.mean.sum()

    def dense(scale):
        value = jnp.matmul(jax.nn.softmax(scale * logits), scale * values).sum()
        return jax.nn.logsumexp(scale * logits) + value

    cuts = (slice(0, 1), slice(1, 9), slice(9, N))
    expected = jax.jit(jax.grad(dense))(0.1)
    np.testing.assert_allclose(jax.jit(jax.grad(merged))(0.1), expected, rtol=1e-12)


@pytest.mark.parametrize("what", ["value", "batch"])
def test_memory_does_not_grow_with_the_data(what):
    def temporary(n):
        data = np.zeros((n, 16))
        denoiser = exact.empirical(PROCESSES["VP"], data, chunk=128)
        one = lambda d, x: d(0.5, x)  # noqa: E731
        if what == "batch":
            one = jax.vmap(one, in_axes=(None, 0))
        x = jnp.zeros((4, 16) if what == "batch" else 16)
        return jax.jit(one).lower(denoiser, x).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary(128 * 16), temporary(128 * 256)
    assert large <= small + 1024, (small, large)
