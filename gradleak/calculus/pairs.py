"""Of many changes that could be made, the one or two that leave least (§6d, §6e).

Two mistakes beside each other look like a third one between them. Who mends the worst one at a time
makes that one, and then neither of the two can be mended singly. Pairs show them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def best_changes(single: Tensor, products: Tensor, noise: float) -> list[int]:
    """Return the one or two of K changes that gain most, none if they gain no more than ``noise``.

    ``single`` (K,) is what each gains alone, half of the squares that it takes away; two together
    gain less by their inner product, of ``products`` (K, K), which is infinite where they exclude
    each other. A second one has to gain more than ``noise`` beside the first.
    """
    if not len(single):
        return []
    pairs = single[:, None] + single - products
    pairs.fill_diagonal_(-torch.inf)
    alone = int(single.argmax())
    first, second = divmod(int(pairs.argmax()), len(single))
    if len(single) > 1 and float(pairs[first, second]) > float(single[alone]) + noise:
        changes, gain = [first, second], float(pairs[first, second])
    else:
        changes, gain = [alone], float(single[alone])
    return changes if gain > noise else []
