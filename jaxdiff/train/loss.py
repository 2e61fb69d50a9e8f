r"""Denoising losses: one error, many weights, and where the times are drawn.

Notation of `jaxdiff.score`: every prediction is $o = a\,m + b\,\hat\epsilon$. At fixed
$x = \alpha m + \sigma\hat\epsilon$ an error in one is an error in the other,
$\delta m = -(\sigma/\alpha)\,\delta\epsilon$, so that

$$ \delta\epsilon = \frac{\alpha}{\alpha b - \sigma a}\,\delta o $$

which is $-\delta m/\bar\sigma$ for `"x0"` with $\bar\sigma = \sigma/\alpha = e^{-\lambda}$,
$\alpha\,\delta v/(\alpha^2 + \sigma^2)$ for `"v"`, and $(1 - t)\,\delta o$ for the velocity of a
straight path. Prediction, weight and sampling of times are three independent arguments: the loss

$$ L = E_{t, \epsilon}\; w(\lambda)\,|\hat\epsilon - \epsilon|^2 $$

has the total weight $w(\lambda)\,p(\lambda)$, $p$ being the density that the times have in
$\lambda$. `trace_loss` trains the second moment of the same error, for `jaxdiff.fisher.TraceHead`.

Losses of one example take a pair $(x_0, \epsilon)$, wherever it comes from; those of a batch draw
the times, and the noise where none is given. Two weights, two names: `weight` is the function
$w(\lambda)$, `example_weight` a number for every pair.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array, Float, PRNGKeyArray

from jaxdiff import _check, score
from jaxdiff._array import Cond, Scalar, ScalarLike
from jaxdiff._host import host64, is_concrete
from jaxdiff._keys import stream
from jaxdiff.fisher.heads import TraceHead
from jaxdiff.process import AbstractProcess

__all__ = [
    "WEIGHTS",
    "SampleTime",
    "Weight",
    "batch_loss",
    "batch_trace_loss",
    "denoising_loss",
    "edm",
    "lognormal_time",
    "logsnr_time",
    "min_snr",
    "p2",
    "sigmoid",
    "trace_loss",
    "uniform_time",
]

Weight: TypeAlias = Callable[[Any], Any]
SampleTime: TypeAlias = Callable[[AbstractProcess, Any], Any]


def edm(sigma_data: ScalarLike = 0.5) -> Weight:
    r"""Return $w = 1 + \bar\sigma^2/\sigma_d^2$ (Karras et al. 2022, 2206.00364, Table 1)."""
    return lambda lam: 1 + jnp.exp(-2 * lam) / sigma_data**2


def min_snr(gamma: ScalarLike = 5.0) -> Weight:
    r"""Return $w = \min(\mathrm{SNR}, \gamma)/\mathrm{SNR}$ (Hang et al. 2023, 2303.09556)."""
    return lambda lam: jnp.minimum(1.0, gamma * jnp.exp(-2 * lam))


def p2(k: ScalarLike = 1.0, gamma: ScalarLike = 1.0) -> Weight:
    r"""Return $w = (k + \mathrm{SNR})^{-\gamma}$ (Choi et al. 2022, 2204.00227)."""
    return lambda lam: (k + jnp.exp(2 * lam)) ** -gamma


def sigmoid(b: ScalarLike = 2.0) -> Weight:
    r"""Return $w = 1/(1 + e^{2\lambda - b})$, monotone (Kingma, Gao 2023, 2303.00848).

    The paper's weight is the total, $w\,p$: draw the times with `logsnr_time`.
    """
    return lambda lam: jax.nn.sigmoid(b - 2 * lam)


# What each loss of the literature asks of the eps error, as a function of lam.
WEIGHTS: dict[str, Weight] = {
    "eps": jnp.ones_like,  # Ho, Jain, Abbeel 2020 (2006.11239), L_simple; ELBO with logsnr_time
    "x0": lambda lam: jnp.exp(-2 * lam),
    "v": lambda lam: 1 + jnp.exp(-2 * lam),  # Salimans, Ho 2022 (2202.00512), VP
    "flow": lambda lam: (1 + jnp.exp(-lam)) ** 2,  # Lipman et al. 2023 (2210.02747), straight path
    "debiased": lambda lam: jnp.exp(-lam),  # Yu et al. 2023 (2310.08442)
    "truncated": lambda lam: jnp.maximum(1.0, jnp.exp(-2 * lam)),  # Salimans, Ho 2022
    "edm": edm(),
    "min_snr": min_snr(),
    "p2": p2(),
    "sigmoid": sigmoid(),
}


def uniform_time(process: AbstractProcess, u: ScalarLike) -> Scalar:
    r"""Map a uniform `u` to $t = t_{min} + u\,(t_{max} - t_{min})$."""
    return jnp.asarray(process.t_min + u * (process.t_max - process.t_min))


def logsnr_time(process: AbstractProcess, u: ScalarLike) -> Scalar:
    r"""Map a uniform `u` to the time at which $\lambda$ is uniform over the process.

    Raises:
        ValueError: if $\lambda$ is infinite at an end of the process; give it another range.
    """
    if is_concrete(process):
        ends = [float(host64(process.lam, float(t))) for t in (process.t_min, process.t_max)]
        if not all(map(math.isfinite, ends)):
            expected = "of finite log-SNR at both ends (set t_min, t_max)"
            raise _check.bad("logsnr_time", "process", expected, f"lam = {ends}")
    low, high = process.lam(process.t_max), process.lam(process.t_min)
    return process.t_of_lam(high + u * (low - high))


def lognormal_time(mean: ScalarLike = -1.2, std: ScalarLike = 1.2) -> SampleTime:
    r"""Return the map from a uniform `u` to times with $\log\bar\sigma \sim N(mean, std^2)$.

    The normal law is conditioned on the range of the process, so that no time leaves it.

    References:
        Karras, Aittala, Aila, Laine 2022 (2206.00364), Table 1.
    """

    def sample_t(process: AbstractProcess, u: ScalarLike) -> Scalar:
        low, high = (ndtr((-process.lam(t) - mean) / std) for t in (process.t_min, process.t_max))
        log_sbar = mean + std * ndtri(low + u * (high - low))
        return process.t_of_lam(-log_sbar)

    return sample_t


def denoising_loss(
    denoiser: score.Denoiser,
    x0: Float[Array, "*dims"],
    eps: Float[Array, "*dims"],
    cond: Cond = None,
    *,
    t: ScalarLike,
    weight: Weight | None = None,
) -> Scalar:
    r"""Return the squared error at the noisy point of one pair, averaged over its dimensions.

    $$ x_t = \alpha x_0 + \sigma\epsilon, \qquad
       \frac1d\,|o_\theta(t, x_t) - (a\,x_0 + b\,\epsilon)|^2 \quad\text{or}\quad
       \frac{w(\lambda)}{d}\,|\hat\epsilon_\theta - \epsilon|^2 $$

    The weighted form is computed from the network's own prediction by the factor of the module's
    head; it is finite wherever the product is: at $\alpha = 0$ for `"eps"` and `"score"`, at both
    ends for `"v"` and `"velocity"`. Cost: one network call.

    Args:
        denoiser: the path and the network, with what the network predicts.
        x0: clean example, (*dims,).
        eps: its noise, (*dims,): a draw of `process.noise`, or that of a coupling.
        cond: condition passed to the network.
        t: time, ().
        weight: $w$, a function of $\lambda$ (`WEIGHTS`, `min_snr`, ...); None for weight 1 on
            whatever the network predicts.

    Returns:
        The loss, (), in float32 or wider.

    Raises:
        ValueError: if `denoiser` has no network, `weight` is no function or `eps` is not of the
            shape of `x0`.
    """
    if not isinstance(denoiser, score.Denoiser):
        expected = "a Denoiser with a network to train"
        raise _check.bad("denoising_loss", "denoiser", expected, type(denoiser).__name__)
    if weight is not None and not callable(weight):
        raise _check.bad("denoising_loss", "weight", "a function of lam, as WEIGHTS has", weight)
    process, kind = denoiser.process, denoiser.predicts
    x = process.mix(t, x0, eps)
    a, b = score.mixing(process, kind, t)
    alpha, sigma = process.alpha(t), process.sigma(t)
    out = denoiser.raw(t, x, cond)
    # The score enters as sigma * score (its b is -1), which is finite at sigma = 0.
    error = (sigma * out if kind == "score" else out) - (a * x0 + b * eps)
    square = jnp.mean(error.astype(jnp.promote_types(error.dtype, jnp.float32)) ** 2)
    if weight is None:
        return square / sigma**2 if kind == "score" else square
    if kind in ("eps", "score"):  # alpha / (alpha b - sigma a) is 1, at alpha = 0 too
        return weight(process.lam(t)) * square
    return weight(process.lam(t)) * (alpha / (alpha * b - sigma * a)) ** 2 * square


def batch_loss(
    key: PRNGKeyArray,
    denoiser: score.Denoiser,
    x0: Float[Array, "n *dims"],
    cond: Cond = None,
    *,
    eps: Float[Array, "n *dims"] | None = None,
    sample_t: SampleTime = uniform_time,
    weight: Weight | None = None,
    example_weight: Float[Array, " n"] | None = None,
) -> tuple[Scalar, Float[Array, " n"]]:
    r"""Return the mean of `denoising_loss` over a batch, at stratified times.

    $$ u_i = (i + U)/n, \qquad L = \frac1n \sum_i w_i\,\ell_i $$

    with one $U$ uniform on $[0, 1)$ for the whole batch: every $u_i$ is uniform over many batches,
    and the times of one batch cover the path evenly (Kingma et al. 2021, 2107.00630, app. I.1).
    Shuffle the examples, since their order decides which part of the path they see. Cost: one
    network call on the batch.

    Without `eps`, example `i` draws its noise by `process.noise(fold_in(key, i), ...)`. With it,
    the pairs $(x_0, \epsilon)$ are taken as they come, and the key decides the times only: a
    coupling, a pool of pairs or a model's own trajectories, each pair with its weight.

    Args:
        key: a key; give every step another one.
        denoiser: the path and the network.
        x0: clean examples, (n, *dims).
        cond: condition whose leaves have a leading axis n.
        eps: noise of the examples, (n, *dims); drawn by default.
        sample_t: map `(process, u) -> t` of $u \in (0, 1)$: `uniform_time`, `logsnr_time`,
            `lognormal_time()`.
        weight: see `denoising_loss`; a function of $\lambda$.
        example_weight: $w_i$, (n,), one number per pair; for instance 1 or 0, or importance weights
            of mean 1.

    Returns:
        The mean loss, (), and the loss of each example before `example_weight`, (n,).

    Raises:
        ValueError: if `x0` is not floating, `eps` is not of its shape or `example_weight` is not of
            shape (n,); as `denoising_loss`.

    Example:
        A coupling maps `(key, x0, noise, cond)` to `(x0, noise, weight)`. This one pairs numbers
        with numbers in increasing order, which is optimal transport on a line:

        >>> from jaxdiff.process import Rectified
        >>> def in_order(key, x0, noise, cond):
        ...     return jnp.sort(x0, axis=0), jnp.sort(noise, axis=0), jnp.ones(len(x0))
        >>> flow = score.Denoiser(Rectified(), lambda t, x, cond: 0 * x, "velocity")
        >>> keys, x0 = jax.random.split(jax.random.key(0), 3), jnp.arange(4.0)[:, None]
        >>> noise = flow.process.noise(keys[0], x0.shape)
        >>> x0, eps, w = in_order(keys[1], x0, noise, None)
        >>> loss, each = batch_loss(keys[2], flow, x0, eps=eps, example_weight=w)
        >>> bool(jnp.allclose(each, ((eps - x0) ** 2)[:, 0]))
        True
    """
    return _stratified(
        "batch_loss",
        lambda x0, eps, cond, t: denoising_loss(denoiser, x0, eps, cond, t=t, weight=weight),
        key,
        denoiser.process,
        x0,
        eps,
        cond,
        sample_t,
        example_weight,
    )


def trace_loss(
    head: TraceHead,
    denoiser: score.AbstractDenoiser,
    x0: Float[Array, "*dims"],
    eps: Float[Array, "*dims"],
    cond: Cond = None,
    *,
    t: ScalarLike,
) -> Scalar:
    r"""Return the squared error of a trace head at the noisy point of one pair.

    $$ x_t = \alpha x_0 + \sigma\epsilon, \qquad \big(h_\theta(t, x_t) - y\big)^2, \qquad
       y = \begin{cases} |x_0|^2/d & \text{raw} \\
         |\epsilon - \hat\epsilon|^2/d & \text{residual} \\
         (|x_0 - m|^2 + |\epsilon - \hat\epsilon|^2)/d & \text{preconditioned} \end{cases} $$

    whose minimiser is the conditional moment $E[y | x_t]$ of `TraceHead`'s table; the last is
    $(\alpha^2 + \sigma^2)/\sigma^2\,|x_0 - m|^2/d$, written so that nothing cancels. The denoiser
    is frozen: no gradient reaches it, its features or its process. Cost: one network call.

    Args:
        head: what is trained; its `kind` decides the target.
        denoiser: a trained or an exact denoiser.
        x0: clean example, (*dims,).
        eps: its noise, (*dims,).
        cond: condition passed to both networks.
        t: time, ().

    Returns:
        The loss, (), in float32 or wider.

    Raises:
        ValueError: if `head` is no `TraceHead`, `denoiser` no denoiser or `eps` not of the shape of
            `x0`.

    References:
        Wang et al. 2025 (2505.23264) for `"raw"`; Bao et al. 2022 (2206.07309).
    """
    if not isinstance(head, TraceHead):
        raise _check.bad("trace_loss", "head", "a TraceHead", type(head).__name__)
    if not isinstance(denoiser, score.AbstractDenoiser):
        raise _check.bad("trace_loss", "denoiser", "a jaxdiff denoiser", type(denoiser).__name__)
    x = denoiser.process.mix(t, x0, eps)
    # Stopped here, not at the parameters: a network may hold those in a closure.
    frozen = (denoiser.process.lam(t), *head.inputs(denoiser, t, x, cond))
    lam, m, guess, inputs = jax.lax.stop_gradient(frozen)
    moment = head.moment(lam, inputs, cond)
    return (moment - head.target(x0, eps, m, guess)) ** 2


def batch_trace_loss(
    key: PRNGKeyArray,
    head: TraceHead,
    denoiser: score.AbstractDenoiser,
    x0: Float[Array, "n *dims"],
    cond: Cond = None,
    *,
    eps: Float[Array, "n *dims"] | None = None,
    sample_t: SampleTime = logsnr_time,
    example_weight: Float[Array, " n"] | None = None,
) -> tuple[Scalar, Float[Array, " n"]]:
    r"""Return the mean of `trace_loss` over a batch, at stratified times as in `batch_loss`.

    The default draws $\lambda$ uniformly, which the integral of $r$ over $\lambda$ in a likelihood
    asks for. A path whose $\lambda$ is infinite at an end needs another range.

    Args:
        key: a key; give every step another one.
        head: what is trained.
        denoiser: a trained or an exact denoiser, frozen.
        x0: clean examples, (n, *dims).
        cond: condition whose leaves have a leading axis n.
        eps: see `batch_loss`.
        sample_t: see `batch_loss`.
        example_weight: see `batch_loss`.

    Returns:
        The mean loss, (), and the loss of each example before `example_weight`, (n,).

    Raises:
        ValueError: as `trace_loss`, `batch_loss` and `logsnr_time`.
    """
    return _stratified(
        "batch_trace_loss",
        lambda x0, eps, cond, t: trace_loss(head, denoiser, x0, eps, cond, t=t),
        key,
        denoiser.process,
        x0,
        eps,
        cond,
        sample_t,
        example_weight,
    )


def _stratified(
    where: str,
    loss: Callable[[Array, Array, Cond, Array], Scalar],
    key: PRNGKeyArray,
    process: AbstractProcess,
    x0: Array,
    eps: Array | None,
    cond: Cond,
    sample_t: SampleTime,
    example_weight: Array | None,
) -> tuple[Scalar, Array]:
    """Return the mean of a loss over a batch at stratified times, and the loss of each example."""
    if not hasattr(x0, "dtype") or not jnp.issubdtype(x0.dtype, jnp.floating):
        raise _check.bad(where, "x0", "a floating array", getattr(x0, "dtype", type(x0)))
    n = len(x0)
    if eps is not None and jnp.shape(eps) != x0.shape:
        raise _check.bad(where, "eps", f"of the shape of x0, {x0.shape}", jnp.shape(eps))
    if example_weight is not None and example_weight.shape != (n,):
        raise _check.bad(where, "example_weight", f"of shape ({n},)", example_weight.shape)
    offset = jax.random.uniform(stream(key, n))  # examples use the streams 0 .. n - 1
    tiny = jnp.finfo(offset.dtype).eps  # rounding must not reach 0 or 1, where log-SNR may diverge
    u = jnp.clip((jnp.arange(n) + offset) / n, tiny, 1 - tiny)

    def one(i: Array, u: Array, x0: Array, eps: Array | None, cond: Cond) -> Scalar:
        if eps is None:
            eps = process.noise(stream(key, i), x0.shape, dtype=x0.dtype)
        return loss(x0, eps, cond, sample_t(process, u))

    losses = jax.vmap(one)(jnp.arange(n), u, x0, eps, cond)
    return jnp.mean(losses if example_weight is None else example_weight * losses), losses
