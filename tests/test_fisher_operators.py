"""The Fisher operators against the Hessian of the log-density, in float64 and float32."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from helpers import PROCESSES
from oracles import GaussianMixture

import jaxdiff as jd
from jaxdiff import exact
from jaxdiff.fisher.operators import fisher, posterior_cov, solve
from jaxdiff.linalg.estimators import diagonal, trace

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
        matrix = jax.jit(lambda x, m=method: fisher(denoiser, t, x, method=m).as_matrix())(x)
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
        (lambda: fisher(network, 0.5, x, method="exact"), "fisher: method must be 'jvp', 'fd' or"),
        (lambda: fisher(network, 0.5, x, method="hessian"), "method must be one of 'jvp', 'fd'"),
        (lambda: fisher(network, 0.5, x, method="fd", symmetrise=True), "symmetrise must be False"),
        (lambda: trace(fisher(network, 0.5, x), probes=4), "trace: key must be a key"),
        (lambda: trace(fisher(network, 0.5, x), jax.random.key(0), probes=1), "probes must be"),
        (lambda: posterior_cov(lambda t, x: x, 0.5, x), "posterior_cov: denoiser must be"),
        (
            lambda: posterior_cov(network, 0.5, x, method="neighbours", rank=2),
            "not built from data",
        ),
        (lambda: fisher(network, 0.5, x, method="lanczos"), r"rank \(with method='lanczos'\) must"),
        (lambda: fisher(network, 0.5, x, rank=3), "fisher: rank must be None for method='jvp'"),
        (lambda: diagonal(fisher(network, 0.5, x), probes=4), "diagonal: key must be a key"),
        (lambda: diagonal(fisher(network, 0.5, x), jax.random.key(0), probes=1), "probes must be"),
    ]:
        with pytest.raises(ValueError, match=said):
            call()


def test_the_trace_identities_of_the_oracle():
    """Section 8.2: (2), (3), (5), (6) and tr F of an independent mixture, to 1e-10."""
    path = PROCESSES["VP"]
    oracle = GaussianMixture.random(3, 4, D)
    denoiser = exact.mixture(path, oracle.weights, oracle.means, oracle.covs)
    for lam in (-1.0, 1.0, 3.0):
        t, x = state(path, lam)
        alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
        truth = oracle.fisher(x, alpha, sigma)
        cov = oracle.posterior_cov(x, alpha, sigma)
        operator = fisher(denoiser, t, x, method="exact")
        assert relative(operator.as_matrix(), truth) < 1e-10
        by_jvp = fisher(denoiser, t, x, method="jvp")
        scale = D / sigma**2
        for value in (trace(operator)[0], trace(by_jvp)[0], jnp.sum(diagonal(operator)[0])):
            assert abs(value - np.trace(truth)) < 1e-10 * scale
        r = (alpha / sigma) ** 2 * np.trace(cov)
        assert abs((D - r) / sigma**2 - np.trace(truth)) < 1e-10 * scale
        assert relative(posterior_cov(denoiser, t, x).as_matrix(), cov) < 1e-10


def test_symmetrised_covariance_of_a_network():
    path = PROCESSES["VP"]
    w = RNG.normal(size=(D, D))
    network = jd.Denoiser(path, lambda t, x, cond: jnp.tanh(w @ x), "eps")
    t, x = state(path, 0.0)
    jacobian = jax.jacobian(lambda x: network(t, x))(x) * path.sigma(t) ** 2 / path.alpha(t)
    operator = posterior_cov(network, t, x, symmetrise=True)
    np.testing.assert_allclose(
        operator.as_matrix(), (jacobian + jacobian.T) / 2, rtol=1e-10, atol=1e-12
    )
    assert lx.is_symmetric(operator) and not lx.is_positive_semidefinite(operator)


@pytest.mark.parametrize("method", ["exact", "jvp"])
def test_diagonal_exact_and_by_probes(method):
    path = PROCESSES["VP"]
    denoiser = exact.empirical(path, ATOMS.reshape(50, 2, 3))
    t, x = state(path, -0.5)
    operator = fisher(denoiser, t, x.reshape(2, 3), method=method)
    want = np.diag(operator.as_matrix()).reshape(2, 3)
    value, error = diagonal(operator)
    np.testing.assert_allclose(value, want, rtol=1e-12)
    assert not np.any(error)
    key = jax.random.key(1)
    value, error = jax.jit(lambda key: diagonal(operator, key, probes=400))(key)
    assert value.shape == (2, 3) and np.all(np.abs(value - want) < 4 * error)
    off = operator.as_matrix() - np.diag(np.diag(operator.as_matrix()))
    predicted = np.sqrt(np.sum(off**2, axis=1) / 400).reshape(2, 3)
    np.testing.assert_allclose(error, predicted, rtol=0.2)


def test_conjugate_gradients_in_48_dimensions():
    """Section 9.9: a shifted Fisher, solved to 1e-11 of the dense solution in about 11 steps."""
    path, d = PROCESSES["VP"], 48
    rng = np.random.default_rng(1)
    atoms = rng.normal(size=(24, d))
    denoiser = exact.empirical(path, atoms, chunk=8)
    t = path.t_of_lam(-1.0)
    x = path.alpha(t) * atoms[0] + path.sigma(t) * rng.normal(size=d)
    operator, v = fisher(denoiser, t, x, method="exact"), rng.normal(size=d)
    dense = operator.as_matrix()
    delta = 0.5 - min(0.0, np.linalg.eigvalsh(dense)[0])
    shifted = lx.FunctionLinearOperator(
        lambda v: operator.mv(v) + delta * v,
        operator.in_structure(),
        lx.positive_semidefinite_tag,
    )
    want = np.linalg.solve(dense + delta * np.eye(d), v)
    out = lx.linear_solve(shifted, jnp.asarray(v), lx.CG(rtol=1e-10, atol=1e-10))
    assert relative(out.value, want) < 1e-11 and out.stats["num_steps"] <= 14
    assert relative(solve(shifted, v, rtol=1e-10, atol=1e-10), want) < 1e-11
    assert relative(solve(operator, v, shift=delta, rtol=1e-10, atol=1e-10), want) < 1e-8  # GMRES


@pytest.mark.slow
@pytest.mark.parametrize("method", ["exact", "jvp"])
def test_derivatives_with_respect_to_the_state(method):
    path = PROCESSES["VP"]
    denoiser = denoisers(path)["full"]
    t, x = state(path, 0.3)
    v = jnp.arange(1.0, D + 1) / D
    operators = {
        "product": lambda x: jnp.sum(fisher(denoiser, t, x, method=method).mv(v) ** 2),
        "diagonal": lambda x: jnp.sum(diagonal(fisher(denoiser, t, x, method=method))[0] ** 2),
        "cg or gmres": lambda x: jnp.sum(
            solve(posterior_cov(denoiser, t, x, method=method), v, shift=1.0, rtol=1e-11)
        ),
        "gmres": lambda x: jnp.sum(
            solve(fisher(denoiser, t, x, method=method), v, shift=9.0, rtol=1e-11)
        ),
    }
    h = 1e-5
    for name, fn in operators.items():
        want = (fn(x + h * v) - fn(x - h * v)) / (2 * h)
        got = jax.jit(jax.grad(fn))(x) @ v
        np.testing.assert_allclose(got, want, rtol=1e-5, err_msg=name)
        both = jax.vmap(fn)(jnp.stack([x, x + v]))
        np.testing.assert_allclose(both, [fn(x), fn(x + v)], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("method", ["exact", "jvp"])
def test_a_failed_solve_has_nan_derivatives_and_does_not_raise(method):
    path = PROCESSES["VP"]
    t, x = state(path, 0.3)
    cov = posterior_cov(denoisers(path)["full"], t, x, method=method)
    slope = jax.jit(jax.grad(lambda v: jnp.sum(solve(cov, v, max_steps=1, rtol=1e-12))))
    assert np.all(np.isnan(slope(jnp.arange(1.0, D + 1))))


def test_a_difference_solves_and_has_forward_derivatives():
    path = PROCESSES["VP"]
    t, x = state(path, 0.3)
    v = jnp.arange(1.0, D + 1) / D
    full = denoisers(path)["full"]
    operator = lambda x, method: fisher(full, t, x, method=method)  # noqa: E731
    want = solve(operator(x, "exact"), v, shift=5.0, rtol=1e-10)
    np.testing.assert_allclose(solve(operator(x, "fd"), v, shift=5.0), want, rtol=1e-4)


@pytest.mark.parametrize("lowest", [0.5, 1e-3])
@pytest.mark.parametrize("t", [0.02, 0.3])
def test_solve_in_float32_at_every_scale_of_the_operator(lowest, t, defaults):
    d, path = 784, PROCESSES["VP"]
    denoiser = exact.gaussian(path, jnp.zeros(d), jnp.linspace(lowest, 1, d))
    v = jnp.asarray(np.random.default_rng(0).normal(size=d), jnp.float32)
    cov = posterior_cov(denoiser, t, jnp.zeros(d))
    residual = cov.mv(solve(cov, v)) - v
    assert jnp.linalg.norm(residual) < 1e-3 * jnp.linalg.norm(v)


def test_no_operator_is_named(as_users_see_it):
    for call in (trace, lambda a: solve(a, jnp.ones(3))):
        with pytest.raises(ValueError, match="operator must be a lineax linear operator, got A"):
            call(jnp.eye(3))
