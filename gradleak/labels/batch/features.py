"""The features of a batch whose labels are known: which sample of the gradient is whose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradleak.errors import IncompleteError, InputError
from gradleak.labels.batch.judge import residual_of
from gradleak.labels.batch.recover import recover_batch
from gradleak.labels.factorise import Rank
from gradleak.labels.options import LabelOptions
from gradleak.linalg import matmul

# An entry of a label may be off by this much before label and gradient do not belong together.
_CONSISTENT, _SAME = 1e-2, 1e-9
_AGAIN = "run gradleak recover-label on this bundle"


@dataclass(frozen=True)
class BatchFeatures:
    """The head's inputs ``features`` (M, D) float64, of M labels out of ``samples`` = N.

    ``residual`` is that of the head gradient re-simulated from the samples, relative; ``method``
    how they were found.
    """

    features: Tensor
    samples: int
    residual: float
    method: str


def features_of_labels(
    grad_weight: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    rank: Rank,
    bias: Tensor | None = None,
    grad_bias: Tensor | None = None,
    options: LabelOptions | None = None,
    found_with: Tensor | None = None,
) -> BatchFeatures:
    """Recover the head's input of each of ``labels`` (M, C) from the gradient of their batch.

    Arguments as :func:`recover_batch` takes them, which finds label and feature of a sample
    together. The features (M, D) that the labels were ``found_with`` are kept if they explain the
    gradient. Otherwise the batch is solved again, with the ``options`` that the labels were found
    with, and its samples are assigned to the labels; rows with the same label may stand in any
    order.

    Raises :class:`InputError` for labels that are not those of the gradient, and
    :class:`IncompleteError` where its samples are not found.
    """
    if found_with is not None and found_with.shape == (len(labels), weight.shape[1]):
        logits = matmul(weight, found_with.T).T
        p = torch.softmax(logits if bias is None else logits + bias.double(), 1)
        residual = residual_of(grad_weight, p - labels, found_with, len(labels))
        if residual <= _CONSISTENT:
            return BatchFeatures(found_with, len(labels), residual, "label")
    found = recover_batch(
        grad_weight, weight, rank=rank, bias=bias, grad_bias=grad_bias, options=options
    )
    if found.labels is None or found.features is None or found.residual is None:
        raise IncompleteError(f"no feature was found: {found.reason}", "share less of the batch")
    given, count = len(labels), len(found.labels)
    if given != count and count == found.batch_size:
        raise InputError(f"{given} labels are given for a gradient of {count} samples", _AGAIN)
    if given != count:
        raise IncompleteError(
            f"{given} labels are given, and {count} of {found.batch_size} samples were found",
            _AGAIN,
        )
    recovered = found.labels.to(labels.device)
    order = torch.arange(count, device=labels.device)
    # Mostly they are the very labels of that recovery, as they were; to look costs nothing.
    if float((recovered - labels).abs().max()) > _SAME:
        order = _assign(labels, recovered)
    apart = float((recovered[order] - labels).abs().max())
    if apart > _CONSISTENT:
        raise InputError(f"the labels miss those of the head gradient by {apart:.2g}", _AGAIN)
    features = found.features[order.to(found.features.device)]
    return BatchFeatures(features, found.batch_size, found.residual, found.method)


def _assign(labels: Tensor, found: Tensor) -> Tensor:
    """Return (M,) the row of ``found`` (M, C) for each of ``labels``, least different together."""
    from scipy.optimize import (  # type: ignore[import-untyped, unused-ignore]
        linear_sum_assignment,
    )

    cost = torch.cdist(labels, found, p=torch.inf)
    _, order = linear_sum_assignment(cost.cpu().numpy())
    return torch.as_tensor(order, device=labels.device)
