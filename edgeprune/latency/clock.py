"""The clock: owns measuring workers, and times models turn by turn with an anchor.

Every round runs all candidates in a fresh random order, and the anchor among every few of them: what others do to a
machine may change within a second, and a round of dozens of models takes longer. The order is drawn here and the
time is taken in the worker, around the inference call only; a worker that waits for its turn is idle.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from edgeprune import errors
from edgeprune.latency import device, statistics
from edgeprune.types import FloatArray, Measurement, Quiet

#: Rounds that are run even when the time budget is over: fewer say nothing.
FEWEST_ROUNDS = 9
WARM_RUNS = 40
#: Where in memory a model lies makes it a per cent faster or slower for as long as it is loaded (Mytkowicz et al.,
#: ASPLOS 2009). A model that others are compared with, or that decides a gate, is loaded several times.
COPIES = 4
#: How many times its time budget a measurement may take where the machine is disturbed.
PATIENCE = 4
#: The share of the budget that warming up may take.
WARM_SHARE = 0.2
#: Candidates that share one run of the anchor. On a busy machine two runs next to each other are slowed alike (correlation
#: .84), eight runs apart .64, a round of 76 models apart .36.
BESIDE = 10
PREDICT_CHUNK = 64
#: Inferences that any device is done with within `timeout_s`; it is given more time for more of them.
SOON = 20


class Clock:
    """One worker process with one runtime. A context manager: leaving it ends the worker.

    threads: exactly what the runtime gets; see `device.usable_threads`.
    max_isa: cap the instruction set, in oneDNN's names; "" = none. Runtimes that cannot be capped refuse it.
    timeout_s: longest wait for one answer (loading a model, `SOON` inferences) before the worker is killed.
    command: how to start the worker, when it is not this Python on this machine.
    greeting: the line with which it begins to speak the protocol; what comes before is not for us.

    Raises TargetUnavailable when the runtime is missing, dies or hangs, UsageError for a bad name or model.
    """

    def __init__(
        self,
        runtime: str,
        *,
        precision: str = "fp32",
        threads: int,
        max_isa: str = "",
        seed: int = 0,
        timeout_s: float = 120.0,
        command: Sequence[str] = (),
        greeting: str = "",
    ) -> None:
        if threads < 1:
            raise errors.UsageError(f"a clock needs at least 1 thread, not {threads}")
        self.runtime = runtime
        self.seed = seed
        self.facts: dict[str, dict[str, Any]] = {}  # of every loaded model, by name
        #: How often the worker was lost and found again; only one at the end of a connection can be.
        self.losses = 0
        self._timeout_s = timeout_s
        self._command = list(command) or [sys.executable, "-m", "edgeprune.latency.worker"]
        self._greeting = greeting
        self._open()
        #: Runtime and version, precision, threads and instruction set cap in force, Python, machine, pid.
        self.info: dict[str, Any] = {}
        self._start: dict[str, Any] = {
            "runtime": runtime,
            "precision": precision,
            "threads": threads,
            "max_isa": max_isa,
            "seed": seed,
        }
        try:
            self.info = self._begin()
        except errors.EdgepruneError:
            self.close()
            raise

    def _open(self) -> None:
        """Start the worker's process; it is asked for nothing yet."""
        self._said = ""  # all of its stderr, once it has ended
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 closed by `close`
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=_environment(),
            encoding="utf-8",
            errors="replace",
            start_new_session=True,  # its own process group: what a runtime forks ends with it
        )
        listening = (self._process.stdout, self._answers)
        threading.Thread(target=self._listen, args=listening, daemon=True).start()

    def _begin(self) -> dict[str, Any]:
        """Have the worker load its runtime; returns what it says of itself."""
        info: dict[str, Any] = self._ask("start", **self._start)["info"]
        return info

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker, whatever it is doing."""
        if self._process.poll() is None:
            self._kill()
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        self._stderr.close()

    def _kill(self) -> None:
        if hasattr(os, "killpg"):
            os.killpg(self._process.pid, signal.SIGKILL)
        else:
            self._process.kill()

    def load(self, name: str, path: Path | str, copies: int = 1, *, values: bool = True) -> dict[str, Any]:
        """Open a model file under `name` and run it once; returns the runtime's facts about it.

        copies: how many of it take turns, see `COPIES`; fewer where memory is short.
        values: whether its weights matter; where only its latency does, other weights may be sent to a device.
        """
        path = Path(path).resolve()
        copies = max(1, min(copies, device.room_for(path)))
        facts: dict[str, Any] = self._ask("load", name=name, path=str(path), copies=copies)["facts"]
        facts["copies"] = copies
        self.facts[name] = facts
        return facts

    def unload(self, name: str) -> None:
        """Forget a model and free its memory."""
        self._known([name])
        self._ask("unload", name=name)
        del self.facts[name]

    def measure(
        self,
        names: Sequence[str],
        anchor: str,
        *,
        ci: float = 0.01,
        min_rounds: int = 40,
        max_rounds: int = 1000,
        budget_s: float = 60.0,
        quiet: Quiet | None = None,
        settle: bool = False,
        every_round: bool = False,
        patience: float = PATIENCE,
        fewest: int | None = None,
        enough: Callable[[list[Measurement]], bool] | None = None,
        on_round: Callable[[int, float], None] | None = None,
    ) -> dict[str, Measurement]:
        """Time loaded models turn by turn with the loaded `anchor`; see `race`."""
        entries = [(self, name) for name in dict.fromkeys([anchor, *names])]
        measured = race(
            entries,
            0,
            ci=ci,
            min_rounds=min_rounds,
            max_rounds=max_rounds,
            budget_s=budget_s,
            quiet=quiet,
            settle=settle,
            every_round=every_round,
            patience=patience,
            fewest=fewest,
            enough=enough,
            seed=self.seed,
            on_round=on_round,
        )
        by_name = {measurement.name: measurement for measurement in measured}
        return {name: by_name[name] for name in names}

    def predict(self, name: str, inputs: NDArray[Any]) -> NDArray[Any]:
        """Run images, as many at a time as the model takes. inputs: `[n, *input shape without batch]`; returns `[n, classes]`."""
        self._known([name])
        outputs = []
        with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
            source, result = Path(folder) / "inputs.npy", Path(folder) / "outputs.npy"
            for i in range(0, len(inputs), PREDICT_CHUNK):
                try:
                    np.save(source, np.ascontiguousarray(inputs[i : i + PREDICT_CHUNK]))
                except OSError as error:
                    raise errors.StorageError(f"cannot write {source}: {error}; set TMPDIR elsewhere") from error
                count = len(inputs[i : i + PREDICT_CHUNK])
                self._ask("predict", inferences=count, name=name, inputs=str(source), outputs=str(result))
                outputs.append(np.load(result))
        if not outputs:
            raise errors.UsageError("there are no images to run")
        return np.concatenate(outputs)

    def operators(self, name: str, runs: int = 20) -> list[dict[str, Any]]:
        """Where a loaded model spends its time, by the runtime's own profiler; see `Runtime.operators`."""
        self._known([name])
        found: list[dict[str, Any]] = self._ask("operators", inferences=runs, name=name, runs=runs)["operators"]
        return found

    def counters(self) -> dict[str, float | None]:
        """A snapshot of what disturbs the worker's measurements; see `noise.counters` and `noise.between`."""
        snapshot: dict[str, float | None] = self._ask("counters")["counters"]
        return snapshot

    def modules(self) -> list[str]:
        """What the worker has imported."""
        names: list[str] = self._ask("modules")["modules"]
        return names

    def _known(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.facts:
                raise errors.unknown("loaded model", name, self.facts)

    def _listen(self, stdout: IO[str], answers: queue.SimpleQueue[str]) -> None:
        """Queue the worker's answers; an empty line means that it is gone."""
        greeted = not self._greeting
        with stdout as lines:
            for line in lines:
                if greeted:
                    answers.put(line)
                greeted = greeted or line.strip() == self._greeting
        answers.put("")

    def _ask(self, op: str, *, inferences: int = 1, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer; on anything unexpected the worker is killed.

        inferences: about how many it takes, which decides how long it may.
        """
        timeout_s = self._timeout_s * max(1.0, inferences / SOON)
        if self._process.stdin is None or self._process.stdin.closed:
            raise errors.UsageError(f"the {self.runtime} clock is closed")
        try:
            self._process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._answers.get(timeout=timeout_s)
        except BrokenPipeError:
            line = ""
        except queue.Empty:
            told = self._end()
            raise errors.TargetUnavailable(
                f"the {self.runtime} worker did not answer '{op}' within {timeout_s:g} s and was killed: "
                f"the model is too large or too slow for this machine{told}"
            ) from None
        except BaseException:  # Ctrl-C: never leave a worker with half a conversation
            self.close()
            raise
        if not line:
            told = self._end()
            code = self._process.returncode
            reason = "killed, out of memory?" if code == -9 else f"exit code {code}"
            raise errors.TargetUnavailable(f"the {self.runtime} worker died during '{op}' ({reason}){told}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            kinds = {kind.__name__: kind for kind in errors.EdgepruneError.__subclasses__()}
            raise kinds.get(answer["kind"], errors.EdgepruneError)(answer["error"])
        return answer

    def _end(self) -> str:
        """Kill the worker; returns the last lines of its stderr, ready to append to a message."""
        if self._process.poll() is None:
            try:
                self._process.wait(timeout=0.5)  # its stdout is closed: let it find its own exit code
            except subprocess.TimeoutExpired:
                self._kill()
                self._process.wait()
        self._stderr.seek(0)
        self._said = self._stderr.read().decode(errors="replace").strip()
        lines = self._said.splitlines()[-8:]
        self.close()
        return "; it last said:\n  " + "\n  ".join(lines) if lines else ""


def race(
    entries: Sequence[tuple[Clock, str]],
    anchor: int,
    *,
    ci: float = 0.01,
    min_rounds: int = 40,
    max_rounds: int = 1000,
    budget_s: float = 60.0,
    quiet: Quiet | None = None,
    settle: bool = False,
    every_round: bool = False,
    patience: float = PATIENCE,
    fewest: int | None = None,
    enough: Callable[[list[Measurement]], bool] | None = None,
    seed: int = 0,
    on_round: Callable[[int, float], None] | None = None,
) -> list[Measurement]:
    """Time loaded models, of one clock or several, turn by turn; `entries[anchor]` is the anchor.

    Rounds go on until the half-width of every 95 % interval is at most `ci` of its ratio (0.01 = ± 1 %),
    after `min_rounds` at least, or until `max_rounds` or `budget_s` (warming up included) is over; `fewest`
    rounds (None = 9) are always run. `on_round(rounds, seconds)` is called after each round.
    Runs whose threads had to wait for a CPU do not count. With `quiet`, the anchor on the quiet device, only
    rounds as calm as that do, and a machine that is disturbed is given up to `patience` times the budget to
    calm down. With `settle` the same holds for the quietest stretch of this measurement, if it is quieter; all
    undisturbed rounds are then returned. When the budget is over and what was measured is not `enough`, which is
    asked once, rounds go on for as long as on a disturbed machine. With `every_round` all count, whatever happened: the machine as it is.
    Returns a Measurement per entry in order; the anchor's own ratio is 1.
    """
    for clock, name in entries:
        clock._known([name])
    began = time.monotonic()
    for clock, name in entries:
        clock._ask("warm", name=name, max_runs=WARM_RUNS, max_s=WARM_SHARE * budget_s / len(entries))
    rng = np.random.default_rng(seed)
    names = [name for _, name in entries]
    record = statistics.Record(len(entries), anchor)

    def summarised() -> list[Measurement]:
        return statistics.summarise(names, record.turns, seed, None if settle else quiet)

    fewest = FEWEST_ROUNDS if fewest is None else fewest
    next_look = max(min_rounds, fewest)
    turn, calm, undecided = 0, 0, False
    while calm < max(max_rounds, fewest):
        found = _round(entries, _parts(rng, len(entries), anchor), anchor, turn)
        if every_round:
            found[1] *= 0
        record.add(found)
        turn, seconds = turn + 1, time.monotonic() - began
        if on_round is not None:
            on_round(turn, seconds)
        calm = statistics.calm_count(record.turns, quiet, settle=settle)
        waiting = undecided or (calm < min_rounds and (quiet is not None or settle))
        if turn >= fewest and seconds >= budget_s * (patience if waiting else 1):
            if waiting or enough is None or enough(summarised()):
                break
            undecided = True
        if calm >= next_look:
            measured = summarised()
            if statistics.tight(measured, ci):
                return measured
            next_look = math.ceil(calm * 1.1)  # looking costs a bootstrap per candidate
    return summarised()


def _parts(rng: np.random.Generator, entries: int, anchor: int) -> list[list[int]]:
    """The order of a round: the candidates at random, cut into parts of at most `BESIDE`, with the anchor somewhere in each."""
    candidates = rng.permutation([i for i in range(entries) if i != anchor])
    parts = np.array_split(candidates, max(1, math.ceil(len(candidates) / BESIDE)))
    return [np.insert(part, rng.integers(len(part) + 1), anchor).astype(int).tolist() for part in parts]


def _round(entries: Sequence[tuple[Clock, str]], parts: Sequence[Sequence[int]], anchor: int, turn: int) -> FloatArray:
    """`[3, parts, entries]`: milliseconds of each run, those that it waited, and which copy of the model ran; NaN = none did."""
    found = np.full((3, len(parts), len(entries)), np.nan)
    order = [(k, i) for k, part in enumerate(parts) for i in part]
    # Neighbours of one worker go in one request; the worker's idle time between requests is untimed.
    for _, group in itertools.groupby(order, key=lambda at: id(entries[at[1]][0])):
        runs = list(group)
        which = tuple(zip(*runs, strict=True))
        copies = [_copy(entries[i], i == anchor, turn) for _, i in runs]
        answer = entries[runs[0][1]][0]._ask(
            "turns", inferences=2 * len(runs), names=[entries[i][1] for _, i in runs], copies=copies, turn=turn
        )
        found[0][which], found[1][which], found[2][which] = answer["ms"], answer["waited_ms"], copies
    return found


def _copy(entry: tuple[Clock, str], is_anchor: bool, turn: int) -> int:
    """Which copy of a model runs in a round; over the rounds each of a candidate's meets each of the anchor's."""
    clock, name = entry
    copies: int = clock.facts[name]["copies"]
    return (turn // copies if is_anchor else turn) % copies


def _environment() -> dict[str, str]:
    """The worker's environment: ours, with this very edgeprune importable from any directory."""
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
