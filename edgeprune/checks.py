"""Checks: the compiled artifact against the dense model, in the runtime that will run: checks and verdicts.

Knows nothing of torch or of how the artifact came to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune import errors
from edgeprune.console import SILENT, Console
from edgeprune.latency import choose
from edgeprune.latency.clock import Clock
from edgeprune.latency.statistics import quantile_ci_ms, quantile_ms, verdict
from edgeprune.report import digits, ms
from edgeprune.types import Check, FloatArray, Measurement, Quiet, Verdict

SECONDS = 30.0
COLLAPSE = 0.25  # of the accuracy above chance: what is left of it where accuracy has collapsed
DRIFT = 0.05  # of the anchor's latency, above which drift is worth a line
MIN_ROUNDS = {"p50": 100, "p90": 200, "p99": 700}


@dataclass(frozen=True)
class Accuracy:
    """Top-1 of two models on the same images, in percent, and the 95 % interval of their paired difference."""

    dense: float
    pruned: float
    drop_ci: tuple[float, float]  # points
    agreement: float  # percent of images where both say the same
    images: int


def measure(
    clock: Clock,
    dense: str,
    pruned: str,
    quantile: str,
    quiet: Quiet | None,
    check: Callable[[Measurement], Check],
    *,
    strict: bool = False,
    console: Console = SILENT,
) -> Measurement:
    """Time the two loaded models turn by turn, long enough for the quantile; says what disturbed it.

    quiet: only rounds as calm as that count; None on another device than the profile's. strict: all do.
    check: what is to be decided of `pruned`. If it is undecided when the time is over, more time is given, once: two
    looks at a 95 % interval, each of which passes a model just beyond its limit 2.5 times in 100, do so 5 times at most.
    """

    def enough(found: list[Measurement]) -> bool:
        return check(found[-1]).verdict != "inconclusive"

    with choose.watched(clock, console), console.timing("timing", SECONDS) as on_round:
        return clock.measure(
            [pruned], dense, ci=0.0025, min_rounds=MIN_ROUNDS[quantile], budget_s=SECONDS,
            quiet=None if strict else quiet, every_round=strict, enough=enough, on_round=on_round,
        )[pruned]  # fmt: skip


def drift(measured: Measurement, profiled_ms: float, *, strict: bool, console: Console) -> float:
    """How much slower the anchor runs than when profiled. Corrected by the profile's latency, but with `strict`."""
    now = float(np.median(measured.raw_ms[1]))
    found = now / profiled_ms - 1
    if abs(found) > DRIFT:
        console.say(
            f"the dense model takes {ms(now)} now and took {ms(profiled_ms)} when profiled: the machine is {abs(found):.0%} "
            f"{'slower' if found > 0 else 'faster'}, {'and the strict clock counts it so' if strict else 'which is corrected'}"
        )
    return found


def latency_check(measured: Measurement, anchor_ms: float | None, limit_ms: float, quantile: str) -> Check:
    """pass only if the whole interval is within the limit, fail only if all of it is beyond.

    A machine that was never calm cannot fail a model. It can pass one: what disturbs it only slows it down, so
    where also the milliseconds as they were, corrected by nothing, are within the limit, those of a calm one are.

    anchor_ms: the anchor's latency in the device profile; None = milliseconds as they are here and now.
    """
    value, interval = quantile_ms(measured, anchor_ms, quantile), quantile_ci_ms(measured, anchor_ms, quantile)
    name, rounds = f"latency {quantile}", len(measured.samples_ms)
    if value is None or interval is None:
        return Check(name, None, limit_ms, "inconclusive", f"{rounds} samples are too few for {quantile}")
    low, high = interval
    reason = f"95 % interval {digits(low)} to {ms(high)} from {rounds} rounds, limit {ms(limit_ms)}"
    decided = verdict((low, high), limit_ms)
    if not measured.calm:
        reason += "; the machine was never quiet enough: too busy here, or slower than when it was profiled"
        _, slowest = quantile_ci_ms(measured, None, quantile) or interval
        if decided == "pass" and slowest <= limit_ms:
            reason += f", yet even so all is within {ms(slowest)}"
        else:
            decided = "inconclusive"
    elif (left_out := measured.raw_ms.shape[1] - rounds) > 0:
        reason += f"; {left_out} rounds that waited for a CPU or were slower than the quiet device do not count"
    return Check(name, value, limit_ms, decided, reason)


#: For each image `[n]`: whether the dense model is right, whether the pruned one is, whether they say the same.
Answers = tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]


def summary(*parts: Answers) -> Accuracy:
    """On the images of all parts."""
    d, p, same = (np.concatenate(own) for own in zip(*parts, strict=True))
    low, high = drop_interval(d.astype(float) - p)
    return Accuracy(
        dense=100 * float(d.mean()),
        pruned=100 * float(p.mean()),
        drop_ci=(100 * low, 100 * high),
        agreement=100 * float(same.mean()),
        images=len(d),
    )


def drop_interval(drops: FloatArray) -> tuple[float, float]:
    """95 % interval of the mean drop. drops `[n]`: 1 where only the dense model is right, -1 where only the other is, else 0.

    Two images on which both differ by 0 and by one right answer each way are added, half each (Agresti and Min, Statistics
    in Medicine 24, 2005): where no answer changed, that is still no proof that none would. Means of several answers to an
    image, between -1 and 1, are taken as well.
    """
    n = len(drops) + 2
    mean = drops.sum() / n
    margin = 1.96 * np.sqrt(((drops**2).sum() + 1) / n - mean**2) / np.sqrt(n)
    return float(mean - margin), float(mean + margin)


def collapsed(measured: Accuracy, classes: int) -> bool:
    """Whether most of what the dense model knows beyond guessing one of `classes` is lost, and it knew something."""
    chance = 100 / classes
    return measured.dense - chance > min(10.0, chance) and measured.pruned - chance < COLLAPSE * (
        measured.dense - chance
    )


def domain_facts(name: str, found: Answers, *, held_out: bool) -> dict[str, Any]:
    """How good both models are on the images of one domain, in percent, each with its 95 % interval."""
    (dense, pruned, _), total = (int(own.sum()) for own in found), len(found[0])
    return {
        "name": name,
        "held_out": held_out,
        "images": total,
        "dense": 100 * dense / total,
        "dense_ci": wilson(dense, total),
        "pruned": 100 * pruned / total,
        "pruned_ci": wilson(pruned, total),
    }


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


def worst(codes: Iterable[int]) -> int:
    """The exit code of several artifacts: 1 where any failed a gate, else the greatest."""
    found = list(codes)
    return errors.GATE_FAILED if errors.GATE_FAILED in found else max(found)


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % interval in percent of a share that was seen as `right` of `total` (Wilson's score interval)."""
    z, share = 1.96, right / total
    scale = 1 + z * z / total
    middle = (share + z * z / (2 * total)) / scale
    half = z * math.sqrt(share * (1 - share) / total + (z / (2 * total)) ** 2) / scale
    # Rounding must not put 100 % beyond what 100 % allows.
    return (100 * (middle - half) if right else 0.0), (100 * (middle + half) if right < total else 100.0)
