"""Of many changes the one or two that gain most."""

from __future__ import annotations

import math

import torch

from gradleak.calculus.pairs import best_changes


def test_two_mistakes_that_look_like_a_third_are_both_found() -> None:
    one, two = torch.tensor([1.0, 0.0, 0.2]), torch.tensor([0.0, 1.0, 0.2])
    between = torch.tensor([0.7, 0.7, 0.3])
    ways = torch.stack([one, between, two])
    left = one + two
    products = ways @ ways.mT
    single = ways @ left - 0.5 * products.diagonal()
    assert int(single.argmax()) == 1
    assert sorted(best_changes(single, products, 1e-3)) == [0, 2]


def test_a_second_change_has_to_gain_more_than_noise() -> None:
    single, products = torch.tensor([1.0, 0.05]), torch.zeros(2, 2)
    assert best_changes(single, products, 0.1) == [0]
    assert sorted(best_changes(single, products, 0.01)) == [0, 1]


def test_changes_that_exclude_each_other_are_not_made_together() -> None:
    single = torch.tensor([1.0, 0.9])
    assert best_changes(single, torch.full((2, 2), math.inf), 0.1) == [0]


def test_nothing_is_changed_where_nothing_gains() -> None:
    assert best_changes(torch.tensor([0.05, -1.0]), torch.zeros(2, 2), 0.1) == []
    assert best_changes(torch.zeros(0), torch.zeros(0, 0), 0.1) == []
