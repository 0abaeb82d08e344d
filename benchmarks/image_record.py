"""The record of the image benchmarks: every case that was measured, by which run.

One JSON line a case, beside the page that is made of them. So a table can be measured in parts:
a run that ended early is gone on with, rows can be run one by one or side by side, and the page
names every run that its figures are from.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import Run
from image_attack import Attack, Outcome, Picture, Stage
from image_maps import MapScore


@dataclass(frozen=True)
class Measured:
    """One case of a row, the wall-clock ``seconds`` it took with its baselines, and its run."""

    row: str
    outcome: Outcome
    seconds: float
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Record:
    """The measured cases of a table, in a file of JSON lines; one that is missing has none."""

    path: Path

    def measured(self) -> list[Measured]:
        """Read every case, in the order of measuring."""
        return [_measured(json.loads(line)) for line in self._lines()]

    def add(self, row: str, outcome: Outcome, seconds: float, run: Run) -> None:
        """Write a case at the end. Runs side by side may do so."""
        kept = asdict(Measured(row, outcome, seconds, run.facts))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(kept) + "\n")

    def drop(self, rows: Collection[str]) -> None:
        """Forget the cases of ``rows``, which are to be measured afresh."""
        kept = [line for line in self._lines() if json.loads(line)["row"] not in rows]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(line + "\n" for line in kept))

    def outcomes(self) -> dict[str, list[Outcome]]:
        """Return the outcomes of each row, in the order of measuring."""
        done: dict[str, list[Outcome]] = {}
        for each in self.measured():
            done.setdefault(each.row, []).append(each.outcome)
        return done

    def seconds(self) -> dict[str, float]:
        """Return the seconds that the cases of each row took."""
        spent: dict[str, float] = {}
        for each in self.measured():
            spent[each.row] = spent.get(each.row, 0.0) + each.seconds
        return spent

    def header(self) -> list[str]:
        """Return the lines that say by which runs the cases were measured, and on what."""
        runs: dict[tuple[tuple[str, str], ...], list[float]] = {}
        for each in self.measured():
            runs.setdefault(tuple(each.facts.items()), []).append(each.seconds)
        lines = []
        for facts, seconds in runs.items():
            about = dict(facts)
            lines.append(f"- Command: `{about.pop('Command')}`")
            lines += [f"  - {name}: {value}" for name, value in about.items()]
            lines.append(f"  - Cases: {len(seconds)}, in {sum(seconds):.0f} s")
        return lines

    def _lines(self) -> list[str]:
        return self.path.read_text().splitlines() if self.path.exists() else []


def _measured(kept: dict[str, Any]) -> Measured:
    outcome = kept["outcome"]
    stages = {name: Stage(**stage) for name, stage in outcome["attack"]["stages"].items()}
    maps = outcome["maps"]
    read = Outcome(
        **{
            **outcome,
            "attack": Attack(stages, outcome["attack"]["method"]),
            "picture": Picture(**outcome["picture"]),
            "baselines": {
                name: (Picture(**picture), seconds)
                for name, (picture, seconds) in outcome["baselines"].items()
            },
            "maps": maps and MapScore(**{**maps, "barriers": tuple(maps["barriers"])}),
        }
    )
    return Measured(kept["row"], read, kept["seconds"], kept["facts"])
