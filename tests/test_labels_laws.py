"""Laws that a recovered label obeys whatever the numbers: the simplex, symmetries, precision."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from photographs import crops
from torch import Tensor
from torch.nn import functional as F

from gradleak.labels.single import recover_single
from gradleak.labels.verdict import LabelResult
from gradleak.softlabels import FAMILIES, soft_label

BIASES = ("bias gradient", "gradient withheld", "no bias")
laws = settings(max_examples=50, deadline=None, derandomize=True, database=None)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Sample:
    """A head, the feature (1, D) that enters it and the soft label (C,), all float64."""

    feature: Tensor
    weight: Tensor
    bias: Tensor | None
    label: Tensor
    family: str
    withheld: bool

    def share(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor | None]:
        """Return the gradients of weight and bias that autograd computes in ``dtype``."""
        weight = self.weight.to(dtype, copy=True).requires_grad_()
        bias = None if self.bias is None else self.bias.to(dtype, copy=True).requires_grad_()
        logits = F.linear(self.feature.to(dtype), weight, bias)
        loss = F.cross_entropy(logits, self.label[None].to(dtype))
        wanted = [weight] if bias is None else [weight, bias]
        grads = torch.autograd.grad(loss, wanted)
        return grads[0], None if self.withheld or bias is None else grads[1]

    def attack(self, dtype: torch.dtype = torch.float64) -> LabelResult:
        grad_weight, grad_bias = self.share(dtype)
        weight = self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return recover_single(grad_weight, weight, bias=bias, grad_bias=grad_bias)


@st.composite
def samples(draw: st.DrawFn, signed: bool = False) -> Sample:
    """Draw a head of 6 to 60 classes on the pixels of a photograph, and a label of any family.

    ``signed`` centres the pixels, so that the feature has entries of both signs.
    """
    dice = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    classes, size = draw(st.integers(6, 60)), draw(st.integers(3, 8))
    feature = crops(size, 1, dice).flatten(1).double()
    feature = feature - feature.mean() if signed else feature
    assume(float(feature.norm()) > 0.1)  # a crop may show nothing but sky
    feature = feature / feature.norm()
    # Logits of a few units: uncertain predictions and confident ones, none of them saturated.
    size_of_logits = draw(st.floats(0.3, 4.0))
    weight = size_of_logits * torch.randn(classes, feature.shape[1], generator=dice).double()
    arrangement = draw(st.sampled_from(BIASES))
    bias = None if arrangement == "no bias" else 0.3 * torch.randn(classes, generator=dice).double()
    family = draw(st.sampled_from(FAMILIES[:4]))
    share, smooth = draw(st.floats(0.05, 0.95)), draw(st.floats(0.02, 0.5))
    first, second = torch.randperm(classes, generator=dice)[:2].tolist()
    pairs = [(first, share), (second, 1 - share)] if family.support == 2 else [(first, 1.0)]
    label = soft_label(pairs, classes, smooth if family.base else 0.0)
    return Sample(feature, weight, bias, label, family.name, arrangement == BIASES[1])


def answer(result: LabelResult, verdict: str = "unique") -> Tensor:
    assert result.verdict == verdict, result.reason
    assert result.labels is not None
    return result.labels[0]


def moved(sample: Sample, **changes: Tensor | None) -> Sample:
    return Sample(**{**vars(sample), **changes})


def assert_same(one: Tensor, other: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(one, other, rtol=0.0, atol=tolerance)


@laws
@given(samples(), st.sampled_from([torch.float32, torch.float64]))
def test_every_label_is_a_distribution(sample: Sample, dtype: torch.dtype) -> None:
    label = answer(sample.attack(dtype))
    assert label.shape == sample.label.shape
    assert float(label.sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(label.min()) >= 0.0


@laws
@given(st.integers(0, 2**31), st.integers(3, 40), st.booleans())
def test_an_arbitrary_label_is_answered_by_a_distribution(
    seed: int, classes: int, with_bias: bool
) -> None:
    dice = torch.Generator().manual_seed(seed)
    feature = crops(6, 1, dice).flatten(1).double()
    weight = torch.randn(classes, feature.shape[1], generator=dice).double()
    label = torch.rand(classes, generator=dice, dtype=torch.float64).softmax(0)
    bias = torch.zeros(classes, dtype=torch.float64) if with_bias else None
    result = Sample(feature, weight, bias, label, "arbitrary", False).attack()
    assert result.labels is not None
    assert float(result.labels.sum()) == pytest.approx(1.0, abs=1e-12)
    assert float(result.labels.min()) >= 0.0


@laws
@given(samples())
def test_float64_gradients_give_the_label_to_ten_digits(sample: Sample) -> None:
    result = sample.attack()
    assert result.family == sample.family
    assert_same(answer(result), sample.label, 1e-10)


@laws
@given(samples())
def test_float32_gradients_give_the_label_to_five_digits(sample: Sample) -> None:
    result = sample.attack(torch.float32)
    assert result.family == sample.family
    assert_same(answer(result), sample.label, 1e-5)


@laws
@given(samples(), st.integers(0, 2**31))
def test_the_order_of_the_classes_does_not_matter(sample: Sample, seed: int) -> None:
    order = torch.randperm(len(sample.label), generator=torch.Generator().manual_seed(seed))
    shuffled = moved(
        sample,
        weight=sample.weight[order],
        bias=None if sample.bias is None else sample.bias[order],
        label=sample.label[order],
    )
    assert_same(answer(shuffled.attack()), answer(sample.attack())[order], 1e-10)


@laws
@given(samples(), st.floats(-4.0, 4.0))
def test_the_unit_of_the_features_does_not_matter(sample: Sample, decades: float) -> None:
    factor = 10.0**decades
    scaled = moved(sample, feature=sample.feature * factor, weight=sample.weight / factor)
    one, other = sample.attack(), scaled.attack()
    assert_same(answer(other), answer(one), 1e-10)
    assert one.features is not None
    assert other.features is not None
    torch.testing.assert_close(other.features / factor, one.features, rtol=1e-8, atol=1e-10)


@laws
@given(samples(), st.integers(0, 2**31), st.floats(-20.0, 20.0))
def test_a_constant_on_all_logits_does_not_matter(sample: Sample, seed: int, shift: float) -> None:
    dice = torch.Generator().manual_seed(seed)
    row = shift * torch.randn(sample.weight.shape[1], generator=dice, dtype=torch.float64)
    bias = None if sample.bias is None else sample.bias + shift
    shifted = moved(sample, weight=sample.weight + row, bias=bias)
    assert_same(answer(shifted.attack()), answer(sample.attack()), 1e-9)


@laws
@given(samples(signed=True))
def test_features_may_have_both_signs(sample: Sample) -> None:
    assert float(sample.feature.min()) < 0.0 < float(sample.feature.max())
    result = sample.attack(torch.float32)
    assert_same(answer(result), sample.label, 1e-5)
    assert result.features is not None
    assert_same(result.features, sample.feature, 1e-4)


@laws
@given(samples(signed=True))
def test_turning_feature_and_weights_round_turns_the_feature_alone(sample: Sample) -> None:
    turned = moved(sample, feature=-sample.feature, weight=-sample.weight)
    one, other = sample.attack(), turned.attack()
    assert_same(answer(other), answer(one), 1e-10)
    assert one.features is not None
    assert other.features is not None
    assert_same(other.features, -one.features, 1e-8)
