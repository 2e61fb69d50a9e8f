r"""Noise around the step of another solver: churn before it, Langevin steps after it.

Notation: $s = \sigma/\alpha$; a step from $t_0$ to $t_1 < t_0$ is made from a noisier state
$\hat x = a x + c z$ at $\hat t \ge t_0$, or followed by unadjusted Langevin steps at $t_1$,

$$ x \leftarrow x + \delta\,\nabla\log q_{t_1}(x) + \sqrt{2\delta}\,z $$

which pull the law of $x$ back to $q_{t_1}$.
"""

import sys
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff import _check
from jaxdiff._array import ScalarLike
from jaxdiff._host import is_concrete
from jaxdiff._numerics import safe_sqrt
from jaxdiff.process import AbstractProcess
from jaxdiff.solvers.engine import ENDLESS, AbstractGridSolver, Row, State, combine
from jaxdiff.solvers.exponential import transfer
from jaxdiff.solvers.multistep import step_length
from jaxdiff.solvers.singlestep import TABLEAUS, RungeKutta, Tableau
from jaxdiff.solvers.terms import View

__all__ = ["Churn", "SplitNoise"]


class Churn(AbstractGridSolver):
    r"""EDM's stochastic sampler: add a little noise, then step the ODE from there.

    $$ \hat s = (1 + \gamma)\,s_0, \qquad
       \hat x = \frac{\hat\alpha}{\alpha_0}x_0
              + \nu\,\hat\sigma\sqrt{1 - (1+\gamma)^{-2}}\,z, \qquad
       x_1 = \text{ODE step from } (\hat t, \hat x) $$

    with $\gamma = \min(S/N, \sqrt2 - 1)$ for N steps where $s_{min} \le s_0 \le s_{max}$, 0
    elsewhere. The noise corrects errors that earlier steps made. Weak order that of the tableau; as
    many network evaluations. The path may be any: churn acts on $x/\alpha$.

    The lifted time never leaves the process: $\hat t \le$ `t_max`, so that a step that starts at
    `t_max` adds nothing; neither does one that starts at alpha = 0. The number of steps N must be
    known: on the grid of a `jd.sampler`, or after `tabulate`.

    Args:
        churn: S, the total amount, 0 or more; from 10 to 80 in the paper.
        s_min: least $\sigma/\alpha$ at which noise is added.
        s_max: largest.
        noise: $\nu$, 1 for the right law, a little more against the loss of detail of networks.
        tableau: the step on the ODE, in $s$: `"heun"` as in the paper, `"euler"`, or any other of
            `RungeKutta`.

    Raises:
        ValueError: if an argument is out of its range, or N is not known.

    References:
        Karras et al. 2022 (2206.00364), algorithm 2, on a general path.
    """

    churn: float | int | Array = 30.0
    s_min: float | int | Array = 0.0
    s_max: float | int | Array = float("inf")
    noise: float | int | Array = 1.003
    tableau: Tableau = eqx.field(static=True, default="heun")
    output = "eps"
    stochastic = True

    def __check_init__(self) -> None:
        for name in ("churn", "s_min", "noise"):
            _check.number("Churn", name, getattr(self, name), 0, sys.float_info.max)
        low = self.s_min if is_concrete(self.s_min) else 0
        _check.number("Churn", "s_max", self.s_max, float(low), float("inf"))
        _check.choice("Churn", "tableau", self.tableau, TABLEAUS)

    @property
    def _inner(self) -> RungeKutta:
        return RungeKutta(tableau=self.tableau)

    @property
    def evaluations(self) -> int:
        """The stages of the tableau."""
        return self._inner.evaluations

    @property
    def claimed_order(self) -> int:
        """At most 2."""
        return min(self._inner.claimed_order, 2)

    def row(self, process: AbstractProcess, ts: Array, n: ScalarLike, left: ScalarLike) -> Any:
        """Return the lift, the noise, the lifted time and the row from there."""
        if isinstance(left, int) and left == ENDLESS:
            raise _check.bad("Churn", "ts", "a known grid: tabulate(process, ts)", "a controller")
        t0, count = ts[1], jnp.asarray(n + left, float)
        alpha0, sigma0 = process.alpha(t0), process.sigma(t0)
        inside = (self.s_min * alpha0 <= sigma0) & (sigma0 <= self.s_max * alpha0) & (alpha0 > 0)
        gamma = jnp.minimum(self.churn / count, jnp.sqrt(2.0) - 1)
        t0 = jnp.where(inside, t0, (jnp.asarray(process.t_min) + process.t_max) / 2)  # has a lam
        lam0 = process.lam(t0)
        lifted = jnp.minimum(process.t_of_lam(lam0 - jnp.log1p(gamma)), process.t_max)
        spent = -jnp.expm1(-2 * (lam0 - process.lam(lifted)))
        lift = jnp.where(inside, process.alpha(lifted) / process.alpha(t0), 1.0)
        noise = jnp.where(inside, self.noise * process.sigma(lifted) * safe_sqrt(spent), 0.0)
        lifted = jnp.where(inside, lifted, ts[1])
        return lift, noise, lifted, self._inner.row(process, jnp.stack([ts[0], lifted]), n, left)

    def advance(
        self, at: View, row: Any, t: Array, x: Array, state: State
    ) -> tuple[Array, Array, Any]:
        """Lift the state, and step from there."""
        lift, noise, lifted, inner = row
        x = (lift * x + noise * at.normal(state.step, x)).astype(x.dtype)
        return self._inner.advance(at, inner, t.at[0].set(lifted), x, state)


class SplitNoise(AbstractGridSolver):
    r"""Ancestral sampling with its noise split around the network evaluation.

    $$ y = x_0 + \sqrt{G^2/2}\,z, \qquad
       x_1 = \frac{\alpha_1}{\alpha_0}\left[y + G^2\,\nabla\log q_{t_0}(y)
             + \sqrt{G^2/2}\,z'\right], \qquad G^2 = \sigma_0^2(1 - e^{-2h}) $$

    Much more accurate than ancestral sampling for Gaussian data, where it has weak order 2; of
    order 1 in general. One network evaluation per step. Steps from alpha = 0 or to sigma = 0 are
    those of DDPM.

    References:
        Li et al. 2024 (2403.03852), section 3, on a general path.
    """

    stochastic = True

    def row(self, process: AbstractProcess, ts: Array, n: ScalarLike, left: ScalarLike) -> Any:
        """Return the noise before, a time between for the path, and the row after."""
        decay, gain, noise = transfer(process, ts[1], ts[0], 1.0)
        h, finite = step_length(process, ts)
        before = jnp.where(finite, process.sigma(ts[1]) * jnp.sqrt(-jnp.expm1(-2 * h) / 2), 0.0)
        after = jnp.where(finite, process.sigma(ts[0]) * jnp.sqrt(jnp.expm1(2 * h) / 2), noise)
        return before, after, Row(decay, gain)

    def advance(
        self, at: View, row: Any, t: Array, x: Array, state: State
    ) -> tuple[Array, Array, Any]:
        """Add noise, evaluate, add noise."""
        before, after, frozen = row
        marks = (t[0], (t[0] + t[1]) / 2, t[1])
        first, second = (
            at.normal(state.step, x, use=k, ends=(marks[k], marks[k + 1])) for k in (0, 1)
        )
        y = (x + before * first).astype(x.dtype)
        m, output = self.outputs(at.field.denoiser, t[0], y, at.field.cond)
        x1 = combine(frozen, y, m, [output], None) + after * second
        return x1, output, state.extra
