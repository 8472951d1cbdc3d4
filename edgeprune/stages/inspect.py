"""Inspect: where the pruned model differs from the dense one: classes, images, confidence, corruptions, features, memory.

Gates nothing. Writes `inspection.json`, which the report shows.
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from edgeprune import artifact, corruptions, inspection, neighbours
from edgeprune.config import FEATURES, Request
from edgeprune.console import Console
from edgeprune.data import Images
from edgeprune.inspection import Predictions
from edgeprune.latency import choose, machine, resources
from edgeprune.latency.clock import Clock
from edgeprune.neighbours import Predictor
from edgeprune.stages import baseline, export, profile, validate

SEVERITY = 3
#: How long both models run on corrupted images, about; it decides how many, the first few at least.
ROBUSTNESS_SECONDS = 20.0
ROBUSTNESS_IMAGES = 256  # at most
FIRST, CHUNK = 4, 64  # images of the first chunk, which tells how long one takes, and at most of the others
GEOMETRY_IMAGES = 64
EXAMPLES = 12  # flipped images shown, of each kind
POWERED = 8  # images that run over and over while memory and energy are measured, or a whole batch
THUMBNAIL = 96  # pixels
BATCH = 32


def run(request: Request, read: Mapping[str, Path], out: Path, console: Console) -> None:
    dense = baseline.load(request, read["baseline"])
    document, table = profile.read_profile(read["profile"])
    compiled = artifact.read_json(read["compile"] / "compile.json")
    here = not request.device and machine.here().same(document)
    parts = dense.splits.domains or {"": dense.splits.evaluation}
    held_out = request.card.data.held_out_domain or None
    said = {name: own for name, own in inspection.load(read["validate"] / "answers.npz").items() if name != held_out}
    every = inspection.joined(list(said.values()))
    entry = read["compile"] / compiled["entry"]

    def clock() -> Clock:
        if here:
            return choose.clock(request.conditions, compiled["runtime"], table.threads)
        return validate.accuracy_clock(request, compiled["runtime"], table.threads)

    flipped = inspection.flips(every, EXAMPLES)
    places = [(parts[name], int(place)) for name, own in said.items() for place in own.places]
    flipped["examples"] = {
        kind: [
            {
                **_said(every, i, dense.splits.classes),
                "thumbnail": thumbnail(places[i][0], places[i][1], dense.transforms),
            }
            for i in rows
        ]
        for kind, rows in flipped["examples"].items()
    }
    with clock() as answering:
        answering.load("dense", read["baseline"] / "dense.onnx")
        answering.load("pruned", entry)
        judge: Predictor = answering
        if request.card.task == FEATURES:
            judge = neighbours.Judge(answering, _references(request, read["validate"]))
        served = {name: dense.served(own) for name, own in parts.items()}
        robust = robustness(judge, served, said, dense.transforms, request.seed, console)
    first = next(iter(parts.values()))
    few = next(first.take(GEOMETRY_IMAGES).batches(GEOMETRY_IMAGES))[0]
    planned = artifact.read_plan(read["finetune"] / "plan.json")
    pruned = artifact.rebuild(planned, read["finetune"] / "model.safetensors")
    files = {"dense": read["baseline"] / "dense.onnx", "pruned": entry}
    _, inputs = export.check_images(dense, max(POWERED, export.how(dense.model).intake.batch))
    with console.busy("memory and energy"):
        used = {name: resources.of_model(clock, path, inputs) for name, path in files.items()} if here else {}
    facts = {
        "images": len(every.labels),
        "classes": inspection.per_class(every, dense.splits.classes),
        "calibration": inspection.calibration(every),
        "flips": flipped,
        "robustness": robust,
        "geometry": {"images": len(few), "blocks": geometry(dense.model.eval(), pruned, few)},
        "resources": used,
        "bytes": {name: _size(path) for name, path in files.items()},
    }  # fmt: skip
    dense.splits.report(out, console)
    (out / "inspection.json").write_text(json.dumps(facts))
    console.say(
        f"{flipped['lost']} of {len(every.labels)} images lost, {flipped['gained']} gained; {robust['images']} images under "
        f"{len(robust['kinds'])} corruptions of severity {SEVERITY}: drop {robust['all']['drop']:.2f} points"
        if robust["kinds"] else f"{flipped['lost']} of {len(every.labels)} images lost, {flipped['gained']} gained; {robust['left_out']}"
    )  # fmt: skip


def _references(request: Request, folder: Path) -> dict[str, neighbours.Reference]:
    """What the stage validate judged both models by."""
    classes = artifact.read_json(folder / "validation.json")["features"]["classes"]
    count = request.card.features.neighbours
    return {name: neighbours.load(folder / f"{name}-{neighbours.FILE}", count, classes) for name in inspection.MODELS}


def robustness(
    clock: Predictor, parts: Mapping[str, Images], said: Mapping[str, Predictions], transforms: Mapping[str, Any], seed: int,
    console: Console,
) -> dict[str, Any]:  # fmt: skip
    """Accuracy of both loaded models on corrupted copies of the same images, drawn by the seed, as many as time allows.

    Each kind is compared pair by pair, and all of them together; `clean` is the same images as they are.
    """
    if transforms["input_size"][0] != 3:
        return {"severity": SEVERITY, "images": 0, "kinds": [], "left_out": "corruptions are for RGB images"}
    total, rng = sum(len(own.labels) for own in said.values()), np.random.default_rng(seed)
    drawn = rng.permutation(total)[:ROBUSTNESS_IMAGES]
    mean, std = (np.array(transforms[key], np.float32).reshape(-1, 1, 1) for key in ("mean", "std"))
    chunks: list[NDArray[np.bool_]] = []  # [kinds, 2, images] each
    seen: list[NDArray[np.int64]] = []
    start = told = time.monotonic()
    with console.progress("corruptions", ROBUSTNESS_SECONDS, "s") as advance:
        at, size = 0, FIRST
        while at < len(drawn) and size > 0:
            mine = np.sort(drawn[at : at + size])
            pixels, labels = _drawn(parts, said, mine)
            images = pixels if pixels.dtype == np.uint8 else _unnormalised(pixels, mean, std)
            raw = pixels.dtype == np.uint8
            chunks.append(
                np.stack(
                    [
                        _right(clock, kind, images, labels, rng, None if raw else (mean, std))
                        for kind in corruptions.KINDS
                    ]
                )
            )
            seen.append(mine)
            at += len(mine)
            now = time.monotonic()
            advance(now - told, f"{at} images")
            told = now
            size = min(int((start + ROBUSTNESS_SECONDS - now) * at / max(now - start, 1e-9)), CHUNK)
    right = np.concatenate(chunks, axis=-1)
    clean = inspection.joined(list(said.values())).right[:, np.concatenate(seen)]
    # An image counts once in the whole: its kinds are no independent draws.
    together = right.mean(axis=0)
    return {
        "severity": SEVERITY,
        "images": right.shape[-1],
        "clean": inspection.paired(clean[0], clean[1]),
        "kinds": [
            {"name": kind, **inspection.paired(own[0], own[1])}
            for kind, own in zip(corruptions.KINDS, right, strict=True)
        ],
        "all": inspection.paired(together[0], together[1]),
    }


def _right(
    clock: Predictor, kind: str, images: NDArray[np.uint8], labels: NDArray[np.int64], rng: np.random.Generator,
    normal: tuple[NDArray[np.float32], NDArray[np.float32]] | None,
) -> NDArray[np.bool_]:  # fmt: skip
    """`[2, n]`: whether the dense and the pruned model name the corrupted images `[n, height, width, 3]` rightly.

    normal: mean and standard deviation by which images are normalised for the models; None = they take raw ones.
    """
    changed = np.stack([corruptions.corrupt(kind, image, rng, SEVERITY) for image in images])
    inputs: NDArray[Any] = changed
    if normal is not None:
        inputs = (changed.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255) - normal[0]) / normal[1]
    return np.stack([clock.predict(name, inputs).argmax(-1) == labels for name in inspection.MODELS])


def _unnormalised(pixels: NDArray[Any], mean: NDArray[np.float32], std: NDArray[np.float32]) -> NDArray[np.uint8]:
    """`[n, channels, height, width]` as images `[n, height, width, channels]`."""
    return np.round(255 * np.clip(pixels * std + mean, 0, 1)).astype(np.uint8).transpose(0, 2, 3, 1)


def _drawn(
    parts: Mapping[str, Images], said: Mapping[str, Predictions], drawn: NDArray[np.int64]
) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Pixels, as the models' files take them, and labels of the images with these indices into all predictions."""
    pixels, labels, start = [], [], 0
    for name, own in said.items():
        mine = drawn[(drawn >= start) & (drawn < start + len(own.labels))] - start
        for _, (batch, found) in parts[name].placed(own.places[mine], BATCH):
            pixels.append(batch.numpy())
            labels.append(found.numpy())
        start += len(own.labels)
    return np.concatenate(pixels), np.concatenate(labels)


@torch.no_grad()
def geometry(dense: Any, pruned: Any, images: Tensor) -> list[dict[str, float]]:
    """After every block, how far the features of the pruned model point away from the dense one's, and their norm.

    Token by token; the mean over tokens where the two models have different numbers of them.
    """
    rows = []
    for a, b in zip(_after_blocks(dense, images), _after_blocks(pruned, images), strict=True):
        if a.shape != b.shape:
            a, b = a.mean(1), b.mean(1)
        degrees, norm = inspection.angles(a.reshape(-1, a.shape[-1]).numpy(), b.reshape(-1, b.shape[-1]).numpy())
        rows.append({"degrees": degrees, "norm": norm})
    return rows


def _after_blocks(model: Any, images: Tensor) -> list[Tensor]:
    found: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _m, _i, output: found.append(output)) for block in model.blocks]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def thumbnail(images: Images, place: int, transforms: Mapping[str, Any]) -> str:
    """The image as the model sees it, as a PNG in a data URI; "" when it cannot be read any more."""
    found = next(iter(images.placed(np.array([place]), 1)), None)
    if found is None:
        return ""
    pixels = found[1][0][0].numpy()
    mean, std = (np.array(transforms[key], np.float32).reshape(-1, 1, 1) for key in ("mean", "std"))
    unit = np.round(255 * np.clip(pixels * std + mean, 0, 1)).astype(np.uint8).transpose(1, 2, 0)
    picture = Image.fromarray(unit.squeeze(-1) if unit.shape[-1] == 1 else unit)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _said(said: Predictions, i: int, classes: tuple[str, ...]) -> dict[str, Any]:
    names = [classes[c] if c < len(classes) else str(c) for c in (int(said.labels[i]), *map(int, said.top[:, i]))]
    sure = [100 * float(said.confidence[row, i]) for row in (0, 1)]
    return {"label": names[0], "dense": names[1], "dense_sure": sure[0], "pruned": names[2], "pruned_sure": sure[1]}


def _size(path: Path) -> int:
    """Bytes of a model file, and of its weights where they lie beside it."""
    files = [path] + [path.with_suffix(".bin")] * (path.suffix == ".xml")
    return sum(file.stat().st_size for file in files if file.is_file())
