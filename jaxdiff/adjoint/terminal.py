r"""The gradient of a loss on a sample by the noise it starts from, through any sampler."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from jaxdiff import _check
from jaxdiff._array import Cond, Scalar
from jaxdiff._gaussian import PairSolve
from jaxdiff._sampler import Sampler, Samples
from jaxdiff._status import or_nan, status
from jaxdiff.adjoint.rules import Cov, Loss, Pullback, WithCov, is_loss, pullback, scalar
from jaxdiff.fisher.heads import AbstractTrace
from jaxdiff.score import AbstractDenoiser, floating
from jaxdiff.solvers._reversal import ReversibleAdjoint

__all__ = ["Gradient", "Problem", "gradient", "problem", "terminal_gradient"]


class Gradient(eqx.Module):
    """The result of `terminal_gradient` and `continuous_gradient`; NaN where the solve failed.

    Attributes:
        value: the loss at the end point, ().
        grad: its gradient by the starting noise, (*dims,).
        sample: the end point with its status, as of a sampler; `jaxdiff.check(out.sample)` raises
            if the path or its gradient failed. Its `nfe` leaves out the products of the way back.
        grads: the gradients by the states of `sample.aux["trajectory"]`, (nodes, *dims), if they
            were asked for.
    """

    value: Scalar
    grad: Float[Array, "*dims"]
    sample: Samples
    grads: Float[Array, "nodes *dims"] | None = None


class Problem(eqx.Module):
    """A sampler, a loss of its sample, and the rule by which gradients go back."""

    sampler: Sampler
    loss: Loss
    rule: Pullback
    cond: Cond
    key: PRNGKeyArray | None

    def model(self, end: Any) -> Any:
        """Return the model that is differentiated; `"vjp"` needs no other than its own."""
        if isinstance(self.rule.cov, str) and self.rule.cov == "vjp":
            return self.sampler.model
        return WithCov(self.sampler.model, self.rule, end)

    def run(self, x: Array, nudges: Any = None, end: Any = None, solve: Any = None) -> Samples:
        """Return the sample of a noise."""
        solve = self.sampler.solve if solve is None else solve
        return solve.run(self.model(end), self.key, self.cond, x, nudges)

    def end(self, x: Array) -> Any:
        """Return the end point for rules that look at it."""
        if not self.rule.ended:
            return None
        solve = self.sampler.solve
        return jax.lax.stop_gradient(solve.run(self.sampler.model, self.key, self.cond, x).x)


def problem(
    where: str, sampler: Any, loss: Any, cov: Any, cond: Cond, trace: Any, key: Any
) -> Problem:
    """Check the arguments that all functions of the package share.

    Raises:
        ValueError: naming the first that is wrong.
    """
    if not isinstance(sampler, Sampler) or not isinstance(sampler.model, AbstractDenoiser):
        expected = "one of a denoiser, jd.sampler(denoiser, shape, solver=..., ts=...)"
        raise _check.bad(where, "sampler", expected, repr(sampler))
    is_loss(where, loss)
    rule = pullback(where, sampler.model, cov, trace, key)
    key = _check.needed_key(where, key, sampler.solve.draws)
    return Problem(sampler, loss, rule, cond, key)


def gradient(problem: Problem, x: Array, trajectory: bool = False) -> Gradient:
    """Return the loss at the end of a path and its gradient at the start."""
    solve, nudges = problem.sampler.solve, None
    if trajectory:
        nodes = solve.steps + 1 + (solve.last_time is not None)
        nudges = jnp.zeros((nodes, *x.shape), x.dtype)
    elif isinstance(solve, PairSolve) and solve.reversible:
        solve = dataclasses.replace(solve, adjoint=ReversibleAdjoint())  # keeps no states
    end = problem.end(x)

    def value(x: Array, nudges: Any) -> tuple[Array, Samples]:
        out = problem.run(x, nudges, end, solve)
        return scalar(problem.loss, out.x), out

    by = (0, 1) if trajectory else (0,)
    (loss, sample), grads = jax.value_and_grad(value, by, has_aux=True)(x, nudges)
    result = status(sample.result, sample.x, loss, grads[0])
    sample = eqx.tree_at(lambda s: (s.result, s.x), sample, (result, or_nan(result, sample.x)))
    every = grads[1] if trajectory else None
    return Gradient(or_nan(result, loss), or_nan(result, grads[0]), sample, every)


_gradient_jit = eqx.filter_jit(gradient)


def terminal_gradient(
    sampler: Sampler,
    loss: Loss,
    x_T: Float[ArrayLike, "*dims"],
    *,
    cov: Cov = "vjp",
    cond: Cond = None,
    trajectory: bool = False,
    trace: AbstractTrace | None = None,
    key: PRNGKeyArray | None = None,
) -> Gradient:
    r"""Return a loss at the end of a sampler's path and its gradient by the noise at the start.

    For DDIM the gradient runs back by

    $$ \ell_i = d_i\,\ell_{i-1} + w_i\,\frac{\alpha_i}{\sigma_i^2}\,C(x_i)\,\ell_{i-1}, \qquad
       d_i = \frac{\sigma_{i-1}}{\sigma_i}, \quad w_i = \alpha_{i-1} - \alpha_i d_i $$

    and for any other solver along its own steps: it is the derivative of the sampler, with the
    pullback of the network replaced by the rule. With `cov="vjp"`, and with `"jvp"`, `"exact"` or
    `"fd"` (up to round-off of the difference) where the denoiser is a true posterior mean, this is
    the gradient of the sample. `"none"` and `"isotropic"` are the cheap approximations; endpoint
    models are good at large noise only.

    Pure: runs under jit and vmap. Cost: the sampler's evaluations; and back, per evaluation, one
    product, see the table of `adjoint.rules`, and for most rules the evaluation once more. Rules
    that look at the end point run the sampler once before. Memory: the states, (nodes, *dims), and
    one network evaluation; for a reversible solver nothing that grows with the number of steps.

    Args:
        sampler: of a denoiser. A deterministic one, or one whose noise is fixed by `key`.
        loss: differentiable, from the end point (*dims,) to a number ().
        x_T: noise at the first node, (*dims,).
        cov: the posterior covariance, a name of the table of `adjoint.rules` or a callable
            `(t, x, m, y) -> operator` that returns $C$ at a state `x` with denoiser output `m`
            on the way to the end point `y`.
        cond: condition passed to the denoiser.
        trajectory: also return all states, in `sample.aux`, and the gradient by each.
        trace: the estimator of `"isotropic"` and `"gated"`; `fisher.ExactTrace()` by default.
        key: for a stochastic sampler or `trace`.

    Returns:
        `Gradient`. Nothing raises inside jit: where the path or its gradient is not finite they
        are NaN and `sample.result` says so.

    Raises:
        ValueError: if an argument is wrong: the name of a model, `"exact"` without a closed form,
            a `trace` that is not used, a missing `key`, a loss that is no number.

    Example:
        >>> import jaxdiff as jd
        >>> vp = jd.process.VP()
        >>> unit = jd.exact.gaussian(vp, jnp.zeros(2), 1.0)
        >>> ddim = jd.sampler(unit, (2,), solver=jd.solvers.DDIM(), ts=vp.grid(10))
        >>> out = terminal_gradient(ddim, lambda x: x[0], jnp.ones(2))
        >>> out.grad.shape, bool(out.grad[1] == 0)
        ((2,), True)

    References:
        Wang et al. 2025, "Efficiently Access Diffusion Fisher" (2505.23264); Song et al. 2021
        (2010.02502), eq. 12.
    """
    where = "terminal_gradient"
    task = problem(where, sampler, loss, cov, cond, trace, key)
    x = sampler.solve.admit(where, floating(x_T))
    return _gradient_jit(task, x.astype(sampler.solve.start.dtype), trajectory)
