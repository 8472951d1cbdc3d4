"""Choose: which runtimes can measure a target on this machine, and which of them is the fastest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from edgeprune import runtimes
from edgeprune.config import Conditions
from edgeprune.console import SILENT, Console
from edgeprune.errors import TargetUnavailable, unknown
from edgeprune.latency import devices, noise
from edgeprune.latency.clock import COPIES, Clock, race
from edgeprune.latency.machine import Machine
from edgeprune.types import Measurement, Target

RACE_SECONDS = 15.0


def clock(under: Conditions, runtime: str, threads: int, console: Console = SILENT) -> Clock:
    """A clock at the precision, seed and instruction set of `under`, on its device."""
    return devices.clock(
        under.device, runtime, console=console, precision=under.precision, threads=threads,
        max_isa=devices.machine(under.device).cap(under.target), seed=under.seed,
    )  # fmt: skip


@contextlib.contextmanager
def watched(clock: Clock, console: Console) -> Iterator[None]:
    """Around a measurement: says afterwards what disturbed it, or that nobody could tell."""
    before, losses = clock.counters(), clock.losses
    yield
    if clock.losses != losses:
        console.say("meanwhile the connection was lost, so what else disturbed the device is not known")
        return
    for sentence in noise.disturbances(noise.between(before, clock.counters())):
        console.say(f"meanwhile {sentence}")


def eligible(under: Conditions, console: Console) -> list[str]:
    """Runtimes that the target names and that can measure it here; says why one cannot.

    Raises TargetUnavailable when none is left, or not the one asked for.
    """
    if under.runtime and under.runtime not in runtimes.names():
        raise unknown("runtime", under.runtime, runtimes.names())
    machine = devices.machine(under.device)
    reasons = {name: _unusable(name, under.target, machine) for name in under.target.runtimes}
    if under.runtime:
        reason = reasons.get(under.runtime, f"target '{under.target.name}' runs {', '.join(under.target.runtimes)}")
        if reason:
            raise TargetUnavailable(f"runtime '{under.runtime}' cannot be used: {reason}")
        return [under.runtime]
    for name, reason in reasons.items():
        if reason:
            console.say(f"{name} is left out: {reason}")
    usable = [name for name, reason in reasons.items() if not reason]
    if not usable:
        raise TargetUnavailable(
            f"no runtime of target '{under.target.name}' can be used here: {'; '.join(reasons.values())}"
        )
    return usable


def _unusable(name: str, target: Target, machine: Machine) -> str:
    runtime, isa = runtimes.get(name), machine.cap(target)
    if reason := machine.missing.get(name, ""):
        return f"on {machine.name} {reason}" if machine.url else reason
    if isa and runtime.cap_environment(isa) is None:
        return (
            f"this CPU has wider instructions than {isa}, and {name} cannot be held to {isa}: "
            f"its times here would say nothing about {target.name}"
        )
    return ""


def fastest(under: Conditions, models: Mapping[str, Path], threads: int) -> tuple[str, dict[str, float]]:
    """The fastest runtime, and how many times as long each one takes; `models` maps runtimes to their files.

    Every runtime has its own worker; they run turn by turn.
    """
    if len(models) == 1:
        return next(iter(models)), dict.fromkeys(models, 1.0)
    with contextlib.ExitStack() as stack:
        entries = []
        for runtime, path in models.items():
            own = stack.enter_context(clock(under, runtime, threads))
            own.load("model", path, COPIES)
            entries.append((own, "model"))
        measured: dict[str, Measurement] = dict(zip(models, race(entries, 0, budget_s=RACE_SECONDS), strict=True))
    best = min(measured, key=lambda name: measured[name].ratio)
    return best, {name: m.ratio / measured[best].ratio for name, m in measured.items()}


def why(under: Conditions, runtime: str, times: Mapping[str, float]) -> str:
    """Why this runtime was chosen, in words; `times` as `fastest` returns them."""
    if len(times) == 1:
        return "as asked" if under.runtime else "the only one that this target can use here"
    others = ", ".join(f"{name} takes {ratio:.2f} times as long" for name, ratio in times.items() if name != runtime)
    return f"the fastest, measured turn by turn ({others})"
