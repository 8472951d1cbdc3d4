"""CFSP: blocks that turn the residual stream further keep more (Wang et al., arXiv 2409.13199, the coarse part).

    importance_b = mean over tokens of arccos(cos(h_in, h_out)) / pi          keep_b ~ sigmoid(a z_b),  a = 1

h_in and h_out are the stream before and after block b, z_b the importance less its mean over the blocks, divided by its
standard deviation. The authors divide by 10^4 instead, which fits sums over the tokens of their calibration set alone.
Keep ratios are scaled to the budget and clipped at 1; the authors draw all towards the mean where one would be above 1.
They prune MLPs and spare attention; here both sub-blocks of a block keep its ratio. Which units stay is the criterion's
(`cfsp` for the fine part). Needs activations, no labels. Cost: one pass over the calibration images.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from edgeprune import vit
from edgeprune.allocators import Choose, Task, by_ratios, spread
from edgeprune.compat import VisionTransformer
from edgeprune.types import FloatArray

NEEDS = ("activations",)
SLOPE = 1.0  # a


def prepare(task: Task) -> Choose:
    ratios = np.repeat(keep(angles(task.model, task.found.batches)), len(vit.KINDS))
    return lambda room_ms: by_ratios(task, lambda knob: spread(ratios, 1 - knob), room_ms)


def keep(importance: FloatArray) -> FloatArray:
    """What each block keeps, before scaling."""
    deviation = importance.std()
    z = (importance - importance.mean()) / deviation if deviation > 1e-9 else np.zeros(len(importance))
    return np.asarray(1 / (1 + np.exp(-SLOPE * z)))


@torch.no_grad()
def angles(model: VisionTransformer, batches: Sequence[Tensor]) -> FloatArray:
    """`[blocks]`: by which share of pi each block turns a token's residual stream, on average."""
    totals, tokens = np.zeros(len(model.blocks)), np.zeros(len(model.blocks))
    for pixels in batches:
        stream = vit.embed(model, pixels)
        for i, block in enumerate(model.blocks):
            before, stream = vit.entered(block, stream), block(stream)
            tokens[i] += stream[..., 0].numel()
            cosine = torch.cosine_similarity(before.double(), stream.double(), -1).clamp(-1, 1)
            totals[i] += float(cosine.arccos().sum()) / np.pi
    return totals / tokens
