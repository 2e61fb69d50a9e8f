r"""Clocks, and the PF-ODE and the reverse SDE as diffrax terms.

Notation: $m$ and $\hat\epsilon$ are the denoiser's views, $\lambda = \log(\alpha/\sigma)$. In the
right clock both equations lose their linear part, so that a textbook solver is an exponential
integrator:

| clock | time | state | equation |
|---|---|---|---|
| `"t"` | $t$ | $x$ | $dx/dt = \alpha' m + \sigma'\hat\epsilon$ |
| `"r"` | $r = \alpha/\sigma$ | $x/\sigma$ | $dy/dr = m$ |
| `"s"` | $s = \sigma/\alpha$ | $x/\alpha$ | $dy/ds = \hat\epsilon$ |
| `"lam"` | $\lambda$ | $x/\sqrt{\alpha^2+\sigma^2}$ | $dy/d\lambda = \bar\alpha\bar\sigma(\bar\sigma m - \bar\alpha\hat\epsilon)$ |
| `"u"` | $u = \alpha^2/\sigma^2$ | $\alpha x/\sigma^2$ | $dY = m\,du + dB$ (SDE) |

with $\bar\alpha, \bar\sigma$ the scales divided by $\sqrt{\alpha^2 + \sigma^2}$. Sampling goes up in
`r`, `lam` and `u`, and down in `t` and `s`. Euler in `r` or `s` is DDIM; Euler-Maruyama in `u` is
ancestral DDPM sampling.
"""  # noqa: E501

from typing import Any, Literal, NamedTuple, TypeAlias

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jaxdiff import _check
from jaxdiff._array import Cond, Scalar, ScalarLike
from jaxdiff.process import AbstractProcess
from jaxdiff.score import AbstractDenoiser

__all__ = [
    "USES",
    "AdditiveNoise",
    "Clock",
    "ClockName",
    "Field",
    "GridBrownian",
    "View",
    "log_snr_drift",
    "pf_ode",
    "reverse_sde",
    "view",
]

ClockName: TypeAlias = Literal["t", "r", "s", "lam", "u"]

# name: (clock of lam, lam of clock, state / x from alpha and sigma)
_CLOCKS: dict[str, tuple[Any, Any, Any]] = {
    "r": (jnp.exp, jnp.log, lambda alpha, sigma: 1 / sigma),
    "s": (lambda lam: jnp.exp(-lam), lambda c: -jnp.log(c), lambda alpha, sigma: 1 / alpha),
    "lam": (lambda lam: lam, lambda c: c, lambda alpha, sigma: 1 / jnp.hypot(alpha, sigma)),
    "u": (
        lambda lam: jnp.exp(2 * lam),
        lambda c: jnp.log(c) / 2,
        lambda alpha, sigma: alpha / sigma**2,
    ),
}


class Clock(eqx.Module):
    """A change of time and state, in which the equations are written.

    Attributes:
        process: the Gaussian path.
        name: one of `"t"`, `"r"`, `"s"`, `"lam"`, `"u"`; see the module's table.
    """

    process: AbstractProcess
    name: ClockName = eqx.field(static=True)

    def __check_init__(self) -> None:
        _check.choice("Clock", "name", self.name, ("t", *_CLOCKS))

    def of_t(self, t: ScalarLike) -> Scalar:
        """Return the clock's reading at time `t`."""
        return jnp.asarray(t) if self.name == "t" else _CLOCKS[self.name][0](self.process.lam(t))

    def t(self, c: ScalarLike) -> Scalar:
        """Return the time at which the clock reads `c`."""
        c = jnp.asarray(c)
        return c if self.name == "t" else self.process.t_of_lam(_CLOCKS[self.name][1](c))

    def scale(self, t: ScalarLike) -> ScalarLike:
        """Return the factor between the clock's state and `x` at time `t`: `state = scale x`."""
        if self.name == "t":
            return 1.0
        return _CLOCKS[self.name][2](self.process.alpha(t), self.process.sigma(t))


def log_snr_drift(alpha: Scalar, sigma: Scalar, m: Array, eps: Array) -> Array:
    r"""Return $dy/d\lambda = \bar\alpha\bar\sigma(\bar\sigma m - \bar\alpha\hat\epsilon)$."""
    return (sigma * m - alpha * eps) * alpha * sigma / jnp.hypot(alpha, sigma) ** 3


class Field(eqx.Module):
    """The drift of a denoiser in a clock: a diffrax vector field `(c, y, args) -> dy/dc`."""

    denoiser: AbstractDenoiser
    clock: Clock
    cond: Cond = None

    def __call__(self, c: ScalarLike, y: Float[Array, "*dims"], args: Any = None) -> Array:
        """Return the drift at clock reading `c` and state `y`, from one denoiser evaluation."""
        t = self.clock.t(c)
        x = (y / self.clock.scale(t)).astype(y.dtype)
        match self.clock.name:
            case "t":
                return self.denoiser.velocity(t, x, self.cond)
            case "s":
                return self.denoiser.eps(t, x, self.cond)
            case "lam":
                alpha, sigma = self.clock.process.alpha(t), self.clock.process.sigma(t)
                m, eps = self.denoiser.pair(t, x, self.cond)
                return log_snr_drift(alpha, sigma, m, eps).astype(y.dtype)
            case _:
                return self.denoiser(t, x, self.cond)


class AdditiveNoise(dfx.AbstractTerm):
    """The term `dB` of unit, state-independent noise.

    A lineax identity would have no leaves, which diffrax's stochastic Runge-Kutta methods
    mistake for no noise at all; this term carries an array of ones instead.
    """

    path: dfx.AbstractBrownianPath

    def vf(self, t: Any, y: Array, args: Any) -> Array:
        """Return ones in the shape of the state."""
        return jnp.ones_like(y)

    def contr(self, t0: Any, t1: Any, **kwargs: Any) -> Any:
        """Return the increment of the path."""
        return self.path.evaluate(t0, t1, **kwargs)

    def prod(self, vf: Array, control: Array) -> Array:
        """Return the elementwise product."""
        return vf * control


USES = 16  # independent draws in one step of a grid-keyed path


class GridBrownian(dfx.AbstractBrownianPath):
    """A Brownian path whose increments are keyed by the step of a fixed grid.

    Increment `k`, over `[nodes[k], nodes[k + 1]]`, is `sqrt(nodes[k + 1] - nodes[k])` times a
    normal draw from `fold_in(key, k)`: as fast as drawing noise by hand, and a function of `key`
    and `k` only. Ask for one grid step at a time: any other interval is answered with NaN, since
    this path has no value there. (Adaptive SDE solves need `diffrax.VirtualBrownianTree`, which is
    tens of times slower.)

    Attributes:
        key: one key for the whole path.
        nodes: strictly increasing clock readings, (n + 1,).
        shape: shape and dtype of the state.
        levy_area: which integrals `evaluate(..., use_levy=True)` draws beside the increment.
    """

    key: PRNGKeyArray
    nodes: Float[Array, " nodes"]
    shape: jax.ShapeDtypeStruct = eqx.field(static=True)
    levy_area: Any = eqx.field(static=True, default=dfx.SpaceTimeTimeLevyArea)

    @property
    def t0(self) -> Array:
        """The first node."""
        return self.nodes[0]

    @property
    def t1(self) -> Array:
        """The last node."""
        return self.nodes[-1]

    def stream(self, step: Any, use: int = 0) -> PRNGKeyArray:
        """Return the key of one of the `USES` uses of randomness in a step."""
        return jax.random.fold_in(self.key, USES * step + use)

    def normal(self, step: Any, use: int = 0) -> Array:
        """Return a standard normal of a step: use 0 is the increment, 1 and 2 Levy areas."""
        return jax.random.normal(self.stream(step, use), self.shape.shape, self.shape.dtype)

    def evaluate(
        self, t0: Any, t1: Any = None, left: bool = True, use_levy: bool = False
    ) -> Array | dfx.AbstractBrownianIncrement:
        """Return the increment over one grid step, or NaN if `[t0, t1]` is not one."""
        if t1 is None:
            raise _check.bad("GridBrownian", "t1", "given: the path knows increments only", None)
        # From the middle of the interval, so that the round-off of its ends does not matter.
        step = jnp.searchsorted(self.nodes, (t0 + t1) / 2) - 1
        low, high = self.nodes[step], self.nodes[step + 1]
        tolerance = 1e-3 * (high - low)
        is_step = (jnp.abs(t0 - low) < tolerance) & (jnp.abs(t1 - high) < tolerance)
        dt = jnp.where(is_step, t1 - t0, jnp.nan).astype(self.shape.dtype)
        w = jnp.sqrt(dt) * self.normal(step)
        if not use_levy:
            return w
        kinds: dict[Any, tuple[float, ...]] = {
            dfx.BrownianIncrement: (),
            dfx.SpaceTimeLevyArea: (12,),
            dfx.SpaceTimeTimeLevyArea: (12, 720),
        }
        areas = [
            jnp.sqrt(dt / variance) * self.normal(step, use)
            for use, variance in enumerate(kinds[self.levy_area], 1)
        ]
        return self.levy_area(dt, w, *areas)


def pf_ode(denoiser: AbstractDenoiser, clock: ClockName = "r", cond: Cond = None) -> dfx.ODETerm:
    r"""Return the probability-flow ODE of a denoiser as a diffrax term.

    $$ dx/dt = f x - \tfrac12 g^2\,\nabla\log q_t(x) $$

    written in the clock and state of the module's table. Every diffrax ODE solver works on it.
    Tolerances of adaptive solvers act on the clock's state; step adaptively in `"lam"` only.
    Cost: one denoiser evaluation per evaluation of the vector field.

    Args:
        denoiser: the denoiser.
        clock: `"t"`, `"r"`, `"s"` or `"lam"`.
        cond: condition passed to the denoiser.

    Raises:
        ValueError: if `clock` is unknown, or `"u"`, which belongs to the SDE.

    References:
        Song et al. 2021 (2011.13456), eq. 13.
    """
    if not isinstance(denoiser, AbstractDenoiser):
        raise _check.bad("pf_ode", "denoiser", "a jaxdiff denoiser", repr(denoiser))
    _check.choice("pf_ode", "clock", clock, ("t", "r", "s", "lam"))
    return dfx.ODETerm(Field(denoiser, Clock(denoiser.process, clock), cond))


def reverse_sde(
    denoiser: AbstractDenoiser, noise: dfx.AbstractBrownianPath, cond: Cond = None
) -> dfx.MultiTerm:
    r"""Return the reverse-time SDE of a denoiser as diffrax terms, in clock `"u"`.

    $$ dx = (f x - g^2\,\nabla\log q_t)\,dt + g\,d\bar W \quad\Longleftrightarrow\quad
       dY = m\,du + dB $$

    with $u = \alpha^2/\sigma^2$ increasing and $Y = \alpha x/\sigma^2$: additive unit noise, so
    every diffrax SDE solver works, those for additive noise (`SEA`, `ShARK`) included. Cost: one
    denoiser evaluation per drift evaluation.

    Args:
        denoiser: the denoiser.
        noise: a Brownian path in clock `"u"`: `GridBrownian` on a fixed grid.
        cond: condition passed to the denoiser.

    References:
        Song et al. 2021 (2011.13456), eq. 6, after the change of clock.
    """
    field = Field(denoiser, Clock(denoiser.process, "u"), cond)
    return dfx.MultiTerm(dfx.ODETerm(field), AdditiveNoise(noise))


class View(NamedTuple):
    """What a solver of ours sees of its terms: the field, the noise and the two times."""

    field: Field
    path: dfx.AbstractBrownianPath | None
    c0: Any
    c1: Any

    def normal(self, step: Any, x: Array, *, use: int = 0, ends: Any = None) -> Array:
        """Return a standard normal of this step: the increment between two times, normalised.

        A path keyed by the grid draws it from its `use` and the step; any other path is asked for
        its increment between `ends`, the whole step by default.
        """
        if isinstance(self.path, GridBrownian):
            return self.path.normal(step, use)
        if self.path is None:
            raise _check.bad("solver", "terms", "those of reverse_sde: it needs noise", "an ODE")
        c0, c1 = (self.c0, self.c1) if ends is None else (self.field.clock.of_t(t) for t in ends)
        low, high = jnp.minimum(c0, c1), jnp.maximum(c0, c1)
        return (self.path.evaluate(low, high) / jnp.sqrt(high - low)).astype(x.dtype)


def view(terms: Any, c0: Any, c1: Any) -> View:
    """Unpack the terms of `pf_ode` or `reverse_sde`, also when diffrax has turned time round."""
    drift, noise = terms.terms if isinstance(terms, dfx.MultiTerm) else (terms, None)
    direction = getattr(drift, "direction", 1)  # diffeqsolve wraps terms so that time increases
    drift, noise = getattr(drift, "term", drift), getattr(noise, "term", noise)
    field = getattr(drift, "vector_field", None)
    if not isinstance(field, Field):
        raise _check.bad("solver", "terms", "those of pf_ode or reverse_sde", type(drift).__name__)
    return View(field, getattr(noise, "path", None), c0 * direction, c1 * direction)
