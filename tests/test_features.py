"""The inputs of all Linear layers come out of the gradient, from the head down to the image."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from photographs import centre, crops
from torch import Tensor, nn

from gradleak.bundle import FEATURE, GRAD, LABEL, PARAM, Bundle
from gradleak.errors import IncompleteError, InputError
from gradleak.metrics import relative_error
from gradleak.models.build import build_model
from gradleak.models.spec import LinearLayer, ModelSpec
from gradleak.softlabels import soft_label
from gradleak.stages.capture import Capture, capture
from gradleak.stages.feature import FeatureOutcome, recover_feature
from gradleak.stages.label import recover_label

EXACT = 1e-5
ACTIVATIONS = {
    "relu": nn.ReLU(),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "leaky_relu:0.1": nn.LeakyReLU(0.1),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "identity": nn.Identity(),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mlp(activation: nn.Module, bias: bool, seed: int = 0) -> nn.Sequential:
    """Build a user's own network on 8×8 photographs: three Linear layers."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(192, 96, bias=bias),
            activation,
            nn.Linear(96, 48, bias=bias),
            activation,
            nn.Linear(48, 10, bias=bias),
        )


def share(model: nn.Module, image: Tensor, classes: int, **options: Any) -> Capture:
    label = soft_label([(1, 0.7), (2, 0.3)], classes, 0.1)
    return capture(model, image, label[None], device="cpu", **options)


def recover(captured: Capture) -> FeatureOutcome:
    labelled = recover_label(captured.bundle, device="cpu")
    assert labelled.result.verdict == "unique"
    return recover_feature(labelled.bundle, device="cpu")


def check(captured: Capture, names: list[str]) -> FeatureOutcome:
    """Attack and compare: exactly the layers ``names``, from the head downwards, all exact."""
    outcome = recover(captured)
    assert [layer.name for layer in outcome.layers] == names
    assert outcome.stopped is None
    assert outcome.verdict == "unique", outcome.reason
    for layer in outcome.layers:
        true = captured.truth.features[layer.name]
        assert float(relative_error(layer.features, true)[0]) <= EXACT, layer.name
        assert layer.residual <= EXACT
        assert torch.equal(outcome.bundle.tensor(FEATURE + layer.name), layer.features)
    return outcome


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [16, 64])
def test_fcn4_gives_every_feature_and_the_image(size: int, bias: bool) -> None:
    model = build_model("fcn4", size=size, options={"bias": bias})
    image = centre("chelsea", size)
    outcome = check(share(model, image, 17), ["fc4", "fc3", "fc2", "fc1"])
    pixels = outcome.layers[-1].features.reshape(image.shape)
    assert float((pixels - image).abs().max()) < 0.5 / 255  # every 8-bit pixel


def test_alexnet_gives_the_inputs_of_its_three_linear_layers() -> None:
    model = build_model("alexnet", classes=20, size=64)
    names = ["classifier.6", "classifier.4", "classifier.1"]
    for withheld in (True, False):
        captured = share(model, centre("coffee", 64), 20, withhold_bias=withheld)
        assert check(captured, names).method == ("label" if withheld else "bias")


@pytest.mark.parametrize("init", ["default", "paper"])
@pytest.mark.parametrize("head_bias", [True, False])
def test_lenet_gives_the_input_of_its_head(init: str, head_bias: bool) -> None:
    model = build_model("lenet", options={"init": init, "head_bias": head_bias})
    captured = share(model, centre("astronaut", 32), 10, withhold_bias=True)
    assert check(captured, ["fc"]).method == "label"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_network_of_ones_own_is_peeled_through_its_activations(name: str, bias: bool) -> None:
    for seed in range(4):
        model = mlp(ACTIVATIONS[name], bias, seed)
        image = crops(8, 1, torch.Generator().manual_seed(seed))
        captured = share(model, image, 10)
        recorded = [layer.activation for layer in captured.bundle.model.layers]
        assert recorded == [name, name, None]
        check(captured, ["5", "3", "1"])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_float64_gradients_give_features_to_ten_digits(name: str) -> None:
    captured = share(mlp(ACTIVATIONS[name], False).double(), centre("rocket", 8), 10)
    for layer in recover(captured).layers:
        true = captured.truth.features[layer.name]
        assert true.dtype == torch.float64
        assert float(relative_error(layer.features, true)[0]) <= 1e-10


def test_a_missing_bias_gradient_below_the_head_is_not_needed() -> None:
    captured = share(mlp(nn.GELU(), True), centre("coffee", 8), 10)
    kept = {name: captured.bundle.tensor(name) for name in captured.bundle}
    for layer in ("1", "3", "5"):
        del kept[f"{GRAD}{layer}.bias"]
    bare = Bundle(kept, captured.bundle.metadata)
    check(Capture(bare, captured.truth), ["5", "3", "1"])


# Where it ends


def told_of(captured: Capture, *activations: str | None) -> Capture:
    """Return the same gradient with metadata that name the layers, as another tool may write."""
    names = zip(("1", "3", "5"), (*activations, None), strict=True)
    layers = tuple(LinearLayer(name, activation) for name, activation in names)
    told = replace(captured.bundle.model, layers=layers).to_json()
    return Capture(captured.bundle.extended(metadata={"model": told}), captured.truth)


@pytest.mark.parametrize("name", ["softplus", None])
def test_an_unknown_activation_ends_the_peeling_and_is_named(name: str | None) -> None:
    captured = share(mlp(nn.Softplus(), False), centre("coffee", 8), 10)
    outcome = recover(told_of(captured, "relu", name))
    assert [layer.name for layer in outcome.layers] == ["5"]
    assert outcome.stopped is not None
    assert outcome.stopped.startswith("3: the activation after it")
    assert (name or "not recorded") in outcome.stopped
    assert outcome.verdict == "failed"
    assert "1 of 3 Linear layers" in outcome.reason


def test_bias_gradients_lead_past_an_activation_that_is_not_known() -> None:
    model, image = mlp(nn.Softplus(), True), centre("coffee", 8)
    captured = share(model, image, 10)
    with torch.no_grad():
        features = {"1": image.flatten(1), "3": model[:3](image), "5": model[:5](image)}
    known = Capture(captured.bundle, replace(captured.truth, features=features))
    check(told_of(known, "softplus", "softplus"), ["5", "3", "1"])


@pytest.mark.parametrize("bias", [True, False])
def test_layers_that_capture_could_not_follow_are_not_passed_over_in_silence(bias: bool) -> None:
    captured = share(mlp(nn.Softplus(), bias), centre("coffee", 8), 10)
    outcome = recover(captured)
    assert [layer.name for layer in outcome.layers] == ["5"]
    assert outcome.stopped is not None


def test_a_head_alone_gives_its_own_input_and_says_why_no_more() -> None:
    model = build_model("fcn4", size=16)
    captured = share(model, centre("chelsea", 16), 17, head_only=True)
    outcome = recover(captured)
    assert [layer.name for layer in outcome.layers] == ["fc4"]
    assert outcome.stopped is not None
    assert "fc3" in outcome.stopped
    assert "no gradient" in outcome.stopped
    assert outcome.verdict == "failed"
    true = captured.truth.features["fc4"]
    assert float(relative_error(outcome.layers[0].features, true)[0]) <= EXACT


def test_missing_weights_end_the_peeling_below() -> None:
    captured = share(mlp(nn.ReLU(), False), centre("chelsea", 8), 10)
    kept = {n: captured.bundle.tensor(n) for n in captured.bundle if n != f"{PARAM}3.weight"}
    outcome = recover(Capture(Bundle(kept, captured.bundle.metadata), captured.truth))
    assert [layer.name for layer in outcome.layers] == ["5", "3"]
    assert outcome.stopped is not None
    assert outcome.stopped.startswith("1: no weight")


def test_a_dead_network_passes_nothing_down() -> None:
    model = mlp(nn.ReLU(), True)
    layer = model[3]
    assert isinstance(layer, nn.Linear)
    with torch.no_grad():
        layer.bias.fill_(-100.0)  # no unit of the second hidden layer is ever active
    captured = share(model, centre("chelsea", 8), 10)
    labelled = recover_label(captured.bundle, device="cpu")
    # The head's input is zero, so its weight gradient is, and no label comes out of it.
    assert labelled.result.verdict == "unidentifiable"
    assert LABEL not in labelled.bundle


# Labels that cannot serve


@pytest.mark.parametrize("withheld", [True, False])
def test_the_label_of_another_gradient_is_refused(withheld: bool) -> None:
    model = build_model("lenet")
    label = soft_label([(4, 0.6), (8, 0.4)], 10, 0.3)
    other = capture(model, centre("rocket", 32), label[None], device="cpu", withhold_bias=withheld)
    foreign = recover_label(other.bundle, device="cpu").bundle.tensor(LABEL)
    mine = share(model, centre("chelsea", 32), 10, withhold_bias=withheld)
    with pytest.raises(InputError, match="label misses the head gradient"):
        recover_feature(mine.bundle.extended({LABEL: foreign}), device="cpu")


def test_a_label_is_needed_and_must_fit_the_head() -> None:
    captured = share(build_model("lenet"), centre("chelsea", 32), 10)
    with pytest.raises(IncompleteError, match="holds no label/soft"):
        recover_feature(captured.bundle, device="cpu")
    few = captured.bundle.extended({LABEL: torch.full((1, 9), 1 / 9, dtype=torch.float64)})
    with pytest.raises(InputError, match="for a head of 10 classes"):
        recover_feature(few, device="cpu")
    two = captured.bundle.extended({LABEL: torch.full((2, 10), 0.1, dtype=torch.float64)})
    with pytest.raises(InputError, match="2 labels are given for a gradient of 1 samples"):
        recover_feature(two, device="cpu")


def test_features_rest_on_the_verdict_of_their_label() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2, bias=False))
    captured = capture(model, centre("chelsea", 8), soft_label([(0, 1.0)], 2, 0.2)[None])
    labelled = recover_label(captured.bundle, device="cpu")
    assert labelled.result.verdict == "unidentifiable"
    outcome = recover_feature(labelled.bundle, device="cpu")
    assert outcome.verdict == "unidentifiable"
    assert "label" in outcome.reason
    # The direction is known all the same; only its length is not.
    found, true = outcome.layers[0].features[0], captured.truth.features["1"][0].double()
    assert abs(float(found @ true / (found.norm() * true.norm()))) == pytest.approx(1.0, abs=1e-6)


# Ground truth stays out


@pytest.mark.parametrize("withheld", [True, False])
def test_the_truth_beside_the_bundle_changes_nothing(tmp_path: Path, withheld: bool) -> None:
    model = build_model("fcn4", size=16, options={"bias": True})
    spec = ModelSpec(name="fcn4", options={"bias": True})
    captured = share(model, centre("coffee", 16), 17, spec=spec, withhold_bias=withheld)
    outcomes = []
    for folder in ("alone", "beside"):
        place = tmp_path / folder
        place.mkdir()
        captured.bundle.save(place / "grads.safetensors")
        if folder == "beside":
            captured.truth.save(place / "truth.safetensors")
        labelled = recover_label(Bundle.open(place / "grads.safetensors"), device="cpu")
        labelled.bundle.save(place / "label.safetensors")
        outcomes.append(recover_feature(Bundle.open(place / "label.safetensors"), device="cpu"))
    alone, beside = outcomes
    assert [x.name for x in alone.layers] == [x.name for x in beside.layers]
    for one, other in zip(alone.layers, beside.layers, strict=True):
        assert torch.equal(one.features, other.features)
        assert one.residual == other.residual
    assert (alone.verdict, alone.reason) == (beside.verdict, beside.reason)
