"""Every part of every method on models of other families than ViT. python -m pytest tests/test_family_methods.py"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import parts
import pytest
import torch

from edgeprune import adapters, allocators, criteria, polish, recoveries, vit
from edgeprune.types import BlockPlan, Plan

SWIN = "swin_tiny_patch4_window7_224"
NAMES = ("eva02_tiny_patch14_224", "beit_base_patch16_224", SWIN)
#: A block of 64 tokens, 24 wide, then two of 16 tokens, 48 wide; as many heads and neurons as in `parts.TABLE`.
HIERARCHY = {
    "img_size": 32, "embed_dim": 24, "depths": (1, 2), "num_heads": (3, 3), "mlp_ratio": (1.0, 0.5), "window_size": 4
}  # fmt: skip
PLAN = Plan((BlockPlan((0, 2), tuple(range(16))), BlockPlan((), tuple(range(24))), BlockPlan((1,), ())))


@pytest.fixture(scope="module", params=NAMES)
def model(request: pytest.FixtureRequest, make_vit: Callable[..., Any]) -> Any:
    return hierarchy() if request.param == SWIN else make_vit(request.param)


def hierarchy() -> Any:
    model = vit.create(SWIN, HIERARCHY, parts.CLASSES)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for key, tensor in model.named_parameters():
            tensor.normal_(1.0 if "norm" in key and key.endswith("weight") else 0.0, 0.2)
    return model


@pytest.mark.parametrize("name", criteria.names())
def test_every_criterion_scores_it(name: str, model: Any) -> None:
    for level in parts.calibration(model, name).levels:
        units = vit.anatomy(model).units(level.at)
        assert len(level.errors) == 1 + units and np.isfinite(level.errors).all()
        assert sorted(level.order) == list(range(units))


@pytest.mark.parametrize("name", allocators.names())
def test_every_allocator_meets_its_budget(name: str, model: Any) -> None:
    task = parts.task(model)
    choice = allocators.get(name).prepare(task)(4.0)
    assert task.cost(choice) <= 4.0 + 1e-9
    vit.slice_model(model, task.plan(choice))


@pytest.mark.parametrize("name", recoveries.names())
def test_every_recovery_leaves_a_model_of_the_plan(name: str, model: Any, make_images: Callable[..., Any]) -> None:
    before = parts.state(model)
    recovered = recoveries.get(name).recover(parts.damage(model, PLAN))
    with torch.no_grad():
        assert recovered(make_images(2)).isfinite().all()
    assert [block.mlp.fc2.in_features for block in recovered.blocks[:2]] == [16, 24]
    assert all(torch.equal(value, before[key]) for key, value in parts.state(model).items())


def test_polishing_brings_it_no_further_away(model: Any) -> None:
    found = parts.calibration(model)
    pruned: Any = vit.slice_model(model, PLAN)
    cut = copy.deepcopy(pruned)
    polish.polish(model, pruned, found.batches, found.weights, 2)
    held_out = found.batches[-1]
    with torch.no_grad():
        off = [float((part(held_out) - model(held_out)).square().mean()) for part in (pruned, cut)]
    assert off[0] <= off[1]


def test_adapters_are_saved_and_come_back(model: Any, tmp_path: Any, make_images: Callable[..., Any]) -> None:
    tuned: Any = vit.slice_model(model, PLAN)
    adapters.attach(tuned, rank=2)
    with torch.no_grad():
        for _, layer in adapters.attached(tuned):
            layer.parametrizations.weight[0].b.normal_()
        adapters.save(tuned, model, PLAN, tmp_path / "adapters.safetensors")
        want = tuned(make_images(2))
        again = adapters.rebuild(model, PLAN, tmp_path / "adapters.safetensors")
        torch.testing.assert_close(again(make_images(2)), want, rtol=1e-4, atol=1e-4)
