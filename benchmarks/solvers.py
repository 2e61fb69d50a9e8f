"""How far from the exact solution is each solver, at what cost, and how exact is its way back?

1. *mixtures*: relative error at the end of the PF-ODE (of the median start) against the number of
   network evaluations, for every deterministic solver on the exact denoiser of a mixture, on three
   processes; the truth is an adaptive solve of order 8 in float64.
2. *digits*: the same on the U-Net that `jaxdiff demo` trains, against a fine solve of that network.
3. *laws*: sliced Wasserstein distance of the samples of stochastic solvers to the mixture's own.
4. *trips*: relative errors noise -> data -> noise and back of the reversible solvers, in float32
   and float64.
5. *overhead*: time and compilation of our loop; see `overhead.py`.

Every solver runs one sample at a time under `vmap`, as in `jaxdiff.sample`, but without `jit`
around the loop, so that one compiled network serves all of them. Writes
`benchmarks/results/solvers.json` and `solvers.png`.

    python benchmarks/solvers.py [mixtures digits laws trips overhead] [--quick] [--digits FOLDER]
"""

import argparse
import functools
import itertools
import json
import time
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import overhead
from matplotlib.figure import Figure

import jaxdiff as jd
from jaxdiff import demo, solvers, tuning

RESULTS = Path(__file__).parent / "results"
NFES = (5, 10, 20, 50)
STARTS = 64
VP, EDM = jd.process.VP(), jd.process.EDM()
STABLE = jd.process.Discrete(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)  # s: 14.6 to 0.029
PATHS = {  # with the grid that is natural for each, inside finite log-SNR
    "VP": (VP, dict(kind="logsnr")),
    "EDM": (EDM, dict(kind="edm")),
    "Rectified": (jd.process.Rectified(), dict(kind="uniform", t_start=0.99, t_end=0.01)),
}

RK4 = solvers.RungeKutta("rk4")
DETERMINISTIC = {
    "DDIM": solvers.DDIM(),
    "DPM++(2M)": solvers.DPMpp2M(),
    "DPM++(2M), heun": solvers.DPMpp2M("heun"),
    "DPM++(3M)": solvers.DPMpp3M(),
    "UniPC(2)": solvers.UniPC(2),
    "UniPC(3)": solvers.UniPC(3),
    "UniPC(3), lower": solvers.UniPC(3, lower_order_final=True),
    "UniPC(3), eps": solvers.UniPC(3, output="eps"),
    "DEIS(3), t": solvers.DEIS(3),
    "DEIS(4), s (LMS)": solvers.DEIS(4, "s"),
    "DEIS(2), angle": solvers.DEIS(2, "angle"),
    "iPNDM": solvers.PNDM(),
    "PLMS": solvers.WarmStart(solvers.PNDM(), solvers.Heun(), 1),
    "F-PNDM": solvers.WarmStart(solvers.PNDM(), solvers.PseudoRK4(), 3),
    "SA(3, 4), tau = 0": solvers.SASolver(tau=0.0),
    "ER(3), ode": solvers.ERSDE(phi="ode"),
    "GHVB(2, 0.8)": solvers.GHVB(2, 0.8),
    "heavy ball, DPM++(2M)": solvers.HeavyBall(solvers.DPMpp2M()),
    "Heun": solvers.Heun(),
    "midpoint, r": solvers.RungeKutta("midpoint", "r"),
    "midpoint, t": solvers.RungeKutta("midpoint", "t"),
    "Kutta 3, s": solvers.RungeKutta("kutta3"),
    "RK4, s": RK4,
    "DPM-Solver-2": solvers.ExponentialRK(2, "eps"),
    "DPM-Solver-3": solvers.ExponentialRK(3, "eps"),
    "DPM++(2S)": solvers.ExponentialRK(2),
    "DPM++(3S)": solvers.ExponentialRK(3),
    "O-BELM": solvers.BELM(),
    "BDIA": solvers.BDIA(),
    "EDICT": solvers.EDICT(),
    "McCallum-Foster, RK4": solvers.McCallumFoster(RK4),
    "symmetric leapfrog": solvers.SymmetricLeapfrog(),
    "velocity leapfrog": solvers.VelocityLeapfrog(),
}
STOCHASTIC = {
    "DDIM": solvers.DDIM(),  # two of the above, for comparison
    "DPM++(2M)": solvers.DPMpp2M(),
    "DDIM, eta = 0.5": solvers.DDIM(eta=0.5),
    "Euler-Maruyama, u": solvers.EulerMaruyama(),
    "Euler-Maruyama, t": solvers.EulerMaruyama("t"),
    "reverse diffusion": solvers.ReverseDiffusion(),
    "DPM++(2M) SDE": solvers.DPMpp2MSDE(),
    "DPM++ SDE": solvers.DPMppSDE(),
    "SA(3, 4)": solvers.SASolver(),
    "ER(3)": solvers.ERSDE(),
    "SEEDS-2": solvers.SEEDS(2),
    "SEEDS-3": solvers.SEEDS(3),
    "churn": solvers.Churn(),
    "split noise": solvers.SplitNoise(),
    "DPM++(2M), Langevin": solvers.Between(
        solvers.DPMpp2M(), solvers.Langevin(rule="ald", snr=0.1)
    ),
}
SHOWN = {  # in colour in the figure, and printed
    "DDIM": "k", "DPM++(2M)": "C0", "DPM++(3M)": "C9", "UniPC(3)": "C3", "DEIS(3), t": "C1",
    "Heun": "C5", "DPM++(3S)": "C4", "symmetric leapfrog": "C2", "DPM-Solver-v3": "C6",
}  # fmt: skip


# --- What is sampled from, and how. ---------------------------------------------------------------


_pair = eqx.filter_jit(lambda denoiser, t, x, cond: denoiser.pair(t, x, cond))


class Compiled(jd.score.AbstractDenoiser):
    """A denoiser that alone is compiled in a loop that is not, once for all solvers."""

    inner: jd.score.AbstractDenoiser

    @property
    def process(self):
        return self.inner.process

    def pair(self, t, x, cond=None):
        with jax.disable_jit(False):
            return _pair(self.inner, jnp.asarray(t, x.dtype), x, cond)


def prepared(denoiser, solver, ts, x):
    """A sampler of one row of a batch, of states or results."""
    x = getattr(x, "x", x)
    return jd.sampler(Compiled(denoiser), x.shape[1:], solver=solver, ts=ts, dtype=x.dtype)


def each(run, *args):
    """`vmap` of the arguments that are there."""
    return jax.vmap(run, tuple(None if arg is None else 0 for arg in args))(*args)


def draw(denoiser, solver, ts, x, cond=None, key=None):
    """The samples of a solver from a batch of states, or from what `invert` made of one."""
    with jax.disable_jit():
        keys = None if key is None else jd.keys(key, 0, len(x))
        return each(prepared(denoiser, solver, ts, x), keys, cond, x)


def invert(denoiser, solver, ts, x):
    """What `draw` needs to come back to a batch."""
    with jax.disable_jit():
        return each(prepared(denoiser, solver, ts, x).invert, x)


def cost(solver, steps):
    """Network evaluations of so many steps."""
    if not isinstance(solver, solvers.Between):
        return int(solver.cost(steps))
    corrected = max(steps - (not solver.hook.last), 0)
    return cost(solver.solver, steps) + solver.hook.evaluations * corrected


def mixture(process, d=8, k=6, dtype=np.float64):
    """Means around the origin at distances of 1 per coordinate, thin and wide components."""
    rng = np.random.default_rng(0)
    law = rng.uniform(0.5, 1.5, k), rng.standard_normal((k, d)), rng.uniform(0.01, 0.3, k)
    denoiser = jd.exact.mixture(process, *(jnp.asarray(a, dtype) for a in law))

    def sample(seed, n):
        rng = np.random.default_rng(seed)
        which = rng.choice(k, n, p=law[0] / law[0].sum())
        return law[1][which] + np.sqrt(law[2])[which, None] * rng.standard_normal((n, d))

    return denoiser, sample


@eqx.filter_jit
def exact_flow(denoiser, ts, x):
    """The end of the PF-ODE, by an adaptive solve of order 8 in log-SNR."""
    clock = solvers.Clock(denoiser.process, "lam")
    c = [clock.of_t(t) for t in (ts[0], ts[-1])]

    def one(x):
        solution = diffrax.diffeqsolve(
            solvers.pf_ode(denoiser, "lam"), diffrax.Dopri8(), c[0], c[1], None,
            x * clock.scale(ts[0]), stepsize_controller=diffrax.PIDController(1e-11, 1e-11),
            max_steps=None,
        )  # fmt: skip
        return solution.ys[0] / clock.scale(ts[-1])

    return jax.vmap(one)(x)


def error(x, truth, reduce=jnp.mean):
    """RMS distance over RMS size; with a median, of the one sample in the middle."""
    squares = reduce(jnp.mean((x - truth).reshape(len(x), -1) ** 2, axis=1))
    value = float(jnp.sqrt(squares / jnp.mean(truth**2)))
    return value if np.isfinite(value) else None  # JSON has no NaN


# Of the sample in the middle: one that starts between two basins may end in the other.
typical = functools.partial(error, reduce=jnp.median)


def by_budget(table, budgets, run):
    """Rows of `run(solver, steps, budget)`, with as many steps as the budget allows; prints too."""
    rows = []
    print(f"{'':<28}" + "".join(f"{budget:>12}" for budget in budgets), end="")
    for name, solver in table.items():
        print(f"\n{name:<28}", end="", flush=True)
        for budget in budgets:
            steps = max(n for n in range(budget + 1) if cost(solver, n) <= budget)
            value = run(solver, steps, budget) if steps else None
            print(f"{'':>12}" if value is None else f"{value:>12.2e}", end="")
            if steps:
                nfe = cost(solver, steps)
                rows.append(dict(solver=name, budget=budget, nfe=nfe, steps=steps, error=value))
    print()
    return rows


def v3(denoiser, data, ts, nodes, samples, **kwargs):
    """DPM-Solver-v3 with statistics of the model."""
    fitted = tuning.model_statistics(
        jax.random.key(3), denoiser, data, nodes=nodes, samples=samples, t_start=ts[0],
        t_end=ts[-1], **kwargs,
    )  # fmt: skip
    return {"DPM-Solver-v3": solvers.DPMSolverV3(fitted)}


# --- 1, 2. Errors on the PF-ODE. ------------------------------------------------------------------


def mixtures(args):
    rows = []
    with jax.enable_x64(True):
        for name, (path, options) in PATHS.items():
            denoiser, sample = mixture(path)
            grid = functools.partial(path.grid, **options)
            ts = grid(1)
            noise = np.random.default_rng(1).standard_normal((args.starts, 8))
            x = jnp.asarray(noise * float(path.sigma(ts[0])))
            truth = exact_flow(denoiser, jnp.asarray(ts), x)
            table = args.table | v3(denoiser, sample(2, 512), ts, *args.fit)
            print(f"\nMedian relative error of the end of the PF-ODE: mixture, d = 8, {name}")

            def run(solver, steps, _, denoiser=denoiser, grid=grid, x=x, truth=truth):
                return typical(draw(denoiser, solver, grid(steps), x).x, truth)

            rows += [dict(process=name, **row) for row in by_budget(table, args.nfes, run)]
    return rows


def digits(args):
    images = demo.load()
    steps = 20 if args.quick else 800
    folder = Path(args.digits or ("out/quick" if args.quick else "out")) / "checkpoint"
    denoiser = demo.fit(images, folder, steps=steps, seed=0, progress=False)
    noise = np.random.default_rng(1).standard_normal((args.starts // 2, *demo.SHAPE), np.float32)
    labels = jnp.arange(args.starts // 2) % 10
    x = jnp.asarray(noise) * denoiser.process.sigma(1.0)
    grid = lambda n: denoiser.process.grid(n, "logsnr")  # noqa: E731
    go = lambda solver, n: draw(denoiser, solver, grid(n), x, labels).x  # noqa: E731
    fine = args.fine
    truth, other = go(solvers.UniPC(3), fine), go(RK4, fine // 2)
    print(f"\nThe same for the U-Net of digits; UniPC(3) with {fine} steps is the truth, from "
          f"which RK4 with {fine // 2} differs by {typical(other, truth):.1e}")  # fmt: skip
    nodes, samples = args.fit[0] // 2, args.fit[1] // 2
    rows = np.arange(samples) % len(images.train)
    table = args.table | v3(denoiser, images.train[rows], grid(1), nodes, samples,
                            cond=images.train_labels[rows])  # fmt: skip
    run = lambda solver, steps, _: typical(go(solver, steps), truth)  # noqa: E731
    return dict(reference=typical(other, truth), rows=by_budget(table, args.nfes, run))


# --- 3. Laws of stochastic solvers. ---------------------------------------------------------------


def laws(args):
    denoiser, sample = mixture(VP, dtype=np.float32)
    n = args.samples
    truth = jnp.asarray(sample(4, 4 * n), jnp.float32)
    noise = jnp.asarray(np.random.default_rng(5).standard_normal((n, 8)), jnp.float32)
    distance = jax.jit(lambda x: jd.transport.sliced_wasserstein(
        jax.random.key(7), x, truth, projections=128))  # fmt: skip
    floor = [float(distance(jnp.asarray(sample(seed, n), jnp.float32))) for seed in range(10, 18)]
    floor = dict(mean=float(np.mean(floor)), deviation=float(np.std(floor)))
    print(f"\nSliced W2 of {n} samples to {4 * n} of the mixture's own on VP; of {n} of its own "
          f"{floor['mean']:.4f} +- {floor['deviation']:.4f}")  # fmt: skip

    def run(solver, steps, budget):
        ts = VP.grid(steps, "logsnr")
        out = draw(denoiser, solver, ts, noise * VP.sigma(ts[0]), key=jax.random.key(budget)).x
        value = float(distance(out))
        return value if np.isfinite(value) else None

    return dict(floor=floor, rows=by_budget(args.laws, args.nfes[1:], run))


# --- 4. Round trips. ------------------------------------------------------------------------------


def ddim(denoiser, ts, x):
    """DDIM along times in either order: the inversion of DDIM is DDIM with the times reversed."""
    for t0, t1 in itertools.pairwise(ts):
        m, eps = jax.vmap(Compiled(denoiser).pair, (None, 0))(t0, x)
        x = (denoiser.process.alpha(t1) * m + denoiser.process.sigma(t1) * eps).astype(x.dtype)
    return x


def round_trip(denoiser, solver, ts, noise, x):
    """The end of noise, and the errors of noise -> data -> noise and data -> noise -> data."""
    if solver is None:
        end = ddim(denoiser, ts, noise)
        there, back = ddim(denoiser, ts[::-1], end), ddim(denoiser, ts, ddim(denoiser, ts[::-1], x))
        return end, error(there, noise), error(back, x)
    end = draw(denoiser, solver, ts, noise)
    there, inverse = invert(denoiser, solver, ts, end).x, invert(denoiser, solver, ts, x)
    return end.x, error(there, noise), error(draw(denoiser, solver, ts, inverse).x, x)


def trips(args):
    sd = lambda n: jd.grids.discrete(STABLE, n + 1, "linspace")  # noqa: E731
    log = lambda n: STABLE.grid(n, "logsnr")  # noqa: E731
    leap = solvers.SymmetricLeapfrog()
    plan = [
        ("DDIM", None, "SD", sd, 50),
        ("BDIA", solvers.BDIA(), "SD", sd, 50),
        ("EDICT", solvers.EDICT(), "SD", sd, 50),
        *(("O-BELM", solvers.BELM(), "SD", sd, n) for n in (10, 50, 200)),
        ("O-BELM", solvers.BELM(), "log", log, 50),
        ("O-BELM", solvers.BELM(), "EDM", EDM.grid, 200),
        *(("symmetric leapfrog", leap, "log", log, n) for n in (10, 50, 200)),
        ("symmetric leapfrog", leap, "EDM, log", lambda n: EDM.grid(n, "logsnr"), 200),
        ("symmetric leapfrog, 20 bits", solvers.SymmetricLeapfrog(bits=20), "log", log, 50),
        ("velocity leapfrog", solvers.VelocityLeapfrog(), "log", log, 50),
        ("McCallum-Foster, RK4", solvers.McCallumFoster(RK4), "log", log, 6),
        ("McCallum-Foster, RK4", solvers.McCallumFoster(RK4), "log", log, 25),
    ]
    rows, flows = [], {}
    print("\nMedian error of generation, RMS of round trips, d = 64, float32 / float64\n"
          f"{'':<30}{'grid':<10}{'N':>5}{'generation':>12}{'noise-data-noise':>22}"
          f"{'data-noise-data':>22}")  # fmt: skip
    for name, solver, kind, grid, n in [p for p in plan if not args.quick or p[-1] <= 10]:
        row = dict(solver=name, grid=kind, steps=n)
        for dtype in (np.float32, np.float64):
            with jax.enable_x64(dtype == np.float64):
                path = EDM if kind.startswith("EDM") else STABLE
                denoiser, sample = mixture(path, 64, 20, dtype)
                ts = np.asarray(grid(n))
                noise = np.random.default_rng(6).standard_normal((args.starts // 2, 64))
                noise = jnp.asarray(noise * float(path.sigma(ts[0])), dtype)
                x = jnp.asarray(sample(7, args.starts // 2), dtype)
                x = x * path.alpha(ts[-1]).astype(dtype)
                end, there, back = round_trip(denoiser, solver, ts, noise, x)
                row |= {f"noise {dtype.__name__}": there, f"data {dtype.__name__}": back}
                if dtype == np.float64:
                    if kind[:3] not in flows:  # the ends are those of the process
                        flows[kind[:3]] = exact_flow(denoiser, jnp.asarray(ts), noise)
                    row["generation"] = typical(end, flows[kind[:3]])
        rows.append(row)
        print(f"{name:<30}{kind:<10}{n:>5}{row['generation']:>12.1e}", end="")
        for way in ("noise", "data"):
            text = f"{row[f'{way} float32']:.1e} / {row[f'{way} float64']:.0e}"
            print(f"{text:>22}", end="\n" if way == "data" else "", flush=True)
    return rows


# --- Output. --------------------------------------------------------------------------------------


def draw_figure(path, report):
    panels: dict[str, Any] = {f"mixture, {name}": [
        row for row in report["mixtures"] if row["process"] == name] for name in PATHS}  # fmt: skip
    panels["digits, U-Net"] = report["digits"]["rows"]
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        names = list(dict.fromkeys(row["solver"] for row in rows))
        for name in sorted(names, key=lambda name: name in SHOWN):
            mine = [row for row in rows if row["solver"] == name]
            style = dict(color=SHOWN.get(name, "0.8"), lw=1.6 if name in SHOWN else 0.7)
            label = name if name in SHOWN and axis is axes[0] else None
            errors = [np.nan if row["error"] is None else row["error"] for row in mine]
            axis.loglog([row["nfe"] for row in mine], errors, "o-", ms=3, label=label, **style)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(NFES, map(str, NFES))
        axis.minorticks_off()
        axis.set_xlabel("network evaluations")
        axis.set_ylim(top=2)
    axes[0].set_ylabel("relative error of the end of the PF-ODE")
    figure.legend(loc="outside right center", fontsize=8)
    figure.savefig(path, dpi=120)


def main():
    parts = {"mixtures": mixtures, "digits": digits, "laws": laws, "trips": trips,
             "overhead": lambda args: overhead.measure(args.quick)}  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(parts)}; all by default")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, and nothing is written")
    parser.add_argument("--digits", help="folder of a run of the demo, to use or to make: out")
    args = parser.parse_args()
    sizes = (8, (5, 10), 40, 256, (60, 64)) if args.quick else (STARTS, NFES, 200, 4096, (300, 256))
    args.starts, args.nfes, args.fine, args.samples, args.fit = sizes
    some = slice(0, None, 6) if args.quick else slice(None)
    args.table = dict(list(DETERMINISTIC.items())[some])
    args.laws = dict(list(STOCHASTIC.items())[some])
    file = RESULTS / "solvers.json"
    report = json.loads(file.read_text()) if file.exists() else {}
    report |= overhead.machine()
    for name in args.parts or parts:
        begin = time.perf_counter()
        report[name] = parts[name](args)
        print(f"[{name}: {time.perf_counter() - begin:.0f} s]", flush=True)
        if not args.quick:
            RESULTS.mkdir(exist_ok=True)
            file.write_text(json.dumps(report, indent=1))
    if not args.quick and {"mixtures", "digits"} <= report.keys():
        draw_figure(RESULTS / "solvers.png", report)


if __name__ == "__main__":
    main()
