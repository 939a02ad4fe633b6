"""Bodies of networks, for one expert or a stack."""

from mixdist.nets.conv import ConvDecoder, ConvEncoder, NormName, image_shape
from mixdist.nets.mlp import ACTIVATIONS, MLP, ActivationName, Affine, flat

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "ActivationName",
    "Affine",
    "ConvDecoder",
    "ConvEncoder",
    "NormName",
    "flat",
    "image_shape",
]
