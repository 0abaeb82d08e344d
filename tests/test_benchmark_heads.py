"""The referee of the label benchmarks and the label solver agree, without sharing code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gradleak.labels.single import recover_single
from gradleak.softlabels import soft_label

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from heads.cases import head_gradient
from heads.identifiable import Judgement, Truth, judge
from photographs import crops

LABELS = {
    "hard": ([(3, 1.0)], 0.0),
    "smooth": ([(3, 1.0)], 0.2),
    "mixup": ([(3, 0.7), (5, 0.3)], 0.0),
    "mixup+smooth": ([(3, 0.7), (5, 0.3)], 0.2),
}


def real_feature(width: int = 192) -> Tensor:
    """Return (width,) the pixels of a small square of a photograph."""
    side = round((width / 3) ** 0.5)
    return crops(side, 1, torch.Generator().manual_seed(0)).flatten()


def random_head(classes: int, spread: float, seed: int = 0) -> Tensor:
    """Return (C, D) weights whose logits on the feature have the standard deviation ``spread``."""
    x = real_feature()
    weight = torch.randn(classes, len(x), generator=torch.Generator().manual_seed(seed))
    return weight * spread / x.norm()


def judged(
    weight: Tensor, family: str, label: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Judgement]:
    """Return a gradient (C, D) of the label and what the referee says of it."""
    x = real_feature()
    gradient = head_gradient(x, label, weight, bias)
    return gradient, judge(Truth.of(gradient, x, label, weight, bias), family)


@pytest.mark.parametrize("family", LABELS)
@pytest.mark.parametrize(("classes", "spread"), [(10, 0.1), (10, 1.0), (10, 4.0), (100, 1.0)])
def test_what_the_referee_calls_identifiable_the_solver_finds(
    classes: int, family: str, spread: float
) -> None:
    weight = random_head(classes, spread)
    bias = torch.linspace(-1.0, 1.0, classes)
    label = soft_label(LABELS[family][0], classes, LABELS[family][1])
    gradient, judgement = judged(weight, family, label, bias)
    assert judgement.identifiable, judgement
    assert judgement.found, "the scan for rivals must meet the truth"
    assert 0.1 < judgement.misfit < 4.0, "the model of rounding is that of the rounding"
    found = recover_single(gradient, weight, bias=bias)
    assert found.verdict == "unique"
    assert found.labels is not None
    assert (found.labels[0] - label).abs().max() <= 1e-5


def saturated(family: str, classes: list[int]) -> tuple[Tensor, Tensor, Judgement]:
    """Return head, gradient and judgement where the softmax leaves others than class 3 nothing."""
    weight = random_head(10, 1.0)
    x = real_feature()
    weight[3] += 40.0 * x / x.square().sum()
    shares = [1.0] if len(classes) == 1 else [0.7, 0.3]
    label = soft_label(list(zip(classes, shares, strict=True)), 10, LABELS[family][1])
    gradient, judgement = judged(weight, family, label)
    return weight, gradient, judgement


@pytest.mark.parametrize(
    ("family", "classes", "reason"),
    [
        ("smooth", [3], "standard error"),
        ("mixup", [3, 5], ""),
        ("mixup+smooth", [3, 5], "standard error"),
        ("smooth", [5], "one more class"),
        ("mixup+smooth", [5, 6], "one more class"),
    ],
)
def test_of_a_saturated_softmax_both_say_what_it_keeps(
    family: str, classes: list[int], reason: str
) -> None:
    weight, gradient, judgement = saturated(family, classes)
    assert judgement.identifiable == (not reason)
    assert reason in judgement.reason
    found = recover_single(gradient, weight)
    assert (found.verdict == "unique") == judgement.identifiable, found.reason


def test_a_label_and_its_double_give_the_same_gradient() -> None:
    """Mixup+smooth with the class that the network is sure of, and smooth of the other class."""
    weight, gradient, _ = saturated("mixup+smooth", [5, 3])
    x = real_feature().double()
    delta = gradient.double() @ x / (x @ x)
    # The smooth label of class 5 whose base explains class 3, at another scale of the feature.
    rest = [c for c in range(10) if c not in (3, 5)]
    base = -delta[rest].mean()
    scale = delta[3] + base
    double = soft_label([(5, 1.0)], 10, float(10.0 * base / scale))
    p = F.softmax(weight.double() @ x * scale, 0)
    assert torch.allclose(delta / scale, p - double, atol=1e-6)
    assert (double - soft_label([(5, 0.7), (3, 0.3)], 10, 0.2)).abs().max() > 0.1


def test_too_few_classes_and_a_zero_gradient_determine_nothing() -> None:
    weight = random_head(4, 1.0)
    _, judgement = judged(weight, "smooth", soft_label([(1, 1.0)], 4, 0.2))
    assert judgement.identifiable
    _, judgement = judged(weight[:3], "smooth", soft_label([(1, 1.0)], 3, 0.2))
    assert judgement.reason == "no more equations than unknowns"
    x = real_feature()
    label = soft_label([(1, 1.0)], 4)
    zero = torch.zeros_like(weight)
    assert judge(Truth.of(zero, x, label, weight, None), "hard").reason == "the gradient is zero"


@pytest.mark.parametrize("seed", [25, 72, 206])
def test_a_root_beside_a_false_minimum_of_its_own_family_is_found(seed: int) -> None:
    """Two classes share the softmax; the label's small weight on one of them looks like either."""
    weight, bias, x = random_head(17, 16.0, seed), torch.zeros(17), real_feature()
    unit = x / x.square().sum()
    order = (weight @ x).argsort(descending=True)
    first, second, other = order[0], order[1], int(order[5])
    weight[second] = weight[first].roll(1)
    logits = weight @ x
    weight[second] += (logits[first] - logits[second] - 0.3) * unit
    bias[first] = 6.0
    weight[first] -= 6.0 * unit
    label = soft_label([(other, 0.996), (int(second), 0.004)], 17, 0.08)
    gradient, judgement = judged(weight, "mixup+smooth", label, bias)
    assert judgement.identifiable, judgement
    found = recover_single(gradient, weight, bias=bias)
    assert (found.verdict, found.family) == ("unique", "mixup+smooth")
    assert found.labels is not None
    assert (found.labels[0] - label).abs().max() <= 1e-5
