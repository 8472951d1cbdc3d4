"""L2: a unit matters as much as the sum of its squared weights (groups of DepGraph, arXiv 2301.12900).

error(level) = sum of w^2 over the groups that are removed: rows and biases of `qkv` or `fc1`, columns of `proj` or
`fc2`. Needs weights alone; costs nothing. The square is kept, without a root, so that a level's error is the squared
norm of all that it removes; within a sub-block the order is the same. Unlike `magnitude` it looks at first layers too,
and is not a share of the sub-block's own norm. DepGraph's code divides by means of groups and layers; here nothing is.
"""

from __future__ import annotations

import torch

from edgeprune import saliency
from edgeprune.criteria import Evidence
from edgeprune.types import Levels

NEEDS = ("weights",)


def score(evidence: Evidence) -> list[Levels]:
    return saliency.levels(evidence, saliency.of_weights(evidence, torch.square))
