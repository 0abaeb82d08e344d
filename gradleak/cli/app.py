"""The ``gradleak`` command: its subcommands, and what becomes of errors."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
from typing import Annotated

import typer

from gradleak import __version__
from gradleak.cli import capture, defend, feature, importing, inspect, label, reconstruct, score
from gradleak.cli.common import print_error
from gradleak.errors import GradleakError

# Typer carries its own copy of click or uses the installed one; both call their base class so.
_ClickException: type[Exception] = next(
    c
    for c in typer.BadParameter.__mro__
    if c.__name__ == "ClickException" and issubclass(c, Exception)
)

_INTERRUPTED = 130
_MENDS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit on file sizes",
}

app = typer.Typer(
    name="gradleak",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for module in (capture, importing, defend, label, feature, reconstruct, score, inspect):
    app.command(module.NAME, epilog=f"Example: {module.EXAMPLE}")(module.command)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"gradleak {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Show, exactly and honestly, what a saved gradient gives away.

    For measuring your own systems. Each stage reads a gradient bundle and adds what it found.

    Exit codes: 0 done, 2 usage, 3 invalid input, 4 answer not complete.
    """


def main() -> None:
    """Run the command line; every failure is one line on stderr and an exit code."""
    # The stages of a pipe share the cores. OpenMP's threads spin while they wait for each other,
    # and two stages that spin against each other turn milliseconds into seconds.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _prepare_streams()
    # Like an exception, so that half-written files are removed on the way out.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(_run())


def _prepare_streams() -> None:
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller: what is printed there goes nowhere
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # A file name that is not UTF-8, or a terminal that is not, is no reason to fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _run() -> int:
    try:
        code = app(standalone_mode=False, prog_name="gradleak")
        sys.stdout.flush()
    except GradleakError as error:
        print_error(str(error))
        return error.exit_code
    except _ClickException as error:
        return _usage(error)
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except BrokenPipeError:
        return _reader_left()
    except SystemExit as end:
        # Typer answers a closed pipe itself, with exit code 1.
        if isinstance(end.__context__, BrokenPipeError):
            return _reader_left()
        raise
    except OSError as error:
        mend = _MENDS.get(error.errno or 0, "check path and permissions")
        where = f" ({error.filename})" if error.filename else ""
        print_error(f"{error.strerror or error}{where}; {mend}")
        _silence_stdout()
        return 1
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):  # torch's own way
            raise
        print_error("out of memory; use a smaller batch, image or network")
        return 1
    if code == _INTERRUPTED:  # also Typer's answer to Ctrl-C
        print_error("interrupted")
    return code if isinstance(code, int) else 0


def _reader_left() -> int:
    """End quietly: the reader of the pipe has what it wanted."""
    _silence_stdout()
    return 0


def _silence_stdout() -> None:
    """Discard what is still buffered: at exit Python would fail on it once more, and say so."""
    with contextlib.suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage(error: Exception) -> int:
    message = str(getattr(error, "format_message", error.__str__)())
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        if message:  # Typer has printed the help itself, or left it to us
            print(message, file=sys.stderr)
        return 2
    command = context.command_path if context is not None else "gradleak"
    print_error(f"{message.rstrip('.')}; see {command} --help")
    return int(getattr(error, "exit_code", 2))
