"""Closed-form denoisers against independent oracles, at every noise level, in both precisions."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.special
from helpers import PROCESSES

from jaxdiff import exact

K, D = 3, 3
U32 = float(np.finfo(np.float32).eps) / 2  # unit round-off


def times(path, n=9):
    """Both ends of the process, as far as sigma > 0, and times between them."""
    ts = np.linspace(path.t_min, path.t_max, n)
    ts = np.sort(np.append(ts, path.t_min + (path.t_max - path.t_min) * np.array([1e-4, 1e-2])))
    return ts[np.array([float(path.sigma(t)) > 0 for t in ts])]


def mixtures(path, d=D, seed=1):
    """The four kinds of covariance, each with its oracle, plus one Gaussian and one data set."""
    out = {}
    for kind in ("isotropic", "diagonal", "full"):
        law = oracles.GaussianMixture.random(seed, K, d, kind)
        covs = {"isotropic": law.covs[:, 0, 0], "full": law.covs}.get(
            kind, np.diagonal(law.covs, axis1=1, axis2=2)
        )
        out[kind] = exact.mixture(path, 7 * law.weights, law.means, covs), law
    law = oracles.GaussianMixture.full(law.weights, law.means, law.covs[[0] * K])
    out["shared"] = exact.mixture(path, law.weights, law.means, law.covs[:1]), law
    one = oracles.GaussianMixture.full([1.0], law.means[:1], law.covs[:1])
    out["gaussian"] = exact.gaussian(path, one.means[0], one.covs[0]), one
    atoms = oracles.GaussianMixture.random(seed + 1, 7, d).means
    weights = np.arange(1.0, 8.0)
    dirac = oracles.GaussianMixture.isotropic(weights, atoms, np.zeros(7))
    out["empirical"] = exact.empirical(path, atoms, weights, chunk=3), dirac
    return out


# Every process with the two kinds that share no code; the other kinds differ in one line.
CASES = [(name, kind) for name in PROCESSES for kind in ("full", "empirical")]
CASES += [("VP", kind) for kind in ("isotropic", "diagonal", "shared", "gaussian")]
each_case = pytest.mark.parametrize("name,kind", CASES)


def points(law, path, ts, seed=2):
    """One typical sample per time, and every third time one that is ten deviations away."""
    rng = np.random.default_rng(seed)
    x0, eps = law.sample(seed, len(ts)), rng.standard_normal((len(ts), law.dim))
    eps[::3] *= 10
    alpha, sigma = (np.array([float(f(t)) for t in ts]) for f in (path.alpha, path.sigma))
    return alpha, sigma, alpha[:, None] * x0 + sigma[:, None] * eps


def _views(denoiser, t, x):
    m, eps = denoiser.pair(t, x)
    density, score = denoiser.log_density(t, x), denoiser.score(t, x)
    return dict(log_density=density, score=score, m=m, eps=eps)


def _views_and_slope(denoiser, t, x):
    slope = jax.grad(denoiser.log_density, argnums=1)(t, x)
    return dict(_views(denoiser, t, x), slope=slope)


views = jax.jit(jax.vmap(_views, in_axes=(None, 0, 0)))
views_and_slope = jax.jit(jax.vmap(_views_and_slope, in_axes=(None, 0, 0)))


def close(got, expected, tolerance):
    """Relative to the largest entry of each row; `tolerance` may be one per row."""
    got, expected = (np.asarray(a, np.float64).reshape(len(a), -1) for a in (got, expected))
    error = np.abs(got - expected).max(1) / np.abs(expected).max(1)
    assert np.all(error <= tolerance), (error, tolerance)


@each_case
def test_views_equal_the_oracle(name, kind):
    path = PROCESSES[name]
    denoiser, law = mixtures(path)[kind]
    ts = times(path)
    alpha, sigma, x = points(law, path, ts)
    got = views_and_slope(denoiser, jnp.asarray(ts), jnp.asarray(x))
    # Where every component is d deviations away the score is large and log q is not small.
    close(got["score"], got["slope"], 1e-10)
    rows = list(zip(x, alpha, sigma, strict=True))
    close(got["log_density"], [law.log_prob(*row) for row in rows], 1e-10)
    close(got["m"], [law.posterior_mean(*row) for row in rows], 1e-10)
    rebuilt = alpha[:, None] * got["m"] + sigma[:, None] * got["eps"]
    close(rebuilt, x, 1e-13)


def dirac_truth(law, x, alpha, sigma):
    """Log density, mean and noise of a Dirac mixture, whose joint covariance SciPy refuses."""
    noise = (x[None] - alpha * law.means) / sigma
    logits = np.log(law.weights) - 0.5 * (noise**2).sum(1)
    w = scipy.special.softmax(logits)
    normaliser = law.dim * (np.log(sigma) + 0.5 * np.log(2 * np.pi))
    return scipy.special.logsumexp(logits) - normaliser, w @ law.means, w @ noise


@each_case
def test_float32_is_right_to_1e_4(name, kind):
    r"""The truth is the float64 oracle at the float32 `t` and `x`.

    What float32 cannot give: `alpha` and `alpha y` are rounded, so `z = x - alpha y` is off by
    about `2 u |alpha y|` with `u = 2^-24`. Divided by the smallest standard deviation there is,
    `s = sqrt(alpha^2 c + sigma^2)`, this is the extra error of `z / s`, and `|z| / s` times it
    that of the log weights. It exceeds 1e-4 only for Dirac data at sigma/alpha < 3e-3.
    """
    path = PROCESSES[name]
    denoiser, law = mixtures(path)[kind]
    ts = times(path)
    _, _, x = points(law, path, ts)
    ts, x = ts.astype(np.float32), x.astype(np.float32)
    got = views(denoiser, jnp.asarray(ts), jnp.asarray(x))
    assert all(v.dtype == jnp.float32 for v in got.values())
    ts, x = ts.astype(np.float64), x.astype(np.float64)
    alpha, sigma = (np.array([float(f(t)) for t in ts]) for f in (path.alpha, path.sigma))
    rows = list(zip(x, alpha, sigma, strict=True))
    if kind == "empirical":
        density, mean, noise = zip(*(dirac_truth(law, *row) for row in rows), strict=True)
        score, least = -np.array(noise) / sigma[:, None], sigma
    else:
        density, mean = zip(
            *((law.log_prob(*r), law.posterior_mean(*r)) for r in rows), strict=True
        )
        score = [law.score(*row) for row in rows]
        c = min(np.linalg.eigvalsh(cov).min() for cov in law.covs)
        least = np.sqrt(alpha**2 * c + sigma**2)
    shift = 2 * U32 * alpha * np.abs(law.means).max() / least
    reach = np.sqrt(law.dim) + np.abs(np.array(score)).max(1) * least  # |z| / s
    close(got["score"], score, 1e-4 + reach * shift)
    close(got["m"], mean, 1e-4 + reach * shift)
    size = law.dim + np.abs(np.array(density))
    error = np.abs(got["log_density"] - np.array(density))
    assert np.all(error <= 1e-4 * size + reach * np.sqrt(law.dim) * shift), error


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("kind", ["full", "empirical"])
def test_in_64_dimensions(kind, dtype):
    path = PROCESSES["VP"]
    denoiser, law = mixtures(path, d=64, seed=5)[kind]
    ts = np.array([0.02, 0.3, 1.0])
    alpha, sigma, x = points(law, path, ts)
    ts, x = ts.astype(dtype), x.astype(dtype)
    got = views_and_slope(denoiser, jnp.asarray(ts), jnp.asarray(x))
    ts, x = ts.astype(np.float64), x.astype(np.float64)
    alpha, sigma = (np.array([float(f(t)) for t in ts]) for f in (path.alpha, path.sigma))
    rows = list(zip(x, alpha, sigma, strict=True))
    if kind == "empirical":
        density, mean, _ = zip(*(dirac_truth(law, *row) for row in rows), strict=True)
    else:
        density, mean = zip(
            *((law.log_prob(*r), law.posterior_mean(*r)) for r in rows), strict=True
        )
    tolerance = 1e-10 if dtype == np.float64 else 1e-4
    close(got["log_density"], density, tolerance)
    close(got["m"], mean, tolerance)
    close(got["score"], got["slope"], tolerance)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("kind", ["mixture", "empirical"])
def test_components_a_thousand_apart(kind, dtype):
    path = PROCESSES["EDM"]
    means = np.array([[-500.0, 0.0], [500.0, 0.0], [500.0, 1000.0]])
    if kind == "mixture":
        denoiser = exact.mixture(path, np.ones(3), means, 0.01)
    else:
        denoiser = exact.empirical(path, means, chunk=1)
    variance = 0.01 if kind == "mixture" else 0.0
    # By one component, between two at equal distance, far from all: at the least and most noise.
    x = np.array([[-500.0, 0.125], [500.0, 1000.0], [0.0, 0.0], [500.0, 500.0], [4096.0, -4096.0]])
    truth = np.array([[-500.0, 0.125], [500.0, 1000.0], [0, 0], [500, 500], [500.0, 0.0]])
    for t in (0.002, 0.05):
        s = variance + t**2
        got = views(denoiser, jnp.full(5, t, dtype), jnp.asarray(x.astype(dtype)))
        expected = truth + 0.0
        near = np.array([0, 1, 4])
        centre = means[[0, 2, 1]]
        expected[near] = centre + variance / s * (x[near] - centre)
        close(got["m"] + 1e-3, expected + 1e-3, 1e-12 if dtype == np.float64 else 1e-5)
        square = (x[0, 1]) ** 2
        density = -0.5 * square / s - np.log(s) - np.log(2 * np.pi) - np.log(3)
        assert got["log_density"][0] == pytest.approx(density, rel=1e-5)
        middle = -0.5 * 500.0**2 / s - np.log(s) - np.log(2 * np.pi) + np.log(2 / 3)
        assert got["log_density"][2] == pytest.approx(middle, rel=1e-5)
        assert all(np.isfinite(v).all() for v in got.values())
    got = views(denoiser, jnp.full(5, 80.0, dtype), jnp.asarray(x.astype(dtype)))
    w = scipy.special.softmax(
        [[-0.5 * ((a - b) ** 2).sum() / (variance + 80.0**2) for b in means] for a in x], axis=1
    )
    close(got["m"][:4], (w @ means + variance / (variance + 6400) * (x - w @ means))[:4], 1e-3)


def test_empirical_does_not_depend_on_order_chunks_or_padding():
    path = PROCESSES["VP"]
    data = np.random.default_rng(3).normal(size=(10, 2, 2))
    weights = np.random.default_rng(4).uniform(0.1, 1, 10)
    ts, x = jnp.array([0.01, 0.2, 0.9]), jnp.asarray(data[:3] + 0.1)
    expected = views(exact.empirical(path, data, weights), ts, x)
    order = np.random.default_rng(5).permutation(10)
    variants = [exact.empirical(path, data, weights, chunk=c) for c in (1, 3, 10, 1000)]
    variants.append(exact.empirical(path, data[order], 3 * weights[order], chunk=3))
    for denoiser in variants:
        got = views(denoiser, ts, x)
        for name, value in got.items():
            scale = np.abs(expected[name]).max()
            np.testing.assert_allclose(value, expected[name], rtol=1e-12, atol=1e-13 * scale)


def test_weights_of_a_data_set_are_multiplicities():
    path = PROCESSES["Cosine"]
    data = np.random.default_rng(3).normal(size=(4, 2))
    ts, x = jnp.array([0.1, 0.5]), jnp.asarray(data[:2])
    weighted = views(exact.empirical(path, data, [2, 0, 1, 3], chunk=2), ts, x)
    repeated = views(exact.empirical(path, data[[0, 0, 2, 3, 3, 3]], chunk=6), ts, x)
    for name, value in weighted.items():
        np.testing.assert_allclose(value, repeated[name], rtol=1e-12, atol=1e-12)
    assert not np.allclose(weighted["m"], views(exact.empirical(path, data), ts, x)["m"])


def test_a_thin_mixture_is_the_data_set():
    path = PROCESSES["VE"]
    data = np.random.default_rng(3).normal(size=(4, 2))
    ts, x = jnp.array([0.0, 0.5]), jnp.asarray(data[:2] + 0.01)
    mixture = views(exact.mixture(path, np.ones(4), data, 0.0), ts, x)
    atoms = views(exact.empirical(path, data), ts, x)
    for name, value in mixture.items():
        np.testing.assert_allclose(value, atoms[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["full", "empirical"])
def test_derivatives_of_the_pair_are_finite_everywhere(kind):
    path = PROCESSES["VP"]
    denoiser = mixtures(path)[kind][0]

    @jax.jit
    @jax.vmap
    def slopes(t, x):
        def total(t, x, beta):
            moved = type(path)(beta_min=0.1, beta_max=beta)
            m, eps = jax.tree.map(jnp.sum, _with(denoiser, moved).pair(t, x))
            return m + 0.5 * eps

        return jax.grad(total, argnums=(0, 1, 2))(t, x, 20.0)

    x = jnp.array([[0.1, 0.2, 0.3], [1e3, -1e3, 0.0]])
    for t in (1e-3, 0.5, 1.0):
        assert all(np.isfinite(s).all() for s in slopes(jnp.full(2, t), x))


def _with(denoiser, path):
    return eqx.tree_at(lambda d: d.process, denoiser, path)


def test_the_jacobian_of_the_mean_is_the_posterior_covariance():
    path = PROCESSES["Rectified"]
    denoiser, law = mixtures(path)["full"]
    alpha, sigma, x = 0.6, 0.4, np.array([0.3, -0.4, 0.2])
    jacobian = jax.jit(jax.jacfwd(lambda x: denoiser(0.4, x)))(jnp.asarray(x))
    expected = alpha / sigma**2 * law.posterior_cov(x, alpha, sigma)
    np.testing.assert_allclose(jacobian, expected, rtol=1e-10, atol=1e-12)


def test_at_alpha_zero_the_data_are_forgotten():
    for kind in ("full", "empirical"):
        denoiser, law = mixtures(PROCESSES["Rectified"])[kind]
        m, eps = eqx.filter_jit(denoiser.pair)(1.0, jnp.array([0.3, -2.0, 5.0]))
        np.testing.assert_allclose(m, law.moments()[0], rtol=1e-13)
        np.testing.assert_allclose(eps, [0.3, -2.0, 5.0], rtol=1e-13)


def test_at_sigma_zero_a_mixture_returns_its_input():
    denoiser = mixtures(PROCESSES["Rectified"])["diagonal"][0]
    x = jnp.array([0.3, -2.0, 5.0])
    m, eps = denoiser.pair(0.0, x)
    np.testing.assert_allclose(m, x, rtol=1e-13)
    np.testing.assert_array_equal(eps, np.zeros(3))


def test_integer_samples_and_scalar_samples(as_users_see_it):
    denoiser = exact.gaussian(PROCESSES["VP"], 1.0, 0.25)
    assert denoiser(0.5, 2).shape == () and denoiser(0.5, 2).dtype == jnp.float64
    assert exact.empirical(PROCESSES["VP"], [0, 1, 2])(0.9, 1.0).dtype == jnp.float64


VP, MEANS = PROCESSES["VP"], np.zeros((3, 2))
ONE = np.ones(3)
BAD = {
    "weights shape": (lambda: exact.mixture(VP, np.ones(4), MEANS, 1.0), "weights", "(4,)"),
    "weights negative": (lambda: exact.mixture(VP, [1, 1, -0.5], MEANS, 1.0), "weights", "-0.5"),
    "weights zero": (lambda: exact.mixture(VP, np.zeros(3), MEANS, 1.0), "weights", "0."),
    "weights nan": (lambda: exact.mixture(VP, [1, np.nan, 1], MEANS, 1.0), "weights", "nan"),
    "means": (lambda: exact.mixture(VP, [1.0], np.array(0.0), 1.0), "means", "()"),
    "covs shape": (lambda: exact.mixture(VP, ONE, MEANS, np.ones((3, 5))), "covs", "(3, 5)"),
    "covs negative": (lambda: exact.mixture(VP, ONE, MEANS, [1, -0.25, 1]), "covs", "-0.25"),
    "covs asymmetric": (
        lambda: exact.mixture(VP, ONE, MEANS, np.array([[[1, 0.3], [0, 1]]])),
        "covs",
        "symmetric",
    ),
    "covs indefinite": (
        lambda: exact.mixture(VP, ONE, MEANS, np.array([[[1.0, 2.0], [2.0, 1.0]]])),
        "covs",
        "-1.0",
    ),
    "cov": (lambda: exact.gaussian(VP, np.zeros(2), np.ones(3)), "cov", "(3,)"),
    "gaussian covs": (lambda: exact.gaussian(VP, np.zeros(2), -0.5), "cov", "-0.5"),
    "data empty": (lambda: exact.empirical(VP, np.zeros((0, 2))), "data", "(0, 2)"),
    "data scalar": (lambda: exact.empirical(VP, np.array(1.0)), "data", "()"),
    "data weights": (lambda: exact.empirical(VP, MEANS, np.ones(2)), "weights", "(2,)"),
    "chunk zero": (lambda: exact.empirical(VP, MEANS, chunk=0), "chunk", "0"),
    "x of mixture": (
        lambda: exact.mixture(VP, ONE, MEANS, 1.0)(0.5, np.zeros((4, 2))),
        "x",
        "(4, 2)",
    ),
    "x of data": (lambda: exact.empirical(VP, MEANS)(0.5, np.zeros(7)), "x", "(7,)"),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_name_the_argument_and_what_was_given(case, as_users_see_it):
    build, argument, given = BAD[case]
    with pytest.raises(ValueError) as error:
        build()
    message = str(error.value)
    assert f": {argument} must be" in message, message
    assert given in message, message


def test_the_score_of_a_mixture_at_sigma_zero_is_that_of_the_data():
    path = PROCESSES["Rectified"]
    denoiser = exact.mixture(path, [0.5, 0.5], [[-1.0, 0.0], [1.0, 0.5]], 0.04)
    x = jnp.array([1.1, 0.7])
    want = jax.grad(lambda x: denoiser.log_density(0.0, x))(x)
    np.testing.assert_allclose(denoiser.score(0.0, x), want, rtol=1e-12)


def test_parts_that_are_no_numbers_are_refused(as_users_see_it):
    path = PROCESSES["VP"]
    with pytest.raises(ValueError, match="mixture: means must be finite"):
        exact.mixture(path, [1.0], [[jnp.nan]], 0.1)
    with pytest.raises(ValueError, match="empirical: process must be a jaxdiff process"):
        exact.empirical(jnp.ones((3, 2)), path)
    with pytest.raises(ValueError, match=r"mixture: t must be one time.* got \(2,\)"):
        exact.mixture(path, [1.0], [[0.0]], 0.1)(jnp.ones(2), jnp.ones(1))
