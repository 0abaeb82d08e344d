"""Feature maps in bundles, reports and pictures, and the control that noise gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from photographs import photograph
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import gradleak
from gradleak.bundle import FEATURE, Bundle
from gradleak.cli.app import app
from gradleak.errors import IncompleteError, UsageError
from gradleak.images import channel_strip
from gradleak.progress import Step
from gradleak.stages.maps import recover_maps


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LeNet's gradient with its label."""
    path = tmp_path_factory.mktemp("maps") / "labelled.safetensors"
    run("capture", "--image", str(photograph("coffee")), "--model", "lenet", "--size", "32",
        "--classes", "10", "--label", "3", "-o", str(path.with_stem("gradient")))  # fmt: skip
    run("recover-label", str(path.with_stem("gradient")), "-o", str(path))
    return path


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def truth(bundle: Bundle) -> dict[str, Tensor]:
    """Return what every convolution read, from the photograph itself."""
    from gradleak.stages.network import network_of

    network = network_of(bundle, None, torch.device("cpu"))
    seen: dict[str, Tensor] = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(
                lambda _, inputs, __, name=name: seen.update({name: inputs[0].detach()})
            )
    picture = gradleak.images.load_image(photograph("coffee"), 32).pixels[None]
    spec = bundle.model
    assert spec.mean is not None
    assert spec.std is not None
    network(gradleak.normalisation.normalise(picture, spec.mean, spec.std))
    return seen


def test_all_maps_of_a_lenet_go_to_the_bundle_and_onto_a_sheet(
    labelled: Path, tmp_path: Path
) -> None:
    out, sheet = tmp_path / "featured.safetensors", tmp_path / "maps.png"
    text = run("recover-feature", str(labelled), "--all", "--json", "--contact-sheet", str(sheet),
               "-o", str(out))  # fmt: skip
    bundle, told = Bundle.open(out), json.loads(text)
    maps = {name: bundle.tensor(FEATURE + name) for name in bundle.names(FEATURE)}
    true = truth(bundle)
    assert true.keys() < maps.keys()
    for name, value in true.items():
        assert float((maps[name] - value).abs().max()) < 1e-3 * float(value.abs().max())
    assert {name for found in told["maps"] for name in found["layers"]} == true.keys()
    assert all(found["residual"] < 1e-5 for found in told["maps"])
    assert bundle.stages[-1]["arguments"]["residuals"].keys() == true.keys()
    with Image.open(sheet) as picture:
        assert picture.height > 3 * 32
    run("inspect", str(out))
    run("reconstruct", str(out))  # what reads features is not led astray by the others


def test_a_contact_sheet_needs_all(labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="add --all"):
        run("recover-feature", str(labelled), "--contact-sheet", str(tmp_path / "x.png"))


def test_maps_need_features(labelled: Path) -> None:
    with pytest.raises(IncompleteError, match="label or feature are missing"):
        recover_maps(Bundle.open(labelled))


def test_the_walk_tells_of_every_map(labelled: Path) -> None:
    featured = gradleak.recover_feature(Bundle.open(labelled)).bundle
    told: list[Step] = []
    found = recover_maps(featured, progress=told.append)
    assert [step.phase for step in told] == [f"walk: {m.names[0]}" for m in found.maps]
    assert [step.value for step in told] == [m.residual for m in found.maps]


def test_the_null_control_is_a_picture_without_the_photograph(
    labelled: Path, tmp_path: Path
) -> None:
    out, sheet = tmp_path / "cup.png", tmp_path / "sheet.png"
    featured = tmp_path / "featured.safetensors"
    run("recover-feature", str(labelled), "-o", str(featured))
    text = run("reconstruct", str(featured), "--null-control", "--time-limit", "2", "--json",
               "-o", str(out), "--sheet", str(sheet))  # fmt: skip
    told = json.loads(text)
    assert told["residual"] < 1e-6 < 0.1 < told["null_control"]["residual"]
    picture, null = (gradleak.images.load_image(p, 32).pixels
                     for p in (out, tmp_path / "cup-null.png"))  # fmt: skip
    true = gradleak.images.load_image(photograph("coffee"), 32).pixels
    assert float((picture - true).abs().max()) == 0.0
    assert float((null - true).square().mean()) > 1e-3
    with Image.open(sheet) as both:
        assert both.height > 2 * both.width * 0.9


def test_a_strip_of_channels_shows_their_common_range() -> None:
    channels = torch.stack([torch.zeros(2, 2), torch.ones(2, 2), torch.full((2, 2), 9.0)])
    strip = channel_strip(channels, 2, 3)
    assert strip.shape[:2] == (3, 6)
    assert float(strip[0, 0, 0]) == 0.0
    assert float(strip[0, 0, strip.shape[2] // 2]) == 1.0
