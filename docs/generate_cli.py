"""Write docs/cli.md from the ``--help`` of every command, so that it says what the program says.

Run by ``make docs``; a test fails when the file is out of date.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gradleak.cli.app import app

WIDTH = 88
PAGE = Path(__file__).with_name("cli.md")
INTRODUCTION = f"""\
# The command line

This page is written by `make docs` from `gradleak COMMAND --help`; do not edit it.

Every command but `capture` takes bundles as arguments, or one on standard input (`-`, or nothing
where a pipe is). `-o FILE` writes a bundle, `-o -` writes it to standard output and moves the
report to standard error. Without `-o` there is only the report. `--json` prints the report as one
JSON object an input. The picture of `reconstruct` goes to `-o NAME.png`.

| exit code | meaning |
| --: | :-- |
| 0 | done; of an attack: the answer is unique, or the image exact |
| 1 | an unexpected error, a full disk among them |
| 2 | the command line itself is wrong |
| 3 | the input is broken, or of a kind that no attack here applies to |
| 4 | the attack ran, and its answer is not complete; or an earlier stage is missing |
| 130 | interrupted |

The bundle is written on exit code 4 too, with the best answer and the verdict in it, where there
was anything to attack. With several inputs the highest code counts. The help below is {WIDTH}
columns wide.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(render(), encoding="utf-8")


def render() -> str:
    """Return the page as Markdown."""
    commands = [command.name or "" for command in app.registered_commands]
    parts = [INTRODUCTION, section("gradleak", [])]
    parts += [section(f"gradleak {name}", [name]) for name in commands]
    return "\n".join(parts)


def section(title: str, arguments: Sequence[str]) -> str:
    """Return the help of one command under its title."""
    lines = [line.rstrip() for line in help_of(arguments).strip("\n").splitlines()]
    text = "\n".join(lines).strip("\n")
    return f"## {title}\n\n```text\n{text}\n```\n"


def help_of(arguments: Sequence[str]) -> str:
    """Run ``gradleak … --help`` at the fixed width, without colour and whatever the terminal."""
    script = Path(sys.executable).with_name("gradleak")
    plain = {"NO_COLOR": "1", "TERM": "dumb", "PYTHONIOENCODING": "utf-8"}
    # Each of these makes the help coloured or of another width.
    ignored = {"FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TYPER_USE_RICH"}
    environment = {name: value for name, value in os.environ.items() if name not in ignored}
    width = {"COLUMNS": str(WIDTH), "TERMINAL_WIDTH": str(WIDTH)}
    done = subprocess.run(
        [script, *arguments, "--help"],
        env={**environment, **plain, **width},
        capture_output=True,
        check=True,
        encoding="utf-8",
    )
    return done.stdout


if __name__ == "__main__":
    main()
