"""A functional sampling toolkit for score-based models in JAX."""

from jaxdiff import exact as exact
from jaxdiff import grids as grids
from jaxdiff import process as process
from jaxdiff import score as score
from jaxdiff import solvers as solvers
from jaxdiff.sampling import Samples as Samples
from jaxdiff.sampling import check as check
from jaxdiff.sampling import draw as draw
from jaxdiff.sampling import sample as sample
from jaxdiff.score import Denoiser as Denoiser

__version__ = "0.1.0"
