import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers import PROCESSES, each_process, inner_times

from jaxdiff import exact
from jaxdiff.fisher.heads import TraceHead
from jaxdiff.pfgm import PFGMpp
from jaxdiff.process import EDM, VE, VP, Rectified
from jaxdiff.score import PREDICTIONS, Denoiser
from jaxdiff.train import loss

KEY = jax.random.key(7)
X0 = jnp.linspace(-1.0, 2.0, 6).reshape(2, 3)
ONE = loss.WEIGHTS["eps"]


def net(t, x, cond=None):
    return jnp.sin(2 * x + t) + 0.3


def losses_of(path, kind, weight, t):
    eps = path.noise(KEY, X0.shape)
    return loss.denoising_loss(Denoiser(path, net, kind), X0, eps, t=t, weight=weight)


@each_process
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_weight_acts_on_the_eps_error(path, kind):
    denoiser = Denoiser(path, net, kind)
    for t in inner_times(path, 5, 0.1, 0.1):
        x, eps = path.perturb(KEY, t, X0)
        got = losses_of(path, kind, lambda lam: 2 + jnp.tanh(lam), t)
        error = denoiser.eps(t, x) - eps
        expected = (2 + jnp.tanh(path.lam(t))) * jnp.mean(error**2)
        np.testing.assert_allclose(got, expected, rtol=1e-7)


@each_process
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_default_is_the_error_of_the_own_prediction(path, kind):
    t = inner_times(path, 3)[1]
    x, eps = path.perturb(KEY, t, X0)
    alpha_dot, sigma_dot = path.rates(t)
    alpha, sigma = path.alpha(t), path.sigma(t)
    target = {
        "x0": X0,
        "eps": eps,
        "score": -eps / sigma,
        "v": alpha * eps - sigma * X0,
        "velocity": alpha_dot * X0 + sigma_dot * eps,
    }[kind]
    expected = jnp.mean((net(t, x) - target) ** 2)
    np.testing.assert_allclose(losses_of(path, kind, None, t), expected, rtol=1e-10)


ENDS = [(kind, t) for kind in PREDICTIONS for t in (0.0, 1.0) if (kind, t) != ("x0", 0.0)]


@pytest.mark.parametrize("kind,t", ENDS)
def test_finite_at_the_ends_of_the_path(kind, t):
    def scaled(c):
        denoiser = Denoiser(Rectified(), lambda t, x, cond: c * x, kind)
        return loss.denoising_loss(denoiser, X0, 1 - 2 * X0, t=t, weight=ONE)

    assert np.all(np.isfinite(jax.value_and_grad(scaled)(0.7)))


# name: weight, path, prediction, the published weight on the error of that prediction.
NATIVE = {
    "eps": (loss.WEIGHTS["eps"], VP(), "eps", lambda snr: 1.0),
    "x0": (loss.WEIGHTS["x0"], VP(), "x0", lambda snr: 1.0),
    "v": (loss.WEIGHTS["v"], VP(), "v", lambda snr: 1.0),
    "flow": (loss.WEIGHTS["flow"], Rectified(), "velocity", lambda snr: 1.0),
    "edm": (loss.edm(0.7), EDM(), "x0", lambda snr: (1 / snr + 0.49) / (0.49 / snr)),
    "min_snr_x0": (loss.min_snr(5), VP(), "x0", lambda snr: np.minimum(snr, 5)),
    "min_snr_v": (loss.min_snr(5), VP(), "v", lambda snr: np.minimum(snr, 5) / (snr + 1)),
    "p2": (loss.p2(1, 0.5), VP(), "eps", lambda snr: 1 / (1 + snr) ** 0.5),
    "debiased": (loss.WEIGHTS["debiased"], VP(), "eps", lambda snr: 1 / np.sqrt(snr)),
    "truncated": (loss.WEIGHTS["truncated"], VP(), "x0", lambda snr: np.maximum(snr, 1)),
    "sigmoid": (loss.sigmoid(2), VP(), "eps", lambda snr: 1 / (1 + snr * np.exp(-2))),
}


@pytest.mark.parametrize("weight,path,kind,native", NATIVE.values(), ids=NATIVE)
def test_weights_equal_their_published_form(weight, path, kind, native):
    for t in inner_times(path, 7, 0.01, 0.01):
        expected = native(float(path.snr(t))) * losses_of(path, kind, None, t)
        np.testing.assert_allclose(losses_of(path, kind, weight, t), expected, rtol=1e-9)


def test_minimiser_is_the_posterior_mean_of_gaussian_data():
    path, std, t, n = VP(), 1.5, 0.4, 20_000
    alpha, sigma = path.alpha(t), path.sigma(t)
    best = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
    x0 = std * jax.random.normal(jax.random.key(1), (n, 1))

    def of(c):
        denoiser = Denoiser(path, lambda t, x, cond: c * x, "x0")
        return loss.batch_loss(KEY, denoiser, x0, sample_t=lambda p, u: jnp.full_like(u, t))[1]

    slopes = jax.jacfwd(of)(best)
    error = jnp.std(slopes) / np.sqrt(n)
    assert abs(jnp.mean(slopes)) < 4 * error
    assert abs(jnp.mean(jax.jacfwd(of)(1.1 * best))) > 10 * error
    curvature = jax.hessian(lambda c: jnp.mean(of(c)))(best)  # quadratic: one Newton step fits it
    fitted = 0.2 - jnp.mean(jax.jacfwd(of)(0.2)) / curvature
    assert abs(fitted - best) < 4 * error / curvature


def test_times_are_stratified_and_examples_independent():
    path, n = Rectified(), 8
    clock = Denoiser(path, lambda t, x, cond: t + 0 * x, "x0")
    mean, square = jax.jit(lambda x0: loss.batch_loss(KEY, clock, x0))(jnp.zeros((n, 3)))
    u = n * np.sqrt(square)
    assert np.floor(u).tolist() == list(range(n))
    np.testing.assert_allclose(np.diff(u), 1, rtol=1e-6)
    np.testing.assert_allclose(mean, np.mean(square))

    denoiser = Denoiser(path, net, "velocity")
    x0 = jax.random.normal(KEY, (n, 3))
    first = loss.batch_loss(KEY, denoiser, x0)[1]
    second = loss.batch_loss(KEY, denoiser, x0.at[3].add(1.0))[1]
    assert np.flatnonzero(first != second).tolist() == [3]
    assert not np.any(first == loss.batch_loss(jax.random.key(8), denoiser, x0)[1])


def test_example_weights_and_conditions():
    n = 4
    denoiser = Denoiser(VP(), lambda t, x, cond: cond["shift"] + 0 * x, "x0")
    cond = {"shift": jnp.arange(1.0, n + 1)}
    w = jnp.array([0.0, 2.0, 0.5, 1.5])
    mean, losses = loss.batch_loss(KEY, denoiser, jnp.zeros((n, 2)), cond, example_weight=w)
    np.testing.assert_allclose(losses, cond["shift"] ** 2)
    np.testing.assert_allclose(mean, np.mean(w * losses))


# --- Pairs from elsewhere. -----------------------------------------------------------------------


@pytest.mark.parametrize("path", [VP(), Rectified(), PFGMpp(D=3.0)], ids=["VP", "flow", "PFGMpp"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_pairs_given_equal_pairs_drawn(path, dtype):
    n, w = 5, jnp.linspace(0.0, 2.0, 5)
    denoiser = Denoiser(path, net, "eps")
    head = TraceHead(lambda clock, x, cond: jnp.mean(x) - clock, "residual")
    x0 = jax.random.normal(jax.random.key(1), (n, 3), dtype)
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(n))
    if isinstance(path, PFGMpp):  # what a normal draw alone would not be

        def draw(key):
            normal, mixing = jax.random.split(key)
            log_w = jax.random.loggamma(mixing, jnp.asarray(1.5, dtype), (), dtype) - jnp.log(1.5)
            return jax.random.normal(normal, (3,), dtype) * jnp.exp(-log_w / 2).astype(dtype)
    else:
        draw = lambda key: jax.random.normal(key, (3,), dtype)  # noqa: E731
    eps = jax.vmap(draw)(keys)
    options = dict(example_weight=w, sample_t=lambda p, u: p.t_min + (0.1 + 0.8 * u) * p.t_max / 2)
    calls = [lambda **kw: loss.batch_loss(KEY, denoiser, x0, **kw, weight=loss.min_snr())]
    if not isinstance(path, PFGMpp):
        calls += [lambda **kw: loss.batch_trace_loss(KEY, head, denoiser, x0, **kw)]
    for call in calls:
        drawn, given = call(**options), call(**options, eps=eps)
        rtol = 2e-6 if isinstance(path, PFGMpp) else 0
        for a, b in zip(drawn, given, strict=True):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=0)
        assert np.all(call(**options, eps=eps + 1)[1] != drawn[1])


def test_pairs_equal_their_closed_form():
    n = 6
    rng = np.random.default_rng(0)
    x0, eps, w = rng.normal(size=(n, 3)), rng.normal(size=(n, 3)), rng.uniform(size=n)
    A = rng.normal(size=(3, 3))

    def total(A, w, x0, eps):
        linear = Denoiser(Rectified(), lambda t, x, cond: A @ x + t, "velocity")
        weight = lambda lam: jnp.exp(-lam)  # noqa: E731
        return loss.batch_loss(KEY, linear, x0, eps=eps, example_weight=w, weight=weight)[0]

    arrays = tuple(map(jnp.asarray, (A, w, x0, eps)))
    value, slope = jax.jit(jax.value_and_grad(total))(*arrays)
    t = ((np.arange(n) + float(jax.random.uniform(jax.random.fold_in(KEY, n)))) / n)[:, None]
    x = (1 - t) * x0 + t * eps
    error = x @ A.T + t - (eps - x0)
    factor = t[:, 0] / (1 - t[:, 0]) * (1 - t[:, 0]) ** 2  # w(lam), and that of the eps error
    np.testing.assert_allclose(value, np.mean(w * factor * np.mean(error**2, 1)), rtol=1e-12)
    want = 2 / (3 * n) * np.einsum("i,ij,ik->jk", w * factor, error, x)
    np.testing.assert_allclose(slope, want, rtol=1e-11)
    np.testing.assert_allclose(total(arrays[0], 3 * arrays[1], *arrays[2:]), 3 * value, rtol=1e-12)


def test_errors_name_the_argument(as_users_see_it):
    denoiser = Denoiser(VP(), net)
    for call in (
        loss.batch_loss,
        lambda *a, **kw: loss.batch_trace_loss(*a[:1], None, *a[1:], **kw),
    ):
        with pytest.raises(
            ValueError, match=r"eps must be of the shape of x0, \(4, 2\), got \(2,\)"
        ):
            call(KEY, denoiser, jnp.zeros((4, 2)), eps=jnp.zeros(2))
    with pytest.raises(ValueError, match=r"eps must be of the shape of x0, \(2, 3\), got \(3,\)"):
        loss.denoising_loss(denoiser, X0, X0[0], t=0.5)
    with pytest.raises(ValueError, match=r"example_weight must be of shape \(4,\), got \(3,\)"):
        loss.batch_loss(KEY, denoiser, jnp.zeros((4, 2)), example_weight=jnp.ones(3))
    with pytest.raises(ValueError, match="batch_loss: x0 must be a floating array, got int64"):
        loss.batch_loss(KEY, denoiser, jnp.zeros((4, 2), int))
    with pytest.raises(ValueError, match="logsnr_time: process must be of finite log-SNR"):
        loss.logsnr_time(Rectified(), 0.5)


def test_lognormal_time_has_its_law_inside_the_process():
    path, u = EDM(), np.linspace(0.001, 0.999, 101)
    t = jax.vmap(lambda u: loss.lognormal_time(-1.2, 1.2)(path, u))(jnp.asarray(u))
    ends = (np.log([path.sigma_min, path.sigma_max]) + 1.2) / 1.2
    np.testing.assert_allclose(np.log(t), -1.2 + 1.2 * scipy.stats.truncnorm(*ends).ppf(u))


@each_process
def test_times_stay_in_the_process(path):
    samplers = [loss.uniform_time, loss.lognormal_time()]
    samplers += [] if path is PROCESSES["Rectified"] else [loss.logsnr_time]
    u = jnp.linspace(0.0, 1.0, 65)[1:-1]
    for sample_t in samplers:
        t = jax.vmap(lambda u, sample_t=sample_t: sample_t(path, u))(u)
        slack = 1e-9 * path.t_max
        assert np.all((t >= path.t_min - slack) & (t <= path.t_max + slack))
        assert np.all(np.diff(t) > 0)
    if loss.logsnr_time in samplers:
        assert np.std(np.diff(jax.vmap(path.lam)(t))) < 1e-6


def test_float32_and_low_precision(defaults):
    x0 = jax.random.normal(KEY, (64, 5), jnp.bfloat16)
    for kind in PREDICTIONS:
        denoiser = Denoiser(VE(), lambda t, x, cond: x, kind)
        sample_t = loss.lognormal_time()
        mean, _ = loss.batch_loss(KEY, denoiser, x0, sample_t=sample_t, weight=loss.min_snr())
        assert mean.dtype == jnp.float32 and np.isfinite(mean)


# --- Heads for the trace. ------------------------------------------------------------------------

KINDS = ("raw", "residual", "preconditioned")


def exact_moment(denoiser, kind, t, x):
    """What the head of each kind is to predict, from the closed-form posterior."""
    known = denoiser.posterior(t, x)
    snr = denoiser.process.snr(t)
    if kind == "raw":
        return (known.residual / snr + jnp.sum(known.mean**2)) / x.size
    return known.residual / x.size * (1 if kind == "residual" else (1 + snr) / snr)


@pytest.mark.parametrize("kind", KINDS)
def test_minimiser_of_the_trace_loss_is_the_conditional_moment(kind):
    path, t, n = VP(), 0.3, 20_000
    means = jnp.array([[-1.0, 0.5], [1.0, 0.0]])
    denoiser = exact.mixture(path, [0.4, 0.6], means, 0.2)
    which = jax.random.bernoulli(jax.random.key(1), 0.6, (n,)).astype(int)
    x0 = means[which] + 0.2**0.5 * jax.random.normal(jax.random.key(2), (n, 2))

    def losses(a):  # the exact moment, moved along the functions 1 and |x|^2
        def net(clock, x, cond):
            moment = exact_moment(denoiser, kind, t, x) + a[0] + a[1] * jnp.sum(x**2)
            if kind != "preconditioned":
                return moment
            return jnp.log(jnp.expm1(moment)) - jnp.log(jnp.expm1(1.0))

        head, at = TraceHead(net, kind), lambda p, u: jnp.full_like(u, t)
        return loss.batch_trace_loss(KEY, head, denoiser, x0, sample_t=at)[1]

    slopes = jax.jit(jax.jacfwd(losses))
    best, moved = slopes(jnp.zeros(2)), slopes(jnp.array([0.05, 0.02]))
    error = jnp.std(best, axis=0) / np.sqrt(n)
    assert np.all(np.abs(jnp.mean(best, axis=0)) < 4 * error)
    assert np.all(np.abs(jnp.mean(moved, axis=0)) > 6 * error)


@each_process
def test_the_preconditioned_target_is_its_definition(path):
    head = TraceHead(lambda t, x, cond: jnp.sum(x))
    denoiser = Denoiser(path, net, "v")
    for t in inner_times(path, 5, 0.05, 0.05):
        x, eps = path.perturb(KEY, t, X0)
        m, guess = denoiser.pair(t, x)
        alpha, sigma = path.alpha(t), path.sigma(t)
        want = (alpha**2 + sigma**2) / sigma**2 * jnp.mean((X0 - m) ** 2)
        np.testing.assert_allclose(head.target(X0, eps, m, guess), want, rtol=1e-8)
        scaled = x / jnp.hypot(alpha, sigma)
        moment = jax.nn.softplus(jnp.sum(scaled) + jnp.log(jnp.expm1(1.0)))
        got = loss.trace_loss(head, denoiser, X0, eps, t=t)
        np.testing.assert_allclose(got, (moment - want) ** 2, rtol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", [False, True])
def test_no_gradient_of_the_trace_loss_reaches_the_denoiser(kind, features):
    class Net(eqx.Module):
        scale: jax.Array

        def __call__(self, t, x, cond):
            return self.features(t, x, cond)[0]

        def features(self, t, x, cond):
            return jnp.sin(self.scale * x), self.scale * x

    def of(parameters, hidden):
        head_scale, net_scale, beta = parameters
        # `hidden` is what a network may hold in a closure, where no tree shows it
        path, inner = VP(beta_max=beta), Net(net_scale * hidden)
        head = TraceHead(lambda t, h, cond: head_scale * jnp.mean(h), kind, features=features)
        return loss.trace_loss(head, Denoiser(path, inner, "eps"), X0, 1 - X0, t=0.4)

    grads = jax.grad(of, (0, 1))((jnp.array(0.7), jnp.array(1.3), jnp.array(20.0)), jnp.array(1.0))
    assert abs(grads[0][0]) > 1e-3
    assert not np.any(jax.tree.leaves((grads[0][1:], grads[1])))


def test_a_batch_of_trace_losses_has_stratified_times_and_its_own_noise():
    path, n = VP(), 8
    denoiser = Denoiser(path, net, "velocity")
    head = TraceHead(lambda clock, x, cond: jnp.mean(x) - 4 * clock + cond["shift"])
    x0, cond = jax.random.normal(KEY, (n, 3)), {"shift": jnp.arange(1.0, n + 1)}
    w = jnp.linspace(0.0, 2.0, n)

    mean, losses = loss.batch_trace_loss(KEY, head, denoiser, x0, cond, example_weight=w)
    np.testing.assert_allclose(mean, np.mean(w * losses))
    offset = jax.random.uniform(jax.random.fold_in(KEY, n))
    for i in (0, 5):
        t = loss.logsnr_time(path, (i + offset) / n)
        one = {"shift": cond["shift"][i]}
        eps = jax.random.normal(jax.random.fold_in(KEY, i), (3,))
        want = loss.trace_loss(head, denoiser, x0[i], eps, one, t=t)
        np.testing.assert_allclose(losses[i], want, rtol=1e-6)
    with pytest.raises(ValueError, match="logsnr_time: process must be of finite log-SNR"):
        loss.batch_trace_loss(KEY, head, Denoiser(Rectified(), net), x0, cond)


def test_trace_loss_errors(as_users_see_it):
    head, denoiser = TraceHead(lambda t, x, cond: jnp.sum(x)), Denoiser(VP(), net)
    for call, said in [
        (lambda: loss.trace_loss(net, denoiser, X0, X0, t=0.5), "trace_loss: head must be a Tra"),
        (lambda: loss.trace_loss(head, net, X0, X0, t=0.5), "trace_loss: denoiser must be a jaxd"),
        (
            lambda: loss.batch_trace_loss(KEY, head, denoiser, jnp.zeros((4, 2), int)),
            "batch_trace_loss: x0 must be a floating array, got int64",
        ),
        (
            lambda: loss.batch_trace_loss(
                KEY, head, denoiser, jnp.zeros((4, 2)), example_weight=jnp.ones(3)
            ),
            r"batch_trace_loss: example_weight must be of shape \(4,\), got \(3,\)",
        ),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
