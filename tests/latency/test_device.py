"""python -m pytest tests/latency/test_device.py"""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeprune import errors
from edgeprune.latency import device
from edgeprune.types import Target

INTEL = """processor\t: 0
cpu family\t: 6
model\t\t: 190
model name\t: Intel(R) N100
stepping\t: 0
microcode\t: 0x17
flags\t\t: fpu sse4_1 avx avx2 fma avx_vnni

processor\t: 1
model name\t: another
"""
PI = """processor\t: 0
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU architecture: 8
CPU part\t: 0xd08
CPU revision\t: 3
"""
AVX512 = "sse4_1 avx avx2 fma avx_vnni avx512f avx512bw avx512vl avx512dq"


def target(max_isa: str = "AVX2", cpu_flags: tuple[str, ...] = ("avx2", "fma")) -> Target:
    return Target("cpu-test", "", ("x86_64",), cpu_flags, max_isa, ("onnxruntime",), ("fp32",), 0, 8, "p50")


def test_cpuinfo_of_intel_and_arm() -> None:
    assert device.cpu_model(INTEL) == "Intel(R) N100"
    assert "avx_vnni" in device.cpu_flags(INTEL)
    assert device.cpu_model(PI) == "Arm implementer 0x41 part 0xd08"
    assert "asimd" in device.cpu_flags(PI)
    assert device.cpu_flags("") == frozenset()


def test_fingerprint_is_stable_and_tells_devices_apart() -> None:
    assert device.fingerprint(INTEL) == device.fingerprint(INTEL)
    ids = {str(device.fingerprint(text)) for text in (INTEL, PI)}
    assert len(ids) == 2
    assert device.fingerprint()["cpu"]


@pytest.mark.parametrize(
    ("flags", "isa"),
    [
        ("asimd", ""),
        ("sse4_1", "SSE41"),
        ("sse4_1 avx avx2 fma", "AVX2"),
        ("sse4_1 avx avx2 fma avx_vnni", "AVX2_VNNI"),
        (AVX512, "AVX512_CORE"),
        (f"{AVX512} avx512_vnni", "AVX512_CORE_VNNI"),
        (f"{AVX512} avx512_vnni avx512_bf16", "AVX512_CORE_BF16"),
        (f"{AVX512} avx512_vnni avx512_bf16 amx_tile amx_int8 amx_bf16", "AVX512_CORE_AMX"),
    ],
)
def test_widest_isa(flags: str, isa: str) -> None:
    assert device.widest_isa(flags.split()) == isa


def test_a_wider_host_needs_a_cap() -> None:
    assert device.needs_cap(target("AVX2"), AVX512.split())
    assert not device.needs_cap(target("AVX512_CORE"), AVX512.split())
    assert not device.needs_cap(target(""), AVX512.split())
    assert not device.needs_cap(target("AVX2"), ["asimd"])
    with pytest.raises(errors.UsageError, match="did you mean 'AVX2'"):
        device.needs_cap(target("AVX-2"), AVX512.split())


def test_missing_flags() -> None:
    assert device.missing_flags(target(), device.cpu_flags(INTEL)) == []
    assert device.missing_flags(target(cpu_flags=("avx2", "avx512f")), device.cpu_flags(INTEL)) == ["avx512f"]


def test_cgroup_2_takes_the_tightest_group(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "cpu.max").write_text("150000 100000\n")
    (tmp_path / "a" / "b" / "cpu.max").write_text("max 100000\n")
    assert device.cgroup_quota("0::/a/b\n", tmp_path) == 1.5
    assert device.cgroup_quota("0::/\n", tmp_path) is None
    assert device.cgroup_quota("", tmp_path) is None


@pytest.mark.parametrize("folder", ["cpu", "cpu,cpuacct"])
def test_cgroup_1(tmp_path: Path, folder: str) -> None:
    group = tmp_path / folder / "box"
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text("250000\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / folder / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / folder / "cpu.cfs_period_us").write_text("100000\n")
    text = "5:memory:/box\n4:cpu,cpuacct:/box\n3:cpuset:/box\n0::/\n"
    assert device.cgroup_quota(text, tmp_path) == 2.5


@pytest.mark.parametrize(
    ("asked", "cpus", "quota", "threads", "reason"),
    [
        (0, 4, None, 4, "all 4 CPUs this process may run on"),
        (2, 4, None, 2, "2 asked for"),
        (8, 4, None, 4, "8 asked for, limited to all 4 CPUs this process may run on"),
        (0, 4, 2.5, 2, "the cgroup quota of 2.5 CPUs"),
        (4, 4, 0.5, 1, "4 asked for, limited to the cgroup quota of 0.5 CPUs"),
        (1, 4, 2.0, 1, "1 asked for"),
    ],
)
def test_usable_threads(asked: int, cpus: int, quota: float | None, threads: int, reason: str) -> None:
    assert device.usable_threads(asked, cpus=cpus, quota=quota) == (threads, reason)


def test_usable_threads_here() -> None:
    threads, reason = device.usable_threads(0)
    assert 1 <= threads <= device.affinity() and reason
    with pytest.raises(errors.UsageError, match="--threads -1"):
        device.usable_threads(-1)
