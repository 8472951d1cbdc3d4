"""Baseline: the dense model as it came, checked against its data, and as ONNX: the anchor of every measurement.

Writes `dense.safetensors`, `dense.onnx` (simplified) and `baseline.json`; where a selection chose the images to
calibrate and to tune on, also `chosen.npz`, so that all stages see the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeprune import adapting, artifact, numerics, selections, tasks, vit, weightfile
from edgeprune.compat import VisionTransformer
from edgeprune.config import CLASSIFY, FEATURES, ModelSpec, Request
from edgeprune.console import SILENT, Console
from edgeprune.data import Chosen, Images, Splits, check_classes, load_splits, transform_config
from edgeprune.errors import UsageError
from edgeprune.stages import export, simplify
from edgeprune.types import Plan

BATCH = 32  # images that are embedded at once
CLASSIFIERS = ("head.", "head_dist.")  # what an embedding model does not have of a classifier's weights
FIRST_IMAGES = 32  # of calibration, that tell whether the model works


@dataclass(frozen=True)
class Dense:
    """The dense model with its data: what most stages start from."""

    model: VisionTransformer
    sizes: vit.Anatomy
    transforms: dict[str, Any]
    splits: Splits

    def served(self, images: Images) -> Images:
        """The images as the model's files take them."""
        return images.served(export.how(self.model).intake, self.transforms)


def run(request: Request, read: Mapping[str, Path], out: Path, console: Console) -> None:
    model = load_source(request.card, request.weights, console)
    dense = with_data(model, request)
    sizes = dense.sizes
    possible = vit.choosable(request.dims, sizes)
    for name, reason in vit.impossible(sizes).items():
        if name in request.dims:
            console.say(f"{reason}: a plan chooses {', '.join(possible)}")
    if request.card.task == CLASSIFY:
        check_classes(dense.splits, sizes.num_classes)
    if request.selects:
        chosen = select(dense, request, out, console)
        chosen.save(out)
        dense = with_data(model, request, chosen)
    splits = dense.splits
    right = seen = 0
    for pixels, labels in splits.calibration.take(FIRST_IMAGES).batches(request.card.calibration.batch_size):
        with torch.no_grad():
            logits = model(pixels)
        numerics.refuse_not_finite(model, pixels, logits, "baseline", "the weights are broken there: use others")
        right, seen = right + int((logits.argmax(-1) == labels).sum()), seen + len(labels)
    if request.card.task == CLASSIFY and guesses(right, seen, sizes.num_classes):
        console.warn(
            f"the dense model names {right} of {seen} training images rightly, as guessing one of {sizes.num_classes} classes "
            "may: its weights, the order of its classes or its preprocessing may not fit this data"
        )
    parts = ", then ".join(
        f"{s.blocks} blocks of {s.heads} heads and {s.neurons} neurons, {s.tokens} tokens" for s in sizes.stages
    )
    console.say(f"{request.card.architecture}: {parts}, {vit.parameters(model) / 1e6:.2f} M parameters")
    console.say(f"{splits.source}: {len(splits.train)} training, {len(splits.calibration)} calibration, "
                f"{len(splits.evaluation)} evaluation images")  # fmt: skip
    weightfile.write(model, out / "dense.safetensors")
    with console.busy("the dense model to ONNX"):
        export.to_onnx(model, sizes.image, out / "exported.onnx")
    simplify.simplify(out / "exported.onnx", out / "dense.onnx")
    (out / "exported.onnx").unlink()
    facts = {
        "params": vit.parameters(model),
        "macs": vit.macs(sizes, sizes.shape),
        "num_classes": sizes.num_classes,
        "classes": splits.classes,
        "transforms": dense.transforms,
    }
    (out / "baseline.json").write_text(json.dumps(facts, indent=1))


def guesses(right: int, images: int, classes: int) -> bool:
    """Whether so many right answers are no more than one in a hundred who guess would have; False where all would be."""
    from scipy.stats import binom

    rare = 0.01
    return bool(binom.sf(right - 1, images, 1 / classes) > rare > binom.sf(images - 1, images, 1 / classes))


def select(dense: Dense, request: Request, out: Path, console: Console) -> Chosen:
    """What the request's selection chooses of the training images; those it could not read are named."""
    drawn = dense.splits
    order = np.concatenate([drawn.calibration.indices, drawn.train.indices])
    images = Images(drawn.train.source, order, drawn.train.transform, drawn.train.what, drawn.train.corrupt)
    pool = selections.Pool(images, dense.model, BATCH, request.seed, console)
    found = selections.divide(selections.get(request.selection), pool, len(drawn.calibration), request.tune_on)
    console.say(f"selection '{request.selection}': {len(found.calibration)} images to calibrate on and, of the other "
                f"{len(order) - len(found.calibration)}, {len(found.train)} to tune on")  # fmt: skip
    drawn.report(out, console)
    return found


def load_source(card: ModelSpec, weights: Path | None, console: Console = SILENT) -> VisionTransformer:
    """The card's model with its weights, or with those of the file `weights`; of an embedding model without the classifier.

    Weights for another image size, or for RGB where the model takes grey images, are adapted, which is said.
    """
    source = weights or (Path(card.weights) if card.weights not in ("", "hub") else None)
    if source is None and not card.weights:
        raise UsageError(f"the card '{card.name}' has no weights; give a .safetensors or .pth file with --weights")
    model = vit.create(card.architecture, card.arguments, card.num_classes, card.anatomy, pretrained=source is None)
    if source is not None:
        state = weightfile.read(source)
        if card.task == FEATURES and not card.num_classes:
            state = {name: value for name, value in state.items() if not name.startswith(CLASSIFIERS)}
        state, done = adapting.adapt(model, state)
        for what in done:
            console.say(f"weights in '{source}': {what}")
        weightfile.load(model, state, str(source))
    return tasks.mark(model, card.task)


def with_data(model: VisionTransformer, request: Request, chosen: Chosen | None = None) -> Dense:
    transforms = transform_config(request.card, model)
    splits = load_splits(request.card, transforms, request.seed, chosen)
    export.deploy(model, export.deployed(request, transforms, splits.classes))
    return Dense(model, vit.anatomy(model), transforms, splits)


def load(request: Request, folder: Path) -> Dense:
    """The dense model that the baseline stage wrote to `folder`, with its data."""
    facts = json.loads((folder / "baseline.json").read_text())
    card = request.card
    model = vit.create(card.architecture, card.arguments, facts["num_classes"], card.anatomy)
    weightfile.load(model, weightfile.read(folder / "dense.safetensors"), str(folder))
    return with_data(tasks.mark(model, request.card.task), request, Chosen.find(folder))


def parent(dense: Dense, read: Mapping[str, Path]) -> tuple[VisionTransformer, Plan]:
    """What is pruned further, in dense shape, and its plan: what "parent" or "sparsify" left, else the dense model."""
    folder = read.get("parent") or read.get("sparsify")
    if folder is None:
        return dense.model, vit.dense_plan(dense.sizes)
    planned = artifact.read_plan(folder / "plan.json")
    pruned = artifact.rebuild(planned, folder / "model.safetensors")
    return vit.in_dense_shape(dense.model, planned.plan, pruned), planned.plan
