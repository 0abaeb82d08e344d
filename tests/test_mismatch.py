"""Gradients of another loss than the plain mean: summed, scaled, clipped, decayed, in part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import run_cli
from photographs import centre, crops
from torch import Tensor, nn
from torch.nn import functional as F

import gradleak
from gradleak import Bundle
from gradleak.errors import GradleakError, IncompleteError
from gradleak.images import to_uint8
from gradleak.labels.decay import find_weight_decay
from gradleak.models.build import build_model
from gradleak.softlabels import soft_label
from gradleak.stages.maps import recover_maps

NETWORKS = {"fcn4": 16, "lenet": 32}
LABELS = {
    "hard": ([(3, 1.0)], 0.0),
    "smooth": ([(3, 1.0)], 0.1),
    "mixup": ([(3, 0.7), (5, 0.3)], 0.0),
}


class Client:
    """A network of some initialisation, its photographs, and the gradient that it sends."""

    def __init__(self, name: str, samples: int = 1, seed: int = 1) -> None:
        self.size = NETWORKS[name]
        self.model = build_model(name, size=self.size, seed=seed)
        self.images = crops(self.size, samples, torch.Generator().manual_seed(seed))
        self.images = (255 * self.images).round() / 255
        with torch.no_grad():
            self.classes = self.model(self.images).shape[1]

    def labels(self, family: str) -> Tensor:
        pairs, smooth = LABELS[family]
        shifted = ([(k + n, weight) for k, weight in pairs] for n in range(len(self.images)))
        return torch.stack([soft_label(p, self.classes, smooth) for p in shifted])

    def sends(
        self,
        labels: Tensor,
        *,
        factor: float = 1.0,
        decay: float = 0.0,
        biases: bool = True,
        reduction: str = "mean",
    ) -> Bundle:
        loss = F.cross_entropy(self.model(self.images), labels.float(), reduction=reduction)
        named = dict(self.model.named_parameters())
        found = torch.autograd.grad(factor * loss, list(named.values()))
        gradients = {
            name: gradient + decay * parameter.detach() * (biases or parameter.dim() > 1)
            for (name, parameter), gradient in zip(named.items(), found, strict=True)
        }
        return Bundle.from_gradients(self.model, gradients, example=self.images)

    def pictures(self, bundle: Bundle) -> tuple[str, bool]:
        """Return the verdict on the images recovered, and whether they are the client's."""
        featured = gradleak.recover_feature(bundle).bundle
        found = gradleak.reconstruct(featured, model=self.model)
        return found.verdict, torch.equal(to_uint8(found.images[0]), to_uint8(self.images[0]))


def error(bundle: Bundle, labels: Tensor) -> float:
    found = bundle.tensor("label/soft").double()
    return float(torch.cdist(labels.double(), found, p=float("inf")).amin(1).max())


# A factor


@pytest.mark.parametrize("family", LABELS)
@pytest.mark.parametrize("factor", [0.01, 0.3, 1000.0])
def test_a_factor_is_recognised_and_the_picture_comes_back(factor: float, family: str) -> None:
    client = Client("lenet")
    labels = client.labels(family)
    found = gradleak.recover_label(client.sends(labels, factor=factor))
    assert found.result.verdict == "unique"
    assert "summed, scaled or clipped" in found.result.reason
    assert found.result.samples[0].loss_scale == pytest.approx(factor, rel=1e-5)
    assert error(found.bundle, labels) < 1e-5
    assert client.pictures(found.bundle) == ("unique", True)


def test_clipping_is_recognised_through_the_pipe(tmp_path: Path) -> None:
    client = Client("lenet")
    path = tmp_path / "g.safetensors"
    client.sends(client.labels("smooth")).save(path)
    clipped = run_cli("defend", path, "--clip", "0.5", "-o", "-", "-q")
    done = run_cli("recover-label", "-o", tmp_path / "l.safetensors", stdin=clipped.out)
    assert done.code == 0
    assert "class 3        0.91" in done.text
    assert "\nloss scale     " in done.text
    assert client.pictures(Bundle.open(tmp_path / "l.safetensors")) == ("unique", True)


def test_a_label_of_no_family_is_no_sign_of_a_factor() -> None:
    client = Client("lenet")
    dice = torch.Generator().manual_seed(4)
    labels = torch.softmax(torch.randn(1, client.classes, generator=dice).double(), 1)
    found = gradleak.recover_label(client.sends(labels))
    assert found.result.samples[0].family == "arbitrary"
    assert found.result.samples[0].loss_scale is None
    assert error(found.bundle, labels) < 1e-6


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("factor", [0.3, 0.5, 3.0])
def test_where_the_logits_hardly_differ_no_factor_is_claimed(factor: float, seed: int) -> None:
    """Without biases an untrained FCN-4 leaves feature, label and factor open together."""
    client = Client("fcn4", seed=seed)
    labels = client.labels("hard")
    found = gradleak.recover_label(client.sends(labels, factor=factor))
    assert found.result.verdict != "unique" or error(found.bundle, labels) < 1e-3


def test_a_factor_that_is_told_is_not_doubted() -> None:
    client = Client("lenet")
    bundle = client.sends(client.labels("hard"), factor=0.3)
    found = gradleak.recover_label(bundle, loss_scale=1.0)
    assert found.result.samples[0].family == "arbitrary"
    assert gradleak.recover_label(bundle, loss_scale=0.3).result.samples[0].classes == (3,)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_sum_over_a_batch_is_recognised(name: str) -> None:
    client = Client(name, samples=3)
    labels = client.labels("smooth")
    found = gradleak.recover_label(client.sends(labels, reduction="sum"))
    assert found.result.verdict == "unique"
    assert "scaled by 3" in found.result.reason
    assert error(found.bundle, labels) < 1e-4


# Weight decay


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("decay", [1e-4, 1e-2])
@pytest.mark.parametrize("name", NETWORKS)
def test_weight_decay_is_recognised_and_taken_off(name: str, decay: float, samples: int) -> None:
    client = Client(name, samples)
    labels = client.labels("smooth")
    found = gradleak.recover_label(client.sends(labels, decay=decay))
    assert found.weight_decay is not None
    assert found.weight_decay.rate == pytest.approx(decay, rel=1e-3)
    assert found.result.verdict == "unique"
    assert error(found.bundle, labels) < 1e-4
    if samples == 1:
        assert client.pictures(found.bundle)[1]


@pytest.mark.parametrize("biases", [True, False])
def test_whether_biases_decay_is_read_off_the_heads_own(biases: bool) -> None:
    client = Client("lenet")
    labels = client.labels("hard")
    found = gradleak.recover_label(client.sends(labels, decay=1e-2, biases=biases))
    assert found.weight_decay is not None
    assert found.weight_decay.of_bias is biases
    assert error(found.bundle, labels) < 1e-5
    assert client.pictures(found.bundle)[1]


def test_weight_decay_and_a_factor_are_recognised_together() -> None:
    client = Client("lenet")
    labels = client.labels("mixup")
    found = gradleak.recover_label(client.sends(labels, factor=0.3, decay=5e-4))
    assert found.result.samples[0].loss_scale == pytest.approx(0.3, rel=1e-4)
    assert error(found.bundle, labels) < 1e-5
    assert client.pictures(found.bundle)[1]


def test_weight_decay_is_reported(tmp_path: Path) -> None:
    client = Client("lenet")
    client.sends(client.labels("hard"), decay=1e-3).save(tmp_path / "g.safetensors")
    done = run_cli("recover-label", tmp_path / "g.safetensors")
    assert "0.001 of biases as well: recognised by the column sums, and taken off" in done.text
    told = run_cli("recover-label", tmp_path / "g.safetensors", "--json").object
    assert told["weight_decay"] == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("what", ["plain", "noise", "another loss", "columns that sum to zero"])
def test_what_is_no_weight_decay_is_not_taken_for_it(what: str) -> None:
    client = Client("lenet")
    bundle = client.sends(client.labels("hard"))
    gradient, weight = bundle.tensor("grad/fc.weight"), bundle.tensor("param/fc.weight")
    if what == "noise":
        dice = torch.Generator().manual_seed(0)
        gradient = gradient + 1e-3 * torch.randn(gradient.shape, generator=dice)
    elif what == "another loss":
        gradient = gradient + 0.1 * gradient[:1]
    elif what == "columns that sum to zero":
        weight = (weight.double() - weight.double().mean(0)).float()
        weight = weight - weight.sum(0) / len(weight)
        gradient = gradient + 1e-2 * weight
    assert find_weight_decay(gradient, weight, None, None) is None


def test_decay_without_weights_is_not_guessed() -> None:
    client = Client("lenet")
    bundle = gradleak.recover_label(client.sends(client.labels("hard"), decay=1e-3)).bundle
    tensors = {name: bundle.tensor(name) for name in bundle if not name.startswith("param/feat")}
    with pytest.raises(IncompleteError, match="weight decay cannot be taken off"):
        gradleak.recover_feature(Bundle(tensors, bundle.metadata))


# A part of the gradient


def part(bundle: Bundle, *missing: str) -> Bundle:
    held = {n: bundle.tensor(n) for n in bundle if not n.startswith(tuple(missing))}
    return Bundle(held, bundle.metadata)


def test_frozen_first_layers_leave_label_feature_and_the_maps_above() -> None:
    client = Client("lenet")
    bundle = part(client.sends(client.labels("smooth")), "grad/features.0")
    labelled = gradleak.recover_label(bundle)
    featured = gradleak.recover_feature(labelled.bundle)
    assert featured.verdict == "unique"
    found = recover_maps(featured.bundle, model=client.model)
    assert [m.names for m in found.maps][:2] == [("features.4",), ("features.2",)]
    image = gradleak.reconstruct(featured.bundle, model=client.model)
    assert image.images.shape == client.images.shape


def test_a_gap_in_the_middle_stops_the_walk_there() -> None:
    client = Client("lenet")
    bundle = part(client.sends(client.labels("hard")), "grad/features.2")
    featured = gradleak.recover_feature(gradleak.recover_label(bundle).bundle)
    found = recover_maps(featured.bundle, model=client.model)
    assert [m.names for m in found.maps] == [("features.4",)]
    assert "0 equations for 256 unknowns" in str(found.barriers[0])
    assert gradleak.reconstruct(featured.bundle, model=client.model).verdict == "approximate"


def test_without_the_heads_gradient_there_is_no_label() -> None:
    client = Client("lenet")
    bundle = part(client.sends(client.labels("hard")), "grad/fc")
    with pytest.raises(GradleakError, match=r"no gradient of the head's weight \(grad/fc.weight\)"):
        gradleak.recover_label(bundle)


def test_the_last_layer_alone_by_hand_gives_label_and_feature(tmp_path: Path) -> None:
    torch.manual_seed(0)
    head = nn.Linear(64, 10)
    feature = crops(8, 1, torch.Generator().manual_seed(0))[:, :1].flatten(1)
    loss = F.cross_entropy(head(feature), torch.tensor([6]))
    gradient, of_bias = torch.autograd.grad(loss, [head.weight, head.bias])
    from safetensors.torch import save_file

    tensors = {
        "grad/fc.weight": gradient,
        "grad/fc.bias": of_bias,
        "param/fc.weight": head.weight.detach(),
        "param/fc.bias": head.bias.detach(),
    }
    save_file(tensors, tmp_path / "hand.safetensors")
    labelled = gradleak.recover_label(Bundle.open(tmp_path / "hand.safetensors"))
    assert labelled.result.samples[0].classes == (6,)
    found = gradleak.recover_feature(labelled.bundle).layers[0].features
    assert (found - feature.double()).abs().max() < 1e-5


@pytest.mark.parametrize("smooth", [0.0, 0.1])
def test_a_clipped_gradient_with_noise_is_recognised_as_one(smooth: float) -> None:
    """What noise leaves of the misfit of a wrong factor is still more than a family explains."""
    model = build_model("lenet", seed=1)
    label = soft_label([(3, 1.0)], 10, smooth)[None]
    captured = gradleak.capture(model, centre("chelsea", 32), label)
    dice = torch.Generator().manual_seed(1)
    changed = {}
    for name in captured.bundle.names("grad/"):
        gradient = 0.27 * captured.bundle.tensor(f"grad/{name}")
        size = gradient.square().mean().sqrt()
        changed[f"grad/{name}"] = gradient + 1e-2 * size * torch.randn(
            gradient.shape, generator=dice
        )
    found = gradleak.recover_label(captured.bundle.extended(changed)).result
    (sample,) = found.samples
    if found.verdict == "unique":
        assert sample.classes == (3,)
        assert sample.loss_scale == pytest.approx(0.27, rel=0.05)
        assert abs(sample.weights[0] - float(label.max())) < 0.02
    else:
        assert found.verdict == "ambiguous"
        assert "a loss multiplied by 0.2" in found.reason
