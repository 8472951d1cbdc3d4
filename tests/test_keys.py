"""python -m pytest tests/test_keys.py

What a stage's result depends on is in its key: which stages an option makes run again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import small

from edgeprune import api, pipeline
from edgeprune.config import Request

READ = {stage.name: "0" * 64 for stage in pipeline.PIPELINE}


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("keys")
    (root / "small.toml").write_text(small.CARD)
    (root / "here.toml").write_text(small.TARGET)
    small.random_weights(root / "small.safetensors")
    return root / "small.toml"


def request_of(card: Path, **options: Any) -> Request:
    made, _ = api.request(str(card), target=str(card.with_name("here.toml")), **{"latency": "2x", **options})
    return made


def keys(request: Request) -> Mapping[str, str]:
    """The key of every stage, whatever the stages before it have made."""
    return {stage.name: pipeline.stage_key(stage, request, READ) for stage in pipeline.PIPELINE}


@pytest.mark.parametrize(
    ("options", "again"),
    [
        ({}, set()),
        ({"latency": "3x"}, {"sparsify", "prune"}),
        ({"seed": 1}, {"baseline", "profile", "sparsify", "calibrate", "prune", "finetune", "roofline", "inspect"}),
        ({"reducer": "tome"}, {"profile", "prune", "finetune", "export", "simplify"}),
        ({"dims": "heads,mlp,depth"}, {"profile", "sparsify", "prune", "finetune", "export", "simplify"}),
        ({"dims": "heads,mlp,tokens"}, {"profile", "sparsify", "prune"}),
        ({"criterion": "ziplm"}, {"sparsify", "calibrate"}),
        # it knows widths only, so that tokens need not be measured either
        ({"allocator": "knapsack"}, {"profile", "sparsify", "prune", "finetune", "export", "simplify"}),
        ({"recovery": "none"}, {"prune", "finetune"}),
        ({"schedule": "gradual"}, {"sparsify", "finetune"}),
        ({"epochs": 2}, {"sparsify", "finetune"}),
        ({"search_seconds": 3}, {"prune"}),
        ({"polish": 1}, {"prune"}),
        ({"quantile": "p90"}, {"sparsify", "prune", "validate"}),
        ({"max_drop": 1}, {"validate"}),
        ({"strict_clock": True}, {"validate"}),
        ({"selection": "balanced"}, {"baseline"}),
        ({"tune_on": 0.5}, {"baseline"}),
        ({"runtime": "onnxruntime"}, {"profile", "compile"}),
        ({"threads": 1}, {"profile"}),
    ],
)
def test_an_option_runs_again_what_it_changes(card: Path, options: dict[str, Any], again: set[str]) -> None:
    before, after = keys(request_of(card)), keys(request_of(card, **options))
    changed = {name for name in before if before[name] != after[name]}
    # Another device key may come with other threads: what depends on the device says so.
    assert changed - again <= ({"roofline"} if "threads" in options else set())
    assert again <= changed


def test_the_source_of_the_parts_is_in_the_keys(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edited reducer is another reducer."""
    before = keys(request_of(card, reducer="tome"))
    own = pipeline.code_key
    monkeypatch.setattr(pipeline, "code_key", lambda module: own(module) + "x" * module.endswith("reducers.tome"))
    after = keys(request_of(card, reducer="tome"))
    assert {name for name in before if before[name] != after[name]} == {
        "profile",
        "prune",
        "finetune",
        "export",
        "simplify",
    }


def test_the_source_of_the_families_is_in_the_keys() -> None:
    """They are found by their names, which no import says."""
    from edgeprune import anatomies

    named = pipeline.BY_NAME["edgeprune.anatomies"]
    assert {f"edgeprune.anatomies.{name}" for name in anatomies.names()} <= set(named)


def test_weights_of_a_local_folder_are_told_apart(tmp_path: Path) -> None:
    from dataclasses import replace

    from edgeprune import config

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"one")
    card = replace(config.load_card("digits"), architecture=f"local-dir:{folder}", weights="hub")
    made = replace(api.request("digits", target="cpu-avx2", latency="2x")[0], card=card)
    before = keys(made)["baseline"]
    (folder / "model.safetensors").write_bytes(b"another")
    assert keys(made)["baseline"] != before


def test_a_link_to_nothing_in_the_data_has_a_key(tmp_path: Path) -> None:
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    assert pipeline.files_key(str(tmp_path))
