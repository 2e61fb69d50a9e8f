import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxdiff import metrics, transport

KEY = jax.random.key(0)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def test_quantile_distance_equals_scipy_for_unequal_sizes():
    x, y = normal(1, 37), 0.3 + 2 * normal(2, 52)
    ours = transport.quantile_distance(x, y, 1.0)
    assert np.isclose(ours, scipy.stats.wasserstein_distance(x, y), rtol=1e-12)


def test_quantile_distance_of_order_two_equals_that_of_repeated_samples():
    x, y = normal(1, 6), normal(2, 4)
    paired = np.sort(np.repeat(x, 2)) - np.sort(np.repeat(y, 3))
    assert np.isclose(transport.quantile_distance(x, y), np.mean(paired**2), rtol=1e-12)


def test_sliced_wasserstein_of_a_shift_is_its_mean_projection():
    """For y = x + a every projection is shifted by theta.a, and E (theta.a)^2 = |a|^2 / d."""
    x, a, n = normal(1, 50, 3, 2), jnp.arange(6.0).reshape(3, 2), 4000
    ours = transport.sliced_wasserstein(KEY, x, x + a[None], projections=n) ** 2
    d, square = 6, jnp.sum(a**2)
    # Var (theta.a)^2 = |a|^4 (3 / (d (d + 2)) - 1 / d^2)
    error = square * math.sqrt((3 / (d * (d + 2)) - 1 / d**2) / n)
    assert abs(ours - square / d) < 4 * error


def test_energy_distance_equals_the_closed_form_for_normals():
    """E|X - Y| of normals is the mean of a folded normal."""
    n, shift = 3000, 1.0
    truth = 2 * scipy.stats.foldnorm(shift / math.sqrt(2), scale=math.sqrt(2)).mean()
    truth -= 2 * 2 / math.sqrt(math.pi)
    runs = [
        float(metrics.energy_distance(normal(2 * i, n, 1), shift + normal(2 * i + 1, n, 1)))
        for i in range(8)
    ]
    assert abs(np.mean(runs) - truth) < 4 * np.std(runs, ddof=1) / math.sqrt(len(runs))


def test_energy_distance_is_unbiased_at_zero():
    runs = jax.jit(jax.vmap(metrics.energy_distance))(normal(1, 500, 20, 2), normal(2, 500, 15, 2))
    assert abs(jnp.mean(runs)) < 4 * jnp.std(runs) / math.sqrt(500)
    assert jnp.min(runs) < 0


def test_energy_distance_equals_all_pairs():
    x, y = np.asarray(normal(1, 40, 2, 3)), np.asarray(normal(2, 33, 2, 3))
    pairs = lambda a, b: scipy.spatial.distance.cdist(a.reshape(len(a), -1), b.reshape(len(b), -1))  # noqa: E731
    truth = 2 * pairs(x, y).mean() - pairs(x, x).sum() / (40 * 39) - pairs(y, y).sum() / (33 * 32)
    assert np.isclose(metrics.energy_distance(x, y), truth, rtol=1e-12)


def test_nearest_distance_equals_all_pairs():
    x, y = np.asarray(normal(1, 40, 3)), np.asarray(normal(2, 33, 3))
    truth = scipy.spatial.distance.cdist(x, y).min(1)
    np.testing.assert_allclose(metrics.nearest_distance(x, y), truth, rtol=1e-12)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, y: transport.sliced_wasserstein(KEY, x, y),
        metrics.energy_distance,
        metrics.nearest_distance,
    ],
)
def test_sets_of_other_shapes_are_refused(call, as_users_see_it):
    with pytest.raises(ValueError, match=r"y must be samples of the shape of x, \(5, 3\), got"):
        call(normal(1, 5, 3), normal(2, 5, 4))


def test_counts_are_checked():
    with pytest.raises(ValueError, match="two samples or more, got 1 and 5"):
        metrics.energy_distance(normal(1, 1, 3), normal(2, 5, 3))
    with pytest.raises(ValueError, match=r"projections must be a whole number.* got 0"):
        transport.sliced_wasserstein(KEY, normal(1, 5, 3), normal(2, 5, 3), projections=0)


@pytest.mark.parametrize("dtype", [np.uint8, np.float16])
def test_images_of_any_dtype_are_measured_in_floats(dtype):
    rng = np.random.default_rng(0)
    x, y = (rng.integers(0, 256, (40, 16)).astype(dtype) for _ in range(2))
    wide = [a.astype(np.float32) for a in (x, y)]
    for call in (metrics.energy_distance, metrics.nearest_distance):
        np.testing.assert_array_equal(call(jnp.asarray(x), jnp.asarray(y)), call(*wide))
    ours = transport.quantile_distance(jnp.array([0, 1, 2]), jnp.array([0, 1, 1]))
    assert np.isclose(ours, 1 / 3)
