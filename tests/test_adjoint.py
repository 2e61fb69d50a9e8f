"""Terminal gradients: against autodiff through the sampler, closed forms, and their memory."""

import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest
from helpers import DETERMINISTIC, PROCESSES, each

import jaxdiff as jd
from jaxdiff import solvers
from jaxdiff.adjoint import continuous_gradient, guide, optimise_noise, terminal_gradient
from jaxdiff.adjoint.rules import WithCov, pullback
from jaxdiff.fisher import posterior_cov
from jaxdiff.fisher.heads import ExactTrace, Hutchinson
from jaxdiff.solvers import DDIM

D = 6
RNG = np.random.default_rng(0)
MEANS, ATOMS, W = RNG.normal(size=(4, D)), RNG.normal(size=(16, D)), RNG.normal(size=D)
MIXER = RNG.normal(size=(D, D))
VP = PROCESSES["VP"]
TS = VP.grid(20)
X_T = RNG.normal(size=D)
MIX = jd.exact.mixture(VP, np.ones(4), MEANS, 0.05)
NETWORK = jd.Denoiser(VP, lambda t, x, cond: jnp.tanh(jnp.matmul(MIXER, x)))


def loss(x):
    return jnp.sum(W.reshape(x.shape) * jnp.sin(x))


def law(kind, path):
    if kind == "mixture":
        return jd.exact.mixture(path, np.ones(4), MEANS, 0.05)
    return jd.exact.empirical(path, ATOMS)


def ddim(denoiser, ts=TS, shape=(D,), **kwargs):
    return jd.sampler(denoiser, shape, **{"solver": DDIM(), **kwargs}, ts=ts)


def through_the_sampler(sampler, x, loss=loss, cond=None, key=None):
    """Value and gradient by reverse mode through a call of the sampler."""
    return jax.value_and_grad(lambda x: loss(sampler(key, cond, x).x))(jnp.asarray(x))


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def cosine(a, b):
    return np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b))


# --- The discrete adjoint. ---


@pytest.mark.parametrize(
    "name,kind,steps,ends",
    [
        ("VP", "mixture", 50, {}),
        ("EDM", "dirac", 20, {"t_end": 0.1}),
        ("Rectified", "mixture", 20, {}),  # from alpha = 0 to sigma = 0
        pytest.param("VP", "mixture", 200, {}, marks=pytest.mark.slow),
        pytest.param("VP", "dirac", 50, {}, marks=pytest.mark.slow),
        pytest.param("Rectified", "dirac", 50, {"t_end": 0.3}, marks=pytest.mark.slow),
    ],
)
def test_it_is_the_gradient_of_the_sampler(name, kind, steps, ends):
    path = PROCESSES[name]
    denoiser, ts = law(kind, path), path.grid(steps, **ends)
    x = float(path.sigma(ts[0])) * X_T
    sampler = ddim(denoiser, ts)
    value, grad = through_the_sampler(sampler, x)
    assert np.linalg.norm(grad) > 1e-8
    for cov, tolerance in (("vjp", 1e-10), ("jvp", 1e-10), ("exact", 1e-10), ("fd", 1e-5)):
        out = terminal_gradient(sampler, loss, x, cov=cov)
        np.testing.assert_allclose(out.value, value, rtol=1e-12)
        assert relative(out.grad, grad) < tolerance, cov
        assert cosine(out.grad, grad) > 0.99999
        assert int(out.sample.nfe) == steps


def test_on_a_gaussian_every_factor_is_known():
    """Each step multiplies by decay + gain alpha v / (alpha^2 v + sigma^2)."""
    v = 0.3
    sampler = ddim(jd.exact.gaussian(VP, np.zeros(D), v))
    alpha, sigma = (np.array([float(f(t)) for t in TS]) for f in (VP.alpha, VP.sigma))
    decay = sigma[1:] / sigma[:-1]
    slope = alpha * v / (alpha**2 * v + sigma**2)
    factor = np.prod(decay + (alpha[1:] - alpha[:-1] * decay) * slope[:-1])
    grad = factor * W * np.cos(factor * X_T)
    for cov in ("vjp", "jvp", "fd", "exact", "isotropic", "gated"):
        out = terminal_gradient(sampler, loss, X_T, cov=cov)
        if cov == "gated":  # its endpoint term turns the gradient a little where sigma is large
            assert 0.9 < cosine(out.grad, grad) < 1 - 1e-6
            continue
        np.testing.assert_allclose(out.grad, grad, rtol=1e-5 if cov == "fd" else 1e-11)
    out = terminal_gradient(sampler, loss, X_T, cov="none")
    np.testing.assert_allclose(out.grad, sigma[-1] / sigma[0] * W * np.cos(factor * X_T))


def test_a_network_is_not_symmetric_and_only_reverse_mode_is_its_gradient():
    sampler = ddim(NETWORK)
    value, grad = through_the_sampler(sampler, X_T)
    out = terminal_gradient(sampler, loss, X_T)
    np.testing.assert_allclose(out.value, value, rtol=1e-12)
    assert relative(out.grad, grad) < 1e-12
    forward = terminal_gradient(sampler, loss, X_T, cov="jvp")
    assert relative(forward.grad, grad) > 1e-2
    by_difference = terminal_gradient(sampler, loss, X_T, cov="fd")
    assert relative(by_difference.grad, forward.grad) < 1e-5


@pytest.mark.parametrize("denoise", [False, True])
def test_the_gradient_at_every_state(denoise):
    out = terminal_gradient(ddim(MIX, denoise=denoise), loss, X_T, trajectory=True)
    drawn = ddim(MIX, trajectory=True, denoise=denoise)(None, init=X_T)
    states = out.sample.aux["trajectory"]
    np.testing.assert_allclose(states, drawn.aux["trajectory"], rtol=1e-12)
    np.testing.assert_array_equal(out.sample.aux["ts"], drawn.aux["ts"])
    np.testing.assert_allclose(out.sample.x, drawn.x, rtol=1e-12)
    assert out.grads.shape == states.shape and int(out.sample.nfe) == int(drawn.nfe)
    np.testing.assert_array_equal(out.grads[0], out.grad)
    np.testing.assert_allclose(out.grads[-1], W * np.cos(drawn.x), rtol=1e-12)
    middle = through_the_sampler(ddim(MIX, TS[12:], denoise=denoise), states[12])[1]
    np.testing.assert_allclose(out.grads[12], middle, rtol=1e-9)


def test_a_model_of_the_users_own_sees_m_and_the_end_point():
    run = functools.partial(terminal_gradient, ddim(MIX), loss, X_T)
    known = run(cov=lambda t, x, m, y: posterior_cov(MIX, t, x))
    np.testing.assert_allclose(known.grad, run(cov="exact").grad, rtol=1e-12)

    def centred(t, x, m, y):
        return lx.MatrixLinearOperator((y - m)[:, None] * (y - m)[None])

    np.testing.assert_allclose(run(cov=centred).grad, run(cov="centred").grad, rtol=1e-10)
    end = run().sample.x

    def raw(t, x, m, y):
        m = MIX(t, x)
        return lx.MatrixLinearOperator(end[:, None] * end[None] - m[:, None] * m[None])

    np.testing.assert_allclose(run(cov=raw).grad, run(cov="endpoint").grad, rtol=1e-8)


def test_an_estimated_trace():
    run = functools.partial(terminal_gradient, ddim(MIX), loss, X_T, cov="isotropic")
    exactly, known = run(), run(trace=ExactTrace())
    np.testing.assert_array_equal(exactly.grad, known.grad)
    estimate = jax.vmap(lambda k: run(trace=Hutchinson(), key=k).grad)(
        jax.random.split(jax.random.key(0), 64)
    )
    ratio = np.linalg.norm(estimate, axis=1) / np.linalg.norm(exactly.grad)
    assert np.std(ratio) > 1e-4  # the probes are drawn
    # the steps have independent probes, so the product of their factors is unbiased
    assert abs(np.mean(ratio) - 1) < 4 * np.std(ratio) / 8


# What each model is worth: medians over 64 draws, d = 16, 50 steps. Bounds on the cosine and on
# log10 of the ratio of norms; comments: measured here.
BOUNDS = {
    "exact": ((0.9999, 1), (-1e-3, 1e-3)),
    "gated": ((0.9, 1), (-0.1, 0.1)),
    "isotropic": ((0.9, 1), (-0.1, 0.1)),
    "none": ((0.9, 1), (-1.2, -0.05)),
    "centred": ((0.6, 0.97), (-1.2, 0.3)),
    "endpoint": ((-0.5, 0.5), (3, 8)),
}


@pytest.mark.parametrize("kind", ["dirac", pytest.param("mixture", marks=pytest.mark.slow)])
def test_the_worth_of_every_model(kind):
    rng = np.random.default_rng(5)
    if kind == "dirac":
        denoiser = jd.exact.empirical(VP, rng.normal(size=(64, 16)))
    else:
        denoiser = jd.exact.mixture(VP, np.ones(8), rng.normal(size=(8, 16)), 0.01)
    xs, vs = rng.normal(size=(2, 64, 16))
    sampler = ddim(denoiser, VP.grid(50), (16,))

    def gradients(cov):
        one = lambda x, v: terminal_gradient(  # noqa: E731
            sampler, lambda y: jnp.sum(y * v), x, cov=cov
        )
        return jax.vmap(one)(xs, vs).grad

    truth = gradients("vjp")
    norm = functools.partial(np.linalg.norm, axis=1)
    for cov, ((low, high), (shorter, longer)) in BOUNDS.items():
        grad = gradients(cov)
        angle = np.median(np.sum(grad * truth, 1) / (norm(grad) * norm(truth)))
        ratio = np.median(np.log10(norm(grad) / norm(truth)))
        assert low < angle < high + 1e-9, (cov, angle)
        assert shorter < ratio < longer, (cov, ratio)


# --- Any sampler. ---

FAST = VP.grid(8, "logsnr")
ANY = {name: row[0] for name, row in DETERMINISTIC.items()}
ANY |= {"Heun of diffrax": dfx.Heun(), "Tsit5 of diffrax": dfx.Tsit5()}


@each(ANY, "solver")
def test_it_is_the_gradient_of_any_solver(solver):
    """Of a network that is not symmetric."""
    sampler = ddim(NETWORK, FAST, solver=solver)
    value, grad = through_the_sampler(sampler, X_T)
    assert np.linalg.norm(grad) > 1e-3
    out = terminal_gradient(sampler, loss, X_T)
    np.testing.assert_allclose(out.value, value, rtol=1e-12)
    assert relative(out.grad, grad) < 1e-10


SOME = ("DPMpp2M", "UniPC(2, eps)", "DEIS(2, t)", "Heun", "RK(midpoint, t)", "Tsit5 of diffrax")


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("cov", ["jvp", "exact"])
def test_so_it_is_by_products_forward_and_closed_where_the_jacobian_is_symmetric(name, cov):
    sampler = ddim(MIX, FAST, solver=ANY[name])
    value, grad = through_the_sampler(sampler, X_T)
    out = terminal_gradient(sampler, loss, X_T, cov=cov)
    np.testing.assert_allclose(out.value, value, rtol=1e-12)
    assert relative(out.grad, grad) < 1e-10


def test_of_a_stochastic_sampler_with_its_noise():
    key, sampler = jax.random.key(3), ddim(MIX, FAST, solver=DDIM(eta=1.0))
    value, grad = through_the_sampler(sampler, X_T, key=key)
    for cov in ("vjp", "jvp", "exact"):
        out = terminal_gradient(sampler, loss, X_T, cov=cov, key=key)
        np.testing.assert_allclose(out.value, value, rtol=1e-12)
        assert relative(out.grad, grad) < 1e-10, cov
    other = terminal_gradient(sampler, loss, X_T, key=jax.random.key(4))
    assert relative(other.grad, grad) > 1e-2


def test_a_denoiser_with_another_covariance_has_its_own_values():
    for cov in ("vjp", "jvp", "exact", "isotropic", "centred"):
        tilted = WithCov(MIX, pullback("test", MIX, cov, None, None), jnp.zeros(D))
        for t in (0.1, 0.6):
            for one, other in zip(tilted.pair(t, X_T), MIX.pair(t, X_T), strict=True):
                np.testing.assert_array_equal(one, other)
            np.testing.assert_array_equal(tilted(t, X_T), MIX(t, X_T))
    flat = jax.grad(lambda x: jnp.sum(tilted(0.5, x)))(jnp.asarray(X_T))
    m = np.asarray(MIX(0.5, X_T))
    alpha, sigma = float(VP.alpha(0.5)), float(VP.sigma(0.5))
    np.testing.assert_allclose(flat, alpha / sigma**2 * m * m.sum(), rtol=1e-12)  # y = 0


# --- The continuous adjoint. ---


@pytest.mark.parametrize(
    "name,kind,ends",
    [
        ("VP", "mixture", (1.0, 0.01)),
        ("EDM", "dirac", (80.0, 0.02)),
    ],
)
@pytest.mark.slow
def test_the_continuous_adjoint_is_the_gradient_of_the_ode(name, kind, ends):
    path = PROCESSES[name]
    denoiser, ts = law(kind, path), np.array(ends)
    x = float(path.sigma(ts[0])) * X_T
    tight = dict(solver=dfx.Dopri8(), controller=dfx.PIDController(1e-10, 1e-10))
    value, grad = through_the_sampler(ddim(denoiser, ts, **tight), x)
    for cov in ("vjp", "exact") if kind == "dirac" else ("vjp",):
        out = continuous_gradient(denoiser, loss, x, ts=ts, cov=cov, **tight)
        np.testing.assert_allclose(out.value, value, rtol=1e-9)
        assert relative(out.grad, grad) < 1e-7
        assert relative(out.sample.aux["x_T"], x) < 1e-8
    nodes = path.grid(50, "logsnr", t_start=ts[0], t_end=ts[-1])
    coarse = continuous_gradient(denoiser, loss, x, ts=nodes)
    assert 1e-12 < relative(coarse.grad, grad) < 1e-4
    steps = terminal_gradient(ddim(denoiser, nodes), loss, x)
    assert relative(steps.grad, grad) > 1e-3  # which is the gradient of another map


def test_the_continuous_adjoint_of_a_gaussian_in_closed_form():
    v, ts = 0.3, VP.grid(40, "logsnr")
    denoiser = jd.exact.gaussian(VP, np.zeros(D), v)
    scale = [float(VP.alpha(t)) ** 2 * v + float(VP.sigma(t)) ** 2 for t in (ts[0], ts[-1])]
    factor = np.sqrt(scale[1] / scale[0])
    for cov, dtype in (("jvp", jnp.float32), ("isotropic", jnp.float64)):
        low, x = jax.tree.map(lambda a, d=dtype: jnp.asarray(a, d), (denoiser, X_T))
        out = continuous_gradient(low, loss, x, ts=ts, cov=cov)
        assert out.grad.dtype == dtype
        want, tolerance = factor * W * np.cos(factor * X_T), 1e-3 if cov == "jvp" else 1e-6
        np.testing.assert_allclose(out.grad, want, rtol=tolerance)


def test_a_failed_solve_says_so():
    control = dfx.PIDController(1e-8, 1e-8)
    out = continuous_gradient(MIX, loss, X_T, ts=TS, controller=control, max_steps=3)
    assert np.isnan(out.grad).all() and np.isnan(out.value) and np.isnan(out.sample.x).all()
    with pytest.raises(RuntimeError, match="maximum number of solver steps"):
        jd.check(out.sample)
    poles = jd.Denoiser(VP, lambda t, x, cond: x / 0.0)
    out = terminal_gradient(ddim(poles), loss, X_T)
    assert np.isnan(out.grad).all()
    with pytest.raises(RuntimeError, match="1 of 1 samples failed"):
        jd.check(out.sample)


# --- Memory. ---


@pytest.mark.optimised
def test_memory_is_the_states_or_flat():
    d, width = 32, 1024
    first, second = RNG.normal(size=(width, d)), RNG.normal(size=(d, width)) / width

    def network(t, x, cond):
        return jnp.matmul(second, jnp.tanh(jnp.matmul(first, x)))

    denoiser = jd.Denoiser(VP, network)

    def temporary(fn):
        program = jax.jit(fn).lower(jnp.ones(d)).compile()
        return program.memory_analysis().temp_size_in_bytes

    def discrete(x, n, cov):
        return terminal_gradient(ddim(denoiser, VP.grid(n), (d,)), loss_of_all, x, cov=cov).grad

    def continuous(x, n):
        return continuous_gradient(denoiser, loss_of_all, x, ts=VP.grid(n)).grad

    def loss_of_all(x):
        return jnp.sum(x**2)

    def tape(x, n):
        rows, ts = DDIM().tabulate(VP, VP.grid(n)).rows, jnp.asarray(VP.grid(n))

        def body(x, row):
            t, decay, gain = row
            return decay * x + gain * denoiser(t, x), None

        table = ts[:-1], jnp.asarray(rows.decay), jnp.asarray(rows.gain)
        return loss_of_all(jax.lax.scan(body, x, table)[0])

    def growth(fn):
        return (temporary(lambda x: fn(x, 1000)) - temporary(lambda x: fn(x, 10))) / 990

    state = d * 8
    for cov, states in (("vjp", 1), ("fd", 2)):
        # and the number of each step, by which the way back finds its coefficients
        assert growth(functools.partial(discrete, cov=cov)) <= states * state + 8, cov
    assert growth(continuous) == 0
    assert growth(jax.grad(tape)) > width * 8


@pytest.mark.parametrize(
    "solver", [solvers.SymmetricLeapfrog(), solvers.BELM(), solvers.EDICT()], ids=repr
)
@pytest.mark.optimised
def test_a_reversible_solver_keeps_no_states(solver):
    d = 64
    denoiser = jd.exact.gaussian(VP, jnp.zeros(d), 0.3)

    def temporary(n):
        sampler = ddim(denoiser, VP.grid(n, "logsnr"), (d,), solver=solver)
        fn = lambda x: terminal_gradient(sampler, lambda y: jnp.sum(y**2), x).grad  # noqa: E731
        program = jax.jit(fn).lower(jnp.ones(d)).compile()
        return program.memory_analysis().temp_size_in_bytes

    # 190 more steps have rows of at most 16 numbers each, but not one state of 64
    assert temporary(200) - temporary(10) < 190 * 16 * 8


# --- Guidance. ---

TARGET = MEANS[0]


def towards(y):
    return jnp.sum((y - TARGET) ** 2)


STEERED = {"DPMpp2M": solvers.DPMpp2M(), "Heun": solvers.Heun()}


@each(STEERED, "solver")
def test_noise_is_optimised_as_by_hand(solver):
    sampler, adam = ddim(MIX, FAST, solver=solver), optax.adam(0.05)
    out = optimise_noise(sampler, towards, X_T, optimiser=adam, steps=4)
    x, losses = jnp.asarray(X_T), []
    state = adam.init(x)
    for _ in range(4):
        value, grad = through_the_sampler(sampler, x, towards)
        update, state = adam.update(grad, state, x)
        x, losses = x + update, [*losses, value]
    np.testing.assert_allclose(out.x_T, x, rtol=1e-10)
    np.testing.assert_allclose(out.losses[:-1], losses, rtol=1e-10)
    np.testing.assert_allclose(out.losses[-1], towards(sampler(None, init=x).x), rtol=1e-10)


def test_an_optimiser_that_searches_along_a_line_gets_what_it_asks_for():
    sampler = ddim(jd.exact.gaussian(VP, np.zeros(D), np.diag(np.geomspace(0.01, 4, D))), FAST)
    run = functools.partial(optimise_noise, sampler, towards, X_T, steps=8)
    first, *_, by_search = run(optimiser=optax.lbfgs()).losses
    by_sgd = min(run(optimiser=optax.sgd(rate)).losses[-1] for rate in (0.01, 0.1))
    assert by_search < 0.5 * by_sgd < 0.5 * first


@each(STEERED, "solver")
def test_guidance_of_other_solvers_is_the_loop_by_hand(solver):
    eta, ts = 0.05, VP.grid(5)
    sampler = ddim(MIX, ts, solver=solver)
    out = guide(sampler, loss, X_T, window=(ts[1], ts[2]), step_size=eta)
    state = sampler.init(None, init=X_T)
    for n in range(5):
        if 1 <= n <= 2:

            def rest(x, n=n, state=state):
                state = sampler.replace(n, state, x)
                for k in range(n, 5):
                    state = sampler.step(k, None, state)
                return loss(sampler.finish(None, state).x)

            x = sampler.x(n, state)
            state = sampler.replace(n, state, x - eta * jax.grad(rest)(x))
        state = sampler.step(n, None, state)
    np.testing.assert_allclose(out.x, sampler.finish(None, state).x, rtol=1e-10)
    assert loss(out.x) < loss(sampler(None, init=X_T).x)


@pytest.mark.parametrize("project", [None, "sphere"])
def test_optimised_noise_leads_to_the_target(project):
    d = 16
    means = np.random.default_rng(4).normal(size=(4, d))
    denoiser = jd.exact.mixture(VP, np.ones(4), means, 0.01)
    sampler, x = ddim(denoiser, shape=(d,)), np.random.default_rng(3).normal(size=d)
    first = sampler(None, init=x).x
    distance = np.linalg.norm(means - first[None], axis=1)
    target = means[np.argsort(distance)[1]]  # not the mode that the noise leads to
    out = optimise_noise(
        sampler,
        lambda y: jnp.mean((y - target) ** 2),
        x,
        optimiser=optax.adam(0.1),
        steps=60,
        project=project,
    )
    jd.check(out.sample)
    assert out.losses.shape == (61,)
    radius = float(VP.sigma(TS[0])) * np.sqrt(d)
    start = x * radius / np.linalg.norm(x) if project else x
    begun = sampler(None, init=start).x
    np.testing.assert_allclose(out.losses[0], np.mean((begun - target) ** 2), rtol=1e-9)
    drawn = sampler(None, init=out.x_T)
    np.testing.assert_allclose(out.sample.x, drawn.x, rtol=1e-9)
    np.testing.assert_allclose(out.losses[-1], np.mean((drawn.x - target) ** 2), rtol=1e-9)
    assert out.losses[0] > 0.3 and out.losses[-1] < 0.02  # within the mode, of variance 0.01
    length = np.linalg.norm(out.x_T) / radius
    assert abs(length - 1) < 1e-12 if project else abs(length - 1) > 1e-3


def test_an_update_is_that_of_the_optimiser():
    grad = terminal_gradient(ddim(MIX), loss, X_T, cov="jvp").grad
    run = functools.partial(optimise_noise, ddim(MIX), loss, X_T, steps=1, cov="jvp")
    out = run(optimiser=optax.sgd(0.7))
    np.testing.assert_allclose(out.x_T, X_T - 0.7 * grad, rtol=1e-12)
    out = run(optimiser=optax.sgd(0.7), normalise=True)
    np.testing.assert_allclose(out.x_T, X_T - 0.7 * grad / np.linalg.norm(grad), rtol=1e-12)


def test_guidance_inside_a_window_is_the_loop_by_hand():
    ts, eta = VP.grid(5), 0.3
    out = guide(ddim(MIX, ts), loss, X_T, window=(ts[1], ts[2]), step_size=eta, repeats=2)
    x = jnp.asarray(X_T)
    for i in range(5):
        for _ in range(2 * (1 <= i <= 2)):
            x = x - eta * through_the_sampler(ddim(MIX, ts[i:]), x)[1]
        x = ddim(MIX, ts[i : i + 2])(None, init=x).x
    np.testing.assert_allclose(out.x, x, rtol=1e-10)
    assert int(out.nfe) == 5 + 2 * (4 + 3)
    plain = ddim(MIX, ts)(None, init=X_T).x
    none = guide(ddim(MIX, ts), loss, X_T, window=(0.5 * ts[-1], 0.0), step_size=eta)
    np.testing.assert_allclose(none.x, plain, rtol=1e-12)
    assert loss(out.x) < loss(plain)


# --- Transformations, shapes and dtypes. ---


def test_the_value_may_be_differentiated():
    def value(x, net):
        return terminal_gradient(ddim(jd.Denoiser(VP, net)), loss, x).value

    class Net(eqx.Module):
        w: jax.Array

        def __call__(self, t, x, cond):
            return jnp.tanh(jnp.matmul(self.w, x))

    net = Net(jnp.asarray(MIXER))
    by_x, by_net = jax.grad(value, argnums=(0, 1))(jnp.asarray(X_T), net)
    want = terminal_gradient(ddim(NETWORK), loss, X_T).grad
    np.testing.assert_allclose(by_x, want, rtol=1e-10)
    e = np.random.default_rng(1).normal(size=(D, D))
    ends = [value(jnp.asarray(X_T), Net(MIXER + h * e)) for h in (1e-5, -1e-5)]
    np.testing.assert_allclose(np.sum(by_net.w * e), (ends[0] - ends[1]) / 2e-5, rtol=1e-6)


def test_images_conditions_and_batches():
    def network(t, x, cond):
        flat = jnp.tanh(jnp.matmul(MIXER, x.reshape(-1)) + cond["shift"])
        return flat.reshape(x.shape)

    denoiser = jd.Denoiser(VP, network)
    xs, shifts = RNG.normal(size=(3, 2, 3)), RNG.normal(size=3)

    sampler = ddim(denoiser, shape=(2, 3))

    def run(x, shift, cov, fn=None):
        fn = fn or functools.partial(terminal_gradient, sampler)
        return fn(loss, x, cov=cov, cond={"shift": shift})

    for cov in ("fd", "gated"):
        many = jax.jit(jax.vmap(functools.partial(run, cov=cov)))(xs, shifts)
        assert many.grad.shape == (3, 2, 3) and np.isfinite(many.grad).all(), cov
    many = jax.vmap(functools.partial(run, cov="vjp"))(xs, shifts)
    one = through_the_sampler(sampler, xs[1], cond={"shift": shifts[1]})
    np.testing.assert_allclose(many.value[1], one[0], rtol=1e-12)
    np.testing.assert_allclose(many.grad[1], one[1], rtol=1e-10)
    ode = functools.partial(continuous_gradient, denoiser, ts=TS)
    continuous = jax.vmap(functools.partial(run, cov="vjp", fn=ode))(xs, shifts)
    assert continuous.grad.shape == (3, 2, 3)


def test_float32_stays_float32_and_near_float64():
    wide = terminal_gradient(ddim(MIX), loss, X_T).grad
    low, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (MIX, X_T))
    sampler = ddim(low, dtype=jnp.float32)
    for cov, tolerance in (("vjp", 1e-4), ("exact", 1e-4), ("fd", 2e-2)):
        out = terminal_gradient(sampler, loss, x, cov=cov, trajectory=True)
        assert {out.grad.dtype, out.grads.dtype, out.sample.x.dtype} == {jnp.dtype("float32")}
        assert relative(out.grad, wide) < tolerance, cov
    moved = optimise_noise(sampler, loss, x, optimiser=optax.sgd(0.1), steps=2)
    guided = guide(sampler, loss, x, window=(0.9, 0.5), step_size=0.1)
    assert moved.x_T.dtype == guided.x.dtype == jnp.float32


class Weights(eqx.Module):
    w: jax.Array
    traces: list = eqx.field(static=True)

    def __call__(self, t, x, cond=None):
        self.traces.append(1)
        return jnp.tanh(jnp.matmul(self.w, x)) + cond


class _Counter(list):
    def __eq__(self, other):
        return isinstance(other, _Counter)

    def __hash__(self):
        return 0


def test_nothing_is_traced_twice():
    traces = _Counter()
    sgd = optax.sgd(0.1)

    def of_a_sampler(call, **options):
        return lambda denoiser, *args, ts, cond: call(
            ddim(denoiser, ts), *args, cond=cond, **options
        )

    calls = [
        of_a_sampler(terminal_gradient),
        continuous_gradient,
        of_a_sampler(optimise_noise, optimiser=sgd, steps=2),
        of_a_sampler(guide, window=(0.9, 0.5), step_size=0.1),
    ]
    for call in calls:
        for scale in (1.0, 0.9):
            denoiser = jd.Denoiser(VP, Weights(jnp.asarray(scale * MIXER), traces))
            x, cond = scale * X_T, scale * np.ones(D)
            call(denoiser, loss, x, ts=scale * TS + 0.01 * (scale < 1), cond=cond)
            count = len(traces) if scale == 1.0 else count
        assert len(traces) == count > 0


# --- Errors. ---


def test_errors(as_users_see_it):
    run = functools.partial(terminal_gradient, ddim(NETWORK), loss, X_T)
    go = functools.partial(continuous_gradient, NETWORK, loss, X_T, ts=TS)
    sgd = optax.sgd(0.1)
    better = functools.partial(optimise_noise, ddim(NETWORK), loss, X_T)
    inside = functools.partial(guide, ddim(NETWORK), loss, X_T, step_size=0.1)
    straight = jd.Denoiser(PROCESSES["Rectified"], lambda t, x, cond: x)
    for call, said in [
        (lambda: run(cov="exact"), "terminal_gradient: cov must be 'vjp', 'jvp' or 'fd'"),
        (lambda: run(cov="hessian"), "cov must be one of 'vjp', 'jvp'.*got 'hessian'"),
        (lambda: go(ts=TS[::-1]), "continuous_gradient: ts must be strictly decreasing"),
        (lambda: run(trace=ExactTrace()), "trace must be left out for cov='vjp'"),
        (lambda: run(cov="isotropic", trace=3), "trace must be a trace estimator"),
        (lambda: run(cov="isotropic", trace=Hutchinson()), "terminal_gradient: key must be a key"),
        (lambda: terminal_gradient(loss, loss, X_T), "sampler must be one of a denoiser"),
        (lambda: continuous_gradient(loss, loss, X_T, ts=TS), "denoiser must be a jaxdiff"),
        (
            lambda: terminal_gradient(ddim(NETWORK), loss, X_T[:2]),
            r"must be of shape \(6,\), got shape \(2,\)",
        ),
        (lambda: terminal_gradient(ddim(NETWORK), 1.0, X_T), "loss must be callable"),
        (
            lambda: terminal_gradient(ddim(NETWORK), jnp.sin, X_T),
            r"one floating number, \(\), got float64\[6\]",
        ),
        (lambda: go(solver=DDIM()), "continuous_gradient: solver must be an ODE solver of diff"),
        (lambda: go(max_steps=0), "continuous_gradient: max_steps must be"),
        (
            lambda: continuous_gradient(straight, loss, X_T, ts=[0.9, 0.0]),
            r"ts\[-1\] must be a time of finite log-SNR \(sigma > 0\), got t=0.0; end above",
        ),
        (
            lambda: continuous_gradient(straight, loss, X_T, ts=[1.0, 0.1]),
            r"ts\[0\] must be a time of finite log-SNR .*, got t=1.0; start below it",
        ),
        (lambda: better(optimiser=0.1, steps=3), "optimise_noise: optimiser must be an optax"),
        (lambda: better(optimiser=sgd, steps=0), "steps must be a whole number of at least 1"),
        (lambda: better(optimiser=sgd, steps=1, project="cube"), "project must be one of None"),
        (lambda: inside(window=(0.1, 0.9)), "guide: window must be two times t_hi >= t_lo"),
        (lambda: inside(window=0.5), "window must be two times"),
        (lambda: inside(window=(0.9, 0.1), repeats=0), "repeats must be a whole number"),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
