"""The Vision Transformers that timm users deploy, each at tiny sizes. python -m pytest tests/test_families.py"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from edgeprune import artifact, families, vit
from edgeprune.cli import cli
from edgeprune.errors import UsageError
from edgeprune.stages import export, simplify
from edgeprune.types import BlockPlan, Plan

WIDE = tuple(range(24))
#: Three budgets: mild, mixed with fewer tokens, and harsh with a sub-block of each kind gone.
PLANS = {
    "mild": Plan((BlockPlan((0, 1, 2), tuple(range(16))), BlockPlan((0, 2), WIDE))),
    "tokens": Plan((BlockPlan((0, 1), WIDE, 9), BlockPlan((0, 1, 2), tuple(range(0, 24, 2)), 4))),
    "harsh": Plan((BlockPlan((), tuple(range(0, 24, 3))), BlockPlan((1,), ()))),
}
#: 48 wide, 2 blocks of 3 heads and 24 neurons, 16 patches.
SMALL: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 0.5}
GATED = {"mlp_ratio": 1.0}  # two rows per neuron


def tiny(name: str, classes: int = 5) -> Any:
    """Every tensor random: a fresh model is zero in its biases and would hide what goes wrong there."""
    patch = next(
        int(part[5:]) for part in [*name.split("_"), "patch16"] if part.startswith("patch") and part[5:].isdigit()
    )
    kwargs = {**SMALL, **(GATED if "giant" in name else {}), "img_size": 4 * patch}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = vit.create(name, kwargs, classes)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                noise = torch.randn_like(parameter) * 0.15
                parameter.copy_(1 + noise if "norm" in key and key.endswith("weight") else noise)
    model.edgeprune_kwargs = kwargs
    return model


def pixels(model: Any, count: int = 3) -> torch.Tensor:
    size = vit.anatomy(model).image
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def masked(model: Any, plan: Plan) -> Any:
    """The dense model with the removed columns of `proj` and `fc2` at zero."""
    import copy

    sizes, own = vit.anatomy(model), copy.deepcopy(model)
    for block, keep in zip(own.blocks, plan.blocks, strict=True):
        for kind, units in (("attn", keep.heads), ("mlp", keep.neurons)):
            layer = vit.output_layer(block, kind)  # type: ignore[arg-type]
            gone = torch.ones(layer.in_features, dtype=torch.bool)
            gone[vit.columns(units, sizes.unit_size(kind))] = False  # type: ignore[arg-type]
            layer.weight[:, gone] = 0
    return own


@pytest.mark.parametrize("name", families.NAMES)
def test_slicing_equals_masking_and_tunes(name: str) -> None:
    model = tiny(name)
    sizes = vit.anatomy(model)
    assert (sizes.blocks, sizes.heads, sizes.neurons, sizes.patches) == (2, 3, 24, 16)
    for plan in PLANS.values():
        small = vit.slice_model(model, plan)
        without_drops = Plan(tuple(BlockPlan(b.heads, b.neurons) for b in plan.blocks))
        with torch.no_grad():
            got = vit.slice_model(model, without_drops)(pixels(model))
            torch.testing.assert_close(got, masked(model, without_drops)(pixels(model)), rtol=1e-3, atol=1e-4)
        small(pixels(model)).square().mean().backward()
        assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in small.parameters())
        assert sum(p.grad is not None for p in small.parameters()) > 10


#: One of each kind; the others are exported by `make slow`.
QUICK = {
    "vit_tiny_patch16_224", "vit_base_patch16_gap_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224",
    "vit_small_patch14_reg4_dinov2", "vit_giant_patch14_dinov2", "vit_base_patch16_clip_quickgelu_224",
    "vit_base_patch16_siglip_224", "test_vit2",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in families.NAMES]
)
def test_it_exports_runs_in_both_runtimes_and_reloads(name: str, tmp_path: Path) -> None:
    import onnxruntime
    import openvino

    model = tiny(name)
    small, images = vit.slice_model(model, PLANS["tokens"]), pixels(model)
    exported, path = tmp_path / "exported.onnx", tmp_path / "model.onnx"
    export.to_onnx(small, vit.anatomy(model).image, exported)
    simplify.simplify(exported, path)
    with torch.no_grad():
        want = small(images).numpy()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for image, row in zip(images.numpy(), want, strict=True):
        scale = 1e-3 * np.abs(row).max() + 1e-5
        np.testing.assert_allclose(session.run(None, {"pixels": image[None]})[0][0], row, atol=scale)
        np.testing.assert_allclose(compiled(image[None])[0][0], row, atol=scale)
    planned = artifact.PlannedModel(name, model.edgeprune_kwargs, 5, PLANS["tokens"], 1.0, 2.0)
    artifact.write_plan(planned, tmp_path / "plan.json")
    save_file({k: v.contiguous() for k, v in small.state_dict().items()}, tmp_path / "model.safetensors")
    again = artifact.rebuild(artifact.read_plan(tmp_path / "plan.json"), tmp_path / "model.safetensors")
    with torch.no_grad():
        np.testing.assert_allclose(again(images).numpy(), want, rtol=1e-5, atol=1e-6)


def test_gates_go_with_their_neurons() -> None:
    model = tiny("vit_giant_patch14_dinov2")
    small = vit.slice_model(model, PLANS["mild"])
    fc1 = model.blocks[0].mlp.fc1.weight
    torch.testing.assert_close(small.blocks[0].mlp.fc1.weight, torch.cat([fc1[:16], fc1[24:40]]))


@pytest.mark.parametrize(
    "name, what",
    [
        ("vit_base_patch16_xp_224", "ParallelScalingBlock"),
        ("vit_base_patch16_rpn_224", "ResPostBlock"),
        ("vit_relpos_small_patch16_224", "VisionTransformerRelPos"),
        ("samvit_base_patch16", "VisionTransformerSAM"),
        ("vit_dlittle_patch16_reg1_gap_256", "DiffAttention"),
    ],
)
def test_what_cannot_be_sliced_is_named(name: str, what: str, make_vit: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match=what):
        vit.create(name, {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 64}, 5)


@pytest.mark.parametrize("name", ["vit_7b_patch16_dinov3", "swin_large_patch4_window7_224", "aimv2_3b_patch14_224"])
def test_the_unsupported_are_refused_before_their_weights_are_made(name: str) -> None:
    began = time.monotonic()
    with pytest.raises(UsageError, match=r"the nearest .* is tested is '(vit|deit)"):
        vit.create(name, {}, 1000)
    assert time.monotonic() - began < 5


def test_the_supported_are_listed() -> None:
    done = CliRunner().invoke(cli, ["models", "--supported"])
    assert done.exit_code == 0 and all(f"  {name}\n" in done.output for name in families.NAMES)
    assert len(set(families.NAMES)) == len(families.NAMES) >= 30
    assert families.nearest("swin_tiny_patch4_window7_224.ms_in1k") in families.NAMES
