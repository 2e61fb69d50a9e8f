r"""Stochastic interpolants: data and any base law, joined by a bridge, with a tunable diffusion.

Notation: $x_0$ data and $x_1$ base, drawn together or independently, $z \sim N(0, I)$,

$$ x_t = \alpha(t)\,x_0 + \beta(t)\,x_1 + \gamma(t)\,z, \qquad t \in [0, 1], $$

with $\alpha, \beta, \gamma$ equal to $1, 0, 0$ at $t = 0$ and $0, 1, 0$ at $t = 1$. (Papers put the
base at time 0: their $t$ is our $1 - t$, their velocity our $-b$.) Two regressions are learnt,

$$ b(t, x) = E[\alpha' x_0 + \beta' x_1 + \gamma' z \,|\, x_t = x], \qquad
   \eta(t, x) = E[z \,|\, x_t = x], \qquad \nabla\log q_t = -\eta/\gamma, $$

and for every $e(t) \ge 0$ the solution, from $x_1$ at $t = 1$ down to $t = 0$, of

$$ dx = (b - e\,\nabla\log q_t)\,dt + \sqrt{2e}\,d\bar W $$

has the law of $x_t$ at every time; $e = 0$ is an ODE. With a standard normal base, independent of
the data, this is a Gaussian path: see `as_process`. Otherwise there is no denoiser behind $b$ and
no log-SNR that solvers could step in, hence this file.

References: Albergo, Boffi, Vanden-Eijnden 2023 (2303.08797), theorem 5 and corollary 6.
"""

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from jaxdiff import _check, grids
from jaxdiff._array import Cond, NetFn, Scalar, ScalarLike, time_dtype
from jaxdiff._host import host64, is_concrete
from jaxdiff._keys import INIT, SOLVER, stream
from jaxdiff._numerics import safe_sqrt
from jaxdiff._sampler import State, prepare
from jaxdiff._steps import DiffraxSolve, bounded
from jaxdiff.process import AbstractProcess, Rectified
from jaxdiff.score import floating
from jaxdiff.solvers.terms import AdditiveNoise, GridBrownian

__all__ = ["Interpolant", "Model", "as_process", "bridge"]


def _rise(t: Any) -> Any:
    return jnp.sin(0.5 * math.pi * t)


# alpha and beta; the sine of 1 - t is the cosine, exactly 0 at t = 1
_PATHS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "linear": (lambda t: 1 - t, lambda t: t),
    "trigonometric": (lambda t: _rise(1 - t), _rise),
}
# gamma^2 of a scale; sin(pi t) = 2 sin(pi t/2) cos(pi t/2), exactly 0 at both ends
_GAMMA2: dict[str, Callable[[Any, Any], Any]] = {
    "zero": lambda a, t: jnp.zeros_like(t),
    "sqrt": lambda a, t: 2 * a**2 * t * (1 - t),
    "sin2": lambda a, t: a**2 * (2 * _rise(t) * _rise(1 - t)) ** 4,
}


class Interpolant(eqx.Module):
    r"""The three scales of a bridge between data and base: see `bridge`.

    The noise level is given by its square, whose slope is finite where $\gamma = \sqrt{2t(1-t)}$
    has none: $\gamma\gamma' = (\gamma^2)'/2$ is all that $b$ needs at the ends.

    Attributes:
        alpha: $\alpha(t)$, any differentiable callable of one time.
        beta: $\beta(t)$.
        gamma2: $\gamma(t)^2$.

    Raises:
        ValueError: if a scale has a wrong value at an end.
    """

    alpha: Callable[[Any], Any]
    beta: Callable[[Any], Any]
    gamma2: Callable[[Any], Any]

    def __check_init__(self) -> None:
        ends = [host64(Interpolant.jet, self, t)[0] for t in (0.0, 1.0)]
        wanted = {"alpha": (1, 0), "beta": (0, 1), "gamma2": (0, 0)}
        for (name, want), *got in zip(wanted.items(), *ends, strict=True):
            if is_concrete(got) and not np.allclose(got, want, atol=1e-6):
                expected = f"{want[0]} at t = 0 (data) and {want[1]} at t = 1 (base)"
                got = f"{float(got[0])!r} and {float(got[1])!r}"
                raise _check.bad("Interpolant", name, expected, got)

    def jet(self, t: ScalarLike) -> tuple[tuple[Scalar, ...], tuple[Scalar, ...]]:
        r"""Return $(\alpha, \beta, \gamma^2)$ and their derivatives."""
        scales, t = (self.alpha, self.beta, self.gamma2), floating(t)
        all_of = lambda t: tuple(jnp.asarray(scale(t)) for scale in scales)  # noqa: E731
        return jax.jvp(all_of, (t,), (jnp.ones_like(t),))

    def perturb(
        self,
        key: PRNGKeyArray,
        t: ScalarLike,
        x0: Float[ArrayLike, "*dims"],
        x1: Float[ArrayLike, "*dims"],
    ) -> tuple[Float[Array, "*dims"], Float[Array, "*dims"], Float[Array, "*dims"]]:
        r"""Draw $x_t$ from a data and a base sample, (*dims,) each, at a time inside (0, 1).

        Returns:
            $x_t$; the target of $b$, $\alpha' x_0 + \beta' x_1 + \gamma' z$; that of $\eta$, $z$.
        """
        x0, x1 = floating(x0), floating(x1)
        if x0.shape != x1.shape:
            raise _check.bad("perturb", "x1", f"of the shape of x0, {x0.shape}", x1.shape)
        z = jax.random.normal(key, x0.shape, x0.dtype)
        (alpha, beta, gamma2), (d_alpha, d_beta, slope) = self.jet(t)
        gamma = safe_sqrt(gamma2)
        x = alpha * x0 + beta * x1 + gamma * z
        d_gamma = slope / jnp.where(gamma > 0, 2 * gamma, jnp.inf)  # 0 at the ends
        velocity = d_alpha * x0 + d_beta * x1 + d_gamma * z
        return x.astype(x0.dtype), velocity.astype(x0.dtype), z


def bridge(path: str = "linear", gamma: str = "zero", *, scale: ScalarLike = 1.0) -> Interpolant:
    r"""Return a published interpolant.

    Args:
        path: `"linear"`, $\alpha = 1 - t$, $\beta = t$, or `"trigonometric"`,
            $\alpha = \cos(\pi t/2)$, $\beta = \sin(\pi t/2)$, which keeps a common variance.
        gamma: `"zero"`, or `"sqrt"`, $\gamma = a\sqrt{2t(1-t)}$, or `"sin2"`,
            $\gamma = a\sin^2(\pi t)$.
        scale: $a$.

    Raises:
        ValueError: if a name is unknown or `scale` negative.

    References:
        Albergo et al., table 2. `bridge()` with Euler's method is the deblending of Heitz, Belcour,
        Chambon 2023 (2305.03486).
    """
    _check.choice("bridge", "path", path, tuple(_PATHS))
    _check.choice("bridge", "gamma", gamma, tuple(_GAMMA2))
    _check.number("bridge", "scale", scale, 0, sys.float_info.max)
    return Interpolant(*_PATHS[path], eqx.Partial(_GAMMA2[gamma], scale))


class _Path(AbstractProcess):
    """The Gaussian path of an interpolant with a standard normal base."""

    interpolant: Interpolant
    t_min: float = 0.0
    t_max: float = 1.0

    def log_alpha(self, t: ScalarLike) -> Scalar:
        return jnp.log(self.interpolant.jet(t)[0][0])

    def log_sigma(self, t: ScalarLike) -> Scalar:
        return 0.5 * jnp.log(self._square(t))

    def _square(self, t: ScalarLike) -> Scalar:
        (_, beta, gamma2), _ = self.interpolant.jet(t)
        return beta**2 + gamma2

    def rates(self, t: ScalarLike) -> tuple[Scalar, Scalar]:
        t, grow = floating(t), lambda f, t: jax.jvp(f, (t,), (jnp.ones_like(t),))
        (square, slope), (_, bend) = grow(lambda t: grow(self._square, t), t)
        # sigma sigma' = (sigma^2)'/2 leaves sigma' = sqrt((sigma^2)''/2) where sigma vanishes
        end = jnp.where(slope == 0, safe_sqrt(bend / 2), jnp.inf)
        inner = slope / (2 * safe_sqrt(jnp.where(square > 0, square, 1)))
        return self.interpolant.jet(t)[1][0], jnp.where(square > 0, inner, end)


def as_process(interpolant: Interpolant) -> AbstractProcess:
    r"""Return the Gaussian path of an interpolant whose base is standard normal.

    $$ \sigma^2 = \beta^2 + \gamma^2, \quad b = \alpha' m + \sigma'\hat\epsilon, \quad
       \eta = (\gamma/\sigma)\,\hat\epsilon, \quad E[x_1 | x] = (\beta/\sigma)\,\hat\epsilon $$

    So a network for $b$ is `Denoiser(as_process(interpolant), net, predicts="velocity")`, and the
    whole of jaxdiff applies to it. Holds only if $x_1 \sim N(0, I)$ is independent of $x_0$.

    Raises:
        ValueError: if the log-SNR of the path does not decrease: `gamma` is too large.
    """
    if not isinstance(interpolant, Interpolant):
        raise _check.bad("as_process", "interpolant", "an Interpolant", repr(interpolant))
    path, ts = _Path(interpolant=interpolant), np.linspace(0, 1, 257)[1:-1]
    lam = host64(_log_snrs, path, ts)
    if is_concrete(lam) and not np.all(np.diff(lam) < 0):
        got = f"one that grows near t = {ts[int(np.argmax(np.diff(lam) >= 0))]:.3g}"
        raise _check.bad("as_process", "interpolant", "of decreasing log-SNR", got)
    return path


def _log_snrs(path: AbstractProcess, ts: Array) -> Array:
    return jax.vmap(path.lam)(ts)


class Model(eqx.Module):
    r"""Networks for $b$ and $\eta$, and the base they start from.

    Cost: one evaluation of $b$ per stage of the ODE, one of both per stage of the SDE.

    Attributes:
        interpolant: the bridge that they were trained on.
        b: any pytree callable `b(t, x, cond) -> (*dims,)` for one sample; see `Denoiser`.
        eta: the same for $\eta = E[z | x]$ (not its negative); None if only the ODE is wanted.
        base: draws $x_1$, as `jax.random.normal(key, shape, dtype)`; None if it is always given.

    Raises:
        ValueError: if an argument is of another kind, or a network returns another shape.
    """

    interpolant: Interpolant
    b: NetFn
    eta: NetFn | None = None
    base: Callable[..., Any] | None = None

    def __check_init__(self) -> None:
        if not isinstance(self.interpolant, Interpolant):
            raise _check.bad("Model", "interpolant", "an Interpolant", repr(self.interpolant))
        for name in ("b", "eta", "base"):
            net = getattr(self, name)
            if not (callable(net) or (net is None and name != "b")):
                raise _check.bad("Model", name, "callable", repr(net))

    def drift(
        self, t: ScalarLike, x: Float[ArrayLike, "*dims"], cond: Cond = None, e: Any = None
    ) -> Float[Array, "*dims"]:
        r"""Return $b - e\,\nabla\log q_t = b + (e/\gamma)\,\eta$, which is $b$ where `e` is 0."""
        x = floating(x)
        b = self._call("b", t, x, cond)
        if e is None:
            return b
        gamma = safe_sqrt(self.interpolant.jet(t)[0][2])
        rate = jnp.where(e == 0, 0, e / jnp.where(e == 0, 1, gamma))
        return (b + rate * self._call("eta", t, x, cond)).astype(x.dtype)

    def _call(self, name: str, t: ScalarLike, x: Array, cond: Cond) -> Array:
        out = jnp.asarray(getattr(self, name)(jnp.asarray(t, time_dtype(x.dtype)), x, cond))
        if out.shape != x.shape:
            expected = f"of the shape of x, {x.shape}"
            raise _check.bad("Model", f"the output of {name}", expected, out.shape)
        return out.astype(x.dtype)


def _value(diffusion: Any, t: ScalarLike) -> Array:
    """Return $e(t)$."""
    return jnp.asarray(diffusion(t) if callable(diffusion) else diffusion, jnp.result_type(t))


class _Noise(AdditiveNoise):
    r"""The term $\sqrt{2e}\,dB$ in the clock s = 1 - t."""

    diffusion: Any

    def vf(self, t: Any, y: Array, args: Any) -> Array:
        root = safe_sqrt(2 * _value(self.diffusion, 1 - t))
        return jnp.broadcast_to(root, y.shape).astype(y.dtype)


def _profile(interpolant: Interpolant, diffusion: Any, ts: Array) -> tuple[Array, Array]:
    return jax.vmap(lambda t: (_value(diffusion, t), interpolant.jet(t)[0][2]))(ts)


def _check_diffusion(where: str, model: Model, solver: Any, ts: Any, diffusion: Any) -> None:
    """Check that e is not negative on the grid, and the score known where it is positive."""
    if model.eta is None:
        raise _check.bad(where, "diffusion", "0 for a model without eta", repr(diffusion))
    e, gamma2 = host64(_profile, model.interpolant, diffusion, ts)
    if is_concrete(e, gamma2):
        unknown = (e > 0) & (gamma2 == 0)
        unknown[-1] &= not isinstance(solver, dfx.Euler)  # which does not evaluate there
        wrong = ~(np.isfinite(e) & (e >= 0)) | unknown
        if wrong.any():
            got = f"{float(e[wrong][0])!r} at t = {float(ts[wrong][0])!r}"
            expected = "finite, not negative, and 0 where gamma is 0: -eta/gamma is no score there"
            raise _check.bad(where, "diffusion", expected, got)


class _BridgeSolve(DiffraxSolve):
    r"""A solver of diffrax between base and data, in the clock s = 1 - t, which increases.

    Attributes:
        diffusion: e; None for the ODE.
        base: whether the model can draw $x_1$.
    """

    diffusion: Any
    base: bool = eqx.field(static=True)

    def path_of(self, model: Any) -> Any:
        """Return the interpolant."""
        return model.interpolant

    def admit(self, where: str, init: Any, lead: tuple[int, ...] = ()) -> Any:
        """Ask for a start where the model has none."""
        if init is None and not self.base:
            expected = "given: the model has no base to draw it from"
            raise _check.bad(where, "init", expected, None)
        return super().admit(where, init, lead)

    def terms(self, model: Any, key: Any, cond: Cond) -> Any:
        """Return the equation of one sample, with its noise."""
        level = None if self.diffusion is None else functools.partial(_value, self.diffusion)

        def drift(s: Any, x: Array, args: Any) -> Array:
            return -model.drift(1 - s, x, cond, None if level is None else level(1 - s))

        if self.diffusion is None:
            return dfx.ODETerm(drift)
        path = GridBrownian(
            key=stream(key, SOLVER), nodes=jnp.asarray(self.nodes), shape=self.start
        )
        return dfx.MultiTerm(dfx.ODETerm(drift), _Noise(path, self.diffusion))

    def init(self, model: Any, key: Any, cond: Cond, init: Any) -> State:
        """Draw from the base, or take what is given."""
        if self.admit("sampler", init) is None:
            init = model.base(stream(key, INIT), self.start.shape, self.start.dtype)
        return self.begin(self.terms(model, key, cond), jnp.asarray(init, self.start.dtype))


@prepare.register
def _(
    model: Model,
    start: jax.ShapeDtypeStruct,
    *,
    solver: Any,
    ts: Any,
    diffusion: Any = None,
    trajectory: bool = False,
) -> _BridgeSolve:
    r"""Prepare to carry base samples to data, by the ODE or by an SDE of any diffusion.

    $$ dx = (b - e\,\nabla\log q_t)\,dt + \sqrt{2e}\,d\bar W, \qquad x(t_0) = x_1 $$

    Every diffusion gives the same law; a larger one forgets errors of $b$ and needs more steps.
    `diffrax.Euler()` is of order 1, `diffrax.Heun()` of order 2 at two evaluations per step, weakly
    so for the SDE. Where $\gamma = 0$, as at both ends, `diffusion` must vanish, as
    $e = 4a\,t(1-t)$ does, or no step may start.
    """
    where, wide = "sampler", time_dtype(start.dtype)
    ts = grids.check(Rectified(), ts, where=where, dtype=wide)
    if diffusion is not None and not callable(diffusion):
        _check.number(where, "diffusion", diffusion, 0, sys.float_info.max)
        diffusion = None if is_concrete(diffusion) and float(diffusion) == 0 else diffusion
    families = (dfx.AbstractItoSolver, dfx.AbstractStratonovichSolver)
    kind, good = "ODEs", isinstance(solver, (dfx.Euler, dfx.AbstractERK))
    if diffusion is not None:
        _check_diffusion(where, model, solver, ts, diffusion)
        kind, good = "SDEs", isinstance(solver, families)
        good &= isinstance(solver, (dfx.Euler, dfx.AbstractERK, dfx.AbstractSRK))
    if not good:
        expected = f"an explicit diffrax solver for {kind}, as diffrax.Heun()"
        raise _check.bad(where, "solver", expected, repr(solver))
    ts = ts.astype(wide)
    return _BridgeSolve(
        bounded(solver),
        1 - ts,
        diffusion,
        model.base is not None,
        ts=ts,
        stochastic=diffusion is not None,
        start=start,
        trajectory=trajectory,
        live=not is_concrete(model.interpolant),
    )
