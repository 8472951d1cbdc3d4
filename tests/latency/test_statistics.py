"""python -m pytest tests/latency/test_statistics.py"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgeprune.latency import statistics
from edgeprune.types import Measurement, Quiet


def turns(samples: Any, waited: Any = None, copies: Any = None) -> statistics.Turns:
    """Of models `[models, rounds]`, of which the first is the anchor, once a round."""
    beside = np.zeros(len(samples), dtype=int)
    waited = np.zeros_like(samples) if waited is None else waited
    copies = np.zeros(samples.shape, dtype=int) if copies is None else copies
    level = np.broadcast_to(statistics.levels(samples[0], waited[0]), samples.shape)
    ms, waits, which = (np.stack([own, own[beside]]) for own in (samples, waited, copies))
    return statistics.Turns(ms, waits, level, which)


def measurement(rounds: int = 200, drift: float = 1.0, ratio: float = 0.5) -> Measurement:
    """A candidate at `ratio` of an anchor of 10 ms, on a machine that slows down by `drift` for both."""
    rng, noise = np.random.default_rng(3), 0.05
    anchor = 10 * drift * np.exp(noise * rng.standard_normal(rounds))
    candidate = 10 * ratio * drift * np.exp(noise * rng.standard_normal(rounds))
    return statistics.summarise(["anchor", "candidate"], turns(np.stack([anchor, candidate])))[1]


def test_the_interval_covers_the_true_median_about_95_times_in_100() -> None:
    rng = np.random.default_rng(0)
    values = 1 + 0.1 * rng.standard_normal((300, 61))
    intervals = np.array([statistics.bootstrap_median_ci(row) for row in values])
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
    assert statistics.summarise(["a", "b"], turns(samples))[1].ratio == pytest.approx(0.7, rel=0.01)


def test_the_anchor_is_one() -> None:
    [anchor] = statistics.summarise(["a"], turns(np.random.default_rng(0).uniform(1, 2, (1, 30))))
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


# Which rounds count -------------------------------------------------------------------------


def two(rounds: int = 200, noise: float = 0.01, level: Any = 1.0, seed: int = 0) -> Any:
    """Anchor of 10 ms and a candidate of 3 ms `[2, rounds]`; `level`: how many times as long the anchor takes."""
    rng = np.random.default_rng(seed)
    level = np.broadcast_to(level, rounds)
    slowed = 3 * level * (1 + 0.5 * 0.7 * (level - 1))
    return np.stack([10 * level, slowed]) * (1 + noise * rng.standard_normal((2, rounds)))


def test_runs_that_waited_for_a_cpu_do_not_count() -> None:
    """Another process takes a core in every other round, from the anchor or the candidate at random."""
    rng = np.random.default_rng(1)
    samples, waited = two(), np.zeros((2, 200))
    for which in rng.integers(0, 2, 100):
        at = rng.integers(0, 200)
        samples[which, at] += 8
        waited[which, at] = 8
    candidate = statistics.summarise(["a", "b"], turns(samples, waited))[1]
    assert candidate.ratio == pytest.approx(0.3, rel=0.005)
    assert candidate.samples_ms.max() < 4
    assert candidate.raw_ms.shape == candidate.waited_ms.shape == (2, 200)
    assert len(candidate.samples_ms) == int((waited.max(axis=0) == 0).sum())


def test_a_little_housekeeping_is_no_disturbance() -> None:
    ms = np.array([1.0, 1.0, 10.0, 10.0])
    assert statistics.undisturbed(ms, np.array([0.04, 0.06, 0.15, 0.25])).tolist() == [True, False, True, False]


def test_slow_stretches_do_not_count_and_leave_no_trace() -> None:
    level = np.where(np.arange(200) < 80, 1.0, 1.3)
    candidate = statistics.summarise(["a", "b"], turns(two(level=level)), quiet=Quiet(10.0))[1]
    assert candidate.calm
    assert 70 <= len(candidate.samples_ms) <= 84
    assert candidate.ratio == pytest.approx(0.3, rel=0.005)


def test_a_slightly_slower_device_is_corrected_to_the_quiet_one() -> None:
    """All rounds 6 % slower: they count, and the shifted ratio is brought back."""
    samples = two(level=1.06)
    assert np.median(samples[1] / samples[0]) == pytest.approx(0.3 * 1.021, rel=0.003)
    candidate = statistics.summarise(["a", "b"], turns(samples), quiet=Quiet(10.0, slope=0.5))[1]
    assert len(candidate.samples_ms) == 200
    assert candidate.ratio == pytest.approx(0.3, rel=0.003)
    assert candidate.doubt == pytest.approx(0.5 * 0.7 * 0.06, rel=0.1)
    low, high = candidate.ratio_ci
    assert low < 0.3 * (1 - 0.9 * candidate.doubt)
    assert high > np.median(samples[1] / samples[0]), "it passes only what would pass uncorrected"
    assert statistics.tight([candidate], 0.005), "more rounds would not remove the doubt"


def test_of_a_device_that_is_never_calm_the_calmest_rounds_count() -> None:
    """It is 30 % slower than its profile, and in most rounds twice as slow, where small models lose more."""
    level = np.where(np.arange(200) < 90, 1.3, 2.0)
    candidate = statistics.summarise(["a", "b"], turns(two(level=level)), quiet=Quiet(10.0))[1]
    assert not candidate.calm
    assert len(candidate.samples_ms) == 80
    assert candidate.ratio == pytest.approx(0.3 * (1 + 0.5 * 0.7 * 0.3), rel=0.01)
    assert candidate.raw_ms.shape == (2, 200)


def test_more_than_the_calmest_count_where_these_do_not_agree() -> None:
    """Nine rounds a third off in either direction say nothing; all 200 do."""
    level = np.where(np.arange(200) < 9, 1.3, 2.0)
    samples = two(level=level)
    samples[1] *= 1 + 0.8 * (np.random.default_rng(0).random(200) - 0.5)
    candidate = statistics.summarise(["a", "b"], turns(samples), quiet=Quiet(10.0))[1]
    assert 100 < len(candidate.samples_ms) <= 200


def test_where_hardly_a_round_is_undisturbed_all_count() -> None:
    waited = np.zeros((2, 200))
    waited[1, 7:] = 5
    assert len(statistics.summarise(["a", "b"], turns(two(), waited), quiet=Quiet(10.0))[1].samples_ms) == 200
    waited[1, :9] = 0
    assert len(statistics.summarise(["a", "b"], turns(two(), waited), quiet=Quiet(10.0))[1].samples_ms) == 8


def test_the_anchor_stays_one_whatever_the_level() -> None:
    anchor = statistics.summarise(["a", "b"], turns(two(level=np.linspace(1, 1.1, 200))), quiet=Quiet(10.0))[0]
    assert (anchor.ratio, anchor.ratio_ci) == (1.0, (1.0, 1.0))


def test_the_level_is_unknown_where_every_round_was_disturbed() -> None:
    good = np.ones(30, dtype=bool)
    good[5:20] = False
    level = statistics.levels(np.full(30, 10.0), np.where(good, 0.0, 9.0))
    assert np.isinf(level[8:17]).all()
    assert (level[[0, 5, 19, 29]] == 10).all()


def test_the_slope_is_found_when_the_level_varies_and_taken_as_usual_when_not() -> None:
    wave = 1 + 0.1 * (np.sin(np.arange(400) / 40) > 0)
    moving = statistics.summarise(["a", "b"], turns(two(400, level=wave))) * 20  # a profile has dozens of candidates
    assert statistics.fit_slope(moving, 10.0) == pytest.approx(0.5, abs=0.15)
    rigid = np.stack([10 * wave, 3 * wave])
    assert statistics.fit_slope(statistics.summarise(["a", "b"], turns(rigid)) * 20, 10.0) < 0.15
    still = statistics.summarise(["a", "b"], turns(two(400, noise=0.001)))
    assert statistics.fit_slope(still, 10.0) == pytest.approx(Quiet(10.0).slope, abs=0.05)


def test_calm_rounds_are_counted_as_they_are_summarised() -> None:
    level = np.where(np.arange(200) < 80, 1.0, 1.3)
    samples, waited = two(level=level), np.zeros((2, 200))
    waited[0, ::4] = 5
    found = statistics.summarise(["a", "b"], turns(samples, waited), quiet=Quiet(10.0))[1]
    assert statistics.calm_count(turns(samples, waited), Quiet(10.0)) == len(found.samples_ms)


# Luck, and milliseconds as they are ---------------------------------------------------------


def test_copies_that_differ_widen_the_interval() -> None:
    """Four copies of the candidate, a per cent apart: more rounds do not remove what the choice of copies left."""
    samples, copies = two(800), np.zeros((2, 800), dtype=np.int64)
    copies[1] = np.arange(800) % 4
    samples[1] *= 1 + 0.01 * (copies[1] - 1.5)
    alone = statistics.summarise(["a", "b"], turns(samples))[1]
    found = statistics.summarise(["a", "b"], turns(samples, copies=copies))[1]
    assert alone.doubt == 0
    assert found.doubt == pytest.approx(0.01 * np.std([0, 1, 2, 3], ddof=1) / 2, rel=0.2)
    assert statistics.half_width(found) > statistics.half_width(alone) + 0.9 * found.doubt
    assert found.ratio == alone.ratio


def test_one_copy_has_no_luck_to_tell() -> None:
    assert statistics.luck(np.array([1.0, 2.0, 3.0]), np.zeros(3, dtype=np.int64)) == 0


def test_here_and_now_the_samples_count_as_they_are() -> None:
    """On another device the anchor's latency is not known better than the candidate's own."""
    found = measurement(300, drift=1.6)
    assert statistics.quantile_ms(found, None, "p50") == pytest.approx(float(np.median(found.samples_ms)))
    low, high = statistics.quantile_ci_ms(found, None, "p50") or (0, 0)
    assert low < float(np.median(found.samples_ms)) < high
    assert high - low > 10 * 1.6 * 0.5 * 0.005, "the scatter of the samples themselves, not of the ratio"
    assert statistics.latency_ms(found, None)["samples"] == 300


def test_the_slope_is_not_drawn_to_zero_by_the_noise_of_the_anchor() -> None:
    """A ratio has the anchor below the line: a round must not be compared with a level that holds itself."""
    still = statistics.summarise(["a", "b"], turns(two(400, noise=0.03))) * 20
    assert statistics.fit_slope(still, 10.0) > 0.25
