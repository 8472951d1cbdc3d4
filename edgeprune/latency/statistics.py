"""Statistics of turn-by-turn timing: ratios, intervals, quantiles, verdicts. Pure numpy.

A candidate's latency is the median over rounds of its ratio to the anchor, times the anchor's latency
in the device profile. Not every round counts: a run whose threads waited for a CPU was disturbed by another
process, and a stretch in which the anchor is slow by something that nobody here can see (another tenant, heat).
The interval is a bootstrap over rounds: it knows nothing of drift that is slower than the whole
measurement, and takes rounds for independent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeprune.types import FloatArray, Measurement, Quiet, Verdict

RESAMPLES = 1000
#: Samples below which a tail quantile is not reported (MLPerf's early-stopping rule at 99 % confidence).
MIN_SAMPLES = {"p90": 64, "p99": 662}
#: A run is disturbed when its threads waited for a CPU for longer than this share of it, and than this.
WAITED = 0.02
WAITED_MS = 0.05
#: A run is calm when the anchor's running median is at most this share above its quiet latency.
CALM = 0.08
CALM_WINDOW = 7  # runs of the anchor
#: Calm rounds below which they do not speak for themselves.
FEWEST_CALM = 20
#: Of fewer, the calmest are taken: this share of those that were undisturbed, at least so many, and more until the
#: standard error of their median is at most this share of it.
CALMEST = 0.4
FEWEST_CALMEST = 8
STEADY = 0.02
#: Weight of the usual slope in `fit_slope`: it takes slow and quick stretches to outweigh it, noise does not.
SLOPE_PRIOR = 0.1
OUTLIER = 0.15
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def bootstrap_median_ci(values: FloatArray, seed: int = 0, resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the median of `values` `[rounds]`."""
    picks = np.random.default_rng(seed).integers(0, len(values), size=(resamples, len(values)))
    low, high = np.quantile(np.median(values[picks], axis=1), [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class Turns:
    """Timed runs of some models, and what each is compared with.

    Shapes: `ms`, `waited_ms` and `copies` are `[2, models, rounds]`: of the model, and of the anchor that ran beside it;
    waited_ms: how long the threads of each run waited for a CPU; copies: which copy of the model ran.
    level_ms: `[models, rounds]`, the anchor's running median at that time; see `levels`.
    """

    ms: FloatArray
    waited_ms: FloatArray
    level_ms: FloatArray
    copies: NDArray[np.int64]


class Record:
    """Collects the turns of a measurement, round by round."""

    def __init__(self, models: int, anchor: int) -> None:
        self._anchor = anchor
        self._ran = np.empty((3, 2, models, 0))  # as `Turns` has them
        self._beside = np.empty((models, 0), dtype=np.int64)  # which run of the anchor a model is compared with
        self._anchors = np.empty((2, 0))  # milliseconds and those waited of all its runs, in order of time

    def add(self, ran: FloatArray) -> None:
        """A round: `[3, parts, models]`, milliseconds, those waited, and the copy; NaN = not in this part. The anchor is in all."""
        part = np.argmin(np.isnan(ran[0]), axis=0)  # the anchor's own row has its first run
        pairs = np.stack([ran[:, part, np.arange(ran.shape[2])], ran[:, part, self._anchor]], axis=1)
        self._beside = np.column_stack([self._beside, self._anchors.shape[1] + part])
        self._ran = np.concatenate([self._ran, pairs[..., None]], axis=-1)
        self._anchors = np.concatenate([self._anchors, ran[:2, :, self._anchor]], axis=-1)

    @property
    def turns(self) -> Turns:
        ms, waited_ms, copies = self._ran
        return Turns(ms, waited_ms, levels(*self._anchors)[self._beside], copies.astype(np.int64))


def summarise(names: Sequence[str], turns: Turns, seed: int = 0, quiet: Quiet | None = None) -> list[Measurement]:
    """One Measurement per model.

    quiet: the anchor's quiet latency; only rounds as calm as that count, corrected to exactly that. None = all calm.
    """
    return [
        judged(name, turns.ms[:, i], turns.waited_ms[:, i], turns.level_ms[i], turns.copies[:, i], seed, quiet)
        for i, name in enumerate(names)
    ]


def judged(
    name: str,
    raw_ms: FloatArray,
    waited_ms: FloatArray,
    level_ms: FloatArray,
    copies: NDArray[np.int64] | None = None,
    seed: int = 0,
    quiet: Quiet | None = None,
) -> Measurement:
    """What the runs of a model and the anchor's beside them, `[2, rounds]`, say; see `Turns`. copies: None = there is one."""
    good = undisturbed(raw_ms, waited_ms).all(axis=0)
    still = np.isfinite(level_ms) if quiet is None else level_ms <= (1 + CALM) * quiet.ms
    mask, rounds = good & still, raw_ms.shape[1]
    calm = int(mask.sum()) >= min(FEWEST_CALM, rounds)
    mask = mask if calm else calmest(good & np.isfinite(level_ms), level_ms, raw_ms[0] / raw_ms[1])
    (own, anchor), doubt = raw_ms[:, mask], 0.0
    ratios = own / anchor
    if calm and quiet is not None:
        shifted = shift(float(np.median(ratios)), level_ms[mask], quiet)
        ratios = ratios / shifted
        # One slope serves all models and causes: for this one the correction may be wrong altogether.
        doubt = abs(float(np.median(shifted)) - 1)
    if copies is not None:
        doubt += math.hypot(*(luck(ratios, which) for which in copies[:, mask]))
    low, high = bootstrap_median_ci(ratios, seed)
    return Measurement(
        name=name,
        samples_ms=own,
        anchor_ms=anchor,
        ratio=float(np.median(ratios)),
        ratio_ci=(low * (1 - doubt), high * (1 + doubt)),
        doubt=doubt,
        raw_ms=raw_ms,
        waited_ms=waited_ms,
        level_ms=level_ms,
        calm=calm,
    )


def calmest(good: NDArray[np.bool_], level_ms: FloatArray, ratios: FloatArray) -> NDArray[np.bool_]:
    """Which of the rounds `[rounds]` to take from a machine that was never calm: of the good ones those of the lowest level.

    All of them where hardly any is good, and of those more where few do not agree about the ratio. On a machine that was
    calm in 20 to 46 % of the time, tables of 27 and 30 rounds predicted 20 plans with a median error of 2.1 and 2.3 % by two
    fifths of the rounds, and of 3.2 and 5.2 % by all. In an hour when the anchor took 37 to 55 ms, one of 27 rounds erred by
    10 % by two fifths, by 3 % by as many as make them steady, by 5 % by all.
    """
    known = np.flatnonzero(good)
    if len(known) < FEWEST_CALMEST:
        return np.ones(len(good), dtype=bool)
    order = known[np.argsort(level_ms[known], kind="stable")]
    few = max(FEWEST_CALMEST, round(CALMEST * len(known)))
    while few < len(order) and _standard_error(ratios[order[:few]]) > STEADY:
        few += 1
    mask = np.zeros(len(good), dtype=bool)
    mask[order[:few]] = True
    return mask


def _standard_error(values: FloatArray) -> float:
    """Of the median of `values` `[n]`, as a share of it, by their median absolute deviation as if they were normal."""
    median = float(np.median(values))
    deviation = 1.4826 * float(np.median(np.abs(values - median)))
    return math.sqrt(math.pi / 2 / len(values)) * deviation / median


def luck(ratios: FloatArray, copies: NDArray[np.int64]) -> float:
    """The standard error, as a share, that comes from having measured only these copies of a model.

    ratios: `[rounds]`; copies: which copy ran in each. From how far the copies' own medians are apart.
    """
    medians = [float(np.median(ratios[copies == copy])) for copy in np.unique(copies)]
    if len(medians) < 2:
        return 0.0
    return float(np.std(medians, ddof=1) / np.mean(medians) / math.sqrt(len(medians)))


def undisturbed(samples_ms: FloatArray, waited_ms: FloatArray) -> NDArray[np.bool_]:
    """Which runs had their CPUs to themselves. Both arguments and the result are of one shape.

    Told from how long the system let their threads wait, not from how long they took, so that leaving runs
    out favours no model. A run or two that waits a little is the system's own housekeeping.
    """
    mask: NDArray[np.bool_] = waited_ms <= np.maximum(WAITED_MS, WAITED * samples_ms)
    return mask


def levels(anchor_ms: FloatArray, waited_ms: FloatArray) -> FloatArray:
    """The anchor's running median over the runs beside each `[runs]`, in order of time; inf where all were disturbed.

    A median over neighbours tells a slow stretch from a single slow run, and does not favour lucky anchors.
    """
    half = CALM_WINDOW // 2
    good = undisturbed(anchor_ms, waited_ms)
    padded = np.pad(np.where(good, anchor_ms, np.nan), half, constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1).copy()
    windows[:, half] = np.nan  # a run does not vouch for itself: its own luck would choose it
    known = (~np.isnan(windows)).sum(axis=1)
    ordered = np.sort(windows, axis=1)  # NaN goes last
    at = np.arange(len(anchor_ms))
    middle = (ordered[at, np.maximum(known - 1, 0) // 2] + ordered[at, known // 2]) / 2
    return np.where(known > 0, middle, np.inf)


def calm_count(turns: Turns, quiet: Quiet | None, *, settle: bool = False) -> int:
    """How many rounds count so far, for the model that has the fewest.

    With `settle` they must also be as calm as their own quietest stretch.
    """
    good = undisturbed(turns.ms, turns.waited_ms)
    anchor = turns.ms[1, 0, good[1, 0]]
    own = [quiet_ms(anchor)[0]] if settle and len(anchor) else []
    quietest = min([*own, *([quiet.ms] if quiet else [])], default=np.inf)
    still = np.isfinite(turns.level_ms) & (turns.level_ms <= (1 + CALM) * quietest)
    return int((good.all(axis=0) & still).sum(axis=1).min())


def shift(ratio: float, level_ms: FloatArray, quiet: Quiet) -> FloatArray:
    """By what factor a ratio is larger where the anchor takes `level_ms` `[rounds]` than on the quiet device."""
    shifted: FloatArray = 1 + quiet.slope * min(max(1 - ratio, 0.0), 1.0) * (level_ms / quiet.ms - 1)
    return shifted


def fit_slope(measurements: Iterable[Measurement], quiet_ms: float) -> float:
    """The slope of `Quiet`, fitted on all candidates of one measurement at once; between 0 and 1.

    What another tenant takes from a shared core, cache or memory is paid per operator and synchronisation
    rather than per FLOP, so a small model pays more than its share: over a slower stretch its ratio rises.
    One least-squares slope for all, drawn to the usual one when the device was equally fast all the time.
    """
    products = squares = 0.0
    candidates = 0
    for one in measurements:
        good = undisturbed(one.raw_ms, one.waited_ms)
        level = one.level_ms
        ratios = one.raw_ms[0] / one.raw_ms[1]
        relative = ratios / np.median(ratios) - 1
        # Beyond that a run says nothing of the state of the machine.
        keep = good.all(axis=0) & np.isfinite(level) & (np.abs(relative) < OUTLIER)
        if one.ratio >= 1 or keep.sum() < 2:
            continue
        x = (level[keep] / quiet_ms - 1) * (1 - one.ratio)
        x, y = x - np.median(x), relative[keep] - np.median(relative[keep])
        products, squares, candidates = products + float(x @ y), squares + float(x @ x), candidates + 1
    # All candidates share one anchor and its noise: they are averaged, not counted as so many measurements.
    products, squares = products / max(candidates, 1), squares / max(candidates, 1)
    usual = Quiet(quiet_ms).slope
    return float(np.clip((products + SLOPE_PRIOR * usual) / (squares + SLOPE_PRIOR), 0, 1))


def quiet_ms(samples_ms: FloatArray, windows: int = 16) -> tuple[float, str]:
    """The sustained quiet latency: the median over the quietest quarter of the time, and that in words.

    samples_ms: `[rounds]` in order of time. Load from elsewhere comes in stretches; a few lucky rounds are
    not sustained, and a minimum is fragile. So the rounds are cut into stretches, and the quarter of them
    with the lowest medians counts.
    """
    stretches = np.array_split(samples_ms, min(windows, len(samples_ms)))
    quiet = sorted(stretches, key=lambda part: float(np.median(part)))[: (len(stretches) + 3) // 4]
    rounds = sum(len(part) for part in quiet)
    how = f"the median of the {rounds} rounds in the quietest {len(quiet)} of {len(stretches)} stretches of time"
    return float(np.median(np.concatenate(quiet))), how


def half_width(measurement: Measurement) -> float:
    """Half the interval's width relative to the ratio: 0.01 means ± 1 %."""
    low, high = measurement.ratio_ci
    return (high - low) / 2 / measurement.ratio


def tight(measurements: Iterable[Measurement], ci: float) -> bool:
    """Whether more rounds are not needed: every interval, but for doubt that they would not remove, is within ± `ci`."""
    return all(half_width(measurement) - measurement.doubt <= ci for measurement in measurements)


def quantile_ms(measurement: Measurement, anchor_ms: float | None, quantile: str) -> float | None:
    """The p50, p90 or p99 in milliseconds, or None with fewer samples than it takes.

    anchor_ms: the anchor's latency in the device profile; None = the samples as they are. Tails are the
    candidate's own samples, corrected by how far the anchor has drifted from the profile since; runs that
    waited for a CPU are not among them: they say something of the machine's other work, not of the model.
    """
    if quantile == "p50" and anchor_ms is not None:
        return measurement.ratio * anchor_ms
    if len(measurement.samples_ms) < MIN_SAMPLES.get(quantile, 0):
        return None
    drift = 1.0 if anchor_ms is None else anchor_ms / float(np.median(measurement.anchor_ms))
    return float(np.quantile(measurement.samples_ms, QUANTILES[quantile])) * drift


def quantile_ci_ms(
    measurement: Measurement, anchor_ms: float | None, quantile: str, seed: int = 0
) -> tuple[float, float] | None:
    """95 % interval in milliseconds of `quantile_ms`; None when that is None."""
    if quantile == "p50" and anchor_ms is not None:
        return measurement.ratio_ci[0] * anchor_ms, measurement.ratio_ci[1] * anchor_ms
    rounds = len(measurement.samples_ms)
    if rounds < MIN_SAMPLES.get(quantile, 0):
        return None
    picks = np.random.default_rng(seed).integers(0, rounds, size=(RESAMPLES, rounds))
    drifts = 1.0 if anchor_ms is None else anchor_ms / np.median(measurement.anchor_ms[picks], axis=1)
    tails = np.quantile(measurement.samples_ms[picks], QUANTILES[quantile], axis=1) * drifts
    low, high = np.quantile(tails, [0.025, 0.975])
    return float(low) * (1 - measurement.doubt), float(high) * (1 + measurement.doubt)


def latency_ms(measurement: Measurement, anchor_ms: float | None) -> dict[str, float | int | list[float] | None]:
    """p50 with its interval, p90 and p99 in milliseconds, and the number of samples.

    anchor_ms: as for `quantile_ms`. p90 and p99 are None below 64 and 662 samples.
    """
    interval = quantile_ci_ms(measurement, anchor_ms, "p50")
    return {
        **{quantile: quantile_ms(measurement, anchor_ms, quantile) for quantile in QUANTILES},
        "ci": list(interval) if interval else None,
        "samples": len(measurement.samples_ms),
    }


def verdict(ci: tuple[float, float], limit: float) -> Verdict:
    """pass when the whole interval is within the limit, fail when it is all beyond, else inconclusive."""
    low, high = ci
    if high <= limit:
        return "pass"
    return "fail" if low > limit else "inconclusive"
