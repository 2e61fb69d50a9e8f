r"""Gradients of a loss on the sample with respect to the noise, without a tape.

Notation: $L$ is a loss on the end point $y$ of a sampling path, $\ell(t) = \partial L/\partial x_t$,
$m = E[x_0 | x_t]$, $C = Cov[x_0 | x_t]$, $R = (\alpha/\sigma)^2 C$, $\lambda = \log(\alpha/\sigma)$.
A DDIM step is $x' = d\,x + w\,m(t, x)$, so the gradient runs back along it by

$$ \ell = d\,\ell' + w\left(\frac{\partial m}{\partial x}\right)^{\!\top}\ell', \qquad
   \frac{\partial m}{\partial x} = \frac{\alpha}{\sigma^2}\,C , $$

and along the PF-ODE, with $\mu = \sigma\ell$, by $d\mu/d\lambda = -R\mu$. Everything isotropic has
cancelled: the posterior covariance is all that an approximation can get right or wrong.

| `cov` | $(\partial m/\partial x)^\top\ell$ from | cost of a step back |
|---|---|---|
| `"vjp"` | reverse mode: the gradient of the sampler, for any network | 1 vjp |
| `"jvp"` | forward mode: the same where the Jacobian is symmetric | 1 jvp |
| `"fd"` | a difference of two outputs, likewise | 1 evaluation |
| `"exact"` | the closed form, where the data are known | vector operations |
| `"isotropic"` | $C = (\sigma/\alpha)^2 (r/d) I$, $r$ from an estimator of the trace | that of the estimator |
| `"gated"` | the same, at large sigma in part $(y - m)(y - m)^\top$ | that of the estimator |
| `"centred"` | $C = (y - m)(y - m)^\top$ | vector operations |
| `"endpoint"` | $C = y y^\top - m m^\top$, as published | vector operations |
| `"none"` | $C = 0$: the gradient is scaled by $\sigma'/\sigma$ | none |

A true posterior has a symmetric Jacobian, a learned network has not, and there the cosine between
`"jvp"` and `"vjp"` is a diagnostic. The states are kept, (nodes, *dims), and the activations of one
network evaluation at a time; `continuous_gradient` keeps no states either.
"""  # noqa: E501

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, Real

from jaxdiff import _check, exact
from jaxdiff._types import PROBES, Cond, Scalar, ScalarLike, is_concrete, stream
from jaxdiff.fisher.endpoint import endpoint_cov, gated_cov, isotropic_cov
from jaxdiff.fisher.operators import difference_step, posterior_cov
from jaxdiff.fisher.trace import AbstractTrace, ExactTrace
from jaxdiff.sampling import Samples
from jaxdiff.score import AbstractDenoiser, floating
from jaxdiff.solvers.engine import AbstractGridSolver
from jaxdiff.solvers.exponential import DDIM
from jaxdiff.solvers.plan import Options, Plan, plan_solve
from jaxdiff.solvers.terms import Clock, Field

Loss: TypeAlias = Callable[[Any], Any]
CovName: TypeAlias = Literal[
    "vjp", "jvp", "fd", "exact", "isotropic", "gated", "centred", "endpoint", "none"
]
Cov: TypeAlias = CovName | Callable[[Any, Any, Any, Any], lx.AbstractLinearOperator]


class Gradient(eqx.Module):
    """The result of `terminal_gradient` and `continuous_gradient`; NaN where the solve failed.

    Attributes:
        value: the loss at the end point, ().
        grad: its gradient with respect to the starting noise, (*dims,).
        sample: the end point with its status, as from `draw`; `jaxdiff.check(out.sample)` raises
            if the path or its gradient failed. Its `nfe` leaves out the products of the way back.
        grads: the gradients with respect to the states of `sample.aux["trajectory"]`,
            (nodes, *dims), if they were asked for.
    """

    value: Scalar
    grad: Float[Array, "*dims"]
    sample: Samples
    grads: Float[Array, "nodes *dims"] | None = None


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


# --- Products with the Jacobian of the denoiser. ---


class _Node(NamedTuple):
    """What a product may know: a state of the path, the end point, and the tools."""

    denoiser: AbstractDenoiser
    cond: Cond
    trace: AbstractTrace | None
    key: PRNGKeyArray | None
    t: Any
    x: Array
    y: Array

    def mean(self, x: Array) -> Array:
        return self.denoiser(self.t, x, self.cond)


# A rule maps (node, m, ell) to (m, (dm/dx)^T ell); m is None where it is not known yet.
_Rule: TypeAlias = Callable[[_Node, Any, Array], tuple[Array, Array]]


def _vjp(at: _Node, m: Array | None, ell: Array) -> tuple[Array, Array]:
    m, pull = jax.vjp(at.mean, at.x)
    return m, pull(ell)[0]


def _jvp(at: _Node, m: Array | None, ell: Array) -> tuple[Array, Array]:
    return jax.jvp(at.mean, (at.x,), (ell,))


def _fd(at: _Node, m: Array | None, ell: Array) -> tuple[Array, Array]:
    m = at.mean(at.x) if m is None else m
    alpha, sigma = at.denoiser.process.alpha(at.t), at.denoiser.process.sigma(at.t)
    step = difference_step(sigma, at.x, (at.x - alpha * m) / sigma, ell)
    return m, (at.mean(at.x + step * ell) - m) / step


def _none(at: _Node, m: Array | None, ell: Array) -> tuple[Array, Array]:
    return at.mean(at.x) if m is None else m, jnp.zeros_like(ell)


def _scaled(at: _Node, cov: lx.AbstractLinearOperator, ell: Array) -> Array:
    alpha, sigma = at.denoiser.process.alpha(at.t), at.denoiser.process.sigma(at.t)
    # where alpha = 0 the state says nothing about x0, and C / alpha may be undefined
    return jnp.where(alpha > 0, alpha / sigma**2 * cov.mv(ell), 0).astype(ell.dtype)


def _by_cov(model: Callable[[_Node, Array], lx.AbstractLinearOperator]) -> _Rule:
    """Make a rule of a model of C from a node and m."""

    def rule(at: _Node, m: Array | None, ell: Array) -> tuple[Array, Array]:
        known = at.mean(at.x) if m is None else m
        return known, _scaled(at, model(at, known), ell)

    return rule


def _by_trace(model: Callable[[_Node, Array, Array], lx.AbstractLinearOperator]) -> _Rule:
    """Make a rule of a model of C from a node, m and r: both from one evaluation."""

    def rule(at: _Node, m: Array | None, ell: Array) -> tuple[Array, Array]:
        assert at.trace is not None  # by _problem
        m, _, values = at.trace(at.denoiser, at.t, at.x, at.cond, at.key)
        return m, _scaled(at, model(at, m, jnp.mean(values)), ell)

    return rule


_RULES: dict[str, _Rule] = {
    "vjp": _vjp,
    "jvp": _jvp,
    "fd": _fd,
    "exact": _by_cov(lambda at, m: posterior_cov(at.denoiser, at.t, at.x, at.cond, method="exact")),
    "isotropic": _by_trace(lambda at, m, r: isotropic_cov(at.denoiser.process, at.t, r, at.x)),
    "gated": _by_trace(lambda at, m, r: gated_cov(at.denoiser, at.t, at.x, at.y, r, at.cond, m=m)),
    "centred": _by_cov(
        lambda at, m: endpoint_cov(at.denoiser, at.t, at.x, at.y, at.cond, kind="centred", m=m)
    ),
    "endpoint": _by_cov(
        lambda at, m: endpoint_cov(at.denoiser, at.t, at.x, at.y, at.cond, kind="raw", m=m)
    ),
    "none": _none,
}
_TRACED = ("isotropic", "gated")  # those that need r


class _Problem(eqx.Module):
    """The arguments that do not change along the path, and the two maps made of them."""

    denoiser: AbstractDenoiser
    loss: Loss
    cond: Cond
    cov: Any
    trace: AbstractTrace | None
    key: PRNGKeyArray | None

    def product(
        self, i: Any, t: Any, x: Array, m: Array | None, y: Array, ell: Array
    ) -> tuple[Array, Array]:
        r"""Return $m$ and $(\partial m/\partial x)^\top\ell$ at step `i`."""
        key = None if self.key is None else stream(self.key, i)
        at = _Node(self.denoiser, self.cond, self.trace, key, t, x, y)
        if isinstance(self.cov, str):
            return _RULES[self.cov](at, m, ell)
        return _by_cov(lambda at, m: self.cov(at.t, at.x, m, at.y))(at, m, ell)

    def scalar(self, y: Array) -> Array:
        value = jnp.asarray(self.loss(y))
        if value.shape != ():
            raise _check.bad("adjoint", "the value of loss", "one number, ()", value.shape)
        return value


# --- The discrete adjoint. ---


class _Steps(NamedTuple):
    """The sampler: step `i` is `decay[i] x + gain[i] m(nodes[i], x)`."""

    nodes: Array  # (n + 1,)
    decay: Array  # (n,)
    gain: Array  # (n,)

    def rows(self) -> tuple[Array, ...]:
        return jnp.arange(len(self.gain)), self.nodes[:-1], self.decay, self.gain


def _steps(where: str, denoiser: Any, ts: Any, dtype: Any, denoise: bool) -> _Steps:
    options = Options(denoise, False, None, None, None, None, None, 1)
    plan = plan_solve(where, denoiser, DDIM(), ts, dtype, options)
    nodes, decay, gain = jnp.asarray(plan.ts), jnp.zeros(0), jnp.zeros(0)
    rows: Any = getattr(plan.solver, "rows", None)
    if rows is not None:
        decay, gain = jnp.asarray(rows.decay), jnp.asarray(rows.weights)[:, 0]
    if plan.denoise:  # x = alpha m, which keeps nothing of the state
        nodes = jnp.append(nodes, plan.last[1])
        decay, gain = jnp.append(decay, 0.0), jnp.append(gain, plan.last[0])
    return _Steps(*(a.astype(nodes.dtype) for a in (nodes, decay, gain)))


def _from(
    first: Any, i: Any, move: Callable[[Any], Any], skip: Callable[[Any], Any], x: Any
) -> Any:
    """Make step `i` of a path that begins at node `first`; None stands for the first of all."""
    return move(x) if first is None else jax.lax.cond(i >= first, move, skip, x)


def _forward(problem: _Problem, steps: _Steps, x: Array, first: Any = None) -> tuple[Array, Any]:
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
    problem: _Problem, steps: _Steps, path: Any, y: Array, ell: Array, keep: bool, first: Any = None
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


def _status(*values: Array) -> Any:
    good = jnp.all(jnp.stack([jnp.all(jnp.isfinite(value)) for value in values]))
    nonfinite: Any = dfx.RESULTS.nonfinite
    return dfx.RESULTS.where(good, dfx.RESULTS.successful, nonfinite)


def _or_nan(result: Any, value: Array) -> Array:
    return jnp.where(result == dfx.RESULTS.successful, value, jnp.nan)


def _terminal(
    problem: _Problem, steps: _Steps, x: Array, keep: bool = False, first: Any = None
) -> Gradient:
    y, path = _forward(problem, steps, x, first)
    value, ell = jax.value_and_grad(problem.scalar)(y)
    grad, grads = _backward(problem, steps, path, y, ell, keep, first)
    result = _status(y, value, grad)
    aux = {}
    if keep:
        aux = {"trajectory": jnp.concatenate([path[0], y[None]]), "ts": steps.nodes}
    sample = Samples(_or_nan(result, y), result, jnp.asarray(len(steps.gain)), aux)
    return Gradient(_or_nan(result, value), _or_nan(result, grad), sample, grads)


_terminal_jit = eqx.filter_jit(_terminal)


def _problem(
    where: str, denoiser: Any, loss: Any, cond: Any, cov: Any, trace: Any, key: Any
) -> _Problem:
    if not isinstance(denoiser, AbstractDenoiser):
        raise _check.bad(where, "denoiser", "a jaxdiff denoiser", repr(denoiser))
    if not callable(loss):
        raise _check.bad(where, "loss", "callable as loss(x) -> ()", repr(loss))
    if not callable(cov):
        _check.choice(where, "cov", cov, _RULES)
    if cov == "exact" and not isinstance(denoiser, exact.AbstractExact):
        expected = "'vjp', 'jvp' or 'fd', since this denoiser has no closed form"
        raise _check.bad(where, "cov", expected, repr(cov))
    if isinstance(cov, str) and cov in _TRACED:
        trace = ExactTrace() if trace is None else trace
        if not isinstance(trace, AbstractTrace):
            raise _check.bad(where, "trace", "a trace estimator, as Hutchinson()", repr(trace))
        key = stream(_check.key(where, "key", key), PROBES) if trace.stochastic else None
    elif trace is not None:
        raise _check.bad(where, "trace", f"left out for cov={cov!r}", repr(trace))
    else:
        key = None
    return _Problem(denoiser, loss, cond, cov, trace, key)


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
    problem = _problem("terminal_gradient", denoiser, loss, cond, cov, trace, key)
    steps = _steps("terminal_gradient", denoiser, ts, x.dtype, denoise)
    return _terminal_jit(problem, steps, x, trajectory)


# --- The continuous adjoint. ---


class _AdjointField(eqx.Module):
    r"""The PF-ODE in the state of clock `"lam"`, with $d\mu/d\lambda = -R\mu$ beside it."""

    problem: _Problem
    clock: Clock
    y: Array

    def __call__(self, lam: Any, state: tuple[Array, Array], args: Any) -> tuple[Array, Array]:
        scaled, mu = state
        t = self.clock.t(lam)
        alpha, sigma = self.clock.process.alpha(t), self.clock.process.sigma(t)
        size = jnp.hypot(alpha, sigma)
        x = (scaled * size).astype(scaled.dtype)
        m, product = self.problem.product(0, t, x, None, self.y, mu)
        # alpha sigma (sigma m - alpha eps) / size^3, where nothing is divided by sigma
        slope = alpha * (sigma**2 * m - alpha * (x - alpha * m)) / size**3
        return slope.astype(scaled.dtype), (-alpha * product).astype(mu.dtype)


def _integrate(plan: Plan, field: Any, nodes: Array, y0: Any) -> Any:
    controller, max_steps = plan.controller, plan.max_steps
    if controller is None:
        controller, max_steps = dfx.StepTo(nodes), nodes.shape[0] - 1
    return dfx.diffeqsolve(
        dfx.ODETerm(field),
        plan.solver,
        nodes[0],
        nodes[-1],
        None,
        y0,
        stepsize_controller=controller,
        max_steps=max_steps,
        throw=False,
    )


@eqx.filter_jit
def _continuous(problem: _Problem, plan: Plan, x: Array) -> Gradient:
    nodes, ts = jnp.asarray(plan.nodes), jnp.asarray(plan.ts)
    process = problem.denoiser.process
    clock = Clock(process, "lam")
    size = [jnp.hypot(process.alpha(t), process.sigma(t)) for t in (ts[0], ts[-1])]
    field = Field(problem.denoiser, clock, problem.cond)
    there = _integrate(plan, field, nodes, (x / size[0]).astype(x.dtype))
    y = (there.ys[-1] * size[1]).astype(x.dtype)
    value, ell = jax.value_and_grad(problem.scalar)(y)
    # The equation is linear in mu: at unit size the tolerances of a controller mean something.
    norm = jnp.sqrt(jnp.mean(ell**2))
    unit = ell / jnp.where(norm > 0, norm, 1)
    back = _integrate(plan, _AdjointField(problem, clock, y), nodes[::-1], (there.ys[-1], unit))
    start, mu = (a[-1] for a in back.ys)
    grad = (mu * norm * (process.sigma(ts[-1]) / process.sigma(ts[0]))).astype(x.dtype)
    result = dfx.RESULTS.where(there.result == dfx.RESULTS.successful, back.result, there.result)
    ok = result == dfx.RESULTS.successful
    result = dfx.RESULTS.where(ok, _status(y, value, grad), result)
    aux = {"x_T": (start * size[0]).astype(x.dtype)}
    sample = Samples(_or_nan(result, y), result, -jnp.ones((), int), aux)
    return Gradient(_or_nan(result, value), _or_nan(result, grad), sample)


def continuous_gradient(
    denoiser: AbstractDenoiser,
    loss: Loss,
    x_T: Float[ArrayLike, "*dims"],
    *,
    ts: Real[ArrayLike, " nodes"] | Sequence[Any],
    solver: dfx.AbstractSolver | None = None,
    controller: dfx.AbstractStepSizeController | None = None,
    cov: Cov = "vjp",
    cond: Cond = None,
    trace: AbstractTrace | None = None,
    key: PRNGKeyArray | None = None,
    max_steps: int = 4096,
) -> Gradient:
    r"""Return a loss at the end of the PF-ODE and its gradient with respect to the noise.

    The path is integrated to the data end and then, with the gradient, back again:

    $$ \frac{d\mu}{d\lambda} = -R\,\mu, \qquad \mu = \sigma\ell, \qquad
       \ell(T) = \frac{\sigma_{t_0}}{\sigma_T}\,
       \mathcal{T}\exp\Big(\int_{\lambda_T}^{\lambda_{t_0}} R\,d\lambda\Big)\,\ell(t_0) $$

    Memory does not grow with the number of steps. The price is that the two solves differ by
    their own errors: the gradient is that of the ODE, not of the steps that were taken, and the
    path is not quite the same on the way back. `sample.aux["x_T"]` is the noise as it was found
    again: compare it with `x_T`. Where the steps are few, use `terminal_gradient`.

    Args:
        denoiser: what to sample from.
        loss: differentiable, from the end point (*dims,) to a number ().
        x_T: noise at `ts[0]`, (*dims,).
        ts: strictly decreasing times, (nodes,), with alpha > 0 and sigma > 0 at the ends.
        solver: a diffrax ODE solver; `diffrax.Tsit5()` by default.
        controller: a diffrax step-size controller; by default the steps are those of `ts`. Its
            tolerances act on $x/\sqrt{\alpha^2 + \sigma^2}$ and on $\mu$ of unit size at the data.
        cov: as in `terminal_gradient`. `"endpoint"` diverges towards the data, and `"fd"` is too
            rough for tolerances below the square root of round-off.
        cond: condition passed to the denoiser.
        trace: as in `terminal_gradient`.
        key: for a stochastic `trace`, whose probes stay the same along the path.
        max_steps: bound on the steps of each solve under a controller.

    Returns:
        `Gradient`, NaN with a status where a solve failed.

    Raises:
        ValueError: as `terminal_gradient`, and if an end of `ts` has infinite log-SNR or `solver`
            is no diffrax ODE solver.

    Example:
        >>> import jaxdiff as jd
        >>> vp = jd.process.VP()
        >>> unit = jd.exact.gaussian(vp, jnp.zeros(2), 1.0)
        >>> ts = vp.grid(20, "logsnr")
        >>> out = continuous_gradient(unit, lambda x: x[0], jnp.ones(2), ts=ts)
        >>> bool(abs(out.grad[0] - 1) < 1e-3)  # the law does not move, so neither does a sample
        True

    References:
        Wang et al. 2025 (2505.23264); Chen et al. 2018, "Neural ordinary differential equations"
        (1806.07366), algorithm 1.
    """
    x, where = floating(x_T), "continuous_gradient"
    problem = _problem(where, denoiser, loss, cond, cov, trace, key)
    solver = dfx.Tsit5() if solver is None else solver
    if isinstance(solver, AbstractGridSolver | dfx.AbstractItoSolver | dfx.AbstractSRK):
        raise _check.bad(where, "solver", "a diffrax ODE solver, as diffrax.Tsit5()", repr(solver))
    options = Options(False, False, None, "ode", "lam", controller, None, max_steps)
    plan = plan_solve(where, denoiser, solver, ts, x.dtype, options)
    if plan.denoise:
        raise _check.bad(where, "ts[-1]", "a time with sigma > 0", f"t={plan.last[1]!r}")
    return _continuous(problem, plan, x)


# --- Guidance. ---


def _direction(ell: Array, normalise: bool) -> Array:
    if not normalise:
        return ell
    norm = jnp.linalg.norm(ell)
    return ell / jnp.where(norm > 0, norm, 1)


@eqx.filter_jit
def _optimise(
    problem: _Problem,
    steps: _Steps,
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
        out = _terminal(own, steps, x)
        update, state = optimiser.update(_direction(out.grad, normalise), state, x)
        return (place((x + update).astype(x.dtype)), state), out.value

    x = place(x)
    (x, _), losses = jax.lax.scan(body, (x, optimiser.init(x)), jnp.arange(count))
    y, _ = _forward(problem, steps, x)
    value = problem.scalar(y)
    result = _status(y, value)
    nfe = jnp.asarray(len(steps.gain) * (count + 1))
    sample = Samples(_or_nan(result, y), result, nfe, {})
    return OptimisedNoise(x, jnp.append(losses, _or_nan(result, value)), sample)


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
    problem = _problem(where, denoiser, loss, cond, cov, trace, key)
    if not (callable(getattr(optimiser, "init", 0)) and callable(getattr(optimiser, "update", 0))):
        raise _check.bad(where, "optimiser", "an optax transformation", repr(optimiser))
    _check.whole(where, "steps", steps, 1)
    _check.choice(where, "project", project, (None, "sphere"))
    table = _steps(where, denoiser, ts, x.dtype, denoise)
    return _optimise(problem, table, x, optimiser, steps, project == "sphere", normalise)


@eqx.filter_jit
def _guide(
    problem: _Problem,
    steps: _Steps,
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
            ell = _terminal(own, steps, x, first=i).grad
            return (x - step_size * _direction(ell, normalise)).astype(x.dtype)

        x = jax.lax.cond(inside, lambda x: jax.lax.fori_loop(0, repeats, once, x), lambda x: x, x)
        m = problem.denoiser(t, x, problem.cond)
        return (decay * x + gain * m).astype(x.dtype), None

    y, _ = jax.lax.scan(body, x, (steps.rows(), inside))
    result = _status(y)
    nfe = n + repeats * jnp.sum(jnp.where(inside, n - jnp.arange(n), 0))
    return Samples(_or_nan(result, y), result, nfe, {})


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
    problem = _problem(where, denoiser, loss, cond, cov, trace, key)
    _check.whole(where, "repeats", repeats, 1)
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise _check.bad(where, "window", "two times (t_hi, t_lo)", repr(window))
    if is_concrete(window) and not window[0] >= window[1]:
        raise _check.bad(where, "window", "two times t_hi >= t_lo", repr(window))
    table = _steps(where, denoiser, ts, x.dtype, denoise)
    window = (jnp.asarray(window[0]), jnp.asarray(window[1]))
    return _guide(problem, table, x, window, jnp.asarray(step_size), repeats, normalise)
