"""The READMEs keep their promises: examples run, tables name what there is, figures are measured.

A figure in a README is the number of a file in `benchmarks/results`, rounded to the digits shown.
"""

import ast
import json
import math
import re
from functools import cache
from pathlib import Path

import jax
import pytest

import jaxdiff

ROOT = Path(__file__).parent.parent
README, BENCHMARKS = ((ROOT / name).read_text() for name in ("README.md", "benchmarks/README.md"))
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def section(text, title):
    """Return what stands under a heading of the second level."""
    return re.split(r"^## ", text.split(f"\n## {title}\n")[1], flags=re.M)[0]


# --- Examples, commands and names. ----------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number, defaults):
    exec(compile(EXAMPLES[number], f"README example {number + 1}", "exec"), {})


def test_there_are_thirteen_examples_that_assert():
    assert len(EXAMPLES) == 13
    assert all(re.search(r"^ *assert ", example, flags=re.M) for example in EXAMPLES)


def test_there_are_two_commands():
    assert re.findall(r"```bash\n(.*?)\n```", README) == [
        'pip install -e ".[demo]" && jaxdiff demo',
        'pip install -e ".[test]" && pytest',
    ]


def test_the_table_names_what_is_exported():
    names = re.findall(r"^\| `(\w+)` \|", section(README, "What is there"), flags=re.M)
    assert sorted(names) == sorted(jaxdiff.__all__)


def test_the_names_in_the_table_exist():
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", section(README, "What is there"), flags=re.M)
    anywhere = (jaxdiff, jaxdiff.exact, jaxdiff.process.AbstractProcess, jax)
    for owner, text in rows:
        thing = getattr(jaxdiff, owner)
        known = set(getattr(thing, "__annotations__", ()))  # fields of results
        known |= {name for place in (thing, *anywhere) for name in dir(place)}
        assert set(re.findall(r"`([A-Za-z]\w*)(?:\(\w*\))?`", text)) <= known, owner


@pytest.mark.parametrize("text, folder", [(README, "."), (BENCHMARKS, "benchmarks")])
def test_links_lead_to_files(text, folder):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    assert links
    assert not [link for link in links if not (ROOT / folder / link).exists()]


# --- Schedulers of diffusers: the pairs are those that tests/test_diffusers.py verifies. ----------

FAMILIES = {
    "_dpm": "DPMSolverMultistepScheduler",
    "_deis": "DEISMultistepScheduler",
    "_unipc": "UniPCMultistepScheduler",
    "_single": "DPMSolverSinglestepScheduler",
}


def verified_pairs():
    """Return (scheduler, solver) of every case, read from the source: diffusers is not needed."""
    tree = ast.parse((ROOT / "tests/test_diffusers.py").read_text())
    cases = next(
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CASES"
    )
    for call in cases.values:
        name, args = ast.unparse(call.func), call.args
        theirs = [FAMILIES[name]] if name in FAMILIES else [args[0].value]
        ours = args[0] if name in FAMILIES else args[2 if name == "Case" else 1]
        yield theirs[0], ast.unparse(ours)


def test_the_schedulers_are_those_that_are_verified():
    table = section(README, "Coming from PyTorch schedulers")
    stated = set()
    for scheduler, cell in re.findall(r"^\| `(\w+)` \| (.*) \|$", table, flags=re.M):
        for code in re.findall(r"`([A-Z][^`]*\))`", cell):
            stated.add((scheduler, ast.unparse(ast.parse(code, mode="eval"))))
    assert stated == set(verified_pairs())
    assert len(stated) > 20


# --- Figures. -------------------------------------------------------------------------------------

NUMBER = r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?"


@cache
def results(name):
    text = (ROOT / "benchmarks/results" / name).read_text()
    if name.endswith("l"):
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return json.loads(text)


def agrees(printed, value):
    """Whether a printed number is a value rounded to the digits that are shown."""
    digits, _, power = printed.replace(",", "").partition("e")
    unit = 10.0 ** (int(power or 0) - len(digits.partition(".")[2]))
    return abs(float(digits) * 10.0 ** int(power or 0) - value) <= 0.5000001 * unit


def find(rows, **keys):
    """Return the one row with these entries."""
    (row,) = [row for row in rows if all(row.get(key) == keys[key] for key in keys)]
    return row


def solver_error(process, solver, *budgets):
    report = results("solvers.json")
    if process == "digits":
        return [find(report["digits"]["rows"], solver=solver, budget=n)["error"] for n in budgets]
    rows = report["mixtures"]
    return [find(rows, process=process, solver=solver, budget=n)["error"] for n in budgets]


def law_error(solver, *budgets):
    rows = results("solvers.json")["laws"]["rows"]
    return [find(rows, solver=solver, budget=n)["error"] for n in budgets]


def trip(solver, grid, *keys):
    row = find(results("solvers.json")["trips"], solver=solver, grid=grid, steps=50)
    return [row[key] for key in keys]


def cost(net, method, *keys):
    rows = results("fisher.json")["costs"]
    (row,) = [row for row in rows if row["net"].startswith(net) and row["method"] == method]
    return [row[key] for key in keys or ("time", "memory")]


def nats(name):
    report = results("fisher.json")
    return find(report["errors"]["nll"], name=name), find(report["likelihoods"], name=name)


def share(process, solver, nfe):
    """Return the geometric mean of the errors of a solver over those of DPM++(2M)."""
    rows = [r for r in results("second_order.json")["mixtures"]["rows"] if r["nfe"] == nfe]
    known = {(r["process"], r["solver"], r["d"], r["condition"]): r["median"] for r in rows}
    base = [key for key in known if key[:2] == (process, "DPM++(2M)")]
    assert len(base) == 12
    logs = [math.log(known[process, solver, *key[2:]] / known[key]) for key in base]
    return math.exp(sum(logs) / len(logs))


def ahead_of_ddim(process, ddim, steps):
    """Return the geometric mean of the errors of DDIM over those of LocalGaussian."""
    rows = [r for r in results("second_order.json")["mixtures"]["rows"] if r["steps"] == steps]
    known = {(r["process"], r["solver"], r["d"], r["condition"]): r["median"] for r in rows}
    mine = [key for key in known if key[:2] == (process, "local Gaussian, steps")]
    assert len(mine) == 9
    logs = [math.log(known[process, ddim, *key[2:]] / known[key]) for key in mine]
    return math.exp(sum(logs) / len(logs))


def gain(solver, nfe, distance="sliced"):
    row = find(results("second_order.json")["digits"]["rows"], solver=solver, nfe=nfe)[distance]
    return [row["paired"], row["standard_error"]]


def langevin(rule, start):
    row = find(results("second_order.json")["gaussian"]["rows"], rule=rule, start=start)
    return [row["reach"], row["nfe"]]


def bits(name):
    return find(results("demo_metrics.json")["likelihoods"], name=name)["bits_per_dim"]


# --- Tables of benchmarks/README.md: (label, numbers of the row), in order. -----------------------


def demo_samples():
    for row in results("demo_metrics.json")["entries"]:
        keys = ("nfe", "sliced_wasserstein", "energy", "nearest", "ms_per_sample")
        real = row["name"].startswith("real")  # drawn by no network
        yield row["name"], [row[key] for key in (keys[1:4] if real else keys)]


def demo_likelihoods():
    for row in results("demo_metrics.json")["likelihoods"]:
        yield row["name"], [row[key] for key in ("bits_per_dim", "standard_error", "ms_per_digit")]


SOLVERS = {
    "DDIM()": "DDIM",
    "DPMpp2M()": "DPM++(2M)",
    "UniPC(3)": "UniPC(3)",
    "DEIS(3)": "DEIS(3), t",
    "PNDM()": "iPNDM",
    "Heun()": "Heun",
    "ExponentialRK(3)": "DPM++(3S)",
    "DPMSolverV3(...)": "DPM-Solver-v3",
    "SymmetricLeapfrog()": "symmetric leapfrog",
}


def solver_errors():
    for label, name in SOLVERS.items():
        where = ("VP", "EDM", "Rectified", "digits")
        yield f"`{label}`", [e for process in where for e in solver_error(process, name, 10, 20)]


LAWS = {
    "EulerMaruyama()": "Euler-Maruyama, u",
    "ReverseDiffusion()": "reverse diffusion",
    "DPMpp2MSDE()": "DPM++(2M) SDE",
    "DPMppSDE()": "DPM++ SDE",
    "SASolver()": "SA(3, 4)",
    "ERSDE()": "ER(3)",
    "SEEDS(2)": "SEEDS-2",
    "Churn()": "churn",
    "SplitNoise()": "split noise",
}


def laws():
    for label, name in LAWS.items():
        yield f"`{label}`", law_error(name, 10, 20, 50)


TRIPS = {
    "`DDIM()`, indices": ("DDIM", "SD"),
    "`BDIA()`, indices": ("BDIA", "SD"),
    "`EDICT()`, indices": ("EDICT", "SD"),
    "`BELM()`, indices": ("O-BELM", "SD"),
    "`BELM()`, log-SNR": ("O-BELM", "log"),
    "`SymmetricLeapfrog()`, log-SNR": ("symmetric leapfrog", "log"),
    "`SymmetricLeapfrog(bits=20)`, log-SNR": ("symmetric leapfrog, 20 bits", "log"),
    "`VelocityLeapfrog()`, log-SNR": ("velocity leapfrog", "log"),
}


def trips():
    keys = ("noise float32", "noise float64", "data float32", "data float64")
    for label, row in TRIPS.items():
        yield label, trip(*row, *keys)


def overhead():
    for row in results("overhead.jsonl")[-1]["cases"]:
        if row["loop"] == "jaxdiff" and row["model"] != "trivial, 128 x 64":
            yield f"{row['model']}, {row['solver']}", [row["ratio"], row["extra_us"]]


def compiling():
    for row in results("overhead.jsonl")[-1]["compile"]:
        yield f"{row['model']}, {row['solver']}", [row["ratio"], row["tables_s"]]


METHODS = {
    "trace by a head on the network's features": "trace: head on features",
    "trace by one probe, forward mode": "trace: Hutchinson, jvp",
    "trace by one probe, difference": "trace: Hutchinson, fd",
    "trace by one probe, reverse mode": "trace: Hutchinson, vjp",
    "Hutch++, six products": "trace: Hutch++, 6 products",
    "exact trace": "trace: exact, d derivatives",
    "m and F v, forward mode": "F v: jvp",
    "m and F v, difference": "F v: fd",
    "m and F v, end-point model as published": "F v: endpoint (DF-EA)",
    "m and F v, end-point model, centred": "F v: endpoint, centred",
}


def costs():
    for label, method in METHODS.items():
        nets = ("MLP",) if label == "exact trace" else ("MLP", "U-Net")
        yield label, [number for net in nets for number in cost(net, method)]


def trace_errors():
    for row in results("fisher.json")["errors"]["trace"]:
        keys = ("raw", "residual", "preconditioned", "1 probe", "probes to match")
        yield str(row["lam"]), [row[key] for key in keys]


def log_likelihoods():
    for row in results("fisher.json")["likelihoods"]:
        mixture, digits = nats(row["name"])
        yield row["name"], [mixture["rms"], digits["rms"], digits["bias"], digits["time"]]


def streamed():
    for n, queries in ((10_000, 64), (100_000, 64), (100_000, 256), (10**6, 64), (10**6, 256)):
        row = find(results("fisher.json")["data"], n=n, queries=queries)
        keys = ("queries", "ratio", "peak_fraction", "scratch_mb", "naive_scratch_mb")
        yield f"{n:,}", [row[key] for key in keys]


SECOND = {
    "`Secant(1)`": "Secant(1)",
    "`Secant(2)`": "Secant(2)",
    "`LML(DPMpp2M())`, c = .1": "LML DPM++(2M), c = .1",
    "`LML(DPMpp2M())`, damping as published": "LML DPM++(2M), published",
    '`DEIS(2, "lam")`': "DPM-Solver-2M",
    '`LML(DEIS(2, "lam"))`, c = .1': "LML DPM-Solver-2M, c = .1",
    "`DPMpp3M()`": "DPM++(3M)",
}


def second_order():
    for label, name in SECOND.items():
        paths = [share(process, name, n) for process in ("VP", "Rectified") for n in (5, 10, 20)]
        digits = [] if "published" in label else gain(name, 10) + gain(name, 20)
        yield label, paths + digits


RULES = {
    "plain, best step": "ULA, best h",
    "Newton, damping .01, h = .5": "Newton 0.01, exponential, h = 0.5",
    "Newton, damping .001, h = .5": "Newton 0.001, exponential, h = 0.5",
}


def langevin_steps():
    for label, rule in RULES.items():
        yield label, langevin(rule, 0.03**2) + langevin(rule, 1.0)


def scale(what, key):
    for row in results("scale.json")["4 x cpu"][what]:
        yield str(row[key]), [row["weak_ratio"], row["strong_ratio"]]


TABLES = {
    "jaxdiff demo": [demo_samples, demo_likelihoods],
    "solvers.py": [solver_errors, laws, trips],
    "overhead.py": [overhead, compiling],
    "fisher.py": [costs, trace_errors, log_likelihoods, streamed],
    "second_order.py": [second_order, langevin_steps],
    "scale.py": [lambda: scale("devices", "devices"), lambda: scale("processes", "processes")],
}


def tables(text):
    """Return the tables of a text, each a list of rows (label, the other cells)."""
    for table in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.M):
        rows = [[c.strip() for c in line[1:-1].split("|")] for line in table.splitlines()]
        yield [(row[0], row[1:]) for row in rows[2:]]


@pytest.mark.parametrize("title", TABLES)
def test_tables_are_what_was_measured(title):
    shown = list(tables(section(BENCHMARKS, title)))
    assert len(shown) == len(TABLES[title])
    for rows, measured in zip(shown, TABLES[title], strict=True):
        for (label, cells), (name, values) in zip(rows, measured(), strict=True):
            numbers = re.findall(NUMBER, " | ".join(cells))
            assert label == name
            assert len(numbers) == len(values), label
            pairs = zip(numbers, values, strict=True)
            assert not [(n, v) for n, v in pairs if not agrees(n, v)], label


def test_every_table_is_compared():
    assert sum(1 for _ in tables(BENCHMARKS)) == sum(map(len, TABLES.values()))


# --- Figures in sentences: a phrase, with # for each number, and the numbers. ---------------------


def figures_of_readme():
    """What stands behind the parentheses (measured: ...) of README.md, in order."""
    yield (
        "digits, 10 and 20 evaluations, # and #; `DDIM()` # and #",
        solver_error("digits", "DPM++(2M)", 10, 20) + solver_error("digits", "DDIM", 10, 20),
    )
    yield (
        "digits, 20, #; VP, 50, # where `DPMpp2M()` has #",
        solver_error("digits", "UniPC(3)", 20)
        + solver_error("VP", "UniPC(3)", 50)
        + solver_error("VP", "DPM++(2M)", 50),
    )
    names = ("iPNDM", "DPM++(2M)", "UniPC(3)", "UniPC(3), lower")
    yield (
        "flow, 20, #; `DPMpp2M()` #, `UniPC(3)` #, and # with `lower_order_final=True`",
        [solver_error("Rectified", name, 20)[0] for name in names],
    )
    yield (
        "digits, 20, #; VP, 20, #",
        [solver_error(where, "DPM-Solver-v3", 20)[0] for where in ("digits", "VP")],
    )
    yield (
        "digits, 10, `Heun()` #, `ExponentialRK(3)` #",
        [solver_error("digits", name, 10)[0] for name in ("Heun", "DPM++(3S)")],
    )
    yield (
        "sliced W2 to the law, VP, 20, # and #; `EulerMaruyama()` #; samples of the law itself #",
        [law_error(name, 20)[0] for name in ("ER(3)", "SA(3, 4)", "Euler-Maruyama, u")]
        + [results("solvers.json")["laws"]["floor"]["mean"]],
    )
    yield "# evaluations at d = 64", cost("MLP", "trace: exact, d derivatives", "time")
    yield (
        "# to # evaluations a probe; log-likelihoods on a mixture off by # nats with one probe a "
        "step, # with four",
        [cost(net, "trace: Hutchinson, jvp", "time")[0] for net in ("MLP", "U-Net")]
        + [nats(f"Hutchinson, {k}")[0]["rms"] for k in ("1 probe", "4 probes")],
    )
    yield (
        "# times the memory of an evaluation at d = 64, forward mode #",
        [cost("MLP", f"trace: Hutchinson, {mode}", "memory")[0] for mode in ("fd", "jvp")],
    )
    price = cost("MLP", "trace: head on features", "time")
    rms = [row["rms"] for row in nats("preconditioned head")]
    yield (
        "# evaluations; # nats on that mixture, # on digits where one probe has #",
        price + rms + [nats("Hutchinson, 1 probe")[1]["rms"]],
    )
    names = ("trace head", "trace head, debiased at 8 times", "Hutchinson, 1 probe")
    yield "bits of digits # without, # with, # by probes", [bits(name) for name in names]
    yield (
        "round trip # in float32, `DDIM()` #; digits, 20, #",
        trip("symmetric leapfrog", "log", "noise float32")
        + trip("DDIM", "SD", "noise float32")
        + solver_error("digits", "symmetric leapfrog", 20),
    )
    yield (
        "round trip #; digits, 20, #",
        trip("O-BELM", "SD", "noise float32") + solver_error("digits", "O-BELM", 20),
    )
    yield (
        "round trip #, but digits, 20, #",
        trip("EDICT", "SD", "noise float32") + solver_error("digits", "EDICT", 20),
    )


def figures_of_benchmarks():
    """Every other figure in the sentences of benchmarks/README.md."""
    demo, solvers = results("demo_metrics.json"), results("solvers.json")
    yield "with JAX #.#.#,", [int(part) for part in solvers["jax"].split(".")]
    seconds = [demo["seconds"][key] for key in ("train", "sample", "score")]
    yield "It trained in # s, sampled in # s and scored in # s", seconds
    yield "nearest training digit is # for the held-out", [demo["held_out_nearest"]]
    yield "of which chance has #)", [math.log2(17)]
    yield "at noise # (24", [0.05]
    bias = bits("trace head") - bits("Hutchinson, 1 probe")
    yield "shows as a bias of # bits", [bias]
    lower = [solver_error("Rectified", name, 20)[0] for name in ("UniPC(3)", "UniPC(3), lower")]
    yield "takes `UniPC(3)` there from # to #.", lower
    floor = solvers["laws"]["floor"]
    yield "itself have #, with a standard deviation of #:", [floor["mean"], floor["deviation"]]
    runs = [run["cases"] for run in results("overhead.jsonl")]
    torch = [cases for cases in runs if any(case["loop"] == "diffusers" for case in cases)][-1]
    theirs = [
        find(torch, model="trivial, 1 x 2", solver=solver, loop="diffusers")["us_per_step"]
        for solver in ("DDIM", "DPM++(2M)", "UniPC(3)")
    ]
    yield "trivial model took # (DDIM), # (2M) and # (UniPC)", theirs
    worse = gain("LML DPM-Solver-2M, c = .1", 10, "energy")
    yield "by # +- # at 10 evaluations", worse
    yield "`DPMpp3M()` at # of the error", [share("VP", "DPM++(3M)", 50)]
    ratios = [
        ahead_of_ddim(*names, steps)
        for names in (("VP", "DDIM"), ("Rectified", "Euler (= DDIM)"))
        for steps in (5, 10, 20)
    ]
    yield "beats DDIM # to # times", [min(ratios), max(ratios)]
    yield "of variances from 1 to # is #, from the law at sigma = # and", [0.001, 0.1, 0.03]
    yield "with a damping of # and small", [0.5]
    yield "alone (# times its rate)", [results("scale.json")["4 x cpu"]["forward"]["share"]]


def pattern(phrase):
    words = re.escape(phrase).replace(r"\#", f"({NUMBER})")
    return re.sub(r"(?:\\ )+", lambda _: r"\s+", words)


def test_measured_figures_of_the_readme():
    shown = re.findall(r"\(measured:\s+((?:[^()]|\([^()]*\))*)\)", README)
    figures = list(figures_of_readme())
    assert len(shown) == len(figures) == README.count("(measured:")
    for text, (phrase, values) in zip(shown, figures, strict=True):
        match = re.fullmatch(pattern(phrase), text)
        assert match, f"{text!r} is not {phrase!r}"
        assert all(map(agrees, match.groups(), values)), (text, values)


def test_no_other_figure_stands_in_the_readme():
    text = re.sub(r"```.*?```", "", README, flags=re.S)
    text = re.sub(r"\(measured:\s+(?:[^()]|\([^()]*\))*\)", "", text)
    known = {"3.11", "0.7.2", "0.13.2", "2.0", "0.0"}  # versions, a licence, a time
    assert not set(re.findall(r"\d*\.\d+(?:\.\d+)?", text)) - known


def test_measured_figures_of_the_benchmarks():
    text = re.sub(r"^\|.*\|$", "", BENCHMARKS, flags=re.M)
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    for phrase, values in figures_of_benchmarks():
        found = re.findall(pattern(phrase), text)
        assert len(found) == 1, phrase
        numbers = found[0] if isinstance(found[0], tuple) else found
        assert all(map(agrees, numbers, values)), (found, values)
        text = re.sub(pattern(phrase), "", text)
    assert not re.findall(r".*\d*\.\d.*", text)  # no figure is left that no file has


def test_dates_are_those_of_the_files():
    dates = {
        "solvers.py": results("solvers.json")["date"],
        "overhead.py": results("overhead.jsonl")[-1]["date"],
        "fisher.py": results("fisher.json")["date"],
        "second_order.py": results("second_order.json")["date"],
        "scale.py": results("scale.json")["4 x cpu"]["date"],
    }
    for title, date in dates.items():
        opening = section(BENCHMARKS, title).strip().split("\n\n")[0]
        assert opening.endswith(f"`, {date}.")
