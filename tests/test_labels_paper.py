"""The paper's own search works as described, and never claims more than the gradient holds."""

import math
from collections.abc import Iterator

import pytest
import torch
from conftest import Capture, assert_refused, run_cli
from photographs import centre, crops
from torch import Tensor

from gradleak import UsageError, recover_label
from gradleak.bundle import GRAD, LABEL, PARAM, Bundle
from gradleak.labels.paper import PaperFailure, failure_of, recover_paper
from gradleak.labels.paper_search import PaperOptions, RowProblem, search
from gradleak.labels.verdict import LabelResult
from gradleak.models.build import build_model
from gradleak.softlabels import soft_label
from gradleak.stages import capture as stage
from gradleak.stages.capture import mix_pairs

LABELS = {
    "hard": soft_label([(3, 1.0)], 10),
    "smooth": soft_label([(3, 1.0)], 10, 0.2),
    "mixup": soft_label([(3, 0.7), (5, 0.3)], 10),
    "mixup+smooth": soft_label([(3, 0.7), (5, 0.3)], 10, 0.2),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def lenet_on_a_cat(family: str) -> Bundle:
    """Capture an untrained LeNet without a bias in its head, as the paper has it."""
    model = build_model("lenet", options={"init": "paper", "head_bias": False}, seed=1)
    image = torch.cat([centre("chelsea", 32), centre("coffee", 32)])
    if "mixup" in family:
        image = mix_pairs(image, 0.7)
    label = LABELS[family][None]
    return stage.capture(model, image[:1], label, head_only=True, device="cpu").bundle


def head(weight: Tensor, feature: Tensor, label: Tensor) -> Tensor:
    """Return the gradient δ xᵀ of a head."""
    return torch.outer(torch.softmax(weight @ feature, 0) - label, feature)


def photograph_head(classes: int, size: int, logits: float) -> tuple[Tensor, Tensor]:
    """Return a random head without a bias, and the pixels of a photograph that enter it."""
    dice = torch.Generator().manual_seed(classes)
    feature = crops(size, 1, dice).flatten().double()
    weight = torch.randn(classes, len(feature), generator=dice, dtype=torch.float64)
    return logits * weight / feature.norm(), feature


def error(result: LabelResult, truth: Tensor) -> float:
    assert result.labels is not None
    return float((result.labels[0] - truth).abs().max())


@pytest.mark.parametrize("family", ["smooth", "mixup"])
def test_a_photographs_label_is_recovered_when_the_family_is_told(family: str) -> None:
    bundle = lenet_on_a_cat(family)
    outcome = recover_label(bundle, method="paper", family=family, device="cpu")
    result = outcome.result
    assert (result.verdict, result.method, result.family) == ("unique", "paper", family)
    assert error(result, LABELS[family]) < 1e-3
    (sample,) = result.samples
    assert error(result, LABELS[family]) <= 6.0 * sample.uncertainty() + 1e-9
    assert sample.classes == ((3,) if family == "smooth" else (3, 5))
    assert result.residual is not None
    assert result.residual < 1e-3
    assert torch.equal(outcome.bundle.tensor(LABEL), result.labels)  # type: ignore[arg-type]
    # It is the same feature that the engine finds, and the same scale.
    ours = recover_label(bundle, device="cpu").result
    assert ours.features is not None
    assert result.features is not None
    assert torch.allclose(result.features, ours.features, rtol=1e-3)
    assert math.isclose(sample.scale, ours.samples[0].scale, rel_tol=1e-3)


@pytest.mark.parametrize(
    ("family", "told"),
    [("smooth", "mixup"), ("mixup", "smooth"), ("mixup+smooth", "smooth")],
)
def test_a_family_told_wrongly_is_no_answer(family: str, told: str) -> None:
    bundle = lenet_on_a_cat(family)
    result = recover_label(bundle, method="paper", family=told, device="cpu").result
    assert result.verdict == "failed"
    assert failure_of(result) is PaperFailure.WRONG_FAMILY


def test_a_mixup_answer_to_a_smoothed_mixup_is_named_wrong() -> None:
    # The variance loss does not see a base, so it accepts; the gradient does see it.
    bundle = lenet_on_a_cat("mixup+smooth")
    result = recover_label(bundle, method="paper", family="mixup", device="cpu").result
    assert result.samples
    assert result.verdict == "failed"
    assert failure_of(result) is PaperFailure.WRONG_FAMILY


@pytest.mark.parametrize("told", ["smooth", "mixup"])
def test_a_hard_label_lies_at_the_edge_of_both_families(told: str) -> None:
    bundle = lenet_on_a_cat("hard")
    result = recover_label(bundle, method="paper", family=told, device="cpu").result
    assert result.verdict == "unique"
    assert error(result, LABELS["hard"]) < 1e-3


def test_a_saturated_head_shows_the_trivial_zero_and_is_never_called_unique() -> None:
    kinds = set()
    for shown in range(10):
        weight, feature = photograph_head(10, 8, 60.0)
        predicted = int((weight @ feature).argmax())
        label = soft_label([(shown, 1.0)], 10, 0.1)
        gradient = head(weight, feature, label).float()
        result = recover_paper(gradient, weight.float(), family="smooth")
        kinds.add(failure_of(result))
        if result.verdict == "unique":
            assert error(result, label) < 1e-3, (shown, predicted)
    assert kinds & {PaperFailure.TRIVIAL_ZERO, PaperFailure.ESCAPED}


def test_a_loss_that_stays_high_is_not_converged() -> None:
    weight, feature = photograph_head(100, 8, 3.0)
    label = soft_label([(7, 1.0)], 100, 0.1)
    gradient = head(weight, feature, label)
    blind = PaperOptions(tolerance=1e-30, steps=3, particles=3, rounds=1)
    result = recover_paper(gradient, weight, family="smooth", options=blind)
    assert result.verdict == "failed"
    assert failure_of(result) is PaperFailure.NOT_CONVERGED
    assert not result.samples


def test_an_answer_taken_too_early_is_said_to_be() -> None:
    weight, feature = photograph_head(100, 8, 3.0)
    label = soft_label([(7, 1.0)], 100, 0.1)
    gradient = head(weight, feature, label)
    early = PaperOptions(tolerance=1e-3, steps=0)
    result = recover_paper(gradient, weight, family="smooth", options=early)
    assert error(result, label) > 1e-3
    assert result.verdict == "failed"
    assert failure_of(result) in (PaperFailure.STOPPED_SHORT, PaperFailure.FALSE_MINIMUM)
    assert result.samples[0].uncertainty() > 1e-3


def test_the_loss_is_the_variance_of_the_smallest_entries() -> None:
    weight, feature = photograph_head(12, 4, 2.0)
    gradient = head(weight, feature, soft_label([(1, 0.6), (4, 0.4)], 12))
    problem = RowProblem.of(gradient, weight, None, 4.0)
    scales = torch.tensor([-3.0, 0.8, 2.5, 40.0], dtype=torch.float64)
    for support in (1, 2):
        expected = []
        for scale in scales.tolist():
            x = scale * problem.row
            y = torch.softmax(weight @ x, 0) - gradient[:, x.abs().argmax()] / x[x.abs().argmax()]
            expected.append(1000.0 * float(y.sort().values[: 12 - support].var()))
        assert problem.loss(scales, support).tolist() == pytest.approx(expected, rel=1e-9)
        for scale, loss in zip(scales, expected, strict=True):
            step = torch.tensor([-1e-6, 1e-6], dtype=torch.float64)
            low, high = problem.loss(scale + step, support).tolist()
            value, slope = problem.loss_and_slope(scale[None], support)
            assert float(value) == pytest.approx(loss, rel=1e-9)
            assert float(slope) == pytest.approx((high - low) / 2e-6, rel=1e-4)


def test_the_windows_grow_outwards_on_both_sides() -> None:
    smooth, mixup = PaperOptions().windows(1), PaperOptions().windows(2)
    assert smooth[:4] == [(0.7, 6.0), (-6.3, -1.0), (6.0, 26.0), (-26.3, -6.3)]
    assert min(smooth) == (-70.0, pytest.approx(-66.3))
    assert max(smooth) == (66.0, 70.0)
    assert mixup[2:] == [(6.0, 56.0), (-56.3, -6.3), (56.0, 100.0), (-100.0, pytest.approx(-56.3))]


def test_the_swarm_finds_what_the_walks_miss_and_the_seed_decides_how() -> None:
    weight, feature = photograph_head(10, 8, 8.0)
    gradient = head(weight, feature, soft_label([(2, 0.6), (8, 0.4)], 10))
    problem = RowProblem.of(gradient, weight, None, 1.0)
    still = PaperOptions(steps=0)

    def run(seed: int) -> tuple[float, str | None]:
        found = search(problem, 2, still, torch.Generator().manual_seed(seed))
        return found.scale, found.stage

    assert run(0) == run(0)
    assert run(0)[1] == run(1)[1] == "swarm"
    assert run(0)[0] != run(1)[0]
    # x = λ g_r, so the true λ is 1/δ_r.
    delta = torch.softmax(weight @ feature, 0) - soft_label([(2, 0.6), (8, 0.4)], 10)
    largest = delta[delta.abs().argmax()]
    assert run(0)[0] == pytest.approx(float(1.0 / largest), rel=1e-2)


def test_what_the_method_does_not_apply_to_is_said() -> None:
    weight = torch.randn(10, 20, generator=torch.Generator().manual_seed(0))
    zero = recover_paper(torch.zeros(10, 20), weight, family="smooth")
    assert zero.verdict == "unidentifiable"
    assert "zero" in zero.reason
    few = head(weight[:3], torch.ones(20), soft_label([(1, 1.0)], 3).float())
    assert recover_paper(few, weight[:3], family="mixup").verdict == "unidentifiable"
    two = head(weight, torch.ones(20), soft_label([(1, 1.0)], 10).float())
    two = two + head(weight, torch.linspace(0, 1, 20), soft_label([(2, 1.0)], 10).float())
    batch = recover_paper(two / 2, weight, family="smooth")
    assert (batch.verdict, batch.rank) == ("failed", 2)


@pytest.mark.parametrize("family", ["auto", "hard", "mixup+smooth"])
def test_the_family_must_be_told(family: str, lenet: object) -> None:
    done = run_cli("recover-label", lenet, "--method", "paper", "--family", family)
    assert_refused(done, 2, f"'{family}'")
    assert "--family smooth or mixup" in done.line


def test_the_divisor_belongs_to_the_method(capture: Capture) -> None:
    bundle = capture("--smooth", "0.1", "--label", "3", model="lenet", size=32)
    given = ("recover-label", bundle, "--paper-divisor", "4")
    assert_refused(run_cli(*given), 2, "--method paper")
    paper = (*given[:3], "0", "--method", "paper", "--family", "smooth")
    assert_refused(run_cli(*paper), 2, "divisor")
    found = run_cli(*given, "--method", "paper", "--family", "smooth", "--json").object
    assert (found["verdict"], found["method"]) == ("unique", "paper")
    (sample,) = found["samples"]
    assert sample["weights"][0] == pytest.approx(0.91, abs=1e-3)


def test_the_bias_enters_the_softmax_and_its_gradient_is_not_used(capture: Capture) -> None:
    bundle = Bundle.open(capture("--smooth", "0.1", "--label", "3", model="lenet", size=32))
    assert GRAD + "fc.bias" in bundle
    tensors = {k: bundle.tensor(k) for k in (GRAD + "fc.weight", PARAM + "fc.weight")}
    with_bias = Bundle({**tensors, PARAM + "fc.bias": bundle.tensor(PARAM + "fc.bias")})
    answers = [
        recover_label(b, method="paper", family="smooth", device="cpu").result
        for b in (bundle, with_bias)
    ]
    assert answers[0].samples == answers[1].samples
    without = recover_label(Bundle(tensors), method="paper", family="smooth", device="cpu").result
    assert without.verdict != "unique"


def test_a_divisor_must_be_positive() -> None:
    for divisor in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UsageError, match="divisor"):
            PaperOptions(divisor=divisor)
