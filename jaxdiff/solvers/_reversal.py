r"""Runs of a reversible solver in both directions, and their derivative in constant memory.

Notation: as in `reversible`. A run is a scan of the solver's rows over pairs; its derivative
reconstructs each pair by the inverse step instead of storing it.
"""

import dataclasses
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff import _check
from jaxdiff.score import AbstractDenoiser
from jaxdiff.solvers.reversible import AbstractReversible, Pair
from jaxdiff.solvers.terms import Clock, Field, View


class ReversibleAdjoint(dfx.AbstractAdjoint):
    """Differentiate a sampler in memory that does not grow with the number of steps.

    For reversible solvers in the scan engine: the way back reconstructs every pair by the inverse
    step, and pulls the gradient through it by one vjp. It equals the gradient of the plain scan up
    to the rounding of the round trip, in about the same time. Reverse mode only: forward mode has
    no use for it. Reaches all that the plain gradient does: `init`, `cond`, the parameters of the
    network (which must be leaves of the denoiser: JAX refuses those that a plain function closes
    over), and the process, the grid and the solver's parameters through the rows.

    References:
        McCallum, Foster 2024 (2410.11648), algorithm 1.
    """

    def loop(self, **kwargs: Any) -> Any:
        """Refuse: diffrax does not know how to step back."""
        raise _check.bad("ReversibleAdjoint", "engine", "'scan'", "diffrax.diffeqsolve")


def _at(denoiser: AbstractDenoiser, cond: Any, t: Array) -> View:
    return View(Field(denoiser, Clock(denoiser.process, "t"), cond), None, t[0], t[1])


def step_pair(shared: Any, row: Any, t: Array, pair: Pair, name: str = "forward") -> Pair:
    """Step a pair `forward` or `backward`; `shared` are solver, denoiser and condition."""
    solver, denoiser, cond = shared
    return getattr(solver, name)(_at(denoiser, cond, t), row, t, pair)


def _spans(ts: Array) -> Array:
    return jnp.stack([ts[:-1], ts[1:]], axis=1)


@eqx.filter_custom_vjp
def _travel(vjp_arg: Any) -> tuple[Pair, Pair]:
    """Run the steps; return the pair as it is kept and as numbers."""
    shared, rows, ts, pair = vjp_arg
    solver: AbstractReversible = shared[0]
    pair = jax.tree.map(solver.store, pair)
    pair, _ = jax.lax.scan(
        lambda pair, at: (step_pair(shared, *at, pair), None), pair, (rows, _spans(ts))
    )
    return pair, jax.tree.map(lambda z: solver.load(z, ts.dtype), pair)


@_travel.def_fwd
def _travel_fwd(perturbed: Any, vjp_arg: Any) -> Any:
    out = _travel(vjp_arg)
    return out, out[0]


@_travel.def_bwd
def _travel_bwd(pair: Pair, grads: Any, perturbed: Any, vjp_arg: Any) -> Any:
    shared, rows, ts, _ = vjp_arg
    solver: AbstractReversible = shared[0]
    like = jax.tree.map(lambda z: solver.load(z, ts.dtype), pair)
    ct = tuple(
        sum((g for g in both if g is not None), jnp.zeros_like(z))
        for z, *both in zip(like, *grads, strict=True)
    )
    # What all steps share, and the rows: apart what somebody wants the gradient of.
    (shared_yes, rows_yes), (shared_no, rows_no) = eqx.partition((shared, rows), perturbed[:2])
    moving = perturbed[2]

    def body(carry: Any, at: Any) -> Any:
        pair, ct, total = carry
        row, fixed, t = at
        pair = step_pair(shared, eqx.combine(row, fixed), t, pair, "backward")

        def forward(some: Any, row: Any, t: Array, pair: Pair) -> Pair:
            solver, *others = eqx.combine(some, shared_no)
            return step_pair((solver.smooth, *others), eqx.combine(row, fixed), t, pair)

        now = jax.tree.map(lambda z: solver.load(z, t.dtype), pair)
        _, pull = jax.vjp(forward, shared_yes, row, t, now)
        d_some, d_row, d_t, ct = pull(ct)
        return (pair, ct, jax.tree.map(jnp.add, total, d_some)), (d_row, d_t if moving else None)

    start = pair, ct, jax.tree.map(jnp.zeros_like, shared_yes)
    (_, ct, total), (d_rows, d_spans) = jax.lax.scan(
        body, start, (rows_yes, rows_no, _spans(ts)), reverse=True
    )
    d_ts = None
    if moving:
        d_ts = jnp.zeros_like(ts).at[:-1].add(d_spans[:, 0]).at[1:].add(d_spans[:, 1])
    ct = tuple(c if wanted else None for c, wanted in zip(ct, perturbed[3], strict=True))
    return total, d_rows, d_ts, ct


def travel(
    solver: Any, denoiser: AbstractDenoiser, cond: Any, rows: Any, ts: Array, pair: Pair
) -> tuple[Pair, Pair]:
    """Run rows of a solver from a pair; return the pair at the end as it is kept and in numbers."""
    bare = dataclasses.replace(solver, rows=None)
    return _travel(((bare, denoiser, cond), rows, ts, pair))


def travel_back(
    solver: Any, denoiser: AbstractDenoiser, cond: Any, rows: Any, ts: Array, pair: Pair, first: int
) -> Pair:
    """Undo the rows from the last to the one with number `first`."""
    rows, shared = jax.tree.map(lambda a: a[first:], rows), (solver, denoiser, cond)

    def body(pair: Pair, at: Any) -> tuple[Pair, None]:
        return step_pair(shared, at[0], at[1], pair, "backward"), None

    return jax.lax.scan(body, pair, (rows, _spans(ts[first:])), reverse=True)[0]


def arrive(
    solver: Any, denoiser: AbstractDenoiser, cond: Any, rows: Any, ts: Array, x: Array
) -> Pair:
    """Return a pair at the last node, of which x alone is known."""
    last = jax.tree.map(lambda a: a[-1], rows)
    return solver.arrive(_at(denoiser, cond, ts[-2:]), last, ts[-2:], x)
