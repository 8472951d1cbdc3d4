"""P3B: squared Taylor of masks, what the loss would change by if a unit's output were scaled (Glandorf et al., arXiv 2506.23675).

With a mask m = 1 on every head and neuron, L the mean cross entropy of a batch with its labels, and E the mean over
batches of at most 256 calibration images,

    error(level) = sum over the removed units of E[ (m dL/dm)^2 ],    dL/dm = sum over images, tokens, columns of x dL/dx

with x the unit's columns of the input of `proj` or `fc2`. Squares are taken per batch, as the authors' code does at
every step of its training: images of a batch may cancel, and larger batches have smaller scores. Needs activations,
gradients and labels. Cost: one backward pass per image.

This is P3B's order of units within a block, of a model that is not trained meanwhile. Not here: its ranks in place of
scores, soft masks that let units revive, masks on widths that edgeprune never prunes, and the block benefits that
decide how much each block keeps, which are for an allocator and a schedule.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from edgeprune import saliency
from edgeprune.criteria import SCORED, Evidence
from edgeprune.types import Levels, SubBlock

NEEDS = ("activations", "gradients", "labels")


def score(evidence: Evidence) -> list[Levels]:
    totals = {at: torch.zeros(evidence.sizes.units(at)).double() for at in evidence.moments}
    batches = 0
    with evidence.console.progress("masks", min(SCORED, evidence.images), "images") as advance:
        for pixels, labels in saliency.first(evidence):
            for at, gradient in mask_gradients(evidence, pixels, labels).items():
                totals[at] += gradient.square()
            batches += 1
            advance(len(pixels), "")
    return saliency.levels(evidence, {at: total / batches for at, total in totals.items()})


def mask_gradients(evidence: Evidence, pixels: Tensor, labels: Tensor) -> dict[SubBlock, Tensor]:
    """dL/dm of every unit at m = 1, `[units]` per sub-block."""

    def loss(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    found = saliency.features(evidence.model, pixels, evidence.moments, loss)
    return {at: saliency.of_columns(evidence, at, (x * g).sum((0, 1))) for at, (x, g) in found.items()}
