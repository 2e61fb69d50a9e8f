r"""What a gradient along a sampling path is made of: the loss and products with the Jacobian.

Notation: $L$ is a loss on the end point $y$ of a sampling path, $\ell(t) = \partial L/\partial x_t$,
$m = E[x_0 | x_t]$, $C = Cov[x_0 | x_t]$, $R = (\alpha/\sigma)^2 C$, $\lambda = \log(\alpha/\sigma)$.
A DDIM step is $x' = d\,x + w\,m(t, x)$, so the gradient runs back along it by

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
`"jvp"` and `"vjp"` is a diagnostic. The states are kept, (nodes, *dims), and the activations of one
network evaluation at a time; `continuous_gradient` keeps no states either.
"""  # noqa: E501

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PRNGKeyArray

from jaxdiff import _check, exact
from jaxdiff._array import Cond, Scalar
from jaxdiff._keys import PROBES, stream
from jaxdiff.fisher.endpoint import endpoint_cov, gated_cov, isotropic_cov
from jaxdiff.fisher.heads import AbstractTrace, ExactTrace
from jaxdiff.fisher.operators import difference_step, posterior_cov
from jaxdiff.sampling import Samples
from jaxdiff.score import AbstractDenoiser

Loss: TypeAlias = Callable[[Any], Any]
CovName: TypeAlias = Literal[
    "vjp", "jvp", "fd", "exact", "isotropic", "gated", "centred", "endpoint", "none"
]
Cov: TypeAlias = CovName | Callable[[Any, Any, Any, Any], lx.AbstractLinearOperator]


class Gradient(eqx.Module):
    """The result of `terminal_gradient` and `continuous_gradient`; NaN where the solve failed.

    Attributes:
        value: the loss at the end point, ().
        grad: its gradient with respect to the starting noise, (*dims,).
        sample: the end point with its status, as from `draw`; `jaxdiff.check(out.sample)` raises
            if the path or its gradient failed. Its `nfe` leaves out the products of the way back.
        grads: the gradients with respect to the states of `sample.aux["trajectory"]`,
            (nodes, *dims), if they were asked for.
    """

    value: Scalar
    grad: Float[Array, "*dims"]
    sample: Samples
    grads: Float[Array, "nodes *dims"] | None = None


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
        assert at.trace is not None  # by make_problem
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


class Problem(eqx.Module):
    """The arguments that do not change along the path, and the two maps made of them."""

    denoiser: AbstractDenoiser
    loss: Loss
    cond: Cond
    cov: Any
    trace: AbstractTrace | None
    key: PRNGKeyArray | None

    def product(
        self, i: Any, t: Any, x: Array, m: Array | None, y: Array, ell: Array
    ) -> tuple[Array, Array]:
        r"""Return $m$ and $(\partial m/\partial x)^\top\ell$ at step `i`."""
        key = None if self.key is None else stream(self.key, i)
        at = _Node(self.denoiser, self.cond, self.trace, key, t, x, y)
        if isinstance(self.cov, str):
            return _RULES[self.cov](at, m, ell)
        return _by_cov(lambda at, m: self.cov(at.t, at.x, m, at.y))(at, m, ell)

    def scalar(self, y: Array) -> Array:
        """Return the loss, or raise ValueError if it is not one floating number."""
        value = jnp.asarray(self.loss(y))
        if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            got = f"{value.dtype}{list(value.shape)}"
            raise _check.bad("adjoint", "the value of loss", "one floating number, ()", got)
        return value


def status(*values: Array) -> Any:
    """Return the diffrax result that says whether all values are finite."""
    good = jnp.all(jnp.stack([jnp.all(jnp.isfinite(value)) for value in values]))
    nonfinite: Any = dfx.RESULTS.nonfinite
    return dfx.RESULTS.where(good, dfx.RESULTS.successful, nonfinite)


def or_nan(result: Any, value: Array) -> Array:
    """Return `value` where the result is a success."""
    return jnp.where(result == dfx.RESULTS.successful, value, jnp.nan)


def make_problem(
    where: str, denoiser: Any, loss: Any, cond: Any, cov: Any, trace: Any, key: Any
) -> Problem:
    """Check the arguments that all functions of the package share, and bind them."""
    if not isinstance(denoiser, AbstractDenoiser):
        raise _check.bad(where, "denoiser", "a jaxdiff denoiser", repr(denoiser))
    if not callable(loss):
        raise _check.bad(where, "loss", "callable as loss(x) -> ()", repr(loss))
    if not callable(cov):
        _check.choice(where, "cov", cov, _RULES)
    if cov == "exact" and not isinstance(denoiser, exact.AbstractExact):
        expected = "'vjp', 'jvp' or 'fd', since this denoiser has no closed form"
        raise _check.bad(where, "cov", expected, repr(cov))
    if isinstance(cov, str) and cov in _TRACED:
        trace = ExactTrace() if trace is None else trace
        if not isinstance(trace, AbstractTrace):
            raise _check.bad(where, "trace", "a trace estimator, as Hutchinson()", repr(trace))
        key = stream(_check.key(where, "key", key), PROBES) if trace.stochastic else None
    elif trace is not None:
        raise _check.bad(where, "trace", f"left out for cov={cov!r}", repr(trace))
    else:
        key = None
    return Problem(denoiser, loss, cond, cov, trace, key)
