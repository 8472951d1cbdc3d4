"""Compile: the simplified graph for every runtime the target can use; the faster one is kept, measured.

Writes `model.onnx`, what the winning runtime adds (`model.xml`, `model.bin`), and `compile.json`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from edgeprune import runtimes
from edgeprune.config import Request
from edgeprune.console import Console
from edgeprune.latency import choose, devices
from edgeprune.stages import profile


def run(request: Request, read: Mapping[str, Path], out: Path, console: Console) -> None:
    shutil.copyfile(read["simplify"] / "model.onnx", out / "model.onnx")
    document, table = profile.read_profile(read["profile"])
    # With another device's profile: which runtime is faster there was found there.
    names = [table.runtime]
    here = devices.machine(request.device).same(document)
    if here:
        names = [name for name in choose.eligible(request.conditions, console) if name in document["anchor_ms"]]
    compiled = {
        name: runtimes.get(name).compile(out / "model.onnx", out, request.card.deploy.ir_precision) for name in names
    }
    entries = {name: (files or [out / "model.onnx"])[0] for name, files in compiled.items()}
    with console.busy("timing the runtimes"):
        winner, times = choose.fastest(request.conditions, entries, table.threads)
    for name, files in compiled.items():
        if name != winner:
            for path in files:
                path.unlink()
    why = choose.why(request.conditions, winner, times) if here else "as in the recorded profile"
    console.say(f"runtime of the artifact: {winner}, {why}")
    if request.card.deploy.ir_precision != "fp32" and winner != "openvino":
        console.warn(f"{request.card.deploy.ir_precision} weights were asked for in OpenVINO's files, and {winner} uses none; "
                     "add --runtime openvino to have them")  # fmt: skip
    (out / "compile.json").write_text(json.dumps({"runtime": winner, "entry": entries[winner].name, "times": times}))
