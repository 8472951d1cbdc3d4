"""Every way edgeprune refuses, and the exit code each one ends with.

EdgepruneError              70  a defect in edgeprune
├── UsageError               2  bad usage or bad input: the message names the file, key or value, and the fix
├── TargetUnavailable        3  the target's hardware or runtime is not here
├── Infeasible               4  the latency cannot be reached
└── StorageError             5  input/output failure; nothing that was finished is lost

Gates do not raise: an artifact that misses its contract is kept, says so, and ends with
`GATE_FAILED` or `INCONCLUSIVE`. A user who presses Ctrl-C ends with `INTERRUPTED`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

PASSED = 0
GATE_FAILED = 1
INCONCLUSIVE = 6
INTERRUPTED = 130


class EdgepruneError(Exception):
    """Base class; raised itself only for a defect in edgeprune."""

    exit_code = 70


class UsageError(EdgepruneError):
    """Bad usage or bad input. The message names the file, key or value, and the fix."""

    exit_code = 2


class TargetUnavailable(EdgepruneError):
    """The target's instruction set, device or runtime is not on this machine."""

    exit_code = 3


class Infeasible(EdgepruneError):
    """No plan reaches the latency. The message gives the lowest reachable latency."""

    exit_code = 4


class StorageError(EdgepruneError):
    """A file cannot be read or written."""

    exit_code = 5


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is not in `known`: says what was meant, or lists what there is."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names)}"
    return UsageError(f"unknown {kind} '{name}'; {hint}")


def first_line(error: BaseException) -> str:
    """What a library's error says first, or its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
