"""The Fisher operators against the Hessian of the log-density, in float64 and float32."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from helpers import PROCESSES

import jaxdiff as jd
from jaxdiff import exact
from jaxdiff.fisher import fisher, posterior_cov, solve, trace

D = 6
RNG = np.random.default_rng(0)
FACTORS = RNG.normal(size=(4, D, D)) / 3
MEANS = RNG.normal(size=(4, D))
WEIGHTS = RNG.uniform(0.2, 1.0, 4)
ATOMS = RNG.normal(size=(50, D))


def denoisers(path):
    full = FACTORS @ FACTORS.swapaxes(1, 2) + 0.02 * np.eye(D)
    return {
        "full": exact.mixture(path, WEIGHTS, MEANS, full),
        "shared": exact.mixture(path, WEIGHTS, MEANS, full[:1]),
        "diagonal": exact.mixture(path, WEIGHTS, MEANS, RNG.uniform(0.01, 1.0, (4, D))),
        "atoms": exact.empirical(path, ATOMS, chunk=16),
    }


def state(path, lam, seed=0):
    """A time of the given log-SNR, and a sample of the path there."""
    t = path.t_of_lam(lam)
    noise = np.random.default_rng(seed).normal(size=D)
    return t, path.alpha(t) * ATOMS[seed] + path.sigma(t) * noise


def relative(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("kind", ["full", "shared", "diagonal", "atoms"])
@pytest.mark.parametrize("lam", [-3.0, 0.0, 2.0])
def test_every_method_is_the_hessian(kind, lam):
    path = PROCESSES["VP"]
    denoiser = denoisers(path)[kind]
    t, x = state(path, lam)
    hessian = -jax.hessian(lambda x: denoiser.log_density(t, x))(x)
    for method, tolerance in (("exact", 1e-10), ("jvp", 1e-10), ("fd", 1e-5)):
        matrix = jax.jit(
            lambda x, method=method: (
                fisher(denoiser, t, x, method=method).as_matrix()
                if method != "fd"
                else jax.vmap(fisher(denoiser, t, x, method=method).mv)(jnp.eye(D)).T
            )
        )(x)
        # of F, or of its isotropic part where the posterior covariance cancels almost all of it
        scale = max(np.linalg.norm(hessian), float(1 / path.sigma(t) ** 2))
        assert np.linalg.norm(matrix - hessian) < tolerance * scale, method


@pytest.mark.parametrize("name", ["VE", "EDM", "Rectified", "Cosine", "SubVP"])
def test_the_fisher_is_the_hessian_on_every_path(name):
    path = PROCESSES[name]
    denoiser = denoisers(path)["full"]
    t, x = state(path, 0.5)
    hessian = -jax.hessian(lambda x: denoiser.log_density(t, x))(x)
    assert relative(fisher(denoiser, t, x, method="exact").as_matrix(), hessian) < 1e-10


@pytest.mark.parametrize("kind", ["full", "atoms"])
def test_posterior_covariance_is_that_of_reweighted_atoms_and_of_second_order_tweedie(kind):
    path = PROCESSES["VP"]
    denoiser = denoisers(path)[kind]
    t, x = state(path, 0.7)
    cov = posterior_cov(denoiser, t, x).as_matrix()
    tweedie = path.sigma(t) ** 2 / path.alpha(t) * jax.jacobian(lambda x: denoiser(t, x))(x)
    assert relative(cov, tweedie) < 1e-10
    assert np.linalg.eigvalsh(cov).min() > -1e-12
    network = jd.Denoiser(path, lambda t, x, cond: denoiser.eps(t, x), "eps")
    assert relative(posterior_cov(network, t, x).as_matrix(), tweedie) < 1e-10
    if kind == "atoms":
        logits = -0.5 * np.sum((np.asarray(x) - float(path.alpha(t)) * ATOMS) ** 2, 1)
        logits = logits / float(path.sigma(t)) ** 2
        w = np.exp(logits - logits.max())
        assert relative(cov, np.cov(ATOMS.T, aweights=w, ddof=0)) < 1e-10


def test_float32_keeps_five_digits():
    path = PROCESSES["VP"]
    for kind, denoiser in denoisers(path).items():
        for lam in (-2.0, 0.0, 1.5):
            t, x = state(path, lam)
            low = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (denoiser, t, x))
            t, x = low[1].astype(float), low[2].astype(float)
            wide = jax.tree.map(lambda a: jnp.asarray(a, float), low[0])
            want = fisher(wide, t, x, method="exact").as_matrix()
            got = fisher(*low, method="exact").as_matrix()
            assert got.dtype == jnp.float32
            scale = max(np.linalg.norm(want), float(1 / path.sigma(t) ** 2))
            assert np.linalg.norm(got - want) < 1e-5 * scale, (kind, lam)


def test_tags_are_only_what_is_true():
    path = PROCESSES["VP"]
    denoiser = denoisers(path)["full"]
    t, x = state(path, 0.0)
    exactly, by_jvp = (fisher(denoiser, t, x, method=m) for m in ("exact", "jvp"))
    assert lx.is_symmetric(exactly) and not lx.is_positive_semidefinite(exactly)
    assert not lx.is_symmetric(by_jvp)
    assert lx.is_positive_semidefinite(posterior_cov(denoiser, t, x))
    assert not lx.is_positive_semidefinite(posterior_cov(denoiser, t, x, method="jvp"))


def test_a_network_jacobian_its_transpose_and_its_symmetric_part():
    path = PROCESSES["VP"]
    w = RNG.normal(size=(D, D))
    network = jd.Denoiser(path, lambda t, x, cond: jnp.tanh(w @ x), "eps")
    t, x = state(path, 0.0)
    jacobian = jax.jacobian(lambda x: network.eps(t, x))(x) / path.sigma(t)
    operator = fisher(network, t, x)
    np.testing.assert_allclose(operator.as_matrix(), jacobian, rtol=1e-12)
    np.testing.assert_allclose(operator.transpose().as_matrix(), jacobian.T, rtol=1e-12)
    symmetric = fisher(network, t, x, symmetrise=True)
    np.testing.assert_allclose(symmetric.as_matrix(), (jacobian + jacobian.T) / 2, rtol=1e-12)
    assert lx.is_symmetric(symmetric)


def test_trace_exact_and_by_probes():
    path = PROCESSES["VP"]
    denoiser = denoisers(path)["full"]
    t, x = state(path, 0.3)
    operator = fisher(denoiser, t, x)
    truth = np.trace(operator.as_matrix())
    value, error = trace(operator)
    np.testing.assert_allclose(value, truth, rtol=1e-12)
    assert error == 0
    value, error = trace(operator, jax.random.key(0), probes=400)
    assert 0 < error < 0.1 * abs(truth) and abs(value - truth) < 4 * error


def test_trace_of_images():
    path = PROCESSES["VP"]
    denoiser = exact.empirical(path, ATOMS.reshape(50, 2, 3))
    t, x = state(path, 0.3)
    flat = exact.empirical(path, ATOMS)
    want = trace(fisher(flat, t, x, method="exact"))[0]
    got = trace(fisher(denoiser, t, x.reshape(2, 3), method="exact"))[0]
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("method, shift", [("exact", 0.1), ("jvp", 0.1), ("exact", 0.0)])
def test_solve_leaves_no_residual(method, shift):
    path = PROCESSES["VP"]
    denoiser = denoisers(path)["full"]
    t, x = state(path, 0.3)
    v = jnp.arange(1.0, D + 1)
    cov = posterior_cov(denoiser, t, x, method=method)
    s = jax.jit(lambda v: solve(cov, v, shift=shift, rtol=1e-10, atol=1e-12))(v)
    dense = cov.as_matrix() + shift * np.eye(D)
    np.testing.assert_allclose(s, np.linalg.solve(dense, v), rtol=1e-6)


def test_a_failed_solve_is_nan_and_does_not_raise():
    path = PROCESSES["VP"]
    t, x = state(path, 0.3)
    cov = posterior_cov(denoisers(path)["full"], t, x)
    assert np.isnan(solve(cov, jnp.ones(D), max_steps=1, rtol=1e-12, atol=1e-12)).all()


def test_grad_and_vmap_through_a_product():
    path = PROCESSES["VP"]
    denoiser = denoisers(path)["full"]
    t, x = state(path, 0.3)
    xs, v = jnp.stack([x, x + 0.1]), jnp.ones(D)
    many = jax.vmap(lambda x: fisher(denoiser, t, x, method="exact").mv(v))(xs)
    one = fisher(denoiser, t, xs[1], method="exact").mv(v)
    np.testing.assert_allclose(many[1], one, rtol=1e-12)
    slope = lambda m: jax.grad(lambda x: fisher(denoiser, t, x, method=m).mv(v).sum())(x)  # noqa: E731
    np.testing.assert_allclose(slope("exact"), slope("jvp"), rtol=1e-8)


def test_errors(as_users_see_it):
    path = PROCESSES["VP"]
    network = jd.Denoiser(path, lambda t, x, cond: x, "eps")
    x = jnp.ones(D)
    for call, said in [
        (lambda: fisher(network, 0.5, x, method="exact"), "fisher: method must be 'jvp' or 'fd'"),
        (lambda: fisher(network, 0.5, x, method="hessian"), "method must be one of 'jvp', 'fd'"),
        (lambda: fisher(network, 0.5, x, method="fd", symmetrise=True), "symmetrise must be False"),
        (lambda: trace(fisher(network, 0.5, x), probes=4), "trace: key must be a key"),
        (lambda: trace(fisher(network, 0.5, x), jax.random.key(0), probes=1), "probes must be"),
        (lambda: posterior_cov(lambda t, x: x, 0.5, x), "posterior_cov: denoiser must be"),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
