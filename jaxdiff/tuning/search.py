r"""Search among solvers and grids: what every step does, and where it stops, by evolution.

The candidates are grids, and schedules of `jaxdiff.solvers.Scheduled`, which one program runs all:

$$ \text{population} \leftarrow \text{best few} \cup \text{children of them}, \qquad
   \text{child} = \text{mutation of a crossing of two}. $$
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, Real

from jaxdiff import _check
from jaxdiff._array import Cond, ScalarLike
from jaxdiff._many import sample
from jaxdiff._sampler import check, sampler
from jaxdiff.score import AbstractDenoiser
from jaxdiff.solvers.engine import AbstractGridSolver
from jaxdiff.solvers.scheduled import _MOST, Schedule, Scheduled

__all__ = ["Distance", "Found", "distance", "search_grid", "search_schedule"]


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
        dtype = self.init.dtype
        solve = sampler(self.denoiser, tuple(dims), solver=solver, ts=ts, dtype=dtype)
        run = sample(None, solve, num=num, cond=self.cond, init=self.init)
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
    solve = sampler(denoiser, shape, solver=solver, ts=ts, trajectory=True)
    run = sample(key, solve, num=num, cond=cond)
    path = check(run).aux["trajectory"]
    return Distance(denoiser, path[:, 0], run.x, cond)
