"""What does `jaxdiff.sample` cost over a scan written by hand?

The same 50 steps of the same model in one process, in turns: a `lax.scan` over coefficients from
outside, `jaxdiff.sample` of a prepared sampler inside `jit`, and for DDIM also the same called
eagerly, `diffrax.Euler` in clock "r", and the torch scheduler of diffusers where that is installed.
Then what one call costs where the model costs nothing: of a prepared sampler, eager and inside
`jit`; of `sample` with a number of samples that is new to it, at one chunk width; and of preparing.
Then what tracing and compiling 20 steps take, with no cache, beside preparing the sampler. Ratios
are to the scan by hand; appends a line of JSON to `benchmarks/results/overhead.jsonl`.

    python benchmarks/overhead.py
"""

import contextlib
import importlib.util
import json
import os
import platform
import statistics
import time
import warnings
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp

import jaxdiff as jd
from jaxdiff import solvers, train

STEPS, REPEATS = 50, 21
COMPILED_STEPS, COMPILED_REPEATS = 20, 3
VP = jd.process.VP()
SOLVERS = {
    "DDIM": solvers.DDIM(),
    "DPM++(2M)": solvers.DPMpp2M(),
    "UniPC(3)": solvers.UniPC(3),
    "symmetric leapfrog": solvers.SymmetricLeapfrog(),
}
THEIRS = {
    "DDIM": "DDIMScheduler",
    "DPM++(2M)": "DPMSolverMultistepScheduler",
    "UniPC(3)": "UniPCMultistepScheduler",
}


# --- Models. --------------------------------------------------------------------------------------


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


def unet(shape):
    """The U-Net of the demo, with random weights."""
    module, key = train.UNet((32, 64), attention=True), jax.random.key(1)
    params = jax.jit(module.init)(key, jnp.zeros(1), jnp.zeros((1, *shape)))["params"]
    params = jax.tree.map(lambda a: a + 0.02 * jax.random.normal(key, a.shape), params)
    return jd.score.from_linen(module, {"params": params})


# --- Loops. ---------------------------------------------------------------------------------------


def by_hand(net, name, num, shape, ts):
    """Write the loop as a careful user would: coefficients outside, one vectorised scan."""
    rows = SOLVERS[name].tabulate(VP, ts).rows
    rows = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), rows)
    times, batched = jnp.asarray(ts[:-1], jnp.float32), jax.vmap(net, (None, 0))

    def combine(x, c, t, old):  # old: as many older outputs as the method has weights
        m = batched(t, x)
        x = c.decay * x + c.gain * m
        for w, older in zip(c.weights, old, strict=True):
            x = x + w * (older - m)
        return x, (m, *old)[: len(old)]

    def leap(z, c, t, old):  # z = x / sqrt(alpha sigma); the noise prediction is in `of_z`
        c, of_z, of_m = c
        return jnp.where(c.first > 0, z, old) + of_z * z + of_m * batched(t, z / c.c0), z

    if name == "symmetric leapfrog":
        alpha, sigma = (jax.vmap(f)(times) for f in (VP.alpha, VP.sigma))
        of_eps = rows.of_eps / sigma
        rows, step = (rows, of_eps / rows.c0, rows.of_m - of_eps * alpha), leap
        into, out = rows[0].c0[0], rows[0].c1[-1]
    else:
        weights, step, into, out = rows.weights, combine, 1.0, 1.0
        weights = weights if isinstance(weights, tuple) else tuple(weights.T)
        rows = rows._replace(weights=weights, noise=())

    def run(key):
        fold = jax.random.fold_in
        start = lambda i: jax.random.normal(fold(fold(key, i), 0), shape)  # noqa: E731
        x = VP.sigma(ts[0]) * jax.vmap(start)(jnp.arange(num))  # the same noise as ours
        old = x if step is leap else (jnp.zeros_like(x),) * SOLVERS[name].memory
        body = lambda carry, now: (step(carry[0], *now, carry[1]), None)  # noqa: E731
        return jax.lax.scan(body, (into * x, old), (rows, times))[0][0] / out

    return run


def ours(net, solver, num, shape, ts):
    sampler = jd.sampler(jd.Denoiser(VP, net), shape, solver=solver, ts=ts)
    return lambda key: jd.sample(key, sampler, num=num).x


def torch_scheduler(name, num, shape):
    """The same by a scheduler of diffusers, whose model costs nothing either; None without it."""
    if name not in THEIRS or not all(map(importlib.util.find_spec, ("torch", "diffusers"))):
        return None
    with warnings.catch_warnings(), contextlib.suppress(ImportError):
        warnings.simplefilter("ignore")
        import diffusers
        import torch

        options = {} if name == "DDIM" else {"solver_order": int(name[-2]) if "U" in name else 2}
        scheduler = getattr(diffusers, THEIRS[name])(prediction_type="sample", **options)

        def run(key):
            scheduler.set_timesteps(STEPS)
            x = torch.randn(num, *shape)
            for t in scheduler.timesteps:
                x = scheduler.step(0.5 * x, t, x, return_dict=False)[0]
            return x.numpy()

        return run


# --- Clocks. --------------------------------------------------------------------------------------


def clock(run, key):
    begin = time.perf_counter()
    jax.block_until_ready(run(key))
    return time.perf_counter() - begin


def in_turns(loops, repeats):
    """First call, median run and all runs of each loop, in turns: noise hits them alike."""
    first = {name: clock(run, jax.random.key(0)) for name, run in loops.items()}
    times = {name: [] for name in loops}
    for i in range(repeats):
        for name, run in loops.items():
            times[name].append(clock(run, jax.random.key(i)))
    return {name: (first[name], statistics.median(times[name]), times[name]) for name in loops}


def steps_take(cases):
    rows, ts = [], VP.grid(STEPS, "logsnr")
    print(f"{'model':<24}{'solver':<20}{'loop':<22}{'first call s':>14}{'us/step':>12}"
          f"{'extra':>12}{'ratio':>8}")  # fmt: skip
    for name, net, num, shape, repeats in cases:
        for method, solver in SOLVERS.items():
            hand = by_hand(net, method, num, shape, ts)
            mine = ours(net, solver, num, shape, ts)
            loops = {"by hand": jax.jit(hand), "jaxdiff": jax.jit(mine)}
            if method == "DDIM":
                loops |= {"jaxdiff, eager call": mine}
                loops |= {"diffrax.Euler": jax.jit(ours(net, diffrax.Euler(), num, shape, ts))}
            theirs = torch_scheduler(method, num, shape) if net is shrink else None
            results = in_turns(loops, repeats)
            if theirs:  # by itself: the threads of torch go on spinning after it
                results |= in_turns({"diffusers": theirs}, min(repeats, REPEATS))
            off = float(jnp.max(jnp.abs(loops["by hand"](jax.random.key(0))
                                        - loops["jaxdiff"](jax.random.key(0)))))  # fmt: skip
            assert off < 1e-2, (name, method, off)  # the two do the same
            base = results["by hand"]
            for loop, (first, median, runs) in results.items():
                us, least = 1e6 * median / STEPS, min(runs) / min(base[2])
                turns = statistics.median(a / b for a, b in zip(runs, base[2], strict=False))
                extra = 1e6 * (median - base[1]) / STEPS
                row = dict(model=name, solver=method, loop=loop, first_call_s=first, us_per_step=us,
                           extra_us=extra, ratio=median / base[1], ratio_of_least=least,
                           ratio_of_turns=turns)  # fmt: skip
                rows.append(row)
                print(f"{name:<24}{method:<20}{loop:<22}{first:>14.2f}{us:>12.2f}"
                      f"{extra:>12.2f}{turns:>8.3f}", flush=True)  # fmt: skip
    return rows


def calls_take(repeats):
    """Microseconds of single calls with a model that costs nothing, in turns."""
    ts, key, width = VP.grid(STEPS, "logsnr"), jax.random.key(0), 32
    prepare = lambda: jd.sampler(jd.Denoiser(VP, shrink), (2,), solver=solvers.DDIM(), ts=ts)  # noqa: E731
    sampler = prepare()
    jitted = jax.jit(lambda key: sampler(key).x)
    results = in_turns({"eager call": lambda key: sampler(key).x, "inside jit": jitted}, repeats)
    rows = [dict(call=name, us=1e6 * median) for name, (_, median, _) in results.items()]
    many = lambda num: lambda key: jd.sample(key, sampler, num=num, chunk=width).x  # noqa: E731
    first = clock(many(2 * width), key)
    nums = range(2 * width + 1, 2 * width + 1 + min(repeats, width))  # three chunks each
    new, again = zip(*[(clock(many(num), key), clock(many(num), key)) for num in nums], strict=True)
    rows += [dict(call="sample, three chunks", us=1e6 * statistics.median(again)),
             dict(call="the same, a new num", us=1e6 * statistics.median(new)),
             dict(call="the same, the first", us=1e6 * first)]  # fmt: skip
    prepare()
    times = [clock(lambda key: prepare().solve.ts, key) for _ in range(min(repeats, REPEATS))]
    rows.append(dict(call="preparing", us=1e6 * statistics.median(times)))
    print(f"\n{'trivial, 2, DDIM':<24}{'us':>12}{'extra':>12}")
    for row in rows:
        extra = f"{row['us'] - rows[1]['us']:>12.1f}" if row is rows[0] else ""
        print(f"{row['call']:<24}{row['us']:>12.1f}{extra}", flush=True)
    return rows


def build(run, key):
    """Trace, lower and compile with empty caches; return the seconds of each."""
    jax.clear_caches()
    begin = time.perf_counter()
    lowered = jax.jit(run).lower(key)
    middle = time.perf_counter()
    lowered.compile()
    return middle - begin, time.perf_counter() - middle


def compiling_takes(cases, repeats):
    rows, ts, key = [], VP.grid(COMPILED_STEPS, "logsnr"), jax.random.key(0)
    print(f"\n{COMPILED_STEPS} steps{'':<14}{'solver':<20}{'trace s, by hand':>18}{'ours':>8}"
          f"{'compile s, by hand':>20}{'ours':>8}{'prepare':>9}{'ratio':>8}{'prepared':>10}"
          )  # fmt: skip
    for name, net, num, shape, _ in cases:
        for method in [method for method in SOLVERS if method != "DDIM"]:
            solver = SOLVERS[method]
            hand, runs = by_hand(net, method, num, shape, ts), []
            for _ in range(repeats):
                jax.clear_caches()
                begin = time.perf_counter()
                mine = ours(net, solver, num, shape, ts)
                took = time.perf_counter() - begin
                runs.append([*build(hand, key), *build(mine, key), took])
            a, b, c, d, took = (min(column) for column in zip(*runs, strict=True))
            ratio, rest = (took + c + d) / (a + b), (c + d) / (a + b)
            rows.append(dict(model=name, solver=method, by_hand_trace_s=a, by_hand_compile_s=b,
                             trace_s=c, compile_s=d, prepare_s=took, ratio=ratio,
                             ratio_of_prepared=rest))  # fmt: skip
            print(f"{name:<22}{method:<20}{a:>18.3f}{c:>8.3f}{b:>20.3f}{d:>8.3f}{took:>9.3f}"
                  f"{ratio:>8.2f}{rest:>10.2f}", flush=True)  # fmt: skip
    return rows


def machine():
    return {
        "date": time.strftime("%Y-%m-%d"), "jax": jax.__version__, "jaxdiff": jd.__version__,
        "diffrax": diffrax.__version__, "device": jax.devices()[0].device_kind,
        "cpus": os.cpu_count(), "architecture": platform.machine(),
    }  # fmt: skip


def measure(quick=False):
    image = (8, 8, 1)
    more, some = (3, 3) if quick else (10 * REPEATS, REPEATS)
    cases = [  # the model, samples, their shape, repeats
        ("trivial, 1 x 2", shrink, 1, (2,), more),
        ("trivial, 128 x 64", shrink, 128, (64,), more),
        ("MLP 3 x 512, 128 x 64", mlp(512, 3, 64), 128, (64,), some),
        ("U-Net, 16 x 8 x 8", unet(image), 16, image, some),
    ]
    few = cases[::3]
    return {
        "steps": STEPS,
        "cases": steps_take(few if quick else cases),
        "calls": calls_take(more),
        "compile": compiling_takes(few, 1 if quick else COMPILED_REPEATS),
    }


def main():
    report = {"benchmark": "overhead", **machine(), **measure()}
    out = Path(__file__).parent / "results" / "overhead.jsonl"
    out.parent.mkdir(exist_ok=True)
    with out.open("a") as file:
        file.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
