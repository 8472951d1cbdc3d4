"""python -m pytest tests/test_recoveries.py

Recoveries against their formulas, written out, and the adapters that tuning trains instead of weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import parts
import pytest
import small
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from edgeprune import adapters, api, artifact, pipeline, publish, recoveries, vit
from edgeprune.artifact import PlannedModel
from edgeprune.config import Request
from edgeprune.console import SILENT
from edgeprune.errors import UsageError
from edgeprune.pipeline import Done
from edgeprune.recoveries import scratch
from edgeprune.stages import baseline, finetune
from edgeprune.tuning.loop import fit
from edgeprune.types import BlockPlan, Plan

#: Block 0 keeps a head and 8 neurons, block 1 no attention, block 2 no MLP.
HARSH = Plan((BlockPlan((1,), tuple(range(0, 24, 3))), BlockPlan((), tuple(range(8, 24))), BlockPlan((0, 2), ())))
#: Where HARSH removes some units and not all.
PLACES = [(0, "attn"), (0, "mlp"), (1, "mlp"), (2, "attn")]


def pixels(count: int = 24, seed: int = 1) -> torch.Tensor:
    """By default those that `parts.damage` calibrates on."""
    return torch.stack([image for image, _ in parts.images(count, seed=seed)])


def recover(name: str, damage: recoveries.Damage) -> Any:
    return recoveries.get(name).recover(damage)


def kept_of(at: tuple[int, str]) -> tuple[list[int], list[int]]:
    """The input columns of the sub-block's last layer that HARSH keeps and removes."""
    units, count, size = (HARSH.blocks[at[0]].heads, 3, 16) if at[1] == "attn" else (HARSH.blocks[at[0]].neurons, 24, 1)
    columns = [(u, u * size + d) for u in range(count) for d in range(size)]
    return [column for u, column in columns if u in units], [column for u, column in columns if u not in units]


# Bias ---------------------------------------------------------------------------------------


def test_bias_takes_up_the_mean_of_what_is_removed(tiny_vit: Any) -> None:
    pruned, sliced = recover("bias", parts.damage(tiny_vit, HARSH)), vit.slice_model(tiny_vit, HARSH)
    biases = set()
    for i in range(3):
        for kind in vit.KINDS:
            seen: list[np.ndarray] = []
            layer = vit.output_layer(tiny_vit.blocks[i], kind)
            hook = layer.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0].double().numpy()))
            with torch.no_grad():
                tiny_vit(pixels())
            hook.remove()
            mean = seen[0].reshape(-1, seen[0].shape[-1]).mean(0)
            want = layer.bias.detach().double().numpy().copy()
            for column in kept_of((i, kind))[1]:
                want += layer.weight[:, column].detach().double().numpy() * mean[column]
            removed = isinstance(vit.sub_block(pruned.blocks[i], kind), vit.RemovedSubBlock)
            name = f"blocks.{i}.{kind}." + ("bias" if removed else "proj.bias" if kind == "attn" else "fc2.bias")
            np.testing.assert_allclose(pruned.state_dict()[name].numpy(), want, rtol=1e-4, atol=1e-6)
            biases.add(name)
    for name, value in sliced.state_dict().items():
        assert torch.equal(value, pruned.state_dict()[name]) == (name not in biases), name


def test_bias_keeps_the_mean_of_the_first_pruned_sub_block(tiny_vit: Any) -> None:
    """Whose inputs pruning has not changed yet."""
    pruned, sliced = recover("bias", parts.damage(tiny_vit, HARSH)), vit.slice_model(tiny_vit, HARSH)
    with torch.no_grad():
        x = vit.embed(tiny_vit, pixels())
        want, have, worse = (vit.call(m.blocks[0], "attn", x).mean((0, 1)) for m in (tiny_vit, pruned, sliced))
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(worse, want, atol=1e-2)


# UDFC ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", PLACES)
@pytest.mark.parametrize("kwargs", [{}, {"qkv_bias": False}])
def test_udfc_is_its_formula(make_vit: Callable[..., Any], at: tuple[int, str], kwargs: dict[str, Any]) -> None:
    """One removed row after another."""
    model = make_vit(**kwargs)
    pruned = recover("udfc", parts.damage(model, HARSH))
    i, kind = at
    block: Any = model.blocks[i]
    norm = block.norm1 if kind == "attn" else block.norm2
    first = block.attn.qkv if kind == "attn" else block.mlp.fc1
    from_, columns = (2 * 48, 48) if kind == "attn" else (0, 24)  # the rows of the values are the last
    rows = []
    for row in range(from_, from_ + columns):
        w = first.weight[row].detach().double().numpy()
        b = 0.0 if first.bias is None else first.bias[row].item()
        rows.append([*(w * norm.weight.detach().double().numpy()), b + w @ norm.bias.detach().double().numpy()])
    every = np.array(rows)
    kept, gone = kept_of(at)
    m = every[kept].T  # [width + 1, kept]
    ridge = 1e-2 * np.mean([column @ column for column in m.T])
    last = block.attn.proj if kind == "attn" else block.mlp.fc2
    weight = last.weight.detach().double().numpy()
    want = weight[:, kept].copy()
    for j in gone:
        s = np.linalg.inv(m.T @ m + ridge * np.eye(len(kept))) @ m.T @ every[j]
        for position in range(len(kept)):
            want[:, position] += s[position] * weight[:, j]
    have = vit.output_layer(pruned.blocks[i], kind)  # type: ignore[arg-type]
    np.testing.assert_allclose(have.weight.detach().numpy(), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(have.bias, last.bias)


def test_udfc_changes_nothing_but_last_layers(tiny_vit: Any) -> None:
    pruned, sliced = recover("udfc", parts.damage(tiny_vit, HARSH)), vit.slice_model(tiny_vit, HARSH)
    changed = {k for k, v in sliced.state_dict().items() if not torch.equal(v, pruned.state_dict()[k])}
    assert changed == {f"blocks.{i}.{'attn.proj' if kind == 'attn' else 'mlp.fc2'}.weight" for i, kind in PLACES}


def test_udfc_replaces_a_neuron_by_its_double(tiny_vit: Any) -> None:
    """Neurons 1 and 2 are neuron 0 again, so nothing is lost but to the ridge."""
    plan = Plan((BlockPlan((0, 1, 2), (0, *range(3, 24))), *vit.dense_plan(vit.anatomy(tiny_vit)).blocks[1:]))
    mlp = tiny_vit.blocks[0].mlp
    with torch.no_grad():
        mlp.fc1.weight[1:3], mlp.fc1.bias[1:3] = mlp.fc1.weight[0], mlp.fc1.bias[0]
        x = pixels()
        want = tiny_vit(x)
        have, worse = recover("udfc", parts.damage(tiny_vit, plan))(x), vit.slice_model(tiny_vit, plan)(x)
    assert (have - want).square().sum() < 0.01 * (worse - want).square().sum()


# Scratch ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "kwargs"),
    [("vit_tiny_patch16_224", {"init_values": 0.3, "reg_tokens": 2, "qk_norm": True}), ("deit_tiny_distilled_patch16_224", {})],
)  # fmt: skip
def test_scratch_is_drawn_as_timm_draws(
    make_vit: Callable[..., Any], architecture: str, kwargs: dict[str, Any]
) -> None:
    """Constants alike, and what is random spread alike, tensor by tensor; nothing of the dense model is left."""
    dense = make_vit(architecture, **kwargs)
    fresh = recover("scratch", parts.damage(dense, HARSH)).state_dict()
    with torch.random.fork_rng():
        torch.manual_seed(7)
        timms = vit.slice_model(vit.create(architecture, {**small_kwargs(), **kwargs}, 5), HARSH).state_dict()
    sliced = vit.slice_model(dense, HARSH).state_dict()
    assert fresh.keys() == timms.keys()
    for name, value in fresh.items():
        want = timms[name]
        assert not torch.equal(value, sliced[name]), name
        if value.numel() > 1 and float(want.std()) == 0:
            assert torch.equal(value, want), name
        else:
            assert not torch.equal(value, want), name
            assert float(value.std()) == pytest.approx(float(want.std()), rel=0.5), name
            assert abs(float(value.mean())) < 5 * float(want.std()) / value.numel() ** 0.5, name


def small_kwargs() -> dict[str, Any]:
    return {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "mlp_ratio": 0.5}


def test_scratch_follows_its_seed_alone(tiny_vit: Any) -> None:
    damage = parts.damage(tiny_vit, HARSH)
    before = torch.get_rng_state()
    scratch.initialise(copy.deepcopy(tiny_vit), 0)
    assert torch.equal(torch.get_rng_state(), before)
    first, second = recover("scratch", damage), recover("scratch", replace(damage, seed=1))
    assert not torch.equal(first.blocks[0].mlp.fc1.weight, second.blocks[0].mlp.fc1.weight)


def test_scratch_refuses_what_timm_would_leave_as_it_was(tiny_vit: Any) -> None:
    tiny_vit.blocks[1].extra = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(UsageError, match=r"timm does not initialise blocks\.1\.extra\.0 of this model"):
        recover("scratch", parts.damage(tiny_vit, HARSH))


# LoRA ---------------------------------------------------------------------------------------


def test_lora_leaves_the_weights_alone_and_tunes_adapters(tiny_vit: Any) -> None:
    pruned, sliced = recover("lora", parts.damage(tiny_vit, HARSH)), vit.slice_model(tiny_vit, HARSH)
    assert all(torch.equal(v, pruned.state_dict()[k]) for k, v in sliced.state_dict().items())
    tuned = {name: recoveries.get(name).TUNES for name in recoveries.names()}
    assert tuned["lora"] == "adapters" and tuned["bias"] == tuned["udfc"] == tuned["scratch"] == "weights"


# Adapters -----------------------------------------------------------------------------------

ADAPTED = [
    "blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2",
    "blocks.2.attn.qkv", "blocks.2.attn.proj",
]  # fmt: skip
RECIPE = replace(parts.RECIPE, epochs=(2.0,), learning_rate=1e-2)


def learn(model: Any) -> None:
    """Any values for what is trainable."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def student_of(dense: Any, rank: int = 2, seed: int = 0) -> Any:
    student = vit.slice_model(dense, HARSH)
    adapters.attach(student, rank, seed)
    return student


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_adapters_change_nothing_at_first_and_take_all_gradients(
    make_vit: Callable[..., Any], architecture: str
) -> None:
    dense = make_vit(architecture)
    sliced, student = vit.slice_model(dense, HARSH), student_of(dense)
    x = pixels(8)
    with torch.no_grad():
        assert torch.equal(student(x), sliced(x))
    assert [name for name, _ in adapters.attached(student)] == ADAPTED
    learn(student)  # as long as B is zero A has no gradient
    with torch.no_grad():
        assert not torch.allclose(student(x), sliced(x), atol=1e-2)
    F.cross_entropy(student(x), torch.arange(8) % 5).backward()
    has = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert all(bool(parameter.grad.any()) for parameter in student.parameters() if parameter.grad is not None)
    wanted = {f"{name}.parametrizations.weight.0.{factor}" for name in ADAPTED for factor in "ab"}
    assert has == wanted | {name for name, _ in sliced.named_parameters() if name.startswith("head")}


def test_an_adapter_is_its_formula(tiny_vit: Any) -> None:
    student = student_of(tiny_vit, rank=3)
    learn(student)
    layer = student.blocks[0].mlp.fc1
    a, b = (getattr(layer.parametrizations.weight[0], name).detach().numpy() for name in "ab")
    assert a.shape == (3, 48) and b.shape == (8, 3)
    want = vit.slice_model(tiny_vit, HARSH).blocks[0].mlp.fc1.weight.detach().numpy().copy()
    for row in range(8):
        for column in range(48):
            want[row, column] += 16 / 3 * sum(b[row, r] * a[r, column] for r in range(3))
    np.testing.assert_allclose(layer.weight.detach().numpy(), want, rtol=1e-5, atol=1e-6)


def test_adapters_follow_their_seed(tiny_vit: Any) -> None:
    first, again, other = (student_of(tiny_vit, seed=seed).state_dict() for seed in (0, 0, 1))
    key = "blocks.0.mlp.fc1.parametrizations.weight.0.a"
    assert torch.equal(first[key], again[key]) and not torch.equal(first[key], other[key])


def test_merging_leaves_a_plain_model_that_does_the_same(tiny_vit: Any) -> None:
    sliced, student = vit.slice_model(tiny_vit, HARSH), student_of(tiny_vit)
    learn(student)
    with torch.no_grad():
        want = student(pixels(8))
        adapters.merge(student)
        torch.testing.assert_close(student(pixels(8)), want)
    assert student.state_dict().keys() == sliced.state_dict().keys()
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert {type(m) for m in student.modules()} == {type(m) for m in sliced.modules()}
    assert not list(adapters.attached(student))
    copy.deepcopy(student)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_tuning_changes_adapters_and_the_head_alone(tiny_vit: Any, precision: str) -> None:
    """With a search for the rate, a moving average and checks, all of which copy weights about."""
    sliced, student = vit.slice_model(tiny_vit, HARSH), student_of(tiny_vit)
    images, check = parts.images(40), parts.images(12, seed=9)
    before = parts.divergence(student, tiny_vit, check, 8)
    recipe = replace(RECIPE, epochs=(30.0,), precision=precision, learning_rate_search=True, ema=0.9)
    history = fit(student, images, recipe, parts.CONFIG, teacher=tiny_vit, check=check)
    after = parts.divergence(student, tiny_vit, check, 8)
    assert history.precision == precision and len(history.checks) > 0
    assert after < 0.8 * before and after == pytest.approx(min(value for _, value in history.checks), rel=1e-3)
    original = {k.replace("parametrizations.weight.original", "weight"): v for k, v in student.state_dict().items()}
    same = {k for k, v in sliced.state_dict().items() if torch.equal(v, original[k])}
    assert same == {k for k in sliced.state_dict() if not k.startswith("head")}
    adapters.merge(student)
    assert parts.divergence(student, tiny_vit, check, 8) == pytest.approx(after, rel=1e-4)
    changed = {k for k, v in sliced.state_dict().items() if not torch.equal(v, student.state_dict()[k])}
    assert changed == {f"{name}.weight" for name in ADAPTED} | {"head.weight", "head.bias"}


def test_a_model_is_rebuilt_from_base_plan_and_adapters(tiny_vit: Any, tmp_path: Path) -> None:
    student = student_of(tiny_vit)
    fit(student, parts.images(40), RECIPE, parts.CONFIG, teacher=tiny_vit)
    adapters.save(student, tiny_vit, HARSH, tmp_path / "adapters.safetensors")
    adapters.merge(student)
    saved = load_file(tmp_path / "adapters.safetensors")
    learnt = {f"{name}.{factor}" for name in ADAPTED for factor in "ab"}
    assert set(saved) == learnt | {"head.weight", "head.bias", "scale"}
    assert sum(v.numel() for v in saved.values()) < 0.2 * vit.parameters(student)
    rebuilt = adapters.rebuild(tiny_vit, HARSH, tmp_path / "adapters.safetensors")
    assert not rebuilt.training and rebuilt.state_dict().keys() == student.state_dict().keys()
    for name, value in student.state_dict().items():
        torch.testing.assert_close(rebuilt.state_dict()[name], value, rtol=1e-6, atol=1e-7)


def test_whatever_else_differs_from_the_base_model_is_saved_whole(tiny_vit: Any, tmp_path: Path) -> None:
    """As after polishing, or a schedule that trained; adapters that learnt nothing are left out."""
    student = vit.slice_model(tiny_vit, HARSH)
    with torch.no_grad():
        student.blocks[0].mlp.fc1.weight.mul_(2)
        student.norm.bias.add_(1)
    adapters.attach(student, 2)
    with torch.no_grad():
        student.blocks[0].mlp.fc1.parametrizations.weight[0].b.fill_(0.1)
    adapters.save(student, tiny_vit, HARSH, tmp_path / "adapters.safetensors")
    own = {f"blocks.0.mlp.fc1.{name}" for name in ("a", "b", "weight")}
    assert set(load_file(tmp_path / "adapters.safetensors")) == own | {"norm.bias", "scale"}
    adapters.merge(student)
    rebuilt = adapters.rebuild(tiny_vit, HARSH, tmp_path / "adapters.safetensors")
    for name, value in student.state_dict().items():
        torch.testing.assert_close(rebuilt.state_dict()[name], value, rtol=1e-6, atol=1e-7)


def test_adapters_of_another_plan_are_refused(tiny_vit: Any, tmp_path: Path) -> None:
    path = tmp_path / "adapters.safetensors"
    student = student_of(tiny_vit)
    learn(student)
    adapters.save(student, tiny_vit, HARSH, path)
    with pytest.raises(UsageError, match=r"the adapter of blocks\.0\.attn\.proj in .* does not fit the plan"):
        adapters.rebuild(tiny_vit, vit.dense_plan(vit.anatomy(tiny_vit)), path)
    saved = load_file(path)
    save_file({k: v for k, v in saved.items() if k != "blocks.0.mlp.fc2.b"}, path)
    with pytest.raises(UsageError, match=r"the adapter of blocks\.0\.mlp\.fc2 in"):
        adapters.rebuild(tiny_vit, HARSH, path)
    save_file({**saved, "stray": torch.zeros(1)}, path)
    with pytest.raises(UsageError, match="stray is unknown to the model"):
        adapters.rebuild(tiny_vit, HARSH, path)
    save_file({k: v for k, v in saved.items() if k != "scale"}, path)
    with pytest.raises(UsageError, match="holds no adapters"):
        adapters.rebuild(tiny_vit, HARSH, path)


# The stage ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> Request:
    """The small card on digits, its weights random."""
    root = tmp_path_factory.mktemp("lora")
    (root / "small.toml").write_text(small.CARD)
    (root / "here.toml").write_text(small.TARGET)
    small.random_weights(root / "small.safetensors")
    made, _ = api.request(str(root / "small.toml"), target=str(root / "here.toml"), latency="2x", recovery="lora")
    return replace(made, card=replace(made.card, finetune=replace(made.card.finetune, epochs=(0.25,))))


def finetuned(request: Request, root: Path) -> tuple[Any, Plan, Path]:
    """The dense model, the plan, and what the stage wrote."""
    plan = Plan((BlockPlan((1,), tuple(range(0, 192, 3))), BlockPlan((), tuple(range(96))), BlockPlan((0, 2), ())))
    folders = {name: root / name for name in ("baseline", "prune", "finetune")}
    for folder in folders.values():
        folder.mkdir()
    dense = baseline.load_source(request.card, None)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.mul_(3)  # else a random model is the same whatever is removed from it, and nothing is tuned
    save_file(dense.state_dict(), folders["baseline"] / "dense.safetensors")
    (folders["baseline"] / "baseline.json").write_text('{"num_classes": 10}')
    save_file(vit.slice_model(dense, plan).state_dict(), folders["prune"] / "pruned.safetensors")
    planned = PlannedModel(request.card.architecture, request.card.kwargs, 10, plan, 1.0, 1.0)
    artifact.write_plan(planned, folders["prune"] / "plan.json")
    finetune.run(request, folders, folders["finetune"], SILENT)
    return dense, plan, folders["finetune"]


def test_the_stage_writes_plain_weights_and_what_adapters_learnt(request_: Request, tmp_path: Path) -> None:
    dense, plan, out = finetuned(request_, tmp_path)
    planned = artifact.read_plan(out / "plan.json")
    tuned = artifact.rebuild(planned, out / "model.safetensors")
    assert artifact.read_json(out / "finetune.json")["losses"]
    base = vit.slice_model(dense, plan).state_dict()
    changed = {k for k, v in tuned.state_dict().items() if not torch.equal(v, base[k])}
    assert changed == {f"{name}.weight" for name in ADAPTED} | {"head.weight", "head.bias"}
    rebuilt = adapters.rebuild(dense, plan, out / "adapters.safetensors").state_dict()
    for name, value in tuned.state_dict().items():
        torch.testing.assert_close(rebuilt[name], value, rtol=1e-6, atol=1e-7)
    assert (out / "adapters.safetensors").stat().st_size < 0.5 * (out / "model.safetensors").stat().st_size


def test_without_epochs_adapters_learn_nothing(request_: Request, tmp_path: Path) -> None:
    idle = replace(request_, card=replace(request_.card, finetune=replace(request_.card.finetune, epochs=(0.0,))))
    dense, plan, out = finetuned(idle, tmp_path)
    assert set(load_file(out / "adapters.safetensors")) == {"scale"}
    base, left = vit.slice_model(dense, plan).state_dict(), load_file(out / "model.safetensors")
    assert left.keys() == base.keys() and all(torch.equal(v, left[k]) for k, v in base.items())


def test_other_recoveries_write_no_adapters(request_: Request, tmp_path: Path) -> None:
    _, _, out = finetuned(replace(request_, recovery="bias"), tmp_path)
    assert not (out / "adapters.safetensors").exists() and (out / "model.safetensors").exists()


@pytest.mark.parametrize("learnt", [True, False])
def test_the_file_is_published_if_there_is_one(
    request_: Request, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learnt: bool
) -> None:
    done = []
    for stage, files in (
        ("finetune", ["plan.json", "model.safetensors", *(["adapters.safetensors"] if learnt else [])]),
        ("profile", ["profile.json"]), ("compile", ["model.onnx"]), ("baseline", ["dense.onnx", "dense.safetensors"]),
        ("inspect", ["inspection.json"]), ("validate", ["validation.json"]),
    ):  # fmt: skip
        (tmp_path / stage).mkdir()
        for name in files:
            (tmp_path / stage / name).write_text("{}" if name == "inspection.json" else name)
        done.append(Done(stage, "key", tmp_path / stage, 1.0, False, "digest"))
    monkeypatch.setattr(publish, "write_anchor", lambda _, path: path.write_text("anchor"))
    monkeypatch.setattr(publish, "make_manifest", lambda *_: {})
    monkeypatch.setattr("edgeprune.report.markdown", lambda _: "report")
    monkeypatch.setattr("edgeprune.report.page.artifact_page", lambda *_: "page")
    monkeypatch.setattr("edgeprune.report.page.read", lambda *_: {})
    monkeypatch.setattr("edgeprune.provenance.sbom", lambda _: "sbom")
    monkeypatch.setattr("edgeprune.provenance.statement", lambda *_: "statement")
    made = publish.publish(request_, done, tmp_path / "artifact", {})
    assert ("adapters.safetensors" in made.manifest["files"]) == learnt
    assert (made.folder / "adapters.safetensors").exists() == learnt


def test_several_processes_are_refused_before_any_work(request_: Request, tmp_path: Path) -> None:
    pipeline.check_request(request_)
    (tmp_path / "accelerate.yaml").touch()
    for several in (replace(request_, processes=2), replace(request_, accelerate_config=tmp_path / "accelerate.yaml")):
        with pytest.raises(UsageError, match="the recovery 'lora' tunes adapters, and those in one process alone"):
            pipeline.check_request(several)
        pipeline.check_request(replace(several, recovery="refit"))
