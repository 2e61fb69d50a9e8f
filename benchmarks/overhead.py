"""What does `jaxdiff.sample` cost over a scan written by hand?

Three ways to run the same 50 DDIM steps of the same model in one process: a `lax.scan` over
coefficients computed by hand, `jaxdiff.sample` (its own scan), and `jaxdiff.sample` with
`diffrax.Euler` in clock "r" (diffeqsolve). Prints trace + compile time, the median time of a run,
and ratios to the scan by hand; appends a line of JSON to `benchmarks/results/overhead.jsonl`.

    python benchmarks/overhead.py
"""

import json
import os
import platform
import statistics
import time
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import jaxdiff as jd

STEPS, REPEATS = 50, 31
VP = jd.process.VP()
TS = VP.grid(STEPS, "logsnr")


def shrink(t, x, cond=None):
    """A model that costs nothing: what is left is the loop."""
    return 0.5 * x


def mlp(width, layers, d):
    keys = jax.random.split(jax.random.key(1), layers)
    sizes = [d + 1, *[width] * (layers - 1), d]
    weights = [
        jax.random.normal(k, (m, n)) / m**0.5
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]

    def net(t, x, cond=None):
        h = jnp.append(x, t)
        for w in weights[:-1]:
            h = jax.nn.silu(h @ w)
        return h @ weights[-1]

    return net


def by_hand(net, num, d):
    """Write the loop as a careful user would: coefficients outside, one vectorised scan."""
    alpha = np.exp(np.asarray(jax.vmap(VP.log_alpha)(TS), np.float64))
    sigma = np.exp(np.asarray(jax.vmap(VP.log_sigma)(TS), np.float64))
    decay = jnp.asarray(sigma[1:] / sigma[:-1], jnp.float32)
    gain = jnp.asarray(alpha[1:] - alpha[:-1] * sigma[1:] / sigma[:-1], jnp.float32)
    ts, batched = jnp.asarray(TS[:-1], jnp.float32), jax.vmap(net, (None, 0))

    @jax.jit
    def run(key):
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num))
        x = jax.vmap(lambda k: jax.random.normal(k, (d,)))(keys)
        step = lambda x, c: (c[0] * x + c[1] * batched(c[2], x), None)  # noqa: E731
        return jax.lax.scan(step, x, (decay, gain, ts))[0]

    return run


def clock(run, key):
    begin = time.perf_counter()
    jax.block_until_ready(run(key))
    return time.perf_counter() - begin


def compare(loops):
    """Return (first call, median run) of each loop, run in turns so that noise hits them alike."""
    first = {name: clock(run, jax.random.key(0)) for name, run in loops.items()}
    times = {name: [] for name in loops}
    for i in range(REPEATS):
        for name, run in loops.items():
            times[name].append(clock(run, jax.random.key(i)))
    return {name: (first[name], statistics.median(times[name])) for name in loops}


def main():
    report = {
        "benchmark": "overhead", "date": time.strftime("%Y-%m-%d"), "steps": STEPS,
        "jax": jax.__version__, "diffrax": diffrax.__version__, "jaxdiff": jd.__version__,
        "device": jax.devices()[0].device_kind, "cpus": os.cpu_count(),
        "architecture": platform.machine(), "cases": [],
    }  # fmt: skip
    cases = [
        ("trivial, 1 x 2", shrink, 1, 2),
        ("trivial, 128 x 64", shrink, 128, 64),
        ("MLP 3 x 512, 128 x 64", mlp(512, 3, 64), 128, 64),
    ]
    print(f"{'model':<24}{'loop':<22}{'first call s':>14}{'run us/step':>14}{'ratio':>8}")
    for name, net, num, d in cases:
        model = jd.Denoiser(VP, net)

        def ours(solver, model=model, num=num, d=d):
            return lambda key: jd.sample(key, model, (d,), num=num, solver=solver, ts=TS).x

        loops = {
            "by hand": by_hand(net, num, d),
            "jaxdiff": jax.jit(ours(jd.solvers.DDIM())),
            "jaxdiff, eager call": ours(jd.solvers.DDIM()),
            "diffrax.Euler": jax.jit(ours(diffrax.Euler())),
        }
        results = compare(loops)
        base = results["by hand"][1]
        for loop, (first, median) in results.items():
            us, ratio = 1e6 * median / STEPS, median / base
            print(f"{name:<24}{loop:<22}{first:>14.2f}{us:>14.2f}{ratio:>8.2f}")
            report["cases"].append(
                dict(model=name, loop=loop, first_call_s=first, us_per_step=us, ratio=ratio)
            )
    out = Path(__file__).parent / "results" / "overhead.jsonl"
    out.parent.mkdir(exist_ok=True)
    with out.open("a") as file:
        file.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
