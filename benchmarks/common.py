"""What the benchmarks share: photographs, the facts of a run, and Markdown results."""

from __future__ import annotations

import datetime
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"

# The tests own the list of photographs; there shall be one.
sys.path.insert(0, str(ROOT / "tests"))
from photographs import centre, crops, labelled_crops, photograph, photographs  # noqa: E402

__all__ = [
    "RESULTS",
    "Run",
    "centre",
    "crops",
    "labelled_crops",
    "markdown_table",
    "photograph",
    "photographs",
    "write_result",
]


@dataclass
class Run:
    """The facts of one benchmark run, from its start; ``command`` is what reproduces it."""

    command: str
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds since the start."""
        return time.perf_counter() - self.started

    def header(self) -> list[str]:
        """Return the lines that say how, when and on what the figures were made."""
        versions = ", ".join(f"{name} {version(name)}" for name in ("gradleak", "torch", "numpy"))
        return [
            f"- Command: `{self.command}`",
            f"- Versions: Python {platform.python_version()}, {versions}",
            f"- Machine: {device_name()}",
            f"- Date: {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}",
            f"- Duration: {self.seconds:.0f} s",
        ]


def this_command() -> str:
    """Return the command line of this process, relative to the repository."""
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(ROOT) if script.is_relative_to(ROOT) else script
    return " ".join(["python", str(name), *sys.argv[1:]])


def device_name() -> str:
    """Name the CPU and the threads used, and the GPU if there is one."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    threads = torch.get_num_threads()
    text = f"{model}, {threads} of {os.cpu_count()} cores"
    if torch.cuda.is_available():
        text += f", {torch.cuda.get_device_name()}"
    return text


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay out a Markdown table, text to the left in the first column, figures to the right."""
    align = [":--", *["--:"] * (len(columns) - 1)]
    return [f"| {' | '.join(row)} |" for row in (columns, align, *rows)]


def write_result(
    name: str, title: str, run: Run, parts: Sequence[Sequence[str]], folder: Path = RESULTS
) -> Path:
    """Write ``NAME.md`` to ``folder``: a title, the facts of the run, and blocks of lines."""
    folder.mkdir(parents=True, exist_ok=True)
    blocks = [[f"# {title}"], run.header(), *parts]
    path = folder / f"{name}.md"
    path.write_text("\n\n".join("\n".join(block) for block in blocks if block) + "\n")
    return path
