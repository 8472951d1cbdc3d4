"""A sweep: every cell of a matrix built, whatever becomes of the others; the artifacts, their logs and a comparison.

Writes to the output folder: the artifacts, `logs/<job>.txt`, `profiles/<job>.json`, `sweep.json` and `sweep.md`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeprune import artifact, cache, checks, errors, extras, pipeline, report
from edgeprune.console import SILENT, Console
from edgeprune.fleet import job as process
from edgeprune.fleet import matrix, schedule
from edgeprune.fleet.cluster import Cluster
from edgeprune.fleet.local import Local
from edgeprune.fleet.matrix import Job
from edgeprune.fleet.schedule import Outcome

SCHEMA = "edgeprune.sweep/1"
ENGINES = ("local", "ray")
#: What a cell came to, by exit code; any other is an error.
WORDS = {errors.PASSED: "pass", errors.GATE_FAILED: "fail", errors.INCONCLUSIVE: "inconclusive"}


def sweep(
    path: str | Path, *, out: str | Path = "artifacts", cache_dir: str | Path | None = None, rebuild: bool = False,
    engine: str = "local", jobs: int = 1, console: Console = SILENT,
) -> dict[str, Any]:  # fmt: skip
    """Build every cell of the matrix in the TOML file `path`; see `matrix`. A cell that fails does not stop the rest.

    engine: "local", processes on this machine of which `jobs` run at a time, or "ray", a cluster. Returns the document of `sweep.json` (schema
    edgeprune.sweep/1): `exit_code` and for each cell `name`, `exit_code`, `error`, `seconds` and, if it was built, `artifact`.

    Raises UsageError for the matrix, before any work; TargetUnavailable when there is no cluster, or no machine is left of it.
    """
    if engine not in ENGINES:
        raise errors.unknown("engine", engine, ENGINES)
    if jobs < 1:
        raise errors.UsageError(f"jobs must be 1 or more, not {jobs}")
    extras.need_build_packages()
    todo = matrix.read(Path(path))
    folder, stages = Path(out), Path(cache_dir) if cache_dir else pipeline.default_cache_dir()
    for where, option in ((folder, "--out"), (stages, "--cache-dir")):
        artifact.must_be_writable(where, option, folder=True)
    common = {"cache_dir": str(stages.resolve()), "rebuild": rebuild}
    began, ended = time.monotonic(), dict[str, Outcome]()

    def done(outcome: Outcome) -> None:
        ended[outcome.job.name] = outcome
        _keep(outcome, folder)
        result = outcome.result or {}
        said = "profiled" if outcome.job.profiles and not result["exit_code"] else _word(result["exit_code"])
        told = console.warn if result["error"] else console.say
        told(f"{outcome.job.name}: {said} ({outcome.seconds:.0f} s){': ' if result['error'] else ''}{result['error']}")

    console.stage(f"{sum(not job.profiles for job in todo)} artifacts from {path}, engine {engine}")
    try:
        work = Path(tempfile.mkdtemp(prefix=".sweep-", dir=folder))
        try:
            running: Local | Cluster = Local(jobs, work, common) if engine == "local" else Cluster(work, common)
            with running:
                schedule.run(todo, running, done, console)
        finally:
            shutil.rmtree(work, ignore_errors=True)
            document = _document(todo, ended, folder, engine, time.monotonic() - began)
            (folder / "sweep.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
            (folder / "sweep.md").write_text(markdown(document, folder), encoding="utf-8")
    except OSError as error:
        raise errors.StorageError(
            f"the sweep cannot write '{error.filename or folder}': {error.strerror or error}; what is finished is in '{folder}'"
        ) from error
    console.say(f"report: {folder / 'sweep.md'}")
    return document


def _keep(outcome: Outcome, out: Path) -> None:
    """Move what a job wrote to where it belongs."""
    name, result = outcome.job.name, outcome.result or {}
    if "profile" in result:
        (out / "profiles").mkdir(exist_ok=True)
        (out / "profiles" / f"{name}.json").write_text(json.dumps(result["profile"], indent=1), encoding="utf-8")
    if outcome.folder is None:
        return
    if (outcome.folder / "log.txt").is_file():
        (out / "logs").mkdir(exist_ok=True)
        shutil.move(outcome.folder / "log.txt", out / "logs" / f"{name}.txt")
    if "artifact" in result:
        built = outcome.folder / process.ARTIFACTS / str(result["artifact"])
        cache.put(built, out / name)
    shutil.rmtree(outcome.folder, ignore_errors=True)


def _document(
    jobs: Sequence[Job], ended: Mapping[str, Outcome], out: Path, engine: str, seconds: float
) -> dict[str, Any]:
    cells = []
    for job in (job for job in jobs if not job.profiles):
        outcome = ended.get(job.name)
        result = (outcome.result if outcome else None) or {"exit_code": errors.INTERRUPTED, "error": "not run"}
        cells.append(
            {
                "name": job.name, **job.text, "exit_code": result["exit_code"], "error": result["error"],
                "seconds": outcome.seconds if outcome else 0.0,
                "artifact": str(out / job.name) if "artifact" in result else None,
            }
        )  # fmt: skip
    codes = [cell["exit_code"] for cell in cells]
    return {"schema": SCHEMA, "exit_code": checks.worst(codes), "engine": engine, "seconds": seconds, "cells": cells}


def markdown(document: Mapping[str, Any], out: Path) -> str:
    """The artifacts side by side, then what could not be built and why."""
    built = [artifact.read_manifest(out / cell["name"]) for cell in document["cells"] if cell["artifact"]]
    lines = ["# Sweep", "", f"{len(built)} of {len(document['cells'])} artifacts, {document['seconds']:.0f} s, engine {document['engine']}", ""]  # fmt: skip
    if built:
        lines += [report.comparison(built), ""]
    missing = [cell for cell in document["cells"] if not cell["artifact"]]
    if missing:
        lines += ["| not built | exit code | why |", "|---|---|---|"]
        lines += [
            f"| {cell['name']} | {cell['exit_code']} | {str(cell['error']).replace('|', '/')} |" for cell in missing
        ]
    return "\n".join(lines).rstrip() + "\n"


def _word(code: int) -> str:
    return WORDS.get(code, f"error {code}")
