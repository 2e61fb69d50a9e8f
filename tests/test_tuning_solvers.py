"""Solvers fitted to a model: DPM-Solver-v3, fitted coefficients, searched schedules."""

import itertools
import math

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff import exact
from jaxdiff.process import EDM, VP
from jaxdiff.solvers import DDIM, DPMpp2M, DPMpp3M, EulerMaruyama, RungeKutta, UniPC, pf_ode
from jaxdiff.solvers.fitted import Fitted
from jaxdiff.solvers.scheduled import Schedule, Scheduled
from jaxdiff.solvers.v3 import DPMSolverV3, Statistics, _divided
from jaxdiff.tuning import (
    distance,
    distil,
    integration_approximation,
    model_statistics,
    search_grid,
    search_schedule,
    subspace,
)

# The mixture and the span on which the specified errors were measured.
PATH = EDM(0.05, 20.0)
WEIGHTS = np.array([0.4, 0.35, 0.25])
MEANS = np.array([[1, 0.5], [-1, 0.2], [0.2, -1.1]])
STDS = np.array([0.35, 0.25, 0.45])
LAW = exact.mixture(PATH, WEIGHTS, MEANS, STDS**2)
FREEZE = DDIM()
NUM, MOST = 1024, 64


def data(n):
    rng = np.random.default_rng(1)
    k = rng.choice(3, size=n, p=WEIGHTS)
    return MEANS[k] + STDS[k][:, None] * rng.standard_normal((n, 2))


def rms(a):
    return float(np.sqrt(np.mean(np.square(a))))


@eqx.filter_jit
def _ends(solver, nodes, n, start):
    """Solve over the first n intervals of padded nodes: one program serves every n."""
    terms = pf_ode(LAW, "t")

    def body(i, carry):
        x, state = carry
        x, _, _, state, _ = solver.step(terms, nodes[i], nodes[i + 1], x, None, state, False)
        return x, state

    def one(x):
        state = solver.init(terms, nodes[0], nodes[1], x, None)
        return jax.lax.fori_loop(0, n, body, (x, state))[0]

    return jax.vmap(one)(start)


def ends(solver, ts, start):
    nodes = jnp.asarray(np.append(ts, np.full(MOST + 1 - len(ts), ts[-1])))
    return np.asarray(_ends(solver, nodes, jnp.asarray(len(ts) - 1), jnp.asarray(start)))


@pytest.fixture(scope="module")
def flow():
    """Starting states of the mixture and where the PF-ODE takes them."""
    start = 20.0 * np.random.default_rng(5).standard_normal((NUM, 2))
    controller = dfx.PIDController(1e-10, 1e-10)
    options = dict(clock="lam", controller=controller)
    sampler = jd.sampler(LAW, (2,), solver=dfx.Dopri8(), ts=[20.0, 0.05], **options)
    return start, np.asarray(jd.check(jd.sample(None, sampler, num=NUM, init=start)).x)


# --- DPM-Solver-v3. ---


def unipc_with_full_solves(p, of_noise, ts, x):
    """UniPC-p by Vandermonde systems and moments, on the gauge of EDM, without a corrected end."""
    nodes, outputs, last = [], [], None
    law = jax.jit(jax.vmap(lambda t, x: jnp.stack(LAW.pair(t, x)), (None, 0)))

    def taylor(lam0, h, lams, values):
        """Integrate the polynomial through the values: sum of derivatives times phi moments."""
        powers = np.vander(np.asarray(lams) - lam0, increasing=True)
        coefficients = np.linalg.solve(powers, np.stack([v.ravel() for v in values]))
        r, w = np.polynomial.legendre.leggauss(40)
        r, w = (r + 1) * h / 2, w * h / 2
        t1 = math.exp(-lam0 - h)
        kernel = -t1 * np.exp(h - r) if of_noise else np.exp(r - h)
        moments = [np.sum(w * kernel * r**k) for k in range(len(lams))]
        return (np.asarray(moments) @ coefficients).reshape(values[0].shape)

    for t, t1 in itertools.pairwise(ts):
        lam, h = -math.log(t), math.log(t / t1)
        value = np.asarray(law(t, x))[:, int(of_noise)]
        if last is not None:
            x0, lam0, h0, kept = last
            count = min(p, len(nodes))
            x = kept * x0 + taylor(lam0, h0, [lam, *nodes[:count]], [value, *outputs[:count]])
        nodes, outputs = [lam, *nodes], [value, *outputs]
        kept = 1.0 if of_noise else t1 / t
        last = x, lam, h, kept
        count = min(p, len(nodes))
        x = kept * x + taylor(lam, h, nodes[:count], outputs[:count])
    return x


@pytest.fixture(scope="module")
def statistics():
    return model_statistics(jax.random.key(1), LAW, data(1024), nodes=300)


def test_v3_with_fixed_parameters_is_unipc(statistics, flow):
    """The two usual predictions, through one program whose statistics are its arguments."""
    start, _ = flow
    ts = 20.0 * (0.05 / 20.0) ** (np.linspace(0, 1, 9) ** 1.3)
    one, none = np.ones(300), np.zeros((300, 2))
    for of_noise, linear, growth in ((False, one, 0 * one), (True, 0 * one, -one)):
        solver = DPMSolverV3(Statistics(statistics.lams, linear, growth, none), 3)
        expected = unipc_with_full_solves(3, of_noise, ts, start)
        np.testing.assert_allclose(ends(solver, ts, start), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("p", "corrector", "five", "ten"),
    [
        pytest.param(2, False, None, 1.8e-2, marks=pytest.mark.slow),
        pytest.param(2, True, 2.6e-2, 6.8e-3, marks=pytest.mark.slow),
        (3, True, 2.4e-2, 5.0e-3),
    ],
)
def test_v3_has_its_order_and_its_error_at_few_steps(p, corrector, five, ten, statistics, flow):
    """Errors as specified, within a factor 1.5; order p, and p + 1 with the corrector."""
    start, truth = flow
    solver, sizes = DPMSolverV3(statistics, p, corrector), (5, 10, 32, 64)
    errors = [rms(ends(solver, PATH.grid(n, "logsnr"), start) - truth) for n in sizes]
    for error, expected in zip(errors, (five, ten), strict=False):
        assert expected is None or 1 / 1.5 < error / expected < 1.5, errors
    order = math.log2(errors[2] / errors[3])
    assert order > solver.order(None) - 0.3, (order, errors)
    if p == 2 and not corrector:
        assert order < 2.3, (order, errors)


def test_pseudo_derivatives_are_divided_differences():
    """The weights, times the values of a function, are a sum over its table of differences."""
    nodes, h, g = np.array([0.3, 0.1, -0.4, -0.6]), 0.5, np.array([1.0, -2.0, 0.7, 5.0])
    table, expected = g, 0.0
    for k in range(3):
        expected += table[0] * h ** (k + 1) / (k + 1)
        table = np.diff(table) / (nodes[k + 1 :] - nodes[: len(nodes) - k - 1])
    got = _divided(jnp.ones_like, h, jnp.asarray(nodes), 3)
    np.testing.assert_allclose(got @ g, expected, rtol=1e-13)


def test_values_per_coordinate_make_rows_per_coordinate(statistics):
    """What a coordinate's own statistics, taken alone, would make of it."""
    window, lams = jnp.asarray([0.3, 0.5, 1.1]), jnp.linspace(-3, 3, 8)
    tables = [np.asarray(a)[::40] for a in (statistics.l, statistics.s, statistics.b[:, 0])]

    @jax.jit
    def rows(*tables):
        solver = DPMSolverV3(Statistics(lams, *tables), 2, False)
        return jax.tree.leaves(solver.row(PATH, window, jnp.asarray(3), 9))

    both = rows(*(np.stack([a, a[::-1]], 1)[:, None] for a in tables))
    for i, flip in enumerate((1, -1)):
        for whole, part in zip(both, rows(*(a[::flip] for a in tables)), strict=True):
            whole = whole[0, i] if whole.ndim > 0 else whole
            np.testing.assert_allclose(whole, part, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("own", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_statistics_of_a_gaussian(own):
    """In closed form: every coordinate of the PF-ODE is linear, y' = -l_d (y - mean)."""
    path, mean, std = VP(), np.array([0.5, -0.3]), np.array([0.3, 1.0])
    law, n = exact.gaussian(path, mean, std**2), 4000
    x0 = mean + std * np.random.default_rng(0).standard_normal((n, 2))
    options = dict(nodes=65, samples=n, t_end=0.05, coordinatewise=own, chunk=1000)
    got = model_statistics(jax.random.key(0), law, x0, **options)
    lams, inner = got.lams[:, None], slice(2, -2)  # l' is by differences
    each = 1 / (1 + std**2 * np.exp(2 * lams))
    slope = -2 * each * (1 - each)
    if own:
        np.testing.assert_allclose(got.l, each, rtol=1e-12)  # probes are exact on a diagonal
        np.testing.assert_array_equal(got.s, 0)  # f is constant
        np.testing.assert_allclose(got.b[inner], (-slope * mean)[inner], rtol=0.03, atol=1e-3)
        return
    linear, d_linear = each.mean(1, keepdims=True), slope.mean(1, keepdims=True)
    np.testing.assert_allclose(got.l, linear[:, 0], rtol=1e-12)
    # f = (l_d - l) z - l mean with z = y - mean of variance std^2 + s^2, z' = -l_d z
    a, variance = each - linear, std**2 + np.exp(-2 * lams)
    g = slope - d_linear - a * each
    s = (a * g * variance).sum(1) / (a**2 * variance).sum(1)
    b = -d_linear * mean + s[:, None] * linear * mean
    np.testing.assert_allclose(got.s[inner], s[inner], rtol=0.05, atol=0.05)
    np.testing.assert_allclose(got.b[inner], b[inner], atol=0.05)


# --- Fitted coefficients. ---

SPECIFIED = {5: (0.077, 0.057), 10: (0.031, 0.0215), 20: (0.0115, 0.0070)}


@pytest.mark.parametrize(
    "n", [pytest.param(5, marks=pytest.mark.slow), 10, pytest.param(20, marks=pytest.mark.slow)]
)
def test_fits_generalise_as_specified(n, flow):
    """Errors on noises that the fit has not seen, within 20 per cent; least squares on its own."""
    start, truth = flow
    ts = PATH.grid(n, "edm")
    args = dict(num=256, solver=FREEZE, ts=ts)
    fits = [
        fit(jax.random.key(3), LAW, (2,), **args) for fit in (integration_approximation, distil)
    ]
    for fitted, expected in zip(fits, SPECIFIED[n], strict=True):
        assert (fitted.errors[:, 1] <= fitted.errors[:, 0]).all()
        sampler = jd.sampler(LAW, (2,), solver=fitted, ts=ts)
        run = jd.sample(None, sampler, num=NUM, init=start)
        error = rms(run.x - truth)
        assert 0.8 < error / expected < 1.2, error
        assert int(run.nfe[0]) == n


def test_a_teacher_like_the_student_teaches_nothing():
    ts, key = PATH.grid(4, "edm"), jax.random.key(0)
    fitted = distil(key, LAW, (2,), num=8, solver=DPMpp2M(), ts=ts, substeps=1)
    assert np.abs(fitted.coefficients).max() < 1e-10 and np.abs(fitted.errors).max() < 1e-10
    with pytest.raises(ValueError, match="ts must be the grid of the fit"):
        fitted.tabulate(PATH, 0.9 * ts)


def test_a_subspace_holds_the_flow_of_a_linear_model():
    """With N(0, c^2) data all outputs are multiples of the noise, so that the fit is exact."""
    law, ts = exact.mixture(PATH, WEIGHTS, 0 * MEANS, np.full(3, 0.3)), PATH.grid(10, "edm")
    fitted = subspace(jax.random.key(3), law, (2,), num=256, solver=FREEZE, ts=ts, terms=2)
    assert fitted.errors[:, 0].min() > 1e-3 and fitted.errors[:, 1].max() < 1e-12
    assert Fitted(FREEZE, np.zeros((10, 10)), ts).memory == 9


# --- Searches. ---


def test_schedules_spell_solvers():
    ts = np.geomspace(20.0, 0.05, 7)
    for solver, choices in {
        DPMpp3M(): (3, "exact", "x0", 0),
        DPMpp3M(released=True): (3, "damped", "x0", 0),
        UniPC(2): (2, "bh2", "x0", 2),
        UniPC(3, "bh1", "eps"): (3, "bh1", "eps", 3),
    }.items():
        row, of_eps = Scheduled(Schedule.of(6, *choices)).tabulate(PATH, ts).rows
        ours, other = (row.weights, of_eps) if choices[2] == "x0" else (of_eps, row.weights)
        theirs = solver.tabulate(PATH, ts).rows
        np.testing.assert_array_equal(row.decay, theirs.decay)
        np.testing.assert_array_equal(row.gain, theirs.gain)
        weights = theirs.weights
        weights = np.stack(weights, 1) if isinstance(weights, tuple) else weights
        weights = np.pad(weights, ((0, 0), (0, 3 - weights.shape[1])))
        np.testing.assert_allclose(ours, weights, rtol=1e-12, atol=1e-13)
        np.testing.assert_array_equal(other, 0)


def test_a_step_may_start_at_the_older_node():
    """Frozen outputs from node -1 on: (s_1/s_-1) x_-1 + (1 - s_1/s_-1) m_0, and for eps."""
    ts = np.geomspace(20.0, 0.05, 7)
    s2, s0, s1 = ts[:3]
    for output in ("x0", "eps"):
        solver = Scheduled(Schedule.of(6, 1, output=output, start=1))
        row, of_eps = jax.tree.map(lambda a: a[1], solver.tabulate(PATH, ts).rows)
        total = {
            "m_0": row.decay + row.gain - sum(row.weights),
            "e_0": row.decay * s0 - sum(of_eps),
            "m_-1": row.weights[0],
            "e_-1": of_eps[0],
        }
        expected = {"m_0": 1 - s1 / s2, "e_0": 0, "m_-1": s1 / s2, "e_-1": s1}
        if output == "eps":
            expected = {"m_0": 0, "e_0": s1 - s2, "m_-1": 1, "e_-1": s2}
        for name, value in expected.items():
            np.testing.assert_allclose(total[name], value, atol=1e-13, err_msg=name)


def test_a_search_improves_and_repeats_itself():
    ts, fine = PATH.grid(6, "logsnr"), PATH.grid(60, "logsnr")
    args = dict(num=256, solver=RungeKutta("rk4"), ts=fine)
    objective, held_out = (distance(jax.random.key(k), LAW, (2,), **args) for k in (0, 1))
    start = [(Schedule.of(6, 2, "bh2"), ts), (Schedule.of(6, 2, "bh2", corrector=2), ts)]
    run = lambda seed, **options: search_schedule(  # noqa: E731
        jax.random.key(seed), objective, start, pop=12, top=4, rounds=6, **options
    )
    values = [objective(Scheduled(s), g) for s, g in start]
    np.testing.assert_allclose(values[0], objective(DPMpp2M(), ts), rtol=1e-12)
    found, again = run(0, pool=fine), run(0, pool=fine)
    assert found.value == again.value == found.trace[-1]
    np.testing.assert_array_equal(found.best[1], again.best[1])
    assert found.trace[0] == min(values) and (np.diff(found.trace) <= 0).all()
    assert found.value == objective(Scheduled(found.best[0]), found.best[1])
    assert found.value < 0.7 * values[0]
    assert held_out(Scheduled(found.best[0]), found.best[1]) < 0.8 * held_out(DPMpp2M(), ts)
    np.testing.assert_array_equal(run(1).best[1], ts)  # no pool, no other grid


def test_a_search_of_grids_finds_the_nodes_of_a_toy():
    pool, aim = np.linspace(1, 0, 33), np.array([1, 0.75, 0.5, 0.09375, 0])
    objective = lambda ts: np.inf if ts[1] > 0.9 else np.abs(ts - aim).sum()  # noqa: E731
    found = search_grid(
        jax.random.key(0), objective, [np.linspace(1, 0, 5)], pool, mutate=0.5, rounds=15
    )
    np.testing.assert_array_equal(found.best, aim)
    none = search_grid(jax.random.key(0), lambda ts: np.nan, [pool[::8]], pool, pop=3, rounds=1)
    assert none.value == np.inf


@pytest.mark.usefixtures("as_users_see_it")
def test_wrong_arguments():
    lams, one, key = np.linspace(-1.0, 1.0, 5), np.ones(5), jax.random.key(0)
    narrow = DPMSolverV3(Statistics(lams, one, one, one))
    ts, schedule = PATH.grid(3), Schedule.of(4)
    fit = dict(num=2, solver=FREEZE, ts=ts)
    for call, message in (
        (lambda: Statistics(lams, one, one[:4], one), r"l, s, b must be of shape \(5,\)"),
        (lambda: Statistics(lams**3, one, one, one), "lams must be increasing, equally spaced"),
        (lambda: DPMSolverV3(one), "statistics must be a Statistics"),
        (lambda: narrow.tabulate(PATH, ts), "log-SNRs in .-2.99573, 2.99573"),
        (lambda: model_statistics(key, LAW, data(4), samples=10, chunk=4), "chunk must be a div"),
        (lambda: model_statistics(key, exact.mixture(jd.process.Rectified(), WEIGHTS, MEANS, 1.0),
                                  data(4)), "times of finite log-SNR"),
        (lambda: Fitted(FREEZE, np.zeros((2, 1)), ts), r"coefficients must be of shape \(3, terms"),
        (lambda: distil(key, LAW, (2,), **{**fit, "solver": EulerMaruyama("u")}), "solver must be"),
        (lambda: integration_approximation(key, LAW, (2,), **fit, terms=0), "terms must be a"),
        (lambda: jax.jit(lambda ts: distil(key, LAW, (2,), **{**fit, "ts": ts}))(ts), "known"),
        (lambda: Schedule.of(4, 5), r"order must be whole numbers in \[1, 3\]"),
        (lambda: Scheduled(schedule).tabulate(PATH, ts), "a grid of 4 steps"),
        (lambda: search_schedule(key, len, [(schedule, ts)]), "schedules of 3 steps"),
        (lambda: search_grid(key, len, [ts, ts[1:]], ts), "grids of one length"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
