"""Export: the tuned model as ONNX, batch 1, static shapes, checked against torch on calibration images.

Writes `exported.onnx` and `export.json` (greatest difference, top-1 agreement).
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeprune import artifact, numerics, tasks, vit
from edgeprune.compat import VisionTransformer
from edgeprune.config import Request
from edgeprune.console import Console
from edgeprune.errors import EdgepruneError
from edgeprune.stages import baseline

OPSET = 20  # the first with Gelu as one node
INPUT, OUTPUT = "pixels", "logits"
CHECK_IMAGES = 32
MAX_TIES = 1 / 16  # share of the images whose dropped tokens may differ
MAX_ERROR = 1e-3  # of the logits' greatest magnitude; fp32 kernels differ in summation order


def run(request: Request, read: Mapping[str, Path], out: Path, console: Console) -> None:
    dense = baseline.load(request, read["baseline"])
    model = artifact.rebuild(artifact.read_plan(read["finetune"] / "plan.json"), read["finetune"] / "model.safetensors")
    path = out / "exported.onnx"
    with console.busy("torch to ONNX"):
        to_onnx(model, dense.sizes.image, path)
    images, _ = next(dense.splits.calibration.batches(CHECK_IMAGES))
    facts = compare(model, path, images)
    console.say(f"ONNX opset {OPSET}; against torch on {len(images)} images: greatest relative difference "
                f"{facts['max_error']:.1e}, top-1 agreement {facts['agreement']:.1%}")  # fmt: skip
    (out / "export.json").write_text(json.dumps(facts))


def to_onnx(model: VisionTransformer, image: tuple[int, int, int], path: Path) -> None:
    """Write the model as ONNX with one input `pixels` `[1, *image]` and one output `logits` `[1, classes]`."""
    with _quiet():
        program = torch.onnx.export(
            model.eval(), (torch.zeros(1, *image),), dynamo=True, opset_version=OPSET,
            input_names=[INPUT], output_names=[OUTPUT], verbose=False,
        )  # fmt: skip
        assert program is not None
        program.save(str(path), external_data=False)


@torch.no_grad()
def compare(model: VisionTransformer, path: Path, images: Tensor) -> dict[str, Any]:
    """Greatest difference, relative to the greatest output, and top-1 agreement (`tasks.top1`) of the ONNX with torch.

    Where tokens are dropped, two that matter nearly alike may change places between runtimes, and the logits of that
    image with them: such images may be a few, and are counted apart. Raises EdgepruneError above `MAX_ERROR`.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    got = np.concatenate([session.run([OUTPUT], {INPUT: image[None].numpy()})[0] for image in images])
    wanted = model(images)
    numerics.refuse_not_finite(
        model, images, wanted, "export", "lower [finetune] learning_rate, or ask for a milder latency"
    )
    want = wanted.numpy()
    errors = np.abs(got - want).max(-1) / max(float(np.abs(want).max()), 1e-9)
    ties = errors > MAX_ERROR
    if not any(isinstance(block, vit.ReducingBlock) for block in model.blocks) or ties.mean() > MAX_TIES:
        ties[:] = False
    error = float(errors[~ties].max())
    task = tasks.of(model)
    agreement = float((tasks.top1(torch.from_numpy(got), task) == tasks.top1(wanted, task)).float().mean())
    if not error <= MAX_ERROR:
        raise EdgepruneError(
            f"the ONNX differs from torch by {error:.1e} of the greatest logit (at most {MAX_ERROR:.0e})"
        )
    return {"max_error": error, "agreement": agreement, "images": len(images), "opset": OPSET, "ties": int(ties.sum())}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its progress on stdout, which belongs to `--format json`."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
