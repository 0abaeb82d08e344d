"""The table of built-in networks: what each is called, takes and was trained on; torch-free."""

from dataclasses import dataclass

from gradleak.errors import UsageError

Triple = tuple[float, float, float]

NO_MEAN: Triple = (0.0, 0.0, 0.0)
NO_STD: Triple = (1.0, 1.0, 1.0)
CIFAR10_MEAN: Triple = (0.4914, 0.4822, 0.4465)
CIFAR10_STD: Triple = (0.2470, 0.2435, 0.2616)
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ModelEntry:
    """One built-in network.

    ``factory`` is ``module:function``, called as ``function(classes, size, **options)``;
    ``classes`` and ``size`` (pixels, the input is 3×size×size) are its defaults; ``mean`` and
    ``std`` normalise an image in [0, 1] channel by channel; ``options`` names the keywords the
    factory takes, out of ``init``, ``head_bias`` and ``bias``.
    """

    name: str
    factory: str
    classes: int
    size: int
    mean: Triple = NO_MEAN
    std: Triple = NO_STD
    options: tuple[str, ...] = ("head_bias",)


_ENTRIES: dict[str, ModelEntry] = {}


def register(entry: ModelEntry) -> None:
    """Add ``entry`` to the table, or replace the one of the same name."""
    _ENTRIES[entry.name] = entry


def names() -> list[str]:
    """List the names of the built-in networks in the order of registration."""
    return list(_ENTRIES)


def entry(name: str) -> ModelEntry:
    """Look up a built-in network; raises ``UsageError`` with the known names."""
    if name not in _ENTRIES:
        raise UsageError(
            f"unknown model {name!r}",
            f"use one of {', '.join(names())}, or module:factory for a network of your own",
        )
    return _ENTRIES[name]


def _imagenet(name: str, factory: str) -> ModelEntry:
    return ModelEntry(name, factory, 1000, 224, IMAGENET_MEAN, IMAGENET_STD)


register(
    ModelEntry("fcn4", "gradleak.models.fcn:fcn4", 17, 64, options=("head_bias", "bias")),
)
register(
    ModelEntry("lenet", "gradleak.models.lenet:lenet", 10, 32, options=("init", "head_bias")),
)
register(_imagenet("alexnet", "gradleak.models.alexnet:alexnet"))
register(_imagenet("resnet18", "gradleak.models.resnet:resnet18"))
register(_imagenet("resnet34", "gradleak.models.resnet:resnet34"))
register(_imagenet("resnet50", "gradleak.models.resnet:resnet50"))
register(
    ModelEntry(
        "resnet18-cifar", "gradleak.models.resnet:resnet18_cifar", 10, 32, CIFAR10_MEAN, CIFAR10_STD
    )
)
