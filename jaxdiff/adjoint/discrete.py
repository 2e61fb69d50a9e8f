r"""The gradient of a DDIM path: the adjoint of every step, from the data back to the noise."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, Real

from jaxdiff._array import Cond
from jaxdiff.adjoint.problem import Cov, Gradient, Loss, Problem, make_problem, or_nan, status
from jaxdiff.fisher.heads import AbstractTrace
from jaxdiff.sampling import Samples
from jaxdiff.score import AbstractDenoiser, floating
from jaxdiff.solvers.exponential import DDIM
from jaxdiff.solvers.plan import Options, plan_solve


class Steps(NamedTuple):
    """The sampler: step `i` is `decay[i] x + gain[i] m(nodes[i], x)`."""

    nodes: Array  # (n + 1,)
    decay: Array  # (n,)
    gain: Array  # (n,)

    def rows(self) -> tuple[Array, ...]:
        """Return number, time, decay and gain of every step, to scan over."""
        return jnp.arange(len(self.gain)), self.nodes[:-1], self.decay, self.gain


def tabulate(where: str, denoiser: Any, ts: Any, dtype: Any, denoise: bool) -> Steps:
    """Return the steps of DDIM over a grid, with the checks of `draw`."""
    options = Options(denoise, False, None, None, None, None, None, 1)
    plan = plan_solve(where, denoiser, DDIM(), ts, dtype, options)
    nodes, decay, gain = jnp.asarray(plan.ts), jnp.zeros(0), jnp.zeros(0)
    rows: Any = getattr(plan.solver, "rows", None)
    if rows is not None:
        decay, gain = jnp.asarray(rows.decay), jnp.asarray(rows.gain)
    if plan.denoise:  # x = alpha m, which keeps nothing of the state
        nodes = jnp.append(nodes, plan.last[1])
        decay, gain = jnp.append(decay, 0.0), jnp.append(gain, plan.last[0])
    return Steps(*(a.astype(nodes.dtype) for a in (nodes, decay, gain)))


def _from(
    first: Any, i: Any, move: Callable[[Any], Any], skip: Callable[[Any], Any], x: Any
) -> Any:
    """Make step `i` of a path that begins at node `first`; None stands for the first of all."""
    return move(x) if first is None else jax.lax.cond(i >= first, move, skip, x)


def forward(problem: Problem, steps: Steps, x: Array, first: Any = None) -> tuple[Array, Any]:
    """Return the end point, and the state and denoiser output of every step."""

    # a derivative of the value keeps states, not networks
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(x: Array, row: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
        i, t, decay, gain = row

        def move(x: Array) -> tuple[Array, Array]:
            m = problem.denoiser(t, x, problem.cond)
            return (decay * x + gain * m).astype(x.dtype), m

        x1, m = _from(first, i, move, lambda x: (x, x), x)
        return x1, (x, m)

    return jax.lax.scan(body, x, steps.rows())


def _backward(
    problem: Problem, steps: Steps, path: Any, y: Array, ell: Array, keep: bool, first: Any = None
) -> tuple[Array, Array | None]:
    """Return the gradient at the start and, with `keep`, that at every node."""

    def body(ell: Array, row: Any) -> tuple[Array, Array | None]:
        (i, t, decay, gain), (x, m) = row

        def pull(ell: Array) -> Array:
            product = problem.product(i, t, x, m, y, ell)[1]
            return (decay * ell + gain * product).astype(ell.dtype)

        ell = _from(first, i, pull, lambda ell: ell, ell)
        return ell, ell if keep else None

    start, grads = jax.lax.scan(body, ell, (steps.rows(), path), reverse=True)
    return start, None if grads is None else jnp.concatenate([grads, ell[None]])


def gradient(
    problem: Problem, steps: Steps, x: Array, keep: bool = False, first: Any = None
) -> Gradient:
    """Return the loss at the end of the path from node `first` and its gradient there."""
    y, path = forward(problem, steps, x, first)
    value, ell = jax.value_and_grad(problem.scalar)(y)
    grad, grads = _backward(problem, steps, path, y, ell, keep, first)
    result = status(y, value, grad)
    aux = {}
    if keep:
        aux = {"trajectory": jnp.concatenate([path[0], y[None]]), "ts": steps.nodes}
    sample = Samples(or_nan(result, y), result, jnp.asarray(len(steps.gain)), aux)
    return Gradient(or_nan(result, value), or_nan(result, grad), sample, grads)


_terminal_jit = eqx.filter_jit(gradient)


def terminal_gradient(
    denoiser: AbstractDenoiser,
    loss: Loss,
    x_T: Float[ArrayLike, "*dims"],
    *,
    ts: Real[ArrayLike, " nodes"] | Sequence[Any],
    cov: Cov = "vjp",
    cond: Cond = None,
    denoise: bool = False,
    trajectory: bool = False,
    trace: AbstractTrace | None = None,
    key: PRNGKeyArray | None = None,
) -> Gradient:
    r"""Return a loss at the end of a DDIM path and its gradient with respect to the noise.

    $$ \ell_i = d_i\,\ell_{i-1} + w_i\,\frac{\alpha_i}{\sigma_i^2}\,C(x_i)\,\ell_{i-1}, \qquad
       d_i = \frac{\sigma_{i-1}}{\sigma_i}, \quad w_i = \alpha_{i-1} - \alpha_i d_i $$

    with the sampler's own rows of coefficients. With `cov="vjp"`, and with `"jvp"`, `"exact"` or
    `"fd"` (up to round-off of the difference) where the denoiser is a true posterior mean, this is
    the gradient of `draw(..., solver=DDIM())`. `"none"` and `"isotropic"` are the cheap
    approximations; endpoint models are good at large noise only.

    `x_T` may be a state at any time: let `ts` start there. Pure: runs under jit and vmap, and
    `value` may be differentiated again. Cost: one network evaluation per step, and one product
    per step back, see the module's table. Memory: the states, (nodes, *dims), twice that for the
    models that look at $m$, and one network evaluation.

    Args:
        denoiser: what to sample from.
        loss: differentiable, from the end point (*dims,) to a number ().
        x_T: noise at `ts[0]`, (*dims,).
        ts: strictly decreasing times inside the process, (nodes,). If sigma vanishes at the last,
            the last step is $x = \alpha m$, as in `draw`.
        cov: the posterior covariance, a name of the module's table or a callable
            `(t, x, m, y) -> operator` that returns $C$ at a state `x` with denoiser output `m`
            on the way to the end point `y`.
        cond: condition passed to the denoiser.
        denoise: finish with one more evaluation, as in `draw`.
        trajectory: also return all states, in `sample.aux`, and the gradient with respect to each.
        trace: the estimator of `"isotropic"` and `"gated"`; `fisher.ExactTrace()` by default.
        key: for a stochastic `trace`.

    Returns:
        `Gradient`. Nothing raises inside jit: where the path or its gradient is not finite they
        are NaN and `sample.result` says so.

    Raises:
        ValueError: if an argument is wrong: the grid, the name of a model, `"exact"` without a
            closed form, a `trace` that is not used, a missing `key`, a loss that is no number.

    Example:
        >>> import jaxdiff as jd
        >>> vp = jd.process.VP()
        >>> unit = jd.exact.gaussian(vp, jnp.zeros(2), 1.0)
        >>> out = terminal_gradient(unit, lambda x: x[0], jnp.ones(2), ts=vp.grid(10))
        >>> out.grad.shape, bool(out.grad[1] == 0)
        ((2,), True)

    References:
        Wang et al. 2025, "Efficiently Access Diffusion Fisher" (2505.23264); Song et al. 2021
        (2010.02502), eq. 12.
    """
    x = floating(x_T)
    problem = make_problem("terminal_gradient", denoiser, loss, cond, cov, trace, key)
    steps = tabulate("terminal_gradient", denoiser, ts, x.dtype, denoise)
    return _terminal_jit(problem, steps, x, trajectory)
