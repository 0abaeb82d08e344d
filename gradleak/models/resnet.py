"""ResNets (arXiv 1512.03385), parameters named and initialised as torchvision does.

The bottleneck has its stride in the 3×3 convolution, as the public weights expect.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3×3 convolutions beside a shortcut."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        """Map ``inputs`` channels to ``width``, the side divided by ``stride``."""
        super().__init__()
        self.conv1 = _conv(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, width, H/stride, W/stride)."""
        branch = F.relu(self.bn1(self.conv1(x)))
        branch = self.bn2(self.conv2(branch))
        return F.relu(branch + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """A 3×3 convolution between two 1×1 convolutions, beside a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        """Map ``inputs`` channels to 4·``width``, the side divided by ``stride``."""
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = _conv(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, inputs, H, W) to (N, 4·width, H/stride, W/stride)."""
        branch = F.relu(self.bn1(self.conv1(x)))
        branch = F.relu(self.bn2(self.conv2(branch)))
        branch = self.bn3(self.conv3(branch))
        return F.relu(branch + (x if self.downsample is None else self.downsample(x)))


Block = type[BasicBlock] | type[Bottleneck]


class ResNet(nn.Module):
    """A stem, four stages of residual blocks, global average pooling and one Linear layer."""

    def __init__(
        self,
        block: Block,
        depths: tuple[int, int, int, int],
        classes: int,
        *,
        small_stem: bool = False,
        head_bias: bool = True,
    ) -> None:
        """Make the layers; ``small_stem`` is 3×3, stride 1, without pooling (32×32 images)."""
        super().__init__()
        self.conv1 = _conv(3, 64, 3) if small_stem else _conv(3, 64, 7, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.pool_stem = not small_stem
        wide = block.expansion
        self.layer1 = _stage(block, 64, 64, depths[0], 1)
        self.layer2 = _stage(block, 64 * wide, 128, depths[1], 2)
        self.layer3 = _stage(block, 128 * wide, 256, depths[2], 2)
        self.layer4 = _stage(block, 256 * wide, 512, depths[3], 2)
        self.fc = nn.Linear(512 * wide, classes, bias=head_bias)
        # He initialisation by fan-out: keeps the gradient's variance through the ReLUs.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, H, W) of any size to logits (N, classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        if self.pool_stem:
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def _stage(block: Block, inputs: int, width: int, depth: int, stride: int) -> nn.Sequential:
    later = (block(width * block.expansion, width, 1) for _ in range(depth - 1))
    return nn.Sequential(block(inputs, width, stride), *later)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


def resnet18(classes: int, size: int, *, head_bias: bool = True) -> nn.Module:
    """Build ResNet-18; it takes any ``size``."""
    return ResNet(BasicBlock, (2, 2, 2, 2), classes, head_bias=head_bias)


def resnet34(classes: int, size: int, *, head_bias: bool = True) -> nn.Module:
    """Build ResNet-34; it takes any ``size``."""
    return ResNet(BasicBlock, (3, 4, 6, 3), classes, head_bias=head_bias)


def resnet50(classes: int, size: int, *, head_bias: bool = True) -> nn.Module:
    """Build ResNet-50; it takes any ``size``."""
    return ResNet(Bottleneck, (3, 4, 6, 3), classes, head_bias=head_bias)


def resnet18_cifar(classes: int, size: int, *, head_bias: bool = True) -> nn.Module:
    """Build ResNet-18 with a 3×3 stride-1 stem and no pooling in it, for images of 32×32."""
    return ResNet(BasicBlock, (2, 2, 2, 2), classes, small_stem=True, head_bias=head_bias)
