"""Exporting: many shapes of one model as ONNX, shared with a second process where each takes long.

torch's exporter is Python on one core, 5 to 10 s for twelve blocks.

    python -m edgeprune.stages.exporting FOLDER
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from edgeprune import artifact, vit, weightfile
from edgeprune.artifact import PlannedModel
from edgeprune.compat import VisionTransformer
from edgeprune.config import Request
from edgeprune.intake import Intake
from edgeprune.latency import clock, device
from edgeprune.stages import export, shapes
from edgeprune.types import Shape

LONG = 4.0  # seconds of an export from which a second process, which takes about as long to start, is worth it


def export_all(
    request: Request, model: VisionTransformer, wanted: Mapping[Path, Shape], advance: Callable[[int, str], None]
) -> None:
    """Write a simplified ONNX of `model`, the request's dense one, cut to each shape.

    Every other one is written by a second process if the first takes long.
    """
    sizes, todo = vit.anatomy(model), list(wanted.items())

    def here(path: Path, shape: Shape) -> None:
        shapes.export_shape(model, shape, sizes, path, request.reducer)
        advance(1, "")

    began = time.monotonic()
    for path, shape in todo[:1]:
        here(path, shape)
    plain = export.how(model).intake == Intake()  # which is all that the second process knows of
    alone = time.monotonic() - began < LONG or device.usable_threads(0)[0] < 2 or not plain
    theirs = {} if alone else dict(todo[2::2])
    with second(request, model, theirs) as done:
        for path, shape in todo[1:]:
            if path not in theirs:
                here(path, shape)
        if done():
            advance(len(theirs), "")
            return
    for path, shape in theirs.items():
        here(path, shape)


@contextlib.contextmanager
def second(request: Request, model: VisionTransformer, wanted: Mapping[Path, Shape]) -> Iterator[Callable[[], bool]]:
    """A process that exports these, ended with the context; yields what waits for it and tells whether it did it all."""
    if not wanted:
        yield lambda: False
        return
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
        job, sizes = Path(folder), vit.anatomy(model)
        whole = PlannedModel.of(request.card, sizes.num_classes, vit.dense_plan(sizes), 1.0, 1.0)
        artifact.write_plan(whole, job / "plan.json")
        weightfile.write(model, job / "model.safetensors")
        shaped = [[str(path), shape] for path, shape in wanted.items()]
        (job / "wanted.json").write_text(json.dumps({"reducer": request.reducer, "shapes": shaped}))
        process = subprocess.Popen(
            [sys.executable, "-m", "edgeprune.stages.exporting", folder],
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
    """Export what `second` wrote down."""
    model = artifact.rebuild(artifact.read_plan(job / "plan.json"), job / "model.safetensors")
    sizes, asked = vit.anatomy(model), artifact.read_json(job / "wanted.json")
    for path, shape in asked["shapes"]:
        shapes.export_shape(model, tuple(map(tuple, shape)), sizes, Path(path), asked["reducer"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
