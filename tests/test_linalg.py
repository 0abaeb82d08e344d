"""Products with large gradients agree with plain float64 arithmetic."""

import math

import pytest
import torch
from photographs import centre

from gradleak.linalg import outer_residual, outer_rest, rank_one_fit, rmatmul


def outer(scale: float, noise: float, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return δ xᵀ of a photograph's rows with noise on it, and δ."""
    photograph = centre("chelsea", 48).flatten().double()
    dice = torch.Generator().manual_seed(0)
    left = torch.randn(300, generator=dice, dtype=torch.float64)
    noisy = torch.outer(left, photograph)
    noisy = noisy + noise * torch.randn(noisy.shape, generator=dice, dtype=torch.float64)
    return (scale * noisy).to(dtype), left


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [0.0, 1e-3, 1.0, 100.0])
def test_a_fit_in_one_look_is_that_of_least_squares(noise: float, dtype: torch.dtype) -> None:
    matrix, left = outer(1.0, noise, dtype)
    right, residual = rank_one_fit(matrix, left)
    wide = matrix.double()
    expected = left @ wide / left.square().sum()
    rest = float((wide - torch.outer(left, expected)).norm() / wide.norm())
    # What the first row leaves is summed in float32.
    assert float((right - expected).norm() / expected.norm()) < 1e-7 + 1e-6 * rest
    assert residual == pytest.approx(rest, rel=1e-3, abs=3e-8)
    assert outer_residual(matrix, left, right) == pytest.approx(rest, rel=1e-3, abs=6e-8)


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e25])
def test_small_and_large_gradients_have_the_same_residual(scale: float) -> None:
    matrix, left = outer(scale, 1e-2, torch.float32)
    middle, _ = outer(1.0, 1e-2, torch.float32)
    right, residual = rank_one_fit(matrix, left)
    assert residual == pytest.approx(rank_one_fit(middle, left)[1], rel=1e-4)
    assert outer_residual(matrix, left, right) == pytest.approx(residual, rel=1e-4)


def test_zeros_and_what_is_not_a_number() -> None:
    matrix, left = outer(1.0, 0.0, torch.float32)
    right = torch.ones(matrix.shape[1], dtype=torch.float64)
    zeros = torch.zeros_like(matrix)
    assert outer_residual(zeros, left, right) == 0.0
    assert rank_one_fit(zeros, left)[1] == 0.0
    matrix[5, 7] = math.nan
    assert math.isnan(outer_residual(matrix, left, right))
    assert math.isnan(rank_one_fit(matrix, left)[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_several_samples_are_taken_block_by_block(dtype: torch.dtype) -> None:
    dice = torch.Generator().manual_seed(0)
    left = torch.randn(700, 3, generator=dice, dtype=torch.float64)
    right = torch.randn(3, 900, generator=dice, dtype=torch.float64)
    matrix = (left @ right).to(dtype)
    rest = matrix.double() - left @ right
    rows, columns = outer_rest(matrix, left, right)
    torch.testing.assert_close(rows, rest.square().sum(1), rtol=1e-6, atol=1e-24)
    torch.testing.assert_close(columns, rest.square().sum(0), rtol=1e-6, atol=1e-24)
    torch.testing.assert_close(rmatmul(matrix, left.mT), left.mT @ matrix.double())
    expected = float(rest.norm() / matrix.double().norm())
    assert outer_residual(matrix, left, right) == pytest.approx(expected, rel=1e-3, abs=1e-15)
    wrong = float((matrix.double() - 2.0 * left @ right).norm() / matrix.double().norm())
    assert outer_residual(matrix, left, 2.0 * right) == pytest.approx(wrong, rel=1e-6)
