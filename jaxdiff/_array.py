"""What arrays and the callables on them are called, and the dtype of times."""

from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree, Real

Scalar: TypeAlias = Float[Array, ""]
if TYPE_CHECKING:
    ScalarLike: TypeAlias = float | Array | np.ndarray | np.floating
else:
    ScalarLike: TypeAlias = Real[ArrayLike, ""]
Cond: TypeAlias = PyTree[Any]
Prediction: TypeAlias = Literal["x0", "eps", "score", "v", "velocity"]


@runtime_checkable
class NetFn(Protocol):
    """Any pytree callable that maps one noisy sample to one prediction."""

    def __call__(self, t: Any, x: Any, cond: Any = None, /) -> Any:
        """Predict from time `t: ()`, sample `x: (*dims,)` and an optional condition."""
        ...


def time_dtype(dtype: Any) -> Any:
    """Return the dtype of times and coefficients for a state of `dtype`: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)
