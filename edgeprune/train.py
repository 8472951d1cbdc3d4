"""Train a card: the fine-tuning stage with no teacher and nothing pruned; writes fp16 safetensors."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from edgeprune import adapting, artifact, cache, config, data, pipeline, sealed, vit, weightfile
from edgeprune.api import with_data
from edgeprune.console import SILENT, Console
from edgeprune.errors import StorageError, UsageError
from edgeprune.tuning.checkpoint import Checkpoint
from edgeprune.tuning.loop import fit
from edgeprune.types import to_json


def train(
    model: str, *, out: str | Path | None = None, weights: str | None = None, data: str = "", data_dir: str = "",
    held_out_domain: str = "", follow_links: bool = False, epochs: Sequence[float] = (), seed: int = 0, console: Console = SILENT,
) -> dict[str, Any]:  # fmt: skip
    """Train the card `model` by its [train] recipe; returns where the weights are and how good they are.

    A training that was killed goes on from its last checkpoint, in a hidden folder beside `out`, if it is of the same
    card, options, data and code; until it has ended another one with the same `out` waits. Raises UsageError for bad input, StorageError when the weights cannot be written (checked first).
    """
    card = with_data(config.load_card(model), data, data_dir, held_out_domain, follow_links)
    recipe = replace(card.train, epochs=tuple(epochs)) if epochs else card.train
    path = Path(out or f"{card.name}.safetensors")
    artifact.must_be_writable(path, "--out", folder=False)
    if card.task == config.FEATURES:
        raise UsageError(
            f"the card '{card.name}' is of an embedding model, which labels cannot train; give weights with --weights"
        )
    if not recipe.label_weight:
        raise UsageError(f"the [train] recipe of '{card.name}' has label_weight 0: there is no teacher to learn from")
    start = time.monotonic()
    torch.manual_seed(seed)
    network = vit.create(card.architecture, card.kwargs, card.num_classes, card.anatomy)
    if weights:
        state, done = adapting.adapt(network, weightfile.read(Path(weights)))
        for change in done:
            console.say(f"weights in '{weights}': {change}")
        weightfile.load(network, state, weights)
    transforms, splits = _data(card, network, seed)
    what = (
        card.architecture,
        card.kwargs,
        card.anatomy,
        card.num_classes,
        card.data,
        card.transforms,
        card.calibration,
        recipe,
        seed,
    )
    facts = [to_json(what), pipeline.data_key(card.data), artifact.sha256(Path(weights)) if weights else ""]
    facts += [pipeline.code_key(__name__), pipeline.versions()]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def waiting() -> None:
        console.say(f"another process is training '{path}'; waiting until it has ended")

    try:
        with cache.working(path.parent / f".{path.name}.training", waiting) as work:
            checkpoint = Checkpoint(work / cache.CHECKPOINT, console, key)
            fit(network, splits.train, recipe, transforms, seed=seed, console=console, checkpoint=checkpoint)
            sealed.write_whole(path, save({k: v.half().contiguous() for k, v in network.state_dict().items()}))
    except OSError as error:
        raise StorageError(f"cannot write '{path}' or its checkpoint: {error.strerror or error}") from error
    weightfile.load(network, weightfile.read(path), str(path))  # judge what was written: rounded to fp16
    right = total = 0
    with torch.no_grad():
        for pixels, labels in splits.evaluation.batches(recipe.batch_size):
            right += int((network(pixels).argmax(-1) == labels).sum())
            total += len(labels)
    return {
        "weights": str(path),
        "accuracy": 100 * right / total,
        "images": total,
        "seconds": time.monotonic() - start,
        "seed": seed,
    }


def _data(card: config.ModelSpec, network: Any, seed: int) -> tuple[dict[str, Any], data.Splits]:
    transforms = data.transform_config(card, network)
    splits = data.load_splits(card, transforms, seed)
    data.check_classes(splits, card.num_classes)
    return transforms, splits
