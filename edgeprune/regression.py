"""Regression: whether an artifact is slower than a baseline, by the intervals of what was measured."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeprune import artifact, errors, onnxfile
from edgeprune.checks import measure
from edgeprune.console import Console
from edgeprune.latency.clock import COPIES, Clock
from edgeprune.latency.machine import Machine
from edgeprune.latency.statistics import quantile_ci_ms, quantile_ms, verdict
from edgeprune.types import Check, Measurement

NAME = "latency regression"


def parse_share(text: str) -> float:
    """ "3%" as 0.03. Raises UsageError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", text)
    if not found:
        raise errors.UsageError(f"max-regression must be a percentage as in 3%, not '{text}'")
    return float(found[1]) / 100


def read_baseline(path: Path) -> tuple[Path, dict[str, Any]]:
    """The folder and the manifest of a baseline: a manifest.json, alone or in its artifact, or an artifact directory."""
    if not path.exists():
        raise errors.UsageError(f"there is no baseline '{path}'; give the manifest.json of an earlier build")
    folder, file = (path, path / "manifest.json") if path.is_dir() else (path.parent, path)
    if not file.is_file():
        raise errors.UsageError(
            f"the baseline '{path}' has no manifest.json; give a directory that `edgeprune build` wrote"
        )
    manifest = artifact.read_json(file)
    artifact.check_manifest(folder, manifest)
    return folder, manifest


def check(
    clock: Clock,
    machine: Machine,
    baseline: tuple[Path, Mapping[str, Any]],
    now: Measurement,
    anchor_ms: float | None,
    most: float,
    console: Console,
) -> Check:
    """Whether the loaded `pruned` is at most a share `most` slower than the baseline, p50 against p50.

    A baseline whose model lies beside its manifest is timed turn by turn, on any device. Of one that is a manifest
    alone the recorded milliseconds count, on the device that they were measured on; elsewhere nothing is decided.
    machine: the clock's. now: the artifact as measured on it; anchor_ms: as for `checks.latency_check`.
    """
    folder, manifest = baseline
    if (folder / str(manifest["entry"])).is_file():
        if manifest["runtime"] == clock.runtime and manifest["precision"] == clock.info["precision"]:
            return timed(_measured(clock, folder, manifest, most, console), most)
        console.say(f"the baseline runs in {manifest['runtime']}, {manifest['precision']}: its recorded latency counts")
    return recorded(manifest, machine, now, anchor_ms, clock.info, most)


def _measured(clock: Clock, folder: Path, manifest: Mapping[str, Any], most: float, console: Console) -> Measurement:
    entry = folder / str(manifest["entry"])
    artifact.check_files(folder, dict(manifest), artifact.model_files(manifest))
    onnxfile.refuse_external(entry)
    clock.load("baseline", entry, COPIES)
    console.say("timing the baseline, turn by turn with the artifact")
    gate = functools.partial(timed, most=most)
    return measure(clock, "baseline", "pruned", "p50", None, gate, console=console)


def timed(measured: Measurement, most: float) -> Check:
    """The artifact was measured in the same rounds as the baseline."""
    low, high = (end - 1 for end in measured.ratio_ci)
    reason = (
        f"{_change(low, high)} turn by turn with the baseline, {len(measured.samples_ms)} rounds, at most {most:.1%}"
    )
    decided = verdict((low, high), most)
    if not measured.calm:
        return Check(
            NAME, 100 * (measured.ratio - 1), 100 * most, "inconclusive", f"{reason}; the machine was too busy"
        )
    return Check(NAME, 100 * (measured.ratio - 1), 100 * most, decided, reason)


def recorded(
    manifest: Mapping[str, Any],
    machine: Machine,
    measured: Measurement,
    anchor_ms: float | None,
    worker: Mapping[str, Any],
    most: float,
) -> Check:
    """Against the milliseconds in the baseline's manifest. As in `checks.latency_check`, a machine that was never calm fails nothing."""
    before, interval = manifest["pruned"]["latency_ms"]["p50"], manifest["pruned"]["latency_ci_ms"]
    now, ci = quantile_ms(measured, anchor_ms, "p50"), quantile_ci_ms(measured, anchor_ms, "p50")
    why = ""
    if interval is None or before is None:
        why = "the baseline's latency was predicted, not measured"
    elif now is None or ci is None:
        why = "there are too few samples"
    elif manifest["device"] != machine.fingerprint:
        why = f"the baseline was measured on another device ({manifest['device']['cpu']})"
    elif (manifest["runtime"], manifest["threads"]) != (worker["runtime"], worker["threads"]):
        why = f"the baseline was measured with {manifest['runtime']} and {manifest['threads']} threads"
    if why or now is None or ci is None:
        fix = "give an artifact directory as the baseline, which is then timed here"
        return Check(NAME, None, 100 * most, "inconclusive", f"{why}; {fix}")
    low, high = ci[0] / interval[1] - 1, ci[1] / interval[0] - 1
    reason = f"{_change(low, high)} from the recorded {before:.3g} ms, at most {most:.1%}"
    decided = verdict((low, high), most)
    if not measured.calm:
        reason += "; the machine was too busy"
        _, slowest = quantile_ci_ms(measured, None, "p50") or ci
        if decided != "pass" or slowest / interval[0] - 1 > most:
            decided = "inconclusive"
    return Check(NAME, 100 * (now / before - 1), 100 * most, decided, reason)


def _change(low: float, high: float) -> str:
    return f"95 % interval of the change {low:+.1%} to {high:+.1%}"
