"""HESSO: five scores of a unit, normalised and averaged (Chen et al., arXiv 2409.09085).

With w and g the unit's weights and gradients, the latter of the mean cross entropy with the labels of at most 256
calibration images: magnitude ||w||, mean magnitude ||w|| / number of weights, cosine w.g / (||w|| ||g||) + 1,
first-order Taylor |w.g|, second-order Taylor (w.g)^2 / 2. Each is divided by its root sum of squares over all units of
the model, and counts .2. error(level) = sum of the mixed scores of what is removed. Needs weights, gradients and
labels. Cost: one backward pass per image. The scores alone: the paper takes an optimiser's directions for gradients,
within its training, and then moves units to zero and corrects its choice, which is for a schedule.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from edgeprune import saliency
from edgeprune.criteria import Evidence
from edgeprune.types import Levels

NEEDS = ("weights", "gradients", "labels")

WEIGHT = 0.2  # of each score


def score(evidence: Evidence) -> list[Levels]:
    gradients = saliency.mean_gradients(evidence)

    def sums(value: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`[units of all sub-blocks]`"""
        return torch.cat(list(saliency.of_pairs(evidence, gradients, value).values()))

    norm = sums(lambda w, g: w.square()).sqrt()
    steepness = sums(lambda w, g: g.square()).sqrt()
    product = sums(torch.mul)
    cosine = product / (norm * steepness).clamp_min(1e-30)
    scores = [norm, norm / sums(lambda w, g: torch.ones_like(w)), cosine + 1, product.abs(), product.square() / 2]
    mixed = sum((WEIGHT * own / own.norm().clamp_min(1e-300) for own in scores), torch.zeros_like(norm))
    units = [evidence.sizes.units(at) for at in evidence.moments]
    return saliency.levels(evidence, dict(zip(evidence.moments, mixed.split(units), strict=True)))
