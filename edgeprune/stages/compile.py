"""Compile: the simplified graph for every runtime the target can use; the faster one is kept, measured.

Writes `model.onnx`, what the winning runtime adds (`model.xml`, `model.bin`), and `compile.json`.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from edgeprune import runtimes
from edgeprune.config import Request
from edgeprune.console import Console
from edgeprune.latency.clock import Clock
from edgeprune.stages import profile


def run(request: Request, read: Mapping[str, Path], out: Path, console: Console) -> None:
    shutil.copyfile(read["simplify"] / "model.onnx", out / "model.onnx")
    _, table = profile.read_profile(read["profile"])
    names = profile.eligible(request, console)
    compiled = {name: runtimes.get(name).compile(out / "model.onnx", out) for name in names}
    entries = {name: (compiled[name] or [out / "model.onnx"])[0] for name in names}
    ratios = dict.fromkeys(names, 1.0)
    if len(names) > 1:
        with contextlib.ExitStack() as stack:
            clocks = []
            for name in names:
                clock = stack.enter_context(Clock(name, precision=table.precision, threads=table.threads,
                                                  max_isa=profile.cap(request), seed=request.seed))  # fmt: skip
                clock.load("model", entries[name])
                clocks.append(clock)
            ratios = {name: m.ratio for name, m in profile.race_named(names, clocks, "model").items()}
    winner = min(names, key=lambda name: ratios[name])
    for name in names:
        if name != winner:
            for path in compiled[name]:
                path.unlink()
    if len(names) > 1:
        others = ", ".join(
            f"{name} takes {ratios[name] / ratios[winner]:.2f} times as long" for name in names if name != winner
        )
        console.say(f"runtime of the artifact: {winner}, measured turn by turn ({others})")
    else:
        console.say(f"runtime of the artifact: {winner}")
    (out / "compile.json").write_text(json.dumps({"runtime": winner, "entry": entries[winner].name, "ratios": ratios}))
