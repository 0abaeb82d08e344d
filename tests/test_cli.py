"""The command-line contract: inputs, outputs, reports, exit codes."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import (
    CAT,
    Capture,
    contents,
    environment,
    executable,
    run_cli,
    run_process,
)

from gradleak import Bundle

LABEL_KEYS = {
    "schema", "input", "stage", "verdict", "reason", "method", "family", "batch_size", "samples",
    "residual", "noise", "alternatives", "device", "seconds",
}  # fmt: skip


# --- Input and output ---------------------------------------------------------------------------


def test_input_is_a_path_or_a_dash_or_what_is_piped(lenet: Path) -> None:
    data = lenet.read_bytes()
    answers = [
        run_cli("recover-label", lenet, "--json"),
        run_cli("recover-label", "-", "--json", stdin=data),
        run_cli("recover-label", "--json", stdin=data),
    ]
    objects = [done.object for done in answers]
    assert [found.pop("input") for found in objects] == [str(lenet), "-", "-"]
    assert {found.pop("seconds") > 0 for found in objects} == {True}
    assert objects[0] == objects[1] == objects[2]


def test_standard_input_is_read_once(lenet: Path) -> None:
    done = run_cli("recover-label", "-", "-", stdin=lenet.read_bytes())
    assert (done.code, done.line) == (2, "gradleak: standard input is named twice; give - once")


def test_nothing_piped_is_said(tmp_path: Path) -> None:
    done = run_cli("inspect", cwd=tmp_path)
    assert done.code == 3
    assert done.line == "gradleak: standard input is empty; give a safetensors file"


def test_without_input_on_a_terminal_there_is_help() -> None:
    terminal, end = pty.openpty()
    try:
        for command in ("inspect", "recover-label"):
            done = run_process(command, stdin=end)
            assert (done.code, done.out) == (2, b"")
            assert f"Usage: gradleak {command}" in done.err
    finally:
        os.close(terminal)
        os.close(end)


def test_binary_never_goes_to_a_terminal(lenet: Path) -> None:
    terminal, end = pty.openpty()
    try:
        commands = [
            ("recover-label", lenet, "-o", "-"),
            ("capture", "--model", "lenet", "--image", CAT, "-o", "-"),
        ]
        for command in commands:
            done = run_process(*command, stdout=end)
            assert done.code == 2
            assert done.line.endswith("does not go to a terminal; pipe it on, or use -o FILE")
    finally:
        os.close(terminal)
        os.close(end)


def test_with_the_bundle_on_stdout_the_report_is_on_stderr(lenet: Path, tmp_path: Path) -> None:
    table = run_cli("recover-label", lenet, "-o", "-")
    assert "verdict" in table.err
    objects = run_cli("recover-label", lenet, "-o", "-", "--json")
    assert json.loads(objects.line)["verdict"] == "unique"
    (tmp_path / "b").write_bytes(table.out)
    (tmp_path / "file").write_bytes(objects.out)
    assert contents(tmp_path / "b") == contents(tmp_path / "file")
    assert "label/soft" in Bundle.open(tmp_path / "b")


def test_output_may_be_the_input(lenet: Path, tmp_path: Path) -> None:
    path, other = tmp_path / "b.safetensors", tmp_path / "o.safetensors"
    path.write_bytes(lenet.read_bytes())
    assert run_cli("recover-label", path, "-o", other).code == 0
    assert run_cli("recover-label", path, "-o", path).code == 0
    assert contents(path) == contents(other)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["b.safetensors", "o.safetensors"]


def test_capture_writes_grads_safetensors(tmp_path: Path) -> None:
    command = ("capture", "--model", "lenet", "--image", CAT, "--json", "-q")
    done = run_cli(*command, cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    assert done.object["output"] == "grads.safetensors"
    assert [x.name for x in tmp_path.iterdir()] == ["grads.safetensors"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("-o", "nowhere/b"), "the folder nowhere does not exist; create it first"),
        (("-o", "."), ". is a folder; give -o a file name"),
        (("-o", ""), "-o has no file name; give one, or - for standard output"),
        (("--truth", "-"), "--truth does not go to standard output; give it a file name"),
        (("--truth", "t", "-o", "t"), "the output would replace t; give it another name"),
        (("-o", "cat.png"), "the output would replace cat.png; give it another name"),
        (("--truth", "./cat.png"), "the output would replace cat.png; give it another name"),
        (("-o", "w.pth", "--weights", "w.pth"), "the output would replace w.pth; give it another"),
    ],
)
def test_outputs_are_checked_before_any_work(
    tmp_path: Path, options: tuple[str, ...], line: str
) -> None:
    (tmp_path / "cat.png").write_bytes(CAT.read_bytes())
    done = run_cli("capture", "--model", "lenet", "--image", "cat.png", *options, cwd=tmp_path)
    assert done.code == 2
    assert done.line.startswith(f"gradleak: {line}")
    assert (tmp_path / "cat.png").read_bytes() == CAT.read_bytes()
    assert len(list(tmp_path.iterdir())) == 1


def test_one_output_cannot_hold_several_inputs(lenet: Path) -> None:
    done = run_cli("recover-label", lenet, lenet, "-o", "b")
    assert done.code == 2
    assert "-o takes one input, and 2 were given" in done.line


# --- Reports ------------------------------------------------------------------------------------


def test_json_has_one_object_per_input_in_order_failures_included(
    lenet: Path, fcn: Path, tmp_path: Path
) -> None:
    missing = tmp_path / "missing"
    done = run_cli("recover-label", lenet, missing, fcn, "--json")
    assert [found["input"] for found in done.objects] == [str(lenet), str(missing), str(fcn)]
    assert [found["verdict"] for found in done.objects] == ["unique", "failed", "unique"]
    assert all(found.keys() >= LABEL_KEYS for found in done.objects)
    assert done.code == 3
    assert done.line == f"gradleak: {missing} does not exist; check the path"
    assert done.objects[1]["samples"] == []
    assert done.objects[1]["reason"] == f"{missing} does not exist; check the path"


def test_the_highest_exit_code_wins(lenet: Path, fcn: Path, tmp_path: Path) -> None:
    incomplete = run_cli("recover-feature", lenet)
    assert incomplete.code == 4
    assert run_cli("recover-feature", tmp_path / "missing", lenet).code == 4
    assert run_cli("recover-label", tmp_path / "missing", lenet).code == 3


def test_json_of_a_label(fcn: Path) -> None:
    found = run_cli("recover-label", fcn, "--json").object
    assert found["schema"] == 1
    assert (found["stage"], found["verdict"], found["batch_size"]) == ("recover-label", "unique", 1)
    assert (found["family"], found["device"], found["alternatives"]) == ("smooth", "cpu", [])
    assert 0 <= found["residual"] < 1e-5
    (sample,) = found["samples"]
    assert sample["classes"] == [3]
    assert sample["weights"] == pytest.approx([0.9 + 0.1 / 17], abs=1e-5)
    assert sample["base"] == pytest.approx(0.1 / 17, abs=1e-5)
    errors = sample["uncertainty"]
    assert len(errors["weights"]) == 1
    assert 0 < max(errors["weights"][0], errors["base"]) < 1e-4
    assert 0 < errors["scale"] < abs(sample["scale"])


def test_json_classes_are_sorted_by_weight(capture: Capture) -> None:
    two = ("--image", CAT, "--image", CAT, "--label", 2, "--label", 9)
    path = capture("--mixup", "0.3", *two, model="lenet", size=32)
    (sample,) = run_cli("recover-label", path, "--json").object["samples"]
    assert sample["classes"][:2] == [9, 2]
    assert sample["weights"] == sorted(sample["weights"], reverse=True)


def test_numbers_that_are_not_finite_are_null(recovered: Path) -> None:
    done = run_cli("score", recovered, "--against", recovered.parent / "same.png", "--json")
    assert done.code == 3  # not there yet
    assert run_cli("reconstruct", recovered, "-o", recovered.parent / "same.png", "-q").code == 0
    done = run_cli("score", recovered, "--against", recovered.parent / "same.png", "--json")
    image = done.object["samples"][0]["image"]
    assert image["identical_8bit"] is True
    assert image["psnr_8bit"] is None  # infinite
    assert image["ssim"] is None  # pictures of 8 pixels are too small for it


def test_the_table_is_short_and_plain_in_a_file(fcn: Path) -> None:
    done = run_cli("recover-label", fcn)
    assert done.err == ""
    lines = done.text.splitlines()
    assert lines[0] == str(fcn)
    assert lines[1].startswith("verdict        unique: ")
    assert len(lines) < 15
    assert "\x1b" not in done.text


def test_quiet_leaves_nothing_but_errors(lenet: Path, tmp_path: Path) -> None:
    capture = ("capture", "--model", "lenet", "--image", CAT, "-o", tmp_path / "b", "-q")
    for command in (capture, ("recover-label", lenet, "-q"), ("inspect", lenet, "--quiet")):
        done = run_cli(*command)
        assert (done.code, done.out, done.err) == (0, b"", "")
    assert "does not exist" in run_cli("inspect", tmp_path / "missing", "-q").line


def on_a_terminal(*args: object, **variables: str) -> str:
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [executable(), *map(str, args)],
        stdout=end,
        stderr=end,
        stdin=subprocess.DEVNULL,
        env=environment(TERM="xterm-256color", **variables),
    )
    os.close(end)
    shown = b""
    while True:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        shown += data
    os.close(terminal)
    assert process.wait(60) == 0
    return shown.decode()


def test_no_color_is_respected(lenet: Path) -> None:
    colour = re.compile(r"\x1b\[(\d+;)*[34][0-8]")
    assert colour.search(on_a_terminal("--help"))
    assert not colour.search(on_a_terminal("--help", NO_COLOR="1"))
    assert not colour.search(on_a_terminal("inspect", lenet, NO_COLOR="1"))


def test_names_from_a_file_cannot_steer_the_terminal(lenet: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(lenet)
    evil = "\x1b[2J\x1b]0;owned\x07\r\n\u202eabc"
    path = tmp_path / "evil"
    bundle.extended({f"x/{evil}": torch.ones(1)}, metadata={"mode": evil}).save(path)
    done = run_cli("inspect", path)
    assert done.code == 0
    assert r"\x1b[2J" in done.text
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", done.text)
    (tmp_path / evil.replace("/", "")).write_bytes(b"x")
    assert r"\x1b[2J" in run_cli("inspect", tmp_path / evil.replace("/", "")).line


def test_a_name_that_is_no_text_is_no_obstacle(lenet: Path, tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.safetensors")
    Path(name).write_bytes(lenet.read_bytes())
    assert run_process("inspect", name).code == 0
    ascii_only = run_process("inspect", name, env=environment(PYTHONIOENCODING="ascii"))
    assert ascii_only.code == 0
    found = run_process("inspect", name, "--json").object
    assert found["input"] == name
