"""The Jacobian of the flow against autodiff of the solver, its invariances, the published test."""

import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PROCESSES

import jaxdiff as jd
from jaxdiff import exact
from jaxdiff.flow_map import (
    AFFINE,
    NON_AFFINE,
    asymmetry,
    ddim_jacobian,
    flow_jacobian,
    transport_test,
)

D = 3
RNG = np.random.default_rng(1)
FACTORS = RNG.normal(size=(3, D, D)) / 2
COVS = FACTORS @ FACTORS.swapaxes(1, 2) + 0.02 * np.eye(D)
MEANS = RNG.normal(size=(3, D))
WEIGHTS = RNG.uniform(0.3, 1.0, 3)
W = RNG.normal(size=(2, D, D)) / D**0.5
X = RNG.normal(size=D)
COS, SIN = np.cos(0.7), np.sin(0.7)
ROTATED = np.asarray(AFFINE) @ np.array([[COS, SIN], [-SIN, COS]])
TIGHT = dfx.PIDController(rtol=1e-11, atol=1e-11)
tight_flow = functools.partial(flow_jacobian, solver=dfx.Dopri8(), controller=TIGHT)


def ends(path, high, low):
    """Times at which sigma/alpha is `high` and `low`."""
    return np.array([float(path.t_of_lam(-np.log(s))) for s in (high, low)])


def denoisers(path):
    net = lambda t, x, cond: W[0] @ jnp.tanh(W[1] @ x + t)  # noqa: E731
    return {
        "mixture": exact.mixture(path, WEIGHTS, MEANS, COVS),
        "atoms": exact.empirical(path, MEANS),
        "network": jd.Denoiser(path, net, "eps"),
    }


def relative(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("kind", ["atoms", pytest.param("network", marks=pytest.mark.slow)])
def test_the_matrix_equation_is_the_derivative_of_the_solve(kind):
    path = PROCESSES["VP"]
    denoiser = denoisers(path)[kind]
    ts = ends(path, 20, 0.1)
    flow = tight_flow(denoiser, X, ts=ts)

    options = dict(controller=TIGHT, adjoint=dfx.ForwardMode())
    sampler = jd.sampler(denoiser, (D,), solver=dfx.Dopri8(), ts=ts, **options)

    def end(x):
        return sampler(None, init=x).x

    x, jacobian = end(jnp.asarray(X)), jax.jit(jax.jacfwd(end))(jnp.asarray(X))
    assert flow.result == dfx.RESULTS.successful
    assert relative(flow.x, x) < 1e-9
    assert relative(flow.jacobian, jacobian) < 1e-9
    assert np.linalg.det(flow.jacobian) > 0  # the flow is a homeomorphism


@pytest.mark.parametrize(
    "names",
    [["EDM"], pytest.param(["SubVP", "VE", "Rectified"], marks=pytest.mark.slow)],
    ids=len,
)
def test_one_flow_whatever_the_schedule(names):
    found = {}
    for name in ("VP", *names):
        path = PROCESSES[name]
        ts = ends(path, 40, 0.05)
        alpha = np.array([path.alpha(t) for t in ts])
        denoiser = exact.empirical(path, MEANS)
        flow = tight_flow(denoiser, alpha[0] * 40 * X, ts=ts)
        found[name] = flow.x / alpha[1], flow.jacobian * alpha[0] / alpha[1]
    for name in names:
        assert relative(found[name][0], found["VP"][0]) < 1e-8, name
        assert relative(found[name][1], found["VP"][1]) < 1e-8, name


@pytest.mark.parametrize(
    "name, kind", [("VP", "mixture"), ("EDM", "network"), ("Rectified", "mixture")]
)
def test_the_discrete_rule_is_the_derivative_of_ddim(name, kind):
    path = PROCESSES[name]
    denoiser = denoisers(path)[kind]
    ts = np.append(path.grid(7, t_start=ends(path, 30, 1)[0]), 0.0 if name == "Rectified" else [])
    ts = np.unique(ts)[::-1]

    sampler = jd.sampler(denoiser, (D,), solver=jd.solvers.DDIM(), ts=ts)

    def end(x):
        return sampler(None, init=x).x

    start = float(path.sigma(ts[0])) * X
    flow = ddim_jacobian(denoiser, start, ts=ts)
    np.testing.assert_allclose(flow.x, end(start), rtol=1e-10)
    assert relative(flow.jacobian, jax.jacrev(end)(jnp.asarray(start))) < 1e-10


@pytest.mark.slow
def test_fixed_steps_have_the_order_of_the_solver():
    path = PROCESSES["VP"]
    denoiser, (start, end) = exact.empirical(path, MEANS), ends(path, 20, 0.1)
    truth = tight_flow(denoiser, X, ts=[start, end]).jacobian
    coarse, fine = (
        relative(
            flow_jacobian(
                denoiser, X, ts=path.grid(n, "logsnr", t_start=start, t_end=end)
            ).jacobian,
            truth,
        )
        for n in (40, 80)
    )
    assert np.log2(coarse / fine) > 4.8 and fine < 1e-5


def test_atoms_off_a_line_are_not_transported_optimally_and_those_on_it_are():
    path = PROCESSES["VE"]
    nodes = np.geomspace(40, 0.05, 41)
    ts = np.array([float(path.t_of_lam(-np.log(s))) for s in nodes])
    off, on, axis = (  # of the same shapes: compiled once
        transport_test(jax.random.key(0), exact.empirical(path, data), (2,), num=20, ts=ts)
        for data in (NON_AFFINE, ROTATED, AFFINE)
    )
    assert abs(off.off_diagonal.mean - 0.237) < 4 * off.off_diagonal.error
    assert off.off_diagonal.mean > 3 * off.off_diagonal.error and off.full.largest > 0.03
    assert on.off_diagonal.largest < 1e-10 and on.full.largest < 1e-10
    assert np.max(np.abs(on.flow.jacobian[:, 0, 1])) > 1e-3  # there is something to compare
    assert axis.off_diagonal.largest == 0 and axis.full.largest == 0  # and here there is not


@pytest.mark.slow
def test_asymmetry_of_the_flow_over_200_draws():
    path = PROCESSES["VE"]
    run = functools.partial(transport_test, jax.random.key(0), num=200, ts=ends(path, 40, 0.05))
    out = run(exact.empirical(path, NON_AFFINE), (2,), jacobian=tight_flow)
    assert abs(out.off_diagonal.mean - 0.237) < 4 * out.off_diagonal.error
    assert abs(out.full.mean - 0.0311) < 4 * out.full.error
    assert out.off_diagonal.largest > 0.9
    assert np.all(np.linalg.det(out.flow.jacobian) > 0)
    gaussian = exact.gaussian(path, [0.3, -0.2], [[0.5, 0.2], [0.2, 0.3]])
    for control in (exact.empirical(path, ROTATED), gaussian):
        out = run(control, (2,), jacobian=tight_flow)
        assert out.off_diagonal.largest < 1e-10 and out.full.largest < 1e-10


BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2


class SubVPBranch(jd.process.Discrete):
    """The script's "sub-VP": alpha, sigma and f of VP, g^2 discounted with the betas swapped."""

    def g2(self, t):
        u, noisy, clean = jnp.asarray(t) / 1000, 1000 * BETAS[-1], 1000 * BETAS[0]
        return super().g2(t) * -jnp.expm1(-2 * noisy * u - (clean - noisy) * u**2)


class Root(jd.process.AbstractProcess):
    """The script's "VE": alpha = 1, sigma^2 = t."""

    t_min: float = 0.0
    t_max: float = 1.0

    def log_alpha(self, t):
        return jnp.zeros_like(jnp.asarray(t, float))

    def log_sigma(self, t):
        return 0.5 * jnp.log(t)


SCRIPT = {  # the process, indices of the script per unit of its time, mean by (steps, sign)
    "VP": (
        jd.process.Discrete(BETAS),
        1,
        {(20, -1): 0.110, (20, 1): 0.190, (200, 1): 0.252, (1000, 1): 0.239},
    ),
    "sub-VP": (
        SubVPBranch(BETAS),
        1,
        {(20, -1): 0.092, (20, 1): 0.140, (200, 1): 0.165, (1000, 1): 0.159},
    ),
    "VE": (
        Root(),
        1000,
        {(20, -1): 0.119, (20, 1): 0.184, (200, 1): 0.257, (1000, 1): 0.244},
    ),
    "EDM": (jd.process.EDM(sigma_min=0.0, sigma_max=1.0), 1000, {(20, -1): 0.258}),
}


def script(name, steps, sign, data=NON_AFFINE, cut=None):
    """The published test on its own grid: `steps` nodes, so that it stops before alpha = 1."""
    path, scale, _ = SCRIPT[name]
    denoiser, ts = exact.empirical(path, data), np.round(np.linspace(999, 0, steps)) / scale
    rule = functools.partial(ddim_jacobian, rule="euler", sign=sign)
    key = jax.random.key(1)
    return transport_test(key, denoiser, (2,), num=200, ts=ts[:cut], jacobian=rule)


@pytest.mark.parametrize(
    "name, steps, sign",
    [
        pytest.param(name, *column, marks=[pytest.mark.slow] if column[0] == 1000 else [])
        for name, (_, _, table) in SCRIPT.items()
        for column in table
    ],
)
def test_the_values_of_the_published_script(name, steps, sign):
    table = SCRIPT[name][2]
    out = script(name, steps, sign).off_diagonal
    # the table averages 200 draws too, of its own, and is rounded to three digits
    bound = 4 * 2**0.5 * out.error + 5e-4
    assert abs(out.mean - table[steps, sign]) < bound
    if (steps, -sign) in table:  # and the signs are told apart
        assert abs(out.mean - table[steps, -sign]) > bound
    if steps == 20:
        assert script(name, steps, sign, AFFINE).off_diagonal.largest == 0


def test_a_step_of_the_script_onto_clean_data_leaves_round_off():
    r"""With sigma = t Euler's last step is A <- R A, and R = sum_{i<j} w_i w_j v v^T / sigma^2."""
    before, out = script("EDM", 20, 1, cut=-1).flow, script("EDM", 20, 1).flow
    sigma, Y = np.round(np.linspace(999, 0, 20))[-2] / 1000, np.asarray(NON_AFFINE)
    away = np.asarray(before.x)[:, None] - Y
    w = np.exp(-np.sum(away**2, axis=2) / (2 * sigma**2))
    w /= np.sum(w, axis=1, keepdims=True)
    R = sum(
        w[:, i, None, None] * w[:, j, None, None] * np.outer(Y[i] - Y[j], Y[i] - Y[j])
        for i, j in ((0, 1), (0, 2), (1, 2))
    )
    want = R / sigma**2 @ np.asarray(before.jacobian)
    np.testing.assert_allclose(out.jacobian, want, rtol=0, atol=1e-12 * np.max(np.abs(want)))
    # of most draws nothing is left but the rounding of 1 - 1, whose index has no meaning
    assert np.median(np.max(np.abs(want), axis=(1, 2))) < 1e-15
    assert np.max(np.abs(script("EDM", 200, 1).flow.jacobian)) < 1e-15


def test_the_published_sign_repels_where_the_flow_contracts():
    path = PROCESSES["VP"]
    denoiser = exact.empirical(path, np.zeros((1, 2)))
    ts = path.grid(2000, "logsnr", t_end=0.1)
    ratio = float(path.sigma(ts[-1]) / path.sigma(ts[0]))
    run = functools.partial(ddim_jacobian, denoiser, np.ones(2), ts=ts, rule="euler")
    np.testing.assert_allclose(run().jacobian, ratio * np.eye(2), rtol=0.02)
    assert run(sign=-1).jacobian[0, 0] > 1


def test_asymmetry_between_nothing_and_the_root_of_two():
    A = jnp.asarray(RNG.normal(size=(4, 4)))
    off = A - jnp.diag(jnp.diag(A))
    skew = np.linalg.norm(A - A.T) / 2**0.5
    np.testing.assert_allclose(asymmetry(A), skew / np.linalg.norm(off), rtol=1e-12)
    whole = asymmetry(A, diagonal=True)
    np.testing.assert_allclose(whole, skew / np.linalg.norm(A), rtol=1e-12)
    np.testing.assert_allclose(asymmetry(off - off.T + jnp.eye(4)), 2**0.5, rtol=1e-12)
    assert asymmetry(A + A.T) == 0 and asymmetry(jnp.diag(jnp.diag(A))) == 0
    assert asymmetry(jnp.zeros((4, 4)), diagonal=True) == 0
    np.testing.assert_allclose(asymmetry(1e200 * A), asymmetry(A), rtol=1e-12)
    for B in (A, A + A.T, jnp.eye(4), jnp.zeros((4, 4))):
        for diagonal in (False, True):
            gradient = jax.grad(functools.partial(asymmetry, diagonal=diagonal))(B)
            assert np.all(np.isfinite(gradient))
            assert abs(jnp.vdot(gradient, B)) < 1e-12  # the index has no scale
    step = 1e-6 * jnp.asarray(RNG.normal(size=(4, 4)))
    difference = (asymmetry(A + step) - asymmetry(A - step)) / 2
    np.testing.assert_allclose(jnp.vdot(jax.grad(asymmetry)(A), step), difference, rtol=1e-6)


def test_draws_are_named_by_the_key_and_their_index():
    path = PROCESSES["VP"]
    denoiser, ts = exact.empirical(path, NON_AFFINE), path.grid(10)
    small, large = (
        transport_test(jax.random.key(3), denoiser, (2,), num=n, ts=ts, jacobian=ddim_jacobian)
        for n in (3, 5)
    )
    np.testing.assert_allclose(small.flow.jacobian, large.flow.jacobian[:3], rtol=1e-12)
    ddim = jd.sampler(denoiser, (2,), solver=jd.solvers.DDIM(), ts=ts)
    samples = jd.sample(jax.random.key(3), ddim, num=5)
    np.testing.assert_allclose(large.flow.x, samples.x, rtol=1e-10, atol=1e-12)
    A = np.asarray(large.flow.jacobian)
    skew, side = np.abs(A[:, 0, 1] - A[:, 1, 0]), np.hypot(A[:, 0, 1], A[:, 1, 0])
    index = skew / side  # in the plane
    np.testing.assert_allclose(large.off_diagonal.mean, np.mean(index), rtol=1e-12)
    np.testing.assert_allclose(large.off_diagonal.error, np.std(index, ddof=1) / 5**0.5, rtol=1e-12)


def image_case():
    """A network on (3, 2) images whose columns do not meet."""
    path = PROCESSES["VP"]
    net = lambda t, x, cond: cond * jnp.tanh(W[0] @ x + t)  # noqa: E731
    x = jnp.asarray(np.random.default_rng(2).normal(size=(D, 2)))
    return jd.Denoiser(path, net, "eps"), x, dict(ts=path.grid(8, "logsnr"), cond=jnp.asarray(0.7))


def test_images_and_conditions():
    image, x, options = image_case()
    flow = ddim_jacobian(image, x, **options)
    assert flow.x.shape == (D, 2) and flow.jacobian.shape == (2 * D, 2 * D)
    blocks = flow.jacobian.reshape(D, 2, D, 2)
    assert np.all(blocks[:, 0, :, 1] == 0)
    column = ddim_jacobian(image, x[:, 0], **options)
    np.testing.assert_allclose(column.jacobian, blocks[:, 0, :, 0], rtol=1e-10)
    np.testing.assert_allclose(column.x, flow.x[:, 0], rtol=1e-10)


@pytest.mark.parametrize(
    "run", [pytest.param(flow_jacobian, marks=pytest.mark.slow), ddim_jacobian]
)
def test_jit_vmap_and_gradients(run):
    image, x, options = image_case()
    v = jnp.asarray(RNG.normal(size=x.shape))

    @eqx.filter_jit
    def loss(image, x):
        flow = run(image, x, **options)
        return asymmetry(flow.jacobian) + jnp.sum(flow.x**2), flow.jacobian

    alone = run(image, x, **options).jacobian
    moved = jnp.stack([x, x + 1e-5 * v, x - 1e-5 * v])
    values, batched = jax.vmap(loss, in_axes=(None, 0))(image, moved)
    np.testing.assert_allclose(batched[0], alone, rtol=1e-10, atol=1e-14)
    gradient = jax.grad(lambda x: loss(image, x)[0])(x)
    slope = (values[1] - values[2]) / 2e-5
    np.testing.assert_allclose(jnp.vdot(gradient, v), slope, rtol=1e-6)


def test_differences_of_the_network_do_as_well():
    image, x, options = image_case()
    by_jvp, by_fd = (ddim_jacobian(image, x, method=m, **options).jacobian for m in ("jvp", "fd"))
    assert 0 < relative(by_fd, by_jvp) < 1e-7


def test_float32(defaults):
    path = PROCESSES["VP"]
    denoiser, ts = (
        exact.empirical(path, MEANS),
        path.grid(60, "logsnr", t_end=ends(path, 20, 0.3)[1]),
    )
    low = flow_jacobian(denoiser, jnp.asarray(X), ts=ts)
    assert low.x.dtype == low.jacobian.dtype == jnp.float32
    jax.config.update("jax_enable_x64", True)
    wide = flow_jacobian(exact.empirical(path, MEANS), X, ts=ts)
    assert wide.jacobian.dtype == jnp.float64
    assert relative(low.x, wide.x) < 1e-5 and relative(low.jacobian, wide.jacobian) < 1e-4


def test_a_failed_solve_is_nan_with_a_reason_and_does_not_raise():
    path = PROCESSES["VP"]
    denoiser = exact.empirical(path, NON_AFFINE)
    flow = tight_flow(denoiser, np.ones(2), ts=path.grid(2), max_steps=3)
    assert flow.result == dfx.RESULTS.max_steps_reached
    assert np.all(np.isnan(flow.x)) and np.all(np.isnan(flow.jacobian))
    broken = jd.Denoiser(path, lambda t, x, cond: x / jnp.zeros(()), "eps")
    options = dict(num=2, ts=path.grid(3), jacobian=ddim_jacobian)
    out = transport_test(jax.random.key(0), broken, (2,), **options)
    assert np.all(out.flow.result == dfx.RESULTS.nonfinite)
    assert np.all(np.isnan(out.flow.jacobian)) and np.isnan(out.off_diagonal.mean)


def test_errors_name_what_was_given(as_users_see_it):
    path = PROCESSES["VP"]
    denoiser, x = exact.empirical(path, NON_AFFINE), jnp.ones(2)
    flat, ts, key = exact.empirical(PROCESSES["Rectified"], NON_AFFINE), path.grid(3), None
    network = jd.Denoiser(path, lambda t, x, cond: x, "eps")
    for call, said in [
        (lambda: flow_jacobian(lambda t, x: x, x, ts=ts), "denoiser must be a jaxdiff denoiser"),
        (lambda: flow_jacobian(denoiser, x, ts=ts[::-1]), "flow_jacobian: ts must be strictly"),
        (lambda: flow_jacobian(flat, x, ts=[0.9, 0.0]), r"ts\[-1\] must be a time of finite"),
        (lambda: flow_jacobian(flat, x, ts=[1.0, 0.1]), r"ts\[0\] must be a time of finite"),
        (lambda: ddim_jacobian(flat, x, ts=[1.0, 0.1]), r"ts\[0\] must be .*, got 1.0"),
        (lambda: flow_jacobian(denoiser, x, ts=ts, solver="Tsit5"), "solver must be .*'Tsit5'"),
        (lambda: flow_jacobian(denoiser, x, ts=ts, controller=0.1), "controller must be .*got 0.1"),
        (lambda: flow_jacobian(denoiser, x, ts=ts, max_steps=0), "max_steps must be .*got 0"),
        (lambda: flow_jacobian(network, x, ts=ts, method="exact"), "method must be .*got 'exact'"),
        (lambda: ddim_jacobian(denoiser, x, ts=ts, rule="heun"), "rule must be .*got 'heun'"),
        (lambda: ddim_jacobian(denoiser, x, ts=ts, sign=-1), "sign must be one of 1, got -1"),
        (lambda: asymmetry(jnp.ones((2, 3))), r"of shape \(d, d\), got \(2, 3\)"),
        (lambda: transport_test(key, denoiser, (2,), num=4, ts=ts), "transport_test: key must be"),
        (
            lambda: transport_test(jax.random.key(0), denoiser, (2,), num=1, ts=ts),
            "num must be a whole number of at least 2, got 1",
        ),
        (
            lambda: transport_test(jax.random.key(0), denoiser, 2, num=4, ts=ts),
            "shape must be a tuple",
        ),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
