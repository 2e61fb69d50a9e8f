"""Endpoint and trace models of the posterior covariance: definitions, bounds, what they keep."""

import functools

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from helpers import PROCESSES
from oracles import GaussianMixture

from jaxdiff import exact
from jaxdiff.fisher.endpoint import (
    endpoint_bound,
    endpoint_cov,
    fisher_of,
    gated_cov,
    isotropic_cov,
)
from jaxdiff.fisher.operators import fisher, posterior_cov
from jaxdiff.linalg.diag_low_rank import DiagLowRank

D = 6
VP = PROCESSES["VP"]
RNG = np.random.default_rng(0)
ATOMS = RNG.normal(size=(40, D))
ATOMIC = exact.empirical(VP, ATOMS)


def state(lam, seed=0, n=None):
    """A time, samples of the path there and clean samples to serve as endpoints."""
    rng = np.random.default_rng(seed)
    t = VP.t_of_lam(lam)
    size = (D,) if n is None else (n, D)
    x0, y = (ATOMS[rng.integers(40, size=size[:-1])] for _ in range(2))
    return t, VP.alpha(t) * x0 + VP.sigma(t) * rng.normal(size=size), jnp.asarray(y)


def dense_posterior(t, x, atoms=ATOMS):
    """Weights, mean and covariance of the atoms given x, in NumPy."""
    alpha, sigma = float(VP.alpha(t)), float(VP.sigma(t))
    logits = -0.5 * np.sum((np.asarray(x) - alpha * atoms) ** 2, 1) / sigma**2
    w = np.exp(logits - logits.max())
    w /= w.sum()
    m = w @ atoms
    return w, m, (atoms - m).T @ (w[:, None] * (atoms - m))


def test_both_endpoint_models_are_their_definitions():
    t, x, y = state(0.3)
    _, m, _ = dense_posterior(t, x)
    raw, centred = (endpoint_cov(ATOMIC, t, x, y, kind=k) for k in ("raw", "centred"))
    want = np.outer(y, y) - np.outer(m, m)
    np.testing.assert_allclose(raw.as_matrix(), want, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(centred.as_matrix(), np.outer(y - m, y - m), rtol=1e-10, atol=1e-12)
    v = jnp.arange(1.0, D + 1)
    np.testing.assert_allclose(raw.mv(v), raw.as_matrix() @ v, rtol=1e-12)
    default = endpoint_cov(ATOMIC, t, x, y)
    np.testing.assert_array_equal(default.as_matrix(), centred.as_matrix())
    assert lx.is_symmetric(raw) and not lx.is_positive_semidefinite(raw)
    assert lx.is_positive_semidefinite(centred)
    assert np.linalg.eigvalsh(raw.as_matrix())[0] < 0  # and rightly so


def test_a_known_mean_costs_no_evaluation():
    t, x, y = state(0.3)

    class Counting(exact.Empirical):
        def pair(self, t, x, cond=None):
            raise AssertionError("evaluated")

    counting = Counting(VP, ATOMIC.atoms, ATOMIC.log_weights, ATOMIC.centre, ATOMIC.shape)
    m = ATOMIC(t, x)
    for call in (
        lambda d, **o: endpoint_cov(d, t, x, y, **o),
        lambda d, **o: endpoint_cov(d, t, x, y, kind="raw", **o),
        lambda d, **o: gated_cov(d, t, x, y, 1.0, **o),
    ):
        np.testing.assert_array_equal(call(counting, m=m).as_matrix(), call(ATOMIC).as_matrix())
        with pytest.raises(AssertionError, match="evaluated"):
            call(counting)


def test_the_fisher_of_any_covariance():
    t, x, y = state(0.3)
    snr, scale = float(VP.snr(t)), float(VP.sigma(t)) ** 2
    eye = np.eye(D)
    models = [
        endpoint_cov(ATOMIC, t, x, y, kind="raw"),
        gated_cov(ATOMIC, t, x, y, 2.0, sigma_lo=0.1),
        isotropic_cov(VP, t, 2.0, x),
        lx.MatrixLinearOperator(jnp.asarray(RNG.normal(size=(D, D)))),
    ]
    for cov in models:
        got = fisher_of(cov, VP, t)
        want = eye / scale - snr / scale * np.asarray(cov.as_matrix())
        np.testing.assert_allclose(got.as_matrix(), want, rtol=1e-10, atol=1e-10)
        assert lx.is_symmetric(got) == lx.is_symmetric(cov)
        assert isinstance(got, DiagLowRank) == isinstance(cov, DiagLowRank)
        assert not lx.is_positive_semidefinite(got)
    exactly = fisher_of(posterior_cov(ATOMIC, t, x), VP, t).as_matrix()
    want = fisher(ATOMIC, t, x, method="exact").as_matrix()
    np.testing.assert_allclose(exactly, want, rtol=1e-10, atol=1e-10)


def test_the_bound_holds_and_is_not_idle():
    ratios = {"raw": [], "centred": []}
    model = jax.jit(
        lambda kind, t, x, y: fisher_of(
            endpoint_cov(ATOMIC, t, x, y, kind=kind), VP, t
        ).as_matrix(),
        static_argnums=0,
    )
    for lam in np.linspace(-2, 2, 10):
        t, xs, ys = state(lam, seed=int(100 + 10 * lam), n=20)
        snr, scale = float(VP.snr(t)), float(VP.sigma(t)) ** 2
        for x, y in zip(xs, ys, strict=True):
            _, m, cov = dense_posterior(t, x)
            truth = np.eye(D) / scale - snr / scale * cov
            bound = endpoint_bound(VP, t, np.linalg.norm(cov, 2), y, m)
            for kind in ratios:
                error = np.linalg.norm(model(kind, t, x, y) - truth, 2)
                ratios[kind].append(float(error / bound))
    assert len(ratios["raw"]) == 200
    assert 0.5 < max(ratios["raw"]) <= 1 and max(ratios["centred"]) <= 1
    assert max(ratios["centred"]) > 0.5


def test_draws_of_the_posterior_have_the_covariance_as_their_mean():
    t, x, _ = state(-0.5)
    w, m, cov = dense_posterior(t, x)
    n = 20_000
    ys = jnp.asarray(ATOMS[np.random.default_rng(3).choice(40, size=n, p=w)])
    for kind in ("centred", "raw"):
        one = lambda y, kind=kind: endpoint_cov(ATOMIC, t, x, y, kind=kind, m=m).as_matrix()  # noqa: E731
        draws = np.asarray(jax.vmap(one)(ys))
        error = draws.std(0, ddof=1) / n**0.5
        assert np.all(np.abs(draws.mean(0) - cov) < 4 * error + 1e-12), kind
        assert np.max(error) < 0.05 * np.max(np.abs(cov))


def test_only_the_centred_model_does_not_see_the_origin():
    t, xs, _ = state(-0.5, n=30)
    errors = {"centred": [], "raw": []}
    for i, x in enumerate(xs):
        w, m, cov = dense_posterior(t, x)
        y = ATOMS[np.random.default_rng(i).choice(40, p=w)]
        for kind, found in errors.items():
            here, there = (
                endpoint_cov(ATOMIC, t, x, y + c, kind=kind, m=m + c).as_matrix()
                for c in (0.0, 5.0)
            )
            if kind == "centred":
                np.testing.assert_allclose(there, here, rtol=1e-12, atol=1e-13)
            found.append([np.sum((a - cov) ** 2) for a in (here, there)])
    here, there = np.sqrt(np.mean(errors["raw"], axis=0))
    assert there > 5 * here
    # the denoiser of the shifted data moves its mean along
    moved = exact.empirical(VP, ATOMS + 5)
    a = endpoint_cov(moved, t, xs[0] + 5 * VP.alpha(t), ATOMS[0] + 5).as_matrix()
    b = endpoint_cov(ATOMIC, t, xs[0], ATOMS[0]).as_matrix()
    np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", ["raw", "centred"])
def test_exact_where_the_posterior_is_one_atom(kind):
    t, x, y = VP.t_of_lam(4.0), None, jnp.asarray(ATOMS[3])
    x = VP.alpha(t) * y + VP.sigma(t) * np.random.default_rng(5).normal(size=D)
    _, m, cov = dense_posterior(t, x)
    assert np.max(np.abs(cov)) < 1e-15
    got = fisher_of(endpoint_cov(ATOMIC, t, x, y, kind=kind), VP, t).as_matrix()
    scale = float(VP.sigma(t)) ** 2
    np.testing.assert_allclose(np.asarray(got) * scale, np.eye(D), atol=1e-10)
    assert endpoint_bound(VP, t, np.linalg.norm(cov, 2), y, m) * scale < 1e-10
    # a density never collapses: there the model misses all of R = (1 - o(1)) I
    smooth = GaussianMixture.random(0, 2, D)
    truth = smooth.fisher(np.asarray(x), float(VP.alpha(t)), float(VP.sigma(t)))
    assert np.linalg.norm(np.asarray(got) - truth, 2) * scale > 0.5


@pytest.mark.parametrize("name", ["VP", "EDM", "Rectified"])
def test_the_trace_is_kept(name):
    path = PROCESSES[name]
    denoiser = exact.empirical(path, ATOMS)
    for lam, seed, r in [
        (-2.0, 0, 0.3),
        (-1.0, 1, 3.0),
        (-0.5, 2, 1e-3),
        (1.0, 3, 2.0),
        (-1, 4, 0),
    ]:
        t = path.t_of_lam(lam)
        rng = np.random.default_rng(seed)
        x = path.alpha(t) * ATOMS[0] + path.sigma(t) * rng.normal(size=D)
        snr = float(path.snr(t))
        for sigma_lo in (0.0, 0.9, 1.0):
            y = jnp.asarray(ATOMS[seed])
            gated = gated_cov(denoiser, t, x, y, r, sigma_lo=sigma_lo)
            R = snr * np.asarray(gated.as_matrix())
            np.testing.assert_allclose(np.trace(R), r, rtol=1e-10, atol=1e-14)
            assert np.linalg.eigvalsh(R)[0] > -1e-12
            relative_sigma = float(path.sigma(t) / jnp.hypot(path.alpha(t), path.sigma(t)))
            flat = isotropic_cov(path, t, r, x)
            np.testing.assert_allclose(snr * np.trace(flat.as_matrix()), r, rtol=1e-12)
            below = relative_sigma < sigma_lo
            assert np.allclose(gated.as_matrix(), flat.as_matrix(), rtol=1e-12) == (below or r == 0)


def test_the_endpoint_has_its_share_and_no_more():
    t, x, y = state(-1.0)
    m, snr = np.asarray(ATOMIC(t, x)), float(VP.snr(t))
    e = np.asarray(y) - m
    rho = snr * e @ e
    ample = snr * np.asarray(gated_cov(ATOMIC, t, x, y, 2 * rho, sigma_lo=0.5).as_matrix())
    want = rho / D * np.eye(D) + snr * np.outer(e, e)
    np.testing.assert_allclose(ample, want, rtol=1e-10, atol=1e-12)
    scarce = snr * np.asarray(gated_cov(ATOMIC, t, x, y, rho / 2, sigma_lo=0.5).as_matrix())
    np.testing.assert_allclose(scarce, snr * np.outer(e, e) / 2, rtol=1e-10, atol=1e-12)
    # an estimate of the trace may be negative: then all of it is isotropic
    negative = snr * np.asarray(gated_cov(ATOMIC, t, x, y, -0.6, sigma_lo=0.5).as_matrix())
    np.testing.assert_allclose(negative, -0.1 * np.eye(D), rtol=1e-10, atol=1e-12)
    # an endpoint on the mean claims nothing, and leaves no 0/0 in the derivative either
    loss = lambda y: jnp.sum(gated_cov(ATOMIC, t, x, y, 0.6, m=m, sigma_lo=0.5).mv(jnp.ones(D)))  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(m))
    np.testing.assert_allclose(snr * value, 0.6, rtol=1e-10)
    assert np.all(np.isfinite(gradient))


@pytest.mark.slow
def test_the_gated_model_is_the_best_of_them_for_the_adjoint_of_ddim():
    d, steps, draws = 16, 50, 32
    rng = np.random.default_rng(0)
    denoiser, target = exact.empirical(VP, rng.normal(size=(64, d))), rng.normal(size=d)
    ts = jnp.linspace(1.0, 1e-3, steps + 1)
    alpha, sigma = jax.vmap(VP.alpha)(ts), jax.vmap(VP.sigma)(ts)
    decay = sigma[1:] / sigma[:-1]
    gain = alpha[1:] - alpha[:-1] * decay
    rows = (ts[:-1], decay, gain, gain * alpha[:-1] / sigma[:-1] ** 2)
    models = {
        "exact": lambda t, x, y, m, r: posterior_cov(denoiser, t, x),
        "raw": lambda t, x, y, m, r: endpoint_cov(denoiser, t, x, y, m=m, kind="raw"),
        "centred": lambda t, x, y, m, r: endpoint_cov(denoiser, t, x, y, m=m),
        "zero": lambda t, x, y, m, r: isotropic_cov(VP, t, 0.0, x),
        "isotropic": lambda t, x, y, m, r: isotropic_cov(VP, t, r, x),
        "gated": lambda t, x, y, m, r: gated_cov(denoiser, t, x, y, r, m=m),
    }

    def adjoints(x):
        def forward(x, row):
            t, decay, gain, _ = row
            known = denoiser.posterior(t, x)
            return decay * x + gain * known.mean, (x, known.mean, known.residual)

        y, states = jax.lax.scan(forward, x, rows)

        def backward(adjoint, inputs):
            (t, decay, _, scale), (x, m, r) = inputs
            cov = {name: model(t, x, y, m, r) for name, model in models.items()}
            return {k: decay * a + scale * cov[k].mv(a) for k, a in adjoint.items()}, None

        start = dict.fromkeys(models, y - target)  # of half the squared distance from the target
        return jax.lax.scan(backward, start, (rows, states), reverse=True)[0]

    out = jax.jit(jax.vmap(adjoints))(jnp.asarray(rng.normal(size=(draws, d))))
    true, size = np.asarray(out["exact"]), lambda a: np.linalg.norm(a, axis=1)
    cosine = {k: np.median(np.sum(a * true, 1) / size(a) / size(true)) for k, a in out.items()}
    length = {k: abs(np.median(np.log10(size(a) / size(true)))) for k, a in out.items()}
    others = ("raw", "centred", "zero", "isotropic")
    assert cosine["gated"] > max(cosine[k] for k in others) + 0.01
    assert length["gated"] < min(0.1, *(length[k] for k in others))


MODELS = {
    "raw": lambda t, x, y: endpoint_cov(ATOMIC, t, x, y, kind="raw"),
    "centred": lambda t, x, y: endpoint_cov(ATOMIC, t, x, y),
    "isotropic": lambda t, x, y: isotropic_cov(VP, t, jnp.sum(x**2), x),
    "gated": lambda t, x, y: gated_cov(ATOMIC, t, x, y, jnp.sum(x**2), sigma_lo=0.5),
}


@pytest.mark.parametrize("name", MODELS)
def test_jit_vmap_grad_over_times_on_both_sides_of_the_gate(name):
    ts = jnp.stack([VP.t_of_lam(lam) for lam in (-1.0, 1.5)])
    _, x, y = state(0.0)
    v = jnp.asarray(RNG.normal(size=D))

    def value(t, x, y):
        return jnp.sum(fisher_of(MODELS[name](t, x, y), VP, t).mv(v) ** 2)

    both = jax.jit(jax.vmap(value, (0, None, None)))(ts, x, y)
    np.testing.assert_allclose(both, [value(t, x, y) for t in ts], rtol=1e-10)
    gradient = jax.jit(jax.vmap(jax.grad(value, (0, 1, 2)), (0, None, None)))(ts, x, y)
    for argument in (0, 1, 2):
        args = [ts[0], x, y]
        direction = jnp.asarray(RNG.normal(size=np.shape(args[argument])))
        ends = []
        for sign in (1, -1):
            moved = list(args)
            moved[argument] = moved[argument] + sign * 1e-6 * direction
            ends.append(value(*moved))
        slope = (ends[0] - ends[1]) / 2e-6
        got = jnp.sum(gradient[argument][0] * direction)
        np.testing.assert_allclose(got, slope, rtol=1e-5, atol=1e-6)


def test_images():
    t, x, y = state(-1.0)
    image = exact.empirical(VP, ATOMS.reshape(40, 2, 3))
    v = jnp.arange(1.0, D + 1)
    for call in (
        lambda d, x, y: endpoint_cov(d, t, x, y, kind="raw"),
        lambda d, x, y: endpoint_cov(d, t, x, y),
        lambda d, x, y: isotropic_cov(VP, t, 2.0, x),
        lambda d, x, y: gated_cov(d, t, x, y, 2.0, sigma_lo=0.5),
    ):
        flat = fisher_of(call(ATOMIC, x, y), VP, t).mv(v)
        whole = fisher_of(call(image, x.reshape(2, 3), y.reshape(2, 3)), VP, t)
        got = whole.mv(v.reshape(2, 3))
        assert got.shape == (2, 3)
        np.testing.assert_allclose(got.reshape(-1), flat, rtol=1e-12)
    m = ATOMIC(t, x)
    np.testing.assert_allclose(
        endpoint_bound(VP, t, 0.3, y.reshape(2, 3), m.reshape(2, 3)),
        endpoint_bound(VP, t, 0.3, y, m),
        rtol=1e-12,
    )


def test_float32(defaults):
    low = exact.empirical(VP, jnp.asarray(ATOMS))
    t = VP.t_of_lam(-1.0)
    x, y = jnp.asarray(ATOMS[0]), jnp.asarray(ATOMS[1])
    calls = (
        lambda d, x, y: endpoint_cov(d, t, x, y, kind="raw"),
        lambda d, x, y: gated_cov(d, t, x, y, 2.0, sigma_lo=0.5),
    )
    found = [call(low, x, y) for call in calls]
    assert all(a.dtype == jnp.float32 for f in found for a in (f.shift, f.factors, f.weights))
    matrices = [fisher_of(f, VP, t).as_matrix() for f in found]
    assert all(a.dtype == jnp.float32 for a in matrices)
    jax.config.update("jax_enable_x64", True)
    t = t.astype(float)
    for call, got in zip(calls, matrices, strict=True):
        want = fisher_of(call(ATOMIC, ATOMS[0], ATOMS[1]), VP, t).as_matrix()
        assert np.linalg.norm(got - want) < 2e-6 * np.linalg.norm(want)


def test_errors_name_what_was_given(as_users_see_it):
    t, x, y = state(0.0)
    cov = functools.partial(endpoint_cov, ATOMIC, t, x)
    for call, said in [
        (lambda: cov(y, kind="published"), "endpoint_cov: kind must be .*got 'published'"),
        (lambda: cov(y[:3]), r"endpoint_cov: y must be of the shape of x, \(6,\), got \(3,\)"),
        (lambda: cov(y, m=y[:2]), r"endpoint_cov: m must be .*, got \(2,\)"),
        (lambda: endpoint_cov(lambda t, x: x, t, x, y), "denoiser must be a jaxdiff denoiser"),
        (lambda: gated_cov(ATOMIC, t, x, y[:3], 1.0), r"gated_cov: y must be .*got \(3,\)"),
        (lambda: gated_cov(ATOMIC, t, x, y, 1.0, sigma_lo=1.5), "sigma_lo must be .*got 1.5"),
        (lambda: endpoint_bound(VP, t, 1.0, y, y[:3]), r"endpoint_bound: y must be .*got \(6,\)"),
    ]:
        with pytest.raises(ValueError, match=said):
            call()


def test_the_trace_must_be_one_number(as_users_see_it):
    with pytest.raises(ValueError, match=r"isotropic_cov: r must be one number.*got \(2,\)"):
        isotropic_cov(PROCESSES["VP"], 0.3, jnp.ones(2), jnp.ones(4))
