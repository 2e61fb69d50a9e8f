"""What is computed on the host before tracing, in float64."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer, eval_context

_NUMPY = (np.ndarray, np.generic)


def is_concrete(*trees: Any) -> bool:
    """Say whether no leaf is being traced, so that values may be looked at now."""
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees))


def _x64() -> Any:
    # jax.enable_x64 is the public name since 0.8; 0.7 has it under jax.experimental only.
    return (jax if hasattr(jax, "enable_x64") else jax.experimental).enable_x64(True)  # type: ignore


def _widen(leaf: Any) -> Any:
    if isinstance(leaf, bool) or not isinstance(leaf, (float, np.floating, np.ndarray, jax.Array)):
        return leaf
    if isinstance(leaf, (float, np.floating)) or jnp.issubdtype(leaf.dtype, jnp.floating):
        return np.array(leaf, np.float64)  # a copy, that no trace in another precision has seen
    return leaf


# Scalars per step are not worth optimised code: it takes four times as long to compile.
_HASTY: dict[str, Any] = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}


@functools.cache
def _hasty() -> Any:
    """Return `(fn, args) -> fn(*args)`, jitted with the options that this XLA knows."""
    known = {}
    for option, value in _HASTY.items():
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # no such option
            jax.jit(lambda: 0, compiler_options={option: value}).lower().compile()
            known[option] = value
    jit: Any = eqx.filter_jit
    return jit(lambda fn, args: fn(*args), compiler_options=known)


def host64(fn: Callable[..., Any], *args: Any) -> Any:
    """Evaluate `fn(*args)` in float64 on the host; fall back to plain tracing on traced arguments.

    Schedules and solver coefficients are scalars per step, so they are worth full precision even
    where the state is float32. `fn` must be a module-level function (or a bound method of a
    module): its compiled form is cached by identity.

    Returns:
        The result with NumPy float64 leaves if every argument is concrete, else with traced leaves
        in the ambient precision.
    """
    if is_concrete(fn, args):
        wide = jax.tree.map(_widen, (fn, args))
        # eval_context leaves any trace around this call; ensure_compile_time_eval would also fold
        # the constants inside it, each by a compilation of its own.
        with _x64(), eval_context(), jax.default_device(host_device()):
            out = _hasty()(*wide)
            return jax.tree.map(lambda a: np.asarray(a) if eqx.is_array(a) else a, out)
    return fn(*jax.tree.map(lambda a: jnp.asarray(a) if isinstance(a, _NUMPY) else a, args))


def host_device() -> Any:
    """Return the device of the host's own memory."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # a runtime started with the accelerator as its only platform
        return jax.local_devices()[0]
