"""Validate: the compiled artifact against the dense model, in the runtime that will run: checks and verdicts.

Knows nothing of torch or of how the artifact came to be.
"""

from __future__ import annotations

import gzip
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune import artifact, errors
from edgeprune.config import parse
from edgeprune.console import SILENT, Console
from edgeprune.latency import device
from edgeprune.latency.clock import Clock
from edgeprune.latency.statistics import latency_ms, quantile_ci_ms, quantile_ms, verdict
from edgeprune.types import Check, Measurement, Target, Verdict

SECONDS = 30.0
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


def measure(clock: Clock, dense: str, pruned: str, quantile: str, quiet_ms: float | None) -> Measurement:
    """Time the two loaded models turn by turn, long enough for the quantile; rounds as calm as `quiet_ms` count."""
    return clock.measure(
        [pruned], dense, ci=0.004, min_rounds=MIN_ROUNDS[quantile], budget_s=SECONDS, quiet_ms=quiet_ms
    )[pruned]


def corrected(measured: Measurement, profiled_ms: float, *, strict: bool, console: Console) -> tuple[float, float]:
    """The anchor latency that counts, in ms, and the drift: how much slower the anchor runs than when profiled.

    Drift is corrected by taking the profile's anchor latency; with `strict` the machine is taken as it is now.
    """
    now = float(np.median(measured.anchor_ms))
    drift = now / profiled_ms - 1
    if abs(drift) > DRIFT:
        console.say(
            f"the dense model takes {now:.2f} ms now and took {profiled_ms:.2f} ms when profiled: the machine is {abs(drift):.0%} "
            f"{'slower' if drift > 0 else 'faster'}, {'and the strict clock counts it so' if strict else 'which is corrected'}"
        )
    return (now if strict else profiled_ms), drift


def latency_check(measured: Measurement, anchor_ms: float, limit_ms: float, quantile: str) -> Check:
    """pass only if the whole interval is within the limit, fail only if all of it is beyond."""
    value, interval = quantile_ms(measured, anchor_ms, quantile), quantile_ci_ms(measured, anchor_ms, quantile)
    name, rounds = f"latency {quantile}", len(measured.samples_ms)
    if value is None or interval is None:
        return Check(name, None, limit_ms, "inconclusive", f"{rounds} samples are too few for {quantile}")
    low, high = interval
    reason = f"95 % interval {low:.2f} to {high:.2f} ms from {rounds} rounds, limit {limit_ms:.2f} ms"
    decided = verdict((low, high), limit_ms)
    if not measured.calm:
        reason += "; the machine was never as quiet as when it was profiled"
        decided = "pass" if decided == "pass" else "inconclusive"  # disturbance only makes slower
    elif (left_out := measured.raw_ms.shape[1] - rounds) > 0:
        reason += f"; {left_out} disturbed rounds do not count"
    return Check(name, value, limit_ms, decided, reason)


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


def validate_artifact(
    folder: Path, *, threads: int = 0, strict_clock: bool = False, console: Console = SILENT
) -> dict[str, Any]:
    """Check a finished artifact again, on this machine: every file's hash, then the latency contract.

    The anchor is the artifact's own copy of the dense model (its weights mean nothing, its shapes do). On
    the device that built it, the profile's anchor latency counts; on another one, the anchor's latency now.
    Raises UsageError for a damaged artifact, TargetUnavailable when the target or runtime is not here.
    """
    manifest = artifact.read_manifest(folder)
    artifact.check_files(folder, manifest)
    profile = artifact.read_json(folder / "profile.json")
    target = parse(Target, profile["target"], str(folder / "profile.json"))
    if reason := device.unfit(target):
        raise errors.TargetUnavailable(f"target '{target.name}' is not here: {reason}")
    runtime, request = manifest["runtime"], manifest["request"]
    count, why = device.usable_threads(threads or manifest["threads"])
    console.say(f"{runtime}, {manifest['precision']}, {count} threads ({why})")
    max_isa = target.max_isa if device.needs_cap(target) else ""
    with (
        tempfile.TemporaryDirectory(prefix="edgeprune-") as work,
        Clock(runtime, precision=manifest["precision"], threads=count, max_isa=max_isa) as clock,
    ):
        anchor = Path(work) / "anchor.onnx"
        anchor.write_bytes(gzip.decompress((folder / "anchor.onnx.gz").read_bytes()))
        clock.load("dense", anchor)
        clock.load("pruned", folder / manifest["entry"])
        same = profile["device"] == device.fingerprint() and count == manifest["threads"]
        quiet_ms = profile["anchor_ms"][runtime] if same and not strict_clock else None
        measured = measure(clock, "dense", "pruned", request["quantile"], quiet_ms)
    if same:
        anchor_ms, _ = corrected(measured, profile["anchor_ms"][runtime], strict=strict_clock, console=console)
    else:
        anchor_ms = float(np.median(measured.anchor_ms))
        console.say(
            f"not the device of the profile: the dense model's latency here and now, {anchor_ms:.2f} ms, counts"
        )
    check = latency_check(measured, anchor_ms, request["latency_ms"], request["quantile"])
    return {
        "artifact": str(folder),
        "same_device": same,
        "anchor_ms": anchor_ms,
        "latency": latency_ms(measured, anchor_ms),
        "checks": [asdict(check)],
    }
