"""python -m pytest tests/test_export.py

An export takes more than a second, so the module exports each plan once and checks many things on it.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from edgeprune import vit
from edgeprune.console import SILENT
from edgeprune.errors import EdgepruneError
from edgeprune.intake import Intake
from edgeprune.stages import export, simplify
from edgeprune.stages import shapes as stage_shapes
from edgeprune.types import BlockPlan, Plan

PLANS = {
    "dense": vit.plan_of_shape(((3, 96),) * 2),
    "mixed": Plan((BlockPlan((0, 2), (1, 5, 9, 40)), BlockPlan((1,), tuple(range(0, 96, 3))))),
    "partly removed": Plan((BlockPlan((), tuple(range(16))), BlockPlan((0, 1, 2), ()))),
    "all removed": vit.plan_of_shape(((0, 0),) * 2),
}


@pytest.fixture(scope="module")
def dense(make_vit: Callable[..., Any]) -> Any:
    return make_vit(depth=2, mlp_ratio=2)


@pytest.fixture(scope="module", params=PLANS)
def exported(
    request: pytest.FixtureRequest, dense: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path, Path]:
    """The sliced model, its ONNX and its simplified ONNX."""
    folder = tmp_path_factory.mktemp("export")
    model = vit.slice_model(dense, PLANS[request.param])
    export.to_onnx(model, (3, 32, 32), folder / "exported.onnx")
    simplify.simplify(folder / "exported.onnx", folder / "model.onnx")
    return model, folder / "exported.onnx", folder / "model.onnx"


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def weight_shapes(model: onnx.ModelProto) -> Counter[tuple[int, ...]]:
    """The shapes of all constants of more than 8 numbers (the rest are shapes and indices)."""
    return Counter(tuple(t.dims) for t in model.graph.initializer if np.prod(t.dims) > 8)


# Export -------------------------------------------------------------------------------------


def test_onnx_equals_torch_before_and_after_simplification(
    exported: tuple[Any, Path, Path], make_images: Callable[..., Any]
) -> None:
    model, *paths = exported
    for path in paths:
        facts = export.compare(model, path, make_images(6))
        assert facts["max_error"] < 1e-5 and facts["agreement"] == 1.0 and facts["images"] == 6


def test_input_and_output_are_named_and_static(exported: tuple[Any, Path, Path]) -> None:
    for path in exported[1:]:
        graph = onnx.load(path).graph
        shapes = [(v.name, [d.dim_value for d in v.type.tensor_type.shape.dim]) for v in (*graph.input, *graph.output)]
        assert shapes == [("pixels", [1, 3, 32, 32]), ("logits", [1, 5])]
        assert not [d for v in graph.input for d in v.type.tensor_type.shape.dim if d.dim_param]


def test_the_opset_is_fixed_and_the_model_sound(exported: tuple[Any, Path, Path]) -> None:
    for path in exported[1:]:
        model = onnx.load(path)
        assert {o.domain: o.version for o in model.opset_import}[""] == export.OPSET
        onnx.checker.check_model(model, full_check=True)
        assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}


def test_everything_is_in_one_file(exported: tuple[Any, Path, Path]) -> None:
    folder = exported[1].parent
    assert sorted(p.name for p in folder.iterdir()) == ["exported.onnx", "model.onnx"]
    assert not [t for t in onnx.load(exported[1], load_external_data=False).graph.initializer if t.external_data]


def test_a_removed_sub_block_costs_no_operator(exported: tuple[Any, Path, Path]) -> None:
    """Two layer norms per whole block, one per half, and the last; a Softmax and a Gelu per attention and MLP."""
    model, _, path = exported
    attns = sum(not isinstance(b.attn, vit.RemovedSubBlock) for b in model.blocks)
    mlps = sum(not isinstance(b.mlp, vit.RemovedSubBlock) for b in model.blocks)
    found = operators(onnx.load(path))
    assert (found["LayerNormalization"], found["Softmax"], found["Gelu"]) == (1 + attns + mlps, attns, mlps)
    assert found["Conv"] == 1


def test_export_says_nothing_on_stdout(dense: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import logging

    export.to_onnx(vit.slice_model(dense, PLANS["all removed"]), (3, 32, 32), tmp_path / "x.onnx")
    simplify.simplify(tmp_path / "x.onnx", tmp_path / "y.onnx")
    assert capfd.readouterr().out == ""
    assert logging.root.manager.disable == logging.NOTSET


def test_a_wrong_onnx_is_found(exported: tuple[Any, Path, Path], make_images: Callable[..., Any]) -> None:
    """The comparison fails for a model whose head is a little off."""
    wrong = copy.deepcopy(exported[0])
    with torch.no_grad():
        wrong.head.bias += 0.05
    with pytest.raises(EdgepruneError, match="the ONNX differs from torch"):
        export.compare(wrong, exported[2], make_images(2))


def test_a_nan_is_no_agreement(exported: tuple[Any, Path, Path], make_images: Callable[..., Any]) -> None:
    broken = copy.deepcopy(exported[0])
    with torch.no_grad():
        broken.head.bias[0] = float("nan")
    with pytest.raises(EdgepruneError, match=r"stage export: NaN or infinity .* output of head"):
        export.compare(broken, exported[2], make_images(2))


def test_a_simplification_that_computes_something_else_is_refused(
    exported: tuple[Any, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_images: Callable[..., Any]
) -> None:
    import onnxsim

    def wrong(model: onnx.ModelProto, *_: Any, **__: Any) -> tuple[onnx.ModelProto, bool]:
        changed = onnx.ModelProto.FromString(model.SerializeToString())
        bias = next(tensor for tensor in changed.graph.initializer if tensor.name.endswith("head.bias"))
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1, bias.name))
        return changed, True

    images = make_images(2)
    monkeypatch.setattr(onnxsim, "simplify", wrong)
    monkeypatch.setattr(export, "deployable", lambda request, read: (None, exported[0]))
    monkeypatch.setattr(export, "check_images", lambda dense, count: (images, images.numpy()))
    with pytest.raises(EdgepruneError, match=r"the ONNX differs from torch by"):
        simplify.run(None, {"export": exported[1].parent}, tmp_path, SILENT)  # type: ignore[arg-type]
    assert not (tmp_path / "simplify.json").exists()


# Shape models -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes(dense: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("shapes")
    return {
        entry.name: path
        for entry, path in stage_shapes.shape_models(dense, [(0, 16, 40, 64, 96)], folder, SILENT).items()
    }


def test_shape_models_are_one_per_shape_but_the_dense_one(shapes: dict[str, Path]) -> None:
    assert set(shapes) == {"heads0", "heads1", "heads2", "neurons0", "neurons16", "neurons40", "neurons64"}
    folder = next(iter(shapes.values())).parent
    assert sorted(p.name for p in folder.iterdir()) == sorted(f"{name}.onnx" for name in shapes)


def test_fewer_sizes_of_a_large_model_are_measured(dense: Any) -> None:
    sizes, grid = vit.anatomy(dense), tuple(range(0, 2049, 128))
    many = replace(sizes, stages=(replace(sizes.only, heads=12),))
    assert stage_shapes.head_counts(many, 0, large=False) == tuple(range(12))
    assert stage_shapes.measured_widths(grid, large=False) == grid[:-1]
    assert stage_shapes.head_counts(many, 0, large=True) == (0, 2, 4, 6, 8, 10)
    assert stage_shapes.measured_widths(grid, large=True) == tuple(range(0, 2048, 256))


def test_no_marker_is_a_size_that_the_deployment_brings(dense: Any, make_vit: Callable[..., Any]) -> None:
    """A batch of as many images as a marker has heads would be cut with the heads."""
    model = make_vit(num_heads=8)
    sizes = vit.anatomy(model)
    marker = stage_shapes.head_marker(sizes, 0, stage_shapes.other_sizes(model))
    export.deploy(model, export.Deployed(Intake(batch=marker)))
    assert marker in stage_shapes.other_sizes(model)
    assert stage_shapes.head_marker(sizes, 0, stage_shapes.other_sizes(model)) != marker
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage_shapes, "FEWEST_MARKED", 2)
        assert 0 < stage_shapes.marker_width(sizes, 0, stage_shapes.other_sizes(model)) < sizes.only.neurons


def test_tokens_are_dropped_step_by_step_where_the_price_of_it_is_measured(make_vit: Callable[..., Any]) -> None:
    sizes = vit.anatomy(make_vit(img_size=64, depth=4))
    *fewer, _ = stage_shapes.patch_counts(sizes)
    found = [row[2] for row in stage_shapes.reducing_shape(sizes) if len(row) > 2]
    assert found == fewer[::-1][:4] and len(set(found)) == len(found), (
        "a drop to what is there already costs some nothing"
    )
    assert len(stage_shapes.reducing_shape(sizes)) == 4


def test_the_first_blocks_are_measured(dense: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert stage_shapes.shallow(dense) is dense, "it has no more blocks than that"
    monkeypatch.setattr(stage_shapes, "SHALLOW", 1)
    few = stage_shapes.shallow(dense)
    assert len(few.blocks) == 1 and len(dense.blocks) == 2
    assert vit.anatomy(few).shape == vit.anatomy(dense).shape[:1]


@pytest.mark.parametrize("width", [16, 40])
def test_a_cut_model_is_like_one_exported_at_that_width(
    shapes: dict[str, Path], dense: Any, tmp_path: Path, width: int
) -> None:
    direct = tmp_path / "direct.onnx"
    sizes = vit.anatomy(dense)
    stage_shapes.export_shape(dense, ((3, width),) * sizes.blocks, sizes, direct)
    cut, want = onnx.load(shapes[f"neurons{width}"]), onnx.load(direct)
    assert operators(cut) == operators(want)
    assert weight_shapes(cut) == weight_shapes(want)
    assert (48, width) in weight_shapes(cut) or (width, 48) in weight_shapes(cut)


def test_shape_models_run_and_compute(shapes: dict[str, Path], dense: Any, make_images: Callable[..., Any]) -> None:
    """Also the cut ones hold the dense model's own weights, so they compute what the sliced model does."""
    for name, path in shapes.items():
        kind, count = (name[:5], int(name[5:])) if name.startswith("heads") else (name[:7], int(name[7:]))
        shape = (count, 96) if kind == "heads" else (3, count)
        onnx.checker.check_model(onnx.load(path), full_check=True)
        assert export.compare(vit.slice_model(dense, vit.plan_of_shape((shape,) * 2)), path, make_images(2))


#: Families with heads enough for a marker: 8 of 6 dimensions, in Swin's second stage too.
MARKED: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", {"num_heads": 8}),
    "rotary": ("eva02_tiny_patch14_224", {"num_heads": 8, "img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2}),
    "biased": ("beit_base_patch16_224", {"num_heads": 8, "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2}),
    "windows": ("swin_tiny_patch4_window7_224", {
        "img_size": 32, "embed_dim": 72, "depths": (2, 2), "num_heads": (9, 9), "mlp_ratio": 1.0, "window_size": 4
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", MARKED)
def test_models_with_fewer_heads_are_cut_from_one(
    name: str, make_vit: Callable[..., Any], tmp_path: Path, make_images: Callable[..., Any], monkeypatch: Any
) -> None:
    """They have the graph of a direct export, and compute what the sliced model does."""
    architecture, kwargs = MARKED[name]
    model = make_vit(depth=2, **kwargs) if name == "plain" else vit.create(architecture, kwargs, 5)
    for key, tensor in model.named_parameters():
        torch.nn.init.normal_(tensor, 1.0 if "norm" in key and key.endswith("weight") else 0.0, 0.2)
    sizes, exported = vit.anatomy(model), []
    real = stage_shapes.export_shape
    monkeypatch.setattr(stage_shapes, "export_shape", lambda *args: (exported.append(args[-1]), real(*args)))
    for stage, own in enumerate(sizes.stages):
        exported.clear()
        found = stage_shapes.head_models(model, stage, range(own.heads), tmp_path)
        assert len(exported) == own.heads - stage_shapes.head_marker(sizes, stage) + 2 <= 4
        for heads, path in found.items():
            plan = vit.plan_of_shape(stage_shapes.with_stage(sizes, stage, (heads, own.neurons)))
            onnx.checker.check_model(onnx.load(path), full_check=True)
            assert export.compare(vit.slice_model(model, plan), path, make_images(2))
            if heads == 3:
                real(model, plan.shape, sizes, tmp_path / "direct.onnx")
                direct, cut = onnx.load(tmp_path / "direct.onnx"), onnx.load(path)
                assert operators(cut) == operators(direct) and weight_shapes(cut) == weight_shapes(direct)


@pytest.mark.parametrize("precision", [False, True])
def test_models_of_lower_rank_are_cut_from_one(
    precision: bool, make_vit: Callable[..., Any], tmp_path: Path, monkeypatch: Any
) -> None:
    """They have the graph of a direct export."""
    model, exported = make_vit(depth=2, embed_dim=96), []
    sizes = vit.anatomy(model)
    real = stage_shapes.export_shape
    monkeypatch.setattr(stage_shapes, "export_shape", lambda *args: (exported.append(args[-1]), real(*args)))
    assert sizes.only.head_dim == 32 and stage_shapes.rank_marker(sizes, 0, 3) == 31
    dims = ("qk", "precision") if precision else ("qk",)
    found = stage_shapes.form_models(model, [(0, sizes.only.neurons)], dims, tmp_path, SILENT)
    ranked = [entry for entry in found if entry.form.rank]
    assert len(ranked) == 6 * (1 + precision) and sum(path.stem == "marked" for path in exported) == 2 * (1 + precision)
    for entry in (entry for entry in ranked if entry.form.rank == 8):
        row = (entry.kept, sizes.only.neurons, 0, 1 if entry.form.int8 else 0, entry.form.rank)
        real(model, (row,) * 2, sizes, tmp_path / "direct.onnx")
        direct, cut = onnx.load(tmp_path / "direct.onnx"), onnx.load(found[entry])
        onnx.checker.check_model(cut, full_check=True)
        assert operators(cut) == operators(direct) and weight_shapes(cut) == weight_shapes(direct)
        session = onnxruntime.InferenceSession(str(found[entry]), providers=["CPUExecutionProvider"])
        assert np.isfinite(session.run(None, {"pixels": np.ones((1, *sizes.image), np.float32)})[0]).all()


@pytest.mark.parametrize("size", [32, 64])
def test_models_with_fewer_tokens_are_cut_from_one(
    size: int, make_vit: Callable[..., Any], tmp_path: Path, make_images: Callable[..., Any]
) -> None:
    model = make_vit(img_size=size, depth=2)
    sizes = vit.anatomy(model)
    every = stage_shapes.patch_counts(sizes)
    found, counts = stage_shapes.token_models(model, every, tmp_path, SILENT), every[:-1]
    assert set(found) == {f"tokens{n}.{kind}" for n in counts for kind in ("none", "attn", "whole")}
    for patches in counts:
        short = copy.deepcopy(model)
        short.patch_drop = stage_shapes.FirstTokens(1 + patches)
        for kind, row in (("none", (0, 0)), ("attn", (3, 0)), ("whole", (3, 24))):
            path = found[f"tokens{patches}.{kind}"]
            onnx.checker.check_model(onnx.load(path), full_check=True)
            small = vit.slice_model(short, vit.plan_of_shape((row,) * 2))
            assert export.compare(small, path, make_images(2, size=size))


def test_models_of_a_form_with_fewer_tokens_are_cut_from_one(
    make_vit: Callable[..., Any], tmp_path: Path, monkeypatch: Any
) -> None:
    """They have the graph of a direct export."""
    model, exported = make_vit(img_size=64, depth=2, embed_dim=96), []
    sizes = vit.anatomy(model)
    real = stage_shapes.export_shape
    monkeypatch.setattr(stage_shapes, "export_shape", lambda *args: (exported.append(args[-1]), real(*args)))
    every = stage_shapes.patch_counts(sizes)
    found = stage_shapes.token_form_models(model, every, ("qk", "precision"), tmp_path, SILENT)
    assert [f"{kind}.{form}" for kind, form in found] == ["attn.rank8", "attn.int8", "mlp.int8"]
    assert all(list(own) == [every[1], every[3], sizes.patches] for own in found.values())
    assert len(exported) == 6, "a marker and the whole of each"
    for (kind, form), own in found.items():
        short = copy.deepcopy(model)
        short.patch_drop = stage_shapes.FirstTokens(1 + every[1])
        units = (3, 0) if kind == "attn" else (0, sizes.only.neurons)
        row = (*units, 0, (1 if kind == "attn" else 2) if form.int8 else 0, form.rank or 0)
        real(short, (row,) * 2, sizes, tmp_path / "direct.onnx")
        direct, cut = onnx.load(tmp_path / "direct.onnx"), onnx.load(own[every[1]])
        onnx.checker.check_model(cut, full_check=True)
        assert operators(cut) == operators(direct) and weight_shapes(cut) == weight_shapes(direct)
        session = onnxruntime.InferenceSession(str(own[every[1]]), providers=["CPUExecutionProvider"])
        assert np.isfinite(session.run(None, {"pixels": np.ones((1, *sizes.image), np.float32)})[0]).all()


def test_translations_are_read_once(dense: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is exported is the same to the bit, torch is left as it was, and one without them exports too."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    before, asked = vars(ONNXRegistry)["from_torchlib"], []

    def read(cls: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs)
        return before.__get__(None, cls)(*args, **kwargs)

    monkeypatch.setattr(ONNXRegistry, "from_torchlib", classmethod(read))
    monkeypatch.setattr(export, "_READ", {})
    size = vit.anatomy(dense).image
    for name in ("first", "second"):
        export.to_onnx(dense, size, tmp_path / name)
    assert len(asked) == len(export._READ) == 1
    monkeypatch.delattr(ONNXRegistry, "from_torchlib")
    with export._translations():
        assert "from_torchlib" not in vars(ONNXRegistry)
    monkeypatch.undo()
    assert vars(ONNXRegistry)["from_torchlib"] is before
    with monkeypatch.context() as patch:
        patch.setattr(export, "_translations", contextlib.nullcontext)
        export.to_onnx(dense, size, tmp_path / "plain")
    assert len({(tmp_path / name).read_bytes() for name in ("first", "second", "plain")}) == 1


def test_a_marker_that_is_also_a_value_is_refused() -> None:
    graph = onnx.GraphProto(initializer=[numpy_helper.from_array(np.array([1, 89], dtype=np.int64), "shape")])
    with pytest.raises(ValueError, match=r"'shape' holds a marker of \[89\]"):
        stage_shapes.cut(onnx.ModelProto(graph=graph), {89: np.arange(16)})


def test_cut_does_not_pretend_to_a_width_above_the_marker() -> None:
    """There is nothing to cut it from: the table would list a time for a width that was never run."""
    graph = onnx.GraphProto(initializer=[numpy_helper.from_array(np.zeros((89, 4), dtype=np.float32), "weight")])
    with pytest.raises(ValueError):
        stage_shapes.cut(onnx.ModelProto(graph=graph), {89: np.arange(96)})


@pytest.mark.parametrize("step", [8, 16])
@pytest.mark.parametrize("width", [48, 192, 384, 768, 1024, 1280])
def test_the_marker_is_a_prime_that_is_no_other_size_and_not_below_the_grid(width: int, step: int) -> None:
    for neurons in {width // 2 * k for k in range(2, 10)}:
        sizes = vit.Anatomy((vit.Stage(2, 3, width // 3, neurons, width, 197),), (3, 224, 224), 1000)
        marker = stage_shapes.marker_width(sizes, 0)
        assert all(marker % d for d in range(2, marker)) and marker < neurons
        assert marker not in (197, 196, width, 3 * width, 1000, 3, 224)
        assert marker >= vit.neuron_grid(neurons, step)[-2]


def test_a_marker_avoids_the_sizes_that_are_prime() -> None:
    sizes = vit.Anatomy((vit.Stage(2, 3, 16, 200, 199, 197),), (3, 224, 224), 193)
    assert stage_shapes.marker_width(sizes, 0) == 191
