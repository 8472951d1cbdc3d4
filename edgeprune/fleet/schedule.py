"""The schedule: what runs where and when. Knows no engine; whatever fails, the rest goes on.

Two rules of placement: a job that measures on the machine on which it runs has that machine for itself, and no two jobs
measure on one device at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edgeprune import errors
from edgeprune.console import Console
from edgeprune.fleet.matrix import Job

ATTEMPTS = 3  # of a job whose machine is lost


@dataclass(frozen=True)
class Slot:
    """A place for one job at a time."""

    name: str
    machine: str  # slots of one machine share its CPUs
    fingerprint: Mapping[str, Any]  # as a profile's `device` has it


@dataclass(frozen=True)
class Outcome:
    """What became of a job: `folder` holds what it wrote, `result` what it said; None = its machine was lost."""

    job: Job
    result: Mapping[str, Any] | None
    folder: Path | None = None
    seconds: float = 0.0


class Engine(Protocol):
    """What runs jobs; a context manager, and leaving it ends what still runs."""

    def slots(self) -> Sequence[Slot]:
        """Every place there is now; those of machines that are lost are gone."""

    def start(self, job: Job, slot: Slot, profile: Mapping[str, Any] | None) -> None:
        """Run the job there, `profile` being the one of the job that it needs."""

    def wait(self) -> Outcome:
        """Wait until one of the running jobs has ended."""


def place(
    job: Job, slots: Sequence[Slot], running: Mapping[str, Job], profile: Mapping[str, Any] | None = None
) -> Slot | None:
    """Where a job may run now; None = it has to wait. `running`: jobs by the name of their slot."""
    busy = {slot.machine for slot in slots if slot.name in running}
    alone = {slot.machine for slot in slots if slot.name in running and measures_there(running[slot.name], slot)}
    if job.where and any(other.where == job.where for other in running.values()):
        return None
    alike = [slot for slot in slots if profile is not None and slot.fingerprint == profile["device"]]
    if job.where == "":
        # Where its profile was taken, or on a machine of that kind; elsewhere it could only predict.
        fitting = [slot for slot in alike or slots if slot.machine not in busy]
    else:
        free = [slot for slot in slots if slot.name not in running and slot.machine not in alone]
        fitting = [slot for slot in free if not (measures_there(job, slot) and slot.machine in busy)]
        fitting.sort(key=lambda slot: slot.machine in busy)
    return fitting[0] if fitting else None


def measures_there(job: Job, slot: Slot) -> bool:
    """Whether a job measures on the machine on which it runs, in that place."""
    return job.where == "" or (job.where is None and job.recorded == slot.fingerprint)


def run(jobs: Sequence[Job], engine: Engine, done: Callable[[Outcome], None], console: Console) -> None:
    """Run all jobs; `done` is told of each one as it ends. A job whose profile failed fails with it.

    Raises TargetUnavailable when no machine is left.
    """
    waiting, running = list(jobs), dict[str, Job]()
    profiles: dict[str, Mapping[str, Any]] = {}
    failed: dict[str, Mapping[str, Any]] = {}
    attempts: dict[str, int] = {}

    def finish(outcome: Outcome) -> None:
        result = outcome.result or {}
        if outcome.job.profiles and "profile" in result:
            profiles[outcome.job.name] = result["profile"]
        elif outcome.job.profiles:
            failed[outcome.job.name] = result
        done(outcome)

    while waiting or running:
        slots = engine.slots()
        if not slots and not running:
            raise errors.TargetUnavailable(
                "no machine is left to run on; what is finished is kept: run the same command again"
            )
        for job in list(waiting):
            if job.needs in failed:
                waiting.remove(job)
                finish(Outcome(job, failed[job.needs]))
            elif not job.needs or job.needs in profiles:
                slot = place(job, slots, running, profiles.get(job.needs))
                if slot is not None:
                    waiting.remove(job)
                    running[slot.name] = job
                    console.say(f"{job.name}: runs on {slot.name}")
                    engine.start(job, slot, profiles.get(job.needs))
        if not running:
            continue
        outcome = engine.wait()
        running = {name: job for name, job in running.items() if job != outcome.job}
        if outcome.result is not None:
            finish(outcome)
            continue
        attempts[outcome.job.name] = attempts.get(outcome.job.name, 1) + 1
        if attempts[outcome.job.name] > ATTEMPTS:
            reason = f"its machine was lost {ATTEMPTS} times"
            finish(Outcome(outcome.job, {"exit_code": errors.TargetUnavailable.exit_code, "error": reason}))
        else:
            console.warn(
                f"{outcome.job.name}: its machine was lost; attempt {attempts[outcome.job.name]} of {ATTEMPTS}"
            )
            waiting.insert(0, outcome.job)
