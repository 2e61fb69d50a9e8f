"""How a solve went: one status for it, and NaN where it failed."""

from typing import Any

import diffrax as dfx
import jax.numpy as jnp
from jaxtyping import Array

SUCCESS = dfx.RESULTS.successful


def status(result: Any, *values: Array) -> Any:
    """Return `result`, or `RESULTS.nonfinite` where it is a success but a value is not finite."""
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(value)) for value in values]))
    nonfinite: Any = dfx.RESULTS.nonfinite
    return dfx.RESULTS.where((result == SUCCESS) & ~finite, nonfinite, result)


def first_failure(result: Any, later: Any) -> Any:
    """Return the first of two statuses that is a failure."""
    return dfx.RESULTS.where(result == SUCCESS, later, result)


def or_nan(result: Any, value: Array) -> Array:
    """Return `value` where the result is a success."""
    return jnp.where(result == SUCCESS, value, jnp.nan)
