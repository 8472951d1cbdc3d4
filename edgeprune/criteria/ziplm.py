"""ZipLM (arXiv 2302.04089): structured OBS order, relative layer-wise error, as published.

With H = mean of x x^T over all calibration tokens, not centred, and damped: error(level) =
tr((W - W') H (W - W')^T) / tr(W H W^T), 1 for a removed sub-block, W' the best weights without the units that are gone.
Needs weights and input moments; no gradients, no labels. Cost: the OBS sweep alone.
Weakness: it does not know which layers the loss cares for.
"""

from __future__ import annotations

import numpy as np
import torch

from edgeprune import obs
from edgeprune.criteria import Evidence, make_levels
from edgeprune.types import Levels

NEEDS = ("weights", "activations")


def score(evidence: Evidence) -> list[Levels]:
    found = []
    with evidence.console.progress("OBS", len(evidence.moments), "sub-blocks") as advance:
        for at, moments in evidence.moments.items():
            weight = evidence.layer(at)[0].double()
            h = obs.damped(moments.covariance + torch.outer(moments.mean, moments.mean))
            order, errors = obs.removal_order(weight, h, evidence.sizes.unit_size(at))
            everything = float(((weight @ h) * weight).sum())
            found.append(make_levels(at, order, np.array(errors) / max(everything, 1e-300)))
            advance(1, "")
    return found
