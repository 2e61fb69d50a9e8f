"""Heavy balls: weights, identities, orders, intervals of stability."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxdiff as jd
from jaxdiff import exact
from jaxdiff.process import EDM, Rectified
from jaxdiff.score import Denoiser
from jaxdiff.solvers import DDIM, DEIS, PNDM, DPMpp2M, EulerMaruyama, WarmStart, pf_ode
from jaxdiff.solvers.momentum import GHVB, HeavyBall, adams_moments

PATH = EDM(0.05, 20.0)
MEANS = np.array([[1, 0.5], [-1, 0.2], [0.2, -1.1]])
LAW = exact.mixture(PATH, [0.4, 0.35, 0.25], MEANS, np.array([0.35, 0.25, 0.45]) ** 2)


def test_moments_are_those_of_adams_bashforth():
    np.testing.assert_allclose(adams_moments(5), [1, 1 / 2, 5 / 12, 3 / 8, 251 / 720], rtol=1e-14)


def test_weights_of_ghvb_are_the_published_ones():
    """From the expanded formulas of r = 2, 3, 4, which the first steps of r = 4 go through."""
    b, ts = 0.7, np.linspace(2.0, 0.5, 8)
    published = [
        np.ones(1),
        np.array([2 + b, -(2 - b)]) / (2 * b),
        np.array([18 + 5 * b, -(24 - 8 * b), 6 - b]) / (12 * b),
        *[np.array([46 + 9 * b, -(78 - 19 * b), 42 - 5 * b, -(10 - b)]) / (24 * b)] * 4,
    ]
    rows, keep = GHVB(4, b).tabulate(PATH, ts).rows
    np.testing.assert_allclose(keep, [0, *[1 - b] * 6], rtol=1e-14)
    # x1 = x0 + (s1 - s0) sum_j w_j v_j, where v_0 = eps + keep (v_-1 - eps)
    for got, w, kept in zip(rows.weights / np.diff(ts)[:, None], published, keep, strict=True):
        expected = np.append(w[1:], np.zeros(4 - len(w)))
        expected[0] += kept * w[0]
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)
    plain, (rows, _) = PNDM(4).tabulate(PATH, ts).rows, GHVB(4, 1.0).tabulate(PATH, ts).rows
    np.testing.assert_allclose(rows.weights, plain.weights, rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(rows.gain, plain.gain)


def test_a_heavy_ball_averages_the_bracket_of_2m():
    """Against the recursion written out; without averaging, the solver itself."""
    ts, init = np.geomspace(20.0, 0.05, 7), np.array([11.0, -23.0])
    end = lambda solver: jd.sampler(LAW, (2,), solver=solver, ts=ts)(None, init=init).x  # noqa: E731
    mean = jax.jit(lambda t, x: LAW(t, x))
    for beta in (1.0, 0.6):
        x, v, last = init, None, None
        for i in range(6):
            m, ratio = np.asarray(mean(ts[i], x)), ts[i + 1] / ts[i]
            bracket = m
            if i:
                gaps = np.log(ts[i] / ts[i + 1]) / np.log(ts[i - 1] / ts[i])
                bracket = m + gaps / 2 * (m - last)
            v = bracket if v is None else (1 - beta) * v + beta * bracket
            x, last = ratio * x + (1 - ratio) * v, m
        np.testing.assert_allclose(end(HeavyBall(DPMpp2M(), beta)), x, rtol=1e-12)
        if beta == 1:
            np.testing.assert_allclose(end(DPMpp2M()), x, rtol=1e-12)


def test_one_atom_is_exact_from_pure_noise_to_clean_data():
    """Where the output is constant, so is its average; the two infinite ends included."""
    path, atom, init = Rectified(), np.array([0.7, -1.3]), np.array([0.4, 0.9])
    denoiser = exact.gaussian(path, atom, 0.0)
    for solver in (HeavyBall(PNDM(3)), GHVB(3)):
        run = jd.sampler(denoiser, (2,), solver=solver, ts=np.linspace(1, 0, 5))
        end = run(None, init=init).x
        np.testing.assert_allclose(end, atom, atol=1e-13)


@eqx.filter_jit
def ends(solver, nodes, n, start):
    """Solve over the first n intervals of padded nodes: one program serves every n."""
    terms = pf_ode(LAW, "t")

    def one(x):
        def body(i, carry):
            x, _, _, state, _ = solver.step(
                terms, nodes[i], nodes[i + 1], carry[0], None, carry[1], False
            )
            return x, state

        return jax.lax.fori_loop(0, n, body, (x, solver.init(terms, nodes[0], nodes[1], x, None)))[
            0
        ]

    return jax.vmap(one)(start)


def test_orders():
    """1, and on a grid uniform in sigma/alpha r, in log-SNR 2 at most."""
    start, fine = 2 * np.random.default_rng(0).standard_normal((32, 2)), 512

    def slope(solver, space, sizes=(64, 128, 256)):
        at = lambda n: jnp.asarray(np.append(space(2.0, 0.2, n + 1), np.full(fine - n, 0.2)))  # noqa: E731
        run = lambda n: ends(solver, at(n), jnp.asarray(n), jnp.asarray(start))  # noqa: E731
        errors = [float(jnp.sqrt(jnp.mean((run(n) - truth) ** 2))) for n in sizes]
        return -np.polyfit(np.log(sizes), np.log(errors), 1)[0]

    nodes = jnp.asarray(np.geomspace(2.0, 0.2, fine + 1))
    solver = jd.solvers.RungeKutta("rk4")
    truth = ends(solver, nodes, jnp.asarray(fine), jnp.asarray(start))
    assert abs(slope(HeavyBall(DPMpp2M()), np.geomspace) - 1) < 0.1
    assert abs(slope(GHVB(1), np.linspace) - 1) < 0.1
    assert abs(slope(GHVB(2), np.linspace) - 2) < 0.1
    third = GHVB(3)
    assert slope(third, np.linspace) > 2.8
    assert abs(slope(third, np.geomspace) - 2) < 0.2


class Linear(eqx.Module):
    """A network for which the PF-ODE is y' = mu y in sigma."""

    mu: jax.Array

    def __call__(self, t, x, cond=None):
        return self.mu * x


STABLE = {
    "HeavyBall(DDIM)": (lambda b: HeavyBall(DEIS(1), b), lambda b: 2 * (2 - b) / b),
    "HeavyBall(AB2)": (lambda b: HeavyBall(PNDM(2), b), lambda b: (2 - b) / b),
    "GHVB(1)": (lambda b: GHVB(1, b), lambda b: 2 * (2 - b) / b),
    "GHVB(2)": (lambda b: GHVB(2, b), lambda b: 2 - b),
}


@pytest.mark.parametrize("name", STABLE)
def test_intervals_of_stability(name):
    """Two hundred unit steps just inside decay, just outside grow."""
    make, limit = STABLE[name]
    ts, beta = np.arange(201.0, 0.0, -1.0), np.array([0.5, 0.8, 1.0])

    @jax.jit
    @jax.vmap
    def growth(beta, mu):
        denoiser = Denoiser(EDM(0.5, 300.0), Linear(mu), "eps")
        return jd.sampler(denoiser, (), solver=make(beta), ts=ts)(None, init=jnp.ones(())).x

    inside, outside = (np.abs(growth(beta, c * limit(beta))) for c in (0.95, 1.05))
    assert (inside < 1e-4).all() and (outside > 1e4).all(), (inside, outside)


@pytest.mark.usefixtures("as_users_see_it")
def test_wrong_arguments():
    for make, message in (
        (lambda: GHVB(5), "r must be one of 1, 2, 3, 4, got 5"),
        (lambda: GHVB(2, 0.0), "beta must be a finite number"),
        (lambda: HeavyBall(DPMpp2M(), 1.5), "got 1.5"),
        (lambda: HeavyBall(EulerMaruyama("u")), "solver must be a deterministic"),
        (lambda: HeavyBall(jd.solvers.RungeKutta("euler", "t")), "solver must be a deterministic"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    assert HeavyBall(DPMpp2M()).cost(7) == 7


@pytest.mark.usefixtures("as_users_see_it")
def test_a_starter_that_carries_something_is_refused():
    """The first steps of `WarmStart` keep the state of the other solver."""
    for starter in (HeavyBall(DDIM()), GHVB(1), DEIS(2)):
        with pytest.raises(ValueError, match="starter must be one that carries nothing"):
            WarmStart(DPMpp2M(), starter)
    assert WarmStart(DPMpp2M(), DDIM()).claimed_order == 2
