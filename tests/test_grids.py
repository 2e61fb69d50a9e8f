"""Time grids: monotone, exact at the ends, equal to their published formulas, and checked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PROCESSES

from jaxdiff import grids
from jaxdiff.process import EDM, VE, VP, AbstractProcess, Cosine, Rectified

STEPS = (1, 2, 5, 50, 1000)
# Rectified has infinite log-SNR at both ends: kinds that are uniform in it cannot start there.
ENDLESS = [("Rectified", "logsnr"), ("Rectified", "edm")]
PAIRS = [(name, kind) for name in PROCESSES for kind in grids.KINDS if (name, kind) not in ENDLESS]


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


# --- Optimality. ---------------------------------------------------------------------------------


def ddim_std_error(s):
    """Relative error of the standard deviation of DDIM, data N(0, 1), at noise levels s."""
    gain = np.prod((1 + s[:-1] * s[1:]) / (1 + s[:-1] ** 2))
    return 1 - gain * np.sqrt((1 + s[0] ** 2) / (1 + s[-1] ** 2))


@pytest.mark.parametrize("n", [5, 10, 20])
def test_the_cosine_grid_is_the_best_for_ddim_on_unit_normal_data(n):
    path = EDM(sigma_min=0.04, sigma_max=40.0)
    best = path.grid(n, "cosine")
    angle = np.arctan(40.0) - np.arctan(0.04)
    np.testing.assert_allclose(ddim_std_error(best), 1 - np.cos(angle / n) ** n, rtol=1e-10)
    if n != 10:
        return
    rng = np.random.default_rng(0)
    for _ in range(20):
        other = best.copy()
        other[1:-1] *= np.exp(0.02 * rng.standard_normal(n - 1))
        assert ddim_std_error(other) > ddim_std_error(best)


def test_published_error_of_the_cosine_grid():
    # Data of standard deviation 0.5 on noise levels 20..0.02: unit data on 40..0.04.
    path = EDM(sigma_min=0.04, sigma_max=40.0)
    table = {
        5: (0.2057, 0.3145, 0.2927),
        10: (0.1076, 0.1705, 0.1583),
        20: (0.0552, 0.0892, 0.0825),
    }
    for n, row in table.items():
        got = [ddim_std_error(path.grid(n, kind)) for kind in ("cosine", "edm", "logsnr")]
        np.testing.assert_allclose(got, row, atol=5.1e-5)


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


@pytest.mark.parametrize("kind", grids.KINDS)
def test_a_grid_of_a_traced_process(kind):
    def build(beta, start):
        return VP(beta_max=beta).grid(6, kind, t_start=start)

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
