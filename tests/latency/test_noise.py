"""python -m pytest tests/latency/test_noise.py"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_clock import NULL_RUNTIME, WORKER

from edgeprune import errors
from edgeprune.latency import noise
from edgeprune.latency.clock import Clock

HERE = {"wall_s", "voluntary_switches", "involuntary_switches", "cpu_s"}
MACHINE = {"cpus", "steal_s", "busy_s", "throttled", "quota_throttled", "mhz", "temperature_c", "waiting_seen"}


def tree(folder: Path, files: dict[str, str]) -> dict[str, Path]:
    """Fake /proc and /sys in `folder`, as arguments of `counters`."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return {"proc": folder / "proc", "sys_root": folder / "sys"}


def test_an_intel_laptop(tmp_path: Path) -> None:
    tick = os.sysconf("SC_CLK_TCK")
    files = {
        "proc/stat": "cpu  100 10 20 5000 40 3 2 7 50 5\ncpu0 1 1 1 1\ncpu1 1 1 1 1\nintr 5\n",
        "proc/loadavg": "1.25 0.58 0.34 3/94 4135\n",
        "proc/cpuinfo": "cpu MHz\t\t: 1000.0\n",
        "sys/class/thermal/thermal_zone0/temp": "-5000\n",
        "sys/class/thermal/thermal_zone1/temp": "61500\n",
        "sys/class/thermal/thermal_zone2/temp": "not now\n",
        "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "9\n",
    }
    for cpu in (0, 1):
        at = f"sys/devices/system/cpu/cpu{cpu}"
        files[f"{at}/cpufreq/scaling_cur_freq"] = f"{2_000_000 + cpu * 1_000_000}\n"
        files[f"{at}/thermal_throttle/core_throttle_count"] = f"{cpu + 1}\n"
    seen = noise.counters(**tree(tmp_path, files))
    assert seen["cpus"] == 2 and seen["waiting_seen"] == 0
    assert seen["steal_s"] == 7 / tick and seen["busy_s"] == 142 / tick  # guests are in user already
    assert seen["mhz"] == 2500 and seen["throttled"] == 3 and seen["temperature_c"] == 61.5
    assert seen["quota_throttled"] is None


def test_an_arm_board(tmp_path: Path) -> None:
    files = {
        "proc/stat": "cpu  100 0 20 5000\ncpu0 100 0 20 5000\n",
        "proc/cpuinfo": "processor\t: 0\nBogoMIPS\t: 108.00\n",
        "sys/class/thermal/thermal_zone0/temp": "55844",
    }
    seen = noise.counters(**tree(tmp_path, files))
    assert seen["mhz"] is None and seen["throttled"] is None and seen["steal_s"] is None
    assert seen["busy_s"] and seen["temperature_c"] == pytest.approx(55.844)


def test_the_clock_rate_of_cpuinfo(tmp_path: Path) -> None:
    text = "processor : 0\ncpu MHz\t\t: 1000.0\n\nprocessor : 1\ncpu MHz\t\t: 3000.5\n"
    files = {"proc/cpuinfo": text, "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "<unknown>"}
    assert noise.counters(**tree(tmp_path, files))["mhz"] == 2000.25


@pytest.mark.parametrize(
    ("cgroup", "files", "throttled"),
    [
        ("0::/a/b\n", {"a/b/cpu.stat": "usage_usec 5\nnr_throttled 3", "cpu.stat": "usage_usec 9"}, 3),
        ("0::/a/b\n", {"a/b/cpu.stat": "nr_throttled 3", "a/cpu.stat": "nr_throttled 4"}, 7),
        ("0::/../..\n", {"cpu.stat": "nr_throttled 2"}, 2),  # a namespace whose root is ours
        ("4:cpu,cpuacct:/job\n3:cpuset:/x\n", {"cpu,cpuacct/job/cpu.stat": "nr_periods 9\nnr_throttled 5"}, 5),
        ("1:cpu,cpuacct:/job\n0::/\n", {"cpu/cpu.stat": "nr_throttled 6", "unified/cpu.stat": "x"}, 6),
        ("2:name=systemd:/a\n", {"cpu.stat": "nr_throttled 1"}, None),
        ("0::/a\n", {"a/cpu.stat": "usage_usec 5"}, None),
    ],
)
def test_throttling_by_control_groups(
    tmp_path: Path, cgroup: str, files: dict[str, str], throttled: float | None
) -> None:
    groups = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    seen = noise.counters(**tree(tmp_path, {"proc/self/cgroup": cgroup, **groups}))
    assert seen["quota_throttled"] == throttled


@pytest.mark.parametrize("stat", ["", "cpu  0 0 0 0 0 0 0 0 0 0\n", "rubbish\n"])
def test_a_machine_that_shows_nothing(tmp_path: Path, stat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tree(tmp_path, {"proc/stat": stat})
    before = noise.counters(**place)
    assert set(before) == HERE | MACHINE
    assert before.pop("waiting_seen") == 0
    assert all(before[name] is None for name in MACHINE - {"waiting_seen"})
    assert all(before[name] is not None for name in HERE)
    monkeypatch.setattr(noise, "resource", None)
    assert noise.counters(**place)["cpu_s"] is None
    facts = noise.between(before, noise.counters(**place))
    assert [name for name, value in facts.items() if value is not None] == ["seconds", "waiting_seen"]
    assert noise.disturbances(facts)[0].startswith("this system did not show how long threads wait")


def test_this_machine() -> None:
    before = noise.counters()
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
    facts = noise.between(before, noise.counters())
    assert 0 < facts["seconds"] < 10
    assert facts["cpus_used"] is None or 0.01 < facts["cpus_used"] < 1.5
    json.dumps(facts, allow_nan=False)


BEFORE: noise.Counters = {
    "wall_s": 100.0, "cpus": 4.0, "voluntary_switches": 10.0, "involuntary_switches": 5.0,
    "cpu_s": 2.0, "busy_s": 50.0, "steal_s": 1.0, "throttled": 7.0, "quota_throttled": 2.0, "mhz": 2000.0,
    "temperature_c": 50.0, "waiting_seen": 1.0,
}  # fmt: skip
AFTER: noise.Counters = {
    "wall_s": 110.0, "cpus": 4.0, "voluntary_switches": 30.0, "involuntary_switches": 1005.0,
    "cpu_s": 17.0, "busy_s": 72.6, "steal_s": 2.6, "throttled": 10.0, "quota_throttled": 14.0, "mhz": 1760.0,
    "temperature_c": 91.0, "waiting_seen": 1.0,
}  # fmt: skip


def test_between() -> None:
    assert noise.between(BEFORE, AFTER) == pytest.approx({
        "seconds": 10.0, "voluntary_switches_per_s": 2.0, "involuntary_switches_per_s": 100.0, "cpus_used": 1.5,
        "others_cpus": 0.6, "steal_share": 0.04, "throttled": 3.0, "quota_throttled": 12.0, "mhz": 1760.0,
        "mhz_change": -0.12, "temperature_c": 91.0, "waiting_seen": 1.0,
    })  # fmt: skip


def test_between_floors_and_unknowns() -> None:
    assert noise.between(BEFORE, {**AFTER, "busy_s": 60.0})["others_cpus"] == 0.0
    assert noise.between(BEFORE, {**AFTER, "steal_s": None})["steal_share"] is None
    assert noise.between(BEFORE, {**AFTER, "steal_s": None})["others_cpus"] == pytest.approx(0.76)
    assert noise.between({**BEFORE, "mhz": None}, AFTER)["mhz_change"] is None
    assert noise.between(BEFORE, {**AFTER, "cpus": None})["steal_share"] is None
    with pytest.raises(errors.UsageError, match="must be taken after the first"):
        noise.between(AFTER, BEFORE)


def test_disturbances_in_words() -> None:
    assert noise.disturbances(noise.between(BEFORE, AFTER)) == [
        "the hypervisor took 4 % of the CPU time (steal)",
        "the control group's quota throttled this process 12 times",
        "the CPU throttled 3 times for heat",
        "0.6 CPUs' worth of other work ran beside",
        "the clock rate fell by 12 %",
    ]
    assert noise.disturbances({"quota_throttled": 1.0}) == ["the control group's quota throttled this process once"]


def test_small_things_are_no_disturbance() -> None:
    calm = {"steal_share": 0.002, "others_cpus": 0.05, "throttled": 0.0, "temperature_c": 95.0, "mhz_change": 0.3}
    assert noise.disturbances(calm) == []
    hot = noise.disturbances({**calm, "throttled": None})
    assert hot == ["the hottest sensor reads 95 °C, where many CPUs slow down"]


def test_stability_of_independent_noise() -> None:
    samples = 10 * (1 + 0.02 * np.random.default_rng(0).standard_normal(1000))
    facts = noise.stability(samples)
    assert facts["rounds"] == 1000 and facts["cv"] == pytest.approx(0.02, rel=0.15)
    assert facts["p90_over_p50"] == pytest.approx(1.0256, abs=0.005)
    assert facts["p99_over_p50"] == pytest.approx(1.0465, abs=0.015)
    assert abs(facts["drift"] or 0) < 0.01 and abs(facts["autocorrelation"] or 0) < 0.1
    assert 1 <= (facts["slowest_over_fastest_stretch"] or 0) < 1.02


def test_stability_of_drift_and_of_a_slow_stretch() -> None:
    rng = np.random.default_rng(0)
    drifting = noise.stability(np.linspace(10, 12, 400) * (1 + 0.002 * rng.standard_normal(400)))
    assert drifting["drift"] == pytest.approx(0.1463, abs=0.01) and (drifting["autocorrelation"] or 0) > 0.9
    assert drifting["p99_over_p50"] is None and drifting["p90_over_p50"] is not None
    stretch = np.full(400, 10.0)
    stretch[150:200] *= 1.5
    disturbed = noise.stability(stretch)
    assert disturbed["slowest_over_fastest_stretch"] == 1.5 and disturbed["drift"] == 0.0


def test_stability_says_nothing_of_too_few_rounds() -> None:
    few = noise.stability(np.full(63, 3.0))
    assert few["p90_over_p50"] is None and few["cv"] == 0.0 and few["autocorrelation"] is None
    for rounds in (0, 7):
        facts = noise.stability(np.full(rounds, 3.0))
        assert facts.pop("rounds") == rounds and set(facts.values()) == {None}


def test_the_worker_counts(tmp_path: Path) -> None:
    (tmp_path / "null.py").write_text(NULL_RUNTIME)
    (tmp_path / "model.txt").write_text("sleep 5")
    with Clock("null", threads=1, command=[sys.executable, "-c", WORKER.format(folder=str(tmp_path))]) as clock:
        clock.load("m", tmp_path / "model.txt")
        before = clock.counters()
        rounds = 20
        clock.measure(["m"], "m", min_rounds=rounds, max_rounds=rounds)
        facts = noise.between(before, clock.counters())
    assert set(before) == HERE | MACHINE
    assert facts["seconds"] >= 2 * rounds * 0.005
    # Its own sleeps, not ours: each gives the CPU away once.
    assert facts["voluntary_switches_per_s"] is None or facts["voluntary_switches_per_s"] * facts["seconds"] >= rounds


# Waiting for a CPU --------------------------------------------------------------------------


def test_the_run_queue_adds_up_what_threads_waited(tmp_path: Path) -> None:
    for thread, waited in (("11", 2_000_000), ("12", 500_000)):
        (tmp_path / thread).mkdir()
        (tmp_path / thread / "schedstat").write_text(f"123456 {waited} 7\n")
    queue = noise.RunQueue(tmp_path)
    assert queue.waited_ms() == 2.5
    (tmp_path / "11" / "schedstat").write_text("123456 4000000 9\n")
    assert queue.waited_ms() == 4.5


def test_a_system_that_does_not_count_waiting_shows_none(tmp_path: Path) -> None:
    assert noise.RunQueue(tmp_path).waited_ms() == 0
