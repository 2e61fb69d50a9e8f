"""Grids fitted to a model: the Girsanov bound, shortest paths and the arc-length clock."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import GaussianMixture

import jaxdiff as jd
from jaxdiff import exact, grids, solvers
from jaxdiff.process import EDM, VP, Rectified
from jaxdiff.score import Denoiser
from jaxdiff.tuning.align import align_your_steps, klub
from jaxdiff.tuning.kinetic import kinetic_energy, kinetic_grid
from jaxdiff.tuning.trajectories import gits, jump_costs, shortest_path

C, KEY = 0.5, jax.random.key(0)
NOISE = EDM(sigma_min=0.02, sigma_max=20.0)
SHARP = exact.mixture(
    NOISE, [1, 1, 1], [[-0.5, 0.0], [0.5, 0.2], [0.0, 0.6]], np.array([0.1, 0.05, 0.15]) ** 2
)
LINE = GaussianMixture.isotropic([0.4, 0.6], [[-1.0], [0.6]], [0.04, 0.09])  # in one dimension


def normal_data(n, d, seed=1):
    return C * jax.random.normal(jax.random.key(seed), (n, d))


def snr(path, ts):
    return np.exp(2 * np.asarray(jax.vmap(path.lam)(jnp.asarray(ts))))


def moved(path, ts):
    """The nodes of another path at the noise levels of NOISE's grid."""
    return np.asarray(jax.vmap(path.t_of_lam)(-jnp.log(jnp.asarray(ts))))


def closed_form(s, d):
    """The published lemma, for N(0, C^2 I_d) at noise levels s."""
    c2, s2 = C**2, np.asarray(s) ** 2
    total = np.log((s2[0] + c2) / (s2[-1] + c2)) - np.log(s2[0] / s2[-1])
    return d / 2 * (total + c2 * np.sum((s2[:-1] - s2[1:]) / ((c2 + s2[:-1]) * s2[1:])))


def best_normal_grid(n):
    """The minimiser of the closed form: log(1 + C^2 snr) uniform, since all ratios are equal."""
    low, high = (np.log1p(C**2 / s**2) for s in (20.0, 0.02))
    return C / np.sqrt(np.expm1(low + (high - low) * np.arange(n + 1) / n))


@jax.jit
def line_moments(alpha, sigma):
    """Quadrature over the states x of LINE: x, their probabilities, and m(x)."""
    x = jnp.linspace(-1, 1, 4001) * (alpha * 3 + 8 * sigma)
    log_q, score = jax.vmap(jax.value_and_grad(lambda x: LINE.log_density(x[None], alpha, sigma)))(
        x
    )
    return x, jnp.exp(log_q) * (x[1] - x[0]), (x + sigma**2 * score) / alpha


def line_signal(snr):
    """E m^2 of LINE, which is E x_0^2 less the mean squared error."""
    _, q, m = line_moments(1.0, snr**-0.5)
    return jnp.sum(q * m**2)


# --- The bound. ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind,options", [("edm", {}), ("cosine", dict(c=C))])
def test_bound_of_normal_data_is_the_lemma(kind, options):
    n, d = 8192, 64
    model = exact.gaussian(NOISE, jnp.zeros(d), C**2)
    ts = NOISE.grid(10, kind, **options)
    terms = klub(KEY, model, normal_data(n, d), ts=ts)
    # |.|^2 is a multiple of a chi-square of d degrees, so that a term has this relative error; the
    # data are shared by all terms, hence so has at most the sum.
    error = (2 / (d * n)) ** 0.5
    np.testing.assert_allclose(jnp.sum(terms), closed_form(ts, d), rtol=4 * error)
    each = [closed_form(pair, d) for pair in itertools.pairwise(ts)]
    np.testing.assert_allclose(terms, each, rtol=5 * error)
    assert 4 * error < 0.01


def test_bounds_of_published_grids():
    published = {"edm": 5.37, "cosine": 9.95}
    for kind, value in published.items():
        options = dict(c=C) if kind == "cosine" else {}
        np.testing.assert_allclose(
            closed_form(NOISE.grid(10, kind, **options), 1), value, rtol=1e-3
        )
    best = [0.526, 0.309, 0.206, 0.144, 0.102, 0.073, 0.053, 0.038, 0.028]
    np.testing.assert_allclose(best_normal_grid(10)[1:-1], best, atol=1e-3)
    np.testing.assert_allclose(closed_form(best_normal_grid(10), 1), 1.300, atol=1e-3)


def test_bound_is_the_same_on_every_path_and_starts_at_pure_noise():
    ts, data = NOISE.grid(3), normal_data(4096, 2)
    ours = klub(KEY, exact.gaussian(NOISE, jnp.zeros(2), C**2), data, ts=ts)
    flow = exact.gaussian(Rectified(), jnp.zeros(2), C**2)
    theirs = klub(KEY, flow, data, ts=moved(flow.process, ts))
    np.testing.assert_allclose(theirs, ours, rtol=1e-9)
    nodes = np.array([1.0, 0.7, 0.4, 0.2])  # alpha = 0: the closed form at infinite noise
    levels = np.append(1e8, nodes[1:] / (1 - nodes[1:]))
    each = [closed_form(pair, 2) for pair in itertools.pairwise(levels)]
    np.testing.assert_allclose(klub(KEY, flow, data, ts=nodes), each, rtol=4 / 4096**0.5)


def test_bound_of_a_network_that_is_no_posterior_mean():
    # m = x: E|x_s - x_{s_i}|^2 = d (s_i^2 - s^2), which only the pair of noisy samples decides.
    model, ts, n, d = Denoiser(NOISE, lambda t, x, cond=1.0: cond * x), NOISE.grid(8), 2048, 4
    y, one = snr(NOISE, ts), jnp.ones(n)
    truth = d / 2 * (np.diff(y) / y[:-1] - np.diff(np.log(y)))
    data = normal_data(n, d)
    terms = [klub(k, model, data, ts=ts, cond=one) for k in jax.random.split(KEY, 9)]
    error = np.std(terms, axis=0, ddof=1) / 3
    assert np.all(np.abs(np.mean(terms, axis=0) - truth) < 5 * error)
    assert np.all(error < 0.02 * truth)
    # Quadratic in the condition, and in chunks the same.
    whole, double = (klub(KEY, model, data, ts=ts, cond=c) for c in (one, 2 * one))
    np.testing.assert_allclose(double, 4 * whole, rtol=1e-10)
    pieces = klub(KEY, model, data, ts=ts, cond=one, chunk=1000)
    np.testing.assert_allclose(pieces, whole, rtol=1e-12)


def test_bound_of_a_mixture_is_the_integral_of_its_mean_squared_error():
    # An exact denoiser is a martingale: E|m - m_i|^2 = E|m|^2 - E|m_i|^2.
    model = exact.mixture(NOISE, LINE.weights, LINE.means, [0.04, 0.09])
    ts = np.array([20.0, 1.5, 0.7, 0.4, 0.2])
    y, nodes = snr(NOISE, ts), np.polynomial.legendre.leggauss(24)
    truth = []
    for low, high in itertools.pairwise(y):
        at = low + (high - low) * (nodes[0] + 1) / 2
        gain = [line_signal(v) - line_signal(low) for v in at]
        truth.append(np.dot(nodes[1], gain) * (high - low) / 4)
    terms = [
        klub(jax.random.fold_in(KEY, i), model, LINE.sample(i, 2048), ts=ts) for i in range(16)
    ]
    error = np.std(terms, axis=0, ddof=1) / 4
    assert np.all(np.abs(np.mean(terms, axis=0) - truth) < 4 * error)
    assert np.all(error < 0.03 * np.array(truth))


def test_in_float32(defaults):
    model, ts = exact.gaussian(NOISE, jnp.zeros(2), C**2), NOISE.grid(6)
    terms = klub(KEY, model, normal_data(4096, 2), ts=ts)
    assert terms.dtype == jnp.float32
    each = [closed_form(pair, 2) for pair in itertools.pairwise(ts)]
    np.testing.assert_allclose(terms, each, rtol=4 / 4096**0.5)


# --- Align Your Steps. ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide():
    """Normal data in enough dimensions that the bound has little noise."""
    return exact.gaussian(NOISE, jnp.zeros(64), C**2), normal_data(512, 64)


def test_descent_finds_the_best_grid_of_normal_data(wide):
    model, data = wide
    start = NOISE.grid(6)
    found = align_your_steps(KEY, model, data, ts=start, tol=1e-7, sweeps=90)
    assert found.dtype == np.float64 and found[0] == start[0] and found[-1] == start[-1]
    np.testing.assert_allclose(
        closed_form(found, 64), closed_form(best_normal_grid(6), 64), rtol=1e-4
    )
    np.testing.assert_allclose(found, best_normal_grid(6), rtol=0.02)


def test_descent_never_grows_and_stops_early(wide):
    model, data = wide
    start = NOISE.grid(6)
    bounds = [float(jnp.sum(klub(KEY, model, data, ts=start)))]
    for sweeps in range(1, 7):
        ts = align_your_steps(KEY, model, data, ts=start, sweeps=sweeps, tol=0.0)
        bounds.append(float(jnp.sum(klub(KEY, model, data, ts=ts))))
    assert np.all(np.diff(bounds) <= 1e-9 * np.array(bounds[1:]))
    assert bounds[-1] < 0.8 * bounds[0]
    # The first cycle that gains less than tol is the last one.
    cycles = np.array(bounds)[::3]
    gains = 1 - cycles[1:] / cycles[:-1]
    tol = 1.01 * gains[1]
    assert gains[0] > tol
    stopped = align_your_steps(KEY, model, data, ts=start, tol=tol)
    np.testing.assert_allclose(jnp.sum(klub(KEY, model, data, ts=stopped)), cycles[2], rtol=1e-9)


def test_subdivision_keeps_the_old_nodes(wide):
    model, data = wide
    start = NOISE.grid(6)
    coarse = align_your_steps(KEY, model, data, ts=start, sweeps=3)
    fine = align_your_steps(KEY, model, data, ts=start, subdivide=1, sweeps=3)
    np.testing.assert_array_equal(fine[::2], coarse)
    assert closed_form(fine, 64) < 0.99 * closed_form(grids.refine(NOISE, coarse), 64)
    single = align_your_steps(KEY, model, data, ts=[20.0, 0.02], sweeps=3)
    np.testing.assert_array_equal(single, [20.0, 0.02])  # nothing to move


def test_scale_changes_the_variance_only(wide):
    model, data = wide
    terms = [klub(KEY, model, data, ts=NOISE.grid(6), scale=scale) for scale in (0.2, 0.5, 1.5)]
    for other in (terms[0], terms[2]):
        np.testing.assert_allclose(other, terms[1], rtol=0.04)
        assert np.all(other != terms[1])


# --- GITS. ---------------------------------------------------------------------------------------


def cheapest(costs, n, gamma):
    """Every path of n steps, by brute force."""
    last = len(costs) - 1

    def price(path):
        return sum(gamma**k * costs[i, j] for k, (i, j) in enumerate(itertools.pairwise(path)))

    inner = itertools.combinations(range(1, last), n - 1)
    return min(((0, *path, last) for path in inner), key=price)


def test_shortest_path_is_brute_force():
    # Squared error of an Euler step of dx/ds = x/(s + 1), on its exact trajectory x = s + 1 ...
    s = np.geomspace(20, 0.02, 12)
    x = (s + 1) ** 0.5
    slope = 0.5 / x
    error = (x[:, None] + (s[None] - s[:, None]) * slope[:, None] - x[None]) ** 2
    assert tuple(shortest_path(error, 4, gamma=1.0)) == cheapest(error, 4, 1.0)
    # ... and costs of any sign.
    for seed, gamma in itertools.product(range(4), (0.8, 1.15)):
        costs = np.random.default_rng(seed).standard_normal((12, 12))
        for n in (1, 2, 4, 10, 11):
            assert tuple(shortest_path(costs, n, gamma=gamma)) == cheapest(costs, n, gamma)


@pytest.mark.parametrize("metric", ["l1", "l2", "dev"])
def test_costs_are_those_of_euler_steps(metric):
    ts = NOISE.grid(7)
    costs = jump_costs(KEY, SHARP, (2,), ts=ts, num=5, metric=metric)
    solver = solvers.DPMpp2M()
    run = jd.sample(KEY, jd.sampler(SHARP, (2,), solver=solver, ts=ts, trajectory=True), num=5)
    xs = run.aux["trajectory"]
    eps = np.asarray(jax.vmap(jax.vmap(SHARP.eps), (None, 0))(jnp.asarray(ts), xs))
    xs = np.asarray(xs)

    def off_chord(y, x):
        (p, q), (r, s) = x[-1] - x[0], y - x[0]
        return abs(p * s - q * r) / np.hypot(p, q)  # area of the parallelogram over its base

    for i, j in itertools.combinations(range(8), 2):
        each = []
        for x, e in zip(xs, eps, strict=True):
            there = x[i] + (ts[j] - ts[i]) * e[i]
            if metric == "dev":
                each.append(off_chord(there, x) - off_chord(x[j], x))
            else:
                each.append(np.linalg.norm(there - x[j], 1 if metric == "l1" else 2))
        np.testing.assert_allclose(costs[i, j], np.mean(each), rtol=1e-9, atol=1e-10)
    assert np.all(np.isinf(costs[np.tril_indices(8)]))


def test_costs_are_the_same_on_every_path_and_start_at_pure_noise():
    ts = NOISE.grid(7)
    ours = jump_costs(KEY, SHARP, (2,), ts=ts, num=5, metric="dev")
    flow = exact.mixture(Rectified(), [1, 1, 1], SHARP.means, SHARP.variances[:, 0])
    there = moved(Rectified(), ts)
    upper = np.triu_indices(8, 1)
    theirs = jump_costs(KEY, flow, (2,), ts=there, num=5, metric="dev")
    np.testing.assert_allclose(theirs[upper], ours[upper], rtol=1e-9, atol=1e-10)
    there = np.append(1.0, there[1:])  # alpha = 0
    theirs = jump_costs(KEY, flow, (2,), ts=there, num=5, metric="dev")
    assert np.all(np.isfinite(theirs[upper]))


@pytest.mark.slow
def test_gits_beats_the_grids_that_know_no_model():
    fine = NOISE.grid(60)
    costs = jump_costs(KEY, SHARP, (2,), ts=fine, num=128)
    init = jax.vmap(lambda k: NOISE.prior(k, (2,)))(jax.random.split(jax.random.key(7), 256))

    def ends(ts, solver):
        return jd.sample(None, jd.sampler(SHARP, (2,), solver=solver, ts=ts), num=256, init=init).x

    truth = ends(NOISE.grid(600), solvers.Heun())
    rms = lambda ts: float(jnp.sqrt(jnp.mean((ends(ts, solvers.DDIM()) - truth) ** 2)))  # noqa: E731
    for n in (4, 6):
        ours = rms(fine[shortest_path(costs, n)])
        assert ours < 0.85 * min(rms(NOISE.grid(n)), rms(NOISE.grid(n, "logsnr")))
    whole = gits(KEY, SHARP, (2,), ts=fine, n=6, num=128, chunk=50)
    np.testing.assert_array_equal(whole, fine[shortest_path(costs, 6)])
    assert whole[0] == NOISE.t_max and whole[-1] == NOISE.t_min


# --- The arc-length clock. -----------------------------------------------------------------------


@pytest.mark.parametrize("path", [NOISE, VP()], ids=["EDM", "VP"])
def test_kinetic_clock_of_normal_data_is_its_standard_deviation(path):
    model, data = exact.gaussian(path, jnp.zeros(2), C**2), normal_data(4096, 2)
    ts = kinetic_grid(KEY, model, data, n=6, ts=path.grid(128, "cosine"))
    assert ts.dtype == np.float64 and ts[0] == path.t_max and ts[-1] == path.t_min
    alpha, sigma = jax.vmap(path.alpha)(jnp.asarray(ts)), jax.vmap(path.sigma)(jnp.asarray(ts))
    steps = -np.diff(np.sqrt(alpha**2 * C**2 + sigma**2))
    # The speed is that of the law times the norm of 8192 normals, less its mean over time.
    np.testing.assert_allclose(steps / steps.mean(), 1, atol=4 / (2 * 8192) ** 0.5)


def test_kinetic_energy_is_the_identity_of_the_mean_squared_error():
    path, n = VP(), 4096
    model = exact.mixture(path, LINE.weights, LINE.means, [0.04, 0.09])
    ts = np.array([0.95, 0.6, 0.35, 0.15, 0.03])
    ours = kinetic_energy(KEY, model, LINE.sample(0, n), ts=ts)
    second = float(LINE.weights @ (LINE.means[:, 0] ** 2 + np.array([0.04, 0.09])))
    for t, energy in zip(ts, ours, strict=True):
        alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
        da, ds = map(float, path.rates(t))
        x, q, m = line_moments(alpha, sigma)
        u = da * m + ds * (x - alpha * m) / sigma
        mse = second - jnp.sum(q * m**2)
        identity = da**2 * second + ds**2 - (da - alpha * ds / sigma) ** 2 * mse
        np.testing.assert_allclose(jnp.sum(q * u**2), identity, rtol=1e-7)
        error = ((jnp.sum(q * u**4) - identity**2) / n) ** 0.5
        assert abs(energy - identity) < 4 * error


# --- Checks. -------------------------------------------------------------------------------------

UNIT = exact.gaussian(NOISE, jnp.zeros(2), C**2)
STEPS = NOISE.grid(4)


@pytest.mark.parametrize(
    "call,parts",
    [
        (lambda x: klub(KEY, None, x, ts=STEPS), ["klub", "denoiser", "NoneType"]),
        (lambda x: klub(KEY, UNIT, x[:0], ts=STEPS), ["klub", "data", "(0, 2)"]),
        (lambda x: klub(KEY, UNIT, x, ts=STEPS[::-1]), ["klub", "ts", "decreasing"]),
        (lambda x: klub(KEY, UNIT, x, ts=STEPS, scale=0.0), ["klub", "scale", "0.0"]),
        (lambda x: klub(KEY, UNIT, x, ts=STEPS, chunk=0), ["klub", "chunk", "0"]),
        (lambda x: klub(KEY, UNIT, x, ts=STEPS, cond=x[:3]), ["cond", "axis 8", "(3, 2)"]),
        (
            lambda x: klub(KEY, exact.gaussian(Rectified(), jnp.zeros(2), 1.0), x, ts=[0.5, 0.0]),
            ["klub", "ts", "sigma > 0"],
        ),
        (
            lambda x: align_your_steps(KEY, UNIT, x, ts=STEPS, candidates=4),
            ["candidates", "odd", "4"],
        ),
        (lambda x: align_your_steps(KEY, UNIT, x, ts=STEPS, subdivide=-1), ["subdivide", "-1"]),
        (lambda x: align_your_steps(KEY, UNIT, x, ts=STEPS, sweeps=0), ["sweeps", "0"]),
        (lambda x: align_your_steps(KEY, UNIT, x, ts=STEPS, tol=-1.0), ["tol", "-1.0"]),
        (lambda x: align_your_steps(KEY, UNIT, jnp.nan * x, ts=STEPS), ["the bound", "nan"]),
        (lambda x: gits(KEY, UNIT, (2,), ts=STEPS, n=5), ["gits", "n must", "4", "5"]),
        (lambda x: gits(KEY, UNIT, (2,), ts=STEPS, n=2, gamma=0.0), ["gits", "gamma", "0.0"]),
        (lambda x: jump_costs(KEY, UNIT, (2,), ts=STEPS, metric="l3"), ["metric", "'l3'"]),
        (
            lambda x: jump_costs(KEY, UNIT, (1,), ts=STEPS, metric="dev"),
            ["metric", "one dimension"],
        ),
        (lambda x: shortest_path(np.ones((3, 2)), 1), ["costs", "(3, 2)"]),
        (lambda x: shortest_path(np.full((3, 3), np.nan), 1), ["costs", "NaN"]),
        (lambda x: shortest_path(np.ones((3, 3)), 3), ["n must", "2", "3"]),
        (lambda x: kinetic_grid(KEY, UNIT, x, n=0, ts=STEPS), ["kinetic_grid", "n must", "0"]),
        (
            lambda x: kinetic_grid(KEY, Denoiser(NOISE, lambda t, x, c: x), x, n=2, ts=STEPS),
            ["kinetic_grid", "speed", "not all zero"],
        ),
        (
            lambda x: jax.jit(lambda x: align_your_steps(KEY, UNIT, x, ts=STEPS))(x),
            ["align_your_steps", "concrete", "jit"],
        ),
    ],
)
def test_tuning_names_what_is_wrong(as_users_see_it, call, parts):
    with pytest.raises(ValueError) as error:
        call(normal_data(8, 2))
    for part in parts:
        assert part in str(error.value)
