r"""What the gradient is for: noise that minimises a loss, and guidance along the path."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, Real

from jaxdiff import _check
from jaxdiff._array import Cond, ScalarLike
from jaxdiff._host import is_concrete
from jaxdiff._keys import stream
from jaxdiff.adjoint.discrete import Steps, forward, gradient, tabulate
from jaxdiff.adjoint.problem import Cov, Loss, Problem, make_problem, or_nan, status
from jaxdiff.fisher.heads import AbstractTrace
from jaxdiff.sampling import Samples
from jaxdiff.score import AbstractDenoiser, floating


class OptimisedNoise(eqx.Module):
    """The result of `optimise_noise`.

    Attributes:
        x_T: the noise, (*dims,).
        losses: the loss before every update and at `x_T`, (steps + 1,).
        sample: the sample that `x_T` leads to, with its status.
    """

    x_T: Float[Array, "*dims"]
    losses: Float[Array, " losses"]
    sample: Samples


def _direction(ell: Array, normalise: bool) -> Array:
    if not normalise:
        return ell
    norm = jnp.linalg.norm(ell)
    return ell / jnp.where(norm > 0, norm, 1)


@eqx.filter_jit
def _optimise(
    problem: Problem,
    steps: Steps,
    x: Array,
    optimiser: Any,
    count: int,
    sphere: bool,
    normalise: bool,
) -> OptimisedNoise:
    radius = problem.denoiser.process.sigma(steps.nodes[0]) * jnp.sqrt(x.size)

    def place(x: Array) -> Array:
        return (x * (radius / jnp.linalg.norm(x))).astype(x.dtype) if sphere else x

    def body(carry: tuple[Array, Any], k: Array) -> tuple[tuple[Array, Any], Array]:
        x, state = carry
        own = problem
        if problem.key is not None:
            own = dataclasses.replace(problem, key=stream(problem.key, k))
        out = gradient(own, steps, x)
        update, state = optimiser.update(_direction(out.grad, normalise), state, x)
        return (place((x + update).astype(x.dtype)), state), out.value

    x = place(x)
    (x, _), losses = jax.lax.scan(body, (x, optimiser.init(x)), jnp.arange(count))
    y, _ = forward(problem, steps, x)
    value = problem.scalar(y)
    result = status(y, value)
    nfe = jnp.asarray(len(steps.gain) * (count + 1))
    sample = Samples(or_nan(result, y), result, nfe, {})
    return OptimisedNoise(x, jnp.append(losses, or_nan(result, value)), sample)


def optimise_noise(
    denoiser: AbstractDenoiser,
    loss: Loss,
    x_T: Float[ArrayLike, "*dims"],
    *,
    ts: Real[ArrayLike, " nodes"] | Sequence[Any],
    optimiser: Any,
    steps: int,
    cov: Cov = "vjp",
    project: Literal["sphere"] | None = None,
    normalise: bool = False,
    cond: Cond = None,
    denoise: bool = False,
    trace: AbstractTrace | None = None,
    key: PRNGKeyArray | None = None,
) -> OptimisedNoise:
    r"""Minimise a loss of the sample over the noise it starts from.

    $$ x_T \leftarrow \mathrm{project}\big(x_T - \eta\,\ell(T)\big), \qquad
       |x_T| = \sigma_T\sqrt d \ \text{ on the sphere} $$

    Gaussian noise in many dimensions lies near that sphere, and a denoiser has seen no other: the
    projection keeps the optimised noise where samples are good. Cost: `steps` times that of
    `terminal_gradient`, and one path for the final sample. Build `optimiser` once: another
    instance is compiled again.

    Args:
        denoiser: what to sample from.
        loss: differentiable, from a sample (*dims,) to a number ().
        x_T: the noise to begin with, (*dims,); not zero with `project`.
        ts: as in `terminal_gradient`.
        optimiser: an optax gradient transformation, `optax.adam(0.1)`.
        steps: number of updates, at least 1.
        cov: as in `terminal_gradient`.
        project: `"sphere"` to begin and stay on the sphere, or None.
        normalise: divide the gradient by its norm before the optimiser sees it.
        cond: condition passed to the denoiser.
        denoise: as in `terminal_gradient`.
        trace: as in `terminal_gradient`.
        key: for a stochastic `trace`; each update has probes of its own.

    Returns:
        `OptimisedNoise`: the noise, the losses (steps + 1,) and the sample.

    Raises:
        ValueError: as `terminal_gradient`, and if `optimiser`, `steps` or `project` is wrong.

    Example:
        >>> import jaxdiff as jd, optax
        >>> vp = jd.process.VP()
        >>> two = jd.exact.mixture(vp, [0.5, 0.5], [[-1.0], [1.0]], 0.01)
        >>> out = optimise_noise(two, lambda x: (x[0] - 1) ** 2, jnp.array([-0.5]), ts=vp.grid(10),
        ...                      optimiser=optax.sgd(0.5), steps=20, normalise=True)
        >>> bool(out.losses[0] > 3), bool(out.losses[-1] < 0.1)
        (True, True)

    References:
        Wang et al. 2025 (2505.23264); Pan et al. 2023, "AdjointDPM" (2307.10711).
    """
    x, where = floating(x_T), "optimise_noise"
    problem = make_problem(where, denoiser, loss, cond, cov, trace, key)
    if not (callable(getattr(optimiser, "init", 0)) and callable(getattr(optimiser, "update", 0))):
        raise _check.bad(where, "optimiser", "an optax transformation", repr(optimiser))
    _check.whole(where, "steps", steps, 1)
    _check.choice(where, "project", project, (None, "sphere"))
    table = tabulate(where, denoiser, ts, x.dtype, denoise)
    return _optimise(problem, table, x, optimiser, steps, project == "sphere", normalise)


@eqx.filter_jit
def _guide(
    problem: Problem,
    steps: Steps,
    x: Array,
    window: tuple[Any, Any],
    step_size: Any,
    repeats: int,
    normalise: bool,
) -> Samples:
    n = len(steps.gain)
    inside = (steps.nodes[:-1] <= window[0]) & (steps.nodes[:-1] >= window[1])

    def body(x: Array, row: Any) -> tuple[Array, None]:
        (i, t, decay, gain), inside = row

        def once(k: Any, x: Array) -> Array:
            own = problem
            if problem.key is not None:
                own = dataclasses.replace(problem, key=stream(problem.key, i * repeats + k))
            ell = gradient(own, steps, x, first=i).grad
            return (x - step_size * _direction(ell, normalise)).astype(x.dtype)

        x = jax.lax.cond(inside, lambda x: jax.lax.fori_loop(0, repeats, once, x), lambda x: x, x)
        m = problem.denoiser(t, x, problem.cond)
        return (decay * x + gain * m).astype(x.dtype), None

    y, _ = jax.lax.scan(body, x, (steps.rows(), inside))
    result = status(y)
    nfe = n + repeats * jnp.sum(jnp.where(inside, n - jnp.arange(n), 0))
    return Samples(or_nan(result, y), result, nfe, {})


def guide(
    denoiser: AbstractDenoiser,
    loss: Loss,
    x_T: Float[ArrayLike, "*dims"],
    *,
    ts: Real[ArrayLike, " nodes"] | Sequence[Any],
    window: tuple[ScalarLike, ScalarLike],
    step_size: ScalarLike,
    repeats: int = 1,
    cov: Cov = "vjp",
    normalise: bool = False,
    cond: Cond = None,
    denoise: bool = False,
    trace: AbstractTrace | None = None,
    key: PRNGKeyArray | None = None,
) -> Samples:
    r"""Sample by DDIM and correct the states inside a window of time by the gradient of a loss.

    $$ x_t \leftarrow x_t - \eta\,\ell(t), \qquad t_{hi} \ge t \ge t_{lo} $$

    before the step from $t$, where $\ell(t)$ is the gradient of the loss at the end of the rest of
    the path. One pass instead of the many of `optimise_noise`. Cost: per node of the window,
    `repeats` times a path to the end and back.

    Args:
        denoiser: what to sample from.
        loss: differentiable, from a sample (*dims,) to a number ().
        x_T: noise at `ts[0]`, (*dims,).
        ts: as in `terminal_gradient`.
        window: `(t_hi, t_lo)`, both included.
        step_size: $\eta$, ().
        repeats: corrections at each node of the window, at least 1.
        cov: as in `terminal_gradient`.
        normalise: divide the gradient by its norm, so that $\eta$ is the length of a correction.
        cond: condition passed to the denoiser.
        denoise: as in `terminal_gradient`.
        trace: as in `terminal_gradient`.
        key: for a stochastic `trace`; each correction has probes of its own.

    Returns:
        `Samples` with `x: (*dims,)`; `nfe` counts evaluations, not products.

    Raises:
        ValueError: as `terminal_gradient`, and if `window` or `repeats` is wrong.

    Example:
        >>> import jaxdiff as jd
        >>> vp = jd.process.VP()
        >>> two = jd.exact.mixture(vp, [0.5, 0.5], [[-1.0], [1.0]], 0.01)
        >>> out = guide(two, lambda x: (x[0] - 1) ** 2, jnp.array([-0.5]), ts=vp.grid(20),
        ...             window=(0.9, 0.4), step_size=0.2, normalise=True)
        >>> bool(out.x[0] > 0.5)
        True

    References:
        Wang et al. 2025 (2505.23264).
    """
    x, where = floating(x_T), "guide"
    problem = make_problem(where, denoiser, loss, cond, cov, trace, key)
    _check.whole(where, "repeats", repeats, 1)
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise _check.bad(where, "window", "two times (t_hi, t_lo)", repr(window))
    if is_concrete(window) and not window[0] >= window[1]:
        raise _check.bad(where, "window", "two times t_hi >= t_lo", repr(window))
    table = tabulate(where, denoiser, ts, x.dtype, denoise)
    window = (jnp.asarray(window[0]), jnp.asarray(window[1]))
    return _guide(problem, table, x, window, jnp.asarray(step_size), repeats, normalise)
