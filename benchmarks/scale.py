"""Throughput over devices and processes, against one device and against the network alone.

1. *devices*: samples per second of `sample` on 1, 2, 4 ... devices of this process, weak (so
   many samples for each) and strong (so many in all), as multiples of one device.
2. *processes*: the same over processes of one device each, started by `launch.py`.
3. *forward*: the rate of network evaluations in `sample` as a share of that of the network alone,
   vectorised over the same batch.
4. *oracle*: the rate of the data-sharded exact denoiser as a share of that of a matrix product of
   the same shapes, per device.

Virtual devices of one CPU share its cores: there the numbers say what sharding costs, not what it
gains. Writes `benchmarks/results/scale.json` under a name for the hardware.

    python benchmarks/scale.py [--quick] [--devices N]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "scale.json"


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--devices", type=int, default=4, help="virtual CPU devices, if no GPU (4)")
    parser.add_argument("--child", action="store_true", help="one of the processes of launch.py")
    return parser.parse_args()


ARGS = arguments()
if not ARGS.child:
    flags = os.environ.get("XLA_FLAGS", "")
    count = f" --xla_force_host_platform_device_count={ARGS.devices}"
    os.environ["XLA_FLAGS"] = flags + count  # of no effect on GPUs and TPUs

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import launch  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import AxisType, NamedSharding, PartitionSpec  # noqa: E402

import jaxdiff as jd  # noqa: E402
from jaxdiff import shard, train  # noqa: E402

STEPS = 20
VP = jd.process.VP()


def network(quick: bool) -> tuple[jd.Denoiser, tuple[int, ...], int]:
    """Return a U-Net, the shape of an image, and images per device."""
    large = jax.default_backend() != "cpu"
    size, channels, batch = (32, (64, 128, 256), 256) if large else (16, (16, 32), 16)
    if quick:
        size, channels, batch = 8, (8, 16), 4
    module = train.UNet(channels=channels)
    shape = (size, size, 3)
    variables = module.init(jax.random.key(0), jnp.zeros(1), jnp.zeros((1, *shape)))
    return jd.Denoiser(VP, jd.score.from_linen(module, variables), "eps"), shape, batch


def seconds(run, repeats: int = 5) -> float:
    """Return the best time of a call, compilation left out."""
    jax.block_until_ready(run())
    best = np.inf
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        best = min(best, time.perf_counter() - start)
    return best


def mesh_of(devices) -> jax.sharding.Mesh:
    """Return a mesh of one axis."""
    return jax.make_mesh((len(devices),), ("batch",), (AxisType.Auto,), devices=devices)


def rate(mesh, num: int) -> float:
    """Return samples per second on a mesh."""
    model, shape, _ = network(ARGS.quick)
    sampler = jd.sampler(model, shape, solver=jd.solvers.DPMpp2M(), ts=VP.grid(STEPS))
    run = lambda: jd.sample(jax.random.key(0), sampler, num=num, on=mesh).x  # noqa: E731
    return num / seconds(run, 3)


def scaling(sizes: list[int]) -> list[dict]:
    """Measure weak and strong scaling over the devices of this process."""
    batch, rows = network(ARGS.quick)[2], []
    for n in sizes:
        mesh = mesh_of(jax.devices()[:n])
        weak, strong = rate(mesh, batch * n), rate(mesh, batch * max(sizes))
        rows.append(dict(devices=n, weak=weak, strong=strong, per_device=weak / n))
        rows[-1] |= {f"{k}_ratio": rows[-1][k] / rows[0][k] for k in ("weak", "strong")}
        print(f"devices {n}: weak {weak:8.1f}/s (x{rows[-1]['weak_ratio']:.2f}), "
              f"strong {strong:8.1f}/s (x{rows[-1]['strong_ratio']:.2f})")  # fmt: skip
    return rows


def forward() -> dict:
    """Compare evaluations inside `sample` with the network alone, on one device."""
    model, shape, batch = network(ARGS.quick)
    key, ts = jax.random.key(0), VP.grid(STEPS, t_end=1e-3)
    sampler = jd.sampler(model, shape, solver=jd.solvers.DPMpp2M(), ts=ts)
    x = jax.random.normal(key, (batch, *shape))
    alone = jax.jit(lambda x: jax.lax.scan(
        lambda x, t: (jax.vmap(lambda x: model(t, x))(x), None), x, jnp.full(STEPS, 0.5))[0]
    )  # fmt: skip
    ours, theirs = seconds(lambda: jd.sample(key, sampler, num=batch).x), seconds(lambda: alone(x))
    row = dict(samples_per_second=batch / ours, share=theirs / ours, evaluations=STEPS)
    print(f"forward: {row['samples_per_second']:.1f} samples/s, {row['share']:.2f} of the network")
    return row


def oracle(sizes: list[int]) -> list[dict]:
    """Compare the data-sharded oracle with a product of two matrices, per device."""
    large = jax.default_backend() != "cpu"
    per_device, d, queries = (2**18, 3072, 256) if large else (2**14, 784, 64)
    per_device = 512 if ARGS.quick else per_device
    rng, rows = np.random.default_rng(0), []
    a, b = (jnp.asarray(rng.normal(size=(2048, 2048)), jnp.float32) for _ in range(2))
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision="highest"))
    peak = 2 * 2048**3 / seconds(lambda: product(a, b))
    for n in sizes:
        mesh = jax.make_mesh((n,), ("data",), (AxisType.Auto,), devices=jax.devices()[:n])
        data = rng.normal(size=(per_device * n, d)).astype(np.float32)
        model = shard.empirical(VP, data, on=NamedSharding(mesh, PartitionSpec("data")))
        x = jnp.asarray(rng.normal(size=(queries, d)), jnp.float32)
        score = jax.jit(lambda model, x: jax.vmap(lambda x: model.score(0.5, x))(x))
        took = seconds(lambda: score(model, x), 3)  # noqa: B023
        work = 4 * len(data) * d * queries / took / n
        rows.append(dict(devices=n, atoms=len(data), seconds=took, share_of_peak=work / peak))
        print(f"oracle {n}: {len(data)} atoms in {took * 1e3:.1f} ms, {work / peak:.2f} of peak")
    return rows


def child() -> None:
    """Measure over all processes; the first one prints."""
    launch.join()
    mesh, batch = mesh_of(jax.devices()), network(ARGS.quick)[2]
    weak, strong = rate(mesh, batch * len(jax.devices())), rate(mesh, batch * 4)
    if jax.process_index() == 0:
        print(json.dumps(dict(processes=jax.process_count(), weak=weak, strong=strong)))


def processes(sizes: list[int]) -> list[dict]:
    """Measure over processes of one device each."""
    rows = []
    for n in sizes:
        options = ["--processes", str(n), "--devices", "1"]
        command = [sys.executable, str(HERE / "launch.py"), *options, __file__, "--child"]
        command += ["--quick"] if ARGS.quick else []
        env = os.environ | {"XLA_FLAGS": flags}
        run = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        rows.append(json.loads(run.stdout.strip().splitlines()[-1]))
        rows[-1] |= {f"{k}_ratio": rows[-1][k] / rows[0][k] for k in ("weak", "strong")}
        print(f"processes {n}: weak {rows[-1]['weak']:.1f}/s (x{rows[-1]['weak_ratio']:.2f}), "
              f"strong {rows[-1]['strong']:.1f}/s (x{rows[-1]['strong_ratio']:.2f})")  # fmt: skip
    return rows


def main() -> None:
    """Run everything and write the results of this hardware beside those of others."""
    device = jax.devices()[0]
    sizes = [n for n in (1, 2, 4, 8, 16) if n <= jax.device_count()]
    name = f"{jax.device_count()} x {device.device_kind}"
    print(f"{name}, {os.cpu_count()} CPU cores, jax {jax.__version__}")
    result = dict(date=time.strftime("%Y-%m-%d"), cores=os.cpu_count(), jax=jax.__version__)
    result |= dict(steps=STEPS, devices=scaling(sizes), forward=forward(), oracle=oracle(sizes))
    if device.platform == "cpu":
        result["processes"] = processes([1, 2, 4])
    if not ARGS.quick:
        known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        RESULTS.write_text(json.dumps(known | {name: result}, indent=1) + "\n")


if __name__ == "__main__":
    child() if ARGS.child else main()
