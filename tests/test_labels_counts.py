"""Class counts of hard-labelled batches: right where the gradient shows them, refused elsewhere."""

from functools import lru_cache

import pytest
import torch
from photographs import crops
from torch import Tensor, nn
from torch.nn import functional as F

from gradleak import UsageError
from gradleak.labels.counts import ClassCounts, count_labels
from gradleak.labels.counts_fit import round_counts
from gradleak.models.build import build_model

Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@lru_cache(maxsize=1)
def lenet_features() -> tuple[nn.Linear, Tensor]:
    """Return an untrained LeNet's head and the features of 80 crops of photographs."""
    model = build_model("lenet", seed=2)
    seen: list[Tensor] = []
    model.fc.register_forward_hook(lambda _m, given, _o: seen.append(given[0]))
    with torch.no_grad():
        model(crops(32, 80, torch.Generator().manual_seed(0)))
    return model.fc, seen[0]


def batch(samples: int, seed: int, logits: float = 1.0) -> Batch:
    """Return head weight and bias, their gradients by autograd, and the counts; labels uneven."""
    head, features = lenet_features()
    dice = torch.Generator().manual_seed(seed)
    x = features[torch.randint(len(features), (samples,), generator=dice)]
    labels = (10 * torch.rand(samples, generator=dice).square()).long()
    weight = (logits * head.weight.detach()).requires_grad_()
    bias = head.bias.detach().clone().requires_grad_()
    if logits > 1.0:  # a network that is right and sure
        labels = F.linear(x, weight, bias).argmax(1)
    loss = F.cross_entropy(F.linear(x, weight, bias), labels)
    grad_weight, grad_bias = torch.autograd.grad(loss, (weight, bias))
    counts = labels.bincount(minlength=10)
    return weight.detach(), bias.detach(), grad_weight, grad_bias, counts


def recall(found: ClassCounts, truth: Tensor) -> float:
    return 1.0 - float((found.counts - truth).abs().sum()) / (2.0 * float(truth.sum()))


@pytest.mark.parametrize("samples", [8, 40, 400])
def test_an_untrained_networks_batch_is_counted(samples: int) -> None:
    weight, bias, grad_weight, grad_bias, truth = batch(samples, samples)
    found = count_labels(grad_weight, weight, bias, grad_bias, samples)
    assert found.consistent, found.reason
    assert recall(found, truth) >= (1.0 if samples < 100 else 0.97)
    assert int(found.counts.sum()) == samples
    assert found.counts.dtype == torch.int64
    assert float(found.fractions.sum()) == pytest.approx(1.0)
    assert float(found.fractions.min()) >= 0.0


@pytest.mark.parametrize("seed", range(4))
def test_without_a_bias_gradient_a_small_batch_is_counted(seed: int) -> None:
    weight, bias, grad_weight, _, truth = batch(6, seed)
    found = count_labels(grad_weight, weight, bias, None, 6)
    assert recall(found, truth) == 1.0


def test_without_a_bias_gradient_a_large_batch_leaves_the_scale_open() -> None:
    weight, bias, grad_weight, _, _ = batch(400, 1)
    found = count_labels(grad_weight, weight, bias, None, 400)
    assert not found.consistent
    assert "scale of their features open" in found.reason


def test_a_network_that_is_sure_leaves_no_counts() -> None:
    weight, bias, grad_weight, grad_bias, _ = batch(40, 3, logits=300.0)
    found = count_labels(grad_weight, weight, bias, grad_bias, 40)
    assert not found.consistent
    assert int(found.counts.sum()) == 40


def test_foreign_weights_do_not_give_consistent_counts() -> None:
    weight, bias, grad_weight, grad_bias, truth = batch(40, 4)
    foreign = 40.0 * weight.flip(0)
    found = count_labels(grad_weight, foreign, bias, grad_bias, 40)
    assert not found.consistent or recall(found, truth) > 0.9


def test_permuted_classes_give_permuted_counts() -> None:
    weight, bias, grad_weight, grad_bias, _ = batch(40, 5)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    one = count_labels(grad_weight, weight, bias, grad_bias, 40)
    two = count_labels(grad_weight[order], weight[order], bias[order], grad_bias[order], 40)
    assert torch.equal(one.counts[order], two.counts)


def test_it_works_inside_inference_mode() -> None:
    weight, bias, grad_weight, grad_bias, truth = batch(8, 0)
    with torch.inference_mode():
        given = [t.clone() for t in (grad_weight, weight, bias, grad_bias)]
        found = count_labels(*[t.double() for t in given], 8)
    assert recall(found, truth) == 1.0


def test_a_zero_gradient_says_nothing() -> None:
    weight = torch.ones(10, 4)
    found = count_labels(torch.zeros(10, 4), weight, None, None, 5)
    assert not found.consistent
    assert "zero" in found.reason
    assert int(found.counts.sum()) == 5
    with pytest.raises(UsageError, match="batch-size"):
        count_labels(torch.zeros(10, 4), weight, None, None, 0)


def test_counts_are_the_whole_numbers_next_to_the_shares() -> None:
    shares = torch.tensor([0.26, 0.24, 0.5, -0.1], dtype=torch.float64)
    assert round_counts(shares, 4).tolist() == [1, 1, 2, 0]
    assert round_counts(shares, 1).tolist() == [0, 0, 1, 0]
    assert round_counts(torch.full((3,), 1 / 3, dtype=torch.float64), 10).sum() == 10
