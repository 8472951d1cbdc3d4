"""Statistics of turn-by-turn timing: ratios, intervals, quantiles, verdicts. Pure numpy.

A candidate's latency is the median over rounds of its ratio to the anchor, times the anchor's latency
in the device profile. The interval is a bootstrap over rounds: it knows nothing of drift that is slower
than the whole measurement, and takes rounds for independent.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgeprune.types import FloatArray, Measurement, Verdict

RESAMPLES = 1000
#: Samples below which a tail quantile is not reported (MLPerf's early-stopping rule at 99 % confidence).
MIN_SAMPLES = {"p90": 64, "p99": 662}
#: A round is calm when the anchor's running median is at most this share above its quiet latency.
CALM = 0.06
CALM_WINDOW = 7  # rounds
#: Calm rounds below which they do not speak for themselves.
FEWEST_CALM = 20
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}


def bootstrap_median_ci(values: FloatArray, seed: int = 0, resamples: int = RESAMPLES) -> FloatArray:
    """95 % percentile bootstrap intervals of the median of each row.

    values: `[candidates, rounds]`; all rows are resampled alike. Returns `[candidates, 2]`.
    """
    rounds = values.shape[1]
    picks = np.random.default_rng(seed).integers(0, rounds, size=(resamples, rounds))
    # One candidate at a time keeps memory at resamples x rounds.
    medians = np.stack([np.median(row[picks], axis=1) for row in values])
    interval: FloatArray = np.quantile(medians, [0.025, 0.975], axis=1).T
    return interval


def summarise(
    names: Sequence[str], samples_ms: FloatArray, anchor: int, seed: int = 0, quiet_ms: float | None = None
) -> list[Measurement]:
    """One Measurement per row of `samples_ms` `[candidates, rounds]`; row `anchor` is the anchor.

    quiet_ms: the anchor's quiet latency; only rounds as calm as that count. None = all rounds count.
    """
    mask = np.ones(samples_ms.shape[1], dtype=bool)
    if quiet_ms is not None:
        mask = calm_rounds(samples_ms[anchor], quiet_ms)
    calm = quiet_ms is None or int(mask.sum()) >= FEWEST_CALM
    counted = samples_ms[:, mask] if calm else samples_ms
    ratios = counted / counted[anchor]
    intervals = bootstrap_median_ci(ratios, seed)
    return [
        Measurement(
            name=name,
            samples_ms=counted[i].copy(),
            anchor_ms=counted[anchor].copy(),
            ratio=float(np.median(ratios[i])),
            ratio_ci=(float(intervals[i, 0]), float(intervals[i, 1])),
            raw_ms=samples_ms[[i, anchor]],
            calm=calm,
        )
        for i, name in enumerate(names)
    ]


def calm_rounds(anchor_ms: FloatArray, quiet_ms: float) -> NDArray[np.bool_]:
    """Which rounds `[rounds]` were as calm as the profile's: the anchor's running median is near `quiet_ms`.

    A disturbed machine does not slow all models alike: what another tenant takes from a shared core is
    paid per synchronisation, so a small model pays more than its share and ratios shift. The median over
    neighbouring rounds tells such stretches from a single slow run, and does not favour lucky anchors.
    """
    half = CALM_WINDOW // 2
    padded = np.pad(anchor_ms, half, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
    mask: NDArray[np.bool_] = np.median(windows, axis=1) <= (1 + CALM) * quiet_ms
    return mask


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


def quantile_ms(measurement: Measurement, anchor_ms: float, quantile: str) -> float | None:
    """The p50, p90 or p99 in milliseconds, or None with fewer samples than it takes.

    anchor_ms: the anchor's latency in the device profile. Tails are the candidate's own samples,
    corrected by how far the anchor has drifted from the profile since.
    """
    if quantile == "p50":
        return measurement.ratio * anchor_ms
    if len(measurement.samples_ms) < MIN_SAMPLES[quantile]:
        return None
    drift = anchor_ms / float(np.median(measurement.anchor_ms))
    return float(np.quantile(measurement.samples_ms, QUANTILES[quantile])) * drift


def quantile_ci_ms(
    measurement: Measurement, anchor_ms: float, quantile: str, seed: int = 0
) -> tuple[float, float] | None:
    """95 % interval in milliseconds of `quantile_ms`; None when that is None."""
    if quantile == "p50":
        return measurement.ratio_ci[0] * anchor_ms, measurement.ratio_ci[1] * anchor_ms
    rounds = len(measurement.samples_ms)
    if rounds < MIN_SAMPLES[quantile]:
        return None
    picks = np.random.default_rng(seed).integers(0, rounds, size=(RESAMPLES, rounds))
    drifts = anchor_ms / np.median(measurement.anchor_ms[picks], axis=1)
    tails = np.quantile(measurement.samples_ms[picks], QUANTILES[quantile], axis=1) * drifts
    return float(np.quantile(tails, 0.025)), float(np.quantile(tails, 0.975))


def latency_ms(measurement: Measurement, anchor_ms: float) -> dict[str, float | int | list[float] | None]:
    """p50 with its interval, p90 and p99 in milliseconds, and the number of samples.

    anchor_ms: the anchor's latency in the device profile. p90 and p99 are None below 64 and 662 samples.
    """
    low, high = measurement.ratio_ci
    return {
        "p50": quantile_ms(measurement, anchor_ms, "p50"),
        "p90": quantile_ms(measurement, anchor_ms, "p90"),
        "p99": quantile_ms(measurement, anchor_ms, "p99"),
        "ci": [low * anchor_ms, high * anchor_ms],
        "samples": len(measurement.samples_ms),
    }


def verdict(ci: tuple[float, float], limit: float) -> Verdict:
    """pass when the whole interval is within the limit, fail when it is all beyond, else inconclusive."""
    low, high = ci
    if high <= limit:
        return "pass"
    return "fail" if low > limit else "inconclusive"
