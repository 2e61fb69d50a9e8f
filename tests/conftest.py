"""Settings of the whole suite: float64 unless a test says otherwise, and no silent broadcasting."""

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_threefry_partitionable", True)
