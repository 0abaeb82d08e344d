"""AlexNet in its one-column form (arXiv 1404.5997), parameters named as torchvision names them."""

from torch import Tensor, nn

from gradleak.errors import UsageError

SMALLEST = 63  # below it the last pooling window does not fit


class AlexNet(nn.Module):
    """Five convolutions (``features``), adaptive pooling to 6×6, three Linear (``classifier``)."""

    def __init__(self, classes: int, *, head_bias: bool) -> None:
        """Make the layers; the dropout layers act in training mode only."""
        super().__init__()
        self.features = nn.Sequential(
            *_conv(3, 64, 11, stride=4, padding=2),
            nn.MaxPool2d(3, stride=2),
            *_conv(64, 192, 5, padding=2),
            nn.MaxPool2d(3, stride=2),
            *_conv(192, 384, 3, padding=1),
            *_conv(384, 256, 3, padding=1),
            *_conv(256, 256, 3, padding=1),
            nn.MaxPool2d(3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(6)
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(4096, 4096),
            nn.ReLU(),
            nn.Linear(4096, classes, bias=head_bias),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W), H and W at least 63, to logits (N, classes)."""
        logits: Tensor = self.classifier(self.avgpool(self.features(x)).flatten(1))
        return logits


def _conv(
    inputs: int, outputs: int, kernel: int, *, padding: int, stride: int = 1
) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding), nn.ReLU()


def alexnet(classes: int, size: int, *, head_bias: bool = True) -> nn.Module:
    """Build AlexNet; raises ``UsageError`` when ``size`` (pixels) is below 63."""
    if size < SMALLEST:
        raise UsageError(
            f"alexnet cannot take {size}x{size} images", f"use a size of at least {SMALLEST}"
        )
    return AlexNet(classes, head_bias=head_bias)
