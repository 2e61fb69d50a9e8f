r"""Coefficients fitted to a model on a known grid, by least squares against a finer solve.

Notation: $o_i$ is the network output of a solver at node i, $x_{i+1} = \Phi(x_i)$ its step. A
fitted solver adds a combination of outputs that it has anyway,

$$ x_{i+1} = \Phi(x_i) + \sum_{k=0}^{r}\gamma_{i,k}\,o_{i-k}, \qquad
   \gamma_i = \arg\min\sum_{\text{batch}}\Big\|z_{i+1} - \Phi(x_i)
              - \sum_k\gamma_k\,o_{i-k}\Big\|^2, $$

with the states $x_i$ of the fitted solver itself, so that later steps know what earlier ones do:

| method | target $z_{i+1}$ | combinations allowed |
|---|---|---|
| `integration_approximation` | a finer solve from $x_i$ | all |
| `distil` | a finer solve from the noise | multiples of $o_i - o_{i-1}$ |
| `subspace` | a finer solve from the noise | all, of all outputs so far |

The number of network evaluations in use does not change. A fit belongs to its model, guidance and
grid.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, Real

from jaxdiff import _check, grids
from jaxdiff._array import Cond, time_dtype
from jaxdiff._host import host64, is_concrete
from jaxdiff._keys import INIT, stream
from jaxdiff._many import sample
from jaxdiff._sampler import sampler
from jaxdiff.process import AbstractProcess
from jaxdiff.score import AbstractDenoiser
from jaxdiff.solvers.engine import AbstractGridSolver, State
from jaxdiff.solvers.fitted import Fitted
from jaxdiff.solvers.terms import pf_ode

__all__ = ["distil", "integration_approximation", "subspace"]


def _begin(solver: AbstractGridSolver, ts: Array, x: Array) -> State:
    """Return the state of a solver before its first step."""
    nodes = jnp.broadcast_to(ts[0], (solver.memory,))
    history = (jnp.zeros_like(x),) * solver.memory
    return State(jnp.zeros((), jnp.int32), nodes, history, solver.begin(x))


@eqx.filter_jit
def _step(
    solver: AbstractGridSolver,
    denoiser: AbstractDenoiser,
    ts: Array,
    x: Array,
    states: State,
    cond: Cond,
) -> tuple[Array, State]:
    """Make the next step of a batch."""

    def one(x: Array, state: State, cond: Cond) -> tuple[Array, State]:
        terms, i = pf_ode(denoiser, "t", cond), state.step
        x1, _, _, state, _ = solver.step(terms, ts[i], ts[i + 1], x, None, state, False)
        return x1, state

    return jax.vmap(one)(x, states, cond)


def _subgrid(process: AbstractProcess, ts: Array, substeps: Any) -> Array:
    """Divide every step into equal parts of log-SNR, (steps, parts + 1)."""
    shares = jnp.linspace(0, 1, len(substeps) + 1)
    lams = jax.vmap(process.lam)(ts)
    inner = lams[:-1, None] + jnp.diff(lams)[:, None] * shares[None, 1:-1]
    inner = jax.vmap(jax.vmap(process.t_of_lam))(inner)
    return jnp.concatenate([ts[:-1, None], inner, ts[1:, None]], axis=1)


class _Problem(NamedTuple):
    """What the methods share: a solver on its grid, and finer solves of a batch of `num` starts."""

    denoiser: AbstractDenoiser
    cond: Cond
    x: Array  # (num, *dims)
    solver: AbstractGridSolver
    ts: np.ndarray  # (steps + 1,)
    teacher: AbstractGridSolver
    fine: np.ndarray  # (steps, substeps + 1)

    def solve(self, grid: np.ndarray, x: Array, *, trajectory: bool = False) -> np.ndarray:
        """Return where the teacher leads from `x`, or all nodes, (num, nodes, *dims)."""
        options: Any = dict(solver=self.teacher, ts=grid, dtype=x.dtype, trajectory=trajectory)
        solve = sampler(self.denoiser, x.shape[1:], **options)
        run = sample(None, solve, num=len(x), cond=self.cond, init=x)
        return np.asarray(run.aux["trajectory"] if trajectory else run.x)


def _problem(
    where: str,
    key: PRNGKeyArray | None,
    denoiser: AbstractDenoiser,
    shape: tuple[int, ...],
    num: int,
    solver: AbstractGridSolver,
    ts: Any,
    teacher: AbstractGridSolver | None,
    substeps: int,
    cond: Cond,
    init: Any,
) -> _Problem:
    """Check the arguments of a public function."""
    teacher = solver if teacher is None else teacher
    if not isinstance(denoiser, AbstractDenoiser):
        raise _check.bad(where, "denoiser", "a jaxdiff denoiser", repr(denoiser))
    for name, value in (("solver", solver), ("teacher", teacher)):
        if not isinstance(value, AbstractGridSolver) or value.stochastic:
            raise _check.bad(where, name, "a deterministic solver of jaxdiff", value)
    _check.whole(where, "num", num, 1)
    _check.whole(where, "substeps", substeps, 1)
    process, shape = denoiser.process, _check.dims(where, "shape", shape)
    ts = grids.check(process, ts, where=where)
    if not is_concrete(ts, denoiser, cond, init):
        raise _check.bad(
            where, "ts, denoiser, cond, init", "known: fits run outside jit", "tracers"
        )
    if float(process.sigma(ts[-1])) == 0:  # the last step is exact: x = alpha m
        ts = ts[:-1]
    fine = np.asarray(host64(_subgrid, process, ts, np.zeros(substeps)))
    if not np.all(np.isfinite(fine)):
        expected = "a grid of two or more nodes that starts at a finite log-SNR"
        raise _check.bad(where, "ts", expected, ts)
    if init is None:
        key = _check.key(where, "key", key)
        x = jax.vmap(lambda i: process.prior(stream(stream(key, i), INIT), shape, t=ts[0]))(
            jnp.arange(num, dtype=jnp.uint32)
        )
    else:
        x = jnp.asarray(init)
        if x.shape != (num, *shape):
            raise _check.bad(where, "init", f"of shape {(num, *shape)}", x.shape)
    return _Problem(denoiser, cond, x, solver, ts, teacher, fine)


def _from_state(problem: _Problem) -> Callable[[int, Array], np.ndarray]:
    """Return the target of step i from x: a finer solve of this step alone."""
    return lambda i, x: problem.solve(problem.fine[i], x)


def _from_noise(problem: _Problem) -> Callable[[int, Array], np.ndarray]:
    """Return the target of step i, whatever x: node i + 1 of one finer solve of all steps."""
    grid = np.append(problem.fine[:, :-1].ravel(), problem.ts[-1])
    parts = problem.fine.shape[1] - 1
    z = problem.solve(grid, problem.x, trajectory=True)[:, ::parts]
    return lambda i, x: z[:, i + 1]


def _any(known: int) -> np.ndarray:
    """Allow every combination of the known outputs."""
    return np.eye(known)


def _difference(known: int) -> np.ndarray:
    """Allow multiples of the difference of the last two outputs, if there are two."""
    return np.array([[1.0, -1.0]]) if known == 2 else np.zeros((0, known))


class _Method(NamedTuple):
    """A row of the module's table."""

    target: Callable[[_Problem], Callable[[int, Array], np.ndarray]]
    allowed: Callable[[int], np.ndarray]  # from the number of outputs to a basis of coefficients


_METHODS = {
    "integration_approximation": _Method(_from_state, _any),
    "distil": _Method(_from_noise, _difference),
    "subspace": _Method(_from_noise, _any),
}


def _combine(coefficients: np.ndarray, outputs: Sequence[np.ndarray]) -> Any:
    r"""Return $\sum_k\gamma_k\,o_{i-k}$."""
    return sum(gamma * o for gamma, o in zip(coefficients, outputs, strict=True))


def _least_squares(
    allowed: np.ndarray, outputs: Sequence[np.ndarray], missing: np.ndarray
) -> np.ndarray:
    r"""Return the smallest best $\gamma$ in the span of the rows of `allowed`, in float64."""
    columns = np.zeros((missing.size, len(allowed)))
    for j, basis in enumerate(allowed):
        columns[:, j] = np.ravel(_combine(basis, outputs))
    return np.linalg.lstsq(columns, np.ravel(missing).astype(np.float64), rcond=None)[0] @ allowed


def _rms(a: np.ndarray) -> Any:
    return np.sqrt(np.mean(np.square(a)))


def _fit(where: str, problem: _Problem, terms: int | None) -> Fitted:
    """Fit the steps one after the other, each from the state to which the fitted ones lead."""
    denoiser, cond, x, solver, ts, *_ = problem
    steps = len(ts) - 1
    terms = steps if terms is None else terms
    target, allowed = _METHODS[where].target(problem), _METHODS[where].allowed
    # One output more than is fitted, so that the state holds the current one too.
    blank = Fitted(solver=solver, coefficients=np.zeros((steps, terms + 1)), ts=ts)
    base, nodes = blank.tabulate(denoiser.process, ts), jnp.asarray(ts, time_dtype(x.dtype))
    states = jax.vmap(lambda x: _begin(base, nodes, x))(x)
    table, errors = np.zeros((steps, terms)), np.zeros((steps, 2))
    for i in range(steps):
        z = target(i, x)
        phi, states = _step(base, denoiser, nodes, x, states, cond)
        outputs = [np.asarray(o) for o in states.history[: min(i + 1, terms)]]
        missing = z - np.asarray(phi)
        gamma = _least_squares(allowed(len(outputs)), outputs, missing)
        change = _combine(gamma, outputs)
        x = (phi + change).astype(x.dtype)
        table[i, : len(gamma)] = gamma
        errors[i] = _rms(missing), _rms(missing - change)
    return Fitted(solver=solver, coefficients=table, ts=ts, errors=errors)


def integration_approximation(
    key: PRNGKeyArray | None,
    denoiser: AbstractDenoiser,
    shape: tuple[int, ...],
    *,
    num: int,
    solver: AbstractGridSolver,
    ts: Real[ArrayLike, " nodes"] | Sequence[Any],
    terms: int = 2,
    teacher: AbstractGridSolver | None = None,
    substeps: int = 16,
    cond: Cond = None,
    init: Float[Any, "num *dims"] | None = None,
) -> Fitted:
    r"""Improve the approximation of each step's integral (IIA), by a fit from the same state.

    $$ \gamma_i = \arg\min\sum\Big\|z_{i+1} - \Phi(x_i)
                  - \sum_{k=0}^{r}\gamma_k\,o_{i-k}\Big\|^2, $$

    with $z_{i+1}$ from a finer solve of this one step, that starts at $x_i$ without history. Each
    step is made as good as it can be on its own; `distil` corrects the accumulated error too.

    Cost, once: `num * steps * (substeps + 1)` evaluations of the network for a solver of one.

    Args:
        key: names the noises, those of `sample`; None with `init`.
        denoiser: the model.
        shape: shape of one sample, `(*dims,)`.
        num: number of samples in the batch of the fit.
        solver: the deterministic solver to correct.
        ts: its grid. A last step to sigma = 0 is exact and left alone.
        terms: number of outputs combined, r + 1.
        teacher: the solver of the finer solve; `solver` itself by default.
        substeps: parts, equal in log-SNR, that it divides each step into.
        cond: conditions, every leaf with leading axis `num`.
        init: starting states, (num, *dims), instead of noise.

    Returns:
        A solver for `sample` on the same grid.

    Raises:
        ValueError: if an argument is wrong or being traced.

    References:
        Zhang, Niwa, Kleijn 2023 (2304.11328).
    """
    where = "integration_approximation"
    _check.whole(where, "terms", terms, 1)
    args = (key, denoiser, shape, num, solver, ts, teacher, substeps, cond, init)
    return _fit(where, _problem(where, *args), terms)


def distil(
    key: PRNGKeyArray | None,
    denoiser: AbstractDenoiser,
    shape: tuple[int, ...],
    *,
    num: int,
    solver: AbstractGridSolver,
    ts: Real[ArrayLike, " nodes"] | Sequence[Any],
    teacher: AbstractGridSolver | None = None,
    substeps: int = 16,
    cond: Cond = None,
    init: Float[Any, "num *dims"] | None = None,
) -> Fitted:
    r"""Distil a finer solve into one scalar per step (D-ODE).

    $$ x_{i+1} = \Phi(x_i) + \theta_i\,(o_i - o_{i-1}), \qquad
       \theta_i = \frac{\langle z_{i+1} - \Phi(x_i),\, o_i - o_{i-1}\rangle}
                       {\|o_i - o_{i-1}\|^2}, $$

    with $z$ the finer solve from the same noise. As the coefficients sum to nothing, the result is
    exact where the output is constant. On `DDIM` this is a multistep method whose extrapolation is
    fitted: better than `DPMpp2M` at the same cost. The first step has nothing to differ from and
    stays as it is.

    Cost, once: `num * steps * (substeps + 1)` evaluations of the network for a solver of one.
    Memory: the trajectories of the finer solve.

    Arguments, result and errors are those of `integration_approximation`, without `terms`.

    References:
        Kim, Tang, Yu 2023 (2309.16421).
    """
    args = (key, denoiser, shape, num, solver, ts, teacher, substeps, cond, init)
    return _fit("distil", _problem("distil", *args), 2)


def subspace(
    key: PRNGKeyArray | None,
    denoiser: AbstractDenoiser,
    shape: tuple[int, ...],
    *,
    num: int,
    solver: AbstractGridSolver,
    ts: Real[ArrayLike, " nodes"] | Sequence[Any],
    terms: int | None = None,
    teacher: AbstractGridSolver | None = None,
    substeps: int = 16,
    cond: Cond = None,
    init: Float[Any, "num *dims"] | None = None,
) -> Fitted:
    r"""Search the next state in the span of all outputs so far (OLSS, without path optimisation).

    The fit of `integration_approximation` to the target of `distil`, by default with every output
    of the run: the best that a linear scheduler of this grid can do.

    Cost, once: as `distil`. At run time, memory for `terms` outputs.

    Arguments, result and errors are those of `integration_approximation`, with `terms=None` for all
    outputs.

    References:
        Duan et al. 2023 (2305.14677).
    """
    if terms is not None:
        _check.whole("subspace", "terms", terms, 1)
    args = (key, denoiser, shape, num, solver, ts, teacher, substeps, cond, init)
    return _fit("subspace", _problem("subspace", *args), terms)
