r"""Hooks: what is done to a sample between the steps of a solver.

A hook is a function of a few lines, `hook(model, (t0, t1), x0, x1, key, cond) -> x1`: after the
step from $x_0$ at $t_0$ to $x_1$ at $t_1 < t_0$ it returns what is to stand in place of $x_1$.
Langevin correctors, projections and barriers are hooks.
"""

import sys
from typing import Any, Literal, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from jaxdiff import _check
from jaxdiff._array import Cond, ScalarLike
from jaxdiff._keys import stream
from jaxdiff.score import AbstractDenoiser

__all__ = ["Between", "Hook", "Langevin", "LangevinStep"]


@runtime_checkable
class Hook(Protocol):
    """What `Between` calls after a step; any pytree callable.

    May have three attributes: `stochastic`, whether it needs a key (False by default); `last`,
    whether it is called after the last step too (True); `evaluations`, network evaluations of a
    call, for `nfe` (0).
    """

    def __call__(
        self,
        model: Any,
        times: tuple[Any, Any],
        x0: Array,
        x1: Array,
        key: PRNGKeyArray | None,
        cond: Cond,
        /,
    ) -> Array:
        """Return the sample at `times[1]` in place of `x1`, (*dims,).

        Args:
            model: what is sampled from.
            times: start and end of the step, decreasing.
            x0: sample at its start, (*dims,).
            x1: sample at its end, (*dims,).
            key: of this step and hook only; None if the sampler was given none.
            cond: condition passed to the network.
        """
        ...


class Between(eqx.Module):
    """A solver, and a hook that is called between its steps and after the last one.

    For `jaxdiff.sampler`, which takes it apart: it is no diffrax solver. Hooks of a `Between` in a
    `Between` are called from the inside outwards, each with random numbers of its own. Any solver
    on a fixed grid will do, but a reversible one, whose state is a pair.

    Args:
        solver: the solver.
        hook: see `Hook`.

    Raises:
        ValueError: if `hook` cannot be called.

    Example:
        >>> import jaxdiff as jd
        >>> vp = jd.process.VP()
        >>> unit = jd.exact.gaussian(vp, jnp.zeros(2), 1.0)
        >>> def inside(model, times, x0, x1, key, cond):  # the box, on clean data
        ...     return jnp.clip(x1, -1, 1) if cond is None else x1
        >>> boxed = Between(jd.solvers.DDIM(), inside)
        >>> one = jd.sampler(unit, (2,), solver=boxed, ts=vp.grid(5))(jax.random.key(0))
        >>> bool(jnp.all(jnp.abs(one.x) <= 1))
        True
    """

    solver: Any
    hook: Hook

    def __check_init__(self) -> None:
        if not callable(self.hook) or isinstance(self.hook, type):
            expected = "a function (model, times, x0, x1, key, cond) -> x1"
            raise _check.bad("Between", "hook", expected, repr(self.hook))


@runtime_checkable
class LangevinStep(Protocol):
    """Any step that leaves the law at time `t` as it is: `(denoiser, t, x, z, cond) -> x`."""

    def __call__(
        self, denoiser: AbstractDenoiser, t: ScalarLike, x: Array, z: Array, cond: Any = None, /
    ) -> Array:
        """Step from `x` with the standard normals `z`, both (*dims,)."""
        ...


class Langevin(eqx.Module):
    r"""The corrector of predictor-corrector sampling: Langevin steps at the end of each step.

    $$ x \leftarrow x + \delta\,\nabla\log q_{t_1}(x) + \sqrt{2\delta}\,z, \qquad
       \delta = 2\left(r\,\frac{\|z\|}{\|\nabla\log q\|}\right)^2 \text{ (snr)}, \qquad
       \delta = 2(r\sigma_1)^2 \text{ (ald)} $$

    A hook: `Between(DPMpp2M(), Langevin())`. Where $x$ has variance v at $t_1$, the steps pull it
    towards $v\,/\,(1 - \delta/(2v))$: with the SNR rule, a share $r^2$ too much, however many there
    are. The norms are those of the one sample, where published code averages them over a batch:
    choose `"ald"` in fewer than about ten dimensions, in which $1/\|\nabla\log q\|^2$ has heavy
    tails. Published code for variance preserving paths also has a factor $1 - \beta_i$, which is
    close to 1. There is no corrector after the last step, so that the sample is free of its noise.

    Cost: `steps` network evaluations after every step but the last.

    Args:
        steps: Langevin steps after each step, at least 1.
        snr: r, positive; 0.01 to 0.2 in the paper.
        rule: of the step size, `"snr"` or `"ald"` (annealed Langevin dynamics).
        kernel: a step of another kind instead, `(denoiser, t, x, z, cond) -> x`, such as
            `fisher.Newton()`; `snr` and `rule` then have no meaning, and `nfe` counts one
            evaluation for each.

    Raises:
        ValueError: if an argument is none of these.

    References:
        Song et al. 2021 (2011.13456), algorithms 2 to 5; Song, Ermon 2019 (1907.05600) for `"ald"`.
    """

    steps: int = eqx.field(static=True, default=1)
    snr: float | Array = 0.16
    rule: Literal["snr", "ald"] = eqx.field(static=True, default="snr")
    kernel: LangevinStep | None = None

    stochastic = True
    last = False

    def __check_init__(self) -> None:
        _check.whole("Langevin", "steps", self.steps, 1)
        _check.number("Langevin", "snr", self.snr, sys.float_info.min, 1e6)
        _check.choice("Langevin", "rule", self.rule, ("snr", "ald"))
        if self.kernel is not None and (not callable(self.kernel) or isinstance(self.kernel, type)):
            expected = "a step (denoiser, t, x, z, cond) -> x, as fisher.Newton()"
            raise _check.bad("Langevin", "kernel", expected, repr(self.kernel))

    @property
    def evaluations(self) -> int:
        """One of the network for each step."""
        return self.steps

    def __call__(
        self, model: Any, times: Any, x0: Array, x1: Array, key: PRNGKeyArray | None, cond: Cond
    ) -> Array:
        """Correct `x1`."""
        assert key is not None  # by stochastic
        for k in range(self.steps):
            z = jax.random.normal(stream(key, k), x1.shape, x1.dtype)
            x1 = self.langevin(model, times[1], x1, z, cond)
        return x1

    def langevin(
        self, denoiser: AbstractDenoiser, t: ScalarLike, x: Array, z: Array, cond: Cond = None
    ) -> Array:
        """Make one Langevin step at time `t` with the normals `z`, both (*dims,)."""
        if self.kernel is not None:
            return self.kernel(denoiser, t, x, z, cond).astype(x.dtype)
        score = denoiser.score(t, x, cond)
        if self.rule == "snr":
            size = self.snr**2 * jnp.sum(z**2) / jnp.sum(score**2)
        else:
            size = (self.snr * denoiser.process.sigma(t)) ** 2
        return (x + 2 * size * score + 2 * jnp.sqrt(size) * z).astype(x.dtype)
