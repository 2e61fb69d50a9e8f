r"""Pullbacks through a denoiser: products with its Jacobian, exact or by a model of it.

Notation: $L$ is a loss on the end point $y$ of a sampling path, $\ell(t) = \partial L/\partial x_t$,
$m = E[x_0 | x_t]$, $C = Cov[x_0 | x_t]$, $R = (\alpha/\sigma)^2 C$, $\lambda = \log(\alpha/\sigma)$.
A step is linear in the state and in outputs of the network. That of DDIM is
$x' = d\,x + w\,m(t, x)$, so the gradient runs back along it by

$$ \ell = d\,\ell' + w\left(\frac{\partial m}{\partial x}\right)^{\!\top}\ell', \qquad
   \frac{\partial m}{\partial x} = \frac{\alpha}{\sigma^2}\,C , $$

and along the PF-ODE, with $\mu = \sigma\ell$, by $d\mu/d\lambda = -R\mu$. Everything isotropic has
cancelled: the posterior covariance is all that an approximation can get right or wrong.

| `cov` | $(\partial m/\partial x)^\top\ell$ from | cost of a step back |
|---|---|---|
| `"vjp"` | reverse mode: the gradient of the sampler, for any network | 1 vjp |
| `"jvp"` | forward mode: the same where the Jacobian is symmetric | 1 jvp |
| `"fd"` | a difference of two outputs, likewise | 1 evaluation |
| `"exact"` | the closed form, where the data are known | vector operations |
| `"isotropic"` | $C = (\sigma/\alpha)^2 (r/d) I$, $r$ from an estimator of the trace | that of the estimator |
| `"gated"` | the same, at large sigma in part $(y - m)(y - m)^\top$ | that of the estimator |
| `"centred"` | $C = (y - m)(y - m)^\top$ | vector operations |
| `"endpoint"` | $C = y y^\top - m m^\top$, as published | vector operations |
| `"none"` | $C = 0$: the gradient is scaled by $\sigma'/\sigma$ | none |

A true posterior has a symmetric Jacobian, a learned network has not, and there the cosine between
`"jvp"` and `"vjp"` is a diagnostic.
"""  # noqa: E501

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from jaxdiff import _check, exact
from jaxdiff._array import Cond, ScalarLike
from jaxdiff._keys import PROBES, stream
from jaxdiff.fisher.endpoint import endpoint_cov, gated_cov, isotropic_cov
from jaxdiff.fisher.heads import AbstractTrace, ExactTrace
from jaxdiff.fisher.operators import difference_step, posterior_cov
from jaxdiff.process import AbstractProcess, gaussian_only
from jaxdiff.score import AbstractDenoiser, floating

__all__ = ["Cov", "CovName", "Loss", "Pullback", "WithCov", "is_loss", "pullback", "scalar"]

Loss: TypeAlias = Callable[[Any], Any]
CovName: TypeAlias = Literal[
    "vjp", "jvp", "fd", "exact", "isotropic", "gated", "centred", "endpoint", "none"
]
Cov: TypeAlias = CovName | Callable[[Any, Any, Any, Any], lx.AbstractLinearOperator]


class _Node(NamedTuple):
    """What a product may know: a state of the path, the end point, and the tools."""

    denoiser: AbstractDenoiser
    cond: Cond
    trace: AbstractTrace | None
    key: PRNGKeyArray | None
    t: Any
    x: Array
    y: Array

    def mean(self, x: Array) -> Array:
        return self.denoiser(self.t, x, self.cond)


# A rule maps (node, m, ell) to (m, (dm/dx)^T ell); m is None where it is not known yet.
_Rule: TypeAlias = Callable[[_Node, Any, Array], tuple[Array, Array]]


def _vjp(at: _Node, m: Array | None, ell: Array) -> tuple[Array, Array]:
    m, pull = jax.vjp(at.mean, at.x)
    return m, pull(ell)[0]


def _jvp(at: _Node, m: Array | None, ell: Array) -> tuple[Array, Array]:
    return jax.jvp(at.mean, (at.x,), (ell,))


def _fd(at: _Node, m: Array | None, ell: Array) -> tuple[Array, Array]:
    m = at.mean(at.x) if m is None else m
    alpha, sigma = at.denoiser.process.alpha(at.t), at.denoiser.process.sigma(at.t)
    step = difference_step(sigma, at.x, (at.x - alpha * m) / sigma, ell)
    return m, (at.mean(at.x + step * ell) - m) / step


def _none(at: _Node, m: Array | None, ell: Array) -> tuple[Array, Array]:
    return at.mean(at.x) if m is None else m, jnp.zeros_like(ell)


def _scaled(at: _Node, cov: lx.AbstractLinearOperator, ell: Array) -> Array:
    alpha, sigma = at.denoiser.process.alpha(at.t), at.denoiser.process.sigma(at.t)
    # where alpha = 0 the state says nothing about x0, and C / alpha may be undefined
    return jnp.where(alpha > 0, alpha / sigma**2 * cov.mv(ell), 0).astype(ell.dtype)


def _by_cov(model: Callable[[_Node, Array], lx.AbstractLinearOperator]) -> _Rule:
    """Make a rule of a model of C from a node and m."""

    def rule(at: _Node, m: Array | None, ell: Array) -> tuple[Array, Array]:
        known = at.mean(at.x) if m is None else m
        return known, _scaled(at, model(at, known), ell)

    return rule


def _by_trace(model: Callable[[_Node, Array, Array], lx.AbstractLinearOperator]) -> _Rule:
    """Make a rule of a model of C from a node, m and r: both from one evaluation."""

    def rule(at: _Node, m: Array | None, ell: Array) -> tuple[Array, Array]:
        assert at.trace is not None  # by pullback
        m, _, values = at.trace(at.denoiser, at.t, at.x, at.cond, at.key)
        return m, _scaled(at, model(at, m, jnp.mean(values)), ell)

    return rule


_RULES: dict[str, _Rule] = {
    "vjp": _vjp,
    "jvp": _jvp,
    "fd": _fd,
    "exact": _by_cov(lambda at, m: posterior_cov(at.denoiser, at.t, at.x, at.cond, method="exact")),
    "isotropic": _by_trace(lambda at, m, r: isotropic_cov(at.denoiser.process, at.t, r, at.x)),
    "gated": _by_trace(lambda at, m, r: gated_cov(at.denoiser, at.t, at.x, at.y, r, at.cond, m=m)),
    "centred": _by_cov(
        lambda at, m: endpoint_cov(at.denoiser, at.t, at.x, at.y, at.cond, kind="centred", m=m)
    ),
    "endpoint": _by_cov(
        lambda at, m: endpoint_cov(at.denoiser, at.t, at.x, at.y, at.cond, kind="raw", m=m)
    ),
    "none": _none,
}
_TRACED = ("isotropic", "gated")  # those that need r


_ENDED = ("gated", "centred", "endpoint")  # those that look at the end point


class Pullback(eqx.Module):
    """A rule for products with the transposed Jacobian of the denoiser, and what it needs.

    Attributes:
        cov: a name of the module's table, or a callable `(t, x, m, y) -> operator`.
        trace: an estimator, for `"isotropic"` and `"gated"`.
        key: of its probes, or None.
    """

    cov: Any
    trace: AbstractTrace | None
    key: PRNGKeyArray | None

    @property
    def ended(self) -> bool:
        """Whether the end point of the path must be known."""
        return callable(self.cov) or self.cov in _ENDED

    def product(
        self, denoiser: Any, t: Any, x: Array, cond: Cond, m: Any, y: Any, ell: Array, key: Any
    ) -> tuple[Array, Array]:
        r"""Return $m$, if it is not given, and $(\partial m/\partial x)^\top\ell$ at a state."""
        at = _Node(denoiser, cond, self.trace, key, t, x, y)
        if isinstance(self.cov, str):
            return _RULES[self.cov](at, m, ell)
        return _by_cov(lambda at, m: self.cov(at.t, at.x, m, at.y))(at, m, ell)


def pullback(where: str, denoiser: Any, cov: Any, trace: Any, key: Any) -> Pullback:
    """Check the arguments that make a rule.

    Raises:
        ValueError: naming the first that is wrong.
    """
    if not isinstance(denoiser, AbstractDenoiser):
        raise _check.bad(where, "denoiser", "a jaxdiff denoiser", repr(denoiser))
    if not callable(cov):
        _check.choice(where, "cov", cov, _RULES)
    if cov == "exact" and not isinstance(denoiser, exact.AbstractExact):
        expected = "'vjp', 'jvp' or 'fd', since this denoiser has no closed form"
        raise _check.bad(where, "cov", expected, repr(cov))
    if cov not in ("vjp", "none"):
        gaussian_only(where, "the process of the denoiser", denoiser.process, "use cov='vjp'")
    probes = None
    if isinstance(cov, str) and cov in _TRACED:
        trace = ExactTrace() if trace is None else trace
        if not isinstance(trace, AbstractTrace):
            raise _check.bad(where, "trace", "a trace estimator, as Hutchinson()", repr(trace))
        if trace.stochastic:
            probes = stream(_check.key(where, "key", key), PROBES)
    elif trace is not None:
        raise _check.bad(where, "trace", f"left out for cov={cov!r}", repr(trace))
    return Pullback(cov, trace, probes)


class WithCov(AbstractDenoiser):
    r"""A denoiser whose derivative by the state is that of a model of the posterior covariance.

    $$ \frac{\partial m}{\partial x} = \frac{\alpha}{\sigma^2}\,C $$

    Its values are those of `denoiser`. Reverse mode pulls covectors back by the rule of the
    module's table; so the gradient of any sampler, likelihood or loss through it is the gradient
    with that model of C. Derivatives reach the state only: to the denoiser itself, its parameters
    among them, and to time and condition they are 0. Reverse mode only.

    Attributes:
        denoiser: the denoiser.
        rule: how products with the Jacobian are made.
        end: the end point of the path for rules that look at it, (*dims,); None for others.
    """

    denoiser: AbstractDenoiser
    rule: Pullback
    end: Any = None

    def __init__(self, denoiser: AbstractDenoiser, rule: Pullback, end: Any = None) -> None:
        self.denoiser, self.rule, self.end = denoiser, rule, end

    @property
    def process(self) -> AbstractProcess:  # type: ignore[override]
        """Of the denoiser."""
        return self.denoiser.process

    def pair(
        self, t: ScalarLike, x: Float[ArrayLike, "*dims"], cond: Cond = None
    ) -> tuple[Float[Array, "*dims"], Float[Array, "*dims"]]:
        r"""Return $(m, \hat\epsilon)$."""
        rest = (self.denoiser, self.rule, self.end, jnp.asarray(t), cond)
        hold = lambda a: jax.lax.stop_gradient(a) if eqx.is_inexact_array(a) else a  # noqa: E731
        return _pair(floating(x), *jax.tree.map(hold, rest))


@eqx.filter_custom_vjp
def _pair(x: Array, denoiser: Any, rule: Any, end: Any, t: Any, cond: Any) -> Any:
    return denoiser.pair(t, x, cond)


@_pair.def_fwd
def _pair_fwd(perturbed: Any, x: Array, denoiser: Any, rule: Any, end: Any, t: Any, cond: Any):
    m, eps = denoiser.pair(t, x, cond)
    return (m, eps), m


@_pair.def_bwd
def _pair_bwd(
    m: Array, grads: Any, perturbed: Any, x: Array, denoiser: Any, rule: Any, end: Any, t: Any,
    cond: Any,
) -> Any:  # fmt: skip
    of_m, of_eps = (jnp.zeros_like(x) if grad is None else grad for grad in grads)
    alpha, sigma = denoiser.process.alpha(t), denoiser.process.sigma(t)
    # eps = (x - alpha m) / sigma
    here = jnp.where(sigma > 0, sigma, 1.0)
    ell = (of_m - alpha / here * of_eps).astype(x.dtype)
    key = None
    if rule.key is not None:  # its own probes at every time
        bits = jax.lax.bitcast_convert_type(t.astype(jnp.float32), jnp.uint32)
        key = stream(rule.key, bits)
    product = rule.product(denoiser, t, x, cond, m, end, ell, key)[1]
    return (of_eps / here + product).astype(x.dtype)


def scalar(loss: Loss, y: Array) -> Array:
    """Return a loss, or raise ValueError if it is not one floating number."""
    value = jnp.asarray(loss(y))
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        got = f"{value.dtype}{list(value.shape)}"
        raise _check.bad("adjoint", "the value of loss", "one floating number, ()", got)
    return value


def is_loss(where: str, loss: Any) -> None:
    """Raise ValueError if a loss cannot be called."""
    if not callable(loss):
        raise _check.bad(where, "loss", "callable as loss(x) -> ()", repr(loss))
