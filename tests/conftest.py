"""Settings of the whole suite: float64 unless a test says otherwise, and no silent broadcasting."""

import gc
import os
from pathlib import Path

# Most of the time goes into compilation: code that runs once is not worth optimising. What is said
# of bits, memory and programs is tested with the optimiser: XLA_FLAGS="" pytest -m optimised
HASTY = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", HASTY)  # before the first computation

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_threefry_partitionable", True)

MAPS, MOST = Path("/proc/self/maps"), 20_000


@pytest.fixture(autouse=True)
def few_programs():
    """Forget compiled programs before they are too many.

    Each keeps some maps of memory, of which Linux gives a process 65,530 by default; then a
    compilation ends in a segmentation fault.
    """
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def as_users_see_it():
    """Turn the suite's type checks off, so that the library's own checks answer."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def defaults():
    """Run as a user does: float32, and broadcasting as JAX allows it."""
    jax.config.update("jax_enable_x64", False)
    jax.config.update("jax_numpy_rank_promotion", "allow")
    yield
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_rank_promotion", "raise")
