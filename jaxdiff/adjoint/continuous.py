r"""The gradient of the PF-ODE: state and adjoint integrated together, with no state kept."""

from collections.abc import Sequence
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, Real

from jaxdiff import _check
from jaxdiff._array import Cond
from jaxdiff.adjoint.problem import Cov, Gradient, Loss, Problem, make_problem, or_nan, status
from jaxdiff.fisher.heads import AbstractTrace
from jaxdiff.sampling import Samples
from jaxdiff.score import AbstractDenoiser, floating
from jaxdiff.solvers.engine import AbstractGridSolver
from jaxdiff.solvers.plan import Options, Plan, plan_solve
from jaxdiff.solvers.terms import Clock, Field


class _AdjointField(eqx.Module):
    r"""The PF-ODE in the state of clock `"lam"`, with $d\mu/d\lambda = -R\mu$ beside it."""

    problem: Problem
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
def _continuous(problem: Problem, plan: Plan, x: Array) -> Gradient:
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
    result = dfx.RESULTS.where(ok, status(y, value, grad), result)
    aux = {"x_T": (start * size[0]).astype(x.dtype)}
    sample = Samples(or_nan(result, y), result, -jnp.ones((), int), aux)
    return Gradient(or_nan(result, value), or_nan(result, grad), sample)


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
    problem = make_problem(where, denoiser, loss, cond, cov, trace, key)
    solver = dfx.Tsit5() if solver is None else solver
    if isinstance(solver, AbstractGridSolver | dfx.AbstractItoSolver | dfx.AbstractSRK):
        raise _check.bad(where, "solver", "a diffrax ODE solver, as diffrax.Tsit5()", repr(solver))
    options = Options(False, False, None, "ode", "lam", controller, None, max_steps)
    plan = plan_solve(where, denoiser, solver, ts, x.dtype, options)
    if plan.denoise:
        raise _check.bad(where, "ts[-1]", "a time with sigma > 0", f"t={plan.last[1]!r}")
    return _continuous(problem, plan, x)
