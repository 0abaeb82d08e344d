"""What the command line costs as a user meets it: whole processes, beside ``import torch``.

Each command is timed in turn with ``python -c "import torch"``, so that both meet the same machine;
the medians and their ratio are reported. Peak memory is the largest resident set of the process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from common import Run, markdown_table, photographs, this_command, write_result

import gradleak
from gradleak.bundle import GRAD, PARAM
from gradleak.images import load_image, save_png
from gradleak.models.build import build_model
from gradleak.models.spec import ModelSpec
from gradleak.softlabels import soft_label

BIN = Path(sys.executable).parent
IMPORT_TORCH = [sys.executable, "-c", "import torch"]
PIPE = (
    "set -o pipefail; gradleak capture --model fcn4 --image cat.png --smooth 0.1 "
    "--truth truth.safetensors -o - | gradleak recover-label -o - | gradleak recover-feature -o - "
    "| gradleak reconstruct -o cat-recovered.png"
)
GIGABYTE = 1_000_000_000
CLASSES, WIDTH = 1000, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats: int = parser.parse_args().repeats
    run = Run(this_command())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        save_png("cat.png", load_image(photographs()[3], None).pixels)
        head, large = write_heads(Path(folder))
        cases: list[tuple[str, Sequence[str], str, float]] = [
            ("`gradleak --help`", ["gradleak", "--help"], "0.25 s", 0.0),
            ("`recover-label`, head-only bundle", ["gradleak", "recover-label", head], "1.4 ×", 1),
            ("the FCN-4 pipe", ["bash", "-c", PIPE], "3 × 4 ×", 4),
        ]
        for name, command, asked, unit in cases:
            own, reference = paired(command, repeats)
            median, torch_median = statistics.median(own), statistics.median(reference)
            got = f"{median:.2f} s" if not unit else f"{median / torch_median / unit:.2f} ×"
            rows.append((name, f"{median:.2f} s", f"{torch_median:.2f} s", got, asked))
            print(" | ".join(rows[-1]), flush=True)
        small = max(peak_memory(["gradleak", "recover-label", head]) for _ in range(3))
        big = max(peak_memory(["gradleak", "recover-label", large]) for _ in range(3))
        memory = [
            f"Peak memory of `recover-label`: {small:.0f} MB on a head-only bundle, {big:.0f} MB "
            f"on a bundle of 1 GB with the same head of 8 MB: {big - small:+.0f} MB (asked: within "
            "60 MB)."
        ]
    columns = ("command", "median", "import torch", "reached", "asked")
    note = [
        "`1.4 ×` is the ratio to one `import torch`; `3 × 4 ×` is three times four of them, one "
        "for each process of the pipe. The FCN-4 pipe moves a bundle of 440 MB three times."
    ]
    path = write_result(
        "command_line", "The command line", run, (markdown_table(columns, rows), note, memory)
    )
    print(*memory, path, sep="\n")


def write_heads(folder: Path) -> tuple[str, str]:
    """Write a head-only bundle of 1000 classes, and one of 1 GB with the same head."""
    model = build_model("resnet50", classes=CLASSES)
    image = load_image(photographs()[3], 224).pixels[None]
    label = soft_label([(281, 1.0)], CLASSES, 0.1)[None]
    spec = ModelSpec(name="resnet50", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    bundle = gradleak.capture(
        model, image, label, spec=spec, head_only=True, withhold_bias=True
    ).bundle
    bundle.save(folder / "head.safetensors")
    shape = (16, GIGABYTE // 2 // 4 // 16)
    ballast = {kind + "ballast": torch.rand(shape) for kind in (GRAD, PARAM)}
    bundle.extended(ballast).save(folder / "large.safetensors")
    return "head.safetensors", "large.safetensors"


def paired(command: Sequence[str], repeats: int) -> tuple[list[float], list[float]]:
    """Time a command and ``import torch`` in turn, after one run of each that does not count."""
    own, reference = [], []
    for count in range(repeats + 1):
        for times, line in ((reference, IMPORT_TORCH), (own, command)):
            start = time.perf_counter()
            subprocess.run(line, check=True, capture_output=True, env=environment())
            if count:
                times.append(time.perf_counter() - start)
    return own, reference


def peak_memory(command: Sequence[str]) -> float:
    """Run a command and return its largest resident set in MB.

    A small process starts it: a child begins with the resident set of the one it was forked from.
    """
    script = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, "
        "stdout=subprocess.DEVNULL); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *command],
        check=True,
        capture_output=True,
        text=True,
        env=environment(),
    )
    return int(done.stdout) * (1024 if sys.platform != "darwin" else 1) / 1e6


def environment() -> dict[str, str]:
    """Return the environment with this interpreter's commands first."""
    return {**os.environ, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


if __name__ == "__main__":
    main()
