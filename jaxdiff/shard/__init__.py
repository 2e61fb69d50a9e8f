"""The same entry points over many devices: a mesh, `jax.pmap`, many processes, many files."""

from jaxdiff.shard.entry import invert, log_prob, pmap_sample, sample
from jaxdiff.shard.files import read, sample_to
from jaxdiff.shard.mesh import gather
from jaxdiff.shard.oracle import ShardedEmpirical, empirical

__all__ = [
    "ShardedEmpirical",
    "empirical",
    "gather",
    "invert",
    "log_prob",
    "pmap_sample",
    "read",
    "sample",
    "sample_to",
]
