"""The networks of the image benchmarks: built in, trained, or of one's own making."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn
from train_networks import RECIPES, trained

from gradleak.models import registry
from gradleak.models.build import build_model
from gradleak.models.spec import ModelSpec

WIDTHS = (3072, 1024, 512, 512, 256, 256, 256, 128)


@dataclass(frozen=True)
class Network:
    """One network and its weights: ``title`` for the tables, ``classes`` unless the task says.

    ``name`` is of the registry, of ``RECIPES`` (then trained, and every case has its weights), or
    of ``OWN``; ``size`` is the side of its images.
    """

    title: str
    name: str
    classes: int
    size: int = 32
    options: Mapping[str, object] = field(default_factory=dict)

    @property
    def task(self) -> str | None:
        """What it was trained on, None for a network as it was initialised."""
        return RECIPES[self.name].task if self.name in RECIPES else None


@dataclass(frozen=True)
class Built:
    """A network in eval mode, with what its user knows; ``module`` where no name stands for it."""

    model: nn.Module
    spec: ModelSpec
    classes: int
    module: nn.Module | None = None


def build(network: Network, seed: int) -> Built:
    """Build the network, its weights drawn from ``seed`` unless it was trained."""
    if network.name in OWN:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = OWN[network.name](network.classes, network.size).eval()
        return Built(model, ModelSpec(), network.classes, model)
    if network.name in RECIPES:
        made = trained(network.name)
        entry = registry.entry(RECIPES[network.name].network)
        spec = ModelSpec(name=entry.name, mean=entry.mean, std=entry.std)
        return Built(made.model, spec, made.classes)
    entry = registry.entry(network.name)
    model = build_model(
        network.name,
        classes=network.classes,
        size=network.size,
        options=network.options,
        seed=seed,
    )
    spec = ModelSpec(
        name=network.name, mean=entry.mean, std=entry.std, options=dict(network.options)
    )
    return Built(model, spec, network.classes)


def deep_mlp(act: Callable[[], nn.Module], *, he: bool = False) -> Callable[[int, int], nn.Module]:
    """Return a factory of MLPs of eight Linear layers with biases and ``act`` between them.

    They are initialised as torch does, where all samples come out of eight layers nearly alike, or
    by He's rule (arXiv 1502.01852) with biases of zero.
    """

    def make(classes: int, size: int) -> nn.Module:
        widths = (3 * size * size, *WIDTHS[1:], classes)
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(widths):
            linear = nn.Linear(inputs, outputs)
            if he:
                nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
                nn.init.zeros_(linear.bias)
            layers += [linear, act()]
        return nn.Sequential(*layers[:-1])

    return make


def relu_lenet(classes: int, size: int) -> nn.Module:
    """Return LeNet with ReLUs in the place of its sigmoids."""
    side = (size + 3) // 4
    return nn.Sequential(
        nn.Conv2d(3, 12, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(12, 12, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(12, 12, 5, stride=1, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * side * side, classes),
    )


def conv_net(classes: int, size: int) -> nn.Module:
    """Return a plain ConvNet without skips: 3×3 convolutions, batch norm, ReLU, max pooling.

    Eight convolutions of 64 to 256 channels, two poolings and one Linear layer, as the ConvNet of
    Inverting Gradients (arXiv 2003.14053).
    """
    widths = (3, 64, 64, 128, 128, 128, 256, 256, 256)
    layers: list[nn.Module] = []
    for place, (inputs, outputs) in enumerate(pairwise(widths)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        if place in (4, 7):
            layers.append(nn.MaxPool2d(3))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * (size // 9) ** 2, classes))


OWN: dict[str, Callable[[int, int], nn.Module]] = {
    "mlp8": deep_mlp(nn.ReLU),
    "mlp8-he": deep_mlp(nn.ReLU, he=True),
    "mlp8-tanh": deep_mlp(nn.Tanh),
    "relu-lenet": relu_lenet,
    "convnet": conv_net,
}

FCN4 = Network("FCN-4", "fcn4", 17, 64)
FCN4_BIAS = Network("FCN-4 with biases", "fcn4", 17, 64, {"bias": True})
FCN4_100 = Network("FCN-4", "fcn4", 100, 64)
MLP8_HE = Network("MLP of 8 layers, ReLU, He initialisation", "mlp8-he", 100)
MLP8 = Network("MLP of 8 layers, ReLU, torch's initialisation", "mlp8", 100)
MLP8_TANH = Network("MLP of 8 layers, tanh", "mlp8-tanh", 100)
LENET = Network("LeNet, default initialisation", "lenet", 10)
LENET_PAPER = Network("LeNet, paper's initialisation", "lenet", 10, options={"init": "paper"})
LENET_DIGITS = Network("LeNet, trained on digits", "lenet-digits", 10)
RESNET18 = Network("ResNet-18, untrained", "resnet18", 100)
RESNET18_CROPS = Network("ResNet-18, trained on photographs", "resnet18-photographs", 10)
CIFAR = Network("ResNet-18, CIFAR stem, untrained", "resnet18-cifar", 100)
CIFAR_DIGITS = Network("ResNet-18, CIFAR stem, trained on digits", "resnet18-cifar-digits", 10)
CIFAR_CROPS = Network(
    "ResNet-18, CIFAR stem, trained on photographs", "resnet18-cifar-photographs", 10
)
RESNET18_64 = Network("ResNet-18, untrained, 64×64", "resnet18", 100, 64)
RESNET18_224 = Network("ResNet-18, untrained, 224×224", "resnet18", 100, 224)
RELU_LENET = Network("LeNet with ReLUs", "relu-lenet", 10)
CONVNET = Network("ConvNet without skips", "convnet", 10)
ALEXNET = Network("AlexNet 64×64", "alexnet", 100, 64)
