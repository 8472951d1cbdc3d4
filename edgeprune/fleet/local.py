"""The local engine: processes on this machine."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgeprune import artifact, errors
from edgeprune.fleet import job as process
from edgeprune.fleet.matrix import Job
from edgeprune.fleet.schedule import Outcome, Slot
from edgeprune.latency.machine import here

POLL_S = 0.1


class Local:
    """At most `jobs` processes at a time on this machine. work: a folder for what they write and for their logs."""

    def __init__(self, jobs: int, work: Path, common: Mapping[str, Any]) -> None:
        fingerprint = here().fingerprint
        self._slots = [Slot(f"process {i + 1}", "here", fingerprint) for i in range(jobs)]
        self._work, self._common = work, common
        self._running: list[tuple[Job, subprocess.Popen[str], Path, float]] = []

    def __enter__(self) -> Local:
        return self

    def __exit__(self, *_: object) -> None:
        for _job, child, folder, _began in list(self._running):
            child.kill()
            child.wait()
            shutil.rmtree(folder, ignore_errors=True)

    def slots(self) -> list[Slot]:
        return self._slots

    def start(self, job: Job, slot: Slot, profile: Mapping[str, Any] | None) -> None:
        folder = Path(tempfile.mkdtemp(prefix=".job-", dir=self._work))
        child = begin(document(job, profile, self._common), folder)
        self._running.append((job, child, folder, time.monotonic()))

    def wait(self) -> Outcome:
        while True:
            for i, (job, child, folder, began) in enumerate(self._running):
                if child.poll() is not None:
                    del self._running[i]
                    return Outcome(job, ended(child, folder), folder, time.monotonic() - began)
            time.sleep(POLL_S)


def document(job: Job, profile: Mapping[str, Any] | None, common: Mapping[str, Any]) -> dict[str, Any]:
    """What a job's process is told. common: cache_dir and rebuild."""
    return {"options": dict(job.options), "profiles": job.profiles, "profile": profile, **common}


def begin(given: Mapping[str, Any], folder: Path) -> subprocess.Popen[str]:
    """Start a job's process; it writes to `folder`, its log too, and ends when this process does."""
    with (folder / "log.txt").open("wb") as log:
        child = subprocess.Popen(process.command(folder), stdin=subprocess.PIPE, stdout=log, stderr=log, text=True)
    assert child.stdin is not None
    try:
        child.stdin.write(json.dumps(given) + "\n")
        child.stdin.flush()
    except BrokenPipeError:
        pass  # it has ended already, and its log says why
    return child


def ended(child: subprocess.Popen[str], folder: Path) -> dict[str, Any]:
    """What the job's process said, or that it crashed and the end of its log."""
    if child.stdin is not None:
        with contextlib.suppress(BrokenPipeError):  # it never read what it was told
            child.stdin.close()
    if child.returncode == 0 and (folder / process.RESULT).is_file():
        return artifact.read_json(folder / process.RESULT)
    lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()[-1:]
    reason = "killed, out of memory?" if child.returncode == -9 else f"exit code {child.returncode}"
    return {"exit_code": errors.EdgepruneError.exit_code, "error": f"its process ended with {reason}: {''.join(lines)}"}
