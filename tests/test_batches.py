"""Every sample of a batch comes out of the head's gradient: label and feature, whatever family."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from conftest import run_cli, run_shell
from hypothesis import given, settings
from hypothesis import strategies as st
from photographs import centre, crops, photograph
from test_labels_single import pretrained
from torch import Tensor
from torch.nn import functional as F

from gradleak.bundle import FEATURE, GRAD, LABEL, Bundle
from gradleak.errors import InputError, UsageError
from gradleak.labels.single import recover_single
from gradleak.labels.verdict import LabelResult
from gradleak.metrics import match_samples
from gradleak.models.build import build_model
from gradleak.softlabels import MIXED, soft_label
from gradleak.stages.capture import Capture, capture
from gradleak.stages.feature import recover_feature
from gradleak.stages.label import recover_label
from gradleak.stages.reconstruct import reconstruct
from gradleak.stages.score import score

FAMILIES = ("hard", "smooth", "mixup", "mixup+smooth")
EXACT_LABEL, EXACT_FEATURE = 1e-5, 1e-4
LAW = 1e-4
"""What float32 may make of a batch of small, much alike features."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw_labels(
    families: Sequence[str], classes: int, dice: torch.Generator, *, shared: bool = True
) -> Tensor:
    """Draw a soft label of each of ``families``; of ``shared`` ones two have their first class."""
    drawn = torch.randperm(classes, generator=dice).tolist()
    rows = []
    for n, family in enumerate(families):
        first, second = drawn[2 * n : 2 * n + 2]
        first = drawn[0] if shared and n == 1 else first
        weight = 0.55 + 0.4 * float(torch.rand((), generator=dice))
        pairs = [(first, weight), (second, 1 - weight)] if "mixup" in family else [(first, 1.0)]
        rows.append(soft_label(pairs, classes, 0.2 if "smooth" in family else 0.0))
    return torch.stack(rows)


@lru_cache(maxsize=32)
def share(
    families: tuple[str, ...], *, withhold: bool = True, classes: int = 100, seed: int = 0
) -> Capture:
    """Capture the head's gradient of photographs through a network with a random head."""
    dice = torch.Generator().manual_seed(seed)
    name = "lenet" if classes == 10 else "resnet18-cifar"
    labels = draw_labels(families, classes, dice)
    return capture(
        build_model(name, classes=classes, seed=seed),
        crops(32, len(families), dice),
        labels,
        head_only=True,
        withhold_bias=withhold,
        device="cpu",
    )


def check(captured: Capture, families: Sequence[str]) -> None:
    """Attack a batch, and compare every label and feature with the truth."""
    labelled = recover_label(captured.bundle, device="cpu")
    result, count = labelled.result, len(captured.truth.labels)
    assert result.verdict == "unique", result.reason
    assert (result.batch_size, result.rank, len(result.samples)) == (count, count, count)
    assert sorted(sample.family for sample in result.samples) == sorted(families)
    assert result.family == (families[0] if len(set(families)) == 1 else MIXED)
    assert result.residual is not None
    assert result.residual <= 1e-6
    featured = recover_feature(labelled.bundle, device="cpu")
    assert (featured.verdict, featured.batch_size) == ("unique", count)
    (layer,) = featured.layers
    assert torch.equal(featured.bundle.tensor(FEATURE + layer.name), layer.features)
    assert layer.residual == featured.residual <= 1e-6
    scored = score(featured.bundle, truth=captured.truth)
    assert scored.labels is not None
    assert scored.found == count
    assert max(scored.labels.max_error) <= EXACT_LABEL
    assert all(scored.labels.top_k)
    assert max(scored.features[layer.name]) <= EXACT_FEATURE


# --- What is recovered --------------------------------------------------------------------------


@pytest.mark.parametrize("withhold", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_of_one_family(family: str, withhold: bool) -> None:
    families = (family,) * 5
    check(share(families, withhold=withhold), families)


@pytest.mark.parametrize("withhold", [True, False])
@pytest.mark.parametrize("count", [2, 4, 12])
def test_families_may_be_mixed_in_one_batch(count: int, withhold: bool) -> None:
    families = tuple(FAMILIES[n % 4] for n in range(count))
    check(share(families, withhold=withhold, seed=count), families)


def test_all_samples_may_be_of_one_class() -> None:
    dice = torch.Generator().manual_seed(3)
    model = build_model("resnet18-cifar", classes=100)
    labels = soft_label([(7, 1.0)], 100)[None].expand(2, -1)
    captured = capture(model, crops(32, 2, dice), labels, head_only=True, device="cpu")
    check(captured, ("hard",) * 2)


def test_two_samples_of_one_class_may_be_of_different_families() -> None:
    families = ("mixup+smooth", "smooth")
    check(share(families, seed=8), families)


def test_a_trained_network_gives_its_batch_away() -> None:
    model, spec = pretrained()
    images = torch.cat([centre(name, 224) for name in ("chelsea", "coffee", "rocket")])
    labels = torch.stack(
        [
            soft_label([(285, 1.0)], 1000, 0.1),  # an Egyptian cat, which the network sees
            soft_label([(967, 0.7), (285, 0.3)], 1000),
            soft_label([(967, 1.0)], 1000),  # a rocket, called espresso
        ]
    )
    captured = capture(
        model, images, labels, spec=spec, head_only=True, withhold_bias=True, device="cpu"
    )
    check(captured, ("smooth", "mixup", "hard"))


# --- What is not, and is said -------------------------------------------------------------------


def test_a_partial_answer_is_given_and_called_so() -> None:
    captured = share(("hard", "smooth", "hard", "smooth"), seed=4)
    labelled = recover_label(captured.bundle, family="hard", device="cpu")
    result = labelled.result
    assert (result.verdict, result.batch_size, len(result.samples)) == ("failed", 4, 2)
    assert "2 of 4 samples were found" in result.reason
    featured = recover_feature(labelled.bundle, device="cpu")
    assert (featured.verdict, featured.batch_size) == ("failed", 4)
    assert featured.reason == "the label they rest on is failed"
    assert featured.layers[0].features.shape == (2, 512)
    scored = score(featured.bundle, truth=captured.truth)
    assert [index is None for index in scored.order] == [False, True, False, True]
    assert scored.labels is not None
    assert max(scored.labels.max_error) <= EXACT_LABEL
    assert max(scored.features["fc"]) <= EXACT_FEATURE


@pytest.mark.parametrize(("count", "solved"), [(8, True), (9, False), (12, False)])
def test_too_few_classes_for_a_batch_leave_it_open(count: int, solved: bool) -> None:
    captured = capture(
        build_model("lenet"),
        crops(32, count, torch.Generator().manual_seed(5)),
        torch.arange(count) % 10,
        withhold_bias=True,
        device="cpu",
    )
    result = recover_label(captured.bundle, device="cpu").result
    assert result.batch_size == count
    # C − 1 equations a direction: with N = C − 1 samples there is none to spare.
    assert result.verdict == ("unique" if solved else "unidentifiable"), result.reason
    if solved:
        assert result.labels is not None
        assert result.labels.argmax(1).tolist() == list(range(8))
    else:
        assert f"{count} samples in 10 classes" in result.reason


def test_the_number_of_samples_can_be_given() -> None:
    captured = share(("hard", "smooth", "mixup"), seed=6)
    bare = Bundle({name: captured.bundle.tensor(name) for name in captured.bundle})
    one, other = (recover_label(bare, batch_size=n, device="cpu") for n in (None, 3))
    assert (one.result.verdict, one.result.batch_size) == ("unique", 3)
    assert one.result.labels is not None
    assert other.result.labels is not None
    assert torch.equal(one.result.labels, other.result.labels)
    assert other.bundle.stages[-1]["arguments"]["batch_size"] == 3
    assert recover_feature(other.bundle, device="cpu").verdict == "unique"
    # Of four, one is not to be seen: two of equal features, perhaps.
    four = recover_label(bare, batch_size=4, device="cpu").result
    assert (four.verdict, four.batch_size, four.rank) == ("failed", 4, 3)
    with pytest.raises(UsageError, match="batch size 0 is below 1"):
        recover_label(bare, batch_size=0)


def test_a_batch_through_an_mlp_gives_the_inputs_of_all_layers() -> None:
    labels = torch.stack([soft_label([(k, 1.0)], 17, 0.1) for k in (3, 5)])
    images = crops(16, 2, torch.Generator().manual_seed(0))
    network = build_model("fcn4", size=16)
    captured = capture(network, images, labels, device="cpu")
    outcome = recover_feature(recover_label(captured.bundle, device="cpu").bundle, device="cpu")
    assert [layer.name for layer in outcome.layers] == ["fc4", "fc3", "fc2", "fc1"]
    assert (outcome.verdict, outcome.batch_size, outcome.stopped) == ("unique", 2, None)
    scored = score(outcome.bundle, truth=captured.truth)
    assert max(max(errors) for errors in scored.features.values()) <= EXACT_FEATURE
    pictures = reconstruct(outcome.bundle, model=network, device="cpu")
    assert (pictures.verdict, pictures.method) == ("unique", "mlp")
    away = (pictures.images[:, None] - images).abs().amax((2, 3, 4)).amin(0)
    assert float(away.max()) < 1e-5


# --- Labels that do not belong to the gradient --------------------------------------------------


def test_labels_and_gradient_must_be_of_as_many_samples() -> None:
    two, one = share(("hard", "smooth")), share(("smooth",))
    labels = [recover_label(captured.bundle, device="cpu").bundle for captured in (two, one)]
    of_two, of_one = (bundle.tensor(LABEL) for bundle in labels)
    with pytest.raises(InputError, match="1 labels are given for a gradient of 2 samples"):
        recover_feature(two.bundle.extended({LABEL: of_one}), device="cpu")
    with pytest.raises(InputError, match="2 labels are given for a gradient of 1 samples"):
        recover_feature(one.bundle.extended({LABEL: of_two}), device="cpu")


def test_the_labels_of_another_batch_are_refused() -> None:
    mine, other = share(("hard", "smooth")), share(("hard", "smooth"), seed=1)
    labels = recover_label(other.bundle, device="cpu").bundle.tensor(LABEL)
    with pytest.raises(InputError, match="the labels miss those of the head gradient by"):
        recover_feature(mine.bundle.extended({LABEL: labels}), device="cpu")


def test_features_stand_in_the_order_of_the_labels() -> None:
    labelled = recover_label(share(("hard", "smooth", "mixup")).bundle, device="cpu").bundle
    turned = labelled.extended({LABEL: labelled.tensor(LABEL).flip(0).contiguous()})
    one, other = (recover_feature(b, device="cpu").layers[0].features for b in (labelled, turned))
    assert torch.equal(one.flip(0), other)


def test_features_found_with_the_labels_are_kept_if_they_explain_the_gradient() -> None:
    labelled = recover_label(share(("hard", "smooth", "mixup")).bundle, device="cpu").bundle
    head = f"{FEATURE}{labelled.model.head}"
    kept = recover_feature(labelled, device="cpu")
    assert kept.method == "label"
    assert torch.equal(kept.layers[0].features, labelled.tensor(head))
    bare = Bundle({n: labelled.tensor(n) for n in labelled if n != head}, labelled.metadata)
    spoilt = labelled.extended({head: labelled.tensor(head).roll(1, 0)})
    for bundle in (bare, spoilt):
        again = recover_feature(bundle, device="cpu")
        assert again.method == "subspace"
        torch.testing.assert_close(again.layers[0].features, kept.layers[0].features)


# --- Laws ---------------------------------------------------------------------------------------

laws = settings(max_examples=6, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Batch:
    """A head, the features (N, D) that enter it and soft labels (N, C), all float64."""

    features: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor
    withheld: bool

    def attack(self, dtype: torch.dtype) -> LabelResult:
        """Share the gradients that autograd computes in ``dtype``, and recover the batch."""
        weight, bias = (t.to(dtype, copy=True).requires_grad_() for t in (self.weight, self.bias))
        logits = F.linear(self.features.to(dtype), weight, bias)
        loss = F.cross_entropy(logits, self.labels.to(dtype))
        grad_weight, grad_bias = torch.autograd.grad(loss, (weight, bias))
        return recover_single(
            grad_weight,
            weight.detach(),
            bias=bias.detach(),
            grad_bias=None if self.withheld else grad_bias,
        )

    def answer(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return labels and features of an attack, in the order of the true samples."""
        result = self.attack(dtype)
        assert result.verdict == "unique", result.reason
        assert result.labels is not None
        assert result.features is not None
        order = match_samples(result.labels, self.labels, [(result.features, self.features)])
        return result.labels[order], result.features[order]


def draw_batch(count: int, classes: int, seed: int, *, withheld: bool) -> Batch:
    """Draw photographs' pixels before a random head, with labels of all families."""
    dice = torch.Generator().manual_seed(seed)
    features = crops(6, count, dice).flatten(1).double()
    weight = 0.1 * torch.randn(classes, features.shape[1], generator=dice).double()
    bias = 0.1 * torch.randn(classes, generator=dice).double()
    families = [FAMILIES[(seed + n) % 4] for n in range(count)]
    labels = draw_labels(families, classes, dice, shared=False)
    return Batch(features, weight, bias, labels, withheld)


def batches() -> st.SearchStrategy[Batch]:
    """Draw batches of 2 to 4 samples before heads of 30 to 60 classes."""
    seeds = st.integers(0, 2**31)
    return st.builds(
        draw_batch, st.integers(2, 4), st.integers(30, 60), seeds, withheld=st.booleans()
    )


def assert_same(one: Tensor, other: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(one, other, rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("withheld", [True, False])
def test_float64_gradients_give_twelve_digits(withheld: bool) -> None:
    batch = draw_batch(3, 40, 1, withheld=withheld)
    labels, features = batch.answer(torch.float64)
    assert_same(labels, batch.labels, 1e-12)
    assert_same(features, batch.features, 1e-12)


def test_a_sample_is_not_taken_for_another_one_of_its_class() -> None:
    batch = draw_batch(2, 48, 0, withheld=True)
    pairs = ([(1, 0.9), (24, 0.1)], [(1, 1.0)])
    labels = torch.stack([soft_label(list(pair), 48, 0.2) for pair in pairs])
    twins = replace(batch, labels=labels)
    assert_same(twins.answer()[0], labels, LAW)


@laws
@given(batches())
def test_every_label_is_a_distribution(batch: Batch) -> None:
    labels, features = batch.answer()
    assert_same(labels.sum(1), torch.ones(len(labels), dtype=torch.float64), 1e-12)
    assert float(labels.min()) >= 0.0
    assert_same(labels, batch.labels, LAW)
    assert_same(features, batch.features, LAW)


@laws
@given(batches(), st.integers(0, 2**31))
def test_the_order_of_classes_and_of_samples_does_not_matter(batch: Batch, seed: int) -> None:
    dice = torch.Generator().manual_seed(seed)
    classes = torch.randperm(batch.labels.shape[1], generator=dice)
    rows = torch.randperm(len(batch.labels), generator=dice)
    shuffled = Batch(
        batch.features[rows],
        batch.weight[classes],
        batch.bias[classes],
        batch.labels[rows][:, classes],
        batch.withheld,
    )
    (labels, features), (moved, carried) = batch.answer(), shuffled.answer()
    assert_same(moved, labels[rows][:, classes], LAW)
    assert_same(carried, features[rows], LAW)


@laws
@given(batches(), st.floats(-3.0, 3.0))
def test_the_unit_of_the_features_does_not_matter(batch: Batch, decades: float) -> None:
    factor = 10.0**decades
    scaled = replace(batch, features=batch.features * factor, weight=batch.weight / factor)
    (labels, features), (same, carried) = batch.answer(), scaled.answer()
    assert_same(same, labels, LAW)
    assert_same(carried / factor, features, LAW)


@laws
@given(batches(), st.integers(0, 2**31), st.floats(-10.0, 10.0))
def test_a_constant_on_all_logits_does_not_matter(batch: Batch, seed: int, shift: float) -> None:
    dice = torch.Generator().manual_seed(seed)
    row = 0.01 * shift * torch.randn(batch.weight.shape[1], generator=dice, dtype=torch.float64)
    shifted = replace(batch, weight=batch.weight + row, bias=batch.bias + shift)
    assert_same(shifted.answer()[0], batch.answer()[0], LAW)


def test_a_seed_gives_one_answer_and_another_seed_the_same_labels() -> None:
    bundle = share(("hard", "smooth", "mixup", "mixup+smooth")).bundle
    runs = [recover_label(bundle, seed=seed, device="cpu").result for seed in (0, 0, 1)]
    for other in runs[1:]:
        assert other.labels is not None
        assert runs[0].labels is not None
        assert_same(runs[0].labels, other.labels, 0.0 if other is runs[1] else EXACT_LABEL)
    assert [runs[0].samples, runs[0].residual] == [runs[1].samples, runs[1].residual]


# --- From the shell -----------------------------------------------------------------------------


def test_a_batch_goes_through_the_pipe(tmp_path: Path) -> None:
    names = ("chelsea", "astronaut", "coffee", "rocket", "camera", "coins")
    pictures = " ".join(f"--image {photograph(name)} --label {n}" for n, name in enumerate(names))
    done = run_shell(
        f"gradleak capture --model lenet --mixup 0.7 --smooth 0.1 {pictures} --truth t"
        " --classes 40 -q -o - | gradleak recover-label -q -o - | gradleak recover-feature -q -o -"
        " | gradleak score --truth t --json",
        tmp_path,
    )
    assert done.code == 0, done.err
    assert done.object["found"] == 3
    for sample in done.object["samples"]:
        assert sample["label"]["max_error"] <= EXACT_LABEL
        assert sample["features"]["fc"] <= EXACT_FEATURE


def test_the_reports_of_a_batch(tmp_path: Path) -> None:
    captured = share(("hard", "hard", "smooth"), seed=2)
    path, truth = tmp_path / "b.safetensors", tmp_path / "t.safetensors"
    captured.bundle.save(path)
    captured.truth.save(truth)
    partial = run_cli("recover-label", path, "--family", "hard", "--json", "-o", path)
    assert (partial.code, partial.err) == (4, "")
    assert (partial.object["batch_size"], len(partial.object["samples"])) == (3, 2)
    done = run_cli("recover-feature", path, "--json", "-o", path)
    assert (done.code, done.object["batch_size"]) == (4, 3)
    (layer,) = done.object["layers"]
    assert (layer["name"], layer["width"], len(layer["norms"])) == ("fc", 512, 2)
    done = run_cli("score", path, "--truth", truth, "--json")
    assert (done.code, done.object["found"]) == (0, 2)
    assert [sample["recovered"] for sample in done.object["samples"]].count(None) == 1
    shown = run_cli("score", path, "--truth", truth).text
    assert "found 2 of 3" in shown
    assert "missing" in shown


def test_the_truth_beside_the_bundle_changes_nothing(tmp_path: Path) -> None:
    captured = share(("hard", "smooth", "mixup"))
    answers = []
    for folder in ("alone", "beside"):
        place = tmp_path / folder
        place.mkdir()
        captured.bundle.save(place / "grads.safetensors")
        if folder == "beside":
            captured.truth.save(place / "truth.safetensors")
        labelled = recover_label(Bundle.open(place / "grads.safetensors"), device="cpu")
        featured = recover_feature(labelled.bundle, device="cpu")
        answers.append(featured.bundle)
    alone, beside = answers
    assert set(alone) == set(beside) >= {LABEL, FEATURE + "fc", GRAD + "fc.weight"}
    for name in alone:
        assert torch.equal(alone.tensor(name), beside.tensor(name)), name


@pytest.mark.parametrize(("samples", "twins"), [(4, 1), (8, 2), (12, 3)])
def test_samples_that_the_network_hardly_tells_apart_are_found(samples: int, twins: int) -> None:
    network = build_model("fcn4", classes=50, size=32)
    images = crops(32, samples, torch.Generator().manual_seed(samples))
    labels = torch.arange(samples)
    labels[samples - twins :] = labels[:twins]  # as many classes have two samples
    captured = capture(network, images, labels)
    values = torch.linalg.svdvals(captured.bundle.tensor("grad/fc4.weight").double())
    weakest = float(values[samples - 1] / values[0])
    assert weakest < 1e-3
    labelled = recover_label(captured.bundle)
    assert labelled.result.verdict == "unique"
    assert labelled.result.labels is not None
    assert (labelled.result.labels.argmax(1).sort().values == labels.sort().values).all()
    found = recover_feature(labelled.bundle).layers[0].features
    true = captured.truth.features["fc4"].double()
    apart = torch.cdist(true, found).amin(1) / true.norm(dim=1)
    # Where they differ, float32's rounding comes back divided by the smallest singular value.
    assert float(apart.max()) < 8.0 * 2.0**-24 / weakest
    assert float(apart[twins : samples - twins].max()) < 1e-4
