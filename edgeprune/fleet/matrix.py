"""The matrix: `matrix.toml` -> jobs. A target is profiled once per model; every latency is a build that takes the table.

models = ["digits", { model = "deit_small", data-dir = "/data/images" }]
targets = ["cpu-avx2", { target = "cpu-neon", device = "pi" }, { target = "cpu-neon", profile = "old.json" }]
latencies = ["2x", "40%"]

[build]
max-drop = 1.0
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeprune import api, artifact, config, publish
from edgeprune.errors import UsageError, unknown

KEYS = ("models", "targets", "latencies", "build")
#: Options of a build by the key that names them; what a matrix holds itself is no option.
OPTIONS = {
    name.replace("_", "-")
    for name in inspect.signature(api.request).parameters
    if name not in ("model", "target", "latency", "gradual")
}
#: What depends on where it runs, and may be said of a target; anything may be said of a model.
OF_A_TARGET = {"device", "profile", "runtime", "threads", "precision", "quantile", "accuracy-on", "strict-clock"}


@dataclass(frozen=True)
class Job:
    """One process' work: to profile a model on a target, or to build one artifact with that profile."""

    name: str  # also of its log, and a build's of its artifact
    options: Mapping[str, Any]  # of `api.request`, latency too where it is a build
    needs: str = ""  # the job whose profile it takes
    where: str | None = ""  # the machine that it measures on: "" = the one that it runs on, None = of `recorded` alone
    recorded: Mapping[str, Any] | None = None  # the device of a recorded profile, as its fingerprint has it
    profiles: bool = False
    text: Mapping[str, str] = field(default_factory=dict)  # model, target and latency, for people


def read(path: Path) -> list[Job]:
    """The jobs of a matrix, each after those it needs. UsageError names the file and the key that is wrong."""
    table = config.read_toml(path)
    for key in table:
        if key not in KEYS:
            raise UsageError(f"{path}: {unknown('key', key, KEYS)}")
    for key in KEYS[:3]:
        if not isinstance(table.get(key), list) or not table[key]:
            raise UsageError(f"{path}: '{key}' must be a list with at least one entry")
    shared = _options(path, "[build]", table.get("build", {}), OPTIONS)
    models = [_entry(path, "model", entry, OPTIONS) for entry in table["models"]]
    targets = [_entry(path, "target", entry, OF_A_TARGET) for entry in table["targets"]]
    if wrong := [latency for latency in table["latencies"] if not isinstance(latency, str)]:
        raise UsageError(f'{path}: a latency is a text such as "2x", "40%" or "10ms", not {wrong[0]!r}')
    jobs: list[Job] = []
    for model in models:
        for target in targets:
            jobs += _jobs(path, {**shared, **model, **target}, table["latencies"])
    names = [job.name for job in jobs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(
            f"{path}: '{twice[0]}' is there twice; leave one out, or give one of two equal targets a device"
        )
    return jobs


def _jobs(path: Path, options: dict[str, Any], latencies: list[str]) -> list[Job]:
    """Of one model on one target."""
    device = str(options.get("device", ""))
    suffix = (
        "-" + "".join(c if c.isalnum() or c in "-_." else "-" for c in device.removeprefix("ssh://")) if device else ""
    )
    try:
        requests = [api.request(**options, latency=latency)[0] for latency in latencies]
    except TypeError as error:
        raise UsageError(f"{path}: {error}") from error
    own = requests[0]
    text = {"model": own.card.name, "target": own.target.name + (f" on {device}" if device else "")}
    recorded = own.profile is not None
    profiling = "" if recorded else f"profile-{own.card.name}-{own.target.name}{suffix}"
    of = artifact.read_json(own.profile).get("device") if own.profile is not None and own.profile.is_file() else None
    jobs = [] if recorded else [Job(profiling, options, where=device, profiles=True, text=text)]
    for request, latency in zip(requests, latencies, strict=True):
        where = None if recorded and not device else device
        name = publish.artifact_name(request) + suffix
        given = {**options, "latency": latency, **({"profile": str(own.profile.resolve())} if own.profile else {})}
        jobs.append(Job(name, given, profiling, where, of, text={**text, "latency": latency}))
    return jobs


def _entry(path: Path, what: str, entry: Any, known: set[str]) -> dict[str, Any]:
    """A model or a target: its name alone, or a table with options of its own."""
    if isinstance(entry, str):
        return {what: entry}
    if not isinstance(entry, dict) or not isinstance(entry.get(what), str):
        raise UsageError(f"{path}: a {what} is a name or a table with the key '{what}', not {entry!r}")
    return {
        what: entry[what],
        **_options(path, f"{what} '{entry[what]}'", {k: v for k, v in entry.items() if k != what}, known),
    }


def _options(path: Path, where: str, table: Any, known: set[str]) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise UsageError(f"{path}: {where} must be a table of options")
    for key in table:
        if key not in known:
            raise UsageError(f"{path}, {where}: {unknown('option', key, known)}")
    return {key.replace("-", "_"): value for key, value in table.items()}
