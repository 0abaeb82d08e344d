"""Batches under which the softmax hardly bends: their labels follow from moments in closed form."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from photographs import crops
from torch import Tensor
from torch.nn import functional as F

from gradleak.labels.batch.moments import moments_of
from gradleak.labels.batch.structures import Part, structures
from gradleak.labels.batch.subspace import Subspace, subspace_of
from gradleak.labels.factorise import Rank
from gradleak.labels.options import LabelOptions
from gradleak.labels.single import recover_single
from gradleak.labels.verdict import LabelResult
from gradleak.softlabels import FAMILIES, soft_label

CLASSES, WIDTH = 100, 192
# Two labels of class 3, a mixed one whose class 9 is shared, and others.
SHARED = [
    ([(3, 1.0)], 0.0),
    ([(3, 1.0)], 0.3),
    ([(9, 0.7), (12, 0.3)], 0.0),
    ([(9, 1.0)], 0.15),
    ([(20, 1.0)], 0.0),
    ([(41, 0.55), (77, 0.45)], 0.0),
    ([(60, 1.0)], 0.4),
    ([(98, 1.0)], 0.0),
]


def labels_of_batch() -> Tensor:
    return torch.stack([soft_label(parts, CLASSES, smooth) for parts, smooth in SHARED])


def drawn(spread: float) -> tuple[Tensor, Tensor]:
    """A head that spreads its logits so far, and features of photographs."""
    dice = torch.Generator().manual_seed(3)
    x = crops(8, len(SHARED), dice).flatten(1)
    bound = spread / math.sqrt(WIDTH)
    return torch.empty(CLASSES, WIDTH).uniform_(-bound, bound, generator=dice), x


def gradient(weight: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    weight = weight.clone().requires_grad_()
    loss = F.cross_entropy(F.linear(x, weight), labels.float())
    return torch.autograd.grad(loss, weight)[0]


def subspace(weight: Tensor, x: Tensor, labels: Tensor) -> Subspace:
    rank = Rank(rank=len(x), noise=1e-12, noisy=False)
    grads = gradient(weight, x, labels)
    return subspace_of(grads, weight, None, None, rank=rank, samples=len(x))


def attacked(weight: Tensor, x: Tensor, labels: Tensor) -> LabelResult:
    options = LabelOptions(families=FAMILIES, batch_size=len(x))
    return recover_single(gradient(weight, x, labels), weight, options=options)


def without_base(labels: Tensor) -> Tensor:
    return labels - labels.median(1, keepdim=True).values


def test_the_gram_matrix_of_the_labels_follows_from_the_gradient() -> None:
    weight, x = drawn(1.0)
    labels = labels_of_batch()
    found = moments_of(subspace(weight, x, labels))
    assert found is not None
    own = without_base(labels)
    assert found.labelled.tolist() == (own.abs().amax(0) > 1e-6).nonzero()[:, 0].tolist()
    own = own[:, found.labelled]
    assert (found.gram - own.T @ own).abs().max() < 0.02


def test_labels_that_share_a_class_are_told_apart_without_a_bias() -> None:
    weight, x = drawn(1.0)
    labels = labels_of_batch()
    found = attacked(weight, x, labels)
    assert (found.verdict, found.method) == ("unique", "moments")
    assert found.labels is not None
    assert found.features is not None
    order = torch.cdist(labels.double(), found.labels).argmin(1)
    assert len(order.unique()) == len(labels)
    assert (found.labels[order] - labels).abs().max() < 1e-3
    assert (found.features[order] - x.double()).norm() < 1e-3 * x.norm()


def test_where_the_softmax_bends_the_search_answers() -> None:
    weight, x = drawn(12.0)
    labels = labels_of_batch()
    found = attacked(weight, x, labels)
    assert (found.verdict, found.method) == ("unique", "subspace")
    assert found.labels is not None
    apart = torch.cdist(labels.double(), found.labels).amin(1)
    assert apart.max() < 1e-4


def parts_of(labels: Tensor) -> tuple[Tensor, list[int]]:
    own = without_base(labels)
    rests_on = (own.abs().amax(0) > 1e-6).nonzero()[:, 0]
    return own[:, rests_on], rests_on.tolist()


def test_the_labels_are_among_those_that_their_gram_matrix_allows() -> None:
    own, rests_on = parts_of(labels_of_batch())
    dice = torch.Generator().manual_seed(0)
    drawn_labels = itertools.islice(structures(own.T @ own, len(own), dice), 200)
    wanted = sorted(sorted(k for k, _ in parts) for parts, _ in SHARED)

    def classes(parts: list[Part]) -> list[list[int]]:
        return sorted(sorted(rests_on[place] for place in part.places) for part in parts)

    met = [parts for parts in drawn_labels if classes(parts) == wanted]
    assert len(met) > 20
    mixed = [part for part in met[0] if len(part.places) == 2]
    assert sorted(round(max(part.weights), 2) for part in mixed) == [0.55, 0.7]


@pytest.mark.parametrize("samples", [2, 40])
def test_a_gram_matrix_of_another_number_of_labels_is_read_as_none(samples: int) -> None:
    own, _ = parts_of(labels_of_batch())
    dice = torch.Generator().manual_seed(0)
    assert list(structures(own.T @ own, samples, dice)) == []
