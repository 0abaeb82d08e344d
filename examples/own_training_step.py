"""Ask your own training step what it gives away: an own network, a photograph, one backward pass.

    python examples/own_training_step.py [PHOTO] [OUTPUT.png]

The client's half is an ordinary training step, watched: what a server would receive is kept. The
attacker's half works on that alone; the photograph is looked at again only to say how close the
answer came.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradleak
from gradleak.images import load_image, save_png
from gradleak.normalisation import normalise

CAT = Path(__file__).with_name("cat.png")
SIZE, CLASSES = 48, 20
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Classifier(nn.Module):
    """A small network of one's own: pictures (N, 3, 48, 48), normalised, to 20 classes."""

    def __init__(self) -> None:
        """Draw the weights."""
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 256), nn.ReLU(), nn.Linear(256, 64), nn.GELU()
        )
        self.head = nn.Linear(64, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, 20)."""
        logits: Tensor = self.head(self.body(x))
        return logits


def train_one_step(photo: Tensor, target: int) -> gradleak.Bundle:
    """Train on one photograph (1, 3, 48, 48) in [0, 1]; return what the server would receive."""
    torch.manual_seed(0)
    model = Classifier()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)

    inputs = normalise(photo, MEAN, STD)
    # Of the inputs it keeps the shape alone.
    with gradleak.watch(model, spec=gradleak.ModelSpec(mean=MEAN, std=STD)) as step:
        loss = F.cross_entropy(model(inputs), torch.tensor([target]), label_smoothing=0.1)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return step.bundle()


def attack(bundle: gradleak.Bundle) -> Tensor:
    """Recover label, features and picture from the bundle; print each, return the picture."""
    labelled = gradleak.recover_label(bundle)
    result = labelled.result
    print(f"label     {result.verdict}: {result.reason}")
    for sample in result.samples:
        for k, weight, error in zip(
            sample.classes, sample.weights, sample.weight_errors, strict=True
        ):
            print(f"          class {k} has {weight:.6f} ± {error:.0e}")
        print(f"          every other class has {sample.base:.6f}")

    featured = gradleak.recover_feature(labelled.bundle)
    print(f"features  {featured.verdict}: {featured.reason}")
    for layer in featured.layers:
        print(f"          {layer.features.shape[1]} values enter {layer.name}")

    outcome = gradleak.reconstruct(featured.bundle)
    print(f"picture   {outcome.verdict}: {outcome.reason}")
    return outcome.images


def main(photo_file: Path, output: Path) -> None:
    photo = load_image(photo_file, SIZE).pixels[None]
    recovered = attack(train_one_step(photo, target=7))
    save_png(output, recovered[0])
    different = int((recovered.mul(255).round() != photo.mul(255).round()).sum())
    print(f"\n{output}: {different} of {photo.numel()} 8-bit values differ from {photo_file.name}")


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:]]
    main(given[0] if given else CAT, given[1] if len(given) > 1 else Path("recovered.png"))
