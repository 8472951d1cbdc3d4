"""Facts about this CPU: what identifies it, what it offers, and how much of it we may use.

Reads /proc, /sys and the affinity mask; changes nothing. Functions that read text files take the text
or the path, so that every machine can be tested on any other.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from edgeprune import errors

if TYPE_CHECKING:
    from edgeprune.types import Target

#: Times its files: what a loaded model takes (its weights, a repacked copy of them, scratch).
LOADED = 3

CPUINFO = Path("/proc/cpuinfo")
CGROUP = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")
GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")

_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq")
#: oneDNN's names from narrow to wide, each with the /proc/cpuinfo flags it takes.
ISAS: dict[str, tuple[str, ...]] = {
    "SSE41": ("sse4_1",),
    "AVX": ("avx",),
    "AVX2": ("avx2", "fma"),
    "AVX2_VNNI": ("avx2", "avx_vnni"),
    "AVX2_VNNI_2": ("avx2", "avx_vnni", "avx_vnni_int8", "avx_ne_convert"),
    "AVX512_CORE": _AVX512,
    "AVX512_CORE_VNNI": (*_AVX512, "avx512_vnni"),
    "AVX512_CORE_BF16": (*_AVX512, "avx512_vnni", "avx512_bf16"),
    "AVX512_CORE_FP16": (*_AVX512, "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    "AVX512_CORE_AMX": (*_AVX512, "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16"),
}


def read(path: Path) -> str:
    """The file's text, or "" where this system has no such file."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def cpu_facts(cpuinfo: str) -> dict[str, str]:
    """The fields of the first processor in the text of /proc/cpuinfo, keys in lower case."""
    first = cpuinfo.strip().split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip().lower(): value.strip() for key, value in pairs}


def cpu_flags(cpuinfo: str | None = None) -> frozenset[str]:
    """Instruction sets as /proc/cpuinfo names them: 'flags' on x86, 'Features' on Arm."""
    facts = cpu_facts(read(CPUINFO) if cpuinfo is None else cpuinfo)
    return frozenset(facts.get("flags", facts.get("features", "")).split())


def cpu_model(cpuinfo: str | None = None) -> str:
    """The model name; on Arm, which has none, implementer and part; else the machine type."""
    facts = cpu_facts(read(CPUINFO) if cpuinfo is None else cpuinfo)
    if "model name" in facts:
        return facts["model name"]
    if "cpu part" in facts:
        return f"Arm implementer {facts.get('cpu implementer', '?')} part {facts['cpu part']}"
    return platform.processor() or platform.machine()


def affinity() -> int:
    """How many CPUs this process may be scheduled on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def governor(path: Path = GOVERNOR) -> str:
    """The frequency governor of CPU 0; "" where it cannot be seen, as in most virtual machines."""
    return read(path)


def cgroup_quota(cgroup: str | None = None, root: Path = CGROUP_ROOT) -> float | None:
    """CPUs that the control group grants, e.g. 1.5; None when there is no limit.

    cgroup: the text of /proc/self/cgroup. Limits of parent groups count; versions 1 and 2.
    """
    quotas = []
    for line in (read(CGROUP) if cgroup is None else cgroup).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / controllers if controllers else root
        if controllers and not base.exists():
            base = root / "cpu"
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            quotas.append(_quota(base.joinpath(*parts[:depth])))
    limits = [quota for quota in quotas if quota is not None]
    return min(limits) if limits else None


def _quota(group: Path) -> float | None:
    """The limit of one group itself."""
    words = read(group / "cpu.max").split() or [
        read(group / "cpu.cfs_quota_us"),
        read(group / "cpu.cfs_period_us"),
    ]
    quota, period = [*words, ""][:2]
    if not quota.isdigit() or not period.isdigit():  # "max" in version 2, -1 in version 1, or no such file
        return None
    return int(quota) / int(period)


def usable_threads(asked: int, *, cpus: int | None = None, quota: float | None = None) -> tuple[int, str]:
    """min(asked, affinity, quota rounded down) and the reason in words; asked 0 = all, at least 1.

    cpus, quota: what to use instead of this process's affinity and cgroup quota.
    """
    if asked < 0:
        raise errors.UsageError(f"--threads {asked} is not a thread count; use 0 for all, or 1 or more")
    if cpus is None:
        cpus, quota = affinity(), cgroup_quota() if quota is None else quota
    limits = [(cpus, f"all {cpus} CPUs this process may run on")]
    if asked:
        limits.insert(0, (asked, f"{asked} asked for"))
    if quota is not None:
        # More threads than whole CPUs would be throttled in the middle of an inference.
        limits.append((max(1, int(quota)), f"the cgroup quota of {quota:g} CPUs"))
    threads, reason = min(limits, key=lambda limit: limit[0])
    if asked > threads:
        reason = f"{asked} asked for, limited to {reason}"
    return threads, reason


def fingerprint(cpuinfo: str | None = None) -> dict[str, str | int]:
    """The stable facts that identify this device: the same on every run, whatever the load."""
    facts = cpu_facts(read(CPUINFO) if cpuinfo is None else cpuinfo)
    named = {} if cpu_flags(cpuinfo) else {"node": platform.node()}  # a system that tells little of its CPU
    return {
        **named,
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": cpu_model(cpuinfo),
        "family": facts.get("cpu family", facts.get("cpu architecture", "")),
        "model": facts.get("model", facts.get("cpu part", "")),
        "stepping": facts.get("stepping", facts.get("cpu revision", "")),
        "microcode": facts.get("microcode", ""),
        "flags": " ".join(sorted(cpu_flags(cpuinfo))),
        "cpus": os.cpu_count() or 1,
    }


def room_for(model: Path, meminfo: str | None = None) -> int:
    """How many copies of a model file fit into a quarter of the memory that is free; large where nobody can tell.

    meminfo: the text of /proc/meminfo.
    """
    facts = cpu_facts(read(Path("/proc/meminfo")) if meminfo is None else meminfo)
    words = facts.get("memavailable", "").split()
    size = sum(path.stat().st_size for path in (model, model.with_suffix(".bin")) if path.is_file())
    return copies_in(int(words[0]) * 1024 if words else None, size)


def copies_in(free: int | None, size: int) -> int:
    """How many copies of a model whose files have `size` bytes fit into a quarter of `free` bytes; None = unknown."""
    return 1 << 30 if free is None or not size else free // 4 // (LOADED * size)


def conditions() -> dict[str, str | float | None]:
    """What of this device can be set, and changes latencies: frequency governor and CPU quota."""
    return {"governor": governor(), "quota": cgroup_quota()}


def missing_flags(target: Target, flags: Iterable[str] | None = None) -> list[str]:
    """The instruction sets that the target must have and this CPU (or `flags`) has not."""
    have = cpu_flags() if flags is None else frozenset(flags)
    return [flag for flag in target.cpu_flags if flag not in have]


def unfit(target: Target, flags: Iterable[str] | None = None, machine: str | None = None) -> str:
    """Why this machine cannot run what is built for the target, in words; "" when it can."""
    here = machine or platform.machine()
    if here not in target.machine:
        return f"it is for {' or '.join(target.machine)}, and this is {here}"
    missing = missing_flags(target, flags)
    return f"this CPU lacks {', '.join(missing)}" if missing else ""


def detect(
    targets: Iterable[Target], judge: Callable[[Target], str] | None = None, cpu: str = ""
) -> tuple[Target, str]:
    """The target that asks the most of a CPU and still fits this one, with the reason in words.

    judge, cpu: `unfit` and `cpu_model` of another machine.
    Raises TargetUnavailable when none fits.
    """
    targets = list(targets)
    reasons = {target.name: (judge or unfit)(target) for target in targets}
    fitting = [target for target in targets if not reasons[target.name]]
    if not fitting:
        listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise errors.TargetUnavailable(f"no shipped target fits this machine ({listed}); write one, see README")
    best = max(fitting, key=lambda target: len(target.cpu_flags))
    left = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason)
    return best, f"{cpu or cpu_model()} has {', '.join(best.cpu_flags)}" + (f" ({left})" if left else "")


def widest_isa(flags: Iterable[str] | None = None) -> str:
    """The widest instruction set in oneDNN's names; "" on a CPU that is not x86."""
    have = cpu_flags() if flags is None else frozenset(flags)
    fitting = [name for name, needs in ISAS.items() if have.issuperset(needs)]
    return fitting[-1] if fitting else ""


def needs_cap(target: Target, flags: Iterable[str] | None = None) -> bool:
    """Whether this CPU has wider registers than the target, so that it must be capped to imitate it.

    fp32 kernels differ by register width alone: AVX2_VNNI runs them as AVX2 does.
    Raises UsageError for a max_isa that oneDNN does not know (OpenVINO would silently ignore it).
    """
    if not target.max_isa:
        return False
    if target.max_isa not in ISAS:
        raise errors.unknown(f"max_isa in target {target.name}:", target.max_isa, ISAS)
    widths = list(dict.fromkeys(isa.split("_")[0] for isa in ISAS))
    widest = widest_isa(flags)
    return bool(widest) and widths.index(widest.split("_")[0]) > widths.index(target.max_isa.split("_")[0])
