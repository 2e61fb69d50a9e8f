r"""The Jacobian of the probability-flow map, and the test whether that map is optimal transport.

Notation: $A(t) = dx_t/dx_T$ along the PF-ODE, $R = Cov[\epsilon | x_t]$,
$\lambda = \log(\alpha/\sigma)$. Differentiating the flow gives a matrix ODE, and in the right scale
all that is isotropic drops out of it:

$$ \frac{dA}{dt} = \left(f I + \tfrac12 g^2 F\right) A, \quad A(T) = I
   \qquad\Longleftrightarrow\qquad
   A = \frac{\sigma}{\sigma_T}\tilde A, \quad \frac{d\tilde A}{d\lambda} = R\,\tilde A $$

so that only products with the posterior covariance enter, and no schedule: on the same range of
$\sigma/\alpha$ every process has the same flow.

An optimal transport map is the gradient of a convex function, and its Jacobian is symmetric and
positive semidefinite. An asymmetric $A$ therefore refutes optimality; a symmetric one proves
nothing. Flows of Gaussian and of collinear data are optimal, that of three atoms off a line is not.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, Real

from jaxdiff import _check, exact, grids
from jaxdiff._array import Cond, Scalar, time_dtype
from jaxdiff._host import host64, is_concrete
from jaxdiff._keys import INIT, stream
from jaxdiff._loop import over_steps
from jaxdiff._passengers import At, Ride, Road, ride, road
from jaxdiff._status import or_nan, status
from jaxdiff.fisher.operators import posterior_cov
from jaxdiff.process import AbstractProcess, gaussian_only
from jaxdiff.score import AbstractDenoiser, floating

__all__ = [
    "AFFINE",
    "NON_AFFINE",
    "Flow",
    "Method",
    "Statistics",
    "TransportTest",
    "asymmetry",
    "ddim_jacobian",
    "flow_jacobian",
    "transport_test",
]

Method: TypeAlias = Literal["jvp", "fd", "exact"]

# Three atoms in the plane: on a line, where the flow is optimal transport, and off it.
AFFINE = ((0.0, 0.0), (0.0, 0.5), (0.0, -0.6))
NON_AFFINE = ((0.5, 0.0), (0.0, -0.5), (0.0, 0.0))


class Flow(eqx.Module):
    """Where a map from noise to data ends, and its Jacobian there.

    Attributes:
        x: the end point, (*dims,).
        jacobian: its derivative by the starting point, (d, d) with d = prod(dims), flattened in
            the order of `reshape`.
        result: a `diffrax.RESULTS`; x and jacobian are NaN where it is not `successful`.
    """

    x: Float[Array, "*dims"]
    jacobian: Float[Array, "..."]
    result: dfx.RESULTS


def _columns(
    denoiser: AbstractDenoiser, t: Any, x: Array, cond: Cond, method: Method | None, A: Array
) -> Array:
    """Return R A, column by column: products with the posterior covariance and never itself."""
    cov = posterior_cov(denoiser, t, x, cond, method=method)
    product = jax.vmap(lambda v: cov.mv(v.reshape(x.shape)).reshape(-1), in_axes=1, out_axes=1)
    return denoiser.process.snr(t) * product(A)


class _Jacobian(eqx.Module):
    r"""The passenger $\tilde A$, driven by $R\tilde A$."""

    denoiser: AbstractDenoiser
    cond: Cond
    method: Method | None = eqx.field(static=True)

    def __call__(self, at: At, A: Array) -> tuple[Array, Array, Array]:
        m, eps = self.denoiser.pair(at.t, at.x, self.cond)
        return m, eps, _columns(self.denoiser, at.t, at.x, self.cond, self.method, A)


def _finish(x: Array, jacobian: Array, result: Any, dtype: Any) -> Flow:
    result = status(result, x, jacobian)
    return Flow(or_nan(result, x).astype(dtype), or_nan(result, jacobian), result)


@eqx.filter_jit
def _integrate(passenger: _Jacobian, x: Array, path: Road) -> Flow:
    wide = time_dtype(x.dtype)
    path = path.cast(wide)
    field = Ride(passenger.denoiser.process, passenger)
    start = ((x / path.scales[0]).astype(wide), jnp.eye(x.size, dtype=wide))
    (y, A), _, result, _ = ride(path, field, start)
    jacobian = path.sigmas[-1] / path.sigmas[0] * A
    return _finish(path.scales[-1] * y, jacobian, result, x.dtype)


def _start(where: str, denoiser: Any, x: Any, method: Any) -> Array:
    """Check what both maps share, and return the starting point."""
    if not isinstance(denoiser, AbstractDenoiser):
        raise _check.bad(where, "denoiser", "a jaxdiff denoiser", repr(denoiser))
    gaussian_only(where, "the process of the denoiser", denoiser.process)
    closed = ("exact",) if isinstance(denoiser, exact.AbstractExact) else ()
    _check.choice(where, "method", method, (None, "jvp", "fd", *closed))
    return floating(x)


def _finite(where: str, argument: str, t: Any, lam: Any) -> None:
    if is_concrete(lam) and not np.isfinite(lam):
        raise _check.bad(where, argument, "a time of finite log-SNR", repr(float(t)))


def flow_jacobian(
    denoiser: AbstractDenoiser,
    x: Float[ArrayLike, "*dims"],
    *,
    ts: Real[ArrayLike, " nodes"] | Sequence[Any],
    solver: dfx.AbstractSolver | None = None,
    controller: dfx.AbstractStepSizeController | None = None,
    cond: Cond = None,
    method: Method | None = None,
    max_steps: int = 4096,
) -> Flow:
    r"""Carry a point from noise to data along the PF-ODE, with the Jacobian of the map.

    $$ \frac{d\tilde A}{d\lambda} = R(x_\lambda)\,\tilde A, \qquad
       \frac{dx_{t_n}}{dx_{t_0}} = \frac{\sigma_n}{\sigma_0}\,\tilde A $$

    jointly with the state, in clock $\lambda$. Cost of a stage: one evaluation of the denoiser and
    d products with its posterior covariance: d forward derivatives of a network, or d columns of
    one weighted sum in closed form. Memory O(d^2).

    Args:
        denoiser: the denoiser.
        x: starting point $x_{t_0}$, (*dims,).
        ts: strictly decreasing times of finite log-SNR, (nodes,); without a controller best even
            in log-SNR, `process.grid(n, "logsnr")`.
        solver: a diffrax ODE solver; `diffrax.Tsit5()` by default.
        controller: a diffrax step-size controller; `ts` then gives the two ends only. One step per
            node by default.
        cond: condition passed to the denoiser.
        method: how products are made, as in `posterior_cov`: `"exact"` in closed form and `"jvp"`
            for a network by default.
        max_steps: bound on the steps under a controller.

    Returns:
        `Flow`, NaN with a `result` where the solver failed.

    Raises:
        ValueError: if `ts` is no grid of the process or has an end of infinite log-SNR, `method`
            does not fit the denoiser, or an argument is of another kind.

    References:
        Wang et al. 2025 (2505.23264), with the sign of the Fisher term that differentiation gives.

    Example:
        >>> from jaxdiff import exact, process
        >>> unit = exact.gaussian(process.VP(), jnp.zeros(2), 1.0)
        >>> flow = flow_jacobian(unit, jnp.ones(2), ts=process.VP().grid(40, "logsnr"))
        >>> bool(jnp.allclose(flow.jacobian, jnp.eye(2), atol=1e-3))
        True
    """
    where = "flow_jacobian"
    x = _start(where, denoiser, x, method)
    path = road(where, denoiser, ts, solver, controller, None, max_steps, dtype=time_dtype(x.dtype))
    return _integrate(_Jacobian(denoiser, cond, method), x, path)


def _rows(process: AbstractProcess, ts: Any) -> tuple[Any, ...]:
    """Return lam_0, and alpha_1, sigma_1, alpha_1/alpha_0, h, f dt, (g^2/2 sigma^2) dt by step."""

    def row(t0: Any, t1: Any) -> tuple[Any, ...]:
        alpha1, sigma1, dt = process.alpha(t1), process.sigma(t1), t1 - t0
        rate = process.g2(t0) / (2 * process.sigma(t0) ** 2)
        h = process.lam(t1) - process.lam(t0)
        return alpha1, sigma1, alpha1 / process.alpha(t0), h, process.f(t0) * dt, rate * dt

    return process.lam(ts[0]), jax.vmap(row)(ts[:-1], ts[1:])


@eqx.filter_jit
def _discrete(
    denoiser: AbstractDenoiser, x: Array, nodes: Any, cond: Cond, rule: str, sign: int, method: Any
) -> Flow:
    dtype, wide = x.dtype, time_dtype(x.dtype)

    rows = jax.tree.map(lambda a: jnp.asarray(a, wide), nodes)

    def step(n: Any, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        x, A = carry
        t, alpha1, sigma1, ratio, h, drift, rate = jax.tree.map(lambda a: a[n], rows)
        m, eps = denoiser.pair(t, x, cond)
        RA = _columns(denoiser, t, x, cond, method, A)
        if rule == "ddim":
            A = ratio * (jnp.exp(-h) * A - jnp.expm1(-h) * RA)
        else:
            A = A + drift * A + sign * rate * (A - RA)
        return (alpha1 * m + sigma1 * eps).astype(wide), A.astype(wide)

    start = (x.astype(wide), jnp.eye(x.size, dtype=wide))
    (x, A), _ = over_steps(step, start, 0, len(rows[0]))
    return _finish(x, A, dfx.RESULTS.successful, dtype)


def ddim_jacobian(
    denoiser: AbstractDenoiser,
    x: Float[ArrayLike, "*dims"],
    *,
    ts: Real[ArrayLike, " nodes"] | Sequence[Any],
    rule: Literal["ddim", "euler"] = "ddim",
    sign: Literal[1, -1] = 1,
    cond: Cond = None,
    method: Method | None = None,
) -> Flow:
    r"""Carry a point from noise to data by DDIM, with a Jacobian: of that sampler, or Euler's.

    With $h = \lambda_1 - \lambda_0$, everything on the right at node 0, both rules step
    $x \leftarrow \alpha_1 m + \sigma_1\hat\epsilon$ and

    | rule | step of the Jacobian |
    |---|---|
    | `"ddim"` | $A \leftarrow \frac{\alpha_1}{\alpha_0}[e^{-h} I + (1 - e^{-h}) R] A$ |
    | `"euler"` | $A \leftarrow A + (t_1 - t_0)(f I \pm \tfrac12 g^2 F) A$ |

    `"ddim"` is the exact derivative of the map of the sampler, and so tests the sampler itself; it
    may end at $\sigma = 0$. `"euler"` is first order in t and for comparison with published numbers
    only: the script has the sign $-$, under which a single atom repels; $+$ is that of the flow.
    Cost of a step: as a stage of `flow_jacobian`.

    Args:
        denoiser: the denoiser.
        x: starting point, (*dims,).
        ts: strictly decreasing times, the first of finite log-SNR, (nodes,).
        rule: `"ddim"` or `"euler"`.
        sign: of the Fisher term in `"euler"`: 1, or -1 as published.
        cond: condition passed to the denoiser.
        method: as in `flow_jacobian`.

    Returns:
        `Flow`, NaN with a `result` where it is not finite.

    Raises:
        ValueError: as `flow_jacobian`, and if `rule` or `sign` is unknown or `sign` is given
            without `"euler"`.

    References:
        Wang et al. 2025 (2505.23264); Song, Meng, Ermon 2021 (2010.02502), eq. 12.
    """
    where = "ddim_jacobian"
    _check.choice(where, "rule", rule, ("ddim", "euler"))
    _check.choice(where, "sign", sign, (1, -1) if rule == "euler" else (1,))
    x = _start(where, denoiser, x, method)
    ts = grids.check(denoiser.process, ts, where=where, dtype=time_dtype(x.dtype))
    lam, rows = host64(_rows, denoiser.process, ts)
    _finite(where, "ts[0]", ts[0], lam)
    return _discrete(denoiser, x, (ts[:-1], *rows), cond, rule, sign, method)


def asymmetry(jacobian: Float[ArrayLike, "d d"], *, diagonal: bool = False) -> Scalar:
    r"""Return how far a matrix is from symmetric, between 0 and $\sqrt2$.

    $$ a(A) = \frac{\|A - A^\top\|_F}{\sqrt2\,\|A\|_F} $$

    of the matrix without its diagonal, as published, or of all of it. $\sqrt2$ is an antisymmetric
    matrix. Where no more than round-off is left off the diagonal the index is 0, with gradient 0.

    Args:
        jacobian: $A$, (d, d).
        diagonal: keep the diagonal in $\|A\|_F$.

    Returns:
        The index, ().

    References:
        Wang et al. 2025 (2505.23264), the OT experiment.
    """
    A = floating(jacobian)
    if A.ndim != 2 or A.shape[0] != A.shape[1]:
        raise _check.bad("asymmetry", "jacobian", "of shape (d, d)", A.shape)
    top = jax.lax.stop_gradient(jnp.max(jnp.abs(A)))  # the index has no scale, its squares do
    A = A / jnp.where(top > 0, top, 1)
    off = A - jnp.diag(jnp.diag(A))
    below = jnp.sum(off**2)
    nothing = below <= (_ROUND * jnp.finfo(A.dtype).eps) ** 2 * jnp.sum(A**2)
    above = jnp.sum((off - off.T) ** 2)
    size = jnp.sum(A**2) if diagonal else below
    symmetric = nothing | (above == 0)
    inner = jnp.where(symmetric, 1.0, above) / (2 * jnp.where(nothing, 1.0, size))
    return jnp.where(symmetric, 0.0, jnp.sqrt(inner)).astype(A.dtype)


_ROUND = 64.0  # units of round-off that count as nothing off the diagonal


class Statistics(NamedTuple):
    """Mean over draws, its standard error and the largest value, all ()."""

    mean: Scalar
    error: Scalar
    largest: Scalar


class TransportTest(eqx.Module):
    """The result of `transport_test`.

    Attributes:
        off_diagonal: statistics of the index of the Jacobian without its diagonal (published).
        full: statistics of the index of the whole Jacobian.
        flow: the flows themselves, with leading axis num.
    """

    off_diagonal: Statistics
    full: Statistics
    flow: Flow


def transport_test(
    key: PRNGKeyArray,
    denoiser: AbstractDenoiser,
    shape: tuple[int, ...],
    *,
    num: int,
    ts: Real[ArrayLike, " nodes"] | Sequence[Any],
    jacobian: Callable[..., Flow] = flow_jacobian,
    cond: Cond = None,
    dtype: Any = None,
) -> TransportTest:
    r"""Average the asymmetry of the flow's Jacobian over draws from the prior.

    Draw $i$ starts where sample $i$ of `sample(key, ...)` does. The map is optimal transport only
    if every index is 0 up to the error of the solver; compare with Gaussian or collinear data, of
    which that is true. Cost: `num` times that of `jacobian`, all of them in one program.

    Args:
        key: a threefry key.
        denoiser: the denoiser.
        shape: shape of one sample, `(*dims,)`.
        num: number of draws, at least 2.
        ts: as in `flow_jacobian`.
        jacobian: the map and its options: `flow_jacobian`, `ddim_jacobian`, or
            `functools.partial` of one of them.
        cond: condition passed to the denoiser, the same for all draws.
        dtype: dtype of the samples; the default float.

    Returns:
        `TransportTest`. A draw that failed makes the statistics NaN; `flow.result` tells which.

    Raises:
        ValueError: as `jacobian`, and if `key` is no threefry key, `shape` no shape or `num` less
            than 2.

    References:
        Wang et al. 2025 (2505.23264), the OT experiment.

    Example:
        >>> from jaxdiff import exact, process
        >>> atoms = exact.empirical(process.EDM(), NON_AFFINE)
        >>> out = transport_test(jax.random.key(0), atoms, (2,), num=4, ts=process.EDM().grid(50))
        >>> bool(out.off_diagonal.largest > 1e-3)
        True
    """
    where = "transport_test"
    key, shape = _check.key(where, "key", key), _check.dims(where, "shape", shape)
    _check.whole(where, "num", num, 2)
    if not isinstance(denoiser, AbstractDenoiser):
        raise _check.bad(where, "denoiser", "a jaxdiff denoiser", repr(denoiser))
    ts = grids.check(denoiser.process, ts, where=where)

    def one(i: Array) -> Flow:
        own = stream(stream(key, i), INIT)
        x = denoiser.process.prior(own, shape, t=ts[0], dtype=dtype)
        return jacobian(denoiser, x, ts=ts, cond=cond)

    flow = jax.vmap(one)(jnp.arange(num, dtype=jnp.uint32))

    def statistics(diagonal: bool) -> Statistics:
        index = jax.vmap(functools.partial(asymmetry, diagonal=diagonal))(flow.jacobian)
        error = jnp.std(index, ddof=1) / math.sqrt(num)
        return Statistics(jnp.mean(index), error, jnp.max(index))

    return TransportTest(statistics(False), statistics(True), flow)
