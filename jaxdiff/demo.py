r"""`jaxdiff demo`: a denoiser of real handwritten digits, trained, sampled and judged.

The data are the 1,797 digits that scikit-learn ships (8 x 8 pixels; Alpaydin, Kaynak 1998, "Optical
Recognition of Handwritten Digits"), 1,437 for training and 360 held out. A class-conditional U-Net
in EDM's preconditioning learns $E[x_0 | x_t]$ on the VP path. Every solver draws the same labels
from the same noise, and is judged by its distance to the held-out digits beside two yardsticks:
real training digits (the floor), and the exact denoiser of the training set, which memorises it.
Then two small heads on the denoiser's own features learn the trace of the noise covariance, and the
held-out digits get a likelihood: by random probes, and by the heads at the cost of sampling.
"""

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from tqdm import tqdm

import jaxdiff as jd
from jaxdiff import metrics, train, transport

__all__ = [
    "BATCH",
    "CHUNK",
    "HELD_OUT",
    "SHAPE",
    "SIGMA_END",
    "WIDTH",
    "Digits",
    "Entry",
    "Likelihood",
    "batches",
    "build",
    "compare",
    "draw",
    "draw_grid",
    "draw_trajectory",
    "fit",
    "fit_head",
    "judge",
    "likelihood_grid",
    "likelihoods",
    "load",
    "print_likelihoods",
    "print_table",
    "run",
]

HELD_OUT = 360
BATCH = 128
CHUNK = 250  # samples per program: the first chunk pays for compilation and is not timed
SHAPE = (8, 8, 1)
WIDTH = 1 / 8  # between two grey levels
SIGMA_END = 0.05  # where likelihoods end: the density of digits under this much noise


class Digits(NamedTuple):
    """Images in [-1, 1], (n, 8, 8, 1), and labels, (n,), split once and for all."""

    train: Array
    train_labels: Array
    held_out: Array
    held_out_labels: Array


class Entry(NamedTuple):
    """One line of the table: a set of images against the held-out digits."""

    name: str
    nfe: int
    sliced_wasserstein: float
    energy: float
    nearest: float
    ms_per_sample: float | None


class Likelihood(NamedTuple):
    """One line of the second table: the held-out digits under the model."""

    name: str
    bits_per_dim: float
    standard_error: float
    ms_per_digit: float | None


def load() -> Digits:
    """Load the digits and hold out 360 of them, the same ones every time."""
    digits: Any = load_digits()
    images = (digits.images / 8 - 1).astype(np.float32)[..., None]
    labels = digits.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(images))
    held, rest = order[:HELD_OUT], order[HELD_OUT:]
    arrays = (images[rest], labels[rest], images[held], labels[held])
    return Digits(*map(jnp.asarray, arrays))


def build(digits: Digits) -> tuple[Any, Callable[[Any], jd.Denoiser], float]:
    """Return the network, the map from its parameters to a denoiser, and the scale of the data."""
    process = jd.process.VP()
    sigma_data = float(jnp.std(digits.train))
    net = train.UNet((32, 64), num_classes=10, attention=True)

    def denoiser(params: Any) -> jd.Denoiser:
        inner = jd.score.from_linen(net, {"params": params})
        return jd.Denoiser(process, jd.score.precondition(process, inner, sigma_data))

    return net, denoiser, sigma_data


def fit(digits: Digits, path: Path, *, steps: int, seed: int, progress: bool) -> jd.Denoiser:
    """Train, or go on from the checkpoint in `path`, and return the averaged denoiser."""
    net, denoiser, sigma_data = build(digits)
    key = jax.random.key(seed)
    start = (jnp.zeros(1), digits.train[:1], digits.train_labels[:1])
    params = jax.jit(net.init)(jax.random.fold_in(key, 0), *start)["params"]
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-3))

    def loss(params: Any, key: Any, batch: Any) -> Any:
        return train.batch_loss(
            key,
            denoiser(params),
            *batch,
            sample_t=train.lognormal_time(-1.0, 1.4),
            weight=train.loss.edm(sigma_data),
        )

    state = train.init(jax.random.fold_in(key, 2), params, optimiser)
    step = train.make_step(loss, optimiser, ema_decay=0.995)
    batch = batches(digits, jax.random.fold_in(key, 1))
    state = train.fit(state, step, batch, steps=steps, path=path, save_every=200, progress=progress)
    return denoiser(state.ema)


def batches(digits: Digits, key: Any) -> Callable[[int], tuple[Array, Array]]:
    """Return the map from a step to its images and labels."""
    indices = train.epochs(key, len(digits.train), BATCH)

    def batch(n: int) -> tuple[Array, Array]:
        rows = indices(n)
        return digits.train[rows], digits.train_labels[rows]

    return batch


def fit_head(
    denoiser: jd.Denoiser, digits: Digits, kind: Any, *, steps: int, seed: int, progress: bool
) -> jd.fisher.TraceHead:
    """Train a trace head on the features of the frozen denoiser."""
    net, key = train.TraceNet(num_classes=10), jax.random.key(seed)
    image, label = digits.train[0], digits.train_labels[0]
    first = (jnp.zeros(1), denoiser.features(0.5, image, label)[2][None], label[None])
    params = jax.jit(net.init)(jax.random.fold_in(key, 3), *first)["params"]
    optimiser = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def head(params: Any) -> jd.fisher.TraceHead:
        return jd.fisher.TraceHead(
            jd.score.from_linen(net, {"params": params}), kind, features=True
        )

    def loss(params: Any, key: Any, batch: Any) -> Any:
        return train.batch_trace_loss(key, head(params), denoiser, *batch)

    state = train.init(jax.random.fold_in(key, 4), params, optimiser)
    step = train.make_step(loss, optimiser, ema_decay=0.99)
    batch = batches(digits, jax.random.fold_in(key, 5))
    title = f"train {kind} head"
    state = train.fit(state, step, batch, steps=steps, progress=progress, description=title)
    return head(state.ema)


def draw(
    denoiser: Any, solver: Any, steps: int, labels: Array | None, num: int, seed: int
) -> tuple[Array, int, float | None]:
    """Draw `num` samples in chunks; return them, the evaluations each, and ms per sample."""
    pieces, nfe, seconds, timed = [], 0, 0.0, 0
    chunk = min(CHUNK, num)
    ts = denoiser.process.grid(steps, "logsnr")
    sampler = jd.sampler(denoiser, SHAPE, solver=solver, ts=ts, denoise=True)
    for start in range(0, num, chunk):
        rows = np.minimum(np.arange(start, start + chunk), num - 1)
        begin = time.perf_counter()
        own = None if labels is None else labels[rows]
        samples = jd.sample(jax.random.key(seed), sampler, num=chunk, start=start, cond=own)
        pieces.append(jax.block_until_ready(jd.check(samples).x))
        nfe = int(samples.nfe[0])
        if start:
            seconds, timed = seconds + time.perf_counter() - begin, timed + chunk
    return jnp.concatenate(pieces)[:num], nfe, 1e3 * seconds / timed if timed else None


def judge(name: str, images: Array, nfe: int, ms: float | None, digits: Digits) -> Entry:
    """Measure a set of images against the held-out digits."""
    directions = jax.random.key(7)  # the same ones for every entry
    return Entry(
        name,
        nfe,
        float(transport.sliced_wasserstein(directions, images, digits.held_out)),
        float(metrics.energy_distance(images, digits.held_out)),
        float(jnp.median(metrics.nearest_distance(images, digits.train))),
        ms,
    )


def compare(
    denoiser: jd.Denoiser, digits: Digits, *, num: int, seed: int, progress: bool
) -> tuple[list[Entry], Array, Array]:
    """Sample with every solver; return the table, and labels and samples for the picture."""
    rows = np.random.default_rng(seed).integers(0, len(digits.train), num)
    labels = digits.train_labels[rows]
    exact = jd.exact.empirical(denoiser.process, digits.train)
    ddim, dpm = jd.solvers.DDIM(), jd.solvers.DPMpp2M()
    plans = [
        *(("DDIM", denoiser, ddim, n, labels) for n in (10, 20, 50)),
        *(("DPM++(2M)", denoiser, dpm, n, labels) for n in (10, 20, 50)),
        ("reverse SDE", denoiser, jd.solvers.EulerMaruyama(), 50, labels),
        ("memoriser", exact, dpm, 20, None),
    ]
    chance = digits.train[np.random.default_rng(seed + 1).permutation(len(digits.train))[:num]]
    entries = [judge("real digits (train)", chance, 0, None, digits)]
    shown = jnp.zeros((0, *SHAPE))
    bar = tqdm(plans, desc="sample", unit="run", disable=not progress, dynamic_ncols=True)
    for name, model, solver, steps, cond in bar:
        bar.set_postfix_str(f"{name}, {steps} steps")
        images, nfe, ms = draw(model, solver, steps, cond, num, seed)
        entries.append(judge(f"{name}, {steps} steps", images, nfe, ms, digits))
        if solver is dpm and steps == 20 and model is denoiser:
            shown = images
    return entries, labels, shown


def likelihood_grid(process: Any) -> Any:
    """Return 24 steps from the noise end to where sigma is `SIGMA_END`."""
    t_end = float(process.t_of_lam(np.log(np.sqrt(1 - SIGMA_END**2) / SIGMA_END)))
    return process.grid(24, "logsnr", t_end=t_end)


def likelihoods(
    denoiser: jd.Denoiser, digits: Digits, *, steps: int, num: int, seed: int, progress: bool
) -> list[Likelihood]:
    """Train the heads and return bits per dimension of `num` held-out digits by each estimator."""
    fisher, ts = jd.fisher, likelihood_grid(denoiser.process)
    fit = lambda kind: fit_head(denoiser, digits, kind, steps=steps, seed=seed, progress=progress)  # noqa: E731
    head, raw = fit("preconditioned"), fit("raw")
    plans = [
        ("Hutchinson, 1 probe", fisher.Hutchinson(1), 0),
        ("Hutchinson, 4 probes", fisher.Hutchinson(4), 0),
        ("trace head", head, 0),
        ("trace head, debiased at 8 times", head, 8),
        ("trace head, as published (raw)", raw, 0),
    ]
    keys = jax.random.split(jax.random.key(seed + 2), num)
    noisy = jax.vmap(lambda key, x: jd.dequantise(key, x, WIDTH))(keys, digits.held_out[:num])
    entries, parts = [], np.array_split(np.arange(num), max(1, min(4, num // 8)))
    bar = tqdm(plans, desc="likelihood", unit="run", disable=not progress, dynamic_ncols=True)
    for name, trace, debias in bar:
        bar.set_postfix_str(name)

        likelihood = jd.likelihood(
            denoiser, ts=ts, solver=diffrax.Heun(), trace=trace, debias=debias
        )
        measure = jax.vmap(lambda key, x, label, of=likelihood: of(x, label, key=key).log_prob)
        pieces, begin = [], 0.0
        for part in parts:  # the first pays for compilation and is not timed
            pieces.append(measure(keys[part], noisy[part], digits.held_out_labels[part]))
            jax.block_until_ready(pieces)
            begin = begin or time.perf_counter()
        timed = num - len(parts[0])
        ms = 1e3 * (time.perf_counter() - begin) / timed if timed else None
        bits = jd.bits_per_dim(jnp.concatenate(pieces), noisy[0].size, WIDTH)
        error = float(jnp.std(bits) / np.sqrt(num))
        entries.append(Likelihood(name, float(jnp.mean(bits)), error, ms))
    return entries


def _tile(images: np.ndarray) -> np.ndarray:
    """Lay out images (rows, columns, 8, 8) as one picture, with a blank pixel round each."""
    padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-1)
    rows, columns, height, width = padded.shape
    return padded.transpose(0, 2, 1, 3).reshape(rows * height, columns * width)


def _by_class(images: Array, labels: Array, columns: int) -> np.ndarray:
    """Return images in ten rows, one per class; a class with too few leaves blanks."""
    rows = np.full((10, columns, 8, 8), -1.0)
    for k in range(10):
        mine = np.asarray(images)[np.asarray(labels) == k][:columns, ..., 0]
        rows[k, : len(mine)] = mine
    return rows


def _show(axis: Any, images: np.ndarray, title: str) -> None:
    axis.imshow(_tile(images), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
    axis.set_title(title, fontsize=10)
    axis.set_xticks([])
    axis.set_yticks([])


def draw_grid(path: Path, digits: Digits, labels: Array, samples: Array) -> None:
    """Write real digits beside samples, a row per class."""
    figure = Figure(figsize=(9, 4.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    _show(left, _by_class(digits.held_out, digits.held_out_labels, 10), "real, held out")
    _show(right, _by_class(samples, labels, 10), "samples, DPM++(2M), 20 steps")
    figure.savefig(path, dpi=120)


def draw_trajectory(path: Path, denoiser: jd.Denoiser, seed: int) -> None:
    """Write the states of five samples from noise to data."""
    solve: dict = dict(solver=jd.solvers.DPMpp2M(), ts=denoiser.process.grid(10, "logsnr"))
    sampler = jd.sampler(denoiser, SHAPE, **solve, denoise=True, trajectory=True)
    samples = jd.sample(jax.random.key(seed), sampler, num=5, cond=jnp.arange(5) * 2)
    states, ts = (np.asarray(samples.aux[name]) for name in ("trajectory", "ts"))
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axis = figure.subplots()
    _show(axis, states[..., 0], "from noise to data: DPM++(2M), 10 steps and a denoising step")
    labels = [f"t = {t:.2g}" for t in ts[0, :-1]] + ["denoised"]
    axis.set_xticks(np.arange(len(labels)) * 10 + 4.5, labels, fontsize=7)
    axis.tick_params(length=0)
    figure.savefig(path, dpi=120)


def print_table(entries: list[Entry], reference: float, console: Console) -> None:
    """Print the comparison."""
    table = Table(title=f"distance to {HELD_OUT} held-out digits")
    table.add_column("images")
    for column in ("NFE", "sliced W2", "energy", "nearest", "ms/sample"):
        table.add_column(column, justify="right")
    for e in entries:
        ms = "" if e.ms_per_sample is None else f"{e.ms_per_sample:.2f}"
        distances = (f"{e.sliced_wasserstein:.4f}", f"{e.energy:.4f}", f"{e.nearest:.2f}")
        table.add_row(e.name, str(e.nfe or ""), *distances, ms)
    console.print(table)
    console.print(
        f"nearest: median distance to the nearest training digit; {reference:.2f} for the held-out"
        " digits themselves, 0 for a copy."
    )


def print_likelihoods(entries: list[Likelihood], num: int, console: Console) -> None:
    """Print the likelihoods."""
    table = Table(title=f"{num} held-out digits under the model, noise {SIGMA_END:g}")
    table.add_column("trace by")
    for column in ("bits/dim", "+-", "ms/digit"):
        table.add_column(column, justify="right")
    for e in entries:
        ms = "" if e.ms_per_digit is None else f"{e.ms_per_digit:.2f}"
        table.add_row(e.name, f"{e.bits_per_dim:.3f}", f"{e.standard_error:.3f}", ms)
    console.print(table)
    console.print("bits/dim: an upper bound on those of 17 grey levels, 4.09 by chance.")


def _prepare(out: Path, settings: dict[str, Any]) -> None:
    """Make the folder, or refuse one that cannot be written or holds another run."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        raise OSError(f"cannot write to {out}: {error.strerror}; choose another --out") from error
    file = out / "settings.json"
    if file.exists():
        found = json.loads(file.read_text())
        if found != settings:
            raise ValueError(
                f"{out} holds a run with {found}, this one has {settings}; choose another --out"
            )
    file.write_text(json.dumps(settings))


def run(
    out: str | os.PathLike[str] = "out",
    *,
    steps: int = 800,
    num: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Train, sample, judge, and write everything to `out`.

    Writes `checkpoint/`, `samples.png`, `trajectory.png` and `metrics.json`.

    Args:
        out: the folder; made if it is missing.
        steps: training steps in all; those already in the folder's checkpoint are not redone.
        num: samples per solver.
        seed: seed of all that is random, the split of the data excepted.
        progress: whether to show bars.

    Returns:
        What is written to `metrics.json`.

    Raises:
        OSError: if `out` cannot be written.
        ValueError: if `out` holds a run with another seed, or with more steps.
    """
    out, console = Path(out), Console()
    _prepare(out, {"seed": seed})
    digits = load()
    begin = time.perf_counter()
    denoiser = fit(digits, out / "checkpoint", steps=steps, seed=seed, progress=progress)
    trained = time.perf_counter()
    entries, labels, shown = compare(denoiser, digits, num=num, seed=seed, progress=progress)
    draw_grid(out / "samples.png", digits, labels, shown)
    draw_trajectory(out / "trajectory.png", denoiser, seed)
    sampled = time.perf_counter()
    scores = min(num, HELD_OUT)
    bits = likelihoods(
        denoiser, digits, steps=max(1, steps // 2), num=scores, seed=seed, progress=progress
    )
    scored = time.perf_counter()
    reference = float(jnp.median(metrics.nearest_distance(digits.held_out, digits.train)))
    print_table(entries, reference, console)
    print_likelihoods(bits, scores, console)
    seconds = {"train": trained - begin, "sample": sampled - trained, "score": scored - sampled}
    report = {
        "steps": steps,
        "num": num,
        "seed": seed,
        "seconds": seconds,
        "held_out_nearest": reference,
        "entries": [entry._asdict() for entry in entries],
        "likelihoods": [entry._asdict() for entry in bits],
        "versions": {"jaxdiff": jd.__version__, "jax": jax.__version__},
        "machine": {"backend": jax.default_backend(), "cpus": os.cpu_count(),
                    "architecture": platform.machine()},
    }  # fmt: skip
    (out / "metrics.json").write_text(json.dumps(report, indent=1))
    console.print(
        f"trained in {seconds['train']:.0f} s, sampled in {seconds['sample']:.0f} s, heads and "
        f"likelihoods in {seconds['score']:.0f} s; pictures, table and checkpoint are in {out}/"
    )
    return report
