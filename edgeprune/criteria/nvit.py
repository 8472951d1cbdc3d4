"""NViT: squared first-order change of the loss, unit by unit (Yang et al., arXiv 2110.04869).

error(level) = sum over the removed units of the mean over batches of (sum of g w)^2, the inner sum over the unit's
weights, g the gradient of a batch's cross entropy with the labels. It is the batch that is squared: with larger batches
less of it is noise. Needs weights, gradients and labels. Cost: one backward pass per image, of at most 256. Left out:
the residual width and those of queries, keys and values are not pruned here; the paper's reward for saved latency is
the allocator's business, which has measured latencies; the divisors by kind of its code (6 for heads) belong to one
model; scoring anew in the midst of training is a schedule's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgeprune import saliency
from edgeprune.criteria import Evidence
from edgeprune.types import Levels, SubBlock

NEEDS = ("weights", "gradients", "labels")


def score(evidence: Evidence) -> list[Levels]:
    squares: dict[SubBlock, list[Tensor]] = {at: [] for at in evidence.moments}
    for gradients, _ in saliency.gradients(evidence):
        for at, sums in saliency.of_pairs(evidence, gradients, torch.mul).items():
            squares[at].append(sums.square())
    return saliency.levels(evidence, {at: torch.stack(found).mean(0) for at, found in squares.items()})
