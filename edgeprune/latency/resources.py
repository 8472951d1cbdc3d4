"""Resources: peak memory and energy of one model in a worker of its own. What this system does not show is None."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from edgeprune.latency.clock import Clock
from edgeprune.latency.device import cpu_facts, read

#: How long a model runs for its energy; the counters tick every millisecond.
ENERGY_SECONDS = 3.0
POWERCAP = Path("/sys/class/powercap")


def peak_bytes(pid: int, proc: Path = Path("/proc")) -> int | None:
    """The most resident memory that the process has had so far."""
    words = cpu_facts(read(proc / str(pid) / "status")).get("vmhwm", "").split()
    return int(words[0]) * 1024 if words and words[0].isdigit() else None


def microjoules(root: Path = POWERCAP) -> dict[str, tuple[int, int]] | None:
    """RAPL's counters of every CPU package: (now, where it starts again), by zone; None where they cannot be read."""
    found = {}
    for zone in sorted(root.glob("intel-rapl:*")) if root.is_dir() else ():
        if zone.name.count(":") != 1:  # a part of a package
            continue
        try:
            found[zone.name] = (int((zone / "energy_uj").read_text()), int((zone / "max_energy_range_uj").read_text()))
        except (OSError, ValueError):
            return None  # readable by root only, as most kernels have it
    return found or None


def spent_joules(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> float:
    """Energy between two readings; a counter may have started again once."""
    return sum((after[zone][0] - start) % (limit + 1) for zone, (start, limit) in before.items()) / 1e6


def of_model(
    open_clock: Callable[[], Clock], path: Path, inputs: NDArray[Any], root: Path = POWERCAP
) -> dict[str, Any]:
    """`peak_bytes` of a process that runs the model file alone, `runtime_bytes` before it was loaded, and energy.

    inputs: `[n, ...]`, as the file takes them. `joules`: of all CPU packages, per image, whatever else runs and idles
    there included; measured over `joules_images` images.
    """
    with open_clock() as clock:
        pid = int(clock.info["pid"])
        bare = peak_bytes(pid)
        clock.load("model", path)
        clock.predict("model", inputs)
        peak = peak_bytes(pid)
        joules, images = None, 0
        before = microjoules(root)
        if before is not None:
            end = time.monotonic() + ENERGY_SECONDS
            while not images or time.monotonic() < end:
                clock.predict("model", inputs)
                images += len(inputs)
            after = microjoules(root)
            joules = spent_joules(before, after) / images if after is not None else None
    return {"peak_bytes": peak, "runtime_bytes": bare, "joules": joules, "joules_images": images}
