"""Machine: what one device says of itself, and what follows from it for a measurement.

The same questions are asked of the machine that builds (`here`) and of a device at the other end of a connection,
whose worker answers with `describe`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeprune import runtimes
from edgeprune.latency import device

if TYPE_CHECKING:
    from edgeprune.types import Target


@dataclass(frozen=True)
class Machine:
    """One device at one time. `url` is "" for the machine that this process runs on."""

    fingerprint: Mapping[str, Any]  # as `device.fingerprint` has it
    conditions: Mapping[str, Any]  # as `device.conditions` has it
    cpus: int  # that its worker may be scheduled on
    memory: int | None  # bytes free now; None where nobody can tell
    missing: Mapping[str, str]  # runtimes that cannot be used there, and why
    name: str = ""
    url: str = ""

    def same(self, profile: Mapping[str, Any]) -> bool:
        """Whether a profile document was recorded on this very device, set as it is now."""
        return bool(profile["device"] == self.fingerprint and profile.get("conditions") == self.conditions)

    def usable_threads(self, asked: int) -> tuple[int, str]:
        """min(asked, affinity, quota) and the reason in words; see `device.usable_threads`."""
        return device.usable_threads(asked, cpus=self.cpus, quota=self.conditions["quota"])

    def unfit(self, target: Target) -> str:
        """Why this machine cannot run what is built for the target, in words; "" when it can."""
        reason = device.unfit(target, self._flags, str(self.fingerprint["machine"]))
        return reason.replace("and this is", f"and {self.name} is", 1) if self.url else reason

    def cap(self, target: Target) -> str:
        """The instruction set to hold runtimes to: the target's, where this CPU has a wider one; else ""."""
        return target.max_isa if device.needs_cap(target, self._flags) else ""

    def detect(self, targets: Iterable[Target]) -> tuple[Target, str]:
        """The target that asks the most of a CPU and still fits this one, with the reason; see `device.detect`."""
        return device.detect(targets, self.unfit, self.cpu)

    @property
    def cpu(self) -> str:
        return str(self.fingerprint["cpu"])

    @property
    def _flags(self) -> list[str]:
        return str(self.fingerprint["flags"]).split()


def describe() -> dict[str, Any]:
    """The facts of a `Machine` of the system that this process runs on; JSON types only."""
    words = device.cpu_facts(device.read(Path("/proc/meminfo"))).get("memavailable", "").split()
    reasons = {name: runtimes.get(name).available() for name in runtimes.names()}
    return {
        "fingerprint": device.fingerprint(),
        "conditions": device.conditions(),
        "cpus": device.affinity(),
        "memory": int(words[0]) * 1024 if words else None,
        "missing": {name: reason for name, reason in reasons.items() if reason},
    }


def here() -> Machine:
    """This machine, as it is now."""
    return Machine(**describe())


def state(folder: Path, sys_root: Path = Path("/sys")) -> dict[str, Any]:
    """What may make this system slow just now, where it shows it: load, clock rates, room on the disk of `folder`."""
    rates = sys_root.glob("devices/system/cpu/cpu[0-9]*/cpufreq/cpuinfo_max_freq")
    khz = [int(text) for path in rates if (text := device.read(path)).isdigit()]
    return {
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "max_mhz": max(khz) / 1000 if khz else None,
        "governor": device.governor(),
        "disk": shutil.disk_usage(folder).free,
    }
