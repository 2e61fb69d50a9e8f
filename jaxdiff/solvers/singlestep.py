"""Single-step solvers: extra network evaluations inside the step, no memory between steps."""

import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff._types import ScalarLike
from jaxdiff.process import AbstractProcess
from jaxdiff.solvers.engine import AbstractGridSolver, Row, State
from jaxdiff.solvers.exponential import log_snr_step, transfer
from jaxdiff.solvers.terms import View


class Heun(AbstractGridSolver):
    r"""Heun's method in EDM's form: the trapezoidal rule in $s = \sigma/\alpha$.

    $$ \hat x_1 = \alpha_1\left(\frac{x_0}{\alpha_0} + (s_1 - s_0)\,\hat\epsilon_0\right), \qquad
       x_1 = \hat x_1 + \tfrac12\alpha_1(s_1 - s_0)(\hat\epsilon_1 - \hat\epsilon_0) $$

    with $\hat\epsilon_1$ taken at $\hat x_1$, a DDIM step. Order 2; two network evaluations per
    step; no history. Steps from alpha = 0 or to sigma = 0 are those of DDIM.

    References:
        Karras et al. 2022 (2206.00364), algorithm 1, on a general path.
    """

    rows: Row | None = None
    evaluations = 2
    claimed_order = 2

    def row(self, process: AbstractProcess, ts: Array, n: ScalarLike) -> Row:
        r"""Return the DDIM step and $\tfrac12\alpha_1(s_1 - s_0) = -\tfrac12\sigma_1(e^h - 1)$."""
        decay, gain, _ = transfer(process, ts[1], ts[0])
        h = log_snr_step(process, ts[1], ts[0])
        correction = -0.5 * process.sigma(ts[0]) * jnp.expm1(jnp.where(jnp.isinf(h), 0.0, h))
        return Row(decay, jnp.stack([gain, correction]))

    def advance(self, at: View, row: Row, t: Array, x: Array, state: State) -> tuple[Array, Array]:
        """Predict by DDIM, evaluate there, correct."""
        gain, correction = row.weights
        m, eps = at.field.denoiser.pair(t[0], x, at.field.cond)
        predicted = row.decay * x + gain * m
        # Where nothing is to be corrected, look at t0: the noise is unknown at sigma = 0.
        t1 = jnp.where(correction == 0, t[0], t[1])
        change = at.field.denoiser.eps(t1, predicted, at.field.cond) - eps
        return predicted + correction * change, m
