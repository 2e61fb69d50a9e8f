"""A functional sampling toolkit for score-based models in JAX."""

from jaxdiff import grids as grids
from jaxdiff import process as process
from jaxdiff import score as score

__version__ = "0.1.0"
