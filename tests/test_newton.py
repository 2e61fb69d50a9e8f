"""Newton-Langevin: the metric, its divergence, the laws that its steps leave as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import GaussianMixture

import jaxdiff as jd
from jaxdiff import exact
from jaxdiff._numerics import eigh
from jaxdiff.fisher import (
    Curvature,
    CurvatureFn,
    Eigen,
    Newton,
    RankOne,
    rank_one_divergence,
)
from jaxdiff.mcmc import newton, run, target
from jaxdiff.process import EDM
from jaxdiff.score import Denoiser

PATH = EDM(1e-3, 80.0)
DATA = GaussianMixture.isotropic([0.3, 0.7], np.array([[1, 0], [-1, 0.5]]), [0.2, 0.1])
LAW = exact.mixture(PATH, DATA.weights, DATA.means, DATA.covs)
T = 0.6
EXACT = Curvature("exact")


# --- The metric. ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["exact", "jvp", "fd"])
def test_the_curvature_is_the_fisher(method):
    """Eigenpairs against minus the Hessian of an independent log density; by Lanczos as well."""
    data = GaussianMixture.random(1, 3, 5)
    law = exact.mixture(PATH, data.weights, data.means, data.covs)
    x = np.random.default_rng(0).standard_normal(5)
    truth = np.eye(5) - T**2 * data.fisher(x, 1.0, T)
    close = dict(atol=1e-9) if method != "fd" else dict(atol=1e-6)
    for rank in (None, 5):
        eigen = jax.jit(lambda x, rank=rank: Curvature(method, rank)(law, T, x, None))(x)
        rows = np.asarray(eigen.vectors)
        np.testing.assert_allclose(rows @ rows.T, np.eye(5), atol=1e-10)
        np.testing.assert_allclose(rows.T @ np.diag(eigen.values) @ rows, truth, **close)
    least = np.linalg.eigvalsh(truth)
    top = Curvature(method, 3)(law, T, x, None).values
    assert least[0] - 1e-6 < top.min() and top.max() < least[-1] + 1e-6  # Ritz values lie within


def test_decompositions_alone_in_batches_and_differentiated():
    """As jaxlib's, whose derivative it does not use; finite where eigenvalues repeat."""
    a = np.random.default_rng(4).standard_normal((2, 3, 5, 5))
    a = jnp.asarray(a + np.swapaxes(a, -1, -2))
    values, vectors = jax.jit(jax.vmap(jax.vmap(eigh)))(a)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(a), rtol=1e-12)
    rebuilt = np.einsum("...ij,...j,...kj->...ik", vectors, values, vectors)
    np.testing.assert_allclose(rebuilt, a, atol=1e-12)

    def feature(decompose, a):
        values, vectors = decompose(a)
        return jnp.sum(jnp.sin(values) * vectors[0] ** 2)

    ours, theirs = (
        jax.grad(lambda a, f=f: feature(f, (a + a.T) / 2))(a[0, 0]) for f in (eigh, jnp.linalg.eigh)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-10)
    repeated = jax.grad(lambda c: feature(eigh, c * jnp.eye(4)))(0.7)
    np.testing.assert_allclose(repeated, np.cos(0.7), rtol=1e-12)


def test_the_curvature_of_the_nearest_atoms():
    points = np.random.default_rng(2).standard_normal((40, 6))
    law, x = exact.empirical(PATH, points), np.full(6, 0.3)
    full, near = Curvature("exact")(law, T, x, None), Curvature("neighbours", 40)(law, T, x, None)
    v = jnp.asarray(np.random.default_rng(3).standard_normal(6))
    for eigen in (full, near):
        assert eigen.vectors.shape[1:] == (6,)
    np.testing.assert_allclose(
        near.apply(near.values, jnp.zeros(()), v), full.apply(full.values, jnp.zeros(()), v),
        atol=1e-12,
    )  # fmt: skip


def metric(rule, x):
    eigen = rule.curvature(LAW, T, x, None)
    _, p = rule._scales(eigen, x.size)
    return T**2 * jax.vmap(lambda v: eigen.apply(p[:-1], p[-1], v))(jnp.eye(x.size))


POINTS = np.array([[0.1, 0.2], [1.0, 0.5], [-0.3, 0.6]])  # the first between the modes


def test_the_metric_is_the_damped_inverse():
    """As a function of the oracle's matrix; bounded in its condition number where that is asked."""
    for x in POINTS:
        a, basis = np.linalg.eigh(T**2 * DATA.fisher(x, 1.0, T))
        plain = basis @ np.diag(T**2 / np.sqrt(a**2 + 0.01)) @ basis.T
        np.testing.assert_allclose(metric(Newton(EXACT, damping=0.1), x), plain, rtol=1e-9)
        bounded = metric(Newton(EXACT, damping=1e-9, condition=1.5), x)
        values = np.linalg.eigvalsh(bounded)
        ratio = max(np.abs(a)) / min(np.abs(a))
        np.testing.assert_allclose(values[1] / values[0], min(1.5, ratio), rtol=1e-6)
        # and the step then counts relaxation times of the fastest direction
        fastest = np.max(np.abs(np.linalg.eigvals(bounded @ DATA.fisher(x, 1.0, T))))
        assert 0.8 < fastest <= 1 + 1e-9


def test_the_adapted_metric_is_bounded_where_all_curvature_vanishes():
    """Between two modes on a line, and on a law that is flat: m = x, so R = I."""
    line = exact.mixture(PATH, [1.0, 1.0], [[-1.0], [1.0]], 0.05)
    rule = Newton(EXACT, step_size=0.1, damping=0.5, condition=10.0)
    x = jnp.linspace(-1.5, 1.5, 2001)[:, None]
    eigen = jax.vmap(lambda x: rule.curvature(line, T, x, None))(x)
    a, p = jax.vmap(lambda e: rule._scales(e, 1))(eigen)
    assert np.abs(a[:, 0]).min() < 1e-2 and p[:, 0].max() < 1 / 0.5 + 1e-9
    flat = Denoiser(PATH, lambda t, x, cond=None: x)
    step = Newton(step_size=0.1, condition=10.0)(flat, T, jnp.ones(3), jnp.ones(3))
    assert np.isfinite(step).all()


def test_the_correction_is_the_divergence_of_the_metric():
    """Its mean over 40,000 normals, against autodiff through the metric, within 4 standard errors.

    In the library the sum of a step and its correction is formed; here their difference from the
    uncorrected step, which is `h` times the estimate.
    """
    rule, plain = (Newton(EXACT, step_size=0.1, damping=0.1, correct=c) for c in (True, False))
    z = jax.random.normal(jax.random.key(0), (40_000, 2))
    for x in POINTS:
        truth = np.einsum("ijj->i", jax.jacfwd(lambda x: metric(rule, x))(jnp.asarray(x)))
        both = [
            jax.jit(jax.vmap(lambda z, r=r, x=x: r(LAW, T, jnp.asarray(x), z)))(z)
            for r in (rule, plain)
        ]
        gamma = np.asarray(both[0] - both[1]) / 0.1
        error = gamma.std(axis=0) / 200
        assert (np.abs(gamma.mean(axis=0) - truth) < 4 * error + 1e-3 * np.abs(truth)).all()


def test_the_divergence_of_the_rank_one_metric():
    """Formula (5) against autodiff of P, to 1e-12."""
    delta = 0.7

    def inverse(x):
        u = LAW.eps(T, x)
        return jnp.eye(2) - jnp.outer(u, u) / (delta + u @ u)

    for x in POINTS:
        truth = np.einsum("ijj->i", jax.jacfwd(inverse)(jnp.asarray(x)))
        fisher = DATA.fisher(x, 1.0, T)
        eps = np.asarray(LAW.eps(T, jnp.asarray(x)))
        gamma = rank_one_divergence(
            jnp.asarray(eps), jnp.asarray(fisher @ eps), np.trace(fisher), T, delta
        )
        np.testing.assert_allclose(gamma, truth, rtol=1e-12, atol=1e-12)


def test_a_curvature_made_by_hand():
    """That of a Gaussian, with an eigenvector that is no axis, steps as the built-in one."""
    turn = np.array([[0.8, -0.6], [0.6, 0.8]])
    spread = np.array([0.5, 0.02])
    law = exact.gaussian(PATH, np.zeros(2), turn @ np.diag(spread) @ turn.T)

    def by_hand(denoiser, t, x, cond):
        sigma = denoiser.process.sigma(t)
        return Eigen(spread / (spread + sigma**2), jnp.asarray(turn.T))

    assert isinstance(by_hand, CurvatureFn) and isinstance(EXACT, CurvatureFn)
    x, z = jnp.array([0.7, -0.4]), jnp.array([0.3, 1.1])
    steps = [Newton(c, step_size=0.3, damping=0.2)(law, T, x, z) for c in (by_hand, EXACT)]
    # by NumPy: P = sigma^2 (a^2 + delta^2)^(-1/2), a = sigma^2 F, along the two eigenvectors
    a = T**2 / (spread + T**2)
    rate = 0.3 * a / np.hypot(a, 0.2)
    keep, noise = np.exp(-rate), np.sqrt((spread + T**2) * -np.expm1(-2 * rate))
    truth = turn @ (keep * (turn.T @ x)) + turn @ (noise * (turn.T @ z))
    for step in steps:
        np.testing.assert_allclose(step, truth, rtol=1e-9)


# --- A Gaussian, on which a step is affine and its law exact. -------------------------------------

D = 32
VARIANCES = np.logspace(0, -3, D)
GAUSS = exact.mixture(PATH, [1.0], np.zeros((1, D)), np.diag(VARIANCES)[None])
SIGMA = 0.03
TOTAL = VARIANCES + SIGMA**2


def affine(rule):
    """The matrices of a step, of the state and of its normals."""
    step = jax.jit(jax.vmap(lambda x, z: rule(GAUSS, SIGMA, x, z)))
    zero, eye = np.zeros((D, D)), np.eye(D)
    return np.asarray(step(eye, zero)).T, np.asarray(step(zero, eye)).T


def steps_to(kl, move, noise, most=20_000):
    """How many steps until the law from N(0, I) is that close in KL; `most` if it never is."""
    cov = np.eye(D)
    for n in range(1, most + 1):
        cov = move @ cov @ move.T + noise @ noise.T
        ratio = np.linalg.eigvalsh(cov / np.sqrt(TOTAL[:, None] * TOTAL[None]))
        if 0.5 * np.sum(ratio - 1 - np.log(ratio)) < kl:
            return n
    return most


def test_newton_is_ten_times_sooner_than_langevin():
    """d = 32, variances 1 to 1e-3, sigma = .03: steps to KL .1, each at the best of its sizes."""

    def ula(h):
        return np.eye(D) - h * np.diag(1 / TOTAL), np.sqrt(2 * h) * np.eye(D)

    first = min(steps_to(0.1, *ula(c * TOTAL.min())) for c in (0.03, 0.1, 0.3, 0.6, 1.0))
    for integrator in ("exponential", "euler"):
        sizes = (0.3, 0.5) if integrator == "exponential" else (0.05, 0.1)
        rules = (
            Newton(EXACT, step_size=h, damping=1e-3, correct=False, integrator=integrator)
            for h in sizes
        )
        second = min(steps_to(0.1, *affine(rule)) for rule in rules)
        assert 10 * second <= first, (integrator, first, second)


def test_the_exponential_step_has_no_bias_on_a_gaussian():
    """Whatever the size and the damping: the covariance of the target is a fixed point."""
    for size, damping in ((0.1, 0.5), (1.0, 1e-3), (30.0, 0.1)):
        move, noise = affine(Newton(EXACT, step_size=size, damping=damping))
        fixed = move @ np.diag(TOTAL) @ move.T + noise @ noise.T
        np.testing.assert_allclose(fixed, np.diag(TOTAL), rtol=1e-9, atol=1e-9 * TOTAL.min())
    move, noise = affine(Newton(EXACT, step_size=0.5, damping=0.5, integrator="euler"))
    fixed = move @ np.diag(TOTAL) @ move.T + noise @ noise.T
    assert np.max(np.diag(fixed) / TOTAL) > 1.1


# --- A mixture. ----------------------------------------------------------------------------------


def marginal(seed, n):
    data = DATA.sample(seed, n)
    return data + T * np.random.default_rng(seed + 1).standard_normal((n, 2))


def features(x):
    x0, x1 = np.asarray(x).T
    return np.stack([x0, x1, x0**2, x1**2, x0 * x1, x0**3, np.cos(2 * x0)], axis=1)


def moments():
    """Of q_t, by Gauss-Hermite nodes on its components."""
    nodes, masses = np.polynomial.hermite_e.hermegauss(40)
    grid = np.stack(np.meshgrid(nodes, nodes, indexing="ij"), axis=-1).reshape(-1, 2)
    mass = np.outer(masses, masses).reshape(-1) / np.sum(masses) ** 2
    total = 0.0
    for w, mu, cov in zip(DATA.weights, DATA.means, DATA.covs, strict=True):
        x = mu[None] + np.sqrt(cov[0, 0] + T**2) * grid
        total = total + w * mass @ features(x)
    return total


def off(x):
    """Distances of all moments from those of q_t, in standard errors."""
    values = features(x)
    return np.abs(values.mean(axis=0) - moments()) / (values.std(axis=0) / len(values) ** 0.5)


def chains(kernel, steps, n=8000, seed=0):
    keys = jax.random.split(jax.random.key(seed), n)
    one = lambda key, x: run(key, kernel, x, steps).x  # noqa: E731
    return jax.jit(jax.vmap(one))(keys, jnp.asarray(marginal(3, n)))


@pytest.mark.parametrize("size,damping", [(0.5, 0.1), (2.0, 0.02)])
def test_the_adjusted_chain_is_exact(size, damping):
    """At 4 standard errors of 8,000 chains, with steps at which the unadjusted one is far off."""
    law, rule = target(LAW, T), Newton(EXACT, step_size=size, damping=damping, correct=False)
    assert off(chains(newton(law, rule, metropolis=True), 60)).max() < 4
    assert off(chains(newton(law, rule), 60)).max() > 8


def test_the_corrected_chain_keeps_the_law():
    """Small steps: at 4 standard errors with the correction, and far off without it."""
    law = target(LAW, T)
    right, wrong = (Newton(EXACT, step_size=0.03, damping=0.5, correct=c) for c in (True, False))
    assert off(chains(newton(law, right), 150)).max() < 4
    assert off(chains(newton(law, wrong), 150)).max() > 8
    assert off(chains(newton(law, RankOne(0.05, 1.0, "exact")), 60)).max() < 4


def test_the_corrector_of_a_sampler():
    """After each step of DDIM the law moves towards q_t; by jvp as by the closed form."""
    ts, key = PATH.grid(12, "edm"), jax.random.key(0)

    def ends(solver):
        return jd.sample(key, jd.sampler(LAW, (2,), solver=solver, ts=ts), num=500).x

    def corrected(curvature):
        kernel = Newton(curvature, step_size=0.5, damping=0.5)
        return ends(jd.solvers.Between(jd.solvers.DDIM(), jd.solvers.Langevin(kernel=kernel)))

    closed, plain = corrected(EXACT), ends(jd.solvers.DDIM())
    np.testing.assert_allclose(corrected(Curvature("jvp")), closed, rtol=1e-5, atol=1e-6)
    covariance = DATA.moments()[1]
    error = lambda x: np.abs(np.cov(np.asarray(x).T) - covariance).max()  # noqa: E731
    assert np.isfinite(closed).all() and error(closed) < error(plain) + 0.1


def test_a_log_density_is_a_denoiser_at_sigma_one():
    """Adjusted chains on the density of the mixture; the acceptance is that of the exact form."""
    density = target(lambda x: DATA.log_density(x, 1.0, T))
    start, key = jnp.asarray([0.4, -0.2]), jax.random.key(5)
    rule = Newton(step_size=0.4, damping=0.1)
    # in units of F itself, where the denoiser counts in units of 1 / sigma^2
    other = Newton(step_size=0.4, damping=0.1 * T**2)
    ends = [
        run(key, newton(law, r, metropolis=True), start, 25, trajectory=True)
        for law, r in ((density, rule), (target(LAW, T), other))
    ]
    np.testing.assert_allclose(ends[0].x, ends[1].x, rtol=1e-6)
    np.testing.assert_allclose(ends[0].info.acceptance, ends[1].info.acceptance, rtol=1e-5)
    assert 0.3 < np.mean(ends[0].info.acceptance) <= 1


def test_float32_and_images():
    """One step on an image, near the same in both precisions."""
    data = np.random.default_rng(0).standard_normal((30, 2, 3, 1))
    law, x, z = exact.empirical(PATH, data), data[0] + 0.2, data[1]
    for curvature in (EXACT, Curvature("jvp"), Curvature("neighbours", 8)):
        rule = Newton(curvature, step_size=0.3, damping=0.3)
        step = jax.jit(lambda x, z, rule=rule: rule(law, T, x, z))
        wide = step(jnp.asarray(x), jnp.asarray(z))
        narrow = step(jnp.asarray(x, jnp.float32), jnp.asarray(z, jnp.float32))
        assert wide.shape == (2, 3, 1) and narrow.dtype == jnp.float32
        np.testing.assert_allclose(narrow, wide, atol=1e-4)
        half = step(jnp.asarray(x, jnp.bfloat16), jnp.asarray(z, jnp.bfloat16))
        assert half.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(half, float), wide, atol=0.05)


@pytest.mark.usefixtures("as_users_see_it")
def test_refusals():
    net = Denoiser(PATH, lambda t, x, cond=None: 0.5 * x)
    for make, message in (
        (lambda: Curvature("neighbours"), "Curvature: rank must be a whole number"),
        (lambda: Curvature("power"), "method must be one of"),
        (lambda: EXACT(net, T, np.ones(2), None), "Curvature: method must be .jvp. or .fd."),
        (lambda: Curvature("jvp", 3)(net, T, np.ones(2), None), "at most the dimension 2"),
        (lambda: Newton(damping=0.0), "Newton: damping must be a"),
        (lambda: Newton(condition=1.0), "condition must be a"),
        (lambda: Newton("exact"), "curvature must be a function of .* as fisher.Curvature"),
        (lambda: RankOne(step_size=-1.0), "RankOne: step_size must be"),
        (lambda: newton(target(net, T), metropolis=True), "target must be one with a log density"),
        (
            lambda: newton(target(LAW, T), RankOne(), metropolis=True),
            "rule must be a fisher.Newton under metropolis",
        ),
        (lambda: newton(LAW), r"newton: target must be made by target\(...\)"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
