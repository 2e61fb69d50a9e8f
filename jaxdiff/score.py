r"""The denoiser: one object behind every prediction type, and adapters for networks.

Notation: $m = E[x_0 | x_t = x]$, $\hat\epsilon = (x - \alpha m)/\sigma$, so that
$x = \alpha m + \sigma\hat\epsilon$. Every prediction is a linear combination
$o = a\,m + b\,\hat\epsilon$:

| predicts | a | b | range |
|---|---|---|---|
| `"x0"` | 1 | 0 | |
| `"eps"` | 0 | 1 | |
| `"score"` | 0 | $-1/\sigma$ | $\nabla\log q_t$ |
| `"v"` | $-\sigma$ | $\alpha$ | Salimans, Ho 2022 (2202.00512) |
| `"velocity"` | $\alpha'$ | $\sigma'$ | $dx/dt$ along the PF-ODE |

Given $x$ and $o$, the pair is the solution of a 2x2 system with determinant
$D = \alpha b - \sigma a$: $m = (b x - \sigma o)/D$, $\hat\epsilon = (\alpha o - a x)/D$. `v` and
`velocity` are finite at both ends of the path; `eps` and `score` lose $m$ where alpha = 0
(`needs_signal`) and `x0` loses $\hat\epsilon$ where sigma = 0 (`needs_noise`). A score that is
finite at sigma = 0 gives the pair there, $m = x/\alpha$ and $\hat\epsilon = 0$.
"""

import abc
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree

from jaxdiff import _check
from jaxdiff._array import Cond, NetFn, Prediction, Scalar, ScalarLike, time_dtype
from jaxdiff.process import AbstractProcess, floating, gaussian_only

__all__ = [
    "PREDICTIONS",
    "AbstractDenoiser",
    "Denoiser",
    "check_score",
    "edm_coefficients",
    "floating",
    "from_batched",
    "from_linen",
    "from_nnx",
    "mixing",
    "precondition",
]

PREDICTIONS = ("x0", "eps", "score", "v", "velocity")


def mixing(process: AbstractProcess, kind: Prediction, t: ScalarLike) -> tuple[Any, Any]:
    r"""Return $(a, b)$ of the module's table: a prediction is $o = a\,m + b\,\hat\epsilon$.

    The score stands here multiplied by sigma, $b = -1$, to stay finite where sigma vanishes.

    Args:
        process: the Gaussian path.
        kind: one of `PREDICTIONS`.
        t: time, ().
    """
    match kind:
        case "x0":
            return 1.0, 0.0
        case "eps":
            return 0.0, 1.0
        case "score":
            return 0.0, -1.0
        case "v":
            return -process.sigma(t), process.alpha(t)
        case "velocity":
            return process.rates(t)


class AbstractDenoiser(eqx.Module):
    r"""The posterior mean $m(t, x)$ of a Gaussian path, and its views.

    Subclasses write `pair`. All methods take one sample: `t: ()`, `x: (*dims,)`, and return
    `(*dims,)` in the dtype of `x`; batching is `jax.vmap`.
    """

    process: eqx.AbstractVar[AbstractProcess]

    @property
    def needs_signal(self) -> bool:
        r"""Whether `pair` is undefined where alpha = 0.

        There $x - \sigma\hat\epsilon$ does not tell $m$. True if it is of any denoiser among the
        fields of this one, at any depth of the pytree: a wrapper is defined where what it wraps is.
        Override it where that is not so, or where the inner denoiser is no child of the pytree.
        """
        return any(inner.needs_signal for inner in _inside(self))

    @property
    def needs_noise(self) -> bool:
        r"""Whether `pair` is undefined where sigma = 0.

        There $x - \alpha m$ does not tell $\hat\epsilon$. By default that of the fields, as
        `needs_signal`.
        """
        return any(inner.needs_noise for inner in _inside(self))

    @abc.abstractmethod
    def pair(
        self, t: ScalarLike, x: Float[ArrayLike, "*dims"], cond: Cond = None
    ) -> tuple[Float[Array, "*dims"], Float[Array, "*dims"]]:
        r"""Return $(m, \hat\epsilon)$ from one evaluation."""

    def __call__(
        self, t: ScalarLike, x: Float[ArrayLike, "*dims"], cond: Cond = None
    ) -> Float[Array, "*dims"]:
        r"""Return the posterior mean $m = E[x_0 | x_t = x]$."""
        return self.pair(t, x, cond)[0]

    def eps(
        self, t: ScalarLike, x: Float[ArrayLike, "*dims"], cond: Cond = None
    ) -> Float[Array, "*dims"]:
        r"""Return the noise prediction $\hat\epsilon = (x - \alpha m)/\sigma$."""
        return self.pair(t, x, cond)[1]

    def score(
        self, t: ScalarLike, x: Float[ArrayLike, "*dims"], cond: Cond = None
    ) -> Float[Array, "*dims"]:
        r"""Return the score $\nabla\log q_t(x) = -\hat\epsilon/\sigma$.

        Raises:
            ValueError: if the kernel of the process is not Gaussian, of which this does not hold.
        """
        check_score("score", self)
        return self._view("score", t, x, cond)

    def v(
        self, t: ScalarLike, x: Float[ArrayLike, "*dims"], cond: Cond = None
    ) -> Float[Array, "*dims"]:
        r"""Return $v = \alpha\hat\epsilon - \sigma m$."""
        return self._view("v", t, x, cond)

    def velocity(
        self, t: ScalarLike, x: Float[ArrayLike, "*dims"], cond: Cond = None
    ) -> Float[Array, "*dims"]:
        r"""Return the PF-ODE velocity $dx/dt = \alpha' m + \sigma'\hat\epsilon$."""
        return self._view("velocity", t, x, cond)

    def _view(self, kind: Prediction, t: ScalarLike, x: Any, cond: Cond) -> Array:
        m, eps = self.pair(t, x, cond)
        if kind == "score":
            return (-eps / self.process.sigma(t)).astype(m.dtype)
        a, b = mixing(self.process, kind, t)
        return (a * m + b * eps).astype(m.dtype)


def _inside(denoiser: AbstractDenoiser) -> list[AbstractDenoiser]:
    """Return the outermost denoisers among the children of a denoiser."""
    inner = lambda node: isinstance(node, AbstractDenoiser) and node is not denoiser  # noqa: E731
    return [leaf for leaf in jax.tree.leaves(denoiser, is_leaf=inner) if inner(leaf)]


def check_score(where: str, denoiser: AbstractDenoiser) -> None:
    """Raise ValueError where a denoiser has no score but that of a Gaussian kernel, and not one."""
    if type(denoiser).score in (AbstractDenoiser.score, Denoiser.score):
        instead = "only a denoiser with a score of its own, as pfgm.empirical builds, has one there"
        gaussian_only(where, "the process of the denoiser", denoiser.process, instead)


def _time(t: ScalarLike, x: Array) -> Array:
    """Return the time that a network gets with `x`."""
    if jnp.ndim(t) != 0:
        raise _check.bad("Denoiser", "t", "one time, (); use jax.vmap for more", jnp.shape(t))
    return jnp.asarray(t, time_dtype(x.dtype))


def _output(x: Array, out: Any) -> Array:
    """Return the prediction of a network at `x` as an array, or raise if it is of another shape."""
    if out is None:
        raise _check.bad("Denoiser", "the output of net", "an array", "None")
    out = jnp.asarray(out)
    if out.shape != x.shape:
        raise _check.bad(
            "Denoiser", "the output of net", f"of the shape of x, {x.shape}", out.shape
        )
    return out.astype(x.dtype)


def _both(net: Any) -> Any:
    """Return the method of a network that gives its prediction and its features."""
    method = getattr(net, "features", None)
    if not callable(method):
        expected = (
            "a network with a method features(t, x, cond) -> (prediction, features); from_linen "
            "and from_nnx provide it for a module that takes features=True, as train.UNet does"
        )
        raise _check.bad("features", "net", expected, type(net).__name__)
    return method


class Denoiser(AbstractDenoiser):
    r"""A process and a network, whatever the network predicts.

    Cost: one network evaluation per call, no autodiff.

    Attributes:
        process: the Gaussian path.
        net: any pytree callable `net(t, x, cond) -> (*dims,)` for one sample; `from_linen`,
            `from_nnx` and `from_batched` adapt batched networks.
        predicts: what `net` returns, one of `"x0"`, `"eps"`, `"score"`, `"v"`, `"velocity"`.

    Raises:
        ValueError: if `predicts` is unknown, or `"score"` where the kernel of the process is not
            Gaussian (a score then does not give the pair), or (when called) if `net` returns
            another shape than that of `x`.

    Example:
        >>> from jaxdiff.process import VP
        >>> shrink = Denoiser(VP(), lambda t, x, cond: 0.5 * x, predicts="eps")
        >>> shrink.eps(0.5, jnp.ones(2)).tolist()
        [0.5, 0.5]
    """

    process: AbstractProcess
    net: NetFn
    predicts: Prediction = eqx.field(static=True, default="x0")

    def __check_init__(self) -> None:
        _check.choice("Denoiser", "predicts", self.predicts, PREDICTIONS)
        if not isinstance(self.process, AbstractProcess):
            raise _check.bad("Denoiser", "process", "a jaxdiff process", repr(self.process))
        if not callable(self.net):
            raise _check.bad("Denoiser", "net", "callable as net(t, x, cond)", repr(self.net))
        if self.predicts == "score":
            instead = "predict x0, eps, v or velocity there, since a score does not give m"
            gaussian_only("Denoiser", "process (with predicts='score')", self.process, instead)

    @property
    def needs_signal(self) -> bool:
        """Whether the network predicts `"eps"` or `"score"`, or holds a denoiser that needs it."""
        return self.predicts in ("eps", "score") or super().needs_signal

    @property
    def needs_noise(self) -> bool:
        """Whether the network predicts `"x0"`, or holds a denoiser that needs it."""
        return self.predicts == "x0" or super().needs_noise

    def raw(
        self, t: ScalarLike, x: Float[ArrayLike, "*dims"], cond: Cond = None
    ) -> Float[Array, "*dims"]:
        """Return what the network says, of the kind `predicts`."""
        x = floating(x)
        return _output(x, self.net(_time(t, x), x, cond))

    def pair(
        self, t: ScalarLike, x: Float[ArrayLike, "*dims"], cond: Cond = None
    ) -> tuple[Float[Array, "*dims"], Float[Array, "*dims"]]:
        r"""Return $(m, \hat\epsilon)$ by the 2x2 system of the module's head."""
        x = floating(x)
        return self._solve(t, x, self.raw(t, x, cond))

    def features(
        self, t: ScalarLike, x: Float[ArrayLike, "*dims"], cond: Cond = None
    ) -> tuple[Float[Array, "*dims"], Float[Array, "*dims"], Any]:
        r"""Return $(m, \hat\epsilon)$ and the network's last hidden features, from one evaluation.

        They cost nothing, and a small network on them predicts other functions of $(t, x)$, such
        as the trace of `jaxdiff.fisher.TraceHead`.

        Raises:
            ValueError: if the network has no method `features(t, x, cond)`, which returns
                `(prediction, features)`. `from_linen` and `from_nnx` provide it for modules that
                take `features=True`, as `train.MLP` and `train.UNet` do.
        """
        x = floating(x)
        out, hidden = _both(self.net)(_time(t, x), x, cond)
        return (*self._solve(t, x, _output(x, out)), hidden)

    def _solve(self, t: ScalarLike, x: Array, out: Array) -> tuple[Array, Array]:
        alpha, sigma = self.process.alpha(t), self.process.sigma(t)
        if self.predicts == "score":
            out = out * sigma
        a, b = mixing(self.process, self.predicts, t)
        det = alpha * b - sigma * a
        m = out if self.predicts == "x0" else (b * x - sigma * out) / det
        if self.predicts == "eps":
            eps = out
        elif self.predicts == "score":
            eps = -out
        else:
            eps = (alpha * out - a * x) / det
        return m.astype(x.dtype), eps.astype(x.dtype)

    def _view(self, kind: Prediction, t: ScalarLike, x: Any, cond: Cond) -> Array:
        if kind == self.predicts:  # the network's own output, with no round trip through the pair
            return self.raw(t, x, cond)
        return super()._view(kind, t, x, cond)


class _Precondition(eqx.Module):
    process: AbstractProcess
    net: NetFn
    sigma_data: ScalarLike

    def __call__(self, t: Any, x: Array, cond: Cond = None) -> Array:
        return self._around(lambda *args: (self.net(*args), None), t, x, cond)[0]

    def features(self, t: Any, x: Array, cond: Cond = None) -> tuple[Array, Any]:
        return self._around(_both(self.net), t, x, cond)

    def _around(self, net: Any, t: Any, x: Array, cond: Cond) -> tuple[Array, Any]:
        skip, out, scale, noise = edm_coefficients(self.process, t, self.sigma_data)
        inner, hidden = net(noise.astype(time_dtype(x.dtype)), (scale * x).astype(x.dtype), cond)
        return (skip * x + out * inner).astype(x.dtype), hidden


def edm_coefficients(
    process: AbstractProcess, t: ScalarLike, sigma_data: ScalarLike = 0.5
) -> tuple[Scalar, Scalar, Scalar, Scalar]:
    r"""Return EDM's preconditioning $(c_{skip}, c_{out}, c_{in}, c_{noise})$ on any Gaussian path.

    $$ V = \alpha^2\sigma_d^2 + \sigma^2, \quad c_{skip} = \alpha\sigma_d^2/V, \quad
       c_{out} = \sigma\sigma_d/\sqrt V, \quad c_{in} = 1/\sqrt V, \quad c_{noise} = -\lambda/4 $$

    On the path `EDM` these are Table 1 of the paper; elsewhere they are the same preconditioning
    applied to $x/\alpha$ at noise level $\sigma/\alpha$.

    Args:
        process: the Gaussian path.
        t: time, ().
        sigma_data: standard deviation of the data.

    References:
        Karras, Aittala, Aila, Laine 2022 (2206.00364), Table 1.
    """
    alpha, sigma = process.alpha(t), process.sigma(t)
    total = alpha**2 * sigma_data**2 + sigma**2
    root = jnp.sqrt(total)
    return (
        alpha * sigma_data**2 / total,
        sigma * sigma_data / root,
        1 / root,
        -process.lam(t) / 4,
    )


def precondition(process: AbstractProcess, net: NetFn, sigma_data: ScalarLike = 0.5) -> NetFn:
    r"""Wrap a raw network in EDM's preconditioning; the result predicts `"x0"`.

    $$ m(t, x) = c_{skip}\,x + c_{out}\,\mathrm{net}(c_{noise}, c_{in}\,x) $$

    with the coefficients of `edm_coefficients`: unit-variance input and target at every noise
    level, for any Gaussian path.

    Args:
        process: the Gaussian path.
        net: network `net(c_noise, c_in * x, cond)`.
        sigma_data: standard deviation of the data.

    Returns:
        A network for `Denoiser(process, net, predicts="x0")`.
    """
    return _Precondition(process, net, sigma_data)


class _Batched(eqx.Module):
    net: Callable[..., Any]
    dtype: Any = eqx.field(static=True)

    def __call__(self, t: Any, x: Array, cond: Cond = None) -> Array:
        return self._single(self.net, t, x, cond)

    def features(self, t: Any, x: Array, cond: Cond = None) -> tuple[Array, Any]:
        return self._single(_both(self.net), t, x, cond)

    def _single(self, net: Callable[..., Any], t: Any, x: Array, cond: Cond) -> Any:
        inner = x if self.dtype is None else x.astype(self.dtype)
        batched = [jax.tree.map(lambda a: jnp.asarray(a)[None], a) for a in (t, inner, cond)]
        return jax.tree.map(lambda a: a[0].astype(x.dtype), net(*batched))


def _takes_features(call: Callable[..., Any]) -> None:
    if "features" not in inspect.signature(call).parameters:
        expected = "a module that takes features=True and then returns (prediction, features)"
        raise _check.bad("features", "module", expected, call.__qualname__)


class _Linen(eqx.Module):
    module: Any = eqx.field(static=True)
    variables: PyTree
    kwargs: tuple[tuple[str, Any], ...] = eqx.field(static=True)

    def __call__(self, t: Any, x: Array, cond: Cond, **more: Any) -> Any:
        args = (t, x) if cond is None else (t, x, cond)
        return self.module.apply(self.variables, *args, **dict(self.kwargs), **more)

    def features(self, t: Any, x: Array, cond: Cond) -> tuple[Array, Any]:
        _takes_features(type(self.module).__call__)
        return self(t, x, cond, features=True)


class _Nnx(eqx.Module):
    graph: Any = eqx.field(static=True)
    state: PyTree

    def __call__(self, t: Any, x: Array, cond: Cond, **more: Any) -> Any:
        return self._model()(*((t, x) if cond is None else (t, x, cond)), **more)

    def features(self, t: Any, x: Array, cond: Cond) -> tuple[Array, Any]:
        _takes_features(self._model().__call__)
        return self(t, x, cond, features=True)

    def _model(self) -> Any:
        from flax import nnx

        return nnx.merge(self.graph, self.state)


def from_batched(net: Callable[..., Any], *, dtype: Any = None) -> NetFn:
    """Adapt a network with a leading batch axis to one sample at a time.

    Under `jax.vmap` the added axis merges back into one batched call.

    Args:
        net: callable `net(t, x, cond)` with `t: (batch,)`, `x: (batch, *dims)` and every leaf of
            `cond` with a leading batch axis (`cond=None` is passed on). No statistic of the batch
            may enter the result.
        dtype: dtype of `x` inside the network, bfloat16 for instance; that of `x` by default.
            The output is cast back.

    Returns:
        A per-sample network for `Denoiser`.

    Example:
        >>> net = from_batched(lambda t, x, cond: t[:, None] * x)
        >>> net(2.0, jnp.ones(3)).tolist()
        [2.0, 2.0, 2.0]
    """
    return _Batched(net, dtype)


def from_linen(module: Any, variables: PyTree, *, dtype: Any = None, **kwargs: Any) -> NetFn:
    """Adapt a `flax.linen` module called as `module(t, x)` or `module(t, x, cond)`.

    Args:
        module: the linen module; static, so it is compared by value.
        variables: what `module.apply` takes first, `{"params": ...}`; dynamic leaves.
        dtype: dtype of `x` inside the network, see `from_batched`.
        **kwargs: hashable keyword arguments of every `module.apply`, such as `train=False`.

    Returns:
        A per-sample network for `Denoiser`.

    Raises:
        ValueError: if `variables` has no `"params"`, or a keyword would make the network random,
            change its variables or its kind of output (`rngs`, `mutable`, `features`).
    """
    from flax import linen

    if not isinstance(module, linen.Module):
        raise _check.bad("from_linen", "module", "a flax.linen module", type(module).__name__)
    if not isinstance(variables, Mapping) or "params" not in variables:
        got = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise _check.bad("from_linen", "variables", 'a mapping with "params"', got)
    for name, value in kwargs.items():
        if name in ("rngs", "mutable", "features") or any(
            map(eqx.is_array, jax.tree.leaves(value))
        ):
            expected = "a plain option such as train=False: the network must be deterministic"
            raise _check.bad("from_linen", name, expected, type(value).__name__)
    return _Batched(_Linen(module, variables, tuple(sorted(kwargs.items()))), dtype)


def from_nnx(model: Any, *, dtype: Any = None) -> NetFn:
    """Adapt a `flax.nnx` model called as `model(t, x)` or `model(t, x, cond)`.

    The model is split once: its parameters become leaves and later changes of `model` are not
    seen.

    Args:
        model: the nnx model, in evaluation mode.
        dtype: dtype of `x` inside the network, see `from_batched`.

    Returns:
        A per-sample network for `Denoiser`.
    """
    from flax import nnx

    return _Batched(_Nnx(*nnx.split(model)), dtype)
