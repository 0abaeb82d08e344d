"""Finding the classifier head, and heads written by hand: no metadata is ever needed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Capture, run_cli
from safetensors.torch import load_file, save_file
from torch import Tensor

from gradleak import Bundle, IncompleteError, InputError
from gradleak.head import find_head, read_head
from gradleak.truth import Truth

Save = Callable[..., Path]
Tensors = dict[str, Tensor]


def bundle(*layers: str, **model: object) -> Bundle:
    """Make a bundle of one 4×6 matrix per layer, and the model's metadata."""
    names = [f"{layer}.weight" if layer else "weight" for layer in layers]
    tensors = {f"grad/{name}": torch.ones(4, 6) for name in names}
    metadata = {"model": json.dumps(model)} if model else {}
    return Bundle({**tensors, "grad/conv.weight": torch.ones(4, 4, 3, 3)}, metadata)


def test_the_head_is_the_metadatas_then_the_last_layers_then_the_only_matrix() -> None:
    layers = [{"name": "a"}, {"name": "b"}]
    assert find_head(bundle("b", "c", head="c", layers=[{"name": "b"}], name="resnet18")) == "c"
    assert find_head(bundle("b", layers=layers[::-1][:1], name="resnet18")) == "b"
    assert find_head(bundle("a", "b", name="resnet18")) == "fc"
    assert find_head(bundle("a", "b", name="alexnet")) == "classifier.6"
    assert find_head(bundle("model.head")) == "model.head"
    assert find_head(bundle("")) == ""


def test_a_network_that_is_not_built_in_leaves_the_only_matrix() -> None:
    assert find_head(bundle("cls", name="vgg16")) == "cls"
    assert find_head(bundle("cls", name="nowhere:factory")) == "cls"


def test_claims_of_size_do_not_fill_the_memory() -> None:
    vast = {"classes": 10**12, "input_shape": [3, 10**6, 10**6], "options": {"head_bias": 5}}
    assert find_head(bundle("a", "b", name="lenet", **vast)) == "fc"


def test_several_candidates_are_listed() -> None:
    with pytest.raises(InputError, match=r"could be any of a, b; name .* --head NAME"):
        find_head(bundle("a", "b"))
    with pytest.raises(InputError, match="no gradient of a Linear layer"):
        find_head(bundle())


def test_a_head_that_is_not_there() -> None:
    with pytest.raises(IncompleteError, match=r"grad/z\.weight.*it holds a, b"):
        read_head(bundle("a", "b"), name="z")
    with pytest.raises(InputError, match=r"has shape \[4, 4, 3, 3\]"):
        read_head(bundle("a").extended({"param/conv.weight": torch.ones(4, 4, 3, 3)}), name="conv")


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (1, 5)])
def test_a_head_has_two_classes_and_a_feature(shape: tuple[int, int]) -> None:
    empty = Bundle({"grad/fc.weight": torch.ones(shape), "param/fc.weight": torch.ones(shape)})
    with pytest.raises(InputError, match="2 classes or more"):
        read_head(empty)


def test_bias_shapes(head_tensors: Tensors) -> None:
    both = {"grad/fc.bias": torch.zeros(5), "param/fc.bias": torch.zeros(5)}
    with pytest.raises(InputError, match=r"param/fc\.bias has shape \[5\] for a head of 10"):
        read_head(Bundle(head_tensors | both))
    flat = {f"{kind}/fc.bias": head_tensors[f"{kind}/fc.bias"][None] for kind in ("grad", "param")}
    with pytest.raises(InputError, match=r"has shape \[1, 10\] for a head of 10"):
        read_head(Bundle(head_tensors | flat))


def test_weights_come_from_a_file(head_tensors: Tensors, tmp_path: Path) -> None:
    state = {n.removeprefix("param/"): t for n, t in head_tensors.items() if n.startswith("param")}
    gradients = Bundle({n: t for n, t in head_tensors.items() if n.startswith("grad")})
    with pytest.raises(IncompleteError, match=r"no param/fc\.weight; .*--weights FILE"):
        read_head(gradients)
    torch.save({"module." + n: t for n, t in state.items()}, tmp_path / "w.pth")
    save_file(state, tmp_path / "w.safetensors")
    for name in ("w.pth", "w.safetensors"):
        head = read_head(gradients, weights=tmp_path / name)
        assert torch.equal(head.weight, head_tensors["param/fc.weight"])
        assert head.bias is not None
    save_file({"other.weight": torch.ones(1)}, tmp_path / "o.safetensors")
    with pytest.raises(InputError, match=r"o\.safetensors holds no fc\.weight"):
        read_head(gradients, weights=tmp_path / "o.safetensors")
    save_file({"fc.weight": torch.ones(10, 5)}, tmp_path / "s.safetensors")
    with pytest.raises(InputError, match=r"grad/fc\.weight has shape .* param/fc\.weight has"):
        read_head(gradients, weights=tmp_path / "s.safetensors")


# --- Heads written by hand ----------------------------------------------------------------------


def answer(path: Path, *options: str, code: int = 0) -> dict[str, object]:
    done = run_cli("recover-label", path, "--json", *options)
    assert (done.code, done.err) == (code, "")
    return done.object


def assert_smooth_label_3(found: dict[str, object], classes: int) -> None:
    assert found["verdict"] == "unique"
    (sample,) = found["samples"]  # type: ignore[misc]
    assert sample["classes"][0] == 3
    assert sample["weights"][0] == pytest.approx(0.9 + 0.1 / classes, abs=1e-5)
    others = sample["weights"][1:] or [sample["base"]]
    assert others == pytest.approx([0.1 / classes] * len(others), abs=1e-5)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_head_with_bias_is_a_complete_input(
    head_tensors: Tensors, save: Save, metadata: dict[str, str] | None
) -> None:
    path = save(head_tensors, metadata)
    found = answer(path)
    assert found["method"] == "bias"
    assert found["head"] == "fc"
    assert_smooth_label_3(found, 10)


def test_a_bias_whose_gradient_is_withheld_still_enters_the_softmax(
    head_tensors: Tensors, save: Save
) -> None:
    del head_tensors["grad/fc.bias"]
    found = answer(save(head_tensors))
    assert found["method"] == "scale"
    assert_smooth_label_3(found, 10)


def test_a_head_without_bias_is_a_complete_input(
    capture: Capture, tmp_path: Path, save: Save
) -> None:
    truth = tmp_path / "truth.safetensors"
    options = ("--smooth", "0.1", "--label", "3", "--no-head-bias", "--truth", truth)
    full = load_file(capture(*options, model="lenet", size=32))
    path = save({n: full[n] for n in ("grad/fc.weight", "param/fc.weight")})
    assert run_cli("recover-label", path, "-o", path, "-q").code == 0
    done = run_cli("recover-feature", path, "-o", path, "--json")
    assert done.code == 0
    assert done.object["layers"][0]["name"] == "fc"
    known = Truth.load(truth)
    found = Bundle.open(path)
    assert torch.allclose(found.tensor("label/soft"), known.labels, atol=1e-5)
    assert torch.allclose(found.tensor("feature/fc"), known.features["fc"].double(), rtol=1e-5)


def test_features_of_a_head_written_by_hand(head_tensors: Tensors, save: Save) -> None:
    path = save(head_tensors)
    for command in ("recover-label", "recover-feature"):
        assert run_cli(command, path, "-o", path, "-q").code == 0
    feature = Bundle.open(path).tensor("feature/fc")[0]
    delta = head_tensors["grad/fc.bias"].double()
    assert torch.allclose(torch.outer(delta, feature).float(), head_tensors["grad/fc.weight"])


def test_a_bare_linear_layer_has_a_nameless_head(head_tensors: Tensors, save: Save) -> None:
    bare = {name.replace("fc.", ""): tensor for name, tensor in head_tensors.items()}
    found = answer(save(bare))
    assert found["head"] == ""
    assert_smooth_label_3(found, 10)


def test_head_names_the_classifier(head_tensors: Tensors, save: Save) -> None:
    double = {name.replace("fc.", "aux."): tensor for name, tensor in head_tensors.items()}
    path = save(head_tensors | double)
    done = run_cli("recover-label", path)
    assert done.code == 3
    assert "could be any of aux, fc; name the classifier with --head NAME" in done.line
    assert_smooth_label_3(answer(path, "--head", "aux"), 10)
