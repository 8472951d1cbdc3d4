"""The Vision Transformers that timm users deploy, each at tiny sizes. python -m pytest tests/test_families.py"""

from __future__ import annotations

import copy
import itertools
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from edgeprune import adapting, anatomies, artifact, compat, config, families, vit, weightfile
from edgeprune.cli import cli
from edgeprune.compat import AttentionRope, VisionTransformer, timm
from edgeprune.errors import UsageError
from edgeprune.gates import units_of
from edgeprune.intake import Intake
from edgeprune.stages import export, simplify
from edgeprune.types import BlockPlan, Plan

WIDE = tuple(range(24))
#: Three budgets: mild, mixed with fewer tokens, and harsh with a sub-block of each kind gone.
PLANS = {
    "mild": Plan((BlockPlan((0, 1, 2), tuple(range(16))), BlockPlan((0, 2), WIDE))),
    "tokens": Plan((BlockPlan((0, 1), WIDE, 9), BlockPlan((0, 1, 2), tuple(range(0, 24, 2)), 4))),
    "harsh": Plan((BlockPlan((), tuple(range(0, 24, 3))), BlockPlan((1,), ()))),
}


#: The same of two stages of two blocks: 3 heads and 24 neurons, then 6 and 48.
HIERARCHY = {
    "mild": Plan((*PLANS["mild"].blocks, BlockPlan((0, 1, 2, 3, 5), tuple(range(40))), BlockPlan((2, 4), tuple(range(48))))),
    "tokens": Plan((*PLANS["mild"].blocks, BlockPlan((5,), tuple(range(0, 48, 2))), BlockPlan((0, 1, 2), tuple(range(8))))),
    "harsh": Plan((BlockPlan((1,), ()), BlockPlan((), ()), BlockPlan((), tuple(range(0, 48, 3))), BlockPlan((1,), ()))),
}  # fmt: skip


def plans(sizes: vit.Anatomy) -> dict[str, Plan]:
    """The same without dropped tokens or without parts of MLPs, where those have to stay."""
    if len(sizes.stages) > 1:
        return HIERARCHY
    found = {name: without_drops(plan) for name, plan in PLANS.items()} if sizes.positional else PLANS
    return {name: whole_mlps(plan) for name, plan in found.items()} if sizes.whole_mlp else found


def whole_mlps(plan: Plan) -> Plan:
    return Plan(tuple(replace(block, neurons=block.neurons and WIDE) for block in plan.blocks))


def without_drops(plan: Plan) -> Plan:
    return Plan(tuple(BlockPlan(block.heads, block.neurons) for block in plan.blocks))


#: 48 wide, 2 blocks of 3 heads and 24 neurons, 16 patches.
SMALL: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 0.5}
SMALL_SWIN: dict[str, Any] = {
    "embed_dim": 24, "depths": (2, 2), "num_heads": (3, 6), "mlp_ratio": 1.0, "window_size": 4, "img_size": 32
}  # fmt: skip
GATED = {"mlp_ratio": 1.0}  # timm halves it where one layer holds both rows of a neuron
PACKED = ("vit_giant_patch14_dinov2", "vit_giant_patch14_reg4_dinov2")


def tiny_kwargs(name: str) -> dict[str, Any]:
    patch = next(
        int(part[5:]) for part in [*name.split("_"), "patch16"] if part.startswith("patch") and part[5:].isdigit()
    )
    if name.startswith("swin"):
        return SMALL_SWIN
    return {**SMALL, **(GATED if name in PACKED else {}), "img_size": 4 * patch}


def tiny(name: str, **more: Any) -> Any:
    model: Any = fill(vit.create(name, {**tiny_kwargs(name), **more}, 5))
    model.edgeprune_kwargs = {**tiny_kwargs(name), **more}
    return model


@torch.no_grad()
def fill(model: Any) -> Any:
    """Every parameter random: a fresh model is zero in its biases and would hide what goes wrong there."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for key, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) * 0.15
            parameter.copy_(1 + noise if "norm" in key and key.endswith("weight") else noise)
    return model


def pixels(model: Any, count: int = 3) -> torch.Tensor:
    size = vit.anatomy(model).image
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def masked(model: Any, plan: Plan) -> Any:
    """The dense model with the removed columns of `proj` and `fc2` at zero."""
    sizes, own = vit.anatomy(model), copy.deepcopy(model)
    for (i, kind), units in units_of(plan).items():
        layer = vit.output_layer(own.blocks[i], kind)
        gone = torch.ones(layer.in_features, dtype=torch.bool)
        gone[vit.columns(units, sizes.unit_size((i, kind)))] = False
        layer.weight[:, gone] = 0
    return own


@pytest.mark.parametrize("name", families.NAMES)
def test_slicing_equals_masking_and_tunes(name: str) -> None:
    model = tiny(name)
    sizes = vit.anatomy(model)
    first = sizes.stages[0]
    assert (first.blocks, first.heads, first.neurons, sizes.patches) == (2, 3, 24, 64 if len(sizes.stages) > 1 else 16)
    for plan in plans(sizes).values():
        small = vit.slice_model(model, plan)
        narrow = without_drops(plan)
        with torch.no_grad():
            got = vit.slice_model(model, narrow)(pixels(model))
            torch.testing.assert_close(got, masked(model, narrow)(pixels(model)), rtol=1e-3, atol=1e-4)
            again = vit.in_dense_shape(model, narrow, vit.slice_model(model, narrow))
            torch.testing.assert_close(again(pixels(model)), got, rtol=1e-3, atol=1e-4)
        small(pixels(model)).square().mean().backward()
        assert all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in small.parameters())
        assert sum(p.grad is not None for p in small.parameters()) > 10


#: One of each kind; the others are exported by `make slow`.
QUICK = {
    "vit_tiny_patch16_224", "vit_base_patch16_gap_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224",
    "vit_small_patch14_reg4_dinov2", "vit_giant_patch14_dinov2", "vit_base_patch16_clip_quickgelu_224",
    "vit_base_patch16_siglip_224", "test_vit2", "eva02_tiny_patch14_224", "beit_base_patch16_224",
    "swin_tiny_patch4_window7_224",
}  # fmt: skip


#: Of those one plan each, so that all plans have their turn.
QUICK_PLANS = set(zip(sorted(QUICK), itertools.cycle(PLANS), strict=False))


@pytest.mark.parametrize(
    "name, budget",
    [
        pytest.param(name, budget, marks=() if (name, budget) in QUICK_PLANS else pytest.mark.slow)
        for name in families.NAMES
        for budget in PLANS
    ],
)
def test_it_exports_runs_in_both_runtimes_and_reloads(name: str, budget: str, tmp_path: Path) -> None:
    import onnxruntime
    import openvino

    model = tiny(name)
    plan = plans(vit.anatomy(model))[budget]
    small, images = vit.slice_model(model, plan), pixels(model)
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
    planned = artifact.PlannedModel(name, model.edgeprune_kwargs, 5, plan, 1.0, 2.0)
    artifact.write_plan(planned, tmp_path / "plan.json")
    save_file({k: v.contiguous() for k, v in small.state_dict().items()}, tmp_path / "model.safetensors")
    again = artifact.rebuild(artifact.read_plan(tmp_path / "plan.json"), tmp_path / "model.safetensors")
    with torch.no_grad():
        np.testing.assert_allclose(again(images).numpy(), want, rtol=1e-5, atol=1e-6)


#: One of each anatomy that reshapes by the number of images.
BATCHED = {"swin_tiny_patch4_window7_224", "beit_base_patch16_224", "eva02_tiny_patch14_224"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in BATCHED else pytest.mark.slow) for name in sorted(QUICK)]
)
def test_its_files_take_any_number_of_images(name: str, tmp_path: Path) -> None:
    import onnxruntime
    import openvino

    model = tiny(name)
    small = vit.slice_model(model, plans(vit.anatomy(model))["tokens"])
    export.deploy(small, export.Deployed(Intake(batch=2, dynamic=True)))
    exported, path = tmp_path / "exported.onnx", tmp_path / "model.onnx"
    export.to_onnx(small, vit.anatomy(model).image, exported)
    simplify.simplify(exported, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for count in (1, 2, 5):
        images = pixels(model, count)
        with torch.no_grad():
            want = small(images).numpy()
        scale = 1e-3 * np.abs(want).max()
        np.testing.assert_allclose(session.run(None, {"pixels": images.numpy()})[0], want, atol=scale)
        np.testing.assert_allclose(compiled(images.numpy())[0], want, atol=scale)


def test_gates_go_with_their_neurons() -> None:
    model = tiny("vit_giant_patch14_dinov2")
    small = vit.slice_model(model, PLANS["mild"])
    fc1 = model.blocks[0].mlp.fc1.weight
    torch.testing.assert_close(small.blocks[0].mlp.fc1.weight, torch.cat([fc1[:16], fc1[24:40]]))


@pytest.mark.parametrize(
    "name, what",
    [
        ("vit_base_patch16_xp_224", "ParallelScalingBlock, where attention and MLP run in parallel"),
        ("vit_base_patch16_rpn_224", "ResPostBlock, where norms come after"),
        ("eva02_enormous_patch14_clip_224", "EvaBlockPostNorm, where norms come after"),
        ("eva02_base_patch16_clip_224", "a norm inside attention"),
        ("vit_small_patch16_rope_mixed_224", "learnt for every head"),
        ("vit_relpos_small_patch16_224", "VisionTransformerRelPos"),
        ("samvit_base_patch16", "VisionTransformerSAM"),
        ("vit_dlittle_patch16_reg1_gap_256", "DiffAttention"),
        ("vit_small_r26_s32_224", "patches come from a HybridEmbed, not from one convolution"),
    ],
)
def test_what_cannot_be_sliced_is_named(name: str, what: str, make_vit: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match=what):
        vit.create(name, {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 64}, 5)


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("eva02_enormous_patch14_clip_224", "eva02_"),
        ("eva02_large_patch14_clip_336", "eva02_"),
        ("swinv2_large_window12_192", "swin_"),
        ("vit_small_r26_s32_224", "vit_"),
        ("vit_base_mci_224", "vit_"),
        ("vit_huge_patch14_xp_224", "vit_"),
    ],
)
def test_the_unsupported_are_refused_before_their_weights_are_made(name: str, nearest: str) -> None:
    began = time.process_time()
    with pytest.raises(UsageError, match=rf"the nearest .* is tested is '{nearest}"):
        vit.create(name, {}, 1000)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("name", families.NAMES)
def test_a_supported_name_is_a_model_of_the_command_line(name: str) -> None:
    assert config.load_card(name).architecture == name


@pytest.mark.parametrize("name", ["resnet50", "convnext_tiny"])
def test_a_name_that_is_no_vit_gets_the_nearest_that_is_tested(name: str) -> None:
    with pytest.raises(UsageError, match=rf"unknown model '{name}'.*the nearest that is tested is '(vit|deit)"):
        config.load_card(name)


def test_the_supported_are_listed() -> None:
    done = CliRunner().invoke(cli, ["models", "--supported"])
    assert done.exit_code == 0 and all(f"  {name}\n" in done.output for name in families.NAMES)
    assert len(set(families.NAMES)) == len(families.NAMES) >= 30
    assert families.nearest("swin_tiny_patch4_window7_224.ms_in1k") in families.NAMES


#: What timm names otherwise, or has as no parameter at all: every way in which a family is rewritten.
REWRITTEN = {
    "queries and values have biases": ("eva02_tiny_patch14_224", {}),
    "queries, keys and values apart": ("eva02_tiny_patch14_224", {"qkv_fused": False}),
    "no biases": ("vit_small_patch16_dinov3", {}),
    "gates apart, and a norm over neurons": ("eva02_base_patch14_224", {}),
    "gates apart": ("vit_small_plus_patch16_dinov3", {}),
    "rotation, and queries, keys and values apart": ("vit_small_patch16_rope_224", {"qkv_fused": False}),
    "norms of queries and keys": ("vit_small_patch16_rope_224", {"qk_norm": True}),
    "LayerScale of the attention alone": ("vit_small_patch16_rope_224", {"attn_only_layer_scale": True}),
    "pooling by attention": ("vit_pe_core_tiny_patch16_384", {}),
    "registers, no class token": ("vit_medium_patch16_rope_reg1_gap_256", {}),
    "another size and other channels": ("eva02_tiny_patch14_224", {"img_size": (28, 70), "in_chans": 1}),
    "a table per block": ("beit_base_patch16_224", {}),
    "a shared table": ("beit_base_patch16_224", {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True}),
    "a shared table and one per block": ("beit_base_patch16_224", {"use_shared_rel_pos_bias": True}),
    "no table, and SwiGLU": ("beit_base_patch16_224", {"use_rel_pos_bias": False, "swiglu_mlp": True}),
    "a table, another size and other channels": ("beitv2_base_patch16_224", {"img_size": (32, 80), "in_chans": 4}),
    "SwiGLU without biases": ("aimv2_large_patch14_224", {}),
}


@pytest.mark.parametrize("what", REWRITTEN)
def test_a_family_computes_what_timm_computes_and_loads_its_weights(what: str, tmp_path: Path) -> None:
    name, more = REWRITTEN[what]
    kwargs = {**tiny_kwargs(name), **more}
    original = fill(timm.create_model(name, num_classes=7, **kwargs).eval())
    path = tmp_path / "timm.safetensors"
    save_file({k: v.contiguous() for k, v in original.state_dict().items()}, path)
    model = vit.create(name, kwargs, 7)
    weightfile.load(model, weightfile.read(path), str(path))
    images = pixels(model)
    with torch.no_grad():
        torch.testing.assert_close(model(images), original(images), rtol=1e-5, atol=1e-5)
        *_, logits = vit.streams(model, images)
        torch.testing.assert_close(logits, original(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224"])
def test_weights_in_timms_names_are_loaded_strictly(name: str) -> None:
    model = tiny(name)
    state = timm.create_model(name, num_classes=5, **tiny_kwargs(name)).state_dict()
    older = {**state, "blocks.0.attn.relative_position_index": torch.zeros(17, 17, dtype=torch.long)}
    weightfile.load(model, older, "older.pth")  # timm kept it in its checkpoints once
    without = {k: v for k, v in state.items() if k != "blocks.1.attn.v_bias"}
    with pytest.raises(UsageError, match=r"do not fit .*blocks\.1\.attn\.v_bias is missing"):
        weightfile.load(model, without, "w.pth")
    with pytest.raises(UsageError, match=r"head.weight is \(9, 48\), the model wants \(5, 48\)"):
        weightfile.load(model, {**state, "head.weight": torch.zeros(9, 48)}, "w.pth")


def test_an_mlp_with_a_norm_inside_stays_or_goes_as_a_whole() -> None:
    sizes = vit.anatomy(tiny("eva02_base_patch14_224"))
    assert vit.grids(sizes, 8) == ((0, 24),) and vit.grids(replace(sizes, whole_mlp=False), 8) == ((0, 8, 16, 24),)
    with pytest.raises(UsageError, match="block 0 of the plan keeps 16 of 24 neurons; a norm inside the MLP couples"):
        vit.check_plan(without_drops(PLANS["mild"]), sizes)
    with pytest.raises(UsageError, match="couples"):
        vit.slice_model(tiny("vit_tiny_patch16_224", scale_mlp_norm=True), PLANS["mild"])


def test_biases_by_distance_go_with_their_heads() -> None:
    model = tiny("beit_base_patch16_224")
    small = vit.slice_model(model, without_drops(PLANS["mild"]))
    table = model.blocks[1].attn.relative_position_bias_table
    torch.testing.assert_close(small.blocks[1].attn.relative_position_bias_table, table[:, [0, 2]])


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "beit_base_patch16_224", "swin_tiny_patch4_window7_224"])
def test_tokens_stay_where_attention_depends_on_their_places(name: str) -> None:
    model = tiny(name)
    sizes = vit.anatomy(model)
    drops = tuple(replace(block, patches=4) for block in vit.dense_plan(sizes).blocks)
    with pytest.raises(UsageError, match="depends on where its tokens are"):
        vit.slice_model(model, Plan(drops))
    with pytest.raises(UsageError, match="choose --dims heads,mlp,depth"):
        vit.choosable(("tokens",), sizes)
    assert vit.choosable(("heads", "mlp", "depth", "tokens"), sizes) == ("heads", "mlp", "depth")
    plain = vit.anatomy(tiny("eva_giant_patch14_224"))  # no rotation: positions are embedded once
    assert vit.choosable(("tokens",), plain) == ("tokens",)


@pytest.mark.parametrize(
    "kwargs, stages",
    [
        (SMALL_SWIN, [(64, 16), (16, 16)]),
        # 11 x 11 patches in windows of 3 x 3, padded, then 6 x 6 and 3 x 3; every other block is shifted
        ({**SMALL_SWIN, "img_size": 44, "window_size": 3, "depths": (2, 2, 2), "num_heads": (3, 6, 6)}, [(121, 9), (36, 9), (9, 9)]),
        # a window as large as the patches there are is the last stage's own
        ({**SMALL_SWIN, "img_size": (32, 64), "window_size": (8, 4)}, [(128, 32), (32, 16)]),
        ({**SMALL_SWIN, "global_pool": "max", "qkv_bias": False, "head_dim": 4, "num_classes": 0}, [(64, 16), (16, 16)]),
    ],
)  # fmt: skip
def test_swin_is_what_timm_computes(kwargs: dict[str, Any], stages: list[tuple[int, int]]) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("swin_tiny_patch4_window7_224", **{"num_classes": 5, **kwargs}).eval()
    for tensor in theirs.parameters():
        torch.nn.init.normal_(tensor, std=0.3)
    own = vit.create("swin_tiny_patch4_window7_224", kwargs, 0 if "num_classes" in kwargs else 5)
    weightfile.load(own, theirs.state_dict(), "timm")
    sizes = vit.anatomy(own)
    assert [(stage.tokens, stage.window) for stage in sizes.stages] == stages
    with torch.no_grad():
        x = pixels(own)
        torch.testing.assert_close(own(x), theirs(x), rtol=1e-4, atol=1e-4)
        stream = vit.embed(own, x)
        for i in range(sizes.blocks):
            for kind in vit.KINDS:
                stream = vit.walk(own, (i, kind), stream)
        torch.testing.assert_close(vit.classify(own, stream), theirs(x), rtol=1e-4, atol=1e-4)


WINDOWS = {"img_size": 64, "window_size": 8}


@pytest.mark.parametrize(
    "name, more, resampled",
    [
        ("swin_tiny_patch4_window7_224", {"img_size": 64}, 0),  # more windows of the same size
        ("swin_tiny_patch4_window7_224", WINDOWS, 4),
        ("beit_base_patch16_224", {"img_size": 96}, 2),
        ("eva02_tiny_patch14_224", {"img_size": 84}, 1),
        ("aimv2_large_patch14_224", {"img_size": 84}, 1),
    ],
)
def test_weights_of_another_image_size_are_resampled_as_timm_does(
    name: str, more: dict[str, Any], resampled: int
) -> None:
    kwargs = {**tiny_kwargs(name), **more}
    source = fill(timm.create_model(name, num_classes=5, **tiny_kwargs(name)).eval())
    theirs = timm.create_model(name, num_classes=5, **kwargs).eval()
    theirs.load_state_dict(compat.checkpoint_filter(theirs)(source.state_dict(), theirs))
    own = vit.create(name, kwargs, 5)
    found, done = adapting.adapt(own, source.state_dict())
    assert len(done) == resampled and all("resampled from" in what for what in done)
    weightfile.load(own, found, "w.pth")
    with torch.no_grad():
        torch.testing.assert_close(own(pixels(own)), theirs(pixels(own)), rtol=1e-3, atol=1e-4)


def test_macs_of_a_hierarchy_are_those_that_torch_counts() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny("swin_tiny_patch4_window7_224")
    sizes = vit.anatomy(model)
    for plan in plans(sizes).values():
        with (
            FlopCounterMode(display=False) as counter,
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
        ):  # it counts no others
            vit.slice_model(model, plan)(pixels(model, 1))
        assert 2 * vit.macs(sizes, plan.shape) == counter.get_total_flops()


class Unlike(torch.nn.Module):
    """A ViT under names of its own; `swapped` puts its norms after attention and MLP."""

    def __init__(self, swapped: bool = False) -> None:
        super().__init__()
        plain: Any = VisionTransformer(img_size=64, num_classes=5, class_token=False, global_pool="avg", **SMALL)
        self.stem, self.places, self.last, self.classifier = (
            plain.patch_embed,
            plain.pos_embed,
            plain.fc_norm,
            plain.head,
        )
        self.encoder = torch.nn.Module()
        self.encoder.layers = torch.nn.ModuleList(UnlikeBlock(block, swapped) for block in plain.blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x) + self.places
        for layer in self.encoder.layers:
            x = layer(x)
        return self.classifier(self.last(x.mean(1)))


class UnlikeBlock(torch.nn.Module):
    def __init__(self, block: Any, swapped: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2, self.heads, self.swapped = block.norm1, block.norm2, block.attn.num_heads, swapped
        self.q, self.k, self.v = (torch.nn.Linear(48, 48) for _ in range(3))
        self.out = block.attn.proj
        self.ffn = torch.nn.Sequential(block.mlp.fc1, torch.nn.ReLU(), block.mlp.fc2)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        return self.out(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.swapped:
            x = x + self.ln_1(self.attention(x))
            return x + self.ln_2(self.ffn(x))
        x = x + self.attention(self.ln_1(x))
        return x + self.ffn(self.ln_2(x))


ANATOMY = {
    "patch_embed": "stem", "pos_embed": "places", "blocks": "encoder.layers", "fc_norm": "last", "head": "classifier",
    "norm1": "ln_1", "qkv": "q, k, v", "num_heads": "heads", "proj": "out", "norm2": "ln_2", "fc1": "ffn.0",
    "act": "ffn.1", "fc2": "ffn.2",
}  # fmt: skip


@pytest.fixture(params=[False, True])
def swapped(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Makes 'unlike_vit' a model of timm's, plain in all but names or not."""
    monkeypatch.setattr(timm, "is_model", lambda name: name == "unlike_vit")
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **kwargs: Unlike(request.param))
    return bool(request.param)


def test_a_card_can_say_where_units_live(swapped: bool, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is a Unlike; .* the card's \[anatomy\] can say so"):
        vit.create("unlike_vit", {}, 5)
    if swapped:
        with pytest.raises(UsageError, match=r"are off by \d+% of the greatest logit"):
            vit.create("unlike_vit", {}, 5, ANATOMY)
        return
    original = fill(Unlike().eval())
    model: Any = vit.create("unlike_vit", {}, 5, ANATOMY)
    weightfile.load(model, original.state_dict(), "theirs.pth")
    images = pixels(model)
    with torch.no_grad():
        torch.testing.assert_close(model(images), original(images), rtol=1e-5, atol=1e-5)
        for plan in PLANS.values():
            narrow = without_drops(plan)
            got = vit.slice_model(model, narrow)(images)
            torch.testing.assert_close(got, masked(model, narrow)(images), rtol=1e-3, atol=1e-4)
    small = vit.slice_model(model, PLANS["tokens"])
    planned = artifact.PlannedModel("unlike_vit", {}, 5, PLANS["tokens"], 1.0, 2.0, anatomy=ANATOMY)
    artifact.write_plan(planned, tmp_path / "plan.json")
    save_file({k: v.contiguous() for k, v in small.state_dict().items()}, tmp_path / "model.safetensors")
    again = artifact.rebuild(artifact.read_plan(tmp_path / "plan.json"), tmp_path / "model.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(again(images), small(images))


@pytest.mark.parametrize("swapped", [False], indirect=True)
def test_a_described_model_can_be_asked_for_its_sizes_alone(swapped: bool) -> None:
    with torch.device("meta"):  # as before every build, to say how much memory it takes
        model = vit.create("unlike_vit", {}, 5, ANATOMY)
    assert vit.anatomy(model) == vit.anatomy(vit.create("unlike_vit", {}, 5, ANATOMY))


@pytest.mark.parametrize("swapped", [False], indirect=True)
def test_a_described_model_whose_blocks_differ_is_refused(swapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Unlike()
    made.encoder.layers[1].ffn = torch.nn.Sequential(torch.nn.Linear(48, 8), torch.nn.ReLU(), torch.nn.Linear(8, 48))
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **kwargs: made)
    with pytest.raises(UsageError, match="its blocks differ in heads, their dimensions or neurons"):
        vit.create("unlike_vit", {}, 5, ANATOMY)


@pytest.mark.parametrize(
    "wrong, says",
    [
        ({"norm1": "ln_9"}, r"block 0 has no 'ln_9'.*norm1"),
        ({"norm1": "norm_before"}, r"block 0 has no 'norm_before'"),
        ({"fc1": "ffn.2", "fc2": "ffn.0"}, "does not describe the model"),
        ({"proj": "heads"}, "does not describe the model"),
        ({"norm1": "ln_2", "norm2": "ln_1"}, "are off by"),
    ],
)
@pytest.mark.parametrize("swapped", [False], indirect=True)
def test_a_card_that_describes_another_model_is_refused(swapped: bool, wrong: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        vit.create("unlike_vit", {}, 5, {**ANATOMY, **wrong})


@pytest.mark.parametrize(
    "anatomy, says",
    [("norm = 3", "must be a name like"), ('qvk = "x"', "did you mean 'qkv'"), ('fc1 = "a b"', "must be a name")],
)
def test_odd_parts_in_a_card_are_named(anatomy: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "card.toml"
    path.write_text(
        f'description = "x"\narchitecture = "y"\nnum_classes = 2\n[data]\nname = "digits"\n[anatomy]\n{anatomy}\n'
    )
    with pytest.raises(UsageError, match=says) as error:
        config.load_card(str(path))
    assert "card.toml" in str(error.value) and "[anatomy]" in str(error.value)


def test_contributings_family_in_one_file_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code of CONTRIBUTING.md, for a model that is made here."""
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    [code] = [part for part in text.split("```")[1::2] if "def obstacle" in part]
    (tmp_path / "rotary.py").write_text(code.removeprefix("python\n"))
    monkeypatch.setattr(compat, "RotaryViT", RotaryViT, raising=False)
    monkeypatch.setattr(anatomies, "__path__", [*anatomies.__path__, str(tmp_path)])
    try:
        model: Any = fill(RotaryViT().eval())
        made: Any = anatomies.canonical(copy.deepcopy(model), vit.check_anatomy(model, "rotary_vit", {}))
        images = pixels(made)
        with torch.no_grad():
            torch.testing.assert_close(made(images), model(images), rtol=1e-5, atol=1e-5)
            narrow = without_drops(PLANS["harsh"])
            got = vit.slice_model(made, narrow)(images)
            torch.testing.assert_close(got, masked(made, narrow)(images), rtol=1e-3, atol=1e-4)
    finally:
        sys.modules.pop("edgeprune.anatomies.rotary", None)


class RotaryViT(VisionTransformer):
    def __init__(self) -> None:
        super().__init__(img_size=64, num_classes=5, **SMALL)
        self.rope = timm.layers.RotaryEmbeddingCat(16, in_pixels=False, feat_shape=[4, 4])
        for block in self.blocks:
            block.attn = AttentionRope(48, 3)

    def forward_features(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        x = vit.embed(self, x)
        for block in self.blocks:
            x = x + block.attn(block.norm1(x), rope=self.rope.get_embed())
            x = x + block.mlp(block.norm2(x))
        return self.norm(x)
