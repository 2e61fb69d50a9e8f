r"""Denoisers in phase space: a network of any kind, and any denoiser of a Gaussian path.

Notation: $z = (x, p)$, $z_t = \Phi_{\cdot x}x_0 + K\epsilon$ with $K K^\top = \Sigma$. The score is
that of the joint law of position and momentum, and

$$ \nabla_z\log q_t = -K^{-\top}\hat\epsilon, \qquad \hat\epsilon = E[\epsilon | z_t], \qquad
   z = \Phi_{\cdot x}\,m - \Sigma\,\nabla\log q_t. $$

A network is fitted by regression on the `eps` of `LinearSDE.perturb`, whose root K it then has to
keep. With the Cholesky root, $\nabla_p\log q_t = -\hat\epsilon_p/K_{pp}$ needs the second half of
the prediction only, and so does every solver of CLD; with gDDIM's root both halves count.
"""

import abc
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from jaxdiff import _check, score
from jaxdiff._array import Cond, NetFn, ScalarLike, time_dtype
from jaxdiff.phase.process import FACTORS, Factor, LinearSDE, Matrix, apply, inverse, product
from jaxdiff.process import gaussian_only
from jaxdiff.score import floating

__all__ = ["KINDS", "AbstractDenoiser", "Denoiser", "Head", "Kind", "Lifted"]

Kind: TypeAlias = Literal["eps", "score"]
KINDS = ("eps", "score")


class Head(eqx.Module):
    """What a prediction means: the part of a denoiser that coefficients are computed from.

    Attributes:
        process: the diffusion.
        predicts: `"eps"` or `"score"`.
        factor: the root K to which `"eps"` refers, `"cholesky"` or `"r"`.
    """

    process: LinearSDE
    predicts: Kind = eqx.field(static=True, default="eps")
    factor: Factor = eqx.field(static=True, default="cholesky")

    def __check_init__(self) -> None:
        if not isinstance(self.process, LinearSDE):
            raise _check.bad("Denoiser", "process", "a LinearSDE", repr(self.process))
        _check.choice("Denoiser", "predicts", self.predicts, KINDS)
        _check.choice("Denoiser", "factor", self.factor, FACTORS)

    def to_score(self, t: ScalarLike) -> Matrix:
        """Return the matrix C with score = C prediction: the identity, or minus K^-T."""
        if self.predicts == "score":
            return jnp.eye(2)
        return -inverse(self.process.root(t, self.factor)).T

    def to_clean(self, t: ScalarLike) -> tuple[Matrix, Matrix]:
        r"""Return (P, W) with $E[z_0 | z_t] = P z + W\,\mathrm{prediction}$.

        $$ m = (x + (\Sigma s)_x)/\Phi_{xx}, \qquad E[p_0 | z_t] = -v\,\Phi_{\cdot p}\cdot s $$

        the first from the upper row of the module's identity, the second from
        $Cov[p_0, z_t] = v\,\Phi_{\cdot p}$.
        """
        process, C = self.process, self.to_score(t)
        phi = process.transition(t)
        rows = [process.covariance(t)[0] / phi[0, 0], -process.momentum * phi[:, 1]]
        return jnp.array([[1 / phi[0, 0], 0.0], [0.0, 0.0]]), product(jnp.stack(rows), C)


class AbstractDenoiser(eqx.Module):
    """A prediction of a phase-space diffusion and its views. Subclasses write `raw` and `head`.

    All methods take one state: `t: ()`, `z: (2, *dims)`, and return `(2, *dims)` (`__call__`:
    `(*dims,)`) in the dtype of `z`; batching is `jax.vmap`.
    """

    head: eqx.AbstractVar[Head]

    @property
    def process(self) -> LinearSDE:
        """The diffusion."""
        return self.head.process

    @abc.abstractmethod
    def raw(
        self, t: ScalarLike, z: Float[ArrayLike, "2 *dims"], cond: Cond = None
    ) -> Float[Array, "2 *dims"]:
        """Return the prediction, of the kind that `head` names."""

    def score(
        self, t: ScalarLike, z: Float[ArrayLike, "2 *dims"], cond: Cond = None
    ) -> Float[Array, "2 *dims"]:
        r"""Return $\nabla_z\log q_t(z)$."""
        z = floating(z)
        out, t = self.raw(t, z, cond), jnp.asarray(t, time_dtype(z.dtype))
        return out if self.head.predicts == "score" else _as(z, apply(self.head.to_score(t), out))

    def eps(
        self,
        t: ScalarLike,
        z: Float[ArrayLike, "2 *dims"],
        cond: Cond = None,
        factor: Factor | None = None,
    ) -> Float[Array, "2 *dims"]:
        r"""Return $\hat\epsilon = -K^\top\nabla\log q_t$ of a root, by default that of `head`."""
        z = floating(z)
        factor = self.head.factor if factor is None else factor
        if self.head.predicts == "eps" and factor == self.head.factor:
            return self.raw(t, z, cond)
        t = jnp.asarray(t, time_dtype(z.dtype))
        return _as(z, -apply(self.process.root(t, factor).T, self.score(t, z, cond)))

    def __call__(
        self, t: ScalarLike, z: Float[ArrayLike, "2 *dims"], cond: Cond = None
    ) -> Float[Array, "*dims"]:
        r"""Return the position that is expected, $m = E[x_0 | z_t = z]$, (*dims,)."""
        z = floating(z)
        P, W = self.head.to_clean(jnp.asarray(t, time_dtype(z.dtype)))
        return _as(z, apply(P, z) + apply(W, self.raw(t, z, cond)))[0]


def _as(z: Array, value: Array) -> Array:
    return value.astype(z.dtype)


class Denoiser(AbstractDenoiser):
    r"""A phase-space diffusion and a network that predicts its noise or its score.

    Cost: one network evaluation per call, no autodiff.

    Attributes:
        net: any pytree callable `net(t, z, cond) -> (2, *dims)` for one state `z: (2, *dims)`.
        head: what it predicts, and of which process.

    Args:
        process: the diffusion, as `CLD()` or `PSLD()`.
        net: the network.
        predicts: `"eps"` or `"score"`.
        factor: the root K that the noise refers to, $\nabla\log q_t = -K^{-\top}\epsilon$:
            `"cholesky"` (as the publications of CLD and PSLD) or `"r"` (as gDDIM).

    Raises:
        ValueError: if an argument is of another kind, or (when called) if `net` returns another
            shape than that of `z`.

    Example:
        >>> from jaxdiff.phase.process import PSLD
        >>> model = Denoiser(PSLD(), lambda t, z, cond: 0.5 * z)
        >>> model.eps(0.5, jnp.ones((2, 3))).shape, model(0.5, jnp.ones((2, 3))).shape
        ((2, 3), (3,))
    """

    net: NetFn
    head: Head

    def __init__(
        self,
        process: LinearSDE,
        net: NetFn,
        predicts: Kind = "eps",
        factor: Factor = "cholesky",
    ) -> None:
        if not callable(net):
            raise _check.bad("Denoiser", "net", "callable as net(t, z, cond)", repr(net))
        self.net, self.head = net, Head(process, predicts, factor)

    def raw(
        self, t: ScalarLike, z: Float[ArrayLike, "2 *dims"], cond: Cond = None
    ) -> Float[Array, "2 *dims"]:
        """Return what the network says."""
        z = floating(z)
        if jnp.ndim(t) != 0:
            raise _check.bad("Denoiser", "t", "one time, (); use jax.vmap for more", jnp.shape(t))
        out = jnp.asarray(self.net(jnp.asarray(t, time_dtype(z.dtype)), z, cond))
        if out.shape != z.shape:
            expected = f"of the shape of z, {z.shape}"
            raise _check.bad("Denoiser", "the output of net", expected, out.shape)
        return _as(z, out)


class Lifted(AbstractDenoiser):
    r"""A denoiser of any Gaussian path, seen from phase space: no network to train.

    Given $z$, all that is known of $x_0$ lies along $u = K^{-1}\Phi_{\cdot x}$: with
    $y = K^{-1}z = u x_0 + \epsilon$, $\hat u = u/|u|$ and $y_\perp = y - \hat u\,\hat u\cdot y$,

    $$ \hat x = u\cdot y/|u|^2 = x_0 + \epsilon'/|u|, \qquad m = m'(\hat x), \qquad
       \hat\epsilon = y_\perp + \hat u\,\hat\epsilon'(\hat x), $$

    where $m', \hat\epsilon'$ are those of the path at log-SNR $\log|u|$. Exact if `base` is. With
    an exact one, it is the oracle of this package; with a trained one of `VP` or `EDM`, the solvers
    of phase space run on it as it is. Cost: one evaluation of `base`.

    Attributes:
        head: the process; predicts `"eps"` of the Cholesky root.
        base: the denoiser of a Gaussian path, as `jaxdiff.exact.mixture(EDM(), ...)`.

    Args:
        process: the diffusion.
        base: the denoiser.

    Raises:
        ValueError: if an argument is of another kind.

    Example:
        >>> import jaxdiff as jd
        >>> from jaxdiff.phase.process import CLD
        >>> two = jd.exact.mixture(jd.process.EDM(), [0.5, 0.5], [[-1.0], [1.0]], 0.01)
        >>> bool(abs(Lifted(CLD(), two)(0.5, jnp.zeros((2, 1)))[0]) < 1e-6)
        True
    """

    head: Head
    base: score.AbstractDenoiser

    def __init__(self, process: LinearSDE, base: score.AbstractDenoiser) -> None:
        if not isinstance(base, score.AbstractDenoiser):
            raise _check.bad("Lifted", "base", "a denoiser of a Gaussian path", repr(base))
        gaussian_only("Lifted", "the process of base", base.process, "its kernel is not lifted")
        self.head, self.base = Head(process), base

    def _split(self, t: ScalarLike, z: Any, cond: Cond) -> tuple[Array, Array]:
        r"""Return $(m, \hat\epsilon)$ at one state."""
        z = floating(z)
        if z.shape[:1] != (2,):
            raise _check.bad("Lifted", "z", "one state of shape (2, *dims)", z.shape)
        t = jnp.asarray(t, time_dtype(z.dtype))
        back = inverse(self.process.root(t))
        u = product(back, self.process.transition(t)[:, :1])[:, 0]
        size, y = jnp.hypot(u[0], u[1]), apply(back, z.astype(t.dtype))
        along, across = (u[0] * y[0] + u[1] * y[1]) / size, (u[0] * y[1] - u[1] * y[0]) / size
        path = self.base.process
        time = path.t_of_lam(jnp.log(size))
        m, eps = self.base.pair(time, path.alpha(time) * along / size, cond)
        rest = jnp.stack([-u[1] * across, u[0] * across]) / size
        return m, rest + jnp.stack([u[0] * eps, u[1] * eps]) / size

    def raw(
        self, t: ScalarLike, z: Float[ArrayLike, "2 *dims"], cond: Cond = None
    ) -> Float[Array, "2 *dims"]:
        r"""Return $\hat\epsilon$."""
        return _as(floating(z), self._split(t, z, cond)[1])

    def __call__(
        self, t: ScalarLike, z: Float[ArrayLike, "2 *dims"], cond: Cond = None
    ) -> Float[Array, "*dims"]:
        r"""Return $m = E[x_0 | z_t = z]$, which is that of `base`."""
        return _as(floating(z), self._split(t, z, cond)[0])
