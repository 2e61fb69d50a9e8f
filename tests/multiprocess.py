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
task = dict(num=16, solver=jd.solvers.DDIM(eta=1.0), ts=vp.grid(10, "logsnr"))
out = shard.sample(mesh, jax.random.key(0), mixture, (2,), **task)
assert not out.x.is_fully_addressable
if mode == "killed" and jax.process_index() == 1:
    (folder / "killed").touch()
    os.kill(os.getpid(), signal.SIGKILL)
x = shard.gather(out).x
assert x.shape == (16, 2)

both = jax.make_mesh((2, 2), ("batch", "data"), axis_types=(auto, auto))
data = np.random.default_rng(0).normal(size=(101, 2)).astype(np.float32)
oracle = shard.empirical(both, vp, data, chunk=8)
task |= dict(num=4, solver=jd.solvers.DPMpp2M())
memoriser = shard.gather(shard.sample(both, jax.random.key(0), oracle, (2,), **task)).x
shard.sample_to(
    folder / "files", jax.random.key(0), mixture, (2,), per_file=2, **task, progress=False
)
if jax.process_index() == 0:
    np.savez(folder / "made.npz", x=x, memoriser=memoriser)
