"""Calling it wrongly, and what helps: usage errors, help, examples, and what starting costs."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
import torch
from conftest import CAT, environment, executable, metadata_of, run_cli, run_command

from gradleak import __version__
from gradleak.cli import capture, feature, inspect, label, reconstruct, score

MODULES = (capture, label, feature, reconstruct, score, inspect)


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("unknown", "No such command 'unknown'; see gradleak --help"),
        ("inspect --unknown", "; see gradleak inspect --help"),
        ("capture --image a.png", "Missing option '--model'; see gradleak capture --help"),
        ("capture --model nothing --image a.png", "unknown model 'nothing'; use one of fcn4, "),
        ("capture --model a:b --image a.png", "cannot import 'a:b'"),
        ("capture --model torch.nn:Identity --image a.png", "the input size of torch.nn:Identity "),
        ("capture --model fcn4 --size 8 --image {cat} --image {cat} --label 1", "1 labels were"),
        ("capture --model fcn4 --size 8 --image {cat} --mixup .5", "mixup takes pairs of images, "),
        (
            "capture --model fcn4 --size 8 --image {cat} --smooth nan",
            "smooth",
        ),
        (
            "capture --model fcn4 --size 8 --image {cat} --smooth 1.1",
            "Invalid value for '--smooth'",
        ),
        ("capture --model fcn4 --size 8 --image {cat} --label 17", "label 17 is outside [0, 17)"),
        ("capture --model fcn4 --size 8 --image {cat} --init paper", "fcn4 takes no option 'init'"),
        ("capture --model fcn4 --size 8 --image {cat} --device gpu", "unknown device 'gpu'; use"),
        ("capture --model fcn4 --size 8 --image {cat} --device cpu:", "unknown device 'cpu:'; use"),
        ("capture --model fcn4 --size 8 --image {cat} --seed 4294967296", "Invalid value for '--s"),
        ("capture --model alexnet --size 9 --image {cat}", "alexnet cannot take 9x9 images; use"),
        ("recover-label {lenet} --family spiky", "unknown label family 'spiky'; choose"),
        ("recover-label {lenet} --method guess", "unknown method 'guess'; choose one of auto"),
        ("reconstruct {lenet} -o picture.jpg", "picture.jpg is neither .png nor .safetensors"),
        ("reconstruct {lenet} --sheet -", "--sheet does not go to standard output; give it a"),
        ("reconstruct {lenet} -o {lenet}.png --steps 0", "Invalid value for '--steps'"),
        ("score {lenet}", "there is nothing to compare with; give --truth FILE or --against IMAGE"),
    ],
)
def test_usage_errors_are_one_line_and_exit_code_2(command: str, line: str, lenet: Path) -> None:
    done = run_cli(*shlex.split(command.format(cat=CAT, lenet=lenet)))
    assert (done.code, done.out) == (2, b"")
    assert line in done.line


def test_cuda_must_be_there_when_it_is_asked_for(
    lenet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cuda:1"):
        done = run_cli("recover-label", lenet, "--device", device)
        assert done.code == 2
        assert f"device '{device}' is not there (0 CUDA devices found)" in done.line
    assert run_cli("recover-label", lenet, "--json").object["device"] == "cpu"


def test_seed_and_device_are_recorded(tmp_path: Path, lenet: Path) -> None:
    path = tmp_path / "b"
    assert run_cli("recover-label", lenet, "--seed", 5, "-o", path, "-q").code == 0
    first, second = json.loads(metadata_of(path)["stages"])
    assert (first["seed"], first["device"]) == (0, "cpu")
    assert (second["seed"], second["device"], second["verdict"]) == (5, "cpu", "unique")
    assert second["version"] == __version__


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.NAME)
def test_every_option_says_what_it_is_its_range_and_its_default(module: ModuleType) -> None:
    names = {**vars(module), "Console": object}
    hints = get_type_hints(module.command, names, include_extras=True)
    for name, parameter in signature(module.command).parameters.items():
        if get_origin(hints[name]) is not Annotated:
            assert name == "context"
            continue
        kind, option = get_args(hints[name])
        assert option.help, name
        if kind is not bool and parameter.default is not parameter.empty:
            shown = option.show_default and parameter.default is not None
            assert shown or "Default:" in option.help, f"{name}: {option.help}"
        if re.search(r"\b(int|float)\b", str(kind)):
            assert re.search(r"\b(from|above) \d|\d to \d", option.help), f"{name}: {option.help}"


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.NAME)
def test_help_shows_an_example_that_runs(
    module: ModuleType, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    example: str = module.EXAMPLE
    shown = run_cli(module.NAME, "--help")
    assert shown.code == 0
    assert example in " ".join(shown.text.split())
    (tmp_path / "cat.png").write_bytes(CAT.read_bytes())
    steps = {"grads": "fcn", **{x: x for x in ("labelled", "featured", "recovered")}}
    for file, fixture in steps.items():
        if f"{file}.safetensors" in example:
            os.link(request.getfixturevalue(fixture), tmp_path / f"{file}.safetensors")
    if "truth.safetensors" in example:
        make = request.getfixturevalue("capture")
        options = ("--smooth", "0.1", "--label", "3", "--truth", tmp_path / "truth.safetensors")
        assert make(*options)
    done = run_cli(*shlex.split(example)[1:], cwd=tmp_path)
    assert done.code == 0, done.err


@pytest.mark.parametrize("command", ["--help", "--version", "inspect", "completion"])
def test_what_needs_no_torch_does_not_import_it(command: str, lenet: Path) -> None:
    variables, args = {}, [command]
    if command == "inspect":
        args = ["inspect", str(lenet), "--json"]
    elif command == "completion":
        words = {"COMP_WORDS": "gradleak recover-", "COMP_CWORD": "1"}
        variables, args = {"_GRADLEAK_COMPLETE": "complete_bash", **words}, []
    python = [sys.executable, "-X", "importtime", executable(), *args]
    done = run_command(python, env=environment(**variables))
    expected = {"--version": f"gradleak {__version__}", "completion": "recover-label"}
    assert done.code == 0
    assert expected.get(command, "gradleak") in done.text
    imported = {line.split("|")[-1].strip() for line in done.err.splitlines()}
    assert "gradleak.cli.app" in imported
    assert not {"torch", "scipy", "PIL", "torchmetrics"} & imported


def test_importing_gradleak_does_not_import_torch() -> None:
    script = (
        "import sys, gradleak; dir(gradleak); gradleak.UsageError; print('torch' in sys.modules)"
    )
    assert run_command([sys.executable, "-c", script]).text == "False\n"
