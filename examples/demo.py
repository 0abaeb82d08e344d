"""Run the whole pipeline on a photograph for three networks, and show what was given away.

FCN-4, LeNet and ResNet-18 give back label, feature and every pixel. Every step is the command that
a user would type; this script only strings them together, collects what ``gradleak score`` says and
puts the pictures side by side in ``demo-out/``.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import skimage.data
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gradleak.images import contact_sheet, load_image, save_sheet

PHOTO = Path(skimage.data.__file__).parent / "chelsea.png"
OUT = Path("demo-out")
NETWORKS = {"fcn4": 64, "lenet": 32, "resnet18": 32}
SHEET_WIDTH = 320
INCOMPLETE = 4


def main() -> None:
    OUT.mkdir(exist_ok=True)
    table = Table(title="What one gradient gave away (chelsea.png, smoothed label)")
    columns = ("network", "label, largest error", "features, relative", "PSNR", "8-bit values off")
    for column in columns:
        table.add_column(column)
    rows = []
    for network, size in NETWORKS.items():
        sample = attack(network, size)
        image = sample["image"]
        table.add_row(
            network,
            f"{sample['label']['max_error']:.1e}",
            f"{max(sample['features'].values()):.1e}",
            "bit for bit" if image["psnr"] is None else f"{image['psnr']:.1f} dB",
            f"{image['differing']} of {image['total']}",
        )
        original = load_image(PHOTO, size).pixels
        recovered = load_image(OUT / f"{network}-recovered.png", None).pixels
        scale = SHEET_WIDTH // size
        pair = ((f"{network}: the client's image", original), ("from its gradient", recovered))
        rows.append([(caption, enlarge(picture, scale)) for caption, picture in pair])
    Console().print(table)
    save_sheet(OUT / "side-by-side.png", contact_sheet(rows, scale=1))
    print(f"The recovered pictures and sheets are in {OUT.resolve()}:")
    for path in sorted(OUT.glob("*.png")):
        print(f"  {path}")


def attack(network: str, size: int) -> dict[str, Any]:
    """Capture, attack and score one network; return the score of its one sample."""
    photo, out = shlex.quote(str(PHOTO)), OUT / network
    run(
        f"gradleak capture --model {network} --size {size} --image {photo} --smooth 0.1 "
        f"--truth {out}-truth.safetensors -o {out}-grads.safetensors -q"
    )
    # An approximate image would end with exit code 4; the report says which it is.
    run(
        f"gradleak recover-label {out}-grads.safetensors -o - | gradleak recover-feature -o - "
        f"| gradleak reconstruct -o {out}-recovered.png -o {out}-recovered.safetensors",
        allowed=(0, INCOMPLETE),
        show=True,
    )
    scored = run(
        f"gradleak score {out}-recovered.safetensors --truth {out}-truth.safetensors --json"
    )
    sample: dict[str, Any] = json.loads(scored)["samples"][0]
    return sample


def enlarge(picture: Tensor, scale: int) -> Tensor:
    """Repeat every pixel of (3, H, W), so that pictures of two sizes fit one sheet."""
    return picture.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def run(command: str, *, allowed: tuple[int, ...] = (0,), show: bool = False) -> str:
    """Run one shell line, shown as typed; stop the demo if it fails unexpectedly."""
    print(f"$ {command}", flush=True)
    script = ["bash", "-c", f"set -o pipefail; {command}"]
    done = subprocess.run(script, stdout=None if show else subprocess.PIPE, text=True, check=False)
    if done.returncode not in allowed:
        sys.exit(f"that command ended with exit code {done.returncode}")
    return done.stdout or ""


if __name__ == "__main__":
    main()
