"""Likelihoods against the density of a mixture by SciPy, and the honesty of their errors."""

import math
from typing import ClassVar

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.stats
import trace_heads
from diffrax._local_interpolation import ThirdOrderHermitePolynomialInterpolation
from helpers import PROCESSES

import jaxdiff as jd
from jaxdiff import bits_per_dim, dequantise, likelihood
from jaxdiff.fisher.heads import AbstractTrace, ExactTrace, Hutchinson

D = 8
LAW = oracles.GaussianMixture.random(0, 4, D)
VP = PROCESSES["VP"]
TS = VP.grid(40, "logsnr")
KEY = jax.random.key(5)
TIGHT = dfx.PIDController(rtol=1e-10, atol=1e-10)


def mixture(path=VP, law=LAW):
    return jd.exact.mixture(path, law.weights, law.means, law.covs)


MIX = mixture()
NET = jd.Denoiser(VP, lambda t, x, cond: MIX.eps(t, x), "eps")  # the same, with no closed form


def diffused(path, t, n, law=LAW, seed=0):
    """Draws of q_t and their log density, by NumPy and SciPy."""
    alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
    noise = np.random.default_rng(seed).normal(size=(n, law.dim))
    x = alpha * law.sample(seed, n) + sigma * noise
    return x, np.array([law.log_prob(one, alpha, sigma) for one in x])


XS, TRUTH = diffused(VP, TS[-1], 4)


class RK4(dfx.AbstractERK):
    """The classic method of order 4."""

    tableau: ClassVar = dfx.ButcherTableau(
        c=np.array([0.5, 0.5, 1.0]),
        b_sol=np.array([1 / 6, 1 / 3, 1 / 3, 1 / 6]),
        b_error=np.zeros(4),
        a_lower=(np.array([0.5]), np.array([0.0, 0.5]), np.array([0.0, 0.0, 1.0])),
    )
    interpolation_cls: ClassVar = ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms):
        return 4


class Biased(AbstractTrace):
    """A deterministic estimate that is wrong on purpose: 0.2 r + 1."""

    stochastic: ClassVar[bool] = False

    def __call__(self, denoiser, t, x, cond=None, key=None):
        m, eps, r = ExactTrace()(denoiser, t, x, cond)
        return m, eps, 0.2 * r + 1


# --- The value. ---


def tightly(path, x, ts):
    denoiser = mixture(path)
    options = {"solver": dfx.Dopri8(), "controller": TIGHT, "max_steps": 256}
    return likelihood(denoiser, ts=ts, terminal=denoiser, **options)(x)


ENDS = ("VP", "VE", "Rectified", "Discrete")  # of every kind; the others are slow twins


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=name, marks=() if name in ENDS else pytest.mark.slow)
        for name, path in PROCESSES.items()
    ],
)
def test_the_density_of_a_mixture(path):
    ts = [0.999, 1e-3] if path is PROCESSES["Rectified"] else [path.t_max, path.t_min]
    x, truth = (a[0] for a in diffused(path, ts[-1], 1))
    out = tightly(path, x, ts)
    assert abs(out.log_prob - truth) < 1e-7
    assert out.error == 0 and out.result == dfx.RESULTS.successful and 10 < out.steps < 256


def test_the_state_at_the_noise_end_is_what_sampling_starts_from():
    ts = [VP.t_max, VP.t_min]
    out = tightly(VP, XS[0], ts)
    sampler = jd.sampler(MIX, (D,), ts=ts, solver=dfx.Dopri8(), controller=TIGHT)
    np.testing.assert_allclose(sampler(None, init=out.x).x, XS[0], atol=1e-8)


@pytest.mark.slow
def test_fixed_steps_converge_at_the_order_of_the_solver():
    counts = [10, 20, 40, 80]
    errors = []
    for n in counts:
        options = {"ts": VP.grid(n, "logsnr"), "solver": RK4(), "terminal": MIX}
        values = jd.many(likelihood(MIX, **options), XS).log_prob
        errors.append(np.sqrt(np.mean((values - TRUTH) ** 2)))
    assert -np.polyfit(np.log(counts), np.log(errors), 1)[0] > 3
    assert errors[-1] < 1e-4


def test_the_law_at_the_noise_end_costs_what_the_docstring_says():
    matched = jd.exact.gaussian(VP, *LAW.moments())
    truth, gaussian, plain = (
        np.asarray(jd.many(likelihood(MIX, ts=TS, terminal=law), XS).log_prob)
        for law in (MIX, matched, None)
    )
    np.testing.assert_allclose(truth, TRUTH, atol=1e-3)
    ratio = float(jnp.exp(VP.lam(TS[0])))
    size = math.sqrt(np.trace(LAW.moments()[1]) + np.sum(LAW.moments()[0] ** 2))
    # of first order in alpha/sigma at a point, of second (the leak) on average
    assert 1e-3 < np.abs(plain - truth).max() < 4 * ratio * size
    assert np.abs(gaussian - truth).max() < 4 * (ratio * size) ** 3


def test_a_controller_watches_the_integral_too():
    # At the mean of Gaussian data the state does not move, whatever the step.
    unit = jd.exact.gaussian(VP, jnp.zeros(D), 4.0)
    control = dfx.PIDController(rtol=1e-6, atol=1e-6)
    variance = 4 * VP.alpha(1e-3) ** 2 + VP.sigma(1e-3) ** 2
    truth = -0.5 * D * np.log(2 * np.pi * variance)
    control = dfx.ClipStepSizeController(control)  # whose norm is one level down
    out = likelihood(unit, ts=[1.0, 1e-3], terminal=unit, controller=control)(jnp.zeros(D))
    assert abs(out.log_prob - truth) < 1e-4, out.steps


# --- Random probes. ---


def test_fresh_probes_are_unbiased_with_an_honest_error_and_beat_frozen_ones():
    keys, x = jax.random.split(KEY, 256), XS[0]

    def spread(**options):
        fn = likelihood(NET, terminal=MIX, **options)
        out = jax.vmap(lambda key: fn(x, key=key))(keys)
        z = (np.mean(out.log_prob) - TRUTH[0]) / (np.std(out.log_prob) / 16)
        return out, z, np.var(out.log_prob)

    out, z, fresh = spread(ts=TS, trace=Hutchinson(4))
    assert abs(z) < 4
    # a variance from 256 values has a relative standard error of 0.09
    assert abs(np.mean(out.error**2) / fresh - 1) < 0.36
    control = dfx.PIDController(rtol=1e-4, atol=1e-4)
    frozen_out, z, frozen = spread(ts=TS, trace=Hutchinson(), controller=control)
    assert abs(z) < 4 and np.isnan(frozen_out.error).all()
    # Tsit5 has weights up to 3.3 of both signs: probes fresh in every stage would do worse
    assert 4 * fresh < frozen / 4


def test_debiasing_removes_the_bias_of_any_estimate():
    keys, x = jax.random.split(KEY, 256), XS[1]
    raw, fn = (likelihood(NET, ts=TS, trace=Biased(), debias=m, terminal=MIX) for m in (0, 32))
    assert abs(raw(x).log_prob - TRUTH[1]) > 2
    out = jax.vmap(lambda key: fn(x, key=key))(keys)
    assert abs(np.mean(out.log_prob) - TRUTH[1]) < 4 * np.std(out.log_prob) / 16
    ratio = np.mean(out.error**2) / np.var(out.log_prob)
    assert 0.64 < ratio < 4  # collapsed strata overestimate, and the variance is of 256 values


@pytest.mark.slow
def test_debiasing_under_a_controller_in_float32():
    low, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (MIX, XS[1]))
    options = {"trace": Biased(), "debias": 8, "terminal": low}
    options["controller"] = dfx.PIDController(rtol=1e-4, atol=1e-4)
    fn = likelihood(low, ts=TS, **options)
    out = np.asarray(jax.vmap(lambda key: fn(x, key=key).log_prob)(jax.random.split(KEY, 256)))
    assert out.dtype == np.float32
    assert abs(np.mean(out) - TRUTH[1]) < 4 * np.std(out) / 16


# --- Trained heads. ---


@pytest.fixture(scope="module")
def thin():
    """The mixture of the heads: a likelihood along its path, draws of q and their truth."""
    law, denoiser = trace_heads.thin_and_wide()
    ts = VP.grid(60, "logsnr")

    def fn(trace, debias=0):
        return likelihood(denoiser, ts=ts, trace=trace, debias=debias, terminal=denoiser)

    return fn, *diffused(VP, ts[-1], 32, law, seed=3)


@pytest.mark.slow
def test_a_preconditioned_head_is_within_a_nat_and_a_raw_one_useless(thin):
    fn, xs, truth = thin

    def rmse(trace):
        value = jd.many(fn(trace), xs).log_prob
        return np.sqrt(np.mean((value - truth) ** 2))

    assert rmse(ExactTrace()) < 1e-4
    assert rmse(trace_heads.train_head("preconditioned")[0]) < 1
    assert rmse(trace_heads.train_head("raw")[0]) > 50


@pytest.mark.slow
def test_a_debiased_head_is_unbiased(thin):
    (fn, xs, truth), head = thin, trace_heads.train_head("preconditioned")[0]
    keys, one = jax.random.split(KEY, 128), fn(head, 8)
    out = jax.vmap(lambda x: jax.vmap(lambda key: one(x, key=key))(keys))(xs[:4])
    values, errors = np.asarray(out.log_prob), np.asarray(out.error)
    z = (values.mean(1) - truth[:4]) / values.std(1) * math.sqrt(128)
    assert np.all(np.abs(z) < 4)
    ratio = np.mean(errors**2, 1) / values.var(1)
    assert np.all((0.5 < ratio) & (ratio < 3))  # standard error of a variance of 128: 0.125


# --- Derivatives and transformations. ---


def test_the_gradient_is_the_score():
    alpha, sigma = float(VP.alpha(TS[-1])), float(VP.sigma(TS[-1]))
    fn = likelihood(MIX, ts=TS, terminal=MIX)
    slope = jax.grad(lambda x: fn(x).log_prob)
    want = LAW.score(XS[0], alpha, sigma)
    np.testing.assert_allclose(slope(XS[0]), want, atol=1e-3 * np.abs(want).max())


class Shrink(eqx.Module):
    """The optimal network of N(0, c I), predicting eps."""

    c: jax.Array

    def __call__(self, t, x, cond=None):
        sigma = VP.sigma(t)
        return sigma * x / (VP.alpha(t) ** 2 * self.c + sigma**2)


@pytest.mark.slow
def test_the_gradient_with_respect_to_a_network():
    x, c, t = jnp.asarray([0.5, -1.0]), 1.7, float(TS[-1])

    def fn(c):  # R is a multiple of I, on which a probe is exact: the correction is 0
        denoiser = jd.Denoiser(VP, Shrink(c), "eps")
        law = jd.exact.gaussian(VP, jnp.zeros(2), c)
        out = likelihood(denoiser, ts=TS, debias=2, terminal=law)(x, key=KEY)
        return out.log_prob + out.error  # 0, where a standard deviation has no slope

    variance = lambda c: VP.alpha(t) ** 2 * c + VP.sigma(t) ** 2  # noqa: E731
    truth = lambda c: jnp.sum(jax.scipy.stats.norm.logpdf(x, 0, jnp.sqrt(variance(c))))  # noqa: E731
    for got, want in zip(jax.value_and_grad(fn)(c), jax.value_and_grad(truth)(c), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_batches_and_jit_equal_the_loop_and_compile_once():
    traces = []

    def net(t, x, cond):
        traces.append(1)
        return MIX.eps(t, x)

    denoiser = jd.Denoiser(VP, net, "eps")
    fn = likelihood(denoiser, ts=TS, trace=Hutchinson(2))
    keys = jax.random.split(KEY, len(XS))
    loop = [fn(x, key=key) for x, key in zip(XS, keys, strict=True)]
    count = len(traces)
    other = likelihood(denoiser, ts=VP.grid(40, "quadratic"), trace=Hutchinson(2))
    other(XS[0] + 1, key=keys[1])
    assert len(traces) == count
    batch = jax.jit(jax.vmap(lambda x, key: fn(x, key=key)))(XS, keys)
    for i, single in enumerate(loop):
        np.testing.assert_allclose(batch.log_prob[i], single.log_prob, rtol=1e-10)
        np.testing.assert_allclose(batch.error[i], single.error, rtol=1e-10)
        np.testing.assert_allclose(batch.x[i], single.x, rtol=1e-10)


@pytest.mark.parametrize("trace", [ExactTrace(), Hutchinson(3)])
def test_one_network_evaluation_per_stage(trace):
    calls = []

    def net(t, x, cond):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.tanh(x)

    denoiser = jd.Denoiser(VP, net, "eps")
    out = likelihood(denoiser, ts=VP.grid(5), solver=RK4(), trace=trace)(jnp.ones(3), key=KEY)
    jax.block_until_ready(out.log_prob)
    jax.effects_barrier()
    assert len(calls) == 4 * 5 and out.steps == 5


def test_float32(defaults):
    low = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), MIX)
    fn = likelihood(low, ts=TS, terminal=low)
    for x, truth in zip(XS, TRUTH, strict=True):
        out = fn(jnp.asarray(x, jnp.float32))
        assert out.log_prob.dtype == out.x.dtype == jnp.float32
        assert abs(out.log_prob - truth) < 1e-3


def test_images_and_conditions():
    shift = np.linspace(-1.0, 1.0, 6).reshape(2, 3)
    unit = jd.exact.gaussian(VP, jnp.zeros((2, 3)), 0.5)
    # eps of N(cond, I/2) is that of N(0, I/2) at x - alpha cond
    denoiser = jd.Denoiser(VP, lambda t, x, cond: unit.eps(t, x - VP.alpha(t) * cond), "eps")
    t, x = float(TS[-1]), jnp.full((2, 3), 0.3)
    law = jd.exact.gaussian(VP, shift, 0.5)
    alpha, scale = float(VP.alpha(t)), math.sqrt(0.5 * VP.alpha(t) ** 2 + VP.sigma(t) ** 2)
    want = np.sum(scipy.stats.norm.logpdf(x, alpha * shift, scale))
    out = likelihood(denoiser, ts=TS, trace=Hutchinson(2), terminal=law)(x, shift, key=KEY)
    assert out.x.shape == (2, 3) and abs(out.log_prob - want) < 1e-5


# --- Failures. ---


def test_a_failure_is_nan_and_a_result():
    broken = jd.Denoiser(VP, lambda t, x, cond: jnp.nan * x, "eps")
    control = dfx.PIDController(rtol=1e-8, atol=1e-8)
    for denoiser, options, result in [
        (broken, {}, dfx.RESULTS.nonfinite),
        (NET, {"controller": control, "max_steps": 3}, dfx.RESULTS.max_steps_reached),
    ]:
        out = jax.jit(likelihood(denoiser, ts=TS, **options))(XS[0])
        assert out.result == result
        assert np.isnan(out.log_prob) and np.isnan(out.error) and np.isnan(out.x).all()


def test_errors(as_users_see_it):
    x, flow = jnp.zeros(D), mixture(PROCESSES["Rectified"])
    for call, said in [
        (lambda: likelihood(lambda t, x: x, ts=TS), "likelihood: denoiser must be a jaxdiff"),
        (lambda: likelihood(flow, ts=[1.0, 0.1]), r"ts\[0\] must be .* t=1.0; start below"),
        (lambda: likelihood(flow, ts=[0.9, 0.0]), r"ts\[-1\] must be .* t=0.0; end above"),
        (lambda: likelihood(MIX, ts=TS[::-1]), "likelihood: ts must be strictly decreasing"),
        (lambda: likelihood(MIX, ts=TS, solver=jd.solvers.DDIM()), "solver .* got DDIM"),
        (lambda: likelihood(MIX, ts=TS, solver=dfx.SEA()), "solver must be an ODE solver"),
        (lambda: likelihood(MIX, ts=TS, trace=Hutchinson())(x), "likelihood: key must be a key"),
        (lambda: likelihood(MIX, ts=TS, debias=2)(x), "likelihood: key must be a key"),
        (lambda: likelihood(MIX, ts=TS, debias=3), "debias must be even.* got 3"),
        (lambda: likelihood(MIX, ts=TS, debias=-2), "debias must be a whole number"),
        (
            lambda: likelihood(MIX, ts=TS, debias=2, trace=Hutchinson()),
            "trace must be deterministic .* got Hutchinson",
        ),
        (lambda: likelihood(MIX, ts=TS, trace="exact"), "trace must be .* got 'exact'"),
        (lambda: likelihood(MIX, ts=TS, terminal=NET), "terminal must be an exact denoiser"),
        (lambda: likelihood(MIX, ts=TS, max_steps=0), "max_steps must be a whole number"),
        (lambda: dequantise(KEY, x, 0.0), "dequantise: width must be a positive number, got 0.0"),
        (lambda: bits_per_dim(x, D, -1.0), "bits_per_dim: width must be a positive number"),
        (lambda: bits_per_dim(x, 0, 1.0), "bits_per_dim: d must be a whole number"),
    ]:
        with pytest.raises(ValueError, match=said):
            call()


# --- Discrete data. ---


@pytest.mark.parametrize("spread", [0.5, 38.0])
def test_dequantised_bits_bound_those_of_a_discretised_gaussian(spread):
    # levels k, one apart, of probability Phi(k + 1/2) - Phi(k - 1/2)
    k = np.arange(-400, 401)
    law = scipy.stats.norm(0, spread)
    p = law.cdf(k + 0.5) - law.cdf(k - 0.5)
    exactly = -np.sum(p * np.log2(np.where(p > 0, p, 1)))
    nodes, weights = np.polynomial.legendre.leggauss(20)
    log_p = law.logpdf(k[:, None] + nodes[None] / 2) @ (weights / 2)
    bound = float(bits_per_dim(np.sum(p * log_p), 1, 1.0))
    # the gap is the mean divergence of the uniform law from the density in a cell
    assert 0 < bound - exactly < (0.3 if spread < 1 else 1e-4)
    levels = np.random.default_rng(0).choice(k, size=20_000, p=p / p.sum())
    x = np.asarray(dequantise(KEY, levels.astype(float), 1.0))
    np.testing.assert_array_equal(np.round(x), levels)
    bits = np.asarray(bits_per_dim(law.logpdf(x), 1, 1.0))
    assert abs(bits.mean() - bound) < 4 * bits.std() / math.sqrt(len(x))
    for scale in (2 / 255, 1 / 256):  # the unit of the data does not matter
        scaled = scipy.stats.norm(0.3, spread * scale)
        y = np.asarray(dequantise(KEY, 0.3 + scale * levels, scale))
        np.testing.assert_allclose(bits_per_dim(scaled.logpdf(y), 1, scale), bits, rtol=1e-9)


def test_dequantising_is_uniform():
    u = np.asarray(dequantise(KEY, jnp.zeros((100, 50)), 3.0)).ravel() / 3 + 0.5
    assert scipy.stats.kstest(u, "uniform").pvalue > 1e-3
    assert dequantise(KEY, jnp.zeros(2, jnp.float32), 1.0).dtype == jnp.float32


def test_the_law_at_the_end_must_be_of_the_same_path(as_users_see_it):
    unit, other = (
        jd.exact.gaussian(p, jnp.zeros(2), 1.0) for p in (VP, jd.process.EDM(sigma_max=20.0))
    )
    with pytest.raises(ValueError, match="terminal must be of the process of denoiser"):
        likelihood(unit, ts=VP.grid(8), terminal=other)


def test_all_stages_of_a_step_share_their_probes():
    # a stage at the end of a step of Tsit5 has weight 2.3: fresh probes there would dominate
    denoiser = jd.exact.gaussian(VP, jnp.zeros(2), jnp.array([[1.0, 0.8], [0.8, 1.0]]))
    ts, keys = VP.grid(8, "logsnr"), jax.random.split(jax.random.key(0), 400)

    def spread(solver):
        fn = likelihood(denoiser, ts=ts, solver=solver, trace=Hutchinson(1))
        return jnp.std(jax.vmap(lambda key: fn(jnp.ones(2), key=key).log_prob)(keys))

    low, high = spread(dfx.Midpoint()), spread(dfx.Tsit5())
    assert high < 2 * low, (low, high)


# --- Prepared once. ---


class Bent(eqx.Module):
    w: jax.Array

    def __call__(self, t, x, cond=None):
        return jnp.tanh(self.w @ x + t)


def test_both_modes_of_autodiff_are_the_slope_of_the_value():
    """By the sample and by the network, on a fixed grid of Tsit5: as a central difference."""
    start = np.random.default_rng(2).standard_normal((2, 3)), np.eye(3)
    w, (x, way) = jnp.asarray(start[1]), jnp.asarray(start[0])

    def fn(h):
        denoiser = jd.Denoiser(VP, Bent(w * (1 + h)), "eps")
        return likelihood(denoiser, ts=VP.grid(6, "logsnr"))(x + h * way).log_prob

    # a step h leaves an error of order h^2 = 1e-8, and round-off over h of 1e-11
    want = (fn(jnp.asarray(1e-4)) - fn(jnp.asarray(-1e-4))) / 2e-4
    back, ahead = jax.grad(fn)(0.0), jax.jvp(fn, (0.0,), (1.0,))[1]
    assert abs(want) > 0.1
    np.testing.assert_allclose(back, want, rtol=1e-6)
    np.testing.assert_allclose(ahead, back, rtol=1e-10)


def test_new_rows_keys_and_conditions_trace_nothing():
    traces = []

    def net(t, x, cond):
        traces.append(1)
        return MIX.eps(t, x - cond)

    fn = likelihood(jd.Denoiser(VP, net, "eps"), ts=VP.grid(5), trace=Hutchinson(2))
    fn(XS[0], np.zeros(D), key=KEY)
    count = len(traces)
    other = fn(XS[1], np.ones(D), key=jax.random.key(6))
    assert len(traces) == count > 0
    fresh = likelihood(jd.Denoiser(VP, net, "eps"), ts=VP.grid(5), trace=Hutchinson(2))
    again = fresh(XS[1], np.ones(D), key=jax.random.key(6))
    np.testing.assert_allclose(other.log_prob, again.log_prob, rtol=1e-12)
    for moved in (fn(XS[1], np.zeros(D), key=jax.random.key(6)), fn(XS[1], np.ones(D), key=KEY)):
        assert abs(moved.log_prob - other.log_prob) > 1e-6
