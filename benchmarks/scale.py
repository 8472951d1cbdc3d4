"""python benchmarks/scale.py [ARCHITECTURE...]: the pieces from which docs/scale.md computes what a build costs.

Prints a row per architecture: parameters, multiply-adds, bytes of the ONNX file and of what travels to a device, seconds
of an export, milliseconds of an inference (ONNX Runtime, one thread), seconds per image of one training step with its
teacher (torch, one thread, float32), and the most memory that this process has held by then.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from edgeprune import vit
from edgeprune.latency import device, parcel
from edgeprune.latency.clock import Clock
from edgeprune.stages import export, simplify

ARCHITECTURES = ("deit_tiny_patch16_224", "deit_small_patch16_224", "vit_base_patch16_224")
BATCH = 8


def measured(architecture: str) -> str:
    model = vit.create(architecture, {}, 1000).eval()
    sizes = vit.anatomy(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dense.onnx"
        began = time.monotonic()
        export.to_onnx(model, sizes.image, Path(folder) / "exported.onnx")
        simplify.simplify(Path(folder) / "exported.onnx", path)
        export_s = time.monotonic() - began
        size = path.stat().st_size
        began = time.monotonic()
        [sent] = parcel.pack(path, values=False).values()
        pack_s = time.monotonic() - began
        with Clock("onnxruntime", threads=1) as clock:
            clock.load("dense", path)
            ms = float(
                np.median(clock.measure(["dense"], "dense", min_rounds=9, max_rounds=9, budget_s=10)["dense"].raw_ms[1])
            )
    student = vit.create(architecture, {}, 1000).train()
    x = torch.randn(BATCH, *sizes.image)
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        with torch.no_grad():
            model(x)
        student(x).square().mean().backward()
        seconds.append((time.monotonic() - began) / BATCH)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return (
        f"| {architecture} | {vit.parameters(model) / 1e6:.1f} M | {vit.macs(sizes, sizes.shape) / 1e9:.2f} G | {size / 1e6:.0f} MB "
        f"| {len(sent) / 1e6:.2f} MB in {pack_s:.1f} s | {export_s:.1f} s | {ms:.0f} ms | {min(seconds):.2f} s | {memory:.1f} GB |"
    )


def main() -> None:
    torch.set_num_threads(1)
    print(f"{device.cpu_model()}, one thread, {time.strftime('%d %B %Y')}")
    print("| model | parameters | multiply-adds | ONNX | travels | export | inference | training step | memory |")
    print("|---|---|---|---|---|---|---|---|---|")
    for architecture in sys.argv[1:] or ARCHITECTURES:
        print(measured(architecture), flush=True)


if __name__ == "__main__":
    main()
