r"""Sampling in phase space: `draw` one sample, `sample` many.

As in `jaxdiff.sampling`, sample $i$ is a function of `(key, i)` only: its start comes from stream 0
of `fold_in(key, i)`, and the noise of stage j of step k from `fold_in(fold_in(stream 1, k), j)`.
"""

import functools
from collections.abc import Sequence
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, Real

from jaxdiff import _check, grids
from jaxdiff._array import Cond, time_dtype
from jaxdiff._host import host64, is_concrete
from jaxdiff._keys import INIT, SOLVER, stream
from jaxdiff.batching import many
from jaxdiff.phase.denoiser import AbstractDenoiser, Head
from jaxdiff.phase.process import apply
from jaxdiff.phase.solvers import AbstractPhaseSolver, Stage
from jaxdiff.sampling import Samples


class _Plan(eqx.Module):
    """What all samples share: every coefficient, in the dtype of times."""

    ts: Any
    stages: tuple[Stage, ...]  # leaves have a leading axis of steps
    start: Any  # root of the covariance at ts[0]
    last: Stage  # the denoising step
    shape: jax.ShapeDtypeStruct = eqx.field(static=True)
    memory: int = eqx.field(static=True)
    denoise: bool = eqx.field(static=True)
    trajectory: bool = eqx.field(static=True)


def _plan(
    where: str, key: Any, denoiser: Any, rest: tuple[Any, ...], num: tuple[int, ...] = ()
) -> tuple[_Plan, Any, Any]:
    """Check the arguments of `draw` and `sample`, and compute what all samples share."""
    shape, dtype, solver, ts, init, denoise, trajectory = rest
    if not isinstance(denoiser, AbstractDenoiser):
        raise _check.bad(where, "denoiser", "one of jaxdiff.phase", repr(denoiser))
    if not isinstance(solver, AbstractPhaseSolver):
        raise _check.bad(where, "solver", "one of jaxdiff.phase, as Rotation()", repr(solver))
    shape, dtype = _check.dims(where, "shape", shape), _check.floating_dtype(where, dtype)
    head, wide, name = denoiser.head, time_dtype(dtype), type(solver).__name__
    ts = grids.check(head.process.times, ts, where=where, dtype=wide)
    if solver.stable_only and is_concrete(head.process):
        rates = np.linalg.eigvals(np.asarray(head.process.A)).real
        if not np.all(rates < 0):
            expected = f"stable for {name}, its eigenvalues having real parts < 0"
            raise _check.bad(where, "the drift A of the process", expected, rates.tolist())
    stages = solver.tabulate(head, ts)
    leaves = jax.tree.leaves(stages)
    if is_concrete(leaves) and not all(np.all(np.isfinite(leaf)) for leaf in leaves):
        expected = f"a grid on which {name} has finite coefficients"
        raise _check.bad(where, "ts", expected, ts)
    if init is not None and jnp.shape(init) != (*num, 2, *shape):
        expected = f"position and momentum, of shape {(*num, 2, *shape)}"
        raise _check.bad(where, "init", expected, f"shape {jnp.shape(init)}")
    noisy = any(stage.noise is not None for stage in stages)
    key = _check.needed_key(where, key, needed=init is None or noisy)
    start, last = host64(_ends, head, ts)
    ts, stages, start, last = (
        jax.tree.map(lambda a: a.astype(wide), part) for part in (ts, stages, start, last)
    )
    struct = jax.ShapeDtypeStruct((2, *shape), dtype)
    plan = _Plan(ts, stages, start, last, struct, solver.memory, denoise, trajectory)
    return plan, key, init


def _ends(head: Head, ts: Array) -> tuple[Array, Stage]:
    state, weight = head.to_clean(ts[-1])
    return head.process.root(ts[0]), Stage(state, (weight,), ts[-1])


def _advance(
    denoiser: AbstractDenoiser,
    stages: tuple[Stage, ...],
    z: Array,
    outputs: tuple[Array, ...],
    key: PRNGKeyArray | None,
    cond: Cond,
) -> tuple[Array, tuple[Array, ...]]:
    """Make one step; return the next state and all predictions, newest first."""
    y = z
    for j, stage in enumerate(stages):
        if stage.t is not None:
            outputs = (denoiser.raw(stage.t, z, cond), *outputs)
        terms = [apply(stage.state, z)]
        terms += [] if stage.base is None else [apply(stage.base, y)]
        terms += [apply(w, o) for w, o in zip(stage.weights, outputs, strict=False)]
        if stage.noise is not None:
            assert key is not None
            noise = jax.random.normal(jax.random.fold_in(key, j), z.shape, z.dtype)
            terms.append(apply(stage.noise, noise))
        z = functools.reduce(jnp.add, terms).astype(z.dtype)
        if stage.t is None:
            y = z
    return z, outputs


def _draw(denoiser: AbstractDenoiser, plan: _Plan, key: Any, cond: Cond, init: Any) -> Samples:
    plan, shape = jax.tree.map(jnp.asarray, plan), plan.shape
    if init is None:
        normal = jax.random.normal(stream(key, INIT), shape.shape, shape.dtype)
        init = apply(plan.start, normal)
    z = first = jnp.asarray(init).astype(shape.dtype)
    noise = None if key is None else stream(key, SOLVER)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # a gradient keeps states, not networks
    def body(carry: Any, step: Any) -> Any:
        z, outputs = carry
        stages, k = step
        own = None if noise is None else jax.random.fold_in(noise, k)
        z, outputs = _advance(denoiser, stages, z, outputs, own, cond)
        return (z, outputs[: plan.memory]), z if plan.trajectory else None

    n = plan.ts.shape[0] - 1
    history = (jnp.zeros_like(z),) * plan.memory
    (z, _), zs = jax.lax.scan(body, (z, history), (plan.stages, jnp.arange(n)))
    nfe = n * sum(stage.t is not None for stage in plan.stages) + plan.denoise
    if plan.denoise:
        z, _ = _advance(denoiser, (plan.last,), z, (), None, cond)
    finite, failed = jnp.all(jnp.isfinite(z)), dfx.RESULTS.nonfinite
    result: Any = dfx.RESULTS.where(finite, dfx.RESULTS.successful, failed)  # type: ignore
    z = jnp.where(finite, z, jnp.nan)
    aux = {"momentum": z[1]}
    if plan.trajectory:
        last = [z[None]] if plan.denoise else []
        ts = jnp.append(plan.ts, plan.ts[-1]) if plan.denoise else plan.ts
        aux |= {"trajectory": jnp.concatenate([first[None], zs, *last]), "ts": ts}
    return Samples(z[0], result, jnp.asarray(nfe), aux)


_draw_jit = eqx.filter_jit(_draw)


def draw(
    key: PRNGKeyArray | None,
    denoiser: AbstractDenoiser,
    shape: tuple[int, ...],
    *,
    solver: AbstractPhaseSolver,
    ts: Real[ArrayLike, " nodes"] | Sequence[Any],
    cond: Cond = None,
    init: Float[Any, "2 *dims"] | None = None,
    denoise: bool = False,
    trajectory: bool = False,
    dtype: Any = None,
) -> Samples:
    r"""Draw one sample by integrating from `ts[0]` (noise) to `ts[-1]` (data).

    $$ z_{t_0} \sim N(0, \Sigma(t_0)), \qquad z_{t_{i+1}} = \mathrm{solver}(z_{t_i}) $$

    Cost: as many network evaluations as `nfe` says; no autodiff.

    Args:
        key: a threefry key from `jax.random.key`; None if nothing random is left to draw.
        denoiser: what to sample from.
        shape: shape of the position, `(*dims,)`.
        solver: an instance, as `Rotation()`, which decides between ODE and SDE.
        ts: strictly decreasing times inside the process, (nodes,); see `LinearSDE.grid`.
        cond: condition passed to the network.
        init: $z_{t_0}$, (2, *dims), instead of a draw from the prior.
        denoise: finish with one more evaluation, $z = E[z_0 | z_{t_N}]$. It needs both halves of
            a prediction of noise, which is not what CLD trains.
        trajectory: also return the states at all nodes, in `aux`.
        dtype: dtype of the sample; the default float.

    Returns:
        `Samples` with the position in `x: (*dims,)` and the momentum in `aux["momentum"]`;
        `aux["trajectory"]`, (nodes, 2, *dims), and `aux["ts"]` if asked for. Nothing raises inside
        jit: a failed solve gives NaN and a `result`, which `jaxdiff.check` turns into an error.

    Raises:
        ValueError: before any computation, if an argument is wrong.

    Example:
        >>> import jaxdiff as jd
        >>> from jaxdiff import phase
        >>> cld = phase.CLD()
        >>> unit = phase.Lifted(cld, jd.exact.gaussian(jd.process.EDM(), jnp.zeros(2), 1.0))
        >>> one = draw(jax.random.key(0), unit, (2,), solver=phase.Rotation(), ts=cld.grid(5))
        >>> one.x.shape, one.aux["momentum"].shape, int(one.nfe)
        ((2,), (2,), 10)
    """
    rest = (shape, dtype, solver, ts, init, denoise, trajectory)
    plan, key, init = _plan("draw", key, denoiser, rest)
    return _draw_jit(denoiser, plan, key, cond, init)


def sample(
    key: PRNGKeyArray | None,
    denoiser: AbstractDenoiser,
    shape: tuple[int, ...],
    *,
    num: int,
    solver: AbstractPhaseSolver,
    ts: Real[ArrayLike, " nodes"] | Sequence[Any],
    cond: Cond = None,
    init: Float[Any, "num 2 *dims"] | None = None,
    start: Any = 0,
    chunk: int | None = None,
    progress: bool = False,
    denoise: bool = False,
    trajectory: bool = False,
    dtype: Any = None,
) -> Samples:
    """Draw the samples `start, ..., start + num - 1` of the sequence that `key` names.

    Sample i is `draw(fold_in(key, i), ...)`. Arguments are those of `draw`, with a leading axis
    `num` of `init` and of every leaf of `cond`; `num`, `start`, `chunk` and `progress` are those of
    `jaxdiff.sample`. So are the errors. The result has `x: (num, *dims)`.
    """
    _check.whole("sample", "num", num, 1)
    rest = (shape, dtype, solver, ts, init, denoise, trajectory)
    plan, key, init = _plan("sample", key, denoiser, rest, (num,))
    _check.rows("sample", "cond", cond, num)
    one, rows = eqx.Partial(_draw, denoiser, plan), dict(num=num, start=start, chunk=chunk)
    return many("sample", one, key, cond, init, **rows, progress=progress)  # type: ignore
