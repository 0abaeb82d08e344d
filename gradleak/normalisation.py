"""From pictures in [0, 1] to what a network takes, and back."""

from collections.abc import Sequence

from torch import Tensor

from gradleak.errors import InputError


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Map pictures (N, C, H, W) in [0, 1] to network input: (pixels - mean) / std per channel.

    Raises ``InputError`` where ``mean`` and ``std`` are not C numbers, or a ``std`` is not
    positive.
    """
    centre, spread = _per_channel(pixels, mean, std)
    return (pixels - centre) / spread


def denormalise(inputs: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Map network input (N, C, H, W) back to pictures, unclipped: inputs * std + mean per channel.

    Raises ``InputError`` where ``mean`` and ``std`` are not C numbers, or a ``std`` is not
    positive.
    """
    centre, spread = _per_channel(inputs, mean, std)
    return inputs * spread + centre


def _per_channel(
    pixels: Tensor, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Shape mean and std as (1, C, 1, 1) for pictures (N, C, H, W), checked against them."""
    channels = pixels.shape[1] if pixels.ndim == 4 else -1
    if not channels == len(mean) == len(std):
        raise InputError(
            f"pictures of shape {tuple(pixels.shape)} with {len(mean)} means and {len(std)} stds",
            "give (N, C, H, W) and one mean and std a channel",
        )
    if not all(value > 0 for value in std):
        raise InputError(f"a standard deviation in {tuple(std)} is not positive", "mend the std")
    centre = pixels.new_tensor(list(mean)).view(1, -1, 1, 1)
    return centre, pixels.new_tensor(list(std)).view(1, -1, 1, 1)
