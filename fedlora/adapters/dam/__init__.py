"""DiffoRA's Differential Adaptation Matrix (arXiv 2502.08905): which modules of a model get an adapter.

Knows no privacy: scores and updates come in from outside, already released, and all of this is a function of them and
of the model's shape.
"""

from fedlora.adapters.dam.discretisation import cost_aware, discretise, random_scores
from fedlora.adapters.dam.mask import Candidate, ModuleMask, overlap
from fedlora.adapters.dam.mask_file import read_mask
from fedlora.adapters.dam.products import UpdateProducts
from fedlora.adapters.dam.selection import Selection

__all__ = [
    "Candidate",
    "ModuleMask",
    "Selection",
    "UpdateProducts",
    "cost_aware",
    "discretise",
    "overlap",
    "random_scores",
    "read_mask",
]
