"""Hessian: optimal brain damage with the empirical Fisher (LeCun et al. 1989; groups of DepGraph, arXiv 2301.12900).

error(level) = 1/2 sum of w^2 E[g^2] over the groups that are removed, g the gradient of one image's cross entropy with
its label and E the mean over at most 256 calibration images: the diagonal of the Hessian as the mean of *squared*
gradients, which is not the square of the mean. A public implementation of this criterion keeps the last image only;
here all count. Left out: all that is off the diagonal, and DepGraph's means over groups and layers. Needs weights,
gradients and labels. Cost: one backward pass per image, one image at a time.
"""

from __future__ import annotations

from edgeprune import saliency
from edgeprune.criteria import Evidence
from edgeprune.types import Levels

NEEDS = ("weights", "gradients", "labels")


def score(evidence: Evidence) -> list[Levels]:
    _, fisher = saliency.gradient_moments(evidence)
    return saliency.levels(evidence, saliency.of_pairs(evidence, fisher, lambda w, h: 0.5 * w.square() * h))
