r"""Small reference networks in flax linen: an MLP for vectors, a U-Net for images, a trace head.

They are called on batches, `net(t, x, cond)` with `t: (n,)`, `x: (n, *dims)`, `cond: (n,)`, and
become a per-sample network by `jaxdiff.score.from_linen(net, {"params": params})`. No statistic of
the batch enters. Time enters every block as a scale and a shift of its features (FiLM, Perez et
al. 2018, 1709.07871); the last layer starts at zero.

The number of outputs is that of `x`, whatever the denoiser `predicts`; called with
`features=True`, `MLP` and `UNet` return their last hidden representation as well, which
`Denoiser.features` hands to a small head such as `TraceNet`, with one output per sample. For class
conditioning, the table of classes has one row more than there are classes: the label `num_classes`
means "no class", as classifier-free guidance needs (Ho, Salimans 2022, 2207.12598).
`jax.jit(net.init)` starts faster than `net.init`, which compiles operation by operation.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdiff import _check

__all__ = ["MLP", "TraceNet", "UNet", "time_features"]

_ZEROS = nn.initializers.zeros_init()


def time_features(t: Float[Array, " n"], count: int = 16) -> Float[Array, "n two_count"]:
    r"""Return $\sin\omega_k t, \cos\omega_k t$ with $\omega_k$ geometric from 1 to 64.

    The slowest pair is one to one on $|t| < \pi$, which holds `c_noise` $= -\lambda/4$ of usual
    paths and $t \in [0, 1]$; the fastest resolves steps of about $10^{-2}$.
    """
    omega = 64.0 ** jnp.linspace(0.0, 1.0, count, dtype=t.dtype)
    phase = jnp.outer(t, omega)
    return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)], axis=-1)


def _film(h: Array, embedding: Array, dtype: Any) -> Array:
    """Scale and shift the features of `h` by linear functions of the embedding."""
    width = h.shape[-1]
    both = nn.Dense(2 * width, kernel_init=_ZEROS, dtype=dtype)(embedding)
    both = both.reshape(len(h), *(1,) * (h.ndim - 2), 2 * width)
    return h * (1 + both[..., :width]) + both[..., width:]


class _Embedding(nn.Module):
    """Embed time, and the class if there are classes, in `width` features."""

    width: int
    num_classes: int | None
    time_scale: float
    dtype: Any

    @nn.compact
    def __call__(self, t: Array, x: Array, cond: Any) -> Array:
        if t.shape != x.shape[:1]:
            raise _check.bad("net", "t", f"of shape (n,) = {x.shape[:1]}", t.shape)
        h = time_features(self.time_scale * t).astype(self.dtype or x.dtype)
        h = nn.silu(nn.Dense(self.width, dtype=self.dtype)(h))
        h = nn.Dense(self.width, dtype=self.dtype)(h)
        if self.num_classes is None:
            if cond is not None:
                raise _check.bad("net", "cond", "None as num_classes is None", type(cond).__name__)
            return nn.silu(h)
        expected = f"integer labels 0..{self.num_classes} (the last: no class) of shape {t.shape}"
        if cond is None:
            raise _check.bad("net", "cond", expected, "None")
        if cond.shape != t.shape or not jnp.issubdtype(cond.dtype, jnp.integer):
            raise _check.bad("net", "cond", expected, f"{cond.dtype}{list(cond.shape)}")
        return nn.silu(h + nn.Embed(self.num_classes + 1, self.width, dtype=self.dtype)(cond))


def _layers(h: Array, embedding: Array, widths: Sequence[int], dtype: Any) -> Array:
    """Apply layers conditioned on the embedding, residual where their widths are equal."""
    for width in widths:
        inner = _film(nn.Dense(width, dtype=dtype)(h), embedding, dtype)
        inner = nn.Dense(width, dtype=dtype)(nn.silu(inner))
        h = nn.silu(h + inner if h.shape == inner.shape else inner)
    return h


class MLP(nn.Module):
    """A multilayer perceptron on flattened samples, each layer conditioned on time and class.

    Layers of equal width are residual. Cost: one product of matrices per layer, twice.

    Attributes:
        features: widths of the layers.
        num_classes: number of classes, or None for no condition.
        time_scale: factor on `t` before its sinusoidal features; those suit `|t|` of order 1.
        dtype: dtype of the computation, bfloat16 for instance; parameters are float32.

    Raises:
        ValueError: when called, if `t` or `cond` does not fit `x` and `num_classes`.

    Example:
        >>> import jax
        >>> net = MLP((32, 32))
        >>> params = jax.jit(net.init)(jax.random.key(0), jnp.zeros(5), jnp.zeros((5, 2)))["params"]
        >>> net.apply({"params": params}, jnp.zeros(5), jnp.ones((5, 2))).shape
        (5, 2)
    """

    features: Sequence[int] = (128, 128, 128)
    num_classes: int | None = None
    time_scale: float = 1.0
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        t: Float[Array, " n"],
        x: Float[Array, "n *dims"],
        cond: Int[Array, " n"] | None = None,
        features: bool = False,
    ) -> Any:
        """Predict for a batch, in the dtype of `x`; with `features`, give the last layer too."""
        embedding = _Embedding(self.features[0], self.num_classes, self.time_scale, self.dtype)
        h = _layers(x.reshape(len(x), -1), embedding(t, x, cond), self.features, self.dtype)
        size = math.prod(x.shape[1:])
        out = nn.Dense(size, kernel_init=_ZEROS, dtype=self.dtype)(h)
        out = out.reshape(x.shape).astype(x.dtype)
        return (out, h) if features else out


class _Block(nn.Module):
    """GroupNorm, SiLU, convolution, twice, with time in the second; residual, from zero."""

    width: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, h: Array, embedding: Array) -> Array:
        inner = nn.silu(nn.GroupNorm(self.groups, dtype=self.dtype)(h))
        inner = nn.Conv(self.width, (3, 3), dtype=self.dtype)(inner)
        inner = _film(nn.GroupNorm(self.groups, dtype=self.dtype)(inner), embedding, self.dtype)
        inner = nn.Conv(self.width, (3, 3), kernel_init=_ZEROS, dtype=self.dtype)(nn.silu(inner))
        return h + inner


class _Attention(nn.Module):
    """Residual self-attention over the pixels, from zero."""

    heads: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, h: Array) -> Array:
        pixels = nn.GroupNorm(self.groups, dtype=self.dtype)(h).reshape(len(h), -1, h.shape[-1])
        attend = nn.MultiHeadDotProductAttention(
            self.heads, dtype=self.dtype, out_kernel_init=_ZEROS
        )
        return h + attend(pixels).reshape(h.shape)


def _fold(h: Array) -> Array:
    """Move 2x2 pixels into features: (n, H, W, c) -> (n, H/2, W/2, 4c)."""
    n, height, width, c = h.shape
    h = h.reshape(n, height // 2, 2, width // 2, 2, c).transpose(0, 1, 3, 2, 4, 5)
    return h.reshape(n, height // 2, width // 2, 4 * c)


def _unfold(h: Array) -> Array:
    """Undo `_fold`."""
    n, height, width, c = h.shape
    h = h.reshape(n, height, width, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5)
    return h.reshape(n, 2 * height, 2 * width, c // 4)


class UNet(nn.Module):
    r"""A compact U-Net for images, (n, height, width, colours).

    `len(channels)` levels, each half the size of the one before; the change of level is a linear
    map of 2x2 pixels, and the two sides are joined by addition, which costs a CPU half of what
    concatenation does. Ronneberger, Fischer, Brox 2015 (1505.04597); Ho, Jain, Abbeel 2020
    (2006.11239).

    Attributes:
        channels: features at each level, finest first.
        blocks: residual blocks at each level, on either side.
        num_classes: number of classes, or None for no condition.
        attention: whether the coarsest level has self-attention over its pixels.
        groups: groups of every GroupNorm; divides all `channels`.
        heads: heads of the attention; divides `channels[-1]`.
        time_scale: factor on `t` before its sinusoidal features; those suit `|t|` of order 1.
        dtype: dtype of the computation, bfloat16 for instance; parameters are float32.

    Raises:
        ValueError: when called, if `x` is no batch of images, if height or width is not divisible
            by `2**(levels - 1)`, if `groups` does not divide `channels` or `heads` the coarsest,
            or if `t` or `cond` does not fit `x` and `num_classes`.

    Example:
        >>> import jax
        >>> net, x = UNet((8, 16), num_classes=10), jnp.zeros((5, 8, 8, 1))
        >>> labels = jnp.arange(5)
        >>> params = jax.jit(net.init)(jax.random.key(0), jnp.zeros(5), x, labels)["params"]
        >>> net.apply({"params": params}, jnp.zeros(5), x, labels).shape
        (5, 8, 8, 1)
    """

    channels: Sequence[int] = (32, 64)
    blocks: int = 1
    num_classes: int | None = None
    attention: bool = False
    groups: int = 8
    heads: int = 4
    time_scale: float = 1.0
    dtype: Any = None

    def _check(self, x: Array) -> None:
        factor = 2 ** (len(self.channels) - 1)
        if x.ndim != 4 or x.shape[1] % factor or x.shape[2] % factor:
            expected = f"(n, height, width, colours) with sizes divisible by {factor}"
            raise _check.bad("UNet", "x", expected, x.shape)
        if any(c % self.groups for c in self.channels):
            raise _check.bad(
                "UNet", "channels", f"multiples of groups={self.groups}", self.channels
            )
        if self.attention and self.channels[-1] % self.heads:
            expected = f"a divisor of channels[-1]={self.channels[-1]}"
            raise _check.bad("UNet", "heads", expected, self.heads)

    @nn.compact
    def __call__(
        self,
        t: Float[Array, " n"],
        x: Float[Array, "n *dims"],
        cond: Int[Array, " n"] | None = None,
        features: bool = False,
    ) -> Any:
        """Predict for a batch, in the dtype of `x`; with `features`, give the last layer too."""
        self._check(x)
        embedding = _Embedding(4 * self.channels[0], self.num_classes, self.time_scale, self.dtype)
        embedding = embedding(t, x, cond)

        def run(h: Array) -> Array:
            for _ in range(self.blocks):
                h = _Block(h.shape[-1], self.groups, self.dtype)(h, embedding)
            return h

        h = nn.Conv(self.channels[0], (3, 3), dtype=self.dtype)(x)
        skips = []
        for width in self.channels[1:]:
            skips.append(h := run(h))
            h = nn.Dense(width, dtype=self.dtype)(_fold(h))
        h = run(h)
        if self.attention:
            h = _Attention(self.heads, self.groups, self.dtype)(h)
        for skip in reversed(skips):
            h = run(skip + _unfold(nn.Dense(4 * skip.shape[-1], dtype=self.dtype)(h)))
        h = nn.silu(nn.GroupNorm(self.groups, dtype=self.dtype)(h))
        out = nn.Conv(x.shape[-1], (3, 3), kernel_init=_ZEROS, dtype=self.dtype)(h)
        out = out.astype(x.dtype)
        return (out, h) if features else out


class TraceNet(nn.Module):
    r"""A scalar network for `jaxdiff.fisher.TraceHead`, on features of a denoiser or on vectors.

    Features with pixels, (n, height, width, c), are pooled first, to the means of each and of its
    square; vectors (n, c), features of an `MLP` or samples, enter as they are. The output starts
    at zero. On features of a U-Net its cost is a few percent of the network that they come from.

    Attributes:
        width: width of the layers.
        depth: number of layers, those of `MLP`.
        num_classes: number of classes, or None for no condition.
        time_scale: factor on `t` before its sinusoidal features; those suit `|t|` of order 1.
        dtype: dtype of the computation, bfloat16 for instance; parameters are float32.

    Raises:
        ValueError: when called, if `t` or `cond` does not fit `x` and `num_classes`.

    Example:
        >>> import jax
        >>> net, features = TraceNet(16), jnp.ones((5, 8, 8, 4))
        >>> params = jax.jit(net.init)(jax.random.key(0), jnp.zeros(5), features)["params"]
        >>> net.apply({"params": params}, jnp.zeros(5), features).tolist()
        [0.0, 0.0, 0.0, 0.0, 0.0]
    """

    width: int = 64
    depth: int = 2
    num_classes: int | None = None
    time_scale: float = 1.0
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        t: Float[Array, " n"],
        x: Float[Array, "n *dims"],
        cond: Int[Array, " n"] | None = None,
    ) -> Float[Array, " n"]:
        """Predict one number for each of a batch, in the dtype of `x`."""
        embedding = _Embedding(self.width, self.num_classes, self.time_scale, self.dtype)
        h, pixels = x, tuple(range(1, x.ndim - 1))
        if pixels:
            h = jnp.concatenate([jnp.mean(h, pixels), jnp.mean(h**2, pixels)], axis=-1)
        h = _layers(h, embedding(t, x, cond), self.depth * (self.width,), self.dtype)
        return nn.Dense(1, kernel_init=_ZEROS, dtype=self.dtype)(h)[:, 0].astype(x.dtype)
