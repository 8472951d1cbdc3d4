"""Random: units go in an order drawn from the seed. The control that every criterion must beat.

error(level) = share of the sub-block's units that are removed, so all sub-blocks are worth the same. Looks at nothing.
Says nothing of how much each sub-block should keep, so it is best paired with an allocator that keeps the same share
of all: one that adds up errors would decide by latency alone.
"""

from __future__ import annotations

import numpy as np
import torch

from edgeprune.criteria import Evidence, make_levels
from edgeprune.types import Levels

NEEDS = ()


def score(evidence: Evidence) -> list[Levels]:
    generator = torch.Generator().manual_seed(evidence.seed)
    levels = []
    for at in evidence.moments:
        units = evidence.sizes.units(at)
        order = torch.randperm(units, generator=generator).tolist()
        levels.append(make_levels(at, order, np.arange(units + 1) / units))
    return levels
