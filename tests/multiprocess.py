"""One of the processes of `test_shard.test_two_processes...`; started by benchmarks/launch.py."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import jax
import launch
import numpy as np

import jaxdiff as jd
from jaxdiff import shard

mode, folder = sys.argv[1], Path(sys.argv[2])
launch.join()
assert jax.process_count() == 2 and jax.device_count() == 4 and jax.local_device_count() == 2
auto = jax.sharding.AxisType.Auto
mesh = jax.make_mesh((4,), ("batch",), axis_types=(auto,))
vp = jd.process.VP()
mixture = jd.exact.mixture(vp, [0.5, 0.5], [[-1.0, 0.0], [1.0, 0.5]], 0.04)
ts, key = vp.grid(10, "logsnr"), jax.random.key(0)
sampler = jd.sampler(mixture, (2,), solver=jd.solvers.DDIM(eta=1.0), ts=ts)
out = jd.sample(key, sampler, num=16, on=mesh)
assert not out.x.is_fully_addressable
if mode == "killed" and jax.process_index() == 1:
    (folder / "killed").touch()
    os.kill(os.getpid(), signal.SIGKILL)
x = jd.gather(out).x
assert x.shape == (16, 2)

both = jax.make_mesh((2, 2), ("batch", "data"), axis_types=(auto, auto))
data = np.random.default_rng(0).normal(size=(101, 2)).astype(np.float32)
over = jax.NamedSharding(both, jax.P("data"))
oracle = shard.empirical(vp, data, on=over, chunk=8)
fast = jd.sampler(oracle, (2,), solver=jd.solvers.DPMpp2M(), ts=ts)
memoriser = jd.gather(jd.sample(key, fast, num=4, on=both)).x
fast = jd.sampler(mixture, (2,), solver=jd.solvers.DPMpp2M(), ts=ts)
jd.sample_to(folder / "files", key, fast, num=4, per_file=2, progress=False)
if jax.process_index() == 0:
    np.savez(folder / "made.npz", x=x, memoriser=memoriser)
