"""From a picture to its gradient and back, and what is nowhere on the way: the truth."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import photographs
import pytest
import torch
from conftest import CAT, Capture, contents, metadata_of, run_cli, run_shell
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import gradleak
from gradleak.images import load_image
from gradleak.models.build import build_model
from gradleak.truth import Truth

STAGES = ("recover-label", "recover-feature", "reconstruct")


def run_stages(path: Path, *options: object, code: int = 0) -> Path:
    """Run every attack on ``path`` in place; only the last may be incomplete."""
    for command in STAGES:
        last = command == STAGES[-1]
        done = run_cli(command, path, "-o", path, "-q", *(options if last else ()))
        assert (done.code, done.err) == (code if last else 0, "")
    return path


# --- As typed -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with cat.png, as after copying it out of examples/."""
    made = tmp_path_factory.mktemp("typed")
    (made / "cat.png").write_bytes(CAT.read_bytes())
    return made


def test_capture_and_recover_label_as_typed(folder: Path) -> None:
    done = run_shell("gradleak capture --model resnet18 --image cat.png --smooth 0.1", folder)
    assert done.code == 0
    assert "cat.png: resized 256x320 -> 224x224 (antialiased, centre crop)" in done.err
    predicted = re.search(r"network's own prediction is taken \(class (\d+)\)", done.err)
    assert predicted is not None
    done = run_shell("gradleak recover-label grads.safetensors", folder)
    assert (done.code, done.err) == (0, "")
    found = dict(re.findall(r"^(\S.*?)  +(.*)$", done.text, re.MULTILINE))
    assert found["verdict"].startswith("unique: ")
    assert found["family"] == "smooth"
    weight, error = map(float, found[f"class {predicted[1]}"].split(" ± "))
    assert abs(weight - 0.9001) <= max(4 * error, 1e-6)
    assert 0 < error < 1e-3


def test_the_pipe_as_typed_gives_back_every_pixel(folder: Path) -> None:
    done = run_shell(
        "gradleak capture --model fcn4 --image cat.png --smooth 0.1 --truth truth.safetensors -o -"
        " | gradleak recover-label -o - | gradleak recover-feature -o -"
        " | gradleak reconstruct -o cat-recovered.png",
        folder,
    )
    assert done.code == 0, done.err
    assert "unique: exact" in done.text
    original = load_image(folder / "cat.png", 64).pixels
    with Image.open(folder / "cat-recovered.png") as picture:
        assert (picture.size, picture.mode) == ((64, 64), "RGB")
    recovered = load_image(folder / "cat-recovered.png", None)
    assert recovered.note is None
    assert torch.equal(recovered.pixels, original)
    score = ("score", "cat-recovered.png", "--truth", "truth.safetensors", "--json")
    found = run_cli(*score, cwd=folder).object["samples"][0]["image"]
    assert found["identical_8bit"] is True
    assert (found["differing"], found["total"]) == (0, 64 * 64 * 3)


# --- Every road through -------------------------------------------------------------------------


def test_every_stage_against_the_truth(fcn: Path, recovered: Path, tmp_path: Path) -> None:
    photo, truth = photographs.photograph("chelsea"), tmp_path / "truth.safetensors"
    command = ("capture", "--model", "fcn4", "--size", 8, "--smooth", 0.1, "--label", 3, "-q")
    assert run_cli(*command, "--image", photo, "--truth", truth, "-o", tmp_path / "b").code == 0
    done = run_cli("score", recovered, "--truth", truth, "--against", photo, "--json")
    assert (done.code, done.err) == (0, "")
    (sample,) = done.object["samples"]
    assert sample["label"]["max_error"] < 1e-6
    assert sample["label"]["top_k"] is True
    assert sample["features"].keys() == {"fc1", "fc2", "fc3", "fc4"}
    assert max(sample["features"].values()) < 1e-5
    psnr = sample["image"]["psnr"]
    assert psnr is None or psnr > 80  # JSON has no infinity
    assert sample["image"]["identical_8bit"] is True
    assert "resized" in done.object["image_note"]
    none = run_cli("score", fcn, "--truth", truth)
    assert (none.code, "nothing to compare" in none.line) == (4, True)


def test_score_refuses_the_truth_of_another_capture(
    recovered: Path, capture: Capture, tmp_path: Path
) -> None:
    two = ("--image", CAT, "--image", photographs.photograph("coffee"))
    assert capture(*two, "--truth", tmp_path / "two", model="lenet", size=32)
    done = run_cli("score", recovered, "--truth", tmp_path / "two")
    assert (done.code, "recovered labels are [1, 17] and the true" in done.line) == (3, True)
    assert run_cli("reconstruct", recovered, "-o", tmp_path / "p.png", "-q").code == 0
    done = run_cli("score", tmp_path / "p.png", "--truth", tmp_path / "two")
    assert (done.code, "image is of 1 samples and the truth of 2" in done.line) == (3, True)
    save_file({"truth/label": torch.ones(3), "truth/image": torch.ones(1)}, tmp_path / "bad")
    for path in (tmp_path / "bad", recovered):
        done = run_cli("score", recovered, "--truth", path)
        assert (done.code, f"{path} is no truth file" in done.line) == (3, True)


def test_mixup_and_smoothing_of_one_sample(capture: Capture, tmp_path: Path) -> None:
    pair = ("--image", CAT, "--image", photographs.photograph("coffee"))
    truth = tmp_path / "truth.safetensors"
    options = ("--mixup", "0.7", "--smooth", "0.2", "--label", 5, "--label", 11, "--truth", truth)
    path = tmp_path / "b.safetensors"
    path.write_bytes(capture(*pair, *options, size=8).read_bytes())
    assert gradleak.Bundle.open(path).batch_size == 1
    found = run_cli("recover-label", path, "--json").object
    assert (found["verdict"], found["family"]) == ("unique", "mixup+smooth")
    (sample,) = found["samples"]
    assert sample["classes"] == [5, 11]
    assert sample["weights"] == pytest.approx([0.56 + 0.2 / 17, 0.24 + 0.2 / 17], abs=1e-5)
    run_stages(path)
    # Mixed pixels are no 8-bit values, and some lie half-way between two.
    image = gradleak.Bundle.open(path).tensor("image/reconstructed")
    assert float((image - Truth.load(truth).images).abs().max()) < 1e-4


def test_gradient_matching_is_honest_about_its_answer(lenet: Path, tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    path.write_bytes(lenet.read_bytes())
    run_stages(path, "--method", "match", "--steps", "20", "--sheet", tmp_path / "s.png", code=4)
    done = run_cli("reconstruct", path, "--method", "match", "--steps", "20", "--json")
    found = done.object
    assert (done.code, found["verdict"], found["exact"]) == (4, "approximate", False)
    assert found["residual"] > found["precision"]
    assert found["matching"]["steps"] == 20
    assert found["matching"]["stopped"] == "steps"
    image = gradleak.Bundle.open(path).tensor("image/reconstructed")
    assert image.shape == (1, 3, 32, 32)
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.width >= 256


def test_a_batch_of_pictures_is_numbered(lenet: Path, tmp_path: Path) -> None:
    bundle = gradleak.Bundle.open(lenet)
    two = bundle.extended({"label/soft": torch.eye(10)[:2].double()})
    two.save(tmp_path / "two.safetensors")
    options = ("--method", "match", "--steps", "1", "-o", tmp_path / "p.png", "--json")
    done = run_cli("reconstruct", tmp_path / "two.safetensors", *options)
    assert done.code == 4
    assert done.object["images"] == [str(tmp_path / f"p-{n}.png") for n in (0, 1)]
    assert sorted(x.name for x in tmp_path.iterdir()) == ["p-0.png", "p-1.png", "two.safetensors"]


def test_capture_may_leave_things_out(capture: Capture, lenet: Path, tmp_path: Path) -> None:
    options = ("--smooth", "0.1", "--label", "3")
    full = load_file(lenet)
    head = {n: t for n, t in full.items() if "/fc." in n}

    def written(*more: str) -> dict[str, Tensor]:
        return load_file(capture(*options, *more, model="lenet", size=32))

    def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
        return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)

    assert same(written("--head-only"), head)
    assert same(written("--withhold-bias"), {n: t for n, t in full.items() if n != "grad/fc.bias"})
    bare = capture(*options, "--no-weights", model="lenet", size=32)
    assert same(load_file(bare), {n: t for n, t in full.items() if n.startswith("grad/")})
    weights = {n.partition("/")[2]: t for n, t in full.items() if not n.startswith("grad/")}
    torch.save(weights, tmp_path / "w.pth")
    one = run_cli("recover-label", bare, "--weights", tmp_path / "w.pth", "--json").object
    other = run_cli("recover-label", lenet, "--json").object
    assert one["samples"] == other["samples"]


def test_the_python_interface_from_end_to_end() -> None:
    model = build_model("fcn4", size=8)
    images = load_image(photographs.photograph("astronaut"), 8).pixels[None]
    captured = gradleak.capture(model, images, torch.tensor([6]))
    with torch.no_grad():  # training goes on, and the bundle keeps the weights at capture
        for parameter in model.parameters():
            parameter.zero_()
    labelled = gradleak.recover_label(captured.bundle)
    assert (labelled.result.verdict, labelled.result.family) == ("unique", "hard")
    features = gradleak.recover_feature(labelled.bundle)
    pictures = gradleak.reconstruct(features.bundle)
    assert pictures.verdict == "unique"
    assert torch.equal((pictures.images * 255).round(), (images * 255).round())
    with pytest.raises(gradleak.InputError, match="unfreeze one"):
        gradleak.capture(model.requires_grad_(False), images, torch.tensor([6]))
    with pytest.raises(gradleak.InputError, match=r"images of shape \[3, 8, 8\]"):
        gradleak.capture(model, images[0], torch.tensor([6]))


def test_capture_leaves_the_model_as_it_was() -> None:
    model = build_model("resnet18-cifar").train()
    model.bn1.eval()  # type: ignore[union-attr,operator]
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        gradleak.capture(model, photographs.centre("chelsea", 32), torch.tensor([1]))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


# --- A network of one's own ---------------------------------------------------------------------

OWN = """
from pathlib import Path
from torch import nn
Path("imported").touch()
def make(classes=4):
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, 2, 1), nn.Sigmoid(), nn.Flatten(), nn.Linear(12 * 16, classes)
    )
"""


def test_a_bundles_word_imports_no_code(tmp_path: Path) -> None:
    (tmp_path / "own_net.py").write_text(OWN)
    imported = tmp_path / "imported"
    own = ("--model", "own_net:make")
    picture = ("--image", CAT, "--size", 8, "--label", 2, "-q", "-o", "b.safetensors")
    try:
        assert run_cli("capture", *own, *picture, cwd=tmp_path).code == 0
        assert imported.exists()
        imported.unlink()
        del sys.modules["own_net"]
        assert gradleak.Bundle.open(tmp_path / "b.safetensors").model.name == "own_net:make"
        for command in ("inspect", *STAGES[:2]):
            output = () if command == "inspect" else ("-o", "b.safetensors")
            assert run_cli(command, "b.safetensors", *output, cwd=tmp_path).code == 0
        done = run_cli("reconstruct", "b.safetensors", cwd=tmp_path)
        assert done.code == 2
        assert "no code; repeat it if you trust it: --model own_net:make" in done.line
        assert not imported.exists()
        done = run_cli("reconstruct", "b.safetensors", *own, "--time-limit", 20, "-q", cwd=tmp_path)
        assert (done.code, done.err) == (0, "")
        assert imported.exists()
    finally:
        sys.modules.pop("own_net", None)


# --- The truth is nowhere -----------------------------------------------------------------------


def test_a_bundle_holds_no_trace_of_its_sample(tmp_path: Path) -> None:
    for name, photo in (("secret-one", "chelsea"), ("secret-two", "coffee")):
        picture = photographs.centre(photo, 8)[0]
        gradleak.images.save_png(tmp_path / f"{name}.png", picture)  # type: ignore[attr-defined]
    images = [x for name in ("secret-one", "secret-two") for x in ("--image", f"{name}.png")]
    common = ("capture", "--model", "fcn4", "--size", 8, "--truth", "hidden", "-q", *images)
    metadata = []
    for labels, options in (
        ((3, 5), ("--smooth", 0.123, "--mixup", 0.37)),
        ((9, 1), ("--smooth", 0.0, "--mixup", 0.8)),
    ):
        label = [x for k in labels for x in ("--label", k)]
        done = run_cli(*common, *label, *options, "-o", "b", cwd=tmp_path)
        assert (done.code, done.err) == (0, "")
        raw = (tmp_path / "b").read_bytes()
        for trace in (b"secret", b"hidden", str(tmp_path).encode(), b"0.123", b"0.37"):
            assert trace not in raw
        found = metadata_of(tmp_path / "b")
        assert not re.search("label|smooth|mix|lambda|truth|target", json.dumps(found).lower())
        found["stages"] = re.sub(r'"seconds": [\d.e-]+', "", found["stages"])
        metadata.append(found)
    assert metadata[0] == metadata[1]


@pytest.mark.parametrize("model", ["fcn4", "lenet"])
def test_the_truth_beside_a_bundle_changes_nothing(
    model: str, fcn: Path, lenet: Path, capture: Capture, tmp_path: Path
) -> None:
    options = ("--method", "match", "--steps", "5") if model == "lenet" else ()
    written = {}
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "grads.safetensors"
        path.write_bytes((lenet if model == "lenet" else fcn).read_bytes())
        if name == "with":
            truth = ("--truth", path.with_name("truth.safetensors"))
            assert capture("--smooth", "0.1", "--label", "3", *truth)
            path.with_name("cat.png").write_bytes(CAT.read_bytes())
        written[name] = run_stages(path, *options, code=4 if model == "lenet" else 0)
    one, other = (contents(path) for path in written.values())
    assert one.keys() == other.keys()
    assert one == other
    assert "image/reconstructed" in one


@pytest.mark.parametrize(
    ("network", "factor", "told"),
    [
        ("fcn4", 64.0, 64.0),
        ("fcn4", 0.3, 0.3),
        ("lenet", 64.0, "unknown"),
        ("lenet", 0.3, "unknown"),
    ],
)
def test_a_loss_scale_is_divided_out_for_the_later_stages(
    network: str, factor: float, told: float | str
) -> None:
    model = build_model(network, classes=20, size=32)
    image = load_image(CAT, 32).pixels[None]
    captured = gradleak.capture(model, image, torch.tensor([3])).bundle
    scaled = {f"grad/{name}": factor * g for name, g in captured.tensors("grad/").items()}
    bundle = captured.extended(scaled, metadata={"loss": json.dumps({"scale": None})})
    labelled = gradleak.recover_label(bundle, loss_scale=told)
    assert labelled.result.verdict == "unique"
    featured = gradleak.recover_feature(labelled.bundle)
    assert featured.verdict == "unique"
    if network == "fcn4":
        assert gradleak.reconstruct(featured.bundle).verdict == "unique"
    truth = gradleak.recover_feature(gradleak.recover_label(captured).bundle)
    for found, known in zip(featured.layers, truth.layers, strict=True):
        assert float((found.features - known.features).norm() / known.features.norm()) < 1e-4
    again = gradleak.recover_label(captured.extended({"label/loss_scale": torch.tensor(7.0)}))
    assert float(again.bundle.tensor("label/loss_scale")) == 1.0
