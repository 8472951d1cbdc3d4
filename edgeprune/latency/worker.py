"""The measuring worker: a process that holds one runtime and times models in it.

    python -m edgeprune.latency.worker

It reads one JSON request per line on stdin and answers each with one JSON line on stdout; everything
else that is printed goes to stderr. It ends when stdin closes, even in the middle of an inference.
It imports the standard library, numpy and the one runtime it is told to use. It knows nothing of
rounds, ratios or who the anchor is: it runs what it is told, in the order it is told.

    {"op": "start", "runtime", "precision", "threads", "max_isa", "seed"}   -> {"info"}
    {"op": "load", "name", "path", "copies"}  -> {"facts"}        copies take turns, round by round
    {"op": "warm", "name", "max_runs", "max_s"}  -> {"runs"}      run until the time is stable
    {"op": "turns", "names", "copies", "turn"}  -> {"ms": [...], "waited_ms": [...]}  some untimed runs and a timed one each
    {"op": "predict", "name", "inputs", "outputs"}  -> {}         .npy paths, batch of images in and out
    {"op": "operators", "name", "runs"}     -> {"operators": [...]}  see `Runtime.operators`
    {"op": "unload", "name"}                -> {}
    {"op": "counters"}                      -> {"counters"}       a snapshot of what disturbs this process
    {"op": "modules"}                       -> {"modules"}        what is imported, for tests

An answer of {"error", "kind"} carries the message and the class in `edgeprune.errors` to raise.
"""

from __future__ import annotations

import gc
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune import errors, onnxfile, runtimes
from edgeprune.latency import lines, noise

#: Different inputs per model, so that no run sees the data of the run before it.
RING = 7  # shares no factor with usual numbers of copies: each copy sees each input
#: Untimed runs of a model after another one's: so many, or fewer when they take that long.
UNTIMED_RUNS, UNTIMED_MS = 4, 5.0
#: A model that takes so long needs none: what it finds in the caches is soon its own. Of models of 39, 68 and 255 ms the
#: first run after another model's took 1.006, 0.993 and 1.000 times as long as the next (medians of 80, 80 and 30).
LONG_MS = 50.0
#: Runs in each half of the window in which the time must be stable.
WINDOW = 5
STABLE = 0.05


class Worker:
    """The loaded models of one runtime; each public method answers one `op`."""

    def __init__(self) -> None:
        self._sessions: dict[str, list[runtimes.Session]] = {}  # the copies of each model
        self._paths: dict[str, str] = {}
        self._queue = noise.RunQueue()
        self._rings: dict[tuple[Any, ...], list[NDArray[Any]]] = {}
        self._quickest_ms: dict[str, float] = {}  # run of each model

    def start(self, runtime: str, precision: str, threads: int, max_isa: str, seed: int) -> dict[str, Any]:
        """Set the instruction set cap, then import the runtime: it is read when the library loads."""
        self._runtime = runtimes.get(runtime)
        self._threads, self._precision, self._seed = threads, precision, seed
        missing = self._runtime.available()
        if missing:
            raise errors.TargetUnavailable(missing)
        if max_isa:
            cap = self._runtime.cap_environment(max_isa)
            if cap is None:
                raise errors.TargetUnavailable(
                    f"{runtime} cannot be held to {max_isa} on this CPU; measure on the device itself, or use a runtime that can (--runtime openvino)"
                )
            os.environ.update(cap)
        info = {
            "runtime": runtime,
            "version": self._runtime.version(),
            "precision": precision,
            "threads": threads,
            "max_isa": max_isa,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "pid": os.getpid(),
        }
        return {"info": info}

    def load(self, name: str, path: str, copies: int) -> dict[str, Any]:
        if not os.path.isfile(path):
            raise errors.StorageError(f"there is no model file {path}")
        onnxfile.refuse_outside(Path(path))
        sessions = [self._runtime.open(path, self._threads, self._precision) for _ in range(copies)]
        session = sessions[0]
        self._sessions[name] = sessions
        self._paths[name] = path
        for each in sessions:
            try:
                each.run(self._ring(session)[0])
            except Exception as error:
                raise errors.UsageError(f"{path} opens but does not run: {error}") from error
        gc.collect()
        gc.freeze()
        del self._queue  # its files, before as many are opened again
        self._queue = noise.RunQueue()  # the model's threads exist now
        return {"facts": session.facts}

    def unload(self, name: str) -> dict[str, Any]:
        del self._sessions[name], self._paths[name]
        self._quickest_ms.pop(name, None)
        gc.collect()
        return {}

    def warm(self, name: str, max_runs: int, max_s: float) -> dict[str, Any]:
        """Run until the median of the last runs is that of the runs before them, or a bound is met."""
        end = time.perf_counter() + max_s
        times: list[float] = []
        while len(times) < max_runs and time.perf_counter() < end:
            times.append(self._time(name, len(times), len(times)))
            if len(times) >= 2 * WINDOW:
                now, before = np.median(times[-WINDOW:]), np.median(times[-2 * WINDOW : -WINDOW])
                if abs(now - before) <= STABLE * before:
                    break
        return {"runs": len(times)}

    def turns(self, names: list[str], copies: list[int], turn: int) -> dict[str, Any]:
        """Milliseconds of one run per name, and those that its threads waited for a CPU since the run before it.

        Candidates and anchor see the same input in a round.
        """
        times, waits = [], []
        for name, copy in zip(names, copies):  # a device may have Python 3.9, without strict=
            # Untimed runs bring weights and scratch back into the cache: what deployment, which
            # runs one model, finds there; dozens of models in turn would find each other's.
            # What disturbs them leaves cold caches to the timed one, so their waiting counts too.
            before = self._queue.waited_ms()
            self._return_to(name, copy, turn)
            times.append(self._time(name, copy, turn))
            waits.append(self._queue.waited_ms() - before)
        return {"ms": times, "waited_ms": waits}

    def predict(self, name: str, inputs: str, outputs: str) -> dict[str, Any]:
        session = self._sessions[name][0]
        images = np.load(inputs)
        batch, *sizes = session.input_shape
        if list(images.shape[1:]) != sizes or images.dtype != session.input_type:
            raise errors.UsageError(
                f"model {name} takes {session.input_type} {session.input_shape}, not {images.dtype} {(batch, *images.shape[1:])}"
            )
        rows = []
        for i in range(0, len(images), batch):
            own = images[i : i + batch]
            full = np.concatenate([own, np.repeat(own[-1:], batch - len(own), axis=0)])
            # np.array copies: a session may answer with a view that its next run overwrites.
            rows.append(np.array(session.run(full))[: len(own)])
        np.save(outputs, np.concatenate(rows))
        return {}

    def operators(self, name: str, runs: int) -> dict[str, Any]:
        x = self._ring(self._sessions[name][0])[0]
        # A session of its own: one that profiles is slower, and the loaded one may still be timed.
        return {"operators": self._runtime.operators(self._paths[name], self._threads, self._precision, x, runs)}

    def counters(self) -> dict[str, Any]:
        return {"counters": noise.counters()}

    def modules(self) -> dict[str, Any]:
        return {"modules": sorted(sys.modules)}

    def _ring(self, session: runtimes.Session) -> list[NDArray[Any]]:
        """Random inputs of the session's shape and type; made when first asked for."""
        key = (session.input_type, *session.input_shape)
        if key not in self._rings:
            rng, shape = np.random.default_rng(self._seed), (RING, *session.input_shape)
            if session.input_type == "uint8":
                self._rings[key] = list(rng.integers(0, 256, shape, dtype=np.uint8))
            else:
                self._rings[key] = list(rng.standard_normal(shape, dtype=np.float32))
        return self._rings[key]

    def _return_to(self, name: str, copy: int, turn: int) -> None:
        """Run a copy of a model untimed until it is as fast as if nothing else had run.

        Of a 1 ms model that takes the first four runs after another model's (1.70, 1.43, 1.27, 1.21, then 1.20 ms);
        one of 7 ms is itself again after the first, one of `LONG_MS` at once.
        """
        if self._quickest_ms.get(name, 0.0) >= LONG_MS:
            return
        spent_ms = 0.0
        for run in range(1, UNTIMED_RUNS + 1):
            spent_ms += self._time(name, copy, turn + run)
            if spent_ms >= UNTIMED_MS:
                return

    def _time(self, name: str, copy: int, index: int) -> float:
        """Milliseconds of one run of a copy of the model with one of the inputs; both are counted round and round."""
        sessions = self._sessions[name]
        session = sessions[copy % len(sessions)]
        x = self._ring(session)[index % RING]
        run = session.run
        begin = time.perf_counter_ns()
        run(x)
        took_ms = (time.perf_counter_ns() - begin) / 1e6
        self._quickest_ms[name] = min(took_ms, self._quickest_ms.get(name, took_ms))
        return took_ms


def main() -> None:
    worker = Worker()
    lines.serve(lambda op, arguments: getattr(worker, op)(**arguments))


if __name__ == "__main__":
    main()
