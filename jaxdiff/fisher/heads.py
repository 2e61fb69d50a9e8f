r"""The trace of the noise covariance, $r = \mathrm{tr}\,Cov[\epsilon | x_t = x]$, four ways.

Notation: $R = Cov[\epsilon | x_t = x]$, $C = Cov[x_0 | x_t = x]$ and $F = -\nabla^2\log q_t$ obey

$$ R = (\alpha/\sigma)^2\,C = I - \sigma\frac{\partial\hat\epsilon}{\partial x}, \qquad
   r = \mathrm{tr}\,R, \qquad \mathrm{tr}\,F = \frac{d - r}{\sigma^2}. $$

$r$ is the one number that the likelihood of the probability flow needs at every state, and it is
of order $d$ or less at every noise level, where $\mathrm{tr}\,F$ grows as $1/\sigma^2$.

| estimator | cost beside the denoiser's own evaluation | error |
|---|---|---|
| `ExactTrace` | none where the density is known, else d forward derivatives | round-off |
| `Hutchinson` | 1 derivative, or evaluation, per probe | unbiased, variance (3) below |
| `HutchPP` | `products` forward derivatives | unbiased, small where $R$ has low rank |
| `TraceHead` | a scalar network | bias of the training, no noise |

Each returns $m$ and $\hat\epsilon$ of the same evaluation beside its estimates, so that a solver
gets its drift from them.
"""

import abc
from typing import Any, ClassVar, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from jaxdiff import _check, exact
from jaxdiff._array import Cond, NetFn, Scalar, ScalarLike, time_dtype
from jaxdiff.fisher.operators import _Difference, _operator
from jaxdiff.linalg.estimators import LAWS, Probe, deflate, diagonal, dot, draw
from jaxdiff.process import AbstractProcess, gaussian_only
from jaxdiff.score import AbstractDenoiser, Denoiser, floating

__all__ = [
    "AbstractTrace",
    "ExactTrace",
    "HeadKind",
    "HutchPP",
    "Hutchinson",
    "TraceHead",
    "intrinsic_dimension",
    "matching_bound",
]

HeadKind: TypeAlias = Literal["preconditioned", "residual", "raw"]

_MODES = ("jvp", "fd", "vjp")
_KINDS = ("preconditioned", "residual", "raw")
_ONE = 0.5413248546129181  # softplus of it is 1


def _linear(
    denoiser: AbstractDenoiser, t: ScalarLike, x: Array, cond: Cond
) -> tuple[Array, Array, Any]:
    r"""Return $m$, $\hat\epsilon$ and $v \mapsto Rv$, the network being evaluated once."""
    (m, eps), push = jax.linearize(lambda x: denoiser.pair(t, x, cond), x)
    sigma = denoiser.process.sigma(t)
    return m, eps, lambda v: (v - sigma * push(v)[1]).astype(v.dtype)


class AbstractTrace(eqx.Module):
    r"""An estimator of $r = \mathrm{tr}\,Cov[\epsilon | x_t = x]$ for one sample.

    By derivatives it is one of $r = d - \sigma\,\mathrm{div}\,\hat\epsilon$: the same number where
    the kernel of the process is Gaussian, and what a likelihood asks for where it is not.

    Attributes:
        stochastic: whether it draws probes, so that a call needs a key.
    """

    stochastic: ClassVar[bool]

    @abc.abstractmethod
    def __call__(
        self,
        denoiser: AbstractDenoiser,
        t: ScalarLike,
        x: Float[ArrayLike, "*dims"],
        cond: Cond = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*dims"], Float[Array, "*dims"], Float[Array, " k"]]:
        r"""Return $m$, $\hat\epsilon$ and estimates of $r$, from one evaluation of the denoiser.

        Args:
            denoiser: the denoiser.
            t: time with sigma > 0, ().
            x: where, (*dims,).
            cond: condition passed to the denoiser.
            key: for the probes; None where `stochastic` is False.

        Returns:
            The posterior mean and the noise prediction, (*dims,) in the dtype of `x`, and k
            independent estimates of r, (k,) in the dtype of `x` or float32 if that is wider; k is 1
            if not `stochastic`.

        Raises:
            ValueError: if `stochastic` and `key` is not one key.
        """


class ExactTrace(AbstractTrace):
    r"""The trace without error: $r = \sum_i e_i^\top R\,e_i$.

    Where the density is known (`mixture`, `empirical`) it is in closed form; elsewhere it costs d
    forward derivatives of the network, for d up to a few dozens.
    """

    stochastic: ClassVar[bool] = False

    def __call__(
        self,
        denoiser: AbstractDenoiser,
        t: ScalarLike,
        x: Float[ArrayLike, "*dims"],
        cond: Cond = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*dims"], Float[Array, "*dims"], Float[Array, " k"]]:
        """Return the mean, the noise and one value, (1,)."""
        x = floating(x)
        wide = time_dtype(x.dtype)
        if isinstance(denoiser, exact.AbstractExact):
            known = denoiser.posterior(t, x)
            return known.mean, known.eps, known.residual.astype(wide)[None]
        m, eps, product = _linear(denoiser, t, x, cond)
        return m, eps, jnp.sum(diagonal(_operator(product, x))[0].astype(wide))[None]


class Hutchinson(AbstractTrace):
    r"""Random probes: $v^\top R v = v\cdot v - \sigma\,v\cdot(\partial\hat\epsilon/\partial x)v$.

    Unbiased. The variance of one probe is, for a symmetric $R$,

    $$ 2\Big(\|R\|_F^2 - \sum_i R_{ii}^2\Big) \ \text{(Rademacher)}, \qquad
       2\,\|R\|_F^2 \ \text{(Gaussian)}, \tag{3} $$

    so choose Rademacher, never Gaussian: it is exact on the identity, to which $R$ tends at small
    sigma where the data have a density. Gaussian probes are here to compare with. Along a path of
    fixed steps draw fresh probes at every step; under an adaptive solver keep the key fixed.

    The probes go through the derivative together, the network's own evaluation is shared.

    | mode | cost of a probe | note |
    |---|---|---|
    | `"jvp"` | 1 forward derivative (about 2 evaluations) | no tape |
    | `"fd"` | 1 evaluation | no autodiff; about half the digits that `x` has beside $\sigma$ |
    | `"vjp"` | 1 reverse derivative | stores the activations; for networks without forward mode |

    Attributes:
        probes: number of probes, each one value.
        kind: law of the probes.
        mode: how the derivative is taken.

    Raises:
        ValueError: if `probes` is less than 1, or `kind` or `mode` is unknown.

    Example:
        >>> from jaxdiff.process import VP
        >>> shrink = Denoiser(VP(), lambda t, x, cond: 0.5 * x, "eps")
        >>> m, eps, values = Hutchinson(3)(shrink, 0.5, jnp.ones(2), None, jax.random.key(0))
        >>> bool(jnp.allclose(values, 2 - shrink.process.sigma(0.5)))  # exact for R = c I
        True

    References:
        Hutchinson 1990, "A stochastic estimator of the trace of the influence matrix"; Grathwohl
        et al. 2019 (1810.01367) for likelihoods.
    """

    probes: int = eqx.field(static=True, default=1)
    kind: Probe = eqx.field(static=True, default="rademacher")
    mode: Literal["jvp", "fd", "vjp"] = eqx.field(static=True, default="jvp")
    stochastic: ClassVar[bool] = True

    def __check_init__(self) -> None:
        _check.whole("Hutchinson", "probes", self.probes, 1)
        _check.choice("Hutchinson", "kind", self.kind, LAWS)
        _check.choice("Hutchinson", "mode", self.mode, _MODES)

    def __call__(
        self,
        denoiser: AbstractDenoiser,
        t: ScalarLike,
        x: Float[ArrayLike, "*dims"],
        cond: Cond = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*dims"], Float[Array, "*dims"], Float[Array, " k"]]:
        """Return the mean, the noise and one value per probe, (probes,)."""
        x, key = floating(x), _check.key("Hutchinson", "key", key)
        v = draw(key, self.probes, x.shape, x.dtype, self.kind)
        pair = lambda x: denoiser.pair(t, x, cond)  # noqa: E731
        if self.mode == "jvp":
            # Unlike jax.linearize, this stores nothing where the network loops over its layers;
            # only the tangents carry the axis of the probes.
            push = jax.vmap(lambda v: jax.jvp(pair, (x,), (v,)), out_axes=(None, 0))
            (m, eps), (_, along) = push(v)
        elif self.mode == "vjp":
            (m, eps), pull = jax.vjp(pair, x)
            along = jax.vmap(lambda v: pull((jnp.zeros_like(m), v))[0])(v)
        else:
            m, eps = pair(x)
            along = jax.vmap(_Difference(denoiser, t, x, cond, eps))(v)
        values = dot(v, v) - denoiser.process.sigma(t) * dot(v, along)
        return m, eps, values.astype(time_dtype(x.dtype))


class HutchPP(AbstractTrace):
    r"""Hutch++: the trace on a sketched range exactly, on its complement by probes.

    $$ Q = \mathrm{orth}(R S), \qquad
       \mathrm{tr}(Q^\top R Q) + \frac1k\sum_{i=1}^k g_i^\top P R P g_i, \qquad P = I - QQ^\top $$

    with $S$ and $G$ of k Rademacher columns each: 3k forward derivatives. Unbiased. Use it only
    where the rank of $R$ is below k, that is at high noise or for data on few dimensions; where the
    spectrum is flat, `Hutchinson` with Rademacher probes is better at equal cost, since a projected
    probe is no longer exact on the identity.

    Attributes:
        products: forward derivatives per value, 3k.
        repeats: number of values, each from its own sketch.

    Raises:
        ValueError: if `products` is no positive multiple of 3, or `repeats` is less than 1.

    References:
        Meyer, Musco, Musco, Woodruff 2021 (2010.09649), algorithm 1.
    """

    products: int = eqx.field(static=True, default=6)
    repeats: int = eqx.field(static=True, default=1)
    stochastic: ClassVar[bool] = True

    def __check_init__(self) -> None:
        _check.whole("HutchPP", "products", self.products, 3)
        _check.whole("HutchPP", "repeats", self.repeats, 1)
        if self.products % 3:
            raise _check.bad("HutchPP", "products", "a multiple of 3", self.products)

    def __call__(
        self,
        denoiser: AbstractDenoiser,
        t: ScalarLike,
        x: Float[ArrayLike, "*dims"],
        cond: Cond = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*dims"], Float[Array, "*dims"], Float[Array, " k"]]:
        """Return the mean, the noise and one value per repeat, (repeats,)."""
        x, key = floating(x), _check.key("HutchPP", "key", key)
        m, eps, product = _linear(denoiser, t, x, cond)
        k = self.products // 3

        def one(key: PRNGKeyArray) -> Array:
            draws = draw(key, 2 * k, x.shape, x.dtype, "rademacher")
            inside, outside = deflate(product, draws[:k], draws[k:])
            return inside + jnp.mean(outside)

        return m, eps, jax.vmap(one)(jax.random.split(key, self.repeats))


class TraceHead(AbstractTrace):
    r"""A scalar network that has learnt the trace: one evaluation, no derivative, no noise.

    The network predicts a conditional moment, from which $r$ follows:

    | kind | the network predicts | $r$ | |
    |---|---|---|---|
    | `"preconditioned"` | $q = E\|x_0 - m_\theta\|^2/(d\,\sigma^2 V)$ | $d\,\alpha^2 V\,q$ | ours |
    | `"residual"` | $u = E\|\epsilon - \epsilon_\theta\|^2/d$ | $d\,u$ | ours |
    | `"raw"` | $w = E\|x_0\|^2/d$ | $(\alpha/\sigma)^2\,(d\,w - \|m_\theta\|^2)$ | published |

    with $V = 1/(\alpha^2 + \sigma^2)$, all moments given $x_t = x$. `"raw"` is trace matching as
    Wang et al. publish it (DF-TM). It subtracts two numbers of the size of the data to get one of
    size $\sigma^2$, and multiplies by $(\alpha/\sigma)^2$: its error in $\mathrm{tr}\,F$ is that of
    the network times $d\,\alpha^2/\sigma^4$ (`matching_bound`), useless from $\lambda$ of about 1
    on. It is here for comparison, and for very noisy states, where it is accurate. Choose
    `"preconditioned"` otherwise: $q$ is of order 1 at both ends of the path (1 at small sigma for
    data with a density, the variance of the data per dimension at large sigma) and positive, by a
    softplus that is 1 where the network says 0. `"residual"` is the plain noise residual of Bao et
    al.: as good at small sigma, but at large sigma, where $r$ vanishes, its relative error is not
    bounded.

    An imperfect denoiser biases the last two only quadratically, since
    $E|x_0 - m_\theta|^2 = \mathrm{tr}\,C + |m_\theta - m|^2$. What bias is left along a whole path
    can be removed by comparing with one Hutchinson probe at a random time.

    Train with `jaxdiff.train.batch_trace_loss`. The network is called with the clock
    $-\lambda/4$ and with $x/\sqrt{\alpha^2 + \sigma^2}$, which are of order 1 on every path (as in
    `jaxdiff.score.precondition`).

    Attributes:
        net: `net(clock, x, cond) -> ()`, or `net(clock, features, cond) -> ()` if `features`;
            `from_linen(train.TraceNet(), ...)` is one.
        kind: the row of the table.
        features: whether the network reads the last hidden features of the denoiser's own network,
            from the same evaluation (`Denoiser.features`), instead of `x`.

    Raises:
        ValueError: if `kind` is unknown, or (when called) if the output of `net` is no scalar or
            the denoiser has no features.

    References:
        Wang et al. 2025, "Efficiently Access Diffusion Fisher" (2505.23264) for `"raw"`; Bao et
        al. 2022 (2206.07309) for learning the moment of the noise residual.
    """

    net: NetFn
    kind: HeadKind = eqx.field(static=True, default="preconditioned")
    features: bool = eqx.field(static=True, default=False)
    stochastic: ClassVar[bool] = False

    def __check_init__(self) -> None:
        _check.choice("TraceHead", "kind", self.kind, _KINDS)
        if not callable(self.net):
            raise _check.bad("TraceHead", "net", "callable as net(t, x, cond)", repr(self.net))

    def inputs(
        self, denoiser: AbstractDenoiser, t: ScalarLike, x: Float[ArrayLike, "*dims"], cond: Cond
    ) -> tuple[Float[Array, "*dims"], Float[Array, "*dims"], Any]:
        r"""Return $m$, $\hat\epsilon$ and what `net` reads, from one evaluation."""
        gaussian_only("TraceHead", "the process of the denoiser", denoiser.process)
        x = floating(x)
        if not self.features:
            h = jnp.hypot(denoiser.process.alpha(t), denoiser.process.sigma(t))
            return (*denoiser.pair(t, x, cond), (x / h).astype(x.dtype))
        if not isinstance(denoiser, Denoiser):
            expected = "a Denoiser with a network, as the head reads its features"
            raise _check.bad("TraceHead", "denoiser", expected, type(denoiser).__name__)
        return denoiser.features(t, x, cond)

    def moment(self, lam: ScalarLike, inputs: Any, cond: Cond) -> Scalar:
        """Return the moment of the table that `net` predicts, in float32 or wider."""
        wide = time_dtype(jnp.result_type(*jax.tree.leaves(inputs)))
        out = jnp.asarray(self.net(jnp.asarray(-lam / 4, wide), inputs, cond))
        if out.shape != ():
            raise _check.bad("TraceHead", "the output of net", "a scalar, ()", out.shape)
        out = out.astype(wide)
        return jax.nn.softplus(out + _ONE) if self.kind == "preconditioned" else out

    def target(self, x0: Array, noise: Array, m: Array, eps: Array) -> Scalar:
        r"""Return one draw of the moment, for the true $x_0$ and noise of $x$.

        $(\alpha^2+\sigma^2)/\sigma^2\,|x_0 - m|^2 = |x_0 - m|^2 + |\epsilon - \hat\epsilon|^2$,
        which neither divides nor cancels at either end of the path.
        """
        square = lambda a: jnp.mean(a.astype(time_dtype(a.dtype)) ** 2)  # noqa: E731
        match self.kind:
            case "raw":
                return square(x0)
            case "residual":
                return square(noise - eps)
        return square(x0 - m) + square(noise - eps)

    def __call__(
        self,
        denoiser: AbstractDenoiser,
        t: ScalarLike,
        x: Float[ArrayLike, "*dims"],
        cond: Cond = None,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "*dims"], Float[Array, "*dims"], Float[Array, " k"]]:
        """Return the mean, the noise and one value, (1,)."""
        m, eps, inputs = self.inputs(denoiser, t, x, cond)
        lam = denoiser.process.lam(t)
        moment = self.moment(lam, inputs, cond)
        match self.kind:
            case "raw":
                r = jnp.exp(2 * lam) * (m.size * moment - dot(m[None], m[None])[0])
            case "residual":
                r = m.size * moment
            case _:  # sigmoid(2 lam) = alpha^2 / (alpha^2 + sigma^2)
                r = m.size * jax.nn.sigmoid(2 * lam) * moment
        return m, eps, r.astype(moment.dtype)[None]


def matching_bound(
    process: AbstractProcess,
    t: ScalarLike,
    d: int,
    delta_t: ScalarLike,
    m: Float[ArrayLike, "*dims"],
    delta_m: ScalarLike,
) -> Scalar:
    r"""Bound the error of $\mathrm{tr}\,F$ by a `"raw"` head, equation (9).

    $$ |\mathrm{tr}\,\hat F - \mathrm{tr}\,F| \le \frac{\alpha^2}{\sigma^4}
       \big(d\,\delta_t + \delta_m\,(2|m| + \delta_m)\big) $$

    for a head with $|t_\theta - E|x_0|^2/d| \le \delta_t$ and a denoiser with
    $|m_\theta - m| \le \delta_m$.

    Args:
        process: the Gaussian path.
        t: time with sigma > 0, ().
        d: number of dimensions.
        delta_t: error of the head, ().
        m: true posterior mean, (*dims,).
        delta_m: error of the denoiser, ().
    """
    gaussian_only("matching_bound", "process", process)
    snr, sigma = process.snr(t), process.sigma(t)
    size = jnp.sqrt(jnp.sum(floating(m) ** 2))
    return snr / sigma**2 * (d * delta_t + delta_m * (2 * size + delta_m))


def intrinsic_dimension(
    denoiser: AbstractDenoiser,
    t: ScalarLike,
    x: Float[ArrayLike, "*dims"],
    cond: Cond = None,
    *,
    estimator: AbstractTrace | None = None,
    key: PRNGKeyArray | None = None,
) -> Scalar:
    r"""Return the local dimension of the data as the denoiser sees it near a noisy sample.

    $$ r = \mathrm{tr}\,Cov[\epsilon | x_t = x] = d - \sigma^2\,\mathrm{tr}\,F $$

    Directions in which the data have a density on the scale $\sigma/\alpha$ count 1, directions in
    which they do not extend count 0. It tends to the dimension of the data as $\sigma/\alpha$
    falls below the scale on which the set is curved or ends, and for data that are points, further
    down, to 0. Average over draws of $x_t$ around one $x_0$, or over data: one value varies,
    because $r$ is an expectation of the noise error at one state.

    Cost: one trace.

    Args:
        denoiser: the denoiser.
        t: time with small sigma / alpha > 0, ().
        x: noisy sample, (*dims,).
        cond: condition passed to the denoiser.
        estimator: of the trace; `ExactTrace()` by default.
        key: for an estimator that draws probes.

    References:
        Wang et al. 2025 (2505.23264) for the trace; Kamkari et al. 2024 (2406.03537) for the
        related estimate from the clean sample.
    """
    estimator = ExactTrace() if estimator is None else estimator
    for name, value, kind in (
        ("denoiser", denoiser, AbstractDenoiser),
        ("estimator", estimator, AbstractTrace),
    ):
        if not isinstance(value, kind):
            raise _check.bad("intrinsic_dimension", name, f"an {kind.__name__}", repr(value))
    gaussian_only("intrinsic_dimension", "the process of the denoiser", denoiser.process)
    return jnp.mean(estimator(denoiser, t, x, cond, key)[2])
