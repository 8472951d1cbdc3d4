"""Choose: which runtimes can measure a target on this machine, and which of them is the fastest."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

from edgeprune import runtimes
from edgeprune.config import Request
from edgeprune.console import Console
from edgeprune.errors import TargetUnavailable, unknown
from edgeprune.latency import device
from edgeprune.latency.clock import Clock, race
from edgeprune.types import Measurement

RACE_SECONDS = 15.0


def cap(request: Request) -> str:
    """The instruction set to hold runtimes to: the target's, where this CPU has a wider one; else ""."""
    return request.target.max_isa if device.needs_cap(request.target) else ""


def clock(request: Request, runtime: str, threads: int) -> Clock:
    """A clock under the request's precision, seed and instruction set."""
    return Clock(runtime, precision=request.precision, threads=threads, max_isa=cap(request), seed=request.seed)


def eligible(request: Request, console: Console) -> list[str]:
    """Runtimes that the target names and that can measure it here; says why one cannot.

    Raises TargetUnavailable when none is left, or not the one asked for.
    """
    if request.runtime and request.runtime not in runtimes.names():
        raise unknown("runtime", request.runtime, runtimes.names())
    reasons = {name: _unusable(name, request) for name in request.target.runtimes}
    if request.runtime:
        reason = reasons.get(
            request.runtime, f"target '{request.target.name}' runs {', '.join(request.target.runtimes)}"
        )
        if reason:
            raise TargetUnavailable(f"runtime '{request.runtime}' cannot be used: {reason}")
        return [request.runtime]
    for name, reason in reasons.items():
        if reason:
            console.say(f"{name} is left out: {reason}")
    usable = [name for name, reason in reasons.items() if not reason]
    if not usable:
        raise TargetUnavailable(
            f"no runtime of target '{request.target.name}' can be used here: {'; '.join(reasons.values())}"
        )
    return usable


def _unusable(name: str, request: Request) -> str:
    runtime, isa = runtimes.get(name), cap(request)
    if reason := runtime.available():
        return reason
    if isa and runtime.cap_environment(isa) is None:
        return (
            f"this CPU has wider instructions than {isa}, and {name} cannot be held to {isa}: "
            f"its times here would say nothing about {request.target.name}"
        )
    return ""


def fastest(request: Request, models: Mapping[str, Path], threads: int) -> tuple[str, dict[str, float]]:
    """The fastest runtime, and how many times as long each one takes; `models` maps runtimes to their files.

    Every runtime has its own worker; they run turn by turn.
    """
    if len(models) == 1:
        return next(iter(models)), dict.fromkeys(models, 1.0)
    with contextlib.ExitStack() as stack:
        entries = []
        for runtime, path in models.items():
            own = stack.enter_context(clock(request, runtime, threads))
            own.load("model", path)
            entries.append((own, "model"))
        measured: dict[str, Measurement] = dict(zip(models, race(entries, 0, budget_s=RACE_SECONDS), strict=True))
    best = min(measured, key=lambda name: measured[name].ratio)
    return best, {name: m.ratio / measured[best].ratio for name, m in measured.items()}
