"""Time grids: monotone, exact at the ends, equal to their published formulas, and checked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers import PROCESSES

from jaxdiff import grids
from jaxdiff.process import EDM, VE, VP, AbstractProcess, Cosine, Discrete, Rectified

STEPS = (1, 2, 5, 50, 1000)
# Rectified has infinite log-SNR at both ends: kinds that are uniform in it cannot start there.
ENDLESS = [("Rectified", "logsnr"), ("Rectified", "edm")]
ANALYTIC = [*grids.LAWS, "beta", "logitnormal"]  # the kinds that need no table
PAIRS = [(name, kind) for name in PROCESSES for kind in grids.LAWS if (name, kind) not in ENDLESS]
PAIRS += [(name, kind) for name in ("VP", "EDM") for kind in ("beta", "logitnormal")]
# Latent diffusion: sqrt(beta) is linear.
LATENT = Discrete(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


class Trigonometric(AbstractProcess):
    """A user's process: two methods and a range."""

    t_min: float = 0.01
    t_max: float = 0.99

    def log_alpha(self, t):
        return jnp.log(jnp.cos(jnp.pi * jnp.asarray(t) / 2))

    def log_sigma(self, t):
        return jnp.log(jnp.sin(jnp.pi * jnp.asarray(t) / 2))


def sbar(path, ts):
    """Noise-to-signal ratio at the nodes."""
    return np.exp(-np.asarray(jax.vmap(path.lam)(jnp.asarray(ts))))


@pytest.mark.parametrize("name,kind", PAIRS)
def test_strictly_decreasing_with_exact_ends(name, kind):
    path = PROCESSES[name]
    for n in STEPS:
        ts = path.grid(n, kind)
        assert isinstance(ts, np.ndarray) and ts.dtype == np.float64 and ts.shape == (n + 1,)
        assert ts[0] == path.t_max and ts[-1] == path.t_min  # bitwise
        assert np.all(np.diff(ts) < 0)
        assert np.all(np.diff(ts.astype(np.float32)) < 0)
        assert grids.check(path, ts, dtype=np.float32) is not None


@pytest.mark.parametrize("name,kind", [*PAIRS, *ENDLESS])
def test_inner_ends_are_exact(name, kind):
    path = PROCESSES[name]
    span = path.t_max - path.t_min
    start, end = path.t_min + 0.9 * span, path.t_min + 0.07 * span
    ts = path.grid(5, kind, t_start=start, t_end=end)
    assert ts[0] == start and ts[-1] == end
    assert np.all(np.diff(ts) < 0)


@pytest.mark.parametrize("name,kind", ENDLESS)
@pytest.mark.parametrize("n", STEPS)
def test_infinite_log_snr_is_refused(name, kind, n):
    with pytest.raises(ValueError, match=rf"t_start .*{kind}.*1\.0"):
        PROCESSES[name].grid(n, kind)


def test_infinite_log_snr_at_the_data_end():
    path = Rectified()
    with pytest.raises(ValueError, match=r"t_end .*logsnr.*0\.0"):
        path.grid(3, "logsnr", t_start=0.9)
    assert path.grid(3, "edm", t_start=0.9)[-1] == 0.0  # sbar = 0 is a number
    assert path.grid(3, "cosine")[0] == 1.0  # and so is the right angle of sbar = inf


# --- Equivalences. -------------------------------------------------------------------------------


def close(ours, formula):
    np.testing.assert_allclose(ours, formula, rtol=1e-12, atol=1e-14)


def test_uniform_and_quadratic():
    close(Rectified().grid(10), 1 - np.arange(11) / 10)
    close(Rectified().grid(10, "quadratic"), (1 - np.arange(11) / 10) ** 2)
    close(np.diff(np.sqrt(VP().grid(9, "quadratic")), 2), 0.0)
    close(VP().grid(9), np.linspace(1.0, 1e-3, 10))


def test_edm_is_the_formula_of_karras():
    n, rho = 18, 7
    i = np.arange(n)
    sigmas = (80 ** (1 / rho) + i / (n - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    close(EDM().grid(n - 1), sigmas)
    # One law of sbar on every process.
    ts = VP().grid(12, "edm")
    np.testing.assert_allclose(np.diff(sbar(VP(), ts) ** (1 / 7), 2), 0.0, atol=1e-12)


@pytest.mark.parametrize("path", [VP(), Cosine(), VE(), EDM(), PROCESSES["Discrete"]], ids=str)
def test_logsnr_has_a_constant_ratio(path):
    ratio = sbar(path, path.grid(20, "logsnr"))
    np.testing.assert_allclose(ratio[1:] / ratio[:-1], (ratio[-1] / ratio[0]) ** 0.05, rtol=1e-11)


def test_on_exponential_noise_uniform_time_is_uniform_log_snr():
    close(VE().grid(11, "logsnr"), VE().grid(11, "uniform"))


def test_cosine_is_uniform_time_on_a_trigonometric_path():
    path = Trigonometric()
    close(path.grid(17, "cosine"), path.grid(17, "uniform"))
    theta = np.linspace(np.pi / 2, 0, 18)
    tangent = np.sin(theta) / (np.sin(theta) + np.cos(theta))  # t / (1 - t) = tan(theta)
    close(Rectified().grid(17, "cosine"), tangent)


def test_kinds_are_one_law_of_sbar_on_all_processes():
    for kind in ("logsnr", "edm", "cosine"):
        ends = [dict(t_start=p.t_of_lam(-3.0), t_end=p.t_of_lam(3.0)) for p in (VP(), Rectified())]
        ours = [
            sbar(p, p.grid(9, kind, **e)) for p, e in zip((VP(), Rectified()), ends, strict=True)
        ]
        np.testing.assert_allclose(ours[0], ours[1], rtol=1e-11)


def test_powers_and_rates_of_the_kinds():
    close(Rectified().grid(8, "quadratic", power=3), (1 - np.arange(9) / 8) ** 3)
    close(VP().grid(8, "quadratic", power=1), VP().grid(8))
    # k-diffusion's law: log sigma linear in (1 - u)^r.
    u, low, high = np.arange(9) / 8, np.log(0.002), np.log(80)
    close(EDM().grid(8, "logsnr", power=3), np.exp(low + (1 - u) ** 3 * (high - low)))
    # As rho grows the power law becomes the logarithmic one, with an error of order 1/rho.
    limit = [
        np.max(np.abs(np.log(EDM().grid(8, "edm", rho=r) / EDM().grid(8, "logsnr"))))
        for r in (1e4, 1e6)
    ]
    np.testing.assert_allclose(limit, np.log(80 / 0.002) ** 2 / 8 / np.array([1e4, 1e6]), rtol=1e-3)
    # c only rescales the noise.
    scaled = EDM(sigma_min=0.004, sigma_max=160.0).grid(8, "cosine")
    close(EDM().grid(8, "cosine", c=0.5), scaled / 2)


def test_beta_and_logitnormal_are_quantiles():
    path = VP()
    close(path.grid(9, "beta", a=1, b=1), path.grid(9))
    close(path.grid(9, "beta") + path.grid(9, "beta")[::-1], path.t_max + path.t_min)
    u = np.arange(8) / 7
    span = path.t_max - path.t_min
    beta = scipy.stats.beta(0.8, 0.5).ppf(1 - u)
    np.testing.assert_allclose(
        path.grid(7, "beta", a=0.8, b=0.5), path.t_min + span * beta, rtol=1e-11
    )
    flow = Rectified().grid(7, "logitnormal", mu=0.4, s=1.3)
    np.testing.assert_allclose(
        scipy.stats.norm(0.4, 1.3).cdf(np.log(flow[1:-1] / (1 - flow[1:-1]))), 1 - u[1:-1]
    )


# --- Tables. -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", grids.PUBLISHED)
def test_published_tables(name):
    levels = np.array(grids.PUBLISHED[name])
    n = len(levels) - 1
    assert np.all(np.diff(levels) < 0)
    np.testing.assert_array_equal(grids.interpolate(levels, n), levels)
    path = EDM(sigma_min=0.001, sigma_max=1000.0)
    close(path.grid(n, name), levels)
    close(np.log(path.grid(2 * n, name)[1:-1:2]), np.log(levels[1:] * levels[:-1]) / 2)
    close(path.grid(2 * n, name)[::2], levels)


@pytest.mark.parametrize(
    "name,indices",
    [
        ("ays-sd15", [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]),
        ("ays-sdxl", [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]),
    ],
)
def test_tables_fall_on_the_published_indices_of_latent_diffusion(name, indices):
    ts = LATENT.grid(10, name)
    assert ts[0] == LATENT.t_max and ts[-1] == LATENT.t_min  # 14.615 is 14.6146, rounded
    np.testing.assert_allclose(ts[:-1], indices, atol=0.75)  # both are rounded


def test_a_table_of_ones_own():
    path = VP()
    ts = path.grid(2, "levels", levels=[4, 1, 0.25])
    close(sbar(path, ts), [4, 1, 0.25])
    close(path.grid(2, "levels", levels=[4, 1, 0.25], t_start=1.0, t_end=0.01), [1, ts[1], 0.01])
    close(Rectified().grid(2, "levels", levels=[4, 1, 0.25]), [0.8, 0.5, 0.2])


# --- Operations on grids. ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spacing,nodes",
    [
        ("leading", [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]),
        ("trailing", [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]),
        ("linspace", [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]),
    ],
)
def test_spacings_of_discrete_models(spacing, nodes):
    ts = grids.discrete(LATENT, 10, spacing)
    assert ts.dtype == np.float64
    np.testing.assert_array_equal(grids.check(LATENT, ts), nodes)
    for n in (2, 3, 7, 999, 1000):  # rounding never makes two nodes one
        np.testing.assert_array_equal(np.diff(grids.discrete(LATENT, n, spacing)) < 0, True)


def test_shift():
    flow = Rectified()
    t = flow.grid(12)
    shifted = grids.shift(flow, t, 3.0)
    close(shifted, 3 * t / (1 + 2 * t))
    assert shifted[0] == 1 and shifted[-1] == 0
    close(grids.shift(flow, shifted, 1 / 3), t)
    path = VP()  # the same law of sbar on any path
    ts = path.grid(6, "logsnr", t_start=0.7, t_end=0.1)
    close(sbar(path, grids.shift(path, ts, 2.5)), 2.5 * sbar(path, ts))
    with pytest.raises(ValueError, match=r"shift: ts, once shifted, must be inside"):
        grids.shift(path, path.grid(6), 2.5)


def test_refine():
    path = VP()
    coarse = path.grid(5, "edm")
    fine = grids.refine(path, coarse)
    np.testing.assert_array_equal(fine[::2], coarse)  # bitwise
    np.testing.assert_allclose(
        sbar(path, fine)[1::2] ** 2, sbar(path, coarse)[1:] * sbar(path, coarse)[:-1], rtol=1e-11
    )
    close(grids.refine(path, path.grid(5, "logsnr")), path.grid(10, "logsnr"))
    # Infinite log-SNR at both ends: half the angle there.
    for nodes, middles in (([1.0, 0.5, 0.0], [3, 1]), ([1.0, 0.0], [2])):
        tangent = np.tan(np.pi / 8 * np.array(middles))
        close(grids.refine(Rectified(), nodes)[1::2], tangent / (1 + tangent))
    traced = jax.jit(lambda b: grids.refine(VP(beta_max=b), jnp.asarray(coarse)))(20.0)
    np.testing.assert_allclose(traced, fine, rtol=1e-12)


# --- Optimality. ---------------------------------------------------------------------------------


C, NOISE = 0.5, EDM(sigma_min=0.02, sigma_max=20.0)


def ddim_std_error(s):
    """Relative error of the standard deviation of DDIM, data N(0, C^2), at noise levels s."""
    gain = np.prod((C**2 + s[:-1] * s[1:]) / (C**2 + s[:-1] ** 2))
    return 1 - gain * np.sqrt((C**2 + s[0] ** 2) / (C**2 + s[-1] ** 2))


@pytest.mark.parametrize("n", [5, 10, 20])
def test_the_cosine_grid_is_the_best_for_ddim_on_normal_data(n):
    best = NOISE.grid(n, "cosine", c=C)
    angle = np.arctan(20 / C) - np.arctan(0.02 / C)
    np.testing.assert_allclose(ddim_std_error(best), 1 - np.cos(angle / n) ** n, rtol=1e-10)
    if n != 10:
        return
    rng = np.random.default_rng(0)
    for _ in range(20):
        other = best.copy()
        other[1:-1] *= np.exp(0.02 * rng.standard_normal(n - 1))
        assert ddim_std_error(other) > ddim_std_error(best)


def test_published_error_of_the_cosine_grid():
    table = {
        5: (0.2057, 0.3145, 0.2927),
        10: (0.1076, 0.1705, 0.1583),
        20: (0.0552, 0.0892, 0.0825),
    }
    for n, row in table.items():
        ours = NOISE.grid(n, "cosine", c=C), NOISE.grid(n, "edm"), NOISE.grid(n, "logsnr")
        np.testing.assert_allclose([ddim_std_error(ts) for ts in ours], row, atol=5.1e-5)


# --- Where a grid is built. ----------------------------------------------------------------------


def without_x64():
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(False)
    return jax.experimental.disable_x64()


@pytest.mark.parametrize("kind", ["edm", "logsnr"])
def test_float64_even_where_the_program_is_float32(kind):
    full = VP().grid(7, kind)
    with without_x64():
        half = VP().grid(7, kind)
        inside = jax.jit(lambda x: x + VP().grid(7, kind)[3].astype(np.float32))(jnp.float32(0))
    assert half.dtype == np.float64
    np.testing.assert_array_equal(half, full)
    np.testing.assert_allclose(inside, full[3], rtol=1e-7)


def test_a_grid_is_a_constant_of_the_program():
    seen = []
    jax.jit(jax.vmap(lambda x: (seen.append(VP().grid(3)), x)[1]))(jnp.zeros(2))
    assert isinstance(seen[0], np.ndarray)
    np.testing.assert_array_equal(seen[0], VP().grid(3))


@pytest.mark.parametrize("kind", [*ANALYTIC, "ays-sdxl"])
def test_a_grid_of_a_traced_process(kind):
    def build(beta, start):
        return VP(beta_max=beta).grid(6, kind, t_start=start, t_end=0.001)

    traced = jax.jit(build)(18.0, 0.8)
    np.testing.assert_allclose(traced, build(18.0, 0.8), rtol=1e-12)
    slope = jax.jacfwd(build)(18.0, 0.8)
    h = 1e-3
    np.testing.assert_allclose(
        slope, (build(18.0 + h, 0.8) - build(18.0 - h, 0.8)) / (2 * h), atol=1e-8
    )


def test_anything_with_a_clock_has_a_grid():
    class Plain:
        t_min, t_max = 0.5, 8.0

        def lam(self, t):
            return -jnp.log(t)

        def t_of_lam(self, lam):
            return jnp.exp(-lam)

    np.testing.assert_allclose(grids.make(Plain(), 4, "logsnr"), [8, 4, 2, 1, 0.5], rtol=1e-12)


# --- Checks. -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ts", [[0.9, 0.5, 0.1], (0.9, 0.5, 0.1), np.array([0.9, 0.5, 0.1]), jnp.array([0.9, 0.5, 0.1])]
)
def test_a_user_may_give_any_array(ts):
    got = grids.check(VP(), ts)
    assert isinstance(got, np.ndarray) and got.dtype == np.float64
    np.testing.assert_array_equal(got, [0.9, 0.5, 0.1])


@pytest.mark.parametrize("name", PROCESSES)
def test_a_float32_copy_of_a_grid_is_a_grid(name):
    path = PROCESSES[name]
    ts = path.grid(5).astype(np.float32)
    np.testing.assert_array_equal(grids.check(path, ts), ts.astype(np.float64))
    np.testing.assert_array_equal(grids.check(path, jnp.asarray(ts)), ts.astype(np.float64))


def test_integer_indices_are_a_grid():
    ts = grids.check(PROCESSES["Discrete"], np.array([999, 500, 0]))
    np.testing.assert_array_equal(ts, [999.0, 500.0, 0.0])


def test_traced_nodes_are_checked_for_shape_only():
    ts = jnp.array([0.1, 0.9])  # increasing, but nobody can see that
    np.testing.assert_array_equal(jax.jit(lambda ts: grids.check(VP(), ts))(ts), ts)
    with pytest.raises(ValueError, match=r"\(2, 1\)"):
        jax.jit(lambda ts: grids.check(VP(), ts))(ts[:, None])


@pytest.mark.parametrize(
    "ts,parts",
    [
        ([0.9, 0.5, 0.625, 0.1], ["decreasing", "0.5 followed by 0.625", "node 1"]),
        ([0.9, 0.25, 0.25], ["decreasing", "0.25 followed by 0.25"]),
        (np.linspace(0.1, 0.9, 5), ["decreasing", "0.1 followed by 0.3", "node 0"]),
        ([0.9, np.nan, 0.1], ["finite", "nan"]),
        ([np.inf, 0.5], ["finite", "inf"]),
        (np.ones((3, 2)), ["(nodes,)", "(3, 2)"]),
        ([[0.9, 0.5], [0.4, 0.1]], ["(nodes,)", "(2, 2)"]),
        ([0.5], ["2 or more", "(1,)"]),
        ([], ["2 or more", "(0,)"]),
        (0.5, ["(nodes,)", "()"]),
        ([1.25, 0.5], ["inside", "[0.001, 1]", "1.25"]),
        ([0.5, 0.0005], ["inside", "0.0005"]),
        ([1.0 + 1e-9, 0.5], ["inside"]),  # float64 nodes get no slack
        (["noise", "data"], ["array of times", "noise"]),
        ("noise", ["array of times", "noise"]),
        (np.array(["noise", "data"]), ["array of times", "noise"]),
        (np.array([0.9 + 1j, 0.5]), ["array of times", "1.j"]),
        ([[0.9], [0.5, 0.1]], ["array of times", "0.5"]),
        (None, ["(nodes,)", "()"]),
    ],
)
def test_check_names_what_is_wrong(ts, parts):
    with pytest.raises(ValueError) as error:
        grids.check(VP(), ts, where="sample", argument="nodes")
    assert "sample: nodes must be" in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_nodes_must_stay_apart_in_the_dtype_of_the_program():
    ts = np.array([0.9, 0.5 + 1e-9, 0.5, 0.1])
    np.testing.assert_array_equal(grids.check(VP(), ts, dtype=np.float64), ts)
    with pytest.raises(ValueError, match=r"ts must be distinct in float32, got 4 nodes"):
        grids.check(VP(), ts, dtype=np.float32)


@pytest.mark.parametrize(
    "kwargs,parts",
    [
        (dict(n=0), ["n must", "0"]),
        (dict(n=-3), ["n must", "-3"]),
        (dict(n=3, kind="karras"), ["kind", "'karras'", "'edm'"]),
        (dict(n=3, t_start=1.5), ["t_start", "1.5"]),
        (dict(n=3, t_end=0.0001), ["t_end", "0.0001"]),
        (dict(n=3, t_start=0.25, t_end=0.5), ["t_start > t_end", "0.25", "0.5"]),
        (dict(n=3, t_start=float("nan")), ["t_start", "nan"]),
    ],
)
def test_make_names_what_is_wrong(kwargs, parts):
    with pytest.raises(ValueError) as error:
        VP().grid(**kwargs)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("n", [2.5, 3.0, True, "4", None, np.float64(2)])
def test_a_number_of_steps_is_a_whole_number(as_users_see_it, n):
    with pytest.raises(ValueError, match="grid: n must be a whole number of at least 1, got "):
        VP().grid(n)


@pytest.mark.parametrize("kind", [["edm"], 7])
def test_a_kind_is_a_name(as_users_see_it, kind):
    with pytest.raises(ValueError, match=r"grid: kind must be one of 'uniform'.*got "):
        VP().grid(3, kind)


@pytest.mark.parametrize("name", ["t_start", "t_end"])
def test_an_end_is_a_number(as_users_see_it, name):
    with pytest.raises(ValueError, match=f"grid: .*{name}.*noise"):
        VP().grid(3, **{name: "noise"})


@pytest.mark.parametrize(
    "kind,options,parts",
    [
        ("edm", dict(rhos=7), ["kind='edm'", "rho,", "rhos=7"]),
        ("uniform", dict(rho=7), ["kind='uniform'", "absent", "rho=7"]),
        ("ays-sd15", dict(levels=[2, 1]), ["kind='ays-sd15'", "absent", "levels="]),
        ("edm", dict(rho=0.0), ["kind='edm'", "rho", "positive", "0.0"]),
        ("cosine", dict(c=-1), ["kind='cosine'", "c", "positive", "-1"]),
        ("beta", dict(a=float("nan")), ["kind='beta'", "a", "nan"]),
        ("logitnormal", dict(mu=float("inf")), ["kind='logitnormal'", "mu", "finite", "inf"]),
        ("logitnormal", dict(s="wide"), ["kind='logitnormal'", "s", "'wide'"]),
        ("logitnormal", dict(s=50.0), ["kind='logitnormal'", "strictly decreasing"]),  # saturates
        ("levels", {}, ["levels", "kind='levels'", "nothing"]),
        ("levels", dict(levels=[1.0, 2.0]), ["levels", "decreasing", "[1.0, 2.0]"]),
        ("levels", dict(levels=[1.0, 0.0]), ["levels", "positive", "[1.0, 0.0]"]),
        ("levels", dict(levels=[1.0]), ["levels", "(k,)", "(1,)"]),
        ("levels", dict(levels="low"), ["levels", "array", "low"]),
        ("levels", dict(levels=[160.0, 1.0]), ["levels", "inside", "152.", "160.0"]),
        ("levels", dict(levels=[4.0, 1.0, 0.2], t_start=0.1), ["kind='levels'", "decreasing"]),
    ],
)
def test_options_name_what_is_wrong(kind, options, parts):
    with pytest.raises(ValueError) as error:
        VP().grid(5, kind, **options)
    for part in parts:
        assert part in str(error.value)


def test_options_that_are_traced():
    levels = np.array([4.0, 1.0, 0.25])
    for kind, options in (("beta", dict(a=0.6)), ("levels", dict(levels=levels))):
        with pytest.raises(ValueError, match=r"must be concrete|array of noise levels"):
            jax.jit(lambda o, kind=kind: VP().grid(3, kind, **o))(options)
    with pytest.raises(ValueError, match="t_start must be given for kind='levels' on a traced"):
        jax.jit(lambda b: VP(beta_max=b).grid(3, "ays-sd15"))(18.0)
    rho = jax.jit(lambda rho: EDM().grid(3, "edm", rho=rho))(5.0)
    np.testing.assert_allclose(rho, EDM().grid(3, "edm", rho=5.0), rtol=1e-12)


@pytest.mark.parametrize(
    "call,parts",
    [
        (lambda: grids.discrete(VP(), 5), ["path", "Discrete", "VP"]),
        (lambda: grids.discrete(LATENT, 1), ["n must", "2", "1"]),
        (lambda: grids.discrete(LATENT, 1001), ["n must", "1000", "1001"]),
        (lambda: grids.discrete(LATENT, 5, "middle"), ["spacing", "'trailing'", "'middle'"]),
        (lambda: grids.interpolate([2.0, 1.0], 0), ["n must", "0"]),
        (lambda: grids.interpolate([2.0, 3.0], 4), ["levels", "[2.0, 3.0]"]),
        (lambda: grids.shift(VP(), [0.5, 0.1], 0.0), ["k must", "0.0"]),
        (lambda: grids.shift(VP(), [0.1, 0.5], 1.0), ["ts", "decreasing"]),
        (lambda: grids.refine(VP(), [0.1, 0.5]), ["ts", "decreasing"]),
    ],
)
def test_operations_name_what_is_wrong(as_users_see_it, call, parts):
    with pytest.raises(ValueError) as error:
        call()
    for part in parts:
        assert part in str(error.value)
