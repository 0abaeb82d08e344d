"""The time of one label, in process, on one core, without a bias gradient.

The reference beside it is a float32 matrix-vector product with the head's gradient, in the same
run. Medians after warm-up, the family not told.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from common import Run, crops, markdown_table, this_command, write_result
from torch import nn

import gradleak
from gradleak.bundle import GRAD, PARAM
from gradleak.labels.single import recover_single
from gradleak.models.build import build_model
from gradleak.softlabels import soft_label

CASES = (("resnet50", 1000, 224, 25.0), ("lenet", 10, 32, 5.0))
LABELS = {
    "hard": ([(3, 1.0)], 0.0),
    "smooth": ([(3, 1.0)], 0.1),
    "mixup": ([(3, 0.7), (5, 0.3)], 0.0),
    "mixup+smooth": ([(3, 0.7), (5, 0.3)], 0.1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=50)
    repeats: int = parser.parse_args().repeats
    torch.set_num_threads(1)
    run = Run(this_command())
    rows = []
    for network, classes, size, asked in CASES:
        model: nn.Module = build_model(network, classes=classes, options={"head_bias": False})
        image = crops(size, 1, torch.Generator().manual_seed(0))
        for family, (weights, smooth) in LABELS.items():
            label = soft_label(weights, classes, smooth)[None]
            bundle = gradleak.capture(model, image, label, head_only=True).bundle
            gradient, weight = bundle.tensor(f"{GRAD}fc.weight"), bundle.tensor(f"{PARAM}fc.weight")
            found = recover_single(gradient, weight)
            vector = torch.ones(gradient.shape[1])
            product = median(lambda g=gradient, v=vector: g @ v, repeats)  # type: ignore[misc]
            solve = median(lambda g=gradient, w=weight: recover_single(g, w), repeats)  # type: ignore[misc]
            rows.append(
                (
                    f"C = {gradient.shape[0]}, D = {gradient.shape[1]} ({network})",
                    f"{found.family}" if found.family == family else f"{found.family} (wrong)",
                    f"{solve:.1f} ms",
                    f"{asked:.0f} ms",
                    f"{product:.3f} ms",
                    f"{solve / product:.0f}",
                )
            )
            print(" | ".join(rows[-1]), flush=True)
    columns = ("head", "family", "one label", "asked", "matrix-vector product", "ratio")
    title = "The time of one label on one core"
    print(write_result("label_time", title, run, (markdown_table(columns, rows),)))


def median(work: Callable[[], object], repeats: int) -> float:
    """Return the median milliseconds of ``work`` after warm-up."""
    for _ in range(5):
        work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


if __name__ == "__main__":
    main()
