"""FLAP: fluctuation of the inputs times their weights, standardised per layer (An et al., arXiv 2312.11983).

WIFV_j = Var(x_j) ||W_:j||^2 for input column j of `proj` or `fc2`; squared in `proj`, as in the authors' code. Columns
are z-scored within their layer, a head's score is the mean of its columns', and all scores are ranked together (the
paper's AL-AM). error(level) = sum over the removed units of z - min z, the least z of all sub-blocks: the same shift
for all keeps the ranking, and makes the least unit free and none cheaper than that. Sums of such errors mean little,
so this wants an allocator with one threshold for all. Columns that were cut off before are left out of the z-scores.
Needs weights and input statistics; no gradients, no labels; costs nothing beyond them. Not here: the compensation of
biases (a recovery), and the authors' weight of 512/3 of a head against a neuron, for which there are latencies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgeprune import saliency
from edgeprune.criteria import Evidence
from edgeprune.types import Levels, SubBlock

NEEDS = ("weights", "activations")


def score(evidence: Evidence) -> list[Levels]:
    scores = {at: _standardised(evidence, at) for at in evidence.moments}
    least = torch.cat(list(scores.values())).min()
    return saliency.levels(evidence, {at: own - least for at, own in scores.items()})


def _standardised(evidence: Evidence, at: SubBlock) -> Tensor:
    """z-scores `[units]`; 0 where all of a layer's columns fluctuate alike."""
    norms = evidence.layer(at)[0].double().square().sum(0)
    wifv = saliency.variances(evidence, at) * norms
    if at[1] == "attn":
        wifv = wifv.square()
    alive = norms > 0
    centred = wifv[alive] - wifv[alive].mean()
    z = torch.zeros_like(wifv)
    z[alive] = centred / centred.square().mean().sqrt().clamp_min(1e-300)
    size = evidence.sizes.unit_size(at)
    return saliency.of_columns(evidence, at, z) / size
