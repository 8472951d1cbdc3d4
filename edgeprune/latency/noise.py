"""What disturbs a measurement: counters of the system before and after it, and how even its samples are.

Reads /proc, /sys and this process's own usage; changes nothing. What a system does not show is None, so
that "nothing happened" and "nobody can tell" stay apart.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Optional

import numpy as np

from edgeprune import errors
from edgeprune.latency import device, statistics
from edgeprune.types import FloatArray

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

#: From where on a fact of `between` is told as a disturbance.
STEAL_SHARE = 0.01  # of all CPU time; a hypervisor that takes it stops every thread in its tracks
OTHERS_CPUS = 0.25  # CPUs' worth of other work; a quiet system's own housekeeping is a few hundredths
CLOCK_FALL = 0.1  # share of the clock rate; the mean over CPUs wavers as idle ones doze off
#: Degrees Celsius, where throttling itself is not shown: small boards slow down from about 80.
HOT_C = 80.0
#: Consecutive stretches that `stability` compares, and the rounds below which it does not.
STRETCHES = 8

# Fields of the first line of /proc/stat, in ticks. Time of guests is in "user" already.
_IDLE_FIELDS = (3, 4)  # idle, iowait
_STEAL_FIELD = 7
_FIELDS = 8

Counters = dict[str, Optional[float]]  # noqa: UP045 evaluated when imported, also by Python 3.9 on a device


def counters(proc: Path = Path("/proc"), sys_root: Path = Path("/sys")) -> Counters:
    """A snapshot of what disturbs a measurement; None where this system does not show it.

    Of this process with all its threads: `voluntary_switches`, `involuntary_switches`, `cpu_s`,
    `quota_throttled`, the periods in which its control groups ran out of quota, and `waiting_seen`, 1 where
    `RunQueue` can see its threads wait and 0 where it cannot.
    Of the machine, all CPUs together: `cpus` online, `steal_s` and `busy_s` in CPU-seconds (steal is busy),
    `throttled` (throttling for heat, counted per CPU), `mhz` (mean), `temperature_c` (hottest sensor).
    And `wall_s`, a clock that only goes forward.

    proc, sys_root: where /proc and /sys are.
    """
    return {
        "wall_s": time.monotonic(),
        **_usage(),
        **_machine(device.read(proc / "stat")),
        "throttled": _sum(
            _number(device.read(path))
            for path in sys_root.glob("devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count")
        ),
        "quota_throttled": _sum(
            _nr_throttled(device.read(group / "cpu.stat"))
            for group in _groups(device.read(proc / "self/cgroup"), sys_root / "fs/cgroup")
        ),
        "mhz": _mhz(proc, sys_root),
        "temperature_c": _temperature(sys_root),
        "waiting_seen": float(any((proc / "self/task").glob("*/schedstat"))),
    }


def between(before: Mapping[str, float | None], after: Mapping[str, float | None]) -> Counters:
    """JSON facts about the interval between two snapshots of one process; None where either has none.

    `seconds`; `voluntary_switches_per_s`, `involuntary_switches_per_s`; `cpus_used` by the process and
    `others_cpus` by everything else, in CPUs' worth of work (/proc/stat counts in hundredths of a second,
    so `others_cpus` says little about an interval of much less than one); `steal_share` of all CPU time;
    events of `throttled` and `quota_throttled`; `mhz`, `temperature_c` and `waiting_seen` at the end; `mhz_change`, the
    change of the clock rate relative to the start.

    Raises UsageError when no time lies between them.
    """
    seconds = _change(before, after, "wall_s")
    if seconds is None or seconds <= 0:
        raise errors.UsageError("the second snapshot of the counters must be taken after the first")
    rates = {
        name: None if change is None else change / seconds
        for name in ("voluntary_switches", "involuntary_switches", "cpu_s", "busy_s", "steal_s")
        for change in (_change(before, after, name),)
    }
    own, busy, steal = rates["cpu_s"], rates["busy_s"], rates["steal_s"]
    cpus, mhz, mhz_before = after.get("cpus"), after.get("mhz"), before.get("mhz")
    return {
        "seconds": seconds,
        "voluntary_switches_per_s": rates["voluntary_switches"],
        "involuntary_switches_per_s": rates["involuntary_switches"],
        "cpus_used": own,
        "others_cpus": None if own is None or busy is None else max(0.0, busy - own - (steal or 0.0)),
        "steal_share": None if steal is None or not cpus else steal / cpus,
        "throttled": _change(before, after, "throttled"),
        "quota_throttled": _change(before, after, "quota_throttled"),
        "mhz": mhz,
        "mhz_change": None if mhz is None or not mhz_before else mhz / mhz_before - 1,
        "temperature_c": after.get("temperature_c"),
        "waiting_seen": after.get("waiting_seen"),
    }


class RunQueue:
    """How long the threads of this process have waited for a CPU that another process had.

    Linux counts it for every thread; a few microseconds to read. Elsewhere it is always 0, and `disturbances` says so.
    """

    def __init__(self, tasks: Path = Path("/proc/self/task")) -> None:
        self._files: list[int] = []
        if resource is not None:  # a file per thread, and runtimes start many
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            if soft != hard:
                with contextlib.suppress(ValueError, OSError):
                    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        for path in sorted(tasks.glob("*/schedstat")):
            with contextlib.suppress(OSError):  # a thread that has just ended
                self._files.append(os.open(path, os.O_RDONLY))

    def waited_ms(self) -> float:
        """Milliseconds since the threads began, of all that ran when this object was made, together."""
        total = 0
        for file in self._files:
            with contextlib.suppress(OSError):
                total += int(os.pread(file, 64, 0).split()[1])
        return total / 1e6

    def __del__(self) -> None:
        for file in self._files:
            os.close(file)


def stability(samples_ms: FloatArray) -> dict[str, float | int | None]:
    """How even samples `[rounds]` in order of time are; None with fewer rounds than a figure takes.

    `cv`: standard deviation over mean. `p90_over_p50` and `p99_over_p50`: the tails, from 64 and 662 rounds.
    `drift`: median of the last quarter over that of the first, minus 1. `slowest_over_fastest_stretch`: the
    largest over the smallest median of 8 consecutive stretches. `autocorrelation`: of each sample with the
    next; near 0 when rounds are independent, which the bootstrap intervals take for granted.
    """
    samples = np.asarray(samples_ms, dtype=np.float64)
    rounds = len(samples)
    facts: dict[str, float | int | None] = dict.fromkeys(
        ("cv", "p99_over_p50", "p90_over_p50", "drift", "slowest_over_fastest_stretch", "autocorrelation")
    )
    facts = {"rounds": rounds, **facts}
    for name, fewest in statistics.MIN_SAMPLES.items():
        if rounds >= fewest:
            facts[f"{name}_over_p50"] = float(np.quantile(samples, statistics.QUANTILES[name]) / np.median(samples))
    if rounds >= STRETCHES:
        quarters = [float(np.median(part)) for part in np.array_split(samples, 4)]
        stretches = [float(np.median(part)) for part in np.array_split(samples, STRETCHES)]
        deviations = samples - samples.mean()
        power = float(deviations @ deviations)
        facts["cv"] = float(samples.std() / samples.mean())
        facts["drift"] = quarters[-1] / quarters[0] - 1
        facts["slowest_over_fastest_stretch"] = max(stretches) / min(stretches)
        if power > 0:
            facts["autocorrelation"] = float(deviations[1:] @ deviations[:-1]) / power
    return facts


def disturbances(facts: Mapping[str, Any]) -> list[str]:
    """What in the facts of `between` is bad enough to matter, a sentence each; [] when nothing is.

    Involuntary switches are not judged: a runtime whose threads spin and yield makes a thousand a second itself.
    """

    def fact(name: str) -> float:
        return float(facts.get(name) or 0.0)

    found = []
    if facts.get("waiting_seen") == 0:
        found.append(
            "this system did not show how long threads wait for a CPU: runs that other work disturbed count too"
        )
    if fact("steal_share") >= STEAL_SHARE:
        found.append(f"the hypervisor took {100 * fact('steal_share'):.0f} % of the CPU time (steal)")
    if fact("quota_throttled") > 0:
        found.append(f"the control group's quota throttled this process {_times(fact('quota_throttled'))}")
    if fact("throttled") > 0:
        found.append(f"the CPU throttled {_times(fact('throttled'))} for heat")
    elif facts.get("throttled") is None and fact("temperature_c") >= HOT_C:
        found.append(f"the hottest sensor reads {fact('temperature_c'):.0f} °C, where many CPUs slow down")
    if fact("others_cpus") >= OTHERS_CPUS:
        found.append(f"{fact('others_cpus'):.1f} CPUs' worth of other work ran beside")
    if fact("mhz_change") <= -CLOCK_FALL:
        found.append(f"the clock rate fell by {-100 * fact('mhz_change'):.0f} %")
    return found


def _usage() -> Counters:
    """This process with all its threads."""
    if resource is None:
        return dict.fromkeys(("voluntary_switches", "involuntary_switches", "cpu_s"))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "voluntary_switches": float(usage.ru_nvcsw),
        "involuntary_switches": float(usage.ru_nivcsw),
        "cpu_s": usage.ru_utime + usage.ru_stime,
    }


def _machine(stat: str) -> Counters:
    """CPUs online and their CPU-seconds from the text of /proc/stat."""
    facts: Counters = dict.fromkeys(("cpus", "steal_s", "busy_s"))
    lines = stat.splitlines()
    facts["cpus"] = float(sum(line.startswith("cpu") and line[3:4].isdigit() for line in lines)) or None
    words = lines[0].split() if lines else []
    ticks = [_number(word) or 0.0 for word in words[1 : 1 + _FIELDS]]
    if words[:1] == ["cpu"] and any(ticks):  # a sandbox may show the file with nothing but zeros
        ticks_per_s = os.sysconf("SC_CLK_TCK")
        facts["busy_s"] = sum(value for field, value in enumerate(ticks) if field not in _IDLE_FIELDS) / ticks_per_s
        if len(ticks) > _STEAL_FIELD:
            facts["steal_s"] = ticks[_STEAL_FIELD] / ticks_per_s
    return facts


def _groups(cgroup: str, root: Path) -> list[Path]:
    """Folders of the process's control groups for CPU time, parents too: a parent's quota stops it as well."""
    groups = []
    for line in cgroup.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / controllers
        if not base.exists():
            base = root / "cpu"
        parts = [part for part in path.split("/") if part not in ("", "..")]
        groups += [base.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)]
    return groups


def _nr_throttled(cpu_stat: str) -> float | None:
    pairs = (line.partition(" ") for line in cpu_stat.splitlines())
    return next((_number(value) for key, _, value in pairs if key == "nr_throttled"), None)


def _mhz(proc: Path, sys_root: Path) -> float | None:
    """Mean over CPUs; in a virtual machine /proc/cpuinfo often states the nominal rate, which never changes."""
    cpus = sys_root.glob("devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")
    khz = [value for path in cpus if (value := _number(device.read(path)))]
    if khz:
        return float(np.mean(khz)) / 1000
    pairs = (line.partition(":") for line in device.read(proc / "cpuinfo").splitlines())
    mhz = [value for key, _, text in pairs if key.strip() == "cpu MHz" and (value := _number(text))]
    return float(np.mean(mhz)) if mhz else None


def _temperature(sys_root: Path) -> float | None:
    zones = sys_root.glob("class/thermal/thermal_zone*/temp")
    celsius = [value / 1000 for path in zones if (value := _number(device.read(path))) is not None]
    return max(celsius, default=None)


def _number(text: str) -> float | None:
    """The text as a number, or None: sysfs also says "<unknown>" and the like."""
    try:
        return float(text)
    except ValueError:
        return None


def _sum(values: Iterable[float | None]) -> float | None:
    shown = [value for value in values if value is not None]
    return sum(shown) if shown else None


def _change(before: Mapping[str, float | None], after: Mapping[str, float | None], name: str) -> float | None:
    old, new = before.get(name), after.get(name)
    return None if old is None or new is None else new - old


def _times(count: float) -> str:
    return "once" if count == 1 else f"{count:.0f} times"
