"""Gradients of train mode: batch statistics and dropout, and what they do not hide."""

from __future__ import annotations

import pytest
import torch
from conftest import run_cli
from photographs import crops, photograph
from torch import Tensor, nn
from torch.nn import functional as F

import gradleak
from gradleak.errors import UsageError
from gradleak.models.build import build_model
from gradleak.reconstruction.options import MatchSettings
from gradleak.stages.maps import recover_maps


def pictures(count: int, size: int = 32) -> Tensor:
    return crops(size, count, torch.Generator().manual_seed(count))


@pytest.mark.parametrize(("name", "samples"), [("resnet18-cifar", 1), ("resnet18", 3)])
def test_labels_and_head_features_do_not_depend_on_the_mode(name: str, samples: int) -> None:
    model = build_model(name, size=64, classes=10, seed=1)
    labels = torch.arange(samples) + 2
    captured = gradleak.capture(model, pictures(samples, 64), labels, mode="train")
    assert captured.bundle.metadata["mode"] == "train"
    labelled = gradleak.recover_label(captured.bundle)
    assert labelled.result.verdict == "unique"
    assert sorted(s.classes[0] for s in labelled.result.samples) == labels.tolist()
    found = gradleak.recover_feature(labelled.bundle).layers[0].features.double()
    true = captured.truth.features["fc"].double()
    assert (torch.cdist(true, found).amin(1) / true.norm(dim=1)).max() < 1e-5


def test_capture_leaves_the_running_statistics_as_they_were() -> None:
    model = build_model("resnet18-cifar", seed=1)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    captured = gradleak.capture(model, pictures(2), torch.tensor([1, 2]), mode="train")
    assert all(torch.equal(before[name], b) for name, b in model.named_buffers())
    held = captured.bundle.tensors("buffer/")
    assert all(torch.equal(before[name], b) for name, b in held.items())
    assert not model.training


class Normalised(nn.Sequential):
    """A convolution and its BatchNorm, under two Linear layers."""

    def __init__(self, dropout: float = 0.0) -> None:
        torch.manual_seed(3)
        super().__init__(
            nn.Conv2d(3, 12, 5, stride=2, padding=2),
            nn.BatchNorm2d(12),
            nn.Sigmoid(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(12 * 64, 40),
            nn.Tanh(),
            nn.Linear(40, 10),
        )


def featured(model: nn.Module, mode: str) -> gradleak.Bundle:
    captured = gradleak.capture(model, pictures(1, 16), torch.tensor([4]), mode=mode, seed=5)
    return gradleak.recover_feature(gradleak.recover_label(captured.bundle).bundle).bundle


def test_the_walk_stops_at_batch_statistics_and_says_so() -> None:
    model = Normalised()
    found = recover_maps(featured(model, "train"), model=model)
    assert [m.names for m in found.maps] == [("5",)]
    assert "normalises by the statistics of the batch itself" in str(found.barriers[0])
    through = recover_maps(featured(model, "eval"), model=model)
    assert through.maps[-1].names == ("0",)


def test_images_come_back_through_batch_statistics_with_their_contrast() -> None:
    """All but the contrast follows from the maps above; the contrast from BatchNorm's epsilon."""
    model = Normalised()
    found = gradleak.reconstruct(featured(model, "train"), model=model)
    assert found.verdict == "unique"
    assert (found.images - pictures(1, 16)).abs().max() < 0.5 / 255


def test_dropout_is_drawn_from_the_seed_and_warned_of() -> None:
    model = Normalised(dropout=0.5)
    settings = MatchSettings(steps=3, time_limit=5.0)
    found = gradleak.reconstruct(featured(model, "train"), model=model, settings=settings)
    assert found.warning is not None
    assert "whose masks cannot be known" in found.warning
    gradient = featured(model, "train").tensor("grad/7.weight")
    assert torch.equal(gradient, featured(model, "train").tensor("grad/7.weight"))
    assert not torch.equal(gradient, featured(model, "eval").tensor("grad/7.weight"))


def test_one_value_a_channel_is_refused_in_one_line() -> None:
    done = run_cli(
        *("capture", "--model", "resnet18", "--size", "32", "--image", photograph("chelsea")),
        *("--label", "1", "--mode", "train", "-o", "-"),
    )
    assert done.code == 2
    assert "more than 1 value per channel" in done.line
    with pytest.raises(UsageError, match="no mode 'test'"):
        gradleak.capture(Normalised(), pictures(1, 16), torch.tensor([1]), mode="test")


def test_a_watched_step_in_train_mode_is_one() -> None:
    model = Normalised()
    with gradleak.watch(model) as step:
        F.cross_entropy(model(pictures(2, 16)), torch.tensor([2, 7])).backward()
    bundle = step.bundle()
    assert bundle.metadata["mode"] == "train"
    assert bool((bundle.tensor("buffer/1.running_mean") == 0.0).all())  # from before the step
    found = gradleak.recover_label(bundle).result
    assert sorted(s.classes[0] for s in found.samples) == [2, 7]
