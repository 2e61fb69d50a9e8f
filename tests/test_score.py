"""The denoiser: five views of one object, whatever the network predicts, and the adapters."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from flax import linen
from helpers import PROCESSES, each_process
from oracles import GaussianMixture

import jaxdiff as jd
from jaxdiff import exact, score
from jaxdiff.process import EDM, VP, AbstractProcess, Cosine, Rectified
from jaxdiff.score import PREDICTIONS, Denoiser

each_prediction = pytest.mark.parametrize("predicts", PREDICTIONS)
VIEWS = {
    "x0": Denoiser.__call__,
    "eps": Denoiser.eps,
    "score": Denoiser.score,
    "v": Denoiser.v,
    "velocity": Denoiser.velocity,
}
X = np.random.default_rng(3).standard_normal((4, 3))


def times(path):
    """Five times of log-SNR between -3 and 3."""
    return [float(path.t_of_lam(lam)) for lam in np.linspace(-3.0, 3.0, 5)]


def numbers(path, t):
    return [float(a) for a in (path.alpha(t), path.sigma(t), path.f(t), path.g2(t))]


def field(path, t, x):
    """A known posterior mean and everything that follows from it, by the definitions."""
    alpha, sigma, f, g2 = numbers(path, t)
    m = np.tanh(x[..., ::-1] + 0.3 * x + np.cos(t))
    eps = (x - alpha * m) / sigma
    return {
        "x0": m,
        "eps": eps,
        "score": -eps / sigma,
        "v": alpha * eps - sigma * m,
        "velocity": f * x - 0.5 * g2 * (-eps / sigma),  # the probability-flow ODE
    }


class Known(eqx.Module):
    """A network of one prediction kind whose field is the known one."""

    path: object
    kind: str = eqx.field(static=True)

    def __call__(self, t, x, cond=None):
        p, sigma = self.path, self.path.sigma(t)
        m = jnp.tanh(x[..., ::-1] + 0.3 * x + jnp.cos(t))
        eps = (x - p.alpha(t) * m) / sigma
        match self.kind:
            case "x0":
                return m
            case "eps":
                return eps
            case "score":
                return -eps / sigma
            case "v":
                return p.alpha(t) * eps - sigma * m
        return p.f(t) * x + 0.5 * p.g2(t) * eps / sigma


# --- Conversions. --------------------------------------------------------------------------------


@each_process
@each_prediction
def test_all_views_of_every_prediction(path, predicts):
    denoiser = Denoiser(path, Known(path, predicts), predicts)

    @jax.jit
    def views(t, x):
        return {
            kind: jax.vmap(view, (None, None, 0))(denoiser, t, x) for kind, view in VIEWS.items()
        }

    for t in times(path):
        expected = field(path, t, X)
        for kind, got in views(t, X).items():
            scale = np.abs(expected[kind]).max()
            np.testing.assert_allclose(
                got, expected[kind], rtol=0, atol=1e-12 * scale, err_msg=kind
            )


@each_process
@each_prediction
def test_float32_stays_float32(path, predicts):
    denoiser = Denoiser(path, Known(path, predicts), predicts)
    t, x = np.float32(times(path)[2]), X[0].astype(np.float32)
    expected = field(path, float(t), x.astype(np.float64))

    def every(t, x):
        return {kind: view(denoiser, t, x) for kind, view in VIEWS.items()}

    for kind, got in jax.jit(every)(t, x).items():
        assert got.dtype == np.float32, kind
        scale = np.abs(expected[kind]).max()
        np.testing.assert_allclose(got, expected[kind], atol=3e-5 * scale, err_msg=kind)
    for time in (float(t), np.float64(t)):  # the dtype is that of x, whatever the time is
        shapes = jax.eval_shape(lambda x, time=time: every(time, x), x)
        assert {a.dtype for a in shapes.values()} == {np.dtype(np.float32)}


@each_prediction
def test_the_network_s_own_output_passes_unchanged(predicts):
    for t in (0.0, 0.37, 1.0):  # including the ends, where a round trip would divide by zero
        denoiser = Denoiser(Rectified(), lambda t, x, cond: jnp.sin(3 * x), predicts)
        np.testing.assert_array_equal(VIEWS[predicts](denoiser, t, X[0]), jnp.sin(3 * X[0]))


@pytest.mark.parametrize("predicts", ["v", "velocity"])
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_v_and_velocity_are_finite_at_both_ends(predicts, t):
    # At t = 0 x is the data and at t = 1 it is the noise, whatever the network says.
    denoiser = Denoiser(Rectified(), lambda t, x, cond: 0.5 * x + 1.0, predicts)
    clean, noise = denoiser.pair(t, X[0])
    np.testing.assert_allclose(clean if t == 0 else noise, X[0], rtol=1e-15)
    slope = jax.jacfwd(lambda t: jnp.stack(denoiser.pair(t, X[0])))(t)
    assert np.all(np.isfinite(slope)) and np.all(np.isfinite([clean, noise]))


@each_process
def test_the_exact_mixture_through_every_view(path):
    """Posterior mean by conditioning, score by autodiff of the density: two separate oracles."""
    mixture = GaussianMixture.random(0, 3, 2)
    x = np.array([0.4, -0.7])
    for t in times(path)[::2]:
        alpha, sigma = numbers(path, t)[:2]
        y = alpha * x
        mean, grad = mixture.posterior_mean(y, alpha, sigma), mixture.score(y, alpha, sigma)
        denoiser = Denoiser(path, lambda t, x, cond, mean=mean: jnp.asarray(mean))
        np.testing.assert_allclose(denoiser.score(t, y), grad, rtol=1e-9, atol=1e-9)
        backward = Denoiser(path, lambda t, x, cond, grad=grad: jnp.asarray(grad), "score")
        np.testing.assert_allclose(backward(t, y), mean, rtol=1e-9, atol=1e-9)


# --- The oracle itself. --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["isotropic", "diagonal", "full"])
def test_the_oracle_agrees_with_itself(kind):
    mixture = GaussianMixture.random(1, 3, 2, kind)
    alpha, sigma, x = 0.8, 0.7, np.array([0.5, -0.3])
    density = mixture.log_density(jnp.asarray(x), alpha, sigma)
    np.testing.assert_allclose(mixture.log_prob(x, alpha, sigma), density, rtol=1e-12)
    mean, cov = mixture.posterior_mean(x, alpha, sigma), mixture.posterior_cov(x, alpha, sigma)
    np.testing.assert_allclose(
        mixture.score(x, alpha, sigma), (alpha * mean - x) / sigma**2, rtol=1e-10
    )
    fisher = np.eye(2) / sigma**2 - alpha**2 / sigma**4 * cov
    np.testing.assert_allclose(mixture.fisher(x, alpha, sigma), fisher, rtol=1e-9, atol=1e-9)


def test_the_oracle_agrees_with_quadrature_and_with_its_samples():
    mixture = GaussianMixture.isotropic([1, 3], [[-1.0], [2.0]], [0.3, 0.0])  # one Dirac
    alpha, sigma, x = 0.8, 0.7, 0.4
    prior = scipy.stats.norm(-1.0, 0.3**0.5).pdf

    def lik(x0):
        return scipy.stats.norm.pdf(x, alpha * x0, sigma)

    raw = [
        0.25 * scipy.integrate.quad(lambda z, k=k: z**k * prior(z) * lik(z), -6, 6)[0]
        + 0.75 * 2.0**k * lik(2.0)
        for k in range(3)
    ]
    mean = raw[1] / raw[0]
    np.testing.assert_allclose(mixture.log_prob([x], alpha, sigma), np.log(raw[0]), rtol=1e-9)
    np.testing.assert_allclose(mixture.posterior_mean([x], alpha, sigma), [mean], rtol=1e-9)
    np.testing.assert_allclose(
        mixture.posterior_cov([x], alpha, sigma), [[raw[2] / raw[0] - mean**2]], rtol=1e-8
    )
    n, wide = 20_000, GaussianMixture.random(2, 3, 2)
    draws, (mean, cov) = wide.sample(0, n), wide.moments()
    error = np.sqrt(np.diag(cov) / n)
    assert np.all(np.abs(draws.mean(0) - mean) < 4.5 * error)  # standard errors
    centred = draws - mean
    products = centred[:, :, None] * centred[:, None, :]
    assert np.all(np.abs(products.mean(0) - cov) < 4.5 * products.std(0) / n**0.5)


# --- jit, vmap, grad. ----------------------------------------------------------------------------


@each_prediction
def test_transformations(predicts):
    path = VP()
    denoiser = Denoiser(path, Known(path, predicts), predicts)
    ts = jnp.array(times(path))[:4]
    single = [denoiser(t, x) for t, x in zip(ts, X, strict=True)]
    np.testing.assert_allclose(
        jax.vmap(denoiser)(ts, jnp.asarray(X)), jnp.stack(single), rtol=1e-13
    )
    np.testing.assert_allclose(jax.jit(denoiser)(ts[0], X[0]), single[0], rtol=1e-12)
    jac = jax.jacrev(lambda x: denoiser(ts[1], x))(jnp.asarray(X[1]))
    x, h = X[1], 1e-5
    for j, e in enumerate(np.eye(3) * h):
        up, down = (field(path, float(ts[1]), x + s * e)["x0"] for s in (1, -1))
        np.testing.assert_allclose(jac[:, j], (up - down) / (2 * h), atol=1e-8)


def test_the_gradient_reaches_parameters_of_net_and_process():
    class Scale(eqx.Module):
        scale: jax.Array

        def __call__(self, t, x, cond):
            return self.scale * x

    def loss(denoiser):
        return jnp.sum(denoiser(0.5, jnp.ones(3)))

    denoiser = Denoiser(VP(), Scale(jnp.array(0.5)), "eps")
    grads = jax.grad(loss)(denoiser)
    alpha, sigma = numbers(VP(), 0.5)[:2]
    np.testing.assert_allclose(grads.net.scale, -3 * sigma / alpha, rtol=1e-12)
    h = 1e-3
    ends = [loss(Denoiser(VP(beta_max=20 + d), Scale(jnp.array(0.5)), "eps")) for d in (h, -h)]
    np.testing.assert_allclose(grads.process.beta_max, (ends[0] - ends[1]) / (2 * h), rtol=1e-6)


def test_cond_reaches_the_net():
    seen = []
    denoiser = Denoiser(VP(), lambda t, x, cond: (seen.append(cond), x)[1])
    for view in VIEWS.values():
        view(denoiser, 0.5, X[0], {"label": 3})
    assert seen == [{"label": 3}] * len(VIEWS)


def test_the_net_sees_a_time_of_the_dtype_of_x():
    seen = []

    def net(t, x, cond):
        return (seen.append((t.dtype, t.shape, float(t))), x)[1]

    Denoiser(PROCESSES["Discrete"], net, "eps").eps(7, X[0].astype(np.float32))
    Denoiser(VP(), net, "eps").eps(np.float32(0.5), X[0])
    assert seen == [(np.float32, (), 7.0), (np.float64, (), 0.5)]


# --- Errors. -------------------------------------------------------------------------------------


def test_integer_samples_become_floating(as_users_see_it):
    denoiser = Denoiser(VP(), lambda t, x, cond: 0.5 * x, "eps")
    for x in (np.array([1, 2]), jnp.array([1, 2])):
        got = denoiser(1, x)
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, denoiser(1.0, np.array([1.0, 2.0])), rtol=1e-12)


@each_prediction
@pytest.mark.parametrize("wrong", [lambda x: x[:2], lambda x: x[None], jnp.sum])
def test_a_net_of_another_shape_is_refused(predicts, wrong):
    denoiser = Denoiser(VP(), lambda t, x, cond: wrong(x), predicts)
    shape = np.shape(wrong(X[0]))
    for call in (denoiser, denoiser.score, denoiser.velocity, jax.jit(denoiser)):
        with pytest.raises(ValueError) as error:
            call(0.5, X[0])
        assert f"Denoiser: the output of net must be of the shape of x, (3,), got {shape}" in str(
            error.value
        )


@pytest.mark.parametrize(
    "args,parts",
    [
        ((VP(), lambda t, x, c: x, "noise"), ["predicts", "'eps'", "'noise'"]),
        ((VP(), lambda t, x, c: x, None), ["predicts", "None"]),
        (("vp", lambda t, x, c: x), ["process", "'vp'"]),
        ((VP, lambda t, x, c: x), ["process", "VP"]),
        ((VP(), 3.5), ["net", "callable", "3.5"]),
        ((VP(), None), ["net", "callable", "None"]),
    ],
)
def test_wrong_parts_are_refused(as_users_see_it, args, parts):
    with pytest.raises(ValueError) as error:
        Denoiser(*args)
    for part in ["Denoiser: ", *parts]:
        assert part in str(error.value)


# --- Preconditioning. ----------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.002, 0.3, 80.0])
@pytest.mark.parametrize("sd", [0.5, 1.7])
def test_precondition_is_table_1_of_karras(sigma, sd):
    def inner(t, x, cond):
        return jnp.cos(x) + t + cond

    net = score.precondition(EDM(), inner, sd)
    skip = sd**2 / (sigma**2 + sd**2)
    out = sigma * sd / np.sqrt(sd**2 + sigma**2)
    scale = 1 / np.sqrt(sigma**2 + sd**2)
    expected = skip * X[0] + out * (np.cos(scale * X[0]) + np.log(sigma) / 4 + 0.25)
    np.testing.assert_allclose(net(sigma, jnp.asarray(X[0]), 0.25), expected, rtol=1e-12)
    denoiser = Denoiser(EDM(), net)
    np.testing.assert_allclose(denoiser(sigma, X[0], 0.25), expected, rtol=1e-12)


@each_process
@pytest.mark.parametrize("sd", [0.5, 1.0])
def test_input_and_target_have_unit_variance_and_the_target_is_fresh(path, sd):
    for t in times(path):
        alpha, sigma = numbers(path, t)[:2]
        skip, out, scale, noise = (float(c) for c in score.edm_coefficients(path, t, sd))
        # x = alpha x0 + sigma eps with Var x0 = sd^2; target = (x0 - skip x) / out.
        a, b = (1 - skip * alpha) / out, -skip * sigma / out
        assert scale**2 * (alpha**2 * sd**2 + sigma**2) == pytest.approx(1, rel=1e-12)
        assert a**2 * sd**2 + b**2 == pytest.approx(1, rel=1e-10)
        assert a * alpha * sd**2 + b * sigma == pytest.approx(0, abs=1e-10)  # cov(target, x)
        assert noise == pytest.approx(np.log(sigma / alpha) / 4, abs=1e-12)


def test_precondition_keeps_float32():
    seen = []

    def inner(t, x, cond):
        return (seen.append((t.dtype, x.dtype)), x)[1]

    x = jnp.asarray(X[0], np.float32)
    for t in (0.5, np.float32(0.5), np.float64(0.5)):
        assert score.precondition(Cosine(), inner)(t, x).dtype == np.float32
    assert set(seen) == {(np.dtype(np.float32), np.dtype(np.float32))}


# --- Adapters. -----------------------------------------------------------------------------------


def batched(t, x, cond):
    out = t[:, None] * jnp.sin(x)
    return out if cond is None else out + cond["shift"][:, None] * cond["scale"]


def test_from_batched_is_the_batched_net():
    net = score.from_batched(batched)
    ts, x = jnp.linspace(0.1, 0.9, 4), jnp.asarray(X)
    np.testing.assert_array_equal(jax.vmap(net)(ts, x), batched(ts, x, None))
    cond = {"shift": jnp.arange(4.0), "scale": jnp.ones((4, 3))}
    np.testing.assert_array_equal(jax.vmap(net)(ts, x, cond), batched(ts, x, cond))
    labels = score.from_batched(lambda t, x, cond: x + cond[:, None])
    np.testing.assert_array_equal(labels(0.5, x[0], 2), x[0] + 2)


def test_from_batched_gives_the_net_one_axis():
    shapes = []

    def net(t, x, cond):
        shapes.append((t.shape, x.shape, cond.shape))
        return x

    score.from_batched(net)(0.5, jnp.ones((2, 3)), jnp.ones(5))
    assert shapes == [((1,), (1, 2, 3), (1, 5))]


def test_a_bfloat16_net_is_cast_in_and_out():
    seen = []

    def net(t, x, cond):
        seen.append((t.dtype, x.dtype, cond))
        return x * x

    x = jnp.array([1.0, 3.0, 1 + 2.0**-12], np.float32)
    out = score.from_batched(net, dtype=jnp.bfloat16)(np.float32(0.3), x)
    assert seen == [(np.float32, jnp.bfloat16, None)]  # time keeps its digits
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, [1.0, 9.0, 1.0])
    denoiser = Denoiser(VP(), score.from_batched(net, dtype=jnp.bfloat16), "eps")
    assert denoiser(np.float32(0.3), x).dtype == np.float32


def linen_net():
    from flax import linen as nn

    class Net(nn.Module):
        width: int = 3

        @nn.compact
        def __call__(self, t, x, cond=None, train=True):
            out = nn.Dense(self.width)(x) * t[:, None]
            out = out if cond is None else out + cond[:, None]
            return 100 * out if train else out

    module = Net()
    variables = [module.init(jax.random.key(s), jnp.ones(1), jnp.ones((1, 3))) for s in (0, 1)]
    return module, variables


def nnx_nets():
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(3, 3, rngs=rngs)

        def __call__(self, t, x, cond=None):
            out = self.dense(x) * t[:, None]
            return out if cond is None else out + cond[:, None]

    return [Net(nnx.Rngs(seed)) for seed in (0, 1)]


def test_from_linen():
    module, (variables, _) = linen_net()
    net = score.from_linen(module, variables, train=False)
    ts, x, cond = jnp.linspace(0.1, 0.9, 4), jnp.asarray(X), jnp.arange(4.0)
    for extra in ((), (cond,)):
        direct = module.apply(variables, ts, x, *extra, train=False)
        np.testing.assert_allclose(jax.vmap(net)(ts, x, *extra), direct, rtol=1e-6)
    low = score.from_linen(module, variables, train=False, dtype=jnp.bfloat16)
    assert low(ts[0], x[0]).dtype == np.float64


def test_from_nnx():
    model, _ = nnx_nets()
    net = score.from_nnx(model)
    ts, x, cond = jnp.linspace(0.1, 0.9, 4), jnp.asarray(X), jnp.arange(4.0)
    for extra in ((), (cond,)):
        np.testing.assert_allclose(jax.vmap(net)(ts, x, *extra), model(ts, x, *extra), rtol=1e-6)
    kernel = [leaf for leaf in jax.tree.leaves(net) if leaf.ndim == 2]
    assert len(kernel) == 1  # the parameters are leaves of the net
    assert score.from_nnx(model, dtype=jnp.bfloat16)(ts[0], x[0]).dtype == np.float64


def retrace(build):
    """Number of traces of a jitted denoiser over networks with different parameters."""
    count, outs = 0, []

    @eqx.filter_jit
    def run(denoiser, t, x):
        nonlocal count
        count += 1
        return denoiser(t, x)

    for seed in (0, 1):
        outs.append(run(Denoiser(VP(), build(seed), "eps"), jnp.array(0.5), jnp.asarray(X[0])))
    assert not np.allclose(*outs)
    return count


def test_new_linen_parameters_do_not_retrace():
    module, variables = linen_net()
    assert retrace(lambda seed: score.from_linen(module, variables[seed], train=False)) == 1


def test_new_nnx_parameters_do_not_retrace():
    models = nnx_nets()
    assert retrace(lambda seed: score.from_nnx(models[seed])) == 1


# --- Features. -----------------------------------------------------------------------------------


def featured_linen():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, t, x, cond=None, train=True, features=False):
            h = jnp.sin(linen.Dense(5)(x) * t[:, None])
            h = h if cond is None else h + cond[:, None]
            out = linen.Dense(3)(h) * (100 if train else 1)
            return (out, {"last": h}) if features else out

    module = Net()
    return module, module.init(jax.random.key(0), jnp.ones(1), jnp.ones((1, 3)))


@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_features_come_with_the_pair(predicts, kind):
    path, t, x, cond = VP(), 0.4, jnp.asarray(X[0]), 2.0
    if kind == "linen":
        module, variables = featured_linen()
        net = score.from_linen(module, variables, train=False)
        direct = lambda t, x, c: module.apply(  # noqa: E731
            variables, t[None], x[None], c[None], train=False, features=True
        )
    else:
        from flax import nnx

        class Net(nnx.Module):
            def __init__(self, rngs):
                self.dense = nnx.Linear(3, 3, rngs=rngs)

            def __call__(self, t, x, cond=None, features=False):
                h = jnp.sin(x + t[:, None])
                out = self.dense(h) + cond[:, None]
                return (out, {"last": h}) if features else out

        model = Net(nnx.Rngs(0))
        net = score.from_nnx(model)
        direct = lambda t, x, c: model(t[None], x[None], c[None], features=True)  # noqa: E731
    denoiser = Denoiser(path, net, predicts)
    m, eps, hidden = eqx.filter_jit(denoiser.features)(t, x, cond)
    np.testing.assert_allclose([m, eps], denoiser.pair(t, x, cond), rtol=1e-12)
    want = direct(jnp.asarray(t), x, jnp.asarray(cond))[1]["last"][0]
    assert hidden["last"].shape == want.shape and np.any(want)
    np.testing.assert_allclose(hidden["last"], want, rtol=1e-12)
    low = score.from_linen(module, variables, dtype=jnp.bfloat16) if kind == "linen" else net
    assert low.features(jnp.asarray(t), x, cond)[1]["last"].dtype == x.dtype


def test_features_through_preconditioning_are_those_of_the_inner_net():
    path, t, x = Cosine(), 0.3, jnp.asarray(X[0])
    net = score.from_linen(*featured_linen(), train=False)
    denoiser = Denoiser(path, score.precondition(path, net, 0.7))
    m, eps, hidden = denoiser.features(t, x)
    np.testing.assert_allclose([m, eps], denoiser.pair(t, x), rtol=1e-12)
    _, _, scale, noise = score.edm_coefficients(path, t, 0.7)
    want = net.features(noise, scale * x, None)[1]["last"]
    np.testing.assert_allclose(hidden["last"], want, rtol=1e-12)


def test_a_net_without_features_says_how_to_give_it_some(as_users_see_it):
    path, x = VP(), jnp.asarray(X[0])
    plain = "features: net must be a network with a method features"
    module, (variables, _) = linen_net()
    for net, said in [
        (lambda t, x, cond: x, plain),
        (score.from_batched(batched), plain),
        (score.precondition(path, lambda t, x, cond: x), plain),
        (score.from_linen(module, variables), "takes features=True .* got .*Net.__call__"),
        (score.from_nnx(nnx_nets()[0]), "features: module must be a module that takes"),
    ]:
        with pytest.raises(ValueError, match=said):
            Denoiser(path, net).features(0.5, x)


class Affine(eqx.Module):
    linear: eqx.nn.Linear

    def __call__(self, t, x, cond):
        return t * self.linear(x)


def test_new_equinox_parameters_do_not_retrace():
    def build(seed):
        linear = eqx.nn.Linear(3, 3, key=jax.random.key(seed))
        return score.precondition(VP(), Affine(linear))

    assert retrace(build) == 1


def test_from_linen_refuses_what_it_cannot_keep_pure():
    module = linen.Dense(2)
    variables = module.init(jax.random.key(0), jnp.zeros((1, 2)))
    for args, kwargs, said in [
        ((variables, module), {}, "module must be a flax.linen module"),
        ((module, variables["params"]), {}, 'variables must be a mapping with "params"'),
        ((module, variables), {"rngs": {"dropout": jax.random.key(1)}}, "rngs must be a plain"),
        ((module, variables), {"mutable": ["batch_stats"]}, "mutable must be a plain"),
    ]:
        with pytest.raises(ValueError, match=said):
            score.from_linen(*args, **kwargs)


def test_one_time_at_a_time(as_users_see_it):
    denoiser = Denoiser(VP(), lambda t, x, cond: x, "eps")
    with pytest.raises(ValueError, match=r"t must be one time.* got \(2,\)"):
        denoiser.eps(jnp.ones(2), jnp.ones(2))


# --- Where a denoiser is defined. ----------------------------------------------------------------


class Halved(score.AbstractDenoiser):
    """What a user may write: a denoiser around another, deep in a field."""

    inner: dict
    process: AbstractProcess

    def pair(self, t, x, cond=None):
        m, eps = self.inner["net"][0].pair(t, x, cond)
        return m / 2, eps / 2


def truth(t, x):
    """The pair of N(2, 9) on the straight path, and what each network is to say."""
    alpha, sigma = 1 - t, t
    total = 9 * alpha**2 + sigma**2
    m, eps = 2 + 9 * alpha * (x - 2 * alpha) / total, sigma * (x - 2 * alpha) / total
    scores = -(x - 2 * alpha) / total
    v, velocity = alpha * eps - sigma * m, eps - m
    return (m, eps), {"x0": m, "eps": eps, "score": scores, "v": v, "velocity": velocity}


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_a_network_is_defined_at_the_ends_that_it_says(kind):
    x = np.array([1.5, -4.0])
    for t, needs in ((0.0, "needs_noise"), (1.0, "needs_signal")):
        pair, says = truth(t, x)
        denoiser = Denoiser(Rectified(), lambda t, x, cond: jnp.asarray(says[kind]), kind)  # noqa: B023
        with np.errstate(all="ignore"):
            got = np.array(denoiser.pair(t, x))
        right = np.allclose(got, np.array(pair), rtol=1e-12, atol=1e-12)
        assert right == (not getattr(denoiser, needs))
        assert np.all(np.isfinite(got)) == right
        wrapper = Halved({"net": [denoiser]}, Rectified())
        assert getattr(wrapper, needs) == getattr(denoiser, needs)
        assert getattr(Halved({"net": [wrapper]}, Rectified()), needs) == (not right)
    nested = Denoiser(Rectified(), denoiser.velocity, "velocity")  # a bound method is a child too
    assert nested.needs_signal == denoiser.needs_signal
    assert nested.needs_noise == denoiser.needs_noise


@pytest.mark.parametrize("covariance", [9.0, 0.0])
@pytest.mark.parametrize("kind", ["gaussian", "empirical"])
def test_exact_denoisers_are_defined_at_the_ends_that_they_say(kind, covariance):
    x, path = np.array([1.5, -4.0]), Rectified()
    if kind == "gaussian":
        denoiser = exact.gaussian(path, np.full(2, 2.0), covariance)
    else:
        denoiser = exact.empirical(path, 2 + covariance * np.array([[1.0, 0.0], [-1.0, 0.0]]))
    assert not denoiser.needs_signal
    np.testing.assert_allclose(denoiser.pair(1.0, x), [np.full(2, 2.0), x], rtol=1e-12)
    got = np.array(denoiser.pair(0.0, x))
    assert np.all(np.isfinite(got)) == (not denoiser.needs_noise)
    assert denoiser.needs_noise == (kind == "empirical" or covariance == 0)
    if not denoiser.needs_noise:
        np.testing.assert_allclose(got, [x, np.zeros(2)], atol=1e-12)


def test_a_wrapper_of_a_noise_prediction_is_refused_where_there_is_no_signal(as_users_see_it):
    path = Rectified()
    options = dict(solver=jd.solvers.DDIM(), ts=[1.0, 0.5])
    for kind, refused in (("eps", True), ("score", True), ("v", False), ("x0", False)):
        inner = Denoiser(path, lambda t, x, cond: 0.1 * x, kind)
        for model in (inner, Halved({"net": [inner]}, path)):
            if not refused:
                assert np.all(
                    np.isfinite(jd.sampler(model, (2,), **options)(None, init=np.ones(2)).x)
                )
                continue
            expected = r"sampler: ts\[0\] must be a time with alpha > 0"
            with pytest.raises(ValueError, match=expected):
                jd.sampler(model, (2,), **options)
