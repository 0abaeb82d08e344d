"""The image benchmarks run the pipeline as a user does, score afterwards, and keep five back."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gradleak.bundle import IMAGE, LABEL

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import image_networks as nets
from common import Run
from image_attack import Outcome, attack, compare, run_case
from image_cases import CROP, Case, captured, of_photographs, with_change
from image_photographs import HELD_OUT, KNOWN, is_held_out, known_files, picture, targets
from image_record import Record
from image_report import grouped_reasons, page, summary
from image_tables import Row, Size, Table, same_pixels, tables
from images import main

ROOT = Path(__file__).parents[1]
SMALL = replace(nets.MLP8_HE, size=8)


def test_nothing_else_names_a_held_out_photograph() -> None:
    names = "|".join(HELD_OUT)
    named = re.compile(rf"\b({names})\.(png|jpg|npz)|\bdata\.({names})\b|[\"']({names})[\"']")
    assert named.search('photograph("ascent")'), "the search must find what it looks for"
    files = [
        path
        for folder in ("tests", "benchmarks", "examples", "gradleak")
        for path in (ROOT / folder).rglob("*.py")
        if path.name not in ("image_photographs.py", Path(__file__).name)
    ]
    assert len(files) > 50
    assert [path for path in files if named.search(path.read_text())] == []


def test_no_network_is_trained_on_a_held_out_photograph() -> None:
    assert len(HELD_OUT) == 5
    assert len(KNOWN) == len(set(known_files())) == 10
    assert not {path.stem for path in known_files()} & set(HELD_OUT)


def test_every_number_of_photographs_has_held_out_ones() -> None:
    for count in range(2, 11):
        assert abs(sum(map(is_held_out, targets(count))) - count / 2) <= 0.5
    assert sorted(targets()) == sorted(KNOWN + HELD_OUT)


@pytest.mark.parametrize("name", [*KNOWN, *HELD_OUT])
def test_photographs_are_8_bit_pictures_and_differ(name: str) -> None:
    pixels = picture(name, 16)
    assert pixels.shape == (3, 16, 16)
    assert torch.equal((pixels * 255).round() / 255, pixels)
    assert pixels.std() > 0.02
    assert all(not torch.equal(pixels, picture(other, 16)) for other in KNOWN if other != name)


def test_a_case_goes_through_the_pipeline_and_is_scored() -> None:
    (outcome,) = (run_case(case, match_seconds=1.0) for case in of_photographs(SMALL, 1))
    assert outcome.attack.failed is None
    assert set(outcome.attack.stages) == {"label", "feature", "image"}
    assert all(stage.seconds > 0 for stage in outcome.attack.stages.values())
    assert outcome.attack.method == "mlp"
    assert outcome.exact
    assert outcome.picture.psnr > 100
    assert (outcome.picture.differing, outcome.picture.total) == (0, 3 * 8 * 8)
    assert outcome.label_error < 1e-5


def test_a_batch_is_scored_by_its_worst_sample() -> None:
    given = captured(Case(SMALL, (CROP,) * 3, 5))
    answer, _ = attack(given.bundle, given.built.module, 1.0)
    right, _ = compare(answer, given)
    assert right.psnr > 100
    off = answer.tensor(IMAGE).clone()
    off[1, 0, 0, 0] = 1.0 - off[1, 0, 0, 0].round()
    error = float((off - answer.tensor(IMAGE)).square()[1].mean())
    wrong, _ = compare(answer.extended({IMAGE: off}), given)
    assert wrong.psnr == pytest.approx(-10 * math.log10(error), abs=1e-3)
    assert (wrong.differing, wrong.total) == (1, 3 * 3 * 8 * 8)
    fewer = {LABEL: answer.tensor(LABEL)[:2], IMAGE: off[:2]}
    fewer |= {
        f"feature/{name}": answer.tensor(f"feature/{name}")[:2] for name in answer.names("feature/")
    }
    missing, label = compare(answer.extended(fewer), given)
    assert math.isnan(missing.psnr)
    assert math.isnan(label)
    assert missing.differing >= 3 * 8 * 8


def test_the_stage_that_failed_is_named() -> None:
    noisy = with_change(of_photographs(SMALL, 1), noise=0.3)
    outcome = run_case(noisy[0], match_seconds=0.5)
    assert outcome.attack.failed is not None
    assert outcome.reason.startswith(outcome.attack.failed)
    assert not outcome.exact
    assert outcome.picture.differing > 0


def test_an_error_in_the_label_reaches_the_picture() -> None:
    case = of_photographs(replace(nets.FCN4, size=8), 1)  # no bias: all rests on the label
    clean, small, large = (
        run_case(with_change(case, label_error=error)[0], match_seconds=0.5).picture.psnr
        for error in (0.0, 1e-5, 1e-3)
    )
    assert clean > small > large


def test_half_precision_and_noise_change_the_gradient_alone() -> None:
    case = of_photographs(SMALL, 1)[0]
    plain = captured(case)
    for changes in ({"dtype": "bfloat16"}, {"noise": 1e-3}):
        (other,) = map(captured, with_change([case], **changes))
        assert torch.equal(other.truth.images, plain.truth.images)
        assert torch.equal(other.truth.labels, plain.truth.labels)
        name = "grad/1.weight"
        given, clean = other.bundle.tensor(name).double(), plain.bundle.tensor(name).double()
        relative = float((given - clean).norm() / clean.norm())
        assert 5e-4 < relative < 5e-3
        assert torch.equal(
            other.bundle.tensor("param/1.weight"), plain.bundle.tensor("param/1.weight")
        )


def outcomes() -> list[Outcome]:
    return [run_case(case, match_seconds=0.5) for case in of_photographs(SMALL, 2)]


def test_a_row_counts_with_its_interval_and_a_partial_run_says_so() -> None:
    row = Row("some", "all", of_photographs(SMALL, 3), same_pixels)
    found = outcomes()
    assert summary(row, found)[:5] == ["some", "all", "2 of 2", "34% – 100%", "1 of 1"]
    other = Row("others", "all", row.cases, same_pixels)
    table = replace(tables(Size(photographs=1))[0], rows=(row, other))
    text = "\n".join("\n".join(block) for block in page(table, {"some": found}))
    assert "rows not run: others" in text
    assert "some (2 of 3 cases)" in text


def test_a_record_keeps_cases_and_the_runs_they_are_from(tmp_path: Path) -> None:
    first, second = Run("python one"), Run("python two")
    record = Record(tmp_path / "cases" / "page.jsonl")
    assert record.outcomes() == {}
    one, other = outcomes()
    record.add("some", one, 1.0, first)
    record.add("others", one, 2.0, first)
    record.add("some", other, 4.0, second)
    assert Record(record.path).outcomes() == {"some": [one, other], "others": [one]}
    header = "\n".join(record.header())
    assert header.index("python one") < header.index("Cases: 2, in 3 s")
    assert header.index("python two") < header.index("Cases: 1, in 4 s")
    record.drop({"some"})
    assert record.outcomes() == {"others": [one]}


def test_the_pages_of_a_run_do_not_make_it_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("python one")
    facts = dict(run.facts)
    monkeypatch.setattr("common.revision", lambda: "changed meanwhile")
    assert run.facts == facts
    assert "Command" in run.facts
    assert run.header()[0] == "- Command: `python one`"
    assert "Command" in run.facts


def test_a_run_that_is_resumed_measures_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def table(size: Size) -> list[Table]:
        each = of_photographs(SMALL, size.photographs)
        return [Table("mlp", "One", [Row(name, "all", each, same_pixels) for name in ("a", "b")])]

    def measure(*words: str) -> tuple[list[str], str]:
        arguments = ["images.py", "--match-seconds", "1", "--baselines", "0", *words]
        monkeypatch.setattr(sys, "argv", [*arguments, "--results", str(tmp_path)])
        main()
        lines = (tmp_path / "cases" / "images_mlp.jsonl").read_text().splitlines()
        return lines, (tmp_path / "images_mlp.md").read_text()

    monkeypatch.setattr("images.tables", table)
    begun, _ = measure("--photographs", "1", "--row", "a")
    lines, text = measure("--photographs", "2", "--resume")
    rows = [json.loads(line)["row"] for line in lines[1:]]
    assert sorted(rows) == ["a", "b", "b"]
    assert lines[: len(begun)] == begun
    assert text.count("Command") == 2
    assert "2 of 2" in text
    assert "A partial run" not in text
    again, _ = measure("--photographs", "1", "--row", "b")
    assert again[:-1] == [line for line in lines if json.loads(line)["row"] == "a"]


def test_reasons_that_differ_in_numbers_are_one() -> None:
    one, other = (
        run_case(case, match_seconds=0.5)
        for case in with_change(of_photographs(SMALL, 2), noise=1e-3)
    )
    assert one.reason != other.reason
    assert sum(count for count, _ in grouped_reasons([one, other, one])) == 3
    assert grouped_reasons([one, one])[0][0] == 2


def test_every_table_has_rows_with_cases_and_a_page_of_its_own() -> None:
    every = tables(Size(photographs=2, draws=2))
    assert len({table.page for table in every}) == len(every)
    for table in every:
        names = [row.name for row in table.rows]
        assert len(set(names)) == len(names)
        assert all(row.cases for row in table.rows)


def test_a_comparison_with_matching_needs_matching_beside_every_case() -> None:
    rows = {row.name: row for table in tables(Size(photographs=1)) for row in table.rows}
    row = rows["LeNet with ReLUs"]
    assert row.rivals
    assert not rows["FCN-4"].rivals
    alone = run_case(of_photographs(SMALL, 1)[0], match_seconds=0.5)
    assert not row.good(alone)
    beside = run_case(of_photographs(SMALL, 1)[0], match_seconds=0.5, baseline_seconds=0.2)
    assert set(beside.baselines) == {"Inverting Gradients", "L-BFGS"}
    assert all(picture.psnr < 60 for picture, _ in beside.baselines.values())
    assert row.good(beside)
