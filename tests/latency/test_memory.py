"""python -m pytest tests/latency/test_memory.py"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edgeprune.console import SILENT
from edgeprune.latency import device, memory, statistics
from edgeprune.latency.memory import Remembered
from edgeprune.stages import profile
from edgeprune.types import Measurement


def test_only_a_quieter_latency_is_kept(tmp_path: Path) -> None:
    assert memory.recall(tmp_path, "a") is None
    for ms, kept in ((10.0, 10.0), (11.0, 10.0), (9.0, 9.0)):
        memory.remember(tmp_path, "a", ms)
        found = memory.recall(tmp_path, "a")
        assert found is not None
        assert found.ms == kept
    memory.remember(tmp_path, "b", 5.0)
    assert set(json.loads((tmp_path / memory.FILE).read_text())) == {"a", "b", "sha256"}
    assert [path.name for path in tmp_path.iterdir()] == [memory.FILE]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"a": 3}',
        '{"a": {"ms": "x", "when": 1}}',
        '{"a": {"ms": 0, "when": 1}}',
        '{"a": {"ms": NaN, "when": 1}}',
    ],
)
def test_a_damaged_memory_is_none_and_is_written_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / memory.FILE).write_text(text)
    assert memory.recall(tmp_path, "a") is None
    memory.remember(tmp_path, "a", 3.0)
    assert memory.recall(tmp_path, "a") is not None


def test_the_key_is_of_all_that_the_latency_depends_on(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    keys = [
        memory.key(tmp_path / "a", {"cpu": "x"}, {"threads": 1}),
        memory.key(tmp_path / "b", {"cpu": "x"}, {"threads": 1}),
        memory.key(tmp_path / "a", {"cpu": "y"}, {"threads": 1}),
        memory.key(tmp_path / "a", {"cpu": "x"}, {"threads": 2}),
    ]
    assert len(set(keys)) == 4
    assert keys[0] == memory.key(tmp_path / "a", {"cpu": "x"}, {"threads": 1})


def measured(level: float, rounds: int = 100) -> dict[str, Measurement]:
    """A model of ratio 0.3 on a device `level` times as slow as at its quietest, where the anchor takes 10 ms."""
    noise = 1 + 0.005 * np.random.default_rng(0).standard_normal((2, rounds))
    samples = np.array([[3 * level * (1 + 0.35 * (level - 1))], [10 * level]]) * noise
    waited = np.zeros_like(samples)
    return {"half": statistics.judged("half", samples, waited, statistics.levels(samples[1], waited[1]))}


def test_a_first_profile_stands_on_its_own_quiet_latency() -> None:
    _, quiet, how = profile.settle([measured(1.05)], None, 0, SILENT)
    assert quiet.ms == pytest.approx(10.5, rel=0.005)
    assert how.startswith("the median of")


def test_a_slightly_slower_device_is_profiled_as_it_was_at_its_quietest() -> None:
    [found], quiet, how = profile.settle([measured(1.05)], Remembered(10.0, "a better day"), 0, SILENT)
    assert quiet.ms == 10.0
    assert found["half"].ratio == pytest.approx(0.3, rel=0.005)
    assert "a better day" in how


def test_a_much_slower_device_stands_on_what_it_is_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    [found], quiet, how = profile.settle([measured(1.3)], Remembered(10.0, "a better day"), 0, SILENT)
    assert quiet.ms == pytest.approx(13, rel=0.005)
    assert found["half"].calm
    assert "a better day" not in how
    assert "30% slower than it was on a better day" in capsys.readouterr().err


def test_a_machine_that_is_too_busy_is_profiled_as_it_is_and_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    busy = measured(1.0)
    busy["half"].waited_ms[1, 5:] = 4.0
    busy["half"].level_ms[8:] = np.inf
    [found], quiet, _ = profile.settle([busy], None, 0, SILENT)
    assert not found["half"].calm, "so that it is not remembered"
    assert quiet.ms == pytest.approx(10, rel=0.005)
    assert "this machine is busy: for 1 of 1 models" in capsys.readouterr().err


def test_a_quieter_device_than_ever_sets_the_mark() -> None:
    _, quiet, how = profile.settle([measured(0.97)], Remembered(10.0, "a worse day"), 0, SILENT)
    assert quiet.ms == pytest.approx(9.7, rel=0.005)
    assert how.startswith("the median of")


def test_groups_are_settled_together() -> None:
    """One anchor's latency for all; the rounds of a group are its own."""
    groups, quiet, _ = profile.settle([measured(1.0), measured(1.02, rounds=70)], None, 0, SILENT)
    assert quiet.ms == pytest.approx(10, rel=0.005)
    assert [len(group["half"].raw_ms[0]) for group in groups] == [100, 70]
    assert [group["half"].ratio for group in groups] == pytest.approx([0.3, 0.3], rel=0.01)


def test_models_are_loaded_in_groups_that_fit(tmp_path: Path) -> None:
    models = {}
    for name, size in (("a", 10), ("b", 20), ("c", 5), ("d", 200), ("e", 1)):
        models[name] = tmp_path / name
        models[name].write_bytes(b"x" * size)
    room = 30 * device.LOADED
    assert [list(group) for group in profile.grouped(models, room)] == [["a", "b"], ["c"], ["d"], ["e"]]
    assert [list(group) for group in profile.grouped(models, float("inf"))] == [list("abcde")]
    assert profile.table_room(None) == profile.TABLE_BYTES == profile.table_room(1 << 50)
    assert profile.table_room(1 << 20) == 1 << 19
