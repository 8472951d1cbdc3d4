"""Exporting: many shapes of one model as ONNX, shared with a second process where each takes long.

torch's exporter is Python on one core, 5 to 10 s for twelve blocks.

    python -m edgeprune.stages.exporting JOB
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from edgeprune import vit
from edgeprune.compat import VisionTransformer
from edgeprune.latency import clock, device
from edgeprune.stages import shapes
from edgeprune.types import Shape

LONG = 4.0  # seconds of an export from which a second process, which takes about as long to start, is worth it


def export_all(
    model: VisionTransformer,
    wanted: Mapping[Path, Shape],
    reducer: str,
    advance: Callable[[int, str], None],
) -> None:
    """Write a simplified ONNX of `model` cut to each shape; every other one in a second process if the first takes long."""
    sizes, todo = vit.anatomy(model), list(wanted.items())

    def here(path: Path, shape: Shape) -> None:
        shapes.export_shape(model, shape, sizes, path, reducer)
        advance(1, "")

    began = time.monotonic()
    for path, shape in todo[:1]:
        here(path, shape)
    alone = time.monotonic() - began < LONG or device.usable_threads(0)[0] < 2
    theirs = {} if alone else dict(todo[2::2])
    with second(model, theirs, reducer) as done:
        for path, shape in todo[1:]:
            if path not in theirs:
                here(path, shape)
        if done():
            advance(len(theirs), "")
            return
    for path, shape in theirs.items():
        here(path, shape)


@contextlib.contextmanager
def second(model: VisionTransformer, wanted: Mapping[Path, Shape], reducer: str) -> Iterator[Callable[[], bool]]:
    """A process that exports these, ended with the context; yields what waits for it and tells whether it did it all."""
    if not wanted:
        yield lambda: False
        return
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
        job = Path(folder) / "job"
        try:
            torch.save((model, dict(wanted), reducer), job)
        except (pickle.PicklingError, AttributeError, TypeError):  # of classes that were made while running
            yield lambda: False
            return
        process = subprocess.Popen(
            [sys.executable, "-m", "edgeprune.stages.exporting", str(job)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=clock.environment(),
        )
        try:
            yield lambda: process.wait() == 0
        finally:
            process.kill()
            process.wait()


def main(job: Path) -> None:
    model, wanted, reducer = torch.load(job, weights_only=False)
    sizes = vit.anatomy(model)
    for path, shape in wanted.items():
        shapes.export_shape(model, shape, sizes, path, reducer)


if __name__ == "__main__":
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    main(Path(sys.argv[1]))
