r"""Solvers in phase space: a step is a short list of affine stages with 2x2 coefficients.

Notation: a step goes from time s to $t < s$ and by $b = \int_t^s\beta > 0$ in the clock; $o_j$ are
predictions of the network, newest first, and $s_j = C_j o_j$ the scores that they mean. A stage may
evaluate the network at the current state, and then sets

$$ z \leftarrow P z + Q y + \sum_j W_j\,o_j + N\xi, $$

with $y$ the state at the start of the step, or after the last stage that evaluated nothing, and
$\xi$ a standard normal. A solver is a function from nodes to stages, which are tabulated in float64
for the whole grid before anything is sampled. The equations solved are

$$ \frac{dz}{dt} = F z - \tfrac12 G G^\top s \qquad\text{and}\qquad
   dz = [F z - G G^\top s]\,dt + G\,d\bar W. $$
"""

import abc
import functools
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdiff import _check
from jaxdiff._host import host64, is_concrete
from jaxdiff.phase.denoiser import Head
from jaxdiff.phase.process import (
    FACTORS,
    MASSES,
    POINTS,
    Factor,
    LinearSDE,
    cholesky,
    exponential,
    inverse,
    product,
    spread,
)

__all__ = [
    "GDDIM",
    "SSCS",
    "AbstractPhaseSolver",
    "Conjugate",
    "Euler",
    "EulerMaruyama",
    "Heun",
    "Rotation",
    "Splitting",
    "Stage",
]


class Stage(NamedTuple):
    """One stage of a step; a field that is None is absent.

    Attributes:
        state: P, the factor of the current state, (2, 2).
        weights: $W_j$ of the predictions, newest first, each (2, 2).
        t: time at which the network is evaluated first, (); None to evaluate nothing.
        base: Q, the factor of $y$, (2, 2).
        noise: N, the factor of a standard normal, (2, 2).
    """

    state: Any
    weights: tuple[Any, ...] = ()
    t: Any = None
    base: Any = None
    noise: Any = None


class AbstractPhaseSolver(eqx.Module):
    """A solver on a grid of times; subclasses write `stages`.

    Attributes:
        stable_only: whether the process must have a stationary law.
    """

    stable_only: ClassVar[bool] = False

    @property
    def memory(self) -> int:
        """Number of older predictions in use."""
        return 0

    @property
    def claimed_order(self) -> int:
        """Order of convergence: of the path, or of the law where steps add noise."""
        return 1

    @abc.abstractmethod
    def stages(self, head: Head, ts: Float[Array, " nodes"], n: Any) -> tuple[Stage, ...]:
        """Return the stages of step `n`, counted from 0.

        Args:
            head: the process, and what a prediction means.
            ts: the next node, the current one and `memory` older ones; where fewer than `memory`
                exist, the first node again.
            n: number of steps made before this one, ().
        """

    def tabulate(self, head: Head, ts: Any) -> tuple[Stage, ...]:
        """Return the stages of every step of a grid, in float64 where it is known."""
        return host64(_tabulate, self, head, ts)


def _tabulate(solver: AbstractPhaseSolver, head: Head, ts: Array) -> tuple[Stage, ...]:
    steps = jnp.arange(ts.shape[0] - 1)
    older = [jnp.maximum(steps - j, 0) for j in range(solver.memory + 1)]
    windows = jnp.stack([ts[steps + 1], *(ts[i] for i in older)], axis=1)
    return jax.vmap(lambda window, n: solver.stages(head, window, n))(windows, steps)


# --- One-step methods that take the equation as it is. --------------------------------------------


class Euler(AbstractPhaseSolver):
    r"""Euler's method on the probability flow, $z \leftarrow z - (s - t)(F z - \tfrac12GG^\top s)$.

    Order 1; one network evaluation per step. Needs many steps: see `Rotation`.
    """

    def stages(self, head: Head, ts: Array, n: Any) -> tuple[Stage, ...]:
        """Freeze the velocity over the step."""
        h, (F, G2) = ts[1] - ts[0], head.process.matrices(ts[1])
        return (Stage(jnp.eye(2) - h * F, (product(h / 2 * G2, head.to_score(ts[1])),), ts[1]),)


class Heun(AbstractPhaseSolver):
    r"""Heun's method on the probability flow, the trapezoidal rule in time.

    Order 2; two network evaluations per step.
    """

    @property
    def claimed_order(self) -> int:
        """2."""
        return 2

    def stages(self, head: Head, ts: Array, n: Any) -> tuple[Stage, ...]:
        r"""Predict by Euler; then $z \leftarrow \tfrac12(y + z - (s - t)\,\dot z(t, z))$."""
        (first,), half = Euler().stages(head, ts, n), jnp.eye(2) / 2
        h, (F, G2) = ts[1] - ts[0], head.process.matrices(ts[0])
        weight = product(h / 4 * G2, head.to_score(ts[0]))
        return first, Stage(half - h / 2 * F, (weight,), ts[0], base=half)


class EulerMaruyama(AbstractPhaseSolver):
    r"""Euler-Maruyama on the reverse SDE.

    $$ z \leftarrow z - (s - t)(F z - G G^\top s) + \sqrt{(s - t)\beta}\,L\,\xi $$

    Weak order 1; one network evaluation per step. Needs many steps: see `SSCS`.
    """

    def stages(self, head: Head, ts: Array, n: Any) -> tuple[Stage, ...]:
        """Freeze the drift over the step."""
        h, process = ts[1] - ts[0], head.process
        F, G2 = process.matrices(ts[1])
        noise = jnp.sqrt(h * process.rate(ts[1])) * process.L
        weight = product(h * G2, head.to_score(ts[1]))
        return (Stage(jnp.eye(2) - h * F, (weight,), ts[1], noise=noise),)


# --- Exponential methods. -------------------------------------------------------------------------


def _log_points(t0: Any, t1: Any) -> tuple[Array, Array]:
    r"""Return points between two times and masses of $\int_{t_0}^{t_1}d\tau$, Gauss in $\log t$."""
    span = jnp.log(t1) - jnp.log(t0)
    ts = t0 * jnp.exp(span * jnp.asarray(POINTS, span.dtype))
    return ts, span * jnp.asarray(MASSES, span.dtype) * ts


def _to_noise(head: Head, ts: Array, factor: Factor) -> Array:
    """Return the matrices, (nodes, 2, 2), that turn a prediction into the noise of a root."""
    if head.predicts == "eps" and head.factor == factor:
        return jnp.broadcast_to(jnp.eye(2), (len(ts), 2, 2))
    return jax.vmap(lambda t: -product(head.process.root(t, factor).T, head.to_score(t)))(ts)


def _kernel(process: LinearSDE, phi: Array, t: Array, root: Array) -> Array:
    r"""Return $\Phi\,\tfrac12 G G^\top K^{-\top}$ at one time."""
    return product(phi, process.matrices(t)[1] / 2, inverse(root).T)


class GDDIM(AbstractPhaseSolver):
    r"""gDDIM: DDIM for any linear diffusion, exact for data at a single point.

    With $R$ the root `"r"` of the process, $s = -R^{-\top}\hat\epsilon$ and $\Phi = \Phi(t, s)$,

    $$ z_t = \Phi z_s + \sum_j W_j\,\hat\epsilon_j, \qquad
       W_j = \int_s^t \Phi(t, \tau)\,\tfrac12 G G^\top R^{-\top}\,\ell_j(\tau)\,d\tau,
       \qquad \sum_j W_j = R_t - \Phi R_s, $$

    with the Lagrange basis on the last `order + 1` nodes: exponential Adams-Bashforth. The sum rule
    is used, so that exactness does not depend on the quadrature. Order `order + 1`, on grids that
    start where there is little signal: the first steps have no history and are of lower order. One
    network evaluation per step.

    Attributes:
        order: degree q of the extrapolation, 0, 1 or 2.

    Raises:
        ValueError: if `order` is out of range.

    References:
        Zhang, Tao, Chen 2022 (2206.05564), eq. 18, 19, 22 to 25.
    """

    order: int = eqx.field(static=True, default=0)

    def __check_init__(self) -> None:
        _check.choice("GDDIM", "order", self.order, (0, 1, 2))

    @property
    def memory(self) -> int:
        """Older predictions in use."""
        return self.order

    @property
    def claimed_order(self) -> int:
        """One more than the degree."""
        return self.order + 1

    def stages(self, head: Head, ts: Array, n: Any) -> tuple[Stage, ...]:
        """Extrapolate the noise from the nodes that exist."""
        process, t1, t0 = head.process, ts[0], ts[1]
        points, masses = _log_points(t0, t1)
        times = jnp.concatenate([ts[:2], points])
        phis = jax.vmap(lambda t: process.transition(t1, t))(times)
        roots = jax.vmap(lambda t: process.root(t, "r"))(times)
        kernel = jax.vmap(functools.partial(_kernel, process))(phis[2:], points, roots[2:])
        there = [n >= j for j in range(self.order + 1)]
        # what stands for a node that is not there is distinct, so that no gap vanishes
        nodes = [jnp.where(ok, ts[j + 1], t1 - 1.0 - j) for j, ok in enumerate(there)]
        older = []
        for j in range(1, self.order + 1):
            basis = jnp.where(there[j], masses, 0.0)
            for i in set(range(self.order + 1)) - {j}:
                factor = (points - nodes[i]) / (nodes[j] - nodes[i])
                basis = basis * jnp.where(there[i], factor, 1.0)
            older.append(jnp.einsum("k,kij->ij", basis, kernel, precision="highest"))
        newest = roots[0] - product(phis[1], roots[1]) - sum(older, jnp.zeros((2, 2)))
        # a prediction is turned into noise in the root of its own node
        weights = tuple(map(product, [newest, *older], _to_noise(head, ts[1:], "r")))
        return (Stage(phis[1], weights, t0),)


class Conjugate(AbstractPhaseSolver):
    r"""Conjugate integrator: Euler in coordinates that have been scaled to be less stiff.

    In the clock b that runs from noise to data, $\hat z = e^{b(\Lambda + A)}z$ obeys an equation
    whose linear part is $\Lambda$ alone. Euler's method for it, the weight of the noise being
    exact, is

    $$ z_t = e^{-b(\Lambda + A)}\left[(I + b\,\Lambda)\,z_s
         - \int_0^b e^{b'(\Lambda + A)}\,\tfrac12 D K^{-\top}\,db'\;\hat\epsilon\right]. $$

    At $\Lambda = 0$ it is the exponential integrator: gDDIM of order 0 with the root `"r"`. Small
    positive values can help at few steps; stable if $|1 + b\,\mathrm{eig}(\Lambda)| \le 1$ or so.
    Order 1; one network evaluation per step.

    Args:
        lam: $\Lambda$: a number $\lambda$ for $\lambda I$, or a matrix, (2, 2), as
            `0.5 * jnp.ones((2, 2))`; per unit of the clock, that is over $\beta$.
        factor: the root K of the noise that is frozen over a step.

    Raises:
        ValueError: if `lam` is neither a finite number nor a finite 2x2 matrix.

    References:
        Pandey, Rudolph, Mandt 2024 (2310.07894), eq. 8 to 12.
    """

    lam: Any = 0.0
    factor: Factor = eqx.field(static=True, default="r")

    def __check_init__(self) -> None:
        _check.choice("Conjugate", "factor", self.factor, FACTORS)
        try:
            good = np.shape(self.lam) in ((), (2, 2))
            good = good and (not is_concrete(self.lam) or bool(np.all(np.isfinite(self.lam))))
        except TypeError:
            good = False
        if not good:
            raise _check.bad("Conjugate", "lam", "a number or a (2, 2) matrix", repr(self.lam))

    def stages(self, head: Head, ts: Array, n: Any) -> tuple[Stage, ...]:
        """Freeze the noise; integrate its weight by quadrature."""
        process, t1, t0 = head.process, ts[0], ts[1]
        lam = jnp.asarray(self.lam)
        lam = lam * jnp.eye(2) if lam.ndim == 0 else lam
        X, b = lam + process.A, process.elapsed(t1, t0)
        points, masses = _log_points(t1, t0)
        moved = jax.vmap(lambda t: exponential(X, process.elapsed(t, t0)))(points)
        roots = jax.vmap(lambda t: process.root(t, self.factor))(points)
        kernel = jax.vmap(functools.partial(_kernel, process))(moved, points, roots)
        integral = jnp.einsum("k,kij->ij", masses, kernel, precision="highest")
        back = exponential(X, -b)
        weight = -product(back, integral, _to_noise(head, ts[1:2], self.factor)[0])
        return (Stage(product(back, jnp.eye(2) + b * lam), (weight,), t0),)


# --- Splittings. ----------------------------------------------------------------------------------

# (which variable moves, by which share of the step, and how far into the step the score is taken;
# None to take the last score once more)
_SCHEDULES: dict[str, tuple[tuple[int, float, float | None], ...]] = {
    "NSE": ((0, 1.0, 0.0), (1, 1.0, 0.0)),
    "RSE": ((1, 1.0, 0.0), (0, 1.0, None)),
    "NVV": ((0, 0.5, 0.0), (1, 1.0, 0.5), (0, 0.5, 1.0)),
    "RVV": ((1, 0.5, 0.0), (0, 1.0, None), (1, 0.5, 1.0)),
}


class Splitting(AbstractPhaseSolver):
    r"""Symplectic-style splitting of the probability flow: position and momentum move in turn.

    $$ \mathcal A:\ x \mathrel{-}= b\,(A z - \tfrac12 D s)_x, \qquad
       \mathcal B:\ p \mathrel{-}= b\,(A z - \tfrac12 D s)_p $$

    | scheme | moves | scores per step |
    |---|---|---|
    | `"NSE"` naive symplectic Euler | A(b) B(b) | 2 |
    | `"RSE"` reduced symplectic Euler | B(b) A(b) | 1 |
    | `"NVV"` naive velocity Verlet | A(b/2) B(b) A(b/2) | 3 |
    | `"RVV"` reduced velocity Verlet | B(b/2) A(b) B(b/2) | 2 |

    All are of order 1, since every move is a step of Euler's, with smaller constants than `Euler`.

    Args:
        scheme: a name of the table.

    Raises:
        ValueError: if the scheme is unknown.

    References:
        Pandey, Rudolph, Mandt 2024 (2310.07894), section 3.2 and appendix. The order of the moves
        and the times of the scores are reconstructions.
    """

    scheme: str = eqx.field(static=True, default="RVV")

    def __check_init__(self) -> None:
        _check.choice("Splitting", "scheme", self.scheme, _SCHEDULES)

    def stages(self, head: Head, ts: Array, n: Any) -> tuple[Stage, ...]:
        """Move one variable per stage."""
        process, out = head.process, []
        b, to_score = process.elapsed(ts[0], ts[1]), jnp.eye(2)
        for row, share, place in _SCHEDULES[self.scheme]:
            t = None if place is None else ts[1] + place * (ts[0] - ts[1])
            to_score = to_score if t is None else head.to_score(t)
            move = share * b * jnp.zeros((2, 2)).at[row, row].set(1.0)
            state = jnp.eye(2) - product(move, process.A)
            out.append(Stage(state, (product(move, process.D / 2, to_score),), t))
        return tuple(out)


def _kick(head: Head, t: Array, b: Array, share: float, midpoint: bool) -> list[Stage]:
    r"""Stages of $dz/db = c\,D(s(t, z) + S^{-1}z)$ over b, by Euler or by the midpoint rule."""
    process = head.process
    pull = share * process.D
    stiff, weight = product(pull, inverse(process.stationary)), product(pull, head.to_score(t))
    one = jnp.eye(2)
    if not midpoint:
        return [Stage(one + b * stiff, (b * weight,), t)]
    half = Stage(one + b / 2 * stiff, (b / 2 * weight,), t)
    return [half, Stage(b * stiff, (b * weight,), t, base=one)]


class Rotation(AbstractPhaseSolver):
    r"""Strang splitting of the probability flow into a rotation and a kick: the default choice.

    With the stationary covariance S, the flow is
    $-\dot z = J z + \tfrac12 G G^\top(s + S^{-1}z)$, $J = -F - \tfrac12 G G^\top S^{-1}$. J rotates
    phase space ($J S + S J^\top = 0$) and is solved exactly; what is left vanishes for stationary
    data.

    $$ z \leftarrow e^{bJ/2}z; \qquad \text{kick by } b; \qquad z \leftarrow e^{bJ/2}z $$

    with the score at the middle of the step. Order 2 with two network evaluations per step, the
    kick being made by the midpoint rule; `midpoint=False` makes it by Euler: order 1, one
    evaluation.

    Attributes:
        midpoint: whether the kick is of second order.
    """

    midpoint: bool = eqx.field(static=True, default=True)
    stable_only = True

    @property
    def claimed_order(self) -> int:
        """2 with `midpoint`, else 1."""
        return 1 + self.midpoint

    def stages(self, head: Head, ts: Array, n: Any) -> tuple[Stage, ...]:
        """Rotate, kick, rotate."""
        process, b = head.process, head.process.elapsed(ts[0], ts[1])
        J = -process.A - product(process.D / 2, inverse(process.stationary))
        turn = Stage(exponential(J, b / 2))
        return (turn, *_kick(head, (ts[0] + ts[1]) / 2, b, 0.5, self.midpoint), turn)


class SSCS(AbstractPhaseSolver):
    r"""Symmetric splitting of the reverse SDE into an Ornstein-Uhlenbeck part and a kick.

    $$ \mathcal O:\ dz = \tilde A z\,db + L\,dW, \quad \tilde A = -A - D S^{-1}; \qquad
       \mathcal K:\ dz = D(s + S^{-1}z)\,db $$

    $\mathcal O(b/2)\,\mathcal K(b)\,\mathcal O(b/2)$ with the first solved exactly and the score at
    the middle of the step. `midpoint=True` makes the kick by the midpoint rule: weak order 2, two
    network evaluations per step. `midpoint=False` is the published method, weak order 1, one
    evaluation.

    Attributes:
        midpoint: whether the kick is of second order.

    References:
        Dockhorn, Vahdat, Kreis 2022 (2112.07068), section 3.3, for CLD with a kick by Euler.
    """

    midpoint: bool = eqx.field(static=True, default=True)
    stable_only = True

    @property
    def claimed_order(self) -> int:
        """2 with `midpoint`, else 1."""
        return 1 + self.midpoint

    def stages(self, head: Head, ts: Array, n: Any) -> tuple[Stage, ...]:
        """Diffuse, kick, diffuse."""
        process, b = head.process, head.process.elapsed(ts[0], ts[1])
        A = -process.A - product(process.D, inverse(process.stationary))
        noise = cholesky(spread(A, process.D, b / 2))
        diffuse = Stage(exponential(A, b / 2), noise=noise)
        return (diffuse, *_kick(head, (ts[0] + ts[1]) / 2, b, 1.0, self.midpoint), diffuse)
