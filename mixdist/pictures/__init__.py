"""Pictures of a run, from numpy arrays. An expert has the same colour in every one of them."""

from mixdist.pictures.grids import CELL, Panel, experts_picture, mixture_picture, sample_picture, to_uint8
from mixdist.pictures.plots import (
    attributes_picture,
    contingency_picture,
    curves_picture,
    scatter_picture,
    training_picture,
)
from mixdist.pictures.rounds import rounds_picture

__all__ = [
    "CELL",
    "Panel",
    "attributes_picture",
    "contingency_picture",
    "curves_picture",
    "experts_picture",
    "mixture_picture",
    "rounds_picture",
    "sample_picture",
    "scatter_picture",
    "to_uint8",
    "training_picture",
]
