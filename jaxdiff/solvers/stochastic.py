"""Stochastic solvers: fresh noise in every step."""

from typing import Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from jaxdiff import _check
from jaxdiff._types import ScalarLike
from jaxdiff.process import AbstractProcess
from jaxdiff.solvers.engine import AbstractGridSolver, Row
from jaxdiff.solvers.exponential import transfer


class EulerMaruyama(AbstractGridSolver):
    r"""Euler-Maruyama on the reverse SDE, in clock `"u"` (ancestral DDPM) or in time itself.

    In `"u"`, $dY = m\,du + dB$ is solved exactly for a frozen $m$: this is DDPM's ancestral
    sampling, the posterior $q(x_1 | x_0, m)$, and equals `DDIM(eta=1.0)`. In `"t"`,

    $$ x_1 = x_0 + (t_1 - t_0)\,(f x_0 - g^2\,\nabla\log q_t(x_0)) + g\sqrt{t_0 - t_1}\,z, $$

    the method of score-SDE papers, which needs many more steps and cannot start at alpha = 0.
    Weak order 1; one network evaluation per step.

    Args:
        clock: `"u"` or `"t"`.

    Raises:
        ValueError: if `clock` is neither.

    References:
        Ho, Jain, Abbeel 2020 (2006.11239), eq. 7; Song et al. 2021 (2011.13456), eq. 46.
    """

    clock: Literal["u", "t"] = eqx.field(static=True, default="u")
    rows: Row | None = None

    def __check_init__(self) -> None:
        _check.choice("EulerMaruyama", "clock", self.clock, ("u", "t"))

    @property
    def stochastic(self) -> bool:
        """Always."""
        return True

    def row(self, process: AbstractProcess, ts: Array, n: ScalarLike) -> Row:
        """Freeze the drift over the step."""
        if self.clock == "u":
            decay, gain, noise = transfer(process, ts[1], ts[0], 1.0)
        else:
            t0, dt = ts[1], ts[0] - ts[1]
            rate = process.g2(t0) / process.sigma(t0) ** 2
            decay = 1 + dt * (process.f(t0) + rate)
            gain = -dt * rate * process.alpha(t0)
            noise = jnp.sqrt(-dt * process.g2(t0))
        return Row(decay, gain[None], noise)
