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

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PRNGKeyArray, Real

from jaxdiff import _check, exact, grids
from jaxdiff._array import Cond, ScalarLike, time_dtype
from jaxdiff._host import host64, is_concrete
from jaxdiff._keys import PROBES, stream
from jaxdiff.fisher.heads import AbstractTrace, ExactTrace, Hutchinson
from jaxdiff.process import AbstractProcess
from jaxdiff.score import AbstractDenoiser, floating
from jaxdiff.solvers.engine import AbstractGridSolver
from jaxdiff.solvers.plan import Options, Plan, plan_solve
from jaxdiff.solvers.terms import log_snr_drift


class LogProb(eqx.Module):
    """The result of `log_prob`; all fields gain a leading axis under `jax.vmap`.

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


class _Path(eqx.Module):
    r"""The vector field of $(y, \int(r - d\bar\alpha^2))$ in the clock $\lambda$.

    `args` is the number of the step on a fixed grid: there the probes are fresh in every step, so
    that their errors average out along the path, but the same in all stages of a step: Runge-Kutta
    weights can be large and of both signs (the squares of Tsit5's sum to 18), and would amplify
    independent errors. Under a controller (None) the probes stay the same all along, since it
    needs a smooth right-hand side.
    """

    denoiser: AbstractDenoiser
    trace: AbstractTrace
    cond: Cond
    key: PRNGKeyArray | None

    def at(self, lam: Any) -> tuple[Any, Any, Any, Any]:
        r"""Return $t$, $\alpha$, $\sigma$ and $h$."""
        process = self.denoiser.process
        t = process.t_of_lam(lam)
        alpha, sigma = process.alpha(t), process.sigma(t)
        return t, alpha, sigma, jnp.hypot(alpha, sigma)

    def __call__(self, lam: Any, state: tuple[Array, Array], args: Any = None) -> Any:
        """Return the derivatives of the state and of the k integrals."""
        y, total = state
        t, alpha, sigma, h = self.at(lam)
        key = self.key if self.key is None or args is None else stream(self.key, args)
        m, eps, r = self.trace(self.denoiser, t, (h * y).astype(y.dtype), self.cond, key)
        dy = log_snr_drift(alpha, sigma, m, eps)
        return dy.astype(y.dtype), (r - y.size * (alpha / h) ** 2).astype(total.dtype)


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


def _stepwise(plan: Plan, path: _Path, nodes: Array, state: Any) -> Any:
    """Integrate over a grid with probes of their own in every step; return the end and a status.

    A step of diffrax does not know its number, and a stage at its end looks like the next step's
    first; so the steps are made here, each from a fresh start (`made_jump`).
    """
    solver, term = plan.solver, dfx.ODETerm(path)
    n = jnp.arange(len(nodes) - 1)
    inner = solver.init(term, nodes[0], nodes[1], state, n[0])

    @functools.partial(jax.checkpoint, prevent_cse=False)  # a gradient keeps states, not networks
    def body(carry: Any, row: Any) -> tuple[Any, None]:
        (state, inner, result), (i, lam0, lam1) = carry, row
        made_jump = jnp.asarray(True)
        state, _, _, inner, new = solver.step(term, lam0, lam1, state, i, inner, made_jump)
        result = dfx.RESULTS.where(result == dfx.RESULTS.successful, new, result)
        return (state, inner, result), None

    start: Any = (state, inner, dfx.RESULTS.successful)
    state, _, result = jax.lax.scan(body, start, (n, nodes[:-1], nodes[1:]))[0]
    return jax.tree.map(lambda a: a[None], state), result, jnp.asarray(len(n))


def _solve(plan: Plan, path: _Path, y: Array, taus: Array | None) -> Any:
    """Integrate from data to noise; return the states at `taus` and the end, and the rest."""
    nodes = jnp.asarray(plan.nodes)[::-1]
    args = (path.denoiser, nodes[0], y, path.cond, path.key)
    k = eqx.filter_eval_shape(path.trace, *args)[2].shape
    # The integrals start at d, not 0, so that a relative tolerance is a fraction of d nats.
    start = (y, jnp.full(k, float(y.size), y.dtype))
    if plan.controller is None and path.key is not None:
        (ys, total), result, steps = _stepwise(plan, path, nodes, start)
        return ys, total[-1] - start[1], result, steps
    if plan.controller is None:
        n = nodes.shape[0] - 1
        controller, max_steps = dfx.StepTo(nodes), n
        # one checkpoint per step: diffrax's logarithmic default was measured 2-8x slower
        adjoint = dfx.RecursiveCheckpointAdjoint(checkpoints=n)
    else:
        controller, max_steps = _watching_both(plan.controller), plan.max_steps
        adjoint = dfx.RecursiveCheckpointAdjoint()
    solution = dfx.diffeqsolve(
        dfx.ODETerm(path),
        plan.solver,
        nodes[0],
        nodes[-1],
        None,
        start,
        saveat=dfx.SaveAt(t1=True) if taus is None else dfx.SaveAt(ts=taus, t1=True),
        stepsize_controller=controller,
        adjoint=adjoint if plan.adjoint is None else plan.adjoint,
        max_steps=max_steps,
        throw=False,
    )
    ys, total = solution.ys  # type: ignore
    return ys, total[-1] - start[1], solution.result, solution.stats["num_steps"]


def _excess(key: PRNGKeyArray, path: _Path, taus: Array, ys: Array) -> Array:
    r"""Return $v^\top R v - r_\theta$ at each time, with one Rademacher probe each."""

    @jax.checkpoint
    def one(piece: tuple[Array, Array, Array]) -> Array:
        j, tau, y = piece
        t, _, _, h = path.at(tau)
        x = (h * y).astype(y.dtype)
        _, _, truth = Hutchinson()(path.denoiser, t, x, path.cond, stream(key, j))
        _, _, guess = path.trace(path.denoiser, t, x, path.cond, None)
        return truth[0] - guess[0]

    return jax.lax.map(one, (jnp.arange(taus.shape[0]), taus, ys))


def log_prob_of(
    key: PRNGKeyArray | None,
    denoiser: AbstractDenoiser,
    x: Array,
    plan: Plan,
    trace: AbstractTrace,
    cond: Cond,
    terminal: exact.AbstractExact | None,
    debias: int,
) -> LogProb:
    """Solve for one sample as planned."""
    process, ts = denoiser.process, jnp.asarray(plan.ts)
    lams = jnp.asarray(plan.nodes)
    noise = None if key is None else stream(key, PROBES)
    probes = noise if trace.stochastic else None
    path = _Path(denoiser, trace, cond, probes)
    taus = None
    if debias:
        assert noise is not None
        # streams 0 to M - 1 are of the probes at these times
        uniform = jax.random.uniform(stream(noise, debias), (debias,), lams.dtype)
        taus = lams[-1] - (jnp.arange(debias) + uniform) / debias * (lams[-1] - lams[0])
        taus = jnp.maximum(taus, lams[0])  # round-off alone can bring one below its stratum
    ys, minus, result, steps = _solve(plan, path, (x * plan.scales[1]).astype(x.dtype), taus)
    x_T = (ys[-1] / plan.scales[0]).astype(x.dtype)
    if terminal is None:
        log_prob = process.prior_log_prob(x_T, t=ts[0])
    else:
        log_prob = terminal.log_density(ts[0], x_T)
    log_prob = log_prob - x.size * jnp.log(plan.scales[0] / plan.scales[1])
    log_prob = log_prob + jnp.mean(minus)
    error, hold = jnp.zeros((), x.dtype), jax.lax.stop_gradient  # a root has no slope at 0
    if debias:
        assert noise is not None and taus is not None
        rest = _excess(noise, path, taus, ys[:-1]) * ((lams[-1] - lams[0]) / debias)
        log_prob, pairs = log_prob - jnp.sum(rest), hold(rest).reshape(-1, 2)
        error = jnp.sqrt(jnp.sum((pairs[:, 0] - pairs[:, 1]) ** 2))
    elif trace.stochastic:
        k = minus.shape[0]
        error = jnp.std(hold(minus), ddof=1) / math.sqrt(k) if k > 1 else jnp.asarray(jnp.nan)
    good = (result == dfx.RESULTS.successful) & jnp.isfinite(log_prob)
    nonfinite: Any = dfx.RESULTS.nonfinite
    result = dfx.RESULTS.where((result == dfx.RESULTS.successful) & ~good, nonfinite, result)
    hide = lambda a: jnp.where(good, a, jnp.nan).astype(x.dtype)  # noqa: E731
    return LogProb(hide(log_prob), hide(error), hide(x_T), result, jnp.asarray(steps))


_log_prob_jit = eqx.filter_jit(log_prob_of)


def log_prob(
    denoiser: AbstractDenoiser,
    x: Float[ArrayLike, "*dims"],
    *,
    ts: Real[ArrayLike, " nodes"] | Sequence[Any],
    solver: dfx.AbstractSolver | None = None,
    cond: Cond = None,
    trace: AbstractTrace | None = None,
    key: PRNGKeyArray | None = None,
    debias: int = 0,
    controller: dfx.AbstractStepSizeController | None = None,
    terminal: exact.AbstractExact | None = None,
    adjoint: dfx.AbstractAdjoint | None = None,
    max_steps: int = 4096,
) -> LogProb:
    r"""Return $\log q_{t_0}(x)$ of one sample in nats, by the PF-ODE of a denoiser.

    $$ \log q_{t_0}(x) = \log q_T(x_T) + d\log\frac{\sigma_T}{\sigma_{t_0}}
                         - \int_{\lambda_T}^{\lambda_{t_0}} \mathrm{tr}\,R\,d\lambda $$

    with $T$ = `ts[0]` and $t_0$ = `ts[-1]`: the grid of `draw`, walked from its last node to its
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
    `denoiser`, stores one state per step.

    Args:
        denoiser: the denoiser.
        x: sample at time `ts[-1]`, (*dims,), floating; in float32 or wider inside.
        ts: strictly decreasing times of finite log-SNR, (nodes,), such as
            `process.grid(n, "logsnr")`. One step per interval, or, with a `controller`, only the
            two ends.
        solver: a diffrax ODE solver; `diffrax.Tsit5()` by default.
        cond: condition passed to the denoiser.
        trace: the estimator of $r$, of `jaxdiff.fisher`; `ExactTrace()` by default.
        key: a threefry key, for random probes and for `debias`.
        debias: M, the number of random times, even; 0 for none. `trace` must be deterministic.
        controller: a diffrax step-size controller. A PID controller bounds the larger of the
            errors of the state and of the integral, the latter relative to d nats.
        terminal: the law $q_T$ at the noise end, an exact denoiser of the same path: data of the
            same mean and covariance, `exact.gaussian(process, mean, cov)`, for instance. By
            default $N(0, \sigma_T^2 I)$: then `log_prob` is wrong by a first-order term in
            $\alpha_T/\sigma_T$ at each point, and on average (for `ts[0]` = `t_max`) too low by
            at most `process.leak` nats. Matching two moments leaves a third-order term.
        adjoint: a diffrax adjoint; the default has reverse mode only. Not used for random probes
            on a fixed grid, which run in a scan of single steps: reverse mode only, too.
        max_steps: bound on the steps under a controller.

    Returns:
        `LogProb` with `log_prob: ()`. Its `error` is the standard error over independent probes,
        or for `debias` the root of $\frac{L^2}{M^2}\sum_j (\delta_{2j} - \delta_{2j+1})^2$, with
        $\delta$ the differences in brackets above: conservative, since neighbouring strata differ
        in their means as well. Nothing raises inside jit: a failed solve gives NaN and a `result`.

    Raises:
        ValueError: before any computation, if an argument is wrong: `ts` is not a grid of the
            process or has an end of infinite log-SNR, the solver is not one of diffrax's for ODEs,
            `key` is missing or not threefry, or `debias` is odd or given with a random `trace`.

    Example:
        >>> import jaxdiff as jd
        >>> vp = jd.process.VP()
        >>> unit = jd.exact.gaussian(vp, jnp.zeros(2), 1.0)
        >>> out = log_prob(unit, jnp.zeros(2), ts=vp.grid(10, "logsnr"))
        >>> round(float(out.log_prob), 3)  # -log(2 pi)
        -1.838

    References:
        Song et al. 2021 (2011.13456), eq. 39; Wang et al. 2025 (2505.23264); Grathwohl et al. 2019
        (1810.01367) for random probes; Cochran 1977, "Sampling Techniques", sec. 5A.12 for
        collapsed strata.
    """
    x = floating(x)
    x = x.astype(time_dtype(x.dtype))
    options = Options(False, False, None, "ode", "lam", controller, adjoint, max_steps)
    plan, trace, key = plan_log_prob(
        "log_prob", denoiser, x.dtype, ts, solver, trace, key, debias, terminal, options
    )
    return _log_prob_jit(key, denoiser, x, plan, trace, cond, terminal, debias)


def plan_log_prob(
    where: str,
    denoiser: Any,
    dtype: Any,
    ts: Any,
    solver: Any,
    trace: Any,
    key: Any,
    debias: Any,
    terminal: Any,
    options: Options,
) -> tuple[Plan, AbstractTrace, PRNGKeyArray | None]:
    """Check the arguments of `log_prob` and compute what all samples share."""
    solver = dfx.Tsit5() if solver is None else solver
    if isinstance(solver, AbstractGridSolver | dfx.AbstractSRK):
        expected = "an ODE solver of diffrax, as diffrax.Tsit5()"
        raise _check.bad(where, "solver", expected, type(solver).__name__)
    if isinstance(denoiser, AbstractDenoiser):
        _finite_ends(denoiser.process, ts)
    plan = plan_solve(where, denoiser, solver, ts, dtype, options)
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
        _same_path(denoiser.process, terminal.process, plan.ts[0])
    if trace.stochastic or debias or key is not None:
        key = _check.key(where, "key", key)
    return plan, trace, key


def _same_path(process: AbstractProcess, other: AbstractProcess, t: Any) -> None:
    """Raise ValueError if another process has another law at time `t`."""
    if is_concrete(process, other, t):
        ours, theirs = (host64(_scales, p, np.float64(t)) for p in (process, other))
        if not np.allclose(ours, theirs, rtol=1e-5):
            got = f"(alpha, sigma) = {tuple(map(float, theirs))} at t={float(t):g}"
            expected = f"of the process of denoiser, {tuple(map(float, ours))}"
            raise _check.bad("log_prob", "terminal", expected, got)


def _scales(process: AbstractProcess, t: Any) -> tuple[Any, Any]:
    return process.alpha(t), process.sigma(t)


def _finite_ends(process: AbstractProcess, ts: Any) -> None:
    """Raise ValueError if log-SNR is infinite at an end of a grid."""
    ts = grids.check(process, ts, where="log_prob")
    if not is_concrete(process, ts):
        return
    for i, advice in ((0, "start below it"), (-1, "end above it: what has a density is q_t")):
        if not np.isfinite(host64(process.lam, np.float64(ts[i]))):
            got = f"t={float(ts[i])!r}; {advice}"
            raise _check.bad("log_prob", f"ts[{i}]", "a time of finite log-SNR", got)


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
