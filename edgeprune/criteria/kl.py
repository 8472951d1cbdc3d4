"""KL: structured OBS order, and how far the model's output moves when one sub-block alone is at a level.

error(level) = mean over images of KL(dense || dense with this sub-block at this level), the survivors re-fitted.
Measured, so right beyond second order too; needs a forward pass of the blocks from there on per level (the
residual streams before are kept). The errors need no gradients, the OBS order does; no labels.
"""

from __future__ import annotations

import numpy as np
import torch

from edgeprune import obs, saliency
from edgeprune.criteria import SCORED, Evidence, grid_levels, obs_orders
from edgeprune.stitch import Database, Judge
from edgeprune.types import Levels

NEEDS = ("weights", "activations", "gradients", "loss")


def score(evidence: Evidence) -> list[Levels]:
    orders = {at: order for at, (order, _, _) in obs_orders(evidence).items()}
    places = sorted(orders)
    counts = [evidence.grid(at) for at in places]
    unjudged = [Levels(*at, np.array(orders[at]), np.zeros(len(orders[at]) + 1)) for at in places]
    moments = {at: (own.mean, obs.damped(own.covariance)) for at, own in evidence.moments.items()}
    pixels = torch.cat([pixels for pixels, _ in saliency.first(evidence, SCORED)])
    judge = Judge(Database(evidence.model, unjudged, counts, moments), pixels)
    dense = tuple(len(count) - 1 for count in counts)
    judge.keep(dense)
    levels = []
    with evidence.console.progress("divergence", sum(dense), "levels") as advance:
        for i, at in enumerate(places):
            errors = [0.0]
            for option in reversed(range(dense[i])):
                errors.append(judge.divergence((*dense[:i], option, *dense[i + 1 :])))
                advance(1, "")
            levels.append(grid_levels(evidence, at, orders[at], np.array(errors)))
    return levels
