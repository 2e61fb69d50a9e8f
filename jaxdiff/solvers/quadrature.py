r"""Weights of exponential methods: one quadrature builds them all.

Notation: $h = \lambda_1 - \lambda_0$. The exact solution over a step, with the network output
written as $m$ or as $\hat\epsilon$ (variation of constants in $\lambda$; $\tau = 0$ is the PF-ODE,
$\tau = 1$ the reverse SDE), is

$$ x_1 = e^{-\tau^2 h}\frac{\sigma_1}{\sigma_0}x_0
       + (1+\tau^2)\,\alpha_1\int_0^h e^{-(1+\tau^2)(h-r)}\,m(\lambda_0 + r)\,dr
       + \sigma_1\sqrt{1 - e^{-2\tau^2 h}}\,z $$

$$ x_1 = \frac{\alpha_1}{\alpha_0}x_0
       - (1+\tau^2)\,\sigma_1\int_0^h e^{h-r}\,\hat\epsilon(\lambda_0 + r)\,dr
       + \sigma_1\sqrt{e^{2\tau^2 h} - 1}\,z \qquad (\tau \in \{0, 1\}). $$

A method replaces the output by the polynomial through known outputs, in some clock $\chi$; its
weights are integrals of the Lagrange basis, $w_j = \int K(r)\,\ell_j(\chi(\lambda_0 + r))\,dr$.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdiff._array import Scalar, ScalarLike
from jaxdiff.process import AbstractProcess

__all__ = [
    "Chi",
    "clock",
    "history",
    "integral",
    "integrals",
    "log_snr_step",
    "of_mean",
    "of_noise",
    "phi",
]

Chi: TypeAlias = Literal["lam", "s", "t", "angle"]

# On [0, 1]; exact to round-off for steps up to |h| = 10 or so, where accuracy is lost anyway.
_POINTS, _MASSES = np.polynomial.legendre.leggauss(32)
_POINTS, _MASSES = (_POINTS + 1) / 2, _MASSES / 2


def phi(k: int, z: ScalarLike) -> Scalar:
    r"""Return $\varphi_k(z)$: $\varphi_0 = e^z$, $\varphi_{k+1} = (\varphi_k - 1/k!)/z$.

    Near 0, where the recurrence cancels, by the series $\sum_j z^j/(j+k)!$.
    """
    z = jnp.asarray(z)
    if k == 0:
        return jnp.exp(z)
    near = jnp.abs(z) < k
    small, large = jnp.where(near, z, 0.0), jnp.where(near, 1.0, z)
    series = jnp.polyval(jnp.asarray([1 / math.factorial(j + k) for j in range(24, -1, -1)]), small)
    value = jnp.expm1(large) / large
    for i in range(1, k):
        value = (value - 1 / math.factorial(i)) / large
    return jnp.where(near, series, value)


def log_snr_step(process: AbstractProcess, t0: ScalarLike, t1: ScalarLike) -> Scalar:
    r"""Return $h = \lambda(t_1) - \lambda(t_0)$, with a finite gradient where it is infinite.

    Infinite when the step starts at alpha = 0 or ends at sigma = 0. The abscissa is guarded, not
    the result: the derivative of an infinite log would be NaN even where it is not used.
    """
    inside = (jnp.asarray(process.t_min) + process.t_max) / 2
    endless = (process.alpha(t0) <= 0) | (process.sigma(t1) <= 0)
    lam0 = process.lam(jnp.where(endless, inside, t0))
    lam1 = process.lam(jnp.where(endless, inside, t1))
    return jnp.where(endless, jnp.inf, lam1 - lam0)


def history(process: AbstractProcess, ts: Array, most: Any) -> tuple[Array, Array]:
    r"""Return the log-SNRs of the nodes `ts[1:]` and how many of them a step may use.

    At least the current node, 1, and no more than `most`. An older node counts if it is there (not
    the padding of a short history) and its log-SNR is finite; a step from alpha = 0 or to sigma = 0
    uses the current node only. Log-SNRs of nodes that do not count are made up: they are finite and
    distinct, so that nothing computed from them and then dropped can spoil a gradient.
    """
    nodes, index = ts[1:], jnp.arange(ts.shape[0] - 1)
    here = jax.vmap(process.alpha)(nodes) > 0
    older = here[1:] & (nodes[1:] > nodes[:-1])
    finite = here[0] & (process.sigma(ts[0]) > 0)
    used = jnp.cumprod(jnp.concatenate([finite[None], older])) > 0
    used = used & ((index < most) | (index == 0))
    inside = (jnp.asarray(process.t_min) + process.t_max) / 2
    lams = jax.vmap(process.lam)(jnp.where(used, nodes, inside))
    return jnp.where(used, lams, lams[0] - index), jnp.maximum(jnp.sum(used), 1)


def clock(process: AbstractProcess, chi: Chi, lam: Array) -> Array:
    r"""Return the interpolation variable at a log-SNR.

    `"lam"` $\lambda$; `"s"` $\sigma/\alpha$; `"t"` time; `"angle"` $1/(1 + \sigma^2/\alpha^2)$,
    which is $\alpha^2$ on a variance preserving path.
    """
    match chi:
        case "lam":
            return lam
        case "s":
            return jnp.exp(-lam)
        case "angle":
            return jax.nn.sigmoid(2 * lam)
        case _:
            return jax.vmap(process.t_of_lam)(lam)


def integrals(
    kernel: Callable[[Array], Array],
    chi: Callable[[Array], Array],
    lam0: Any,
    h: Any,
    nodes: Sequence[Any] | Array,
    count: Any,
) -> Array:
    r"""Return $\int_0^h K(r)\,\ell_j(\chi(\lambda_0 + r))\,dr$ for the first `count` nodes.

    Args:
        kernel: $K$ at the points r, (q,) -> (q,).
        chi: the clock at log-SNRs, (q,) -> (q,).
        lam0: log-SNR at the start of the interval, ().
        h: its length, finite, ().
        nodes: log-SNRs of all nodes, in order of preference, distinct.
        count: how many of them the polynomial goes through, ().

    Returns:
        Weights, (len(nodes),), zero from `count` on.
    """
    dtype = jnp.result_type(h, float)
    r = h * _POINTS.astype(dtype)
    weights, points = h * _MASSES.astype(dtype) * kernel(r), chi(lam0 + r)
    x, index = chi(jnp.stack(list(nodes))), jnp.arange(len(nodes))
    used = index < count
    others = used[:, None] & used[None] & (index[:, None] != index[None])
    gaps = jnp.where(others, x[:, None] - x[None], 1.0)  # those of made-up nodes may vanish
    factors = (points[:, None] - x[None])[:, None, :] / gaps[None]
    basis = jnp.prod(jnp.where(others[None], factors, 1.0), axis=2)
    return jnp.where(used, weights @ basis, 0.0)


def integral(kernel: Callable[[Array], Array], h: Any) -> Array:
    r"""Return $\int_0^h K(r)\,dr$."""
    return integrals(kernel, lambda lam: lam, 0.0, h, jnp.zeros(1), 1)[0]


def of_mean(alpha1: Any, h: Any, tau: Any = 0.0) -> Callable[[Array], Array]:
    r"""Return the kernel of $m$, $(1+\tau^2)\,\alpha_1 e^{-(1+\tau^2)(h-r)}$."""
    rate = 1 + jnp.asarray(tau) ** 2
    return lambda r: rate * alpha1 * jnp.exp(-rate * (h - r))


def of_noise(sigma1: Any, h: Any) -> Callable[[Array], Array]:
    r"""Return the kernel of $\hat\epsilon$ on the ODE, $-\sigma_1 e^{h-r}$."""
    return lambda r: -sigma1 * jnp.exp(h - r)
