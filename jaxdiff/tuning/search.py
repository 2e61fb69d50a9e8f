r"""Search among solvers: what every step does, and where it stops, as a table of choices.

Notation: $o_j$ is $m$ or $\hat\epsilon$ at node j, $\lambda_1$ the next node. Every multistep step
of the exponential kind makes the same few choices, here integers in a `Schedule`:

| choice | values |
|---|---|
| `order` | number of outputs in the polynomial, 1 to 3 |
| `scaling` | how it is integrated: exactly, as UniPC's B1 or B2, or with the curvature halved |
| `output` | what is extrapolated: $m$ or $\hat\epsilon$ |
| `corrector` | outputs that correct the step beside the new one, 1 to 3; 0 for no correction |
| `start` | node from which the integral starts: the current one, or the one before |

`Scheduled` compiles any of them to rows of the engine, so that one program runs all. Evolution
looks for a good one:

$$ \text{population} \leftarrow \text{best few} \cup \text{children of them}, \qquad
   \text{child} = \text{mutation of a crossing of two}. $$
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, Real

from jaxdiff import _check
from jaxdiff._types import Cond, ScalarLike, is_concrete
from jaxdiff.process import AbstractProcess
from jaxdiff.sampling import check, sample
from jaxdiff.score import AbstractDenoiser
from jaxdiff.solvers.engine import AbstractGridSolver, Row, State, combine
from jaxdiff.solvers.exponential import transfer
from jaxdiff.solvers.multistep import step_length
from jaxdiff.solvers.quadrature import history, integrals, log_snr_step, phi
from jaxdiff.solvers.terms import View

SCALINGS = ("exact", "bh1", "bh2", "damped")
OUTPUTS = ("x0", "eps")
_MOST = {"order": (1, 3), "scaling": (0, 3), "output": (0, 1), "corrector": (0, 3), "start": (0, 1)}


class Schedule(eqx.Module):
    """The choices of every step; see the module's table. `Schedule.of` spells known solvers.

    Attributes:
        order: (steps,), 1 to 3; the first steps use what history there is.
        scaling: (steps,), index into `SCALINGS`.
        output: (steps,), index into `OUTPUTS`.
        corrector: (steps,), 0 to 3; that of the last step has no effect.
        start: (steps,), 0 or 1.

    Raises:
        ValueError: if shapes differ or a value is out of range.
    """

    order: Int[Any, " steps"]
    scaling: Int[Any, " steps"]
    output: Int[Any, " steps"]
    corrector: Int[Any, " steps"]
    start: Int[Any, " steps"]

    def __check_init__(self) -> None:
        for name, (low, high) in _MOST.items():
            value = getattr(self, name)
            if np.ndim(value) != 1 or np.shape(value) != np.shape(self.order):
                raise _check.bad(
                    "Schedule", name, "of the shape (steps,) of order", np.shape(value)
                )
            if is_concrete(value) and not np.all((np.asarray(value) >= low) & (value <= high)):
                raise _check.bad("Schedule", name, f"whole numbers in [{low}, {high}]", value)

    @classmethod
    def of(
        cls,
        steps: int,
        order: int = 2,
        scaling: Literal["exact", "bh1", "bh2", "damped"] = "exact",
        output: Literal["x0", "eps"] = "x0",
        corrector: int = 0,
        start: int = 0,
    ) -> "Schedule":
        """Return the schedule that makes the same choices at every step.

        | solver | arguments |
        |---|---|
        | `DPMpp2M()` | `order=2, scaling="bh2"` |
        | `DPMpp3M()`, `DPMpp3M(released=True)` | `order=3`, and `scaling="damped"` |
        | `UniPC(p, variant, output)` | `order=p, scaling=variant, output=output, corrector=p` |
        | `DEIS(p, "lam")` | `order=p, output="eps"` |
        """
        _check.whole("Schedule.of", "steps", steps, 1)
        _check.choice("Schedule.of", "scaling", scaling, SCALINGS)
        _check.choice("Schedule.of", "output", output, OUTPUTS)
        row = (order, SCALINGS.index(scaling), OUTPUTS.index(output), corrector, start)
        return cls(*(np.full(steps, value, np.int32) for value in row))


class _Span(NamedTuple):
    r"""One step as its quadratures see it, with K and $\kappa$ of either output in one form.

    $$ K(r) = \text{size}\,e^{\pm(h + \text{back} - r)}, \qquad
       \kappa = \text{size}\,h\varphi_1(\pm h) \text{ without back} $$
    """

    lams: Array  # of the nodes `ts[1:]`, newest first
    count: Array  # how many of them count
    h: Array
    back: Array  # how far before the current node the integral starts
    size: Array  # alpha_1 of m, -sigma_1 of eps
    sign: Array  # -1 of m, 1 of eps


def _span(process: AbstractProcess, ts: Array, order: Any, output: Any, start: Any) -> _Span:
    """Return what the choices make of the step from `ts[1]` to `ts[0]`."""
    lams, count = history(process, ts, order)
    h, _ = step_length(process, ts)
    h = jnp.where(h > 0, h, 1.0)  # before the first step nothing can be corrected
    older = (start > 0) & (history(process, ts, 2)[1] > 1)
    back = jnp.where(older, lams[0] - lams[1], 0.0)
    size = jnp.where(output == 0, process.alpha(ts[0]), -process.sigma(ts[0]))
    return _Span(lams, count, h, back, size, jnp.where(output == 0, -1.0, 1.0))


def _exact(span: _Span, nodes: Array, count: Any) -> Array:
    r"""Return $w_j = \int K\,\ell_j\,d\lambda$ of the nodes, over the whole integral."""
    length = span.h + span.back
    kernel = lambda r: span.size * jnp.exp(span.sign * (length - r))  # noqa: E731
    return integrals(kernel, lambda lam: lam, span.lams[0] - span.back, length, nodes, count)


def _half(span: _Span, scaling: Any) -> Array:
    r"""Return $\kappa/2$ with UniPC's B for $h\varphi_1(\pm h)$: h as "bh1", itself otherwise."""
    z = span.sign * span.h
    b = jnp.where(scaling == 1, z, jnp.expm1(z))
    return span.sign * span.size * b / 2


def _line(exact: Array, half: Array, j: int, r: Any) -> Array:
    r"""Return the weights of $\kappa\,o_0 + \text{half}\cdot(o_j - o_0)/r$, with $o_0$ at 1.

    The line through two outputs, r steps apart, is taken to the middle of the step; $\kappa$ is the
    sum of the exact weights.
    """
    slope = half / r
    return jnp.zeros_like(exact).at[j].set(slope).at[1].set(jnp.sum(exact) - slope)


def _curve(span: _Span) -> Array:
    r"""Return the weights of $\text{size}\,h\varphi_3(\pm h)\,D_2$, half of the curvature, (3,).

    $$ D_2 = \frac{1}{a + b}\Big[\frac{o_0 - o_{-1}}{a} - \frac{o_{-1} - o_{-2}}{b}\Big], $$

    the second divided difference of three outputs, that are a and b steps apart.
    """
    a, b = (span.lams[0] - span.lams[1]) / span.h, (span.lams[1] - span.lams[2]) / span.h
    outer = span.size * span.h * phi(3, span.sign * span.h) / (a + b)
    return jnp.stack([outer / a, -outer / a - outer / b, outer / b])


def _extrapolate(
    process: AbstractProcess,
    ts: Array,
    order: Any,
    scaling: Any,
    output: Any,
    start: Any,
    *,
    new: bool,
) -> Array:
    r"""Return the weights of outputs in the integral that ends at `ts[0]`.

    Of the outputs at `ts[1:]`; with `new` the one at `ts[0]` counts too, beside `order` others.
    The first weight is of the output at `ts[0]`, 0 without `new`. All are exact, but in the step
    from the current node: two outputs as B1 or B2 have it (or damped, in a predictor, as B2), three
    that are damped.
    """
    span = _span(process, ts, order, output, start)
    lams, count, here = span.lams, span.count, span.back == 0
    half = _half(span, scaling)
    if new:
        exact = _exact(span, jnp.concatenate([(lams[0] + span.h)[None], lams]), count + 1)
        two = here & (count == 1) & ((scaling == 1) | (scaling == 2))
        return jnp.where(two, _line(exact, half, 0, 1.0), exact)
    exact = jnp.pad(_exact(span, lams, count), (1, 0))
    two, three = here & (count == 2) & (scaling > 0), here & (count == 3) & (scaling == 3)
    weights = jnp.where(two, _line(exact, half, 2, (lams[1] - lams[0]) / span.h), exact)
    return jnp.where(three, exact.at[1:4].add(-_curve(span)), weights)


class Scheduled(AbstractGridSolver):
    r"""The solver that a schedule spells.

    Step n extrapolates as entry n says; it is corrected, if entry n says so, when step n + 1
    starts. A step that starts at the older node starts from the state in which the network was
    evaluated there, $\alpha_{-1}m_{-1} + \sigma_{-1}\hat\epsilon_{-1}$, and hence knows nothing of
    corrections. Both outputs are remembered at three nodes. One network evaluation per step.

    Args:
        schedule: the choices, one row per step of the grid that it is used on.

    Raises:
        ValueError: if (when used) the grid has another number of steps.

    References:
        Liu et al. 2024 (2312.07243).
    """

    schedule: Schedule
    memory: ClassVar[int] = 3

    def begin(self, x: Array) -> Any:
        """Return the older noise predictions: none."""
        return (jnp.zeros_like(x),) * self.memory

    def tabulate(self, process: AbstractProcess, ts: Any, *, more: int = 0) -> AbstractGridSolver:
        """Return this solver with its rows, after counting its steps."""
        steps = np.shape(self.schedule.order)[0]
        if np.shape(ts)[0] - 1 + more != steps:
            got = f"{np.shape(ts)[0] - 1 + more} steps"
            raise _check.bad("Scheduled", "ts", f"a grid of {steps} steps, as the schedule", got)
        return super().tabulate(process, ts, more=more)

    def row(
        self, process: AbstractProcess, ts: Array, n: ScalarLike, left: ScalarLike
    ) -> tuple[Row, Array]:
        """Correct the step that led here, then predict; weights of both outputs."""
        decay, gain, _ = transfer(process, ts[1], ts[0])
        n = jnp.asarray(n)
        now = jax.tree.map(lambda a: jnp.asarray(a)[n], self.schedule)
        past = jax.tree.map(lambda a: jnp.asarray(a)[jnp.maximum(n - 1, 0)], self.schedule)
        plan = (now.order, now.scaling, now.output, now.start)
        weights = _extrapolate(process, ts[:-1], *plan, new=False)[1:]
        is_m = now.output == 0
        h_known = step_length(process, ts)[1]
        # From the older node: alpha m + sigma eps there in place of x_0.
        back = (now.start > 0) & (history(process, ts[:-1], 2)[1] > 1)
        t = jnp.where(back, ts[2], ts[1])
        alpha = jnp.where(process.alpha(t) > 0, process.alpha(t), 1.0)
        decays = jnp.where(
            is_m, process.sigma(ts[0]) / process.sigma(t), process.alpha(ts[0]) / alpha
        )
        older = jnp.where(back, decays, 0.0)
        of_m = jnp.where(is_m, weights, 0.0).at[1].add(older * process.alpha(t))
        of_eps = jnp.where(is_m, 0.0, weights).at[1].add(older * process.sigma(t))
        of_m, of_eps = (jnp.pad(w[1:], (0, 1)) for w in (of_m, of_eps))
        # The correction is a combination of outputs, which decays with the state.
        used = (n > 0) & (past.corrector > 0) & ~back & h_known & (ts[2] > ts[1])
        used = used & jnp.isfinite(log_snr_step(process, ts[2], ts[1]))
        choices = past.scaling, past.output, past.start
        change = _extrapolate(process, ts[1:], past.corrector, *choices, new=True)
        change = change - _extrapolate(process, ts[1:], past.order, *choices, new=False)
        change = jnp.where(used, decays * change[1:], 0.0)
        of_m = of_m + jnp.where(past.output == 0, change, 0.0)
        of_eps = of_eps + jnp.where(past.output == 1, change, 0.0)
        return Row(decay, gain, of_m), of_eps

    def advance(
        self, at: View, row: tuple[Row, Array], t: Array, x: Array, state: State
    ) -> tuple[Array, Array, Any]:
        """Step with both outputs and remember both."""
        m, eps = at.field.denoiser.pair(t[0], x, at.field.cond)
        x1 = combine(row[0], x, m, [m, *state.history], None)
        x1 = combine(Row(1.0, 0.0, row[1]), x1, m, [eps, *state.extra], None)
        return x1, m, (eps, *state.extra)[: self.memory]


class Found(NamedTuple):
    """What a search found.

    Attributes:
        best: the best candidate.
        value: its objective.
        trace: the best objective so far, of the start and after every round, (rounds + 1,).
    """

    best: Any
    value: float
    trace: np.ndarray


class _Evolution(NamedTuple):
    """The numbers of a search, and its source of randomness."""

    rng: np.random.Generator
    pop: int
    top: int
    mutate: float
    rounds: int


def _evolution(where: str, key: Any, pop: int, top: int, mutate: Any, rounds: int) -> _Evolution:
    _check.whole(where, "top", top, 1)
    _check.whole(where, "pop", pop, 1)
    _check.whole(where, "rounds", rounds, 0)
    _check.number(where, "mutate", mutate, 0, 1)
    seed = np.asarray(jax.random.key_data(_check.key(where, "key", key)))
    return _Evolution(np.random.default_rng(seed), pop, top, float(mutate), rounds)


def _evolve(
    plan: _Evolution,
    objective: Callable[[Any], Any],
    init: Sequence[Any],
    breed: Callable[[Any, Any], Any],
) -> Found:
    """Return the best of all candidates that were ever tried."""

    def scored(candidate: Any) -> tuple[float, Any]:
        value = float(objective(candidate))
        return (value if np.isfinite(value) else np.inf), candidate

    def best(population: list[Any]) -> list[Any]:
        return sorted(population, key=lambda pair: pair[0])[: plan.top]  # stable

    population = best([scored(candidate) for candidate in init])
    trace = [population[0][0]]
    for _ in range(plan.rounds):
        pairs = plan.rng.integers(len(population), size=(plan.pop, 2))
        children = [breed(population[i][1], population[j][1]) for i, j in pairs]
        population = best(population + [scored(child) for child in children])
        trace.append(population[0][0])
    return Found(population[0][1], population[0][0], np.asarray(trace))


def _breed_grids(plan: _Evolution, a: np.ndarray, b: np.ndarray, pool: np.ndarray) -> np.ndarray:
    """Return a grid with nodes of both, some of them drawn anew from the pool; the ends stay."""
    both = np.union1d(a[1:-1], b[1:-1])
    inner = plan.rng.choice(both, size=len(a) - 2, replace=False)
    drawn = plan.rng.random(len(inner)) < plan.mutate
    free = np.setdiff1d(pool[(pool < a[0]) & (pool > a[-1])], inner)
    drawn[drawn] = np.arange(drawn.sum()) < len(free)
    inner[drawn] = plan.rng.choice(free, size=drawn.sum(), replace=False)
    return np.concatenate([a[:1], np.sort(inner)[::-1], a[-1:]])


def _breed_schedules(plan: _Evolution, a: Schedule, b: Schedule) -> Schedule:
    """Return a schedule with steps of both, some of their choices drawn anew."""
    steps = len(a.order)
    first, child = plan.rng.random(steps) < 0.5, {}
    for name, (low, high) in _MOST.items():
        value = np.where(first, getattr(a, name), getattr(b, name))
        drawn = plan.rng.random(steps) < plan.mutate
        fresh = plan.rng.integers(low, high + 1, size=steps)
        child[name] = np.where(drawn, fresh, value).astype(np.int32)
    return Schedule(**child)


def _grids(where: str, init: Sequence[Any]) -> list[np.ndarray]:
    grids = [np.asarray(ts, np.float64) for ts in init]
    if not grids or any(ts.ndim != 1 or len(ts) < 2 or np.any(np.diff(ts) >= 0) for ts in grids):
        raise _check.bad(where, "init", "one or more strictly decreasing grids", init)
    if any(
        ts.shape != grids[0].shape or ts[0] != grids[0][0] or ts[-1] != grids[0][-1] for ts in grids
    ):
        raise _check.bad(where, "init", "grids of one length and with the same ends", init)
    return grids


def search_grid(
    key: PRNGKeyArray,
    objective: Callable[[np.ndarray], Any],
    init: Sequence[Any],
    pool: Real[Any, " times"],
    *,
    pop: int = 50,
    top: int = 10,
    mutate: ScalarLike = 0.1,
    rounds: int = 10,
) -> Found:
    r"""Search the nodes of a grid by evolution, for any objective.

    A child takes its nodes from the union of those of two parents, then draws some of them anew.
    The objective is called on the host, `len(init) + pop * rounds` times; compile its work once.

    Args:
        key: a threefry key; the search is a function of it.
        objective: from a grid, strictly decreasing (nodes,), to the number to make small; one that
            is not finite loses.
        init: grids to start from, of one length and with the same ends, which stay.
        pool: times that nodes are drawn from, (times,): a fine grid, or those of a discrete model.
        pop: children per round.
        top: candidates that survive a round, and parents of the next.
        mutate: chance of a node to be drawn anew, in [0, 1].
        rounds: number of rounds.

    Raises:
        ValueError: if an argument is wrong.

    Example:
        >>> first = np.linspace(1, 0, 4)
        >>> found = search_grid(jax.random.key(0), lambda ts: abs(ts[1] - 0.9), [first],
        ...                     np.linspace(1, 0, 21), rounds=3)
        >>> round(float(found.best[1]), 2)
        0.9

    References:
        Li et al. 2023 (2309.10438).
    """
    plan = _evolution("search_grid", key, pop, top, mutate, rounds)
    grids, pool = _grids("search_grid", init), np.asarray(pool, np.float64)
    return _evolve(plan, objective, grids, lambda a, b: _breed_grids(plan, a, b, pool))


def search_schedule(
    key: PRNGKeyArray,
    objective: Callable[[Scheduled, np.ndarray], Any],
    init: Sequence[tuple[Schedule, Any]],
    *,
    pool: Real[Any, " times"] | None = None,
    pop: int = 50,
    top: int = 10,
    mutate: ScalarLike = 0.1,
    rounds: int = 10,
) -> Found:
    r"""Search what each step does, and where it stops, by evolution.

    A child takes every step's choices from one of two parents, then draws some anew. All schedules
    of one length share one compiled program. See `search_grid` for the rest.

    Args:
        key: a threefry key; the search is a function of it.
        objective: from a solver and its grid to the number to make small: `distance`, or a metric
            of samples.
        init: pairs of a schedule and its grid, all of one length, to start from.
        pool: times that nodes are drawn from; None to keep to the grids of `init`.
        pop: children per round.
        top: candidates that survive a round.
        mutate: chance of a choice, and of a node, to be drawn anew.
        rounds: number of rounds.

    Returns:
        `Found`, whose `best` is a pair of a schedule and its grid: never worse than the best of
        `init`.

    Raises:
        ValueError: if an argument is wrong.

    References:
        Liu et al. 2024 (2312.07243), whose predictor of the objective is left out.
    """
    where = "search_schedule"
    plan = _evolution(where, key, pop, top, mutate, rounds)
    schedules = [schedule for schedule, _ in init]
    grids = _grids(where, [ts for _, ts in init])
    if any(len(schedule.order) + 1 != len(grids[0]) for schedule in schedules):
        got = [len(schedule.order) for schedule in schedules]
        raise _check.bad(where, "init", f"schedules of {len(grids[0]) - 1} steps, as the grid", got)
    times = None if pool is None else np.asarray(pool, np.float64)

    def breed(a: Any, b: Any) -> Any:
        schedule = _breed_schedules(plan, a[0], b[0])
        if times is None:
            return schedule, (a, b)[plan.rng.integers(2)][1]
        return schedule, _breed_grids(plan, a[1], b[1], times)

    score = lambda candidate: objective(Scheduled(schedule=candidate[0]), candidate[1])  # noqa: E731
    return _evolve(plan, score, list(zip(schedules, grids, strict=True)), breed)


class Distance(eqx.Module):
    """Root mean square distance of a solver's samples from known ends of the same noises.

    Attributes:
        denoiser: the model.
        init: starting states, (num, *dims).
        target: where they should end, (num, *dims).
        cond: conditions, every leaf with leading axis `num`.
    """

    denoiser: AbstractDenoiser
    init: Float[Array, "num *dims"]
    target: Float[Array, "num *dims"]
    cond: Cond = None

    def __call__(self, solver: AbstractGridSolver, ts: Any) -> float:
        """Return the distance; infinite where a sample failed."""
        num, *dims = self.init.shape
        options = dict(num=num, cond=self.cond, init=self.init, dtype=self.init.dtype)
        run = sample(None, self.denoiser, tuple(dims), solver=solver, ts=ts, **options)  # type: ignore[arg-type]
        value = float(jnp.sqrt(jnp.mean((run.x - self.target) ** 2)))
        return value if np.isfinite(value) else np.inf


def distance(
    key: PRNGKeyArray,
    denoiser: AbstractDenoiser,
    shape: tuple[int, ...],
    *,
    num: int,
    solver: Any,
    ts: Any,
    cond: Cond = None,
) -> Distance:
    """Return the objective that compares with a fine solve on a batch of noises.

    Cost: that of the fine solve, once; of `num` samples for every candidate.

    Args:
        key: names the noises, those of `sample`.
        denoiser: the model.
        shape: shape of one sample, `(*dims,)`.
        num: number of samples.
        solver: deterministic solver of the fine solve.
        ts: its grid, with the ends of the candidates.
        cond: conditions, every leaf with leading axis `num`.

    Raises:
        ValueError: as `sample`.
        RuntimeError: if a fine solve failed.
    """
    run = sample(key, denoiser, shape, num=num, solver=solver, ts=ts, cond=cond, trajectory=True)
    path = check(run).aux["trajectory"]
    return Distance(denoiser, path[:, 0], run.x, cond)
