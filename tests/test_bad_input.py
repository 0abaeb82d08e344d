"""Bad input: each kind has an exit code and one line that says what is wrong and the mend."""

from __future__ import annotations

import contextlib
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import photographs
import pytest
import torch
from conftest import CAT, Capture, Done, metadata_of, run_cli
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from safetensors.torch import save as serialise
from torch import Tensor

from gradleak import Bundle, IncompleteError, InputError
from gradleak.head import read_head

Save = Callable[..., Path]
Tensors = dict[str, Tensor]
STAGES = ("recover-label", "recover-feature", "reconstruct")


def assert_refused(done: Done, code: int, text: str) -> None:
    assert done.code == code, done
    assert done.line.startswith("gradleak: "), done.err
    assert text in done.line
    assert "; " in done.line, "no mend"


def refuse_label(path: Path, text: str, *options: object, code: int = 3) -> None:
    """Check the line for people and the object for machines of one refused bundle."""
    assert_refused(run_cli("recover-label", path, *options), code, text)
    found = run_cli("recover-label", path, *options, "--json").object
    assert (found["verdict"], found["exit_code"]) == ("failed", code)
    assert text in found["reason"]


# --- Files --------------------------------------------------------------------------------------


def header(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


FILES = {
    "empty": (b"", "is empty"),
    "shorter than a header's length": (b"abc", "header too small"),
    "truncated header": (header(b'{"grad/fc.weight":{"dtype":"F32"')[:20], "header"),
    "oversized header": (struct.pack("<Q", 1 << 60) + b"{}", "header too large"),
    "header beyond the file": (struct.pack("<Q", 5000) + b"{}", "invalid header length"),
    "header that is not JSON": (header(b"not JSON"), "header"),
    "header that is no object": (header(b"[1,2]"), "header"),
    "no tensors": (header(b"{}"), "holds no gradient (no tensor named grad/…)"),
    "something else": (b"%PDF-1.7 and more text of another kind", "safetensors file"),
    "unknown dtype": (
        header(b'{"grad/w":{"dtype":"F4","shape":[2,1],"data_offsets":[0,1]}}') + b"x",
        "dtype F4",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_bundle(kind: str, tmp_path: Path) -> None:
    data, text = FILES[kind]
    path = tmp_path / "given"
    path.write_bytes(data)
    for command in ("inspect", *STAGES):
        done = run_cli(command, path)
        assert_refused(done, 3, text)
        assert str(path) in done.line
    assert_refused(run_cli("recover-label", stdin=data), 3, text)


def test_a_file_cut_in_the_data(lenet: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut"
    path.write_bytes(lenet.read_bytes()[:-1])
    refuse_label(path, f"{path} is not a complete safetensors file")
    assert_refused(run_cli("inspect", stdin=lenet.read_bytes()[:-1]), 3, "standard input is not a")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    refuse_label(tmp_path, f"{tmp_path} is a folder; give a safetensors file")
    refuse_label(tmp_path / "x", f"{tmp_path / 'x'} does not exist; check the path")
    refuse_label(tmp_path / ("x" * 300), "File name too long")
    refuse_label(Path("/dev/null"), "/dev/null is empty")


def test_a_newer_schema(lenet: Path, save: Save) -> None:
    newer = {**metadata_of(lenet), "schema": "2"}
    text = "has schema 2, and this gradleak 0.1.0 reads up to 1; install a gradleak that reads"
    refuse_label(save(load_file(lenet), newer), text)
    for schema in ("two", "9" * 5000, "-1", "", "٢"):
        refuse_label(save(load_file(lenet), {**newer, "schema": schema}), "not a number")
    foreign = save(load_file(lenet), {"format": "other", "schema": "2"})
    assert run_cli("recover-label", foreign, "--head", "fc").code == 0


MODELS = {
    "not JSON": "{",
    "too deep": "[" * 100_000,
    "no object": "[]",
    "a number for a name": '{"name": 5}',
    "two pixels": '{"input_shape": [3, 8]}',
    "no layers": '{"from_image": true}',
}


@pytest.mark.parametrize("kind", MODELS)
def test_metadata_of_the_model(kind: str, head_tensors: Tensors, save: Save) -> None:
    refuse_label(save(head_tensors, {"model": MODELS[kind]}), "the model's metadata ")


@pytest.mark.parametrize("stages", ["{", "[" * 100_000, '"x"', "[1]", "[null]", "9" * 5000])
def test_metadata_of_the_stages(stages: str, head_tensors: Tensors, save: Save) -> None:
    path = save(head_tensors, {"stages": stages})
    refuse_label(path, "the bundle's metadata 'stages' is not")
    assert_refused(run_cli("inspect", path), 3, "'stages' is not")


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
    tensors = load_file(capture("--label", "3"))
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


def test_a_batch_is_counted_and_not_solved(capture: Capture, tmp_path: Path) -> None:
    names = ("chelsea", "coffee", "astronaut")
    images = [x for name in names for x in ("--image", photographs.photograph(name))]
    labels = [x for label in (1, 2, 3) for x in ("--label", label)]
    path = capture(*images, *labels, model="lenet", size=32)
    out = tmp_path / "b.safetensors"
    done = run_cli("recover-label", path, "--json", "-o", out)
    found = done.object
    assert (done.code, done.err) == (4, "")
    assert (found["verdict"], found["batch_size"]) == ("failed", 3)
    assert "rank 3" in found["reason"]
    # The bundle is written all the same, with the verdict in its stages.
    assert Bundle.open(out).stages[-1]["verdict"] == "failed"
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


# --- Pictures -----------------------------------------------------------------------------------


def refuse_picture(path: Path, text: str, folder: Path) -> None:
    done = run_cli("capture", "--model", "lenet", "--image", path, cwd=folder)
    assert_refused(done, 3, text)
    assert str(path) in done.line
    assert not (folder / "grads.safetensors").exists()


def test_pictures_that_are_none(tmp_path: Path) -> None:
    refuse_picture(tmp_path / "missing.png", "there is no file", tmp_path)
    refuse_picture(tmp_path, "is a folder; name a picture file", tmp_path)
    (tmp_path / "text.png").write_text("no picture at all")
    refuse_picture(tmp_path / "text.png", "is not a picture that can be read", tmp_path)
    (tmp_path / "cut.png").write_bytes(CAT.read_bytes()[:5000])
    refuse_picture(tmp_path / "cut.png", "is damaged", tmp_path)


def test_a_decompression_bomb(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(bomb)  # 50 kB on disk
    refuse_picture(bomb, "has more than 64 million pixels; scale the picture down", tmp_path)


def test_pictures_of_every_kind_are_the_same_to_a_network(tmp_path: Path) -> None:
    grey = Image.open(photographs.photograph("camera")).convert("L").resize((32, 32))
    turned = grey.convert("RGB").transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    grey.save(tmp_path / "grey.png")
    grey.convert("RGB").save(tmp_path / "rgb.png")
    grey.convert("RGBA").save(tmp_path / "alpha.png")
    grey.quantize(256).save(tmp_path / "palette.png")
    grey.convert("CMYK").save(tmp_path / "cmyk.tiff")
    turned.save(tmp_path / "exif.png", exif=exif)
    written = {}
    for path in sorted(x for x in tmp_path.iterdir() if x.suffix in (".png", ".tiff")):
        command = ("capture", "--model", "lenet", "--label", 1, "--image", path, "-q", "-o", "b")
        assert run_cli(*command, cwd=tmp_path) == Done(0, b"", "")
        written[path.stem] = Bundle.open(tmp_path / "b").tensor("grad/features.0.weight")
    assert len(written) == 6
    for kind, gradient in written.items():
        assert torch.equal(gradient, written["rgb"]), kind


# --- Weights ------------------------------------------------------------------------------------


class Code:
    """Unpickling one makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_pickled_code_is_not_run(lenet: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    pickle.loads(pickle.dumps(Code(made)))
    made.rmdir()  # it does what it is to do
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"fc.weight": Code(made)}))
    torch.save({"fc.weight": Code(made)}, tmp_path / "archive.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    for name in ("plain.pth", "archive.pt", "module.pt"):
        refuse_label(lenet, "pickled code, which is not run", "--weights", tmp_path / name)
        image = ("--image", CAT, "--weights", tmp_path / name)
        assert_refused(run_cli("capture", "--model", "lenet", *image), 3, "pickled code, which is")
    assert not made.exists()


def test_weights_that_are_none(lenet: Path, tmp_path: Path) -> None:
    refuse_label(lenet, "cannot be read", "--weights", tmp_path / "missing.pth")
    refuse_label(lenet, "is no weights file", "--weights", CAT)
    torch.save([1, 2], tmp_path / "list.pth")
    refuse_label(lenet, "holds no state dict", "--weights", tmp_path / "list.pth")
    save_file({"fc.weight": torch.ones(10, 5)}, tmp_path / "w.safetensors")
    refuse_label(lenet, "and param/fc.weight has [10, 5]", "--weights", tmp_path / "w.safetensors")


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
