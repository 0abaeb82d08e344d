"""Images from gradients, table by table: what was asked, and what was measured.

One page a table, written to docs/results after every case, so a run can be ended at any time, and
tables can be run one by one: ``--only lenet,resnet18``. See image_tables.py for the rows
and image_photographs.py for the photographs.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from pathlib import Path

import torch
from common import RESULTS, Run, this_command, write_result
from image_attack import Outcome, run_case
from image_products import product_block
from image_report import line, page
from image_tables import BATCHES, Size, Table, tables


def run_table(table: Table, options: argparse.Namespace) -> None:
    """Run the cases of a table until its time is up; its page is written after each of them."""
    run = Run(this_command())
    done: dict[str, list[Outcome]] = {}

    def write(*more: list[str]) -> None:
        blocks = [*page(table, done), *more]
        write_result(page_name(table, options.row), table.title, run, blocks, options.results)

    rows = [row for row in table.rows if options.row in row.name]
    spent = dict.fromkeys((row.name for row in rows), 0.0)
    while run.seconds < 60.0 * options.minutes:
        left = [row for row in rows if len(done.get(row.name, ())) < len(row.cases)]
        if not left:
            break
        # The row that had the least time: a run that ends early has some of each.
        row = min(left, key=lambda row: spent[row.name])
        begun, place = run.seconds, len(done.get(row.name, ()))
        limit = options.baseline_seconds if place < options.baselines else 0.0
        outcome = run_case(
            row.cases[place],
            match_seconds=row.seconds or options.match_seconds,
            baseline_seconds=math.inf if row.rivals else limit,
            factor=table.factor,
        )
        print(f"{table.key}, {row.name}, {line(outcome)}", flush=True)
        done.setdefault(row.name, []).append(outcome)
        spent[row.name] += run.seconds - begun
        write()
    if table.products and not options.row:
        write(*product_block(table.products, options.products))


def page_name(table: Table, row: str) -> str:
    """Name the page of a run; one of some rows alone has a page of its own."""
    words = re.sub(r"[^a-z0-9]+", "_", row.lower()).strip("_")
    return f"{table.page}_{words}" if words else table.page


def main() -> None:
    """Run the tables that were asked for."""
    names = [table.key for table in tables(Size())]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help=f"tables, comma-separated, of {', '.join(names)}")
    parser.add_argument(
        "--row", default="", help="rows whose name contains this, on their own page"
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
