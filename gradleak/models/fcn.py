"""FCN-4, the fully connected network of arXiv 2402.03124: four Linear layers with ReLU."""

from torch import Tensor, nn
from torch.nn import functional as F


class FCN4(nn.Module):
    """Four Linear layers, 3·size²-4096-1024-256-classes, with ReLU between them."""

    def __init__(self, classes: int, size: int, *, head_bias: bool, bias: bool) -> None:
        """Make ``fc1`` to ``fc4``; ``head_bias`` counts only where there are biases at all."""
        super().__init__()
        self.fc1 = nn.Linear(3 * size * size, 4096, bias=bias)
        self.fc2 = nn.Linear(4096, 1024, bias=bias)
        self.fc3 = nn.Linear(1024, 256, bias=bias)
        self.fc4 = nn.Linear(256, classes, bias=bias and head_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, size, size) to logits (N, classes)."""
        x = F.relu(self.fc1(x.flatten(1)))
        x = F.relu(self.fc2(x))
        x = F.relu(self.fc3(x))
        logits: Tensor = self.fc4(x)
        return logits


def fcn4(classes: int, size: int, *, head_bias: bool = True, bias: bool = False) -> nn.Module:
    """Build FCN-4 for 3×size×size images, without biases unless ``bias`` asks for them."""
    return FCN4(classes, size, head_bias=head_bias, bias=bias)
