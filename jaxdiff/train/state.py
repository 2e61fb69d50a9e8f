r"""The training state and its one pure step: gradient, optimiser, moving average."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from jaxdiff import _check
from jaxdiff._keys import stream

__all__ = ["TrainState", "init", "make_step"]


class TrainState(NamedTuple):
    """All that training carries from step to step: what a checkpoint must hold.

    Attributes:
        step: number of steps done, int32, ().
        params: what is trained, any pytree of arrays.
        ema: moving average of `params`, floating leaves in float32.
        opt_state: state of the optimiser.
        key: the key of the run; step `n` uses `fold_in(key, n)`, so it never changes.
    """

    step: Int[Array, ""]
    params: PyTree
    ema: PyTree
    opt_state: PyTree
    key: PRNGKeyArray


def _wide(leaf: Any) -> Any:
    if not eqx.is_inexact_array(leaf):
        return leaf
    return leaf.astype(jnp.complex64 if jnp.iscomplexobj(leaf) else jnp.float32)


def init(key: PRNGKeyArray, params: PyTree, optimiser: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step.

    Args:
        key: the key of the run.
        params: a pytree of arrays; leaves that are not floating are carried, not trained.
        optimiser: any optax transformation; it sees the floating leaves.

    Raises:
        ValueError: if `key` is not one threefry key, or if a leaf of `params` is not an array.
    """
    key = _check.key("init", "key", key)
    for path, leaf in jax.tree.leaves_with_path(params):
        if not isinstance(leaf, (jax.Array, np.ndarray)):
            name = "params" + jax.tree_util.keystr(path)
            raise _check.bad("init", name, "an array", type(leaf).__name__)
    params = jax.tree.map(jnp.asarray, params)
    opt_state = optimiser.init(eqx.filter(params, eqx.is_inexact_array))
    return TrainState(
        jnp.asarray(0, jnp.int32), params, jax.tree.map(_wide, params), opt_state, key
    )


def make_step(
    loss_fn: Callable[[Any, Any, Any], tuple[Any, Any]],
    optimiser: optax.GradientTransformation,
    *,
    ema_decay: float = 0.999,
) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]:
    r"""Return the compiled step `(state, batch) -> (state, metrics)`.

    $$ \bar\theta \leftarrow \bar\theta + (1 - d_n)(\theta - \bar\theta), \qquad
       d_n = \min\left(d, \frac{1 + n}{10 + n}\right) $$

    after `n` earlier steps: the average forgets its start quickly. It is kept in float32, where a
    bfloat16 average would not move at all. The old state stays valid (no buffer is donated), so
    memory holds two states during a step.

    Args:
        loss_fn: `loss_fn(params, key, batch) -> (loss, aux)`, traceable.
        optimiser: the transformation that `init` was called with.
        ema_decay: $d$, in [0, 1).

    Returns:
        A jitted pure function. `metrics` holds `"loss"` and `"grad_norm"`, both (), and `"aux"`,
        all of the parameters before the update.

    Raises:
        ValueError: if `ema_decay` is outside [0, 1).
    """
    if not 0 <= ema_decay < 1:
        raise _check.bad("make_step", "ema_decay", "in [0, 1)", ema_decay)

    @jax.jit
    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        floating, rest = eqx.partition(state.params, eqx.is_inexact_array)

        def loss(floating: Any) -> tuple[Any, Any]:
            return loss_fn(eqx.combine(floating, rest), stream(state.key, state.step), batch)

        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(floating)
        updates, opt_state = optimiser.update(grads, state.opt_state, floating)
        params = eqx.combine(optax.apply_updates(floating, updates), rest)
        decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step)).astype(jnp.float32)

        def average(ema: Any, new: Any) -> Any:
            return ema + (1 - decay) * (_wide(new) - ema) if eqx.is_inexact_array(ema) else new

        ema = jax.tree.map(average, state.ema, params)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads), "aux": aux}
        return TrainState(state.step + 1, params, ema, opt_state, state.key), metrics

    return step
