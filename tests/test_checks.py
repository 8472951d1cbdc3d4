"""python -m pytest tests/test_checks.py

What a second look at an artifact's accuracy decides. (Latency verdicts: tests/latency/test_statistics.py.)
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from edgeprune import checks, errors, recheck
from edgeprune.types import Check


def manifest(dense: float = 90.0, pruned: float = 88.0, max_drop: float | None = None, images: int = 1000) -> Any:
    return {
        "dense": {"accuracy": dense}, "pruned": {"accuracy": pruned, "latency_ms": {"p50": None}},
        "accuracy": {"images": images}, "request": {"max_drop": max_drop},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(0, 10, 0.0, 27.75), (5, 10, 23.66, 76.34), (10, 10, 72.25, 100.0), (880, 1000, 85.84, 89.87), (1, 1, 20.65, 100)],
)
def test_wilsons_interval(right: int, total: int, low: float, high: float) -> None:
    """Against the closed form worked out by hand and tables of it."""
    assert checks.wilson(right, total) == pytest.approx((low, high), abs=0.01)


def test_the_drops_interval_is_agrestis_and_mins() -> None:
    """By hand: 30 lost and 10 gained of 998, half an image more in each cell, so 1,000 with 40 + 1 that changed."""
    low, high = checks.drop_interval(np.repeat([1.0, -1.0, 0.0], [30, 10, 958]))
    margin = 1.96 * ((41 / 1000 - 0.02**2) / 1000) ** 0.5
    assert (low, high) == pytest.approx((0.02 - margin, 0.02 + margin))


@pytest.mark.parametrize("images", [1, 60, 599, 10_000])
def test_no_changed_answer_is_no_proof_that_there_is_none(images: int) -> None:
    low, high = checks.drop_interval(np.zeros(images))
    assert low < 0 < high and high == pytest.approx(-low) and high == pytest.approx(1.96 / (images + 2))


@pytest.mark.parametrize("lost, gained", [(1, 0), (0, 1), (7, 3), (20, 20)])
def test_the_drops_interval_holds_what_was_seen(lost: int, gained: int) -> None:
    low, high = checks.drop_interval(np.repeat([1.0, -1.0, 0.0], [lost, gained, 60 - lost - gained]))
    assert low < (lost - gained) / 60 < high


@pytest.mark.parametrize("total", [1, 7, 599, 10_000])
def test_the_interval_holds_what_was_seen_and_stays_within_all_and_none(total: int) -> None:
    for right in {0, 1, total // 3, total - 1, total}:
        low, high = checks.wilson(right, total)
        assert 0 <= low <= 100 * right / total <= high <= 100


def test_the_recorded_accuracy_seen_again_passes() -> None:
    facts, gates = recheck.recheck_accuracy(manifest(), 880, 1000, "here")
    assert facts == {
        "accuracy": 88.0, "images": 1000, "interval": list(checks.wilson(880, 1000)), "recorded": 88.0, "dense": 90.0,
        "source": "here",
    }  # fmt: skip
    [gate] = gates
    assert (gate.name, gate.value, gate.limit, gate.verdict) == ("accuracy", 88.0, 88.0, "pass")
    assert "88.00 % of 1000 images (here), 95 % interval 85.84 to 89.87 %" in gate.reason


@pytest.mark.parametrize(
    ("right", "verdict"), [(100, "fail"), (840, "fail"), (862, "pass"), (880, "pass"), (990, "pass")]
)
def test_accuracy_fails_only_where_the_whole_interval_is_below(right: int, verdict: str) -> None:
    _, [gate] = recheck.recheck_accuracy(manifest(), right, 1000, "here")
    assert gate.verdict == verdict
    assert (checks.wilson(right, 1000)[1] < 88.0) == (verdict == "fail")


@pytest.mark.parametrize(("right", "verdict"), [(870, "pass"), (860, "pass"), (859, "fail")])
def test_the_drop_is_exact_on_the_images_of_the_build(right: int, verdict: str) -> None:
    _, gates = recheck.recheck_accuracy(manifest(max_drop=4.0), right, 1000, "here")
    drop = gates[1]
    assert (drop.name, drop.limit, drop.verdict) == ("accuracy drop", 4.0, verdict)
    assert drop.value == pytest.approx(90.0 - right / 10)
    assert "on as many images as at build" in drop.reason


@pytest.mark.parametrize(("right", "verdict"), [(99, "pass"), (86, "inconclusive"), (60, "fail")])
def test_the_drop_on_other_images_may_be_undecided(right: int, verdict: str) -> None:
    _, gates = recheck.recheck_accuracy(manifest(max_drop=4.0), right, 100, "elsewhere")
    assert gates[1].verdict == verdict
    assert "points on other images" in gates[1].reason


def test_right_answers_are_counted_over_batches() -> None:
    class Parrot:
        def predict(self, name: str, pixels: np.ndarray) -> np.ndarray:
            return np.eye(3)[pixels[:, 0]]

    batches = [(np.array([[0], [1]]), np.array([0, 2])), (np.array([[2]]), np.array([2]))]
    assert recheck.measured_accuracy(Parrot(), "pruned", batches) == (2, 3)  # type: ignore[arg-type]
    with pytest.raises(errors.UsageError, match="none of the evaluation images can be read"):
        recheck.measured_accuracy(Parrot(), "pruned", [])  # type: ignore[arg-type]


# The table ----------------------------------------------------------------------------------


def found(*gates: Check) -> dict[str, Any]:
    return {
        "artifact": "out/[x]", "files": 9, "target": "board", "cpu": "a CPU",
        "worker": {"runtime": "openvino", "version": "1", "threads": 2}, "checks": [asdict(gate) for gate in gates],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("verdicts", "word"),
    [(("pass", "pass"), "PASS"), (("pass", "inconclusive"), "INCONCLUSIVE"), (("inconclusive", "fail"), "FAIL")],
)
def test_the_table_has_units_and_one_verdict(capsys: pytest.CaptureFixture[str], verdicts: Any, word: str) -> None:
    latency = Check("latency p90", 9.123, 10.0, verdicts[0], "so [it] is")
    recheck.show(found(latency, Check("accuracy", 88.0, 88.5, verdicts[1], "seen")))
    text = capsys.readouterr().out
    assert "out/[x]: openvino 1, 2 threads" in text
    for part in (
        "9.12 ms",
        "<= 10.00 ms",
        "so [it] is",
        "88.00 %",
        ">= 88.50 %",
        "9 files have their hashes; target board",
    ):
        assert part in text
    assert text.splitlines()[-1] == word


def test_the_table_of_what_could_not_be_measured_and_of_small_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    recheck.show(
        found(
            Check("latency p99", None, 0.033712, "inconclusive", "few"), Check("accuracy drop", -0.1, 0.0, "pass", "ok")
        )
    )
    text = capsys.readouterr().out
    assert "–" in text
    for part in ("<= 0.0337 ms", "-0.10 points", "<= 0.00 points"):
        assert part in text
