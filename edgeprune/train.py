"""Train a card: the fine-tuning stage with no teacher and nothing pruned; writes fp16 safetensors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from edgeprune import artifact, config, data, vit
from edgeprune.api import with_data
from edgeprune.console import SILENT, Console
from edgeprune.errors import UsageError
from edgeprune.tuning.loop import fit


def train(
    model: str, *, out: str | Path | None = None, weights: str | None = None, data: str = "", data_dir: str = "",
    held_out_domain: str = "", epochs: Sequence[float] = (), seed: int = 0, console: Console = SILENT,
) -> dict[str, Any]:  # fmt: skip
    """Train the card `model` by its [train] recipe; returns where the weights are and how good they are.

    Raises UsageError for bad input, StorageError when the weights cannot be written (checked first).
    """
    card = with_data(config.load_card(model), data, data_dir, held_out_domain)
    recipe = replace(card.train, epochs=tuple(epochs)) if epochs else card.train
    path = Path(out or f"{card.name}.safetensors")
    artifact.must_be_writable(path, "--out", folder=False)
    if not recipe.label_weight:
        raise UsageError(f"the [train] recipe of '{card.name}' has label_weight 0: there is no teacher to learn from")
    start = time.monotonic()
    torch.manual_seed(seed)
    network = vit.create(card.architecture, card.kwargs, card.num_classes, card.anatomy)
    if weights:
        vit.load_weights(network, vit.read_weights(Path(weights)), weights)
    transforms, splits = _data(card, network, seed)
    fit(network, splits.train, recipe, transforms, seed=seed, console=console)
    save_file({k: v.half().contiguous() for k, v in network.state_dict().items()}, path)
    vit.load_weights(network, vit.read_weights(path), str(path))  # judge what was written: rounded to fp16
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
