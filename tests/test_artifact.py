"""python -m pytest tests/test_artifact.py"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from edgeprune import artifact, vit
from edgeprune.artifact import PlannedModel
from edgeprune.errors import StorageError, UsageError
from edgeprune.types import BlockPlan, Plan

HARSH = Plan((BlockPlan((1,), (1, 5, 9)), BlockPlan((), (0, 4)), BlockPlan((0, 2), ())))

units = st.sets(st.integers(0, 40)).map(lambda found: tuple(sorted(found)))
plans = st.lists(st.builds(BlockPlan, heads=units, neurons=units), min_size=1, max_size=4).map(
    lambda blocks: Plan(tuple(blocks))
)


def planned(plan: Plan = HARSH, kwargs: dict[str, Any] | None = None) -> PlannedModel:
    return PlannedModel("vit_tiny_patch16_224", kwargs or {}, 5, plan, 9.5, 10.0)


@pytest.fixture
def saved(tmp_path: Path, tiny_vit: Any, tiny_kwargs: dict[str, Any]) -> tuple[Path, Any]:
    """A folder with plan.json, model.safetensors and manifest.json, and the model that they hold."""
    model = vit.slice_model(tiny_vit, HARSH)
    artifact.write_plan(planned(kwargs=tiny_kwargs), tmp_path / "plan.json")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    files = {
        name: {"sha256": hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}
        for name in ("plan.json", "model.safetensors")
    }
    artifact.write_manifest(tmp_path, {"schema": artifact.MANIFEST_SCHEMA, "files": files})
    return tmp_path, model


# Plans --------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(plan=plans, ms=st.floats(1e-3, 1e6))
def test_a_plan_comes_back_byte_for_byte(tmp_path_factory: pytest.TempPathFactory, plan: Plan, ms: float) -> None:
    path = tmp_path_factory.getbasetemp() / "plan.json"
    one = PlannedModel("vit_x", {"img_size": 32, "init_values": 1e-5}, 7, plan, ms, 2 * ms)
    artifact.write_plan(one, path)
    text = path.read_bytes()
    read = artifact.read_plan(path)
    assert read == one
    artifact.write_plan(read, path)
    assert path.read_bytes() == text
    assert json.loads(text)["shape"] == [list(pair) for pair in plan.shape]


def test_a_plan_has_a_line_for_every_block(tmp_path: Path) -> None:
    artifact.write_plan(planned(), tmp_path / "plan.json")
    lines = (tmp_path / "plan.json").read_text().splitlines()
    assert sum('"heads"' in line and '"neurons"' in line for line in lines) == 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": "edgeprune.plan/2"}, "not a plan of schema edgeprune.plan/1 .*plan/2"),
        ({"schema": None}, "not a plan of schema"),
        ({"blocks": None}, "the plan is damaged"),
        ({"blocks": [{"heads": [0]}]}, "the plan is damaged .*neurons"),
        ({"blocks": [{"heads": "01", "neurons": []}]}, "lists of whole numbers"),
        ({"blocks": [{"heads": [True], "neurons": []}]}, "lists of whole numbers"),
        ({"blocks": [{"heads": [1.0], "neurons": []}]}, "lists of whole numbers"),
        ({"blocks": [7]}, "the plan is damaged"),
        ({"num_classes": "many"}, "the plan is damaged"),
        ({"kwargs": 3}, "the plan is damaged"),
        ({"predicted_ms": None}, "the plan is damaged"),
    ],
)
def test_a_damaged_plan_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = tmp_path / "plan.json"
    artifact.write_plan(planned(), path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UsageError, match=says) as error:
        artifact.read_plan(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b"7"])
def test_what_is_no_json_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"plan\.json (is not valid JSON|must hold a JSON object)"):
        artifact.read_plan(tmp_path / "plan.json")


def test_a_plan_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"plan\.json cannot be read"):
        artifact.read_plan(tmp_path / "plan.json")


# Rebuilding ---------------------------------------------------------------------------------


def test_plan_and_weights_make_the_model_again(saved: tuple[Path, Any], make_images: Callable[..., Any]) -> None:
    folder, model = saved
    images = make_images(2)
    rebuilt = artifact.rebuild(artifact.read_plan(folder / "plan.json"), folder / "model.safetensors")
    assert torch.equal(rebuilt(images), model(images)) and not rebuilt.training
    assert torch.equal(artifact.load(folder)(images), model(images))


def without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda s: {k: v for k, v in s.items() if k != name}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("blocks.0.attn.qkv.weight"), r"blocks\.0\.attn\.qkv\.weight is missing"),
        (without("blocks.1.attn.bias"), r"blocks\.1\.attn\.bias is missing"),
        (without("blocks.0.mlp.fc2.bias"), r"blocks\.0\.mlp\.fc2\.bias is missing"),
        (without("patch_embed.proj.bias"), r"patch_embed\.proj\.bias is missing"),
        (lambda s: {**s, "surplus": torch.zeros(1)}, "surplus is unknown"),
        (lambda s: {**s, "blocks.0.mlp.fc1.weight": torch.zeros(24, 48)}, r"is \(24, 48\), the model wants \(3, 48\)"),
        (lambda s: {**s, "blocks.2.mlp.bias": torch.zeros(1)}, r"is \(1,\), the model wants \(48,\)"),
    ],
)
def test_weights_that_do_not_fit_the_plan_are_refused(saved: tuple[Path, Any], change: Any, says: str) -> None:
    folder, model = saved
    save_file(change({k: v.contiguous() for k, v in model.state_dict().items()}), folder / "model.safetensors")
    with pytest.raises(UsageError, match=says):
        artifact.rebuild(artifact.read_plan(folder / "plan.json"), folder / "model.safetensors")


def test_a_plan_for_another_architecture_is_refused(saved: tuple[Path, Any], tiny_kwargs: dict[str, Any]) -> None:
    folder, _ = saved
    artifact.write_plan(planned(kwargs={**tiny_kwargs, "depth": 2}), folder / "plan.json")
    with pytest.raises(UsageError, match="the plan has 3 blocks, the model 2"):
        artifact.rebuild(artifact.read_plan(folder / "plan.json"), folder / "model.safetensors")


# Manifest -----------------------------------------------------------------------------------


def test_a_folder_without_a_manifest_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not an artifact"):
        artifact.load(tmp_path)


def test_a_manifest_of_another_schema_is_refused(saved: tuple[Path, Any]) -> None:
    (saved[0] / "manifest.json").write_text('{"schema": "other/1"}')
    with pytest.raises(UsageError, match=r"is not of schema edgeprune\.manifest/1"):
        artifact.read_manifest(saved[0])


def test_sound_files_pass(saved: tuple[Path, Any]) -> None:
    artifact.check_files(saved[0], artifact.read_manifest(saved[0]))


def test_changed_and_missing_files_are_all_named(saved: tuple[Path, Any]) -> None:
    folder = saved[0]
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    (folder / "plan.json").unlink()
    with pytest.raises(UsageError) as error:
        artifact.check_files(folder, artifact.read_manifest(folder))
    assert "model.safetensors has changed" in str(error.value) and "plan.json is missing" in str(error.value)
    with pytest.raises(UsageError, match=r"plan\.json is missing"):
        artifact.load(folder)


def test_a_file_that_the_manifest_does_not_know_is_not_used(saved: tuple[Path, Any]) -> None:
    folder = saved[0]
    manifest = artifact.read_manifest(folder)
    del manifest["files"]["plan.json"]
    artifact.write_manifest(folder, manifest)
    with pytest.raises(UsageError, match=r"plan\.json is not in the manifest"):
        artifact.load(folder)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/file", "..", ".", ""])
def test_names_outside_the_artifact_are_refused(saved: tuple[Path, Any], name: str) -> None:
    folder = saved[0]
    (folder.parent / "outside").write_text("x")
    manifest = {"files": {name: {"sha256": hashlib.sha256(b"x").hexdigest()}}}
    with pytest.raises(UsageError, match=r"outside the artifact|is missing"):
        artifact.check_files(folder, manifest)


@pytest.mark.parametrize("files", [None, [], {"plan.json": "no table"}, {"plan.json": {}}])
def test_a_manifest_with_damaged_files_is_refused(saved: tuple[Path, Any], files: Any) -> None:
    with pytest.raises(UsageError):
        artifact.check_files(saved[0], {"files": files})


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 1_000_000)
    assert artifact.sha256(tmp_path / "x") == hashlib.sha256(b"abc" * 1_000_000).hexdigest()
