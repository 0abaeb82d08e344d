"""Batches whose samples hardly move the softmax: their labels are read off the rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from photographs import crops
from torch import Tensor
from torch.nn import functional as F

import gradleak
from gradleak.labels.options import LabelOptions
from gradleak.labels.single import recover_single
from gradleak.labels.verdict import LabelResult
from gradleak.softlabels import FAMILIES, Family, soft_label

CLASSES, WIDTH = 100, 192


def features(count: int) -> Tensor:
    return crops(8, count, torch.Generator().manual_seed(5)).flatten(1)


def attacked(
    labels: Tensor,
    x: Tensor,
    *,
    biased: bool = True,
    counted: bool = False,
    families: Sequence[Family] = FAMILIES,
) -> LabelResult:
    weight = torch.zeros(CLASSES, WIDTH, requires_grad=True)
    bias = torch.zeros(CLASSES, requires_grad=True)
    loss = F.cross_entropy(F.linear(x, weight, bias), labels.float())
    grads = torch.autograd.grad(loss, (weight, bias))
    return recover_single(
        grads[0],
        weight.detach(),
        bias=bias.detach(),
        grad_bias=grads[1] if biased else None,
        options=LabelOptions(families=families, batch_size=len(labels) if counted else None),
    )


def rows(*pairs: tuple[int, float]) -> Tensor:
    return torch.stack([soft_label([(k, 1.0)], CLASSES, smooth) for k, smooth in pairs])


def check_exact(found: LabelResult, labels: Tensor, x: Tensor) -> None:
    assert (found.verdict, found.method) == ("unique", "rows")
    assert found.labels is not None
    assert found.features is not None
    order = torch.cdist(labels.double(), found.labels).argmin(1)
    assert (found.labels[order] - labels).abs().max() < 1e-5
    assert (found.features[order] - x.double()).norm() < 1e-5 * x.norm()


@pytest.mark.parametrize("smooth", [0.0, 0.1])
def test_samples_of_different_classes_come_back_exactly(smooth: float) -> None:
    labels, x = rows(*((7 * n + 2, smooth) for n in range(8))), features(8)
    found = attacked(labels, x)
    check_exact(found, labels, x)


def test_hard_and_smooth_labels_are_told_apart() -> None:
    labels = rows((3, 0.0), (9, 0.2), (50, 0.0))
    found = attacked(labels, features(3))
    assert [(s.family, s.classes) for s in found.samples] == [
        ("hard", (3,)),
        ("smooth", (9,)),
        ("hard", (50,)),
    ]


def test_a_family_that_was_not_asked_for_is_not_given() -> None:
    labels = rows((3, 0.0), (9, 0.2), (50, 0.0))
    hard = tuple(family for family in FAMILIES if family.name == "hard")
    found = attacked(labels, features(3), families=hard)
    assert {s.family for s in found.samples} <= {"hard"}
    assert found.verdict != "unique"


def test_mixed_labels_come_back_exactly() -> None:
    labels = torch.stack(
        [
            soft_label([(3, 0.7), (80, 0.3)], CLASSES),
            soft_label([(9, 0.6), (11, 0.4)], CLASSES, 0.1),
            soft_label([(50, 1.0)], CLASSES),
        ]
    )
    found = attacked(labels, features(3))
    assert (found.verdict, found.method) == ("unique", "rows")
    assert {s.classes for s in found.samples} == {(3, 80), (9, 11), (50,)}
    assert found.labels is not None
    assert torch.cdist(labels.double(), found.labels).amin(1).max() < 1e-5


def test_a_class_of_a_hard_and_of_a_mixed_label_is_shared_out() -> None:
    labels = torch.stack(
        [
            soft_label([(3, 1.0)], CLASSES),
            soft_label([(9, 0.6), (3, 0.4)], CLASSES),
            soft_label([(11, 0.5), (60, 0.5)], CLASSES),
            soft_label([(60, 0.2), (61, 0.8)], CLASSES),
        ]
    )
    x = features(4)
    assert attacked(labels, x).verdict != "unique"  # of five samples two could be of class 3
    found = attacked(labels, x, counted=True)
    check_exact(found, labels, x)


def deep_network(outputs: int, seed: int) -> torch.nn.Module:
    """Return eight layers as torch initialises them, which bring all pictures nearly together."""
    torch.manual_seed(seed)
    widths = (3 * 256, 256, 128, 128, 64, 64, 64, 48, outputs)
    layers: list[torch.nn.Module] = [torch.nn.Flatten()]
    for inputs, outputs_ in pairwise(widths):
        layers += [torch.nn.Linear(inputs, outputs_), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


SHARED = {
    "smooth and mixed": [[(3, 1.0)], [(9, 0.6), (3, 0.4)], [(11, 1.0)], [(20, 1.0)]],
    "mixed between two": [[(3, 1.0)], [(9, 0.7), (3, 0.3)], [(9, 0.8), (20, 0.2)], [(11, 1.0)]],
}


@pytest.mark.parametrize("labels", SHARED.values(), ids=SHARED)
def test_a_class_that_a_mixed_label_shares_is_shared_out(
    labels: list[list[tuple[int, float]]],
) -> None:
    smooth = [0.1 * (len(weights) == 1) for weights in labels]
    soft = torch.stack([soft_label(w, 40, s) for w, s in zip(labels, smooth, strict=True)])
    images = crops(16, len(labels), torch.Generator().manual_seed(1))
    captured = gradleak.capture(deep_network(40, 1), images, soft)
    found = gradleak.recover_label(captured.bundle, batch_size=len(labels)).result
    assert (found.verdict, found.method) == ("unique", "rows")
    assert found.labels is not None
    assert torch.cdist(soft.double(), found.labels).amin(1).max() < 1e-5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_samples_that_hardly_move_the_softmax_are_read_off_the_rows(seed: int) -> None:
    model = deep_network(40, seed)
    images = crops(16, 6, torch.Generator().manual_seed(seed))
    labels = torch.stack([soft_label([(7 * k % 40, 1.0)], 40, 0.1 * (k % 2)) for k in range(6)])
    captured = gradleak.capture(model, images, labels)
    found = gradleak.recover_label(captured.bundle).result
    assert (found.verdict, found.method) == ("unique", "rows")
    assert found.labels is not None
    assert torch.cdist(labels.double(), found.labels).amin(1).max() < 1e-5


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
