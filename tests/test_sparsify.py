"""python -m pytest tests/test_sparsify.py

The stage in which schedules train, on the small card: real data, a measured table.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small
import torch

from edgeprune import api, artifact, pipeline, schedules, vit
from edgeprune.config import Request
from edgeprune.errors import Infeasible, UsageError
from edgeprune.stages import baseline, profile, prune
from edgeprune.types import Latency

TRAINING = [name for name in schedules.names() if name != schedules.DEFAULT]


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> Request:
    root = tmp_path_factory.mktemp("sparsify")
    (root / "small.toml").write_text(small.CARD)
    (root / "here.toml").write_text(small.TARGET)
    small.random_weights(root / "small.safetensors")
    made, _ = api.request(
        str(root / "small.toml"), target=str(root / "here.toml"), latency="1.7x", runtime="onnxruntime", epochs=0.7
    )
    return made


def sparsified(request: Request, cache: Path) -> dict[str, pipeline.Done]:
    with small.quick():
        stages = [s for s in pipeline.stages_of(request) if s.name in ("baseline", "profile", "sparsify", "calibrate")]
        return pipeline.run_stages(stages, request, cache)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("name", [n if n == "granet" else pytest.param(n, marks=pytest.mark.slow) for n in TRAINING])
def test_a_schedule_ends_within_the_latency_on_real_data(request_: Request, cache: Path, name: str) -> None:
    request = replace(request_, schedule=name, criterion="l2", allocator="p3b" if name == "p3b" else "ranking")
    done = sparsified(request, cache)
    _, table = profile.read_profile(done["profile"].folder)
    planned = artifact.read_plan(done["sparsify"].folder / "plan.json")
    limit = request.latency.limit_ms(table.dense_ms)
    assert 0.7 * limit < table.predict_ms(planned.plan.shape) <= prune.AIM * limit + 1e-9
    assert planned.limit_ms == pytest.approx(limit)
    model = artifact.rebuild(planned, done["sparsify"].folder / "model.safetensors")
    dense = baseline.load(request, done["baseline"].folder)
    assert not torch.equal(model.head.weight, dense.model.head.weight), "it was trained"
    history = artifact.read_json(done["sparsify"].folder / "sparsify.json")
    steps = -(-int(0.9 * len(dense.splits.train)) // 32) * 0.7 * schedules.SHARE
    assert len(history["losses"]) == pytest.approx(steps, abs=2)
    parent, bounds = baseline.parent(dense, {"sparsify": done["sparsify"].folder})
    assert bounds == planned.plan and vit.anatomy(parent) == dense.sizes


def test_a_latency_that_the_dense_model_meets_trains_nothing(request_: Request, cache: Path) -> None:
    request = replace(request_, schedule="gradual", latency=Latency("3s", ms=3000.0))
    done = sparsified(request, cache)
    planned = artifact.read_plan(done["sparsify"].folder / "plan.json")
    assert planned.plan == vit.dense_plan(baseline.load(request, done["baseline"].folder).sizes)
    assert artifact.read_json(done["sparsify"].folder / "sparsify.json")["losses"] == []


def test_what_cannot_be_reached_is_said_before_training(request_: Request, cache: Path, monkeypatch: Any) -> None:
    from edgeprune.stages import sparsify

    monkeypatch.setattr(sparsify, "fit", lambda *_, **__: pytest.fail("it trained"))
    with pytest.raises(Infeasible, match="the lowest that small can reach on here is about"):
        sparsified(replace(request_, schedule="gradual", latency=Latency("1us", ms=1e-3)), cache)


def test_a_schedule_needs_epochs(request_: Request) -> None:
    none = replace(request_.card, finetune=replace(request_.card.finetune, epochs=(0.0,)))
    with pytest.raises(
        UsageError, match="the schedule 'granet' trains, but 0 epochs were asked for; give --epochs, or"
    ):
        pipeline.check_request(replace(request_, schedule="granet", card=none))
