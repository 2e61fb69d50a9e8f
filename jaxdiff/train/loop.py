"""The training loop: steps until a number is reached, checkpoints, a bar, and clean failures."""

import math
import os
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from jaxdiff import _check
from jaxdiff._keys import stream
from jaxdiff.train import checkpoint
from jaxdiff.train.state import TrainState

__all__ = ["epochs", "fit"]

# Losses are fetched from the device once this many wait, or after this many seconds.
_PENDING, _SECONDS = 64, 0.2


def epochs(key: PRNGKeyArray, n: int, batch_size: int) -> Callable[[Any], Int[Array, " batch"]]:
    """Return a function from the step number to the indices of its batch.

    Epoch `e` visits the examples in the order of a permutation drawn from `fold_in(key, e)`, each
    at most once; the last `n % batch_size` of that order are left out. There is no state: a resumed
    run sees the batches that an uninterrupted one would. Cost: one permutation of `n` per call.

    Args:
        key: the key of the shuffling.
        n: number of examples.
        batch_size: examples in a batch, at most `n`.

    Returns:
        `indices(step) -> (batch_size,)`; the step may be traced.

    Raises:
        ValueError: if the sizes are not whole numbers with `1 <= batch_size <= n`.

    Example:
        >>> indices = epochs(jax.random.key(0), 4, 2)
        >>> sorted([*indices(0).tolist(), *indices(1).tolist()])
        [0, 1, 2, 3]
    """
    key = _check.key("epochs", "key", key)
    _check.whole("epochs", "batch_size", batch_size, 1)
    _check.whole("epochs", "n", n, batch_size)
    each = n // batch_size

    def indices(step: Any) -> Int[Array, " batch"]:
        order = jax.random.permutation(stream(key, step // each), n)
        return jax.lax.dynamic_slice(order, (step % each * batch_size,), (batch_size,))

    return jax.jit(indices)


@jax.jit
def _finite(tree: Any) -> Array:
    leaves = [jnp.all(jnp.isfinite(a)) for a in jax.tree.leaves(tree) if eqx.is_inexact_array(a)]
    return jnp.all(jnp.asarray(leaves, bool))


class _Progress:
    """A bar with the smoothed loss, or nothing at all where tqdm is missing."""

    def __init__(self, shown: bool, **kwargs: Any):
        self.bar, self.loss = None, None
        if shown:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self.bar = tqdm(unit="step", dynamic_ncols=True, **kwargs)

    def update(self, losses: list[float]) -> None:
        for loss in losses:
            self.loss = loss if self.loss is None else 0.98 * self.loss + 0.02 * loss
        if self.bar is not None and losses:
            self.bar.set_postfix_str(f"loss={self.loss:.4g}", refresh=False)
            self.bar.update(len(losses))

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def fit(
    state: TrainState,
    step: Callable[[Any, Any], tuple[Any, dict[str, Any]]],
    batch: Callable[[int], Any],
    *,
    steps: int,
    path: str | os.PathLike[str] | None = None,
    save_every: int = 500,
    progress: bool = True,
    description: str = "train",
) -> TrainState:
    """Train until `state.step == steps`, resuming from a newer checkpoint if `path` holds one.

    The batch and the randomness of a step are functions of its number, so that a run which was
    stopped and resumed ends bitwise where an uninterrupted one does. The device is not waited for
    at every step: losses are fetched a few times per second, and before every save.

    Args:
        state: where to start, from `init` or an earlier `fit`.
        step: the step, from `make_step`.
        batch: `batch(n)`, the batch of step `n`: a pure function, see `epochs`.
        steps: number of steps in the whole life of the state.
        path: directory of the checkpoints; None for no checkpoints.
        save_every: steps between checkpoints; there is one at the end too.
        progress: whether to show a bar (needs tqdm; goes without where it is missing).
        description: title of the bar.

    Returns:
        The state after `steps` steps.

    Raises:
        ValueError: if `steps` is less than the steps already done, or a number is not whole.
        CheckpointError: if `path` cannot be written, or the newest checkpoint there is unusable.
        RuntimeError: if a loss, or a parameter to be saved, is not finite. No such state is saved.
        KeyboardInterrupt: Ctrl-C, after saving the last finished step.
    """
    _check.whole("fit", "steps", steps, 0)
    _check.whole("fit", "save_every", save_every, 1)
    done = int(state.step)
    if path is not None:
        checkpoint.prepare(path)
        if (checkpoint.latest(path) or 0) > done:
            state = checkpoint.restore(path, state)
            done = int(state.step)
    if done > steps:
        raise _check.bad("fit", "steps", f"at least the {done} steps already done", steps)
    bar = _Progress(progress, total=steps, initial=done, desc=description)
    pending: list[tuple[int, Any]] = []
    hint = "" if path is None else f"; it was not saved, earlier checkpoints in {path} are intact"

    def fetch() -> None:
        losses = [float(loss) for loss in jax.device_get([loss for _, loss in pending])]
        for (n, _), loss in zip(pending, losses, strict=True):
            if not math.isfinite(loss):
                raise RuntimeError(f"fit: the loss of step {n} is {loss}{hint}")
        pending.clear()
        bar.update(losses)

    def save() -> None:
        fetch()
        if path is None or checkpoint.latest(path) == int(state.step):
            return
        if not _finite(state.params):
            raise RuntimeError(f"fit: step {done - 1} made params that are not finite{hint}")
        checkpoint.save(path, state)

    try:
        fetched = time.monotonic()
        while done < steps:
            state, metrics = step(state, batch(done))
            pending.append((done, metrics["loss"]))
            done += 1
            if done == steps or done % save_every == 0:
                save()
            elif len(pending) >= _PENDING or time.monotonic() - fetched > _SECONDS:
                fetch()
                fetched = time.monotonic()
    except KeyboardInterrupt:
        save()
        raise
    finally:
        bar.close()
    return state
