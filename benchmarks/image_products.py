"""The time of a solve, in float32 matrix-vector products over all gradients."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from common import markdown_table
from fcn4 import timings
from image_cases import captured, of_photographs
from image_networks import Network

import gradleak

COLUMNS = ("network, photograph", "product", "solve", "solve / product", "with certificate")


def product_block(networks: Sequence[Network], count: int) -> list[list[str]]:
    """Return the block of a page: ``count`` photographs of each network, timed."""
    rows, ratios = [], []
    for network in networks:
        for case in of_photographs(network, count):
            labelled = gradleak.recover_label(captured(case).bundle)
            product, solve, certificate = timings(labelled.bundle)
            ratios.append(solve / product)
            rows.append(
                [
                    f"{network.title}, {case.name}",
                    f"{1e3 * product:.1f} ms",
                    f"{1e3 * solve:.1f} ms",
                    f"{solve / product:.1f}",
                    f"{(solve + certificate) / product:.1f}",
                ]
            )
    if not rows:
        return []
    return [
        ["## Against a matrix-vector product"],
        [
            "The solve is recover-feature; the product is one float32 matrix-vector product with "
            "every gradient. Medians of repeats in the same run. Asked: at most 5; measured: "
            f"{statistics.median(ratios):.1f}."
        ],
        markdown_table(COLUMNS, rows),
    ]
