"""Images from gradients, table by table: what was asked, and what was measured.

One page a table, written to docs/results after every case, so a run can be ended at any time and
gone on with: ``--resume``. Tables can be run one by one, ``--only lenet,resnet18``, and so can
rows, ``--row "N = 32"``; a page shows every case on record, and the runs they are from. See
image_tables.py for the rows, image_photographs.py for the photographs, and image_record.py for the
record.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

import torch
from common import RESULTS, Run, this_command, write_result
from image_attack import run_case
from image_products import product_block
from image_record import Record
from image_report import line, page
from image_tables import BATCHES, Row, Size, Table, tables


def run_table(table: Table, options: argparse.Namespace) -> None:
    """Run the cases of a table until its time is up; its page is written after each of them."""
    run = Run(this_command())
    record = Record(options.results / "cases" / f"{table.page}.jsonl")
    rows = [row for row in table.rows if options.row in row.name]
    if not options.resume:
        record.drop({row.name for row in rows})
    spent = dict.fromkeys((row.name for row in rows), 0.0)
    spent |= record.seconds()
    while run.seconds < 60.0 * options.minutes:
        done = {row.name: _names(record, row) for row in rows}
        left = [
            (row, case) for row in rows for case in row.cases if case.name not in done[row.name]
        ]
        if not left:
            break
        # The row that had the least time: a run that ends early has some of each.
        row, case = min(left, key=lambda each: spent[each[0].name])
        begun = run.seconds
        limit = options.baseline_seconds if len(done[row.name]) < options.baselines else 0.0
        outcome = run_case(
            case,
            match_seconds=row.seconds or options.match_seconds,
            baseline_seconds=math.inf if row.rivals else limit,
            factor=table.factor,
        )
        print(f"{table.key}, {row.name}, {line(outcome)}", flush=True)
        record.add(row.name, outcome, run.seconds - begun, run)
        spent[row.name] += run.seconds - begun
        write_result(
            table.page, table.title, record, page(table, record.outcomes()), options.results
        )
    if table.products:
        blocks = [*page(table, record.outcomes()), product_block(table.products, options.products)]
        write_result(table.page, table.title, record, blocks, options.results)


def _names(record: Record, row: Row) -> set[str]:
    return {outcome.name for outcome in record.outcomes().get(row.name, ())}


def main() -> None:
    """Run the tables that were asked for."""
    names = [table.key for table in tables(Size())]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help=f"tables, comma-separated, of {', '.join(names)}")
    parser.add_argument("--row", default="", help="only rows whose name contains this")
    parser.add_argument(
        "--resume", action="store_true", help="keep the cases on record, and run the others"
    )
    parser.add_argument("--photographs", type=int, help="photographs a row (default: all 15)")
    parser.add_argument("--draws", type=int, default=20, help="batches a row (half of large ones)")
    parser.add_argument("--samples", type=int, nargs="+", default=BATCHES, help="N of the batches")
    parser.add_argument("--match-seconds", type=float, default=60.0, help="limit of a search")
    parser.add_argument("--baselines", type=int, default=3, help="cases a row with baselines")
    parser.add_argument(
        "--baseline-seconds",
        type=float,
        default=60.0,
        help="limit of a baseline that nothing is asked of",
    )
    parser.add_argument("--products", type=int, default=3, help="photographs of timing by product")
    parser.add_argument("--minutes", type=float, default=180.0, help="end each table after so many")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the pages")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else names
    if unknown := set(chosen) - set(names):
        parser.error(f"no table {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    torch.set_num_threads(options.threads)
    for table in tables(Size(options.photographs, options.draws, options.samples)):
        if table.key in chosen:
            run_table(table, options)


if __name__ == "__main__":
    main()
