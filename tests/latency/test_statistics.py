"""python -m pytest tests/latency/test_statistics.py"""

from __future__ import annotations

import numpy as np
import pytest

from edgeprune.latency import statistics
from edgeprune.types import Measurement


def measurement(rounds: int = 200, drift: float = 1.0, ratio: float = 0.5) -> Measurement:
    """A candidate at `ratio` of an anchor of 10 ms, on a machine that slows down by `drift` for both."""
    rng, noise = np.random.default_rng(3), 0.05
    anchor = 10 * drift * np.exp(noise * rng.standard_normal(rounds))
    candidate = 10 * ratio * drift * np.exp(noise * rng.standard_normal(rounds))
    return statistics.summarise(["anchor", "candidate"], np.stack([anchor, candidate]), 0)[1]


def test_the_interval_covers_the_true_median_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    values = 1 + 0.1 * rng.standard_normal((300, 61))
    intervals = statistics.bootstrap_median_ci(values)
    covered = np.mean((intervals[:, 0] <= 1) & (intervals[:, 1] >= 1))
    assert 0.89 < covered < 0.99


def test_intervals_narrow_with_rounds_and_repeat_with_the_seed() -> None:
    few, many = measurement(50), measurement(800)
    assert statistics.half_width(many) < statistics.half_width(few)
    assert measurement(50).ratio_ci == few.ratio_ci


def test_drift_that_hits_candidate_and_anchor_cancels() -> None:
    wave = 1 + 0.4 * np.sin(np.arange(120) / 9)
    noise = 1 + 0.01 * np.random.default_rng(1).standard_normal(120)
    samples = np.stack([10 * wave, 7 * wave * noise])
    assert statistics.summarise(["a", "b"], samples, 0)[1].ratio == pytest.approx(0.7, rel=0.01)


def test_the_anchor_is_one() -> None:
    [anchor] = statistics.summarise(["a"], np.random.default_rng(0).uniform(1, 2, (1, 30)), 0)
    assert (anchor.ratio, anchor.ratio_ci) == (1.0, (1.0, 1.0))


@pytest.mark.parametrize(("rounds", "p90", "p99"), [(63, False, False), (64, True, False), (662, True, True)])
def test_tails_need_samples(rounds: int, p90: bool, p99: bool) -> None:
    latency = statistics.latency_ms(measurement(rounds), 10.0)
    assert (latency["p90"] is not None, latency["p99"] is not None) == (p90, p99)
    assert latency["samples"] == rounds
    ci = statistics.quantile_ci_ms(measurement(rounds), 10.0, "p90")
    assert (ci is not None) == p90


def test_tails_are_corrected_for_drift_since_the_profile() -> None:
    calm, throttled = measurement(300), measurement(300, drift=1.6)
    p90 = statistics.quantile_ms(calm, 10.0, "p90")
    assert p90 is not None and p90 > 5.0
    assert statistics.quantile_ms(throttled, 10.0, "p90") == pytest.approx(p90)
    low, high = statistics.quantile_ci_ms(calm, 10.0, "p90") or (0, 0)
    assert low < p90 < high


@pytest.mark.parametrize(
    ("ci", "expected"), [((8, 9), "pass"), ((9, 10), "pass"), ((9, 11), "inconclusive"), ((10.1, 11), "fail")]
)
def test_verdict(ci: tuple[float, float], expected: str) -> None:
    assert statistics.verdict(ci, 10) == expected
