"""What every subcommand does around its stage: inputs, outputs, reports and exit codes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn, TextIO

import typer

from gradleak.errors import GradleakError, IncompleteError, InputError, UsageError

if TYPE_CHECKING:
    from gradleak.bundle import Bundle

STDIO = "-"
SCHEMA = 1
INCOMPLETE = 4
# Every JSON object has these keys, empty where a stage has nothing to say.
_EVERY_KEY: dict[str, object] = {
    "input": None,
    "stage": None,
    "verdict": None,
    "reason": None,
    "method": None,
    "family": None,
    "batch_size": None,
    "samples": [],
    "residual": None,
    "noise": None,
    "alternatives": [],
    "device": None,
    "seconds": None,
}


@dataclass(frozen=True)
class Report:
    """What a stage has to say of one input: ``data`` for machines, ``rows`` for people.

    ``rows`` are (name, value) pairs under ``title``; ``exit_code`` follows from the verdict.
    """

    title: str
    rows: Sequence[tuple[str, str]]
    data: dict[str, object]
    exit_code: int = 0


@dataclass
class Console:
    """Where a command prints: reports to stdout, or to stderr when stdout carries a bundle.

    ``outputs`` are the bundle files it writes, ``-`` for standard output.
    """

    json: bool = False
    quiet: bool = False
    outputs: Sequence[str] = ()
    codes: list[int] = field(default_factory=list)

    def report(self, report: Report) -> None:
        """Print the report as the user asked and remember its exit code."""
        self.codes.append(report.exit_code)
        stream = sys.stderr if STDIO in self.outputs else sys.stdout
        if self.json:
            data = {"schema": SCHEMA, **_EVERY_KEY, **report.data}
            print(json.dumps(_finite(data)), file=stream, flush=True)
        elif not self.quiet:
            _print_table(report, stream)

    def note(self, text: str) -> None:
        """Tell people something by the way, on stderr."""
        if not self.quiet:
            print(f"gradleak: {printable(text)}", file=sys.stderr)

    def error(
        self,
        error: GradleakError,
        *,
        stage: str,
        source: str | None = None,
        nothing: Mapping[str, object] | None = None,
    ) -> None:
        """Print one line on stderr, and the JSON object of the failed input if asked for.

        ``nothing`` are the keys of the stage's report that this object has besides, with nulls.
        """
        self.codes.append(error.exit_code)
        named = source in (None, STDIO) or str(error).startswith(f"{source} ")
        print_error(str(error) if named else f"{source}: {error}")
        if self.json:
            stream = sys.stderr if STDIO in self.outputs else sys.stdout
            data = {
                "schema": SCHEMA,
                **_EVERY_KEY,
                "input": source,
                "stage": stage,
                "verdict": "failed",
                "reason": str(error),
                **(nothing or {}),
                "exit_code": error.exit_code,
            }
            print(json.dumps(data), file=stream, flush=True)

    def finish(self) -> NoReturn:
        """Leave with the highest exit code seen."""
        raise typer.Exit(max(self.codes, default=0))


def print_error(message: str) -> None:
    """Print the one line on stderr that every failure ends with."""
    print("gradleak: " + printable(" ".join(message.split())), file=sys.stderr)


def printable(text: str) -> str:
    """Spell out control characters: names and metadata come from files of unknown origin."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def choose_inputs(context: typer.Context, inputs: Sequence[str] | None) -> list[str]:
    """Return the inputs given, else standard input if piped; on a terminal help and exit code 2."""
    if inputs:
        if list(inputs).count(STDIO) > 1:
            raise UsageError("standard input is named twice", "give - once")
        return list(inputs)
    if sys.stdin is not None and not sys.stdin.isatty():
        return [STDIO]
    with contextlib.redirect_stdout(sys.stderr):
        print(context.get_help())  # with rich, Typer prints it and returns nothing
    raise typer.Exit(2)


def open_bundle(source: str) -> Bundle:
    """Open a bundle file, or standard input for ``-``."""
    from gradleak.bundle import Bundle

    if source != STDIO:
        return Bundle.open(source)
    if sys.stdin is None:
        raise InputError("standard input is closed", "name a bundle, or pipe one in")
    return Bundle.read(sys.stdin.buffer)


def check_output(output: str | None, inputs: Sequence[str] = (STDIO,)) -> list[str]:
    """Refuse, before any work, an output that cannot be written to or that several inputs share.

    Returns the outputs as a list, empty without one.
    """
    if output is None:
        return []
    if len(inputs) > 1:
        raise UsageError(
            f"-o takes one input, and {len(inputs)} were given", "run the command once per input"
        )
    if output == STDIO:
        if sys.stdout.isatty():
            raise UsageError(
                "a bundle is binary and does not go to a terminal", "pipe it on, or use -o FILE"
            )
        return [output]
    if not output:
        raise UsageError("-o has no file name", "give one, or - for standard output")
    path = Path(output)
    if path.is_dir():
        raise UsageError(f"{output} is a folder", "give -o a file name")
    if not path.parent.is_dir():
        raise UsageError(f"the folder {path.parent} does not exist", "create it first")
    return [output]


def keep_apart(output: str | None, *others: str | None) -> None:
    """Refuse an output that would replace another file which the command reads or writes."""
    for other in others:
        if output is None or other is None or STDIO in (output, other):
            continue
        if os.path.realpath(output) == os.path.realpath(other):
            raise UsageError(f"the output would replace {other}", "give it another name")


def write_bundle(bundle: Bundle, outputs: Sequence[str]) -> None:
    """Write the bundle everywhere that ``-o`` says."""
    for output in outputs:
        if output == STDIO:
            stream: BinaryIO = sys.stdout.buffer
            bundle.write(stream)
            stream.flush()
        else:
            bundle.save(output)


def run_stage(
    console: Console,
    stage: str,
    inputs: Sequence[str],
    work: Callable[[str, Bundle], tuple[Report, Bundle]],
    nothing: Mapping[str, object] | None = None,
) -> None:
    """Run a stage over its inputs: one report each, one failure does not stop the rest.

    ``nothing`` is what the JSON object of a failed input has for the stage's own keys.
    """

    def one_by_one(
        bundles: Iterable[Bundle | GradleakError],
    ) -> Iterator[tuple[Report, Bundle] | GradleakError]:
        for source, bundle in zip(inputs, bundles, strict=True):
            if isinstance(bundle, GradleakError):
                yield bundle
                continue
            try:
                yield work(source, bundle)
            except GradleakError as error:
                yield error

    run_stage_on_all(console, stage, inputs, one_by_one, nothing)


def run_stage_on_all(
    console: Console,
    stage: str,
    inputs: Sequence[str],
    work: Callable[
        [Iterable[Bundle | GradleakError]], Iterable[tuple[Report, Bundle] | GradleakError]
    ],
    nothing: Mapping[str, object] | None = None,
) -> None:
    """Run a stage that takes its inputs together, as :func:`run_stage` does one by one.

    ``work`` gets the opened bundles, or what was wrong with them, and returns in their order the
    report and the bundle of each, or what was wrong.
    """
    opened: list[Bundle] = []

    def bundles() -> Iterator[Bundle | GradleakError]:
        for source in inputs:
            try:
                bundle = open_bundle(source)
            except GradleakError as error:
                yield error
                continue
            if console.outputs:  # of one input
                opened.append(bundle)
            yield bundle

    try:
        answers = work(bundles())
    except GradleakError as error:
        answers = [error] * len(inputs)
    for source, answer in zip(inputs, answers, strict=True):
        try:
            if isinstance(answer, GradleakError):
                if isinstance(answer, IncompleteError) and opened:
                    _pass_on(opened[0], stage, console.outputs)
                raise answer
            report, bundle = answer
            write_bundle(bundle, console.outputs)
        except GradleakError as error:
            console.error(error, stage=stage, source=source, nothing=nothing)
            continue
        console.report(report)
    console.finish()


def _pass_on(bundle: Bundle, stage: str, outputs: Sequence[str]) -> None:
    """Write the bundle as it came, with the stage's failure on record: the pipe goes on."""
    from gradleak.bundle import StageRecord

    write_bundle(bundle.extended(record=StageRecord(stage, verdict="failed")), outputs)


def exit_code_of(verdict: str) -> int:
    """Return 0 for a unique answer and 4 for every other verdict."""
    return 0 if verdict == "unique" else INCOMPLETE


def number(value: float | None, digits: int = 3) -> str:
    """Format a number for people."""
    return "—" if value is None else f"{value:.{digits}g}"


def _print_table(report: Report, stream: TextIO) -> None:
    title = printable("standard input" if report.title == STDIO else report.title)
    rows = [(printable(name), printable(value)) for name, value in report.rows]
    if not stream.isatty():  # whole lines, for grep and logs
        width = max(len(name) for name, _ in rows)
        print(title, *(f"{name:<{width}}  {value}" for name, value in rows), sep="\n", file=stream)
        return
    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    console = RichConsole(file=stream, highlight=False)
    console.print(Text(title, style="bold"))
    console.print(table)


def _finite(value: object) -> object:
    """Replace numbers that JSON cannot hold by null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
