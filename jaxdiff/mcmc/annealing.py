"""Annealed Langevin dynamics: one sample through the laws of falling noise levels."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, Real

from jaxdiff import _check, grids
from jaxdiff._array import Cond, ScalarLike
from jaxdiff._host import host64, is_concrete
from jaxdiff._keys import stream
from jaxdiff.mcmc.chains import like, positive, run, start
from jaxdiff.mcmc.kernels import ula
from jaxdiff.mcmc.targets import target
from jaxdiff.process import AbstractProcess
from jaxdiff.score import AbstractDenoiser

__all__ = ["annealed"]


def _scales(process: AbstractProcess, ts: Array) -> tuple[Array, Array]:
    return jax.vmap(process.alpha)(ts), jax.vmap(process.sigma)(ts)


def annealed(
    key: PRNGKeyArray,
    denoiser: AbstractDenoiser,
    x: Float[ArrayLike, "*dims"],
    ts: Real[Any, " nodes"],
    *,
    steps: int,
    step_size: ScalarLike,
    cond: Cond = None,
    denoise: bool = False,
) -> Float[Array, "*dims"]:
    r"""Anneal a sample through the laws $q_{t_i}$ by Langevin steps at each.

    $$ x \leftarrow \frac{\alpha_i}{\alpha_{i-1}}\,x, \qquad\text{then `steps` times}\qquad
       x \leftarrow x + h_i\,\nabla\log q_{t_i}(x) + \sqrt{2h_i}\,z, \qquad
       h_i = \eta\,\sigma_i^2 $$

    Between levels $x/\alpha$ is kept, which is nothing to do where alpha is 1. The step is relative
    to the shortest scale of $q_{t_i}$, and stable for $\eta < 2$. As levels or steps grow in number
    the law tends to $q_{t_n}$ at the last level but for the bias of `ula`: a direction of
    variance V ends at $V/(1 - h_n/2V)$, up to $1/(1 - \eta/2)$ too wide. Low levels are too
    slow to mend what the high ones left: a direction of data variance c, where
    $\alpha_i^2 c \gg \sigma_i^2$, forgets only $\eta\,\sigma_i^2/(\alpha_i^2 c)$ of itself
    per step. Cost: `steps` scores per level, and 1 evaluation to denoise. The key of level i is
    `fold_in(key, i)`, used as by `run`.

    Args:
        key: a threefry key.
        denoiser: the denoiser.
        x: a sample of $q_{t_0}$, or close to one, (*dims,): $\sigma_{t_0} z$ as a rule.
        ts: the levels: strictly decreasing times of finite log-SNR, (nodes,).
        steps: Langevin steps per level; 100 in the paper.
        step_size: $\eta = h_i/\sigma_i^2$, positive, (); 0.1 in the paper.
        cond: condition passed to the denoiser.
        denoise: return the posterior mean at the last level, a sample without its noise.

    Returns:
        The sample, (*dims,): of $q_{t_n}$, or denoised.

    Raises:
        ValueError: if an argument is wrong: `ts` is no grid of the process, or alpha or sigma is 0
            at one of its ends.

    Example:
        >>> import jaxdiff as jd
        >>> path = jd.process.VE()
        >>> two = jd.exact.mixture(path, [0.5, 0.5], [[-1.0], [1.0]], 0.01)
        >>> ts, noise = path.grid(20, "logsnr"), path.sigma(path.t_max) * jnp.ones(1)
        >>> end = annealed(jax.random.key(0), two, noise, ts, steps=5, step_size=0.1, denoise=True)
        >>> bool(0.5 < abs(end[0]) < 1.5)
        True

    References:
        Song, Ermon 2019 (1907.05600), algorithm 1, with $h_i = \alpha_i/2$ of its step $\alpha_i$.
    """
    key = _check.key("annealed", "key", key)
    if not isinstance(denoiser, AbstractDenoiser):
        raise _check.bad("annealed", "denoiser", "a jaxdiff denoiser", repr(denoiser))
    _check.whole("annealed", "steps", steps, 1)
    positive("annealed", step_size=step_size)
    x = start(x)
    ts = grids.check(denoiser.process, ts, where="annealed", dtype=x.dtype)
    alpha, sigma = host64(_scales, denoiser.process, ts)
    if is_concrete(alpha, sigma) and not (np.all(alpha > 0) and np.all(sigma > 0)):
        i = int(np.argmin((alpha > 0) & (sigma > 0)))
        got = f"t={float(ts[i])!r}"
        raise _check.bad("annealed", f"ts[{i}]", "a time of finite log-SNR", got)
    ratio = alpha / jnp.concatenate([alpha[:1], alpha[:-1]])
    rows = like(x, ts, ratio, step_size * sigma**2)

    def level(x: Array, row: tuple[Array, ...]) -> tuple[Array, None]:
        i, t, rescale, h = row
        kernel = ula(target(denoiser, t, cond), h)
        return run(stream(key, i), kernel, rescale * x, steps).x, None

    x, _ = jax.lax.scan(level, x, (jnp.arange(len(ts)), *rows))
    return denoiser(rows[0][-1], x, cond) if denoise else x
