"""Clocks, the PF-ODE and the reverse SDE as diffrax terms, and the noise path of a grid."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import oracles
import pytest
from helpers import PROCESSES, each_process, inner_times

from jaxdiff import exact
from jaxdiff.solvers import Clock, Field, GridBrownian, pf_ode, reverse_sde
from jaxdiff.solvers.terms import AdditiveNoise

CLOCKS = ("t", "r", "s", "lam", "u")
LAW = oracles.GaussianMixture.random(3, 3, 2)


def mixture(path):
    return exact.mixture(path, LAW.weights, LAW.means, LAW.covs)


@pytest.mark.parametrize("name", CLOCKS)
@each_process
def test_a_clock_runs_back_to_its_time(path, name):
    clock, ts = Clock(path, name), inner_times(path)
    readings = np.array(jax.vmap(clock.of_t)(ts))
    back = jax.vmap(clock.t)(readings)
    np.testing.assert_allclose(back, ts, rtol=1e-11, atol=1e-13 * path.t_max)
    up = {"t": 1, "s": 1}.get(name, -1)
    assert np.all(np.sign(np.diff(readings)) == up)


SCALES = {  # state / x, as the table of the module says
    "t": lambda a, s: np.ones_like(a),
    "r": lambda a, s: 1 / s,
    "s": lambda a, s: 1 / a,
    "lam": lambda a, s: 1 / np.sqrt(a**2 + s**2),
    "u": lambda a, s: a / s**2,
}
READINGS = {
    "r": lambda a, s: a / s,
    "s": lambda a, s: s / a,
    "lam": lambda a, s: np.log(a / s),
    "u": lambda a, s: (a / s) ** 2,
}


@pytest.mark.parametrize("name", CLOCKS)
def test_readings_and_scales_are_those_of_the_table(name):
    path = PROCESSES["SubVP"]  # alpha^2 + sigma^2 is not 1 here
    ts = inner_times(path, 5)
    alpha, sigma = np.array(jax.vmap(path.alpha)(ts)), np.array(jax.vmap(path.sigma)(ts))
    clock = Clock(path, name)
    scales = [float(clock.scale(t)) for t in ts]
    np.testing.assert_allclose(scales, SCALES[name](alpha, sigma), rtol=1e-13)
    expected = ts if name == "t" else READINGS[name](alpha, sigma)
    np.testing.assert_allclose(jax.vmap(clock.of_t)(ts), expected, rtol=1e-12)


@each_process
def test_field_in_time_is_the_velocity_of_the_path(path):
    """Alpha' m + sigma' eps, with alpha', sigma' by differences and m, eps by conditioning."""
    denoiser, x = mixture(path), np.array([0.4, -0.7])
    field = jax.jit(lambda t, x: Field(denoiser, Clock(path, "t"))(t, x))
    for t in inner_times(path, 3, 0.07, 0.07) + 0.25 * (path.t_max > 2):  # inside a Discrete cell
        h = 1e-5 * path.t_max
        rates = [float(f(t + h) - f(t - h)) / (2 * h) for f in (path.alpha, path.sigma)]
        alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
        m = LAW.posterior_mean(x, alpha, sigma)
        eps = -sigma * LAW.score(x, alpha, sigma)
        expected = rates[0] * m + rates[1] * eps
        np.testing.assert_allclose(field(t, jnp.asarray(x)), expected, rtol=1e-7, atol=1e-9)


SPANS = {
    "VP": (0.9, 0.03, ("t", "r", "s", "lam")),
    "SubVP": (0.9, 0.08, ("t", "lam")),
    "Rectified": (0.95, 0.03, ("r", "s")),
}


@pytest.mark.parametrize("name", SPANS)
def test_the_pf_ode_is_one_flow_in_every_clock(name):
    path, (start, end, clocks) = PROCESSES[name], SPANS[name]
    denoiser, x = mixture(path), jnp.array([0.4, -0.7])

    @jax.jit
    def flow(x):
        ends = []
        for name in clocks:
            clock = Clock(path, name)
            solution = dfx.diffeqsolve(
                pf_ode(denoiser, name),
                dfx.Dopri8(),
                clock.of_t(start),
                clock.of_t(end),
                None,
                x * clock.scale(start),
                stepsize_controller=dfx.PIDController(1e-11, 1e-12),
                throw=False,
            )
            ends.append((solution.ys[0] / clock.scale(end), solution.result._value))
        return ends

    (expected, *others), codes = zip(*flow(x), strict=True)
    assert not np.any(codes)
    assert np.abs(expected - x).max() > 0.1
    for other in others:
        np.testing.assert_allclose(other, expected, atol=1e-8)


def test_a_condition_reaches_the_denoiser_in_every_clock():
    from jaxdiff import Denoiser

    path = PROCESSES["VP"]
    denoiser = Denoiser(path, lambda t, x, cond: cond * x, predicts="eps")
    for name in ("t", "r", "s", "lam"):
        clock = Clock(path, name)
        y = jnp.ones(2) * clock.scale(0.5)
        one, two = (pf_ode(denoiser, name, cond=c).vf(clock.of_t(0.5), y, None) for c in (1.0, 2.0))
        assert np.all(np.abs(one - two) > 1e-3)


# --- The Brownian path of a grid. ---

NODES = np.array([0.1, 0.4, 0.5, 2.5])
SHAPE = jax.ShapeDtypeStruct((2,), np.dtype(np.float64))


def brownian(key, **kwargs):
    return GridBrownian(key=key, nodes=jnp.asarray(NODES), shape=SHAPE, **kwargs)


def test_increments_and_levy_areas_have_their_moments():
    n = 20000

    @jax.jit
    @jax.vmap
    def draws(key):
        path = brownian(key)
        steps = [path.evaluate(NODES[i], NODES[i + 1], use_levy=True) for i in range(3)]
        return [jnp.stack([s.W, s.H, s.K]) for s in steps], jnp.stack([s.dt for s in steps])

    steps, dts = draws(jax.random.split(jax.random.key(0), n))
    np.testing.assert_allclose(dts[0], np.diff(NODES), rtol=1e-14)
    # One unit-variance column per (step, kind, coordinate): all of them are independent.
    scales = np.sqrt(np.diff(NODES)[:, None] / np.array([1, 12, 720]))[..., None]
    columns = np.stack(steps, 1) / scales[None]
    columns = columns.reshape(n, -1)
    error = 5 / np.sqrt(n)  # five standard errors, of 18 means and 171 second moments
    assert np.abs(columns.mean(0)).max() < error
    second = columns.T @ columns / n
    assert np.abs(second - np.diag(np.diag(second))).max() < error
    assert np.abs(np.diag(second) - 1).max() < error * np.sqrt(2)


def test_an_increment_is_a_function_of_key_and_step():
    one, two = brownian(jax.random.key(0)), brownian(jax.random.key(1))
    first = one.evaluate(NODES[1], NODES[2])
    np.testing.assert_array_equal(first, one.evaluate(NODES[1], NODES[2]))
    levy = one.evaluate(NODES[1], NODES[2], use_levy=True)
    np.testing.assert_array_equal(first, levy.W)
    np.testing.assert_allclose(first / np.sqrt(NODES[2] - NODES[1]), one.normal(1), rtol=1e-15)
    assert not np.any(first == two.evaluate(NODES[1], NODES[2]))
    assert not np.any(one.normal(0) == one.normal(1))


_evaluate = jax.jit(lambda key, t0, t1: brownian(key).evaluate(t0, t1))


@pytest.mark.parametrize(
    "span",
    [(0.1, 0.25), (0.25, 0.4), (0.2, 0.3), (0.1, 0.5), (0.1, 2.5), (-1.0, 0.1), (2.5, 3.0)],
)
def test_any_other_interval_is_nan(span):
    assert np.isnan(_evaluate(jax.random.key(0), *span)).all()


@pytest.mark.parametrize("kind", [dfx.BrownianIncrement, dfx.SpaceTimeLevyArea])
def test_levy_areas_are_those_asked_for(kind):
    drawn = brownian(jax.random.key(0), levy_area=kind).evaluate(0.1, 0.4, use_levy=True)
    assert type(drawn) is kind
    full = brownian(jax.random.key(0)).evaluate(0.1, 0.4, use_levy=True)
    assert all(np.array_equal(getattr(drawn, f), getattr(full, f)) for f in vars(drawn))


def test_a_path_has_increments_only():
    with pytest.raises(ValueError, match=r"GridBrownian: t1 must be .* got None"):
        brownian(jax.random.key(0)).evaluate(0.1)


# --- Additive noise in the stochastic Runge-Kutta methods. ---


def _ornstein_uhlenbeck(noise_term, solver, rates, ends=(0.0, 1.0), steps=8):
    """End points of dY = -rate Y dt + dB from Y = 1, one per rate, and their driving B(1)."""
    t0, t1 = ends

    @jax.jit
    @jax.vmap
    def solve(key, rate):
        grid = jnp.linspace(min(ends), max(ends), steps + 1)
        path = GridBrownian(key=key, nodes=grid, shape=jax.ShapeDtypeStruct((), np.dtype("f8")))
        terms = dfx.MultiTerm(dfx.ODETerm(lambda t, y, args: -rate * y), noise_term(path))
        solution = dfx.diffeqsolve(
            terms,
            solver,
            t0,
            t1,
            None,
            jnp.ones(()),
            stepsize_controller=dfx.StepTo(grid if t0 < t1 else grid[::-1]),
            throw=False,
        )
        total = sum(path.evaluate(grid[i], grid[i + 1]) for i in range(steps))
        return solution.ys[0], total

    return solve(jax.random.split(jax.random.key(7), len(rates)), rates)


@pytest.mark.parametrize("solver", [dfx.SEA(), dfx.ShARK()], ids=["SEA", "ShARK"])
def test_additive_noise_is_noise_to_stochastic_runge_kutta(solver):
    n = 20000
    y, total = _ornstein_uhlenbeck(AdditiveNoise, solver, np.append(np.zeros(50), np.ones(n)))
    np.testing.assert_allclose(y[:50], 1 + total[:50], rtol=1e-13)
    y = y[50:]
    mean, variance = np.exp(-1.0), 0.5 * (1 - np.exp(-2.0))
    # 4 standard errors and a bias: without noise SEA is Euler's method, ShARK has order 2.
    bias = {"SEA": np.exp(-1) - (7 / 8) ** 8, "ShARK": (1 / 8) ** 2 / 6}[type(solver).__name__]
    assert abs(y.mean() - mean) < 4 * np.sqrt(variance / n) + bias
    assert abs(y.var() - variance) < 4 * variance * np.sqrt(2 / n) + 2 * bias * np.exp(-1)


def test_the_reverse_sde_keeps_the_marginals():
    """On a fine grid in u, Euler-Maruyama keeps the exact law of Gaussian data at every node."""
    path = PROCESSES["VP"]
    mean, variance, n = 0.7, 0.25, 4000
    denoiser = exact.gaussian(path, np.array([mean]), variance)
    clock = Clock(path, "u")
    ts = np.asarray(path.grid(200, "logsnr", t_start=0.8, t_end=0.05))
    nodes = np.asarray(jax.vmap(clock.of_t)(ts))
    alpha, sigma = np.array(jax.vmap(path.alpha)(ts)), np.array(jax.vmap(path.sigma)(ts))

    @jax.jit
    @jax.vmap
    def paths(key):
        start, noise = jax.random.split(key)
        spread = np.sqrt(alpha[0] ** 2 * variance + sigma[0] ** 2)
        x = alpha[0] * mean + spread * jax.random.normal(start, (1,))
        shape = jax.ShapeDtypeStruct((1,), np.dtype("f8"))
        path = GridBrownian(key=noise, nodes=jnp.asarray(nodes), shape=shape)
        solution = dfx.diffeqsolve(
            reverse_sde(denoiser, path),
            dfx.Euler(),
            nodes[0],
            nodes[-1],
            None,
            x * alpha[0] / sigma[0] ** 2,
            stepsize_controller=dfx.StepTo(jnp.asarray(nodes)),
            saveat=dfx.SaveAt(steps=True),
            max_steps=len(nodes) - 1,
            throw=False,
        )
        return solution.ys[:, 0]

    x = np.asarray(paths(jax.random.split(jax.random.key(3), n))) / (alpha / sigma**2)[1:]
    for k in (50, 120, 199):
        m, v = alpha[k + 1] * mean, alpha[k + 1] ** 2 * variance + sigma[k + 1] ** 2
        # Bias of a first-order method at h = (lam_N - lam_0)/200 = 0.027: below h/2 of each.
        assert abs(x[:, k].mean() - m) < 4 * np.sqrt(v / n) + 0.014 * m
        assert abs(x[:, k].var() - v) < 4 * v * np.sqrt(2 / n) + 0.014 * v


# --- Defects of diffrax that the design avoids: a failure here means that one was mended. ---


def test_pin_backward_events_see_negated_time():
    seen = dfx.diffeqsolve(
        dfx.ODETerm(lambda t, y, args: jnp.zeros_like(y)),
        dfx.Euler(),
        1.0,
        0.0,
        -0.1,
        jnp.ones(()),
        event=dfx.Event(lambda t, y, args, **kwargs: t < 0.45),
        throw=False,
    )
    # Correct: it stops at 0.4. The condition sees t = -1, which is below 0.45 from the start.
    assert seen.ts[0] == 1.0


@pytest.mark.filterwarnings("ignore")
def test_pin_leafless_diffusion_is_no_noise_to_stochastic_runge_kutta():
    shape = jax.ShapeDtypeStruct((), np.dtype("f8"))

    def leafless(path):
        return dfx.ControlTerm(lambda t, y, args: lx.IdentityLinearOperator(shape), path)

    y, total = _ornstein_uhlenbeck(leafless, dfx.SEA(), np.zeros(5))
    assert np.abs(y - (1 + total)).max() > 0.1


def test_pin_backward_stochastic_runge_kutta_is_wrong():
    """Backwards in time dY = -Y dt + dB grows, E Y(0) = e Y(1); SEA lets it decay."""
    n = 1000
    y, _ = _ornstein_uhlenbeck(AdditiveNoise, dfx.SEA(), np.ones(n), ends=(1.0, 0.0))
    assert abs(y.mean() - np.exp(-1)) < 0.1  # correct: 2.7, with a standard error of 0.06


ERRORS = {
    "clock": (lambda d: pf_ode(d, "u"), "pf_ode: clock must be .* got 'u'"),
    "unknown": (lambda d: pf_ode(d, "q"), "pf_ode: clock must be .* got 'q'"),
    "name": (lambda d: Clock(d.process, "q"), "Clock: name must be .* got 'q'"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_argument_and_what_was_given(case, as_users_see_it):
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        call(mixture(PROCESSES["VP"]))
