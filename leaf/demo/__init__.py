"""The built-in task: word problems with planted confounders, on which every claim of the method meets ground truth."""

from . import lengths as lengths
from . import long as long
from .comparison import run as run
from .comparison import summary as summary
