"""The sigmoid LeNet of gradient inversion (Deep Leakage from Gradients, NeurIPS 2019)."""

from torch import Tensor, nn

from gradleak.errors import UsageError

CHANNELS = 12


class LeNet(nn.Module):
    """Three sigmoid 5×5 convolutions of 12 channels (strides 2, 2, 1) and one Linear layer."""

    def __init__(self, classes: int, size: int, *, head_bias: bool) -> None:
        """Make ``features`` and ``fc``; each stride of 2 halves ``size``, rounded up."""
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, CHANNELS, 5, stride=2, padding=2),
            nn.Sigmoid(),
            nn.Conv2d(CHANNELS, CHANNELS, 5, stride=2, padding=2),
            nn.Sigmoid(),
            nn.Conv2d(CHANNELS, CHANNELS, 5, stride=1, padding=2),
            nn.Sigmoid(),
        )
        side = (size + 3) // 4
        self.fc = nn.Linear(CHANNELS * side * side, classes, bias=head_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, size, size) to logits (N, classes)."""
        logits: Tensor = self.fc(self.features(x).flatten(1))
        return logits


def lenet(classes: int, size: int, *, init: str = "default", head_bias: bool = True) -> nn.Module:
    """Build LeNet; ``init="paper"`` draws every parameter from U(-0.5, 0.5).

    Raises ``UsageError`` for any other ``init`` than ``default`` and ``paper``. The wide uniform
    initialisation is the one of the DLG experiments and of arXiv 2402.03124.
    """
    if init not in ("default", "paper"):
        raise UsageError(f"lenet has no initialisation {init!r}", "use default or paper")
    model = LeNet(classes, size, head_bias=head_bias)
    if init == "paper":
        for parameter in model.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
    return model
