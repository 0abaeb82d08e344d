"""Vision transformers: the gradient of the position embedding gives the image away."""

from __future__ import annotations

import pytest
import torch
from photographs import crops
from torch import Tensor, nn
from torch.nn import functional as F

import gradleak
from gradleak.calculus.added import image_below_added
from gradleak.calculus.trace import trace
from gradleak.errors import IncompleteError
from gradleak.reconstruction.options import MatchSettings

SIZE, PATCH, WIDTH = 32, 8, 64


class Block(nn.Module):
    """Attention and an MLP, each added to what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(2, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        read = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(read)
        return x + self.mlp(self.norms[1](x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A small vision transformer, with a class token or a mean over the patches."""

    def __init__(self, *, token: bool = True, bent: bool = False, patch: int = PATCH) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.patches = nn.Conv2d(3, WIDTH, patch, stride=PATCH)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH)) if token else None
        count = ((SIZE - patch) // PATCH + 1) ** 2
        self.position = nn.Parameter(0.02 * torch.randn(1, count + int(token), WIDTH))
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, 10)
        self.bent = bent

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        if self.bent:
            x = torch.tanh(x)
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = self.blocks(x + self.position)
        return self.head(x[:, 0] if self.token is not None else x.mean(1))  # type: ignore[no-any-return]


def pictures(count: int) -> Tensor:
    return crops(SIZE, count, torch.Generator().manual_seed(3))


def featured(model: nn.Module, images: Tensor) -> gradleak.Bundle:
    labels = torch.arange(len(images)) + 4
    labelled = gradleak.recover_label(gradleak.capture(model, images, labels).bundle)
    return gradleak.recover_feature(labelled.bundle).bundle


@pytest.mark.parametrize("token", [True, False])
def test_the_image_comes_back_to_the_last_bit(token: bool) -> None:
    model = Transformer(token=token)
    images = (255 * pictures(1)).round() / 255
    found = gradleak.reconstruct(featured(model, images), model=model)
    assert (found.method, found.verdict) == ("embedding", "unique")
    assert torch.equal(found.images, images)


def test_a_dry_run_says_so() -> None:
    leak = gradleak.count_leak(model=Transformer(), size=SIZE)
    assert leak.image == "exact"
    assert "the gradient of position is the δ of the patches" in leak.reason


def gradients_of(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    loss = F.cross_entropy(model(images), torch.arange(len(images)))
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()))
    return dict(zip(named, found, strict=True))


@pytest.mark.parametrize("case", ["two samples", "bent below", "frozen", "patches that overlap"])
def test_nothing_is_read_where_the_equations_do_not_hold(case: str) -> None:
    overlap = case == "patches that overlap"
    model = Transformer(bent=case == "bent below", patch=PATCH + 4 if overlap else PATCH).double()
    images = pictures(2 if case == "two samples" else 1).double()
    gradients = gradients_of(model, images)
    if case == "frozen":
        del gradients["position"]
    assert image_below_added(trace(model, images), model.state_dict(), gradients) is None


def test_the_method_alone_says_why_it_does_not_apply() -> None:
    model = Transformer()
    with pytest.raises(IncompleteError, match="cannot be read off a position embedding"):
        gradleak.reconstruct(featured(model, pictures(2)), model=model, method="embedding")


def test_batches_are_matched_though_attention_is_fused() -> None:
    """The fused kernels have no second derivative, which matching needs."""
    model = Transformer()
    settings = MatchSettings(steps=3)
    found = gradleak.reconstruct(
        featured(model, pictures(2)), model=model, method="match", settings=settings
    )
    assert (found.method, found.verdict) == ("match", "approximate")
