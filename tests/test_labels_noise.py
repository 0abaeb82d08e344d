"""Labels under noise: efficient, honest about their errors, and about what was told."""

import json
import math
from pathlib import Path

import pytest
import torch
from photographs import crops
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from gradleak.bundle import Bundle
from gradleak.cli.app import app
from gradleak.errors import GradleakError, InputError, UsageError
from gradleak.labels.gaussian import Model, Observation, linearise
from gradleak.labels.likelihood import maximise
from gradleak.labels.single import recover_single, recover_singles
from gradleak.labels.verdict import LabelResult
from gradleak.softlabels import families, soft_label
from gradleak.stages.label import recover_label

LABELS = {
    "hard": ([(2, 1.0)], 0.0),
    "smooth": ([(2, 1.0)], 0.2),
    "mixup": ([(2, 0.7), (5, 0.3)], 0.0),
    "mixup+smooth": ([(2, 0.6), (5, 0.4)], 0.3),
}
WIDTH = 64


def label_of(family: str, classes: int) -> Tensor:
    pairs, smooth = LABELS[family]
    return soft_label(pairs, classes, smooth)


class Noisy:
    """A head, the pixels of a photograph as its input, and its gradients with noise."""

    def __init__(
        self,
        family: str = "smooth",
        classes: int = 10,
        std: float = 1e-3,
        seed: int = 0,
        *,
        factor: float = 1.0,
    ) -> None:
        dice = torch.Generator().manual_seed(seed)
        feature = crops(8, 1, dice).flatten(1)[:, :WIDTH].double()
        self.feature = 6.0 * feature / feature.norm()
        weight = (torch.randn(classes, WIDTH, generator=dice) / 8.0).double().requires_grad_()
        bias = (0.1 * torch.randn(classes, generator=dice)).double().requires_grad_()
        self.label = label_of(family, classes)
        loss = factor * F.cross_entropy(F.linear(self.feature, weight, bias), self.label[None])
        grads = torch.autograd.grad(loss, (weight, bias))
        self.weight, self.bias = weight.detach(), bias.detach()
        self.grad_weight, self.grad_bias = (
            grad + std * torch.randn(grad.shape, generator=dice).double() for grad in grads
        )

    def attack(self, *, biased: bool = False, **options: object) -> LabelResult:
        return recover_single(
            self.grad_weight,
            self.weight,
            bias=self.bias,
            grad_bias=self.grad_bias if biased else None,
            **options,  # type: ignore[arg-type]
        )

    def bundle(self, **metadata: str) -> Bundle:
        tensors = {
            "grad/fc.weight": self.grad_weight,
            "grad/fc.bias": self.grad_bias,
            "param/fc.weight": self.weight,
            "param/fc.bias": self.bias,
        }
        return Bundle(tensors, metadata)


def error(result: LabelResult, label: Tensor) -> float:
    assert result.labels is not None
    return float((result.labels[0] - label).abs().max())


# The likelihood


def model_of(sample: Noisy, family: str) -> Model:
    """Return the truth as a hypothesis."""
    pairs, smooth = LABELS[family]
    second = (1.0 - smooth) * pairs[1][1] if len(pairs) == 2 else 0.0
    return Model(
        top=torch.tensor([[[2, 5]]]),
        support=torch.tensor([[len(pairs)]]),
        base=torch.tensor([[smooth > 0.0]]),
        theta=torch.tensor([[[second, smooth]]], dtype=torch.float64),
        feature=sample.feature[None],
        loss_scale=torch.ones(1, 1, dtype=torch.float64),
    )


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("family", list(LABELS))
def test_the_information_is_that_of_the_jacobian(family: str, free: bool, biased: bool) -> None:
    sample = Noisy(family, std=0.0)
    seen = Observation.of(
        sample.grad_weight[None],
        sample.weight[None],
        sample.bias[None],
        sample.grad_bias[None] if biased else None,
        torch.ones(1),
    )
    model = model_of(sample, family)
    linear = linearise(seen, model, None, free)
    active = model.active[0, 0].tolist()

    def gradient(unknown: Tensor) -> Tensor:
        x, beta, alpha, gamma = unknown[:WIDTH], *unknown[WIDTH:]
        eye = torch.eye(10, dtype=torch.float64)
        label = (1 - beta - alpha) * eye[2] + beta * eye[5] + alpha / 10
        delta = gamma * (torch.softmax(sample.weight @ x + sample.bias, 0) - label)
        outer = torch.outer(delta, x).flatten()
        return torch.cat([outer, delta]) if biased else outer

    truth = torch.cat([sample.feature[0], model.theta[0, 0], torch.ones(1, dtype=torch.float64)])
    jacobian = torch.func.jacrev(gradient)(truth)
    unknown = [*range(WIDTH), *(WIDTH + k for k in (0, 1) if active[k])]
    unknown += [WIDTH + 2] if free else []
    inverse = torch.linalg.inv(jacobian[:, unknown].T @ jacobian[:, unknown])
    # From x to ‖x‖ = xᵀdx/‖x‖, the other unknowns as they are.
    turn = torch.zeros(len(unknown), 1 + len(unknown) - WIDTH, dtype=torch.float64)
    turn[:WIDTH, 0] = sample.feature[0] / sample.feature[0].norm()
    turn[WIDTH:, 1:] = torch.eye(len(unknown) - WIDTH, dtype=torch.float64)
    kept = [0, *(1 + k for k in (0, 1) if active[k]), *([3] if free else [])]
    found = linear.inverse[0, 0][kept][:, kept]
    torch.testing.assert_close(found, turn.T @ inverse @ turn, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("family", list(LABELS))
def test_without_noise_the_maximum_is_the_truth(family: str) -> None:
    sample = Noisy(family, std=0.0)
    seen = Observation.of(
        sample.grad_weight[None],
        sample.weight[None],
        sample.bias[None],
        None,
        torch.full((1,), 1e-4),
    )
    start = model_of(sample, family)
    away = Model(**{**vars(start), "feature": 1.1 * start.feature})
    found = maximise(seen, away)
    assert float((found.model.feature - start.feature).abs().max()) < 1e-7
    assert float((found.model.theta - start.theta).abs().max()) < 1e-7


# Errors and intervals


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("family", ["smooth", "mixup", "mixup+smooth"])
def test_an_interval_ends_where_the_profile_of_the_likelihood_does(
    family: str, biased: bool
) -> None:
    draw = Noisy(family, std=0.05, seed=3)
    result = draw.attack(biased=biased, families=families(family), noise_std=0.05)
    sample = result.samples[0]
    assert sample.intervals is not None
    assert set(sample.classes) <= {2, 5}
    interval = sample.intervals.base or sample.intervals.weights[0]
    which = "base" if sample.intervals.base else sample.classes[0]

    def label(free: Tensor, held: float | None) -> Tensor:
        """Return the label, one entry of it held."""
        eye = torch.eye(10, dtype=torch.float64)
        share = torch.zeros(()) if family == "smooth" else free[0]
        alpha = free[1] if "smooth" in family else torch.zeros(())
        if held is not None and which == "base":
            alpha = torch.tensor(10 * held, dtype=torch.float64)
        elif held is not None:
            share = torch.tensor(held if which == 5 else 1.0 - held, dtype=torch.float64)
        return (1 - alpha - share) * eye[2] + share * eye[5] + alpha / 10

    def least(held: float | None) -> float:
        """Minimise the residual by an optimiser that knows nothing of the structure."""
        start = [torch.tensor([0.3, 0.2], dtype=torch.float64), draw.feature[0].clone()]
        free, x = (tensor.requires_grad_() for tensor in start)
        search = torch.optim.LBFGS([free, x], max_iter=500, line_search_fn="strong_wolfe",
                                   tolerance_grad=1e-10, tolerance_change=1e-14)  # fmt: skip

        def residual() -> Tensor:
            delta = torch.softmax(draw.weight @ x + draw.bias, 0) - label(free, held)
            left = (draw.grad_weight - torch.outer(delta, x)).square().sum()
            return left + (draw.grad_bias - delta).square().sum() if biased else left

        def closure() -> Tensor:
            search.zero_grad()
            loss = 100.0 * residual()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        for _ in range(5):
            search.step(closure)  # type: ignore[no-untyped-call]
        return float(residual().detach())

    best = least(None)
    rises = [(least(end) - best) / 0.05**2 for end in (interval.low, interval.high) if end > 0.0]
    assert rises == pytest.approx([1.96**2] * len(rises), abs=0.15)


@pytest.mark.parametrize("biased", [False, True])
def test_little_noise_makes_intervals_of_standard_errors(biased: bool) -> None:
    draw = Noisy("mixup+smooth", std=1e-5, seed=1)
    sample = draw.attack(biased=biased).samples[0]
    stated = sample.intervals
    assert stated is not None
    assert stated.base is not None
    pairs = [
        (stated.scale, sample.scale, sample.scale_error),
        (stated.base, sample.base, sample.base_error),
        *zip(stated.weights, sample.weights, sample.weight_errors, strict=True),
    ]
    for interval, value, error in pairs:
        assert interval.high - value == pytest.approx(1.96 * error, rel=0.03)
        assert value - interval.low == pytest.approx(1.96 * error, rel=0.03)


def test_intervals_do_not_depend_on_what_else_is_asked() -> None:
    draws = [Noisy("mixup+smooth", std=0.03, seed=seed) for seed in range(6)]
    together = recover_singles(
        torch.stack([draw.grad_weight for draw in draws]),
        torch.stack([draw.weight for draw in draws]),
        bias=torch.stack([draw.bias for draw in draws]),
    )
    for draw, result in zip(draws, together, strict=True):
        assert isinstance(result, LabelResult)
        alone, beside = draw.attack().samples[0].intervals, result.samples[0].intervals
        assert alone is not None
        assert beside is not None
        assert beside.scale.low == pytest.approx(alone.scale.low, rel=1e-6)
        assert beside.scale.high == pytest.approx(alone.scale.high, rel=1e-6)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("std", [1e-4, 1e-3, 1e-2])
def test_the_errors_are_those_that_are_stated(std: float, biased: bool) -> None:
    scaled: list[float] = []
    for family in LABELS:
        draws = [Noisy(family, std=std, seed=seed) for seed in range(40)]
        for draw in draws:
            result = draw.attack(biased=biased, families=families(family))
            sample = result.samples[0]
            assert sample.family == family
            scaled.append((sample.scale - float(draw.feature.norm())) / sample.scale_error)
            if "smooth" in family:
                alpha = 10 * sample.base
                scaled.append((alpha - LABELS[family][1]) / (10 * sample.base_error))
    # Of a χ² of n degrees of freedom, over n: within four standard deviations, √(2/n) each.
    n = len(scaled)
    spread = sum(value**2 for value in scaled) / n
    assert abs(spread - 1.0) < 4.0 * math.sqrt(2.0 / n)
    covered = sum(abs(value) < 1.96 for value in scaled) / n
    assert 0.90 < covered < 0.99


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("family", list(LABELS))
def test_little_noise_leaves_label_and_family(family: str, biased: bool) -> None:
    for seed in range(10):
        draw = Noisy(family, std=1e-4, seed=seed)
        result = draw.attack(biased=biased)
        names = {sample.family for sample in (*result.samples, *result.alternatives)}
        assert family in names
        assert error(result, draw.label) < 6.0 * result.samples[0].uncertainty() + 1e-6
        assert result.method == ("bias" if biased else "scale")


def test_a_family_within_four_standard_errors_is_an_alternative() -> None:
    near = 0
    for seed in range(24):
        draw = Noisy("smooth", std=0.1, seed=seed)
        result = draw.attack(families=families("hard") + families("smooth"))
        sample = result.samples[0]
        named = {sample.family, *(other.family for other in result.alternatives)}
        assert "smooth" in named
        if sample.family == "hard" or sample.base < 3.0 * sample.base_error:
            near += 1
            assert (result.verdict, named) == ("ambiguous", {"hard", "smooth"})
            assert "family" in result.reason
    assert near >= 5


def test_a_confident_answer_under_noise_is_not_wrong() -> None:
    wrong = []
    for family in LABELS:
        for seed in range(40):
            draw = Noisy(family, std=1e-2, seed=seed)
            result = draw.attack()
            if result.verdict == "unique":
                allowed = 6.0 * result.samples[0].uncertainty() + 2e-2
                if error(result, draw.label) > allowed:
                    wrong.append((family, seed, result.family, error(result, draw.label)))
    assert wrong == []


def test_noise_that_drowns_the_gradient_leaves_nothing() -> None:
    result = Noisy(std=10.0).attack()
    assert (result.verdict, result.labels) == ("failed", None)
    assert "noise" in result.reason


def test_an_arbitrary_label_under_noise_needs_the_bias_gradient() -> None:
    draw = Noisy(std=0.0)
    dice = torch.Generator().manual_seed(1)
    label = torch.softmax(1.5 * torch.randn(10, generator=dice, dtype=torch.float64), 0)
    delta = torch.softmax(draw.weight @ draw.feature[0] + draw.bias, 0) - label
    draw.grad_weight = torch.outer(delta, draw.feature[0])
    draw.grad_weight += 1e-4 * torch.randn(10, WIDTH, generator=dice, dtype=torch.float64)
    draw.grad_bias = delta + 1e-4 * torch.randn(10, generator=dice, dtype=torch.float64)
    given, withheld = draw.attack(biased=True), draw.attack()
    assert (given.verdict, given.family) == ("unique", "arbitrary")
    assert error(given, label) < 6.0 * given.samples[0].uncertainty()
    assert given.samples[0].scale == pytest.approx(float(draw.feature.norm()), rel=1e-2)
    assert withheld.verdict == "unidentifiable"
    scale = float(draw.feature.norm())
    assert any(i.low <= scale <= i.high for i in withheld.intervals)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", list(LABELS))
def test_half_precision_is_never_confidently_wrong(family: str, dtype: torch.dtype) -> None:
    for seed in range(10):
        draw = Noisy(family, std=0.0, seed=seed)
        draw.grad_weight, draw.grad_bias = draw.grad_weight.to(dtype), draw.grad_bias.to(dtype)
        for biased in (True, False):
            result = draw.attack(biased=biased)
            if result.verdict == "unique":
                assert error(result, draw.label) < 6.0 * result.samples[0].uncertainty() + 1e-3


def test_a_batch_of_noisy_gradients_is_each_of_them() -> None:
    draws = [Noisy(family, seed=seed) for family in LABELS for seed in range(3)]
    results = recover_singles(
        torch.stack([draw.grad_weight for draw in draws]),
        torch.stack([draw.weight for draw in draws]),
        bias=torch.stack([draw.bias for draw in draws]),
    )
    for draw, result in zip(draws, results, strict=True):
        assert not isinstance(result, GradleakError)
        alone = draw.attack()
        assert (alone.verdict, alone.family) == (result.verdict, result.family)
        assert alone.labels is not None
        assert result.labels is not None
        torch.testing.assert_close(alone.labels, result.labels, rtol=0.0, atol=1e-7)


# What is told


def test_a_declared_noise_sets_the_errors() -> None:
    draw = Noisy(std=1e-3)
    once, twice = draw.attack(noise_std=1e-3), draw.attack(noise_std=2e-3)
    assert (once.noise, twice.noise) == (1e-3, 2e-3)
    assert twice.samples[0].scale_error == pytest.approx(2 * once.samples[0].scale_error, rel=1e-2)
    assert draw.attack().noise == pytest.approx(1e-3, rel=0.1)


def test_a_noise_of_zero_is_none() -> None:
    clean = Noisy(std=0.0)
    told, found = clean.attack(noise_std=0.0), clean.attack()
    assert (told.samples, told.verdict) == (found.samples, found.verdict)
    # Noise, were there none, would be no softmax cross-entropy gradient: its columns have a sum.
    with pytest.raises(InputError, match="columns of the head gradient sum to"):
        Noisy(std=1e-2).attack(noise_std=0.0)


def test_a_declared_noise_on_a_clean_gradient_counts() -> None:
    result = Noisy(std=0.0).attack(noise_std=1e-3)
    assert result.samples[0].scale_error > 1e-4
    assert result.noise == 1e-3


# The scale of the loss


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("factor", [1e-2, 8.0, 65536.0])
@pytest.mark.parametrize("family", list(LABELS))
def test_an_unknown_loss_scale_is_recovered(family: str, factor: float, biased: bool) -> None:
    draw = Noisy(family, std=0.0, factor=factor)
    result = draw.attack(biased=biased, loss_scale=None)
    assert (result.verdict, result.family) == ("unique", family)
    assert error(result, draw.label) < 1e-5
    assert result.samples[0].loss_scale == pytest.approx(factor, rel=1e-5)
    assert result.features is not None
    torch.testing.assert_close(result.features, draw.feature, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("biased", [False, True])
def test_an_unknown_loss_scale_under_noise_has_an_error(biased: bool) -> None:
    for family in LABELS:
        draw = Noisy(family, std=8e-4, factor=8.0)
        sample = draw.attack(biased=biased, loss_scale=None).samples[0]
        assert sample.loss_scale is not None
        assert sample.loss_scale_error is not None
        assert sample.loss_scale_error > 0.0
        assert abs(sample.loss_scale - 8.0) < 5.0 * sample.loss_scale_error


@pytest.mark.parametrize("biased", [False, True])
def test_a_given_loss_scale_is_divided_out(biased: bool) -> None:
    plain = Noisy("mixup+smooth", std=0.0).attack(biased=biased)
    scaled = Noisy("mixup+smooth", std=0.0, factor=16.0).attack(biased=biased, loss_scale=16.0)
    assert scaled.verdict == "unique"
    assert plain.labels is not None
    assert scaled.labels is not None
    torch.testing.assert_close(plain.labels, scaled.labels, rtol=0.0, atol=1e-9)


def test_an_arbitrary_label_leaves_an_unknown_loss_scale_open() -> None:
    draw = Noisy(std=0.0)
    dice = torch.Generator().manual_seed(1)
    label = torch.softmax(1.5 * torch.randn(10, generator=dice, dtype=torch.float64), 0)
    delta = 4.0 * (torch.softmax(draw.weight @ draw.feature[0] + draw.bias, 0) - label)
    draw.grad_weight, draw.grad_bias = torch.outer(delta, draw.feature[0]), delta
    given, withheld = draw.attack(biased=True, loss_scale=None), draw.attack(loss_scale=None)
    assert given.verdict == withheld.verdict == "unidentifiable"
    assert given.features is not None  # right whatever the scale
    torch.testing.assert_close(given.features, draw.feature, rtol=1e-6, atol=1e-7)
    assert given.samples[0].loss_scale is not None
    assert given.samples[0].loss_scale <= 4.0
    assert withheld.labels is None


# The stage and the command line


def test_what_is_no_std_or_factor_is_a_usage_error() -> None:
    bundle = Noisy().bundle()
    for options in ({"noise_std": -1.0}, {"noise_std": math.nan}, {"noise_std": math.inf}):
        with pytest.raises(UsageError, match="noise std"):
            recover_label(bundle, **options)  # type: ignore[arg-type]
    for factor in (0.0, -1.0, math.inf, "much"):
        with pytest.raises(UsageError, match="loss scale"):
            recover_label(bundle, loss_scale=factor)


def test_the_options_go_on_record() -> None:
    outcome = recover_label(Noisy().bundle(), noise_std=1e-3, loss_scale="unknown")
    arguments = outcome.bundle.stages[-1]["arguments"]
    assert (arguments["noise_std"], arguments["loss_scale"]) == (1e-3, "unknown")


def test_the_command_reports_noise_and_loss_scale(tmp_path: Path) -> None:
    path = tmp_path / "noisy.safetensors"
    Noisy("smooth", std=8e-4, factor=8.0).bundle().save(path)
    options = ["--noise-std", "8e-4", "--loss-scale", "unknown", "--json"]
    result = CliRunner().invoke(app, ["recover-label", str(path), *options])
    report = json.loads(result.stdout)
    assert result.exit_code == (0 if report["verdict"] == "unique" else 4)
    assert report["noise"] == 8e-4
    assert report["loss_scale"]["value"] == pytest.approx(8.0, rel=0.1)
    assert report["loss_scale"]["uncertainty"] > 0.0
    told = CliRunner().invoke(app, ["recover-label", str(path), "--loss-scale", "8", "--json"])
    assert json.loads(told.stdout)["loss_scale"] is None
    wrong = CliRunner().invoke(app, ["recover-label", str(path), "--loss-scale", "none"])
    assert wrong.exit_code == 2


def test_a_scaled_loss_is_refused_until_it_is_dealt_with() -> None:
    bundle = Noisy("smooth", std=0.0, factor=8.0).bundle(
        loss='{"name": "cross_entropy", "reduction": "mean", "scale": 8.0}'
    )
    with pytest.raises(GradleakError, match="scaled by 8"):
        recover_label(bundle)
    assert recover_label(bundle, loss_scale=8.0).result.verdict == "unique"
    assert recover_label(bundle, loss_scale="unknown").result.verdict == "unique"


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("classes", [10, 50])
@pytest.mark.parametrize("noise", [1e-6, 1e-5, 3e-5, 1e-4])
def test_noise_between_rounding_and_plain_sight_is_not_taken_for_samples(
    noise: float, classes: int, biased: bool
) -> None:
    """Noise of so much of each gradient's own size, whose singular values begin at rounding."""
    case = Noisy("hard", classes=classes, std=0.0)
    dice = torch.Generator().manual_seed(1)
    noisy = [
        (grad + noise * grad.square().mean().sqrt() * torch.randn(grad.shape, generator=dice))
        for grad in (case.grad_weight, case.grad_bias)
    ]
    found = recover_single(
        noisy[0].float(),
        case.weight.float(),
        bias=case.bias.float(),
        grad_bias=noisy[1].float() if biased else None,
    )
    assert found.rank == 1
    assert error(found, case.label) <= noise
