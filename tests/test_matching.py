"""Gradient matching finds the picture, and the certificate knows when it has not."""

import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import skimage
import sklearn
import torch
from torch import Tensor, nn

from gradleak.errors import IncompleteError, InputError, UsageError
from gradleak.images import load_image
from gradleak.models.build import build_model
from gradleak.normalisation import normalise
from gradleak.reconstruction.matching import MatchResult, match_gradients
from gradleak.reconstruction.options import MatchOptions, default_options
from gradleak.reconstruction.resimulate import check_reconstruction, gradients_of

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CAT = Path(skimage.__file__).parent / "data" / "chelsea.png"
CHINA = Path(sklearn.__file__).parent / "datasets" / "images" / "china.jpg"
# Where L-BFGS needs neither a time limit (not repeatable) nor its thousands of steps.
QUICK = MatchOptions(distance="l2", optimiser="lbfgs", steps=60, tv=0.0, time_limit=None)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def photograph(path: Path, size: int) -> Tensor:
    return load_image(path, size).pixels[None]


def soft_label(*classes: int) -> Tensor:
    label = torch.full((len(classes), 10), 0.01, dtype=torch.float64)
    label[range(len(classes)), list(classes)] = 0.91
    return label


def share(model: nn.Module, images: Tensor, labels: Tensor, only: str = "") -> dict[str, Tensor]:
    names = [name for name, _ in model.named_parameters() if only in name]
    return gradients_of(model, normalise(images, MEAN, STD), labels, names)


def match(model: nn.Module, gradients: dict[str, Tensor], labels: Tensor, **kwargs) -> MatchResult:
    size = kwargs.pop("size", 32)
    seed = kwargs.pop("seed", 0)
    return match_gradients(
        model,
        gradients,
        labels,
        shape=(3, size, size),
        mean=MEAN,
        std=STD,
        generator=torch.Generator().manual_seed(seed),
        **kwargs,
    )


def psnr(found: Tensor, true: Tensor) -> float:
    return -10 * math.log10((found.double() - true.double()).square().mean().item())


@pytest.fixture(scope="module")
def lenet() -> nn.Module:
    return build_model("lenet", classes=10, size=32, seed=1)


@pytest.mark.parametrize("path", [CAT, CHINA], ids=["cat", "china"])
def test_lenet_photograph_is_found_to_half_an_8_bit_step(lenet, path):
    image, label = photograph(path, 32), soft_label(3)
    gradients = share(lenet, image, label)
    values: list[float] = []
    options = replace(default_options(lenet, (3, 32, 32)), steps=450, time_limit=None)
    result = match(
        lenet, gradients, label, options=options, progress=lambda *call: values.append(call[2])
    )
    assert (result.options.distance, result.options.optimiser) == ("l2", "lbfgs")
    assert result.images.shape == image.shape
    assert result.images.dtype == torch.float32
    assert psnr(result.images, image) > 54
    assert result.objective == min(values) < 1e-6 * values[0]
    assert result.steps == len(values) == 450


def test_lenet_converges_to_the_gradients_own_rounding():
    model = build_model("lenet", classes=10, size=16, seed=1)
    image, label = photograph(CAT, 16), soft_label(3)
    gradients = share(model, image, label)
    options = replace(default_options(model, (3, 16, 16)), time_limit=None, steps=3000)
    result = match(model, gradients, label, options=options, size=16)
    assert result.stopped == "converged"
    assert psnr(result.images, image) > 90
    assert check_reconstruction(model, gradients, result.images, label, MEAN, STD).exact


def test_resnet_takes_signed_adam_and_the_objective_falls():
    model = build_model("resnet18", classes=10, size=32, seed=1)
    image, label = photograph(CAT, 32), soft_label(3)
    options = replace(default_options(model, (3, 32, 32)), steps=12, time_limit=None)
    assert (options.distance, options.optimiser) == ("cosine", "adam")
    calls: list[tuple[int, int, float]] = []
    gradients = share(model, image, label)
    result = match(
        model, gradients, label, options=options, progress=lambda *call: calls.append(call)
    )
    assert [call[:2] for call in calls] == [(i + 1, 12) for i in range(12)]
    assert result.objective == min(call[2] for call in calls) < 0.7 * calls[0][2]
    assert result.images.min() >= 0
    assert result.images.max() <= 1
    assert result.stopped == "steps"
    check = check_reconstruction(model, gradients, result.images, label, MEAN, STD)
    assert not check.exact
    assert check.relative > 0.1


def test_the_best_restart_wins(lenet):
    image, label = photograph(CAT, 32), soft_label(3)
    values: list[float] = []
    options = MatchOptions(steps=15, restarts=3, time_limit=None)
    result = match(
        lenet,
        share(lenet, image, label),
        label,
        options=options,
        progress=lambda *call: values.append(call[2]),
    )
    assert result.objective == min(values)
    assert result.restart == values.index(min(values)) // 15
    assert result.steps == 45


def test_the_time_limit_is_kept(lenet):
    image, label = photograph(CAT, 32), soft_label(3)
    options = replace(QUICK, steps=None, time_limit=0.6, restarts=2)
    began = time.monotonic()
    result = match(lenet, share(lenet, image, label), label, options=options)
    assert result.stopped == "time limit"
    assert 0.5 < result.seconds < 3
    assert time.monotonic() - began < 3


def test_the_seed_decides_and_the_callers_network_stays(lenet):
    image, label = photograph(CAT, 32), soft_label(3)
    gradients = share(lenet, image, label)
    before = {name: value.clone() for name, value in lenet.state_dict().items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first, again, other = (
        match(lenet, gradients, label, options=QUICK, seed=seed).images for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in lenet.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype == before[name].dtype
    assert not any(module._forward_pre_hooks for module in lenet.modules())


def test_the_feature_term_brings_the_feature_nearer(lenet):
    image, label = photograph(CAT, 32), soft_label(3)
    feature = lenet.features(normalise(image, MEAN, STD)).flatten(1).detach()
    gradients = share(lenet, image, label, only="fc.bias")
    errors = []
    for weight in (0.0, 10.0):
        options = replace(QUICK, steps=40, feature_weight=weight)
        images = match(lenet, gradients, label, options=options, head="fc", features=feature).images
        found = lenet.features(normalise(images, MEAN, STD)).flatten(1)
        errors.append(((found - feature).norm() / feature.norm()).item())
    assert errors[1] < 0.5 * errors[0]


def test_a_tensor_of_zeros_does_not_spoil_the_certificate(lenet):
    image, label = photograph(CAT, 32), soft_label(3)
    model = nn.Sequential(lenet)
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    gradients = share(model, image, label)
    assert not gradients["unused"].any()
    assert check_reconstruction(model, gradients, image, label, MEAN, STD).exact
    gradients["unused"] += 1e-3
    assert not check_reconstruction(model, gradients, image, label, MEAN, STD).exact


def test_a_heads_gradient_alone_is_enough_to_start(lenet):
    image, label = photograph(CAT, 32), soft_label(3)
    gradients = share(lenet, image, label, only="fc")
    assert set(gradients) == {"fc.weight", "fc.bias"}
    result = match(lenet, gradients, label, options=QUICK)
    assert check_reconstruction(lenet, gradients, result.images, label, MEAN, STD).relative < 1e-3
    assert psnr(result.images, image) > psnr(torch.full_like(image, 0.5), image) + 3


def test_two_images_are_found_at_once(lenet):
    images = torch.cat([photograph(CAT, 32), photograph(CHINA, 32)])
    labels = soft_label(3, 8)
    options = replace(QUICK, steps=300)
    result = match(lenet, share(lenet, images, labels), labels, options=options)
    assert result.images.shape == (2, 3, 32, 32)
    assert all(psnr(result.images[i], images[i]) > 18 for i in range(2))


@pytest.mark.parametrize("name", ["lenet", "resnet18", "resnet18-cifar"])
def test_the_true_image_is_certified_and_a_slightly_altered_one_is_not(name):
    model = build_model(name, classes=10, size=32, seed=1)
    image, label = photograph(CAT, 32), soft_label(3)
    gradients = share(model, image, label)
    check = check_reconstruction(model, gradients, image, label, MEAN, STD)
    assert check.exact
    assert check.relative < 1e-5
    assert set(check.per_tensor) == set(gradients)
    altered = image.clone()
    altered[..., 12:16, 12:16] += 1 / 255
    check = check_reconstruction(model, gradients, altered, label, MEAN, STD)
    assert not check.exact
    assert check.relative > 4e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_certificate_follows_the_gradients_dtype(lenet, dtype):
    image, label = photograph(CAT, 32).double(), soft_label(3)
    exact = share(build_model("lenet", classes=10, size=32, seed=1).double(), image, label)
    gradients = {name: gradient.to(dtype) for name, gradient in exact.items()}
    assert check_reconstruction(lenet, gradients, image, label, MEAN, STD).exact
    flipped = check_reconstruction(lenet, gradients, image.flip(-1), label, MEAN, STD)
    assert not flipped.exact


def test_wrong_input_is_named(lenet):
    image, label = photograph(CAT, 32), soft_label(3)
    gradients = share(lenet, image, label)
    with pytest.raises(InputError, match=r"no parameter other\.weight"):
        match(lenet, {"other.weight": gradients["fc.weight"]}, label, options=QUICK)
    with pytest.raises(InputError, match=r"gradient of fc\.bias is \(9,\)"):
        match(lenet, gradients | {"fc.bias": torch.ones(9)}, label, options=QUICK)
    with pytest.raises(InputError, match=r"fc\.bias holds NaN"):
        match(lenet, gradients | {"fc.bias": torch.full((10,), torch.nan)}, label, options=QUICK)
    with pytest.raises(InputError, match="every gradient is zero"):
        match(lenet, {"fc.bias": torch.zeros(10)}, label, options=QUICK)
    with pytest.raises(InputError, match=r"labels of shape \(1, 9\)"):
        match(lenet, gradients, label[:, :9], options=QUICK)
    with pytest.raises(UsageError, match="no Linear layer named None"):
        match(lenet, gradients, label, options=QUICK, features=torch.ones(1, 768))
    with pytest.raises(InputError, match=r"features of shape \(1, 5\)"):
        match(lenet, gradients, label, options=QUICK, features=torch.ones(1, 5), head="fc")


def test_a_network_of_nan_leaves_no_answer(lenet):
    image, label = photograph(CAT, 32), soft_label(3)
    gradients = share(lenet, image, label)
    broken = build_model("lenet", classes=10, size=32, seed=1)
    nn.init.constant_(broken.fc.weight, torch.nan)
    with pytest.raises(IncompleteError, match="never finite"):
        match(broken, gradients, label, options=QUICK)


@pytest.mark.parametrize(
    "wrong",
    [
        {"distance": "l1"},
        {"optimiser": "sgd"},
        {"steps": 0},
        {"restarts": 0},
        {"time_limit": 0.0},
        {"tv": -1.0},
        {"feature_weight": math.inf},
        {"learning_rate": math.nan},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_options_out_of_bounds_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        MatchOptions(**wrong)
