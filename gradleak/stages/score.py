"""``score``: how close an answer came. The only stage that reads the truth; no attack calls it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gradleak.bundle import FEATURE, IMAGE, LABEL, Bundle
from gradleak.errors import IncompleteError, InputError
from gradleak.images import load_image
from gradleak.metrics import (
    ImageScore,
    LabelScore,
    image_score,
    label_errors,
    match_samples,
    relative_error,
)
from gradleak.truth import Truth

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Score:
    """What could be compared; None or empty where one side lacks it.

    ``order`` names the recovered sample of each of the N true ones, None where it is missing; the
    other fields are of those found, in the order of the true ones. ``features`` maps layers to the
    relative errors; ``image_note`` says what was done to the picture compared with.
    """

    labels: LabelScore | None
    features: dict[str, tuple[float, ...]]
    images: ImageScore | None
    image_note: str | None
    order: tuple[int | None, ...]

    @property
    def found(self) -> int:
        """The number of true samples that were recovered."""
        return sum(index is not None for index in self.order)


def score(
    recovered: Bundle | Tensor, *, truth: Truth | None = None, against: Path | str | None = None
) -> Score:
    """Compare recovered label, features and image with the truth, or an image with a picture file.

    ``recovered`` is a bundle, or an image (3, H, W) in [0, 1]. ``against`` is resized to the size
    of the recovered image as ``capture`` does. Samples of a batch are matched by their labels,
    and by their features where those are there; an answer may have fewer samples than the truth.
    Raises :class:`IncompleteError` when there is nothing to compare.
    """
    bundle = recovered if isinstance(recovered, Bundle) else None
    images = bundle.tensor(IMAGE) if bundle is not None and IMAGE in bundle else None
    if not isinstance(recovered, Bundle):
        images = recovered[None]
    labels = bundle.tensor(LABEL) if bundle is not None and LABEL in bundle else None
    found = _against_truth(bundle, labels, images, truth) if truth is not None else None
    if against is None:
        if found is None or (found.labels is None and not found.features and found.images is None):
            raise IncompleteError(
                "there is nothing to compare", "give --truth or --against, and a recovered bundle"
            )
        return found
    if images is None or len(images) != 1:
        count = 0 if images is None else len(images)
        raise IncompleteError(
            f"--against compares one image, and the bundle holds {count}",
            "run gradleak reconstruct first, or use --truth for a batch",
        )
    height, width = images.shape[-2:]
    loaded = load_image(against, width if height == width else None)
    compared = image_score(images, loaded.pixels[None])
    return Score(
        labels=found.labels if found else None,
        features=found.features if found else {},
        images=compared,
        image_note=loaded.note,
        order=found.order if found else (0,),
    )


def _against_truth(
    bundle: Bundle | None, labels: Tensor | None, images: Tensor | None, truth: Truth
) -> Score:
    features = {} if bundle is None else _features(bundle, truth)
    order = _match(labels, features, truth)
    there = [n for n, index in enumerate(order) if index is not None]
    index = [k for k in order if k is not None]
    if images is not None:
        beside = "the truth" if labels is None else "the label"
        _require_samples("the recovered image", images, beside, len(index))
    return Score(
        labels=None
        if labels is None
        else label_errors(labels.double()[index], truth.labels.double()[there]),
        features={
            name: _floats(relative_error(found[index], true[there]))
            for name, (found, true) in features.items()
        },
        images=None if images is None else image_score(images[index], truth.images[there]),
        image_note=None,
        order=order,
    )


def _features(bundle: Bundle, truth: Truth) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the recovered features (M, D) and the true ones (N, D) of the layers with both."""
    return {
        name: (bundle.tensor(FEATURE + name).double(), true.double())
        for name, true in truth.features.items()
        if FEATURE + name in bundle
    }


def _match(
    labels: Tensor | None, features: dict[str, tuple[Tensor, Tensor]], truth: Truth
) -> tuple[int | None, ...]:
    """Return the recovered sample of each true one; without labels they stand in its order."""
    count = len(truth.labels)
    if labels is None:
        for name, (found, _) in features.items():
            _require_samples(FEATURE + name, found, "the truth", count)
        return tuple(range(count))
    if labels.dim() != 2 or labels.shape[1:] != truth.labels.shape[1:] or len(labels) > count:
        raise InputError(
            f"the recovered labels are {list(labels.shape)} and the true ones "
            f"{list(truth.labels.shape)}",
            "score the bundle against the truth of the same capture",
        )
    for name, (found, _) in features.items():
        _require_samples(FEATURE + name, found, "the label", len(labels))
    matched = match_samples(labels.double(), truth.labels.double(), list(features.values()))
    return tuple(None if index < 0 else index for index in matched.tolist())


def _require_samples(what: str, recovered: Tensor, beside: str, count: int) -> None:
    if len(recovered) != count:
        raise InputError(
            f"{what} is of {len(recovered)} samples and {beside} of {count}",
            "score the bundle against the truth of the same capture",
        )


def _floats(values: torch.Tensor) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
