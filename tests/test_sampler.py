"""`draw`, `sample` and `check`: independence, keys, options, tracing, failures and errors."""

import functools
import os
import subprocess
import sys

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from helpers import PROCESSES, each

import jaxdiff as jd
from jaxdiff.solvers import DDIM, DPMpp2M, EulerMaruyama, Heun

LAW = oracles.GaussianMixture.random(3, 3, 2)
VP = PROCESSES["VP"]
MIX = jd.exact.mixture(VP, LAW.weights, LAW.means, LAW.covs)
TS = VP.grid(8)
KEY = jax.random.key(11)


class MLP(eqx.Module):
    """A network of two layers; `trace` counts how often it is traced."""

    w1: jax.Array
    w2: jax.Array
    traces: list = eqx.field(static=True, default_factory=list)

    def __call__(self, t, x, cond=None):
        self.traces.append(1)
        features = jnp.concatenate([x, jnp.stack([t, jnp.ones_like(t)]).astype(x.dtype)])
        hidden = jnp.tanh(jnp.matmul(self.w1, features))
        out = jnp.matmul(self.w2, hidden)
        return out if cond is None else out + cond

    def __hash__(self):
        return id(self)


def mlp(seed=0, dtype=np.float32, traces=None, d=2, width=64):
    rng = np.random.default_rng(seed)
    w1, w2 = rng.normal(size=(width, d + 2)), rng.normal(size=(d, width)) / width
    w1, w2 = jnp.asarray(w1, dtype), jnp.asarray(w2, dtype)
    return jd.Denoiser(VP, MLP(w1, w2, _Counter() if traces is None else traces), predicts="x0")


class _Counter(list):
    """A static field that equals any other, so that it never causes a trace by itself."""

    def __eq__(self, other):
        return isinstance(other, _Counter)

    def __hash__(self):
        return 0


many = functools.partial(jd.sample, KEY, shape=(2,), solver=DDIM(eta=0.5), ts=TS)


# --- Sample i is a function of (key, i). ---


@pytest.mark.parametrize("denoiser", [MIX, mlp()], ids=["mixture", "network"])
def test_a_sample_does_not_depend_on_its_call(denoiser):
    call = functools.partial(many, denoiser, dtype=np.float32)
    whole = call(num=11, chunk=4).x
    assert whole.dtype == jnp.float32 and np.unique(whole).size == whole.size
    # The same width of a chunk: bitwise, for any number and any start.
    np.testing.assert_array_equal(call(num=3, chunk=4).x, whole[:3])
    np.testing.assert_array_equal(call(num=5, chunk=4, start=3).x, whole[3:8])
    # Another width is another program, whose products may be rounded elsewhere.
    for got in (call(num=11).x, call(num=11, chunk=1).x):
        np.testing.assert_allclose(got, whole, rtol=1e-6, atol=1e-6)


def test_a_sample_is_bitwise_the_same_in_wide_chunks():
    """Widths of whole vector registers run the same arithmetic, whatever `num` and `start`."""
    call = functools.partial(many, MIX, dtype=np.float32)
    whole = call(num=80, chunk=16).x
    for kwargs in (dict(num=80, chunk=32), dict(num=64, chunk=64), dict(num=48), dict(num=16)):
        np.testing.assert_array_equal(call(**kwargs).x, whole[: kwargs["num"]])
    np.testing.assert_array_equal(call(num=32, start=23, chunk=32).x, whole[23:55])


def test_the_noise_is_bitwise_the_same_in_any_chunking():
    """A denoiser that answers 0 leaves nothing but noise times coefficients."""
    nothing = jd.Denoiser(VP, lambda t, x, cond: jnp.zeros_like(x))
    call = functools.partial(many, nothing, dtype=np.float32, trajectory=True)
    whole = call(num=6).aux["trajectory"]
    for other in (call(num=6, chunk=1), call(num=6, chunk=4)):
        np.testing.assert_array_equal(other.aux["trajectory"], whole)
    np.testing.assert_array_equal(call(num=2, start=3).aux["trajectory"], whole[3:5])


def test_sample_is_draw_with_the_folded_key():
    whole = many(MIX, num=4).x
    for i in (0, 3):
        key = jax.random.fold_in(KEY, i)
        one = jd.draw(key, MIX, (2,), solver=DDIM(eta=0.5), ts=TS)
        assert one.x.shape == (2,) and one.nfe.shape == ()
        np.testing.assert_allclose(one.x, whole[i], rtol=1e-12)
    other = jd.sample(jax.random.key(12), MIX, (2,), num=4, solver=DDIM(eta=0.5), ts=TS)
    assert not np.any(other.x == whole)


def test_start_may_be_traced_and_a_raw_key_is_its_typed_self():
    whole = many(MIX, num=4).x
    tail = jax.jit(lambda start: many(MIX, num=2, start=start).x)(jnp.asarray(2))
    np.testing.assert_allclose(tail, whole[2:], rtol=1e-12)
    raw = jd.sample(jax.random.PRNGKey(11), MIX, (2,), num=4, solver=DDIM(eta=0.5), ts=TS)
    np.testing.assert_array_equal(raw.x, whole)


def test_the_start_is_the_prior_and_each_step_has_its_own_noise():
    """The start is of fold_in(key_i, 0), that of step k of fold_in(fold_in(key_i, 1), 16k)."""
    nothing = jd.Denoiser(VP, lambda t, x, cond: jnp.zeros_like(x))
    out = jd.draw(KEY, nothing, (2,), solver=EulerMaruyama("u"), ts=TS, trajectory=True)
    path = np.asarray(out.aux["trajectory"])
    sigma = np.asarray(jax.vmap(VP.sigma)(TS))
    first = jax.random.normal(jax.random.fold_in(KEY, 0), (2,), float)
    np.testing.assert_allclose(path[0], sigma[0] * first, rtol=1e-14)
    row = EulerMaruyama("u").tabulate(VP, TS).rows
    noise = jax.random.fold_in(KEY, 1)
    for k in range(8):
        z = jax.random.normal(jax.random.fold_in(noise, 16 * k), (2,), float)
        expected = row.decay[k] * path[k] + row.noise[0][k] * z
        np.testing.assert_allclose(path[k + 1], expected, rtol=1e-12)


# --- Options. ---


def test_every_sample_has_its_own_condition():
    denoiser = jd.Denoiser(VP, lambda t, x, cond: cond["shift"] + 0 * x)
    call = functools.partial(
        jd.sample, KEY, denoiser, (2,), num=5, solver=DDIM(), ts=TS, denoise=True
    )
    shifts = np.arange(10.0).reshape(5, 2)
    for chunk in (None, 2):  # m = cond exactly, so the denoised sample is the condition
        np.testing.assert_array_equal(call(cond={"shift": shifts}, chunk=chunk).x, shifts)


def test_init_replaces_the_prior_and_no_key_is_needed():
    init = np.random.default_rng(0).normal(size=(3, 2))
    whole = jd.sample(None, MIX, (2,), num=3, solver=DPMpp2M(), ts=TS, init=init, chunk=2)
    one = jd.draw(None, MIX, (2,), solver=DPMpp2M(), ts=TS, init=init[2])
    np.testing.assert_allclose(whole.x[2], one.x, rtol=1e-12)
    assert not np.allclose(whole.x[0], whole.x[1])


def test_denoise_and_trajectory():
    call = functools.partial(jd.draw, None, MIX, (2,), solver=DDIM(), ts=TS, init=np.ones(2))
    plain, seen = call(), call(trajectory=True, denoise=True)
    path, ts = seen.aux["trajectory"], seen.aux["ts"]
    assert plain.aux == {} and path.shape == (10, 2) and ts.shape == (10,)
    np.testing.assert_array_equal(ts[:9], TS)
    np.testing.assert_array_equal(path[0], np.ones(2))
    np.testing.assert_allclose(path[8], plain.x, rtol=1e-13)
    np.testing.assert_array_equal(path[9], seen.x)
    alpha, sigma = float(VP.alpha(TS[-1])), float(VP.sigma(TS[-1]))
    np.testing.assert_allclose(seen.x, LAW.posterior_mean(plain.x, alpha, sigma), rtol=1e-10)
    assert int(plain.nfe) == 8 and int(seen.nfe) == 9


def test_a_trajectory_of_a_diffrax_solver_is_in_x():
    """Euler in clock r is DDIM, at every node and not only at the end."""
    call = functools.partial(jd.draw, None, MIX, (2,), ts=TS, init=np.ones(2), trajectory=True)
    ours, theirs = call(solver=DDIM()).aux, call(solver=dfx.Euler()).aux
    np.testing.assert_array_equal(ours["ts"], theirs["ts"])
    np.testing.assert_allclose(ours["trajectory"], theirs["trajectory"], rtol=1e-11)


def test_to_clean_data_is_a_denoising_step():
    path = PROCESSES["Rectified"]
    denoiser = jd.exact.mixture(path, LAW.weights, LAW.means, LAW.covs)
    call = functools.partial(
        jd.draw, None, denoiser, (2,), solver=DDIM(), init=np.ones(2), trajectory=True
    )
    whole, most = call(ts=np.linspace(1, 0, 6)), call(ts=np.linspace(1, 0.2, 5))
    np.testing.assert_allclose(whole.x, LAW.posterior_mean(most.x, 0.8, 0.2), rtol=1e-10)
    assert int(whole.nfe) == 5 and whole.aux["ts"][-1] == 0
    assert whole.aux["trajectory"].shape == (6, 2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_of_everything(dtype):
    out = many(MIX, num=2, dtype=dtype, trajectory=True)
    assert {out.x.dtype, out.aux["trajectory"].dtype, out.aux["ts"].dtype} == {np.dtype(dtype)}
    assert jnp.issubdtype(out.nfe.dtype, jnp.integer)


@pytest.mark.filterwarnings("ignore")
def test_a_progress_bar_changes_nothing(capsys):
    quiet = many(MIX, num=5, chunk=2)
    shown = many(MIX, num=5, chunk=2, progress=True)
    np.testing.assert_allclose(shown.x, quiet.x, rtol=1e-13)
    assert "sample" in capsys.readouterr().err


def test_an_adaptive_solve_meets_its_tolerance():
    init = np.array([[0.4, -0.7], [-1.5, 0.2]])
    call = functools.partial(
        jd.sample, None, MIX, (2,), num=2, init=init, ts=np.array([0.9, 0.5, 0.05])
    )
    control = dfx.PIDController(1e-5, 1e-5)
    loose = jd.check(call(solver=dfx.Tsit5(), controller=control, trajectory=True))
    tight = jd.check(call(solver=dfx.Dopri8(), controller=dfx.PIDController(1e-12, 1e-12)))
    error = np.abs(loose.x - tight.x).max()
    assert 1e-9 < error < 1e-3
    path = loose.aux["trajectory"]
    assert path.shape == (2, 3, 2)
    np.testing.assert_allclose(path[:, 0], init, rtol=1e-12)
    np.testing.assert_allclose(path[:, -1], loose.x, rtol=1e-12)
    assert np.all(loose.nfe > 10) and np.all((loose.nfe - 1) % 6 == 0)


# --- Tracing. ---


def test_nothing_is_traced_twice():
    traces = _Counter()

    def run(seed, denoiser, ts, cond):
        key = jax.random.key(seed)
        return jd.sample(
            key, denoiser, (2,), num=3, solver=DDIM(eta=0.5), ts=ts, cond=cond, dtype=np.float32
        ).x

    cond = np.ones((3, 2), np.float32)
    inside = jax.jit(lambda s, d, ts, cond: run(s, d, ts, cond))
    for call, ts in ((run, TS), (inside, jnp.asarray(TS))):
        call(0, mlp(0, traces=traces), ts, cond)
        before = len(traces)
        assert before > 0
        call(1, mlp(0, traces=traces), ts, cond)
        call(0, mlp(1, traces=traces), ts, 2 * cond)
        call(0, mlp(0, traces=traces), 0.9 * ts + 0.01, cond)
        assert len(traces) == before
    data = np.random.default_rng(0).normal(size=(2, 6, 2))
    sizes = []
    for atoms in data:
        jd.sample(KEY, jd.exact.empirical(VP, atoms), (2,), num=3, solver=DDIM(), ts=TS)
        sizes.append(jd.batching._run_chunks._cached._cache_size())
    assert sizes[0] == sizes[1]


def test_draw_under_jit_vmap_and_grad():
    """Slopes in the start, the parameters of the network and of the process, by differences."""
    net = mlp(dtype=np.float64, width=4)

    def end(init, net, beta):
        path = jd.process.VP(beta_max=beta)
        denoiser = eqx.tree_at(lambda d: d.process, net, path)
        out = jd.draw(None, denoiser, (2,), solver=DPMpp2M(), ts=TS, init=init)
        return jnp.sum(out.x**2)

    init = jnp.array([0.4, -0.7])
    value_and_slopes = eqx.filter_jit(jax.value_and_grad(end, argnums=(0, 1, 2), allow_int=True))
    value, (by_init, by_net, by_beta) = value_and_slopes(init, net, 20.0)
    plain = eqx.filter_jit(end)
    np.testing.assert_allclose(value, plain(init, net, jnp.asarray(20.0)), rtol=1e-12)
    step = 1e-5

    def difference(init_step=0.0, net_step=0.0, beta_step=0.0):
        moved = [
            plain(
                init + sign * init_step,
                eqx.tree_at(lambda d: d.net.w1, net, net.net.w1 + sign * net_step),
                jnp.asarray(20.0 + sign * beta_step),
            )
            for sign in (1, -1)
        ]
        return (moved[0] - moved[1]) / (2 * step)

    direction = np.random.default_rng(1).normal(size=net.net.w1.shape)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9)
    close(by_init[0], difference(init_step=step * np.array([1.0, 0.0])))
    close((by_net.net.w1 * direction).sum(), difference(net_step=step * direction))
    close(by_beta, difference(beta_step=step))
    assert abs(by_beta) > 1e-6
    batch = jax.vmap(plain, in_axes=(0, None, None))(jnp.stack([init, 2 * init]), net, 20.0)
    close(batch[0], value, rtol=1e-12)


def test_a_gradient_keeps_states_and_not_networks():
    """Reverse-mode memory per step is a few states, not the hidden layers of the network."""
    width, d = 512, 2
    net = mlp(width=width, d=d)

    def temporary(n):
        ts = np.asarray(VP.grid(n))

        def loss(init, net):
            out = jd.draw(None, net, (d,), solver=DDIM(), ts=ts, init=init, dtype=np.float32)
            return jnp.sum(out.x)

        program = jax.jit(jax.grad(loss)).lower(jnp.ones(d, np.float32), net).compile()
        return program.memory_analysis().temp_size_in_bytes

    per_step = (temporary(120) - temporary(20)) / 100
    assert per_step < width * 4, per_step  # one hidden layer in float32


EVALUATIONS = {
    "DDIM": (DDIM(), {}, 8),
    "Heun": (Heun(), {}, 16),
    "denoise": (DDIM(eta=0.5), {"denoise": True}, 9),
    "Tsit5": (dfx.Tsit5(), {}, 49),
    "SEA": (dfx.SEA(), {}, 8),
    "ShARK": (dfx.ShARK(), {}, 16),
    "adaptive": (dfx.Bosh3(), {"controller": dfx.PIDController(1e-3, 1e-3)}, None),
}


@each(EVALUATIONS)
def test_nfe_is_the_number_of_evaluations(case):
    solver, kwargs, expected = case
    count = []

    def net(t, x, cond):
        jax.debug.callback(lambda: count.append(1))
        return jnp.tanh(x)

    out = jd.draw(KEY, jd.Denoiser(VP, net), (2,), solver=solver, ts=TS, **kwargs)
    jax.block_until_ready(out.x)
    jax.effects_barrier()
    assert int(out.nfe) == len(count)
    assert expected is None or len(count) == expected


# --- Failures. ---


def breaks_above(limit):
    return jd.Denoiser(VP, lambda t, x, cond: jnp.where(cond > limit, jnp.nan, 0.0) * x)


def test_a_broken_network_spoils_its_own_sample_only():
    cond = np.array([0.0, 5.0, 0.0, 7.0])
    call = functools.partial(
        jd.sample, KEY, breaks_above(1.0), (2,), num=4, solver=DDIM(), ts=TS, cond=cond
    )
    out = call()
    np.testing.assert_array_equal(np.isnan(out.x).all(1), cond > 1)
    np.testing.assert_array_equal(np.isnan(out.x).any(1), cond > 1)
    np.testing.assert_array_equal(out.result != dfx.RESULTS.successful, cond > 1)
    with pytest.raises(RuntimeError, match=r"2 of 4 samples failed, first at index 1: .*2 samples"):
        jd.check(out)
    good = call(cond=np.zeros(4))
    np.testing.assert_array_equal(good.x[::2], out.x[::2])
    assert jd.check(good) is good


def test_too_few_steps_is_a_failure_of_its_sample():
    out = jd.sample(
        KEY,
        MIX,
        (2,),
        num=3,
        solver=dfx.Tsit5(),
        ts=np.array([0.9, 0.01]),
        controller=dfx.PIDController(1e-9, 1e-9),
        max_steps=5,
    )
    assert np.isnan(out.x).all()
    with pytest.raises(RuntimeError, match=r"3 of 3 samples failed, first at index 0: .*max"):
        jd.check(out)
    one = jax.tree.map(lambda a: a[0], out)
    with pytest.raises(RuntimeError, match="1 of 1 samples failed"):
        jd.check(one)


# --- Errors. ---

RECTIFIED = jd.exact.gaussian(PROCESSES["Rectified"], np.zeros(2), 1.0)
ENDS = np.array([1.0, 0.5, 0.1])
BOTH = {  # what draw and sample refuse: changes of a good call, argument, what was given
    "shape": ({"shape": (2, -1)}, "shape", "(2, -1)"),
    "shape 2": ({"shape": (2, 1.5)}, "shape", "1.5"),
    "class": ({"solver": DDIM}, "solver", "DDIM"),
    "solver": ({"solver": "DDIM"}, "solver", "'DDIM'"),
    "denoiser": ({"denoiser": abs}, "denoiser", "abs"),
    "rising": ({"ts": TS[::-1]}, "ts", "0.001"),
    "equal": ({"ts": np.array([0.9, 0.5, 0.5, 0.1])}, "ts", "0.5 followed by 0.5 at node 1"),
    "outside": ({"ts": np.array([1.5, 0.5])}, "ts", "1.5"),
    "below": ({"ts": np.array([0.5, 1e-4])}, "ts", "0.0001"),
    "nan": ({"ts": np.array([0.5, np.nan])}, "ts", "nan"),
    "matrix": ({"ts": np.ones((2, 3))}, "ts", "(2, 3)"),
    "one node": ({"ts": np.ones(1)}, "ts", "(1,)"),
    "float32": (
        {"ts": np.array([0.5, 0.5 - 1e-9, 0.1]), "dtype": np.float32},
        "ts",
        "equal after rounding",
    ),
    "no key": ({"key": None}, "key", "NoneType"),
    "seed": ({"key": 0}, "key", "int"),
    "rbg": ({"key": jax.random.key(0, impl="rbg")}, "key", "rbg"),
    "keys": ({"key": jax.random.split(KEY, 3)}, "key", "(3,)"),
    "init": ({"init": np.ones(5)}, "init", "(5,)"),
    "int": ({"dtype": int}, "dtype", "int"),
    "clock": ({"solver": dfx.Heun(), "clock": "q"}, "clock", "'q'"),
    "clock u": ({"solver": dfx.Heun(), "clock": "u"}, "clock", "'u'"),
    "clock of ours": ({"clock": "r"}, "clock", "'r'"),
    "clock of sde": ({"solver": dfx.SEA(), "clock": "t"}, "clock", "'t'"),
    "equation": ({"solver": dfx.Heun(), "equation": "pde"}, "equation", "'pde'"),
    "equation of ours": ({"equation": "ode"}, "equation", "'ode'"),
    "engine": ({"engine": "fast"}, "engine", "'fast'"),
    "engine of theirs": ({"solver": dfx.Heun(), "engine": "scan"}, "engine", "'scan'"),
    "SEA from noise": ({"denoiser": RECTIFIED, "solver": dfx.SEA(), "ts": ENDS}, "ts[0]", "1.0"),
    "EM from noise": (
        {"denoiser": RECTIFIED, "solver": EulerMaruyama("t"), "ts": ENDS},
        "ts",
        "1.0",
    ),
}
MANY = {
    "num": ({"num": 0}, "num", "0"),
    "num bool": ({"num": True}, "num", "True"),
    "num float": ({"num": 2.0}, "num", "2.0"),
    "chunk": ({"chunk": -1}, "chunk", "-1"),
    "cond": ({"cond": {"a": np.ones((3, 2))}}, "cond", "(3, 2)"),
    "cond scalar": ({"cond": 1.0}, "cond", "()"),
    "init": ({"init": np.ones(2)}, "init", "(2,)"),
}


@pytest.mark.parametrize("where,case", [("draw", c) for c in BOTH] + [("sample", c) for c in MANY])
def test_errors_name_function_argument_and_what_was_given(where, case, as_users_see_it):
    change, argument, given = (BOTH if where == "draw" else MANY)[case]
    good = {"key": KEY, "denoiser": MIX, "shape": (2,), "solver": DDIM(), "ts": TS}
    if where == "sample":
        good["num"] = 4
    with pytest.raises(ValueError) as error:
        getattr(jd, where)(**(good | change))
    message = str(error.value)
    assert message.startswith(f"{where}: ") and f": {argument} must be" in message, message
    assert given in message.split(", got ", 1)[1], message


def test_sample_speaks_in_its_own_name():
    with pytest.raises(ValueError, match=r"sample: ts must be .* got"):
        jd.sample(KEY, MIX, (2,), num=2, solver=DDIM(), ts=TS[::-1])


# --- Devices. ---

DEVICES = """
import jax, jax.numpy as jnp, numpy as np
jax.config.update("jax_threefry_partitionable", True)
import jaxdiff as jd
from jax.sharding import AxisType, PartitionSpec as P

assert jax.device_count() == 4
vp = jd.process.VP()
rng = np.random.default_rng(0)
net = jd.exact.mixture(vp, np.ones(3), rng.normal(size=(3, 2)), 0.1)
zero = jd.Denoiser(vp, lambda t, x, cond: 0 * x)
key, ts = jax.random.key(0), vp.grid(6)
mesh = jax.make_mesh((4,), ("batch",), axis_types=(AxisType.Auto,))


def run(denoiser, start, num):
    return jd.sample(
        key, denoiser, (2,), num=num, start=start, solver=jd.solvers.DDIM(eta=0.5), ts=ts
    ).x


for denoiser, exact in ((net, False), (zero, True)):
    part = lambda start: run(denoiser, start[0], 2)
    mapped = jax.shard_map(
        part, mesh=mesh, in_specs=P("batch"), out_specs=P("batch"), check_vma=False
    )
    got = jax.jit(mapped)(jnp.arange(0, 8, 2))
    assert len(got.sharding.device_set) == 4
    want = run(denoiser, 0, 8)
    assert np.isfinite(want).all()
    if exact:
        np.testing.assert_array_equal(got, want)
    else:
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
print("same")
"""


@pytest.mark.slow
def test_four_devices_give_the_samples_of_one():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    run = subprocess.run(
        [sys.executable, "-c", DEVICES],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0 and run.stdout.endswith("same\n"), run.stderr[-2000:]


@pytest.mark.parametrize("solver", [EulerMaruyama("u"), DDIM(eta=1.0)], ids=["EM", "DDIM"])
def test_a_brownian_path_of_ones_own_drives_either_library(solver):
    """A tree in clock u: Euler-Maruyama of diffrax on the same path, step for step."""
    clock = jd.solvers.Clock(VP, "u")
    tree = dfx.VirtualBrownianTree(
        clock.of_t(TS[0]), clock.of_t(TS[-1]), 1e-3, (2,), jax.random.key(5)
    )
    kwargs = dict(ts=TS, noise=tree, init=jnp.array([0.3, -0.7]), trajectory=True)
    ours = jd.draw(None, MIX, (2,), solver=solver, **kwargs).aux["trajectory"]
    theirs = jd.draw(None, MIX, (2,), solver=dfx.Euler(), equation="sde", **kwargs)
    np.testing.assert_allclose(ours, theirs.aux["trajectory"], rtol=1e-9, atol=1e-9)


# --- The model as an argument, where the floats of its process are traced. ---

FLOW = PROCESSES["Rectified"]
FLOW_MIX = jd.exact.mixture(FLOW, [0.5, 0.5], [[-1.0, 0.0], [1.0, 0.5]], 0.04)


@pytest.mark.parametrize(
    "solver", [DDIM(), EulerMaruyama("t"), dfx.Euler(), dfx.SEA()], ids=lambda s: type(s).__name__
)
def test_the_step_to_clean_data_is_the_same_inside_jit(solver):
    ts = FLOW.grid(6, t_start=0.99)
    run = lambda model: jd.draw(KEY, model, (2,), solver=solver, ts=ts).x  # noqa: E731
    np.testing.assert_allclose(jax.jit(run)(FLOW_MIX), run(FLOW_MIX), rtol=1e-9)


def test_draw_in_an_eager_shard_map():
    mesh = jax.make_mesh((1,), ("b",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("b")

    def body(starts):
        return jd.sample(KEY, MIX, (2,), num=2, start=starts[0], solver=DDIM(), ts=VP.grid(4)).x

    mapped = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    whole = jd.sample(KEY, MIX, (2,), num=3, solver=DDIM(), ts=VP.grid(4)).x
    np.testing.assert_allclose(mapped(jnp.array([1])), whole[1:], rtol=1e-12)


def test_a_model_that_went_through_float32_takes_the_same_grid():
    moved = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), MIX)
    out = jd.draw(KEY, moved, (2,), solver=DDIM(), ts=VP.grid(3))
    assert np.isfinite(out.x).all()


def test_a_trajectory_starts_at_its_start():
    for solver in (DDIM(), dfx.Euler()):
        out = jd.draw(
            None, FLOW_MIX, (2,), solver=solver, ts=[0.5, 0.0], init=jnp.ones(2), trajectory=True
        )
        np.testing.assert_array_equal(out.aux["trajectory"][0], jnp.ones(2))
        np.testing.assert_array_equal(out.aux["ts"], [0.5, 0.0])


def test_times_are_float32_where_the_state_is_not():
    """In bfloat16 the indices 999 and 801 of a discrete process would be 1000 and 800."""
    seen = []

    def net(t, x, cond):
        jax.debug.callback(lambda t: seen.append(float(t)), t)
        return x

    path, ts = PROCESSES["Discrete"], [999, 801, 601, 301, 101]
    out = jd.draw(KEY, jd.Denoiser(path, net, "eps"), (2,), solver=DDIM(), ts=ts, dtype="bfloat16")
    jax.block_until_ready(out)
    assert out.x.dtype == jnp.bfloat16
    assert seen == ts[:-1]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_diffrax_solvers_meet_discrete_indices_exactly(dtype):
    seen = []

    def net(t, x, cond):
        jax.debug.callback(lambda t: seen.append(float(t)), t)
        return x

    ts = [999, 801, 601, 301, 101, 10, 0]
    model = jd.Denoiser(PROCESSES["Discrete"], net, "eps")
    jax.block_until_ready(jd.draw(KEY, model, (2,), solver=dfx.Euler(), ts=ts, dtype=dtype))
    assert seen == ts[:-1]


def test_evaluations_are_not_guessed():
    out = jd.draw(KEY, MIX, (2,), solver=dfx.SlowRK(), ts=VP.grid(3), equation="sde")
    assert out.nfe == -1


@pytest.mark.parametrize(
    "kwargs, parts",
    [
        (dict(start=1.5), ["start", "1.5"]),
        (dict(start=-1), ["start", "-1"]),
        (dict(start=2**32), ["start", "4294967296"]),
        (dict(solver=dfx.ShARK(), controller=dfx.PIDController(1e-3, 1e-3)), ["noise", "None"]),
        (dict(solver=dfx.Tsit5(), controller=dfx.PIDController), ["controller", "PIDController"]),
        (dict(max_steps=0), ["max_steps", "0"]),
        (dict(dtype="foo"), ["dtype", "foo"]),
        (dict(init="x"), ["init", "x"]),
        (dict(solver=dfx.Euler(), clock=np.ones(2)), ["clock", "1."]),
    ],
)
def test_more_wrong_arguments_get_one_sentence(as_users_see_it, kwargs, parts):
    with pytest.raises(ValueError) as error:
        jd.sample(KEY, MIX, (2,), **(dict(num=2, solver=DDIM(), ts=TS) | kwargs))
    assert all(part in str(error.value) for part in ["sample: ", *parts])
    assert len(str(error.value).splitlines()) == 1


def test_noise_that_is_no_path_or_not_wanted(as_users_see_it):
    with pytest.raises(ValueError, match="draw: noise must be a diffrax Brownian path"):
        jd.draw(KEY, MIX, (2,), solver=EulerMaruyama(), ts=TS, noise=jnp.ones(2))
    tree = dfx.VirtualBrownianTree(0.0, 1.0, 0.1, (2,), jax.random.key(5))
    with pytest.raises(ValueError, match="noise must be left out, since DDIM solves the ODE"):
        jd.draw(KEY, MIX, (2,), solver=DDIM(), ts=TS, noise=tree)


def test_a_network_of_noise_cannot_start_where_there_is_no_signal():
    model = jd.Denoiser(FLOW, lambda t, x, cond: x, "eps")
    with pytest.raises(ValueError, match=r"ts\[0\] must be a time with alpha > 0.* got t=1.0"):
        jd.draw(KEY, model, (2,), solver=DDIM(), ts=FLOW.grid(4))


def test_check_reads_results_of_any_rank_and_nothing_else():
    bad = jd.Denoiser(VP, lambda t, x, cond: x * jnp.nan)
    keys = jax.random.split(KEY, 3)
    many_keys = jax.vmap(lambda k: jd.sample(k, bad, (2,), num=2, solver=DDIM(), ts=TS))(keys)
    with pytest.raises(RuntimeError, match=r"6 of 6 samples failed.*detected during solve. \(6"):
        jd.check(many_keys)
    with pytest.raises(ValueError, match="samples must be a result of draw, sample or log_prob"):
        jd.check(jnp.ones(2))
    with pytest.raises(ValueError, match="call it outside jit"):
        jax.jit(lambda k: jd.check(jd.draw(k, MIX, (2,), solver=DDIM(), ts=TS)).x)(KEY)
