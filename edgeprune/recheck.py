"""Check a finished artifact again: hashes, latency, accuracy, on the device and without torch."""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import sys
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune import artifact, errors, images, intake, neighbours, onnxfile, regression, report
from edgeprune.checks import drift, exit_code, latency_check, measure, wilson
from edgeprune.config import load_target, parse
from edgeprune.console import SILENT, Console
from edgeprune.latency import devices
from edgeprune.latency.clock import COPIES, Clock
from edgeprune.latency.device import usable_threads
from edgeprune.latency.machine import Machine, here
from edgeprune.latency.statistics import latency_ms, verdict
from edgeprune.types import Check, Quiet, Target, Verdict

PLAIN_WIDTH = 120  # columns of the table where there is no terminal
UNITS = {
    "accuracy": "%",
    "accuracy drop": "points",
    regression.NAME: "%",
}  # of a check's value and limit; of a latency: ms
MAX_ONNX = (2 << 30) - 1  # bytes: protobuf's own limit
BATCH = 16  # images per request to the worker, which must answer in time on the slowest board


def measured_accuracy(
    clock: neighbours.Predictor, name: str, batches: Iterable[tuple[np.ndarray, np.ndarray]]
) -> tuple[int, int]:
    """How many images a loaded model names rightly, and how many it saw; batches as for `accuracy`.

    Raises UsageError when there was no image at all.
    """
    right = total = 0
    for pixels, labels in batches:
        right += int((clock.predict(name, pixels).argmax(-1) == labels).sum())
        total += len(labels)
    if not total:
        raise errors.UsageError("none of the evaluation images can be read; repair or replace them")
    return right, total


def recheck_accuracy(
    manifest: dict[str, Any], right: int, total: int, source: str
) -> tuple[dict[str, Any], list[Check]]:
    """What `right` of `total` images says of the recorded accuracies: facts (percent), and the gates.

    On the images of the build, which are recognised by their number, the drop is exact; on others it is as
    uncertain as the accuracy, and the gate may stay undecided.
    """
    recorded, dense = manifest["pruned"]["accuracy"], manifest["dense"]["accuracy"]
    same = total == manifest["accuracy"]["images"]
    found, (low, high) = 100 * (right / total), wilson(right, total)
    facts = {"accuracy": found, "images": total, "interval": [low, high], "recorded": recorded, "dense": dense}
    seen = f"{found:.2f} % of {total} images ({source}), 95 % interval {low:.2f} to {high:.2f} %"
    decided: Verdict = "fail" if high < recorded else "pass"
    gates = [Check("accuracy", found, recorded, decided, f"{seen}; recorded {recorded:.2f} %")]
    if (limit := manifest["request"]["max_drop"]) is not None:
        drop = dense - found
        if same:
            decided, how = "pass" if drop <= limit else "fail", "on as many images as at build"
        else:
            decided = verdict((dense - high, dense - low), limit)
            how = f"95 % interval {dense - high:.2f} to {dense - low:.2f} points on other images"
        gates.append(Check("accuracy drop", drop, limit, decided, f"{dense:.2f} % dense as recorded, {how}"))
    return {**facts, "source": source}, gates


def validate_artifact(
    folder: Path,
    *,
    target: str = "",
    data: str = "",
    data_dir: str = "",
    follow_links: bool = False,
    threads: int = 0,
    strict_clock: bool = False,
    device: str = "",
    accuracy_on: str = "build",
    out: Path | None = None,
    baseline: Path | None = None,
    max_regression: str = "",
    console: Console = SILENT,
) -> dict[str, Any]:
    """Check a finished artifact again, on this machine or a device: every file's hash, the latency contract, the accuracy.

    The anchor is the artifact's own copy of the dense model (its weights mean nothing, its shapes do). On
    the device that built it, the profile's anchor latency counts; on another one, the anchor's latency now.
    target: the device class to hold it to, instead of the recorded one. data, data_dir: `digits`, or an image
    folder (`images.for_artifact`); accuracy is checked only then, on this machine ("build") or the "device". out: where the
    result goes with all raw samples. baseline: the manifest.json of another artifact, or its directory, than which it may
    be `max_regression` ("3%") slower.

    Raises UsageError for a damaged artifact or data that does not fit it, TargetUnavailable when the target
    or runtime is not here, StorageError when `out` cannot be written (checked first).
    """
    if bool(baseline) != bool(max_regression):
        missing = "--max-regression 3%" if baseline else "--baseline manifest.json"
        raise errors.UsageError(f"a baseline and a limit on the regression go together; add {missing}")
    most = regression.parse_share(max_regression) if max_regression else 0.0
    before = regression.read_baseline(baseline) if baseline else None
    opened = Opened.read(folder, console)
    manifest, machine = opened.manifest, devices.machine(device)
    held_to = load_target(target) if target else opened.recorded
    _must_fit(held_to, manifest, machine)
    onnxfile.refuse_external(folder / manifest["entry"])
    if before is not None:
        _must_take_as_many(before[1], manifest)
    evaluation = images.for_artifact(manifest, data, data_dir, follow_links)
    reference = None
    if evaluation is not None and (embedded := manifest.get("features")):
        reference = neighbours.load(folder / neighbours.FILE, embedded["neighbours"], embedded["classes"])
    if out is not None:
        artifact.must_be_writable(out, "--out", folder=False)
    runtime, precision, request = manifest["runtime"], manifest["precision"], manifest["request"]
    count, why = machine.usable_threads(threads or manifest["threads"])
    console.say(f"{runtime}, {precision}, {count} threads ({why})")
    max_isa = machine.cap(held_to)
    with contextlib.ExitStack() as stack:
        clock = stack.enter_context(
            devices.clock(device, runtime, console=console, precision=precision, threads=count, max_isa=max_isa)
        )
        _load(clock, folder, manifest["entry"])
        same = opened.here(machine, clock, count, max_isa)
        quiet = Quiet.of(opened.profile, runtime) if same else None
        profiled_ms = opened.profile["anchor_ms"][runtime] if same else None
        anchor_ms = None if strict_clock else profiled_ms
        limit_ms, quantile = request["latency_ms"], request["quantile"]
        gate = functools.partial(latency_check, anchor_ms=anchor_ms, limit_ms=limit_ms, quantile=quantile)
        measured = measure(clock, "dense", "pruned", quantile, quiet, gate, strict=strict_clock, console=console)
        answers = None
        if evaluation is not None:
            answering = clock
            if device and accuracy_on == "build":
                answering = stack.enter_context(Clock(runtime, precision=precision, threads=usable_threads(count)[0]))
                answering.load("pruned", folder / manifest["entry"])
            judge = answering if reference is None else neighbours.Judge(answering, {"pruned": reference})
            answers = measured_accuracy(judge, "pruned", _batches(evaluation, manifest, console))
        now = float(np.median(measured.anchor_ms))
        if profiled_ms is not None:
            drift(measured, profiled_ms, strict=strict_clock, console=console)
        else:
            console.say(
                f"not the device and runtime of the profile: milliseconds here and now count (dense {now:.2f} ms)"
            )
        gates = [gate(measured)]
        if before is not None:
            gates.append(regression.check(clock, machine, before, measured, anchor_ms, most, console))
        worker = clock.info
    found = {
        "artifact": str(folder),
        "files": len(manifest["files"]),
        "target": held_to.name,
        "cpu": machine.cpu,
        **({"device": machine.url} if machine.url else {}),
        "worker": worker,
        "same_device": same,
        "anchor_ms": anchor_ms or now,
        "latency": latency_ms(measured, anchor_ms),
    }
    if evaluation is not None and answers is not None:
        facts, more = recheck_accuracy(manifest, *answers, evaluation.source)
        found["accuracy"] = {**facts, "unreadable": sorted(evaluation.corrupt)}
        gates += more
    found["checks"] = [asdict(check) for check in gates]
    if out is not None:
        samples = {"pruned": measured.raw_ms[0].tolist(), "anchor": measured.raw_ms[1].tolist()}
        _write(out, {"exit_code": exit_code(gates), **found, "samples_ms": samples})
    return found


@dataclass(frozen=True)
class Opened:
    """An artifact whose files have their hashes, and the profile of where it was built."""

    manifest: dict[str, Any]
    profile: dict[str, Any]
    recorded: Target

    @classmethod
    def read(cls, folder: Path, console: Console) -> Opened:
        """Raises UsageError for a damaged artifact, naming the file."""
        manifest = artifact.read_manifest(folder)
        artifact.check_manifest(folder, manifest)
        artifact.check_files(folder, manifest, needed=_used(manifest))
        console.say(f"{len(manifest['files'])} files have their hashes")
        profile = read_profile(folder / "profile.json", manifest["runtime"])
        return cls(manifest, profile, parse(Target, profile["target"], str(folder / "profile.json")))

    def here(self, machine: Machine, clock: Clock, threads: int, max_isa: str) -> bool:
        """Whether what was measured at build compares: the same machine, runtime, threads and instructions."""
        return (
            machine.same(self.profile)
            and self.profile["worker"]["info"]["version"] == clock.info["version"]
            and (threads, max_isa) == (self.manifest["threads"], machine.cap(self.recorded))
        )


def _load(clock: Clock, folder: Path, entry: str) -> None:
    """The artifact's two models, as they are measured: `dense` and `pruned`."""
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as work:
        anchor = Path(work) / "anchor.onnx"
        unpack(folder / "anchor.onnx.gz", anchor)
        onnxfile.refuse_external(anchor)
        clock.load("dense", anchor, COPIES)
    clock.load("pruned", folder / entry, COPIES)


def _must_take_as_many(baseline: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Raise UsageError unless both artifacts take as many images at once."""
    before, now = (intake.of_manifest(one).batch for one in (baseline, manifest))
    if before != now:
        raise errors.UsageError(f"the baseline's latency is of {before} image{'s' * (before > 1)}, the artifact's of {now}: "
                                "build one of them again with the other's --batch")  # fmt: skip


def _used(manifest: dict[str, Any]) -> tuple[str, ...]:
    """The files that are opened here; what is opened must have a hash."""
    reference = (neighbours.FILE,) if "features" in manifest else ()
    return ("profile.json", "anchor.onnx.gz", *artifact.model_files(manifest), *reference)


def read_profile(path: Path, runtime: str) -> dict[str, Any]:
    """The profile document at `path`; UsageError when it lacks what is read of it here, or has it in no sound form."""
    document = artifact.read_json(path)
    try:
        numbers = [document["anchor_ms"][runtime], document["anchor"]["slope"]]
        if not all(type(number) in (int, float) and abs(number) < 1e12 for number in numbers) or numbers[0] <= 0:
            raise ValueError(f"anchor_ms and slope are {numbers}")
        if not isinstance(document["target"], dict) or not isinstance(document["worker"]["info"]["version"], str):
            raise TypeError("target is no table, or the worker's version no text")
        here().same(document)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise errors.UsageError(
            f"{path}: the profile is damaged ({type(error).__name__}: {error}); build the artifact again"
        ) from error
    return document


def unpack(source: Path, target: Path) -> None:
    """Decompress `source`, piece by piece and up to what an ONNX file can have. Raises UsageError, StorageError."""
    size = 0
    try:
        with gzip.open(source) as packed, target.open("wb") as file:
            while piece := packed.read(1 << 20):
                size += len(piece)
                if size > MAX_ONNX:
                    raise errors.UsageError(f"'{source}' unpacks to more than {MAX_ONNX >> 20} MiB, and is no model")
                file.write(piece)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise errors.UsageError(f"'{source}' is not a gzip file: {error}; build the artifact again") from error
    except OSError as error:
        raise errors.StorageError(f"'{source}' cannot be unpacked to '{target}': {error.strerror or error}") from error


def _must_fit(target: Target, manifest: dict[str, Any], machine: Machine) -> None:
    """Raise TargetUnavailable unless this machine is the target, UsageError unless the artifact is made for it."""
    if reason := machine.unfit(target):
        where = f"on {machine.name}" if machine.url else "here"
        raise errors.TargetUnavailable(f"target '{target.name}' is not {where}: {reason}")
    for what, wanted, offered in (
        ("runtime", manifest["runtime"], target.runtimes),
        ("precision", manifest["precision"], target.precisions),
    ):
        if wanted not in offered:
            raise errors.UsageError(
                f"the artifact's {what} '{wanted}' is not one of target '{target.name}': {', '.join(offered)}"
            )


def _batches(
    evaluation: images.Evaluation, manifest: dict[str, Any], console: Console
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The readable images, with progress; the others are named when all is read."""
    console.say(f"accuracy on {len(evaluation)} images: {evaluation.source}")
    with console.progress("accuracy", len(evaluation), "images") as advance:
        for pixels, labels in evaluation.batches(manifest["preprocessing"], BATCH, intake.of_manifest(manifest).take):
            yield pixels, labels
            advance(len(labels), "")
    for name, reason in sorted(evaluation.corrupt.items()):
        console.warn(f"{name} cannot be read and is skipped: {reason}")


def _write(path: Path, document: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(document, indent=1), encoding="utf-8")
    except OSError as error:
        raise errors.StorageError(f"cannot write '{path}': {error.strerror}; choose another --out") from error


def show(found: dict[str, Any]) -> None:
    """What `validate_artifact` found, on stdout: a table of the checks, then the verdict on all of them."""
    from rich.console import Console as Terminal
    from rich.table import Table
    from rich.text import Text

    worker = found["worker"]
    table = Table(
        title=Text(f"{found['artifact']}: {worker['runtime']} {worker['version']}, {worker['threads']} threads")
    )
    for heading in ("check", "value", "limit", "verdict", "reason"):
        numbers, long = heading in ("value", "limit"), heading == "reason"
        table.add_column(heading, justify="right" if numbers else "left", no_wrap=not long)
    for check in found["checks"]:
        bound = ">=" if check["name"] == "accuracy" else "<="
        value, limit = (_amount(check[key], check["name"]) for key in ("value", "limit"))
        table.add_row(*map(Text, (check["name"], value, f"{bound} {limit}", check["verdict"], check["reason"])))
    terminal = Terminal(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    terminal.print(table)
    words = {errors.PASSED: "PASS", errors.GATE_FAILED: "FAIL", errors.INCONCLUSIVE: "INCONCLUSIVE"}
    code = exit_code(Check(**check) for check in found["checks"])
    terminal.print(f"{found['files']} files have their hashes; target {found['target']}, on {found['cpu']}\n{words[code]}",
                   markup=False, soft_wrap=True)  # fmt: skip


def summary(found: dict[str, Any]) -> str:
    """What `validate_artifact` found, for GitHub's step summary."""
    rows = [("check", "value", "limit", "verdict", "reason")]
    for check in found["checks"]:
        value, limit = (_amount(check[key], check["name"]) for key in ("value", "limit"))
        rows.append((check["name"], value, limit, check["verdict"], check["reason"]))
    title = f"## edgeprune validate {found['artifact']}\n\ntarget {found['target']}, on {found['cpu']}\n"
    return "\n".join([title, *report.table(rows)])


def _amount(value: float | None, name: str) -> str:
    """A check's value or limit with its unit; a latency below 1 ms keeps three digits."""
    unit = UNITS.get(name, "ms")
    return "–" if value is None else f"{value:.3g} {unit}" if unit == "ms" and value < 1 else f"{value:.2f} {unit}"
