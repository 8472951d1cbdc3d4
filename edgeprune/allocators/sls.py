"""SLS: blocks at the tail go as long as classes stay apart without them (arXiv 2407.14330).

The class token (the mean of the patches where a model classifies by that) after each block, of labelled calibration
images, is laid out in two dimensions by t-SNE, scaled to 0..1, and SC_l is the silhouette coefficient of the labels in
it. From the last block N down, block l may end the model as long as

    SC_l >= alpha SC_N,   alpha = 0.3

The rule says nothing of latency. So, as soon as anything must go, no more blocks stay than it asks for, and fewer where
those are too slow: always the first ones, whole. Where all fits, all stays. Blocks are coarse: what a budget leaves
below a block is not used, and the biases of removed blocks stay behind as everywhere here. A SC_N below 0, of a model
that does not tell classes apart, is compared as published. The paper looks at all training images, here they are at
most 512 of the calibration's, with a perplexity of at most their third; it then tunes adapters and the head. Needs
activations and labels. Cost: one pass and up to one t-SNE per block, seconds each.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from edgeprune import vit
from edgeprune.allocators import Choose, Task, slowest_within, warn_of_few
from edgeprune.errors import UsageError
from edgeprune.stitch import Choice
from edgeprune.types import FloatArray

NEEDS = ("activations", "labels")
ALPHA = 0.3
IMAGES = 512
PERPLEXITY = 30.0  # t-SNE's own


def prepare(task: Task) -> Choose:
    features, labels = class_features(task)
    left = truncation(lambda block: separation(features[block], labels, task.seed), len(features))
    all_kept = task.dense

    def first(blocks: int) -> Choice:
        return tuple(option if i < len(vit.KINDS) * blocks else 0 for i, option in enumerate(all_kept))

    def choose(room_ms: float) -> Choice:
        if task.cost(all_kept) <= room_ms:
            return all_kept
        return slowest_within(task, lambda knob: first(round((1 - knob) * left)), room_ms)

    return choose


def truncation(separated: Callable[[int], float], blocks: int) -> int:
    """How many blocks are left when the tail is cut as far as the rule allows; separated(block) is its SC."""
    least = ALPHA * separated(blocks - 1)
    left = blocks
    while left > 1 and separated(left - 2) >= least:
        left -= 1
    return left


def separation(features: FloatArray, labels: FloatArray, seed: int) -> float:
    """Silhouette coefficient of the labels in a t-SNE of the features `[n, width]`; -1 where all images are alike."""
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_score

    if np.ptp(features, axis=0).max() <= 1e-6 * np.abs(features).max():
        return -1.0
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    flat = TSNE(n_components=2, init="pca", perplexity=perplexity, random_state=seed).fit_transform(features)
    low, high = flat.min(0), flat.max(0)
    return float(silhouette_score((flat - low) / (high - low), labels))


@torch.no_grad()
def class_features(task: Task) -> tuple[list[FloatArray], FloatArray]:
    """`[n, width]` after each block, and labels `[n]`. Raises UsageError for too few or too many classes."""
    found, labels, count = [], [], 0
    for pixels, own in task.found.labelled():
        pixels, own = pixels[: IMAGES - count], own[: IMAGES - count]
        streams = list(vit.streams(task.model, pixels))[:-1]
        found.append([vit.summary(task.model, stream) for stream in streams])
        labels.append(own)
        count += len(own)
        if count >= IMAGES:
            break
    joined = torch.cat(labels).numpy()
    if not 2 <= len(np.unique(joined)) < count:
        raise UsageError(
            f"SLS needs calibration images of at least two classes, and more images than classes; got {count} images "
            f"of {len(np.unique(joined))} classes"
        )
    warn_of_few("SLS", torch.as_tensor(joined), task.model.num_classes, task.console)
    return [torch.cat(parts).double().numpy() for parts in zip(*found, strict=True)], joined
