r"""Time grids: strictly decreasing times from noise to data, built in float64.

Notation: `n` steps use `n + 1` nodes $t_0 > t_1 > \dots > t_n$, $u_i = i/n$,
$\lambda = \log(\alpha/\sigma)$, $\bar\sigma = \sigma/\alpha = e^{-\lambda}$. A grid is natural in
some variable ($t$, $\lambda$, $\bar\sigma$, an angle) and is mapped to $t$ by the inverse of the
process. It is a plain array: any strictly decreasing array of the user's own does as well.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff import _check
from jaxdiff._types import ScalarLike, host64, is_concrete


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


def _uniform(path: Path, u: Array, start: Array, end: Array) -> Array:
    """$t = t_0 + u (t_n - t_0)$."""
    return start + u * (end - start)


def _quadratic(path: Path, u: Array, start: Array, end: Array) -> Array:
    r"""$\sqrt t$ uniform (Song, Meng, Ermon 2021, 2010.02502)."""
    return _uniform(path, u, jnp.sqrt(start), jnp.sqrt(end)) ** 2


def _logsnr(path: Path, u: Array, start: Array, end: Array) -> Array:
    r"""$\lambda$ uniform (Lu et al. 2022, 2206.00927)."""
    return jax.vmap(path.t_of_lam)(_uniform(path, u, path.lam(start), path.lam(end)))


def _edm(path: Path, u: Array, start: Array, end: Array, rho: float = 7.0) -> Array:
    r"""$\bar\sigma^{1/\rho}$ uniform, $\rho = 7$ (Karras et al. 2022, 2206.00364, eq. 5)."""
    root = _uniform(path, u, jnp.exp(-path.lam(start) / rho), jnp.exp(-path.lam(end) / rho))
    return jax.vmap(path.t_of_lam)(-rho * jnp.log(root))


def _cosine(path: Path, u: Array, start: Array, end: Array) -> Array:
    r"""$\arctan\bar\sigma$ uniform: equal angles between signal and noise.

    Uniform $t$ on a trigonometric path; for DDIM on Gaussian data of unit standard deviation no
    grid has a smaller error (Sabour, Fidler, Kreis 2024, 2404.14507, Thm 3.1).
    """
    theta = _uniform(
        path, u, jnp.arctan(jnp.exp(-path.lam(start))), jnp.arctan(jnp.exp(-path.lam(end)))
    )
    return jax.vmap(path.t_of_lam)(-jnp.log(jnp.tan(theta)))


KINDS: dict[str, Callable[..., Array]] = {
    "uniform": _uniform,
    "quadratic": _quadratic,
    "logsnr": _logsnr,
    "edm": _edm,
    "cosine": _cosine,
}


def _nodes(kind: str, path: Path, u: Array, start: Array, end: Array) -> Array:
    inner = KINDS[kind](path, u[1:-1], start, end)
    return jnp.concatenate([start[None], inner, end[None]])  # the ends are exact, not recomputed


def make(
    path: Path,
    n: int,
    kind: str = "uniform",
    *,
    t_start: ScalarLike | None = None,
    t_end: ScalarLike | None = None,
) -> Float[np.ndarray | Array, " nodes"]:
    r"""Build the grid of `n` steps from `t_start` down to `t_end`.

    | kind | uniform in | use |
    |---|---|---|
    | `"uniform"` | $t$ | flow models, latent VP models |
    | `"quadratic"` | $\sqrt t$ | DDIM, DEIS on pixels |
    | `"logsnr"` | $\lambda$ | DPM-Solver and its relatives |
    | `"edm"` | $\bar\sigma^{1/7}$ | Heun, EDM models |
    | `"cosine"` | $\arctan\bar\sigma$ | DDIM and Euler on standardised data |

    Args:
        path: a process, or anything with `t_min`, `t_max`, `lam` and `t_of_lam`.
        n: number of steps, at least 1.
        kind: the variable in which the nodes are equally spaced, see the table.
        t_start: first (noisiest) node; `path.t_max` by default.
        t_end: last node; `path.t_min` by default.

    Returns:
        Times, shape (n + 1,), float64 NumPy, strictly decreasing, with `t_start` and `t_end`
        themselves at the ends. (A traced array in the ambient precision if the process is traced.)

    Raises:
        ValueError: if `n` or `kind` is wrong, if the ends are not inside the process, or if an end
            has infinite log-SNR and `kind` needs it finite.
    """
    _check.whole("grid", "n", n, 1)
    _check.choice("grid", "kind", kind, KINDS)
    start = path.t_max if t_start is None else t_start
    end = path.t_min if t_end is None else t_end
    u = np.arange(n + 1) / n
    if not is_concrete(path, start, end):
        return _nodes(kind, path, jnp.asarray(u), jnp.asarray(start), jnp.asarray(end))
    check(path, [start, end], where="grid", argument="t_start > t_end")
    if kind == "quadratic" and end < 0:
        raise _check.bad("grid", "t_end", "not negative for kind='quadratic'", repr(end))
    for name, t, kinds in (("t_start", start, ("logsnr", "edm")), ("t_end", end, ("logsnr",))):
        if kind in kinds and not np.isfinite(host64(path.lam, np.float64(t))):
            raise _check.bad("grid", name, f"a time of finite log-SNR for kind={kind!r}", repr(t))
    return host64(_nodes, kind, path, u, np.float64(start), np.float64(end))


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
