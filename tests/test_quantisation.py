"""int8: the layers, their ranges, the graph, the solver, the table, whole builds. python -m pytest tests/test_quantisation.py"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import parts
import pytest
import small
import torch
from small import Workspace
from torch import nn
from torch.nn import functional as F

import edgeprune
from edgeprune import allocators, api, artifact, config, errors, quantisation, vit
from edgeprune.allocators import _forms, _tokens, search
from edgeprune.errors import EdgepruneError, UsageError
from edgeprune.latency import table as tables
from edgeprune.quantisation import HIGHEST, LEVELS, Int8Linear
from edgeprune.search import Space
from edgeprune.stages import export, finetune, shapes, simplify
from edgeprune.tuning.loop import fit
from edgeprune.types import PLAIN, BlockPlan, Form, LatencyTable, Measurement, Plan, int8, left

#: Block 0 int8 as a whole, block 1 its MLP, block 2 its attention, fewer units here and there.
MIXED = ((2, 16, 0, 3), (3, 24, 0, 2), (1, 24, 0, 1))
WITH_TOKENS = ((2, 16, 9, 3), (3, 24, 0, 2), (1, 24, 4, 1))


def with_int8(share: float, extra: float = 0.0) -> LatencyTable:
    """The tests' table, where int8 costs so much of fp32 and something more, whatever is kept."""
    (own,) = parts.TABLE.stages
    prices = [np.where(ms > 0, share * ms + extra, 0) for ms in (own.attn_ms, own.mlp_ms)]
    return replace(parts.TABLE, stages=(replace(own, attn_forms={INT8: prices[0]}, mlp_forms={INT8: prices[1]}),))


INT8 = Form(int8=True)
TABLE = with_int8(0.5)


def quantised(model: Any, shape: Any, images: torch.Tensor | None = None) -> Any:
    plan = vit.plan_of_shape(shape)
    made = quantisation.mark(vit.slice_model(model, plan), plan)
    if images is not None:
        quantisation.calibrate(made, [images])
    return made


# Layers -------------------------------------------------------------------------------------


def test_a_layer_rounds_as_the_formula_says() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    made = Int8Linear(layer)
    x = torch.randn(5, 6) * 2
    assert made(x).isnan().all(), "nothing is guessed before its range is known"
    made.set_range(-1.0, 3.0)
    scale = 4.0 / LEVELS
    zero = round(1.0 / scale)
    inputs = (np.clip(np.rint(x.numpy() / scale) + zero, 0, LEVELS) - zero) * scale
    weight = layer.weight.detach().numpy()
    scales = np.abs(weight).max(1, keepdims=True) / HIGHEST
    rounded = np.rint(weight / scales) * scales
    np.testing.assert_allclose(
        made(x).detach().numpy(), inputs @ rounded.T + layer.bias.detach().numpy(), rtol=1e-5, atol=1e-5
    )
    with quantisation.exactly(made):
        torch.testing.assert_close(made(x), layer(x))
    assert not torch.equal(made(x), layer(x))


def test_zero_is_exact_whatever_the_range() -> None:
    made = Int8Linear(nn.Linear(3, 2))
    for low, high in ((0.5, 2.0), (-3.0, -1.0), (-0.3, 0.7)):
        made.set_range(low, high)
        torch.testing.assert_close(made(torch.zeros(1, 3))[0], made.bias)


def test_gradients_pass_straight_through() -> None:
    made = Int8Linear(nn.Linear(6, 4))
    made.set_range(-4.0, 4.0)
    x = torch.randn(5, 6).clamp(-3, 3).requires_grad_()
    made(x).sum().backward()
    assert x.grad is not None and made.weight.grad is not None
    torch.testing.assert_close(x.grad, made.weight.detach().sum(0).expand(5, 6), rtol=0.05, atol=0.05)
    torch.testing.assert_close(made.weight.grad, x.detach().sum(0).expand(4, 6), rtol=0.05, atol=0.1)


def test_the_range_is_the_one_that_errs_least() -> None:
    """Values spread evenly need all of it; a rare outlier is not worth the steps it costs all others."""
    even = np.linspace(-1, 1, 4001).astype(np.float32)
    assert quantisation._least_error(even) == (-1.0, 1.0)
    normal = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    low, high = quantisation._least_error(np.append(normal, np.float32(7)))
    assert normal.max() * 0.8 < high < 6 and low > normal.min()
    assert quantisation._least_error(np.zeros(5, np.float32)) == (0.0, 0.0)


def test_ranges_are_seen_in_float(tiny_vit: Any) -> None:
    """A later layer's range does not depend on how an earlier one is rounded."""
    images = torch.randn(8, 3, 32, 32)
    made = quantised(tiny_vit, ((3, 24, 0, 3),) * 3, images)
    first = {name: float(layer.high) for name, layer in quantisation.layers(made).items()}
    quantisation.calibrate(made, [images])
    assert first == {name: float(layer.high) for name, layer in quantisation.layers(made).items()}
    dense = quantisation.dense_ranges(tiny_vit, [images])
    assert dense[1, "mlp"][1][1] == pytest.approx(first["blocks.1.mlp.fc2"])
    assert dense[2, "attn"][0][1] == pytest.approx(first["blocks.2.attn.qkv"])


@pytest.mark.parametrize("worse", [False, True])
def test_ranges_that_tuning_made_wrong_are_taken_anew(tiny_vit: Any, worse: bool) -> None:
    """Where they serve better, on other images; else the old ones stay, to the bit."""
    images = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images, others = images[:16], images[16:]
    made = quantised(tiny_vit, ((3, 24, 0, 3),) * 3, others if worse else images)
    for layer in quantisation.layers(made).values():
        layer.set_range(float(layer.low) * (1 if worse else 0.05), float(layer.high) * (1 if worse else 0.05))
    old = {name: (float(layer.low), float(layer.high)) for name, layer in quantisation.layers(made).items()}
    wanted = tiny_vit(others).detach()

    def judge(model: Any) -> float:
        with torch.no_grad():
            return float((model(others) - wanted).square().mean())

    exact, before, after = quantisation.control(made, [100 * images if worse else images], judge)
    now = {name: (float(layer.low), float(layer.high)) for name, layer in quantisation.layers(made).items()}
    assert judge(made) == after and exact < 1e-9
    assert (now == old and after == before) if worse else (now != old and after < 0.2 * before)


# The graph ----------------------------------------------------------------------------------


def as_onnx(model: Any, folder: Path) -> Path:
    export.to_onnx(model, (3, 32, 32), folder / "exported.onnx")
    simplify.simplify(folder / "exported.onnx", folder / "model.onnx", model)
    return folder / "model.onnx"


@pytest.mark.parametrize(
    "architecture, shape, kwargs",
    [
        ("vit_tiny_patch16_224", MIXED, {}),
        ("vit_tiny_patch16_224", WITH_TOKENS, {}),
        ("eva02_tiny_patch14_224", ((2, 16, 0, 3), (3, 24, 0, 2), (1, 24, 0, 1)), {"scale_mlp": False}),
        ("beit_base_patch16_224", MIXED, {}),
    ],
    ids=["vit", "tokens", "eva02", "beit"],
)
def test_the_graph_equals_torch_in_both_runtimes(
    make_vit: Callable[..., Any], tmp_path: Path, architecture: str, shape: Any, kwargs: dict[str, Any]
) -> None:
    dense = make_vit(architecture, **kwargs)
    for name, parameter in dense.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    images = torch.randn(16, 3, 32, 32)
    model = quantised(dense, shape, images)
    path = as_onnx(model, tmp_path)
    nodes = Counter(node.op_type for node in onnx.load(path).graph.node)
    count = len(quantisation.layers(model))
    biases = sum(node.name.endswith(".biases") for node in onnx.load(path).graph.node)
    assert count == 8 and nodes["QuantizeLinear"] == count and nodes["DequantizeLinear"] == 2 * count + biases
    assert biases == sum(layer.bias is not None for layer in quantisation.layers(model).values())
    with torch.no_grad():
        want = model(images).numpy()
        with quantisation.exactly(model):
            exact = model(images).numpy()
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    nodes = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    assert nodes["QGemm"] + nodes["MatMulIntegerToFloat"] == count, "all of them are computed in integers"
    import openvino  # not above: a test elsewhere needs it not yet loaded

    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for run in (lambda x: session.run(None, {"pixels": x})[0], lambda x: compiled({0: x})[0]):
        found = np.concatenate([run(x[None].numpy()) for x in images])
        error, rounding = np.abs(found - want).mean(), np.abs(exact - want).mean()
        assert error < 0.5 * rounding, "it is int8 as torch has it, not float, nor another int8"
        assert (found.argmax(1) == want.argmax(1)).mean() >= 15 / 16


def test_weights_are_stored_as_bytes(tiny_vit: Any, tmp_path: Path) -> None:
    model = quantised(tiny_vit, ((3, 24, 0, 3),) * 3, torch.randn(4, 3, 32, 32))
    graph = onnx.load(as_onnx(model, tmp_path)).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert kinds["blocks.0.mlp.fc1.weight"] == onnx.TensorProto.INT8
    linear = {n.input[1] for n in graph.node if n.op_type == "MatMul"}
    assert not any(kinds.get(name) == onnx.TensorProto.FLOAT for name in linear), "no float copy is left"


def test_a_model_without_int8_is_left_alone(tiny_vit: Any, tmp_path: Path) -> None:
    proto = onnx.load(as_onnx(tiny_vit, tmp_path))
    before = proto.SerializeToString()
    quantisation.insert(proto, tiny_vit)
    assert proto.SerializeToString() == before


def test_a_layer_that_is_not_in_the_graph_is_an_error(tiny_vit: Any, tmp_path: Path) -> None:
    model = quantised(tiny_vit, MIXED, torch.randn(4, 3, 32, 32))
    path = as_onnx(vit.slice_model(tiny_vit, vit.plan_of_shape(tuple(row[:2] for row in MIXED))), tmp_path)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight += 1
    with pytest.raises(EdgepruneError, match=r"'blocks\.1\.mlp\.fc1' is not in the exported graph"):
        quantisation.insert(onnx.load(path), model)


# Plans --------------------------------------------------------------------------------------


def test_shapes_say_what_is_int8() -> None:
    plan = vit.plan_of_shape(WITH_TOKENS)
    assert plan.shape == WITH_TOKENS and plan.quantised
    assert [left(row) for row in WITH_TOKENS] == [9, None, 4]
    assert [int8(row) for row in WITH_TOKENS] == [("attn", "mlp"), ("mlp",), ("attn",)]
    assert [left(row) for row in ((3, 24), (3, 24, 7))] == [None, 7] and int8((3, 24, 7)) == ()


def test_plans_round_trip(tmp_path: Path) -> None:
    planned = artifact.PlannedModel("vit_tiny_patch16_224", {}, 5, vit.plan_of_shape(WITH_TOKENS), 1.0, 2.0)
    artifact.write_plan(planned, tmp_path / "plan.json")
    assert artifact.read_plan(tmp_path / "plan.json").plan == planned.plan
    document = json.loads((tmp_path / "plan.json").read_text())
    for wrong in ("mlp", ["mlp", "attn"], ["head"], [1], {"mlp": 1}, None):
        document["blocks"][0]["int8"] = wrong
        (tmp_path / "plan.json").write_text(json.dumps(document))
        with pytest.raises(UsageError, match="plan is damaged"):
            artifact.read_plan(tmp_path / "plan.json")


def test_what_is_removed_cannot_be_int8(tiny_vit: Any) -> None:
    plan = Plan((BlockPlan((0,), (), None, ("mlp",)), *vit.plan_of_shape(((3, 24),) * 2).blocks))
    with pytest.raises(UsageError, match="block 0 of the plan has int8 for its mlp, which is removed"):
        vit.check_plan(plan, vit.anatomy(tiny_vit))


# The solver ---------------------------------------------------------------------------------


def task_of(model: Any, table: LatencyTable, dims: tuple[str, ...] = (*config.WIDTHS, "precision")) -> allocators.Task:
    found = parts.calibration(model, "fisher")
    return allocators.task(found, table, ((3, 24),) * 3, model, model, 0.0, 0, parts.SILENT, dims)


def test_what_stays_may_be_int8_where_that_is_cheaper(tiny_vit: Any) -> None:
    task = task_of(tiny_vit, TABLE)
    assert task.counts[0] == (0, 1, 2, 3, 1, 2, 3) and task.forms[0] == (PLAIN,) * 4 + (INT8,) * 3
    assert task.costs[0][4:].tolist() == TABLE.stages[0].attn_forms[INT8][1:].tolist()
    assert task_of(tiny_vit, with_int8(1.2)).forms == [], "where it does not pay it is no option"
    some = task_of(tiny_vit, with_int8(0.5, 0.3))
    assert some.forms[0] == (PLAIN,) * 4 + (INT8,) * 2, "one head alone is not worth rounding its inputs"
    assert task_of(tiny_vit, TABLE, config.WIDTHS).forms == [] == task_of(tiny_vit, parts.TABLE).forms


def test_the_error_of_int8_is_twice_its_divergence(tiny_vit: Any) -> None:
    task = _forms.observed(task_of(tiny_vit, TABLE))
    judge, _ = search.judges(task)
    found = _forms.weighed(task, judge)
    images = torch.cat(task.found.batches)[: len(judge.wanted)]
    own = quantised(tiny_vit, ((3, 24), (3, 24, 0, 2), (3, 24)))
    for name, layer in quantisation.layers(own).items():
        layer.set_range(*task.ranges[1, "mlp"][0 if name.endswith("fc1") else 1])
    with torch.no_grad():
        want, got = tiny_vit(images).log_softmax(-1), own(images).log_softmax(-1)
    extra = 2 * float(F.kl_div(got, want, log_target=True, reduction="batchmean"))
    float_options = [i for i, form in enumerate(task.forms[3]) if form == PLAIN]
    for option, (form, units) in enumerate(zip(task.forms[3], task.counts[3], strict=True)):
        plain = task.errors[3][next(i for i in float_options if task.counts[3][i] == units)]
        assert found.errors[3][option] == pytest.approx(plain + (extra if form.int8 else 0.0), rel=1e-2, abs=1e-6)
    assert extra > 0


@pytest.mark.parametrize("dims", [(*config.WIDTHS, "precision"), config.EVERY_DIM])
@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_plans_are_int8_within_the_budget(tiny_vit: Any, seconds: float, dims: tuple[str, ...]) -> None:
    table = replace(
        TABLE, patches=(4, 9, 16), attn_share=np.array([0.2, 0.5, 1.0]), mlp_share=np.array([0.3, 0.6, 1.0])
    )
    task = replace(task_of(tiny_vit, table, dims), seconds=seconds)
    room = 0.5 * task.cost(task.dense)
    choose = search.prepare(task)
    plan = task.plan(choose(room))
    assert table.predict_ms(plan.shape) <= table.base_ms + room + 1e-6
    assert plan.quantised, "all in int8 costs half, and errs little"
    vit.check_plan(plan, task.sizes)
    assert not task.plan(choose(1.01 * task.cost(task.dense))).quantised


def test_options_without_drops_keep_their_precision(tiny_vit: Any) -> None:
    table = replace(TABLE, patches=(9, 16), attn_share=np.array([0.5, 1.0]), mlp_share=np.array([0.6, 1.0]))
    task = task_of(tiny_vit, table, config.EVERY_DIM)
    task = _forms.observed(task)
    tokens = _tokens.tokens(task, search.judges(task)[0])
    assert tokens is not None
    for at, plain in enumerate(tokens.plain):
        for option, same in enumerate(plain):
            assert tokens.drops[at][same] == -1 and task.forms[at][same] == task.forms[at][option]
            assert task.counts[at][same] == task.counts[at][option]
    space = Space(task.errors, task.costs, 2.0, tokens)
    assert space.cost(space.solve()) <= 2.0 + 1e-9


def test_a_stitched_int8_model_is_the_sliced_one(tiny_vit: Any) -> None:
    task = _forms.observed(task_of(tiny_vit, TABLE))
    judge, _ = search.judges(task)
    choice = list(task.dense)
    choice[3] = task.counts[3].index(24, task.forms[3].index(INT8))
    assert task.plan(choice).shape == ((3, 24), (3, 24, 0, 2), (3, 24))
    assert 0 < judge.divergence(tuple(choice)) < 0.5


# The table ----------------------------------------------------------------------------------


def measured(ms: float, dense_ms: float = 12.0) -> Measurement:
    samples = np.full(12, ms)
    ratio = ms / dense_ms
    anchor, both = np.full(12, dense_ms), np.stack([samples, samples])
    return Measurement("x", samples, anchor, ratio, (ratio, ratio), both, np.zeros((2, 12)), anchor)


def made(**more: Any) -> LatencyTable:
    """4 blocks, 3 heads, 64 neurons, 12 ms; attention takes 4 of them, MLPs 6."""
    attn = {0: measured(8.0), 1: measured(9.0), 2: measured(10.5)}
    mlp = {0: measured(6.0), 16: measured(8.0), 32: measured(10.0)}
    stage = tables.Measured(4, 3, 64, attn, mlp, **more)
    return tables.build_table(
        [stage], measured(2.5), {}, dense_ms=12.0, runtime="null", precision="fp32", threads=1
    )  # fmt: skip


def test_prices_of_int8_lie_on_lines_between_what_was_measured() -> None:
    table = made(
        attn_forms={INT8: {2: measured(9.0), 3: measured(9.8)}},
        mlp_forms={INT8: {16: measured(6.8), 32: measured(7.6), 64: measured(9.2)}},
    )
    (own,) = table.stages
    np.testing.assert_allclose(own.attn_forms[INT8], [0, 0.05, 0.25, 0.45], atol=1e-12)
    np.testing.assert_allclose(own.mlp_forms[INT8], [0, 0.2, 0.4, 0.8], atol=1e-12)
    assert table.int8 and not made().int8
    shape = ((3, 64, 0, 3), (2, 32, 0, 1), (3, 64), (3, 64))
    want = 12.0 - (1.0 - 0.45) - (1.5 - 0.8) - (1.0 - 0.25) - (1.5 - 1.0)
    assert table.predict_ms(shape) == pytest.approx(want)
    again = tables.table_from_json(json.loads(json.dumps(tables.table_to_json(table))))
    assert again.predict_ms(shape) == table.predict_ms(shape)


def test_a_table_without_int8_is_read_as_before() -> None:
    document = tables.table_to_json(made())
    for stage in document["stages"]:
        del stage["attn_forms"], stage["mlp_forms"]
    assert not tables.table_from_json(document).int8


@pytest.mark.parametrize("change", [
    {"attn_forms": {"int8": [0, 1]}}, {"mlp_forms": {"int8": [0, 2, 1, 3]}}, {"mlp_forms": "fast"}, {"mlp_forms": {"int8": 3}},
    {"attn_forms": {"int8": [0, 1, 2, float("nan")]}}, {"attn_forms": {"plain": [0, 1, 2, 3]}}, {"attn_forms": {"int4": [0, 1, 2, 3]}},
])  # fmt: skip
def test_damaged_prices_are_refused(change: dict[str, Any]) -> None:
    document = tables.table_to_json(made(attn_forms={INT8: {3: measured(9.8)}}, mlp_forms={INT8: {64: measured(9.2)}}))
    document["stages"][0] |= change
    with pytest.raises(UsageError, match="damaged"):
        tables.table_from_json(document)


def test_int8_models_are_of_few_sizes(tiny_vit: Any, tmp_path: Path) -> None:
    found = shapes.form_models(tiny_vit, [(0, 8, 16, 24)], ("precision",), tmp_path, parts.SILENT)
    assert [entry.name for entry in found] == ["heads1.int8", "heads2.int8", "heads3.int8", "neurons8.int8", "neurons16.int8", "neurons24.int8"]  # fmt: skip
    for entry, path in found.items():
        nodes = Counter(node.op_type for node in onnx.load(path).graph.node)
        assert nodes["QuantizeLinear"] == 6, f"both layers of three sub-blocks of {entry.name}"
        onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def test_random_plans_have_int8_where_it_is_asked_for(tiny_vit: Any) -> None:
    sizes = vit.anatomy(tiny_vit)
    found = shapes.random_shapes(20, sizes, [(0, 8, 24)], (0,), (7, 11, 16), ("precision",))
    some = [any(map(int8, shape)) for shape in found]
    assert 5 <= sum(some) <= 10
    for shape in found:
        vit.check_plan(vit.plan_of_shape(shape), sizes)
    assert not any(int8(row) for shape in shapes.random_shapes(20, sizes, [(0, 8, 24)], (0,)) for row in shape)


# Tuning, requests, builds -------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_tuning_knows_of_the_rounding(tiny_vit: Any, precision: str) -> None:
    train, check = parts.images(60), parts.images(20, seed=9)
    student = quantised(tiny_vit, MIXED, torch.cat([x for x, _ in train.batches(20)]))
    ranges = {name: float(layer.high) for name, layer in quantisation.layers(student).items()}
    before = parts.divergence(student, tiny_vit, check, 10)
    recipe = replace(parts.RECIPE, precision=precision)
    fit(student, train, recipe, parts.CONFIG, teacher=tiny_vit, check=check, seed=0)
    assert parts.divergence(student, tiny_vit, check, 10) < 0.8 * before
    assert ranges == {name: float(layer.high) for name, layer in quantisation.layers(student).items()}


@pytest.mark.parametrize(
    "asked, words",
    [
        (
            {"dims": "mlp,precision", "gradual": True},
            "in dense shape and float; leave precision out",
        ),
        ({"dims": "mlp,precision", "recovery": "lora"}, "the recovery 'lora' tunes adapters"),
        ({"dims": "mlp,precision", "precision": "bf16", "target": "cpu-amx"}, "int8 layers stand beside fp32 ones"),
        ({"dims": "precision", "allocator": "uniform"}, "allocator 'uniform' always chooses heads, mlp, depth"),
        ({"dims": "mlp,precison"}, "did you mean 'precision'"),
    ],
)
def test_what_cannot_be_int8_is_refused(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        api.request("digits", latency="2x", **{"target": "cpu-avx2", **asked})


def test_precision_is_chosen_where_it_is_asked_for() -> None:
    made, _ = api.request("digits", target="cpu-avx2", latency="2x", dims="heads,mlp,depth,tokens,qk,precision")
    assert made.dims == config.EVERY_DIM
    assert "precision" not in api.request("digits", target="cpu-avx2", latency="2x")[0].dims


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[small.Result, Path]:
    """A build by a profile of this device in which int8 costs next to nothing, which this small model would not show."""
    folder = tmp_path_factory.mktemp("int8")
    space: Workspace = small.workspace(tmp_path_factory.getbasetemp())
    dims = "heads,mlp,depth,qk,precision"
    with small.quick():
        document = api.table(
            str(space.card), target=str(space.target), cache_dir=folder / "cache", runtime="onnxruntime", dims=dims
        )
    for stage in document["table"]["stages"]:
        for name in ("attn", "mlp"):
            assert len(stage[f"{name}_forms"]["int8"]) == len(stage[f"{name}_ms"])
            stage[f"{name}_forms"]["int8"] = [0.3 * ms for ms in stage[f"{name}_ms"]]
        assert set(stage["attn_forms"]) == {"int8", "rank8", "int8.rank8"}
        for name, share in (("rank8", 0.5), ("int8.rank8", 0.15)):
            stage["attn_forms"][name] = [share * ms for ms in stage["attn_ms"]]
    document["device"]["cpu"] = "a board"
    (folder / "profile.json").write_text(json.dumps(document))
    with mock.patch.object(finetune, "NEGLIGIBLE", 0.0):  # so that it is tuned, however little is lost
        result = space.build(
            "--latency",
            "1.6x",
            "--epochs",
            "1",
            "--profile",
            folder / "profile.json",
            "--dims",
            dims,
            out=folder / "out",
        )
    return result, folder / "out" / "small-here-1.6x"


@pytest.mark.slow
def test_a_build_with_int8(built: tuple[small.Result, Path]) -> None:
    result, folder = built
    assert result.code == errors.INCONCLUSIVE, result.err  # predicted: the profile is another device's
    assert result.err.count("nats in float") == 2, "when the plan is chosen, and after tuning"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert any(map(int8, manifest["shape"])) and manifest["dims"][-1] == "precision"
    assert manifest["export"]["agreement"] >= 31 / 32
    assert "| int8 |" in (folder / "report.md").read_text()
    assert ", mlp int8" in (folder / "report.html").read_text() or ", attn int8" in (folder / "report.html").read_text()
    model = edgeprune.load(folder)
    images = torch.randn(8, 3, 32, 32)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    found = np.concatenate([session.run(None, {"pixels": x[None].numpy()})[0] for x in images])
    with torch.no_grad():
        want = model(images).numpy()
    assert np.abs(found - want).max() < 0.05 * np.abs(want).max()
    assert len(quantisation.layers(model)) == 2 * sum(len(int8(row)) for row in manifest["shape"])


@pytest.mark.slow
def test_an_artifact_with_int8_is_validated(built: tuple[small.Result, Path]) -> None:
    _, folder = built
    with small.quick():
        found = small.run("validate", folder, "--data", "digits", "--format", "json")
    assert found.code in (errors.PASSED, errors.GATE_FAILED, errors.INCONCLUSIVE), found.err
    recorded = json.loads((folder / "manifest.json").read_text())
    assert found.document["accuracy"]["accuracy"] == recorded["pruned"]["accuracy"]
    assert found.document["checks"][0]["value"] > 0, "measured here, where the build had only predicted"
