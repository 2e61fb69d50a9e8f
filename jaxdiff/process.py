r"""Gaussian paths: alpha, sigma and everything derived from them.

Notation: $x_t = \alpha(t)\,x_0 + \sigma(t)\,\epsilon$, $\epsilon \sim N(0, I)$, data at $t = 0$ and
noise at $t = T$; $\lambda = \log(\alpha/\sigma)$ (half log-SNR);
$f = d\log\alpha/dt$, $g^2 = d\sigma^2/dt - 2 f \sigma^2 = -2\sigma^2\,d\lambda/dt$.

A process writes only `log_alpha`, `log_sigma` and its range. Both are written with `log1p` and
`expm1`, so that nothing cancels near the data end in float32.
"""

import abc
import itertools
import math
import sys
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from jaxdiff import _check, grids
from jaxdiff._array import Scalar, ScalarLike
from jaxdiff._host import host64, is_concrete

__all__ = [
    "EDM",
    "VE",
    "VP",
    "AbstractProcess",
    "Cosine",
    "Discrete",
    "Rectified",
    "SubVP",
    "check_path",
    "floating",
    "gaussian_only",
    "vanishing",
]


def _positive_range(name: str, **values: Any) -> None:
    """Check that concrete parameters are positive and given in increasing order."""
    if not is_concrete(values):
        return
    for argument, value in values.items():
        _check.number(name, argument, value, 0, sys.float_info.max)
    if not all(a < b for a, b in itertools.pairwise(map(float, values.values()))):
        got = ", ".join(f"{k}={v!r}" for k, v in values.items())
        raise _check.bad(name, " < ".join(values), "increasing", got)


def _real(value: ScalarLike) -> Scalar:
    """Return a floating array: integers are times and log-SNRs too."""
    return jnp.asarray(value, jnp.result_type(value, float))


def floating(x: Any) -> Array:
    """Return `x` as a floating array: integers become the default float."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.result_type(float))


_NO_FISHER = "derivatives of its denoiser give neither a Fisher information nor a covariance"


def gaussian_only(where: str, argument: str, process: Any, instead: str = _NO_FISHER) -> None:
    """Raise ValueError unless the kernel of a process is Gaussian, saying what to do `instead`."""
    kernel = getattr(process, "kernel", "gaussian")
    if kernel != "gaussian":
        got = f"{type(process).__name__}, whose kernel is {kernel!r}; {instead}"
        raise _check.bad(where, argument, "a process with a Gaussian kernel", got)


class AbstractProcess(eqx.Module):
    r"""A Gaussian path from data to noise. Subclasses write `log_alpha` and `log_sigma`.

    Where alpha or sigma vanishes inside the range, override `alpha` or `sigma` as well, as
    `Rectified` does: the logarithm has no finite slope there, and `rates` needs one.

    Every method takes one time `t`, a scalar in `[t_min, t_max]`, and costs no network evaluation.

    Attributes:
        t_min: smallest usable time (data side).
        t_max: largest usable time (noise side).
        default_grid: the kind of grid that `grid` builds by default.
        has_sde: whether the marginals are also those of a reverse SDE.
        kernel: law of the noise, `"gaussian"` unless a process says otherwise, as `PFGMpp` does by
            `"student"`. The PF-ODE, the pair $(m, \hat\epsilon)$ and the losses hold for every
            kernel; $-\hat\epsilon/\sigma$ as a score, the Fisher information, covariances from
            derivatives of $m$, and the closed forms of `jaxdiff.exact` for a Gaussian one only,
            and refuse another by `gaussian_only`.
    """

    t_min: eqx.AbstractVar[float]
    t_max: eqx.AbstractVar[float]
    default_grid: ClassVar[str] = "uniform"
    has_sde: ClassVar[bool] = True
    kernel: ClassVar[str] = "gaussian"

    @abc.abstractmethod
    def log_alpha(self, t: ScalarLike) -> Scalar:
        r"""Return $\log\alpha(t)$."""

    @abc.abstractmethod
    def log_sigma(self, t: ScalarLike) -> Scalar:
        r"""Return $\log\sigma(t)$."""

    def alpha(self, t: ScalarLike) -> Scalar:
        r"""Return the signal scale $\alpha(t)$."""
        return jnp.exp(self.log_alpha(t))

    def sigma(self, t: ScalarLike) -> Scalar:
        r"""Return the noise scale $\sigma(t)$."""
        return jnp.exp(self.log_sigma(t))

    def lam(self, t: ScalarLike) -> Scalar:
        r"""Return $\lambda(t) = \log(\alpha/\sigma)$, half the log signal-to-noise ratio."""
        return self.log_alpha(t) - self.log_sigma(t)

    def snr(self, t: ScalarLike) -> Scalar:
        r"""Return $\alpha^2/\sigma^2$."""
        return jnp.exp(2 * self.lam(t))

    def rates(self, t: ScalarLike) -> tuple[Scalar, Scalar]:
        r"""Return $(\alpha'(t), \sigma'(t))$, the velocity of the path's two scales."""
        t = _real(t)
        return jax.jvp(lambda t: (self.alpha(t), self.sigma(t)), (t,), (jnp.ones_like(t),))[1]

    def f(self, t: ScalarLike) -> Scalar:
        r"""Return the drift rate $f = d\log\alpha/dt$ of $dx = f x\,dt + g\,dW$."""
        t = _real(t)
        return jax.jvp(self.log_alpha, (t,), (jnp.ones_like(t),))[1]

    def g2(self, t: ScalarLike) -> Scalar:
        r"""Return the squared diffusion $g^2 = -2\sigma^2\,d\lambda/dt$."""
        sigma = self.sigma(t)
        return 2 * sigma * (self.rates(t)[1] - self.f(t) * sigma)  # no 0 * inf where sigma = 0

    def t_of_lam(self, lam: ScalarLike) -> Scalar:
        r"""Return the time at which $\lambda(t)$ equals `lam`, by bisection on `[t_min, t_max]`.

        Subclasses override it where the inverse is closed. Derivatives are those of the inverse
        function: one Newton step at the solution, whose own derivative is $1/\lambda'$.
        """
        lam = _real(lam)
        number, hold = (float, np.ndarray, jax.Array), jax.lax.stop_gradient
        fixed = jax.tree.map(lambda leaf: hold(leaf) if isinstance(leaf, number) else leaf, self)
        target = jax.lax.stop_gradient(lam)
        low = jnp.full_like(lam, fixed.t_min)
        high = jnp.full_like(lam, fixed.t_max)

        def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = ends
            mid = (low + high) / 2
            noisier = fixed.lam(mid) < target  # lam decreases in t
            return jnp.where(noisier, low, mid), jnp.where(noisier, mid, high)

        low, high = jax.lax.fori_loop(0, 60, halve, (low, high))
        end = jnp.where(lam > 0, low, high)  # where log-SNR is infinite, with no slope to divide by
        t = jnp.where(jnp.isinf(lam), (fixed.t_min + fixed.t_max) / 2, (low + high) / 2)
        slope = jax.jvp(fixed.lam, (t,), (jnp.ones_like(t),))[1]
        inner = t - (self.lam(t) - lam) / jax.lax.stop_gradient(slope)
        return jnp.where(jnp.isinf(lam), end, inner)

    def mix(
        self, t: ScalarLike, x0: Float[ArrayLike, "*dims"], eps: Float[ArrayLike, "*dims"]
    ) -> Float[Array, "*dims"]:
        r"""Return the noisy point $x_t = \alpha x_0 + \sigma\epsilon$ of a pair.

        Args:
            t: time, ().
            x0: clean sample, (*dims,), floating.
            eps: its noise, (*dims,), from `noise` or from wherever the pair comes.

        Returns:
            The noisy sample, (*dims,), in the dtype of `x0`.

        Raises:
            ValueError: if `eps` is not of the shape of `x0`.
        """
        x0, eps = floating(x0), jnp.asarray(eps)
        if x0.shape != eps.shape:
            raise _check.bad("mix", "eps", f"of the shape of x0, {x0.shape}", eps.shape)
        return (self.alpha(t) * x0 + self.sigma(t) * eps).astype(x0.dtype)

    def noise(
        self, key: PRNGKeyArray, shape: tuple[int, ...], *, dtype: Any = None
    ) -> Float[Array, "*dims"]:
        r"""Draw $\epsilon$ of one sample, $N(0, I)$ for a Gaussian kernel, by one normal draw."""
        return jax.random.normal(key, shape, jnp.result_type(float) if dtype is None else dtype)

    def perturb(
        self, key: PRNGKeyArray, t: ScalarLike, x0: Float[ArrayLike, "*dims"]
    ) -> tuple[Float[Array, "*dims"], Float[Array, "*dims"]]:
        r"""Draw `noise` and `mix` it in: return $x_t = \alpha x_0 + \sigma\epsilon$ and $\epsilon$.

        Args:
            key: consumed by the draw of the noise.
            t: time, ().
            x0: clean sample, (*dims,), floating.

        Returns:
            The noisy sample and the noise that was added, both (*dims,) in the dtype of `x0`.
        """
        x0 = floating(x0)
        eps = self.noise(key, x0.shape, dtype=x0.dtype)
        return self.mix(t, x0, eps), eps

    def prior(
        self,
        key: PRNGKeyArray,
        shape: tuple[int, ...],
        *,
        t: ScalarLike | None = None,
        dtype: Any = None,
    ) -> Float[Array, "*dims"]:
        r"""Draw from the law at the noise end, $N(0, \sigma(t)^2 I)$ with $t = T$ by default.

        The signal $\alpha_T x_0$ that is still there is dropped; `leak` bounds what that costs.
        """
        dtype = jnp.result_type(float) if dtype is None else dtype
        scale = self.sigma(self.t_max if t is None else t)
        return (scale * jax.random.normal(key, shape, dtype)).astype(dtype)

    def prior_log_prob(
        self, x: Float[ArrayLike, "*dims"], *, t: ScalarLike | None = None
    ) -> Scalar:
        r"""Return $\log N(x; 0, \sigma(t)^2 I)$ in nats, with $t = T$ by default."""
        x = jnp.asarray(x)
        log_sigma = self.log_sigma(self.t_max if t is None else t)
        square = jnp.sum((x * jnp.exp(-log_sigma)) ** 2)
        log_prob = -0.5 * square - x.size * (log_sigma + 0.5 * math.log(2 * math.pi))
        return log_prob.astype(x.dtype)

    def leak(self, second_moment: ScalarLike) -> Scalar:
        r"""Bound the divergence of the law at `t_max` from the prior, in nats.

        $$ KL(q_T \,\|\, N(0, \sigma_T^2 I)) \le \alpha_T^2\,E|x_0|^2 / (2\sigma_T^2) $$

        Args:
            second_moment: $E|x_0|^2$ of the data, summed over dimensions.
        """
        return self.snr(self.t_max) * jnp.asarray(second_moment) / 2

    def grid(
        self,
        n: int,
        kind: str | None = None,
        *,
        t_start: ScalarLike | None = None,
        t_end: ScalarLike | None = None,
        **options: Any,
    ) -> Float[np.ndarray | Array, " nodes"]:
        """Build a strictly decreasing grid of `n` steps: see `jaxdiff.grids.make`.

        The options are those of the kind, as `rho` of `"edm"`.

        Example:
            >>> VP().grid(2)
            array([1.    , 0.5005, 0.001 ])
        """
        kind = self.default_grid if kind is None else kind
        return grids.make(self, n, kind, t_start=t_start, t_end=t_end, **options)


_NOTHING = 2.0**-24  # what float32 rounds off: 6e-8, four times the root of float64's round-off
_TIMES = 257


def vanishing(alpha: Any, sigma: Any) -> tuple[Any, Any]:
    r"""Say whether the signal and the noise of a point count as none, elementwise.

    $$ \alpha \le 2^{-24}\sigma, \qquad \sigma \le 2^{-24}\alpha $$

    so a scale of the size of round-off is 0, as $\cos(\pi t/2)$ at $t = 1$ is in floating point
    ($6\cdot10^{-17}$), and so is the root of a difference that cancels ($1.5\cdot10^{-8}$). A ratio
    of 6e-8 is also what float32 rounds off the other part. Ends that are meant are far from it: EDM
    has 1/80 and 0.002, and a `sigma_max` of 1e6 still counts as signal.

    Args:
        alpha: signal scales, of any shape; in float64, from `host64`, where that can be had.
        sigma: noise scales, of the shape of `alpha`.

    Returns:
        Whether there is no signal, and whether there is no noise.

    Example:
        >>> import numpy as np
        >>> no_signal, no_noise = vanishing(np.cos(np.pi / 2), 1.0)
        >>> bool(no_signal), bool(no_noise)
        (True, False)
    """
    return alpha <= _NOTHING * sigma, sigma <= _NOTHING * alpha


def _table(process: AbstractProcess) -> tuple[Any, ...]:
    """Return the scales and log-SNR at even times, and the times that the log-SNR leads back to."""
    start, end = jnp.asarray(process.t_min, float), jnp.asarray(process.t_max, float)
    ts = start + (end - start) * jnp.linspace(0.0, 1.0, _TIMES)
    ts = ts.at[-1].set(end)

    def row(t: Array) -> tuple[Array, ...]:
        lam = process.lam(t)
        return process.alpha(t), process.sigma(t), lam, process.t_of_lam(lam)

    return ts, *jax.vmap(row)(ts)


def check_path(process: AbstractProcess, where: str = "check_path") -> None:
    """Raise ValueError unless a process is a path from data to noise, as far as can be seen.

    Looked at are 257 even times of `[t_min, t_max]`, in float64 on the host, in one call. Ends
    where the signal or the noise vanishes, by `vanishing`, may have any log-SNR. A process with
    traced parameters passes. Cost: a millisecond or two, once compiled for the type of the process.

    Args:
        process: the process.
        where: name of the calling function, for the message.

    Raises:
        ValueError: if the range is empty or not finite; if alpha or sigma is not finite or is
            negative, or both are 0; if the log-SNR is not finite inside, is not log(alpha/sigma) or
            does not decrease; or if `t_of_lam` does not give the time back.
    """
    if not is_concrete(process):
        return
    ts, alpha, sigma, lam, back = (np.asarray(a) for a in host64(_table, process))
    name = f"process ({type(process).__name__})"
    low, high = ts[0], ts[-1]
    if not (np.all(np.isfinite(ts)) and low < high):
        raise _check.bad(where, name, "of a finite range t_min < t_max", f"[{low:.9g}, {high:.9g}]")

    def every(good: Any, expected: str, **values: Any) -> None:
        if not np.all(good):
            i = int(np.argmin(good))
            got = ", ".join(f"{key}={float(value[i])!r}" for key, value in values.items())
            raise _check.bad(where, name, expected, f"{got} at t={float(ts[i])!r}")

    scales = dict(alpha=alpha, sigma=sigma)
    every(np.isfinite(alpha) & np.isfinite(sigma), "of finite alpha and sigma", **scales)
    least = -_NOTHING * np.maximum(np.abs(alpha), np.abs(sigma))
    every((alpha >= least) & (sigma >= least), "of alpha and sigma that are not negative", **scales)
    every((alpha > 0) | (sigma > 0), "of alpha and sigma that are not both 0", **scales)
    no_signal, no_noise = vanishing(alpha, sigma)
    seen = ~(no_signal | no_noise)
    seen[1:-1] = True  # only the ends may have an infinite log-SNR
    every(np.isfinite(lam) | ~seen, "of finite log-SNR lam inside its range", lam=lam)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.log(alpha / sigma)
        near = np.abs(ratio - lam) <= 1e-4 * np.maximum(1, np.abs(lam))
        close = np.abs(back - ts) <= 1e-5 * (high - low)
        every(near | ~seen, "of lam = log(alpha/sigma)", lam=lam, log_ratio=ratio)
    falls = np.diff(lam[seen], append=-np.inf) < 0
    steady = np.ones(_TIMES, bool)
    steady[seen] = falls
    every(steady, "of a log-SNR lam that decreases in t", lam=lam)
    every(close | ~seen, "of a t_of_lam that inverts lam", t_of_lam=back)


class _LinearBeta(AbstractProcess):
    """The signal of VP and sub-VP: alpha from a beta that grows linearly in time."""

    beta_min: float | Array = 0.1
    beta_max: float | Array = 20.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def __check_init__(self) -> None:
        name = type(self).__name__
        _positive_range(name, beta_min=self.beta_min, beta_max=self.beta_max)
        _positive_range(name, t_min=self.t_min, t_max=self.t_max)

    def integral(self, t: ScalarLike) -> Scalar:
        r"""Return $B(t) = \int_0^t \beta = \tfrac12(\beta_1 - \beta_0)t^2 + \beta_0 t$."""
        return jnp.asarray((0.5 * (self.beta_max - self.beta_min) * t + self.beta_min) * t)

    def t_of_integral(self, integral: Scalar) -> Scalar:
        r"""Return the time at which $B(t)$ equals `integral`, without cancellation."""
        slope = self.beta_max - self.beta_min
        return 2 * integral / (self.beta_min + jnp.sqrt(self.beta_min**2 + 2 * slope * integral))

    def log_alpha(self, t: ScalarLike) -> Scalar:
        r"""Return $-B/2$."""
        return -0.5 * self.integral(t)


class VP(_LinearBeta):
    r"""Variance preserving, linear beta: $\sigma^2 = 1 - \alpha^2$, $\alpha = e^{-B/2}$.

    $$ B(t) = \tfrac12(\beta_1 - \beta_0)t^2 + \beta_0 t, \qquad \lambda = -\tfrac12\log(e^B - 1) $$

    References:
        Ho, Jain, Abbeel 2020 (2006.11239); Song et al. 2021 (2011.13456).
    """

    def log_sigma(self, t: ScalarLike) -> Scalar:
        r"""Return $\tfrac12\log(1 - e^{-B})$."""
        return 0.5 * jnp.log(-jnp.expm1(-self.integral(t)))

    def t_of_lam(self, lam: ScalarLike) -> Scalar:
        r"""Invert by $B = \log(1 + e^{-2\lambda})$."""
        return self.t_of_integral(jax.nn.softplus(-2 * _real(lam)))


class SubVP(_LinearBeta):
    r"""Sub-variance-preserving: alpha of `VP`, $\sigma = 1 - \alpha^2 = 1 - e^{-B}$.

    References:
        Song et al. 2021 (2011.13456), eq. 29.
    """

    def log_sigma(self, t: ScalarLike) -> Scalar:
        r"""Return $\log(1 - e^{-B})$."""
        return jnp.log(-jnp.expm1(-self.integral(t)))

    def t_of_lam(self, lam: ScalarLike) -> Scalar:
        r"""Invert by $B = 2\,\mathrm{asinh}(e^{-\lambda}/2)$."""
        return self.t_of_integral(2 * jnp.arcsinh(jnp.exp(-_real(lam)) / 2))


class Cosine(AbstractProcess):
    r"""Variance preserving, cosine: $\alpha = \cos a/\cos a_0$, $a = \frac\pi2\frac{t+s}{1+s}$.

    $$ \sigma^2 = \frac{\sin(a - a_0)\,\sin(a + a_0)}{\cos^2 a_0} $$

    is the cancellation-free form of $1 - \alpha^2$. The drift diverges at $t = 1$, so the range
    ends at 0.9946, where $\lambda = -4.78$.

    References:
        Nichol, Dhariwal 2021 (2102.09672), eq. 17.
    """

    s: float = 0.008
    t_min: float = 1e-3
    t_max: float = 0.9946

    def __check_init__(self) -> None:
        _positive_range("Cosine", s=self.s)
        _positive_range("Cosine", t_min=self.t_min, t_max=self.t_max)
        if is_concrete(self.t_max) and self.t_max >= 1:
            raise _check.bad("Cosine", "t_max", "less than 1, where alpha is 0", self.t_max)

    def _angles(self, t: ScalarLike) -> tuple[Any, Any, Any]:
        quarter = 0.5 * math.pi / (1 + self.s)
        return quarter * (t + self.s), quarter * t, quarter * self.s  # a, a - a0, a0

    def log_alpha(self, t: ScalarLike) -> Scalar:
        r"""Return $\log\cos a - \log\cos a_0$."""
        a, _, a0 = self._angles(t)
        left = 0.5 * math.pi * (1 - _real(t)) / (1 + self.s)  # pi/2 - a, exact near t = 1
        cosine = jnp.where(a < math.pi / 4, jnp.cos(a), jnp.sin(left))
        return jnp.log(cosine) - jnp.log(jnp.cos(a0))

    def log_sigma(self, t: ScalarLike) -> Scalar:
        r"""Return half the log of $\sin(a - a_0)\sin(a + a_0)/\cos^2 a_0$."""
        a, rise, a0 = self._angles(t)
        return 0.5 * jnp.log(jnp.sin(rise) * jnp.sin(a + a0)) - jnp.log(jnp.cos(a0))

    def t_of_lam(self, lam: ScalarLike) -> Scalar:
        r"""Invert by $\tan a = \sqrt{\sin^2 a_0 + \sigma^2\cos^2 a_0}\,/\,(\alpha\cos a_0)$."""
        lam = _real(lam)
        alpha2, sigma2 = jax.nn.sigmoid(2 * lam), jax.nn.sigmoid(-2 * lam)
        _, _, a0 = self._angles(0.0)
        sine = jnp.sqrt(jnp.sin(a0) ** 2 + sigma2 * jnp.cos(a0) ** 2)
        a = jnp.arctan2(sine, jnp.sqrt(alpha2) * jnp.cos(a0))
        return a * (1 + self.s) * 2 / math.pi - self.s


class VE(AbstractProcess):
    r"""Variance exploding: $\alpha = 1$, $\sigma = \sigma_{min}(\sigma_{max}/\sigma_{min})^t$.

    The path starts at $\sigma(0) = \sigma_{min}$, not at clean data: finish with a denoising step.

    References:
        Song, Ermon 2019 (1907.05600); Song et al. 2021 (2011.13456), eq. 31.
    """

    sigma_min: float | Array = 0.01
    sigma_max: float | Array = 50.0
    t_min: float = 0.0
    t_max: float = 1.0

    def __check_init__(self) -> None:
        _positive_range("VE", sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        if is_concrete(self.sigma_min) and self.sigma_min == 0:
            raise _check.bad("VE", "sigma_min", "positive", self.sigma_min)
        _positive_range("VE", t_min=self.t_min, t_max=self.t_max)

    def log_alpha(self, t: ScalarLike) -> Scalar:
        """Return 0."""
        return jnp.zeros_like(_real(t))

    def log_sigma(self, t: ScalarLike) -> Scalar:
        r"""Return $\log\sigma_{min} + t\,\log(\sigma_{max}/\sigma_{min})$."""
        low, high = jnp.log(self.sigma_min), jnp.log(self.sigma_max)
        return low + _real(t) * (high - low)

    def t_of_lam(self, lam: ScalarLike) -> Scalar:
        r"""Invert the straight line $-\lambda = \log\sigma(t)$."""
        low, high = jnp.log(self.sigma_min), jnp.log(self.sigma_max)
        return (-_real(lam) - low) / (high - low)


class EDM(AbstractProcess):
    r"""Variance exploding with $\sigma(t) = t$: $\alpha = 1$, $t \in [\sigma_{min}, \sigma_{max}]$.

    References:
        Karras et al. 2022 (2206.00364).
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    default_grid: ClassVar[str] = "edm"

    def __check_init__(self) -> None:
        _positive_range("EDM", sigma_min=self.sigma_min, sigma_max=self.sigma_max)

    @property
    def t_min(self) -> Any:
        r"""$\sigma_{min}$."""
        return self.sigma_min

    @property
    def t_max(self) -> Any:
        r"""$\sigma_{max}$."""
        return self.sigma_max

    def log_alpha(self, t: ScalarLike) -> Scalar:
        """Return 0."""
        return jnp.zeros_like(_real(t))

    def log_sigma(self, t: ScalarLike) -> Scalar:
        r"""Return $\log t$."""
        return jnp.log(_real(t))

    def sigma(self, t: ScalarLike) -> Scalar:
        """Return `t` itself: exact, and differentiable at 0."""
        return _real(t)

    def t_of_lam(self, lam: ScalarLike) -> Scalar:
        r"""Return $e^{-\lambda}$."""
        return jnp.exp(-_real(lam))


class Rectified(AbstractProcess):
    r"""Rectified flow (conditional optimal transport): $\alpha = 1 - t$, $\sigma = t$.

    The velocity $dx/dt$ is noise minus data; flow papers run the other way, $t_{flow} = 1 - t$.
    Both ends are included: $\sigma(0) = 0$ and $\alpha(1) = 0$, where log-SNR is infinite.

    References:
        Liu, Gong, Liu 2023 (2209.03003); Lipman et al. 2023 (2210.02747).
    """

    t_min: float = 0.0
    t_max: float = 1.0

    def __check_init__(self) -> None:
        _positive_range("Rectified", t_min=self.t_min, t_max=self.t_max)
        if is_concrete(self.t_max) and self.t_max > 1:
            raise _check.bad("Rectified", "t_max", "at most 1", self.t_max)

    def log_alpha(self, t: ScalarLike) -> Scalar:
        r"""Return $\log(1 - t)$."""
        return jnp.log1p(-_real(t))

    def log_sigma(self, t: ScalarLike) -> Scalar:
        r"""Return $\log t$."""
        return jnp.log(_real(t))

    def alpha(self, t: ScalarLike) -> Scalar:
        """Return `1 - t` itself: exact, and differentiable at 1."""
        return 1 - _real(t)

    def sigma(self, t: ScalarLike) -> Scalar:
        """Return `t` itself: exact, and differentiable at 0."""
        return _real(t)

    def t_of_lam(self, lam: ScalarLike) -> Scalar:
        r"""Return the logistic of $-\lambda$."""
        return jax.nn.sigmoid(-_real(lam))


class Discrete(AbstractProcess):
    r"""A DDPM schedule of integer steps as a continuous path that is exact at the integers.

    $$ \alpha(i)^2 = \bar\alpha_i = \prod_{j \le i}(1 - \beta_j), \qquad \sigma^2 = 1 - \alpha^2 $$

    and $\log\alpha$ is linear in between. Time is the index that published networks were trained
    with, $t \in [0, N - 1]$; the step from index 0 to clean data is `denoise=True` of `jd.sampler`.
    Nodes that the network needs as integers come from `grids.discrete` or any array of indices.

    Args:
        betas: variances of the N forward steps, (N,), inside (0, 1).

    References:
        Ho, Jain, Abbeel 2020 (2006.11239).
    """

    log_alphas: Array | np.ndarray

    def __init__(self, betas: Float[ArrayLike, " n"]) -> None:
        r"""Accumulate $\log\alpha$ in float64, so that 1000 factors cost no precision."""
        if not is_concrete(betas):
            self.log_alphas = 0.5 * jnp.cumsum(jnp.log1p(-jnp.asarray(betas)))
            return
        try:
            values = np.asarray(betas, np.float64)
        except (TypeError, ValueError):
            raise _check.bad("Discrete", "betas", "an array of numbers", repr(betas)) from None
        if values.ndim != 1 or values.size < 2:
            raise _check.bad("Discrete", "betas", "of shape (N,) with N >= 2", values.shape)
        if not np.all((values > 0) & (values < 1)):
            raise _check.bad(
                "Discrete", "betas", "inside (0, 1)", f"{values.min()}..{values.max()}"
            )
        self.log_alphas = 0.5 * np.cumsum(np.log1p(-values))

    @property
    def t_min(self) -> float:
        """0, the index of the first (least noisy) step."""
        return 0.0

    @property
    def t_max(self) -> float:
        """N - 1, the index of the last (noisiest) step."""
        return float(self.log_alphas.shape[0] - 1)

    def _table(self, dtype: Any) -> tuple[Array, Array]:
        xp = np if isinstance(self.log_alphas, np.ndarray) else jnp  # difference before rounding
        return jnp.asarray(self.log_alphas, dtype), jnp.asarray(xp.diff(self.log_alphas), dtype)

    def log_alpha(self, t: ScalarLike) -> Scalar:
        r"""Interpolate $\log\alpha$ linearly between the integers."""
        t = _real(t)
        table, slopes = self._table(t.dtype)
        i = jnp.clip(jnp.floor(t).astype(int), 0, slopes.shape[0] - 1)
        return table[i] + (t - i) * slopes[i]

    def log_sigma(self, t: ScalarLike) -> Scalar:
        r"""Return $\tfrac12\log(1 - \alpha^2)$."""
        return 0.5 * jnp.log(-jnp.expm1(2 * self.log_alpha(t)))

    def t_of_lam(self, lam: ScalarLike) -> Scalar:
        r"""Invert $\log\alpha = -\tfrac12\log(1 + e^{-2\lambda})$ in the table."""
        lam = _real(lam)
        table, slopes = self._table(lam.dtype)
        target = -0.5 * jax.nn.softplus(-2 * lam)
        i = jnp.clip(jnp.searchsorted(-table, -target, side="right") - 1, 0, slopes.shape[0] - 1)
        t = i + (target - table[i]) / slopes[i]
        # Round-off off an integer would reach another row of an embedding: back onto it.
        whole = jnp.round(t)
        close = jnp.abs(t - whole) < 8 * jnp.finfo(t.dtype).eps * table.shape[0]
        return t + jax.lax.stop_gradient(jnp.where(close, whole - t, 0))
