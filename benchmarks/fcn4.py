"""FCN-4 at 64×64: how exactly and how fast ten photographs come back from float32 gradients.

Every second photograph is held out (``image_photographs``). The whole way of a user is taken
(capture, recover-label, recover-feature, reconstruct), the label family not told and no biases
anywhere. PSNR is of the float image before 8-bit rounding. The solve, which is the whole of
recover-feature (scale, peeling, residuals and forward checks of all layers), is timed beside
float32 matrix-vector products with all the gradients, in the same run and in turn; the last column
adds the whole of reconstruct, which is the read-out and the certificate. Times are of the
processor, which others at work on the machine disturb least.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from common import Run, markdown_table, this_command, write_result
from image_photographs import is_held_out, picture, targets

import gradleak
from gradleak.bundle import GRAD
from gradleak.metrics import image_score, relative_error
from gradleak.models import registry
from gradleak.models.build import build_model
from gradleak.models.spec import ModelSpec
from gradleak.softlabels import soft_label

PHOTOGRAPHS = targets(10)
SMOOTHINGS = 2 * (0.0, 0.1, 0.3, 0.02, 0.45)
ASKED = 5
REPEATS = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    torch.set_num_threads(parser.parse_args().threads)
    run = Run(this_command())
    entry = registry.entry("fcn4")
    rows, ratios, certified, worst, off = [], [], [], [], 0
    for index, (name, smooth) in enumerate(zip(PHOTOGRAPHS, SMOOTHINGS, strict=True)):
        model = build_model("fcn4", seed=index)
        label = soft_label([((5 * index + 3) % entry.classes, 1.0)], entry.classes, smooth)
        spec = ModelSpec(name="fcn4", mean=entry.mean, std=entry.std)
        captured = gradleak.capture(model, picture(name, entry.size)[None], label[None], spec=spec)
        labelled = gradleak.recover_label(captured.bundle)
        featured = gradleak.recover_feature(labelled.bundle)
        image = gradleak.reconstruct(featured.bundle)
        score = image_score(image.images, captured.truth.images)
        true = captured.truth.features["fc4"].double()
        feature = float(relative_error(featured.layers[0].features, true))
        product, solve, certificate = timings(labelled.bundle)
        ratios.append(solve / product)
        certified.append((solve + certificate) / product)
        worst.append(score.psnr[0])
        off += score.differing[0]
        rows.append(
            (
                f"{name} (held out)" if is_held_out(name) else name,
                f"{labelled.result.family} {smooth:g}",
                f"{float((labelled.result.labels - captured.truth.labels).abs().max()):.1e}",
                f"{feature:.1e}",
                f"{score.psnr[0]:.1f} dB",
                f"{score.ssim[0]:.6f}",
                f"{score.differing[0]} of {score.total[0]}",
                "exact" if image.certificate.exact else "not exact",
                f"{1e3 * solve:.0f} / {1e3 * product:.0f} ms = {solve / product:.1f}",
                f"{(solve + certificate) / product:.1f}",
            )
        )
        print(" | ".join(rows[-1]), flush=True)
    columns = (
        "photograph",
        "family found",
        "label, max error",
        "head feature, relative",
        "PSNR",
        "SSIM",
        "8-bit values off",
        "certificate",
        "solve / product",
        "with certificate",
    )
    summary = [
        f"Smallest PSNR {min(worst):.1f} dB (asked: 120), {off} 8-bit values differ (asked: 0), "
        f"median solve {statistics.median(ratios):.1f} × one matrix-vector product over all "
        f"gradients (asked: {ASKED}), {statistics.median(certified):.1f} × with the certificate. "
        "A PSNR of inf means the float32 image is bit for bit the client's."
    ]
    path = write_result("fcn4", "FCN-4 at 64×64", run, (summary, markdown_table(columns, rows)))
    print(*summary, path, sep="\n")


def timings(bundle: gradleak.Bundle) -> tuple[float, float, float]:
    """Return median seconds of a product over all gradients, of the solve, of the certificate."""
    gradients = list(bundle.tensors(GRAD).values())
    vectors = [torch.ones(g.shape[0], dtype=g.dtype) for g in gradients]
    products, solves, certificates = [], [], []
    for _ in range(REPEATS):
        start = time.process_time()
        for gradient, vector in zip(gradients, vectors, strict=True):
            vector @ gradient
        products.append(time.process_time() - start)
        start = time.process_time()
        featured = gradleak.recover_feature(bundle)
        solves.append(time.process_time() - start)
        start = time.process_time()
        gradleak.reconstruct(featured.bundle)
        certificates.append(time.process_time() - start)
    median = statistics.median
    return median(products), median(solves), median(certificates)


if __name__ == "__main__":
    main()
