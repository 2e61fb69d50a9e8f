"""Gaussian paths: every derived quantity against textbook formulas, differences and simulation."""

import decimal
import itertools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from helpers import PROCESSES, each, each_process, inner_times

from jaxdiff import interpolants, pfgm, process
from jaxdiff.process import VE, VP, AbstractProcess, Cosine, Discrete, Rectified, SubVP

METHODS = ("log_alpha", "log_sigma", "alpha", "sigma", "lam", "snr", "f", "g2")
BETAS = np.linspace(1e-4, 0.02, 1000)
SCALED_LINEAR = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2


def values(path, method, ts):
    """One method over many times."""
    return np.asarray(jax.jit(jax.vmap(getattr(path, method)))(jnp.asarray(ts)))


def smooth_times(path, n=33):
    """Times where alpha is smooth: mid-way between the knots of a tabulated schedule."""
    ts = inner_times(path, n, 1e-2, 1e-2)
    return np.floor(ts) + 0.5 if isinstance(path, Discrete) else ts


# --- The definitions, as the papers print them, in plain float64. --------------------------------


def _vp_alpha(t):
    def beta(s):
        return 0.1 + s * (20.0 - 0.1)

    integral = [scipy.integrate.quad(beta, 0, s, epsabs=0, epsrel=1e-13)[0] for s in np.ravel(t)]
    return np.exp(-0.5 * np.reshape(integral, np.shape(t)))


def _cosine_alpha(t):
    def bar(t):
        return np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2

    return np.sqrt(bar(t) / bar(0.0))


def _discrete_alpha(t):
    bar = np.cumprod(1 - BETAS)
    return np.sqrt(np.exp(np.interp(t, np.arange(1000), np.log(bar))))


def _unit(t):
    return np.ones_like(t)


TEXTBOOK = {
    "VP": (_vp_alpha, lambda t: np.sqrt(1 - _vp_alpha(t) ** 2)),
    "SubVP": (_vp_alpha, lambda t: 1 - _vp_alpha(t) ** 2),
    "Cosine": (_cosine_alpha, lambda t: np.sqrt(1 - _cosine_alpha(t) ** 2)),
    "VE": (_unit, lambda t: 0.01 * 5000.0**t),
    "EDM": (_unit, lambda t: t),
    "Rectified": (lambda t: 1 - t, lambda t: t),
    "Discrete": (_discrete_alpha, lambda t: np.sqrt(1 - _discrete_alpha(t) ** 2)),
}
each_name = pytest.mark.parametrize("name", PROCESSES)


@each_name
def test_alpha_and_sigma_are_those_of_the_paper(name):
    path, (alpha, sigma) = PROCESSES[name], TEXTBOOK[name]
    t = inner_times(path)
    np.testing.assert_allclose(values(path, "alpha", t), alpha(t), rtol=1e-10)
    np.testing.assert_allclose(values(path, "sigma", t), sigma(t), rtol=1e-10)
    np.testing.assert_allclose(values(path, "lam", t), np.log(alpha(t) / sigma(t)), atol=1e-10)
    np.testing.assert_allclose(values(path, "snr", t), (alpha(t) / sigma(t)) ** 2, rtol=1e-9)


def test_known_constants():
    vp, cosine, latent = VP(), Cosine(), Discrete(SCALED_LINEAR)
    assert float(vp.alpha(1.0)) == pytest.approx(6.6e-3, abs=0.05e-3)
    assert float(vp.lam(1.0)) == pytest.approx(-5.02, abs=0.01)  # published to two decimals
    assert float(vp.lam(1e-3)) == pytest.approx(4.56, abs=0.005)
    assert float(cosine.lam(0.9946)) == pytest.approx(-4.78, abs=0.005)
    sbar = [math.exp(-float(latent.lam(t))) for t in (latent.t_min, latent.t_max)]
    assert sbar[0] == pytest.approx(0.0292, abs=0.00005)
    assert sbar[1] == pytest.approx(14.61, abs=0.01)


def test_linear_beta_is_the_diffusion():
    t = inner_times(VP())
    beta = 0.1 + 19.9 * t
    np.testing.assert_allclose(values(VP(), "f", t), -beta / 2, rtol=1e-12)
    np.testing.assert_allclose(values(VP(), "g2", t), beta, rtol=1e-12)
    twice = np.exp(-2 * (0.1 * t + 9.95 * t**2))
    np.testing.assert_allclose(values(SubVP(), "g2", t), beta * (1 - twice), rtol=1e-11)


# --- Drift and diffusion. ------------------------------------------------------------------------


def difference(fn, t, h):
    """Central difference of fourth order."""
    return (8 * (fn(t + h) - fn(t - h)) - (fn(t + 2 * h) - fn(t - 2 * h))) / (12 * h)


@each_process
def test_rates_drift_and_diffusion_match_finite_differences(path):
    t = smooth_times(path)
    h = 1e-4 * (path.t_max - path.t_min)
    alpha, sigma = values(path, "alpha", t), values(path, "sigma", t)
    slope = difference(lambda t: values(path, "alpha", t), t, h)
    growth = difference(lambda t: values(path, "sigma", t) ** 2, t, h)
    close = dict(rtol=1e-6, atol=1e-9)
    got = jax.vmap(path.rates)(jnp.asarray(t))
    np.testing.assert_allclose(got[0], slope, **close)
    np.testing.assert_allclose(got[1], growth / (2 * sigma), **close)
    np.testing.assert_allclose(values(path, "f", t), slope / alpha, **close)
    np.testing.assert_allclose(
        values(path, "g2", t), growth - 2 * slope / alpha * sigma**2, **close
    )


@each_process
def test_moment_ode_of_the_sde_reproduces_the_path(path):
    knots = np.arange(300.0, 311.0) if isinstance(path, Discrete) else inner_times(path, 2)
    rates = jax.jit(lambda t: jnp.stack([path.f(t), path.g2(t)]))
    state = np.array([path.alpha(knots[0]), path.sigma(knots[0]) ** 2])
    for low, high in itertools.pairwise(knots):  # the drift jumps at the knots of a table

        def field(t, y, low=low, high=high):
            f, g2 = np.asarray(rates(np.clip(t, low + 1e-10, high - 1e-10)))
            return [f * y[0], 2 * f * y[1] + g2]

        out = scipy.integrate.solve_ivp(
            field, (low, high), state, method="DOP853", rtol=1e-10, atol=1e-13
        )
        state = out.y[:, -1]
    np.testing.assert_allclose(state[0], path.alpha(knots[-1]), rtol=1e-7)
    np.testing.assert_allclose(state[1], path.sigma(knots[-1]) ** 2, rtol=1e-7)


@each_process
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_noise_only_grows(path, dtype):
    t = inner_times(path, 500).astype(dtype)
    assert np.all(np.diff(values(path, "lam", t)) < 0)
    assert np.all(values(path, "g2", t) >= 0)


# --- The inverse. --------------------------------------------------------------------------------


@each_process
@pytest.mark.parametrize("dtype,rtol", [(np.float64, 1e-10), (np.float32, 2e-5)])
def test_t_of_lam_inverts_lam(path, dtype, rtol):
    t = inner_times(path, 101).astype(dtype)
    back = jax.vmap(path.t_of_lam)(jax.vmap(path.lam)(t))
    assert back.dtype == dtype
    np.testing.assert_allclose(back, t, rtol=rtol)


@each_process
def test_bisection_agrees_with_the_closed_inverse(path):
    t = smooth_times(path, 17)
    lam = jax.vmap(path.lam)(jnp.asarray(t))

    def default(lam):
        return AbstractProcess.t_of_lam(path, lam)

    ours, its = (jax.vmap(jax.value_and_grad(fn))(lam) for fn in (default, path.t_of_lam))
    np.testing.assert_allclose(ours[0], its[0], rtol=1e-10)
    np.testing.assert_allclose(ours[1], its[1], rtol=1e-9)
    slope = difference(lambda t: values(path, "lam", t), t, 1e-4 * (path.t_max - path.t_min))
    np.testing.assert_allclose(ours[1] * slope, 1.0, rtol=1e-5)  # of the inverse function


@each_process
def test_bisection_keeps_float32(path):
    t = inner_times(path, 17).astype(np.float32)
    back = jax.vmap(lambda lam: AbstractProcess.t_of_lam(path, lam))(jax.vmap(path.lam)(t))
    assert back.dtype == np.float32
    np.testing.assert_allclose(back, t, rtol=2e-5, atol=1e-7 * path.t_max)


@each_process
def test_bisection_differentiates_the_parameters(path):
    lam = path.lam(float(smooth_times(path, 3)[1]))
    default = jax.grad(lambda p: AbstractProcess.t_of_lam(p, lam))(path)
    closed = jax.grad(lambda p: p.t_of_lam(lam))(path)
    for ours, its in zip(jax.tree.leaves(default), jax.tree.leaves(closed), strict=True):
        np.testing.assert_allclose(ours, its, rtol=1e-8, atol=1e-10)


@each_process
def test_integers_are_times_and_log_snrs(path):
    for method, value in [("lam", 1), ("f", 1), ("t_of_lam", 2), ("t_of_lam", np.int32(2))]:
        if method == "t_of_lam" or float(path.t_max) > 1:
            got = getattr(path, method)(value)
            np.testing.assert_allclose(got, getattr(path, method)(float(value)), rtol=1e-6)


class Learnt(AbstractProcess):
    """A user's schedule with a network in it: only `log_alpha`, `log_sigma` and the range."""

    net: eqx.nn.MLP
    t_min: float = 0.1
    t_max: float = 1.0

    def log_alpha(self, t):
        return -0.1 * jnp.asarray(t) * jax.nn.softplus(self.net(jnp.asarray(t)[None])[0])

    def log_sigma(self, t):
        return 3 * jnp.log(t)


def test_a_schedule_may_contain_a_network():
    path = Learnt(eqx.nn.MLP(1, 1, 4, 1, key=jax.random.key(0)))
    np.testing.assert_allclose(path.t_of_lam(path.lam(0.4)), 0.4, rtol=1e-12)
    grads = eqx.filter_grad(lambda p: p.t_of_lam(0.3))(path)
    assert all(jnp.all(jnp.isfinite(g)) for g in jax.tree.leaves(grads))
    assert np.all(np.diff(path.grid(4, "logsnr")) < 0)


# --- float32. ------------------------------------------------------------------------------------


def damage(sigma, lam, name, t):
    """Relative error of sigma and absolute error of lam against the paper's formula in float64."""
    alpha0, sigma0 = (np.asarray(fn(np.float64(t))) for fn in TEXTBOOK[name])
    return abs(float(sigma) / sigma0 - 1), abs(float(lam) - np.log(alpha0 / sigma0))


@pytest.mark.parametrize("t", [1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("name", [n for n in PROCESSES if n not in ("Discrete", "EDM")])
def test_float32_is_stable_near_data(name, t):
    path, t = PROCESSES[name], np.float32(t)
    assert max(damage(path.sigma(t), path.lam(t), name, t)) < 1e-6


@pytest.mark.parametrize("name", ["EDM", "Discrete"])
def test_float32_is_stable_near_data_on_a_long_clock(name):
    path = PROCESSES[name]
    for t in np.float32([path.t_min, path.t_min + 0.25, path.t_min + 1]):
        assert max(damage(path.sigma(t), path.lam(t), name, t)) < 1e-6


@pytest.mark.parametrize("t,least", [(1e-5, 1e-2), (1e-4, 1e-3), (1e-3, 1e-4)])
def test_the_naive_form_fails_the_float32_bound(t, least):
    t = np.float32(t)
    alpha = np.float32(np.exp(np.float32(-0.5) * (np.float32(9.95) * t + np.float32(0.1)) * t))
    naive = np.sqrt(np.float32(1) - alpha**2)
    assert naive.dtype == np.float32
    assert min(damage(naive, np.log(alpha / naive), "VP", t)) > least


@pytest.mark.parametrize("path", [VP(), SubVP()], ids=["VP", "SubVP"])
def test_float32_inverse_is_stable_near_data(path):
    t = np.geomspace(1e-5, 1e-3, 50).astype(np.float32)
    back = jax.vmap(path.t_of_lam)(jax.vmap(path.lam)(t))
    np.testing.assert_allclose(back, t, rtol=5e-6)


@each_process
def test_float32_everywhere(path):
    t = inner_times(path, 65).astype(np.float32)
    for method in METHODS:
        got = jax.vmap(getattr(path, method))(t)
        assert got.dtype == np.float32, method
        exact = values(path, method, t.astype(np.float64))
        # Logs are compared in absolute terms: their exponentials and differences are what is used.
        log = method in ("log_alpha", "log_sigma", "lam")
        np.testing.assert_allclose(
            got, exact, rtol=0 if log else 5e-6, atol=5e-6 if log else 0, err_msg=method
        )


@each_process
def test_float32_in_float32_out(path):
    t, x = np.float32(smooth_times(path, 3)[1]), np.ones((2, 3), np.float32)
    key = jax.random.key(0)
    assert path.t_of_lam(path.lam(t)).dtype == np.float32
    assert {r.dtype for r in path.rates(t)} == {np.dtype(np.float32)}
    assert {a.dtype for a in path.perturb(key, t, x)} == {np.dtype(np.float32)}
    assert {a.dtype for a in path.perturb(key, float(t), x)} == {np.dtype(np.float32)}
    assert path.prior(key, (2,), dtype=jnp.float32).dtype == np.float32
    assert path.prior(key, (2,)).dtype == np.float64  # the suite's default float
    assert path.prior_log_prob(x).dtype == np.float32


# --- Laws. ---------------------------------------------------------------------------------------


@each_process
def test_mix_makes_the_noisy_point_of_a_pair(path):
    rng = np.random.default_rng(2)
    x0, eps = rng.normal(size=(2, 4, 3))
    for t in inner_times(path, 3):
        alpha = np.exp(float(path.lam(t))) * float(path.sigma(t))
        want = alpha * x0 + float(path.sigma(t)) * eps
        np.testing.assert_allclose(path.mix(t, x0, eps), want, rtol=1e-11)
    key, t = jax.random.key(4), inner_times(path, 3)[1]
    x, drawn = path.perturb(key, t, x0)
    np.testing.assert_array_equal(drawn, jax.random.normal(key, (4, 3)))
    np.testing.assert_array_equal(x, path.mix(t, x0, drawn))
    assert path.mix(t, x0.astype(np.float32), eps).dtype == np.float32  # that of x0


def test_the_ends_of_mix_are_exact(as_users_see_it):
    x0, eps = np.random.default_rng(2).normal(size=(2, 4, 3))
    np.testing.assert_array_equal(process.Rectified().mix(0.0, x0, eps), x0)
    np.testing.assert_array_equal(process.Rectified().mix(1.0, x0, eps), eps)
    np.testing.assert_array_equal(process.EDM().mix(0.0, x0, eps), x0)
    with pytest.raises(
        ValueError, match=r"mix: eps must be of the shape of x0, \(4, 3\), got \(3,\)"
    ):
        process.EDM().mix(1.0, x0, eps[0])


@each_process
def test_perturb_has_the_moments_of_the_path(path):
    n, x0 = 20_000, np.array([[1.5, -2.0]])
    t = float(smooth_times(path, 3)[1])
    keys = jax.random.split(jax.random.key(1), n)
    x, eps = jax.vmap(lambda k: path.perturb(k, t, x0))(keys)
    alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
    np.testing.assert_allclose(x, np.array(alpha * x0)[None] + sigma * np.asarray(eps), rtol=1e-12)
    z = ((np.asarray(x) - alpha * x0) / sigma)[:, 0]
    assert np.all(np.abs(z.mean(0)) < 4.5 / n**0.5)  # 4.5 standard errors of a mean
    assert np.all(np.abs(z.var(0) - 1) < 4.5 * (2 / n) ** 0.5)  # and of a variance
    assert abs(np.mean(z[:, 0] * z[:, 1])) < 4.5 / n**0.5


@each_process
def test_prior_is_the_normal_law_at_the_noise_end(path):
    sigma = float(path.sigma(path.t_max))
    draws = np.asarray(path.prior(jax.random.key(2), (40, 250)))
    assert scipy.stats.kstest(draws.ravel() / sigma, "norm").pvalue > 1e-3
    mid = float(smooth_times(path, 3)[1])
    early = np.asarray(path.prior(jax.random.key(2), (40, 250), t=mid))
    np.testing.assert_allclose(early / float(path.sigma(mid)), draws / sigma, rtol=1e-12)
    for t in (None, mid):
        scale = sigma if t is None else float(path.sigma(mid))
        expected = scipy.stats.norm(scale=scale).logpdf(draws[:3]).sum()
        np.testing.assert_allclose(path.prior_log_prob(draws[:3], t=t), expected, rtol=1e-12)


@each_process
def test_leak_is_the_divergence_for_one_point_and_a_bound_for_others(path):
    alpha, sigma = float(path.alpha(path.t_max)), float(path.sigma(path.t_max))
    prior = scipy.stats.norm(0, sigma)
    z, w = np.polynomial.hermite_e.hermegauss(20)  # expectations under N(0, 1)

    def divergence(law):
        x = law.mean() + law.std() * z
        return np.sum(w * (law.logpdf(x) - prior.logpdf(x))) / np.sqrt(2 * np.pi)

    point = divergence(scipy.stats.norm(3 * alpha, sigma))
    np.testing.assert_allclose(path.leak(9.0), point, rtol=1e-6, atol=1e-12)
    spread = divergence(scipy.stats.norm(0, np.hypot(3 * alpha, sigma)))
    assert spread <= float(path.leak(9.0)) + 1e-12


# --- Single processes. ---------------------------------------------------------------------------


@pytest.mark.parametrize("betas", [BETAS, SCALED_LINEAR], ids=["linear", "scaled-linear"])
def test_discrete_is_exact_at_the_integers(betas):
    path, i = Discrete(betas), np.arange(len(betas))
    bar = np.cumprod(1 - betas)
    np.testing.assert_allclose(values(path, "alpha", i) ** 2, bar, rtol=1e-12)
    with decimal.localcontext(decimal.Context(prec=50)):
        product, exact = decimal.Decimal(1), []
        for beta in betas.tolist():
            product *= 1 - decimal.Decimal(beta)
            exact.append((float(product), float(1 - product)))
    alpha2, sigma2 = np.array(exact).T
    np.testing.assert_allclose(values(path, "alpha", i) ** 2, alpha2, rtol=1e-13)
    np.testing.assert_allclose(values(path, "sigma", i) ** 2, sigma2, rtol=1e-13)
    single = i.astype(np.float32)
    np.testing.assert_allclose(values(path, "sigma", single) ** 2, sigma2, rtol=2e-6)


def test_discrete_is_geometric_between_the_integers():
    path = Discrete(BETAS)
    for i in (0, 500, 998):
        ends = float(path.alpha(i)), float(path.alpha(i + 1))
        middle = float(path.alpha(i + 0.5))
        assert middle == pytest.approx(math.sqrt(ends[0] * ends[1]), rel=1e-13)
    assert (path.t_min, path.t_max) == (0.0, 999.0)


def test_rectified_ends_are_exact():
    path = Rectified()
    assert [float(path.alpha(t)) for t in (0.0, 1.0)] == [1.0, 0.0]
    assert [float(path.sigma(t)) for t in (0.0, 1.0)] == [0.0, 1.0]
    for t in (0.0, 0.3, 1.0):
        assert [float(r) for r in path.rates(t)] == [-1.0, 1.0]
    assert float(path.f(0.0)) == -1.0
    assert float(path.g2(0.0)) == 0.0
    assert [float(path.lam(t)) for t in (0.0, 1.0)] == [math.inf, -math.inf]
    assert [float(path.t_of_lam(lam)) for lam in (math.inf, -math.inf)] == [0.0, 1.0]


@each_process
def test_diffusion_is_finite_at_the_data_end(path):
    for t in (path.t_min, float(np.float32(path.t_min))):
        assert np.isfinite(path.g2(t))
        assert np.isfinite(path.f(t))


# --- A process is a pytree. ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind,name,value", [(VP, "beta_max", 20.0), (SubVP, "beta_min", 0.1), (VE, "sigma_max", 50.0)]
)
def test_schedule_parameters_can_be_learnt(kind, name, value):
    def lam(v):
        return kind(**{name: v}).lam(0.7)

    slope = difference(lambda v: float(lam(v)), value, 1e-3 * value)
    assert abs(slope) > 1e-3
    np.testing.assert_allclose(jax.grad(lam)(value), slope, rtol=1e-8)
    leaf = jax.grad(lambda path: path.lam(0.7))(kind(**{name: value}))
    np.testing.assert_allclose(getattr(leaf, name), slope, rtol=1e-8)
    many = jax.vmap(lam)(jnp.array([value, 2 * value]))
    np.testing.assert_allclose(many[1], lam(2 * value), rtol=1e-12)


def test_betas_can_be_learnt():
    def lam(betas):
        return Discrete(betas).lam(5.0)

    betas = BETAS[:10]
    slope = difference(lambda b: float(lam(betas + b * np.eye(10)[3])), 0.0, 1e-5)
    np.testing.assert_allclose(jax.grad(lam)(jnp.asarray(betas))[3], slope, rtol=1e-7)


@each_process
def test_everything_works_on_a_traced_process(path):
    t = float(smooth_times(path, 3)[1])

    def every(p, t):
        return [getattr(p, m)(t) for m in METHODS] + [
            *p.rates(t),
            p.t_of_lam(p.lam(t)),
            p.prior(jax.random.key(0), (3,)),
            p.prior_log_prob(jnp.ones(3)),
            p.leak(1.0),
            *p.perturb(jax.random.key(0), t, jnp.ones(3)),
            p.grid(5),
            p.grid(1),
        ]

    for traced, plain in zip(jax.jit(every)(path, t), every(path, t), strict=True):
        np.testing.assert_allclose(traced, plain, rtol=1e-9)


@each_process
def test_new_parameters_do_not_retrace(path):
    traces = 0

    @jax.jit
    def lam(path, t):
        nonlocal traces
        traces += 1
        return path.lam(t)

    first = lam(path, path.t_max / 2)
    scaled = jax.tree.map(lambda leaf: 0.9 * leaf, path)
    second = lam(scaled, path.t_max / 3)
    assert traces == 1
    assert first != second


# --- Errors. -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build,parts",
    [
        (lambda: VP(beta_min=3.0, beta_max=1.25), ["VP", "beta_min", "beta_max", "3.0", "1.25"]),
        (lambda: VP(beta_max=math.nan), ["beta_max", "nan"]),
        (lambda: VP(beta_max=math.inf), ["beta_max", "inf"]),
        (lambda: VP(t_min=0.5, t_max=0.25), ["t_min", "t_max", "0.5", "0.25"]),
        (lambda: VP(t_min=-0.125), ["t_min", "-0.125"]),
        (lambda: SubVP(beta_min=-1.5), ["SubVP", "beta_min", "-1.5"]),
        (lambda: SubVP(beta_min=jnp.array(2.5), beta_max=jnp.array(1.5)), ["2.5", "1.5"]),
        (lambda: VP(beta_max=jnp.array([3.0, 4.5])), ["beta_max", "4.5"]),
        (lambda: Cosine(s=-0.25), ["Cosine", "s", "-0.25"]),
        (lambda: Cosine(t_max=1.125), ["Cosine", "t_max", "1.125"]),
        (lambda: VE(sigma_min=0.0), ["VE", "sigma_min", "0.0"]),
        (lambda: VE(sigma_min=7.5, sigma_max=2.5), ["sigma_min", "sigma_max", "7.5", "2.5"]),
        (lambda: process.EDM(sigma_min=3.5, sigma_max=2.5), ["EDM", "sigma_min", "3.5", "2.5"]),
        (lambda: Rectified(t_max=1.5), ["Rectified", "t_max", "1.5"]),
        (lambda: Rectified(t_min=0.75, t_max=0.5), ["Rectified", "t_min", "0.75", "0.5"]),
        (lambda: Discrete(np.array([0.1])), ["Discrete", "betas", "(1,)"]),
        (lambda: Discrete(np.array([0.1, 1.5])), ["Discrete", "betas", "1.5"]),
        (lambda: Discrete(np.array([0.0, 0.5])), ["Discrete", "betas", "0.0"]),
        (lambda: Discrete(np.array([0.1, math.nan])), ["Discrete", "betas", "nan"]),
    ],
)
def test_errors_name_the_argument_and_the_value(build, parts):
    with pytest.raises(ValueError) as error:
        build()
    for part in parts:
        assert part in str(error.value)


class PlainFlow(process.AbstractProcess):
    """A user's process whose log-SNR is infinite at both ends, without a closed inverse."""

    t_min: float = 0.0
    t_max: float = 1.0

    def log_alpha(self, t):
        return jnp.log1p(-jnp.asarray(t))

    def log_sigma(self, t):
        return jnp.log(t)


def test_bisection_at_infinite_log_snr():
    path = PlainFlow()
    np.testing.assert_array_equal(path.t_of_lam(jnp.inf), 0.0)
    np.testing.assert_array_equal(path.t_of_lam(-jnp.inf), 1.0)
    assert np.isfinite(jax.grad(path.t_of_lam)(0.3))


def test_discrete_integers_are_integers_with_the_slope_of_the_inverse():
    path = PROCESSES["Discrete"]
    lam = jax.vmap(path.lam)(jnp.arange(1, 999, dtype=np.float32))
    np.testing.assert_array_equal(jax.vmap(path.t_of_lam)(lam), np.arange(1, 999))
    slope = jax.grad(path.lam)(500.0)
    np.testing.assert_allclose(jax.grad(path.t_of_lam)(path.lam(500.0)), 1 / slope, rtol=1e-9)


def test_quadratic_grid_of_negative_times_is_refused():
    path = PlainFlow(t_min=-1.0)
    with pytest.raises(ValueError, match="t_end must be not negative for kind='quadratic'"):
        path.grid(4, "quadratic")


# --- A path that is none, and ends that are. -----------------------------------------------------


class Written(AbstractProcess):
    """What a user may write: two scales as functions, and the rest by default."""

    scales: tuple
    t_min: float = 0.0
    t_max: float = 1.0
    lies: float = 0.0

    def alpha(self, t):
        return self.scales[0](t)

    def sigma(self, t):
        return self.scales[1](t)

    def log_alpha(self, t):
        return jnp.log(self.alpha(t))

    def log_sigma(self, t):
        return jnp.log(self.sigma(t))

    def t_of_lam(self, lam):
        return super().t_of_lam(lam) + self.lies


class Twice(Written):
    def lam(self, t):
        return 2 * super().lam(t)


def angle(end):
    return eqx.Partial(lambda t: jnp.cos(end * t)), eqx.Partial(lambda t: jnp.sin(end * t))


PATHS = PROCESSES | {
    "PFGMpp": pfgm.PFGMpp(D=3.0),
    "linear": interpolants.as_process(interpolants.bridge("linear")),
    "trigonometric": interpolants.as_process(
        interpolants.bridge("trigonometric", "sin2", scale=0.3)
    ),
    "wide EDM": process.EDM(sigma_min=1e-5, sigma_max=1e6),
    "cosine to its end": Written(angle(math.pi / 2)),
}


@each(PATHS, "path")
def test_a_path_passes_its_check(path):
    process.check_path(path)
    jax.jit(lambda: process.check_path(path))()
    number = jax.tree.map(
        lambda a: jnp.asarray(a, jnp.float32), eqx.filter(path, eqx.is_inexact_array_like)
    )
    process.check_path(eqx.combine(number, path))


one = eqx.Partial(lambda t: jnp.ones_like(t))
NO_PATHS = {
    "of a finite range t_min < t_max, got \\[1, 0\\]": Written(angle(1.0), 1.0, 0.0),
    "of finite alpha and sigma, got alpha=nan, sigma=0.5 at t=0.5": Written(
        (eqx.Partial(lambda t: jnp.where(t == 0.5, jnp.nan, 1 - t)), eqx.Partial(lambda t: t))
    ),
    "not negative, got alpha=-0.0122": Written(angle(math.pi)),
    "not both 0, got alpha=0.0, sigma=0.0 at t=1.0": Written((eqx.Partial(lambda t: 1 - t),) * 2),
    "finite log-SNR lam inside its range, got lam=-inf at t=0.5": Written(
        (eqx.Partial(lambda t: jnp.maximum(0.5 - t, 0.0)), one)
    ),
    "lam = log\\(alpha/sigma\\), got lam=10.18": Twice(angle(math.pi / 2)),
    "decreases in t, got lam=0.0 at t=0.0": Written((one, one)),
    "decreases in t, got lam=-5.09": Written(angle(math.pi / 2)[::-1]),
    "t_of_lam that inverts lam, got t_of_lam=0.0139": Written(angle(1.5), lies=0.01),
}


@pytest.mark.parametrize("said,path", NO_PATHS.items(), ids=map(str, range(len(NO_PATHS))))
def test_what_is_no_path_is_refused_in_one_sentence(said, path, as_users_see_it):
    with pytest.raises(ValueError, match=rf"draw: process \((Written|Twice)\) must be .*{said}"):
        process.check_path(path, "draw")
    jax.jit(lambda s: process.check_path(eqx.tree_at(lambda p: p.t_min, path, s)))(path.t_min)


def test_ends_are_told_by_more_than_round_off():
    t = np.array([0.0, 1e-5, 0.3, 1 - 1e-5, 1.0])
    no_signal, no_noise = process.vanishing(np.cos(np.pi * t / 2), np.sin(np.pi * t / 2))
    assert no_signal.tolist() == [False] * 4 + [True]
    assert no_noise.tolist() == [True] + [False] * 4
    residue = np.sqrt(1 - np.float64(1 - 2**-53))  # of a root that cancels
    assert process.vanishing(residue, 1.0)[0] and process.vanishing(-residue, 1.0)[0]
    assert not any(process.vanishing(1.0, 1e6)) and not any(process.vanishing(1.0, 1e-6))
    assert all(process.vanishing(0.0, 0.0))
