"""Validate: the compiled artifact against the dense model, in the runtime that will run: checks and verdicts.

Knows nothing of torch or of how the artifact came to be.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from edgeprune import errors
from edgeprune.latency.clock import Clock
from edgeprune.latency.statistics import quantile_ci_ms, quantile_ms, verdict
from edgeprune.types import Check, Measurement, Verdict

SECONDS = 30.0
MIN_ROUNDS = {"p50": 100, "p90": 200, "p99": 700}


@dataclass(frozen=True)
class Accuracy:
    """Top-1 of two models on the same images, in percent, and the 95 % interval of their paired difference."""

    dense: float
    pruned: float
    drop_ci: tuple[float, float]  # points
    agreement: float  # percent of images where both say the same
    images: int


def measure(clock: Clock, dense: str, pruned: str, quantile: str) -> Measurement:
    """Time the two loaded models turn by turn, long enough for the quantile."""
    return clock.measure([pruned], dense, ci=0.004, min_rounds=MIN_ROUNDS[quantile], budget_s=SECONDS)[pruned]


def latency_check(measured: Measurement, anchor_ms: float, limit_ms: float, quantile: str) -> Check:
    """pass only if the whole interval is within the limit, fail only if all of it is beyond."""
    value, interval = quantile_ms(measured, anchor_ms, quantile), quantile_ci_ms(measured, anchor_ms, quantile)
    name, rounds = f"latency {quantile}", len(measured.samples_ms)
    if value is None or interval is None:
        return Check(name, float("nan"), limit_ms, "inconclusive", f"{rounds} samples are too few for {quantile}")
    low, high = interval
    reason = f"95 % interval {low:.2f} to {high:.2f} ms from {rounds} rounds, limit {limit_ms:.2f} ms"
    return Check(name, value, limit_ms, verdict((low, high), limit_ms), reason)


def accuracy(clock: Clock, dense: str, pruned: str, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> Accuracy:
    """Run both loaded models on every image: pixels `[n, channels, height, width]`, labels `[n]` per batch."""
    dense_right, pruned_right, same = [], [], []
    for pixels, labels in batches:
        wanted, got = clock.predict(dense, pixels).argmax(-1), clock.predict(pruned, pixels).argmax(-1)
        dense_right.append(wanted == labels)
        pruned_right.append(got == labels)
        same.append(wanted == got)
    d, p = np.concatenate(dense_right).astype(float), np.concatenate(pruned_right).astype(float)
    drop = d - p
    margin = 1.96 * float(drop.std()) / np.sqrt(len(drop))
    return Accuracy(
        dense=100 * float(d.mean()),
        pruned=100 * float(p.mean()),
        drop_ci=(100 * (float(drop.mean()) - margin), 100 * (float(drop.mean()) + margin)),
        agreement=100 * float(np.concatenate(same).mean()),
        images=len(d),
    )


def accuracy_check(measured: Accuracy, max_drop: float) -> Check:
    """Whether the drop on the whole evaluation split is within `max_drop` points."""
    drop = measured.dense - measured.pruned
    low, high = measured.drop_ci
    reason = f"{measured.dense:.2f} % dense, {measured.pruned:.2f} % pruned on {measured.images} images; drop's 95 % interval {low:.2f} to {high:.2f} points"
    return Check("accuracy drop", drop, max_drop, "pass" if drop <= max_drop else "fail", reason)


def exit_code(checks: Iterable[Check]) -> int:
    """1 when a check failed, else 6 when one is inconclusive, else 0."""
    verdicts: set[Verdict] = {check.verdict for check in checks}
    if "fail" in verdicts:
        return errors.GATE_FAILED
    return errors.INCONCLUSIVE if "inconclusive" in verdicts else errors.PASSED
