r"""The likelihood of one sample: the PF-ODE with its log-determinant, from data to noise.

Notation: $\lambda = \log(\alpha/\sigma)$, $h = \sqrt{\alpha^2 + \sigma^2}$, $y = x/h$,
$\bar\alpha = \alpha/h$, $\bar\sigma = \sigma/h$; $R = Cov[\epsilon | x_t = x]$ and
$r = \mathrm{tr}\,R$. Along the PF-ODE from $t_0$ (data end) to $T$ (noise end),

$$ \log q_{t_0}(x) = \log q_T(x_T) + d\log\frac{\sigma_T}{\sigma_{t_0}}
                     - \int_{\lambda_T}^{\lambda_{t_0}} r\,d\lambda. \tag{11} $$

Since $\int \bar\alpha^2 d\lambda = \log(h/\sigma)$, that is the same as

$$ \log q_{t_0}(x) = \log q_T(x_T) + d\log\frac{h_T}{h_{t_0}}
                     - \int_{\lambda_T}^{\lambda_{t_0}} (r - d\bar\alpha^2)\,d\lambda, $$

whose integrand vanishes for standard normal data and nearly cancels for data of about unit
variance, where (11) subtracts two large numbers; on a variance-preserving path $h = 1$. It is
integrated jointly with $dy/d\lambda = \bar\alpha\bar\sigma(\bar\sigma m - \bar\alpha\hat\epsilon)$
in the clock $\lambda$, in which all coefficients are bounded by 1. An evaluation of the vector
field takes $m$, $\hat\epsilon$ and $r$ from one call of a trace estimator.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray, Real

from jaxdiff import _check, exact
from jaxdiff._array import Cond, ScalarLike, time_dtype
from jaxdiff._host import host64, is_concrete
from jaxdiff._keys import PROBES, stream
from jaxdiff._passengers import At, Ride, Road, ride, road
from jaxdiff._prepared import Prepared, call, hold_still
from jaxdiff._status import or_nan, status
from jaxdiff.fisher.heads import AbstractTrace, ExactTrace, Hutchinson
from jaxdiff.process import AbstractProcess
from jaxdiff.score import AbstractDenoiser, floating


class LogProb(eqx.Module):
    """The result of a likelihood; all fields gain a leading axis under `jax.vmap`.

    Attributes:
        log_prob: log-likelihood in nats, (); NaN where the solve failed.
        error: standard error of `log_prob` from the random probes, in nats, (): 0 if nothing was
            random, NaN if one probe gives no estimate of it. It knows nothing of the solver's
            error, of the network's, or of the law at the noise end; no derivative flows through it.
        x: state at the noise end, (*dims,).
        result: a `diffrax.RESULTS`.
        steps: steps of the solver, accepted and rejected, ().
    """

    log_prob: Float[Array, "..."]
    error: Float[Array, "..."]
    x: Float[Array, "..."]
    result: dfx.RESULTS
    steps: Int[Array, "..."]


class _Trace(eqx.Module):
    r"""The passenger of a likelihood: $\int(r - d\bar\alpha^2)$, k of them for k probes.

    On a fixed grid the probes are fresh in every step, so that their errors average out along the
    path, but the same in all stages of a step: Runge-Kutta weights can be large and of both signs
    (the squares of Tsit5's sum to 18), and would amplify independent errors. Under a controller
    (where no step has a number) the probes stay the same all along, since it needs a smooth
    right-hand side.
    """

    denoiser: AbstractDenoiser
    trace: AbstractTrace
    cond: Cond
    key: PRNGKeyArray | None

    def __call__(self, at: At, total: Array) -> tuple[Array, Array, Array]:
        key = self.key if self.key is None or at.step is None else stream(self.key, at.step)
        m, eps, r = self.trace(self.denoiser, at.t, at.x, self.cond, key)
        return m, eps, r - at.x.size * (at.alpha / at.h) ** 2


class _Larger(eqx.Module):
    """The norm of the controller, taken of the state and of the integrals: the larger one.

    The state alone does not do: at the mean of Gaussian data it does not move, whatever the step.
    And one norm of all would drown the integrals in the state's d numbers.
    """

    norm: Callable[[Any], Any]

    def __call__(self, error: tuple[Array, Array]) -> Any:
        return jnp.maximum(self.norm(error[0]), self.norm(error[1]))


def _watching_both(controller: Any) -> Any:
    if isinstance(controller, dfx.PIDController):
        return eqx.tree_at(lambda c: c.norm, controller, _Larger(controller.norm))
    if isinstance(controller, dfx.ClipStepSizeController):
        inner = _watching_both(controller.controller)
        return eqx.tree_at(lambda c: c.controller, controller, inner)
    return controller


def _excess(key: PRNGKeyArray, field: Ride, taus: Array, ys: Array) -> Array:
    r"""Return $v^\top R v - r_\theta$ at each time, with one Rademacher probe each."""
    who: Any = field.passenger

    @jax.checkpoint
    def one(piece: tuple[Array, Array, Array]) -> Array:
        j, tau, y = piece
        at = field.at(tau, y)
        _, _, truth = Hutchinson()(who.denoiser, at.t, at.x, who.cond, stream(key, j))
        _, _, guess = who.trace(who.denoiser, at.t, at.x, who.cond, None)
        return truth[0] - guess[0]

    return jax.lax.map(one, (jnp.arange(taus.shape[0]), taus, ys))


class Likelihood(Prepared):
    """A prepared likelihood: a pure function of a sample, a condition and a key.

    Made by `likelihood`. Works under `jit`, `vmap`, `grad` (reverse mode) and sharding; of many
    samples, `jd.many(likelihood, x, cond, key=key)`.

    Attributes:
        model: the denoiser.
        trace: the estimator of r.
        road: grid and solver.
        terminal: the law at the noise end, or None.
        debias: number of random times.
    """

    model: AbstractDenoiser
    trace: AbstractTrace
    road: Road
    terminal: exact.AbstractExact | None
    debias: int = eqx.field(static=True)

    def __call__(
        self,
        x: Float[ArrayLike, "*dims"],
        cond: Cond = None,
        *,
        key: PRNGKeyArray | None = None,
    ) -> LogProb:
        """Return the likelihood of one sample.

        Args:
            x: sample at the last node, (*dims,), floating; in float32 or wider inside.
            cond: condition passed to the denoiser.
            key: a threefry key, for random probes and for `debias`.

        Raises:
            ValueError: if `key` is missing or not threefry.
        """
        x = floating(x)
        if self.trace.stochastic or self.debias or key is not None:
            key = _check.key("likelihood", "key", key)
        return call(_of_one, self, x.astype(time_dtype(x.dtype)), cond, key)


def _of_one(self: Likelihood, x: Array, cond: Cond, key: Any) -> LogProb:
    """Solve for one sample as planned."""
    model = self.model if self.road.live else hold_still(self.model, self.model.process)
    process, trace, debias = model.process, self.trace, self.debias
    road, noise = self.road.cast(x.dtype), None if key is None else stream(key, PROBES)
    lams, (h_T, h_0) = road.lams, (road.scales[0], road.scales[1])
    probes = noise if trace.stochastic else None
    field = Ride(process, _Trace(model, trace, cond, probes))
    y = (x / h_0).astype(x.dtype)
    taus = None
    if debias:
        assert noise is not None
        # streams 0 to M - 1 are of the probes at these times
        uniform = jax.random.uniform(stream(noise, debias), (debias,), lams.dtype)
        taus = lams[-1] - (jnp.arange(debias) + uniform) / debias * (lams[-1] - lams[0])
        taus = jnp.maximum(taus, lams[0])  # round-off alone can bring one below its stratum
    args = (model, road.ts[-1], y, cond, probes)
    k = eqx.filter_eval_shape(trace, *args)[2].shape
    # The integrals start at d, not 0, so that a relative tolerance is a fraction of d nats.
    start = (y, jnp.full(k, float(y.size), y.dtype))
    if road.controller is not None:
        road = eqx.tree_at(lambda road: road.controller, road, _watching_both(road.controller))
    ends = ride(road, field, start, back=True, fresh=probes is not None, see=taus)
    (y, total), seen, result, steps = ends
    minus, x_T = total - start[1], (y * h_T).astype(x.dtype)
    if self.terminal is None:
        log_prob = process.prior_log_prob(x_T, t=road.ts[0])
    else:
        log_prob = self.terminal.log_density(road.ts[0], x_T)
    log_prob = log_prob + x.size * jnp.log(h_T / h_0) + jnp.mean(minus)
    error, hold = jnp.zeros((), x.dtype), jax.lax.stop_gradient  # a root has no slope at 0
    if debias:
        assert noise is not None and taus is not None
        rest = _excess(noise, field, taus, seen[0]) * ((lams[-1] - lams[0]) / debias)
        log_prob, pairs = log_prob - jnp.sum(rest), hold(rest).reshape(-1, 2)
        error = jnp.sqrt(jnp.sum((pairs[:, 0] - pairs[:, 1]) ** 2))
    elif trace.stochastic:
        k = minus.shape[0]
        error = jnp.std(hold(minus), ddof=1) / math.sqrt(k) if k > 1 else jnp.asarray(jnp.nan)
    result = status(result, log_prob)
    hide = lambda a: or_nan(result, a).astype(x.dtype)  # noqa: E731
    return LogProb(hide(log_prob), hide(error), hide(x_T), result, jnp.asarray(steps))


def likelihood(
    model: AbstractDenoiser,
    *,
    ts: Real[ArrayLike, " nodes"] | Sequence[Any],
    solver: dfx.AbstractSolver | None = None,
    trace: AbstractTrace | None = None,
    debias: int = 0,
    controller: dfx.AbstractStepSizeController | None = None,
    terminal: exact.AbstractExact | None = None,
    adjoint: dfx.AbstractAdjoint | None = None,
    max_steps: int = 4096,
) -> Likelihood:
    r"""Prepare $\log q_{t_0}(x)$ of one sample in nats, by the PF-ODE of a denoiser.

    $$ \log q_{t_0}(x) = \log q_T(x_T) + d\log\frac{\sigma_T}{\sigma_{t_0}}
                         - \int_{\lambda_T}^{\lambda_{t_0}} \mathrm{tr}\,R\,d\lambda $$

    with $T$ = `ts[0]` and $t_0$ = `ts[-1]`: the grid of a sampler, walked from its last node to its
    first. This is the density *of the diffused law* $q_{t_0}$, evaluated at `x` as it is: where
    $\alpha_{t_0} \approx 1$, the density of the data smoothed by noise of $\sigma_{t_0}$ (the
    early-stopping convention). State $\sigma_{t_0}$ with every figure; to score the smoothed law
    consistently, pass `process.perturb(key, ts[-1], x0)[0]`.

    What to choose: `ExactTrace()` up to some tens of dimensions; `Hutchinson(probes=...)` on a
    fixed grid beyond; a trained `TraceHead` where there is one, with `debias` to remove its bias.
    On a fixed grid each step draws fresh probes (and so evaluates its first stage anew), whose
    errors average out: one probe on an 8-dimensional mixture left a standard deviation of 1.6 nats
    when kept along the path, and 0.4 when drawn anew in each of 100 steps of Tsit5. An adaptive
    solver needs a smooth right-hand side and keeps its probes, so average several of them there.
    Many small steps beat a high order: the probes' error falls as one over the root of the number
    of *steps*.

    Random-time debiasing, `debias=M`, makes any deterministic estimate $r_\theta$ unbiased:

    $$ \int r\,d\lambda \approx \int r_\theta\,d\lambda + \frac LM\sum_{j=1}^M
       \left(v_j^\top R v_j - r_\theta\right)(x_{\tau_j}, \tau_j) $$

    with $\tau_j$ uniform in the j-th of M equal parts of $[\lambda_T, \lambda_{t_0}]$, of length L
    in all, $x_{\tau_j}$ from the solver's dense output, and one Rademacher probe $v_j$ each.

    Cost: one call of the trace estimator per evaluation of the vector field, and 2M evaluations
    and M forward derivatives with `debias`. A gradient, with respect to `x` or to a network inside
    `model`, stores one state per step.

    Args:
        model: the denoiser.
        ts: strictly decreasing times of finite log-SNR, (nodes,), such as
            `process.grid(n, "logsnr")`. One step per interval, or, with a `controller`, only the
            two ends.
        solver: a diffrax ODE solver; `diffrax.Tsit5()` by default.
        trace: the estimator of $r$, of `jaxdiff.fisher`; `ExactTrace()` by default.
        debias: M, the number of random times, even; 0 for none. `trace` must be deterministic.
        controller: a diffrax step-size controller. A PID controller bounds the larger of the
            errors of the state and of the integral, the latter relative to d nats.
        terminal: the law $q_T$ at the noise end, an exact denoiser of the same path: data of the
            same mean and covariance, `exact.gaussian(process, mean, cov)`, for instance. By
            default $N(0, \sigma_T^2 I)$: then `log_prob` is wrong by a first-order term in
            $\alpha_T/\sigma_T$ at each point, and on average (for `ts[0]` = `t_max`) too low by
            at most `process.leak` nats. Matching two moments leaves a third-order term.
        adjoint: a diffrax adjoint, for the loop of diffrax, which is then used on a fixed grid too.
        max_steps: bound on the steps under a controller.

    Returns:
        The `Likelihood`, a function `(x, cond=None, *, key=None) -> LogProb`. The `error` is the
        standard error over independent probes, or for `debias` the root of
        $\frac{L^2}{M^2}\sum_j (\delta_{2j} - \delta_{2j+1})^2$, with
        $\delta$ the differences in brackets above: conservative, since neighbouring strata differ
        in their means as well. Nothing raises inside jit: a failed solve gives NaN and a `result`.

    Raises:
        ValueError: before any computation, if an argument is wrong: `ts` is not a grid of the
            process or has an end of infinite log-SNR, the solver is not one of diffrax's for ODEs,
            or `debias` is odd or given with a random `trace`.

    Example:
        >>> import jaxdiff as jd
        >>> vp = jd.process.VP()
        >>> unit = jd.exact.gaussian(vp, jnp.zeros(2), 1.0)
        >>> out = likelihood(unit, ts=vp.grid(10, "logsnr"))(jnp.zeros(2))
        >>> round(float(out.log_prob), 3)  # -log(2 pi)
        -1.838

    References:
        Song et al. 2021 (2011.13456), eq. 39; Wang et al. 2025 (2505.23264); Grathwohl et al. 2019
        (1810.01367) for random probes; Cochran 1977, "Sampling Techniques", sec. 5A.12 for
        collapsed strata.
    """
    where = "likelihood"
    path = road(where, model, ts, solver, controller, adjoint, max_steps)
    trace = ExactTrace() if trace is None else trace
    if not isinstance(trace, AbstractTrace):
        raise _check.bad(where, "trace", "a trace estimator of jaxdiff.fisher", repr(trace))
    _check.whole(where, "debias", debias, 0)
    if debias % 2:
        raise _check.bad(where, "debias", "even, to pair its strata", debias)
    if debias and trace.stochastic:
        expected = "deterministic under debias, which draws its own probes"
        raise _check.bad(where, "trace", expected, type(trace).__name__)
    if terminal is not None and not isinstance(terminal, exact.AbstractExact):
        expected = "an exact denoiser, as exact.gaussian(process, mean, cov)"
        raise _check.bad(where, "terminal", expected, repr(terminal))
    if terminal is not None:
        _same_path(model.process, terminal.process, path.ts[0])
    return Likelihood(model, trace, path, terminal, debias)


def _same_path(process: AbstractProcess, other: AbstractProcess, t: Any) -> None:
    """Raise ValueError if another process has another law at time `t`."""
    if is_concrete(process, other, t):
        ours, theirs = (host64(_scales, p, np.float64(t)) for p in (process, other))
        if not np.allclose(ours, theirs, rtol=1e-5):
            got = f"(alpha, sigma) = {tuple(map(float, theirs))} at t={float(t):g}"
            expected = f"of the process of denoiser, {tuple(map(float, ours))}"
            raise _check.bad("likelihood", "terminal", expected, got)


def _scales(process: AbstractProcess, t: Any) -> tuple[Any, Any]:
    return process.alpha(t), process.sigma(t)


def dequantise(
    key: PRNGKeyArray, x: Float[ArrayLike, "*dims"], width: ScalarLike
) -> Float[Array, "*dims"]:
    r"""Add uniform noise, $x + U(-w/2, w/2)$, to data of discrete levels that are w apart.

    Then $\int_{cell} p$, the probability of a level under a continuous model, is bounded from
    below by the mean of $\log p(x + u) + d\log w$ (Jensen): a lower bound on the discrete
    log-likelihood, an upper bound on the bits per dimension.

    Args:
        key: consumed by one uniform draw.
        x: data at their levels, (*dims,), one sample or more.
        width: the distance w of two levels, ().

    Returns:
        The noisy data, (*dims,) in the dtype of `x`.

    Raises:
        ValueError: if `width` is not positive.

    Example:
        >>> pixels = jnp.arange(256.0)  # of an 8-bit image
        >>> noisy = dequantise(jax.random.key(0), pixels / 127.5 - 1, 2 / 255)
        >>> bool(jnp.all(jnp.round((noisy + 1) * 127.5) == pixels))
        True

    References:
        Theis, van den Oord, Bethge 2016 (1511.01844), sec. 3.1; Ho et al. 2019 (1902.00275).
    """
    key = _check.key("dequantise", "key", key)
    _width("dequantise", width)
    x = floating(x)
    return (x + width * jax.random.uniform(key, x.shape, x.dtype, -0.5, 0.5)).astype(x.dtype)


def bits_per_dim(log_prob: Float[ArrayLike, "..."], d: int, width: ScalarLike) -> Array:
    r"""Return bits per dimension of discrete data, $-(\log p(x) + d\log w)/(d\log 2)$.

    An upper bound on those of the discrete data if `log_prob` is that of dequantised data. The
    unit of the data cancels: data and `width` scaled by c leave it unchanged.

    Args:
        log_prob: log-likelihood of dequantised data in nats, any shape.
        d: number of dimensions of one sample.
        width: the distance w of two levels, (): 2/255 for 8-bit images scaled by x/127.5 - 1, 1/256
            for (x + 1/2)/256.

    Returns:
        Bits per dimension, of the shape of `log_prob`.

    Raises:
        ValueError: if `d` is not a positive whole number or `width` is not positive.

    Example:
        >>> uniform = -3 * math.log(2.0)  # the log density of U(-1, 1)^3
        >>> round(float(bits_per_dim(uniform, 3, 2 / 256)), 6)
        8.0

    References:
        Theis, van den Oord, Bethge 2016 (1511.01844), sec. 3.1.
    """
    _check.whole("bits_per_dim", "d", d, 1)
    _width("bits_per_dim", width)
    return -(floating(log_prob) / d + jnp.log(width)) / math.log(2)


def _width(where: str, width: Any) -> None:
    if is_concrete(width) and not (np.ndim(width) == 0 and 0 < float(width) < np.inf):
        raise _check.bad(where, "width", "a positive number", repr(width))
