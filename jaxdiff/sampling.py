r"""Sampling: `draw` one sample, `sample` many, `check` the result.

Sample $i$ is a function of `(key, i)` only: its starting noise comes from stream 0 of
`fold_in(key, i)` and its solver noise from stream 1, step by step. Neither the number of samples,
nor the size of a chunk, nor the devices enter.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray, PyTree, Real

from jaxdiff import _check
from jaxdiff._array import Cond
from jaxdiff._host import is_concrete
from jaxdiff._keys import INIT, SOLVER, stream
from jaxdiff.batching import many
from jaxdiff.score import AbstractDenoiser
from jaxdiff.solvers.plan import Engine, Options, Plan, evaluations, plan_solve
from jaxdiff.solvers.reversible import AbstractReversible, Inverted, kind
from jaxdiff.solvers.terms import (
    AdditiveNoise,
    Clock,
    ClockName,
    GridBrownian,
    pf_ode,
    reverse_sde,
    view,
)
from jaxdiff.solvers.travel import ReversibleAdjoint, travel


class Samples(eqx.Module):
    """The result of `draw` (no leading axis) or `sample` (leading axis n).

    Attributes:
        x: samples, (n, *dims); NaN where the solve failed.
        result: a `diffrax.RESULTS` per sample.
        nfe: denoiser evaluations per sample, (n,); -1 where the solver does not tell.
        aux: `"trajectory"` (n, nodes, *dims) and `"ts"` (n, nodes) if they were asked for; and
            `"pair"` (n, 2, *dims) of a reversible solver, from which `invert` goes back.
    """

    x: Float[Array, "..."]
    result: dfx.RESULTS
    nfe: Int[Array, "..."]
    aux: dict[str, Array]


def _terms(denoiser: AbstractDenoiser, plan: Plan, path: Any, cond: Cond) -> Any:
    if not plan.stochastic:
        return pf_ode(denoiser, plan.clock, cond)
    if plan.clock == "u":
        return reverse_sde(denoiser, path, cond)
    return dfx.MultiTerm(pf_ode(denoiser, plan.clock, cond), AdditiveNoise(path))


def _begin(plan: Plan, terms: Any, y0: Array, pair: Any) -> Any:
    """Return the solver's first state; with a pair, one that goes on from it."""
    state: Any = plan.solver.init(terms, plan.nodes[0], plan.nodes[1], y0, None)
    return state if pair is None else state._replace(extra=pair)


def _travel(plan: Plan, terms: Any, y0: Array, pair: Any) -> tuple[Array, Array, Any, Any, Any]:
    """Run a reversible solver as `_scan` does, with a derivative that keeps no states."""
    at, ts = view(terms, plan.nodes[0], plan.nodes[1]), jnp.asarray(plan.nodes)
    y, pair = travel(plan.solver, at.field.denoiser, at.field.cond, ts, y0, pair)
    return y, y0[None], dfx.RESULTS.successful, jnp.asarray(len(ts) - 1), pair


def _scan(plan: Plan, terms: Any, y0: Array, pair: Any) -> tuple[Array, Array, Any, Any, Any]:
    solver, nodes = plan.solver, plan.nodes
    state = _begin(plan, terms, y0, pair)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # a gradient keeps states, not networks
    def body(carry: tuple[Array, Any], times: tuple[Array, Array]) -> tuple[Any, Array | None]:
        y, state = carry
        y, _, _, state, _ = solver.step(terms, *times, y, None, state, False)
        return (y, state), y if plan.trajectory else None

    (y, state), ys = jax.lax.scan(body, (y0, state), (nodes[:-1], nodes[1:]))
    path = jnp.concatenate([y0[None], ys]) if plan.trajectory else y0[None]
    pair = state.extra if isinstance(solver, AbstractReversible) else None
    return y, path, dfx.RESULTS.successful, jnp.asarray(len(nodes) - 1), pair


def _diffeqsolve(
    plan: Plan, terms: Any, y0: Array, pair: Any
) -> tuple[Array, Array, Any, Any, Any]:
    nodes = jnp.asarray(plan.nodes)
    n = nodes.shape[0] - 1
    if plan.controller is None:
        controller, max_steps = dfx.StepTo(nodes), n
        # one checkpoint per step: diffrax's logarithmic default was measured 2-8x slower
        adjoint = dfx.RecursiveCheckpointAdjoint(checkpoints=n)
        trajectory: dict[str, Any] = dict(t0=True, steps=True)
    else:
        controller, max_steps = plan.controller, plan.max_steps
        adjoint = dfx.RecursiveCheckpointAdjoint()
        trajectory = dict(ts=nodes)
    paired = isinstance(plan.solver, AbstractReversible)
    saved: Any = trajectory if plan.trajectory else dict(t1=True)
    solution = dfx.diffeqsolve(
        terms,
        plan.solver,
        nodes[0],
        nodes[-1],
        None,
        y0,
        saveat=dfx.SaveAt(**saved, solver_state=paired),
        stepsize_controller=controller,
        adjoint=adjoint if plan.adjoint is None else plan.adjoint,
        max_steps=max_steps,
        solver_state=_begin(plan, terms, y0, pair) if paired else None,
        throw=False,
    )
    ys: Any = solution.ys
    state: Any = solution.solver_state
    pair = state.extra if paired else None
    return ys[-1], ys, solution.result, solution.stats["num_steps"], pair


def _draw(
    key: Any,
    denoiser: AbstractDenoiser,
    shape: jax.ShapeDtypeStruct,
    plan: Plan,
    cond: Cond,
    init: Array | Inverted | None,
    noise: dfx.AbstractBrownianPath | None,
) -> Samples:
    pair = None
    if isinstance(init, Inverted):
        pair, plan = (init.pair[0], init.pair[1]), plan.after(init.step)
    process, ts, nodes = denoiser.process, jnp.asarray(plan.ts), jnp.asarray(plan.nodes)
    if pair is not None:
        assert isinstance(plan.solver, AbstractReversible)  # by _init
        x = plan.solver.show(pair[0], plan.solver.rows.c0[0]).astype(shape.dtype)
    elif init is None:
        x = process.prior(stream(key, INIT), shape.shape, t=ts[0], dtype=shape.dtype)
    else:
        x = jnp.asarray(init, shape.dtype)
    path = noise
    if plan.stochastic and noise is None:
        path = GridBrownian(key=stream(key, SOLVER), nodes=nodes, shape=shape)
    trajectory = (x * plan.scales[0])[None]
    result, steps = dfx.RESULTS.successful, jnp.asarray(0)
    if ts.shape[0] > 1:
        terms = _terms(denoiser, plan, path, cond)
        solve = _scan if plan.engine == "scan" else _diffeqsolve
        solve = _travel if isinstance(plan.adjoint, ReversibleAdjoint) else solve
        y0 = (x * plan.scales[0]).astype(x.dtype)
        y, trajectory, result, steps, pair = solve(plan, terms, y0, pair)
        x = (y / plan.scales[1]).astype(x.dtype)
    nfe = jnp.asarray(evaluations(plan.solver, steps))
    if plan.denoise:
        m = denoiser(ts[-1], x, cond)
        x = (plan.last[0] * m).astype(x.dtype)
        nfe = jnp.where(nfe < 0, nfe, nfe + 1)
    bad = (result == dfx.RESULTS.successful) & ~jnp.all(jnp.isfinite(x))
    nonfinite: Any = dfx.RESULTS.nonfinite
    result = dfx.RESULTS.where(bad, nonfinite, result)
    aux = {} if pair is None else {"pair": jnp.stack(pair)}
    if plan.trajectory:
        scales = jax.vmap(lambda t: jnp.asarray(Clock(process, plan.clock).scale(t)))(ts)
        trajectory = jax.vmap(jnp.divide)(trajectory, scales).astype(x.dtype)
        if plan.denoise:
            trajectory = jnp.concatenate([trajectory, x[None]])
            ts = jnp.append(ts, plan.last[1])
        aux |= {"trajectory": trajectory, "ts": ts}
    x = jnp.where(result == dfx.RESULTS.successful, x, jnp.nan)
    return Samples(x, result, nfe, aux)


_draw_jit = eqx.filter_jit(_draw)


def _draw_one(
    denoiser: AbstractDenoiser,
    shape: jax.ShapeDtypeStruct,
    plan: Plan,
    key: PRNGKeyArray | None,
    cond: Cond,
    init: Array | Inverted | None,
) -> Samples:
    return _draw(key, denoiser, shape, plan, cond, init, None)


def draw(
    key: PRNGKeyArray | None,
    denoiser: AbstractDenoiser,
    shape: tuple[int, ...],
    *,
    solver: dfx.AbstractSolver,
    ts: Real[ArrayLike, " nodes"] | Sequence[Any],
    cond: Cond = None,
    init: Float[Any, "*dims"] | Inverted | None = None,
    noise: dfx.AbstractBrownianPath | None = None,
    denoise: bool = False,
    trajectory: bool = False,
    engine: Engine | None = None,
    equation: Literal["ode", "sde"] | None = None,
    clock: ClockName | None = None,
    controller: dfx.AbstractStepSizeController | None = None,
    adjoint: dfx.AbstractAdjoint | None = None,
    max_steps: int = 4096,
    dtype: Any = None,
) -> Samples:
    r"""Draw one sample by integrating from `ts[0]` (noise) to `ts[-1]` (data).

    $$ x_{t_0} \sim N(0, \sigma(t_0)^2 I), \qquad x_{t_{i+1}} = \mathrm{solver}(x_{t_i}) $$

    A solver of jaxdiff decides between the PF-ODE and the reverse SDE by itself and runs in a plain
    scan. A solver of diffrax runs in `diffrax.diffeqsolve`: on the PF-ODE, unless it is a
    stochastic Runge-Kutta method or `equation="sde"`. If sigma vanishes at `ts[-1]`, the last step
    is its exact limit $x = \alpha\,m$, for every solver.

    Cost: as many network evaluations as `nfe` says; no autodiff. Memory does not grow with the
    number of steps unless `trajectory` or a gradient is asked for.

    Args:
        key: a threefry key from `jax.random.key`; None if nothing random is left to draw.
        denoiser: what to sample from.
        shape: shape of the sample, `(*dims,)`.
        solver: an instance, `jaxdiff.solvers.DDIM()` or `diffrax.Tsit5()`.
        ts: strictly decreasing times inside the process, (nodes,); see `process.grid`. A traced
            grid must not end at sigma = 0 for a solver of diffrax: no clock reaches it.
        cond: condition passed to the network.
        init: $x_{t_0}$, (*dims,), instead of a draw from the prior; or the result of `invert`,
            with its solver and `ts`, to run the steps that it took back.
        noise: a Brownian path in clock `"u"`, of the shape of the sample, instead of one keyed by
            the grid; under a controller, a `diffrax.VirtualBrownianTree`.
        denoise: finish with one more evaluation, $x = m(t_N, x)$: a step to sigma = 0.
        trajectory: also return the states at all nodes, in `aux`.
        engine: `"scan"` or `"diffrax"`, for solvers of jaxdiff; the results are equal.
        equation: `"ode"` or `"sde"`, for solvers of diffrax.
        clock: clock of the PF-ODE for solvers of diffrax: `"r"` on a fixed grid, `"lam"` under a
            controller, by default.
        controller: a diffrax step-size controller, for solvers of diffrax; `ts` then gives the
            two ends and the times of `trajectory`.
        adjoint: a diffrax adjoint, for the diffrax engine; its default has no forward mode, for
            which pass `diffrax.ForwardMode()` or `diffrax.DirectAdjoint()`. For a reversible
            solver in the scan engine, `solvers.ReversibleAdjoint()`.
        max_steps: bound on the steps under a controller.
        dtype: dtype of the sample; the default float.

    Returns:
        `Samples` with `x: (*dims,)`. Nothing raises inside jit: a failed solve gives NaN and a
        `result`, which `check` turns into an error.

    Raises:
        ValueError: before any computation, if an argument is wrong: `ts` is not a grid of the
            process, a shape does not fit, `key` is missing or not threefry, or a solver cannot
            start at `ts[0]`.

    Example:
        >>> import jaxdiff as jd
        >>> vp = jd.process.VP()
        >>> unit = jd.exact.gaussian(vp, jnp.zeros(2), 1.0)
        >>> one = draw(jax.random.key(0), unit, (2,), solver=jd.solvers.DDIM(), ts=vp.grid(5))
        >>> one.x.shape, int(one.nfe)
        ((2,), 5)
    """
    shape, dtype = _check.dims("draw", "shape", shape), _check.floating_dtype("draw", dtype)
    options = Options(denoise, trajectory, engine, equation, clock, controller, adjoint, max_steps)
    plan = plan_solve("draw", denoiser, solver, ts, dtype, options, own_noise=noise is not None)
    if noise is not None and not isinstance(noise, dfx.AbstractBrownianPath):
        raise _check.bad("draw", "noise", "a diffrax Brownian path", type(noise).__name__)
    init = _init("draw", init, shape, plan)
    key = _check.needed_key("draw", key, needed=init is None or (plan.stochastic and noise is None))
    return _draw_jit(key, denoiser, jax.ShapeDtypeStruct(shape, dtype), plan, cond, init, noise)


def _init(where: str, init: Any, shape: tuple[int, ...], plan: Plan, lead: int = 0) -> Any:
    if init is None:
        return None
    if isinstance(init, Inverted):
        solver: Any = plan.solver
        if not isinstance(solver, AbstractReversible) or kind(solver) != init.method:
            expected = "the one that `init` was inverted by, with the same options"
            raise _check.bad(where, "solver", expected, repr(solver))
        if len(plan.ts) - 1 != init.step + init.steps:
            expected = f"the {init.step + init.steps + 1} nodes that `init` was inverted along"
            raise _check.bad(where, "ts", expected, f"{len(plan.ts)} with sigma > 0")
        expected = (*shape[:lead], 2, *shape[lead:])
        if init.pair.shape != expected:
            raise _check.bad(where, "init.pair", f"of shape {expected}", f"{init.pair.shape}")
        return init
    try:
        init = jnp.asarray(init)
    except (TypeError, ValueError):
        raise _check.bad(where, "init", f"an array of shape {shape}", repr(init)) from None
    if init.shape != shape:
        raise _check.bad(where, "init", f"of shape {shape}", f"shape {init.shape}")
    return init


def sample(
    key: PRNGKeyArray | None,
    denoiser: AbstractDenoiser,
    shape: tuple[int, ...],
    *,
    num: int,
    solver: dfx.AbstractSolver,
    ts: Real[ArrayLike, " nodes"] | Sequence[Any],
    cond: Cond = None,
    init: Float[Any, "num *dims"] | Inverted | None = None,
    start: Any = 0,
    chunk: int | None = None,
    progress: bool = False,
    denoise: bool = False,
    trajectory: bool = False,
    engine: Engine | None = None,
    equation: Literal["ode", "sde"] | None = None,
    clock: ClockName | None = None,
    controller: dfx.AbstractStepSizeController | None = None,
    adjoint: dfx.AbstractAdjoint | None = None,
    max_steps: int = 4096,
    dtype: Any = None,
) -> Samples:
    r"""Draw the samples `start, ..., start + num - 1` of the sequence that `key` names.

    Sample $i$ is `draw(fold_in(key, i), ...)`: its noise does not depend on `num`, `start` or
    `chunk`. All samples of a chunk run in one vectorised program, whose width is `chunk` even
    where fewer samples are left. So with one `chunk` sample $i$ is bitwise the same for every
    `num` and `start`; between widths, a backend may pick another kernel and round differently.

    Args:
        key: a threefry key; None if nothing random is left to draw.
        denoiser: what to sample from.
        shape: shape of one sample, `(*dims,)`.
        num: how many samples.
        solver: as in `draw`.
        ts: as in `draw`.
        cond: conditions, every leaf with leading axis `num`.
        init: starting states, (num, *dims), instead of draws from the prior; or the result of a
            vectorised `invert`.
        start: index of the first sample, 0 or more; may be traced.
        chunk: samples per vectorised program, to bound memory; all of them by default.
        progress: show a bar over the chunks (needs tqdm, and no tracing around this call).
        denoise: as in `draw`.
        trajectory: as in `draw`.
        engine: as in `draw`.
        equation: as in `draw`.
        clock: as in `draw`.
        controller: as in `draw`.
        adjoint: as in `draw`.
        max_steps: as in `draw`.
        dtype: as in `draw`.

    Returns:
        `Samples` with `x: (num, *dims)`.

    Raises:
        ValueError: as `draw`, and if `num` or `chunk` is not positive or a leaf of `cond` has
            another leading axis than `num`.

    Example:
        >>> import jaxdiff as jd
        >>> vp = jd.process.VP()
        >>> unit = jd.exact.gaussian(vp, jnp.zeros(2), 1.0)
        >>> many = sample(jax.random.key(0), unit, (2,), num=3, solver=jd.solvers.DDIM(),
        ...               ts=vp.grid(5))
        >>> many.x.shape
        (3, 2)
    """
    options = Options(denoise, trajectory, engine, equation, clock, controller, adjoint, max_steps)
    one, key, each = plan_samples(
        "sample", key, denoiser, shape, num, solver, ts, cond, init, dtype, options
    )
    return many("sample", one, key, *each, num=num, start=start, chunk=chunk, progress=progress)


def plan_samples(
    where: str,
    key: Any,
    denoiser: Any,
    shape: Any,
    num: Any,
    solver: Any,
    ts: Any,
    cond: Cond,
    init: Any,
    dtype: Any,
    options: Options,
) -> tuple[Callable[..., Samples], PRNGKeyArray | None, tuple[Any, Any]]:
    """Check the arguments of `sample` and compute what samples share, before any is traced.

    Returns:
        What draws one sample, the key, and what each sample has of its own.
    """
    shape, dtype = _check.dims(where, "shape", shape), _check.floating_dtype(where, dtype)
    _check.whole(where, "num", num, 1)
    plan = plan_solve(where, denoiser, solver, ts, dtype, options)
    init = _init(where, init, (num, *shape), plan, lead=1)
    key = _check.needed_key(where, key, needed=init is None or plan.stochastic)
    _check.rows(where, "cond", cond, num)
    one = eqx.Partial(_draw_one, denoiser, jax.ShapeDtypeStruct(shape, dtype), plan)
    return one, key, (cond, init)


def check(samples: PyTree) -> Any:
    """Return `samples`, or raise on the host if any of them failed.

    Args:
        samples: a result of `draw`, `sample` or `log_prob`, or any other with a field `result`.

    Raises:
        RuntimeError: naming how many samples failed, which, and why.
        ValueError: if `samples` is no result, or is being traced.
    """
    known = isinstance(getattr(samples, "result", None), dfx.RESULTS)
    if not known or not is_concrete(samples):
        got = "a traced one; call it outside jit" if known else samples
        raise _check.bad("check", "samples", "a result of draw, sample or log_prob", got)
    codes = np.ravel(jax.tree.leaves(samples.result)[0])
    failed = np.ravel(samples.result != dfx.RESULTS.successful)
    if not failed.any():
        return samples
    reasons = []
    for code in np.unique(codes[failed]):
        i = int(np.argmax(codes == code))
        item = jax.tree.map(lambda a, i=i: np.asarray(np.ravel(a)[i]), samples.result)
        reasons.append(f"{dfx.RESULTS[item].strip()} ({int((codes == code).sum())} samples)")
    raise RuntimeError(
        f"check: {failed.sum()} of {failed.size} samples failed, first at index "
        f"{np.flatnonzero(failed)[0]}: " + "; ".join(reasons)
    )
