"""PFGM++: the law of its kernel, its exact denoiser, and solvers that run on it unchanged."""

import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats

import jaxdiff as jd
from jaxdiff import exact, fisher, flow_map, mcmc, pfgm, phase, train, tuning
from jaxdiff.process import EDM, AbstractProcess
from jaxdiff.score import AbstractDenoiser, Denoiser
from jaxdiff.solvers import Heun

KEY = jax.random.key(5)
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
P = np.array([0.5, 0.3, 0.2])
LINE = np.array([[-1.2], [0.3], [1.5]])
PLANE = np.array([[-1.2, 0.4], [0.3, -0.9], [1.5, 1.1]])


@functools.partial(quick, static_argnums=(1, 2))
def draws(D, n, dims):
    """Noise that `perturb` adds to float32 zeros at time 2, in units of sigma."""
    process = pfgm.PFGMpp(D=D)
    one = lambda key: process.perturb(key, 2.0, jnp.zeros(dims, jnp.float32))  # noqa: E731
    x, eps = jax.vmap(one)(jax.random.split(KEY, n))
    return eps, jnp.abs(x - 2 * eps).max()


# --- The kernel. ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n_dims,D", [(2, 8.0), (3072, 0.5)])
def test_the_radius_has_its_law(n_dims, D):
    n = 20_000 if n_dims == 2 else 1000
    eps, difference = map(np.asarray, draws(jnp.asarray(D), n, (n_dims,)))
    assert difference == 0
    radius2 = np.mean(np.float64(eps) ** 2, axis=1)  # the ratio of two chi-squares: Fisher's F
    assert np.all(np.isfinite(radius2)) and np.all(radius2 > 0)
    for values, law in ((radius2, scipy.stats.f(n_dims, D)), (eps[:, 0], scipy.stats.t(D))):
        statistic = scipy.stats.ks_1samp(values, law.cdf).statistic
        assert statistic < 1.95 / n**0.5  # exceeded with probability 0.001
    if D == 8:  # E R^2 = r^2 N / (D - 2)
        assert abs(2 * radius2.mean() - D * 2 / (D - 2)) < 4 * 2 * radius2.std() / n**0.5
    if D == 0.5:  # b = R^2/(R^2 + r^2) is within 1e-13 of 1, and nothing is clipped
        assert radius2.max() > 1e10


def test_the_prior_is_the_kernel_at_zero():
    process = pfgm.PFGMpp(D=3.0)
    want = process.perturb(KEY, 20.0, jnp.zeros(3))[0]
    np.testing.assert_allclose(process.prior(KEY, (3,), t=20.0), want, rtol=1e-12)
    x = np.array([0.7, -30.0, 4.0])
    log_prob = quick(lambda D: pfgm.PFGMpp(D=D).prior_log_prob(x, t=2.0))
    for D in (0.1, 8.0, 1e5):
        want = scipy.stats.multivariate_t.logpdf(x, shape=4 * np.eye(3), df=D)
        assert float(log_prob(D)) == pytest.approx(want, abs=1e-9)


# --- The exact denoiser. -------------------------------------------------------------------------


@eqx.filter_jit
def views(model, t, x):
    """Everything that a denoiser says."""
    return *model.pair(t, x), model.score(t, x), model.log_density(t, x)


@quick
def field(D, r, x):
    """The ratio of the two parts of the Poisson field of PLANE in 2 + D dimensions."""

    def log_potential(x, r):  # of charges P, each |.|^-(N + D - 2)
        squares = jnp.sum((x[None] - PLANE) ** 2, axis=1) + r**2
        return jax.nn.logsumexp(jnp.log(P) - D / 2 * jnp.log(squares))

    along, across = jax.grad(log_potential, (0, 1))(x, r)
    return along / across


@pytest.mark.parametrize("D", [0.5, 8.0, 2048.0])
def test_density_score_and_field(D):
    rows = [3, 4, 0, 1, 2]  # a chunk without weight, and one with padding
    data, weights = np.concatenate([PLANE, PLANE + 9.0])[rows], np.concatenate([P, 0 * P])[rows]
    model = pfgm.empirical(pfgm.PFGMpp(D=jnp.asarray(D)), data, weights, chunk=2)
    t, x = jnp.asarray(0.8), jnp.array([0.9, -0.4])
    m, eps, score, log_density = views(model, t, x)
    kernels = [scipy.stats.multivariate_t(y, 0.64 * np.eye(2), df=D).pdf(x) for y in PLANE]
    assert float(log_density) == pytest.approx(np.log(P @ kernels), abs=1e-10)
    pulls = [(y - x) / (np.sum((x - y) ** 2) + 0.64 * D) for y in PLANE]
    want = (2 + D) * (P * kernels) @ np.array(pulls) / (P @ kernels)
    np.testing.assert_allclose(score, want, rtol=1e-10)
    r = 0.8 * D**0.5
    np.testing.assert_allclose((x - m) / r, field(D, r, x), rtol=1e-9)
    np.testing.assert_allclose(eps, (x - m) / 0.8, rtol=1e-12)


def test_many_augmented_dimensions_are_edm():
    t, x = jnp.asarray(0.8), jnp.array([0.9, -0.4])
    limit = views(exact.empirical(EDM(), PLANE, P), t, x)
    Ds = [128.0, 2048.0, 1e5]
    near = [views(pfgm.empirical(pfgm.PFGMpp(D=jnp.asarray(D)), PLANE, P), t, x) for D in Ds]
    for i in range(4):  # m, eps, score, log density
        errors = [np.linalg.norm(np.atleast_1d(v[i] - limit[i])) for v in near]
        slopes = -np.diff(np.log(errors)) / np.diff(np.log(Ds))
        np.testing.assert_allclose(slopes, 1.0, atol=0.05)


def test_single_precision_on_images():
    rng = np.random.default_rng(3)
    data = rng.uniform(-1, 1, (16, 3, 32, 32))
    model = pfgm.empirical(pfgm.PFGMpp(D=128.0), data)
    both = eqx.filter_jit(lambda t, x: (*model.pair(t, x), model.log_density(t, x)))
    for t in (0.01, 1.0, 30.0):
        x = data[3] + t * rng.standard_normal(data[3].shape)
        narrow, wide = (both(jnp.asarray(t, d), jnp.asarray(x, d)) for d in (np.float32, float))
        assert narrow[0].dtype == np.float32
        np.testing.assert_allclose(narrow[0], wide[0], atol=3e-4 if t == 30.0 else 1e-7)
        np.testing.assert_allclose(narrow[1], wide[1], atol=2e-5)
        np.testing.assert_allclose(narrow[2], wide[2], rtol=2e-7)
    far = both(jnp.float32(1.0), jnp.full((3, 32, 32), 1e12, np.float32))  # nothing underflows
    assert all(np.all(np.isfinite(a)) for a in far)


# --- Solvers of EDM, unchanged. ------------------------------------------------------------------


def cdf(D, r, x):
    """Distribution function of the blurred line."""
    return scipy.stats.t(D).cdf((np.reshape(x, (-1, 1)) - LINE.T) * D**0.5 / r) @ P


@pytest.mark.parametrize("D", [3.0, 8.0, 64.0, 2048.0])
def test_the_flow_carries_the_law_from_r_6_to_r_08(D):
    model = pfgm.empirical(pfgm.PFGMpp(D=jnp.asarray(D), sigma_min=0.01), LINE, P)
    ts = np.geomspace(6.0, 0.8, 41) / D**0.5
    start = np.concatenate([LINE + k * ts[0] for k in (-3, -0.7, 0.4, 3)])
    levels = cdf(D, 6.0, start)
    assert np.ptp(levels) > 0.9 and len(np.unique(levels.round(2))) > 7
    out = jd.sample(None, jd.sampler(model, (1,), solver=dfx.Tsit5(), ts=ts), num=12, init=start)
    np.testing.assert_allclose(cdf(D, 0.8, out.x), levels, atol=1e-8)


def test_heun_has_order_two():
    D = 16.0
    model = pfgm.empirical(pfgm.PFGMpp(D=D, sigma_min=0.01), LINE, P)
    start = np.linspace(-4, 4, 9)
    levels = cdf(D, 6.0, start)
    want = [
        scipy.optimize.brentq(lambda x, q=q: cdf(D, 0.8, x)[0] - q, -20, 20, xtol=1e-13)
        for q in levels
    ]
    errors = []
    for n in (16, 64):
        ts = np.geomspace(6.0, 0.8, n + 1) / D**0.5
        sampler = jd.sampler(model, (1,), solver=Heun(), ts=ts)
        out = jd.sample(None, sampler, num=9, init=start[:, None])
        errors.append(np.sqrt(np.mean((out.x[:, 0] - np.array(want)) ** 2)))
    assert 1.8 < np.log2(errors[0] / errors[1]) / 2 < 2.2


def test_the_flow_carries_the_density_in_the_plane():
    D = 3.0
    model = pfgm.empirical(pfgm.PFGMpp(D=D, sigma_min=0.01), PLANE, P)
    ts = np.geomspace(6.0, 0.8, 65) / D**0.5
    sampler = jd.sampler(model, (2,), solver=Heun(), ts=ts)

    @quick
    @jax.vmap
    def defect(x):
        def flow(x):
            y = sampler(None, init=x).x
            return y, y

        J, y = jax.jacfwd(flow, has_aux=True)(x)
        change = model.log_density(ts[-1], y) - model.log_density(ts[0], x)
        stretch = jnp.linalg.slogdet(J)[1]
        return change, stretch

    change, stretch = defect(jnp.array([[0.3, 0.2], [-4.0, 2.0], [5.0, 5.0], [0.0, -9.0]]))
    np.testing.assert_allclose(change, -stretch, atol=1e-3)


def test_sampling_from_the_prior_reaches_the_data():
    model, n = pfgm.empirical(pfgm.PFGMpp(D=8), LINE, P), 500
    ts = model.process.grid(40)
    sampler = jd.sampler(model, (1,), solver=Heun(), ts=ts, denoise=True)
    out = quick(lambda: jd.sample(KEY, sampler, num=n))()
    jd.check(out)
    nearest = np.abs(np.asarray(out.x) - LINE.T)
    assert np.quantile(nearest.min(axis=1), 0.99) < 1e-6
    shares = np.bincount(nearest.argmin(axis=1), minlength=3) / n
    assert np.all(np.abs(shares - P) < 4 * np.sqrt(P * (1 - P) / n))


# --- What holds for a Gaussian kernel only. ------------------------------------------------------

EXACT = pfgm.empirical(pfgm.PFGMpp(D=4.0, sigma_min=0.01), PLANE, P)
NET = Denoiser(pfgm.PFGMpp(D=4.0), lambda t, x, cond: x / (1 + t))
T, X = jnp.asarray(1.0), jnp.array([1.1, -0.7])


def log_law(x):
    """Log density of the Student mixture, but for a constant."""
    squares = jnp.sum((x[None] - PLANE) ** 2, axis=1)
    return jax.nn.logsumexp(jnp.log(P) - (2 + 4) / 2 * jnp.log(squares + 4.0))


def posterior():
    """Weights of the atoms given X, in NumPy."""
    w = P * (np.sum((np.asarray(X) - PLANE) ** 2, axis=1) + 4.0) ** -3
    return w / w.sum()


class Wrapped(AbstractDenoiser):
    inner: AbstractDenoiser
    process: AbstractProcess

    def pair(self, t, x, cond=None):
        return self.inner.pair(t, x, cond)


VIEWED = Wrapped(EXACT, EXACT.process)
NOISE = jnp.array([0.3, -1.0])
KLUB = dict(ts=np.geomspace(5.0, 0.5, 4))
HEAD = fisher.TraceHead(lambda t, x, cond: jnp.sum(x))
REFUSED = {
    "gaussian": lambda: exact.gaussian(EXACT.process, [0.0], 1.0),
    "mixture": lambda: exact.mixture(EXACT.process, [1.0], [[0.0]], 1.0),
    "empirical": lambda: exact.empirical(EXACT.process, PLANE),
    "built by hand": lambda: exact.Empirical(
        EXACT.process, EXACT.atoms, EXACT.log_weights, EXACT.centre, EXACT.shape
    ),
    "score of a network": lambda: NET.score(T, X),
    "score of a wrapper": lambda: VIEWED.score(T, X),
    "a network that predicts it": lambda: Denoiser(EXACT.process, NET.net, "score"),
    "fisher": lambda: fisher.fisher(EXACT, T, X),
    "fisher by differences": lambda: fisher.fisher(NET, T, X, method="fd"),
    "fisher by lanczos": lambda: fisher.fisher(NET, T, X, method="lanczos", rank=1),
    "posterior_cov": lambda: fisher.posterior_cov(EXACT, T, X),
    "fisher_of": lambda: fisher.fisher_of(
        fisher.isotropic_cov(EXACT.process, T, 1.0, X), EXACT.process, T
    ),
    "endpoint_bound": lambda: fisher.endpoint_bound(EXACT.process, T, 1.0, X, X),
    "matching_bound": lambda: fisher.matching_bound(EXACT.process, T, 2, 0.1, X, 0.1),
    "curvature": lambda: fisher.Curvature()(EXACT, T, X, None),
    "newton": lambda: fisher.Newton()(EXACT, T, X, NOISE),
    "rank one": lambda: fisher.RankOne()(EXACT, T, X, NOISE),
    "intrinsic_dimension": lambda: fisher.intrinsic_dimension(EXACT, T, X),
    "trace head": lambda: HEAD(EXACT, T, X),
    "trace_loss": lambda: train.trace_loss(HEAD, EXACT, X, NOISE, t=T),
    "flow_jacobian": lambda: flow_map.flow_jacobian(EXACT, X, ts=KLUB["ts"]),
    "ddim_jacobian": lambda: flow_map.ddim_jacobian(EXACT, X, ts=KLUB["ts"]),
    "transport_test": lambda: flow_map.transport_test(KEY, EXACT, (2,), num=2, **KLUB),
    "target": lambda: mcmc.target(NET, T),
    "target of a wrapper": lambda: mcmc.target(VIEWED, T),
    "local gaussian": lambda: jd.sampler(
        EXACT, (2,), solver=jd.solvers.LocalGaussian(fisher.Curvature()), **KLUB
    )(None, init=X),
    "klub": lambda: tuning.klub(KEY, EXACT, PLANE, **KLUB),
    "align_your_steps": lambda: tuning.align_your_steps(KEY, EXACT, PLANE, **KLUB),
    "lifted": lambda: phase.Lifted(phase.CLD(), EXACT),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_a_kernel_that_is_not_gaussian_is_refused(call):
    with pytest.raises(ValueError, match="a process with a Gaussian kernel, got PFGMpp, whose ker"):
        call()


def test_the_score_is_that_of_the_law():
    want = jax.grad(log_law)(X)
    np.testing.assert_allclose(EXACT.score(T, X), want, rtol=1e-10)
    assert np.abs(EXACT.eps(T, X) + want).max() > 0.1  # T = 1: it is not -eps
    target = mcmc.target(EXACT, T)
    np.testing.assert_allclose(target.score(X), want, rtol=1e-10)


def test_every_prediction_but_the_score_gives_the_pair():
    m = posterior() @ PLANE
    t, x = float(T), np.asarray(X)
    says = {"x0": m, "eps": (x - m) / t, "velocity": (x - m) / t, "v": (x - m) / t - t * m}
    for kind, value in says.items():
        got = Denoiser(EXACT.process, lambda t, x, cond, value=value: jnp.asarray(value), kind)
        for a, b in zip(got.pair(T, X), (m, (x - m) / t), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12)


def test_models_of_the_posterior_that_need_no_derivative_hold_as_they_are():
    w = posterior()
    C = np.cov(PLANE.T, aweights=w, bias=True)
    for kind in ("centred", "raw"):
        draw = lambda y, kind=kind: fisher.endpoint_cov(EXACT, T, X, y, kind=kind).as_matrix()  # noqa: E731
        np.testing.assert_allclose(sum(p * draw(y) for p, y in zip(w, PLANE, strict=True)), C)
    flat = fisher.isotropic_cov(EXACT.process, T, np.trace(C), X).as_matrix()  # T = 1: tr R = tr C
    np.testing.assert_allclose(flat, np.trace(C) / 2 * np.eye(2))
    gated = fisher.gated_cov(EXACT, T, X, PLANE[0], np.trace(C)).as_matrix()
    np.testing.assert_allclose(np.trace(gated), np.trace(C))


@pytest.mark.parametrize("trace", [fisher.ExactTrace(), fisher.Hutchinson(40), fisher.HutchPP(6)])
def test_traces_by_derivatives_are_those_of_the_flow(trace):
    def mean(x):
        squares = jnp.sum((x[None] - PLANE) ** 2, axis=1)
        return jax.nn.softmax(jnp.log(P) - 3 * jnp.log(squares + 4.0)) @ PLANE

    want = jnp.trace(jax.jacfwd(mean)(X))  # d - sigma div eps, at sigma = 1
    values = trace(EXACT, T, X, None, KEY if trace.stochastic else None)[2]
    tolerance = 4 * jnp.std(values) / len(values) ** 0.5 if len(values) > 1 else 1e-12
    assert abs(jnp.mean(values) - want) <= tolerance + 1e-12


def test_the_likelihood_is_the_density():
    model = pfgm.empirical(pfgm.PFGMpp(D=4.0, sigma_max=4000.0), PLANE, P)
    ts = np.geomspace(4000.0, 0.8, 161)
    out = jd.likelihood(model, ts=ts)(X).log_prob
    kernels = [scipy.stats.multivariate_t(y, 0.64 * np.eye(2), df=4.0).pdf(X) for y in PLANE]
    assert float(out) == pytest.approx(np.log(P @ kernels), abs=3e-4)


# --- Errors. -------------------------------------------------------------------------------------


def test_errors_name_the_argument(as_users_see_it):
    for D in (0, -1.5, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=rf"PFGMpp: D must be positive and finite, got {D!r}"):
            pfgm.PFGMpp(D=D)
    with pytest.raises(ValueError, match="process must be a PFGMpp, got EDM"):
        pfgm.empirical(EDM(), LINE)
    with pytest.raises(ValueError, match=r"weights must be of shape \(3,\), got \(2,\)"):
        pfgm.empirical(pfgm.PFGMpp(D=8), LINE, [1.0, 2.0])
    with pytest.raises(ValueError, match=r"x must be one sample of shape \(1,\), got \(2,\)"):
        pfgm.empirical(pfgm.PFGMpp(D=8), LINE)(1.0, jnp.zeros(2))


def test_solvers_that_add_noise_are_refused(as_users_see_it):
    model = pfgm.empirical(pfgm.PFGMpp(D=8), LINE, P)
    with pytest.raises(ValueError, match="solver must be deterministic"):
        jd.sampler(model, (1,), solver=jd.solvers.DDIM(eta=1.0), ts=model.process.grid(4))
