"""Stochastic solvers: exact laws for Gaussian data, identities, noise, churn and correctors."""

import dataclasses
import functools
import itertools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.integrate
import scipy.interpolate
import scipy.stats
from helpers import PROCESSES, each

import jaxdiff as jd
from jaxdiff._keys import HOOK, SOLVER, stream
from jaxdiff.score import AbstractDenoiser
from jaxdiff.solvers import (
    DDIM,
    Between,
    DPMpp2M,
    EulerMaruyama,
    GridBrownian,
    Langevin,
    UniPC,
    pf_ode,
)
from jaxdiff.solvers.correctors import Churn, SplitNoise
from jaxdiff.solvers.seeds import SEEDS, DPMppSDE
from jaxdiff.solvers.stochastic import ERSDE, DPMpp2MSDE, ReverseDiffusion, SASolver
from jaxdiff.solvers.terms import USES, AdditiveNoise

MEAN, VARIANCE = 0.7, 0.25
MOST = 128
SPANS = {"VP": (0.9, 0.02), "EDM": (20.0, 0.05), "Rectified": (0.95, 0.03)}


# --- Exact laws. For Gaussian data every solver is affine in the state and in its normals, so that
# the state can be carried as its coefficients of (1, x_0, all normals), without sampling. ---


class Affine(AbstractDenoiser):
    """The posterior mean of N(MEAN, VARIANCE), on coefficients."""

    process: jd.process.AbstractProcess

    def pair(self, t, x, cond=None):
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        total = alpha**2 * VARIANCE + sigma**2
        m = (alpha * VARIANCE / total * x).at[0].add(MEAN * sigma**2 / total)
        return m, (x - alpha * m) / sigma


class Unit(GridBrownian):
    """Normals that are coordinates."""

    def normal(self, step, use=0):
        return jnp.zeros(self.shape.shape, self.shape.dtype).at[2 + USES * step + use].set(1.0)


@eqx.filter_jit
def coefficients(solver, path, ts, n):
    """The state after n steps through padded nodes, and through all of them: one program."""
    steps = jnp.arange(MOST)
    back = [ts[jnp.maximum(steps - j, 0)] for j in range(solver.memory + 1)]
    windows = jnp.stack([ts[1:], *back], axis=1)
    rows = jax.vmap(lambda window, k: solver.row(path, window, k, n - k))(windows, steps)
    solver = dataclasses.replace(solver, rows=rows)
    shape = jax.ShapeDtypeStruct((2 + USES * MOST,), ts.dtype)
    terms = dfx.MultiTerm(
        pf_ode(Affine(path), "t"), AdditiveNoise(Unit(jax.random.key(0), ts, shape))
    )
    x = jnp.zeros(shape.shape).at[1].set(1.0)

    def body(i, carry):
        x, _, _, state, _ = solver.step(terms, ts[i], ts[i + 1], carry[0], None, carry[1], False)
        return x, state

    return jax.lax.fori_loop(0, n, body, (x, solver.init(terms, ts[0], ts[1], x, None)))[0]


def law(solver, name, ts):
    """Errors of mean and variance at the end, started from the exact marginal."""
    path, n = PROCESSES[name], len(ts) - 1
    nodes = jnp.asarray(np.append(ts, np.full(MOST - n, ts[-1])))
    c = np.asarray(coefficients(solver, path, nodes, jnp.asarray(n)))
    alpha, sigma = (
        np.array([float(f(t)) for t in (ts[0], ts[-1])]) for f in (path.alpha, path.sigma)
    )
    total = alpha**2 * VARIANCE + sigma**2
    mean = c[0] + c[1] * alpha[0] * MEAN
    return mean - alpha[1] * MEAN, c[1] ** 2 * total[0] + c[2:] @ c[2:] - total[1]


def grid(name, n):
    start, end = SPANS[name]
    return PROCESSES[name].grid(n, "logsnr", t_start=start, t_end=end)


_HALF, _ONE = jnp.asarray(0.5), jnp.asarray(1.0)  # arrays: the levels share a program

# Error of the variance at 16 and 64 steps, by an independent implementation that had two digits,
# and the order between 64 and 128 steps; None where it is not known or not clean yet.
LAWS = {
    "SplitNoise": (SplitNoise(), 3.1e-2, 1.9e-3, 2),
    "DPMpp2MSDE": (DPMpp2MSDE(), 7.0e-3, 7.2e-4, 2),
    "DPMppSDE": (DPMppSDE(), 1.7e-2, 1.3e-3, 2),
    "SEEDS-2(1/3)": (SEEDS(2, (1 / 3,)), 4.0e-2, 8.1e-4, 2),
    "SEEDS-2(1/3, released)": (SEEDS(2, (1 / 3,), True), 5.4e-2, 1.2e-2, 1),
    "SEEDS-3": (SEEDS(3), 8.4e-3, 2.1e-4, 2),
    "ERSDE-3(sde5)": (ERSDE(3), 9.1e-3, None, 2),
    "SA(3, 4, 0)": (SASolver(3, 4, 0 * _ONE), 4.8e-4, 2.9e-6, 4),
    "SA(3, 4, 0.5)": (SASolver(3, 4, _HALF), 5.9e-4, None, 2),
    "SA(3, 4, 1)": (SASolver(3, 4, _ONE), 1.0e-2, None, 2),
    "Churn": (Churn(10.0, noise=1.0), 3.2e-2, 2.5e-3, 2),
}
SLOW_LAWS = {
    "DDPM(large)": (EulerMaruyama("u", "large"), 5.2e-2, 1.2e-2, 1),
    "EulerMaruyama(t)": (EulerMaruyama("t"), 5.1e-2, 1.1e-2, 1),
    "ReverseDiffusion": (ReverseDiffusion(), None, None, 1),
    "DDIM(0.5)": (DDIM(0.5), 5.4e-2, 1.5e-2, 1),
    "SEEDS-1": (SEEDS(1), 1.1e-2, 1.1e-3, None),
    "SEEDS-2": (SEEDS(2), 8.6e-3, 2.0e-5, None),
    "SEEDS-3(released)": (SEEDS(3, released=True), 1.6e-2, 7.5e-4, 2),
    "ERSDE-1(sde)": (ERSDE(1, "sde"), 8.0e-2, None, 1),
    "ERSDE-2(sde)": (ERSDE(2, "sde"), 1.6e-2, None, 2),
    "ERSDE-3(sde)": (ERSDE(3, "sde"), 1.1e-2, None, 2),
    "ERSDE-1(sde5)": (ERSDE(1), 4.9e-2, None, 1),
    "ERSDE-2(sde5)": (ERSDE(2), 1.1e-2, None, 2),
    "SA(1, 0, 0.5)": (SASolver(1, 0, _HALF), 5.6e-2, None, 1),
    "SA(2, 0, 0.5)": (SASolver(2, 0, _HALF), 1.1e-2, None, 2),
    "SA(2, 0, 1)": (SASolver(2, 0, _ONE), 2.5e-2, 1.7e-3, 2),
    "SA(3, 0, 0.5)": (SASolver(3, 0, _HALF), 4.9e-3, None, None),
    "SA(3, 0, 1)": (SASolver(3, 0, _ONE), 1.9e-2, None, 2),
    "SA(1, 2, 1)": (SASolver(1, 2, _ONE), 4.5e-2, None, 2),
    "SA(2, 2, 1)": (SASolver(2, 2, _ONE), 2.2e-2, None, None),
    "Churn(euler)": (Churn(10.0, noise=1.0, tableau="euler"), 7.6e-2, 2.8e-2, 1),
}


def check_law(case):
    solver, coarse, fine, order = case
    errors = {n: law(solver, "VP", grid("VP", n)) for n in (16, 64, 128)}
    if not isinstance(solver, ReverseDiffusion) and getattr(solver, "clock", "u") == "u":
        # E[x] = alpha E[x_0] along the path, and so for every exponential method.
        assert max(abs(mean) for mean, _ in errors.values()) < 1e-13
    for n, expected in ((16, coarse), (64, fine)):
        if expected is not None:  # to the digits given
            assert abs(abs(errors[n][1]) / expected - 1) < 0.055, (n, errors[n])
    if order is not None:
        measured = np.log2(errors[64][1] / errors[128][1])
        assert abs(measured - order) < 0.3, measured
        assert solver.order(None) <= order


@each(LAWS)
def test_the_law_of_gaussian_samples(case):
    check_law(case)


@pytest.mark.slow
@each(SLOW_LAWS)
def test_the_law_of_more_gaussian_samples(case):
    check_law(case)


class UnitLangevin(Langevin):
    """A corrector whose normals are coordinates, one after each step."""

    nodes: jax.Array = dataclasses.field(kw_only=True)

    def __call__(self, model, times, x0, x1, key, cond):
        n = jnp.argmin(jnp.abs(self.nodes - times[1]))
        return self.langevin(model, times[1], x1, jnp.zeros_like(x1).at[n + 1].set(1.0), cond)


def test_a_langevin_corrector_pulls_the_law_back():
    """And leaves it alone after the last step; the errors of DDIM at 16 steps, with and without."""
    path, ts = PROCESSES["VP"], grid("VP", 16)
    hook = UnitLangevin(snr=0.4, rule="ald", nodes=jnp.asarray(ts))
    run = jd.sampler(Affine(path), (18,), solver=Between(DDIM(), hook), ts=ts)
    c = np.asarray(run(jax.random.key(0), init=np.eye(18)[1]).x)
    total = [
        float(path.alpha(t)) ** 2 * VARIANCE + float(path.sigma(t)) ** 2 for t in (ts[0], ts[-1])
    ]
    corrected = abs(c[1] ** 2 * total[0] + c[2:] @ c[2:] - total[1])
    plain = abs(law(DDIM(), "VP", ts)[1])
    assert plain > 4e-2 and corrected < plain / 2, (plain, corrected)
    assert (c[2:17] != 0).all() and c[17] == 0  # a normal after each step but the last


# --- Noise inside a step. ---


@functools.cache
def uneven(n=8):
    """Nodes on VP with steps of many lengths, and their alpha, sigma, lam."""
    path, (start, end) = PROCESSES["VP"], SPANS["VP"]

    @jax.jit
    def nodes():
        lam0, lam1 = path.lam(start), path.lam(end)
        ts = jax.vmap(path.t_of_lam)(lam0 + (lam1 - lam0) * jnp.linspace(0, 1, n + 1) ** 1.3)
        return ts, jax.vmap(path.alpha)(ts), jax.vmap(path.sigma)(ts), jax.vmap(path.lam)(ts)

    return [np.asarray(a) for a in nodes()]


@functools.cache
def tables(solver):
    """Rows of an uneven grid, in float64."""
    ts, alpha, sigma, lam = uneven()
    rows = solver.tabulate(PROCESSES["VP"], ts).rows
    return rows, alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], np.diff(lam)


def stage_scales(rows):
    path = PROCESSES["VP"]
    times = [jnp.asarray(t) for t, _ in rows.stages]
    return [[np.asarray(jax.vmap(f)(t)) for f in (path.alpha, path.sigma)] for t in times]


close = functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-13)


@each({"DPMppSDE": DPMppSDE(0.3), "SEEDS-2": SEEDS(2, (0.3,)), "SEEDS-3": SEEDS(3, (0.2, 0.7))})
def test_stages_and_end_see_one_brownian_path(case):
    """Variances of the SDE with frozen output, and covariances: what is there later decays."""
    solver = case
    rows, _, _, alpha1, sigma1, h = tables(solver)
    sde = np.expm1 if isinstance(solver, SEEDS) else lambda z: -np.expm1(-z)
    r = (0.3,) if isinstance(solver, DPMppSDE) else solver.r
    points = [*zip(stage_scales(rows), r, strict=True), ([alpha1, sigma1], 1.0)]
    noises = [*(row.noise for _, row in rows.stages), rows.noise]
    for i, ((a, s), c) in enumerate(points):
        close(sum(z**2 for z in noises[i]), s**2 * sde(2 * c * h))
        for j in range(i):
            (a0, s0), c0 = points[j]
            # x decays as alpha with the noise prediction frozen, as e^{-h} sigma with the mean.
            decay = a / a0 if isinstance(solver, SEEDS) else s / s0 * np.exp(-(c - c0) * h)
            covariance = sum(x * y for x, y in zip(noises[i], noises[j], strict=False))
            close(covariance, decay * s0**2 * sde(2 * c0 * h))


def test_the_released_noise_of_seeds_has_the_right_variance_but_another_covariance():
    good, bad = (tables(SEEDS(2, (1 / 3,), released))[0] for released in (False, True))
    close(sum(z**2 for z in bad.noise), sum(z**2 for z in good.noise))
    share = bad.noise[0] / good.noise[0]  # stage and end share the first normal only
    assert (np.abs(share - 1) > 0.05).all(), share
    same, even = (tables(SEEDS(2, None, released))[0] for released in (False, True))
    jax.tree.map(close, same, even)


# --- Identities. ---


def test_frozen_steps_are_the_published_formulas():
    rows, a0, s0, a1, s1, h = tables(SEEDS(1))
    eps = -2 * s1 * np.expm1(h)  # x1 = (a1/a0) x0 + eps (x0 - a0 m)/s0
    close(rows.decay, a1 / a0 + eps / s0)
    close(rows.gain, -eps * a0 / s0)
    close(rows.noise[0], s1 * np.sqrt(np.expm1(2 * h)))

    rows = tables(EulerMaruyama("u", "large"))[0]
    close(rows.noise[0] ** 2, s0**2 - (a0 / a1) ** 2 * s1**2)

    rows = tables(ReverseDiffusion())[0]  # x0 = a x1 + G z
    a, g2 = a0 / a1, s0**2 - (a0 / a1) ** 2 * s1**2
    close(rows.decay, 2 - a - g2 / s0**2)
    close(rows.gain, g2 * a0 / s0**2)
    close(rows.noise[0] ** 2, g2)

    before, after, rows = tables(SplitNoise())[0]  # [y + G^2 score + ...]/a
    close(rows.decay, (1 - g2 / s0**2) / a)
    close(rows.gain, g2 * a0 / s0**2 / a)
    close(before**2, g2 / 2)
    close(after**2, g2 / 2 / a**2)

    row = tables(DPMpp2MSDE("heun"))[0].weights[1:]  # of m_{-1} - m_0
    close(row[:, 0], -a1[1:] * (np.expm1(-2 * h) / (2 * h) + 1)[1:] * (h[1:] / h[:-1]), rtol=1e-9)

    level = 0.6  # gDDIM: x1 = a1 m + s1 e^{-l^2 h} eps + noise
    rows = tables(SASolver(1, 0, level))[0]
    close(rows.decay, s1 / s0 * np.exp(-(level**2) * h))
    close(rows.gain, a1 - a0 * s1 / s0 * np.exp(-(level**2) * h))
    close(rows.noise[0], s1 * np.sqrt(-np.expm1(-2 * level**2 * h)))


def test_solvers_that_are_the_same():
    pairs = [
        (SASolver(1, 0, 1.0), DDIM(1.0), 0),
        (SASolver(2, 0, 0.0), DPMpp2M("heun"), 0),
        (SASolver(3, 4, 0.0), UniPC(3), 4),  # whose first steps take shortcuts
        (ERSDE(1, "sde"), DDIM(1.0), 0),
        (ERSDE(1, lambda s: 2 * s**1.5), ERSDE(1, "sde2"), 0),
    ]
    for one, two, first in pairs:
        assert one.stochastic == two.stochastic
        for a, b in zip(parts(one), parts(two), strict=True):
            close(a[first:], b[first:])


def parts(solver):
    """Decay, gain, weights and noise, without columns of a DDIM-like solver that stay zero."""
    rows = tables(solver)[0]
    weights = rows.weights.T if isinstance(rows.weights, np.ndarray) else rows.weights
    columns = [rows.decay, rows.gain, *weights, *rows.noise]
    return columns if solver.stochastic else [c for c in columns if np.any(c)]


@each({"ode": "ode", "sde": "sde", "sde5": "sde5"})
def test_er_sde_is_the_published_formula(case):
    """With the integrals as printed: in closed form, or by adaptive quadrature."""
    phi = case
    rows, alpha0, sigma0, alpha1, sigma1, _ = tables(ERSDE(3, phi))
    s = np.append(sigma0 / alpha0, sigma1[-1] / alpha1[-1])
    scale = {"ode": lambda v: v, "sde": np.square, "sde5": lambda v: v * (np.exp(v**0.3) + 10)}[phi]
    for i in range(2, 8):
        a, b, gaps, w = s[i], s[i + 1], s[i - 2 : i] - s[i - 1 : i + 1], rows.weights[i]
        if phi == "ode":
            j0, j1 = np.log(a / b), a - b - a * np.log(a / b)
        elif phi == "sde":
            j0, j1 = 1 / b - 1 / a, np.log(a / b) - a * (1 / b - 1 / a)
        else:
            j0 = scipy.integrate.quad(lambda v: 1 / scale(v), b, a, epsrel=1e-12)[0]
            j1 = scipy.integrate.quad(lambda v, a=a: (v - a) / scale(v), b, a, epsrel=1e-12)[0]
        rho = scale(b) / scale(a)
        first, second = b - a + scale(b) * j0, (b - a) ** 2 / 2 + scale(b) * j1
        # m' = (m_0 - m_1)/(s_0 - s_1), m'' = 2 (m'_0 - m'_1)/(s_0 - s_2), here with m_0 = 0
        bend = 2 * second / (s[i] - s[i - 2])
        expected = [first / gaps[1] + bend / gaps[1] + bend / gaps[0], -bend / gaps[0]]
        np.testing.assert_allclose(w, alpha1[i] * np.array(expected), rtol=1e-9)
        close(rows.decay[i], alpha1[i] / alpha0[i] * rho)
        close(rows.gain[i], alpha1[i] * (1 - rho))
        if phi != "ode":
            close(rows.noise[0][i], alpha1[i] * np.sqrt(b**2 - a**2 * rho**2))


def test_the_published_levels_of_noise_and_any_other():
    def half(process, t):
        return 0.5 * (t > 0.5)

    ts, alpha, sigma, _ = (a[:-1] for a in uneven())
    windows = {
        "latent": (ts > 0.2008) & (ts < 0.8002),  # shares of 0.001 to 1
        "edm": (0.05 < sigma / alpha) & (sigma / alpha < 1),
        half: ts > 0.5,
    }
    for tau, window in windows.items():
        assert 0 < window.sum() < len(window)
        solver = SASolver(1, 0, tau)
        np.testing.assert_array_equal(tables(solver)[0].noise[0] > 0, window)
        assert solver.stochastic


# --- Ends with infinite log-SNR. ---


@each(
    {
        "DPMppSDE": DPMppSDE(),
        "SEEDS": SEEDS(2),
        "ERSDE": ERSDE(2),
        "SASolver": SASolver(2, 2),
        "SASolver(0)": SASolver(1, 0, 0.0),
        "Churn": Churn(1.0),
        "SplitNoise": SplitNoise(),
    }
)
def test_rows_at_the_ends_are_the_limits_with_finite_slopes(case):
    """DDPM from alpha = 0 and to sigma = 0, or DDIM where the step has no noise of its own."""
    path, kind = PROCESSES["Rectified"], type(case)

    def leaves(ts):
        row = case.row(path, ts[: case.memory + 2], jnp.asarray(3), jnp.asarray(5))
        return jax.tree.map(jnp.asarray, row)

    windows = jnp.array([[0.0, 0.2, 0.3, 0.4], [0.8, 1.0, 1.0, 1.0]])
    rows, slopes = eqx.filter_jit(jax.vmap(lambda ts: (leaves(ts), jax.jacrev(leaves)(ts))))(
        windows
    )
    for leaf in jax.tree.leaves((rows, slopes)):
        assert np.isfinite(leaf).all()
    row = rows[3] if kind is Churn else rows[2] if kind is SplitNoise else rows
    calm = kind is Churn or not case.stochastic
    expected = [DDIM(0.0 if calm else 1.0).row(path, w[:2], 3, 5) for w in windows]
    for i, limit in enumerate(expected):
        if kind is Churn and i == 0:
            continue  # it starts from a noisier time
        np.testing.assert_allclose(
            [row.decay[i], row.gain[i]], [limit.decay, limit.gain], atol=1e-12
        )
        if kind is SplitNoise:
            assert rows[0][i] == 0
        elif not calm:
            total = np.sqrt(sum(z[i] ** 2 for z in row.noise))
            np.testing.assert_allclose(total, limit.noise[0], atol=1e-12)
        size = np.abs(jax.tree.leaves(row.weights)).sum() if i == 1 or kind is not SASolver else 0
        assert i == 0 or size < 1 or np.isfinite(size)


# --- Churn and correctors. ---


def keyed_normals(key, steps, shape, use=0):
    """The normals of a run, by the rule that names their keys."""
    keys = [jax.random.fold_in(stream(key, SOLVER), USES * step + use) for step in range(steps)]
    return [np.asarray(jax.random.normal(k, shape)) for k in keys]


def squash(t, x, xp):
    return xp.tanh(x - t) + 0.1 * xp.sin(x[::-1])


def _squash(t, x, cond):
    return squash(t, x, jnp)


def test_churn_is_algorithm_2_of_edm():
    path, n = PROCESSES["EDM"], 6
    ts = path.grid(n, t_end=0.05)
    key, x = jax.random.key(2), 80 * np.array([0.4, -0.9])
    solver = Churn(1.8, s_min=1.0, s_max=85.0, noise=1.01)
    out = jd.sampler(jd.Denoiser(path, _squash), (2,), solver=solver, ts=ts)(key, init=x)
    slope = lambda x, t: (x - squash(t, x, np)) / t  # noqa: E731
    lifted = []
    for i, z in enumerate(keyed_normals(key, n, (2,))):
        gamma = 0.3 if 1 <= ts[i] <= 85 else 0.0
        t = min((1 + gamma) * ts[i], 80.0)  # not past the end of the process
        lifted.append(t > ts[i])
        x = x + np.sqrt(t**2 - ts[i] ** 2) * 1.01 * z
        d = slope(x, t)
        euler = x + (ts[i + 1] - t) * d
        x = x + (ts[i + 1] - t) * (d + slope(euler, ts[i + 1])) / 2
    assert not lifted[0] and lifted[1] and not lifted[-1] and int(out.nfe) == 2 * n
    np.testing.assert_allclose(out.x, x, rtol=1e-10)


def test_churn_acts_on_the_state_over_alpha():
    lams, ends = jnp.linspace(-3.0, 2.5, 9), []
    for name in ("VP", "EDM"):
        path = PROCESSES[name]
        ts = np.asarray(jax.vmap(path.t_of_lam)(lams))
        first, last = float(path.alpha(ts[0])), float(path.alpha(ts[-1]))
        net = lambda t, x, cond, path=path: jnp.tanh(x / path.alpha(t) - path.lam(t))  # noqa: E731
        run = jd.sampler(jd.Denoiser(path, net), (2,), solver=Churn(2.0), ts=ts)
        out = run(jax.random.key(4), init=first * np.array([13.0, -4.0]))
        ends.append(np.asarray(out.x) / last)
    np.testing.assert_allclose(*ends, rtol=1e-11)


def test_unadjusted_langevin_has_the_bias_of_the_formula():
    """From v to v/(1 - d/(2v)): of `ald` on coefficients, of `snr` within standard errors."""
    path, t = PROCESSES["VP"], 0.4
    alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
    v = alpha**2 * VARIANCE + sigma**2
    corrector, k = Langevin(snr=0.3, rule="ald"), 200
    x = jnp.zeros(k + 2).at[0].set(alpha * MEAN)
    body = lambda i, x: corrector.langevin(Affine(path), t, x, jnp.zeros(k + 2).at[i + 2].set(1.0))  # noqa: E731
    x = np.asarray(jax.lax.fori_loop(0, k, body, x))
    np.testing.assert_allclose(x[0], alpha * MEAN, rtol=1e-12)
    np.testing.assert_allclose(x[2:] @ x[2:], v / (1 - (0.3 * sigma) ** 2 / v), rtol=1e-10)

    corrector, d, chains = Langevin(snr=0.3), 1000, 100
    denoiser = jd.exact.gaussian(path, jnp.full(d, MEAN), VARIANCE)

    @jax.jit
    @jax.vmap
    def chain(key):
        def body(i, x):
            z = jax.random.normal(jax.random.fold_in(key, i), (d,))
            return corrector.langevin(denoiser, t, x, z)

        first = alpha * MEAN + jnp.sqrt(v) * jax.random.normal(jax.random.fold_in(key, 99), (d,))
        return jax.lax.fori_loop(0, 30, body, first)

    x = np.asarray(chain(jax.random.split(jax.random.key(0), chains))) - alpha * MEAN
    ratio, error = np.mean(x**2) / v, np.sqrt(2 / x.size)
    assert abs(ratio - 1 / (1 - 0.3**2)) < 5 * error + 2 / d, (ratio, error)


@pytest.mark.parametrize("clean", [False, True])
def test_a_corrector_follows_every_step_but_the_last(clean):
    """Where a step to clean data follows, that is the last, and all nodes are corrected."""
    path, ts = PROCESSES["VP"], grid("VP", 3)
    key, x, x0 = jax.random.key(5), np.array([0.4, -0.9, 0.3]), 0.0
    rows = DPMpp2M().tabulate(path, ts, more=int(clean)).rows
    solver = Between(DPMpp2M(), Langevin(steps=2))
    denoiser = jd.Denoiser(path, _squash)
    run = jd.sampler(denoiser, (3,), solver=solver, ts=ts, denoise=clean, trajectory=True)
    out = run(key, init=x)
    for i in range(3):
        m = squash(ts[i], x, np)
        x = rows.decay[i] * x + rows.gain[i] * m + rows.weights[0][i] * (x0 - m)
        x0, alpha, sigma = m, float(path.alpha(ts[i + 1])), float(path.sigma(ts[i + 1]))
        for k in range(2 if clean or i < 2 else 0):
            own = stream(stream(stream(stream(key, HOOK), 0), i), k)
            z = np.asarray(jax.random.normal(own, (3,)))
            score = (alpha * squash(ts[i + 1], x, np) - x) / sigma**2
            size = 2 * (0.16 * np.linalg.norm(z) / np.linalg.norm(score)) ** 2
            x = x + size * score + np.sqrt(2 * size) * z
        np.testing.assert_allclose(out.aux["trajectory"][i + 1], x, rtol=1e-10)
    if clean:
        np.testing.assert_allclose(out.x, squash(ts[3], x, np), rtol=1e-10)
    assert int(out.nfe) == (3 + 2 * 3 + 1 if clean else 3 + 2 * 2)


# --- A path of the user. ---


def test_stages_read_a_brownian_path_of_the_user():
    """The noise is what the path B does in clock u: x1 = ... + sigma_1^2/alpha_1 (B_1 - B_0)."""
    path, (start, end) = PROCESSES["VP"], (0.5, 0.3)
    shape, x = jax.ShapeDtypeStruct((2,), jnp.float64), np.array([0.5, -0.2])
    tree = dfx.VirtualBrownianTree(0.0, 10.0, 1e-4, shape, jax.random.key(0))
    denoiser, solver = jd.Denoiser(path, _squash), DPMppSDE(0.3)

    def draw(solver):
        run = jd.sampler(denoiser, (2,), solver=solver, ts=[start, end], noise=lambda key: tree)
        return run(jax.random.key(0), init=x)

    row = jax.tree.map(lambda a: a[0], solver.tabulate(path, jnp.array([start, end])).rows)
    (time, stage), m = row.stages[0], squash(start, x, np)

    def moved(t):
        u0, u1 = float(path.snr(start)), float(path.snr(t))
        return float(path.sigma(t) ** 2 / path.alpha(t)) * np.asarray(tree.evaluate(u0, u1))

    inner = squash(time, stage.decay * x + stage.gain * m + moved(time), np)
    expected = row.decay * x + row.gain * m + row.weights[0] * (inner - m) + moved(end)
    np.testing.assert_allclose(draw(solver).x, expected, rtol=1e-9)

    # The two halves of split noise are two increments.
    before, after, row = SplitNoise().tabulate(path, jnp.array([start, end])).rows
    marks = [float(path.snr(t)) for t in (start, (start + end) / 2, end)]
    pairs = itertools.pairwise(marks)
    z = [np.asarray(tree.evaluate(a, b)) / np.sqrt(b - a) for a, b in pairs]
    y = x + before[0] * z[0]
    expected = row.decay[0] * y + row.gain[0] * squash(start, y, np) + after[0] * z[1]
    np.testing.assert_allclose(draw(SplitNoise()).x, expected, rtol=1e-9)


# --- Weak order where m is not affine. ---

TWO = oracles.GaussianMixture.isotropic([0.3, 0.7], [[-1.0], [0.8]], [0.05, 0.1])


def posterior_mean(x, alpha, sigma):
    total = alpha**2 * TWO.covs[:, 0, 0] + sigma**2
    z = x[..., None] - alpha * TWO.means[:, 0]
    log = np.log(TWO.weights) - z**2 / (2 * total) - np.log(total) / 2
    p = np.exp(log - log.max(-1, keepdims=True))
    means = TWO.means[:, 0] + alpha * TWO.covs[:, 0, 0] / total * z
    return (p * means).sum(-1) / p.sum(-1)


def weak_errors(solver, n):
    """Errors of E x^2, E x^4, E cos 2x at the end: backwards through the steps by quadrature."""
    path, ts = PROCESSES["VP"], grid("VP", n)
    rows = solver.tabulate(path, ts).rows
    alpha, sigma = (np.asarray(jax.vmap(f)(jnp.asarray(ts))) for f in (path.alpha, path.sigma))
    nodes, masses = np.polynomial.hermite_e.hermegauss(12)
    masses = masses / masses.sum()
    z, w = (nodes[:, None], nodes), masses[:, None] * masses
    x = np.linspace(-8, 8, 401)
    tests = [np.square, lambda x: x**4, lambda x: np.cos(2 * x)]
    u = [f(x) for f in tests]
    for i in reversed(range(n)):
        x0 = x[:, None, None]
        if isinstance(solver, SplitNoise):
            y = x0 + rows[0][i] * z[0]
            row, m = rows[2], posterior_mean(y, alpha[i], sigma[i])
            x1 = row.decay[i] * y + row.gain[i] * m + rows[1][i] * z[1]
        else:
            m = posterior_mean(x0, alpha[i], sigma[i])
            x1 = rows.decay[i] * x0 + rows.gain[i] * m
            for c, normal in zip(rows.noise, z, strict=False):
                x1 = x1 + c[i] * normal
            for w_, (time, stage) in zip(rows.weights, rows.stages, strict=True):
                inner = stage.decay[i] * x0 + stage.gain[i] * m + stage.noise[0][i] * z[0]
                a, s = float(path.alpha(time[i])), float(path.sigma(time[i]))
                x1 = x1 + w_[i] * (posterior_mean(inner, a, s) - m)
        u = [(scipy.interpolate.CubicSpline(x, v)(x1) * w).sum((1, 2)) for v in u]

    def density(a, s):
        scale = np.sqrt(a**2 * TWO.covs[:, 0, 0] + s**2)
        return (
            scipy.stats.norm.pdf(x[:, None], a * TWO.means[:, 0], scale)
            @ TWO.weights
            * (x[1] - x[0])
        )

    first, last = density(alpha[0], sigma[0]), density(alpha[-1], sigma[-1])
    return np.array([v @ first - f(x) @ last for v, f in zip(u, tests, strict=True)])


@each({"DPMppSDE": (DPMppSDE(), 2), "SplitNoise": (SplitNoise(), 1)})
def test_weak_order_on_a_mixture(case):
    solver, order = case
    coarse, fine = (np.linalg.norm(weak_errors(solver, n)) for n in (16, 32))
    print(coarse, fine, np.log2(coarse / fine))
    assert abs(np.log2(coarse / fine) - order) < 0.3, (coarse, fine)


@pytest.mark.slow
@each({"DPMpp2MSDE": DPMpp2MSDE(), "SA": SASolver(3, 4), "ERSDE": ERSDE(3, "sde")})
def test_multistep_solvers_sample_a_mixture(case):
    """Second moments within 4 standard errors and a bias that ancestral sampling has 20-fold."""
    solver, path, n = case, PROCESSES["VP"], 1_000_000
    denoiser = jd.exact.mixture(path, TWO.weights, TWO.means, TWO.covs[:, 0])
    ts = grid("VP", 64)
    alpha, sigma = float(path.alpha(ts[-1])), float(path.sigma(ts[-1]))
    start = [float(f(ts[0])) for f in (path.alpha, path.sigma)]
    init = start[0] * TWO.sample(0, n) + start[1] * np.random.default_rng(1).standard_normal((n, 1))
    run = jd.sampler(denoiser, (1,), solver=solver, ts=ts)
    x = np.asarray(jd.sample(jax.random.key(0), run, num=n, init=init).x)
    mean, cov = TWO.moments()
    second = alpha**2 * (cov[0, 0] + mean[0] ** 2) + sigma**2
    error = np.std(x**2) / np.sqrt(n)
    ancestral = abs(weak_errors(DDIM(1.0), 64)[0])
    assert abs(np.mean(x**2) - second) < 4 * error + ancestral / 20, (np.mean(x**2) - second, error)


# --- What is refused. ---


def test_errors_name_the_argument_and_what_was_given(as_users_see_it):
    cases = [
        (lambda: EulerMaruyama("t", "large"), "EulerMaruyama: variance must be .* got 'large'"),
        (lambda: DPMpp2MSDE("other"), "DPMpp2MSDE: variant must be .* got 'other'"),
        (lambda: DPMppSDE(1.0), r"DPMppSDE: r must be .* got \(1.0,\)"),
        (lambda: SEEDS(4), "SEEDS: p must be .* got 4"),
        (lambda: SEEDS(3, (0.5, 0.2)), r"SEEDS: r must be 2 increasing .* got \(0.5, 0.2\)"),
        (lambda: ERSDE(4), "ERSDE: p must be .* got 4"),
        (lambda: ERSDE(2, "sde6"), "ERSDE: phi must be .* got 'sde6'"),
        (lambda: ERSDE(2, lambda s: s**0.5), "ERSDE: phi must be .* nondecreasing"),
        (lambda: SASolver(0), "SASolver: predictor must be .* got 0"),
        (lambda: SASolver(2, -1), "SASolver: corrector must be .* got -1"),
        (lambda: SASolver(tau=-1.0), "SASolver: tau must be .* got -1.0"),
        (lambda: SASolver(tau="pixels"), "SASolver: tau must be .* got 'pixels'"),
        (lambda: Churn(-1), "Churn: churn must be .* got -1"),
        (lambda: Churn(s_min=2.0, s_max=1.0), "Churn: s_max must be .* got 1.0"),
        (lambda: Churn(tableau="rk45"), "Churn: tableau must be .* got 'rk45'"),
        (lambda: Langevin(steps=0), "Langevin: steps must be .* got 0"),
        (lambda: Langevin(snr=0.0), "Langevin: snr must be .* got 0.0"),
        (lambda: Langevin(rule="mala"), "Langevin: rule must be .* got 'mala'"),
        (lambda: Langevin(kernel=Langevin), "Langevin: kernel must be a step .* got"),
        (lambda: Between(DDIM(), 0.5), "Between: hook must be a function .* got 0.5"),
        (lambda: Between(DDIM(), Langevin), "Between: hook must be a function .* got"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    path = PROCESSES["VP"]
    tree = dfx.VirtualBrownianTree(
        0.0, 1e4, 1e-3, jax.ShapeDtypeStruct((2,), float), jax.random.key(0)
    )
    with pytest.raises(ValueError, match="noise must be left out"):
        solver, path_of = Between(DDIM(), Langevin()), lambda key: tree
        jd.sampler(jd.Denoiser(path, _squash), (2,), solver=solver, ts=grid("VP", 3), noise=path_of)
    with pytest.raises(ValueError, match="Churn: ts must be a known grid"):
        solver, terms = Churn(), pf_ode(jd.Denoiser(path, _squash), "t")
        state = solver.init(terms, 0.9, 0.5, jnp.zeros(2), None)
        solver.step(terms, 0.9, 0.5, jnp.zeros(2), None, state, False)
