"""Watching a training loop: the newest step, whatever the loop does around it."""

from __future__ import annotations

import pytest
import torch
from photographs import crops
from torch import Tensor, nn
from torch.nn import functional as F

import gradleak
from gradleak.errors import UsageError
from gradleak.watching import Watch


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 20), nn.ReLU(), nn.Linear(20, 10))


def images(count: int, seed: int = 0) -> Tensor:
    return crops(8, count, torch.Generator().manual_seed(seed))


def classes_of(watch: Watch) -> list[int]:
    found = gradleak.recover_label(watch.bundle()).result.samples
    return sorted(sample.classes[0] for sample in found)


def test_a_step_is_kept_in_two_lines(model: nn.Module) -> None:
    x = images(1)
    with gradleak.watch(model) as step:
        F.cross_entropy(model(x), torch.tensor([4])).backward()
    bundle = step.bundle()
    assert bundle.batch_size == 1
    assert bundle.model.input_shape == (3, 8, 8)
    features = gradleak.recover_feature(gradleak.recover_label(bundle).bundle)
    found = gradleak.reconstruct(features.bundle).images
    assert (found - x).abs().max() < 1e-5


def test_the_weights_kept_are_those_before_the_optimisers_step(model: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimiser = torch.optim.SGD(model.parameters(), lr=10.0)
    with gradleak.watch(model) as step:
        F.cross_entropy(model(images(1)), torch.tensor([4])).backward()
        optimiser.step()
        optimiser.zero_grad()
    held = step.bundle().tensors("param/")
    assert all(torch.equal(held[name], tensor) for name, tensor in before.items())
    assert classes_of(step) == [4]


def test_the_newest_step_of_a_training_is_kept(model: nn.Module) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    step = gradleak.watch(model)
    for label in (1, 2, 3):
        optimiser.zero_grad()
        F.cross_entropy(model(images(1, label)), torch.tensor([label])).backward()
        optimiser.step()
        with torch.no_grad():
            model(images(5))  # an evaluation is no step
    assert classes_of(step) == [3]
    step.close()
    F.cross_entropy(model(images(1)), torch.tensor([9])).backward()
    assert classes_of(step) == [3]


def test_zeroed_gradients_are_no_accumulation(model: nn.Module) -> None:
    with gradleak.watch(model) as step:
        for label in (1, 2):
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()
            F.cross_entropy(model(images(1, label)), torch.tensor([label])).backward()
    assert step.bundle().batch_size == 1
    assert classes_of(step) == [2]


def test_accumulated_passes_are_kept_as_their_sum(model: nn.Module) -> None:
    with gradleak.watch(model) as step:
        for label in (1, 6):
            (F.cross_entropy(model(images(1, label)), torch.tensor([label])) / 2).backward()
    bundle = step.bundle()
    assert bundle.batch_size is None
    assert torch.equal(bundle.tensor("grad/3.weight"), model[3].weight.grad)  # type: ignore[index]
    assert classes_of(step) == [1, 6]


def test_mode_and_batch_size_are_recorded(model: nn.Module) -> None:
    model.eval()
    with gradleak.watch(model, spec=gradleak.ModelSpec(mean=(0.5,) * 3, std=(0.25,) * 3)) as step:
        F.cross_entropy(model(images(3)), torch.tensor([1, 2, 3])).backward()
    bundle = step.bundle()
    assert (bundle.batch_size, bundle.metadata["mode"]) == (3, "eval")
    assert bundle.model.std == (0.25, 0.25, 0.25)
    assert not {name for name in bundle if name.startswith(("label", "image"))}


def test_a_watch_that_saw_no_step_says_so(model: nn.Module) -> None:
    with gradleak.watch(model) as step:
        model(images(1))
    with pytest.raises(UsageError, match="no step has been seen"):
        step.bundle()
