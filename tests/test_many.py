"""`sample`, `many` and `keys`: independence, keys, chunks, tracing, transformations and errors."""

import functools
import os
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from helpers import PROCESSES, Counter, mlp

import jaxdiff as jd
from jaxdiff.score import AbstractDenoiser
from jaxdiff.solvers import BELM, DDIM

LAW = oracles.GaussianMixture.random(3, 3, 2)
VP = PROCESSES["VP"]
MIX = jd.exact.mixture(VP, LAW.weights, LAW.means, LAW.covs)
TS = VP.grid(8)
KEY = jax.random.key(11)


def prepared(model=MIX, solver=None, **kwargs):
    solver = DDIM(eta=0.5) if solver is None else solver
    return jd.sampler(model, (2,), solver=solver, ts=TS, **kwargs)


RUN = prepared()


# --- Sample i is a function of (key, i). ---


@pytest.mark.parametrize("denoiser", [MIX, mlp()], ids=["mixture", "network"])
def test_a_sample_does_not_depend_on_its_call(denoiser):
    call = functools.partial(jd.sample, KEY, prepared(denoiser, dtype=np.float32))
    whole = call(num=11, chunk=4).x
    assert whole.dtype == jnp.float32 and np.unique(whole).size == whole.size
    # The same width of a chunk: bitwise, for any number and any start.
    np.testing.assert_array_equal(call(num=3, chunk=4).x, whole[:3])
    np.testing.assert_array_equal(call(num=5, chunk=4, start=3).x, whole[3:8])
    # Another width is another program, whose products may be rounded elsewhere.
    for got in (call(num=11).x, call(num=11, chunk=1).x):
        np.testing.assert_allclose(got, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.optimised
def test_a_sample_is_bitwise_the_same_in_wide_chunks():
    """Widths of whole vector registers run the same arithmetic, whatever `num` and `start`."""
    call = functools.partial(jd.sample, KEY, prepared(dtype=np.float32))
    whole = call(num=80, chunk=16).x
    for kwargs in (dict(num=80, chunk=32), dict(num=64, chunk=64), dict(num=48), dict(num=16)):
        np.testing.assert_array_equal(call(**kwargs).x, whole[: kwargs["num"]])
    np.testing.assert_array_equal(call(num=32, start=23, chunk=32).x, whole[23:55])


@pytest.mark.optimised
def test_the_noise_is_bitwise_the_same_in_any_chunking():
    """A denoiser that answers 0 leaves nothing but noise times coefficients."""
    nothing = jd.Denoiser(VP, lambda t, x, cond: jnp.zeros_like(x))
    run = prepared(nothing, dtype=np.float32, trajectory=True)
    call = functools.partial(jd.sample, KEY, run)
    whole = call(num=6).aux["trajectory"]
    for other in (call(num=6, chunk=1), call(num=6, chunk=4)):
        np.testing.assert_array_equal(other.aux["trajectory"], whole)
    np.testing.assert_array_equal(call(num=2, start=3).aux["trajectory"], whole[3:5])


def test_sample_is_the_sampler_with_the_folded_key():
    whole = jd.sample(KEY, RUN, num=4).x
    for i in (0, 3):
        one = RUN(jax.random.fold_in(KEY, i))
        assert one.x.shape == (2,) and one.nfe.shape == ()
        np.testing.assert_allclose(one.x, whole[i], rtol=1e-12)
    assert not np.any(jd.sample(jax.random.key(12), RUN, num=4).x == whole)


def test_start_may_be_traced_and_a_raw_key_is_its_typed_self():
    whole = jd.sample(KEY, RUN, num=4).x
    tail = jax.jit(lambda start: jd.sample(KEY, RUN, num=2, start=start).x)(jnp.asarray(2))
    np.testing.assert_allclose(tail, whole[2:], rtol=1e-12)
    raw = jd.sample(jax.random.PRNGKey(11), RUN, num=4)
    np.testing.assert_array_equal(raw.x, whole)


def test_every_sample_has_its_own_condition():
    denoiser = jd.Denoiser(VP, lambda t, x, cond: cond["shift"] + 0 * x)
    run, shifts = prepared(denoiser, denoise=True), np.arange(10.0).reshape(5, 2)
    for chunk in (None, 2):  # m = cond exactly, so the denoised sample is the condition
        out = jd.sample(KEY, run, num=5, cond={"shift": shifts}, chunk=chunk)
        np.testing.assert_array_equal(out.x, shifts)


@pytest.mark.filterwarnings("ignore")
def test_a_progress_bar_changes_nothing(capsys):
    quiet = jd.sample(KEY, RUN, num=5, chunk=2)
    shown = jd.sample(KEY, RUN, num=5, chunk=2, progress=True)
    np.testing.assert_allclose(shown.x, quiet.x, rtol=1e-13)
    assert "sample" in capsys.readouterr().err


# --- Transformations. ---


def test_transformations_of_a_sampler_draw_the_same():
    keys, whole = jd.keys(KEY, 0, 6), jd.sample(KEY, RUN, num=6)
    mapped = jax.vmap(RUN)(keys)
    np.testing.assert_array_equal(mapped.x, whole.x)
    np.testing.assert_array_equal(mapped.nfe, whole.nfe)
    np.testing.assert_allclose(jax.jit(RUN)(keys[2]).x, whole.x[2], rtol=1e-12)
    on_devices = jax.pmap(jax.vmap(RUN))(keys.reshape(1, 6))
    np.testing.assert_allclose(on_devices.x[0], whole.x, rtol=1e-12)
    jitted = jax.jit(lambda key: jd.sample(key, RUN, num=6, chunk=4))(KEY)
    np.testing.assert_allclose(jitted.x, whole.x, rtol=1e-12)
    assert jitted.nfe.shape == (6,)


def test_keys_are_folded_with_the_index():
    want = [jax.random.key_data(jax.random.fold_in(KEY, i)) for i in (3, 4)]
    np.testing.assert_array_equal(jax.random.key_data(jd.keys(KEY, 3, 2)), want)
    traced = jax.jit(lambda start: jd.keys(KEY, start, 2))(3)
    np.testing.assert_array_equal(jax.random.key_data(traced), want)


class Counted(AbstractDenoiser):
    """A denoiser that tells when it is traced."""

    inner: AbstractDenoiser
    traces: Counter = eqx.field(static=True)

    process = property(lambda self: self.inner.process)

    def pair(self, t, x, cond=None):
        self.traces.append(1)
        return self.inner.pair(t, x, cond)


def test_nothing_is_traced_twice():
    """Not for keys, parameters, conditions or grids; outside jit, and with the solve inside."""
    traces, cond = Counter(), np.ones((3, 2), np.float32)

    def run(seed, denoiser, ts, cond):
        run = jd.sampler(denoiser, (2,), solver=DDIM(eta=0.5), ts=ts, dtype=np.float32)
        return jd.sample(jax.random.key(seed), run, num=3, cond=cond).x

    net = functools.partial(mlp, traces=traces)
    inside = jax.jit(lambda s, d, ts, cond: run(s, d, ts, cond))
    for call, ts in ((run, TS), (inside, jnp.asarray(TS))):
        call(0, net(0), ts, cond)
        before = len(traces)
        assert before > 0
        call(1, net(0), ts, cond)
        call(0, net(1), ts, 2 * cond)
        call(0, net(0), 0.9 * ts + 0.01, cond)
        assert len(traces) == before
    traces, counts = Counter(), []
    for atoms in np.random.default_rng(0).normal(size=(2, 6, 2)):
        jd.sample(KEY, prepared(Counted(jd.exact.empirical(VP, atoms), traces)), num=3)
        counts.append(len(traces))
    assert counts[0] == counts[1] > 0


def test_a_network_is_traced_once_for_all_that_is_drawn():
    """Of one preparation: keys, conditions, new parameters, and any number in chunks of one."""
    traces, cond = Counter(), np.ones(2, np.float32)
    net = functools.partial(mlp, traces=traces)
    run = prepared(net(0), dtype=np.float32)
    first = run(KEY, cond).x
    other = run.with_model(net(1))
    for again, key, c in ((run, jax.random.key(3), 2 * cond), (other, KEY, cond)):
        assert not np.any(again(key, c).x == first)
    prepared(net(1), dtype=np.float32)(KEY, cond)  # another that differs in arrays only
    assert len(traces) == 1
    for num in (3, 5, 8):
        jd.sample(KEY, run, num=num, chunk=2, cond=np.ones((num, 2), np.float32))
    jd.sample(KEY, other, num=3, chunk=2, start=7, cond=np.ones((3, 2), np.float32))
    assert len(traces) == 2


# --- Many of any function. ---


def test_many_are_calls_with_their_rows_and_folded_keys():
    fn = lambda x, y, key: x * y["a"] + jax.random.normal(key, ())  # noqa: E731
    x, y = np.arange(1.0, 6.0), {"a": np.linspace(2, 3, 5)}
    normals = [jax.random.normal(jax.random.fold_in(KEY, 4 + i), ()) for i in range(5)]
    for chunk in (None, 1, 2):
        got = jd.many(fn, x, y, key=KEY, start=4, chunk=chunk)
        np.testing.assert_allclose(got, x * y["a"] + np.array(normals), rtol=1e-14)
    without = jd.many(lambda x, none: x**2 if none is None else x, x, None, chunk=2)
    np.testing.assert_array_equal(without, x**2)


def test_many_compiles_a_prepared_function_once_and_takes_methods():
    traces = Counter()
    belm = prepared(mlp(0, np.float64, traces), BELM())
    x = jd.sample(KEY, belm, num=3).x
    before = len(traces)
    there = jd.many(belm.invert, x, chunk=2)
    assert len(traces) > before
    before = len(traces)
    jd.many(belm.with_model(mlp(1, np.float64, traces)).invert, x, chunk=2)
    assert len(traces) == before
    np.testing.assert_allclose(there.x[1], belm.invert(x[1]).x, rtol=1e-12)
    np.testing.assert_allclose(jd.sample(None, belm, num=3, init=there).x, x, rtol=1e-11)


# --- Errors. ---

SAMPLE = {  # changes of a good call of 4, argument, what was given
    "num": ({"num": 0}, "num", "0"),
    "num bool": ({"num": True}, "num", "True"),
    "num float": ({"num": 2.0}, "num", "2.0"),
    "chunk": ({"chunk": -1}, "chunk", "-1"),
    "cond": ({"cond": {"a": np.ones((3, 2))}}, "cond", "(3, 2)"),
    "cond scalar": ({"cond": 1.0}, "cond", "()"),
    "init": ({"init": np.ones(2)}, "init", "(2,)"),
    "text": ({"init": "x"}, "init", "'x'"),
    "start": ({"start": 1.5}, "start", "1.5"),
    "negative": ({"start": -1}, "start", "-1"),
    "large": ({"start": 2**32}, "start", "4294967296"),
    "no key": ({"key": None}, "key", "NoneType"),
    "rbg": ({"key": jax.random.key(0, impl="rbg")}, "key", "rbg"),
    "model": ({"sampler": MIX}, "sampler", "Mixture"),
    "solver": ({"sampler": DDIM()}, "sampler", "DDIM"),
}


@pytest.mark.parametrize("case", SAMPLE)
def test_errors_of_sample_name_the_argument_and_what_was_given(case, as_users_see_it):
    change, argument, given = SAMPLE[case]
    with pytest.raises(ValueError) as error:
        jd.sample(**({"key": KEY, "sampler": RUN, "num": 4} | change))
    message = str(error.value)
    assert message.startswith("sample: ") and f": {argument} must be" in message, message
    assert given in message.split(", got ", 1)[1], message


def test_errors_of_many_and_keys(as_users_see_it):
    cases = [
        (lambda: jd.many(3, np.ones(2)), "many: fn must be a function of one row, got 3"),
        (lambda: jd.many(np.square), r"many: each must be pytrees .* got \(\)"),
        (lambda: jd.many(np.square, 1.0), r"many: each must be pytrees .* leading axis"),
        (lambda: jd.many(max, np.ones(2), np.ones(3)), r"many: each .*num=2, got .* \(3,\)"),
        (lambda: jd.many(jnp.square, np.ones(2), chunk=0), "many: chunk must be .* got 0"),
        (lambda: jd.many(jnp.square, np.ones(2), key=0), "many: key must be a key .* got int"),
        (lambda: jd.keys(0), "keys: key must be a key .* got int"),
        (lambda: jd.keys(KEY, 0, 0), "keys: num must be .* got 0"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


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
    prepared = jd.sampler(denoiser, (2,), solver=jd.solvers.DDIM(eta=0.5), ts=ts)
    return jd.sample(key, prepared, num=num, start=start).x


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


def test_sample_in_an_eager_shard_map():
    mesh = jax.make_mesh((1,), ("b",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("b")
    run = prepared(solver=DDIM())
    body = lambda starts: jd.sample(KEY, run, num=2, start=starts[0]).x  # noqa: E731
    mapped = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    whole = jd.sample(KEY, run, num=3).x
    np.testing.assert_allclose(mapped(jnp.array([1])), whole[1:], rtol=1e-12)
