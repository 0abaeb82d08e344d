"""Batches at a head of zero weight, as torchvision's transformers begin."""

from __future__ import annotations

import pytest
import torch
from photographs import crops
from torch import Tensor
from torch.nn import functional as F

import gradleak
from gradleak.labels.single import recover_single
from gradleak.labels.verdict import LabelResult
from gradleak.softlabels import soft_label

CLASSES, WIDTH = 100, 192


def features(count: int) -> Tensor:
    return crops(8, count, torch.Generator().manual_seed(5)).flatten(1)


def attacked(labels: Tensor, x: Tensor, *, biased: bool = True) -> LabelResult:
    weight = torch.zeros(CLASSES, WIDTH, requires_grad=True)
    bias = torch.zeros(CLASSES, requires_grad=True)
    loss = F.cross_entropy(F.linear(x, weight, bias), labels.float())
    grads = torch.autograd.grad(loss, (weight, bias))
    return recover_single(
        grads[0],
        weight.detach(),
        bias=bias.detach(),
        grad_bias=grads[1] if biased else None,
    )


def rows(*pairs: tuple[int, float]) -> Tensor:
    return torch.stack([soft_label([(k, 1.0)], CLASSES, smooth) for k, smooth in pairs])


@pytest.mark.parametrize("smooth", [0.0, 0.1])
def test_samples_of_different_classes_come_back_exactly(smooth: float) -> None:
    labels, x = rows(*((7 * n + 2, smooth) for n in range(8))), features(8)
    found = attacked(labels, x)
    assert (found.verdict, found.method) == ("unique", "constant")
    assert found.labels is not None
    assert found.features is not None
    order = torch.cdist(labels.double(), found.labels).argmin(1)
    assert (found.labels[order] - labels).abs().max() < 1e-5
    assert (found.features[order] - x.double()).norm() < 1e-5 * x.norm()


def test_hard_and_smooth_labels_are_told_apart() -> None:
    labels = rows((3, 0.0), (9, 0.2), (50, 0.0))
    found = attacked(labels, features(3))
    assert [(s.family, s.classes) for s in found.samples] == [
        ("hard", (3,)),
        ("smooth", (9,)),
        ("hard", (50,)),
    ]


def test_samples_that_share_a_class_are_not_given_out_as_one() -> None:
    labels = rows((3, 0.0), (3, 0.0), (9, 0.0))
    found = attacked(labels, features(3))
    assert found.verdict != "unique"


def test_without_the_bias_gradient_nothing_is_claimed() -> None:
    labels = rows((3, 0.0), (9, 0.2), (50, 0.0))
    assert attacked(labels, features(3), biased=False).verdict != "unique"


def test_head_features_follow_from_the_labels() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(WIDTH, CLASSES))
    torch.nn.init.zeros_(model[1].weight)  # type: ignore[arg-type]
    torch.nn.init.zeros_(model[1].bias)  # type: ignore[arg-type]
    x = features(4).view(4, 3, 8, 8)
    captured = gradleak.capture(model, x, torch.tensor([5, 20, 41, 60]))
    labelled = gradleak.recover_label(captured.bundle)
    found = gradleak.recover_feature(labelled.bundle).layers[0].features.double()
    assert torch.cdist(x.flatten(1).double(), found).amin(1).max() < 1e-5
