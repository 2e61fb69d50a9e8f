r"""The gradient of the PF-ODE: state and adjoint integrated together, with no state kept."""

import functools
from collections.abc import Sequence
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, Real

from jaxdiff._array import Cond
from jaxdiff._passengers import At, Ride, Road, ride, road
from jaxdiff._sampler import Samples
from jaxdiff._status import first_failure, or_nan, status
from jaxdiff.adjoint.rules import Cov, Loss, Pullback, is_loss, pullback, scalar
from jaxdiff.adjoint.terminal import Gradient
from jaxdiff.fisher.heads import AbstractTrace
from jaxdiff.score import AbstractDenoiser, floating

__all__ = ["continuous_gradient"]


class _Covector(eqx.Module):
    r"""The passenger $\mu = \sigma\ell$, driven by $-R\mu$ on the way back from the end point."""

    denoiser: AbstractDenoiser
    rule: Pullback
    cond: Cond
    end: Array

    def __call__(self, at: At, mu: Array) -> tuple[Array, Array, Array]:
        rule, cond = self.rule, self.cond
        args = (self.denoiser, at.t, at.x, cond, None, self.end, mu, rule.key)
        m, product = rule.product(*args)
        eps = (at.x - at.alpha * m) / at.sigma
        return m, eps, -at.alpha * product


class _Alone(eqx.Module):
    """No passenger."""

    denoiser: AbstractDenoiser
    cond: Cond

    def __call__(self, at: At, nothing: Array) -> tuple[Array, Array, Array]:
        return *self.denoiser.pair(at.t, at.x, self.cond), nothing


@eqx.filter_jit
def _continuous(
    denoiser: Any, loss: Loss, rule: Pullback, cond: Cond, path: Road, x: Array
) -> Gradient:
    path, process = path.cast(x.dtype), denoiser.process
    start = ((x / path.scales[0]).astype(x.dtype), jnp.zeros(0, x.dtype))
    (there, _), _, went, _ = ride(path, Ride(process, _Alone(denoiser, cond)), start)
    y = (there * path.scales[1]).astype(x.dtype)
    value, ell = jax.value_and_grad(functools.partial(scalar, loss))(y)
    # The equation is linear in mu: at unit size the tolerances of a controller mean something.
    size = jnp.sqrt(jnp.mean(ell**2))
    unit = ell / jnp.where(size > 0, size, 1)
    field = Ride(process, _Covector(denoiser, rule, cond, y))
    (begin, mu), _, came, _ = ride(path, field, (there, unit), back=True)
    grad = (mu * size * (path.sigmas[1] / path.sigmas[0])).astype(x.dtype)
    result = status(first_failure(went, came), y, value, grad)
    aux = {"x_T": (begin * path.scales[0]).astype(x.dtype)}
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
    is_loss(where, loss)
    rule = pullback(where, denoiser, cov, trace, key)
    path = road(where, denoiser, ts, solver, controller, None, max_steps, dtype=x.dtype)
    return _continuous(denoiser, loss, rule, cond, path, x)
