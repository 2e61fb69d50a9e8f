r"""Stochastic solvers with one network evaluation a step.

Notation: $h = \lambda_1 - \lambda_0$, $s = \sigma/\alpha$, $z$ standard normal, fresh in every
step. A step that freezes $m$ keeps a share $q$ of the noise and draws the rest:

$$ x_1 = \alpha_1 m + \sigma_1\left(q\,\hat\epsilon + \sqrt{1 - q^2}\,z\right) $$

| solver | $q$ | the mean beyond a frozen m |
|---|---|---|
| `DDIM(eta)` | $\sqrt{1 - \eta^2(1 - e^{-2h})}$ | |
| `EulerMaruyama("u")`, DDPM | $e^{-h}$ | |
| `DPMpp2MSDE` | $e^{-h}$ | a line through two outputs |
| `SASolver` | $e^{-\tau^2 h}$ | Adams predictor and corrector |
| `ERSDE` | $\phi(s_1)\,s_0\,/\,(\phi(s_0)\,s_1)$ | Taylor in $s$ |

Older outputs are noisy, and yet two of them give weak order 2 at $\tau = 1$: there $m$ is a
martingale of the exact reverse process, so that the noise in $m_0 - m_{-1}$ supplies the covariance
that freezing $m$ loses. More outputs do not raise the weak order above 2 where there is noise.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdiff import _check
from jaxdiff._array import Scalar, ScalarLike
from jaxdiff._host import is_concrete
from jaxdiff.process import AbstractProcess
from jaxdiff.solvers.engine import AbstractGridSolver, Row
from jaxdiff.solvers.exponential import transfer
from jaxdiff.solvers.multistep import limit, step_length
from jaxdiff.solvers.quadrature import (
    history,
    integral,
    integrals,
    log_snr_step,
    of_mean,
    phi,
)

__all__ = ["ERSDE", "DPMpp2MSDE", "EulerMaruyama", "Phi", "ReverseDiffusion", "SASolver", "keep"]

Phi: TypeAlias = Literal["ode", "sde", "sde1", "sde2", "sde3", "sde4", "sde5"]


def keep(
    process: AbstractProcess, ts: Array, log_q: Any, fresh: Any, at_noise: Any = 0.0
) -> tuple[Scalar, Scalar, Scalar]:
    r"""Return (decay, gain, noise) of the step that keeps the share q of the noise.

    $$ d = q\,\sigma_1/\sigma_0, \qquad w = \alpha_1(1 - e^{-h}q), \qquad
       c = \sigma_1\sqrt{1 - q^2} $$

    Args:
        process: the Gaussian path.
        ts: the next node and the current one.
        log_q: $\log q$, where h is finite.
        fresh: $\sqrt{1 - q^2}$, where h is finite.
        at_noise: q where the step starts at alpha = 0 or ends at sigma = 0.
    """
    h, finite = step_length(process, ts)
    alpha1, sigma1 = process.alpha(ts[0]), process.sigma(ts[0])
    decay = sigma1 / process.sigma(ts[1]) * jnp.where(finite, jnp.exp(log_q), at_noise)
    frozen = jnp.where(finite, log_q - h, -1.0)
    gain = jnp.where(finite, -alpha1 * jnp.expm1(frozen), alpha1 - process.alpha(ts[1]) * decay)
    noise = sigma1 * jnp.where(finite, fresh, jnp.sqrt(1 - jnp.asarray(at_noise) ** 2))
    return decay, gain, noise


class EulerMaruyama(AbstractGridSolver):
    r"""Euler-Maruyama on the reverse SDE, in clock `"u"` (ancestral DDPM) or in time itself.

    In `"u"`, $dY = m\,du + dB$ is solved exactly for a frozen $m$: this is DDPM's ancestral
    sampling, the posterior $q(x_1 | x_0, m)$, and equals `DDIM(eta=1.0)`. In `"t"`,

    $$ x_1 = x_0 + (t_1 - t_0)\,(f x_0 - g^2\,\nabla\log q_t(x_0)) + g\sqrt{t_0 - t_1}\,z, $$

    the method of score-SDE papers, which needs many more steps and cannot start at alpha = 0.
    Weak order 1; one network evaluation per step.

    Args:
        clock: `"u"` or `"t"`.
        variance: of the noise in `"u"`: `"small"`, that of the posterior,
            $\sigma_1^2(1 - e^{-2h})$, or `"large"`, that of the forward step,
            $\sigma_0^2(1 - e^{-2h})$, which is right for data of variance $\sigma^2/(1 - \alpha^2)$
            and often better from few steps.

    Raises:
        ValueError: if an argument is none of these, or `"large"` is asked for in `"t"`.

    References:
        Ho, Jain, Abbeel 2020 (2006.11239), eq. 7 and section 3.2; Song et al. 2021 (2011.13456),
        eq. 46.
    """

    clock: Literal["u", "t"] = eqx.field(static=True, default="u")
    variance: Literal["small", "large"] = eqx.field(static=True, default="small")
    stochastic = True

    def __check_init__(self) -> None:
        _check.choice("EulerMaruyama", "clock", self.clock, ("u", "t"))
        variances = ("small", "large") if self.clock == "u" else ("small",)
        _check.choice("EulerMaruyama", "variance", self.variance, variances)

    def row(self, process: AbstractProcess, ts: Array, n: ScalarLike, left: ScalarLike) -> Row:
        """Freeze the drift over the step."""
        if self.clock == "u":
            decay, gain, noise = transfer(process, ts[1], ts[0], 1.0)
            if self.variance == "large":
                h, finite = step_length(process, ts)
                large = process.sigma(ts[1]) * jnp.sqrt(-jnp.expm1(-2 * h))
                noise = jnp.where(finite, large, noise)
        else:
            t0, dt = ts[1], ts[0] - ts[1]
            rate = process.g2(t0) / process.sigma(t0) ** 2
            decay = 1 + dt * (process.f(t0) + rate)
            gain = -dt * rate * process.alpha(t0)
            noise = jnp.sqrt(-dt * process.g2(t0))
        return Row(decay, gain, noise=(noise,))


class ReverseDiffusion(AbstractGridSolver):
    r"""The reverse-diffusion predictor: the forward step between two nodes, turned round.

    With the exact forward kernel $x_0 = a x_1 + G z$, $a = \alpha_0/\alpha_1$,
    $G^2 = \sigma_0^2(1 - e^{-2h})$,

    $$ x_1 = (2 - a)\,x_0 + G^2\,\nabla\log q_{t_0}(x_0) + G z $$

    A baseline of weak order 1 that needs hundreds of steps; one network evaluation per step. Steps
    from alpha = 0 or to sigma = 0 are ancestral.

    References:
        Song et al. 2021 (2011.13456), eq. 46.
    """

    stochastic = True

    def row(self, process: AbstractProcess, ts: Array, n: ScalarLike, left: ScalarLike) -> Row:
        """Turn the forward kernel round."""
        decay, gain, noise = transfer(process, ts[1], ts[0], 1.0)
        h, finite = step_length(process, ts)
        back = -jnp.expm1(-2 * h)  # G^2 / sigma_0^2
        alpha0, alpha1 = process.alpha(ts[1]), jnp.where(finite, process.alpha(ts[0]), 1.0)
        return Row(
            jnp.where(finite, 2 - alpha0 / alpha1 - back, decay),
            jnp.where(finite, alpha0 * back, gain),
            noise=(jnp.where(finite, process.sigma(ts[1]) * jnp.sqrt(back), noise),),
        )


def _latent(process: AbstractProcess, t: ScalarLike) -> Array:
    share = (jnp.asarray(t) - process.t_min) / (process.t_max - process.t_min)
    return jnp.where((share >= 0.2) & (share <= 0.8), 1.0, 0.0)


def _edm(process: AbstractProcess, t: ScalarLike) -> Array:
    alpha, sigma = process.alpha(t), process.sigma(t)
    return jnp.where((sigma >= 0.05 * alpha) & (sigma <= alpha), 1.0, 0.0)


_TAUS: dict[str, Callable[..., Array]] = {"latent": _latent, "edm": _edm}


def _tau(value: Any) -> Any:
    """Hold a name or a function as structure, not as a leaf, so that every jit takes the solver."""
    value = _TAUS.get(value, value) if isinstance(value, str) else value
    plain = callable(value) and jax.tree.leaves(value) == [value]
    return jax.tree_util.Partial(value) if plain else value


class SASolver(AbstractGridSolver):
    r"""Stochastic Adams: a multistep predictor and corrector at any level of noise.

    On a step, $\tau$ is constant and the exact solution is

    $$ x_1 = e^{-\tau^2 h}\frac{\sigma_1}{\sigma_0}x_0
           + (1+\tau^2)\,\alpha_1\int_0^h e^{-(1+\tau^2)(h-r)}\,m(\lambda_0 + r)\,dr
           + \sigma_1\sqrt{1 - e^{-2\tau^2 h}}\,z $$

    in which $m$ is replaced by the polynomial in $\lambda$ through the last outputs. The corrector
    takes the same step again, with the same $z$, once the network has been evaluated at its end:
    only outputs change, so that the correction enters the next row and costs no evaluation; it is
    left out after the last step. Weak order 2 from two nodes on, and the order of the larger number
    of nodes where $\tau = 0$.

    | arguments | is |
    |---|---|
    | `SASolver(1, 0, 1.0)` | DDPM, `DDIM(eta=1.0)` |
    | `SASolver(1, 0, l)` | isotropic gDDIM of stochasticity l |
    | `SASolver(2, 0, 1.0)` | `DPMpp2MSDE("heun")` |
    | `SASolver(p, 0, 0.0)` | exponential Adams on $m$: `DPMpp2M("heun")`, `DPMpp3M` |

    Args:
        predictor: number of nodes of the predictor, 1 or more. 3 by default, 2 under guidance.
        corrector: number of nodes of the corrector, the new one among them; 0 for none. 4 by
            default, 2 under guidance.
        tau: level of noise, 0 or more: a number, a function of `(process, t)` that is read at the
            start of a step, or one of the published choices, 1 inside a window and 0 outside:
            `"latent"`, where 0.2 to 0.8 of the time has passed, and `"edm"`, where
            $0.05 \le \sigma/\alpha \le 1$. Outputs from before a jump are used across it.
        lower_order_final: lower the number of nodes of the last steps to 1.

    Raises:
        ValueError: if an argument is none of these.

    References:
        Xue et al. 2023 (2309.05019), eq. 14 and 17; Zhang, Tao, Chen 2022 (2206.05564), eq. 22, for
        gDDIM.
    """

    predictor: int = eqx.field(static=True, default=3)
    corrector: int = eqx.field(static=True, default=4)
    tau: Any = eqx.field(converter=_tau, default=1.0)
    lower_order_final: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        _check.whole("SASolver", "predictor", self.predictor, 1)
        _check.whole("SASolver", "corrector", self.corrector, 0)
        if isinstance(self.tau, str):
            _check.choice("SASolver", "tau", self.tau, _TAUS)
        if not callable(self.tau):
            _check.number("SASolver", "tau", self.tau, 0, 1e6)

    @property
    def memory(self) -> int:
        """The nodes of the predictor, seen from the next step where there is a corrector."""
        return max(self.predictor, self.corrector - 1) if self.corrector else self.predictor - 1

    @property
    def claimed_order(self) -> int:
        """The larger number of nodes, but at most 2 with noise."""
        order = max(self.predictor, self.corrector)
        return min(order, 2) if self.stochastic else order

    @property
    def stochastic(self) -> bool:
        """Whether `tau` is (or may be) positive."""
        return callable(self.tau) or not is_concrete(self.tau) or float(self.tau) > 0

    def _tau(self, process: AbstractProcess, t: Array) -> Array:
        return jnp.asarray(self.tau(process, t) if callable(self.tau) else self.tau, float)

    def _predict(self, process: AbstractProcess, ts: Array, tau: Array, left: Any) -> Array:
        """Return the weights of the predictor of `ts[1] -> ts[0]`, (predictor - 1,)."""
        ts = ts[: self.predictor + 1]
        lams, count = history(process, ts, limit(self.predictor, left, self.lower_order_final))
        h, _ = step_length(process, ts)
        kernel = of_mean(process.alpha(ts[0]), h, tau)
        return integrals(kernel, lambda lam: lam, lams[0], h, lams, count)[1:]

    def _correct(self, process: AbstractProcess, ts: Array, left: Any, used: Array) -> Array:
        """Return what redoing the step `ts[1] -> ts[0]` adds, as weights of outputs at `ts[1:]`."""
        tau, nodes = self._tau(process, ts[1]), limit(self.corrector, left, self.lower_order_final)
        lams, count = history(process, ts, nodes - 1)
        h = jnp.where(used, step_length(process, ts)[0], 1.0)
        kernel = of_mean(process.alpha(ts[0]), h, tau)
        count = jnp.minimum(count + 1, nodes)
        exact = integrals(kernel, lambda lam: lam, lams[0], h, [lams[0] + h, *lams], count)
        predicted = self._predict(process, ts, tau, left)
        change = exact[2:] - jnp.pad(predicted, (0, self.memory - self.predictor))
        older = jnp.concatenate([(-exact[0] - jnp.sum(change))[None], change])
        return jnp.where(used, older, 0.0)

    def row(self, process: AbstractProcess, ts: Array, n: ScalarLike, left: ScalarLike) -> Row:
        """Correct the step that led here, then predict."""
        tau, (h, _) = self._tau(process, ts[1]), step_length(process, ts)
        rate = tau**2 * h
        fresh = tau * jnp.sqrt(2 * h * phi(1, -2 * rate))
        decay, gain, noise = keep(process, ts, -rate, fresh, jnp.where(tau > 0, 0.0, 1.0))
        weights = self._predict(process, ts, tau, left)
        if self.corrector:
            used = (jnp.asarray(n) > 0) & (ts[2] > ts[1])
            used = used & (log_snr_step(process, ts[2], ts[1]) < jnp.inf)
            # What is added to the state decays with it, the network output held as it is.
            correction = self._correct(process, ts[1:], jnp.asarray(left) + 1, used)
            weights = jnp.pad(weights, (0, self.memory - self.predictor + 1)) + decay * correction
        return Row(decay, gain, weights, noise=(noise,) if self.stochastic else ())


class DPMpp2MSDE(AbstractGridSolver):
    r"""SDE-DPM-Solver++(2M): weak order 2 from one network evaluation per step.

    $$ x_1 = e^{-h}\frac{\sigma_1}{\sigma_0}x_0 + \alpha_1(1 - e^{-2h})
             \left[m_0 + \frac{h}{2 h_{-1}}(m_0 - m_{-1})\right]
             + \sigma_1\sqrt{1 - e^{-2h}}\,z $$

    The robust choice from 25 steps on. The first step, and a step to sigma = 0, are those of DDPM.

    Args:
        variant: `"midpoint"`, as above, or `"heun"`, which integrates the line through the two
            outputs exactly; the former is more accurate for Gaussian data.
        lower_order_final: make the last step one of DDPM.

    Raises:
        ValueError: if `variant` is neither.

    References:
        Lu et al. 2022 (2211.01095), eq. 18.
    """

    variant: Literal["midpoint", "heun"] = eqx.field(static=True, default="midpoint")
    lower_order_final: bool = eqx.field(static=True, default=False)
    memory = 1
    claimed_order = 2
    stochastic = True

    def __check_init__(self) -> None:
        _check.choice("DPMpp2MSDE", "variant", self.variant, ("midpoint", "heun"))

    def row(self, process: AbstractProcess, ts: Array, n: ScalarLike, left: ScalarLike) -> Row:
        """Extrapolate the network output to the middle of the step, or over it."""
        adams = SASolver(predictor=2, corrector=0, lower_order_final=self.lower_order_final)
        row = adams.row(process, ts, n, left)
        if self.variant == "heun":
            return row
        lams, count = history(process, ts, limit(2, left, self.lower_order_final))
        h, _ = step_length(process, ts)
        half = jnp.where(count > 1, h / (2 * (lams[0] - lams[1])), 0.0)
        return row._replace(weights=(-row.gain * half,))


# log(phi(s) / s) of the published noise scales.
_GROWTH: dict[str, Callable[[Array], Array]] = {
    "ode": jnp.zeros_like,
    "sde": jnp.log,
    "sde1": lambda s: jnp.log(jnp.exp(-1 / s) + 10),
    "sde2": lambda s: 0.5 * jnp.log(s),
    "sde3": lambda s: 1.5 * jnp.log(s),
    "sde4": lambda s: jnp.log(jnp.log1p(100 * s**1.5)) - 0.1 * jnp.log(s),
    "sde5": lambda s: jnp.logaddexp(s**0.3, jnp.log(10.0)),
}


class ERSDE(AbstractGridSolver):
    r"""Extended reverse-time SDE: Taylor expansion in $s = \sigma/\alpha$ at any scale of noise.

    With $a = s_0$, $b = s_1$, $\rho = \phi(b)/\phi(a)$ and $y = x/\alpha$,

    $$ y_1 = \rho y_0 + (1 - \rho)\,m_0 + c_1 m' + c_2 m'' + \sqrt{b^2 - a^2\rho^2}\,z, \qquad
       c_k = -\int_b^a \left(\frac{\phi(b)}{\phi(v)} - 1\right)\frac{(v - a)^{k-1}}{(k-1)!}(-dv) $$

    where $m'$, $m''$ are divided differences of the last outputs. The integrals, by 32-point
    Gauss-Legendre quadrature in $\log v$, are those of the paper after integration by parts, free
    of cancellation. From alpha = 0 all noise is fresh (except for `"ode"`).

    | phi | noise scale $\phi(s)$ |
    |---|---|
    | `"ode"` | $s$, deterministic |
    | `"sde"` | $s^2$, the reverse SDE |
    | `"sde1"` | $s\,(e^{-1/s} + 10)$ |
    | `"sde2"`, `"sde3"` | $s^{1.5}$, $s^{2.5}$ |
    | `"sde4"` | $s^{0.9}\log(1 + 100 s^{1.5})$, for $s < 900$ |
    | `"sde5"` | $s\,(e^{s^{0.3}} + 10)$, the published default |

    Weak order 1 at p = 1 and 2 at p = 2, 3; as an ODE solver too, since the published $m'$ stays of
    first order at p = 3, where $m''$ makes the error smaller. One network evaluation per step.

    Args:
        p: number of outputs, 1, 2 or 3.
        phi: a name of the table, or a function of $s$, positive, with $\phi(s)/s$ nondecreasing.
        lower_order_final: lower the order of the last steps to 1.

    Raises:
        ValueError: if `p` or `phi` is none of these.

    References:
        Cui et al. 2023 (2309.06169), proposition 3 and algorithms 1 to 3.
    """

    p: int = eqx.field(static=True, default=3)
    phi: Phi | Callable[..., Any] = eqx.field(static=True, default="sde5")
    lower_order_final: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        _check.choice("ERSDE", "p", self.p, (1, 2, 3))
        if not callable(self.phi):
            _check.choice("ERSDE", "phi", self.phi, _GROWTH)
            return
        growth = self._growth(jnp.geomspace(1e-2, 1e2, 101))
        if is_concrete(growth) and not np.all(np.diff(growth) > -1e-5):  # false for NaN too
            raise _check.bad("ERSDE", "phi", "positive, with phi(s)/s nondecreasing", self.phi)

    @property
    def memory(self) -> int:
        """The p - 1 older outputs."""
        return self.p - 1

    @property
    def claimed_order(self) -> int:
        """At most 2."""
        return min(self.p, 2)

    @property
    def stochastic(self) -> bool:
        """Whether `phi` is another than that of the ODE."""
        return self.phi != "ode"

    def _growth(self, s: Array) -> Array:
        if callable(self.phi):
            return jnp.log(jnp.vectorize(self.phi)(s)) - jnp.log(s)
        return _GROWTH[self.phi](s)

    def row(self, process: AbstractProcess, ts: Array, n: ScalarLike, left: ScalarLike) -> Row:
        """Expand the output in sigma/alpha."""
        lams, count = history(process, ts, limit(self.p, left, self.lower_order_final))
        h, _ = step_length(process, ts)
        a, b = jnp.exp(-lams[0]), jnp.exp(-lams[0] - h)
        log_q = self._growth(b) - self._growth(a)
        spent = -jnp.expm1(2 * log_q)
        fresh = jnp.sqrt(spent) if self.stochastic else jnp.zeros_like(spent)
        at_noise = 0.0 if self.stochastic else 1.0
        decay, gain, noise = keep(process, ts, log_q, fresh, at_noise)

        def moment(k: int) -> Array:  # alpha_1 c_k
            def kernel(r: Array) -> Array:
                v = jnp.exp(-lams[0] - r)
                # log phi(b)/phi(v)
                ratio = self._growth(b) - self._growth(v) + r - h
                return process.alpha(ts[0]) * v * jnp.expm1(ratio) * (v - a) ** (k - 1)

            return integral(kernel, h)

        weights = jnp.zeros(self.memory)
        nodes = jnp.exp(-lams)
        gaps = nodes[:-1] - nodes[1:]
        if self.p > 1:
            line = jnp.where(count > 1, -moment(1) / gaps[0], 0.0)
            weights = weights.at[0].set(line)
        if self.p > 2:
            bend = 2 * moment(2) / (nodes[0] - nodes[2])
            curve = jnp.stack([-bend / gaps[0] - bend / gaps[1], bend / gaps[1]])
            weights = weights + jnp.where(count > 2, curve, 0.0)
        return Row(decay, gain, weights, noise=(noise,) if self.stochastic else ())
