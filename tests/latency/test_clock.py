"""python -m pytest tests/latency/test_clock.py

The null runtime's "model" is a text file: `sleep MS`, `cold MS` (thrice as slow in the first three runs after another
model's), `print`, `die` or `hang`. Its time is its own: what a run takes does not depend on how busy the machine is.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeprune import errors
from edgeprune.latency import clock as clock_module
from edgeprune.latency import worker
from edgeprune.latency.clock import BESIDE, Clock, race
from edgeprune.types import Measurement, Quiet

NULL_RUNTIME = """
import os, sys, time, types
import numpy as np
from edgeprune.latency import worker

now_ms = [0.0]
worker.time = types.SimpleNamespace(
    perf_counter=lambda: now_ms[0] / 1000, perf_counter_ns=lambda: int(now_ms[0] * 1e6)
)

def take(ms):
    now_ms[0] += ms
    time.sleep(ms / 1000)

def available(): return ""
def version(): return "0"
def cap_environment(max_isa): return None
def compile(onnx_path, out_dir): return []

cached = [None, 0]  # the session that ran last, and how often

class Session:
    input_shape = (1, 3)
    input_type = "float32"
    def __init__(self, text, threads, precision):
        self.text, self.calls = text, 0
        self.facts = {"precision": precision, "threads": threads, "text": text}
    def run(self, x):
        self.calls += 1
        word, _, value = self.text.partition(" ")
        if word == "sleep":
            take(float(value))
        cached[:] = [self, cached[1] + 1 if cached[0] is self else 1]
        if word == "cold":
            take(float(value) * (3 if cached[1] <= 3 else 1))
        if word == "print":
            print("printed"); os.system("echo printed by a child")
        if self.calls > 1:  # load runs once
            if word == "die":
                print("the reason", file=sys.stderr); os._exit(7)
            if word == "hang":
                time.sleep(1000)
        return 2 * x

def open(path, threads, precision):
    with __builtins__["open"](path) as file:
        text = file.read()
    if text == "bad":
        raise ValueError("a bad model")
    return Session(text, threads, precision)
"""
WORKER = """
import sys
from edgeprune import runtimes
runtimes.__path__.append({folder!r})
from edgeprune.latency import worker
worker.main()
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    (tmp_path / "null.py").write_text(NULL_RUNTIME)
    return [sys.executable, "-c", WORKER.format(folder=str(tmp_path))]


@pytest.fixture
def clock(command: list[str]) -> Iterator[Clock]:
    with Clock("null", threads=1, command=command) as clock:
        yield clock


def model(folder: Path, text: str) -> Path:
    path = folder / f"{text.replace(' ', '-')}.txt"
    path.write_text(text)
    return path


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pid: int) -> bool:
    for _ in range(600):
        if not alive(pid):
            return True
        time.sleep(0.05)
    return False


def test_ratios(clock: Clock, tmp_path: Path) -> None:
    clock.load("dense", model(tmp_path, "sleep 4"))
    clock.load("half", model(tmp_path, "sleep 2"))
    seen: list[tuple[int, float]] = []
    measured = clock.measure(["half", "dense"], "dense", budget_s=10, on_round=lambda *a: seen.append(a))
    assert list(measured) == ["half", "dense"]
    half = measured["half"]
    assert half.ratio == pytest.approx(0.5)
    assert half.ratio_ci[0] <= half.ratio <= half.ratio_ci[1]
    assert half.raw_ms.shape == half.waited_ms.shape == (2, len(seen))
    assert len(seen) >= len(half.samples_ms) == len(half.anchor_ms) >= 20
    assert measured["dense"].ratio == 1.0


def test_the_budget_ends_it_but_never_before_nine_rounds(clock: Clock, tmp_path: Path) -> None:
    clock.load("a", model(tmp_path, "sleep 1"))
    clock.load("b", model(tmp_path, "sleep 1.5"))
    assert clock.measure(["b"], "a", budget_s=0.0)["b"].raw_ms.shape == (2, 9)
    # Which rounds were disturbed is judged anew each round, so that one more may make two more count.
    assert 30 <= len(clock.measure(["b"], "a", ci=0.0, max_rounds=30)["b"].samples_ms) <= 35


def test_a_small_model_is_timed_once_it_is_back_in_the_cache(clock: Clock, tmp_path: Path) -> None:
    clock.load("anchor", model(tmp_path, "sleep 4"))
    clock.load("cold", model(tmp_path, "cold 0.5"), 2)
    found = clock.measure(["cold"], "anchor", max_rounds=30)["cold"]
    assert found.ratio == pytest.approx(0.125)  # cold it is 0.375


@pytest.mark.parametrize(("ms", "runs"), [(1.0, 5), (8.0, 2), (60.0, 1)])
def test_a_long_model_is_timed_at_once(ms: float, runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longer a model, the fewer untimed runs it needs after another one's."""
    now_ms = [0.0]
    own_time = types.SimpleNamespace(perf_counter=lambda: now_ms[0] / 1e3, perf_counter_ns=lambda: int(now_ms[0] * 1e6))
    monkeypatch.setattr(worker, "time", own_time)

    class Session:
        input_shape, input_type = (1, 3), "float32"
        calls = 0

        def run(self, x: object) -> None:
            self.calls += 1
            now_ms[0] += ms

    own = worker.Worker()
    own._seed, session = 0, Session()
    own._sessions["m"] = [session]
    own.warm("m", 1, 1.0)
    session.calls = 0
    assert own.turns(["m"], [0], 0)["ms"] == pytest.approx([ms])
    assert session.calls == runs


def test_a_race_between_two_workers(command: list[str], tmp_path: Path) -> None:
    with Clock("null", threads=1, command=command) as one, Clock("null", threads=1, command=command) as two:
        one.load("m", model(tmp_path, "sleep 2"))
        two.load("m", model(tmp_path, "sleep 4"))
        slow, anchor = race([(two, "m"), (one, "m")], 1, budget_s=5, max_rounds=60)
    assert slow.ratio == pytest.approx(2.0) and anchor.ratio == 1.0


def test_predict_runs_images_in_order(clock: Clock, tmp_path: Path) -> None:
    clock.load("m", model(tmp_path, "sleep 0"))
    images = np.random.default_rng(0).standard_normal((130, 3), dtype=np.float32)
    np.testing.assert_array_equal(clock.predict("m", images), 2 * images)
    with pytest.raises(errors.UsageError, match=r"takes float32 \(1, 3\), not float32 \(1, 4\)"):
        clock.predict("m", np.zeros((1, 4), np.float32))
    with pytest.raises(errors.UsageError, match="no images"):
        clock.predict("m", images[:0])


def test_what_the_library_prints_stays_out_of_the_protocol(clock: Clock, tmp_path: Path) -> None:
    clock.load("m", model(tmp_path, "print"))
    assert clock.predict("m", np.ones((1, 3), np.float32)).tolist() == [[2, 2, 2]]


def test_info_facts_and_unload(clock: Clock, tmp_path: Path) -> None:
    assert clock.info["runtime"] == "null" and clock.info["threads"] == 1 and clock.info["max_isa"] == ""
    assert clock.load("m", model(tmp_path, "sleep 0"))["precision"] == "fp32"
    assert clock.facts["m"]["threads"] == 1
    clock.unload("m")
    with pytest.raises(errors.UsageError, match="unknown loaded model 'm'"):
        clock.unload("m")


def test_errors_of_the_worker_keep_their_class_and_the_worker_lives(clock: Clock, tmp_path: Path) -> None:
    with pytest.raises(errors.StorageError, match="there is no model file"):
        clock.load("m", tmp_path / "nothing.onnx")
    with pytest.raises(errors.EdgepruneError, match="a bad model"):
        clock.load("m", model(tmp_path, "bad"))
    clock.load("m", model(tmp_path, "sleep 0"))


def test_a_dead_worker_says_why(clock: Clock, tmp_path: Path) -> None:
    clock.load("m", model(tmp_path, "die"))
    with pytest.raises(errors.TargetUnavailable, match=r"during 'predict' \(exit code 7\)(.|\n)*the reason"):
        clock.predict("m", np.ones((1, 3), np.float32))
    with pytest.raises(errors.UsageError, match="clock is closed"):
        clock.load("m", tmp_path)


def test_a_hanging_worker_is_killed(command: list[str], tmp_path: Path) -> None:
    with Clock("null", threads=1, command=command, timeout_s=1.5) as clock:
        clock.load("m", model(tmp_path, "hang"))
        with pytest.raises(errors.TargetUnavailable, match=r"did not answer 'predict' within 1\.5 s"):
            clock.predict("m", np.ones((1, 3), np.float32))
        assert not alive(clock.info["pid"])


def test_many_inferences_may_take_longer_than_one(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a board where a model takes seconds: an answer has as much time as what it takes."""
    monkeypatch.setattr(clock_module, "SOON", 2)
    with Clock("null", threads=1, command=command, timeout_s=1.5) as clock:
        clock.load("m", model(tmp_path, "sleep 100"))
        assert len(clock.predict("m", np.ones((25, 3), np.float32))) == 25


def test_ctrl_c_leaves_no_worker(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock.load("m", model(tmp_path, "hang"))

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            clock.measure(["m"], "m")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert wait_until_gone(clock.info["pid"])


def test_a_killed_parent_leaves_no_worker(command: list[str], tmp_path: Path) -> None:
    script = (
        "from edgeprune.latency.clock import Clock; import sys, numpy as np\n"
        f"c = Clock('null', threads=1, command={command!r})\n"
        f"c.load('m', {str(model(tmp_path, 'hang'))!r})\n"
        "print(c.info['pid'], flush=True)\n"
        "c.predict('m', np.ones((1, 3), np.float32))\n"
    )
    root = str(Path(__file__).resolve().parents[2])
    env = {**os.environ, "PYTHONPATH": root}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=env)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_until_gone(pid)


def test_refusals(command: list[str]) -> None:
    with pytest.raises(errors.UsageError, match="did you mean 'onnxruntime'"):
        Clock("onnxruntme", threads=1)
    with pytest.raises(errors.UsageError, match="at least 1 thread"):
        Clock("null", threads=0, command=command)
    with pytest.raises(errors.TargetUnavailable, match="null cannot be held to AVX2"):
        Clock("null", threads=1, max_isa="AVX2", command=command)
    with pytest.raises(errors.TargetUnavailable, match="died during 'start'"):
        Clock("null", threads=1, command=[sys.executable, "-c", "raise SystemExit(3)"])


# Which rounds count -------------------------------------------------------------------------


class Scripted:
    """A clock whose anchor `a` takes 10 ms and candidate `b` 5 ms, but for what `slower` and `waits` say of a round."""

    def __init__(self, slower: Any = lambda turn: 1.0, waits: Any = lambda turn: 0.0) -> None:
        self.slower, self.waits, self.turns = slower, waits, 0
        self.facts = {"a": {"copies": 2}, "b": {"copies": 3}}
        self.met: set[tuple[int, int]] = set()

    def _known(self, names: Any) -> None:
        pass

    def _ask(self, op: str, **request: Any) -> dict[str, Any]:
        if op == "warm":
            return {"runs": 1}
        self.turns = request["turn"] + 1
        self.met.add(tuple(copy for _, copy in sorted(zip(request["names"], request["copies"], strict=True))))  # type: ignore[arg-type]
        ms = {"a": 10.0, "b": 5.0}
        wait = self.waits(request["turn"])
        return {
            "ms": [ms[name] * self.slower(request["turn"]) + (wait if name == "b" else 0) for name in request["names"]],
            "waited_ms": [wait if name == "b" else 0.0 for name in request["names"]],
        }


def scripted(clock: Scripted, **options: Any) -> Any:
    return race([(clock, "a"), (clock, "b")], 0, **{"ci": 0.001, "min_rounds": 40, "budget_s": 5, **options})[1]  # type: ignore[list-item]


class Tiring(Scripted):
    """Every run of a round takes longer than the one before it; the last twice as long as the first."""

    def _ask(self, op: str, **request: Any) -> dict[str, Any]:
        if op == "warm":
            return {"runs": 1}
        names = request["names"]
        self.order = names
        tired = 1 + np.arange(len(names)) / (len(names) - 1)
        return {"ms": (np.where(np.array(names) == "a", 10.0, 5.0) * tired).tolist(), "waited_ms": [0.0] * len(names)}


def test_among_every_few_candidates_of_a_long_round_the_anchor_runs() -> None:
    names = [f"b{i}" for i in range(3 * BESIDE)]
    clock = Tiring()
    clock.facts = {name: {"copies": 1} for name in ["a", *names]}
    entries: Any = [(clock, name) for name in ["a", *names]]
    anchor, *found = race(entries, 0, ci=1e-9, min_rounds=40, max_rounds=40, budget_s=5)
    assert sorted(clock.order) == sorted(["a", "a", "a", *names])
    at = [i for i, name in enumerate(clock.order) if name == "a"]
    assert all(k * (BESIDE + 1) <= place < (k + 1) * (BESIDE + 1) for k, place in enumerate(at))
    assert anchor.ratio == 1
    for one in found:
        assert one.raw_ms.shape == (2, 40)
        assert np.abs(one.raw_ms[0] / one.raw_ms[1] / 0.5 - 1).max() < 0.34, "a third of the round apart at most"
        assert one.ratio == pytest.approx(0.5, rel=0.1)


def test_rounds_that_waited_do_not_count() -> None:
    found = scripted(Scripted(waits=lambda turn: 3.0 * (turn % 2)))
    assert found.ratio == 0.5
    assert set(found.samples_ms) == {5.0}
    assert set(found.raw_ms[0]) == {5.0, 8.0}


def test_each_copy_of_the_candidate_meets_each_of_the_anchor() -> None:
    clock = Scripted()
    scripted(clock)
    assert clock.met == {(a, b) for a in range(2) for b in range(3)}


def test_every_round_counts_when_asked() -> None:
    found = scripted(Scripted(waits=lambda turn: 3.0 * (turn % 3 > 0)), every_round=True, max_rounds=60)
    assert found.ratio == pytest.approx(0.8)
    assert found.calm


def test_a_measurement_waits_for_a_calm_machine() -> None:
    clock = Scripted(slower=lambda turn: 2.0 if turn < 300 else 1.0)
    found = scripted(clock, quiet=Quiet(10.0))
    assert clock.turns >= 300 + 40 - 3
    assert found.calm
    assert len(found.samples_ms) < 60
    assert found.ratio == 0.5


@pytest.mark.parametrize("enough", [True, False])
def test_what_is_undecided_gets_more_time_once(enough: bool) -> None:
    clock, asked = Scripted(waits=lambda turn: time.sleep(0.001) or 0.0), []  # type: ignore[func-returns-value]

    def judge(found: list[Measurement]) -> bool:
        asked.append((time.monotonic() - begin, len(found[-1].samples_ms)))
        return enough

    begin = time.monotonic()
    never_tight = -1.0
    found = scripted(clock, ci=never_tight, max_rounds=100_000, budget_s=0.3, patience=3, enough=judge)
    [(seconds, rounds)] = asked
    assert seconds >= 0.3
    assert (len(found.samples_ms) > rounds) == (not enough)
    assert time.monotonic() - begin >= (0.3 if enough else 0.9)


def test_but_not_for_ever() -> None:
    clock = Scripted(slower=lambda turn: time.sleep(0.001) or 2.0)  # type: ignore[func-returns-value]
    begin = time.monotonic()
    found = scripted(clock, quiet=Quiet(10.0), budget_s=0.5, patience=2)
    assert time.monotonic() - begin > 0.9
    assert clock.turns < 1000, "a thousand disturbed rounds would have been too patient"
    assert not found.calm
