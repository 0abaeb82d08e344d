"""The scores agree with independent implementations and with what their names promise."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from gradleak.errors import InputError
from gradleak.images import load_image, to_uint8
from gradleak.metrics import (
    image_score,
    label_errors,
    match_samples,
    pixels_that_differ,
    psnr,
    relative_error,
    ssim,
    wilson_interval,
)

DATA = Path(skimage.__file__).parent / "data"
NAMES = ("chelsea.png", "coffee.png", "rocket.jpg")


@pytest.fixture(scope="module")
def photographs() -> torch.Tensor:
    return torch.stack([load_image(DATA / name, 64).pixels for name in NAMES])


@pytest.fixture(scope="module")
def imperfect(photographs: torch.Tensor) -> torch.Tensor:
    """The photographs with noise of three strengths."""
    dice = torch.Generator().manual_seed(0)
    noise = torch.randn(photographs.shape, generator=dice)
    strength = torch.tensor([0.3, 0.05, 0.01]).view(3, 1, 1, 1)
    return (photographs + strength * noise).clamp(0, 1)


def smooth(classes: int, peak: int, amount: float) -> torch.Tensor:
    label = torch.full((classes,), amount / classes, dtype=torch.float64)
    label[peak] += 1 - amount
    return label


def as_arrays(pictures: torch.Tensor) -> list[np.ndarray]:
    return list(pictures.permute(0, 2, 3, 1).double().numpy())


def test_psnr_and_ssim_agree_with_scikit_image(
    photographs: torch.Tensor, imperfect: torch.Tensor
) -> None:
    pairs = list(zip(as_arrays(photographs), as_arrays(imperfect), strict=True))
    noise = [peak_signal_noise_ratio(true, mine, data_range=1.0) for true, mine in pairs]
    likeness = [
        structural_similarity(
            true,
            mine,
            data_range=1.0,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for true, mine in pairs
    ]
    np.testing.assert_allclose(psnr(imperfect, photographs), noise, rtol=1e-10)
    np.testing.assert_allclose(ssim(imperfect, photographs), likeness, atol=1e-6)
    assert likeness == sorted(likeness)
    assert max(likeness) - min(likeness) > 0.3


def test_image_score_keeps_float_and_8_bit_apart(photographs: torch.Tensor) -> None:
    # A third of a level is lost in a PNG: not the same picture, but the same file.
    shifted = (to_uint8(photographs).double() / 255 + 1 / 765).clamp(0, 1)
    shifted[1, 0, :2, :5] = 1 - shifted[1, 0, :2, :5].round()
    score = image_score(shifted, photographs)
    assert score.psnr_8bit[0] == score.psnr_8bit[2] == math.inf
    assert 55 < score.psnr[0] < 60
    assert score.ssim_8bit[0] == pytest.approx(1, abs=1e-12)
    assert score.ssim[0] < 1
    assert score.psnr_8bit[1] < 40
    assert score.differing == (0, 10, 0)
    assert score.total == (3 * 64 * 64,) * 3


def test_equal_pictures_score_perfectly(photographs: torch.Tensor) -> None:
    assert psnr(photographs, photographs).tolist() == [math.inf] * 3
    torch.testing.assert_close(ssim(photographs, photographs), torch.ones(3, dtype=torch.float64))
    assert pixels_that_differ(photographs, photographs).tolist() == [0, 0, 0]


def test_ssim_of_a_picture_smaller_than_its_window_is_undefined(photographs: torch.Tensor) -> None:
    tiny = photographs[:, :, :10]
    assert bool(ssim(tiny, tiny).isnan().all())
    assert bool(ssim(photographs[:, :, :11], photographs[:, :, :11]).isfinite().all())


def test_label_errors_are_those_of_the_worst_class_and_of_all() -> None:
    true = torch.stack([smooth(5, 2, 0.1), smooth(5, 0, 0.1)])
    recovered = true.clone()
    recovered[0, 2] -= 0.03
    recovered[0, 4] += 0.01
    score = label_errors(recovered, true)
    assert score.l1 == pytest.approx((0.04, 0))
    assert score.max_error == pytest.approx((0.03, 0))
    assert score.top1 == score.top_k == (True, True)


def test_a_mixup_label_is_right_only_with_both_classes() -> None:
    true = torch.tensor([[0.02, 0.60, 0.02, 0.34, 0.02]] * 3)
    recovered = torch.tensor(
        [
            [0.10, 0.40, 0.10, 0.30, 0.10],
            [0.30, 0.50, 0.10, 0.05, 0.05],
            [0.02, 0.34, 0.02, 0.60, 0.02],
        ]
    )
    score = label_errors(recovered, true)
    assert score.top_k == (True, False, True)
    assert score.top_k_agreement == 2
    assert score.top1 == (True, True, False)
    assert score.top1_agreement == 2


def test_an_answer_that_says_nothing_is_never_right() -> None:
    true = smooth(4, 0, 0.1)[None]
    for empty in (torch.full((1, 4), 0.25), torch.full((1, 4), torch.nan)):
        score = label_errors(empty, true)
        assert score.top1 == score.top_k == (False,)


def test_a_flat_label_is_found_by_a_flat_answer() -> None:
    true = torch.full((2, 4), 0.25)
    score = label_errors(torch.stack([true[0], smooth(4, 1, 0.9).float()]), true)
    assert score.top_k == (True, False)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(2, 6), st.integers(0, 2**31))
def test_matching_is_the_best_of_all_orders(samples: int, classes: int, seed: int) -> None:
    dice = torch.Generator().manual_seed(seed)
    true = torch.rand(samples, classes, generator=dice).softmax(dim=1)
    recovered = torch.rand(samples, classes, generator=dice).softmax(dim=1)
    orders = [list(order) for order in itertools.permutations(range(samples))]
    best = min(float((recovered[order] - true).abs().sum()) for order in orders)
    assignment = match_samples(recovered, true)
    assert sorted(assignment.tolist()) == list(range(samples))
    assert float((recovered[assignment] - true).abs().sum()) == pytest.approx(best, abs=1e-5)


def test_matching_undoes_a_shuffle_and_puts_lost_samples_last() -> None:
    true = torch.stack([smooth(10, peak, 0.1) for peak in (3, 1, 4, 1, 5)])
    order = [2, 4, 1, 0, 3]
    recovered = true[order]
    recovered[0] = torch.nan
    assignment = match_samples(recovered, true)
    torch.testing.assert_close(recovered[assignment][[0, 1, 3, 4]], true[[0, 1, 3, 4]])
    assert assignment[2] == 0


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(0, 3), st.integers(0, 2**31))
def test_missing_samples_are_left_out_at_the_least_cost(some: int, more: int, seed: int) -> None:
    dice = torch.Generator().manual_seed(seed)
    recovered = torch.rand(some, 5, generator=dice).softmax(dim=1)
    true = torch.rand(some + more, 5, generator=dice).softmax(dim=1)
    assignment = match_samples(recovered, true)
    assert sorted(assignment.tolist()) == [-1] * more + list(range(some))
    places = itertools.permutations(range(some + more), some)
    best = min(float((recovered - true[list(place)]).abs().sum()) for place in places)
    there = assignment >= 0
    assert float((recovered[assignment[there]] - true[there]).abs().sum()) == pytest.approx(best)


def test_features_decide_between_samples_of_one_label() -> None:
    labels = torch.stack([smooth(10, peak, 0.1) for peak in (3, 3, 3, 1)])
    features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 1.0], [0.0, 2.0]])
    for order in itertools.permutations(range(4)):
        shuffled = list(order)
        # Labels that differ by rounding alone must not outweigh features that differ by a lot.
        blurred = labels[shuffled] + 1e-9 * torch.arange(40).reshape(4, 10).sin()
        assignment = match_samples(blurred, labels, [(features[shuffled], features)])
        assert assignment.tolist() == [shuffled.index(n) for n in range(4)]


def test_relative_error_is_in_units_of_the_truth() -> None:
    true = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]])
    recovered = torch.tensor([[3.0, 4.5], [0.0, 0.0], [0.0, 1.0]])
    assert relative_error(recovered, true).tolist() == pytest.approx([0.1, 0.0, math.inf])


@pytest.mark.parametrize(("successes", "n"), [(0, 7), (1, 7), (50, 100), (719, 720), (12, 12)])
def test_the_interval_of_a_rate_agrees_with_scipy(successes: int, n: int) -> None:
    expected = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(successes, n) == pytest.approx(tuple(expected), abs=1e-7)


def test_an_interval_needs_a_count() -> None:
    assert wilson_interval(0, 0) == (0, 1)
    assert wilson_interval(0, 9)[0] == 0
    assert wilson_interval(9, 9)[1] == 1
    for successes, n in ((-1, 4), (5, 4)):
        with pytest.raises(InputError, match=f"{successes} successes in {n} trials"):
            wilson_interval(successes, n)


def test_shapes_that_differ_are_refused(photographs: torch.Tensor) -> None:
    for compare in (psnr, ssim, pixels_that_differ, image_score):
        for other in (photographs[:1], photographs[0], photographs[:, :, :32]):
            with pytest.raises(InputError, match="cannot be compared"):
                compare(other, photographs)
    with pytest.raises(InputError, match="features of 1 samples beside labels of 2"):
        match_samples(torch.eye(2), torch.eye(2), [(torch.ones(1, 3), torch.ones(2, 3))])
    for compare in (label_errors, match_samples, relative_error):
        for wrong, true in ((torch.zeros(2, 3), torch.zeros(2, 4)), (torch.zeros(3),) * 2):
            with pytest.raises(InputError, match="cannot be compared"):
                compare(wrong, true)
