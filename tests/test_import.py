"""Importing what other programs saved: by name, in order, by shape, from two checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_cli
from photographs import photograph
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import gradleak
from gradleak import Bundle
from gradleak.errors import GradleakError, InputError, UsageError
from gradleak.images import load_image, to_uint8
from gradleak.models.build import build_model
from gradleak.stages.importing import import_gradients
from gradleak.updates import update_gradient

LABEL = 3


class Step:
    """A client's step of LeNet on a photograph, and its files."""

    def __init__(self, folder: Path) -> None:
        self.model = build_model("lenet", seed=5)
        self.image = load_image(photograph("rocket"), 32).pixels[None]
        F.cross_entropy(self.model(self.image), torch.tensor([LABEL])).backward()
        self.folder = folder
        self.weights = folder / "net.pt"
        torch.save(self.model.state_dict(), self.weights)

    @property
    def named(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    @property
    def listed(self) -> list[Tensor]:
        return list(self.named.values())

    def saved(self, content: object, name: str = "grads.pt") -> Path:
        torch.save(content, self.folder / name)
        return self.folder / name


@pytest.fixture
def step(tmp_path: Path) -> Step:
    return Step(tmp_path)


def same(found: Bundle, step: Step) -> bool:
    held = found.tensors("grad/")
    return held.keys() == step.named.keys() and all(
        torch.equal(held[name], gradient) for name, gradient in step.named.items()
    )


WRAPPINGS: dict[str, Callable[[Step], Any]] = {
    "by name": lambda s: s.named,
    "in order": lambda s: s.listed,
    "a tuple": lambda s: tuple(s.listed),
    "pairs": lambda s: list(s.named.items()),
    "under a key": lambda s: {"epoch": 3, "gradients": s.named, "lr": 0.1},
    "with weights": lambda s: {"grads": s.listed, "state_dict": s.model.state_dict()},
    "nested": lambda s: (
        {"features": {n[9:]: g for n, g in s.named.items() if n[:2] != "fc"}}
        | {"fc": {"weight": s.named["fc.weight"], "bias": s.named["fc.bias"]}}
    ),
    "of DataParallel": lambda s: {f"module.{n}": g for n, g in s.named.items()},
    "numbered": lambda s: dict(enumerate(s.listed)),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_gradients_are_found_however_they_are_wrapped(step: Step, wrapping: str) -> None:
    path = step.saved(WRAPPINGS[wrapping](step))
    weights = None if wrapping == "with weights" else step.weights
    model = "lenet" if wrapping == "with weights" else None
    imported = import_gradients(path, weights=weights, model=model)
    assert same(imported.bundle, step)
    assert (imported.guesses, imported.missing) == ((), ())
    assert imported.bundle.model.head == "fc"


@pytest.mark.parametrize("kind", ["npz named", "npz listed", "safetensors"])
def test_arrays_and_safetensors_are_read(step: Step, kind: str) -> None:
    path = step.folder / ("g.safetensors" if kind == "safetensors" else "g.npz")
    if kind == "safetensors":
        save_file(step.named, path)
    elif kind == "npz named":
        np.savez(path, **{name: gradient.numpy() for name, gradient in step.named.items()})
    else:
        np.savez(path, *[gradient.numpy() for gradient in step.listed])
    assert same(import_gradients(path, weights=step.weights).bundle, step)


def test_a_list_as_long_as_the_state_dict_is_in_its_order(tmp_path: Path) -> None:
    """Frameworks that ship every array of a state dict ship BatchNorm's statistics among them."""
    model = build_model("resnet18-cifar", seed=1)
    arrays = [torch.randn(t.shape).numpy() for t in model.state_dict().values()]
    np.savez(tmp_path / "g.npz", *arrays)
    imported = import_gradients(tmp_path / "g.npz", model=model)
    held = imported.bundle.tensors("grad/")
    assert held.keys() == {name for name, _ in model.named_parameters()}
    place = list(model.state_dict()).index("layer1.0.bn1.bias")
    assert torch.equal(held["layer1.0.bn1.bias"], torch.from_numpy(arrays[place]))


def test_labels_and_pictures_come_back_through_the_command_line(step: Step) -> None:
    path = step.saved(step.listed)
    done = run_cli("import", path, "--weights", step.weights, "--model", "lenet", "-o", "-", "-q")
    assert done.code == 0
    labelled = run_cli("recover-label", "-o", "-", "-q", stdin=done.out)
    featured = run_cli("recover-feature", "-o", "-", "-q", stdin=labelled.out)
    picture = step.folder / "out.png"
    assert run_cli("reconstruct", "-o", picture, "-q", stdin=featured.out).code == 0
    found = load_image(picture, 32).pixels
    assert torch.equal(to_uint8(found), to_uint8(step.image[0]))


def test_a_head_without_a_name_is_known_by_its_column_sums(step: Step) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 16), nn.Tanh(), nn.Linear(16, 16))
    F.cross_entropy(model(step.image), torch.tensor([7])).backward()
    grads = step.saved([p.grad for p in model.parameters()])
    weights = step.saved(list(model.state_dict().values()), "listed.pt")
    imported = import_gradients(grads, weights=weights)
    assert imported.bundle.model.head == "2"  # by place: a matrix, its bias, the head
    found = gradleak.recover_label(imported.bundle)
    assert found.result.samples[0].classes == (7,)


# Matching


def test_guesses_are_told(step: Step) -> None:
    renamed = {f"client.{name}": gradient for name, gradient in step.named.items()}
    renamed["last"] = renamed.pop("client.fc.weight")
    imported = import_gradients(step.saved(renamed), weights=step.weights)
    assert same(imported.bundle, step)
    told = {guess.parameter: (guess.saved, guess.reason) for guess in imported.guesses}
    assert told["fc.weight"] == ("last", "by shape 10×768")
    assert told["fc.bias"] == ("client.fc.bias", "by the name's end")
    assert len(told) == len(step.named)


def test_an_end_that_several_names_share_goes_to_the_longest(tmp_path: Path) -> None:
    weights = {"a.b.weight": torch.zeros(2, 2), "b.weight": torch.zeros(2, 2)}
    grads = {"x.a.b.weight": torch.ones(2, 2), "x.b.weight": torch.full((2, 2), 2.0)}
    torch.save(weights, tmp_path / "w.pt")
    torch.save(grads, tmp_path / "g.pt")
    found = import_gradients(tmp_path / "g.pt", weights=tmp_path / "w.pt").bundle.tensors("grad/")
    assert {name: float(t[0, 0]) for name, t in found.items()} == {"a.b.weight": 1, "b.weight": 2}


def test_ambiguity_is_an_error_that_names_the_options(step: Step) -> None:
    path = step.saved({f"g{n}": gradient for n, gradient in enumerate(step.listed)})
    with pytest.raises(InputError, match=r"g1, g3, g5 of shape 12 could be any of.*--map.*--in-or"):
        import_gradients(path, weights=step.weights)
    assert same(import_gradients(path, weights=step.weights, ordered=True).bundle, step)
    given = {
        "g1": "features.0.bias",
        "g3": "features.2.bias",
        "g2": "features.2.weight",
        "g4": "features.4.weight",
    }
    assert same(import_gradients(path, weights=step.weights, given=given).bundle, step)


def test_partial_gradients_are_imported_and_the_rest_is_named(step: Step) -> None:
    path = step.saved({name: g for name, g in step.named.items() if name.startswith("fc")})
    imported = import_gradients(path, weights=step.weights, model="lenet")
    assert "features.0.weight" in imported.missing
    assert set(imported.bundle.names("grad/")) == {"fc.weight", "fc.bias"}
    done = run_cli("import", path, "--weights", step.weights, "-o", step.folder / "b.safetensors")
    assert "no gradient  of 6 parameters: features.0.weight" in done.text


REFUSED: dict[str, tuple[Callable[[Step], Any], str]] = {
    "another shape": (
        lambda s: s.named | {"fc.weight": torch.zeros(10, 7)},
        r"the saved gradient fc.weight has shape \[10, 7\], and fc.weight has \[10, 768\]",
    ),
    "nothing it fits": (
        lambda s: s.named | {"extra": torch.zeros(5, 5)},
        "the saved extra has shape 5×5, and no parameter that is left has",
    ),
    "no tensors": (lambda s: {"fc.weight": 3}, "fc.weight, which is no tensor but int"),
    "text": (lambda s: "gradients", r"no tensors by name or in a list \(str\)"),
    "the module itself": (lambda s: s.model, "holds pickled code, which is not run; save tensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_imported_is_refused_in_one_line(step: Step, case: str) -> None:
    content, reason = REFUSED[case]
    path = step.saved(content(step))
    with pytest.raises(InputError, match=reason):
        import_gradients(path, weights=step.weights)
    done = run_cli("import", path, "--weights", step.weights, "-o", step.folder / "b.safetensors")
    assert done.code == 3
    assert "\n" not in done.line
    assert not (step.folder / "b.safetensors").exists()


def test_object_arrays_are_not_unpickled(step: Step) -> None:
    np.savez(step.folder / "g.npz", a=np.array([object()], dtype=object))
    with pytest.raises(InputError, match="arrays of Python objects, which need pickled code"):
        import_gradients(step.folder / "g.npz", weights=step.weights)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((), "one of the two"),
        (("g.pt", "--before", "a.pt", "--after", "b.pt"), "one of the two"),
        (("--before", "a.pt"), "--before and --after go together"),
        (("g.pt", "--model-arg", "width=3"), "--model-arg goes with --model"),
        (("g.pt", "--model", "lenet", "--model-arg", "width"), "not KEY=VALUE"),
        (("g.pt", "--map", "a"), "not SAVED=PARAM"),
        (("g.pt", "--lr", "-1"), "no learning rate"),
        (("g.pt", "--mean", "a,b"), "not numbers with commas"),
        (("g.pt", "--std", "0,1,1"), "not positive numbers"),
        (("g.pt", "--mode", "test"), "no mode 'test'"),
    ],
)
def test_calls_that_mean_nothing_are_usage_errors(
    options: tuple[str, ...], reason: str, tmp_path: Path
) -> None:
    done = run_cli("import", *options, cwd=tmp_path)
    assert done.code == 2
    assert reason in done.line


# Updates


def trained(step: Step, lr: float, steps: int = 1) -> dict[str, Tensor]:
    optimiser = torch.optim.SGD(step.model.parameters(), lr=lr)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(step.model(step.image), torch.tensor([LABEL])).backward()
        optimiser.step()
    return {name: t.clone() for name, t in step.model.state_dict().items()}


@pytest.mark.parametrize("lr", [1e-3, 0.1])
def test_the_difference_of_two_checkpoints_is_the_gradient_to_their_rounding(
    step: Step, lr: float
) -> None:
    gradients = {name: gradient.clone() for name, gradient in step.named.items()}
    after = step.saved(trained(step, lr), "after.pt")
    imported = import_gradients(before=step.weights, after=after, lr=lr, model="lenet")
    held = imported.bundle.tensors("grad/")
    error = sum(float((held[n] - g).double().square().sum()) for n, g in gradients.items())
    size = sum(float(g.double().square().sum()) for g in gradients.values())
    assert imported.precision is not None
    assert 0.3 * imported.precision < (error / size) ** 0.5 < 3.0 * imported.precision
    found = gradleak.recover_label(imported.bundle).result.samples[0]
    assert found.classes == (LABEL,)


def test_a_file_may_hold_both_checkpoints(step: Step) -> None:
    before = {name: tensor.clone() for name, tensor in step.model.state_dict().items()}
    pair = step.saved({"before": before, "after": trained(step, 0.1)})
    with pytest.raises(UsageError, match="--lr"):
        import_gradients(pair)
    imported = import_gradients(pair, lr=0.1)
    assert gradleak.recover_label(imported.bundle).result.samples[0].classes == (LABEL,)
    assert imported.bundle.metadata["update"] == '{"lr": 0.1, "local_steps": 1}'


def test_several_steps_are_told_to_be_a_mean(step: Step) -> None:
    after = step.saved(trained(step, 1e-3, steps=2), "after.pt")
    done = run_cli(
        *("import", "--before", step.weights, "--after", after, "--lr", "1e-3"),
        *("--local-steps", "2", "-o", step.folder / "b.safetensors"),
    )
    assert done.code == 0
    assert "the mean of 2 gradients at weights that moved" in done.err


def test_a_mean_over_steps_is_taken_for_a_gradient_in_their_middle(step: Step) -> None:
    """The weights halfway leave an error of second order; those before, one of first order."""
    before = {name: t.clone() for name, t in step.model.state_dict().items()}
    errors = []
    for lr in (1e-3, 5e-4):
        step.model.load_state_dict(before)
        bundle = Bundle.from_update(before, trained(step, lr, steps=3), lr, local_steps=3)
        at_middle, at_first = build_model("lenet"), build_model("lenet")
        at_middle.load_state_dict(bundle.tensors("param/"))
        at_first.load_state_dict(before)
        row = []
        for model in (at_first, at_middle):
            F.cross_entropy(model(step.image), torch.tensor([LABEL])).backward()
            gaps = [
                (bundle.tensor(f"grad/{name}") - p.grad).double().square().sum()
                for name, p in model.named_parameters()
            ]
            row.append(float(torch.stack(gaps).sum().sqrt()))
        errors.append(row)
    (first, middle), (half_first, half_middle) = errors
    assert first / half_first == pytest.approx(2.0, rel=0.15)
    assert middle / half_middle == pytest.approx(4.0, rel=0.15)
    assert middle < 0.1 * first


def test_no_label_of_a_mean_over_steps_is_called_unique(step: Step) -> None:
    after = step.saved(trained(step, 1e-3, steps=2), "after.pt")
    imported = import_gradients(before=step.weights, after=after, lr=1e-3, local_steps=2)
    found = gradleak.recover_label(imported.bundle, batch_size=1).result
    assert found.verdict == "ambiguous"
    assert "a mean over 2 steps" in found.reason
    assert found.labels is not None
    assert float(found.labels[0, LABEL]) == pytest.approx(1.0, abs=2e-3)


def test_an_unknown_learning_rate_leaves_the_loss_scale_open(step: Step) -> None:
    after = step.saved(trained(step, 0.05), "after.pt")
    imported = import_gradients(before=step.weights, after=after, lr="unknown")
    found = gradleak.recover_label(imported.bundle, loss_scale="unknown").result
    assert found.samples[0].classes == (LABEL,)
    assert found.samples[0].loss_scale == pytest.approx(0.05, rel=1e-3)


def test_frozen_parameters_have_no_gradient(step: Step) -> None:
    before = dict(step.model.state_dict())
    after = before | {"fc.weight": before["fc.weight"] - 0.1}
    update = update_gradient(before, after, 0.1)
    assert set(update.gradients) == {"fc.weight"}
    assert "features.0.weight" in update.unchanged


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s, "the same"),
        (lambda s: {n: t for n, t in s.items() if n != "fc.bias"}, "only one of the two"),
        (lambda s: s | {"fc.bias": torch.zeros(3)}, "before and"),
    ],
)
def test_checkpoints_of_different_networks_are_refused(
    step: Step, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], reason: str
) -> None:
    before = dict(step.model.state_dict())
    with pytest.raises(InputError, match=reason):
        update_gradient(before, change(before), 0.1)


# From Python


def test_bundles_are_made_of_gradients_in_memory(step: Step) -> None:
    for gradients in (None, step.named, step.listed):
        bundle = Bundle.from_gradients(step.model, gradients)
        assert same(bundle, step)
        assert bundle.model.head == "fc"
        assert bundle.model.input_shape == (3, 32, 32)  # the only size that LeNet takes
    with pytest.raises(InputError, match="3 gradients were given for 8 parameters"):
        Bundle.from_gradients(step.model, step.listed[:3])
    with pytest.raises(InputError, match="has no parameter nose"):
        Bundle.from_gradients(step.model, {"nose": torch.zeros(3)})


def test_bundles_are_made_of_updates_in_memory(step: Step) -> None:
    before = build_model("lenet", seed=5)
    trained(step, 0.1)
    bundle = Bundle.from_update(before, step.model, 0.1)
    assert gradleak.recover_label(bundle).result.samples[0].classes == (LABEL,)
    plain = Bundle.from_update(before.state_dict(), step.model.state_dict(), 0.1)
    assert plain.tensors("grad/").keys() == bundle.tensors("grad/").keys()
    for lr, steps in ((0.0, 1), (0.1, 0)):
        with pytest.raises(GradleakError):
            Bundle.from_update(before, step.model, lr, local_steps=steps)


def test_own_networks_take_arguments(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    (step.folder / "own_net.py").write_text(
        "from torch import nn\n"
        "def build(width, activation='tanh'):\n"
        "    act = {'tanh': nn.Tanh, 'sigmoid': nn.Sigmoid}[activation]\n"
        "    layers = nn.Linear(768, width), act(), nn.Linear(width, 4)\n"
        "    return nn.Sequential(nn.Flatten(), *layers)\n"
    )
    monkeypatch.syspath_prepend(step.folder)
    arguments = ("--model", "own_net:build", "--model-arg", "width=9")
    kind = ("--model-arg", "activation=sigmoid")
    captured = run_cli(
        *("capture", *arguments, *kind, "--image", photograph("chelsea"), "--size", "16"),
        *("--label", "2", "-o", "-", "-q"),
    )
    assert captured.code == 0, captured.err
    labelled = run_cli("recover-label", "-o", "-", "-q", stdin=captured.out)
    featured = run_cli("recover-feature", "-o", "-", "-q", stdin=labelled.out)
    (step.folder / "f.safetensors").write_bytes(featured.out)
    assert Bundle.open(step.folder / "f.safetensors").model.options == {
        "width": 9,
        "activation": "sigmoid",
    }
    path = step.folder / "f.safetensors"
    again = run_cli("reconstruct", path, "--model", "own_net:build", "--json")
    assert again.object["verdict"] == "unique"
    # An argument on the command line comes before the bundle's.
    other = run_cli(
        *("reconstruct", path, "--model", "own_net:build", "--model-arg", "width=7"),
        *("--method", "match"),
    )
    assert other.code == 3
    assert "[9, 768] in the bundle and [7, 768] in the network" in other.line
    sys.modules.pop("own_net", None)


def test_gradients_that_are_not_there_or_not_finite_are_refused(tmp_path: Path) -> None:
    network = build_model("lenet")
    torch.save(network.state_dict(), tmp_path / "net.pt")
    gradients = {name: torch.ones_like(p) for name, p in network.named_parameters()}
    gradients["fc.bias"][2] = torch.nan
    torch.save(gradients, tmp_path / "nan.pt")
    torch.save({}, tmp_path / "empty.pt")
    content = (tmp_path / "net.pt").read_bytes()
    (tmp_path / "short.pt").write_bytes(content[: len(content) // 2])
    out = tmp_path / "g.safetensors"
    for name, line in {
        "nan.pt": "the gradient of fc.bias in {path} holds NaN",
        "empty.pt": "{path} holds no gradient; save them after loss.backward()",
        "short.pt": "{path} is cut short or damaged; copy it again",
        "nope.pt": "there is no file {path}; check the name",
    }.items():
        path = tmp_path / name
        done = run_cli("import", path, "--weights", tmp_path / "net.pt", "-o", out)
        assert done.code == 3
        assert line.format(path=path) in done.line
        assert not out.exists()
