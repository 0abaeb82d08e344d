"""What the tests of the command line share: running it, small bundles, and hand-written ones."""

from __future__ import annotations

import os

# Before torch is imported: the threads of several tests would spin against each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import photographs
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gradleak import Bundle
from gradleak.cli import app

torch.set_num_threads(1)

CAT = Path(__file__).parent.parent / "examples" / "cat.png"


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        return self.out.decode()

    @property
    def objects(self) -> list[dict[str, Any]]:
        """The JSON Lines on standard output; strict, so NaN and Infinity are no JSON."""
        return [json.loads(line, parse_constant=_refuse) for line in self.text.splitlines()]

    @property
    def object(self) -> dict[str, Any]:
        (only,) = self.objects
        return only

    @property
    def line(self) -> str:
        """The one line on stderr."""
        assert self.err.endswith("\n"), self.err
        (only,) = self.err.splitlines()
        return only


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


class _Pipe(io.TextIOWrapper):
    """A text stream over bytes in memory, as a pipe is: binary underneath, and no terminal."""

    def __init__(self, data: bytes = b"") -> None:
        self.bytes = io.BytesIO(data)
        super().__init__(self.bytes, encoding="utf-8", write_through=True)


def run_cli(*args: object, stdin: bytes = b"", cwd: Path | None = None) -> Done:
    """Run the command line inside this process; what it does not foresee is raised."""
    streams = sys.argv, sys.stdin, sys.stdout, sys.stderr
    folder = Path.cwd()
    read, out, err = _Pipe(stdin), _Pipe(), _Pipe()
    sys.argv = ["gradleak", *map(str, args)]
    sys.stdin, sys.stdout, sys.stderr = read, out, err
    os.chdir(cwd or folder)
    try:
        with pytest.raises(SystemExit) as end:
            app.main()
    finally:
        sys.argv, sys.stdin, sys.stdout, sys.stderr = streams
        os.chdir(folder)
    assert isinstance(end.value.code, int)
    return Done(end.value.code, out.bytes.getvalue(), err.bytes.getvalue().decode())


def executable() -> str:
    """Return the installed command."""
    found = shutil.which("gradleak", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found is not None
    return found


def environment(**extra: str) -> dict[str, str]:
    """Return the environment of a real process: the command on the path, one thread."""
    path = f"{Path(executable()).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **extra}


def run_process(*args: object, **options: Any) -> Done:
    """Run the real command, where a process matters: pipes, signals, descriptors."""
    return run_command([executable(), *map(str, args)], **options)


def run_command(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, **options: Any
) -> Done:
    """Run any command with the environment of a real process."""
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "timeout": 120, **options}
    done = subprocess.run(
        command, stderr=subprocess.PIPE, env=env or environment(), check=False, **options
    )
    return Done(done.returncode, done.stdout or b"", done.stderr.decode())


def run_shell(script: str, cwd: Path, **options: Any) -> Done:
    """Run a line as typed into bash, with pipefail."""
    return run_command(["bash", "-c", f"set -o pipefail; {script}"], cwd=cwd, **options)


Capture = Callable[..., Path]


@pytest.fixture(scope="session")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Capture:
    """Capture the gradient of a photograph with small fcn4 (or ``model``), once per arguments."""
    made: dict[tuple[str, ...], Path] = {}

    def make(*args: object, model: str = "fcn4", size: int = 8, photo: str = "chelsea") -> Path:
        images = () if "--image" in args else ("--image", photographs.photograph(photo))
        command = ("capture", "--model", model, "--size", size, *images, *args)
        key = tuple(map(str, command))
        if key not in made:
            path = tmp_path_factory.mktemp("bundle") / "grads.safetensors"
            done = run_cli(*command, "-o", path, "-q")
            assert (done.code, done.err) == (0, "")
            made[key] = path
        return made[key]

    return make


@pytest.fixture(scope="session")
def fcn(capture: Capture) -> Path:
    """Return a bundle of fcn4 at 8×8 on a cat, smoothed label, without biases."""
    return capture("--smooth", "0.1", "--label", "3")


@pytest.fixture(scope="session")
def labelled(fcn: Path) -> Path:
    """Return the same bundle after ``recover-label``."""
    return _stage("recover-label", fcn)


@pytest.fixture(scope="session")
def featured(labelled: Path) -> Path:
    """Return the same bundle after ``recover-feature``."""
    return _stage("recover-feature", labelled)


@pytest.fixture(scope="session")
def recovered(featured: Path) -> Path:
    """Return the same bundle after ``reconstruct``."""
    return _stage("reconstruct", featured)


def _stage(command: str, path: Path) -> Path:
    out = path.parent / f"{command}.safetensors"
    assert run_cli(command, path, "-o", out, "-q") == Done(0, b"", "")
    return out


@pytest.fixture(scope="session")
def lenet(capture: Capture) -> Path:
    """Return a small bundle: lenet on a cat, smoothed label of class 3, with biases."""
    return capture("--smooth", "0.1", "--label", "3", model="lenet", size=32)


@pytest.fixture
def head_tensors(lenet: Path) -> dict[str, Tensor]:
    """Return gradient and weights of one real head with a bias, named as in a bundle."""
    return {n: t for n, t in load_file(lenet).items() if n.split("/")[1].startswith("fc.")}


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Write tensors as somebody else's safetensors file, with metadata only if given."""

    def write(
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str] | None = None,
        name: str = "given.safetensors",
    ) -> Path:
        path = tmp_path / name
        own = {
            name: tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
        save_file(own, path, None if metadata is None else dict(metadata))
        return path

    return write


def contents(path: Path) -> dict[str, bytes]:
    """Return every tensor of a bundle as bytes, and the metadata without what time it took."""
    bundle = Bundle.open(path)
    tensors = {n: bundle.unchecked(n).reshape(-1).view(torch.uint8).numpy() for n in bundle}
    stages = [{**stage, "seconds": None} for stage in bundle.stages]
    metadata = {**bundle.metadata, "stages": json.dumps(stages)}
    return {n: t.tobytes() for n, t in tensors.items()} | {"": repr(sorted(metadata)).encode()}


def metadata_of(path: Path) -> dict[str, str]:
    """Read a safetensors file's metadata with the safetensors library."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def assert_refused(done: Done, code: int, text: str) -> None:
    """Check exit code and line of a refusal: what is wrong and, behind a semicolon, the mend."""
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
