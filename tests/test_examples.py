"""The examples do what they say, on photographs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import photographs
import pytest
import torch
from conftest import CAT, run_command
from PIL import Image

from gradleak.images import load_image

EXAMPLES = CAT.parent
README = EXAMPLES / "README.md"


@pytest.fixture(autouse=True)
def _own_random_state() -> Iterator[None]:
    with torch.random.fork_rng(devices=()):
        yield


def example(name: str) -> ModuleType:
    sys.path.insert(0, str(EXAMPLES))
    try:
        return import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


def test_readme_names_every_example() -> None:
    listed = re.findall(r"^\| `(\S+)`", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(
        path.name for path in EXAMPLES.glob("*.*") if path.name != "README.md"
    )


def test_own_training_step_runs_as_its_readme_says(tmp_path: Path) -> None:
    script, photo = EXAMPLES / "own_training_step.py", photographs.photograph("coffee")
    done = run_command([sys.executable, str(script), str(photo), "out.png"], cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    (shown,) = re.findall(r"```text\n(label .*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    shown = shown.replace("recovered.png", "out.png").replace("cat.png", "coffee.png")
    # Errors and residuals are those of the machine, and so is which of two is the larger; every
    # other number is the same everywhere.
    rounding = re.compile(r"\d\.?\d*e-\d\d(, in body\.\d)?")
    assert rounding.sub("#", done.text) == rounding.sub("#", shown)
    recovered = load_image(tmp_path / "out.png", None).pixels
    assert torch.equal(recovered, load_image(photo, 48).pixels)


@pytest.mark.parametrize("name", ["rocket", "flower"])
def test_own_training_step_recovers_any_photograph(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    own = example("own_training_step")
    photo = photographs.centre(name, 48)
    recovered = own.attack(own.train_one_step(photo, target=11))
    assert float((recovered - photo).abs().max()) < 0.5 / 255
    assert "class 11 has 0.905000" in capsys.readouterr().out


def test_own_training_step_keeps_no_answer() -> None:
    own = example("own_training_step")
    bundle = own.train_one_step(photographs.centre("rocket", 48), target=11)
    assert {name.partition("/")[0] for name in bundle} == {"grad", "param"}
    assert "11" not in json.dumps(bundle.metadata)
    # The weights are those of the gradient, not those after the optimiser's step.
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        before = own.Classifier().state_dict()
    assert torch.equal(bundle.tensor("param/head.weight"), before["head.weight"])


def test_demo_attacks_a_photograph_and_shows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    demo: Any = example("demo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    # FCN-4 at full size moves gigabytes.
    networks = {"fcn4": 32, "lenet": 32, "resnet18": 32}
    assert networks.keys() == demo.NETWORKS.keys()
    monkeypatch.setattr(demo, "NETWORKS", networks)
    demo.main()
    shown = capfd.readouterr().out
    assert shown.count("0 of 3072") == len(networks)
    for network in networks:
        recovered = load_image(tmp_path / "demo-out" / f"{network}-recovered.png", None).pixels
        assert torch.equal(recovered, load_image(demo.PHOTO, 32).pixels)
    sheet = load_image(tmp_path / "demo-out" / "side-by-side.png", None).pixels
    assert sheet.shape[2] > 2 * 320


def test_draw_cat_draws_the_picture() -> None:
    drawn = np.asarray(example("draw_cat").draw_cat(), dtype=float)
    kept = np.asarray(Image.open(CAT).convert("RGB"), dtype=float)
    assert drawn.shape == kept.shape
    assert np.abs(drawn - kept).mean() < 1.0  # of 255: versions of Pillow round edges differently
