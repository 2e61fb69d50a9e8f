"""Checks on eight virtual devices: run by `test_shard.py` in a process that has them."""

import functools

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxdiff as jd
from jaxdiff import shard

VP, KEY = jd.process.VP(), jax.random.key(11)
MIX = jd.exact.mixture(VP, [0.4, 0.6], [[-1.0, 0.0], [1.0, 0.5]], 0.04)
TS = VP.grid(10, "logsnr")


def mesh_of(*shape, names=("batch", "data"), kind=AxisType.Auto):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names[: len(shape)], (kind,) * len(shape), devices=devices)


@functools.cache
def alone(solver, num=16):
    task = dict(num=num, solver=solver, ts=TS, dtype=np.float32, trajectory=True)
    return task, jd.sample(KEY, MIX, (2,), **task)


SOLVERS = [jd.solvers.DPMpp2M(), jd.solvers.DDIM(eta=0.7)]


def test_decompositions_on_many_devices_do_not_wait_for_each_other():
    """In 32 dimensions, where those of jaxlib in batches are known to hang for ever."""
    law = jd.exact.mixture(VP, np.ones(2), np.linspace(-1, 1, 64).reshape(2, 32), 0.1)
    rule = jd.fisher.Newton(jd.fisher.Curvature("exact"))
    for solver in (
        jd.solvers.LocalGaussian(rule.curvature),
        jd.solvers.LangevinCorrected(jd.solvers.Secant(3), kernel=rule),
    ):
        task = dict(num=8, solver=solver, ts=TS)
        want = jd.sample(KEY, law, (32,), **task).x
        got = shard.sample(mesh_of(4), KEY, law, (32,), **task).x
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("solver", SOLVERS, ids=["ODE", "SDE"])
def test_noise_and_samples_do_not_depend_on_the_devices(solver):
    task, want = alone(solver)
    runs = {f"{n} devices": shard.sample(mesh_of(n), KEY, MIX, (2,), **task) for n in (1, 2, 4, 8)}
    runs["chunks"] = shard.sample(mesh_of(2), KEY, MIX, (2,), chunk=3, **task)
    runs["bar"] = shard.sample(mesh_of(2), KEY, MIX, (2,), chunk=3, progress=True, **task)
    pmapped = shard.pmap_sample(KEY, MIX, (2,), **task)
    assert pmapped.x.shape == (8, 2, 2) and len(pmapped.x.sharding.device_set) == 8
    runs["pmap"] = jax.tree.map(lambda a: a.reshape(16, *a.shape[2:]), shard.gather(pmapped))
    chunked = shard.pmap_sample(KEY, MIX, (2,), chunk=3, devices=jax.devices()[:4], **task)
    runs["pmap in chunks"] = jax.tree.map(lambda a: a.reshape(16, *a.shape[2:]), chunked)
    half = task | {"num": 8}
    tail = shard.sample(mesh_of(4), KEY, MIX, (2,), start=8, **half)
    for name, out in runs.items():
        start = out.aux["trajectory"][:, 0], want.aux["trajectory"][:, 0]
        np.testing.assert_array_equal(*start, err_msg=name)
        np.testing.assert_allclose(out.x, want.x, rtol=1e-6, atol=1e-6, err_msg=name)
        np.testing.assert_array_equal(out.nfe, want.nfe)
    np.testing.assert_allclose(tail.x, want.x[8:], rtol=1e-6, atol=1e-6)
    assert runs["8 devices"].x.sharding.is_equivalent_to(NamedSharding(mesh_of(8), P("batch")), 2)


def test_the_noise_of_every_step_is_bitwise_the_same():
    """A network of zeros leaves nothing but noise in the state."""
    nothing = jd.Denoiser(VP, lambda t, x, cond: jnp.zeros_like(x))
    task = dict(num=16, solver=jd.solvers.EulerMaruyama(), ts=TS)
    want = jd.sample(KEY, nothing, (3,), **task).x
    np.testing.assert_array_equal(shard.sample(mesh_of(8), KEY, nothing, (3,), **task).x, want)


def test_nothing_is_exchanged():
    run = jax.jit(lambda key: shard.sample(mesh_of(8), key, MIX, (2,), **alone(SOLVERS[1])[0]).x)
    text = run.lower(KEY).compile().as_text()
    for name in ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert name not in text, name
    assert "fusion" in text  # there is a program


def test_nothing_is_traced_twice():
    traces = []

    def net(t, x, cond):
        traces.append(1)
        return jnp.tanh(x)

    model, task = jd.Denoiser(VP, net), dict(num=8, solver=jd.solvers.DDIM(), ts=TS)
    for run in (functools.partial(shard.sample, mesh_of(4)), shard.pmap_sample):
        run(KEY, model, (2,), **task)
        before = len(traces)
        run(jax.random.key(1), model, (2,), start=5, **task)
        assert len(traces) == before > 0


def test_a_failed_sample_concerns_nobody_else():
    """One of eight, on the second of four devices, needs more steps than it may make."""

    def net(t, x, stiff):
        return jnp.sin(stiff * x)

    stiff = np.ones(8).copy()
    stiff[3] = 1e5
    task = dict(
        num=8, cond=stiff, solver=dfx.Tsit5(), ts=TS, max_steps=60,
        controller=dfx.PIDController(rtol=1e-5, atol=1e-5),
    )  # fmt: skip
    out = shard.sample(mesh_of(4), KEY, jd.Denoiser(VP, net), (2,), **task)
    failed = np.arange(8) == 3
    np.testing.assert_array_equal(np.isnan(out.x).any(1), failed)
    np.testing.assert_array_equal(out.result != dfx.RESULTS.successful, failed)
    with pytest.raises(RuntimeError, match="1 of 8 samples failed, first at index 3"):
        jd.check(out)


class Layer(eqx.Module):
    first: jax.Array
    second: jax.Array

    def __call__(self, t, x, cond):
        return jnp.tanh(x @ self.first) @ self.second


def test_sharded_parameters_stay_where_they_are():
    mesh = mesh_of(2, 4, names=("batch", "model"))
    first, second = (0.1 * np.random.default_rng(i).normal(size=(8, 64)) for i in (0, 1))
    net = Layer(jnp.asarray(first), jnp.asarray(second.T))
    columns, rows = (NamedSharding(mesh, spec) for spec in (P(None, "model"), P("model")))
    spread = Layer(jax.device_put(first, columns), jax.device_put(second.T, rows))
    task = dict(num=4, solver=jd.solvers.DDIM(), ts=TS)
    want = jd.sample(KEY, jd.Denoiser(VP, net), (8,), **task).x
    run = jax.jit(lambda net: shard.sample(mesh, KEY, jd.Denoiser(VP, net), (8,), **task).x)
    np.testing.assert_allclose(run(spread), want, rtol=1e-12, atol=1e-12)
    eager = shard.sample(mesh, KEY, jd.Denoiser(VP, spread), (8,), **task).x
    np.testing.assert_allclose(eager, want, rtol=1e-12, atol=1e-12)
    text = run.lower(spread).compile().as_text()
    assert "all-gather" not in text and "f64[8,16]" in text  # a quarter of the columns, at home


# --- The data-sharded oracle. ---


@pytest.mark.parametrize("n", [5, 1003])
def test_the_sharded_oracle_is_the_oracle(n):
    rng = np.random.default_rng(n)
    data, weights = rng.normal(size=(n, 2, 3)) + 40.0, rng.uniform(size=n)
    weights[: n // 3] = 0
    whole = jd.exact.empirical(VP, data, weights, chunk=64)
    parts = shard.empirical(mesh_of(8, names=("data",)), VP, data, weights, chunk=64)
    assert len(parts.atoms.sharding.device_set) == 8
    vs = jnp.asarray(rng.normal(size=(2, 2, 3)))
    every = jax.jit(lambda oracle, t, x: oracle.posterior(t, x, vs))
    for t in (1e-3, 0.3, 0.9):
        x = jnp.asarray(
            float(VP.alpha(t)) * data[-1] + float(VP.sigma(t)) * rng.normal(size=(2, 3))
        )
        for got, want in zip(every(parts, t, x), every(whole, t, x), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)
    if n > 5:
        slope = jax.jit(jax.grad(lambda x, oracle: oracle.log_density(0.3, x)))
        np.testing.assert_allclose(slope(x, parts), slope(x, whole), rtol=1e-9)
        np.testing.assert_allclose(slope(x, parts), parts.score(0.3, x), rtol=1e-9)
        pairs = [jd.fisher.fisher(oracle, 0.3, x) for oracle in (parts, whole)]
        products, traces = zip(*[(F.mv(x), jd.fisher.trace(F)[0]) for F in pairs], strict=True)
        np.testing.assert_allclose(*products, rtol=1e-9)
        np.testing.assert_allclose(*traces, rtol=1e-9)


def test_an_oracle_samples_on_two_axes(tmp_path):
    """Samples over one axis, data over the other, read from a file by slices."""
    data = np.random.default_rng(0).normal(size=(333, 4)).astype(np.float32)
    np.save(tmp_path / "data.npy", data)
    mesh = mesh_of(2, 4)
    parts = shard.empirical(mesh, VP, np.load(tmp_path / "data.npy", mmap_mode="r"), chunk=16)
    task = dict(num=6, solver=jd.solvers.DPMpp2M(), ts=TS, dtype=np.float32)
    want = jd.sample(KEY, jd.exact.empirical(VP, data), (4,), **task).x
    got = shard.sample(mesh, KEY, parts, (4,), **task).x
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    adaptive = dict(solver=dfx.Tsit5(), controller=dfx.PIDController(rtol=1e-3, atol=1e-3))
    got = shard.sample(mesh, KEY, parts, (4,), **task | adaptive)
    assert np.isfinite(jd.check(got).x).all()


# --- The other entry points. ---


def test_likelihoods_and_inversions():
    x = np.asarray(alone(SOLVERS[0], 8)[1].x, np.float64)
    probes = jd.fisher.Hutchinson(probes=2)
    kwargs = dict(ts=TS, solver=dfx.Heun(), trace=probes)
    got = shard.log_prob(mesh_of(4), MIX, x, key=KEY, **kwargs)
    one = lambda i, x: jd.log_prob(MIX, x, key=jax.random.fold_in(KEY, i), **kwargs)  # noqa: E731
    want = jax.vmap(one)(jnp.arange(8, dtype=jnp.uint32), x)
    np.testing.assert_allclose(got.log_prob, want.log_prob, rtol=1e-10)
    np.testing.assert_allclose(got.error, want.error, rtol=1e-10)

    net = jd.Denoiser(VP, lambda t, x, cond: jnp.tanh(x))  # with its exact trace
    got = shard.log_prob(mesh_of(4), net, x, ts=TS).log_prob
    want = jax.vmap(lambda x: jd.log_prob(net, x, ts=TS).log_prob)(x)
    np.testing.assert_allclose(got, want, rtol=1e-10)

    trip = dict(solver=jd.solvers.SymmetricLeapfrog(), ts=TS)
    noise = shard.invert(mesh_of(4), MIX, x, **trip)
    plain = jax.vmap(lambda x: jd.invert(MIX, x, **trip))(x)
    np.testing.assert_allclose(noise.pair, plain.pair, rtol=1e-10, atol=1e-10)
    back = shard.sample(mesh_of(4), None, MIX, (2,), num=8, init=noise, **trip)
    np.testing.assert_allclose(back.x, x, rtol=1e-12)
    again = shard.invert(mesh_of(4), MIX, back, **trip)
    np.testing.assert_allclose(again.x, noise.x, rtol=1e-11)


def test_files_of_a_mesh(tmp_path):
    task = dict(num=20, solver=jd.solvers.DDIM(eta=1.0), ts=TS)
    shard.sample_to(tmp_path, KEY, MIX, (2,), per_file=8, mesh=mesh_of(4), progress=False, **task)
    want = jd.sample(KEY, MIX, (2,), **task)
    np.testing.assert_allclose(shard.read(tmp_path).x, want.x, rtol=1e-12)
    with pytest.raises(ValueError, match="per_file must be a multiple of the 4 devices, got 6"):
        shard.sample_to(tmp_path, KEY, MIX, (2,), per_file=6, mesh=mesh_of(4), **task)


def test_an_ambient_mesh_changes_nothing():
    task, want = alone(SOLVERS[0])
    for ambient in (mesh_of(4), mesh_of(2, 4)):
        with jax.set_mesh(ambient):
            got = shard.sample(mesh_of(4), KEY, MIX, (2,), **task).x
        np.testing.assert_allclose(got, want.x, rtol=1e-6, atol=1e-6)


MISTAKES = {
    "must be a multiple of the 4 devices that share the samples, as 12": dict(num=10),
    r"axis must be one of .'batch',., the axes of the mesh, got data": dict(axis="data"),
    "mesh must be one whose axes are jax.sharding.AxisType.Auto": dict(kind=AxisType.Explicit),
    "mesh must be a jax.sharding.Mesh, as jax.make_mesh.* got 'all'": dict(mesh="all"),
    "key must be a threefry key": dict(key=jax.random.key(0, impl="rbg")),
}


@pytest.mark.parametrize("said", MISTAKES)
def test_a_mistake_gets_one_sentence(said, as_users_see_it):
    given = dict(MISTAKES[said])
    mesh = given.pop("mesh", mesh_of(4, kind=given.pop("kind", AxisType.Auto)))
    key, num = given.pop("key", KEY), given.pop("num", 8)
    with pytest.raises(ValueError, match=said):
        shard.sample(mesh, key, MIX, (2,), num=num, solver=jd.solvers.DDIM(), ts=TS, **given)


def test_mistakes_elsewhere():
    with pytest.raises(ValueError, match="pmap_sample: num must be a multiple of the 8"):
        shard.pmap_sample(KEY, MIX, (2,), num=9, solver=jd.solvers.DDIM(), ts=TS)
    with pytest.raises(ValueError, match=r"shard.empirical: axis must be one of .'batch',."):
        shard.empirical(mesh_of(4), VP, np.ones((3, 2)))
