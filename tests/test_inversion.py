"""Exact inversion: the equations, orders, round trips, bits, adjoint, editing, refusals."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers import each

import jaxdiff as jd
from jaxdiff import solvers
from jaxdiff.inversion import edit, interpolate
from jaxdiff.solvers import BDIA, BELM, DDIM, EDICT, McCallumFoster, ReversibleAdjoint
from jaxdiff.solvers import SymmetricLeapfrog as Symmetric
from jaxdiff.solvers import VelocityLeapfrog as Velocity
from jaxdiff.solvers.reversible import kind
from jaxdiff.solvers.terms import View

VP, EDM = jd.process.VP(), jd.process.EDM()
STABLE = jd.process.Discrete(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)  # s: 14.6 to 0.029
SINGLE, DOUBLE = np.float32, np.float64


class Modes(eqx.Module):
    """Posterior mean of coordinates that are N(cond +- mu, v) each, as a network."""

    path: jd.process.AbstractProcess
    mu: jax.Array
    v: jax.Array

    def __call__(self, t, x, cond=None):
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        cond = jnp.zeros_like(x) if cond is None else cond
        x, total = x - alpha * cond, alpha**2 * self.v + sigma**2
        tilt = self.mu * jnp.tanh(alpha * self.mu * x / total)
        return cond + (alpha * self.v * x + sigma**2 * tilt) / total


MU, V = np.linspace(0.8, 1.2, 8), np.linspace(0.04, 0.2, 8)


def modes(path, d=8, dtype=DOUBLE):
    return jd.Denoiser(path, Modes(path, *(jnp.asarray(a[:d], dtype) for a in (MU, V))))


def sampler_of(path, solver, ts, d=8, dtype=DOUBLE, **options):
    return jd.sampler(modes(path, d, dtype), (d,), solver=solver, ts=ts, dtype=dtype, **options)


# --- The equations. ---

FAMILY = {  # name: (solver, gamma of alpha and sigma at (next, current, last))
    "DDIM": (BELM(0.0), lambda a, s: 0 * a[0]),
    "O-BELM": (BELM(), lambda a, s: a[0] / a[2] * np.divide(*np.diff(s / a, axis=0)) ** 2),
    "BDIA": (BDIA(0.7), lambda a, s: 0.7),
    "symmetric": (Symmetric(), lambda a, s: np.sqrt(a[0] * s[0] / a[2] / s[2])),
    "velocity": (Velocity(), lambda a, s: 1.0),
}
LAST, H0, H1 = np.cumsum(np.random.default_rng(0).uniform(0.05, 0.5, (3, 1000)), axis=0) - 2
LAMS = np.stack([H1, H0, LAST])  # (next, current, last)


def time_of(lam):
    """Time at which VP has this log-SNR, by its formula."""
    b = np.logaddexp(0, -2 * lam)
    return 2 * b / (0.1 + np.sqrt(0.01 + 2 * 19.9 * b))


@each(FAMILY)
def test_a_step_is_the_equation_and_its_inverse(case):
    solver, gamma = case

    def one_step(ts, x, old, m):
        """Step once from (x, old) with the network output m, and once back."""
        denoiser = jd.Denoiser(VP, lambda t, x, cond: cond)
        at = View(solvers.Field(denoiser, solvers.Clock(VP, "t"), m), None, None, None)
        row, t = solver.row(VP, ts, 5, 1), ts[1::-1]
        pair = row.c0 * x, solver.unit(VP, ts[2]) * old
        there = solver.forward(at, row, t, pair)
        return there[0] / row.c1, pair, solver.backward(at, row, t, there)

    x, old, m = np.random.default_rng(1).standard_normal((3, 1000))
    new, pair, back = jax.jit(jax.vmap(one_step))(time_of(LAMS.T), x, old, m)
    alpha, sigma = (1 + np.exp(-2 * LAMS)) ** -0.5, (1 + np.exp(2 * LAMS)) ** -0.5
    eps = (x - alpha[1] * m) / sigma[1]
    line = alpha * m + sigma * eps
    expected = line[0] + gamma(alpha, sigma) * (old - line[2])
    np.testing.assert_allclose(new, expected, rtol=1e-12, atol=1e-13 * np.abs(eps).max())
    if np.all(expected != line[0]):  # DDIM has no inverse
        np.testing.assert_allclose(back, pair, rtol=0, atol=1e-12 * np.max(np.abs(pair)))


def conditions(nodes):
    """The matrix of the order conditions sum_j a_j u_j^p + p sum_{j<k} c_j u_j^(p-1) = [p = 0].

    Nodes u_0 = 0 (new), u_1, ..., u_k, (..., k + 1); exact for polynomials of degree 2k - 2.
    """
    u, k = np.asarray(nodes)[..., None, 1:], np.shape(nodes)[-1] - 1
    p = np.arange(2 * k - 1)[:, None]
    return np.concatenate([u**p, p * u[..., :-1] ** np.maximum(p - 1, 0)], axis=-1)


def test_the_optimal_member_meets_the_order_conditions():
    rows = jax.jit(jax.vmap(lambda ts: BELM().row(VP, ts, 5, 1)))(time_of(LAMS.T))
    s, q = np.exp(-LAMS.T), np.asarray(rows.q)
    span = s[:, 2] - s[:, 0]
    weights = np.stack([1 - q, q, rows.of_eps / span], axis=1)
    matrix = conditions((s - s[:, :1]) / span[:, None])
    residual = np.einsum("nij,nj->ni", matrix, weights) - np.eye(3)[:1]
    assert np.all(np.abs(residual).max(1) < 2e-14 * np.maximum(1, q))
    np.testing.assert_allclose(rows.of_m, 0, atol=1e-15 * np.max(q))


def test_more_than_two_steps_are_unstable():
    """Why there is no BELM of k >= 3: each step multiplies errors by the largest root, 9.9 or more.

    On equal steps, k = 2 to 5; and k = 3 on steps that shrink by a ratio.
    """

    def largest_root(steps):
        nodes, k = np.cumsum([0, *steps]) / np.sum(steps), len(steps)
        a = np.linalg.solve(conditions(nodes), np.arange(2 * k - 1) == 0)[:k]
        return np.abs(np.roots([1, *-a])).max()

    found = [largest_root(np.ones(k)) for k in (2, 3, 4, 5)]
    np.testing.assert_allclose(found, [1.0, 9.90, 28.0, 56.5], rtol=2e-3)
    for ratio, root in {0.9: 7.2, 0.7: 3.5, 0.5: 1.43, 0.4: 1.0}.items():
        assert abs(largest_root([1, 1 / ratio, 1 / ratio**2]) - root) < 0.06, ratio
    # What is offered has q = 1 on equal steps: the roots are 1 and -1.
    assert abs(BELM().row(EDM, jnp.array([1.0, 2.0, 3.0]), 5, 1).q - 1) < 1e-14


# --- Order. ---

ENDS, MOST = time_of(np.array([-2.5, 3.0])), 320
STARTS = np.random.default_rng(3).uniform(-1.5, 1.5, (6, 4))


@eqx.filter_jit
def ends(solver, nodes, n):
    """End points after n steps through padded nodes: one program for all grids."""
    terms = solvers.pf_ode(modes(VP, 4), "t")

    def one(y):
        def body(i, carry):
            y, state = carry
            y, _, _, state, _ = solver.step(terms, nodes[i], nodes[i + 1], y, None, state, False)
            return y, state

        return jax.lax.fori_loop(0, n, body, (y, solver.init(terms, *nodes[:2], y, None)))[0]

    return jax.vmap(one)(STARTS)


@functools.cache
def flow():
    """Ends of the PF-ODE, which keeps quantiles: by bisection, independent of any solver."""

    def cdf(x, t):
        alpha, sigma = float(VP.alpha(t)), float(VP.sigma(t))
        std = np.sqrt(alpha**2 * V[:4] + sigma**2)
        return sum(scipy.stats.norm.cdf((x + s * alpha * MU[:4]) / std) for s in (-1, 1)) / 2

    low, high = np.full_like(STARTS, -6), np.full_like(STARTS, 6)
    for _ in range(60):
        middle = (low + high) / 2
        below = cdf(middle, ENDS[1]) < cdf(STARTS, ENDS[0])
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return low


ORDERS = {  # name: (solver, order, kinds of grid, numbers of steps)
    "O-BELM": (BELM(), 2, ("logsnr", "edm", "uniform"), (80, 160, 320)),
    "BDIA(0.7)": (BDIA(0.7), 1, ("logsnr",), (160, 320)),
    "BDIA(1)": (BDIA(), 2, ("logsnr",), (80, 160, 320)),
    "EDICT": (EDICT(), 1, ("logsnr",), (160, 320)),
    "symmetric": (Symmetric(), 2, ("logsnr",), (80, 160, 320)),
    "velocity": (Velocity(), 2, ("logsnr",), (80, 160, 320)),
    "McCallumFoster": (McCallumFoster(solvers.Heun()), 2, ("logsnr",), (80, 160)),
}


@each(ORDERS)
def test_order(case):
    solver, order, grids, sizes = case
    assert solver.order(None) == order
    for grid in grids:
        errors = []
        for n in sizes:
            nodes = VP.grid(n, grid, t_start=ENDS[0], t_end=ENDS[1])
            nodes = jnp.asarray(np.append(nodes, np.full(MOST - n, ENDS[1])))
            errors.append(np.sqrt(np.mean((ends(solver, nodes, jnp.asarray(n)) - flow()) ** 2)))
        slopes = -np.diff(np.log(errors)) / np.diff(np.log(sizes))
        assert np.all(np.abs(slopes - order) < 0.05), (grid, errors, slopes)


# --- Round trips. ---


def error(a, b):
    return np.linalg.norm(np.asarray(a, float) - b) / np.linalg.norm(b)


TRIPS = {  # (solver, steps, dtype, bound); s from 14.6 to 0.029
    "O-BELM": (BELM(), 200, DOUBLE, 1e-11),
    "O-BELM, float32": (BELM(), 200, SINGLE, 1e-4),
    "EDICT": (EDICT(), 50, SINGLE, 1e-4),
    "symmetric": (Symmetric(), 200, SINGLE, 1e-6),
    "McCallumFoster": (McCallumFoster(DDIM()), 200, DOUBLE, 1e-11),
}


@each(TRIPS)
def test_round_trips(case):
    """Noise to data to noise and data to noise to data; not so from the noise alone."""
    solver, n, dtype, bound = case
    ts = jd.grids.discrete(STABLE, n + 1, "linspace")
    noise, x = np.random.default_rng(4).standard_normal((2, 8)).astype(dtype)
    noise = noise * np.asarray(STABLE.sigma(ts[0]), dtype)
    sampler = sampler_of(STABLE, solver, ts, dtype=dtype)
    draw = functools.partial(sampler, None)
    there, inverse = sampler.invert(draw(init=noise)), sampler.invert(x)
    assert there.x.dtype == dtype and int(inverse.nfe) == solver.cost(n)
    assert error(there.x, noise) < bound and error(draw(init=inverse).x, x) < bound
    assert error(draw(init=inverse.x).x, x) > 1e-3


def test_the_volume_of_pairs():
    """The log-determinant is d times the sum of the logs of q, for any network: it telescopes."""
    sampler = sampler_of(VP, BELM(), VP.grid(13, "edm"), 3)
    start = sampler.invert(jnp.array([0.5, -0.9, 1.3]))

    def move(pair):
        return sampler(None, init=dataclasses.replace(start, pair=pair)).aux["pair"]

    jacobian = jax.jit(jax.jacfwd(move))(start.pair).reshape(6, 6)
    h = np.diff(np.exp(-np.asarray(jax.vmap(VP.lam)(sampler.solve.ts))))
    found, expected = np.linalg.slogdet(jacobian)[1], 3 * 2 * np.log(h[-1] / h[0])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


def test_not_one_bit_is_lost():
    """A thousand steps in float32, through `sample` and `vmap`, both ways."""
    sampler = sampler_of(VP, Symmetric(20), VP.grid(1000, "logsnr"), dtype=SINGLE)
    back = functools.partial(jd.many, sampler.invert)
    again = functools.partial(jd.sample, None, sampler, num=4)
    noise, x = np.random.default_rng(5).standard_normal((2, 4, 8)).astype(SINGLE)
    made = again(init=noise)
    inverse = back(made)
    same = again(init=inverse)
    assert inverse.pair.dtype == jnp.int32 and np.abs(made.x).max() > 0.5
    for a, b in ((same.aux["pair"], made.aux["pair"]), (same.x, made.x)):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(inverse.x, noise, atol=2e-6)
    inverse = back(jnp.asarray(x))
    trip = again(init=jd.check(inverse))
    np.testing.assert_allclose(trip.x, x, atol=2e-6)  # rounded once, to fixed point
    np.testing.assert_array_equal(back(trip).pair, inverse.pair)


def test_out_of_range_fails():
    sampler = sampler_of(VP, Velocity(bits=30), VP.grid(5, "logsnr"))
    inverse = sampler.invert(3 * jnp.ones(8))
    for failed in (inverse, sampler(None, init=inverse)):
        assert np.all(np.isnan(failed.x))
        with pytest.raises(RuntimeError, match="1 of 1 samples failed"):
            jd.check(failed)


def test_both_engines_agree():
    plain, other = (
        sampler_of(VP, Symmetric(), VP.grid(9, "logsnr"), engine=e, trajectory=True)
        for e in ("scan", "diffrax")
    )
    plain, other = (s(None, init=np.ones(8)).aux["trajectory"] for s in (plain, other))
    assert plain.shape == (10, 8)  # of which the last two are the pair
    np.testing.assert_allclose(other, plain, rtol=1e-13)


# --- Ends. ---

FLAT = jd.process.Rectified()
STEPS = 20
CLEAN = {  # name: (path, grid, denoise); both end on clean data, alpha = 1 and sigma = 0
    "Rectified": (FLAT, FLAT.grid(STEPS, t_start=0.95), False),
    "DDPM": (STABLE, jd.grids.discrete(STABLE, STEPS, "linspace"), True),
}
FINITE = {  # solver, error measured here, amplification as documented by s at the nodes: at most
    "O-BELM": (BELM(), 3.5e-15, lambda s: ((s[0] - s[1]) / (s[-2] - s[-1])) ** 2),  # 38,000
    "BDIA(0.96)": (BDIA(0.96), 1.0e-15, lambda s: 0.96**-STEPS),  # 2.3
    "EDICT": (EDICT(), 3.3e-15, lambda s: 0.93 ** (-2 * STEPS)),  # 18
    "velocity": (Velocity(), 2.7e-16, lambda s: 1.0),
}


def scales(name):
    """Alpha and sigma at all nodes, (nodes, 2), by NumPy; the last is clean data."""
    ts = np.asarray(CLEAN[name][1])
    if name == "Rectified":
        return np.stack([1 - ts, ts], axis=1)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.cumprod(1 - betas)[ts.astype(int)]
    return np.append(np.sqrt(np.stack([kept, 1 - kept], axis=1)), [[1.0, 0.0]], axis=0)


@dataclasses.dataclass(eq=False)
class Watched:
    """The network, which notes when it is called and knows nothing at sigma = 0."""

    net: Modes
    times: list

    def __call__(self, t, x, cond=None):
        jax.debug.callback(lambda t: self.times.append(float(t)), t)
        return jnp.where(self.net.path.sigma(t) > 0, self.net(t, x, cond), jnp.nan)


@each(FINITE, "finite")
@each({name: name for name in CLEAN}, "name")
def test_clean_data_are_inverted_and_come_back(name, finite):
    (path, ts, denoise), (solver, measured, amplification) = CLEAN[name], finite
    net = Watched(modes(path).net, [])
    sampler = jd.sampler(jd.Denoiser(path, net), (8,), solver=solver, ts=ts, denoise=denoise)
    x = np.random.default_rng(4).standard_normal(8)

    def watched(call, *args, **kwargs):
        out = jd.check(call(*args, **kwargs))
        jax.effects_barrier()
        assert len(net.times) == int(out.nfe)
        assert min(net.times) >= float(ts[-1] if denoise else ts[-2])
        net.times.clear()
        return out

    noise = watched(sampler.invert, x)
    back = watched(sampler, None, init=noise)
    again = watched(sampler.invert, back)
    bound = 10 * min(measured, 2.0**-52 * amplification(np.divide(*scales(name).T[::-1])))
    assert error(back.x, x) < bound, error(back.x, x) / bound
    assert error(again.pair, noise.pair) < bound, error(again.pair, noise.pair) / bound
    assert error(noise.x, x) > 0.05  # it went somewhere


@each({name: name for name in CLEAN}, "name")
def test_the_optimal_member_is_the_published_recursion_at_every_node(name):
    """Eq. 18 of Wang et al. 2024 by NumPy, in y = x/alpha, with DDIM as its first step."""
    path, ts, denoise = CLEAN[name]
    (alpha, sigma), net = scales(name).T, modes(path).net
    s, x = sigma / alpha, sigma_start(name)
    h, y = s[:-1] - s[1:], [x / alpha[0]]
    for n in range(len(h)):
        x = alpha[n] * y[-1]
        total = alpha[n] ** 2 * V + sigma[n] ** 2
        m = (alpha[n] * V * x + sigma[n] ** 2 * MU * np.tanh(alpha[n] * MU * x / total)) / total
        eps = (x - alpha[n] * m) / sigma[n]
        if n == 0:
            y.append(y[0] - h[0] * eps)
            continue
        q = (h[n] / h[n - 1]) ** 2
        y.append(y[-1] + q * (y[-2] - y[-1]) - (h[n] + q * h[n - 1]) * eps)
    want = alpha[:, None] * np.stack(y)
    sampler = jd.sampler(
        jd.Denoiser(path, net), (8,), solver=BELM(), ts=ts, denoise=denoise, trajectory=True
    )
    out = sampler(None, init=want[0])
    assert np.isfinite(want).all() and len(want) == STEPS + 1
    np.testing.assert_allclose(out.aux["trajectory"], want, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(out.x, out.aux["trajectory"][-1])


def sigma_start(name):
    return scales(name)[0, 1] * np.random.default_rng(6).standard_normal(8)


@each({"symmetric": Symmetric(), "McCallumFoster": McCallumFoster(solvers.Heun())}, "solver")
@each({name: name for name in CLEAN}, "name")
def test_without_a_finite_step_the_end_is_the_posterior_mean(name, solver):
    path, ts, denoise = CLEAN[name]
    sampler = sampler_of(path, solver, ts, denoise=denoise, trajectory=True)
    out = sampler(None, init=sigma_start(name))
    path_of_x = out.aux["trajectory"]
    m = modes(path)(ts[-1] if denoise else ts[-2], path_of_x[-2])
    np.testing.assert_allclose(out.x, m, rtol=1e-13)  # alpha = 1
    with pytest.raises(ValueError, match="the last step to sigma = 0 forgets the state"):
        sampler.invert(out.x)


# --- Adjoint. ---


def loss(args, solver, n, adjoint):
    net, x, cond = args
    kwargs = dict(solver=solver, ts=VP.grid(n, "logsnr"), adjoint=adjoint)
    sampler = jd.sampler(jd.Denoiser(VP, net), x.shape, **kwargs)
    return jnp.sum(jnp.sin(sampler(None, cond, x).x))


def agree(found, expected, tolerance):
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.max(np.abs(b)))


@pytest.mark.optimised
def test_the_adjoint_of_a_thousand_steps():
    """Equal to the plain gradient in init, parameters and cond, in the memory of ten steps."""
    x, cond = map(jnp.asarray, np.random.default_rng(7).standard_normal((2, 8)))
    args, solver, adjoint = (modes(VP).net, x, cond), Symmetric(), ReversibleAdjoint()
    cases = [(solver, 10, adjoint), (solver, 1000, adjoint), (solver, 1000, None)]
    cases += [(Symmetric(bits=24), 1000, None)]
    grad = eqx.filter_jit(eqx.filter_grad(loss))
    programs = [grad.lower(args, *case).compile() for case in cases]
    memory = [p.compiled.memory_analysis().temp_size_in_bytes for p in programs]
    assert memory[1] <= memory[0] < memory[2] / 20, memory
    _, found, expected, rounded = (p(args, *case) for p, case in zip(programs, cases, strict=True))
    assert len(jax.tree.leaves(found)) == 4
    agree(found, expected, 1e-10)
    agree(rounded, expected, 1e-4)  # the slope of the solver that does not round


def test_the_adjoint_reaches_the_grid_and_the_solver():
    def mean(values, adjoint):
        gamma, ts, x = values
        sampler = sampler_of(VP, BDIA(gamma), ts, adjoint=adjoint)
        return jnp.mean(jd.sample(None, sampler, num=2, init=x).x ** 2)

    values = jnp.asarray(0.9), jnp.linspace(0.9, 0.1, 6), jnp.linspace(-2.0, 2.0, 16).reshape(2, 8)
    agree(*(jax.jit(jax.grad(mean))(values, a) for a in (ReversibleAdjoint(), None)), 1e-10)


# --- Editing. ---


def test_editing():
    """With the source as target nothing changes; with another, the sample follows it."""
    x, source, target = (jnp.full(8, c) for c in (1.1, 0.0, 1.0))
    sampler = sampler_of(VP, Symmetric(), VP.grid(50, "logsnr"))
    same = edit(sampler, x, source=source, target=source)
    np.testing.assert_allclose(same.x, x, rtol=1e-13)
    assert int(same.nfe) == 40 + 39  # 39 steps and the first guess there, 39 steps back
    moved = edit(sampler, x, source=source, target=target).x
    np.testing.assert_allclose(moved - x, 1, atol=0.2)


def test_interpolation():
    x, y = np.random.default_rng(8).standard_normal((2, 3, 4))
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    w = np.linspace(0.0, 1.0, 5)
    path = np.asarray(jax.jit(jax.vmap(interpolate, (None, None, 0)))(x, y, w)).reshape(5, 12)
    np.testing.assert_allclose(path[[0, -1]], [x.ravel(), y.ravel()], atol=1e-14)
    expected = np.cos(np.arccos(np.sum(x * y)) * (w[:, None] - w[None]))
    np.testing.assert_allclose(path @ path.T, expected, atol=1e-14)  # equal angles in one plane
    slope = jax.jit(jax.grad(lambda y: interpolate(x, y, 0.3).sum()))(x)  # at y = x, no angle
    np.testing.assert_allclose(slope, 0.3, rtol=1e-14)


# --- Refusals. ---

TS, X = VP.grid(4, "logsnr"), np.ones(8)


def draw(solver, ts=TS, init=X, **options):
    return sampler_of(VP, solver, ts, **options)(None, init=init)


def pull(x=X, solver=Symmetric(), path=VP, ts=TS, denoise=False, **options):  # noqa: B008
    return sampler_of(path, solver, ts, denoise=denoise).invert(x, **options)


PULLED = functools.cache(pull)
FLOW = functools.partial(pull, path=jd.process.Rectified(), ts=[0.9, 0.5, 0.0])
MEMBER = functools.cache(lambda: dataclasses.replace(PULLED(), method=kind(BELM())))
BARE = functools.cache(lambda: jd.Samples(PULLED().x, PULLED().result, PULLED().nfe, {}))
SLOPE = jax.grad(lambda x: pull(x, solver=Symmetric(20)).x.sum())
FORGETS = "invert: ts[-1] must be a time with sigma > 0: the last step to sigma = 0 forgets"
REFUSED = [
    (lambda: BELM("k=3"), "BELM: q must be 'optimal' or a number of at least 0, got 'k=3'"),
    (lambda: BELM(-1.0), "BELM: q must be a number of at least 0, got -1.0"),
    (lambda: BDIA(-0.1), "BDIA: gamma must be a number of at least 0, got -0.1"),
    (lambda: EDICT(0.0), "EDICT: p must be a finite number in [2.22507e-308, 1], got 0.0"),
    (lambda: Symmetric(31), "SymmetricLeapfrog: bits must be at most 30, got 31"),
    (lambda: McCallumFoster(solvers.HeavyBall(DDIM())), "base must be a deterministic single-step"),
    (lambda: pull(solver=DDIM()), "invert: sampler must be one with a reversible solver, as Symm"),
    (lambda: pull(solver=BELM(0.0)), "got BELM(q=0.0), which is DDIM"),
    (lambda: pull(freeze=0.8), "so small that more than 1 of the 4 steps of ts are left"),
    (lambda: FLOW(), FORGETS),
    (lambda: FLOW(solver=McCallumFoster(DDIM())), FORGETS),
    (lambda: pull(denoise=True), FORGETS),
    (
        lambda: pull(BARE()),
        "invert: x must be an array, or a result of a sampler with a reversible",
    ),
    (lambda: draw(BELM(), init=PULLED()), "the one that `init` was inverted by, with the"),
    (lambda: draw(BELM(0.5), init=MEMBER()), "the one that `init` was inverted by"),
    (lambda: draw(Symmetric(), VP.grid(5), PULLED()), "the 5 nodes that `init` was inv"),
    (lambda: draw(DDIM(), adjoint=ReversibleAdjoint()), "a reversible one for ReversibleAdjoint"),
    (
        lambda: draw(Symmetric(), adjoint=ReversibleAdjoint(), engine="diffrax"),
        "engine must be left",
    ),
    (lambda: interpolate(X, X[:2], 0.5), "interpolate: y must be of the shape of x, (8,), got"),
    (
        lambda: SLOPE(X),
        "bits must be None, or the derivative that of a sampler in the scan engine",
    ),
]


@pytest.mark.parametrize("wrong, message", REFUSED)
def test_refusals(wrong, message, as_users_see_it):
    with pytest.raises(ValueError) as caught:
        wrong()
    assert message in str(caught.value), caught.value
