"""What do second-order samplers win: turned directions, secants, curvature, Newton's Langevin?

1. *digits*: distances to the held-out digits of the U-Net that `jaxdiff demo` trains, over seeds,
   paired: each solver less DPM++(2M), on the same noise and projections. Of the energy distance the
   estimate has no bias; that of sliced W2 has one that depends on the spread of the samples.
2. *gaussian*: exact KL to the law after n Langevin steps at sigma = 0.03, plain and Newton, on a
   Gaussian with variances from 1 to 10^-3 (a step is affine); for the rank-one rule, whose step is
   not, KL of the Gaussian with the second moments of many chains.
3. *invariance*: bias of the moments of a mixture in the plane after many such steps from its law.
4. *mixtures*: relative error at the end of the PF-ODE, and sliced Wasserstein distance to the
   mixture's own law, on exact denoisers of mixtures in 2 to 256 dimensions whose components have
   full covariances of condition number 1 to 10^4.

`LML` with kappa = 0, as its code is published, is its base solver bit by bit and has no row;
"published" below is its published damping with kappa = 0.01. Products with a Jacobian are counted
as 5 evaluations for one and its transpose, 2 for one alone. Writes
`benchmarks/results/second_order.json` and `second_order.png`.

    python benchmarks/second_order.py [digits gaussian invariance mixtures] [--quick]
                                      [--digits FOLDER]
"""

import argparse
import functools
import json
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import overhead
import solvers as first
from matplotlib.figure import Figure

import jaxdiff as jd
from jaxdiff import demo, fisher, solvers
from jaxdiff.solvers import DDIM, LML, DPMpp2M, Secant
from jaxdiff.solvers.lml import DAMPING

CONDITIONS = (1, 100, 10_000)
EULER, DPM2, BASE = solvers.RungeKutta("euler", "t"), solvers.DEIS(2, "lam"), "DPM++(2M)"
PUBLISHED = {name: table[None] for name, table in DAMPING.items() if None in table}
COMMON = {
    BASE: DPMpp2M(), "DPM++(3M)": solvers.DPMpp3M(), "DPM-Solver-2M": DPM2,
    "LML DPM++(2M), c = .1": LML(DPMpp2M()), "LML DPM-Solver-2M, c = .1": LML(DPM2),
    "LML DPM++(2M), published": LML(DPMpp2M(), damping=PUBLISHED["t2i-compbench"]),
    "Secant(1)": Secant(1), "Secant(2)": Secant(2),
}  # fmt: skip
LML_DDIM = {"LML DDIM, incr., c = .5": LML(DDIM(), placement="increment")}
DIGITS = COMMON | {"LML DPM++(2M), c = .05": LML(DPMpp2M(), c=0.05), "DDIM": DDIM()} | LML_DDIM
del DIGITS["LML DPM++(2M), published"]  # far off: see the mixtures
TABLES = {
    "VP": {"DDIM": DDIM(), "LML DDIM, c = -.25": LML(DDIM()),
           "LML DDIM, published": LML(DDIM(), damping=PUBLISHED["celebahq"])} | LML_DDIM | COMMON,
    "Rectified": {"Euler (= DDIM)": EULER, "LML Euler, c = .5": LML(EULER),
                  "LML Euler, published": LML(EULER, damping=PUBLISHED["flux"])} | COMMON,
}  # fmt: skip
SHOWN = {
    "DDIM": "k", BASE: "C0", "DPM++(3M)": "C9", "LML DPM++(2M), c = .1": "C1", "Secant(1)": "C2",
    "LML DPM-Solver-2M, c = .1": "C5", "Secant(2)": "C3", "LML DPM++(2M), published": "0.6",
    "local Gaussian, steps": "C4",
}  # fmt: skip


def line(name, cells, width=10):
    texts = ["" if c is None else c if isinstance(c, str) else f"{c:.2g}" for c in cells]
    print(f"{name:<34}" + "".join(f"{text:>{width}}" for text in texts), flush=True)


# --- One sample at a time: the norms of these solvers are of one sample. --------------------------


_curve = eqx.filter_jit(lambda curvature, *args: curvature(*args))


def local_gaussian(curvature):
    def compiled(denoiser, t, x, cond):
        with jax.disable_jit(False):
            return _curve(curvature, denoiser.inner, jnp.asarray(t, x.dtype), x, cond)

    return solvers.LocalGaussian(compiled)


def draw(denoiser, solver, ts, x, cond=None):
    """The samples of a solver from a batch of states."""
    return first.draw(denoiser, solver, ts, x, cond).x


# --- 1. Digits. -----------------------------------------------------------------------------------


def digits(args):
    images, n, seeds = demo.load(), args.images, range(args.seeds)
    folder = Path(args.digits or ("out/quick" if args.quick else "out")) / "checkpoint"
    denoiser = demo.fit(images, folder, steps=20 if args.quick else 800, seed=0, progress=False)
    process = denoiser.process
    grid = functools.partial(process.grid, kind="logsnr")
    noise = lambda k: jax.random.normal(jax.random.key(k), (n, *demo.SHAPE))  # noqa: E731
    starts = [process.sigma(1.0) * noise(k) for k in seeds]
    draws = [np.random.default_rng(k).integers(0, len(images.train), n) for k in seeds]
    labels = [images.train_labels[rows] for rows in draws]
    distance = jax.jit(lambda seed, x: jnp.array([
        jd.transport.sliced_wasserstein(jax.random.key(seed), x, images.held_out, projections=256),
        jd.metrics.energy_distance(x, images.held_out)]))  # fmt: skip
    pick = lambda k: np.random.default_rng(k).permutation(len(images.train))[:n]  # noqa: E731
    floor = np.array([distance(k, images.train[pick(k)]) for k in seeds], float)
    few = slice(0, args.starts)
    truth = draw(denoiser, solvers.UniPC(3), grid(args.fine), starts[0][few], labels[0][few])
    print(f"\n{n} samples to {len(images.held_out)} held-out digits: sliced W2 and energy distance,"
          f" means over {len(seeds)} seeds, paired differences to {BASE} and their standard errors;"
          f" relative error of the median end point")  # fmt: skip
    line("", ("NFE", "W2", "paired", "s. e.", "energy", "paired", "s. e.", "end point"))
    line("training digits", [None, *(f"{v:.5f}" if k % 3 == 0 else None for k, v in enumerate(
        np.insert(floor.mean(axis=0), 1, [0, 0])))])  # fmt: skip
    rows = []
    for nfe in (10, 20):
        base = None
        for name, solver in list(DIGITS.items())[:: 6 if args.quick else 1]:
            ends = [draw(denoiser, solver, grid(nfe), *start)
                    for start in zip(starts, labels, strict=True)]  # fmt: skip
            values = np.array([distance(k, ends[k]) for k in seeds], float)
            base = values if base is None else base
            table = np.stack([values.mean(axis=0), (values - base).mean(axis=0),
                              (values - base).std(axis=0, ddof=1) / len(seeds) ** 0.5])  # fmt: skip
            end, keys = first.typical(ends[0][few], truth), ("mean", "paired", "standard_error")
            sliced, energy = (dict(zip(keys, v, strict=True)) for v in table.T.tolist())
            rows.append(dict(solver=name, nfe=nfe, end_point=end, values=values.T.tolist(),
                             sliced=sliced, energy=energy))  # fmt: skip
            line(name, (str(nfe), *(f"{v:.5f}" for v in table.T.reshape(-1)), end))
    return dict(samples=n, seeds=len(seeds), floor=floor.T.tolist(), rows=rows)


# --- 2. A Gaussian. -------------------------------------------------------------------------------

VARIANCES, SIGMA, GOAL, LENGTHS = np.logspace(0, -3, 32), 0.03, 0.1, (20, 50, 100, 200)


def plain(h):
    """Unadjusted Langevin with steps of h sigma^2."""
    return solvers.Langevin(rule="ald", snr=float(np.sqrt(h / 2))).langevin


def chains(rule, denoiser, sigma):
    """The map from `(key, x, parameters of the rule, n)` to n steps from each row of x."""

    def step(key, x, params):
        z = jax.random.normal(key, x.shape, x.dtype)
        return jax.vmap(lambda x, z: rule(*params)(denoiser, sigma, x, z))(x, z)

    return jax.jit(lambda key, x, params, n: jax.lax.fori_loop(
        0, n, lambda k, x: step(jax.random.fold_in(key, k), x, params), x))  # fmt: skip


def kl(covariance):
    """KL of N(0, covariance) to the law."""
    ratio = covariance / (VARIANCES + SIGMA**2)
    trace = np.trace(ratio, axis1=-2, axis2=-1)
    value = (trace - len(VARIANCES) - np.linalg.slogdet(ratio)[1]) / 2
    return np.nan_to_num(value, nan=np.inf)


def by_steps(rules, denoiser, start, most):
    """Least KL of the rules after every step, and the step at which one is below the goal for good.

    For good: where its law settles is below it too. With that the index of the rule.
    """
    zero, unit = jnp.zeros((32, 32)), jnp.eye(32)
    ends = [jax.vmap(lambda x, z, rule=rule: rule(denoiser, SIGMA, x, z))(*pair)
            for rule in rules for pair in ((unit, zero), (zero, unit))]  # fmt: skip
    move, noise = np.array(ends[::2]).transpose(0, 2, 1), np.array(ends[1::2])
    bound = functools.partial(np.clip, a_min=-1e30, a_max=1e30)
    added = settled = noise.transpose(0, 2, 1) @ noise
    power, law, best = move, np.broadcast_to(start * np.eye(32), move.shape), []
    for _ in range(30):  # twice as many steps each time
        settled = bound(settled + power @ settled @ power.transpose(0, 2, 1))
        power = np.clip(power @ power, -1e10, 1e10)
    good, reach = kl(settled) <= GOAL, None
    while len(best) < max(LENGTHS) or (good.any() and reach is None and len(best) < most):
        law = bound(move @ law @ move.transpose(0, 2, 1) + added)
        values = kl(law)
        best.append(float(values.min()))
        if reach is None and (good & (values <= GOAL)).any():
            reach = len(best), int(np.argmin(np.where(good, values, np.inf)))
    return best, reach or (None, None)


def gaussian(args):
    sizes, d = np.geomspace(0.05, 4, 6 if args.quick else 18), len(VARIANCES)
    newton = lambda damping, kind: lambda h: fisher.Newton(  # noqa: E731
        fisher.Curvature("exact"), float(h), damping, correct=False, integrator=kind)  # fmt: skip
    plans = {"ULA, best h": (plain, sizes, 1)} | {
        f"Newton {damping:g}, {kind}, {label}": (newton(damping, kind), hs, 1 + 2 * d)
        for damping in (0.01, 0.001) for kind in ("exponential", "euler")
        for label, hs in (("h = 0.5", (0.5,)), ("best h", sizes))
    }  # fmt: skip
    print(f"\nKL after n steps, best h of each n; steps until it is {GOAL:g} for good, with their h"
          f" and evaluations")  # fmt: skip
    line("", ("start", *map(str, LENGTHS), "reached", "h", "NFE"))
    rows = []
    with jax.enable_x64(True):
        denoiser = jd.exact.gaussian(jd.process.EDM(), np.zeros(d), VARIANCES)
        z = np.random.default_rng(3).standard_normal((args.chains, d))
        for start in (SIGMA**2, 1.0):
            for name, (rule, hs, price) in plans.items():
                best, (reach, which) = by_steps([rule(h) for h in hs], denoiser, start, args.most)
                h = None if reach is None else float(hs[which])
                rows.append(dict(rule=name, start=start, kl=best[: max(LENGTHS)], reach=reach, h=h,
                                 nfe=reach and reach * price))  # fmt: skip
            for damping in (32.0, 1.0):
                rule = lambda h, damping=damping: fisher.RankOne(h, damping, "exact")  # noqa: E731
                go, values = chains(rule, denoiser, SIGMA), []
                for h in sizes[::3]:
                    x, path = jnp.asarray(z * np.sqrt(start)), []
                    for made, n in zip((0, *LENGTHS), LENGTHS, strict=False):
                        x = go(jax.random.key(n), x, (h,), n - made)
                        path.append(float(kl(np.asarray(x.T @ x) / len(x))))
                    values.append(path)
                rows.append(dict(rule=f"RankOne {damping:g}, best h", start=start, reach=None,
                                 kl=np.min(values, axis=0).tolist(), h=None, nfe=None))  # fmt: skip
            for row in rows[-len(plans) - 2 :]:
                values = [row["kl"][n - 1] for n in LENGTHS] if len(row["kl"]) > 4 else row["kl"]
                tail = (str(row["reach"] or "-"), row["h"], str(row["nfe"] or "-"))
                line(row["rule"], (start, *values, *tail))
    plain_reach = {row["start"]: row["reach"] for row in rows if row["rule"] == "ULA, best h"}
    print("Steps of plain Langevin over those of")
    for row in rows:
        ours, theirs = row["reach"], plain_reach[row["start"]]
        if ours and theirs and row["rule"] != "ULA, best h":
            row["ratio"] = theirs / ours
            line(row["rule"], (row["start"], row["ratio"]))
    return dict(lengths=LENGTHS, rows=rows)


# --- 3. Is the law left alone? --------------------------------------------------------------------


def invariance(args):
    weights, sigma, n = np.array([0.5, 0.3, 0.2]), 0.3, args.chains
    means, tilt = np.array([[-1.0, 0.0], [0.6, 0.8], [0.7, -0.6]]), np.array([[0, 1], [1, 0]])
    wide = np.array([[0.2, 0.08], [0.02, 0.2], [0.1, 0.1]])[:, :, None] * np.eye(2)
    covs = wide + np.array([0.1, 0, -0.08])[:, None, None] * tilt
    noisy, rng = covs + sigma**2 * np.eye(2), np.random.default_rng(4)
    second = np.einsum("k,kij->ij", weights, noisy + means[:, :, None] * means[:, None])
    pairs = np.triu_indices(2)
    truth, size = np.append(weights @ means, second[pairs]), np.sqrt(np.diag(second))
    scale = np.append(size, np.outer(size, size)[pairs])
    which, rows = rng.choice(3, n, p=weights), []
    roots = np.linalg.cholesky(noisy)[which]
    x = means[which] + np.einsum("nij,nj->ni", roots, rng.standard_normal((n, 2)))
    terms = lambda x: np.hstack([x, x[:, pairs[0]] * x[:, pairs[1]]])  # noqa: E731
    spread = terms(x).std(axis=0) / n**0.5
    print(f"\nLargest bias of 5 moments of {n} chains after {args.steps} steps, sigma = {sigma:g}")
    line("", ("in s. e.", "relative", "ms/1000"))
    rules = [("ULA", h, plain(h)) for h in (0.02, 0.1, 0.5)] + [
        (f"Newton {damping:g}" + ("" if correct else ", not corrected"), h,
         fisher.Newton(fisher.Curvature("exact"), h, damping, correct=correct))
        for correct in (True, False) for damping in (0.5, 0.1, 0.01) for h in (0.05, 0.2, 0.5)
    ]  # fmt: skip
    with jax.enable_x64(True):
        denoiser = jd.exact.mixture(jd.process.EDM(), weights, means, covs)
        for name, h, rule in rules[:: 4 if args.quick else 1]:
            go = chains(lambda rule=rule: rule, denoiser, sigma)
            go(jax.random.key(0), x, (), 1)
            begin = time.perf_counter()
            end = np.asarray(go(jax.random.key(5), x, (), args.steps))
            ms = 1e6 * (time.perf_counter() - begin) / (n * args.steps)
            off = np.abs(terms(end).mean(axis=0) - truth)
            errors, relative = float(np.max(off / spread)), float(np.max(off / scale))
            rows.append(dict(rule=name, h=h, errors=errors, relative=relative, ms=ms))
            line(f"{name}, h = {h:g}", (errors, relative, ms))
    return dict(chains=n, steps=args.steps, sigma=sigma, rows=rows)


# --- 4. Mixtures. ---------------------------------------------------------------------------------


def mixture(process, d, condition, k=4):
    """Four unlike ellipsoids in random bases, the longest axes of variance 0.3, far apart."""
    rng = np.random.default_rng(d)
    means, variances = 0.7**0.5 * rng.standard_normal((k, d)), np.geomspace(0.3, 0.3 / condition, d)
    bases = np.stack([np.linalg.qr(rng.standard_normal((d, d)))[0] for _ in range(k)])

    def sample(seed, n, t):
        """Samples of the law at time t."""
        rng = np.random.default_rng(seed)
        which, z = rng.integers(k, size=n), rng.standard_normal((2, n, d))
        x0 = means[which] + np.einsum("nij,nj->ni", bases[which], np.sqrt(variances) * z[0])
        return jnp.asarray(process.alpha(t) * x0 + process.sigma(t) * z[1])

    covs = np.einsum("kij,j,klj->kil", bases, variances, bases)
    return jd.exact.mixture(process, np.ones(k), means, covs), sample


@jax.jit
def distance(x, y):
    return jd.transport.sliced_wasserstein(jax.random.key(7), x, y, projections=128)


def mixtures(args):
    with jax.enable_x64(True):
        plans = [(name, d) for name in TABLES for d in args.dims]
        return dict(rows=[row for plan in plans for row in one_dimension(args, *plan)])


def one_dimension(args, name, d):
    process, options = first.PATHS[name]
    grid = functools.partial(process.grid, **options)
    ts, n = grid(1), max(args.starts, args.samples // max(1, d // 32))
    made = [mixture(process, d, condition) for condition in CONDITIONS]
    split = [eqx.partition(denoiser, eqx.is_array) for denoiser, _ in made]
    arrays, rest = jax.tree.map(lambda *a: jnp.stack(a), *(a for a, _ in split)), split[0][1]
    noise = np.random.default_rng(1).standard_normal((n, d))
    x = jnp.asarray(noise * float(process.sigma(ts[0])))
    few = x[: args.starts]
    truths = [first.exact_flow(denoiser, jnp.asarray(ts), few) for denoiser, _ in made]
    laws = [sample(2, 4 * n, ts[-1]) for _, sample in made]
    own = [np.mean([float(distance(sample(seed, n, ts[-1]), law)) for seed in range(10, 15)])
           for law, (_, sample) in zip(laws, made, strict=True)]  # fmt: skip
    print(f"\nMedian relative error, {name}, d = {d}: condition, then NFE; last, sliced W2 of {n} "
          f"samples at 10 NFE")  # fmt: skip
    line("", [f"{c:g}, {nfe}" for c in CONDITIONS for nfe in args.nfes]
         + [f"{c:g}, W2" for c in CONDITIONS])  # fmt: skip
    rank = min(4, d)
    price, some = 1 + 5 * rank, args.nfes[:3]
    table = [(label, 1, solver, x, args.nfes) for label, solver in TABLES[name].items()]
    table = table[:: 4 if args.quick else 1]
    if d <= 64:
        exact = local_gaussian(fisher.Curvature("exact"))
        table.append(("local Gaussian, steps", 1 + 5 * d, exact, few, some))
    low = local_gaussian(fisher.Curvature("jvp", rank))
    table.append((f"local Gaussian, rank {rank}, steps", price, low, few, some))
    table.append((f"{BASE}, {5 * price} NFE (5 of these)", 1, DPMpp2M(), few, (5 * price,)))
    rows = []
    for label, cost, solver, start, budgets in table:
        mine = []
        for steps in budgets:
            with jax.disable_jit():  # all conditions at once
                ends = jax.vmap(lambda a, solver=solver, start=start, steps=steps: draw(
                    eqx.combine(a, rest), solver, grid(steps), start))(arrays)  # fmt: skip
            for c, end, truth, law, floor in zip(CONDITIONS, ends, truths, laws, own, strict=True):
                known = end[: args.starts]
                row = dict(process=name, d=d, condition=c, solver=label, steps=steps,
                           nfe=cost * steps, rms=first.error(known, truth), floor=floor,
                           median=first.typical(known, truth), sliced=None)  # fmt: skip
                if start is x and row["rms"] is not None:
                    row["sliced"] = float(distance(end, law))
                mine.append(row)
        rows.extend(mine)
        cells = {(row["condition"], row["steps"]): row for row in mine}
        heads = args.nfes if len(budgets) > 1 else budgets + args.nfes[1:]
        shown = [(c, steps) for c in CONDITIONS for steps in heads]
        shown = [cells[key]["median"] if key in cells else None for key in shown]
        last = [cells[c, 10]["sliced"] for c in CONDITIONS] if start is x else []
        line(label, [*shown, *last])
    line("the law itself", [None] * len(CONDITIONS) * len(args.nfes) + own)
    return rows


# --- Output. --------------------------------------------------------------------------------------


def draw_figure(path, report):
    figure = Figure(figsize=(16, 4.2), layout="constrained")
    axes = figure.subplots(1, 4)
    for axis, (d, condition) in zip(axes, ((2, 100), (64, 10_000)), strict=False):
        for name, color in SHOWN.items():
            here = "VP", d, condition, name
            rows = [row for row in report["mixtures"]["rows"] if here == tuple(
                row[key] for key in ("process", "d", "condition", "solver"))]  # fmt: skip
            errors = [np.nan if row["median"] is None else row["median"] for row in rows]
            axis.loglog([row["nfe"] for row in rows], errors, "o-", ms=3, color=color, label=name)
        axis.set(title=f"mixture, VP, d = {d}, condition {condition:g}", ylim=(None, 2),
                 xlabel="network evaluations", ylabel="median relative error")  # fmt: skip
    axes[1].legend(fontsize=6, loc="lower right")
    hidden = "euler, h = 0.5", "exponential, best h"  # biased; and exact in one long step
    for row in report["gaussian"]["rows"]:
        if row["start"] == SIGMA**2 and not row["rule"].endswith(hidden):
            some = len(row["kl"]) == len(LENGTHS)
            steps = LENGTHS if some else np.arange(1, len(row["kl"]) + 1)
            axes[2].loglog(steps, row["kl"], "x--" if some else "-", label=row["rule"])
    axes[2].set(title="Langevin on a Gaussian, d = 32", xlabel="steps", ylabel="KL to the law",
                ylim=(1e-4, 1e4))  # fmt: skip
    axes[2].legend(fontsize=6, loc="upper right")
    names = [name for name in DIGITS if name != BASE]
    for k, nfe in enumerate((10, 20)):
        rows = {row["solver"]: row for row in report["digits"]["rows"] if row["nfe"] == nfe}
        values, errors = ([rows[name]["energy"][key] for name in names]
                          for key in ("paired", "standard_error"))  # fmt: skip
        axes[3].barh(np.arange(len(names)) + 0.4 * k, values, 0.38, label=f"{nfe} NFE",
                     xerr=2 * np.array(errors))  # fmt: skip
    axes[3].set_yticks(np.arange(len(names)) + 0.2, names, fontsize=7)
    axes[3].axvline(0, color="k", lw=0.8)
    axes[3].locator_params(axis="x", nbins=4)
    axes[3].set(title=f"digits, against {BASE}", xlabel="energy distance, less its; 2 std. errors")
    axes[3].legend(fontsize=7)
    figure.savefig(path, dpi=120)


def main():
    parts = {"digits": digits, "gaussian": gaussian, "invariance": invariance, "mixtures": mixtures}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(parts)}; all by default")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, and nothing is written")
    parser.add_argument("--digits", help="folder of a run of the demo, to use or to make: out")
    args = parser.parse_args()
    names = "starts nfes dims samples most chains steps seeds images fine".split()
    quick = 8, (5, 10), (16,), 64, 300, 256, 20, 2, 64, 20
    full = 64, first.NFES, (2, 16, 64, 256), 1024, 10_000, 10_000, 100, 10, 1000, 200
    vars(args).update(zip(names, quick if args.quick else full, strict=True))
    file = first.RESULTS / "second_order.json"
    report = json.loads(file.read_text()) if file.exists() else {}
    report |= overhead.machine()
    for name in args.parts or parts:
        begin = time.perf_counter()
        report[name] = parts[name](args)
        report[name]["seconds"] = time.perf_counter() - begin
        print(f"[{name}: {report[name]['seconds']:.0f} s]", flush=True)
        if not args.quick:
            first.RESULTS.mkdir(exist_ok=True)
            short = lambda number: float(f"{float(number):.5g}")  # noqa: E731
            report = json.loads(json.dumps(report), parse_float=short)
            file.write_text(json.dumps(report))
    if not args.quick and parts.keys() <= report.keys():
        draw_figure(first.RESULTS / "second_order.png", report)


if __name__ == "__main__":
    main()
