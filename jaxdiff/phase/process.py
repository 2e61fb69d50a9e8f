r"""Linear diffusions of position and momentum: CLD, PSLD and any other pair of 2x2 matrices.

Notation: $z = (x, p)$, stored as `(2, *dims)`; one 2x2 matrix acts on every coordinate alike.

$$ dz = \beta(t)\,A\,z\,dt + \sqrt{\beta(t)}\,L\,dW, \qquad F = \beta A, \quad G G^\top = \beta D,
   \quad D = L L^\top, \qquad p_0 \sim N(0, v) $$

In the clock $b = \int\beta\,dt$ everything is time-homogeneous. With $\Phi(b) = e^{bA}$, and with
the momentum of the data integrated out (hybrid score matching),

$$ z_t = \Phi_{\cdot x}\,x_0 + K\epsilon, \qquad
   K K^\top = \Sigma = \int_0^b \Phi(s)\,D\,\Phi(s)^\top ds
                     + v\,\Phi_{\cdot p}\Phi_{\cdot p}^\top . $$

For a stable $A$ the integral is $S - \Phi S\Phi^\top$ with $A S + S A^\top + D = 0$; it is summed
here as an integral, since the difference loses the entries of order $b^3$ near the data.

$K$ may be any root of $\Sigma$. `"cholesky"` is the lower triangle. `"r"` is the root of gDDIM,

$$ \frac{dR}{dt} = F R + \tfrac12 G G^\top R^{-\top}, $$

along which the noise of a single data point does not turn: then $\epsilon$ is constant on every
path of the probability flow. Both are roots of the same matrix, so $R = K\,Q(\theta)$ with a
rotation, and since $K'$ is lower triangular, the upper right entry of the ODE alone gives

$$ \theta' = -\beta\left[\frac{A_{xp}K_{pp}}{K_{xx}}
   + \frac{D_{xp} - D_{xx}K_{px}/K_{xx}}{2 K_{xx}K_{pp}}\right]: $$

the matrix ODE is one quadrature.
"""

from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray

from jaxdiff import _check, grids
from jaxdiff._array import Scalar, ScalarLike, time_dtype
from jaxdiff._host import is_concrete
from jaxdiff._numerics import safe_sqrt
from jaxdiff.process import EDM
from jaxdiff.score import floating

__all__ = [
    "CLD",
    "FACTORS",
    "MASSES",
    "POINTS",
    "PSLD",
    "Factor",
    "LinearSDE",
    "Matrix",
    "apply",
    "cholesky",
    "exponential",
    "inverse",
    "product",
    "spread",
]

Factor: TypeAlias = Literal["cholesky", "r"]
FACTORS = ("cholesky", "r")
Matrix: TypeAlias = Float[Array, "2 2"]

# On [0, 1]. Exact to round-off over clock increments up to 8 of the published processes.
POINTS, MASSES = np.polynomial.legendre.leggauss(32)
POINTS, MASSES = (POINTS + 1) / 2, MASSES / 2

# Where gDDIM's root is the Cholesky factor. A network that predicts noise in this root depends on
# it, so it is no option.
_REFERENCE = 1e-4

# Values at Chebyshev points of [-1, 1] -> Chebyshev coefficients of an antiderivative.
_ANGLES = (np.arange(128) + 0.5) * np.pi / 128
_INTEGRAL = np.cos(np.outer(np.arange(128), _ANGLES)) / 64
_INTEGRAL[0] /= 2
_INTEGRAL = np.polynomial.chebyshev.chebint(_INTEGRAL)


def apply(matrix: Any, z: Array) -> Array:
    """Multiply a phase-space state, (2, *dims), by a 2x2 matrix from the left."""
    (a, b), (c, d) = matrix
    return jnp.stack([a * z[0] + b * z[1], c * z[0] + d * z[1]])


def product(*matrices: Any) -> Array:
    """Multiply 2x2 matrices in full precision."""
    out = jnp.asarray(matrices[0])
    for matrix in matrices[1:]:
        out = jnp.matmul(out, jnp.asarray(matrix, out.dtype), precision="highest")
    return out


def inverse(matrix: Any) -> Array:
    """Invert a 2x2 matrix by its adjugate."""
    (a, b), (c, d) = matrix
    return jnp.array([[d, -b], [-c, a]]) / (a * d - b * c)


def _modes(matrix: Any, b: Any) -> tuple[Any, Any, Array]:
    r"""Return $(C, S, N)$ with $e^{bX} = C(b)\,I + S(b)\,N$, for numbers b of any shape.

    With $\tau = \mathrm{tr}\,X$, $N = X - \tau I/2$ and $N^2 = q^2 I$: $C = e^{b\tau/2}\cosh bq$
    and $S = e^{b\tau/2}\sinh(bq)/q$. Real q is overdamped, imaginary underdamped, zero critical.
    """
    (a, c), (d, e) = matrix
    half = (a - e) / 2
    square = b**2 * (half**2 + c * d)
    near = jnp.abs(square) < 1e-3  # series, whose slope exists at 0
    q = jnp.sqrt(jnp.where(near, 1.0, jnp.abs(square)))
    cosine = jnp.where(square > 0, jnp.cosh(q), jnp.cos(q))
    sine = jnp.where(square > 0, jnp.sinh(q), jnp.sin(q)) / q
    cosine = jnp.where(near, 1 + square / 2 * (1 + square / 12 * (1 + square / 30)), cosine)
    sine = jnp.where(near, 1 + square / 6 * (1 + square / 20 * (1 + square / 42)), sine)
    decay = jnp.exp(b * (a + e) / 2)
    return decay * cosine, decay * sine * b, jnp.array([[half, c], [d, -half]])


def exponential(matrix: Any, b: ScalarLike = 1.0) -> Array:
    r"""Return $e^{bX}$ of a 2x2 matrix, in closed form."""
    cosine, sine, N = _modes(matrix, jnp.asarray(b))
    return cosine * jnp.eye(2) + sine * N


def spread(A: Any, D: Any, b: ScalarLike) -> Array:
    r"""Return $\int_0^b e^{sA}\,D\,e^{sA^\top}ds$ with a symmetric D.

    $$ \gamma_0 D + \gamma_1(N D + D N^\top) + \gamma_2 N D N^\top, \qquad
       \gamma_0, \gamma_1, \gamma_2 = \int_0^b (C^2,\ C S,\ S^2)\,ds $$

    with C, S and N of $e^{sA}$. The integrals of order $b$, $b^2$ and $b^3$ are summed, none is a
    difference.
    """
    b = jnp.asarray(b, jnp.result_type(b, float))
    cosine, sine, N = _modes(A, b * jnp.asarray(POINTS, b.dtype))
    masses, D = b * jnp.asarray(MASSES, b.dtype), jnp.asarray(D)
    first, second, third = (jnp.sum(masses * f) for f in (cosine**2, cosine * sine, sine**2))
    turned = product(N, D)
    return first * D + second * (turned + turned.T) + third * product(turned, N.T)


def cholesky(cov: Any, v: Any = (0.0, 0.0), weight: ScalarLike = 0.0) -> Array:
    r"""Return the lower root of $C + w\,v v^\top$, (2, 2).

    The determinant is $\det C + w\,v^\top\mathrm{adj}(C)\,v$: near the data, where the second term
    of the sum is much the larger, subtracting squares would lose the first. Where the first column
    vanishes (no noise in the position), so does its share of the second.
    """
    (a, b), (_, d) = cov
    x, p = v
    det = a * d - b**2 + weight * (d * x**2 - 2 * b * x * p + a * p**2)
    xx, xp, pp = a + weight * x**2, b + weight * x * p, d + weight * p**2
    empty = xx <= 0
    root = jnp.sqrt(jnp.where(empty, 1.0, xx))
    rest = jnp.where(empty, pp, det / jnp.where(empty, 1.0, xx))
    # Round-off may leave a rank-one matrix a determinant below zero.
    last = safe_sqrt(rest)
    zero = jnp.zeros_like(root)
    lower = [[jnp.where(empty, zero, root), zero], [jnp.where(empty, zero, xp / root), last]]
    return jnp.array(lower)


def _matrix(value: Any) -> Any:
    return value if isinstance(value, jax.Array) else np.asarray(value, np.float64)


class LinearSDE(eqx.Module):
    r"""A linear diffusion of $(x, p)$ with matrices `A` and `L` in a common clock.

    $$ dz = \beta(t)\,(A z\,dt) + \sqrt{\beta(t)}\,L\,dW, \qquad
       \beta(t) = \beta_0 + \beta_1 t, \qquad p_0 \sim N(0, v) $$

    `CLD` and `PSLD` are the published instances; `A = -(D + Q)` with $L L^\top = 2D$ and a skew Q
    keeps $N(0, I)$ stationary. All methods take one time and cost no network evaluation.

    Attributes:
        A: drift, (2, 2).
        L: noise, (2, 2).
        beta: $\beta_0$, the rate of the clock.
        beta_slope: $\beta_1$; 0 by default, a constant rate.
        momentum: variance $v$ of the momentum at the data.
        t_min: smallest usable time, positive: at 0 the noise has no density.
        t_max: largest usable time.

    Raises:
        ValueError: if a matrix is not finite and 2x2, a number is out of range, or noise never
            reaches one of the two variables.

    References:
        Singhal, Goldstein, Ranganath 2023 (2302.07261), section 4.
    """

    A: Any = eqx.field(converter=_matrix)
    L: Any = eqx.field(converter=_matrix)
    beta: ScalarLike = 1.0
    beta_slope: ScalarLike = 0.0
    momentum: ScalarLike = 0.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def __check_init__(self) -> None:
        for name in ("A", "L"):
            value = getattr(self, name)
            if value.shape != (2, 2):
                raise _check.bad("LinearSDE", name, "of shape (2, 2)", value.shape)
            if is_concrete(value) and not np.all(np.isfinite(value)):
                raise _check.bad("LinearSDE", name, "finite", np.asarray(value).tolist())
        for name in ("beta", "momentum", "t_min", "t_max"):
            _check.number("LinearSDE", name, getattr(self, name), 0, 1e30)
        if is_concrete(self.t_min, self.t_max) and not 0 < self.t_min < self.t_max:
            got = f"{self.t_min!r}, {self.t_max!r}"
            raise _check.bad("LinearSDE", "0 < t_min < t_max", "increasing", got)
        if is_concrete(self.A, self.L):
            reached = np.hstack([np.asarray(self.L), np.asarray(self.A) @ np.asarray(self.L)])
            if np.linalg.matrix_rank(reached) < 2:  # Kalman's condition
                expected = "matrices that lead noise to both position and momentum"
                got = f"{np.asarray(self.A).tolist()}, {np.asarray(self.L).tolist()}"
                raise _check.bad("LinearSDE", "A, L", expected, got)

    @property
    def D(self) -> Matrix:
        r"""$D = L L^\top$."""
        return product(self.L, self.L.T)

    @property
    def stationary(self) -> Matrix:
        r"""$S$ with $A S + S A^\top + D = 0$: the law that a stable process tends to."""
        eye = np.eye(2)
        lyapunov = jnp.kron(jnp.asarray(self.A), eye) + jnp.kron(eye, jnp.asarray(self.A))
        return jnp.linalg.solve(lyapunov, -self.D.reshape(4)).reshape(2, 2)

    def rate(self, t: ScalarLike) -> Scalar:
        r"""Return $\beta(t)$."""
        return jnp.asarray(self.beta + self.beta_slope * t)

    def elapsed(self, t0: ScalarLike, t1: ScalarLike) -> Scalar:
        r"""Return $\int_{t_0}^{t_1}\beta\,dt$."""
        return jnp.asarray((t1 - t0) * self.rate((t0 + t1) / 2))

    def matrices(self, t: ScalarLike) -> tuple[Matrix, Matrix]:
        r"""Return $(F, G G^\top)$ at time `t`."""
        return self.rate(t) * self.A, self.rate(t) * self.D

    def transition(self, t1: ScalarLike, t0: ScalarLike = 0.0) -> Matrix:
        r"""Return $\Phi(t_1, t_0)$, with $E[z_{t_1} | z_{t_0}] = \Phi z_{t_0}$, in either order."""
        return exponential(self.A, self.elapsed(t0, t1))

    def covariance(self, t: ScalarLike) -> Matrix:
        r"""Return $\Sigma(t) = Cov[z_t | x_0]$, of both the noise and the first momentum."""
        v = self.transition(t)[:, 1]
        noise = spread(self.A, self.D, self.elapsed(0.0, t))
        return noise + self.momentum * v[:, None] * v[None, :]

    def root(self, t: ScalarLike, factor: Factor = "cholesky") -> Matrix:
        r"""Return $K$ with $K K^\top = \Sigma(t)$, lower triangular or gDDIM's $R$.

        `"r"` is the root that equals the Cholesky factor at $t = 10^{-4}$, in float64 to 1e-12 for
        the published processes. Times below `t_min / 2` and above `1.2 t_max` have none.
        """
        _check.choice("root", "factor", factor, FACTORS)
        noise = spread(self.A, self.D, self.elapsed(0.0, t))
        lower = cholesky(noise, self.transition(t)[:, 1], self.momentum)
        if factor == "cholesky":
            return lower
        theta = self._angle(t)
        c, s = jnp.cos(theta), jnp.sin(theta)
        return product(lower, jnp.array([[c, -s], [s, c]]))

    def _angle(self, t: ScalarLike) -> Scalar:
        r"""Return $\theta$, integrated over $\log t$ as a Chebyshev series of the whole range."""
        low = jnp.minimum(jnp.asarray(self.t_min), _REFERENCE) / 2
        high = 1.2 * jnp.asarray(self.t_max)
        middle, half = jnp.log(low * high) / 2, jnp.log(high / low) / 2
        ts = jnp.exp(middle + half * np.cos(_ANGLES))
        slopes = jax.vmap(lambda t: t * self._turn(t))(ts)
        series = jnp.matmul(_INTEGRAL, slopes, precision="highest")
        ends = jnp.arccos((jnp.log(jnp.stack([jnp.asarray(t), _REFERENCE])) - middle) / half)
        modes = jnp.cos(ends[:, None] * np.arange(len(series))[None])
        return half * jnp.matmul(modes[0] - modes[1], series, precision="highest")

    def _turn(self, t: Scalar) -> Scalar:
        (xx, _), (px, pp) = self.root(t)
        d = self.D
        by_noise = (d[0, 1] - d[0, 0] * px / xx) / (2 * xx * pp)
        return -self.rate(t) * (self.A[0, 1] * pp / xx + by_noise)

    def perturb(
        self,
        key: PRNGKeyArray,
        t: ScalarLike,
        x0: Float[ArrayLike, "*dims"],
        factor: Factor = "cholesky",
    ) -> tuple[Float[Array, "2 *dims"], Float[Array, "2 *dims"]]:
        r"""Draw $z_t = \Phi_{\cdot x}x_0 + K\epsilon$ given the position alone.

        The score of this kernel is $-K^{-\top}\epsilon$: what a network regresses on is `eps`.

        Args:
            key: consumed by one normal draw.
            t: time, ().
            x0: clean sample, (*dims,).
            factor: the root K of the noise, as in `Denoiser`.

        Returns:
            The noisy state and its noise, both (2, *dims), in the dtype of `x0`.
        """
        x0, t = floating(x0), jnp.asarray(t, time_dtype(floating(x0).dtype))
        eps = jax.random.normal(key, (2, *x0.shape), x0.dtype)
        mean = apply(self.transition(t), jnp.stack([x0, jnp.zeros_like(x0)]))
        return (mean + apply(self.root(t, factor), eps)).astype(x0.dtype), eps

    def grid(
        self, n: int, kind: str = "uniform", **options: Any
    ) -> Float[np.ndarray | Array, " nodes"]:
        r"""Build a strictly decreasing grid of `n` steps: see `jaxdiff.grids.make`.

        The path that grids are made for has time for its noise level, so that `"quadratic"` is
        uniform in $\sqrt t$, `"logsnr"` in $\log t$, `"edm"` in $t^{1/7}$.
        """
        return grids.make(self.times, n, kind, **options)

    @property
    def times(self) -> EDM:
        """The range of times, as the path whose noise level is time itself."""
        return EDM(self.t_min, self.t_max)


def PSLD(
    gamma: ScalarLike = 0.01,
    nu: ScalarLike = 4.01,
    beta: ScalarLike = 8.0,
    kappa: ScalarLike = 0.04,
) -> LinearSDE:
    r"""Build the phase-space Langevin diffusion, critically damped, $1/M = (\Gamma - \nu)^2/4$.

    $$ dz = \frac\beta2\begin{pmatrix} -\Gamma & 1/M \\ -1 & -\nu \end{pmatrix} z\,dt
          + \sqrt\beta\,\mathrm{diag}(\sqrt\Gamma, \sqrt{M\nu})\,dW, \qquad
       p_0 \sim N(0, \kappa M), \quad S = \mathrm{diag}(1, M) $$

    Args:
        gamma: $\Gamma$, friction of the position, not negative.
        nu: $\nu$, friction of the momentum, not negative and not equal to $\Gamma$.
        beta: rate of the clock.
        kappa: share of the stationary variance that the momentum of the data has.

    Raises:
        ValueError: if a number is out of range.

    Example:
        >>> (PSLD().stationary.round(4) + 0).tolist()
        [[1.0, 0.0], [0.0, 0.25]]

    References:
        Pandey, Mandt 2023 (2303.01748), eq. 9.
    """
    for name, value in dict(gamma=gamma, nu=nu, beta=beta, kappa=kappa).items():
        _check.number("PSLD", name, value, 0, 1e30)
    if is_concrete(gamma, nu) and float(gamma) == float(nu):
        raise _check.bad("PSLD", "nu", f"another than gamma={gamma!r}", repr(nu))
    stack = np if is_concrete(gamma, nu) else jnp
    mass = 4 / (gamma - nu) ** 2
    A = stack.array([[-gamma, 1 / mass], [-1.0, -nu]]) / 2
    L = stack.sqrt(stack.array([[gamma, 0.0], [0.0, mass * nu]]))
    return LinearSDE(A, L, beta, momentum=kappa * mass)


def CLD(mass: ScalarLike = 0.25, beta: ScalarLike = 4.0, kappa: ScalarLike = 0.04) -> LinearSDE:
    r"""Build critically damped Langevin diffusion: noise enters through the momentum alone.

    $$ dz = \beta\begin{pmatrix} 0 & 1/M \\ -1 & -\Gamma/M \end{pmatrix} z\,dt
          + \sqrt{2\Gamma\beta}\,(0, dW)^\top, \qquad \Gamma = 2\sqrt M $$

    It is `PSLD` with $\Gamma_{PSLD} = 0$, $\nu = \Gamma/M$ and twice the beta; arguments and errors
    are as there, and `mass` is $M$.

    References:
        Dockhorn, Vahdat, Kreis 2022 (2112.07068), eq. 5 and section 3.1.
    """
    _check.number("CLD", "mass", mass, 1e-30, 1e30)
    nu = 2 / (np.sqrt(mass) if is_concrete(mass) else jnp.sqrt(mass))
    return PSLD(0.0, nu, 2 * beta, kappa)
