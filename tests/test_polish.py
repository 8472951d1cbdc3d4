"""python -m pytest tests/test_polish.py"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from edgeprune import polish, recovery, vit
from edgeprune.types import BlockPlan, Plan

HALF = Plan((BlockPlan((1,), tuple(range(0, 24, 2))), BlockPlan((), tuple(range(12))), BlockPlan((0, 2), ())))


@pytest.fixture
def batches(make_images: Callable[..., Any]) -> list[torch.Tensor]:
    return list(make_images(64).split(8))


@pytest.fixture
def pruned(tiny_vit: Any, batches: list[torch.Tensor]) -> Any:
    model = vit.slice_model(tiny_vit, HALF)
    recovery.sequential(tiny_vit, model, batches)
    return model


@torch.no_grad()
def distance(dense: Any, pruned: Any, images: torch.Tensor) -> float:
    """Squared distance of the final residual streams."""
    *wanted, _ = vit.streams(dense, images)
    *have, _ = vit.streams(pruned, images)
    return float((wanted[-1] - have[-1]).square().sum())


def test_polished_blocks_meet_the_dense_stream_better(
    tiny_vit: Any, pruned: Any, batches: list[torch.Tensor], make_images: Callable[..., Any]
) -> None:
    unseen = make_images(32, seed=99)
    before = distance(tiny_vit, pruned, unseen)
    seen: list[float] = []
    accepted, tried = polish.polish(tiny_vit, pruned, batches, None, 8, lambda amount, _: seen.append(amount))
    assert 0 < accepted <= tried == len(seen) == 3
    assert distance(tiny_vit, pruned, unseen) < before
    assert all(parameter.grad is None for parameter in pruned.parameters())


def test_what_does_not_help_held_out_images_is_put_back(
    tiny_vit: Any, pruned: Any, batches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: value.clone() for name, value in pruned.blocks.state_dict().items()}
    monkeypatch.setattr(polish, "LEARNING_RATE", 30.0)
    assert polish.polish(tiny_vit, pruned, batches, None, 1) == (0, 3)
    assert all(torch.equal(value, before[name]) for name, value in pruned.blocks.state_dict().items())


def test_weighed_tokens_count(tiny_vit: Any, pruned: Any, batches: list[torch.Tensor]) -> None:
    """Tokens that count nothing cannot be followed: with all weight on the CLS token it comes closer than without."""
    tokens = tiny_vit.pos_embed.shape[1]
    cls = torch.zeros(8, tokens)
    cls[:, 0] = 1.0
    weights = {(i, kind): [cls] * len(batches) for i in range(3) for kind in vit.KINDS}
    other = vit.slice_model(tiny_vit, HALF)
    other.load_state_dict(pruned.state_dict())
    polish.polish(tiny_vit, pruned, batches, weights, 8)
    polish.polish(tiny_vit, other, batches, None, 8)

    @torch.no_grad()
    def of_cls(model: Any) -> float:
        images = torch.cat(batches)
        *wanted, _ = vit.streams(tiny_vit, images)
        *have, _ = vit.streams(model, images)
        return float((wanted[-1] - have[-1])[:, 0].square().sum())

    assert of_cls(pruned) < of_cls(other)
