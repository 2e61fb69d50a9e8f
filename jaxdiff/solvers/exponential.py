r"""DDIM: the step that freezes the network output, on which every other method builds.

Notation: $h = \lambda_1 - \lambda_0$, and the exact solution over a step is

$$ x_1 = \frac{\sigma_1}{\sigma_0}x_0
       + \alpha_1\int_0^h e^{-(h-r)}\,m(\lambda_0 + r)\,dr. $$

Freezing $m$ and freezing $\hat\epsilon$ is the same step.
"""

import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff import _check
from jaxdiff._array import Scalar, ScalarLike
from jaxdiff._host import is_concrete
from jaxdiff.process import AbstractProcess
from jaxdiff.solvers.engine import AbstractGridSolver, Row
from jaxdiff.solvers.quadrature import log_snr_step

__all__ = ["DDIM", "transfer"]


def _log_kept(eta: Array, h: Array) -> Array:
    r"""Return $\log(1 - \eta^2(1 - e^{-2h}))$, also where almost nothing is kept."""
    lost = -(eta**2) * jnp.expm1(-2 * h)
    most = lost > 0.5
    kept = (1 - eta) * (1 + eta) + eta**2 * jnp.exp(-2 * h)
    return jnp.where(
        most, jnp.log(jnp.where(most, kept, 1.0)), jnp.log1p(-jnp.where(most, 0.0, lost))
    )


def transfer(
    process: AbstractProcess, t0: ScalarLike, t1: ScalarLike, eta: ScalarLike = 0.0
) -> tuple[Scalar, Scalar, Scalar]:
    r"""Return (decay, gain, noise) of the step that freezes the network output.

    $$ c = \eta\,\sigma_1\sqrt{1 - e^{-2h}}, \quad d = \sqrt{\sigma_1^2 - c^2}/\sigma_0, \quad
       w = \alpha_1 - \alpha_0 d = \alpha_1\left(1 - e^{-h}\sqrt{1 - \eta^2(1 - e^{-2h})}\right) $$

    with their limits where alpha or sigma vanishes. `eta = 0` is deterministic, `eta = 1` samples
    the posterior $q(x_1 | x_0, m)$ of DDPM.
    """
    h = log_snr_step(process, t0, t1)
    endless, alpha1, sigma1 = jnp.isinf(h), process.alpha(t1), process.sigma(t1)
    finite = jnp.where(endless, 1.0, h)
    if is_concrete(eta) and float(eta) == 0:  # the same as below, in fewer operations
        decay = sigma1 / process.sigma(t0)
        gain = jnp.where(endless, alpha1 - process.alpha(t0) * decay, -alpha1 * jnp.expm1(-finite))
        return decay, gain, jnp.zeros_like(gain)
    eta = jnp.asarray(eta)
    log_q = 0.5 * _log_kept(eta, finite)
    limit = jnp.sqrt(1 - jnp.where(endless, eta, 0.0) ** 2)
    decay = sigma1 / process.sigma(t0) * jnp.where(endless, limit, jnp.exp(log_q))
    gain = jnp.where(
        endless, alpha1 - process.alpha(t0) * decay, -alpha1 * jnp.expm1(log_q - finite)
    )
    noise = eta * sigma1 * jnp.where(endless, 1.0, jnp.sqrt(-jnp.expm1(-2 * finite)))
    return decay, gain, noise


class DDIM(AbstractGridSolver):
    r"""Denoising diffusion implicit model, deterministic at `eta = 0` (the default).

    $$ x_1 = \alpha_1 m + \sqrt{\sigma_1^2 - c^2}\,\hat\epsilon + c\,z, \qquad
       c = \eta\,\sigma_1\sqrt{1 - e^{-2h}} $$

    Order 1; one network evaluation per step; no history. At `eta = 0` it is Euler's method in
    clock `"r"`; at `eta = 1` it is ancestral DDPM sampling, Euler-Maruyama in clock `"u"`.

    Args:
        eta: share of the DDPM posterior noise that each step adds, in [0, 1].

    Raises:
        ValueError: if `eta` is outside [0, 1].

    References:
        Song, Meng, Ermon 2021 (2010.02502), eq. 12 and 16, on a general path.
    """

    eta: float | Array = 0.0

    def __check_init__(self) -> None:
        _check.number("DDIM", "eta", self.eta, 0, 1)

    @property
    def stochastic(self) -> bool:
        """Whether `eta` is (or may be) positive."""
        return not (is_concrete(self.eta) and float(self.eta) == 0)

    def row(self, process: AbstractProcess, ts: Array, n: ScalarLike, left: ScalarLike) -> Row:
        """Freeze the network output over the step."""
        decay, gain, noise = transfer(process, ts[1], ts[0], self.eta)
        return Row(decay, gain, noise=(noise,) if self.stochastic else ())
