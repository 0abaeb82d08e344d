"""Files that are no bundle, no picture or no weights: one line, one exit code, nothing written."""

from __future__ import annotations

import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import photographs
import pytest
import torch
from conftest import CAT, Done, assert_refused, metadata_of, refuse_label, run_cli
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from gradleak import Bundle

Save = Callable[..., Path]
Tensors = dict[str, Tensor]
STAGES = ("recover-label", "recover-feature", "reconstruct")


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
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"fc.weight": Code(made)}, protocol=2))
    torch.save({"fc.weight": Code(made)}, tmp_path / "archive.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")
    for name in ("plain.pth", "archive.pt", "module.pt"):
        refuse_label(lenet, "pickled code, which is not run", "--weights", tmp_path / name)
        image = ("--image", CAT, "--weights", tmp_path / name)
        assert_refused(run_cli("capture", "--model", "lenet", *image), 3, "pickled code, which is")
    assert not made.exists()


def test_weights_that_are_none(lenet: Path, tmp_path: Path) -> None:
    refuse_label(lenet, "there is no file", "--weights", tmp_path / "missing.pth")
    refuse_label(lenet, "is no weights file", "--weights", CAT)
    torch.save([1, 2], tmp_path / "list.pth")
    refuse_label(lenet, "holds no state dict", "--weights", tmp_path / "list.pth")
    save_file({"fc.weight": torch.ones(10, 5)}, tmp_path / "w.safetensors")
    refuse_label(lenet, "and param/fc.weight has [10, 5]", "--weights", tmp_path / "w.safetensors")
