r"""The kinetic-optimal clock: nodes between which samples move equally far.

Notation: $u = dx/dt = \alpha' m + \sigma'\hat\epsilon$ along the PF-ODE. Among all ways of running
through a given path, that of constant $E|u|^2$ has the least kinetic energy $\int E|u|^2$; its
time is the arc length

$$ \theta(t) = \int_0^t \left(E\,|u_s|^2\right)^{1/2} ds, $$

and its nodes are uniform in $\theta$. By the identity

$$ E|u_t|^2 = \alpha'^2\,E|x_0|^2 + \sigma'^2\,d
              - \left(\alpha' - \alpha\sigma'/\sigma\right)^2 E|x_0 - m|^2 $$

only the mean squared error of the denoiser enters. That error is not how the speed is estimated:
near the data the last two terms are large and cancel, and the mean of $|u|^2$ itself does not.
Gaussian data of deviation c has $E|u|^2 = d\,(dS/dt)^2$, $S = (\alpha^2c^2 + \sigma^2)^{1/2}$:
nodes uniform in the standard deviation.

References:
    Shaul, Chen, Nickel, Le, Lipman 2023 (2306.06626), for paths; here for the clock of a given one.
"""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, Real

from jaxdiff import _check, grids
from jaxdiff._array import Cond, time_dtype
from jaxdiff._host import is_concrete
from jaxdiff.score import AbstractDenoiser
from jaxdiff.tuning.align import average, rows_of

__all__ = ["kinetic_energy", "kinetic_grid"]


@eqx.filter_jit
def _energies(
    denoiser: AbstractDenoiser, ts: Array, key: PRNGKeyArray, rows: Any, chunk: Any
) -> Array:
    """Return the mean of the squared speed at every node, under the same noise at all of them."""
    data, cond = rows

    def at(t: Array) -> Array:
        def one(key: PRNGKeyArray, i: Array, x0: Array, cond: Cond) -> Array:
            x = denoiser.process.perturb(key, t, x0)[0]
            return jnp.sum(denoiser.velocity(t, x, cond).astype(t.dtype) ** 2)

        return average(one, key, data, cond, chunk)

    return jax.lax.map(at, ts)


def kinetic_energy(
    key: PRNGKeyArray,
    denoiser: AbstractDenoiser,
    data: Real[ArrayLike, "n *dims"],
    *,
    ts: Real[Any, " nodes"] | Sequence[Any],
    cond: Cond = None,
    chunk: int | None = None,
) -> Float[Array, " nodes"]:
    r"""Estimate $E|u_t|^2$ at every node, the squared speed of samples along the PF-ODE.

    Cost: one evaluation per sample and node, no autodiff.

    Args:
        key: the noise, one draw per sample, the same at all nodes.
        denoiser: the model.
        data: clean samples, (n, *dims).
        ts: times, (nodes,), a grid at whose ends the velocity is finite.
        cond: conditions, every leaf with leading axis n.
        chunk: samples per vectorised program; all by default.

    Raises:
        ValueError: if an argument is wrong.
    """
    where = "kinetic_energy"
    rows = rows_of(where, denoiser, data, cond, chunk)
    key = _check.key(where, "key", key)
    dtype = time_dtype(rows[0].dtype)
    ts = grids.check(denoiser.process, ts, where=where, dtype=dtype)
    return _energies(denoiser, jnp.asarray(ts, dtype), key, rows, chunk)


def kinetic_grid(
    key: PRNGKeyArray,
    denoiser: AbstractDenoiser,
    data: Real[ArrayLike, "n *dims"],
    *,
    n: int,
    ts: Real[Any, " nodes"] | Sequence[Any],
    cond: Cond = None,
    chunk: int | None = None,
) -> Float[np.ndarray, " more"]:
    r"""Build the grid of `n` steps on which samples move equally far in every step.

    Arc length by the trapezoidal rule on a fine grid, inverted by a straight line between its
    nodes. It measures how far samples move, not how much they turn: for a solver of the PF-ODE that
    is exact on straight lines compare with `gits`. The clock is that of the path: on one that
    explodes it is almost uniform in sigma.

    Cost: one evaluation per sample and node of the fine grid, no autodiff.

    Args:
        key: the noise.
        denoiser: the model.
        data: clean samples, (samples, *dims).
        n: number of steps, at least 1.
        ts: fine grid on which the speed is measured, as `process.grid(128, "cosine")`; its ends
            are those of the result.
        cond: conditions, every leaf with leading axis `samples`.
        chunk: samples per vectorised program; all by default.

    Returns:
        The grid, (n + 1,), float64.

    Raises:
        ValueError: if an argument is wrong, or the speed is infinite or vanishes everywhere.

    Example:
        >>> import jaxdiff as jd
        >>> flow = jd.process.Rectified()
        >>> unit = jd.exact.gaussian(flow, jnp.zeros(1), 0.25)
        >>> key = jax.random.key(0)
        >>> data = 0.5 * jax.random.normal(key, (256, 1))
        >>> ts = flow.grid(64, "cosine", t_end=0.001)
        >>> kinetic_grid(key, unit, data, n=4, ts=ts).shape
        (5,)
    """
    where = "kinetic_grid"
    _check.whole(where, "n", n, 1)
    if not is_concrete(denoiser, ts, data):
        raise _check.bad(where, "denoiser, ts, data", "concrete", "a traced one; not inside jit")
    energies = np.asarray(
        kinetic_energy(key, denoiser, data, ts=ts, cond=cond, chunk=chunk), np.float64
    )
    if not (np.all(np.isfinite(energies)) and np.any(energies > 0)):
        raise _check.bad(where, "the speed of samples", "finite and not all zero", energies)
    fine = np.asarray(grids.check(denoiser.process, ts, where=where))
    speed = np.sqrt(energies)
    theta = np.append(0, np.cumsum(-np.diff(fine) * (speed[1:] + speed[:-1]) / 2))
    inner = np.interp(np.arange(1, n) / n * theta[-1], theta, fine)
    nodes = np.concatenate([fine[:1], inner, fine[-1:]])
    return np.asarray(grids.check(denoiser.process, nodes, where=where))
