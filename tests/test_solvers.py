"""Solvers: orders, identities, exactness, rows of coefficients, engines, laws of the samples."""

import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.optimize
import scipy.stats
from helpers import DETERMINISTIC, EXPONENTIAL, HOOKED, OTHERS, PROCESSES, SOLVERS, each

import jaxdiff as jd
from jaxdiff import exact
from jaxdiff.solvers import (
    DDIM,
    AbstractGridSolver,
    Clock,
    DPMpp2M,
    EulerMaruyama,
    GridBrownian,
    Row,
    pf_ode,
    reverse_sde,
)
from jaxdiff.solvers.exponential import transfer

LAW = oracles.GaussianMixture.random(3, 3, 2, "diagonal")
PATHS = ("VP", "VE", "EDM", "Rectified", "SubVP", "Cosine")
LAM = (-2.5, 3.0)  # inside every process
MOST = 256


def mixture(path, law=LAW):
    variances = np.diagonal(law.covs, axis1=1, axis2=2)  # as diagonals: quick to compile
    return exact.mixture(path, law.weights, law.means, variances)


def solve(terms_of, solver, nodes, n, y):
    """Step through the first n intervals of padded nodes: one program serves every n."""
    terms = terms_of()
    state = solver.init(terms, nodes[0], nodes[1], y, None)

    def body(i, carry):
        y, state, ys = carry
        y, _, _, state, _ = solver.step(terms, nodes[i], nodes[i + 1], y, None, state, False)
        return y, state, ys.at[i + 1].set(y)

    ys = jnp.zeros((len(nodes), *y.shape)).at[0].set(y)
    return jax.lax.fori_loop(0, n, body, (y, state, ys))[2]


def gauge_paths(solver, denoiser, lams, n, start):
    """Trajectories of x/alpha, (nodes, paths, d), from starts in that gauge, on a log-SNR grid."""
    return np.asarray(_gauge_paths(solver, denoiser, lams, jnp.asarray(n), jnp.asarray(start)))


@eqx.filter_jit
def _gauge_paths(solver, denoiser, lams, n, start):
    path = denoiser.process
    ts = jax.vmap(path.t_of_lam)(lams)
    alpha = jax.vmap(path.alpha)(ts)[:, None]
    if isinstance(solver, AbstractGridSolver):
        solver = solver.tabulate(path, ts)  # rows beyond n mean nothing
    one = lambda y: solve(lambda: pf_ode(denoiser, "t"), solver, ts, n, alpha[0] * y) / alpha  # noqa: E731
    return jax.vmap(one, out_axes=1)(start)


def padded(lams):
    return jnp.asarray(np.append(lams, np.full(MOST + 1 - len(lams), lams[-1])))


def uniform(n):
    return padded(np.linspace(*LAM, n + 1))


# Starting points in the gauge x/alpha, of the law at the noise end.
START = np.exp(-LAM[0]) * np.random.default_rng(0).standard_normal((16, 2))


@pytest.fixture(scope="module")
def flow():
    """The end of every path by Dopri8 in the log-SNR clock, in the gauge x/alpha."""
    path = PROCESSES["VP"]
    return adaptive_flow(mixture(path), jnp.asarray(START))


@eqx.filter_jit
def adaptive_flow(denoiser, start):
    path = denoiser.process
    clock = Clock(path, "lam")
    first, last = (path.t_of_lam(jnp.asarray(lam)) for lam in LAM)

    def one(y):
        solution = dfx.diffeqsolve(
            pf_ode(denoiser, "lam"),
            dfx.Dopri8(),
            LAM[0],
            LAM[1],
            None,
            y * path.alpha(first) * clock.scale(first),
            stepsize_controller=dfx.PIDController(1e-12, 1e-12),
            throw=False,
        )
        return solution.ys[0] / clock.scale(last) / path.alpha(last)

    return jax.vmap(one)(start)


def slope(errors, sizes):
    return -np.polyfit(np.log(sizes), np.log(errors), 1)[0]


def rms(a):
    return float(np.sqrt(np.mean(np.square(a))))


@each({name: (name, *row) for name, row in DETERMINISTIC.items()})
def test_order_invariance_and_one_atom(case, flow):
    """On three processes, with one program each: the order, the trajectory, the exact cases."""
    name, solver, claimed, _ = case
    atom = np.array([0.7, -1.3])
    one = oracles.GaussianMixture.isotropic(np.ones(3), np.tile(atom, (3, 1)), np.zeros(3))
    expected = atom + np.exp(LAM[0] - LAM[1]) * (START - atom)  # x/alpha = x0 + s eps
    lams = np.linspace(*LAM, 13) + 0.15 * np.sin(np.arange(13.0) ** 2)  # uneven
    lams = padded(np.sort(np.clip(lams, *LAM)))
    assert solver.order(None) == claimed
    # Adams methods of order 4 start with large constants; their errors at 256 are still 1e-9.
    sizes, trajectories = ((64, 128, 256) if claimed == 4 else (32, 64, 128, 256)), []
    for path in ("VP", "EDM", "Rectified"):
        denoiser = mixture(PROCESSES[path])
        errors = [rms(gauge_paths(solver, denoiser, uniform(n), n, START)[n] - flow) for n in sizes]
        measured = slope(errors, sizes)
        assert measured >= claimed - 0.2 and errors[-1] < 0.05, (path, measured, errors)
        if claimed == 1:
            assert measured <= 1.1, (path, measured, errors)
        trajectories.append(gauge_paths(solver, denoiser, lams, 12, START)[:13])
        denoiser = mixture(PROCESSES[path], one)
        if name in EXPONENTIAL or "DEIS" in name:
            for inner in ([], [1.1, 1.2], [-2.4, 2.9]):
                nodes, n = padded([LAM[0], *inner, LAM[1]]), len(inner) + 1
                got = gauge_paths(solver, denoiser, nodes, n, START)[n]
                # large weights on an uneven grid multiply the round-off of the differences
                np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-11)
    if name in EXPONENTIAL:
        for other in trajectories[1:]:
            error = np.abs(other - trajectories[0]).max((1, 2))
            assert (error / np.abs(trajectories[0]).max((1, 2))).max() < 1e-12, error


def test_euler_in_time_has_order_one(flow):
    """What Euler-Maruyama in `"t"` is without its noise and half its drift."""
    denoiser, sizes = mixture(PROCESSES["VP"]), (32, 64, 128, 256)
    errors = [
        rms(gauge_paths(dfx.Euler(), denoiser, uniform(n), n, START)[n] - flow) for n in sizes
    ]
    assert abs(slope(errors, sizes) - 1) < 0.1, errors


def test_the_limit_is_the_exact_flow():
    """In one dimension the PF-ODE keeps quantiles, so that its flow is known."""
    law = oracles.GaussianMixture.isotropic([0.3, 0.7], [[-1.0], [0.8]], [0.1, 0.3])
    denoiser = mixture(PROCESSES["Cosine"], law)
    start = np.exp(-LAM[0]) * np.linspace(-1.5, 1.5, 7)[:, None]

    def cdf(x, s):  # of x0 + s eps
        scale = np.sqrt(law.covs[:, 0, 0] + s**2)
        return float(law.weights @ scipy.stats.norm.cdf((x - law.means[:, 0]) / scale))

    quantiles = [cdf(x, np.exp(-LAM[0])) for x in start[:, 0]]
    end = [
        scipy.optimize.brentq(lambda x, q=q: cdf(x, np.exp(-LAM[1])) - q, -9, 9, xtol=1e-13)
        for q in quantiles
    ]
    np.testing.assert_allclose(adaptive_flow(denoiser, jnp.asarray(start))[:, 0], end, atol=1e-9)
    errors = [
        rms(gauge_paths(DPMpp2M(), denoiser, uniform(n), n, start)[n, :, 0] - end)
        for n in (64, 128, 256)
    ]
    assert errors[-1] < 1e-3 and slope(errors, (64, 128, 256)) > 1.9, errors


# --- Identities. ---

SPANS = {"VP": (1.0, 1e-3), "VE": (1.0, 0.0), "EDM": (80.0, 0.002), "Rectified": (0.98, 0.01)}


@functools.cache
def span_grid(name, n=10):
    start, end = SPANS[name]
    return PROCESSES[name].grid(n, "logsnr", t_start=start, t_end=end)


@pytest.mark.parametrize("name", SPANS)
def test_ddim_is_euler_in_clock_r(name):
    path = PROCESSES[name]
    denoiser, ts = mixture(path), jnp.asarray(span_grid(name))
    x = float(path.sigma(ts[0])) * jnp.array([[0.3, -1.1], [1.2, 0.4], [-2.0, 0.1]])

    @jax.jit
    @jax.vmap
    def both(x):
        clock = Clock(path, "r")
        r, scale = jax.vmap(clock.of_t)(ts), jax.vmap(clock.scale)(ts)[:, None]
        euler = solve(lambda: pf_ode(denoiser, "r"), dfx.Euler(), r, 10, x * scale[0]) / scale
        return euler, solve(lambda: pf_ode(denoiser, "t"), DDIM(), ts, 10, x)

    euler, ddim = both(x)
    size = np.abs(ddim).max((0, 2), keepdims=True)
    assert np.abs((euler - ddim) / size).max() < 1e-12


@pytest.mark.parametrize("name", SPANS)
def test_ancestral_sampling_is_euler_maruyama_in_clock_u(name):
    path = PROCESSES[name]
    denoiser, ts = mixture(path), jnp.asarray(span_grid(name))
    x = float(path.sigma(ts[0])) * jnp.array([0.3, -1.1])
    clock = Clock(path, "u")
    u, scale = jax.vmap(clock.of_t)(ts), jax.vmap(clock.scale)(ts)[:, None]

    @jax.jit
    def all_three():
        noise = GridBrownian(jax.random.key(1), u, jax.ShapeDtypeStruct((2,), x.dtype))
        terms = lambda: reverse_sde(denoiser, noise)  # noqa: E731
        paths = [solve(terms, s, u, 10, x * scale[0]) / scale for s in (dfx.Euler(), DDIM(eta=1.0))]
        return [*paths, solve(terms, EulerMaruyama("u"), u, 10, x * scale[0]) / scale]

    euler, *ours = all_three()
    size = np.abs(euler).max(1, keepdims=True)
    for other in ours:
        assert np.abs((other - euler) / size).max() < 1e-12


def test_identities_hold_through_sample():
    law, ts = mixture(PROCESSES["VP"]), span_grid("VP")

    def call(**kwargs):
        return jd.sample(jax.random.key(0), jd.sampler(law, (2,), ts=ts, **kwargs), num=5)

    close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12)
    close(call(solver=DDIM()).x, call(solver=dfx.Euler()).x)
    close(call(solver=DDIM(eta=1.0)).x, call(solver=dfx.Euler(), equation="sde").x)


# --- Rows. ---


def vp_schedule(t):
    """Alpha, sigma and log-SNR of VP in extended precision."""
    t = np.asarray(t, np.longdouble)
    b = (np.longdouble(20) - np.longdouble("0.1")) * t**2 / 2 + np.longdouble("0.1") * t
    return np.exp(-b / 2), np.sqrt(-np.expm1(-b)), -np.log(np.expm1(b)) / 2


def rectified_schedule(t):
    t = np.asarray(t, np.longdouble)
    return 1 - t, t, np.log1p(-t) - np.log(t)


SCHEDULES = {"VP": vp_schedule, "Rectified": rectified_schedule}


@functools.cache
def table(solver_name, name, n):
    path = PROCESSES[name]
    ts = path.grid(n, "uniform", t_start=0.99, t_end=0.01)
    return ts, SOLVERS[solver_name][0].tabulate(path, ts).rows


@pytest.mark.parametrize("n", [20, 1000])
@pytest.mark.parametrize("name", SCHEDULES)
def test_rows_are_the_published_formulas(name, n):
    alpha, sigma, lam = SCHEDULES[name](table("DDIM", name, n)[0])
    h = np.diff(lam)
    a1, s1, s0, a0 = alpha[1:], sigma[1:], sigma[:-1], alpha[:-1]
    close = functools.partial(np.testing.assert_allclose, rtol=2e-11)  # h itself cancels, 1e-3
    total = -a1 * np.expm1(-h)

    row = table("DDIM", name, n)[1]
    assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(row))
    close(row.decay, s1 / s0)
    close(row.gain, total)
    assert row.weights == row.stages == () and not np.any(row.noise)

    row = table("DPMpp2M", name, n)[1]
    close(row.gain, total)
    close(row.weights[0][1:], -total[1:] * h[1:] / (2 * h[:-1]))
    assert row.weights[0][0] == 0

    row = table("Heun", name, n)[1]
    close(row.gain, total)
    close(row.weights[0], a1 * (s1 / a1 - s0 / a0) / 2)
    (t, stage) = row.stages[0]
    np.testing.assert_array_equal(t, table("Heun", name, n)[0][1:])
    close(stage.decay, s1 / s0)
    close(stage.gain, total)

    row = table("DDIM(eta=1)", name, n)[1]  # the posterior q(x_1 | x_0, m) of DDPM
    step = s0**2 - (a0 / a1) ** 2 * s1**2  # variance of x_0 given x_1, forwards
    close(row.decay, (a0 / a1) * s1**2 / s0**2, rtol=1e-9)
    close(row.gain, a1 * step / s0**2, rtol=1e-9)
    close(row.noise[0], s1 / s0 * np.sqrt(step), rtol=1e-9)
    jax.tree.map(np.testing.assert_array_equal, row, table("EulerMaruyama(u)", name, n)[1])

    row = table("DDIM(eta=0.5)", name, n)[1]
    c = s1 / s0 * np.sqrt(step) / 2
    close(row.noise[0], c, rtol=1e-9)
    close(row.decay, np.sqrt(s1**2 - c**2) / s0, rtol=1e-9)
    close(row.gain, a1 - a0 * np.sqrt(s1**2 - c**2) / s0, rtol=1e-8)


def test_rows_of_euler_maruyama_in_time():
    ts, row = table("EulerMaruyama(t)", "VP", 20)
    alpha, sigma, _ = vp_schedule(ts)
    beta, dt = 0.1 + 19.9 * ts[:-1], -np.diff(ts)
    np.testing.assert_allclose(row.decay, 1 + dt * beta * (0.5 - 1 / sigma[:-1] ** 2), rtol=1e-11)
    np.testing.assert_allclose(row.gain, dt * beta * alpha[:-1] / sigma[:-1] ** 2, rtol=1e-11)
    np.testing.assert_allclose(row.noise[0], np.sqrt(beta * dt), rtol=1e-11)


def test_a_long_float32_run_loses_only_round_off():
    """A thousand steps whose rows are rounded once, each to half a unit in the last place.

    On one atom x_N is a product of decays and a sum of gains; N roundings of relative size u add
    to at most about N u = 6e-5, like a random walk to 2e-6.
    """
    atom = np.array([0.7, -1.3])
    denoiser = exact.empirical(PROCESSES["VP"], atom[None])
    ts, init = PROCESSES["VP"].grid(1000), np.array([0.4, -0.9])
    alpha, sigma, _ = vp_schedule(ts)
    truth = alpha[-1] * atom + sigma[-1] / sigma[0] * (init - alpha[0] * atom)
    out = jd.sampler(denoiser, (2,), solver=DDIM(), ts=ts, dtype=np.float32)(None, init=init)
    assert out.x.dtype == jnp.float32
    np.testing.assert_allclose(out.x, truth.astype(float), rtol=6e-5)


@pytest.mark.parametrize("clock", ["t", "r", "s", "lam"])
def test_rows_built_in_the_step_equal_the_table(clock):
    path = PROCESSES["VP"]
    denoiser, ts = mixture(path), span_grid("VP")
    x, c = jnp.array([0.3, -1.1]), Clock(path, clock)
    nodes = jax.vmap(c.of_t)(jnp.asarray(ts))
    solution = eqx.filter_jit(dfx.diffeqsolve)(
        pf_ode(denoiser, clock),
        DPMpp2M(),
        nodes[0],
        nodes[-1],
        None,
        x * c.scale(ts[0]),
        stepsize_controller=dfx.StepTo(nodes),
        max_steps=len(ts) - 1,
        throw=False,
    )
    expected = jd.sampler(denoiser, (2,), solver=DPMpp2M(), ts=ts)(None, init=x).x
    np.testing.assert_allclose(solution.ys[0] / c.scale(ts[-1]), expected, rtol=1e-12, atol=1e-12)


# --- Ends with infinite log-SNR. ---


@each(SOLVERS)
def test_a_step_at_an_end_is_first_order(case):
    """Where log-SNR is infinite a step freezes the network output."""
    solver, path = case[0], PROCESSES["Rectified"]
    row = solver.tabulate(path, np.array([1.0, 0.8, 0.6, 0.5, 0.2, 0.0])).rows
    in_time = getattr(solver, "clock", None) == "t"
    if in_time and solver.stochastic:
        assert not all(
            np.isfinite(leaf).all() for leaf in jax.tree.leaves(row)
        )  # so a sampler refuses
        return
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(row))
    rows = [row] if isinstance(row, Row) else row[:2]  # of a warm start, two
    ddim = DDIM(solver.eta) if isinstance(solver, DDIM) else DDIM(float(solver.stochastic))
    limit = ddim.tabulate(path, np.array([1 - 1e-9, 0.8, 0.6, 0.5, 0.2, 1e-9])).rows
    for row in rows if not in_time else ():
        for end in (0, -1):
            np.testing.assert_allclose(row.decay[end], limit.decay[end], atol=1e-8)
            np.testing.assert_allclose(row.gain[end], limit.gain[end], atol=1e-8)
            if end == 0 or "output='eps'" not in repr(solver):  # that UniPC still corrects
                assert not any(np.any(w[end]) for w in jax.tree.leaves(row.weights))


SLOPES = ("DDIM", "DPMpp2M", "UniPC(2, eps)", "DEIS(2, angle)", "PNDM", "Heun", "DDIM(eta=1)")


@pytest.mark.parametrize("name", (*SLOPES, "RK(heun, t)", "DPM-Solver++(2S)"))
def test_the_slopes_of_a_step_at_an_end_are_finite(name):
    """In the nodes of the grid; no NaN of an unused branch gets through."""
    solver, path = SOLVERS[name][0], PROCESSES["Rectified"]
    row = lambda ts: solver.row(path, ts, jnp.asarray(3), jnp.asarray(5))  # noqa: E731
    slopes = eqx.filter_jit(jax.jacfwd(row))
    for window in ((0.0, 0.2, 0.3, 0.4), (0.8, 1.0, 1.0, 1.0)):
        got = slopes(jnp.asarray(window[: 2 + solver.memory]))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(got))
        if window[0] == 0 and name == "DDIM":  # (sigma_1/sigma_0, alpha_1 - alpha_0 decay)
            np.testing.assert_allclose(got.decay, [1 / 0.2, 0.0])
            np.testing.assert_allclose(got.gain, [-1 - 0.8 / 0.2, 0.0])


def test_the_slope_in_eta_is_finite_up_to_one():
    path = PROCESSES["VP"]

    def parts(eta):
        return jnp.stack(transfer(path, 0.5, 0.3, eta))

    @jax.jit
    def slopes(eta):
        return jax.jacrev(parts)(eta)

    for eta in (0.0, 0.5, 1.0):
        step = 1e-6 if eta < 1 else -1e-6
        difference = (parts(eta + step) - parts(eta)) / step
        np.testing.assert_allclose(slopes(eta), difference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["DPMpp2M", "Heun", "DDIM(eta=1)"])
def test_from_pure_noise_to_clean_data(name):
    """Rectified from alpha = 0 to sigma = 0: values and slopes, with the grid traced or known."""
    denoiser, ts = mixture(PROCESSES["Rectified"]), np.linspace(1, 0, 7)
    init = np.array([0.3, -1.1])

    def end(ts, init):
        run = jd.sampler(denoiser, (2,), solver=SOLVERS[name][0], ts=ts)
        return run(jax.random.key(0), init=init).x

    traced, slopes = jax.jit(lambda ts, init: (end(ts, init), jax.jacrev(end, (0, 1))(ts, init)))(
        jnp.asarray(ts), jnp.asarray(init)
    )
    np.testing.assert_allclose(traced, end(ts, init), rtol=1e-12)
    assert all(np.isfinite(s).all() for s in slopes)


# --- Engines. ---


def _squash(t, x, cond):
    return jnp.tanh(x - t) + 0.1 * jnp.sin(jnp.roll(x, 1))


def both_engines(name, denoiser, dtype):
    solver, ts = (SOLVERS | OTHERS)[name][0], span_grid("VP")

    def call(**kwargs):
        run = jd.sampler(denoiser, (2,), solver=solver, ts=ts, dtype=dtype, **kwargs)
        return jd.sample(jax.random.key(3), run, num=4)

    scan, diffeqsolve = call(), call(engine="diffrax")
    assert scan.x.dtype == dtype and np.isfinite(scan.x).all()
    if isinstance(solver, jd.solvers.AbstractReversible):  # steps its pair in the scan only
        np.testing.assert_allclose(scan.x, diffeqsolve.x, rtol=1e-10)
    else:
        np.testing.assert_array_equal(scan.x, diffeqsolve.x)
    np.testing.assert_array_equal(diffeqsolve.nfe, scan.nfe)
    return scan


@pytest.mark.optimised
@pytest.mark.parametrize("name", SOLVERS | OTHERS)
def test_engines_are_bitwise_equal(name):
    reversible = isinstance((SOLVERS | OTHERS)[name][0], jd.solvers.AbstractReversible)
    dtype = np.float64 if reversible else np.float32
    out = both_engines(name, jd.Denoiser(PROCESSES["VP"], _squash), dtype)
    each_step = (SOLVERS | OTHERS)[name][2]
    assert each_step is None or (out.nfe == each_step * 10).all()


@pytest.mark.optimised
@pytest.mark.parametrize("name", ["DPMpp2M", "Heun", "EulerMaruyama(u)"])
def test_engines_are_bitwise_equal_in_float64(name):
    both_engines(name, jd.Denoiser(PROCESSES["VP"], _squash), np.float64)


@pytest.mark.optimised
@pytest.mark.parametrize("name", ["DPMpp2M", "EulerMaruyama(u)"])
def test_engines_are_bitwise_equal_on_a_mixture(name):
    both_engines(name, mixture(PROCESSES["VP"]), np.float32)


@each(OTHERS | HOOKED)
def test_every_other_solver_is_a_sampler(case):
    """By name and count, where the plain ones have tests of their own."""
    solver, _, each_step = case
    run = jd.sampler(mixture(PROCESSES["VP"]), (2,), solver=solver, ts=span_grid("VP"))
    out = jd.check(jd.sample(jax.random.key(3), run, num=4))
    assert out.nfe.tolist() == [19 if each_step is None else 10 * each_step] * 4


# --- Laws. ---

DIFFRAX = {  # solver, keyword arguments, bound on the relative bias of the moments, evaluations
    "Euler": (dfx.Euler(), {}, 0.06, 40),
    "Heun": (dfx.Heun(), {}, 0.02, 80),
    "Midpoint": (dfx.Midpoint(), {}, 0.02, 80),
    "Bosh3": (dfx.Bosh3(), {}, 0.02, 121),
    "Tsit5": (dfx.Tsit5(), {}, 0.02, 241),
    "Dopri8": (dfx.Dopri8(), {}, 0.02, 521),
    "ReversibleHeun": (dfx.ReversibleHeun(), {"clock": "lam"}, 0.02, -1),
    "SEA": (dfx.SEA(), {}, 0.06, 40),
    "ShARK": (dfx.ShARK(), {}, 0.06, 80),
    "EulerSDE": (dfx.Euler(), {"equation": "sde"}, 0.1, 160),
}


@each(DIFFRAX)
def test_every_diffrax_solver_samples_the_mixture(case):
    solver, kwargs, bias, evaluations = case
    path, n = PROCESSES["VP"], 4000
    ts = path.grid(max(40, evaluations) if kwargs == {"equation": "sde"} else 40, "logsnr")
    run = jd.sampler(mixture(path), (2,), solver=solver, ts=ts, **kwargs)
    out = jd.check(jd.sample(jax.random.key(5), run, num=n))
    mean, cov = LAW.moments()
    x = np.asarray(out.x)
    spread = np.sqrt(np.diag(cov))
    error = 5 / np.sqrt(n)
    np.testing.assert_array_equal(out.nfe, evaluations)
    z = (x.mean(0) - mean) / spread
    second = np.cov(x.T) - cov
    fourth = ((x - mean) ** 4).mean(0) / np.diag(cov) ** 2  # kurtosis, at most 3 here
    assert np.abs(z).max() < error + bias
    assert np.abs(second / np.outer(spread, spread)).max() < error * np.sqrt(fourth.max()) + bias


@each({name: row[:2] for name, row in DIFFRAX.items()})
def test_either_engine_runs_a_diffrax_solver(case):
    """The plain scan, where it is the default and where it is asked for, and `diffeqsolve`."""
    solver, kwargs = case
    denoiser, ts = jd.Denoiser(PROCESSES["VP"], _squash), span_grid("VP")

    def path(engine):
        run = jd.sampler(
            denoiser, (2,), solver=solver, ts=ts, engine=engine, trajectory=True, **kwargs
        )
        return run(jax.random.key(3))

    scan, theirs = path("scan"), path("diffrax")
    np.testing.assert_allclose(
        scan.aux["trajectory"], theirs.aux["trajectory"], rtol=1e-12, atol=1e-13
    )
    np.testing.assert_array_equal(scan.aux["trajectory"][0], theirs.aux["trajectory"][0])
    assert scan.nfe == theirs.nfe


MEAN, VARIANCE = 0.7, 0.25


def vp_recursion(kind, ts):
    """Mean and variance of x_N for data N(MEAN, VARIANCE), by the formulas as published."""
    alpha, sigma, _ = (np.asarray(a, float) for a in vp_schedule(ts))
    m, v = 0.0, sigma[0] ** 2  # of the prior
    for i in range(len(ts) - 1):
        a0, s0, a1, s1 = alpha[i], sigma[i], alpha[i + 1], sigma[i + 1]
        total = a0**2 * VARIANCE + s0**2
        gain, shift = a0 * VARIANCE / total, MEAN * s0**2 / total  # m(x) = gain x + shift
        if kind == "t":
            beta, dt = 0.1 + 19.9 * ts[i], ts[i] - ts[i + 1]
            # x + dt (beta x / 2 + beta score), score = -(x - a0 MEAN)/total
            slope, offset = 1 + dt * beta * (0.5 - 1 / total), dt * beta * a0 * MEAN / total
            noise = beta * dt
        else:
            ratio = (a0 / a1) ** 2  # alpha_bar_t / alpha_bar_{t-1}
            noise = kind**2 * s1**2 / s0**2 * (1 - ratio)  # DDIM, eq. 16
            direction = np.sqrt(s1**2 - noise)  # DDIM, eq. 12
            slope = a1 * gain + direction * (1 - a0 * gain) / s0
            offset = a1 * shift - direction * a0 * shift / s0
        m, v = slope * m + offset, slope**2 * v + noise
    return m, v


STOCHASTIC = {
    "EulerMaruyama(u)": (EulerMaruyama("u"), 1.0),
    "EulerMaruyama(t)": (EulerMaruyama("t"), "t"),
    "DDIM(eta=0.5)": (DDIM(eta=0.5), 0.5),
}


@each(STOCHASTIC)
def test_the_law_of_gaussian_samples_is_the_recursion(case):
    solver, kind = case
    path, n = PROCESSES["VP"], 20000
    denoiser = exact.gaussian(path, np.array([MEAN]), VARIANCE)
    ts = path.grid(25, "uniform", t_end=0.02)
    run = jd.sampler(denoiser, (1,), solver=solver, ts=ts)
    x = jd.sample(jax.random.key(9), run, num=n).x
    m, v = vp_recursion(kind, ts)
    assert abs(x.mean() - m) < 4 * np.sqrt(v / n)
    assert abs(x.var() - v) < 4 * v * np.sqrt(2 / n)


@each(STOCHASTIC)
def test_the_variance_converges_with_order_one(case):
    """The library's own rows, propagated without sampling, towards the exact marginal."""
    solver, kind = case
    path, sizes, errors = PROCESSES["VP"], (128, 256, 512), []
    for n in sizes:
        ts = path.grid(n, "uniform", t_end=0.05)
        alpha, sigma, _ = (np.asarray(a, float) for a in vp_schedule(ts))
        row = solver.tabulate(path, ts).rows
        total = alpha**2 * VARIANCE + sigma**2
        m, v = 0.0, sigma[0] ** 2
        for i in range(n):
            gain = alpha[i] * VARIANCE / total[i]
            slope_ = row.decay[i] + row.gain[i] * gain
            offset = row.gain[i] * MEAN * sigma[i] ** 2 / total[i]
            m, v = slope_ * m + offset, slope_**2 * v + row.noise[0][i] ** 2
        np.testing.assert_allclose((m, v), vp_recursion(kind, ts), rtol=1e-9)
        errors.append(abs(v - total[-1]))
    measured = slope(errors, sizes)
    assert abs(measured - 1) < 0.15 and errors[-1] < 0.01, (measured, errors)


# --- What a solver refuses. ---


def test_errors_name_the_argument_and_what_was_given(as_users_see_it):
    with pytest.raises(ValueError, match=r"DDIM: eta must be .* got 1.5"):
        DDIM(eta=1.5)
    with pytest.raises(ValueError, match=r"EulerMaruyama: clock must be .* got 'r'"):
        EulerMaruyama("r")
    denoiser = mixture(PROCESSES["VP"])
    with pytest.raises(ValueError, match="solver: terms must be those of reverse_sde"):
        solve(lambda: pf_ode(denoiser, "t"), DDIM(eta=1.0), jnp.array([0.9, 0.1]), 1, jnp.zeros(2))
    with pytest.raises(ValueError, match=r"solver: terms must be those of pf_ode .* ODETerm"):
        terms = dfx.ODETerm(lambda t, y, args: y)
        solve(lambda: terms, DDIM(), jnp.array([0.9, 0.1]), 1, jnp.zeros(2))


def test_rows_are_data():
    """A solver can be built from a user's own row: half of every step of DDIM."""

    class Half(DDIM):
        def row(self, process, ts, n, left):
            full = super().row(process, ts, n, left)
            return Row((1 + full.decay) / 2, full.gain / 2)

    denoiser, x = mixture(PROCESSES["VP"]), jnp.array([0.3, -1.1])
    ends = [
        jd.sampler(denoiser, (2,), solver=s, ts=np.array([0.9, 0.5]))(None, init=x).x
        for s in (DDIM(), Half())
    ]
    np.testing.assert_allclose(ends[1], (x + ends[0]) / 2, rtol=1e-13)
