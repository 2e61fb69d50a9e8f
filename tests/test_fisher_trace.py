"""Trace estimators and heads against the mixture oracle, in exact and in statistical terms."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trace_heads
from helpers import PROCESSES
from oracles import GaussianMixture

from jaxdiff import exact
from jaxdiff.fisher import fisher, posterior_cov
from jaxdiff.fisher.heads import ExactTrace, Hutchinson, HutchPP, TraceHead, matching_bound
from jaxdiff.linalg.diag_low_rank import DiagLowRank
from jaxdiff.linalg.estimators import trace
from jaxdiff.process import VP
from jaxdiff.score import Denoiser, from_linen, precondition
from jaxdiff.train import MLP, TraceNet, UNet

D = 6
KEY = jax.random.key(5)
ORACLE = GaussianMixture.random(0, 3, D)
KINDS = ("raw", "residual", "preconditioned")


def exactly(path, oracle=ORACLE):
    return exact.mixture(path, oracle.weights, oracle.means, oracle.covs)


def as_network(denoiser):
    """The same denoiser with nothing known about it but its values."""
    return Denoiser(denoiser.process, lambda t, x, cond: denoiser.eps(t, x), "eps")


def state(path, lam, seed=0, oracle=ORACLE):
    t = path.t_of_lam(lam)
    alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
    noise = np.random.default_rng(seed).normal(size=oracle.dim)
    return t, jnp.asarray(alpha * oracle.sample(seed, 1)[0] + sigma * noise), alpha, sigma


def moments(oracle, x, alpha, sigma):
    """What the network of each kind of head has to predict, from the oracle's posterior."""
    mean, cov = oracle.posterior(np.asarray(x), alpha, sigma).moments()
    spread = np.trace(cov)
    return {
        "raw": (spread + mean @ mean) / len(mean),
        "residual": alpha**2 / sigma**2 * spread / len(mean),
        "preconditioned": (alpha**2 + sigma**2) / sigma**2 * spread / len(mean),
    }


def head_saying(moment, kind):
    """A head whose network predicts the moment, whatever it reads."""
    out = moment
    if kind == "preconditioned":  # the output is softplus, shifted to be 1 at 0
        out = jnp.log(jnp.expm1(moment)) - jnp.log(jnp.expm1(1.0))
    return TraceHead(lambda t, x, cond: jnp.asarray(out), kind)


@eqx.filter_jit
def run(estimator, denoiser, t, x, key=None):
    return estimator(denoiser, t, x, None, key)


def agrees(values, truth):
    """Whether the mean is within 4 standard errors of the truth, and not by chance of width."""
    error = np.std(values, ddof=1) / len(values) ** 0.5
    return abs(np.mean(values) - truth) < 4 * error


# --- Identities. ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["VP", "EDM", "Rectified"])
@pytest.mark.parametrize("lam", [-2.0, 0.0, 1.5])
def test_every_head_with_the_exact_moment_gives_the_exact_trace(name, lam):
    path = PROCESSES[name]
    denoiser = exactly(path)
    t, x, alpha, sigma = state(path, lam)
    hessian = np.trace(ORACLE.fisher(x, alpha, sigma))
    saying = moments(ORACLE, x, alpha, sigma)
    for kind in KINDS:
        m, eps, values = head_saying(saying[kind], kind)(denoiser, t, x)
        assert values.shape == (1,)
        np.testing.assert_allclose((D - values[0]) / sigma**2, hessian, rtol=1e-10, err_msg=kind)
        np.testing.assert_array_equal([m, eps], denoiser.pair(t, x))


def test_a_network_that_says_nothing_gives_the_trace_of_white_data():
    white = exact.gaussian(VP(), np.zeros(D), 1.0)
    head = TraceHead(lambda t, x, cond: jnp.zeros(()))
    for lam in (-3.0, 0.0, 3.0):
        t = VP().t_of_lam(lam)
        want = ExactTrace()(white, t, jnp.ones(D))[2]
        np.testing.assert_allclose(head(white, t, jnp.ones(D))[2], want, rtol=1e-12)


@pytest.mark.parametrize("lam", [-2.0, 0.0, 1.5])
def test_exact_trace_in_closed_form_and_by_derivatives(lam):
    path = PROCESSES["VP"]
    denoiser = exactly(path)
    t, x, alpha, sigma = state(path, lam)
    want = D - sigma**2 * np.trace(ORACLE.fisher(x, alpha, sigma))
    for model in (denoiser, as_network(denoiser)):
        m, eps, values = run(ExactTrace(), model, t, x)
        np.testing.assert_allclose(values, [want], atol=1e-10 * D)
        np.testing.assert_allclose([m, eps], denoiser.pair(t, x), rtol=1e-12)


def test_exact_trace_of_images_and_of_atoms():
    path, atoms = VP(), np.random.default_rng(2).normal(size=(40, 2, 3))
    denoiser = exact.empirical(path, atoms, chunk=16)
    t, x = path.t_of_lam(0.5), jnp.asarray(atoms[0] + 0.3)
    want = trace(fisher(denoiser, t, x, method="exact"))[0]
    for model in (denoiser, as_network(denoiser)):
        r = run(ExactTrace(), model, t, x)[2][0]
        np.testing.assert_allclose((6 - r) / path.sigma(t) ** 2, want, rtol=1e-10)


# --- Probes. -------------------------------------------------------------------------------------


def test_the_three_modes_are_one_estimate():
    path = VP()
    t, x, *_ = state(path, 0.4)
    w = jnp.asarray(np.random.default_rng(1).normal(size=(D, D)))
    network = Denoiser(path, lambda t, x, cond: jnp.tanh(w @ x), "eps")  # with no symmetry
    runs = {m: Hutchinson(5, mode=m)(network, t, x, None, KEY) for m in ("jvp", "vjp", "fd")}
    for mode, (m, eps, values) in runs.items():
        np.testing.assert_allclose([m, eps], network.pair(t, x), rtol=1e-14, err_msg=mode)
        rtol = 1e-6 if mode == "fd" else 1e-12
        np.testing.assert_allclose(values, runs["jvp"][2], rtol=rtol, err_msg=mode)
    one = Hutchinson(1)(network, t, x, None, jax.random.split(KEY, 1)[0])[2]
    assert np.all(runs["jvp"][2] != one)  # as many keys as probes


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased_with_the_published_variance(kind):
    path, n = VP(), 40_000
    t, x, alpha, sigma = state(path, 0.8)
    R = np.eye(D) - sigma**2 * ORACLE.fisher(x, alpha, sigma)
    values = np.asarray(run(Hutchinson(n, kind), exactly(path), t, x, KEY)[2])
    assert agrees(values, np.trace(R))
    squares = (values - np.trace(R)) ** 2
    off = np.sum(R**2) - (np.sum(np.diag(R) ** 2) if kind == "rademacher" else 0.0)
    assert agrees(squares, 2 * off)
    assert not agrees(squares, 2.4 * off)


def test_hutchpp_is_unbiased_and_its_repeats_are_independent():
    path, n = VP(), 4_000
    t, x, alpha, sigma = state(path, -0.5)
    r = D - sigma**2 * np.trace(ORACLE.fisher(x, alpha, sigma))
    values = np.asarray(run(HutchPP(6, n), as_network(exactly(path)), t, x, KEY)[2])
    assert values.shape == (n,) and np.std(values) > 1e-3 * r
    assert agrees(values, r)
    centred = values - r
    assert agrees(centred[1:] * centred[:-1], 0.0)


def test_hutchpp_is_exact_below_its_rank_and_hutchinson_is_not():
    path, atoms = VP(), np.random.default_rng(4).normal(size=(3, 2, 4))
    denoiser = exact.mixture(path, np.ones(3), atoms, 0.0)  # R has rank 2
    t, x = path.t_of_lam(-0.3), jnp.asarray(atoms.mean(0))
    r = run(ExactTrace(), denoiser, t, x)[2][0]
    np.testing.assert_allclose(run(HutchPP(9, 4), denoiser, t, x, KEY)[2], r, rtol=1e-10)
    np.testing.assert_allclose(run(HutchPP(30, 2), denoiser, t, x, KEY)[2], r, rtol=1e-10)
    assert np.std(run(Hutchinson(20), denoiser, t, x, KEY)[2]) > 0.1 * r
    operator = posterior_cov(denoiser, t, x)
    value, error = trace(operator, KEY, probes=3, method="hutch++")
    np.testing.assert_allclose(value, trace(operator)[0], rtol=1e-10)
    assert error < 1e-10 * value


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_trace_of_an_operator_is_unbiased_with_an_honest_error(method, kind):
    t, x, *_ = state(VP(), 0.4)
    operator = fisher(exactly(VP()), t, x, method="exact")

    def run(key):
        return trace(operator, key, probes=4, kind=kind, method=method)

    values, errors = jax.jit(jax.vmap(run))(jax.random.split(KEY, 4_000))
    assert agrees(np.asarray(values), np.trace(operator.as_matrix()))
    if method == "hutchinson":  # the squared error is unbiased for the variance
        assert agrees(np.asarray(errors**2 - (values - np.mean(values)) ** 2), 0.0)


def test_trace_of_a_low_rank_operator_is_closed():
    rng = np.random.default_rng(3)
    operator = DiagLowRank(
        jnp.asarray(0.7), jnp.asarray(rng.normal(size=(3, 2, 5))), jnp.asarray(rng.normal(size=3))
    )
    value, error = trace(operator)
    np.testing.assert_allclose(value, np.trace(operator.as_matrix()), rtol=1e-13)
    assert error == 0


# --- One evaluation, and what a derivative of it gives. ------------------------------------------


def counting(calls):
    def net(t, x, cond):
        calls.append(x.shape)
        return jnp.tanh(x)

    return Denoiser(VP(), net, "eps")


@pytest.mark.parametrize(
    "estimator,number",
    [
        (ExactTrace(), 1),
        (Hutchinson(4), 1),
        (Hutchinson(4, mode="vjp"), 1),
        (Hutchinson(4, mode="fd"), 2),  # the second is the displaced one
        (HutchPP(6, 3), 1),
        (TraceHead(lambda t, x, cond: x[0]), 1),
    ],
)
def test_the_network_is_evaluated_once(estimator, number):
    calls = []
    jax.jit(lambda x: estimator(counting(calls), 0.5, x, None, KEY)).lower(jnp.ones(3))
    assert len(calls) == number


def test_derivatives_of_the_estimates():
    path = VP()
    denoiser, t = exactly(path), path.t_of_lam(-1.0)
    x = path.alpha(t) * jnp.asarray(ORACLE.moments()[0])  # between the modes
    want = jax.jit(jax.grad(lambda x: denoiser.posterior(t, x).residual))(x)
    assert np.linalg.norm(want) > 0.1
    network = as_network(denoiser)

    def slope(estimator, key=KEY):
        return jax.jit(jax.grad(lambda x: jnp.mean(estimator(network, t, x, None, key)[2])))(x)

    np.testing.assert_allclose(slope(ExactTrace()), want, rtol=1e-8, atol=1e-9)
    got, v = slope(Hutchinson(3)), jnp.arange(1.0, D + 1) / D
    ends = [run(Hutchinson(3), network, t, x + h * v, KEY)[2].mean() for h in (1e-5, -1e-5)]
    np.testing.assert_allclose(got @ v, (ends[0] - ends[1]) / 2e-5, rtol=1e-6)
    keys = jax.random.split(KEY, 3_000)  # the sketch is held fixed: unbiased, not pathwise
    slopes = jax.jit(jax.vmap(lambda key: slope(HutchPP(6), key) @ v))(keys)
    assert agrees(np.asarray(slopes), want @ v)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_low_precision_states_give_float32_traces(dtype):
    t, x, *_ = state(VP(), 0.0)
    network = Denoiser(VP(), lambda t, x, cond: jnp.tanh(x), "eps")
    low = jnp.asarray(x, dtype)
    estimators = (ExactTrace(), Hutchinson(2), HutchPP(3), TraceHead(lambda t, x, cond: x[0]))
    single = jnp.asarray(t, jnp.float32)
    known = run(ExactTrace(), exactly(VP()), t, low)
    assert [a.dtype for a in known] == [dtype, dtype, jnp.float32]
    assert run(Hutchinson(2), network, t, low, KEY)[2].dtype == jnp.float32  # t is float64 here
    for estimator in estimators:
        m, eps, values = run(estimator, network, single, low, KEY)
        assert m.dtype == eps.dtype == dtype and values.dtype == jnp.float32
    truth = ExactTrace()(network, t, x)[2]
    got = ExactTrace()(network, single, low)[2]
    np.testing.assert_allclose(got, truth, rtol=0.03 if dtype == jnp.bfloat16 else 1e-5)


# --- The raw head, and what is wrong with it. ----------------------------------------------------


def test_the_bound_of_the_raw_head_holds_and_is_not_vacuous():
    path, rng, ratios = VP(), np.random.default_rng(7), []
    for seed in range(200):
        t, x, alpha, sigma = state(path, rng.uniform(-2.0, 3.0), seed)
        mean, cov = ORACLE.posterior(np.asarray(x), alpha, sigma).moments()
        true = (D - alpha**2 / sigma**2 * np.trace(cov)) / sigma**2
        off_t = rng.choice([-1, 1]) * rng.exponential(0.3)
        off_m = rng.normal(size=D) * rng.exponential(0.3)
        wrong = Denoiser(path, lambda t, x, cond, m=mean + off_m: jnp.asarray(m), "x0")
        head = head_saying((np.trace(cov) + mean @ mean) / D + off_t, "raw")
        r = head(wrong, t, x)[2][0]
        delta_m = np.linalg.norm(off_m)
        bound = matching_bound(path, t, D, abs(off_t), jnp.asarray(mean), delta_m)
        ratios.append(abs((D - r) / sigma**2 - true) / bound)
    assert 0.5 < max(ratios) <= 1


def test_an_imperfect_denoiser_biases_the_residual_head_quadratically():
    path = VP()
    _, x, alpha, sigma = state(path, 0.5)
    mean, cov = ORACLE.posterior(np.asarray(x), alpha, sigma).moments()
    off = np.random.default_rng(0).normal(size=D)
    draws = ORACLE.posterior(np.asarray(x), alpha, sigma).sample(0, 20_000)
    noise = (np.asarray(x) - alpha * draws) / sigma
    for size in (0.0, 0.5):
        m = jnp.asarray(mean + size * off)
        eps = (x - alpha * m) / sigma
        for kind, scale in (("residual", 1.0), ("preconditioned", 1 + sigma**2 / alpha**2)):
            head = TraceHead(lambda t, x, cond: x[0], kind)
            targets = jax.vmap(lambda x0, n, m=m, e=eps, h=head: h.target(x0, n, m, e))
            values = np.asarray(targets(jnp.asarray(draws), jnp.asarray(noise)))
            square = np.trace(cov) + size**2 * off @ off
            assert agrees(values, scale * alpha**2 / sigma**2 * square / D)


def test_raw_cancels_in_float32_and_residual_does_not():
    d = 64
    oracle, path, errors = GaussianMixture.random(1, 3, d, "diagonal"), VP(), {}
    single = lambda a: jnp.asarray(a, jnp.float32)  # noqa: E731
    for sigma in (0.1, 0.01):
        t = path.t_of_lam(0.5 * np.log(1 / sigma**2 - 1))
        alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
        for seed in range(10):
            x0 = oracle.sample(seed, 1)[0]
            x = alpha * x0 + sigma * np.random.default_rng(seed).normal(size=d)
            mean, cov = oracle.posterior(x, alpha, sigma).moments()
            true = d - alpha**2 / sigma**2 * np.trace(cov)
            # perfect inputs, merely rounded
            known = Denoiser(path, lambda t, x, cond, m=mean: single(m), "x0")
            saying = moments(oracle, x, alpha, sigma)
            for kind in ("raw", "residual"):
                r = head_saying(single(saying[kind]), kind)(known, single(t), single(x))[2][0]
                assert r.dtype == jnp.float32
                errors.setdefault((kind, sigma), []).append((d - float(r)) / true - 1)
    rms = {key: np.sqrt(np.mean(np.square(e))) for key, e in errors.items()}
    ratios = [rms["raw", s] / rms["residual", s] for s in sorted({s for _, s in rms})]
    assert ratios[0] > 100 and ratios[0] > 5 * ratios[1] > 5  # at sigma = .01, and at .1
    assert max(rms["residual", s] for _, s in rms) < 1e-3


@pytest.mark.slow
def test_trained_heads_at_high_signal_to_noise():
    """Same network, data and budget: the raw head is useless where the others are good."""
    rms = {}
    for kind in KINDS:
        head, denoiser = trace_heads.train_head(kind)
        for lam in (-3.0, 3.0):
            t, xs = trace_heads.states(lam, 500)

            def error(x, t=t, head=head, denoiser=denoiser):
                r, true = head(denoiser, t, x)[2][0], denoiser.posterior(t, x).residual
                return (r - true) / (x.size - true)

            rms[kind, lam] = float(jnp.sqrt(jnp.mean(jax.jit(jax.vmap(error))(xs) ** 2)))
    assert rms["raw", 3.0] > 1 and rms["preconditioned", 3.0] < 0.1 and rms["residual", 3.0] < 0.1
    # at the noise end the residual head is the coarse one
    assert 10 * rms["preconditioned", -3.0] < rms["residual", -3.0]


# --- Heads on the features of the denoiser. ------------------------------------------------------


def shaken(module, *args):
    shapes = jax.eval_shape(module.init, KEY, *args)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda a: 0.3 * rng.normal(size=a.shape).astype(a.dtype), shapes)


@pytest.mark.parametrize(
    "module,dims", [(UNet((8, 16)), (8, 8, 1)), (MLP((16, 12)), (5,))], ids=["unet", "mlp"]
)
def test_a_head_on_shared_features_is_the_head_on_separate_ones(module, dims):
    path, x = VP(), jnp.asarray(np.random.default_rng(0).normal(size=dims))
    variables = shaken(module, jnp.zeros(1), x[None])
    hidden = module.apply(variables, jnp.zeros(1), x[None], features=True)[1]
    small = TraceNet(16)
    head_variables = shaken(small, jnp.zeros(1), hidden)
    net = from_linen(module, variables)
    head = TraceHead(from_linen(small, head_variables), features=True)
    t, calls = 0.3, []
    for denoiser in (Denoiser(path, net, "v"), Denoiser(path, precondition(path, net))):
        m, eps, values = run(head, denoiser, t, x)
        np.testing.assert_allclose([m, eps], denoiser.pair(t, x), rtol=1e-5, atol=1e-6)
        clock, scale = jnp.asarray(t), 1.0
        if denoiser.predicts == "x0":
            clock = -path.lam(t) / 4
            scale = 1 / jnp.sqrt(0.25 * path.alpha(t) ** 2 + path.sigma(t) ** 2)
        hidden = module.apply(variables, clock[None], (scale * x)[None], features=True)[1]
        out = small.apply(head_variables, -path.lam(t)[None] / 4, hidden)[0]
        q = jax.nn.softplus(out + jnp.log(jnp.expm1(1.0)))
        want = x.size * path.alpha(t) ** 2 * q  # VP
        np.testing.assert_allclose(values, [want], rtol=1e-5)
        assert abs(out) > 1e-3

    class Counting(eqx.Module):
        def __call__(self, t, x, cond):
            return self.features(t, x, cond)[0]

        def features(self, t, x, cond):
            calls.append(x.shape)
            return jnp.tanh(x), x

    counted = Denoiser(path, Counting(), "eps")
    sums = TraceHead(lambda t, h, cond: jnp.sum(h), features=True)
    jax.jit(lambda x: sums(counted, t, x)).lower(x)
    assert len(calls) == 1


# --- Errors. -------------------------------------------------------------------------------------


def test_errors(as_users_see_it):
    denoiser, x = exactly(VP()), jnp.ones(D)
    network = as_network(denoiser)
    operator = fisher(network, 0.5, x)
    scalar = lambda t, x, cond: x[0]  # noqa: E731
    for call, said in [
        (lambda: Hutchinson(0), "Hutchinson: probes must be a whole number of at least 1, got 0"),
        (lambda: Hutchinson(kind="normal"), "kind must be one of 'rademacher', 'gaussian'"),
        (lambda: Hutchinson(mode="rev"), "mode must be one of 'jvp', 'fd', 'vjp', got 'rev'"),
        (lambda: Hutchinson()(network, 0.5, x), "Hutchinson: key must be a key"),
        (lambda: HutchPP(7), "HutchPP: products must be a multiple of 3, got 7"),
        (lambda: HutchPP(repeats=0), "HutchPP: repeats must be a whole number"),
        (lambda: HutchPP()(network, 0.5, x), "HutchPP: key must be a key"),
        (lambda: TraceHead(3.0), "TraceHead: net must be callable"),
        (lambda: TraceHead(scalar, "trace"), "TraceHead: kind must be one of 'preconditioned'"),
        (
            lambda: TraceHead(lambda t, x, cond: x)(network, 0.5, x),
            r"TraceHead: the output of net must be a scalar, \(\), got \(6,\)",
        ),
        (
            lambda: TraceHead(scalar, features=True)(denoiser, 0.5, x),
            "TraceHead: denoiser must be a Denoiser with a network.* got Mixture",
        ),
        (
            lambda: TraceHead(scalar, features=True)(network, 0.5, x),
            "features: net must be a network with a method features.* got function",
        ),
        (lambda: trace(operator, KEY, probes=4, kind="normal"), "trace: kind must be one of"),
        (lambda: trace(operator, KEY, probes=4, method="xtrace"), "trace: method must be one of"),
        (lambda: trace(operator, KEY, probes=1, method="hutch++"), "trace: probes must be"),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
