"""Langevin chains: the laws they leave invariant, and what the step does to those laws."""

import sys

import blackjax
import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from oracles import GaussianMixture

from jaxdiff import exact
from jaxdiff.mcmc import (
    AbstractDensity,
    Kinetic,
    annealed,
    baoab,
    mala,
    randomised_midpoint,
    run,
    target,
    ula,
    underdamped,
)
from jaxdiff.process import VP, Rectified
from jaxdiff.score import Denoiser

KERNELS = {
    "ula": ula,
    "randomised_midpoint": randomised_midpoint,
    "mala": mala,
    "baoab": lambda law, h: baoab(law, h, 1.5, 0.7),
    "QUICSORT": lambda law, h: underdamped(law, h, 1.5, 0.7),
    "ALIGN": lambda law, h: underdamped(law, h, 1.5, 0.7, solver=dfx.ALIGN()),
}


def quadratic(k):
    return target(lambda x: -0.5 * k * jnp.sum(x**2))


def chains(kernel, start, steps, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(start))
    return jax.jit(jax.vmap(lambda key, x: run(key, kernel, x, steps)))(keys, jnp.asarray(start))


def within(values, mean, errors=4):
    """Whether the mean of independent values is within so many standard errors of a number."""
    return abs(np.mean(values) - mean) < errors * np.std(values) / np.size(values) ** 0.5


# --- On a Gaussian a step is linear in the state and its normals: the covariance is exact. --------


def linear(monkeypatch, kernel, size, when=0.5):
    """The matrices of a step: (size, size) of the state, (size, normals) of its random numbers."""

    def step(state, normals):
        drawn = []

        def normal(key, shape=(), dtype=float):
            drawn.append(None)
            return jnp.full(shape, normals.get(len(drawn) - 1, 0.0), dtype)

        with monkeypatch.context() as patch, jax.disable_jit():
            patch.setattr(jax.random, "normal", normal)
            patch.setattr(jax.random, "uniform", lambda *args: jnp.asarray(when))
            start = kernel.init(jnp.asarray(state[0]))
            if size == 2:
                start = start._replace(v=jnp.asarray(state[1]))
            end, _ = kernel.step(jax.random.key(0), start)
        return np.array([end.x, end.v] if size == 2 else [end.x]), len(drawn)

    zero = np.zeros(size)
    offset, count = step(zero, {})
    np.testing.assert_array_equal(offset, zero)
    move = np.stack([step(row, {})[0] for row in np.eye(size)], axis=1)
    return move, np.stack([step(zero, {j: 1.0})[0] for j in range(count)], axis=1)


def stationary(monkeypatch, kernel, size=2):
    move, noise = linear(monkeypatch, kernel, size)
    return scipy.linalg.solve_discrete_lyapunov(move, noise @ noise.T)


def test_ula_settles_at_its_formula(monkeypatch):
    for k, h in ((1.0, 0.1), (3.0, 0.4)):
        variance = stationary(monkeypatch, ula(quadratic(k), h), 1)[0, 0]
        np.testing.assert_allclose(variance, 1 / (k * (1 - h * k / 2)), rtol=1e-13)


def midpoint_variance(k, h):
    a = h * k
    return (2 - 2 * a + a**2) / (2 - 2 * a + a**2 - a**3 / 3) / k


def test_the_randomised_midpoint_settles_at_its_formula(monkeypatch):
    """Averages over the random time, of polynomials of degree 2, by three nodes of Gauss."""
    nodes, weights = np.polynomial.legendre.leggauss(3)
    for k, h in ((1.0, 0.1), (2.0, 0.25), (3.0, 0.4)):
        kernel = randomised_midpoint(quadratic(k), h)
        parts = [linear(monkeypatch, kernel, 1, when=(1 + node) / 2) for node in nodes]
        move2 = sum(w / 2 * np.sum(m**2) for w, (m, _) in zip(weights, parts, strict=True))
        noise2 = sum(w / 2 * np.sum(b**2) for w, (_, b) in zip(weights, parts, strict=True))
        np.testing.assert_allclose(noise2 / (1 - move2), midpoint_variance(k, h), rtol=1e-13)


def test_baoab_has_the_right_positions_at_any_step(monkeypatch):
    for k, h, gamma, u in ((1.0, 0.1, 2.0, 1.0), (1.0, 1.9, 0.3, 1.0), (3.0, 0.7, 5.0, 2.0)):
        covariance = stationary(monkeypatch, baoab(quadratic(k), h, gamma, u))
        np.testing.assert_allclose(covariance[0], [1 / k, 0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver,order", [(dfx.ALIGN, 2), (dfx.ShOULD, 3), (dfx.QUICSORT, 3)])
def test_the_orders_of_the_solvers_of_diffrax(solver, order, monkeypatch):
    """One step against the exponential of the linear diffusion; the law that many settle at."""
    k, gamma, u = 1.3, 1.5, 0.7
    drift = np.array([[0, 1], [-u * k, -gamma]])
    laws, steps = [], np.array([0.1, 0.05, 0.025])
    for h in steps:
        kernel = underdamped(quadratic(k), h, gamma, u, solver=solver(taylor_threshold=0.01))
        move, noise = linear(monkeypatch, kernel, 2)
        law = scipy.linalg.solve_discrete_lyapunov(move, noise @ noise.T)
        local = np.abs(move - scipy.linalg.expm(h * drift)).max()
        laws.append([local, np.abs(law - np.diag([1 / k, u])).max()])
    slopes = np.polyfit(np.log(steps), np.log(np.array(laws)), 1)[0]
    assert slopes[0] > order + 1 - 0.2 and slopes[1] > order - 0.2, slopes
    assert laws[0][1] < 2e-3


# --- The random numbers themselves. ---------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
def test_simulated_variances(name):
    """Of 20,000 pairs after 60 steps, within 4 standard errors of the formulas above."""
    k, h = 2.0, 0.25
    truth = {"ula": 1 / (k * (1 - h * k / 2)), "randomised_midpoint": midpoint_variance(k, h)}
    end = chains(KERNELS[name](quadratic(k), h), np.ones((20_000, 2)), 60)
    assert within(np.asarray(end.x) ** 2, truth.get(name, 1 / k))
    assert within(np.prod(end.x, axis=1), 0)  # the coordinates have noise of their own
    if isinstance(end.state, Kinetic) and name != "baoab":
        assert within(np.asarray(end.state.v) ** 2, 0.7)


@pytest.mark.parametrize("kernel", [ula, randomised_midpoint, mala])
def test_the_step_means_the_same_to_all(kernel):
    """On a flat density every overdamped step is accepted, and has variance 2h."""
    end = run(jax.random.key(0), kernel(quadratic(0.0), 0.3), jnp.zeros(20_000), 1)
    assert within(end.x**2, 0.6) and end.info.acceptance.tolist() == [1]


def test_mala_is_exact_where_ula_is_not():
    """From a wrong start; four moments of a mixture of two, within 4 standard errors."""
    weights, mean, std, h = np.array([0.3, 0.7]), np.array([-1.0, 0.7]), np.array([0.4, 0.6]), 0.3
    law = target(lambda x: jax.nn.logsumexp(jnp.log(weights / std) - 0.5 * ((x - mean) / std) ** 2))
    nodes, masses = np.polynomial.hermite_e.hermegauss(8)
    at = mean[:, None] + std[:, None] * nodes[None]
    moments = [weights @ (at**p @ masses) / np.sum(masses) for p in (1, 2, 3, 4)]
    start = 2 * np.random.default_rng(0).standard_normal(20_000)
    adjusted, plain = (chains(kernel(law, h), start, 100) for kernel in (mala, ula))
    for p, moment in enumerate(moments, 1):
        assert within(np.asarray(adjusted.x) ** p, moment), p
    assert not within(np.asarray(plain.x) ** 2, moments[1], errors=10)
    assert 0.5 < np.mean(adjusted.info.acceptance) < 0.95
    assert (np.asarray(plain.info.acceptance) == 1).all()


# --- Any target, any kernel. ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ula", "mala"])
def test_a_denoiser_at_one_time_is_its_marginal(name):
    """The chain on its score is the chain on the log density of an independent oracle."""
    process, t, data = VP(), 0.3, GaussianMixture.random(3, 2, 2)
    alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
    law = target(exact.mixture(process, data.weights, data.means, data.covs), t)
    other = target(lambda x: data.log_density(x, alpha, sigma))
    start = np.random.default_rng(1).standard_normal((3, 2))
    ends = [chains(KERNELS[name](law, 0.05), start, 20).x for law in (law, other)]
    np.testing.assert_allclose(*ends, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", KERNELS)
def test_one_sample_of_any_shape_in_float32(name):
    """Alone or among others; the key decides; nothing calls the host."""
    kernel, x = KERNELS[name](quadratic(np.float64(2.0)), np.float64(0.1)), np.ones((2, 1, 3))
    one = lambda key, x: run(key, kernel, x, 5, trajectory=True)  # noqa: E731
    single, several = jax.jit(one), jax.jit(jax.vmap(one))
    key, start = jax.random.key(4), jnp.asarray(x, jnp.float32)
    alone = single(key, start)
    dtype = jnp.float64 if name == "mala" else jnp.float32  # blackjax draws in the default dtype
    assert alone.x.shape == (5, 2, 1, 3) and alone.x.dtype == dtype
    assert alone.info.jump.shape == alone.info.acceptance.shape == (5,)
    np.testing.assert_array_equal(alone.x[-1], alone.state.x)
    gaps = np.diff(np.concatenate([start[None], alone.x]), axis=0)
    np.testing.assert_allclose(alone.info.jump, np.sum(gaps**2, axis=(1, 2, 3)), rtol=1e-4)
    keys = jnp.stack([jax.random.key(5), key])
    many = several(keys, jnp.stack([2 * start, start]))
    np.testing.assert_allclose(many.x[1], alone.x, rtol=1e-5, atol=1e-6)
    assert np.abs(single(keys[0], start).x - alone.x).max() > 0.01
    assert "callback" not in str(jax.make_jaxpr(one)(key, start))
    assert jax.eval_shape(one, key, jnp.ones(())).x.shape == (5,)


@pytest.mark.parametrize("name", ["randomised_midpoint", "mala", "baoab"])
def test_a_step_may_be_traced_and_differentiated(name):
    start, key, steps = np.ones(2), jax.random.key(0), jnp.array([0.1, 0.3, 0.30001, 0.29999])
    end = lambda h: run(key, KERNELS[name](quadratic(1.0), h), start, 4).x  # noqa: E731
    several, slope = jax.jit(lambda hs: (jax.vmap(end)(hs), jax.jacfwd(end)(hs[1])))(steps)
    np.testing.assert_allclose(several[1], jax.jit(lambda: end(0.3))(), rtol=1e-12)
    if name != "mala":  # whose acceptance has no derivative
        np.testing.assert_allclose(slope, (several[2] - several[3]) / 2e-5, rtol=1e-6)


@pytest.mark.parametrize("name", ["baoab", "ALIGN"])
def test_a_key_draws_the_first_velocity(name):
    init = KERNELS[name](quadratic(1.0), 0.1).init
    assert not init(jnp.ones(3)).v.any()
    drawn = np.asarray(init(jnp.zeros(20_000), jax.random.key(0)).v)
    assert within(drawn, 0) and within(drawn**2, 0.7)


def test_the_tools_of_blackjax_run_our_kernels():
    for name in ("ula", "baoab"):
        kernel, start = KERNELS[name](quadratic(1.0), 0.1), jnp.ones(2)
        end, (states, _) = blackjax.util.run_inference_algorithm(
            jax.random.key(0), kernel, 3, initial_position=start
        )
        assert states.x.shape == (3, 2)
        np.testing.assert_array_equal(states.x[-1], end.x)


# --- Annealing. -----------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [6, 600])
def test_annealing_a_gaussian_follows_its_recursion(levels):
    """Mean and variance by hand, within 4 standard errors of 20,000 chains; denoised as well."""
    process, mean, variance, size, steps = VP(), 1.5, 0.4, 0.3, 2
    denoiser, ts = exact.gaussian(process, [mean], variance), process.grid(levels, "logsnr")
    scales = [(float(process.alpha(t)), float(process.sigma(t))) for t in ts]
    m, v, before = 0.0, scales[0][1] ** 2, scales[0][0]
    for alpha, sigma in scales:
        m, v, before = m * alpha / before, v * (alpha / before) ** 2, alpha
        total, h = alpha**2 * variance + sigma**2, size * sigma**2
        for _ in range(steps):
            keep = 1 - h / total
            m, v = alpha * mean + keep * (m - alpha * mean), keep**2 * v + 2 * h
    start = scales[0][1] * np.random.default_rng(0).standard_normal((20_000, 1))
    keys = jax.random.split(jax.random.key(1), len(start))

    def ends(denoise):
        one = lambda key, x: annealed(  # noqa: E731
            key, denoiser, x, ts, steps=steps, step_size=size, denoise=denoise
        )
        return np.asarray(jax.jit(jax.vmap(one))(keys, start))

    x = ends(False)
    assert within(x, m) and within((x - m) ** 2, v)
    if levels == 600:  # slow enough for the law of the last level, but for the bias of a step
        assert abs(m - alpha * mean) < 0.05 and abs(v * (1 - h / (2 * total)) / total - 1) < 0.05
        return
    gain = alpha * variance / total
    np.testing.assert_allclose(ends(True), mean + gain * (x - alpha * mean), rtol=1e-10)


# --- Wrong arguments. -----------------------------------------------------------------------------


@pytest.mark.usefixtures("as_users_see_it")
def test_wrong_arguments():
    key, law, x = jax.random.key(0), quadratic(1.0), jnp.ones(2)
    gauss = exact.gaussian(VP(), [0.0, 0.0], 1.0)
    net = Denoiser(VP(), lambda t, x, cond: x)
    assert not isinstance(target(net, 0.5), AbstractDensity)
    ts = [0.9, 0.5, 0.1]
    usual = {"steps": 1, "step_size": 0.1}
    anneal = lambda d=gauss, ts=ts, **kw: annealed(key, d, x, ts, **{**usual, **kw})  # noqa: E731
    for make, message in (
        (lambda: target(gauss), "target: t must be one time of the denoiser, .*got None"),
        (lambda: target(gauss, np.array(ts)), r"got shape \(3,\)"),
        (lambda: target(3.0), "law must be a log density .* got 3.0"),
        (lambda: target(lambda x: x, 0.5), "t must be left out for a log density, got 0.5"),
        (lambda: target(lambda x: x).score(x), r"returns one number, \(\), got shape \(2,\)"),
        (lambda: ula(gauss, 0.1), r"ula: target must be made by target\(...\)"),
        (lambda: ula(law, 0.0), "ula: step_size must be a finite number"),
        (lambda: randomised_midpoint(law, -1.0), "got -1.0"),
        (lambda: mala(target(net, 0.5), 0.1), "mala: target must be one with a log density"),
        (lambda: baoab(law, 0.1, np.inf), "baoab: gamma must be a finite number"),
        (lambda: baoab(law, 0.1, 1.0, -0.5), "baoab: u must be .* got -0.5"),
        (lambda: underdamped(law, 0.1, 1.0, solver=dfx.Heun()), "ALIGN of diffrax, got Heun"),
        (
            lambda: jax.jit(lambda g: underdamped(law, 0.1, g).init(x).x)(1.0),
            "gamma must be a known number; baoab takes traced ones",
        ),
        (lambda: run(0, ula(law, 0.1), x, 3), "key must be a key from jax.random.key"),
        (lambda: run(key, ula, x, 3), "kernel must be a pair"),
        (lambda: run(key, ula(law, 0.1), x, 0), "steps must be a whole number of at least 1"),
        (lambda: anneal(law), "denoiser must be a jaxdiff denoiser"),
        (lambda: anneal(ts=ts[::-1]), "strictly decreasing"),
        (lambda: anneal(steps=0), "steps must be a whole number"),
        (lambda: anneal(step_size=0), "step_size must be a finite number"),
        (
            lambda: anneal(exact.gaussian(Rectified(), [0.0, 0.0], 1.0), [1.0, 0.5, 0.0]),
            r"ts\[0\] must be a time of finite log-SNR, got t=1.0",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "blackjax", None)
    with pytest.raises(ImportError, match=r'pip install "jaxdiff\[mc\]"'):
        mala(quadratic(1.0), 0.1)
