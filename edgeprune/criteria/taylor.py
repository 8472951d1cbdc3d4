"""Taylor: first-order change of the loss, weight by weight (Molchanov et al., arXiv 1906.10771).

error(level) = sum of |w g| over the groups that are removed (DepGraph, arXiv 2301.12900), g the gradient of the cross
entropy with the labels, averaged over at most 256 calibration images. Sizes are taken of every weight, as in DepGraph:
Molchanov squares, and adds up a unit's w g before that (see `nvit`), so that weights may cancel. DepGraph's code takes
means over groups and layers; here sums are added. Needs weights, gradients and labels. Cost: one backward pass per
image.
"""

from __future__ import annotations

from edgeprune import saliency
from edgeprune.criteria import Evidence
from edgeprune.types import Levels

NEEDS = ("weights", "gradients", "labels")


def score(evidence: Evidence) -> list[Levels]:
    return saliency.levels(evidence, saliency.of_gradients(evidence, lambda w, g: (w * g).abs()))
