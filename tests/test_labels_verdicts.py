"""What the gradient does not determine is said to be undetermined, and what is no gradient refused.

The truth must lie within what is stated: a confident wrong answer is the one unforgivable result.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from photographs import crops
from torch import Tensor
from torch.nn import functional as F

from gradleak.bundle import Bundle
from gradleak.errors import InputError, UsageError
from gradleak.labels.single import recover_single
from gradleak.labels.verdict import LabelResult
from gradleak.models.build import build_model
from gradleak.softlabels import families, soft_label
from gradleak.stages.capture import capture
from gradleak.stages.label import recover_label

EXACT = 1e-5


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Head:
    """A head of random weights and the pixels of photographs (N, D) that enter it."""

    feature: Tensor
    weight: Tensor
    bias: Tensor

    @property
    def logits(self) -> Tensor:
        return F.linear(self.feature, self.weight, self.bias)

    def share(self, label: Tensor, biased: bool = True) -> tuple[Tensor, Tensor]:
        """Return the gradients of weight and bias under mean softmax cross-entropy."""
        weight, bias = self.weight.clone().requires_grad_(), self.bias.clone().requires_grad_()
        logits = F.linear(self.feature, weight, bias if biased else bias * 0.0)
        loss = F.cross_entropy(logits, label.to(logits.dtype))
        grad_weight, grad_bias = torch.autograd.grad(loss, (weight, bias))
        return grad_weight, grad_bias


def head(classes: int, seed: int = 0, *, size: int = 8, scale: float = 1.0, count: int = 1) -> Head:
    """Draw a head; ``scale`` is about the standard deviation of its logits."""
    dice = torch.Generator().manual_seed(seed)
    feature = crops(size, count, dice).flatten(1)
    weight = torch.randn(classes, feature.shape[1], generator=dice)
    weight = weight * scale / feature.norm(dim=1).mean()
    return Head(feature, weight, 0.1 * torch.randn(classes, generator=dice))


def attack(
    sample: Head, label: Tensor, arrangement: str = "withheld", **options: Any
) -> LabelResult:
    """Attack the gradient of one sample: bias gradient ``given``, ``withheld``, or no bias."""
    grad_weight, grad_bias = sample.share(label[None], biased=arrangement != "none")
    return recover_single(
        grad_weight,
        sample.weight,
        bias=None if arrangement == "none" else sample.bias,
        grad_bias=grad_bias if arrangement == "given" else None,
        **options,
    )


def true_scale(sample: Head, result: LabelResult) -> float:
    """Return the scale s of x = s v; v is that of the answer."""
    assert result.features is not None
    direction = result.features[0] / result.samples[0].scale
    return float(sample.feature[0].double() @ direction)


def error(result: LabelResult, label: Tensor) -> float:
    assert result.labels is not None
    return float((result.labels[0] - label).abs().max())


def assert_interval_holds(result: LabelResult, sample: Head) -> None:
    scale = true_scale(sample, result)
    assert any(i.low <= scale <= i.high for i in result.intervals), (scale, result.intervals)


def assert_not_confident(result: LabelResult) -> None:
    assert result.verdict == "unidentifiable", result.reason
    assert result.reason
    assert result.samples[0].uncertainty() > 0.0


# Nothing there


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_zero_gradient_determines_nothing(with_bias: bool) -> None:
    sample = head(10)
    grad_bias = torch.zeros(10) if with_bias else None
    nothing = torch.zeros_like(sample.weight)
    result = recover_single(nothing, sample.weight, bias=sample.bias, grad_bias=grad_bias)
    assert (result.verdict, result.batch_size, result.labels) == ("unidentifiable", 0, None)
    assert "zero" in result.reason


# Too few classes


@pytest.mark.parametrize("smooth", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("seed", range(5))
def test_two_classes_need_a_bias_gradient(seed: int, smooth: float) -> None:
    sample, label = head(2, seed), soft_label([(seed % 2, 1.0)], 2, smooth)
    for arrangement in ("withheld", "none"):
        result = attack(sample, label, arrangement)
        assert_not_confident(result)
        assert "classes" in result.reason
        assert_interval_holds(result, sample)
    assert error(attack(sample, label, "given"), label) <= EXACT


@pytest.mark.parametrize(
    ("weights", "smooth", "enough"),
    [
        ([(0, 1.0)], 0.0, 3),
        ([(0, 1.0)], 0.2, 4),
        ([(0, 0.7), (1, 0.3)], 0.0, 4),
        ([(0, 0.7), (1, 0.3)], 0.2, 5),
    ],
)
def test_a_label_takes_as_many_classes_as_it_has_unknowns(
    weights: list[tuple[int, float]], smooth: float, enough: int
) -> None:
    for seed in range(4):
        for classes in range(3, 8):
            sample, label = head(classes, seed), soft_label(weights, classes, smooth)
            result = attack(sample, label)
            if classes < enough:
                assert_not_confident(result)
                assert_interval_holds(result, sample)
            else:
                assert result.verdict == "unique", (classes, seed, result.reason)
                assert error(result, label) <= EXACT + 6 * result.samples[0].uncertainty()


# Labels of no family


def arbitrary_label(classes: int, seed: int) -> Tensor:
    """Draw what a teacher network might say: no two classes alike."""
    dice = torch.Generator().manual_seed(seed)
    return torch.randn(classes, generator=dice, dtype=torch.float64).mul(1.5).softmax(0)


@pytest.mark.parametrize("classes", [5, 10, 100])
@pytest.mark.parametrize("seed", range(4))
def test_an_arbitrary_label_without_bias_gradient_is_an_interval(classes: int, seed: int) -> None:
    sample, label = head(classes, seed, scale=2.0), arbitrary_label(classes, seed)
    for arrangement in ("withheld", "none"):
        result = attack(sample, label, arrangement)
        assert_not_confident(result)
        assert result.family == "arbitrary"
        assert_interval_holds(result, sample)


@pytest.mark.parametrize("classes", [3, 10, 100, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_an_arbitrary_label_with_bias_gradient_is_exact(classes: int, seed: int) -> None:
    sample, label = head(classes, seed, scale=2.0), arbitrary_label(classes, seed)
    result = attack(sample, label, "given")
    assert (result.verdict, result.family, result.method) == ("unique", "arbitrary", "bias")
    assert error(result, label) <= 2e-6
    assert len(result.samples[0].classes) == classes


# Saturation


@dataclass(frozen=True)
class Saturated:
    """A confident prediction, a label of a family, and what the tool was given."""

    sample: Head
    label: Tensor
    family: str
    arrangement: str


def saturated(seed: int, smoothed: bool | None = None) -> Saturated:
    """Draw logits of a few hundred: a softmax that float32 rounds to one class or nearly so."""
    dice = random.Random(seed)
    sample = head(
        dice.choice([5, 6, 10, 17, 100, 1000]),
        seed,
        size=dice.choice([4, 6, 8]),
        scale=10 ** dice.uniform(0.8, 3.0),
    )
    classes = len(sample.bias)
    seen = int(sample.logits.argmax())
    # The predicted class, two others, or one of each: the label may agree with it or not.
    first, second = dice.choice([(0, 1), (1, 0), (1, 2)])
    family = dice.choice(["hard", "smooth", "mixup", "mixup+smooth"])
    smoothed = "smooth" in family if smoothed is None else smoothed
    weight = dice.uniform(0.02, 0.98) if "mixup" in family else 1.0
    pairs = [((seen + first) % classes, weight), ((seen + second) % classes, 1 - weight)]
    label = soft_label(pairs, classes, dice.uniform(0.01, 0.5) if smoothed else 0.0)
    return Saturated(sample, label, family, dice.choice(["given", "withheld", "none"]))


def test_a_saturated_softmax_never_gets_a_confident_wrong_answer() -> None:
    wrong, unique = [], 0
    for seed in range(240):
        case = saturated(seed)
        result = attack(case.sample, case.label, case.arrangement)
        if result.verdict != "unique":
            continue
        unique += 1
        allowed = EXACT + 10 * result.samples[0].uncertainty()
        if error(result, case.label) > allowed:
            wrong.append((seed, case.family, result.family, error(result, case.label), allowed))
    assert wrong == []
    assert unique >= 120  # where something is left of the rest, it determines the label


def test_a_saturated_softmax_is_never_called_a_failure() -> None:
    failed = []
    for seed in range(1000, 1120):
        case = saturated(seed)
        result = attack(case.sample, case.label, case.arrangement)
        if result.verdict == "failed":
            failed.append((seed, case.family, case.arrangement, result.reason))
    assert failed == []


def test_a_saturated_smooth_label_of_the_predicted_class_is_undetermined() -> None:
    sample = head(10, scale=1e3)
    seen = int(sample.logits.argmax())
    label = soft_label([(seen, 1.0)], 10, 0.2)
    result = attack(sample, label)
    assert result.verdict == "unidentifiable"
    assert "saturated" in result.reason
    assert_interval_holds(result, sample)
    assert error(attack(sample, label, "given"), label) <= EXACT


@pytest.mark.parametrize("smooth", [0.0, 0.3])
def test_a_mixture_with_the_predicted_class_of_a_saturated_softmax_is_undetermined(
    smooth: float,
) -> None:
    sample = head(6, 1, scale=1e3)
    seen = int(sample.logits.argmax())
    label = soft_label([(seen, 0.4), ((seen + 1) % 6, 0.6)], 6, smooth)
    # p = e_seen, so every share of the predicted class fits with a scale of its own.
    assert attack(sample, label).verdict in ("unidentifiable", "ambiguous")
    closed = attack(sample, label, "given")
    assert (closed.verdict, closed.family) == ("unique", "mixup+smooth" if smooth else "mixup")
    assert error(closed, label) <= EXACT + 10 * closed.samples[0].uncertainty()


# Not a gradient of softmax cross-entropy, or not of this head


@pytest.mark.parametrize("loss", ["sigmoid", "squares"])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_the_gradient_of_another_loss_is_refused(loss: str, classes: int) -> None:
    sample = head(classes)
    target = F.one_hot(torch.tensor([1]), classes).float()
    weight = sample.weight.clone().requires_grad_()
    logits = F.linear(sample.feature, weight, sample.bias)
    value = (
        F.binary_cross_entropy_with_logits(logits, target)
        if loss == "sigmoid"
        else F.mse_loss(logits, target)
    )
    (gradient,) = torch.autograd.grad(value, weight)
    with pytest.raises(InputError, match="columns of the head gradient sum to"):
        recover_single(gradient, sample.weight, bias=sample.bias)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_batch_is_counted_and_every_sample_found(count: int, with_bias: bool) -> None:
    sample = head(10, count=count)
    grad_weight, grad_bias = sample.share(torch.eye(10)[:count])
    given = grad_bias if with_bias else None
    result = recover_single(grad_weight, sample.weight, bias=sample.bias, grad_bias=given)
    assert (result.verdict, result.batch_size, result.rank) == ("unique", count, count)
    assert result.labels is not None
    assert float((result.labels - torch.eye(10)[:count]).abs().max()) <= 1e-5
    assert result.column_sums is not None


@pytest.mark.parametrize("arrangement", ["given", "withheld", "none"])
@pytest.mark.parametrize("family", ["hard", "smooth", "mixup", "mixup+smooth"])
def test_weights_of_another_step_never_give_a_unique_label(family: str, arrangement: str) -> None:
    pairs = [(0, 0.6), (1, 0.4)] if "mixup" in family else [(0, 1.0)]
    for seed in range(6):
        classes = (6, 10, 100)[seed % 3]
        sample = head(classes, seed, scale=2.0)
        label = soft_label(pairs, classes, 0.1 if "smooth" in family else 0.0)
        grad_weight, grad_bias = sample.share(label[None], biased=arrangement != "none")
        order = torch.randperm(classes, generator=torch.Generator().manual_seed(seed))
        result = recover_single(
            grad_weight,
            sample.weight[order],
            bias=None if arrangement == "none" else sample.bias,
            grad_bias=grad_bias if arrangement == "given" else None,
        )
        assert result.verdict != "unique", (seed, result.family, result.reason)


def test_a_bias_gradient_of_another_step_is_refused() -> None:
    sample = head(10)
    grad_weight, _ = sample.share(soft_label([(3, 1.0)], 10)[None])
    _, foreign = sample.share(soft_label([(4, 1.0)], 10)[None])
    for grad_bias in (foreign, torch.zeros(10)):
        with pytest.raises(InputError, match="do not belong together"):
            recover_single(grad_weight, sample.weight, bias=sample.bias, grad_bias=grad_bias)


# What the user asks for


@pytest.mark.parametrize("name", ["hard", "smooth", "mixup", "mixup+smooth"])
def test_a_family_that_is_named_is_the_only_one_considered(name: str) -> None:
    pairs = [(2, 0.7), (5, 0.3)] if "mixup" in name else [(2, 1.0)]
    sample = head(10)
    label = soft_label(pairs, 10, 0.2 if "smooth" in name else 0.0)
    told = attack(sample, label, families=families(name))
    assert (told.verdict, told.family) == ("unique", name)
    assert error(told, label) <= EXACT
    for other in {"hard", "smooth", "mixup", "mixup+smooth"} - {name}:
        result = attack(sample, label, families=families(other))
        # A larger family may hold the label with a parameter of nearly nothing; no other fits.
        assert result.family in (other, "arbitrary", None)
        if result.verdict == "unique":
            assert error(result, label) <= EXACT + 10 * result.samples[0].uncertainty()


def test_an_unknown_family_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="unknown label family 'softish'"):
        families("softish")


@pytest.mark.parametrize("smooth", [0.0, 0.2])
@pytest.mark.parametrize("withhold", [True, False])
def test_the_truth_beside_the_bundle_changes_nothing(
    tmp_path: Path, withhold: bool, smooth: float
) -> None:
    model = build_model("lenet", seed=3)
    label = soft_label([(7, 1.0)], 10, smooth)[None]
    image = crops(32, 1, torch.Generator().manual_seed(0))
    captured = capture(model, image, label, withhold_bias=withhold, device="cpu")
    results = []
    for folder in ("alone", "beside"):
        place = tmp_path / folder
        place.mkdir()
        captured.bundle.save(place / "grads.safetensors")
        if folder == "beside":
            captured.truth.save(place / "truth.safetensors")
        bundle = Bundle.open(place / "grads.safetensors")
        assert not [name for name in bundle if "truth" in name]
        results.append(recover_label(bundle, device="cpu").result)
    alone, beside = results
    assert alone.labels is not None
    assert beside.labels is not None
    assert torch.equal(alone.labels, beside.labels)
    assert alone.samples == beside.samples
    assert (alone.verdict, alone.reason) == (beside.verdict, beside.reason)


@pytest.mark.parametrize("noise", [1e-4, 1e-3])
def test_a_label_under_noise_lies_within_what_is_stated(noise: float) -> None:
    wrong = []
    for seed in range(30):
        sample, dice = head(10, seed), torch.Generator().manual_seed(seed)
        label = soft_label([(seed % 10, 0.7), ((seed + 3) % 10, 0.3)], 10, 0.2 * (seed % 2))
        gradient, _ = sample.share(label[None])
        gradient = gradient + noise * torch.randn(gradient.shape, generator=dice)
        result = recover_single(gradient, sample.weight, bias=sample.bias)
        assert result.noise == pytest.approx(noise, rel=0.1)
        assert result.labels is not None
        error = float((result.labels[0] - label).abs().max())
        if result.verdict == "unique" and error > EXACT + 6.0 * result.samples[0].uncertainty():
            wrong.append((seed, result.family, error))
    assert wrong == []


def test_a_float64_gradient_of_many_classes_is_not_taken_for_another_loss() -> None:
    sample = head(1000)
    exact = Head(sample.feature.double(), sample.weight.double(), sample.bias.double())
    label = soft_label([(7, 1.0)], 1000, 0.3)
    gradient, _ = exact.share(label[None])
    result = recover_single(gradient, exact.weight, bias=exact.bias)
    assert result.verdict == "unique"
    assert result.labels is not None
    assert float((result.labels[0] - label).abs().max()) < 1e-10
