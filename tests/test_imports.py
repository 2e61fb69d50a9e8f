"""The import rules: who may import whom, read from the sources, and what `import jaxdiff` loads."""

import ast
import graphlib
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "jaxdiff"

# Each layer may import the layers before it, never its own or a later one. A family of models
# registers itself with `_sampler.prepare`: so `_sampler` knows none of them.
LAYERS = [
    ("_array", "_keys", "_host", "_check", "_numerics", "_status", "_loop"),
    ("_mesh", "_prepared"),
    ("grids",),
    ("process",),
    ("score",),
    ("streaming",),
    ("exact",),
    ("pfgm", "linalg", "shard"),
    ("fisher",),
    ("solvers", "guidance"),
    ("_sampler",),
    ("_many", "_steps"),
    ("_files", "_gaussian", "_passengers"),
    ("_likelihood", "flow_map", "inversion"),
    ("adjoint", "phase", "interpolants", "mcmc", "tuning"),
    ("particles", "inverse", "train"),
    ("flow",),
    ("pretrained",),
]
ANYTHING = {"__init__", "cli", "demo", "_demo"}
PROGRAMS = {"cli", "demo", "_demo"}  # import anything, imported by nothing but each other
ALLOWED = {unit: set().union(*LAYERS[:i]) for i, layer in enumerate(LAYERS) for unit in layer}
ALLOWED |= {"metrics": {*LAYERS[0]}, "transport": {*LAYERS[0]}}

# Third parties: where at the top of a module, and where only when called. A name with no dot
# stands for the module or the whole package.
FREE = {"jax", "jaxlib", "numpy", "equinox", "jaxtyping"}
TOP = {
    "diffrax": {
        *("solvers", "_status", "_sampler", "_steps", "_gaussian", "_passengers", "_likelihood"),
        *("flow_map", "adjoint", "interpolants", "mcmc", "tuning.trajectories"),
        "_files",  # builds a status of the numbers in a file
    }
    | PROGRAMS,
    "lineax": {"linalg", "fisher", "adjoint", "inverse", "guidance"},
    "optax": {"train"},
    "scipy": {"grids"},
    "orbax": {"train"},
    "flax": {"train.nets", "pretrained"},
    "rich": PROGRAMS,
    "tqdm": PROGRAMS,
    "sklearn": PROGRAMS,
    "matplotlib": PROGRAMS,
    "ott": set(),
    "blackjax": set(),
}
CALLED = {
    "optax": {"adjoint", "train", "tuning", "flow"},  # where a function takes an optimiser
    "flax": {"score"},
    "tqdm": {"_many", "_files", "train", "tuning"},  # a bar where it is installed
    "ott": {"flow", "train.couplings", "transport", "metrics"},
    "blackjax": {"mcmc"},
}
LAZY = ("flax", "optax", "orbax", "ott", "sklearn", "matplotlib", "tqdm", "blackjax")


def modules(root):
    """All modules under the package: dotted name without the package's -> source."""
    found = {}
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        found[".".join(parts)] = file.read_text()
    return found


def imports(name, source, known):
    """Yield (dotted target, deferred) for every import of a module; `eqx.internal` counts."""
    package = ["jaxdiff", *name.split(".")[:-1]]

    def visit(node, deferred):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            deferred = True
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            deferred = True
        if isinstance(node, ast.Import):
            yield from ((alias.name, deferred) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = node.module.split(".") if node.module else []
            if node.level:
                base = package[: len(package) - node.level + 1] + base
            for alias in node.names:
                full = ".".join([*base, alias.name])
                inner = full.removeprefix("jaxdiff.")
                is_module = inner in known or f"{inner}.__init__" in known
                is_module |= base[0] != "jaxdiff"  # of third parties only the head matters
                yield (full if is_module else ".".join(base)), deferred
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("eqx.internal",):
            yield "equinox.internal", deferred
        for child in ast.iter_child_nodes(node):
            yield from visit(child, deferred)

    yield from visit(ast.parse(source), False)


def within(name, places):
    """Whether a module is one of the places or lies in one of them."""
    return any(name == p or name.startswith(f"{p}.") for p in places)


def violations(name, source, known):
    """Every broken rule of one module, in words."""
    unit = name.split(".")[0]
    if unit not in ALLOWED and unit not in ANYTHING:
        yield f"{name}: add the unit {unit!r} to the tables of tests/test_imports.py"
        return
    for target, deferred in imports(name, source, known):
        head, *rest = target.split(".")
        if head == "jaxdiff":
            other = rest[0] if rest else "__init__"
            if other in PROGRAMS and unit not in PROGRAMS:
                yield f"{name} imports the program {target}"
            elif other not in ALLOWED and other not in ANYTHING:
                yield f"{name} imports {target}: add {other!r} to the tables of test_imports.py"
            elif unit not in ANYTHING and other != unit and other not in ALLOWED[unit]:
                yield f"{name} imports {target}, which is not below it"
        elif target.startswith("equinox.internal"):
            yield f"{name} imports equinox.internal, which is private"
        elif head in sys.stdlib_module_names or head in FREE:
            continue
        elif head not in TOP:
            yield f"{name} imports {target}: add {head!r} to the tables of tests/test_imports.py"
        elif within(name, TOP[head]) or unit in PROGRAMS:
            continue
        elif not (deferred and within(name, CALLED.get(head, set()))):
            where = "at its top" if not deferred else "in a function"
            yield f"{name} imports {target} {where}, which only others may"


def graph(sources):
    """Module -> modules it imports, inside the package. A package's name is its `__init__`."""

    def resolve(target):
        inner = target.removeprefix("jaxdiff").removeprefix(".")
        candidates = (inner, f"{inner}.__init__".removeprefix("."))
        return next((c for c in candidates if c in sources), None)

    return {
        name: {
            resolve(target)
            for target, _ in imports(name, source, sources)
            if target.split(".")[0] == "jaxdiff" and resolve(target)
        }
        for name, source in sources.items()
    }


def naming(name, source):
    """Every broken rule of one module's names, in words."""
    body, own, listed = ast.parse(source).body, set(), None
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        for target in node.targets if isinstance(node, ast.Assign) else ():
            if ast.unparse(target) == "__all__":
                listed = ast.literal_eval(node.value)
    *folders, file = name.split(".")
    if file in own:
        yield f"{name} is named as the function or class {file!r} in it"
    if any(part.startswith("_") for part in [*folders, file.removeprefix("__init__")]):
        return
    if listed is None:
        yield f"{name} has no __all__"
    else:
        hidden = sorted(n for n in own - set(listed) if not n.startswith("_"))
        if hidden and file != "__init__":
            yield f"{name}: {hidden} neither in __all__ nor private"


SOURCES = modules(ROOT)


@pytest.mark.parametrize("name", SOURCES)
def test_a_module_imports_only_what_lies_below_it(name):
    assert list(violations(name, SOURCES[name], SOURCES)) == []


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_a_module_is_named_for_what_is_in_it_and_lists_it(name):
    assert list(naming(name, SOURCES[name])) == []


def test_no_import_cycles():
    graphlib.TopologicalSorter(graph(SOURCES)).prepare()  # raises CycleError, naming the cycle


# --- The rules themselves can fail. --------------------------------------------------------------

KNOWN = {n: "" for n in ["__init__", "_array", "_check", "grids", "process", "score", "cli"]}
KNOWN |= {
    n: ""
    for n in ["solvers.__init__", "solvers.terms", "fisher.__init__", "fisher.heads", "_sampler"]
}
KNOWN |= {n: "" for n in ["linalg.spectrum", "flow", "train.nets"]}


@pytest.mark.parametrize(
    "name,source,word",
    [
        ("grids", "from jaxdiff import process", "not below"),
        ("grids", "from jaxdiff.process import VP", "not below"),
        ("grids", "from . import process", "not below"),
        ("grids", "from .process import VP", "not below"),
        ("grids", "import jaxdiff.process as p", "not below"),
        ("grids", "def f():\n    from jaxdiff import process", "not below"),
        ("process", "import jaxdiff", "not below"),
        ("_array", "from jaxdiff import _check", "not below"),
        ("fisher.heads", "from jaxdiff import solvers", "not below"),
        ("fisher.heads", "from ..solvers import terms", "not below"),
        ("linalg.spectrum", "from jaxdiff.fisher import solve", "not below"),
        ("solvers.terms", "from jaxdiff._sampler import Samples", "not below"),
        ("_sampler", "from jaxdiff import _gaussian", "not below"),
        ("_gaussian", "from jaxdiff._files import read", "not below"),
        ("phase._prepare", "from jaxdiff.interpolants import Model", "not below"),
        ("train.nets", "from jaxdiff import flow", "not below"),
        ("metrics", "from jaxdiff import process", "not below"),
        ("score", "from jaxdiff import cli", "program"),
        ("__init__", "from jaxdiff import cli", "program"),
        ("wavelets", "import jax", "add the unit 'wavelets'"),
        ("score", "from jaxdiff.wavelets import haar", "add 'wavelets'"),
        ("score", "import torch", "add 'torch'"),
        ("score", "import diffrax as dfx", "only others may"),
        ("score", "def f():\n    import diffrax", "only others may"),
        ("solvers.terms", "import lineax as lx", "only others may"),
        ("score", "from flax import nnx", "at its top"),
        ("flow", "import optax", "at its top"),
        ("flow", "import ott", "at its top"),
        ("score", "def f():\n    import tqdm", "only others may"),
        ("solvers.terms", "import equinox.internal as eqxi", "private"),
        ("solvers.terms", "from equinox import internal", "private"),
        ("solvers.terms", "from equinox.internal import while_loop", "private"),
        ("solvers.terms", "import equinox as eqx\neqx.internal.noinline", "private"),
    ],
)
def test_a_broken_rule_is_seen(name, source, word):
    found = list(violations(name, source, KNOWN))
    assert found and word in found[0]


@pytest.mark.parametrize(
    "name,source",
    [
        ("process", "from jaxdiff import _check, grids\nfrom jaxdiff.grids import make"),
        ("solvers.terms", "import diffrax\nfrom jaxdiff import score\nfrom . import terms"),
        ("score", "def f():\n    from flax import nnx"),
        ("_gaussian", "from jaxdiff._sampler import prepare"),
        ("flow", "def f():\n    import optax\n    import ott"),
        ("train.nets", "import flax.linen as nn\nimport optax\nimport math"),
        ("cli", "import matplotlib.pyplot\nfrom jaxdiff import _sampler"),
        ("demo.toys", "import sklearn\nimport jaxdiff\nfrom jaxdiff import cli"),
        ("flow", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import optax"),
    ],
)
def test_a_kept_rule_is_not_seen(name, source):
    assert list(violations(name, source, KNOWN)) == []


@pytest.mark.parametrize(
    "name,source,word",
    [
        ("adjoint.pullback", '__all__ = ["pullback"]\ndef pullback(): ...', "named as"),
        ("fisher.trace", '__all__ = ["trace"]\ndef trace(): ...', "named as"),
        ("Clock", '__all__ = ["Clock"]\nclass Clock: ...', "named as"),
        ("_stream", "def stream(): ...\ndef _stream(): ...", "named as"),
        ("grids", "def make(): ...", "no __all__"),
        ("fisher.__init__", "from jaxdiff.fisher.heads import TraceHead", "no __all__"),
        ("grids", "__all__ = []\ndef make(): ...", "['make'] neither"),
    ],
)
def test_a_bad_name_is_seen(name, source, word):
    found = list(naming(name, source))
    assert found and word in found[0]


@pytest.mark.parametrize(
    "name,source",
    [
        ("fisher.heads", '__all__ = ["heads_of"]\ndef heads_of(heads): ...\ndef _f(): ...'),
        ("trees", '__all__ = ["Tree"]\nclass Tree:\n    def trees(self): ...'),
        ("_keys", "def stream(): ..."),
        ("_shard.mesh", "def gather(): ..."),
    ],
)
def test_a_good_name_is_not_seen(name, source):
    assert list(naming(name, source)) == []


def test_a_cycle_is_seen():
    sources = {
        "solvers.__init__": "from jaxdiff.solvers.a import f",
        "solvers.a": "from jaxdiff.solvers import b",
        "solvers.b": "def g():\n    from .a import f",
    }
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph(sources)).prepare()
    sources["solvers.b"] = "import jax"
    graphlib.TopologicalSorter(graph({**sources, "solvers.a": "from .b import g"})).prepare()
    with pytest.raises(graphlib.CycleError):  # a module that imports its own package
        graphlib.TopologicalSorter(
            graph({**sources, "solvers.a": "import jaxdiff.solvers"})
        ).prepare()


# --- One solve, written once. --------------------------------------------------------------------

# The loop over the steps of all solves, and sums and maps over pieces, which are no steps.
REMATERIALISED = {"_loop": 1, "_likelihood": 1, "pfgm": 1, "streaming": 1}


def rematerialised(source):
    """Count the places where activations are made again for a gradient."""
    names = {"checkpoint", "remat", "filter_checkpoint"}
    found = 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in names:
            found += ast.unparse(node.value) in ("jax", "eqx", "jax.ad_checkpoint", "nn")
        if isinstance(node, ast.ImportFrom) and node.module in ("jax", "equinox", "flax.linen"):
            found += sum(alias.name in names for alias in node.names)
    return found


def tuples_of_options(source):
    """Count the calls and classes named `Options`: keywords of a solve, carried about."""
    calls = [n.func for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    classes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ClassDef)]
    named = [getattr(f, "id", getattr(f, "attr", "")) for f in calls] + [c.name for c in classes]
    return sum(name.strip("_") == "Options" for name in named)


def signatures_of_a_solve(source):
    """Return the names of functions that take a solver, a grid and what to return of the solve.

    The families' implementations of `prepare`, named `_`, are parts of the one that calls them.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        names = {a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
        part = [ast.unparse(d) for d in node.decorator_list] == ["prepare.register"]
        if {"solver", "ts"} <= names and names & {"denoise", "trajectory"} and not part:
            found.append(node.name)
    return found


def test_one_checkpointed_loop_runs_all_solves():
    counts = {name: rematerialised(source) for name, source in SOURCES.items()}
    assert {name: n for name, n in counts.items() if n} == REMATERIALISED


def test_one_function_has_the_keywords_of_a_solve():
    found = {name: signatures_of_a_solve(source) for name, source in SOURCES.items()}
    assert {name: names for name, names in found.items() if names} == {"_sampler": ["sampler"]}
    sampler = next(
        node
        for node in ast.parse(SOURCES["_sampler"]).body
        if getattr(node, "name", 0) == "sampler"
    )
    keywords = {a.arg for a in sampler.args.kwonlyargs}
    assert {"solver", "ts", "denoise", "trajectory", "controller"} <= keywords
    assert not any(map(tuples_of_options, SOURCES.values()))


def test_a_second_solve_is_seen():
    assert rematerialised("import jax\n@jax.checkpoint\ndef f(): ...") == 1
    assert rematerialised("from jax import checkpoint as c\nimport equinox as eqx") == 1
    assert rematerialised("functools.partial(eqx.filter_checkpoint, prevent_cse=False)") == 1
    assert rematerialised("from jaxdiff.train import checkpoint\ncheckpoint.save") == 0
    assert tuples_of_options("_Options(1)") == tuples_of_options("class Options: ...") == 1
    assert tuples_of_options("solve(options)\nsampling.Option(1)") == 0
    again = "def draw(key, model, *, solver, ts, denoise=False): ..."
    assert signatures_of_a_solve(again) == ["draw"]
    assert signatures_of_a_solve(f"@jax.jit\n{again}") == ["draw"]
    assert signatures_of_a_solve(f"@prepare.register\n{again}") == []
    assert signatures_of_a_solve("def likelihood(model, *, solver, ts, controller): ...") == []


# --- What one import costs. ----------------------------------------------------------------------


def test_importing_the_package_loads_no_optional_one():
    script = (
        "import sys, jaxdiff\n"
        "print(jaxdiff.__version__)\n"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    version, loaded = done.stdout.splitlines()
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", version)
    assert "jax" in loaded.split()
    assert not set(LAZY) & set(loaded.split())
