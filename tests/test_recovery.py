"""python -m pytest tests/test_recovery.py"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from edgeprune import criteria, obs, recovery, vit
from edgeprune.types import BlockPlan, Plan

HARSH = Plan(
    (
        BlockPlan((1,), tuple(range(0, 24, 4))),
        BlockPlan((), tuple(range(0, 24, 3))),
        BlockPlan((0, 2), ()),
    )
)


@pytest.fixture
def batches(make_images: Callable[..., Any]) -> list[torch.Tensor]:
    return list(make_images(64).split(8))


def moments_of(model: Any, batches: list[torch.Tensor]) -> dict[Any, tuple[torch.Tensor, torch.Tensor]]:
    found = criteria.collect(model, [(b, torch.zeros(len(b))) for b in batches], 0, lambda *_: None, uses_loss=False)
    return {at: (own.mean, obs.damped(own.covariance)) for at, own in found.moments.items()}


@torch.no_grad()
def distance(dense: Any, pruned: Any, images: torch.Tensor) -> float:
    """Squared distance of the final residual streams."""
    *wanted, _ = vit.streams(dense, images)
    *have, _ = vit.streams(pruned, images)
    return float((wanted[-1] - have[-1]).square().sum())


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# Survivors ----------------------------------------------------------------------------------


def test_survivors_are_refit(tiny_vit: Any, batches: list[torch.Tensor]) -> None:
    moments = moments_of(tiny_vit, batches)
    pruned = recovery.survivors(tiny_vit, HARSH, moments)
    for i, keep in enumerate(HARSH.blocks):
        for kind, units, size in (("attn", keep.heads, 16), ("mlp", keep.neurons, 1)):
            dense = vit.output_layer(tiny_vit.blocks[i], kind)
            weight, bias = obs.refit(dense.weight, dense.bias, *moments[i, kind], vit.columns(units, size))
            sub = getattr(pruned.blocks[i], kind)
            if units:
                layer = vit.output_layer(pruned.blocks[i], kind)
                torch.testing.assert_close(layer.weight, weight.float())
                torch.testing.assert_close(layer.bias, bias.float())
            else:
                torch.testing.assert_close(sub.bias, bias.float())
    assert pruned.blocks[0].attn.num_heads == 1


def test_survivors_of_the_dense_plan_are_the_dense_model(tiny_vit: Any, batches: list[torch.Tensor]) -> None:
    pruned = recovery.survivors(tiny_vit, vit.dense_plan(vit.anatomy(tiny_vit)), moments_of(tiny_vit, batches))
    assert all(torch.equal(v, pruned.state_dict()[k]) for k, v in tiny_vit.state_dict().items())


def test_survivors_come_closer_than_a_plain_slice(tiny_vit: Any, batches: list[torch.Tensor]) -> None:
    pruned = recovery.survivors(tiny_vit, HARSH, moments_of(tiny_vit, batches))
    images = torch.cat(batches)
    assert distance(tiny_vit, pruned, images) < distance(tiny_vit, vit.slice_model(tiny_vit, HARSH), images)


# Sequential ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"init_values": 0.3}, {"reg_tokens": 2}])
def test_sequential_brings_the_stream_closer_on_unseen_images(
    make_vit: Callable[..., Any], make_images: Callable[..., Any], batches: list[torch.Tensor], kwargs: dict[str, Any]
) -> None:
    dense = make_vit(**kwargs)
    pruned = vit.slice_model(dense, HARSH)
    unseen = make_images(32, seed=99)
    before = distance(dense, pruned, unseen)
    accepted, tried = recovery.sequential(dense, pruned, batches)
    assert tried == 7 and 0 < accepted <= tried
    assert distance(dense, pruned, unseen) < 0.9 * before


def test_sequential_after_survivors_comes_closer_still(
    tiny_vit: Any, make_images: Callable[..., Any], batches: list[torch.Tensor]
) -> None:
    pruned = recovery.survivors(tiny_vit, HARSH, moments_of(tiny_vit, batches))
    unseen = make_images(32, seed=99)
    before = distance(tiny_vit, pruned, unseen)
    recovery.sequential(tiny_vit, pruned, batches)
    assert distance(tiny_vit, pruned, unseen) < before


@pytest.mark.parametrize("count", [2, 5, 8])
def test_no_sub_block_gets_worse_on_held_out_images(
    tiny_vit: Any, batches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Before and after every single re-fit, the stream's distance on the batches that did not fit it."""
    refit, seen = recovery.refit_sub_block, []

    def watched(place: Any, have: Any, wanted: Any, weights: Any, fit: int, **options: Any) -> tuple[bool, Any]:
        def held_out() -> float:
            pairs = list(zip(have, wanted, strict=True))[fit:]
            assert pairs
            return sum(float((w - vit.step(place.block, place.kind, x)).square().sum()) for x, w in pairs)

        before = held_out()
        accepted, after = refit(place, have, wanted, weights, fit, **options)
        seen.append((accepted, before, held_out()))
        for x, stream in zip(have, after, strict=True):
            torch.testing.assert_close(vit.step(place.block, place.kind, x), stream, rtol=1e-4, atol=1e-4)
        return accepted, after

    monkeypatch.setattr(recovery, "refit_sub_block", watched)
    pruned = vit.slice_model(tiny_vit, HARSH)
    # four images a batch: fewer tokens than a fit of 48 inputs wants, so that over-fitting can happen
    recovery.sequential(tiny_vit, pruned, [b[:1] for b in batches[:count]])
    assert len(seen) == 6
    for accepted, before, after in seen:
        assert after < before * (1 + 1e-5) if accepted else after == before


def test_a_refit_that_hurts_held_out_images_is_dropped(tiny_vit: Any, make_images: Callable[..., Any]) -> None:
    """What is fitted on one kind of image and judged on quite another is not taken over blindly."""
    fitted, held_out = make_images(2, seed=1) * 1e-3, make_images(2, seed=2) * 30 + 50
    pruned = vit.slice_model(tiny_vit, HARSH)
    accepted, tried = recovery.sequential(tiny_vit, pruned, [fitted, fitted, fitted, held_out])
    assert accepted < tried


def test_an_unpruned_model_stays_as_it_is(
    tiny_vit: Any, make_images: Callable[..., Any], batches: list[torch.Tensor]
) -> None:
    same = vit.slice_model(tiny_vit, vit.dense_plan(vit.anatomy(tiny_vit)))
    recovery.sequential(tiny_vit, same, batches)
    images = make_images(8, seed=3)
    torch.testing.assert_close(same(images), tiny_vit(images), rtol=1e-4, atol=1e-4)


def test_a_layer_scale_of_zero_is_left_alone(make_vit: Callable[..., Any], batches: list[torch.Tensor]) -> None:
    """Nothing can be solved for through a gain of zero; the sub-block is skipped and stays finite."""
    dense = make_vit(init_values=0.3)
    with torch.no_grad():
        dense.blocks[0].ls2.gamma[3] = 0.0
    pruned = vit.slice_model(dense, HARSH)
    weight = pruned.blocks[0].mlp.fc2.weight.clone()
    recovery.sequential(dense, pruned, batches)
    assert torch.equal(weight, pruned.blocks[0].mlp.fc2.weight)
    assert all(torch.isfinite(p).all() for p in pruned.parameters())


@pytest.mark.parametrize("count", [1, 2])
def test_few_batches_are_enough(tiny_vit: Any, batches: list[torch.Tensor], count: int) -> None:
    pruned = vit.slice_model(tiny_vit, HARSH)
    before = distance(tiny_vit, pruned, torch.cat(batches[:count]))
    accepted, _ = recovery.sequential(tiny_vit, pruned, batches[:count])
    assert accepted > 0
    assert distance(tiny_vit, pruned, torch.cat(batches[:count])) < before


def test_no_hooks_stay_and_the_dense_model_is_untouched(tiny_vit: Any, batches: list[torch.Tensor]) -> None:
    before = {k: v.clone() for k, v in tiny_vit.state_dict().items()}
    pruned = vit.slice_model(tiny_vit, HARSH)
    recovery.sequential(tiny_vit, pruned, batches)
    assert hooks(pruned) == hooks(tiny_vit) == 0
    assert all(torch.equal(before[k], v) for k, v in tiny_vit.state_dict().items())
    assert all(p.requires_grad for p in pruned.parameters())


@torch.no_grad()
def test_first_layers_are_solved_for_what_the_dense_units_see(
    tiny_vit: Any, batches: list[torch.Tensor], make_images: Callable[..., Any]
) -> None:
    """With the plan, queries, keys, values and hidden neurons come closer to the dense ones on unseen images."""
    unseen, sizes = make_images(32, seed=99), vit.anatomy(tiny_vit)
    found = []
    for plan in (None, HARSH):
        pruned = vit.slice_model(tiny_vit, HARSH)
        recovery.sequential(tiny_vit, pruned, batches, None, plan)
        missing = 0.0
        wanted = have = vit.embed(tiny_vit, unseen)
        for i, (full, small, keep) in enumerate(zip(tiny_vit.blocks, pruned.blocks, HARSH.blocks, strict=True)):
            for kind, units in (("attn", keep.heads), ("mlp", keep.neurons)):
                if units:
                    norm = small.norm1 if kind == "attn" else small.norm2
                    own = vit.first_layer(vit.sub_block(small, kind), kind)(norm(have))
                    rows = vit.first_rows((i, kind), units, sizes)
                    missing += float((own - vit.hidden(full, kind, wanted, rows)).square().sum())
                wanted, have = vit.step(full, kind, wanted), vit.step(small, kind, have)
        found.append(missing)
    assert found[1] < 0.95 * found[0]
