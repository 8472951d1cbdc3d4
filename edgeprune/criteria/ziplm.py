"""ZipLM (arXiv 2302.04089): structured OBS order, relative layer-wise error.

error(level) = tr((W - W') H (W - W')^T) / tr(W H W^T), 1 for a removed sub-block.
Needs weights and input moments; no gradients, no labels. Cost: the OBS sweep alone.
Weakness: it does not know which layers the loss cares for.
"""

from __future__ import annotations

import numpy as np

from edgeprune.criteria import Evidence, make_levels, obs_orders
from edgeprune.types import Levels

USES_LOSS = False


def score(evidence: Evidence) -> list[Levels]:
    return [
        make_levels(at, order, np.array(errors) / max(everything, 1e-300))
        for at, (order, errors, everything) in obs_orders(evidence).items()
    ]
