"""L1: a unit matters as much as the summed sizes of its weights (groups of DepGraph, arXiv 2301.12900).

error(level) = sum of |w| over the groups that are removed: rows and biases of `qkv` or `fc1`, columns of `proj` or
`fc2`. Needs weights alone; costs nothing. DepGraph's code takes a group's mean and divides by the layer's mean, which
would make every layer, and a head and a neuron, alike; here sums stay as they are, on one scale for all sub-blocks.
"""

from __future__ import annotations

import torch

from edgeprune import saliency
from edgeprune.criteria import Evidence
from edgeprune.types import Levels

NEEDS = ("weights",)


def score(evidence: Evidence) -> list[Levels]:
    return saliency.levels(evidence, saliency.of_weights(evidence, torch.abs))
