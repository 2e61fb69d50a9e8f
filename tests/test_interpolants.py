"""Stochastic interpolants: what is regressed, the Gaussian special case, and one law for any e."""

import functools
import math

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers import each

import jaxdiff as jd
from jaxdiff import exact
from jaxdiff._keys import SOLVER, stream
from jaxdiff.interpolants import Interpolant, Model, as_process, bridge
from jaxdiff.solvers.terms import GridBrownian

KEY = jax.random.key(4)
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
# weights, means and standard deviations of mixtures on the line: neither end is Gaussian
DATA, BASE = ([0.7, 0.3], [-1.0, 1.5], [0.45, 0.2]), ([0.5, 0.5], [-2.0, 1.0], [0.5, 0.8])
NORMAL, TARGET = ([1.0], [0.0], [1.0]), ([1.0], [2.0], [0.5])  # N(0, 1) to N(2, 1/4)


class Exact(eqx.Module):
    """b, eta and log q_t between two mixtures at one point, over pairs of components."""

    bridge: Interpolant
    data: tuple
    base: tuple

    def __call__(self, t, x):
        (a, b, g2), (da, db, dg2) = self.bridge.jet(t)
        pairs = [jnp.meshgrid(*(jnp.array(p[i]) for p in (self.data, self.base))) for i in range(3)]
        (w0, w1), (m0, m1), (s0, s1) = jax.tree.map(jnp.ravel, pairs)
        mean, var = a * m0 + b * m1, (a * s0) ** 2 + (b * s1) ** 2 + g2
        y = (x - mean) / var
        logits = jnp.log(w0 * w1) - y**2 * var / 2 - jnp.log(2 * math.pi * var) / 2
        w = jax.nn.softmax(logits)
        velocity = da * m0 + db * m1 + (a * da * s0**2 + b * db * s1**2 + dg2 / 2) * y
        return w @ velocity, jnp.sqrt(g2) * (w @ y), jax.nn.logsumexp(logits)

    def model(self):
        nets = [lambda t, x, cond, i=i: jax.vmap(lambda x: self(t, x)[i])(x) for i in (0, 1)]
        return Model(self.bridge, *nets, base=jax.random.normal)


def draws(law, n, seed):
    rng = np.random.default_rng(seed)
    k = rng.choice(len(law[0]), n, p=law[0])
    return np.array(law[1])[k] + np.array(law[2])[k] * rng.standard_normal(n)


def cdf(law, x):
    return scipy.stats.norm(law[1], law[2]).cdf(np.reshape(x, (-1, 1))) @ np.array(law[0])


class Diffusion(eqx.Module):
    """Vanishes at both ends; one program for all values."""

    level: jax.Array

    def __call__(self, t):
        return 4 * self.level * t * (1 - t)


@pytest.mark.parametrize("name", ["sqrt", "sin2"])
def test_regression_on_the_bridge_gives_the_drifts(name):
    """Residuals are orthogonal to functions of x_t, within 4 standard errors; target is dx_t/dt."""
    path, t, n = bridge("trigonometric", name, scale=0.7), jnp.asarray(0.35), 50_000
    truth = Exact(path, DATA, BASE)

    @jax.jit
    @jax.vmap
    def residuals(key, x0, x1):
        (x, velocity, z), (slope, *_) = jax.jvp(
            lambda t: path.perturb(key, t, x0, x1), (t,), (jnp.ones(()),)
        )
        b, eta, _ = truth(t, x)
        return x, velocity - b, z - eta, velocity - slope

    x, *left, defect = residuals(jax.random.split(KEY, n), draws(DATA, n, 0), draws(BASE, n, 1))
    assert np.abs(defect).max() < 1e-12
    for residual in left:
        for test in (np.ones_like(x), np.tanh(x), np.cos(2 * x)):
            product = np.asarray(residual) * test
            assert abs(product.mean()) < 4 * product.std() / n**0.5


@pytest.mark.parametrize("gamma", ["zero", "sqrt"])
def test_a_normal_base_is_a_gaussian_path(gamma):
    """b and eta of the bridge against the denoiser of the path; rates by differentiation."""
    path = as_process(bridge("trigonometric", gamma))
    truth = Exact(bridge("trigonometric", gamma), DATA, NORMAL)
    variances = np.square(DATA[2])
    denoiser = exact.mixture(path, DATA[0], np.reshape(DATA[1], (2, 1)), variances)

    @jax.jit
    def look(t):
        x, one = jnp.array([0.3]), jnp.ones(())
        b, eta, log_density = truth(t, x[0])
        scaled = jnp.sqrt(path.interpolant.jet(t)[0][2]) / path.sigma(t) * denoiser.eps(t, x)
        slopes = jax.jvp(lambda t: (path.alpha(t), path.sigma(t)), (t,), (one,))[1]
        pairs = [b, *scaled, log_density, *slopes, t]
        others = [*denoiser.velocity(t, x), eta, denoiser.log_density(t, x), *path.rates(t)]
        return jnp.stack(pairs), jnp.stack([*others, path.t_of_lam(path.lam(t))])

    for t in (0.05, 0.5, 0.98):
        np.testing.assert_allclose(*look(jnp.asarray(t)), rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(as_process(bridge()).rates(0.0), (-1, 1))  # where sigma is 0


def test_the_ode_is_the_quantile_flow_and_heun_has_order_two():
    model, x1 = Exact(bridge(), DATA, BASE).model(), np.linspace(-3.5, 3.0, 9)[:, None]
    levels, errors = cdf(BASE, x1), []
    for n in (64, 256):
        sampler = jd.sampler(model, (1,), solver=dfx.Heun(), ts=np.linspace(1, 0, n + 1))
        out = jd.sample(None, sampler, num=9, init=x1)
        assert int(out.nfe[0]) == 2 * n
        errors.append(np.sqrt(np.mean((cdf(DATA, out.x) - levels) ** 2)))
    assert 1.8 < np.log2(errors[0] / errors[1]) / 2 < 2.6 and errors[1] < 1e-4


@functools.partial(quick, static_argnums=0)
def increments(num, nodes):
    """The start and the normal draws of samples 0 to num - 1, by the rule of the streams."""

    def one(i):
        own, shape = jax.random.fold_in(KEY, i), jax.ShapeDtypeStruct((1,), float)
        path = GridBrownian(stream(own, SOLVER), nodes, shape)
        start = jax.random.normal(jax.random.fold_in(own, 0), (1,))
        return start, jax.vmap(path.normal)(jnp.arange(len(nodes) - 1))[:, 0]

    return jnp.concatenate(jax.vmap(one)(jnp.arange(num)), axis=1)


@each({"Euler-Maruyama": (dfx.Euler(), 1), "Heun": (dfx.Heun(), 2)})
def test_every_diffusion_keeps_the_law_to_the_weak_order(case):
    """N(0, 1) to N(2, 1/4): all is linear, so that least squares give the law with no error."""
    (solver, order), model = case, Exact(bridge("linear", "sqrt"), TARGET, NORMAL).model()

    @functools.partial(quick, static_argnums=1)
    def end(level, n):
        options = dict(solver=solver, ts=np.linspace(1, 0, n + 1), diffusion=Diffusion(level))
        return jd.sample(KEY, jd.sampler(model, (1,), **options), num=n + 6).x[:, 0]

    for level in (0.5, 2.0):
        errors = []
        for n in (16, 64):
            num, ts, x = n + 6, np.linspace(1, 0, n + 1), end(level, n)
            inputs = np.concatenate([np.ones((num, 1)), increments(num, 1 - ts)], axis=1)
            coefficients, *_ = np.linalg.lstsq(inputs, x)
            np.testing.assert_allclose(inputs @ coefficients, x, atol=1e-9)  # nothing else drawn
            assert abs(coefficients[0] - 2) < 1e-10  # the score is 0 on the straight mean
            errors.append(abs(np.sum(coefficients[1:] ** 2) - 0.25))
        assert order - 0.25 < np.log2(errors[0] / errors[1]) / 2 < order + 0.4
        assert errors[1] < (0.03 if order == 1 else 0.003)


def test_every_diffusion_has_the_marginals_of_the_bridge():
    """At t = 1/2 and at the data, within 4 standard errors; bimodal ends."""
    n, steps, failures = 4000, 64, []
    truth, x1 = Exact(bridge("linear", "sqrt"), DATA, BASE), draws(BASE, n, 7)[:, None]
    ts = 0.5 + 0.5 * np.cos(np.linspace(0, np.pi, steps + 1))  # gamma bends at the ends
    xs = np.linspace(-8, 8, 4001)
    density = jax.jit(jax.vmap(lambda t, x: jnp.exp(truth(t, x)[2]), (None, 0)))
    options = dict(solver=dfx.Heun(), ts=ts, trajectory=True)
    for level in (0.0, 0.5, 2.0):
        e = 0.0 if level == 0 else Diffusion(jnp.asarray(level))
        sampler = jd.sampler(truth.model(), (1,), diffusion=e, **options)
        out = jd.sample(KEY, sampler, num=n, init=x1)
        for node in (steps // 2, steps):
            x = np.asarray(out.aux["trajectory"])[:, node, 0]
            weights = density(ts[node], xs) * (xs[1] - xs[0])
            for test in (lambda x: x, np.square, lambda x: np.cos(2 * x)):
                error = (test(x).mean() - weights @ test(xs)) / (test(x).std() / n**0.5)
                failures += [(level, node, float(error))] if abs(error) > 4 else []
    assert failures == []


def test_keys_chunks_conditions_and_slopes():
    nets = [lambda t, x, cond: cond["shift"] - x, lambda t, x, cond: jnp.tanh(t * x)]
    model = Model(bridge("linear", "sqrt"), *nets, base=jax.random.normal)
    shift, ts = np.random.default_rng(2).standard_normal((7, 2, 3)), np.linspace(0.95, 0.05, 5)
    options = dict(ts=ts, solver=dfx.Euler(), diffusion=0.3, trajectory=True)
    sampler = jd.sampler(model, (2, 3), **options)
    shift[6] = np.nan  # the other samples do not notice

    def many(rows, num, **more):
        return jd.sample(KEY, sampler, num=num, cond={"shift": shift[rows]}, **more)

    out = many(slice(None), 7, chunk=3)
    assert out.aux["trajectory"].shape == (7, 5, 2, 3) and out.nfe.tolist() == [4] * 7
    np.testing.assert_array_equal(out.aux["trajectory"][:, -1], out.x)
    np.testing.assert_array_equal(many(slice(3, 6), 3, start=3, chunk=3).x, out.x[3:6])
    own = jax.random.fold_in(KEY, 4)

    @quick
    @functools.partial(jax.value_and_grad, has_aux=True)
    def go(s):
        one = sampler(own, {"shift": s})
        return one.x.sum(), one

    ((_, one), slope), x1 = go(shift[4]), np.asarray(out.aux["trajectory"][4, 0])
    np.testing.assert_allclose(one.x, out.x[4], rtol=1e-13)
    struct = jax.ShapeDtypeStruct((2, 3), float)  # the first step by hand
    z = GridBrownian(stream(own, SOLVER), jnp.asarray(1 - ts), struct).normal(0)
    gamma, h = np.sqrt(2 * 0.95 * 0.05), ts[0] - ts[1]
    drift = shift[4] - x1 + 0.3 / gamma * np.tanh(0.95 * x1)
    step = np.asarray(one.aux["trajectory"][1]) - x1
    np.testing.assert_allclose(step, -h * drift + np.sqrt(0.6 * h) * z, rtol=1e-9)
    finite = (go(shift[4] + 1e-5)[0][0] - go(shift[4] - 1e-5)[0][0]) / 2e-5
    assert float(slope.sum()) == pytest.approx(float(finite), rel=1e-7)
    with pytest.raises(RuntimeError, match="1 of 7 samples failed, first at index 6"):
        jd.check(out)


TS, zero = np.linspace(1, 0, 5), lambda t, x, cond: 0 * x
NETS = Model(bridge("linear", "sqrt"), zero, zero, base=jax.random.normal)


def run(model=NETS, ts=TS, solver=None, diffusion=None, **more):
    sampler = jd.sampler(model, (1,), ts=ts, solver=solver or dfx.Heun(), diffusion=diffusion)
    return jd.sample(KEY, sampler, num=2, **more)


ERRORS = {
    "end": (lambda: Interpolant(lambda t: 1 - t, jnp.cos, jnp.zeros_like), "beta .* got 1.0"),
    "gamma": (lambda: bridge(gamma="cubic"), "one of 'zero', 'sqrt', 'sin2', got 'cubic'"),
    "snr": (lambda: as_process(bridge(gamma="sin2", scale=5.0)), "decreasing log-SNR"),
    "output": (lambda: Model(bridge(), lambda t, x, c: x[:1]).drift(0.5, jnp.ones(2)), "of b .*1,"),
    "solver": (lambda: run(solver=jd.solvers.Heun()), "solver .* for ODEs"),
    "for SDEs": (lambda: run(solver=dfx.Tsit5(), ts=TS[1:-1], diffusion=1.0), "solver .* for SDEs"),
    "dips": (lambda: run(diffusion=lambda t: t - 1), "got -0.25 at t = 0.75"),
    "no eta": (lambda: run(Model(bridge(), zero), diffusion=0.1), "without eta, got 0.1"),
    "no gamma": (lambda: run(diffusion=0.1), "0 where gamma is 0.* got 0.1 at t = 1.0"),
    "init": (lambda: run(init=np.zeros(2)), r"init must be of shape \(2, 1\), got shape \(2,\)"),
    "base": (lambda: run(Model(bridge(), zero)), "init must be given"),
    "cond": (lambda: run(cond=jnp.zeros(3)), "leading axis num=2"),
}


@each(ERRORS)
def test_errors_name_the_argument_and_the_value(case, as_users_see_it):
    call, message = case
    with pytest.raises(ValueError, match=message):
        call()
