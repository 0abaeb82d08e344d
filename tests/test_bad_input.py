"""Bad input: each kind has an exit code and one line that says what is wrong and the mend."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import photographs
import pytest
import torch
from conftest import Capture, assert_refused, metadata_of, refuse_label, run_cli
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from safetensors.torch import save as serialise
from torch import Tensor

from gradleak import Bundle, IncompleteError, InputError
from gradleak.head import read_head

Save = Callable[..., Path]
Tensors = dict[str, Tensor]


# --- Tensors ------------------------------------------------------------------------------------


def test_dtypes_and_shapes(head_tensors: Tensors, save: Save) -> None:
    weight = head_tensors["grad/fc.weight"]
    integers = head_tensors | {"grad/fc.weight": weight.to(torch.int32)}
    refuse_label(save(integers), "grad/fc.weight has dtype I32, which no gradient or weight has")
    narrow = head_tensors | {"grad/fc.weight": weight[:, :5]}
    text = "grad/fc.weight has shape [10, 5] and param/fc.weight has [10, 768]"
    refuse_label(save(narrow), text)
    folded = {n: t.reshape(10, 3, 16, 16) if t.dim() == 2 else t for n, t in head_tensors.items()}
    refuse_label(save(folded), "no gradient of a Linear layer")


def test_what_is_missing(head_tensors: Tensors, save: Save) -> None:
    weights = {n: t for n, t in head_tensors.items() if n.startswith("param")}
    refuse_label(save(weights), "holds no gradient (no tensor named grad/…)")
    gradients = {n: t for n, t in head_tensors.items() if n.startswith("grad")}
    refuse_label(save(gradients), "holds no param/fc.weight; give the model's", code=4)
    refuse_label(save({"grad/fc.bias": gradients["grad/fc.bias"]}), "no gradient of a Linear layer")
    refuse_label(save(head_tensors), "(grad/x.weight); choose", "--head", "x", code=4)


def test_several_heads(capture: Capture, save: Save) -> None:
    """Of a loss without softmax no layer's columns sum to zero, and nothing tells the head."""
    tensors = load_file(capture("--label", "3"))
    tensors["grad/fc4.weight"] = tensors["grad/fc4.weight"] + 0.1
    text = "the head could be any of fc1, fc2, fc3, fc4; name the classifier with --head NAME"
    refuse_label(save(tensors), text)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize(
    "name", ["grad/fc.weight", "grad/fc.bias", "param/fc.weight", "param/fc.bias"]
)
def test_nan_and_infinity_in_the_head(
    name: str, value: str, head_tensors: Tensors, save: Save
) -> None:
    head_tensors[name].view(-1)[3] = float(value)
    kind = "NaN" if value == "nan" else "infinity"
    refuse_label(save(head_tensors), f"{name} holds {kind}")


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("name", ["grad/fc1.weight", "grad/fc3.weight", "param/fc2.weight"])
def test_nan_and_infinity_below_the_head(
    name: str, value: str, featured: Path, tmp_path: Path
) -> None:
    tensors = load_file(featured)
    tensors[name].fill_(float(value))
    save_file(tensors, tmp_path / "b", metadata_of(featured))
    kind = "NaN" if value == "nan" else "infinity"
    for command in ("recover-feature", "reconstruct"):
        assert_refused(run_cli(command, tmp_path / "b"), 3, f"{name} holds {kind}")


@pytest.mark.parametrize("name", ["label/soft", "feature/fc1"])
def test_nan_in_what_was_recovered(name: str, featured: Path, tmp_path: Path) -> None:
    tensors = load_file(featured)
    tensors[name].fill_(float("nan"))
    save_file(tensors, tmp_path / "b", metadata_of(featured))
    assert_refused(run_cli("reconstruct", tmp_path / "b"), 3, f"{name} holds NaN")


def test_not_of_softmax_cross_entropy(head_tensors: Tensors, save: Save) -> None:
    weight = head_tensors["grad/fc.weight"]
    gradient = {"grad/fc.weight": weight.abs(), "param/fc.weight": head_tensors["param/fc.weight"]}
    refuse_label(save(gradient), "is not a softmax cross-entropy gradient; check the loss")
    mean_squares = head_tensors | {"grad/fc.bias": head_tensors["grad/fc.bias"].flip(0)}
    refuse_label(save(mean_squares), "do not belong together; capture both in one step")


# --- Gradients that determine nothing, or too much ----------------------------------------------


def test_a_zero_gradient_is_unidentifiable(head_tensors: Tensors, save: Save) -> None:
    for name in ("grad/fc.weight", "grad/fc.bias"):
        head_tensors[name].zero_()
    path = save(head_tensors)
    done = run_cli("recover-label", path, "--json")
    assert (done.code, done.err) == (4, "")
    assert done.object["verdict"] == "unidentifiable"
    assert done.object["samples"] == []
    labelled = head_tensors | {"label/soft": torch.full((1, 10), 0.1)}
    assert_refused(run_cli("recover-feature", save(labelled)), 4, "gradient is exactly zero")


def test_a_batch_beyond_its_classes_is_counted_and_not_solved(
    capture: Capture, tmp_path: Path
) -> None:
    photo = photographs.photographs()
    images = [x for path in photo[:10] for x in ("--image", path)]
    labels = [x for label in range(10) for x in ("--label", label)]
    path = capture(*images, *labels, model="lenet", size=32)
    out = tmp_path / "b.safetensors"
    done = run_cli("recover-label", path, "--method", "scale", "--json", "-o", out)
    found = done.object
    assert (done.code, done.err) == (4, "")
    assert (found["verdict"], found["batch_size"], found["rank"]) == ("unidentifiable", 10, 9)
    # The bundle is written all the same, with the verdict in its stages.
    assert Bundle.open(out).stages[-1]["verdict"] == "unidentifiable"
    assert "label/soft" not in Bundle.open(out)
    assert_refused(run_cli("recover-feature", out), 4, "run gradleak recover-label first")


def test_a_later_stage_needs_the_earlier_ones(fcn: Path, labelled: Path) -> None:
    assert_refused(run_cli("recover-feature", fcn), 4, "holds no label/soft; run gradleak recover")
    assert_refused(run_cli("reconstruct", fcn), 4, "holds no label/soft; run gradleak recover-l")
    assert_refused(run_cli("reconstruct", labelled), 4, "no feature/fc1; run gradleak recover-f")


def test_a_label_of_another_gradient(labelled: Path, tmp_path: Path) -> None:
    tensors = load_file(labelled)
    tensors["label/soft"] = tensors["label/soft"].roll(5, 1).contiguous()
    save_file(tensors, tmp_path / "b", metadata_of(labelled))
    assert_refused(run_cli("recover-feature", tmp_path / "b"), 3, "the label misses the head grad")
    tensors["label/soft"] = torch.full((1, 5), 0.2)
    save_file(tensors, tmp_path / "b", metadata_of(labelled))
    assert_refused(run_cli("recover-feature", tmp_path / "b"), 3, "for a head of 17 classes")


# --- Numbers and claims that lead nowhere -------------------------------------------------------


def test_a_gradient_too_large_for_any_feature(head_tensors: Tensors, save: Save) -> None:
    vast = {
        "grad/fc.weight": head_tensors["grad/fc.weight"] * 1e30,
        "param/fc.weight": head_tensors["param/fc.weight"],
    }
    assert run_cli("recover-label", save(vast), "--json").code == 4


def chain(activation: str) -> dict[str, object]:
    """Return the metadata of fcn4's layers with another activation."""
    return {"layers": [{"name": f"fc{n}", "activation": activation} for n in (1, 2, 3, 4)]}


@pytest.mark.parametrize("name", ["param/fc1.weight", "param/fc3.weight", "feature/fc1"])
def test_zeros_where_no_gradient_could_come_from(name: str, featured: Path, tmp_path: Path) -> None:
    tensors = load_file(featured)
    tensors[name].zero_()
    save_file(tensors, tmp_path / "b", metadata_of(featured))
    assert run_cli("reconstruct", tmp_path / "b").code == 4


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        ({"std": [1e-300] * 3}, (0, 4)),
        ({"std": [1e300] * 3}, (0, 4)),
        ({"mean": [0.5]}, (0, 3)),
        ({"input_shape": [3, 8, 9]}, (0, 3)),
        ({"input_shape": None}, (0, 4)),
        ({"layers": [{"name": "fc1", "activation": "leaky_relu:x"}, {"name": "fc4"}]}, (3, 3)),
        (chain("leaky_relu:x"), (4, 4)),
        (chain("relu6"), (4, 4)),
    ],
)
def test_false_metadata(
    change: dict[str, object], codes: tuple[int, int], featured: Path, tmp_path: Path
) -> None:
    metadata = metadata_of(featured)
    metadata["model"] = json.dumps({**json.loads(metadata["model"]), **change})
    save_file(load_file(featured), tmp_path / "b", metadata)
    for command, code in zip(("recover-feature", "reconstruct"), codes, strict=True):
        done = run_cli(command, tmp_path / "b")
        assert done.code == code
        assert len(done.err.splitlines()) <= 1


def test_a_label_as_wide_as_another_head(labelled: Path, featured: Path, tmp_path: Path) -> None:
    tensors = load_file(featured)
    tensors["label/soft"] = torch.full((1, 16), 1 / 16)
    save_file(tensors, tmp_path / "b", metadata_of(featured))
    assert_refused(run_cli("reconstruct", tmp_path / "b"), 3, "label/soft has shape [1, 16]")


# --- Anything -----------------------------------------------------------------------------------


def small_bundle(lenet: Path) -> bytes:
    tensors = {n: t[:, :8].contiguous() if t.dim() == 2 else t for n, t in load_file(lenet).items()}
    return serialise({n: t for n, t in tensors.items() if "fc" in n}, metadata_of(lenet))


@given(data=st.data())
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_header_brings_anything_but_an_answer(
    data: st.DataObject, lenet: Path, tmp_path: Path
) -> None:
    raw = bytearray(small_bundle(lenet))
    end = 8 + int.from_bytes(raw[:8], "little")
    places = data.draw(st.lists(st.integers(0, end - 1), min_size=1, max_size=4))
    for place in places:
        raw[place] = data.draw(st.sampled_from(b'0123456789[]{}",:abefnlrtu.-\\\x00\xff'))
    path = tmp_path / "b"
    path.write_bytes(bytes(raw))
    with contextlib.suppress(InputError, IncompleteError):  # anything else fails this test
        bundle = Bundle.open(path)
        assert isinstance(bundle.stages, list)
        assert isinstance(bundle.batch_size, int | None)
        head = read_head(bundle)
        assert head.weight.shape == head.grad_weight.shape
