"""What only a real process meets: closed pipes, full disks, Ctrl-C, closed descriptors."""

from __future__ import annotations

import os
import pty
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import Done, environment, executable, run_cli, run_command, run_process, run_shell


@pytest.mark.parametrize("command", ["inspect", "inspect --json", "recover-label -o -"])
def test_a_closed_pipe_ends_quietly(command: str, fcn: Path) -> None:
    script = f"gradleak {command} {fcn} 2>report | head -c 1; echo ${{PIPESTATUS[0]}}"
    done = run_shell(script, fcn.parent)
    assert done.err == ""
    assert done.out[1:] == b"0\n"
    assert (fcn.parent / "report").read_text() == ""


def test_a_pipe_closed_before_the_first_byte_ends_quietly(fcn: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    for command in (("--help",), ("inspect", fcn, fcn), ("recover-label", fcn, "-q", "-o", "-")):
        assert run_process(*command, stdout=write) == Done(0, b"", "")
    os.close(write)


@pytest.mark.parametrize(
    "command", ["--help", "--version", "inspect {}", "inspect {} --json", "recover-label {} -o -"]
)
def test_a_full_disk_behind_standard_output(command: str, lenet: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "wb") as full:
        done = run_process(*command.format(lenet).split(), stdout=full)
    assert done.code == 1
    assert done.line == "gradleak: No space left on device; free some space"


def test_a_full_disk_leaves_the_old_file_and_no_other(lenet: Path, tmp_path: Path) -> None:
    # No disk that is full can be had everywhere; a limit on file sizes fails the same write.
    path = tmp_path / "b.safetensors"
    path.write_bytes(lenet.read_bytes())

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    for command in (("recover-label", path, "-o", path), ("recover-label", path, "-o", "-")):
        with (tmp_path / "out").open("wb") as out:
            done = run_process(*command, "-q", preexec_fn=limit, stdout=out)
        assert done.code == 1
        assert done.line.startswith("gradleak: File too large")
        assert path.read_bytes() == lenet.read_bytes()
        (tmp_path / "out").unlink()
    assert list(tmp_path.iterdir()) == [path]


def test_process_substitution_is_an_input(lenet: Path, tmp_path: Path) -> None:
    done = run_shell(f"gradleak inspect <(cat {lenet}) /dev/stdin --json <{lenet}", tmp_path)
    assert (done.code, done.err) == (0, "")
    one, other = done.objects
    assert one["tensors"] == other["tensors"]


def test_closed_descriptors(lenet: Path, tmp_path: Path) -> None:
    assert run_shell(f"gradleak inspect {lenet} >&-", tmp_path) == Done(0, b"", "")
    assert run_shell("gradleak inspect missing 2>&-", tmp_path) == Done(3, b"", "")
    done = run_shell("gradleak inspect - <&-", tmp_path)
    assert (done.code, done.line) == (
        3,
        "gradleak: standard input is closed; name a bundle, or pipe one in",
    )
    assert run_shell("gradleak inspect <&-", tmp_path).code == 2


def until(terminal: int, text: bytes) -> bytes:
    """Read a terminal until it has shown ``text`` or is closed."""
    shown = b""
    while text not in shown:
        try:
            shown += os.read(terminal, 65536)
        except OSError:
            break
    return shown


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_end_from_outside_leaves_nothing_behind(
    number: signal.Signals, code: int, lenet: Path, tmp_path: Path
) -> None:
    path, spool = tmp_path / "b.safetensors", tmp_path / "spool"
    spool.mkdir()
    assert run_cli("recover-label", lenet, "-o", path, "-q").code == 0
    before = path.read_bytes()
    terminal, end = pty.openpty()
    long = ("--method", "match", "--steps", "1000000", "--time-limit", "600")
    process = subprocess.Popen(
        [executable(), "reconstruct", "-", *long, "-o", path, "-o", tmp_path / "p.png"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=end,
        env=environment(TMPDIR=str(spool), TERM="xterm"),
    )
    os.close(end)
    assert process.stdin is not None
    process.stdin.write(before)
    process.stdin.close()
    assert b"matching gradients" in until(terminal, b"matching gradients")  # the progress bar
    process.send_signal(number)
    shown = until(terminal, b"interrupted").decode()
    assert process.wait(30) == code
    os.close(terminal)
    assert ("gradleak: interrupted" in shown) is (number is signal.SIGINT)
    assert "Traceback" not in shown
    assert path.read_bytes() == before
    assert sorted(x.name for x in tmp_path.iterdir()) == ["b.safetensors", "spool"]
    assert [x for x in spool.rglob("*") if x.is_file()] == []  # torch makes empty folders there


def test_ctrl_c_while_torch_is_imported() -> None:
    process = subprocess.Popen(
        [executable(), "recover-label", "-"],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    libraries = Path(f"/proc/{process.pid}/maps")
    if not libraries.exists():
        pytest.skip("this system does not show what a process has loaded")
    while "libtorch" not in libraries.read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, b"gradleak: interrupted\n")


def test_a_stage_that_fails_fails_the_pipe(lenet: Path, tmp_path: Path) -> None:
    script = f"gradleak recover-feature {lenet} -o - | gradleak reconstruct -o p.png"
    done = run_shell(script, tmp_path)
    first, second = done.err.splitlines()
    assert done.code == 4
    for line in (first, second):
        assert "holds no label/soft; run gradleak recover-label first" in line
    assert list(tmp_path.iterdir()) == []


def test_the_command_is_installed() -> None:
    assert run_command([executable(), "--version"]).text.startswith("gradleak 0.")
