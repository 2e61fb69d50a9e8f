"""Checks on eight virtual devices: run by `test_shard.py` in a process that has them."""

import functools
import subprocess
import sys
import time
from pathlib import Path

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxdiff as jd
from jaxdiff import mcmc, pfgm, phase, shard
from jaxdiff.interpolants import Model, bridge

VP, KEY = jd.process.VP(), jax.random.key(11)
MIX = jd.exact.mixture(VP, [0.4, 0.6], [[-1.0, 0.0], [1.0, 0.5]], 0.04)
TS = VP.grid(10, "logsnr")


def mesh_of(*shape, names=("batch", "data"), kind=AxisType.Auto):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, names[: len(shape)], (kind,) * len(shape), devices=devices)


def prepared(solver, model=MIX, shape=(2,), **options):
    return jd.sampler(model, shape, solver=solver, ts=TS, **options)


@functools.cache
def alone(solver, num=16):
    sampler = prepared(solver, dtype=np.float32, trajectory=True)
    return sampler, jd.sample(KEY, sampler, num=num)


@functools.cache
def families():
    """Samplers of all families: one program below is for all of them."""
    normal = jd.exact.gaussian(VP, [0.3, -0.2], 0.25)
    cld, psld = (phase.Lifted(process, normal) for process in (phase.CLD(), phase.PSLD()))
    drifts = [lambda t, x, cond: 2 * x - t, lambda t, x, cond: jnp.tanh(t * x)]
    between = Model(bridge("linear", "sqrt"), *drifts, base=jax.random.normal)
    charges = pfgm.empirical(pfgm.PFGMpp(D=8.0), [[-1.2, 0.4], [0.3, -0.9], [1.5, 1.1]])
    noisy = dict(ts=np.linspace(0.95, 0.05, 11), diffusion=0.3)
    rows = {
        "Gaussian path, ODE": (MIX, jd.solvers.DDIM(), dict(ts=TS)),
        "Gaussian path, SDE": (MIX, jd.solvers.DDIM(eta=1.0), dict(ts=TS)),
        "CLD": (cld, phase.Rotation(), dict(ts=cld.process.grid(10))),
        "PSLD": (psld, phase.SSCS(), dict(ts=psld.process.grid(10))),
        "interpolant": (between, dfx.Euler(), noisy),
        "PFGM++": (charges, jd.solvers.Heun(), dict(ts=charges.process.grid(10))),
    }
    more = dict(dtype=np.float32, trajectory=True)
    return {
        name: jd.sampler(model, (2,), solver=solver, **options, **more)
        for name, (model, solver, options) in rows.items()
    }


FILES = dict(num=320, per_file=8, progress=False)  # 40 files of each family


def write_all(folder):
    for name, sampler in families().items():
        jd.sample_to(Path(folder) / name, KEY, sampler, on=mesh_of(4), **FILES)


SOLVERS = [jd.solvers.DPMpp2M(), jd.solvers.DDIM(eta=0.7)]


def test_decompositions_on_many_devices_do_not_wait_for_each_other():
    """In 32 dimensions, where those of jaxlib in batches are known to hang for ever."""
    law = jd.exact.mixture(VP, np.ones(2), np.linspace(-1, 1, 64).reshape(2, 32), 0.1)
    rule = jd.fisher.Newton(jd.fisher.Curvature("exact"))
    for solver in (
        jd.solvers.LocalGaussian(rule.curvature),
        jd.solvers.Between(jd.solvers.Secant(3), jd.solvers.Langevin(kernel=rule)),
    ):
        sampler = prepared(solver, law, (32,))
        want = jd.sample(KEY, sampler, num=8).x
        got = jd.sample(KEY, sampler, num=8, on=mesh_of(4)).x
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def pmapped(sampler, num, count):
    keys = jd.keys(KEY, 0, num).reshape(count, -1)
    return jax.pmap(jax.vmap(sampler), devices=jax.devices()[:count])(keys)


def flat(tree, num=16):
    return jax.tree.map(lambda a: a.reshape(num, *a.shape[2:]), jd.gather(tree))


def same(out, want, name="", start_ulps=0):
    """The noise is the same bit for bit, and the samples up to rounding."""
    start = out.aux["trajectory"][:, 0], want.aux["trajectory"][:, 0]
    np.testing.assert_allclose(*start, rtol=start_ulps * 2.0**-23, atol=0, err_msg=name)
    np.testing.assert_allclose(out.x, want.x, rtol=1e-6, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(out.nfe, want.nfe)


@pytest.mark.parametrize("solver", SOLVERS, ids=["ODE", "SDE"])
def test_noise_and_samples_do_not_depend_on_the_devices(solver):
    sampler, want = alone(solver)
    go = functools.partial(jd.sample, KEY, sampler, num=16)
    runs = {f"{n} devices": go(on=mesh_of(n)) for n in (1, 2, 4, 8)}
    runs["chunks"] = go(chunk=3, on=mesh_of(2))
    runs["bar"] = go(chunk=3, progress=True, on=mesh_of(2))
    on_all = pmapped(sampler, 16, 8)
    assert on_all.x.shape == (8, 2, 2) and len(on_all.x.sharding.device_set) == 8
    runs["pmap"] = flat(on_all)
    tail = jd.sample(KEY, sampler, num=8, start=8, on=mesh_of(4))
    for name, out in runs.items():
        same(out, want, name)
    np.testing.assert_allclose(tail.x, want.x[8:], rtol=1e-6, atol=1e-6)
    assert runs["8 devices"].x.sharding.is_equivalent_to(NamedSharding(mesh_of(8), P("batch")), 2)


@pytest.mark.parametrize("name", families())
def test_one_program_runs_all_families(name, tmp_path):
    sampler, mesh = families()[name], mesh_of(4)
    want = jd.check(jd.sample(KEY, sampler, num=16))
    assert np.std(want.x) > 0.1
    jd.sample_to(tmp_path, KEY, sampler, num=16, per_file=8, on=mesh, progress=False)
    runs = {
        "devices": jd.sample(KEY, sampler, num=16, on=mesh),
        "chunks": jd.sample(KEY, sampler, num=16, chunk=3, on=mesh),
        "chunks of one device": jd.sample(KEY, sampler, num=16, chunk=5),
        "files": jd.read(tmp_path),
        "pmap": flat(pmapped(sampler, 16, 4)),
    }
    for run, out in runs.items():
        # the prior of PFGM++ is a product of draws, which the program of pmap rounds in its own way
        same(out, want, run, start_ulps=2 * (name == "PFGM++" and run == "pmap"))


JOB = "import sys, conftest, sharded; sharded.write_all(sys.argv[1])"  # of the same settings


def test_a_kill_in_between_leaves_no_trace_in_any_family(tmp_path):
    """Another process is killed at work; this one finishes its files, and makes them alone."""
    folder, here = tmp_path / "killed", Path(__file__).parent
    job = subprocess.Popen([sys.executable, "-c", JOB, str(folder)], cwd=here)
    count = lambda: len(list(folder.glob("*/0*.npz")))  # noqa: E731
    while count() < 140 and job.poll() is None:  # of 240: in the fourth family
        time.sleep(0.001)
    job.kill()
    assert job.wait() == -9 and 140 <= count() < 240
    write_all(folder)
    write_all(tmp_path / "whole")
    wholes = sorted((tmp_path / "whole").glob("*/[0s]*"))
    assert len(wholes) == 240 + 6
    for file in wholes:
        other = folder / file.relative_to(tmp_path / "whole")
        assert other.read_bytes() == file.read_bytes(), other


def test_the_noise_of_every_step_is_bitwise_the_same():
    """A network of zeros leaves nothing but noise in the state."""
    nothing = jd.Denoiser(VP, lambda t, x, cond: jnp.zeros_like(x))
    sampler = prepared(jd.solvers.EulerMaruyama(), nothing, (3,))
    want = jd.sample(KEY, sampler, num=16).x
    np.testing.assert_array_equal(jd.sample(KEY, sampler, num=16, on=mesh_of(8)).x, want)


def test_nothing_is_exchanged():
    sampler, _ = alone(SOLVERS[1])
    run = jax.jit(lambda key: jd.sample(key, sampler, num=16, on=mesh_of(8)).x)
    text = run.lower(KEY).compile().as_text()
    for name in ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert name not in text, name
    assert "fusion" in text  # there is a program


def test_nothing_is_traced_twice():
    """Not for another key, start or number, and not for other parameters."""
    traces = []

    class Net(eqx.Module):
        w: jax.Array

        def __call__(self, t, x, cond):
            traces.append(1)
            return jnp.tanh(self.w * x)

    def of(w):
        return prepared(jd.solvers.DDIM(), jd.Denoiser(VP, Net(jnp.asarray(w))))

    for on in (mesh_of(4), None):
        jd.sample(KEY, of(1.0), num=8, chunk=2, on=on)
        before = len(traces)
        jd.sample(jax.random.key(1), of(2.0), num=12, start=5, chunk=2, on=on)
        likelihood = jd.likelihood(of(1.0).model, ts=TS, solver=dfx.Heun())
        assert len(traces) == before > 0
        jd.many(likelihood, np.ones((8, 2)), chunk=2, on=on)
        before = len(traces)
        jd.many(likelihood, np.zeros((12, 2)), chunk=2, on=on)
        assert len(traces) == before
    go = jax.pmap(jax.vmap(of(1.0)))
    go(jd.keys(KEY, 0, 16).reshape(8, -1))
    before = len(traces)
    go(jd.keys(jax.random.key(1), 5, 16).reshape(8, -1))
    assert len(traces) == before


def test_a_failed_sample_concerns_nobody_else():
    """One of eight, on the second of four devices, needs more steps than it may make."""

    def net(t, x, stiff):
        return jnp.sin(stiff * x)

    stiff = np.ones(8).copy()
    stiff[3] = 1e5
    control = dfx.PIDController(rtol=1e-5, atol=1e-5)
    adaptive = prepared(dfx.Tsit5(), jd.Denoiser(VP, net), max_steps=60, controller=control)
    out = jd.sample(KEY, adaptive, num=8, cond=stiff, on=mesh_of(4))
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

    def go(net, **on):
        sampler = prepared(jd.solvers.DDIM(), jd.Denoiser(VP, net), (8,))
        return jd.sample(KEY, sampler, num=4, **on).x

    want, run = go(net), jax.jit(lambda net: go(net, on=mesh))
    np.testing.assert_allclose(run(spread), want, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(go(spread, on=mesh), want, rtol=1e-12, atol=1e-12)
    text = run.lower(spread).compile().as_text()
    assert "all-gather" not in text and "f64[8,16]" in text  # a quarter of the columns, at home


# --- The data-sharded oracle. ---


@pytest.mark.parametrize("n", [5, 1003])
def test_the_sharded_oracle_is_the_oracle(n):
    rng = np.random.default_rng(n)
    data, weights = rng.normal(size=(n, 2, 3)) + 40.0, rng.uniform(size=n)
    weights[: n // 3] = 0
    whole = jd.exact.empirical(VP, data, weights, chunk=64)
    parts = shard.empirical(VP, data, weights, on=mesh_of(8, names=("data",)), chunk=64)
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
    table, over = np.load(tmp_path / "data.npy", mmap_mode="r"), NamedSharding(mesh, P("data"))
    parts = shard.empirical(VP, table, on=over, chunk=16)

    def go(model, solver, on=None, **options):
        sampler = prepared(solver, model, (4,), dtype=np.float32, **options)
        return jd.sample(KEY, sampler, num=6, on=on)

    want = go(jd.exact.empirical(VP, data), jd.solvers.DPMpp2M()).x
    got = go(parts, jd.solvers.DPMpp2M(), mesh).x
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    got = go(parts, dfx.Tsit5(), mesh, controller=dfx.PIDController(rtol=1e-3, atol=1e-3))
    assert np.isfinite(jd.check(got).x).all()


# --- The other entry points. ---


def test_likelihoods_and_inversions():
    x = np.asarray(alone(SOLVERS[0], 8)[1].x, np.float64)
    probes = jd.fisher.Hutchinson(probes=2)
    fn = jd.likelihood(MIX, ts=TS, solver=dfx.Heun(), trace=probes)
    want = [fn(row, key=jax.random.fold_in(KEY, i)) for i, row in enumerate(x)]
    want = jax.tree.map(lambda *rows: np.stack(rows), *want)
    for options in (dict(on=mesh_of(4)), dict(on=mesh_of(2), chunk=3), dict(chunk=3)):
        got = jd.many(fn, x, key=KEY, **options)
        for name in ("log_prob", "error", "x", "steps"):
            np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-10)

    net = jd.Denoiser(VP, lambda t, x, cond: jnp.tanh(x + cond))  # with its exact trace
    fn, cond = jd.likelihood(net, ts=TS), np.linspace(0, 1, 8)
    got = jd.many(fn, x, cond, on=mesh_of(4)).log_prob
    want = [fn(row, c).log_prob for row, c in zip(x, cond, strict=True)]
    np.testing.assert_allclose(got, want, rtol=1e-10)

    trip, mesh = prepared(jd.solvers.SymmetricLeapfrog()), mesh_of(4)
    noise = jd.many(trip.invert, x, on=mesh)
    for i in (0, 5):
        plain = trip.invert(x[i])
        np.testing.assert_allclose(noise.pair[i], plain.pair, rtol=1e-10, atol=1e-10)
    back = jd.sample(None, trip, num=8, init=noise, on=mesh)
    np.testing.assert_allclose(back.x, x, rtol=1e-12)
    again = jd.many(trip.invert, back, on=mesh)
    np.testing.assert_allclose(again.x, noise.x, rtol=1e-11)


def test_markov_chains():
    kernel = mcmc.ula(mcmc.target(MIX, 0.5), 0.1)

    def chain(x, *, key):
        return mcmc.run(key, kernel, x, 20).x

    xs = np.random.default_rng(1).standard_normal((8, 2))
    want = [chain(x, key=jax.random.fold_in(KEY, i)) for i, x in enumerate(xs)]
    for options in (dict(on=mesh_of(4)), dict(chunk=3)):
        np.testing.assert_allclose(jd.many(chain, xs, key=KEY, **options), want, rtol=1e-10)
    other = jd.many(chain, xs, key=KEY, start=1)
    np.testing.assert_allclose(other[:1], [chain(xs[0], key=jax.random.fold_in(KEY, 1))])
    assert np.abs(other - np.stack(want)).min() > 1e-6


def test_files_of_a_mesh(tmp_path):
    sampler = prepared(jd.solvers.DDIM(eta=1.0))
    jd.sample_to(tmp_path, KEY, sampler, num=20, per_file=8, on=mesh_of(4), progress=False)
    want = jd.sample(KEY, sampler, num=20)
    np.testing.assert_allclose(jd.read(tmp_path).x, want.x, rtol=1e-12)
    with pytest.raises(ValueError, match="per_file must be a multiple of the 4 devices, got 6"):
        jd.sample_to(tmp_path, KEY, sampler, num=20, per_file=6, on=mesh_of(4))


def test_an_ambient_mesh_changes_nothing():
    sampler, want = alone(SOLVERS[0])
    for ambient in (mesh_of(4), mesh_of(2, 4)):
        with jax.set_mesh(ambient):
            got = jd.sample(KEY, sampler, num=16, on=mesh_of(4)).x
        np.testing.assert_allclose(got, want.x, rtol=1e-6, atol=1e-6)


def test_the_axis_that_shares_the_samples():
    """The one called batch, the only one there is, or the one that a sharding names."""
    sampler, want = alone(SOLVERS[0])
    both = mesh_of(2, 4, names=("rows", "columns"))
    for on, count in (
        (NamedSharding(both, P("rows")), 2),
        (NamedSharding(both, P("columns")), 4),
        (mesh_of(4, names=("rows",)), 4),
        (mesh_of(2, 4, names=("rows", "batch")), 4),
    ):
        out = jd.sample(KEY, sampler, num=16, on=on)
        np.testing.assert_allclose(out.x, want.x, rtol=1e-6, atol=1e-6)
        assert {len(part.data) for part in out.x.addressable_shards} == {16 // count}


TWO = functools.partial(mesh_of, 2, 4, names=("rows", "columns"))
MISTAKES = {
    "sample: num must be a multiple of the 4 devices that share the samples, as 12": dict(num=10),
    "on must be a mesh with an axis 'batch', or NamedSharding.* 'columns'": dict(mesh=TWO()),
    r"on must be sharded over one axis of a mesh, as Named.*\(\)": dict(
        mesh=NamedSharding(TWO(), P())
    ),
    r"on must be sharded over one axis of a mesh, as Named.*columns": dict(
        mesh=NamedSharding(TWO(), P("rows", "columns"))
    ),
    "on must be a mesh whose axes are jax.sharding.AxisType.Auto": dict(kind=AxisType.Explicit),
    "on must be a jax.sharding.Mesh, as jax.make_mesh.* got 'all'": dict(mesh="all"),
    "key must be a threefry key": dict(key=jax.random.key(0, impl="rbg")),
}


@pytest.mark.parametrize("said", MISTAKES)
def test_a_mistake_gets_one_sentence(said, as_users_see_it):
    given = dict(MISTAKES[said])
    mesh = given.pop("mesh", mesh_of(4, kind=given.pop("kind", AxisType.Auto)))
    key, num = given.pop("key", KEY), given.pop("num", 8)
    with pytest.raises(ValueError, match=said):
        jd.sample(key, prepared(jd.solvers.DDIM()), num=num, on=mesh)


def test_mistakes_elsewhere(as_users_see_it):
    fn, x = jd.likelihood(MIX, ts=TS), np.ones((8, 2))
    for call, said in [
        (lambda: jd.many(fn, x, np.ones(7)), "many: .*8.*7"),
        (lambda: jd.many(fn, x, 1.0), "many: each"),
        (lambda: jd.many(fn), "many: each must be pytrees of arrays with a leading axis"),
        (lambda: jd.many(fn, x[:0]), "many: num must be a whole number of at least 1, got 0"),
        (lambda: jd.many(fn, x[:6], on=mesh_of(4)), "many: num must be a multiple of the 4 dev"),
        (lambda: jd.many(fn, x, on=TWO()), "many: on must be a mesh with an axis 'batch'"),
        (lambda: jd.many(fn, x, chunk=0), "many: chunk must be a whole number of at least 1"),
        (lambda: jd.many(3, x), "many: fn must be a function of one row, got 3"),
        (lambda: shard.empirical(VP, x, on=TWO()), "shard.empirical: on must be a mesh with an"),
        (lambda: jd.sample(KEY, MIX, num=8), "sample: sampler must be a prepared solve"),
    ]:
        with pytest.raises(ValueError, match=said):
            call()
