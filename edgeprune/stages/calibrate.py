"""Calibrate: what the model's layers see, and how much each of its units matters.

Writes `moments.safetensors` (mean and damped covariance of the inputs of every `proj` and `fc2`, and of what attentions
read, where their ranks may be lowered),
`tokens.safetensors` (how much each token of each calibration image counts there; empty for a criterion that does
not know the loss) and `levels.npz` (order of removal and error of every level). None depends on the latency
asked for, unless models are pruned one from the other: then the model is the one that is pruned further.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edgeprune import criteria, lowrank, obs, vit
from edgeprune.allocators import pq
from edgeprune.calibration import Calibration
from edgeprune.compat import VisionTransformer
from edgeprune.config import Request
from edgeprune.console import Console
from edgeprune.data import Batch
from edgeprune.errors import UsageError
from edgeprune.shelf import MEMORY, Shelf
from edgeprune.stages import baseline
from edgeprune.types import Levels


def run(request: Request, read: Mapping[str, Path], out: Path, console: Console) -> None:
    dense = baseline.load(request, read["baseline"])
    model, _ = baseline.parent(dense, read)
    images, size = dense.splits.calibration, request.card.calibration.batch_size

    def batches() -> Iterator[Batch]:
        return images.batches(size)

    criterion = criteria.get(request.criterion)
    with lowrank.watched(model) as attentions:
        evidence, found = gather(request, model, dense.sizes, batches, len(images), console)
    refuse_not_finite(found)
    levels = criteria.score(criterion, evidence)
    for level in levels:
        if not np.isfinite(level.errors).all():
            raise UsageError(f"criterion '{request.criterion}' scores {level.kind} of block {level.block} as NaN or infinite; "
                             "choose another --criterion")  # fmt: skip
    labelled = "labelled" if "labels" in criterion.NEEDS else "unlabelled"
    console.say(f"criterion '{request.criterion}': {len(levels)} sub-blocks scored on {len(images)} {labelled} images")
    indices = ", ".join(f"{kind} {i} {index:.3f}" for (i, kind), index in pq.gauge(model).items())
    console.detail(f"PQ index of unit norms (0: all alike, 1: one has everything): {indices}")
    arrays: dict[str, Any] = {}
    for level in levels:
        arrays[f"{level.block}.{level.kind}.order"] = level.order
        arrays[f"{level.block}.{level.kind}.errors"] = level.errors
    np.savez(out / "levels.npz", **arrays)
    tensors: dict[str, Tensor] = {}
    for (block, kind), own in found.moments.items():
        tensors[f"{block}.{kind}.mean"] = own.mean
        tensors[f"{block}.{kind}.hessian"] = obs.damped(own.covariance)
    for block, own in attentions.items():
        tensors[f"{block}.inputs.mean"], tensors[f"{block}.inputs.covariance"] = own.mean, own.covariance
    save_file(tensors, out / "moments.safetensors")
    weights = {f"{block}.{kind}": torch.cat(parts).half() for (block, kind), parts in found.weights.items()}
    save_file(weights, out / "tokens.safetensors")
    dense.splits.report(out, console)


def refuse_not_finite(found: criteria.Statistics) -> None:
    """Raise UsageError naming the first layer whose inputs are not all numbers, or whose gradients are not."""
    inputs = {at: torch.cat([own.mean[None], own.covariance[:, : len(own.mean)]]) for at, own in found.moments.items()}
    for what, tensors in (("inputs", inputs), ("gradients", found.gradients)):
        for (block, kind), own in sorted(tensors.items()):
            if not bool(own.isfinite().all()):
                layer = "attn.proj" if kind == "attn" else "mlp.fc2"
                raise UsageError(
                    f"stage calibrate: the {what} of blocks.{block}.{layer} hold NaN or infinity (or values beyond float32): "
                    "the dense model's weights are broken there, or its preprocessing is; check both on the card"
                )


def gather(
    request: Request,
    model: VisionTransformer,
    sizes: vit.Anatomy,
    batches: Callable[[], Iterator[Batch]],
    count: int,
    console: Console,
) -> tuple[criteria.Evidence, criteria.Statistics]:
    """Statistics of the model's layers on these `count` images, and all that the request's criterion may look at."""
    criterion = criteria.get(request.criterion)
    with console.progress("layer statistics", count, "images") as advance:
        found = criteria.collect(model, batches(), request.seed, advance, uses_loss=criteria.uses_loss(criterion))
    evidence = criteria.Evidence(
        model=model,
        sizes=sizes,
        moments=found.moments,
        gradients=found.gradients,
        batches=batches,
        images=count,
        neuron_grids=vit.grids(sizes, request.target.neuron_step),
        seed=request.seed,
        console=console,
    )
    return evidence, found


def read(folder: Path, dense: baseline.Dense, batch_size: int, shelf: Shelf = MEMORY) -> Calibration:
    """What the stage wrote to `folder`; shelf: where the images wait, and what is found out about each."""
    places = [(i, kind) for i in range(dense.sizes.blocks) for kind in vit.KINDS]
    batches = shelf.keep(pixels for pixels, _ in dense.splits.calibration.batches(batch_size))
    tensors, tokens = load_file(folder / "moments.safetensors"), load_file(folder / "tokens.safetensors")
    with np.load(folder / "levels.npz", allow_pickle=False) as arrays:
        levels = [Levels(i, kind, arrays[f"{i}.{kind}.order"], arrays[f"{i}.{kind}.errors"]) for i, kind in places]
    moments = {(i, kind): (tensors[f"{i}.{kind}.mean"], tensors[f"{i}.{kind}.hessian"]) for i, kind in places}
    lengths = [len(batch) for batch in batches]
    weights = {(i, kind): list(tokens[f"{i}.{kind}"].float().split(lengths)) for i, kind in places} if tokens else None
    labelled = functools.partial(dense.splits.calibration.batches, batch_size)
    blocks = range(dense.sizes.blocks) if dense.sizes.bilinear else ()
    inputs = {i: (tensors[f"{i}.inputs.mean"], tensors[f"{i}.inputs.covariance"]) for i in blocks}
    return Calibration(levels, moments, batches, weights, labelled, shelf, inputs)
