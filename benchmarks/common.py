"""What the benchmarks share: photographs, the facts of a run, and Markdown results."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

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

    @functools.cached_property
    def facts(self) -> dict[str, str]:
        """How, when and on what the figures were made."""
        versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "numpy"))
        return {
            "Command": self.command,
            "Versions": f"gradleak {revision()}, Python {platform.python_version()}, {versions}",
            "Machine": device_name(),
            "Date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}",
        }

    def header(self) -> list[str]:
        """Return the lines of the facts and of the time that the run took."""
        facts = dict(self.facts)
        command = facts.pop("Command")
        return [
            f"- Command: `{command}`",
            *(f"- {name}: {value}" for name, value in facts.items()),
            f"- Duration: {self.seconds:.0f} s",
        ]


def revision() -> str:
    """Return the version of the package, and the commit if this is a checkout, + if changed."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        command = ("git", "-C", str(ROOT), *words)
        return subprocess.run(command, capture_output=True, text=True, check=False)

    commit = git("rev-parse", "--short", "HEAD")
    if commit.returncode:
        return version("gradleak")
    # Pages that a run has written do not change what it measures.
    changed = git("diff", "--quiet", "HEAD", "--", "gradleak", "benchmarks", "tests").returncode
    return f"{version('gradleak')} ({commit.stdout.strip()}{'+' if changed else ''})"


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


class Headed(Protocol):
    """What made the figures of a page: one run, or several."""

    def header(self) -> list[str]:
        """Return the lines that say how, when and on what."""


def write_result(
    name: str, title: str, made: Headed, parts: Sequence[Sequence[str]], folder: Path = RESULTS
) -> Path:
    """Write ``NAME.md`` to ``folder``: a title, what made the figures, and blocks of lines."""
    folder.mkdir(parents=True, exist_ok=True)
    blocks = [[f"# {title}"], made.header(), *parts]
    path = folder / f"{name}.md"
    path.write_text("\n\n".join("\n".join(block) for block in blocks if block) + "\n")
    return path
