"""Images by gradient matching: what the defaults reach on photographs, and what the choice costs.

Label and feature are recovered by the earlier stages. Every case gets the same time. ``other`` is
the optimiser that the default does not choose for the network.
"""

from __future__ import annotations

import argparse

import torch
from common import Run, centre, markdown_table, this_command, write_result

import gradleak
from gradleak.metrics import image_score
from gradleak.models import registry
from gradleak.models.build import build_model
from gradleak.models.spec import ModelSpec
from gradleak.reconstruction.options import MatchSettings
from gradleak.softlabels import soft_label

CASES = (
    ("lenet", {}, 32, "chelsea", "auto"),
    ("lenet", {}, 32, "flower", "auto"),
    ("lenet", {}, 32, "chelsea", "adam"),
    ("lenet", {"init": "paper"}, 32, "chelsea", "auto"),
    ("lenet", {"init": "paper"}, 32, "flower", "auto"),
    ("resnet18-cifar", {}, 32, "chelsea", "auto"),
    ("resnet18-cifar", {}, 32, "flower", "auto"),
    ("resnet18-cifar", {}, 32, "chelsea", "lbfgs"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0)
    seconds: float = parser.parse_args().seconds
    run = Run(this_command())
    rows = []
    for network, options, size, photograph, optimiser in CASES:
        entry = registry.entry(network)
        model = build_model(network, classes=10, size=size, options=options, seed=0)
        spec = ModelSpec(name=network, mean=entry.mean, std=entry.std, options=dict(options))
        label = soft_label([(3, 1.0)], 10, 0.1)[None]
        captured = gradleak.capture(model, centre(photograph, size), label, spec=spec)
        featured = gradleak.recover_feature(gradleak.recover_label(captured.bundle).bundle)
        settings = MatchSettings(optimiser=optimiser, time_limit=seconds)
        found = gradleak.reconstruct(featured.bundle, method="match", settings=settings)
        assert found.match is not None
        score = image_score(found.images, captured.truth.images)
        used = found.match.options
        rows.append(
            (
                f"{network} {options.get('init', '')}".strip(),
                photograph,
                f"{used.distance} + {used.optimiser}" + ("" if optimiser == "auto" else " (other)"),
                f"{score.psnr[0]:.1f} dB",
                f"{score.ssim[0]:.3f}",
                f"{score.differing[0]} of {score.total[0]}",
                "exact" if found.certificate.exact else f"{found.certificate.relative:.0e}",
                f"{found.match.seconds:.0f} s, {found.match.stopped}",
            )
        )
        print(" | ".join(rows[-1]), flush=True)
    columns = (
        "network",
        "photograph",
        "method",
        "PSNR",
        "SSIM",
        "8-bit values off",
        "certificate",
        "ended",
    )
    threads = f"{torch.get_num_threads()} threads, at most {seconds:.0f} s a picture."
    title = "Images by gradient matching"
    print(write_result("matching", title, run, ([threads], markdown_table(columns, rows))))


if __name__ == "__main__":
    main()
