r"""Exact inversion: from a sample to its noise and back again, and what can be done on the way.

A reversible solver steps pairs of states. `invert` runs the steps of its grid backwards and returns
the pair at the noise end; `draw(None, ..., init=inverted)` runs them forwards again, and arrives
where `invert` started, up to the rounding of the additions (and with `bits`, bit for bit). With
another condition on the way back, it arrives somewhere else that has the structure of the sample:
`edit`.

Why two states: the noise alone, with a fresh start by DDIM, leads back only as well as DDIM does.
And the noise of a *given* sample is inexact, since its pair begins with a guess: exact is the round
trip, not the likeness to the PF-ODE.
"""

from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

from jaxdiff import _check
from jaxdiff._array import Cond, ScalarLike
from jaxdiff._host import is_concrete
from jaxdiff.sampling import Samples, draw
from jaxdiff.score import AbstractDenoiser, floating
from jaxdiff.solvers.plan import Options, Plan, plan_solve
from jaxdiff.solvers.reversible import AbstractReversible, Inverted, kind
from jaxdiff.solvers.travel import arrive, travel_back


def invert_as_planned(
    denoiser: AbstractDenoiser, plan: Plan, step: int, x: Array, pair: Any, cond: Cond
) -> Inverted:
    """Run the steps of a plan backwards, down to the one with number `step`."""
    solver: Any = plan.solver
    ts, nfe = jnp.asarray(plan.ts), solver.cost(len(plan.ts) - 1 - step)
    if pair is None:
        pair, nfe = arrive(solver, denoiser, cond, ts, x), nfe + solver.arrival
    else:
        pair = pair[0], pair[1]
    pair = travel_back(solver, denoiser, cond, ts, pair, step)
    noise = solver.show(pair[solver.lag], jnp.asarray(solver.rows.c0)[step - solver.lag])
    pair = jnp.stack(pair)
    good = jnp.all(jnp.isfinite(solver.load(pair, x.dtype))) & jnp.all(jnp.isfinite(noise))
    done, nonfinite = dfx.RESULTS.successful, dfx.RESULTS.nonfinite
    result = dfx.RESULTS.where(good, done, nonfinite)  # type: ignore[arg-type]
    noise = jnp.where(good, noise, jnp.nan).astype(x.dtype)
    left = len(plan.ts) - 1 - step
    return Inverted(noise, pair, result, jnp.asarray(nfe), step, left, kind(solver))


_invert_jit = eqx.filter_jit(invert_as_planned)


def invert(
    denoiser: AbstractDenoiser,
    x: Float[ArrayLike, "*dims"] | Samples,
    *,
    solver: AbstractReversible,
    ts: Real[ArrayLike, " nodes"],
    cond: Cond = None,
    freeze: float | int = 0.0,
) -> Inverted:
    r"""Run the steps of a reversible solver backwards, from data to noise.

    The way back is `draw(None, denoiser, shape, solver=solver, ts=ts, init=inverted)`, with the
    same conditions, and it ends at `x` exactly: up to rounding, which grows as the module
    `solvers.reversible` says. Of a sample that `draw` returned, the round trip the other way is
    exact too: give the `Samples` and not only `x`, for they hold the pair.

    One sample; pure; many by `jax.vmap(lambda x: invert(...))`, whose result `sample` takes as
    `init`. Cost: the network evaluations of the same steps forwards, and one more for the pair of
    a given `x`; no autodiff.

    Args:
        denoiser: what `x` is, or might have been, a sample of.
        x: a sample at `ts[-1]`, (*dims,), or the result of `draw` with the same solver and grid.
        solver: a reversible solver: `SymmetricLeapfrog()`, `BELM()`, ...
        ts: strictly decreasing times, noise to data, as for `draw`; sigma is positive at the last.
        cond: condition passed to the denoiser.
        freeze: share of the steps, the noisiest, to leave out, in [0, 1): stop before them.

    Returns:
        `Inverted`, of which `x` is the state at the noise end. Nothing raises inside jit: a failed
        inversion gives NaN and a `result`, which `check` turns into an error.

    Raises:
        ValueError: if an argument is wrong: the solver has no inverse, `ts` ends at sigma = 0
            (that step is $x = \alpha m$, which keeps nothing of the state) or has an end without
            units, `freeze` leaves less than a step each way, `x` is a result without a pair.

    Example:
        >>> import jaxdiff as jd
        >>> vp = jd.process.VP()
        >>> two = jd.exact.mixture(vp, [0.5, 0.5], [[-1.0], [1.0]], 0.01)
        >>> trip = dict(solver=jd.solvers.SymmetricLeapfrog(), ts=vp.grid(50, "logsnr"))
        >>> noise = invert(two, jnp.array([1.1]), **trip)
        >>> again = jd.draw(None, two, (1,), init=noise, **trip)
        >>> bool(abs(again.x[0] - 1.1) < 1e-5)
        True

    References:
        Wang et al. 2024 (2410.07273), algorithm 1; Wallace et al. 2022 (2211.12446).
    """
    x, pair = sample_and_pair("invert", x)
    plan, step = plan_invert("invert", denoiser, x, pair, solver, ts, freeze)
    return _invert_jit(denoiser, plan, step, x, pair, cond)


def sample_and_pair(where: str, x: Any) -> tuple[Array, Array | None]:
    """Return a sample, and its pair of states where it is the result of a reversible solver."""
    if not isinstance(x, Samples):
        return floating(x), None
    if "pair" not in x.aux:
        expected = "an array, or a result of draw with a reversible solver"
        raise _check.bad(where, "x", expected, f"Samples with aux {sorted(x.aux)}")
    return floating(x.x), x.aux["pair"]


def plan_invert(
    where: str, denoiser: Any, x: Any, pair: Any, solver: Any, ts: Any, freeze: Any
) -> tuple[Plan, int]:
    """Check the arguments of `invert`; return the solve and the step to stop before."""
    if not isinstance(solver, AbstractReversible):
        expected = "a reversible one, as SymmetricLeapfrog()"
        raise _check.bad(where, "solver", expected, repr(solver))
    solver.check_reversible(where)
    _check.number(where, "freeze", freeze, 0, 1)
    if not is_concrete(freeze):
        raise _check.bad(where, "freeze", "known before tracing", freeze)
    options = Options(False, False, None, None, None, None, None, max_steps=1)
    plan = plan_solve(where, denoiser, solver, ts, x.dtype, options)
    if plan.denoise:
        expected = "a time with sigma > 0: the last step to sigma = 0 forgets the state"
        raise _check.bad(where, "ts[-1]", expected, f"t={plan.last[1]!r}")
    steps = len(plan.ts) - 1
    step = round(float(freeze) * steps) + solver.lag
    if step >= steps:
        expected = f"so small that more than {solver.lag} of the {steps} steps of ts are left"
        raise _check.bad(where, "freeze", expected, f"{freeze!r}")
    if pair is not None:
        expected = jax.eval_shape(solver.store, jax.ShapeDtypeStruct((2, *x.shape), x.dtype))
        if pair.shape != expected.shape or pair.dtype != expected.dtype:
            got = f"a pair of {pair.dtype}{list(pair.shape)}"
            raise _check.bad(where, "x", "one result of draw with the same solver", got)
    return plan, step


def edit(
    denoiser: AbstractDenoiser,
    x: Float[ArrayLike, "*dims"] | Samples,
    *,
    solver: AbstractReversible,
    ts: Real[ArrayLike, " nodes"],
    source: Cond,
    target: Cond,
    freeze: float | int = 0.2,
) -> Samples:
    r"""Change a sample as the change of its condition from `source` to `target` says.

    Inverts with the source and draws again with the target. `freeze` leaves out the noisiest steps:
    0 changes the most, nearly 1 nothing. With `target` equal to `source` the sample comes back.
    Guidance belongs into the denoiser, of the same strength for both.

    Args:
        denoiser: a denoiser with conditions.
        x: as in `invert`.
        solver: as in `invert`.
        ts: as in `invert`.
        source: what `x` is.
        target: what it shall be.
        freeze: as in `invert`.

    Returns:
        `Samples` with `x: (*dims,)`; `nfe` counts both ways.

    Raises:
        ValueError: as `invert`.

    References:
        Wang et al. 2024 (2410.07273), section 5.3, where 20% of the steps are left out.
    """
    noise = invert(denoiser, x, solver=solver, ts=ts, cond=source, freeze=freeze)
    shape, dtype = noise.x.shape, noise.x.dtype
    out = draw(None, denoiser, shape, solver=solver, ts=ts, cond=target, init=noise, dtype=dtype)
    return eqx.tree_at(lambda out: out.nfe, out, out.nfe + noise.nfe)


def interpolate(
    x: Float[ArrayLike, "*dims"], y: Float[ArrayLike, "*dims"], w: ScalarLike
) -> Float[Array, "*dims"]:
    r"""Interpolate between two noises on the great circle through them.

    $$ \frac{\sin((1-w)\theta)}{\sin\theta}\,x + \frac{\sin(w\theta)}{\sin\theta}\,y $$

    with $\theta$ the angle between them. A straight line would leave the shell near which Gaussian
    noise lies. Draw from each point with `init`; the solver then starts by DDIM.

    Args:
        x: noise at w = 0, (*dims,), not zero.
        y: noise at w = 1, (*dims,), not zero and not opposite to `x`.
        w: where, (); `jax.vmap` over it for a path.

    Example:
        >>> interpolate(jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]), 0.5).round(3).tolist()
        [0.7070000171661377, 0.7070000171661377]

    References:
        Song, Meng, Ermon 2021 (2010.02502), eq. 67.
    """
    x, y = floating(x), floating(y)
    if x.shape != y.shape:
        raise _check.bad("interpolate", "y", f"of the shape of x, {x.shape}", y.shape)
    u, v = x / jnp.linalg.norm(x.ravel()), y / jnp.linalg.norm(y.ravel())
    apart, together = jnp.sum((u - v) ** 2), jnp.sum((u + v) ** 2)  # exact also for a small angle
    same = apart == 0  # the limit is the straight line; no slope of a root at 0
    theta = 2 * jnp.arctan2(jnp.sqrt(jnp.where(same, 1.0, apart)), jnp.sqrt(together))
    arc = [jnp.sin(a * theta) / jnp.sin(theta) for a in (1 - w, w)]
    a, b = (jnp.where(same, line, on) for line, on in zip((1 - w, w), arc, strict=True))
    return (a * x + b * y).astype(jnp.result_type(x, y))
