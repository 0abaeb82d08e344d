"""How close an answer came to the truth: the only module that may see ground truth."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradleak.errors import GradleakError, InputError
from gradleak.images import to_uint8

# Classes of a label within this of each other count as equal.
LABEL_TOLERANCE = 1e-6
# SSIM's Gaussian window (sigma 1.5, cut at 3.5 sigma) spans 11 pixels.
_SSIM_WINDOW = 11


@dataclass(frozen=True)
class LabelScore:
    """How close N recovered labels came, in the order of the samples.

    ``l1`` sums the absolute errors over the classes (0 to 2 for labels on the simplex),
    ``max_error`` is the largest of them. ``top1``: the recovered label is largest at a class where
    the true one is. ``top_k``: the classes of the true label's support, those above its smallest
    value, are exactly the largest of the recovered one; ties with other classes do not count.
    """

    l1: tuple[float, ...]
    max_error: tuple[float, ...]
    top1: tuple[bool, ...]
    top_k: tuple[bool, ...]

    @property
    def top1_agreement(self) -> int:
        """The number of samples whose largest class is right."""
        return sum(self.top1)

    @property
    def top_k_agreement(self) -> int:
        """The number of samples whose support is right."""
        return sum(self.top_k)


@dataclass(frozen=True)
class ImageScore:
    """How close N recovered pictures came, in the order of the samples.

    ``psnr`` in dB (inf when equal) and ``ssim`` in [-1, 1] (nan below 11 pixels a side) of the
    pictures as they are and, ``_8bit``, as a PNG holds them; ``differing`` of ``total`` 8-bit
    values are not the same.
    """

    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    psnr_8bit: tuple[float, ...]
    ssim_8bit: tuple[float, ...]
    differing: tuple[int, ...]
    total: tuple[int, ...]


def match_samples(
    recovered: Tensor, true: Tensor, features: Sequence[tuple[Tensor, Tensor]] = ()
) -> Tensor:
    """Find each true sample of a batch among the recovered: an assignment (N,) int64.

    ``recovered`` (M, C) and ``true`` (N, C) are labels, ``features`` pairs (M, D), (N, D) of the
    same samples. The assignment has the least total of L1 distances of the labels, plus the
    relative errors of the features averaged over the pairs, which decide between samples of one
    label (the linear sum assignment problem; Jonker and Volgenant 1987). Of M < N samples the
    missing ones get -1. Rows that are not finite are placed last. Raises ``InputError`` for widths
    that differ and for M > N.
    """
    from scipy.optimize import (  # type: ignore[import-untyped, unused-ignore]
        linear_sum_assignment,
    )

    cost = _distances(recovered, true, "labels (N, C)", p=1.0)
    for answer, truth in features:
        apart = _distances(answer, truth, "vectors (N, D)", p=2.0)
        if apart.shape != cost.shape:
            raise InputError(
                f"features of {len(answer)} samples beside labels of {len(recovered)}",
                "score the features and the labels of one bundle",
            )
        size = torch.linalg.vector_norm(truth.detach().double(), dim=1, keepdim=True)
        cost = cost + torch.where(apart == 0, 0.0, apart / size) / len(features)
    finite = cost[cost.isfinite()]
    worst = 2 * float(finite.max()) + 1 if finite.numel() else 1.0
    cost = torch.where(cost.isfinite(), cost, worst)
    rows, columns = linear_sum_assignment(cost.cpu().numpy())
    assignment = torch.full((len(true),), -1, dtype=torch.int64)
    assignment[torch.as_tensor(rows)] = torch.as_tensor(columns, dtype=torch.int64)
    return assignment.to(recovered.device)


def label_errors(recovered: Tensor, true: Tensor) -> LabelScore:
    """Compare recovered with true labels, both (N, C), sample by sample.

    A true label without support (all classes equal) has its ``top_k`` found when the recovered one
    is as flat. Raises ``InputError`` for shapes that differ.
    """
    _require_alike(recovered, true, 2, "labels (N, C)")
    answer, truth = recovered.detach().double(), true.detach().double()
    error = (answer - truth).abs()
    finite = answer.isfinite().all(dim=1)

    near_largest = truth >= truth.amax(dim=1, keepdim=True) - LABEL_TOLERANCE
    is_largest = answer == answer.amax(dim=1, keepdim=True)
    top1 = (near_largest | ~is_largest).all(dim=1) & finite

    support = truth > truth.amin(dim=1, keepdim=True) + LABEL_TOLERANCE
    lowest_inside = answer.masked_fill(~support, math.inf).amin(dim=1)
    highest_outside = answer.masked_fill(support, -math.inf).amax(dim=1)
    flat = answer.amax(dim=1) - answer.amin(dim=1) <= LABEL_TOLERANCE
    top_k = torch.where(support.any(dim=1), lowest_inside > highest_outside, flat) & finite
    return LabelScore(
        l1=_floats(error.sum(dim=1)),
        max_error=_floats(error.amax(dim=1)),
        top1=tuple(bool(hit) for hit in top1),
        top_k=tuple(bool(hit) for hit in top_k),
    )


def relative_error(recovered: Tensor, true: Tensor) -> Tensor:
    """Return ||recovered - true|| / ||true|| (N,) of vectors (N, D), float64.

    A true vector of zeros gives 0 if recovered exactly, else inf. Raises ``InputError`` for shapes
    that differ.
    """
    _require_alike(recovered, true, 2, "vectors (N, D)")
    answer, truth = recovered.detach().double(), true.detach().double()
    distance = torch.linalg.vector_norm(answer - truth, dim=1)
    # 0 / 0 is the one case that division gets wrong.
    return torch.where(distance == 0, 0.0, distance / torch.linalg.vector_norm(truth, dim=1))


def psnr(recovered: Tensor, true: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio (N,) in dB, float64, of pictures (N, 3, H, W).

    The range is [0, 1], so it is -10 log10 of the mean squared error; inf when equal. Raises
    ``InputError`` for shapes that differ.
    """
    _require_alike(recovered, true, 4, "pictures (N, 3, H, W)")
    error = (recovered.detach().double() - true.detach().double()).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(error)


def ssim(recovered: Tensor, true: Tensor) -> Tensor:
    """Return the structural similarity (N,) in [-1, 1], float64, of pictures (N, 3, H, W).

    The range is [0, 1]; Gaussian window of 11 pixels, averaged over the places where it fits into
    the picture, nan where it fits nowhere. Raises ``InputError`` for shapes that differ. Source:
    Wang, Bovik, Sheikh and Simoncelli 2004.
    """
    _require_alike(recovered, true, 4, "pictures (N, 3, H, W)")
    if min(recovered.shape[2:]) < _SSIM_WINDOW:
        return torch.full((len(recovered),), math.nan, dtype=torch.float64)
    _, places = _import_ssim()(
        recovered.detach().double(),
        true.detach().double(),
        data_range=1.0,
        reduction="none",
        return_full_image=True,
    )
    # The library pads by reflection and its versions differ in whether they count the border.
    border = _SSIM_WINDOW // 2
    inside: Tensor = places[:, :, border:-border, border:-border]
    return inside.mean(dim=(1, 2, 3))


def pixels_that_differ(recovered: Tensor, true: Tensor) -> Tensor:
    """Count the 8-bit values (N,), of 3 H W each, that differ between pictures (N, 3, H, W).

    Raises ``InputError`` for shapes that differ or values that are not finite.
    """
    _require_alike(recovered, true, 4, "pictures (N, 3, H, W)")
    return (to_uint8(recovered) != to_uint8(true)).sum(dim=(1, 2, 3))


def image_score(recovered: Tensor, true: Tensor) -> ImageScore:
    """Compare recovered with true pictures, both (N, 3, H, W) in [0, 1], sample by sample.

    Raises ``InputError`` for shapes that differ or values that are not finite.
    """
    _require_alike(recovered, true, 4, "pictures (N, 3, H, W)")
    answer, truth = to_uint8(recovered).double() / 255, to_uint8(true).double() / 255
    return ImageScore(
        psnr=_floats(psnr(recovered, true)),
        ssim=_floats(ssim(recovered, true)),
        psnr_8bit=_floats(psnr(answer, truth)),
        ssim_8bit=_floats(ssim(answer, truth)),
        differing=tuple(int(count) for count in pixels_that_differ(recovered, true)),
        total=(recovered[0].numel(),) * len(recovered),
    )


def wilson_interval(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the interval of a success rate of ``successes`` in ``n``, within [0, 1].

    ``z`` is in standard deviations (95 % by default). No trials give (0, 1): nothing is known.
    Raises ``InputError`` unless 0 <= successes <= n. Source: Wilson 1927.
    """
    if not 0 <= successes <= n:
        raise InputError(f"{successes} successes in {n} trials", "count again")
    if n == 0:
        return 0.0, 1.0
    rate, weight = successes / n, z * z / n
    centre = (rate + weight / 2) / (1 + weight)
    half = z * math.sqrt(rate * (1 - rate) / n + weight / (4 * n)) / (1 + weight)
    # At the ends the bound is exactly 0 or 1, which rounding misses.
    return (
        0.0 if successes == 0 else max(0.0, centre - half),
        1.0 if successes == n else min(1.0, centre + half),
    )


def _require_alike(recovered: Tensor, true: Tensor, ndim: int, what: str) -> None:
    """Refuse shapes that differ, have another number of dimensions, or hold nothing."""
    if recovered.shape != true.shape or true.ndim != ndim or true.numel() == 0:
        raise InputError(
            f"shapes {tuple(recovered.shape)} and {tuple(true.shape)} cannot be compared",
            f"give two sets of {what} of one shape",
        )


def _distances(recovered: Tensor, true: Tensor, what: str, p: float) -> Tensor:
    """Return (N, M) the p-norm distances of rows, float64; refuse M > N and other widths."""
    if (
        not recovered.ndim == true.ndim == 2
        or recovered.shape[1] != true.shape[1]
        or not 0 < len(recovered) <= len(true)
    ):
        raise InputError(
            f"shapes {tuple(recovered.shape)} and {tuple(true.shape)} cannot be compared",
            f"give {what} of one width, and no more recovered than true ones",
        )
    return torch.cdist(
        true.detach().double(),
        recovered.detach().double(),
        p=p,
        compute_mode="donot_use_mm_for_euclid_dist",  # products would lose half the digits
    )


def _floats(values: Tensor) -> tuple[float, ...]:
    """Unpack (N,) into Python numbers."""
    return tuple(float(value) for value in values)


def _import_ssim() -> Callable[..., Any]:
    """Import torchmetrics' SSIM, which takes seconds, hence only here.

    torchmetrics imports torchvision wherever that is installed, and one that was built for another
    torch fails on import.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except (RuntimeError, ImportError) as error:
        raise GradleakError(
            f"torchmetrics cannot be imported ({str(error).splitlines()[0]})",
            f"install the torchvision made for torch {torch.__version__}, or none",
        ) from error
    return structural_similarity_index_measure
