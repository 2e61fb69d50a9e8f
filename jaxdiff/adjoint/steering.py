r"""What the gradient is for: noise that minimises a loss, and guidance along the path."""

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from jaxdiff import _check
from jaxdiff._array import Cond, ScalarLike
from jaxdiff._host import is_concrete
from jaxdiff._keys import stream
from jaxdiff._loop import over_steps
from jaxdiff._sampler import Sampler, Samples, State
from jaxdiff._status import or_nan, status
from jaxdiff.adjoint.rules import Cov, Loss, scalar
from jaxdiff.adjoint.terminal import Problem, gradient, problem
from jaxdiff.fisher.heads import AbstractTrace
from jaxdiff.score import floating

__all__ = ["OptimisedNoise", "guide", "optimise_noise"]


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
    task: Problem, x: Array, optimiser: Any, count: int, sphere: bool, normalise: bool
) -> OptimisedNoise:
    solve = task.sampler.solve
    t0 = jnp.asarray(solve.ts)[0]
    radius = task.sampler.model.process.sigma(t0) * jnp.sqrt(x.size)

    def place(x: Array) -> Array:
        return (x * (radius / jnp.linalg.norm(x))).astype(x.dtype) if sphere else x

    def loss(x: Array) -> Array:
        return scalar(task.loss, task.run(x, end=task.end(x)).x)

    def body(carry: tuple[Array, Any], k: Array) -> tuple[tuple[Array, Any], Array]:
        x, state = carry
        own = task
        if task.rule.key is not None:
            own = eqx.tree_at(lambda task: task.rule.key, task, stream(task.rule.key, k))
        out = gradient(own, x)
        ell = _direction(out.grad, normalise)
        more = dict(value=out.value, grad=ell, value_fn=loss)
        update, state = optimiser.update(ell, state, x, **more)
        return (place((x + update).astype(x.dtype)), state), out.value

    x = place(x)
    (x, _), losses = jax.lax.scan(body, (x, optimiser.init(x)), jnp.arange(count))
    sample = task.run(x)
    value = scalar(task.loss, sample.x)
    result = status(sample.result, value)
    nfe = jnp.where(sample.nfe < 0, sample.nfe, sample.nfe * (count + 1))
    sample = Samples(or_nan(result, sample.x), result, nfe, {})
    return OptimisedNoise(x, jnp.append(losses, or_nan(result, value)), sample)


def optimise_noise(
    sampler: Sampler,
    loss: Loss,
    x_T: Float[ArrayLike, "*dims"],
    *,
    optimiser: Any,
    steps: int,
    cov: Cov = "vjp",
    project: Literal["sphere"] | None = None,
    normalise: bool = False,
    cond: Cond = None,
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
        sampler: as in `terminal_gradient`.
        loss: differentiable, from a sample (*dims,) to a number ().
        x_T: the noise to begin with, (*dims,); not zero with `project`.
        optimiser: an optax gradient transformation, `optax.adam(0.1)`; also one that asks for
            `value`, `grad` and `value_fn`, as `optax.lbfgs()`.
        steps: number of updates, at least 1.
        cov: as in `terminal_gradient`.
        project: `"sphere"` to begin and stay on the sphere, or None.
        normalise: divide the gradient by its norm before the optimiser sees it.
        cond: condition passed to the denoiser.
        trace: as in `terminal_gradient`.
        key: for a stochastic sampler or `trace`; each update has probes of its own.

    Returns:
        `OptimisedNoise`: the noise, the losses (steps + 1,) and the sample.

    Raises:
        ValueError: as `terminal_gradient`, and if `optimiser`, `steps` or `project` is wrong.

    Example:
        >>> import jaxdiff as jd, optax
        >>> vp = jd.process.VP()
        >>> two = jd.exact.mixture(vp, [0.5, 0.5], [[-1.0], [1.0]], 0.01)
        >>> ddim = jd.sampler(two, (1,), solver=jd.solvers.DDIM(), ts=vp.grid(10))
        >>> out = optimise_noise(ddim, lambda x: (x[0] - 1) ** 2, jnp.array([-0.5]),
        ...                      optimiser=optax.sgd(0.5), steps=20, normalise=True)
        >>> bool(out.losses[0] > 3), bool(out.losses[-1] < 0.1)
        (True, True)

    References:
        Wang et al. 2025 (2505.23264); Pan et al. 2023, "AdjointDPM" (2307.10711).
    """
    where = "optimise_noise"
    task = problem(where, sampler, loss, cov, cond, trace, key)
    x = sampler.solve.admit(where, floating(x_T)).astype(sampler.solve.start.dtype)
    if not (callable(getattr(optimiser, "init", 0)) and callable(getattr(optimiser, "update", 0))):
        raise _check.bad(where, "optimiser", "an optax transformation", repr(optimiser))
    _check.whole(where, "steps", steps, 1)
    _check.choice(where, "project", project, (None, "sphere"))
    import optax

    optimiser = optax.with_extra_args_support(optimiser)
    return _optimise(task, x, optimiser, steps, project == "sphere", normalise)


@eqx.filter_jit
def _guide(
    task: Problem, x: Array, window: tuple[Any, Any], step_size: Any, repeats: int, normalise: bool
) -> Samples:
    solve, model, cond = task.sampler.solve, task.sampler.model, task.cond
    ts = jnp.asarray(solve.ts)
    inside = (ts <= window[0]) & (ts >= window[1])

    def rest(first: Any, state: State, model: Any) -> Array:
        """Return the sample at the end of the steps from `first` on."""

        def step(n: Any, state: State) -> State:
            move = lambda state: solve.move(model, n, task.key, state, cond)  # noqa: E731
            return jax.lax.cond(n >= first, move, lambda state: state, state)

        state, _ = over_steps(step, state, 0, solve.steps)
        return solve.close(model, task.key, state, cond)[0]

    def corrected(n: Any, state: State) -> State:
        def once(k: Any, state: State) -> State:
            own = task
            if task.rule.key is not None:
                fresh = stream(task.rule.key, n * repeats + k)
                own = eqx.tree_at(lambda task: task.rule.key, task, fresh)
            end = jax.lax.stop_gradient(rest(n, state, model)) if task.rule.ended else None
            tilted = own.model(end)

            def loss(x: Array) -> Array:
                return scalar(task.loss, rest(n, solve.replace(n, state, x), tilted))

            x = solve.x(n, state)
            move = step_size * _direction(jax.grad(loss)(x), normalise)
            return solve.replace(n, state, (x - move).astype(x.dtype))

        fix = lambda state: jax.lax.fori_loop(0, repeats, once, state)  # noqa: E731
        return jax.lax.cond(inside[n], fix, lambda state: state, state)

    def step(n: Any, state: State) -> State:
        return solve.move(model, n, task.key, corrected(n, state), cond)

    state, _ = over_steps(step, solve.init(model, task.key, cond, x), 0, solve.steps)
    if solve.last_time is not None:  # the step of `end` starts from a node too
        state = corrected(solve.steps, state)
    out = solve.finish(model, task.key, state, cond)
    numbers = jnp.arange(len(ts) if solve.last_time is not None else solve.steps)
    spent = jnp.where(inside[: len(numbers)], out.nfe * (1 - numbers / len(numbers)), 0)
    nfe = out.nfe + repeats * jnp.round(jnp.sum(spent)).astype(int)
    return eqx.tree_at(lambda out: out.nfe, out, jnp.where(out.nfe < 0, out.nfe, nfe))


def guide(
    sampler: Sampler,
    loss: Loss,
    x_T: Float[ArrayLike, "*dims"],
    *,
    window: tuple[ScalarLike, ScalarLike],
    step_size: ScalarLike,
    repeats: int = 1,
    cov: Cov = "vjp",
    normalise: bool = False,
    cond: Cond = None,
    trace: AbstractTrace | None = None,
    key: PRNGKeyArray | None = None,
) -> Samples:
    r"""Sample and correct the states inside a window of time by the gradient of a loss.

    $$ x_t \leftarrow x_t - \eta\,\ell(t), \qquad t_{hi} \ge t \ge t_{lo} $$

    before the step from $t$, where $\ell(t)$ is the gradient of the loss at the end of the rest of
    the path. One pass instead of the many of `optimise_noise`. Cost: per node of the window,
    `repeats` times a path to the end and back.

    Args:
        sampler: as in `terminal_gradient`; not with a reversible solver, whose state is a pair.
        loss: differentiable, from a sample (*dims,) to a number ().
        x_T: noise at the first node, (*dims,).
        window: `(t_hi, t_lo)`, both included.
        step_size: $\eta$, ().
        repeats: corrections at each node of the window, at least 1.
        cov: as in `terminal_gradient`.
        normalise: divide the gradient by its norm, so that $\eta$ is the length of a correction.
        cond: condition passed to the denoiser.
        trace: as in `terminal_gradient`.
        key: for a stochastic sampler or `trace`; each correction has probes of its own.

    Returns:
        `Samples` with `x: (*dims,)`; `nfe` counts evaluations, not products.

    Raises:
        ValueError: as `terminal_gradient`, and if `window` or `repeats` is wrong.

    Example:
        >>> import jaxdiff as jd
        >>> vp = jd.process.VP()
        >>> two = jd.exact.mixture(vp, [0.5, 0.5], [[-1.0], [1.0]], 0.01)
        >>> ddim = jd.sampler(two, (1,), solver=jd.solvers.DDIM(), ts=vp.grid(20))
        >>> out = guide(ddim, lambda x: (x[0] - 1) ** 2, jnp.array([-0.5]), window=(0.9, 0.4),
        ...             step_size=0.2, normalise=True)
        >>> bool(out.x[0] > 0.5)
        True

    References:
        Wang et al. 2025 (2505.23264).
    """
    where = "guide"
    task = problem(where, sampler, loss, cov, cond, trace, key)
    if not sampler.solve.hookable:
        expected = "on a fixed grid, of a solver that is not reversible"
        raise _check.bad(where, "sampler", expected, type(sampler.solve).__name__)
    x = sampler.solve.admit(where, floating(x_T)).astype(sampler.solve.start.dtype)
    _check.whole(where, "repeats", repeats, 1)
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise _check.bad(where, "window", "two times (t_hi, t_lo)", repr(window))
    if is_concrete(window) and not window[0] >= window[1]:
        raise _check.bad(where, "window", "two times t_hi >= t_lo", repr(window))
    window = (jnp.asarray(window[0]), jnp.asarray(window[1]))
    return _guide(task, x, window, jnp.asarray(step_size), repeats, normalise)
