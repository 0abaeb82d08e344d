"""Many gradients in one call get the answers that each gets alone, and none spoils another's."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import CAT, run_cli
from photographs import crops
from torch import Tensor
from torch.nn import functional as F

import gradleak
from gradleak.bundle import GRAD, LABEL, PARAM, Bundle
from gradleak.errors import GradleakError, InputError, UsageError
from gradleak.labels import single
from gradleak.labels.single import recover_single, recover_singles
from gradleak.labels.verdict import LabelResult
from gradleak.softlabels import soft_label

SIZE, TAU = 6, 1e-4
LABELS = (
    ([(1, 1.0)], 0.0),
    ([(2, 1.0)], 0.2),
    ([(3, 0.7), (0, 0.3)], 0.0),
    ([(4, 0.4), (1, 0.6)], 0.1),
)
Answer = LabelResult | GradleakError


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Many:
    """Gradients (B, C, D) and (B, C) of one head, or of as many, and the true labels (B, C)."""

    grad_weight: Tensor
    weight: Tensor
    bias: Tensor
    grad_bias: Tensor
    labels: Tensor

    def at(self, index: Tensor | slice) -> "Many":
        one_head = self.weight.dim() == 2
        return Many(
            self.grad_weight[index],
            self.weight if one_head else self.weight[index],
            self.bias if one_head else self.bias[index],
            self.grad_bias[index],
            self.labels[index],
        )

    def attack(self, *, biased: bool) -> list[Answer]:
        grad_bias = self.grad_bias if biased else None
        return recover_singles(self.grad_weight, self.weight, bias=self.bias, grad_bias=grad_bias)

    def attack_each(self, *, biased: bool) -> list[Answer]:
        every = [self.at(slice(b, b + 1)) for b in range(len(self.labels))]
        return [one.attack(biased=biased)[0] for one in every]


def many(classes: int, count: int, *, heads: int = 1, dtype: torch.dtype = torch.float32) -> Many:
    """Draw gradients of photographs' pixels: all families, some with noise, some once bfloat16."""
    dice = torch.Generator().manual_seed(classes)
    features = crops(SIZE, count, dice).flatten(1).to(dtype)
    weight = torch.randn(heads, classes, features.shape[1], generator=dice).to(dtype) * 0.3
    bias = 0.1 * torch.randn(heads, classes, generator=dice).to(dtype)
    grads, labels = [], []
    for b in range(count):
        label = soft_label(LABELS[b % 4][0], classes, LABELS[b % 4][1]).to(dtype)
        own, shift = weight[b % heads].clone(), bias[b % heads].clone()
        own.requires_grad_()
        shift.requires_grad_()
        loss = F.cross_entropy(F.linear(features[b : b + 1], own, shift), label[None])
        grad, grad_bias = torch.autograd.grad(loss, (own, shift))
        if b % 3 == 1:
            grad = grad + TAU * torch.randn(grad.shape, generator=dice).to(dtype)
        if b % 7 == 2:
            grad = grad.bfloat16().to(dtype)
        grads.append((grad, grad_bias))
        labels.append(label)
    each = torch.arange(count) % heads
    return Many(
        torch.stack([grad for grad, _ in grads]),
        weight[0] if heads == 1 else weight[each],
        bias[0] if heads == 1 else bias[each],
        torch.stack([grad for _, grad in grads]),
        torch.stack(labels),
    )


def assert_same(one: Answer, other: Answer) -> None:
    """Hold two answers against each other to 1e-9, or two errors to the letter."""
    if isinstance(one, GradleakError) or isinstance(other, GradleakError):
        assert (type(one), str(one)) == (type(other), str(other))
        return
    names = ("verdict", "reason", "method", "family", "batch_size", "rank")
    assert [getattr(one, name) for name in names] == [getattr(other, name) for name in names]
    assert [s.classes for s in one.samples] == [s.classes for s in other.samples]
    for name in ("labels", "features"):
        first, second = getattr(one, name), getattr(other, name)
        assert (first is None) == (second is None)
        if first is not None:
            torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-9)
    for mine, its in zip(one.samples, other.samples, strict=True):
        assert mine.uncertainty() == pytest.approx(its.uncertainty(), rel=1e-6)
    assert one.noise == pytest.approx(other.noise, rel=1e-6)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("classes", "heads"), [(10, 1), (10, 23), (100, 1), (100, 3)])
def test_a_batch_is_its_gradients_one_by_one(
    classes: int, heads: int, dtype: torch.dtype, biased: bool
) -> None:
    drawn = many(classes, 23, heads=heads, dtype=dtype)
    together, alone = drawn.attack(biased=biased), drawn.attack_each(biased=biased)
    for one, other in zip(together, alone, strict=True):
        assert_same(one, other)
    right = [
        b
        for b, (result, label) in enumerate(zip(together, drawn.labels, strict=True))
        if isinstance(result, LabelResult)
        and result.labels is not None
        and float((result.labels[0] - label).abs().max()) < 1e-5
    ]
    clean = [b for b in range(23) if b % 3 != 1 and b % 7 != 2]
    assert set(clean) <= set(right)


@pytest.mark.parametrize("biased", [False, True])
def test_the_order_of_the_gradients_does_not_matter(biased: bool) -> None:
    drawn = many(30, 20, heads=5)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    shuffled = drawn.at(order).attack(biased=biased)
    straight = drawn.attack(biased=biased)
    for place, b in enumerate(order.tolist()):
        assert_same(shuffled[place], straight[b])


def test_a_batch_worked_on_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = many(10, 17, heads=17)
    whole = drawn.attack(biased=False)
    monkeypatch.setattr(single, "_CLASSES", 40)
    for one, other in zip(drawn.attack(biased=False), whole, strict=True):
        assert_same(one, other)


def test_no_gradient_spoils_another() -> None:
    drawn = many(10, 12, heads=12)
    good = drawn.attack(biased=True)
    bad = drawn.at(slice(None))
    bad.grad_weight[1] = 0.0
    bad.grad_weight[3, 2, 5] = float("nan")
    bad.grad_weight[5] += 1.0
    bad.grad_weight[6] += bad.grad_weight[8]
    bad.weight[9, 0, 0] = float("inf")
    bad.grad_bias[11] = bad.grad_bias[11].roll(1)
    found = bad.attack(biased=True)
    for b in (0, 2, 4, 7, 8, 10):
        assert_same(found[b], good[b])
    assert isinstance(found[1], LabelResult)
    assert "exactly zero" in found[1].reason
    assert isinstance(found[6], LabelResult)
    assert found[6].rank == 2
    reasons = {3: "gradient holds NaN", 5: "not a softmax", 9: "weight", 11: "belong together"}
    for b, reason in reasons.items():
        assert isinstance(found[b], InputError)
        assert reason in str(found[b])
        with pytest.raises(InputError, match=reason):
            recover_single(
                bad.grad_weight[b], bad.weight[b], bias=bad.bias[b], grad_bias=bad.grad_bias[b]
            )


def test_answers_may_take_part_in_autograd() -> None:
    for result in many(10, 4).attack(biased=False):
        assert isinstance(result, LabelResult)
        assert result.labels is not None
        assert result.features is not None
        total = result.labels.requires_grad_().sum() + result.features.requires_grad_().sum()
        total.backward()  # type: ignore[no-untyped-call]


def bundles(drawn: Many) -> list[Bundle]:
    """Put each gradient of one head into a bundle of its own, without the bias gradient."""
    return [
        Bundle({GRAD + "fc.weight": g, PARAM + "fc.weight": drawn.weight, PARAM + "fc.bias": b})
        for g, b in zip(drawn.grad_weight, [drawn.bias] * len(drawn.grad_weight), strict=True)
    ]


def test_the_stage_groups_by_shape_and_keeps_the_order() -> None:
    given: list[Bundle | GradleakError] = []
    ten, twelve = bundles(many(10, 6)), bundles(many(12, 6))
    for pair in zip(ten, twelve, strict=True):
        given += pair
    given.insert(5, InputError("not there"))
    given.insert(2, Bundle({GRAD + "fc.weight": torch.ones(10, 4)}))
    outcomes = list(gradleak.recover_labels(given, device="cpu"))
    assert len(outcomes) == len(given)
    assert outcomes[6] is given[6]
    assert isinstance(outcomes[2], GradleakError)
    assert "no param/fc.weight" in str(outcomes[2])
    for bundle, outcome in zip(given, outcomes, strict=True):
        if isinstance(bundle, GradleakError) or isinstance(outcome, GradleakError):
            continue
        alone = gradleak.recover_label(bundle, device="cpu")
        assert_same(outcome.result, alone.result)
        assert outcome.result.labels is not None
        assert torch.equal(outcome.bundle.tensor(LABEL), outcome.result.labels)
        assert outcome.bundle.stages[-1]["arguments"] == alone.bundle.stages[-1]["arguments"]


def test_the_stage_takes_bundles_only_as_it_needs_them() -> None:
    taken = []

    def endless() -> Iterator[Bundle]:
        (bundle,) = bundles(many(10, 1))
        while True:
            taken.append(bundle)
            yield bundle

    outcomes = gradleak.recover_labels(endless(), device="cpu")
    for _ in range(3):
        assert not isinstance(next(outcomes), GradleakError)
    assert len(taken) <= 1000


def test_a_wrong_option_is_told_before_any_bundle_is_read() -> None:
    with pytest.raises(UsageError, match="unknown label family"):
        gradleak.recover_labels([], family="magic")
    with pytest.raises(UsageError, match="unknown method"):
        gradleak.recover_labels([], method="magic")


def test_the_command_answers_in_the_order_of_its_inputs(tmp_path: Path) -> None:
    files = [str(tmp_path / f"{k}.safetensors") for k in range(4)]
    for k, model in enumerate(("lenet", "fcn4", "lenet", "lenet")):
        size = ("--size", 16) if model == "fcn4" else ()
        made = run_cli(
            "capture", "--model", model, *size, "--image", CAT, "--label", k, "-o", files[k], "-q"
        )
        assert made.code == 0
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    missing = str(tmp_path / "missing.safetensors")
    inputs = [files[0], missing, files[1], str(broken), files[2], files[3]]
    done = run_cli("recover-label", *inputs, "--json")
    reports = [json.loads(line) for line in done.out.splitlines()]
    assert [report["input"] for report in reports] == inputs
    verdicts = ["unique", "failed", "unique", "failed", "unique", "unique"]
    assert [report["verdict"] for report in reports] == verdicts
    classes = [r["samples"][0]["classes"][0] for r in reports if r["samples"]]
    assert classes == [0, 1, 2, 3]
    assert done.code == 3
    assert len(done.err.splitlines()) == 2
    alone = json.loads(run_cli("recover-label", files[2], "--json").out)
    assert alone.keys() == reports[4].keys()
    for name in ("verdict", "reason", "method", "family", "head", "device", "rank"):
        assert alone[name] == reports[4][name]
