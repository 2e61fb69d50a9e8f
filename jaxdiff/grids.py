r"""Time grids: strictly decreasing times from noise to data, built in float64.

Notation: `n` steps use `n + 1` nodes $t_0 > t_1 > \dots > t_n$, $u_i = i/n$,
$\lambda = \log(\alpha/\sigma)$, $\bar\sigma = \sigma/\alpha = e^{-\lambda}$. A grid is natural in
some variable ($t$, $\lambda$, $\bar\sigma$, an angle) and is mapped to $t$ by the inverse of the
process. It is a plain array: any strictly decreasing array of the user's own does as well.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real
from scipy import special

from jaxdiff import _check
from jaxdiff._array import ScalarLike
from jaxdiff._host import host64, is_concrete

__all__ = [
    "KINDS",
    "LAWS",
    "PUBLISHED",
    "WARPS",
    "Path",
    "check",
    "discrete",
    "interpolate",
    "make",
    "refine",
    "shift",
]


@runtime_checkable
class Path(Protocol):
    """What a grid needs to know of a process."""

    t_min: Any
    t_max: Any

    def lam(self, t: Any) -> Any:
        """Half log-SNR at time `t`."""
        ...

    def t_of_lam(self, lam: Any) -> Any:
        """Time at half log-SNR `lam`."""
        ...


# Published noise levels sigma/alpha, each of 10 steps but for the last: Align Your Steps (Sabour,
# Fidler, Kreis 2024, 2404.14507) and GITS (Chen et al. 2024, 2405.11326).
PUBLISHED: dict[str, tuple[float, ...]] = {
    "ays-sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays-sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "ays-deepfloyd": (
        *(160.41, 8.081, 3.315, 1.885, 1.207, 0.785, 0.553, 0.293, 0.186, 0.030, 0.006),
    ),
    "ays-svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
    "gits-sd15": (14.615, 4.617, 2.507, 1.236, 0.702, 0.402, 0.240, 0.156, 0.104, 0.094, 0.029),
    "gits-sdxl": (14.615, 4.734, 2.567, 1.529, 0.987, 0.652, 0.418, 0.268, 0.179, 0.127, 0.029),
    "gits-cifar10": (80.0, 10.9836, 3.8811, 1.5840, 0.5666, 0.1698, 0.0020),
}


# --- Laws: the inner nodes from u, (n - 1,), and the two ends. ------------------------------------


def _uniform(path: Path, u: Array, start: Array, end: Array) -> Array:
    """$t = t_0 + u (t_n - t_0)$."""
    return start + u * (end - start)


def _quadratic(path: Path, u: Array, start: Array, end: Array, *, power: ScalarLike = 2) -> Array:
    r"""$t^{1/k}$ uniform, $k = 2$ (Song, Meng, Ermon 2021, 2010.02502)."""
    return _uniform(path, u, start ** (1 / power), end ** (1 / power)) ** power


def _logsnr(path: Path, u: Array, start: Array, end: Array, *, power: ScalarLike = 1) -> Array:
    r"""$\lambda$ linear in $(1 - u)^r$; $r = 1$ is uniform (Lu et al. 2022, 2206.00927)."""
    lam = _uniform(path, (1 - u) ** power, path.lam(end), path.lam(start))
    return jax.vmap(path.t_of_lam)(lam)


def _edm(path: Path, u: Array, start: Array, end: Array, *, rho: ScalarLike = 7) -> Array:
    r"""$\bar\sigma^{1/\rho}$ uniform, $\rho = 7$ (Karras et al. 2022, 2206.00364, eq. 5)."""
    root = _uniform(path, u, jnp.exp(-path.lam(start) / rho), jnp.exp(-path.lam(end) / rho))
    return jax.vmap(path.t_of_lam)(-rho * jnp.log(root))


def _cosine(path: Path, u: Array, start: Array, end: Array, *, c: ScalarLike = 1) -> Array:
    r"""$\arctan(\bar\sigma/c)$ uniform, that is $\bar\sigma = c\tan\theta$.

    At `c = 1` equal angles between signal and noise, which is uniform $t$ on a trigonometric path.
    For DDIM on Gaussian data of standard deviation `c` no grid has a smaller error (Sabour, Fidler,
    Kreis 2024, 2404.14507, Thm 3.1).
    """
    angles = [jnp.arctan(jnp.exp(-path.lam(t)) / c) for t in (start, end)]
    theta = _uniform(path, u, *angles)
    return jax.vmap(path.t_of_lam)(-jnp.log(c * jnp.tan(theta)))


def _at(path: Path, sbar: Array, start: Array, end: Array) -> Array:
    r"""Times of the noise levels $\bar\sigma$ themselves."""
    return jax.vmap(path.t_of_lam)(-jnp.log(sbar))


# --- Changes of u, by NumPy, before anything is traced. -------------------------------------------


def _beta(u: np.ndarray, *, a: ScalarLike = 0.6, b: ScalarLike = 0.6) -> np.ndarray:
    """$t$ at the quantiles $1 - u$ of Beta(a, b) (Lee et al. 2024, 2407.12173)."""
    return special.betaincinv(b, a, u)  # = 1 - Q(1 - u; a, b)


def _logitnormal(u: np.ndarray, *, mu: ScalarLike = 0, s: ScalarLike = 1) -> np.ndarray:
    """$t$ at the quantiles $1 - u$ of sigmoid(N(mu, s^2)) (Esser et al. 2024, 2403.03206)."""
    return special.expit(s * special.ndtri(u) - mu)  # = 1 - expit(mu + s ndtri(1 - u))


def _levels(u: np.ndarray, *, levels: Any) -> np.ndarray:
    r"""$\log\bar\sigma$ piecewise linear through given noise levels."""
    return np.exp(np.interp(u, np.linspace(0, 1, len(levels)), np.log(levels)))


LAWS: dict[str, Callable[..., Array]] = {
    "uniform": _uniform,
    "quadratic": _quadratic,
    "logsnr": _logsnr,
    "edm": _edm,
    "cosine": _cosine,
}
WARPS: dict[str, tuple[Callable[..., np.ndarray], Callable[..., Array]]] = {
    "beta": (_beta, _uniform),
    "logitnormal": (_logitnormal, _uniform),
    "levels": (_levels, _at),
}
KINDS = (*LAWS, *WARPS, *PUBLISHED)


def _nodes(
    law: Callable[..., Array], path: Path, u: Array, start: Array, end: Array, options: Any
) -> Array:
    inner = law(path, u[1:-1], start, end, **options)
    return jnp.concatenate([start[None], inner, end[None]])  # the ends are exact, not recomputed


def _check_options(kind: str, rule: Callable[..., Any], options: dict[str, Any]) -> None:
    """Raise ValueError unless the options are those of the rule, with values that it can take."""
    known = [
        name for name, p in inspect.signature(rule).parameters.items() if p.kind == p.KEYWORD_ONLY
    ]
    for name, value in options.items():
        if name not in known:
            expected = f"one of {', '.join(known)}" if known else "absent"
            raise _check.bad("grid", f"an option of kind={kind!r}", expected, f"{name}={value!r}")
        if name == "levels" or not is_concrete(value):
            continue
        where = f"grid of kind={kind!r}"
        _check.number(where, name, value, -sys.float_info.max, sys.float_info.max)
        if name != "mu" and not value > 0:
            raise _check.bad(where, name, "positive", repr(value))
    if "levels" in known and not options:
        raise _check.bad("grid", "levels", f"given for kind={kind!r}", "nothing")


def _check_levels(where: str, levels: Any) -> np.ndarray:
    """Return noise levels in float64, or raise ValueError unless they are positive and decrease."""
    try:
        sbar = np.asarray(levels, np.float64)
    except (TypeError, ValueError):
        raise _check.bad(where, "levels", "an array of noise levels", repr(levels)) from None
    if sbar.ndim != 1 or len(sbar) < 2:
        raise _check.bad(where, "levels", "of shape (k,) with k >= 2", sbar.shape)
    if not (np.all(np.isfinite(sbar)) and np.all(np.diff(sbar) < 0) and sbar[-1] > 0):
        raise _check.bad(where, "levels", "finite, positive and strictly decreasing", levels)
    return sbar


def _end(path: Path, sbar: float, argument: str) -> Any:
    """Return the time of an end of a table; an end of the process if it is that end, rounded."""
    if not is_concrete(path):
        raise _check.bad("grid", argument, "given for kind='levels' on a traced process", "None")
    low, high = (float(np.exp(-host64(path.lam, np.float64(t)))) for t in (path.t_min, path.t_max))
    if not 0.98 * low <= sbar <= 1.02 * high:
        expected = f"inside the process, sigma/alpha in [{low:.6g}, {high:.6g}]"
        raise _check.bad("grid", "levels", expected, sbar)
    if sbar >= high or sbar <= low:
        return path.t_max if sbar >= high else path.t_min
    return host64(path.t_of_lam, -np.log(np.float64(sbar)))


def make(
    path: Path,
    n: int,
    kind: str = "uniform",
    *,
    t_start: ScalarLike | None = None,
    t_end: ScalarLike | None = None,
    **options: Any,
) -> Float[np.ndarray | Array, " nodes"]:
    r"""Build the grid of `n` steps from `t_start` down to `t_end`.

    | kind | options | uniform in | use |
    |---|---|---|---|
    | `"uniform"` | | $t$ | flow models, latent VP models |
    | `"quadratic"` | `power=2` | $t^{1/power}$ | DDIM, DEIS on pixels |
    | `"logsnr"` | `power=1` | $(\lambda_n - \lambda)^{1/power}$ | DPM-Solver and its relatives |
    | `"edm"` | `rho=7` | $\bar\sigma^{1/\rho}$ | Heun, EDM models |
    | `"cosine"` | `c=1` | $\arctan(\bar\sigma/c)$ | DDIM, Euler; c: deviation of the data |
    | `"beta"` | `a=0.6, b=0.6` | the measure Beta(a, b) of $t$ | VP models, latent models |
    | `"logitnormal"` | `mu=0, s=1` | the logistic-normal measure of $t$ | flow models |
    | `"levels"` | `levels` | the index in a table of $\bar\sigma$ | a table of one's own |
    | `"ays-sd15"`, ... | | the index in a table of `PUBLISHED` | the model that it was fitted to |

    "cosine" with c other than 1 is also known as the tangent grid, "logsnr" with a power as
    poly-exponential. Between the levels of a table $\log\bar\sigma$ is linear.

    Args:
        path: a process, or anything with `t_min`, `t_max`, `lam` and `t_of_lam`.
        n: number of steps, at least 1.
        kind: the variable in which the nodes are equally spaced, see the table.
        t_start: first (noisiest) node; `path.t_max` by default, for tables that of their first
            level.
        t_end: last node; `path.t_min` by default, for tables that of their last level.
        **options: numbers that the kind takes, see the table; all are positive but `mu`. `levels`
            are noise levels $\sigma/\alpha$, (k,), positive and strictly decreasing, whose ends may
            miss those of the process by their rounding (2 percent).

    Returns:
        Times, shape (n + 1,), float64 NumPy, strictly decreasing, with `t_start` and `t_end`
        themselves at the ends. (A traced array in the ambient precision if the process is traced.)

    Raises:
        ValueError: if `n` or `kind` is wrong, if an option is not one of the kind or has no value
            that it can take, if the ends are not inside the process, if an end has infinite log-SNR
            and `kind` needs it finite, or if nodes coincide.

    Example:
        >>> from jaxdiff.process import EDM
        >>> EDM().grid(3, "edm", rho=1, t_end=20.0)
        array([80., 60., 40., 20.])
        >>> EDM().grid(6, "gits-cifar10").round(2)
        array([80.  , 10.98,  3.88,  1.58,  0.57,  0.17,  0.  ])
    """
    _check.whole("grid", "n", n, 1)
    _check.choice("grid", "kind", kind, KINDS)
    rule = WARPS[kind][0] if kind in WARPS else LAWS.get(kind, _uniform)  # tables take no option
    _check_options(kind, rule, options)
    u = np.arange(n + 1) / n
    if kind in LAWS:
        law = LAWS[kind]
    else:
        warp, law = WARPS.get(kind, WARPS["levels"])
        if law is _at:
            levels = _check_levels("grid", PUBLISHED.get(kind, options.get("levels")))
            t_start = _end(path, levels[0], "t_start") if t_start is None else t_start
            t_end = _end(path, levels[-1], "t_end") if t_end is None else t_end
            options = {"levels": levels}
        if not is_concrete(options):
            raise _check.bad("grid", f"an option of kind={kind!r}", "concrete", "a traced one")
        u, options = warp(u, **options), {}
    start = path.t_max if t_start is None else t_start
    end = path.t_min if t_end is None else t_end
    if not is_concrete(path, start, end, options):
        return _nodes(law, path, jnp.asarray(u), jnp.asarray(start), jnp.asarray(end), options)
    check(path, [start, end], where="grid", argument="t_start > t_end")
    if kind == "quadratic" and end < 0:
        raise _check.bad("grid", "t_end", "not negative for kind='quadratic'", repr(end))
    for argument, t, kinds in (("t_start", start, ("logsnr", "edm")), ("t_end", end, ("logsnr",))):
        if kind in kinds and not np.isfinite(host64(path.lam, np.float64(t))):
            raise _check.bad(
                "grid", argument, f"a time of finite log-SNR for kind={kind!r}", repr(t)
            )
    ts = host64(_nodes, law, path, u, np.float64(start), np.float64(end), options)
    return check(path, ts, where="grid", argument=f"a grid of kind={kind!r}")


def interpolate(levels: Real[Any, " k"] | Sequence[Any], n: int) -> Float[np.ndarray, " nodes"]:
    r"""Return `n + 1` noise levels through a table: $\log\bar\sigma$ linear in between.

    What `make(..., kind="levels")` maps to times; a table of `n + 1` levels is returned as it is.

    Args:
        levels: noise levels $\sigma/\alpha$, (k,), positive and strictly decreasing.
        n: number of steps, at least 1.

    Raises:
        ValueError: if `n` or `levels` is wrong.
    """
    _check.whole("interpolate", "n", n, 1)
    sbar = _check_levels("interpolate", levels)
    if len(sbar) == n + 1:
        return sbar
    return np.concatenate([sbar[:1], _levels(np.arange(1, n) / n, levels=sbar), sbar[-1:]])


def discrete(
    path: Path, n: int, spacing: Literal["leading", "trailing", "linspace"] = "trailing"
) -> Float[np.ndarray, " n"]:
    """Choose `n` of the N integer times of a `process.Discrete`.

    | spacing | N = 1000, n = 10 | |
    |---|---|---|
    | `"leading"` | 900, 800, ..., 0 | never sees the noisiest time: its prior is wrong |
    | `"trailing"` | 999, 899, ..., 99 | needed where alpha vanishes at the last index |
    | `"linspace"` | 999, 888, ..., 0 | both ends |

    `n` evaluations: `n - 1` steps between the nodes, and with `denoise=True` of `sample` one last
    step to clean data (alpha = 1). Without it sampling stops at the last index. Solvers step to the
    next node whatever the spacing; some codes step back by N/n from each node, which for
    `"linspace"` is not the next one.

    Args:
        path: a `process.Discrete` of N steps.
        n: how many, from 2 to N.
        spacing: which, see the table.

    Raises:
        ValueError: if `path` is not discrete, or `n` or `spacing` is wrong.

    References:
        Lin et al. 2023 (2305.08891), section 3.3.
    """
    table = getattr(path, "log_alphas", None)
    if table is None:
        raise _check.bad("discrete", "path", "a process.Discrete", type(path).__name__)
    _check.choice("discrete", "spacing", spacing, ("leading", "trailing", "linspace"))
    _check.whole("discrete", "n", n, 2)
    size = table.shape[0]
    if n > size:
        raise _check.bad("discrete", "n", f"at most {size}, the steps of the process", n)
    if spacing == "leading":
        return np.arange(n)[::-1] * float(size // n)
    if spacing == "trailing":
        return np.round(size - np.arange(n) * (size / n)) - 1
    return np.round(np.linspace(size - 1, 0, n))


def _shifted(path: Path, ts: Array, k: ScalarLike) -> Array:
    return jax.vmap(path.t_of_lam)(jax.vmap(path.lam)(ts) - jnp.log(k))


def shift(
    path: Path, ts: Real[Any, " nodes"] | Sequence[Any], k: ScalarLike
) -> Float[np.ndarray | Array, " nodes"]:
    r"""Multiply the noise level of every node by `k`: $\bar\sigma \to k\bar\sigma$.

    On a rectified flow $t' = kt/(1 + (k - 1)t)$, with both ends where they were; `k` is 3 for
    images of 1024 pixels, where more noise is needed to hide as much. A process that ends at a
    finite noise level has no room for shifted ends: build the grid from the time at which
    $\bar\sigma$ is `k` times smaller.

    Args:
        path: a process.
        ts: a grid, (nodes,).
        k: positive.

    Raises:
        ValueError: if `k` is not positive, or a node leaves the process.

    Example:
        >>> from jaxdiff.process import Rectified
        >>> shift(Rectified(), Rectified().grid(2), 3.0)
        array([1.  , 0.75, 0.  ])

    References:
        Esser et al. 2024 (2403.03206), eq. 23.
    """
    ts = check(path, ts, where="shift")
    _check.number("shift", "k", k, sys.float_info.min, sys.float_info.max)
    shifted = host64(_shifted, path, ts, k)
    return check(path, shifted, where="shift", argument="ts, once shifted,")


def _halved(path: Path, ts: Array) -> Array:
    lam = jax.vmap(path.lam)(ts)
    theta = jnp.arctan(jnp.exp(-lam))
    mean, angle = (lam[1:] + lam[:-1]) / 2, (theta[1:] + theta[:-1]) / 2
    middle = jnp.where(jnp.isfinite(mean), mean, -jnp.log(jnp.tan(angle)))
    pairs = jnp.stack([ts[:-1], jax.vmap(path.t_of_lam)(middle)], axis=1)
    return jnp.append(pairs.reshape(-1), ts[-1])


def refine(
    path: Path, ts: Real[Any, " nodes"] | Sequence[Any]
) -> Float[np.ndarray | Array, " more"]:
    r"""Halve every step at the geometric mean of its noise levels; the old nodes stay.

    Where one of the two has infinite log-SNR, at half the angle $\arctan\bar\sigma$ between them.

    Args:
        path: a process.
        ts: a grid of n steps, (nodes,).

    Returns:
        A grid of 2n steps.

    Example:
        >>> from jaxdiff.process import EDM
        >>> refine(EDM(), [8.0, 2.0, 0.5])
        array([8. , 4. , 2. , 1. , 0.5])
    """
    ts = check(path, ts, where="refine")
    return check(path, host64(_halved, path, ts), where="refine", argument="ts, once refined,")


def check(
    path: Path,
    ts: Any,
    *,
    where: str = "ts",
    argument: str = "ts",
    dtype: Any = None,
) -> Float[np.ndarray | Array, " nodes"]:
    """Return `ts` as an array after checking that it is a grid of this process.

    Args:
        path: the process whose range `[t_min, t_max]` the nodes must lie in.
        ts: times, shape (nodes,), nodes >= 2, strictly decreasing.
        where: name of the calling function, for the message.
        argument: name of the argument, for the message.
        dtype: dtype in which the grid will be used; nodes must stay distinct in it.

    Returns:
        The nodes, float64 NumPy where concrete. Traced nodes are checked for shape only.

    Raises:
        ValueError: if `ts` is not one-dimensional with two nodes or more, is not finite, is not
            strictly decreasing (also once rounded to `dtype`), or leaves the process.
    """
    if not isinstance(ts, (np.ndarray, jax.Array)):
        try:
            ts = np.asarray(ts, np.float64)
        except (TypeError, ValueError):
            raise _check.bad(where, argument, "an array of times", repr(ts)) from None
    if not jnp.issubdtype(ts.dtype, jnp.number) or jnp.issubdtype(ts.dtype, jnp.complexfloating):
        raise _check.bad(where, argument, "an array of times", repr(ts))
    if ts.ndim != 1 or ts.shape[0] < 2:
        raise _check.bad(where, argument, "of shape (nodes,) with 2 or more nodes", ts.shape)
    if not is_concrete(ts):
        return ts
    given, ts = ts, np.asarray(ts, np.float64)
    if not np.all(np.isfinite(ts)):
        raise _check.bad(where, argument, "finite", ts)
    if not np.all(np.diff(ts) < 0):
        i = int(np.argmax(np.diff(ts) >= 0))
        got = f"{ts[i]:.9g} followed by {ts[i + 1]:.9g} at node {i}"
        raise _check.bad(where, argument, "strictly decreasing (noise to data)", got)
    if dtype is not None and not np.all(np.diff(ts.astype(dtype)) < 0):
        got = f"{len(ts)} nodes, some equal after rounding"
        raise _check.bad(where, argument, f"distinct in {jnp.dtype(dtype).name}", got)
    if is_concrete(path):
        low, high = float(path.t_min), float(path.t_max)
        # an end that went through float32, in the nodes or in the process, is still that end
        rounded = given.dtype != np.float64 or not isinstance(path.t_max, float)
        slack = (4 * np.finfo(np.float32).eps if rounded else 1e-12) * max(abs(low), abs(high))
        if ts[0] > high + slack or ts[-1] < low - slack:
            got = f"[{ts[-1]:.9g}, {ts[0]:.9g}]"
            raise _check.bad(where, argument, f"inside the process, [{low:.9g}, {high:.9g}]", got)
    return ts
