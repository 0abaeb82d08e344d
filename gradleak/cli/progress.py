"""One display of progress for all long computations, on stderr and on a terminal only."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gradleak.progress import Progress, Step


@contextmanager
def progress_display(hidden: bool) -> Iterator[Progress | None]:
    """Show the phase at work, how far it is and what it has reached; nothing if ``hidden``."""
    if hidden or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed} {task.fields[value]:.2g}"),
        TimeElapsedColumn(),
    )
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=None, value=float("nan"), visible=False)

        def update(step: Step) -> None:
            bars.update(
                task,
                description=step.phase,
                completed=step.done,
                total=step.total,
                value=step.value,
                visible=True,
            )

        yield update
