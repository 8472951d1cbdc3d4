"""Ranks of heads: the decomposition, plans, the solver, the table, recovery. python -m pytest tests/test_lowrank.py"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import parts
import pytest
import torch
from torch.nn import functional as F

from edgeprune import allocators, api, artifact, config, lowrank, quantisation, recoveries, recovery, structure, vit
from edgeprune.allocators import _forms, search
from edgeprune.calibration import Calibration
from edgeprune.errors import UsageError
from edgeprune.latency import table as tables
from edgeprune.recoveries import Damage
from edgeprune.stages import export, shapes, simplify
from edgeprune.types import Form, LatencyTable, Measurement, rank

RANK8 = Form(rank=8)
PRICES = parts.TABLE.stages[0]
#: The tests' table, in which heads of 8 of their 16 dimensions cost 0.6 of the price of attention.
TABLE = replace(parts.TABLE, stages=(replace(PRICES, attn_forms={RANK8: 0.6 * PRICES.attn_ms}),))
SHAPE = ((2, 16, 0, 0, 8), (3, 24), (1, 24, 0, 0, 12))


def calibrated(model: Any, images: int = 24) -> Calibration:
    found = parts.calibration(model, "fisher", parts.images(images, seed=1))
    with lowrank.watched(model) as attentions, torch.no_grad():
        for batch in found.batches:
            model(batch)
    return replace(found, inputs={i: (own.mean, own.covariance) for i, own in attentions.items()})


def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    flat = x.flatten(0, -2).double()
    mean = flat.mean(0)
    return mean, (flat - mean).T @ (flat - mean) / len(flat)


# The decomposition --------------------------------------------------------------------------


def reduced(attn: Any, x: torch.Tensor, to: int) -> Any:
    """The same attention with heads of so many dimensions, for inputs `[n, tokens, width]`."""
    seen: list[torch.Tensor] = []
    hook = attn.proj.register_forward_pre_hook(lambda _, z: seen.append(z[0]))
    with torch.no_grad():
        attn(x)
    hook.remove()
    lowrank.reduce(attn, to, moments(x), moments(seen[0]))
    return attn


@pytest.mark.parametrize("bias", [True, False])
def test_at_full_rank_nothing_changes(make_vit: Callable[..., Any], bias: bool) -> None:
    attn = make_vit(double=True, qkv_bias=bias).blocks[1].attn
    x = torch.randn(16, 9, 48, dtype=torch.float64) + 0.5
    want = attn(x).detach()
    made = reduced(attn, x, 16)
    torch.testing.assert_close(made(x).detach(), want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("bias", [True, False])
def test_what_has_a_low_rank_already_loses_nothing(make_vit: Callable[..., Any], bias: bool) -> None:
    """Queries and values of rank 5 in every head: 8 dimensions hold them, with what the biases add."""
    attn = make_vit(double=True, qkv_bias=bias).blocks[1].attn
    with torch.no_grad():
        rows = attn.qkv.weight.view(3, 3, 16, 48)
        for part in (0, 2):
            rows[part] = torch.randn(3, 16, 5, dtype=torch.float64) @ torch.randn(3, 5, 48, dtype=torch.float64) / 8
    x = torch.randn(16, 9, 48, dtype=torch.float64) - 0.3
    want = attn(x).detach()
    made = reduced(attn, x, 8)
    assert made.qkv.weight.shape == (3 * 3 * 8, 48) and made.proj.weight.shape == (48, 24)
    torch.testing.assert_close(made(x).detach(), want, rtol=1e-3, atol=1e-3)


def test_the_bilinear_form_is_the_closest_for_the_inputs() -> None:
    """Eckart and Young: what is left is the tail of the whitened form's singular values; other forms leave more."""
    torch.manual_seed(0)
    queries, keys = torch.randn(2, 6, 10, dtype=torch.float64)
    root = torch.randn(10, 10, dtype=torch.float64) * torch.logspace(0, -2, 10, dtype=torch.float64)
    factor = torch.linalg.cholesky(root @ root.T + 1e-6 * torch.eye(10, dtype=torch.float64))
    whole = factor.T @ queries.T @ keys @ factor

    def left(q: torch.Tensor, k: torch.Tensor) -> float:
        return float((factor.T @ q.T @ k @ factor - whole).square().sum())

    for to in (1, 3, 5):
        tail = float(torch.linalg.svdvals(whole)[to:].square().sum())
        assert left(*lowrank._bilinear(queries, keys, factor, torch.linalg.inv(factor), to)) == pytest.approx(tail, rel=1e-6, abs=1e-12)  # fmt: skip
        u, s, v = torch.linalg.svd(queries.T @ keys)
        assert tail <= left((u[:, :to] * s[:to]).T, v[:to]), "not better than without the inputs"


def test_the_linear_map_is_the_closest_for_the_inputs() -> None:
    torch.manual_seed(1)
    weight = torch.randn(12, 6, dtype=torch.float64)
    x = torch.randn(500, 6, dtype=torch.float64) * torch.logspace(0, -2, 6, dtype=torch.float64)
    covariance = x.T @ x / len(x)
    onto, end = lowrank._linear(weight, covariance, 2)

    def left(made: torch.Tensor) -> float:
        return float((x @ (made - weight).T).square().sum(-1).mean())

    factor = torch.linalg.cholesky(covariance)
    assert left(end @ onto) == pytest.approx(float(torch.linalg.svdvals(weight @ factor)[2:].square().sum()), rel=1e-2)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    assert left(end @ onto) < left(u[:, :2] * s[:2] @ v[:2])


def test_means_are_kept(make_vit: Callable[..., Any]) -> None:
    """What is lost of the values is their spread: on the whole, the output's mean stays where it was."""
    attn = make_vit(double=True).blocks[1].attn
    x = torch.randn(64, 9, 48, dtype=torch.float64) + 1
    want = attn(x).detach().mean((0, 1))
    made = reduced(attn, x, 4)
    spread = float((attn(x).detach() - want).std())
    assert float((made(x).detach().mean((0, 1)) - want).abs().max()) < 0.2 * spread


def test_what_proj_reads_varies_as_much_as_before(make_vit: Callable[..., Any]) -> None:
    """So that ranges of the dense model's inputs are right for int8 layers of lower rank."""
    attn, x = make_vit(double=True).blocks[0].attn, torch.randn(8, 17, 48, dtype=torch.float64)
    seen: list[torch.Tensor] = []
    attn.proj.register_forward_pre_hook(lambda _, z: seen.append(z[0]))
    attn(x)
    reduced(attn, x, 8)(x)
    dense, low = seen[0], seen[-1]
    for h in range(3):
        before, after = dense[..., 16 * h : 16 * h + 16], low[..., 8 * h : 8 * h + 8]
        spread = [own.flatten(0, 1).var(0).mean().sqrt() for own in (before, after)]
        assert 0.5 < spread[1] / spread[0] < 2


@pytest.mark.parametrize("dims, want", [(8, (8,)), (16, (8, 16)), (32, (8, 16, 24, 32)), (64, (16, 32, 48, 64)), (80, (24, 40, 64, 80))])  # fmt: skip
def test_ranks_are_on_the_grid(dims: int, want: tuple[int, ...]) -> None:
    found = lowrank.ranks(dims)
    assert found[-1] == dims and found[:-1] == tuple(n for n in found[:-1] if n % 8 == 0 and n < dims)
    assert len(found) == len(want)


# Plans --------------------------------------------------------------------------------------


def test_shapes_and_plans_have_ranks(tiny_vit: Any, tmp_path: Path) -> None:
    plan = vit.plan_of_shape(SHAPE)
    assert plan.shape == SHAPE and [rank(row) for row in SHAPE] == [8, None, 12]
    planned = artifact.PlannedModel("vit_tiny_patch16_224", {}, 5, plan, 1.0, 2.0)
    artifact.write_plan(planned, tmp_path / "plan.json")
    assert artifact.read_plan(tmp_path / "plan.json").plan == plan
    document = json.loads((tmp_path / "plan.json").read_text())
    document["blocks"][0]["rank"] = "low"
    (tmp_path / "plan.json").write_text(json.dumps(document))
    with pytest.raises(UsageError, match="plan is damaged"):
        artifact.read_plan(tmp_path / "plan.json")
    sizes = vit.anatomy(tiny_vit)
    assert vit.macs(sizes, SHAPE) < vit.macs(sizes, tuple(row[:2] for row in SHAPE))


@pytest.mark.parametrize("row", [(3, 24, 0, 0, 16), (0, 24, 0, 0, 8), (3, 24, 0, 0, 99)])
def test_impossible_ranks_are_refused(tiny_vit: Any, row: tuple[int, ...]) -> None:
    with pytest.raises(
        UsageError, match="block 0 of the plan: a rank must be a number from 1 to 15, of heads that stay"
    ):
        structure.of(tiny_vit, vit.plan_of_shape((row, (3, 24), (3, 24))))


@pytest.mark.parametrize("architecture, kwargs", [("vit_tiny_patch16_224", {"qk_norm": True}), ("beit_base_patch16_224", {})])  # fmt: skip
def test_heads_that_cannot_be_reduced_are_left_alone(
    make_vit: Callable[..., Any], architecture: str, kwargs: dict[str, Any]
) -> None:
    model = make_vit(architecture, **kwargs)
    sizes = vit.anatomy(model)
    assert not sizes.bilinear
    with pytest.raises(UsageError, match="normed or turned before they meet"):
        vit.check_plan(vit.plan_of_shape(((3, 24, 0, 0, 8),) * 3), sizes)
    with pytest.raises(UsageError, match=r"normed or turned before they meet.*choose --dims mlp"):
        vit.choosable(("mlp", "qk"), sizes)


@pytest.mark.parametrize("shape", [SHAPE, ((2, 16, 9, 3, 8), (3, 24, 0, 0, 8), (1, 24, 4, 1, 12))], ids=["ranks", "all"])  # fmt: skip
def test_the_graph_equals_torch_in_both_runtimes(tiny_vit: Any, tmp_path: Path, shape: Any) -> None:
    plan, found = vit.plan_of_shape(shape), calibrated(tiny_vit)
    model = recovery.lower_ranks(vit.anatomy(tiny_vit), vit.slice_model(tiny_vit, plan), plan, found)
    again = structure.of(tiny_vit, plan)
    quantisation.mark(model, plan)
    quantisation.calibrate(model, found.batches)
    again.load_state_dict(model.state_dict(), strict=True)
    export.to_onnx(again, (3, 32, 32), tmp_path / "exported.onnx")
    simplify.simplify(tmp_path / "exported.onnx", tmp_path / "model.onnx", again)
    images = torch.cat(found.batches)
    with torch.no_grad():
        want = model(images).numpy()
        torch.testing.assert_close(again(images).numpy(), want)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    import openvino  # not above: a test elsewhere needs it not yet loaded

    compiled = openvino.Core().compile_model(str(tmp_path / "model.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for run in (lambda x: session.run(None, {"pixels": x})[0], lambda x: compiled({0: x})[0]):
        got = np.concatenate([run(x[None].numpy()) for x in images])
        if plan.quantised:
            assert (got.argmax(1) == want.argmax(1)).mean() >= 0.9
        else:
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


# The solver ---------------------------------------------------------------------------------


def task_of(model: Any, table: LatencyTable = TABLE, dims: tuple[str, ...] = (*config.WIDTHS, "qk")) -> allocators.Task:
    return allocators.task(calibrated(model), table, ((3, 24),) * 3, model, model, 0.0, 0, parts.SILENT, dims)


def test_attentions_that_stay_may_have_lower_ranks(tiny_vit: Any) -> None:
    task = task_of(tiny_vit)
    assert task.counts[0] == (0, 1, 2, 3, 1, 2, 3) and [form.rank for form in task.forms[0]] == [None] * 4 + [8] * 3
    np.testing.assert_allclose(task.costs[0][4:], 0.6 * task.costs[0][1:4])
    assert task.counts[1] == TABLE.stages[0].mlp_widths
    assert task_of(tiny_vit, dims=config.WIDTHS).forms == [] == task_of(tiny_vit, parts.TABLE).forms


def test_the_error_of_a_rank_is_twice_its_divergence(tiny_vit: Any) -> None:
    task = task_of(tiny_vit)
    judge, _ = search.judges(task)
    found = _forms.weighed(task, judge)
    images = torch.cat(task.found.batches)[: len(judge.wanted)]
    plan = vit.plan_of_shape(((3, 24), (3, 24, 0, 0, 8), (3, 24)))
    own = recovery.lower_ranks(task.sizes, vit.slice_model(tiny_vit, plan), plan, task.found)
    with torch.no_grad():
        want, got = tiny_vit(images).log_softmax(-1), own(images).log_softmax(-1)
    extra = 2 * float(F.kl_div(got, want, log_target=True, reduction="batchmean"))
    assert extra > 0
    np.testing.assert_allclose(found.errors[2][4:], task.errors[2][1:4] + extra, rtol=1e-3)


@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_plans_have_ranks_within_the_budget(tiny_vit: Any, seconds: float) -> None:
    task = replace(task_of(tiny_vit), seconds=seconds)
    room = 0.6 * task.cost(task.dense)
    plan = task.plan(search.prepare(task)(room))
    assert TABLE.predict_ms(plan.shape) <= TABLE.base_ms + room + 1e-6
    vit.check_plan(plan, task.sizes)


# The table ----------------------------------------------------------------------------------


def measured(ms: float) -> Measurement:
    samples = np.full(12, ms)
    anchor, both = np.full(12, 12.0), np.stack([samples, samples])
    return Measurement("x", samples, anchor, ms / 12, (ms / 12,) * 2, both, np.zeros((2, 12)), anchor)


def made(forms: dict[Form, dict[int, Measurement]], **more: Any) -> LatencyTable:
    """4 blocks, 3 heads, 64 neurons, 12 ms; attention takes 4 of them, MLPs 6."""
    attn, mlp = {0: measured(8.0), 1: measured(9.0), 2: measured(10.5)}, {0: measured(6.0)}
    stage = tables.Measured(4, 3, 64, attn, mlp, attn_forms=forms, head_dim=16)
    return tables.build_table(
        [stage], measured(2.5), {}, dense_ms=12.0, runtime="null", precision="fp32", threads=1, **more
    )  # fmt: skip


FORMS = {RANK8: {1: measured(8.8), 3: measured(10.0)}, Form(rank=4): {1: measured(8.6), 3: measured(9.0)}}


def test_an_attention_of_lower_rank_has_prices_of_its_own() -> None:
    table = made(FORMS)
    assert table.stages[0].ranks == (4, 8) and table.ranked and not made({}).ranked
    np.testing.assert_allclose(table.stages[0].attn_forms[RANK8], [0, 0.2, 0.35, 0.5], atol=1e-12)
    assert table.predict_ms(((3, 64, 0, 0, 8), *((3, 64),) * 3)) == pytest.approx(11.5)
    assert table.predict_ms(((2, 64, 0, 0, 4), *((3, 64),) * 3)) == pytest.approx(12 - 1 + 0.2)
    again = tables.table_from_json(json.loads(json.dumps(tables.table_to_json(table))))
    assert again.stages[0].ranks == (4, 8) and again.predict_ms(((3, 64, 0, 0, 8),) * 4) == pytest.approx(10.0)
    with pytest.raises(ValueError, match=r"attn in the form rank12 was not measured"):
        table.predict_ms(((3, 64, 0, 0, 12), *((3, 64),) * 3))


ROWS = ((3, 64, 0, 0, 8), (2, 64), (1, 64, 0, 0, 4), (0, 64), (3, 0), (3, 0, 0, 0, 4))
MIXED = [
    tuple(ROWS[i] for i in at)
    for at in ((0, 1, 2, 3), (0, 0, 4, 4), (5, 1, 0, 3), (1, 1, 3, 4), (2, 5, 5, 1), (0, 2, 4, 5))
]


@pytest.mark.parametrize("surplus", [0.03, -0.03])
def test_a_form_costs_a_surplus_where_plans_have_several(surplus: float) -> None:
    """Of 0.2 ms more, prices 1.1 times what they were, and some for each sub-block of a form; never less for it."""
    plain = made(FORMS)
    formed = [sum(len(row) > 2 for row in plan) for plan in MIXED]
    found = {plan: 0.2 + 1.1 * plain.predict_ms(plan) + surplus * n for plan, n in zip(MIXED, formed, strict=True)}
    table = tables.fitted(plain, found)
    assert table.stages[0].attn_forms[RANK8][0] == 0
    held_out = (ROWS[5], ROWS[0], ROWS[1], ROWS[3])
    if surplus > 0:
        assert table.fit["surplus_ms"] == pytest.approx(surplus)
        assert table.predict_ms(held_out) == pytest.approx(0.2 + 1.1 * plain.predict_ms(held_out) + 2 * surplus)
    else:
        assert table.fit["surplus_ms"] == 0
        np.testing.assert_allclose(
            table.stages[0].attn_forms[RANK8], table.fit["scale"] * plain.stages[0].attn_forms[RANK8]
        )


def test_forms_have_token_shares_of_their_own() -> None:
    """Attention alone takes 3.5 ms more than nothing, of rank 4 1.4; with half of the patches a half, and 0.3."""
    int8 = Form(int8=True)
    fewer = {8: (measured(2.5 + 1.75), measured(7.0)), 12: (measured(2.5 + 2.8), measured(9.0))}
    formed = {("attn", Form(rank=4)): {8: measured(2.5 + 0.42), 16: measured(2.5 + 1.4)},
              ("attn", int8): {8: measured(2.5 + 1.25), 16: measured(2.5 + 2.0)}}  # fmt: skip
    forms = {**FORMS, int8: {3: measured(10.0)}, Form(True, 8): {3: measured(9.5)}}
    table = made(forms, fewer=fewer, fewer_forms=formed, patches=16)
    np.testing.assert_allclose(table.share("attn"), [0.5, 0.8, 1])
    np.testing.assert_allclose(table.share("attn", Form(rank=4)), [0.5 * 0.6, 0.8 * 0.8, 1])
    np.testing.assert_allclose(table.share("attn", int8), [0.5 * 1.25, 0.8 * 1.125, 1])
    factor = 1 - 0.4 * (16 - 8) / (16 - 4)
    np.testing.assert_allclose(table.share("attn", RANK8)[0], 0.5 * factor)
    np.testing.assert_allclose(table.share("attn", Form(True, 8))[0], 0.5 * 1.25 * factor)
    again = tables.table_from_json(json.loads(json.dumps(tables.table_to_json(table))))
    np.testing.assert_allclose(again.share("attn", RANK8), table.share("attn", RANK8))


def test_a_table_without_ranks_is_read_as_before() -> None:
    document = tables.table_to_json(made({}))
    del document["stages"][0]["attn_forms"]
    assert not tables.table_from_json(document).ranked


@pytest.mark.parametrize("change", [{"rank8": [0, 1, 0.5, 2]}, {"rank8": [0.5, 1]}, {"rank0": [0, 1, 1, 2]}, {"rank8.5": [0, 1, 1, 2]}, {"rank8": 2.0}])  # fmt: skip
def test_damaged_ranks_are_refused(change: dict[str, Any]) -> None:
    document = tables.table_to_json(made(FORMS))
    document["stages"][0]["attn_forms"] |= change
    with pytest.raises(UsageError, match="damaged"):
        tables.table_from_json(document)


def test_models_of_lower_rank_are_measured(tiny_vit: Any, tmp_path: Path) -> None:
    found = shapes.form_models(tiny_vit, [(0, 24)], ("qk",), tmp_path, parts.SILENT)
    assert [entry.name for entry in found] == ["heads1.rank8", "heads3.rank8"]
    both = shapes.forms(("qk", "precision"), 64)
    assert [*map(str, both)] == [
        "rank16",
        "rank32",
        "rank48",
        "int8",
        "int8.rank16",
        "int8.rank32",
        "int8.rank48",
    ] and [Form.named(str(form)) for form in both] == both
    some = shapes.random_shapes(20, vit.anatomy(tiny_vit), [(0, 8, 24)], (0,), (7, 16), ("qk",))
    assert 4 <= sum(any(map(rank, shape)) for shape in some) <= 10


# Recovery -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(recoveries.names()) - {"lora"}))
def test_every_recovery_ends_in_the_plans_ranks(tiny_vit: Any, name: str) -> None:
    plan, found = vit.plan_of_shape(SHAPE), calibrated(tiny_vit)
    damage = Damage(tiny_vit, tiny_vit, plan, found, 0, parts.SILENT)
    pruned = recovery.lower_ranks(vit.anatomy(tiny_vit), recoveries.get(name).recover(damage), plan, found)
    structure.of(tiny_vit, plan).load_state_dict(pruned.state_dict(), strict=True)
    assert [vit.sub_block(block, "attn").head_dim for block in pruned.blocks] == [8, 16, 12]
    assert bool(pruned(torch.cat(found.batches)).isfinite().all())


def test_from_scratch_nothing_of_the_dense_model_is_left_in_lower_ranks(tiny_vit: Any) -> None:
    plan, found = vit.plan_of_shape(SHAPE), calibrated(tiny_vit)
    other = replace(found, inputs={i: (mean + 1, 2 * cov) for i, (mean, cov) in found.inputs.items()})
    made = [
        recovery.lower_ranks(
            vit.anatomy(tiny_vit), recoveries.get("scratch").recover(Damage(tiny_vit, tiny_vit, plan, own, 0, parts.SILENT)), plan, own
        )
        for own in (found, other)
    ]  # fmt: skip
    for one, same in zip(made[0].parameters(), made[1].parameters(), strict=True):
        assert torch.equal(one, same)


def test_the_refit_helps_where_ranks_are_low(tiny_vit: Any) -> None:
    plan, found = vit.plan_of_shape(((3, 24, 0, 0, 2),) * 3), calibrated(tiny_vit, 160)
    plain = recovery.lower_ranks(vit.anatomy(tiny_vit), vit.slice_model(tiny_vit, plan), plan, found)
    damage = Damage(tiny_vit, tiny_vit, plan, found, 0, parts.SILENT)
    refitted = recoveries.get("refit").recover(damage)
    images = parts.images(80, seed=2)
    assert parts.divergence(refitted, tiny_vit, images, 20) < parts.divergence(plain, tiny_vit, images, 20)


@pytest.mark.parametrize("asked, words", [({"gradual": True}, "in dense shape and float; leave qk out"), ({"recovery": "lora"}, "tunes adapters of the dense weights; leave qk out")])  # fmt: skip
def test_what_goes_with_no_ranks_is_refused(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        api.request("digits", latency="2x", target="cpu-avx2", dims="mlp,qk", **asked)
