"""Key streams: which key serves what."""

from typing import Any

import jax
from jaxtyping import PRNGKeyArray

# One stream per use, so that no key serves twice. Particle methods that couple samples add their
# own stream of the parent key.
INIT, SOLVER, PROBES, HOOK = 0, 1, 2, 3


def stream(key: PRNGKeyArray, index: Any) -> PRNGKeyArray:
    """Return the key of one numbered stream: a function of `(key, index)` and nothing else."""
    return jax.random.fold_in(key, index)
