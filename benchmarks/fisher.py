"""What does second-order information cost, how exact is it, and how fast is a data set's own?

Four questions, answered in one process:

1. *Costs.* Trace and Fisher-vector product by every method, for an MLP and a U-Net, as multiples of
   one evaluation of the same network, in time and in scratch memory.
2. *Errors.* The same methods on a mixture whose trace is known, and how many random probes it takes
   to match a trained head.
3. *Likelihoods.* Errors of the likelihood of held-out digits under a trained U-Net, against its
   exact trace.
4. *Data sets.* Posterior mean, residual trace and a covariance product of a data set in one
   streamed pass, against softmax of the whole distance matrix, with the fraction of this machine's
   own rate of matrix products.

Writes `benchmarks/results/fisher.json` and `fisher.png`.

    python benchmarks/fisher.py [costs errors likelihoods data]
"""

import functools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import jaxdiff as jd
from jaxdiff import demo, train

RESULTS = Path(__file__).parent / "results"
VP = jd.process.VP()
BATCH, REPEATS = 64, 15


def in_turns(calls, repeats=REPEATS):
    """Median seconds of each call, run in turns so that noise hits them alike."""
    for call in calls.values():
        jax.block_until_ready(call())
    times = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(t) for name, t in times.items()}


def compiled(fn, *args):
    """Return the compiled call and its scratch memory in bytes."""
    done = jax.jit(fn).lower(*args).compile()
    return lambda: done(*args), done.memory_analysis().temp_size_in_bytes


# --- 1. Costs. ------------------------------------------------------------------------------------


def with_head(module, shape):
    """A denoiser with random weights, and a head on its features."""
    key = jax.random.key(0)
    params = jax.jit(module.init)(key, jnp.zeros(1), jnp.zeros((1, *shape)))["params"]
    params = jax.tree.map(lambda a: a + 0.02 * jax.random.normal(key, a.shape), params)
    model = jd.Denoiser(VP, jd.score.from_linen(module, {"params": params}), "eps")
    features = model.features(0.5, jnp.zeros(shape))[2][None]
    net = train.TraceNet()
    weights = jax.jit(net.init)(key, jnp.zeros(1), features)["params"]
    head = jd.fisher.TraceHead(jd.score.from_linen(net, {"params": weights}), features=True)
    return model, head


def methods(model, head, t=0.4):
    """Name every method, as a function of one sample, a direction, an end point and a key."""
    fisher = jd.fisher

    def trace_by(estimator):
        return lambda x, v, y, key: estimator(model, t, x, None, key)[1:]

    def product_by(operator):
        def both(x, v, y, key):
            m = model(t, x)  # the sampler's own evaluation
            return m, operator(x, y, m).mv(v)

        return both

    def endpoint(kind):
        def operator(x, y, m):
            return fisher.fisher_of(fisher.endpoint_cov(model, t, x, y, kind=kind, m=m), VP, t)

        return operator

    return {
        "evaluation": lambda x, v, y, key: model.pair(t, x),
        "trace: head on features": trace_by(head),
        "trace: Hutchinson, jvp": trace_by(fisher.Hutchinson(1)),
        "trace: Hutchinson, vjp": trace_by(fisher.Hutchinson(1, mode="vjp")),
        "trace: Hutchinson, fd": trace_by(fisher.Hutchinson(1, mode="fd")),
        "trace: Hutch++, 6 products": trace_by(fisher.HutchPP(6)),
        "trace: exact, d derivatives": trace_by(fisher.ExactTrace()),
        "F v: jvp": product_by(lambda x, y, m: fisher.fisher(model, t, x)),
        "F v: fd": product_by(lambda x, y, m: fisher.fisher(model, t, x, method="fd")),
        "F v: endpoint (DF-EA)": product_by(endpoint("raw")),
        "F v: endpoint, centred": product_by(endpoint("centred")),
    }


def costs():
    rows = []
    nets = {
        "MLP 3 x 512, d = 64": (train.MLP((512, 512, 512)), (64,)),
        "U-Net 32, 64, 28 x 28": (train.UNet((32, 64)), (28, 28, 1)),
    }
    for name, (module, shape) in nets.items():
        model, head = with_head(module, shape)
        x, v, y = jax.random.normal(jax.random.key(1), (3, BATCH, *shape))
        keys = jax.random.split(jax.random.key(4), BATCH)
        table = methods(model, head)
        if len(shape) > 1:
            del table["trace: exact, d derivatives"]
        done = {k: compiled(jax.vmap(fn), x, v, y, keys) for k, fn in table.items()}
        seconds = in_turns({method: call for method, (call, _) in done.items()})
        base, memory = seconds["evaluation"], done["evaluation"][1]
        print(f"\n{name}: one evaluation of {BATCH} samples {1e3 * base:.2f} ms, "
              f"{memory / 1e6:.1f} MB of scratch\n{'':<32}{'time':>8}{'memory':>9}")  # fmt: skip
        for method, taken in seconds.items():
            row = dict(net=name, method=method, time=taken / base, memory=done[method][1] / memory)
            rows.append(row)
            print(f"{method:<32}{row['time']:>8.2f}{row['memory']:>9.2f}")
    return rows


# --- 2. Errors. -----------------------------------------------------------------------------------


def mixture(d=16):
    """Weights, means and roots of three components, thin and wide by turns in a random basis.

    The hard case of trace matching; along the axes it would be too easy for Rademacher probes.
    """
    rng = np.random.default_rng(0)
    variances = np.where(np.arange(d) % 2, 0.003, 0.6)[None] * rng.uniform(0.5, 1.5, (3, d))
    turn = np.linalg.qr(rng.normal(size=(d, d)))[0]
    return np.array([0.5, 0.3, 0.2]), rng.normal(size=(3, d)), turn * np.sqrt(variances)[:, None]


def fit_head(kind, exact, draw, steps=2000, batch=256):
    net = train.TraceNet()
    optimiser = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def head(params):
        return jd.fisher.TraceHead(jd.score.from_linen(net, {"params": params}), kind)

    def loss(params, key):
        keys = jax.random.split(key)
        return train.batch_trace_loss(keys[0], head(params), exact, draw(keys[1], batch))[0]

    def step(carry, key):
        params, state = carry
        updates, state = optimiser.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(key):
        params = net.init(key, jnp.zeros(1), draw(key, 1))["params"]
        keys = jax.random.split(key, steps)
        return jax.lax.scan(step, (params, optimiser.init(params)), keys)[0][0]

    return head(run(jax.random.key(1)))


def errors():
    weights, means, roots = mixture()
    d = means.shape[1]
    exact = jd.exact.mixture(VP, weights, means, roots @ roots.swapaxes(1, 2))
    mu, root = jnp.asarray(means, jnp.float32), jnp.asarray(roots, jnp.float32)

    def draw(key, n):
        keys = jax.random.split(key)
        which = jax.random.choice(keys[0], len(weights), (n,), p=jnp.asarray(weights))
        z = jax.random.normal(keys[1], (n, d))
        return mu[which] + jnp.einsum("nij,nj->ni", root[which], z)

    def traces(estimator, t, x, keys):
        @eqx.filter_jit
        def run(estimator):
            return jax.vmap(lambda x, k: estimator(exact, t, x, None, k)[2][0])(x, keys)

        return run(estimator)

    heads = {kind: fit_head(kind, exact, draw) for kind in ("raw", "residual", "preconditioned")}
    rows, x0 = [], draw(jax.random.key(5), 512)
    print(f"\nRMS relative error of tr F, d = {d}, 512 states at each log-SNR")
    print(f"{'lam':>5}" + "".join(f"{k:>16}" for k in (*heads, "1 probe", "probes to match")))
    for lam in (-3, -1, 0, 1, 2, 3, 4):
        t = VP.t_of_lam(float(lam))
        keys = jax.random.split(jax.random.key(lam + 10), 512)
        x = jax.vmap(VP.perturb, (0, None, 0))(keys, t, x0)[0]
        truth = traces(jd.fisher.ExactTrace(), t, x, keys)
        estimators = {**heads, "1 probe": jd.fisher.Hutchinson(1)}
        guesses = {name: traces(e, t, x, keys) for name, e in estimators.items()}
        scale = jnp.sqrt(jnp.mean((d - truth) ** 2))
        row = {k: float(jnp.sqrt(jnp.mean((g - truth) ** 2)) / scale) for k, g in guesses.items()}
        row["probes to match"] = (row["1 probe"] / row["preconditioned"]) ** 2
        rows.append({"lam": lam, **row})
        print(f"{lam:>5}" + "".join(f"{value:>16.2g}" for value in row.values()))
    ts = VP.grid(60, "logsnr")
    keys = jax.random.split(jax.random.key(7), 256)
    x = jax.vmap(VP.perturb, (0, None, 0))(keys, ts[-1], draw(jax.random.key(6), 256))[0]
    truth = jax.jit(jax.vmap(lambda x: exact.log_density(ts[-1], x)))(x)
    options = dict(ts=ts, solver=diffrax.Heun(), terminal=exact)
    nll = nll_errors(functools.partial(jd.likelihood, exact, **options), (x,), truth, heads)
    return {"trace": rows, "nll": nll}


# --- 3. Likelihoods. ------------------------------------------------------------------------------


def nll_errors(prepare, args, truth, heads):
    """RMS error in nats, and time as a multiple of the first, of each estimate of a likelihood."""
    fisher = jd.fisher
    plans = {f"{kind} head": (head, 0) for kind, head in heads.items()}
    plans |= {
        "preconditioned head, debiased 8": (heads["preconditioned"], 8),
        "Hutchinson, 1 probe": (fisher.Hutchinson(1), 0),
        "Hutchinson, 4 probes": (fisher.Hutchinson(4), 0),
    }
    rows = []

    def call(trace, debias):
        likelihood = prepare(trace=trace, debias=debias)
        return lambda: jd.many(likelihood, *args, key=jax.random.key(11)).log_prob

    calls = {name: call(*plan) for name, plan in plans.items()}
    seconds = in_turns(calls, 3)
    base = seconds["preconditioned head"]
    print(f"\n{'log-likelihood by':<36}{'RMS nats':>10}{'bias':>9}{'time':>7}")
    for name, call in calls.items():
        error = np.asarray(call()) - np.asarray(truth)
        row = dict(name=name, rms=float(np.sqrt(np.mean(error**2))), bias=float(np.mean(error)),
                   time=seconds[name] / base)  # fmt: skip
        rows.append(row)
        print(f"{name:<36}{row['rms']:>10.2f}{row['bias']:>9.2f}{row['time']:>7.2f}")
    return rows


def likelihoods():
    digits = demo.load()
    with tempfile.TemporaryDirectory() as folder:
        model = demo.fit(digits, Path(folder) / "run", steps=800, seed=0, progress=False)
    fit = lambda kind: demo.fit_head(model, digits, kind, steps=400, seed=0, progress=False)  # noqa: E731
    heads = {kind: fit(kind) for kind in ("raw", "residual", "preconditioned")}
    n = 96
    keys = jax.random.split(jax.random.key(2), n)
    x = jax.vmap(lambda k, x: jd.dequantise(k, x, demo.WIDTH))(keys, digits.held_out[:n])
    labels = digits.held_out_labels[:n]
    ts = demo.likelihood_grid(model.process)
    prepare = functools.partial(jd.likelihood, model, ts=ts, solver=diffrax.Heun())
    truth = jd.many(prepare(), x, labels).log_prob
    print(f"\n{n} held-out digits, {float(jnp.mean(truth)):.2f} nats on average by the exact trace")
    return nll_errors(prepare, (x, labels), truth, heads)


# --- 4. Data sets. --------------------------------------------------------------------------------


def naive(alpha, sigma, x, v, data):
    """The whole distance matrix, as a careful user would write it."""
    squares = jnp.sum(x**2, 1)[:, None] - 2 * alpha * x @ data.T + alpha**2 * jnp.sum(data**2, 1)
    w = jax.nn.softmax(-0.5 * squares / sigma**2, axis=1)
    m = w @ data
    r = jnp.sum(w * squares, 1) / sigma**2 - jnp.sum((x - alpha * m) ** 2, 1) / sigma**2
    return m, r, (w * (v @ data.T)) @ data - m * jnp.sum(m * v, 1, keepdims=True)


def data():
    rows, d, t = [], 784, 0.4
    alpha, sigma = float(VP.alpha(t)), float(VP.sigma(t))
    side = jnp.ones((2048, 2048))
    square = jax.jit(lambda a: a @ a)
    rng = np.random.default_rng(0)
    print(f"\n{'d = 784':<12}{'queries':>9}{'streamed s':>12}{'naive s':>9}{'ratio':>7}"
          f"{'of peak':>9}{'MB':>8}{'naive MB':>10}")  # fmt: skip
    for n in (10_000, 100_000, 200_000, 1_000_000):
        atoms = jnp.asarray(rng.standard_normal((n, d), np.float32)) * 0.5
        model = jd.exact.empirical(VP, atoms)
        for batch in (64, 128, 256):
            x = alpha * atoms[:batch] + sigma * rng.standard_normal((batch, d), np.float32)
            v = jnp.asarray(rng.standard_normal((batch, d), np.float32))
            ours = lambda model, x, v: jax.vmap(lambda x, v: model.posterior(t, x, v[None]))(x, v)  # noqa: E731
            streamed, memory = compiled(ours, model, x, v)
            whole, more = compiled(lambda x, v, a: naive(alpha, sigma, x, v, a), x, v, atoms)
            calls = {"peak": lambda: square(side), "streamed": streamed, "naive": whole}
            seconds = in_turns(calls, 9 if n < 10**6 else 3)
            peak = 2 * 2048**3 / seconds["peak"]
            share = 8 * batch * n * d / seconds["streamed"] / peak
            ratio = seconds["naive"] / seconds["streamed"]
            rows.append(dict(n=n, d=d, queries=batch, seconds=seconds["streamed"], ratio=ratio,
                             peak_fraction=share, peak_gflops=peak / 1e9, scratch_mb=memory / 1e6,
                             naive_scratch_mb=more / 1e6))  # fmt: skip
            print(f"N = {n:<8}{batch:>9}{seconds['streamed']:>12.3f}{seconds['naive']:>9.3f}"
                  f"{ratio:>7.2f}{share:>9.2f}{memory / 1e6:>8.1f}{more / 1e6:>10.1f}")  # fmt: skip
        del model, atoms
    return rows


# --- Output. --------------------------------------------------------------------------------------


def draw_figure(path, report):
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    rows = [
        r for r in report["costs"] if r["net"].startswith("U-Net") and r["method"] != "evaluation"
    ]
    left.barh([r["method"] for r in rows][::-1], [r["time"] for r in rows][::-1], color="0.5")
    left.axvline(1, color="k", lw=0.8)
    left.set_xlabel("time / one evaluation (U-Net)")
    left.tick_params(labelsize=7)
    trace = report["errors"]["trace"]
    for name in ("raw", "residual", "preconditioned", "1 probe"):
        middle.semilogy([r["lam"] for r in trace], [r[name] for r in trace], "o-", ms=3, label=name)
    middle.set_xlabel("half log-SNR")
    middle.set_ylabel("relative error of tr F")
    middle.legend(fontsize=7)
    for batch in (64, 128, 256):
        some = [r for r in report["data"] if r["queries"] == batch]
        right.semilogx([r["n"] for r in some], [r["ratio"] for r in some], "o-", ms=3,
                       label=f"{batch} queries")  # fmt: skip
    right.axhline(1, color="k", lw=0.8)
    right.set_xlabel("atoms, d = 784")
    right.set_ylabel("naive time / streamed time")
    right.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main():
    parts = {"costs": costs, "errors": errors, "likelihoods": likelihoods, "data": data}
    chosen = sys.argv[1:] or list(parts)
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "fisher.json"
    report = json.loads(file.read_text()) if file.exists() else {}
    report |= {
        "date": time.strftime("%Y-%m-%d"), "jax": jax.__version__, "jaxdiff": jd.__version__,
        "device": jax.devices()[0].device_kind, "cpus": os.cpu_count(),
        "architecture": platform.machine(),
    }  # fmt: skip
    for name in chosen:
        report[name] = parts[name]()
        file.write_text(json.dumps(report, indent=1))
    if all(name in report for name in parts):
        draw_figure(RESULTS / "fisher.png", report)


if __name__ == "__main__":
    main()
