"""The built-in kinds of layers; importing this enters them in the table."""

from gradleak.calculus.layers import (
    activation,
    convolution,
    linear,
    max_pooling,
    normalisation,
    pooling,
    rearrangement,
    rectifier,
)

__all__ = [
    "activation",
    "convolution",
    "linear",
    "max_pooling",
    "normalisation",
    "pooling",
    "rearrangement",
    "rectifier",
]
