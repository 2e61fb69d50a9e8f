r"""Exact inversion: from a sample to its noise and back again, and what can be done on the way.

A reversible solver steps pairs of states. `sampler.invert` runs the steps of its grid backwards and
returns the pair at the noise end; `sampler(None, init=inverted)` runs them forwards again, and
arrives where `invert` started, up to the rounding of the additions (and with `bits`, bit for bit).
With another condition on the way back, it arrives somewhere else that has the structure of the
sample: `edit`.

Why two states: the noise alone, with a fresh start by DDIM, leads back only as well as DDIM does.
And the noise of a *given* sample is inexact, since its pair begins with a guess: exact is the round
trip, not the likeness to the PF-ODE.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from jaxdiff import _check
from jaxdiff._array import Cond, ScalarLike
from jaxdiff._sampler import Sampler, Samples
from jaxdiff.score import floating

__all__ = ["edit", "interpolate"]


def edit(
    sampler: Sampler,
    x: Float[ArrayLike, "*dims"] | Samples,
    *,
    source: Cond,
    target: Cond,
    freeze: float | int = 0.2,
) -> Samples:
    r"""Change a sample as the change of its condition from `source` to `target` says.

    Inverts with the source and draws again with the target. `freeze` leaves out the noisiest steps:
    0 changes the most, nearly 1 nothing. With `target` equal to `source` the sample comes back.
    Guidance belongs into the denoiser, of the same strength for both.

    Args:
        sampler: with a reversible solver, of a denoiser with conditions.
        x: as in `sampler.invert`.
        source: what `x` is.
        target: what it shall be.
        freeze: as in `sampler.invert`.

    Returns:
        `Samples` with `x: (*dims,)`; `nfe` counts both ways.

    Raises:
        ValueError: as `sampler.invert`.

    References:
        Wang et al. 2024 (2410.07273), section 5.3, where 20% of the steps are left out.
    """
    noise = sampler.invert(x, source, freeze=freeze)
    out = sampler(None, target, noise)
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
