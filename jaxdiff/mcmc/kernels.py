r"""Langevin chains on a log density, or on a denoiser at one noise level.

Notation: the target is $\pi$ with score $s = \nabla\log\pi$; $z$ are standard normals, $h$ is the
step. The overdamped and the kinetic diffusion both leave $\pi$ invariant,

$$ dx = s(x)\,dr + \sqrt2\,dW, \qquad
   dx = v\,dr, \quad dv = (u\,s(x) - \gamma v)\,dr + \sqrt{2\gamma u}\,dW $$

the second together with $v \sim N(0, uI)$. Sampler time $r$ is not the time $t$ of a denoiser,
which stays fixed: the target is then the diffused law $q_t$. What is left of the step is a bias,
here on a Gaussian of precision k, with $a = hk$:

| kernel | scores per step | variance of x it settles at, times k |
|---|---|---|
| `ula` | 1 | $1/(1 - a/2)$ |
| `randomised_midpoint` | 2 | $(2 - 2a + a^2)/(2 - 2a + a^2 - a^3/3)$ |
| `mala` | 1, and 1 log density | 1, on any target |
| `newton` | 1, and 1 to 3 curvatures | 1 |
| `baoab` | 1 | 1; $O(h^2)$ from the law on other targets |
| `underdamped` | 1 or 2, by the solver | $1 + O(h^2)$ or better |

Langevin steps between the steps of a solver, the predictor-corrector method, are
`jaxdiff.solvers.Langevin`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import eval_context
from jaxtyping import Array, Float, PRNGKeyArray

from jaxdiff import _check
from jaxdiff._array import Scalar, ScalarLike
from jaxdiff._host import is_concrete
from jaxdiff._keys import stream
from jaxdiff.fisher.curvature import Newton
from jaxdiff.mcmc.chains import Info, Kernel, like, positive, start
from jaxdiff.mcmc.targets import AbstractDensity, AbstractTarget, Marginal
from jaxdiff.process import EDM
from jaxdiff.score import Denoiser
from jaxdiff.solvers.hooks import LangevinStep

__all__ = [
    "Adjusted",
    "Kinetic",
    "Overdamped",
    "Proposed",
    "baoab",
    "mala",
    "newton",
    "randomised_midpoint",
    "ula",
    "underdamped",
]


class Overdamped(NamedTuple):
    """State of a chain without velocity or memory: `x`, (*dims,)."""

    x: Float[Array, "*dims"]


class Adjusted(NamedTuple):
    """State of a Metropolis-adjusted chain: what is known at `x`, (*dims,)."""

    x: Float[Array, "*dims"]
    log_density: Scalar
    score: Float[Array, "*dims"]


class Proposed(NamedTuple):
    """State of a Metropolis-adjusted Newton chain: what is known at `x`, (*dims,)."""

    x: Float[Array, "*dims"]
    log_density: Scalar
    proposal: Any


class Kinetic(NamedTuple):
    """State of a kinetic chain.

    Attributes:
        x: the sample, (*dims,).
        v: its velocity, (*dims,).
        cache: what the method keeps: the score at `x` for `baoab`, the state of the solver for
            `underdamped`.
    """

    x: Float[Array, "*dims"]
    v: Float[Array, "*dims"]
    cache: Any


_NEWTON = Newton()


def _is_target(where: str, value: Any) -> None:
    if not isinstance(value, AbstractTarget):
        raise _check.bad(where, "target", "made by target(...)", repr(value))


def _normal(key: PRNGKeyArray, x: Array) -> Array:
    return jax.random.normal(key, x.shape, x.dtype)


def _velocity(key: PRNGKeyArray | None, x: Array, u: Any) -> Array:
    """Return a velocity: 0, or a draw from the law that the chain leaves invariant."""
    return jnp.zeros_like(x) if key is None else jnp.sqrt(like(x, u)[0]) * _normal(key, x)


def _info(x: Array, x1: Array, acceptance: Any = 1.0) -> Info:
    return Info(like(x, acceptance)[0], jnp.sum((x1 - x) ** 2))


def _overdamped(move: Callable[[PRNGKeyArray, Array], Array]) -> Kernel:
    """Return the kernel of a move that remembers nothing."""

    def step(key: PRNGKeyArray, state: Overdamped) -> tuple[Overdamped, Info]:
        x1 = move(key, state.x)
        return Overdamped(x1), _info(state.x, x1)

    return Kernel(lambda x, key=None: Overdamped(start(x)), step)


def ula(target: AbstractTarget, step_size: ScalarLike) -> Kernel:
    r"""Build the unadjusted Langevin algorithm.

    $$ x' = x + h\,s(x) + \sqrt{2h}\,z $$

    Stable for h below 2/L, L the largest curvature of $-\log\pi$; from 0.1/L to 0.5/L are common.
    Cost: 1 score per step.

    Args:
        target: a target.
        step_size: $h$, positive, (); may be traced.

    Raises:
        ValueError: if `target` is none or `step_size` is not positive.

    Example:
        >>> from jaxdiff.mcmc import run, target
        >>> kernel = ula(target(lambda x: -0.5 * jnp.sum(x**2)), 0.1)
        >>> run(jax.random.key(0), kernel, jnp.zeros(3), 50).x.shape
        (3,)

    References:
        Roberts, Tweedie 1996.
    """
    _is_target("ula", target)
    positive("ula", step_size=step_size)

    def move(key: PRNGKeyArray, x: Array) -> Array:
        (step,) = like(x, step_size)
        return x + step * target.score(x) + jnp.sqrt(2 * step) * _normal(key, x)

    return _overdamped(move)


def randomised_midpoint(target: AbstractTarget, step_size: ScalarLike) -> Kernel:
    r"""Build the randomised midpoint method: the score at a uniformly random time of the step.

    $$ x_w = x + wh\,s(x) + \sqrt2\,W_{wh}, \qquad x' = x + h\,s(x_w) + \sqrt2\,W_h, \qquad
       w \sim U(0, 1) $$

    on one Brownian path: $W_{wh} = \sqrt{wh}\,z_1$, $W_h = W_{wh} + \sqrt{(1-w)h}\,z_2$. On
    average over $w$ the score is integrated exactly, so that the bias falls much faster than that
    of `ula`. Cost: 2 scores per step.

    Args:
        target: a target.
        step_size: $h$, positive, (); may be traced.

    Raises:
        ValueError: as `ula`.

    References:
        Shen, Lee 2019 (1909.05503), algorithm 1, without velocity; Yu, Karagulyan, Dalalyan 2023
        (2306.08494).
    """
    _is_target("randomised_midpoint", target)
    positive("randomised_midpoint", step_size=step_size)

    def move(key: PRNGKeyArray, x: Array) -> Array:
        (step,) = like(x, step_size)
        when = jax.random.uniform(stream(key, 0), (), x.dtype)
        first = jnp.sqrt(2 * step * when) * _normal(stream(key, 1), x)
        second = jnp.sqrt(2 * step * (1 - when)) * _normal(stream(key, 2), x)
        middle = x + when * step * target.score(x) + first
        return x + step * target.score(middle) + first + second

    return _overdamped(move)


def mala(target: AbstractTarget, step_size: ScalarLike) -> Kernel:
    r"""Build the Metropolis-adjusted Langevin algorithm, by blackjax.

    $$ y = x + h\,s(x) + \sqrt{2h}\,z, \qquad P(x' = y) = \min\left(1,
       \frac{\pi(y)\,N(x; y + h\,s(y), 2hI)}{\pi(x)\,N(y; x + h\,s(x), 2hI)}\right) $$

    Exact for any h: the proposal is that of `ula`, and its bias is rejected. In high dimension the
    mean acceptance to aim at is 0.574. The chain runs in JAX's default float dtype or wider, in
    which blackjax draws its noise. Cost: 1 log density and its gradient per step.

    Args:
        target: a target with a log density: from a log density or an exact denoiser.
        step_size: $h$, positive, (); may be traced.

    Raises:
        ValueError: as `ula`, and if the target has no log density.
        ImportError: if blackjax is not installed.

    References:
        Roberts, Tweedie 1996; Roberts, Rosenthal 1998 for the acceptance.
    """
    _is_target("mala", target)
    positive("mala", step_size=step_size)
    if not isinstance(target, AbstractDensity):
        expected = "one with a log density: of a log density or an exact denoiser"
        raise _check.bad("mala", "target", expected, repr(target))
    log_density = target.log_density
    try:
        import blackjax
        from blackjax.mcmc.mala import MALAState
    except ImportError as error:
        hint = 'mala: blackjax must be installed: pip install "jaxdiff[mc]"'
        raise ImportError(hint) from error
    kernel = blackjax.mala.build_kernel()

    def init(x: Any, key: PRNGKeyArray | None = None) -> Adjusted:
        x = start(x)
        x = x.astype(jnp.promote_types(x.dtype, jnp.result_type(float)))
        return Adjusted(*blackjax.mala.init(x, log_density))

    def step(key: PRNGKeyArray, state: Adjusted) -> tuple[Adjusted, Info]:
        before = MALAState(*state)  # type: ignore[arg-type]
        new, info = kernel(key, before, log_density, *like(state.x, step_size))
        return Adjusted(*new), _info(state.x, new.position, info.acceptance_rate)

    return Kernel(init, step)


def newton(
    target: AbstractTarget, rule: LangevinStep = _NEWTON, *, metropolis: bool = False
) -> Kernel:
    r"""Build Langevin preconditioned by the diffusion Fisher: see `fisher.Newton`.

    $$ dx = (P\,s(x) + \Gamma)\,dr + \sqrt{2P}\,dW, \qquad
       P \approx \sigma^2(\sigma^2 F + \delta I)^{-1}, \quad F = -\nabla^2\log\pi $$

    For a log density sigma is 1, so that the damping $\delta$ is in units of F. With `metropolis`
    the step without $\Gamma$ is a proposal, accepted or not as in `mala`, with the density of its
    normal law both ways: exact for any step size, any curvature and any damping. A chain that
    starts where the log density is NaN stays there, with acceptance 0.

    Cost: that of the rule; adjusted, one score, one log density and one curvature per step.

    Args:
        target: a target.
        rule: a `fisher.Newton`; or, unadjusted, any rule `(denoiser, t, x, z, cond) -> x`.
        metropolis: whether to accept or reject; needs a target with a log density.

    Raises:
        ValueError: if `target` is none, or has no log density to accept by, or `rule` no proposal.

    References:
        Girolami, Calderhead 2011, "Riemann manifold Langevin and Hamiltonian Monte Carlo methods".
    """
    _is_target("newton", target)
    if not callable(rule) or isinstance(rule, type):
        expected = "a step (denoiser, t, x, z, cond) -> x, as fisher.Newton()"
        raise _check.bad("newton", "rule", expected, repr(rule))
    if isinstance(target, Marginal):
        denoiser, t, cond = target.denoiser, target.t, target.cond
    else:
        score = lambda t, x, cond=None: target.score(x)  # noqa: E731
        denoiser, t, cond = Denoiser(EDM(0.5, 2.0), score, "score"), 1.0, None
    if not metropolis:
        return _overdamped(lambda key, x: rule(denoiser, t, x, _normal(key, x), cond))
    if not isinstance(target, AbstractDensity):
        expected = "one with a log density: of a log density or an exact denoiser"
        raise _check.bad("newton", "target", expected, repr(target))
    if not isinstance(rule, Newton):
        raise _check.bad("newton", "rule", "a fisher.Newton under metropolis", repr(rule))
    density: AbstractDensity = target

    def at(x: Array) -> Proposed:
        return Proposed(x, density.log_density(x), rule.proposal(denoiser, t, x, cond))

    def step(key: PRNGKeyArray, state: Proposed) -> tuple[Proposed, Info]:
        x, log_density, proposal = state
        new = at(proposal.at(_normal(stream(key, 0), x)).astype(x.dtype))
        log_ratio = new.log_density - log_density
        log_ratio += new.proposal.log_density(x) - proposal.log_density(new.x)
        log_ratio = jnp.where(jnp.isnan(log_ratio), -jnp.inf, jnp.minimum(log_ratio, 0))
        accepted = jnp.log(jax.random.uniform(stream(key, 1), (), x.dtype)) < log_ratio
        end = jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, state)
        return end, _info(x, end.x, jnp.exp(log_ratio))

    return Kernel(lambda x, key=None: at(start(x)), step)


def baoab(
    target: AbstractTarget, step_size: ScalarLike, gamma: ScalarLike, u: ScalarLike = 1.0
) -> Kernel:
    r"""Build the splitting BAOAB of the kinetic diffusion.

    $$ v \mathrel{+}= \tfrac h2 u\,s(x), \quad x \mathrel{+}= \tfrac h2 v, \quad
       v \leftarrow cv + \sqrt{u(1 - c^2)}\,z, \quad x \mathrel{+}= \tfrac h2 v, \quad
       v \mathrel{+}= \tfrac h2 u\,s(x), \qquad c = e^{-\gamma h} $$

    On a Gaussian target $x$ has the right law for every stable step, $h^2 u L < 4$; elsewhere it is
    off by $O(h^2)$, and by $O(h^4)$ as $\gamma \to \infty$. The velocity is less accurate than the
    sample. Cost: 1 score per step, and 1 at the start.

    Args:
        target: a target.
        step_size: $h$, positive, (); $0.5/\sqrt{uL}$ is a cautious one.
        gamma: friction $\gamma$, positive, (); $2\sqrt{uL}$ damps the stiffest direction
            critically.
        u: inverse mass, positive, (): the variance of the velocity.

    Raises:
        ValueError: if `target` is none or a number is not positive.

    References:
        Leimkuhler, Matthews 2013 (1203.5428).
    """
    _is_target("baoab", target)
    positive("baoab", step_size=step_size, gamma=gamma, u=u)

    def init(x: Any, key: PRNGKeyArray | None = None) -> Kinetic:
        x = start(x)
        return Kinetic(x, _velocity(key, x, u), target.score(x))

    def step(key: PRNGKeyArray, state: Kinetic) -> tuple[Kinetic, Info]:
        x, v, score = state
        half, rate, mass = like(x, 0.5 * step_size, gamma, u)
        keep, fresh = jnp.exp(-2 * half * rate), jnp.sqrt(-mass * jnp.expm1(-4 * half * rate))
        v = v + half * mass * score
        x1 = x + half * v
        v = keep * v + fresh * _normal(key, x)
        x1 = x1 + half * v
        score = target.score(x1)
        v = v + half * mass * score
        return Kinetic(x1, v, score), _info(x, x1)

    return Kernel(init, step)


def underdamped(
    target: AbstractTarget,
    step_size: ScalarLike,
    gamma: ScalarLike,
    u: ScalarLike = 1.0,
    *,
    solver: dfx.AbstractFosterLangevinSRK | None = None,
) -> Kernel:
    r"""Build the kinetic diffusion as one of diffrax's Langevin solvers steps it.

    Stochastic Runge-Kutta methods, exact in the friction and the noise, which read the integrals of
    the Brownian path over the step (space-time Lévy areas) as well as its increment.

    | solver | order | scores per step |
    |---|---|---|
    | `diffrax.QUICSORT()` | 3 | 2 |
    | `diffrax.ShOULD()` | 3 | 2, and 1 at the start |
    | `diffrax.ALIGN()` | 2 | 1, and 1 at the start |

    The orders are strong ones: they follow the path, and the velocity, not only the law of $x$. For
    that law alone `baoab` is as accurate for less: on a double well $-(x^2 - 1)^2$ with h = 0.2,
    $E[x^2]$ was wrong by 2e-3 with `baoab` and QUICSORT, 6e-3 with ALIGN and less than 1e-3 with
    ShOULD; with h = 0.1, at the cost of the last, by less than 1e-3 with `baoab` too.

    Args:
        target: a target.
        step_size: $h$, positive, (); may be traced, but not differentiated.
        gamma: friction $\gamma$, positive, a known number.
        u: inverse mass, positive, a known number: the variance of the velocity.
        solver: one of the table; `diffrax.QUICSORT()` by default.

    Raises:
        ValueError: if `target` is none, a number is not positive, `gamma` or `u` is traced, or
            `solver` is of another kind.

    References:
        Foster, Lyons, Oberhauser 2021 (2101.03446).
    """
    where = "underdamped"
    _is_target(where, target)
    positive(where, step_size=step_size, gamma=gamma, u=u)
    method = dfx.QUICSORT() if solver is None else solver
    if not isinstance(method, dfx.AbstractFosterLangevinSRK):
        raise _check.bad(where, "solver", "QUICSORT, ShOULD or ALIGN of diffrax", repr(solver))
    for name, value in (("gamma", gamma), ("u", u)):
        if not is_concrete(value):  # diffrax would compare it on the host, from inside the program
            raise _check.bad(where, name, "a known number; baoab takes traced ones", repr(value))
    enough = issubclass(dfx.SpaceTimeLevyArea, method.minimal_levy_area)
    area: Any = dfx.SpaceTimeLevyArea if enough else dfx.SpaceTimeTimeLevyArea

    def terms(slope: Callable[[Array, Any], Array], path: Any) -> Any:
        drift = dfx.UnderdampedLangevinDriftTerm(gamma, u, slope)
        return dfx.MultiTerm(drift, dfx.UnderdampedLangevinDiffusionTerm(gamma, u, path))

    def init(x: Any, key: PRNGKeyArray | None = None) -> Kinetic:
        x = start(x)
        # The coefficients, which fill most of the solver's state, are the same for all coordinates:
        # those of one number serve. They pass diffrax's checks now, outside any trace, and not by
        # callbacks from the program; the first step adapts them to h.
        with eval_context():
            zero, one = jnp.zeros((), x.dtype), jnp.ones((), x.dtype)
            cache = method.init(terms(lambda x, args: x, None), 0.0, one, (zero, zero), None)
        if cache.prev_f is not None:
            cache = eqx.tree_at(lambda cache: cache.prev_f, cache, -target.score(x))
        return Kinetic(x, _velocity(key, x, u), cache)

    def step(key: PRNGKeyArray, state: Kinetic) -> tuple[Kinetic, Info]:
        x, v, cache = state
        # A new path per step, read once: independence of its increments is all that is asked of it.
        path = dfx.UnsafeBrownianPath(jax.ShapeDtypeStruct(x.shape, x.dtype), key, area)
        system = terms(lambda x, args: -target.score(x), path)
        (end,) = like(x, step_size)
        (x1, v1), _, _, cache, _ = method.step(system, 0.0, end, (x, v), None, cache, False)
        return Kinetic(x1, v1, cache), _info(x, x1)

    return Kernel(init, step)
