r"""Stochastic solvers with stages inside the step, which share one Brownian path.

Notation: $h = \lambda_1 - \lambda_0$; stages at shares $0 = r_0 < r_1 < \dots < r_K = 1$ of the
step in $\lambda$, normals $z_k$ of the interval between $r_k$ and $r_{k+1}$. The reverse SDE with
its output frozen, $\hat\epsilon$ or $m$, has at share $c$ of the step the noise

$$ \sigma_c\sum_{r_k < c}\sqrt{e^{2(c - r_k)h} - e^{2(c - r_{k+1})h}}\;z_k, \qquad
   \sigma_c\sum_{r_k < c}\sqrt{e^{-2(c - r_{k+1})h} - e^{-2(c - r_k)h}}\;z_k $$

so that stage and end see the same path. Weak order 2 depends on it.
"""

import itertools
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdiff import _check
from jaxdiff._array import Scalar, ScalarLike
from jaxdiff.process import AbstractProcess
from jaxdiff.solvers.engine import AbstractGridSolver, Row
from jaxdiff.solvers.exponential import transfer
from jaxdiff.solvers.multistep import step_length
from jaxdiff.solvers.quadrature import phi

__all__ = ["SEEDS", "DPMppSDE"]


def _shares(where: str, r: Any, number: int) -> None:
    inside = isinstance(r, tuple) and len(r) == number and all(0 < a < 1 for a in r)
    if not inside or any(b <= a for a, b in itertools.pairwise(r)):
        raise _check.bad(where, "r", f"{number} increasing number(s) inside (0, 1)", repr(r))


def _stage_times(process: AbstractProcess, ts: Array, r: tuple[float, ...]) -> list[Array]:
    """Return the times of the stages; the start where the step has no inside."""
    h, finite = step_length(process, ts)
    inside = (jnp.asarray(process.t_min) + process.t_max) / 2
    lam0 = process.lam(jnp.where(finite, ts[1], inside))
    return [jnp.where(finite, process.t_of_lam(lam0 + a * h), ts[1]) for a in r]


def _increments(ends: tuple[float, ...], h: Array, sign: int) -> list[Array]:
    """Return the factors of the module's equation for a path through `ends`, from 0 to c."""
    c = ends[-1]
    return [
        jnp.exp(sign * (c - high) * h) * jnp.sqrt(sign * jnp.expm1(sign * 2 * (high - low) * h))
        for low, high in itertools.pairwise(ends)
    ]


def _frozen(process: AbstractProcess, t0: Any, t1: Any, output: str) -> tuple[Scalar, Scalar]:
    r"""Return (decay, gain) of the reverse SDE with its output frozen.

    For $\hat\epsilon$: $(\alpha_1/\alpha_0)\,x_0 - 2\sigma_1(e^h - 1)\,\hat\epsilon$.
    """
    decay, gain, _ = transfer(process, t0, t1, 1.0)
    if output == "x0":
        return decay, gain
    h, finite = step_length(process, jnp.stack([t1, t0]))
    growing = process.sigma(t1) / process.sigma(t0) * (1 - jnp.expm1(h))
    return (
        jnp.where(finite, growing, decay),
        jnp.where(finite, -2 * process.alpha(t1) * jnp.expm1(-h), gain),
    )


class DPMppSDE(AbstractGridSolver):
    r"""DPM-Solver++ on the SDE, singlestep: the output taken inside the step as well.

    $$ u = \text{DDPM step to } q, \qquad
       x_1 = e^{-h}\frac{\sigma_1}{\sigma_0}x_0 + \alpha_1(1 - e^{-2h})
             \left[m_0 + \tfrac{1}{2r}(m(u) - m_0)\right]
             + \text{noise on the path of } u $$

    with $\lambda_q = \lambda_0 + r h$. Weak order 2; two network evaluations per step; no history.
    Steps from alpha = 0 or to sigma = 0 are those of DDPM.

    Args:
        r: where in the step, in $\lambda$, the stage sits, inside (0, 1).

    Raises:
        ValueError: if `r` is outside.

    References:
        Lu et al. 2022 (2211.01095), algorithm 1, on the SDE of its section 5.
    """

    r: float = eqx.field(static=True, default=1 / 2)
    evaluations = 2
    claimed_order = 2
    stochastic = True

    def __check_init__(self) -> None:
        _shares("DPMppSDE", (self.r,), 1)

    def row(self, process: AbstractProcess, ts: Array, n: ScalarLike, left: ScalarLike) -> Row:
        """Step to the stage, and from the start to the end on the same path."""
        h, finite = step_length(process, ts)
        (q,) = _stage_times(process, ts, (self.r,))
        sigma1 = process.sigma(ts[0])
        stage = Row(
            *_frozen(process, ts[1], q, "x0"),
            noise=(process.sigma(q) * _increments((0.0, self.r), h, -1)[0],),
        )
        first, second = _increments((0.0, self.r, 1.0), h, -1)
        decay, gain = _frozen(process, ts[1], ts[0], "x0")
        weight = jnp.where(finite, gain / (2 * self.r), 0.0)
        noise = sigma1 * jnp.where(finite, first, 0.0), sigma1 * jnp.where(finite, second, 1.0)
        return Row(decay, gain, (weight,), noise, ((q, stage),))


class SEEDS(AbstractGridSolver):
    r"""SEEDS-1, 2, 3: stochastic exponential Runge-Kutta on the noise prediction.

    The stages of DPM-Solver, on the reverse SDE and one Brownian path:

    $$ p = 1:\quad x_1 = \frac{\alpha_1}{\alpha_0}x_0 - 2\sigma_1(e^h - 1)\,\hat\epsilon_0
                   + \text{noise} $$
    $$ p = 2:\quad x_1 \mathrel{-}= \frac{\sigma_1}{r}(e^h - 1)(\hat\epsilon_1 - \hat\epsilon_0) $$
    $$ p = 3:\quad x_{q_2} \mathrel{-}= 2\sigma_{q_2}\frac{r_2}{r_1}r_2 h\varphi_2(r_2 h)
                   (\hat\epsilon_1 - \hat\epsilon_0), \qquad
       x_1 \mathrel{-}= \frac{2\sigma_1}{r_2}h\varphi_2(h)(\hat\epsilon_2 - \hat\epsilon_0) $$

    Weak order 1, 2, 2; p network evaluations per step; no history. It writes the SDE in
    $\hat\epsilon$, whose factors grow as $e^h$: unstable for steps of more than 1 or so in log-SNR.
    Steps from alpha = 0 or to sigma = 0 are those of DDPM.

    Args:
        p: order of the stages, 1, 2 or 3.
        r: where in the step, in $\lambda$, the stages sit, p - 1 increasing numbers inside (0, 1);
            (1/2,), and (1/3, 2/3), by default.
        released: whether to use the noise of published code, laid out from the end of the step:
            $\sqrt{e^{2h} - e^{2rh}}\,z_0 + \sqrt{e^{2rh} - 1}\,z_1$. The total variance is right,
            the covariance of stage and end is not, unless r = 1/2, which costs the second order. At
            p = 3 two of the factors also change places, and the second stage has the sigma of the
            end, which about triples the error but leaves the order.

    Raises:
        ValueError: if an argument is none of these.

    References:
        Gonzalez et al. 2023 (2305.14267), algorithms 1 to 4.
    """

    p: Literal[1, 2, 3] = eqx.field(static=True, default=2)
    r: tuple[float, ...] | None = eqx.field(static=True, default=None)
    released: bool = eqx.field(static=True, default=False)
    output = "eps"
    stochastic = True

    def __check_init__(self) -> None:
        _check.choice("SEEDS", "p", self.p, (1, 2, 3))
        _shares("SEEDS", self._r, self.p - 1)

    @property
    def _r(self) -> tuple[float, ...]:
        defaults: dict[int, tuple[float, ...]] = {1: (), 2: (1 / 2,), 3: (1 / 3, 2 / 3)}
        return defaults[self.p] if self.r is None else self.r

    @property
    def evaluations(self) -> int:
        """One for each stage."""
        return self.p

    @property
    def claimed_order(self) -> int:
        """At most 2, and 1 with the released noise of stages that are not equally spaced."""
        even = np.allclose(self._r, np.arange(1, self.p) / self.p)
        return min(self.p, 2) if even or not self.released else 1

    def _noise(self, ends: tuple[float, ...], h: Array) -> list[Array]:
        """Return the factors of the normals of a path through `ends`, without sigma."""
        if self.released:
            ends = tuple(ends[-1] - c for c in reversed(ends))
        return _increments(ends, h, 1)

    def row(self, process: AbstractProcess, ts: Array, n: ScalarLike, left: ScalarLike) -> Row:
        """Lay out the stages over the step."""
        r, (h, finite) = self._r, step_length(process, ts)
        times = _stage_times(process, ts, r)
        ends = (0.0, *r, 1.0)

        def weight(t: Any, share: float, factor: Any) -> Array:
            return jnp.where(finite, -2 * factor * process.sigma(t) * share * h, 0.0)

        weights: list[tuple[Any, ...]] = [()] * self.p
        if self.p == 2:
            weights[1] = (weight(ts[0], 1.0, phi(1, h) / (2 * r[0])),)
        if self.p == 3:
            weights[1] = (weight(times[1], r[1], r[1] / r[0] * phi(2, r[1] * h)),)
            weights[2] = (jnp.zeros_like(h), weight(ts[0], 1.0, phi(2, h) / r[1]))
        rows = []
        for k, (t, w) in enumerate(zip([*times, ts[0]], weights, strict=True)):
            scale = process.sigma(ts[0] if self.released and k == 1 else t)
            limits = [0.0] * k + [1.0]  # all noise is fresh where the step has no inside
            factors = zip(self._noise(ends[: k + 2], h), limits, strict=True)
            noise = tuple(scale * jnp.where(finite, c, limit) for c, limit in factors)
            if self.released and k == 2:
                noise = (noise[1], noise[0], noise[2])
            rows.append(Row(*_frozen(process, ts[1], t, "eps"), w, noise))
        return rows[-1]._replace(stages=tuple(zip(times, rows[:-1], strict=True)))
