"""Every part of every method on models of other families than ViT. python -m pytest tests/test_family_methods.py"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import parts
import pytest
import torch

from edgeprune import adapters, allocators, criteria, polish, quantisation, recoveries, structure, vit
from edgeprune.stages import export, shapes, simplify
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


def test_int8_in_a_hierarchy(tmp_path: Path) -> None:
    """Stage by stage: models of the table, and a whole graph in which every sub-block is int8."""
    model, images = hierarchy(), parts.images(16)
    found = shapes.form_models(model, [(0, 24), (0, 24)], ("precision",), tmp_path, parts.SILENT)
    assert {entry.stage for entry in found} == {0, 1} and all(entry.form.int8 for entry in found)
    plan = vit.plan_of_shape(((3, 24, 0, 3),) * 3)
    made = structure.of(model, plan)
    pixels = torch.cat([x for x, _ in images.batches(8)])
    quantisation.calibrate(made, [pixels])
    export.to_onnx(made, (3, 32, 32), tmp_path / "exported.onnx")
    simplify.simplify(tmp_path / "exported.onnx", tmp_path / "model.onnx", made)
    with torch.no_grad():
        want = made(pixels).numpy()
        with quantisation.exactly(made):
            rounding = np.abs(made(pixels).numpy() - want).mean()
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    got = np.concatenate([session.run(None, {"pixels": x[None].numpy()})[0] for x in pixels])
    assert np.abs(got - want).mean() < 0.5 * rounding
