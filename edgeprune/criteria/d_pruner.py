"""D-Pruner: what a weight matters to the labels and to what the model knows already, in one (Zhang et al., arXiv 2405.06275).

With g_n the gradient of image n's cross entropy with its label, f_n that of -log p(y) with y drawn from the model's own
softmax, E the mean over at most 256 calibration images, and the general importance G = E[f^2], the refined loss is

    L'(w') = E[ cross entropy at w' ] + 1/2 sum of G (w' - w)^2

and a weight's importance the size of what L' changes by, to second order, when the weight is removed (w' = 0):

    | -w E[g] + 1/2 w^2 E[g^2] + 1/2 w^2 G |

error(level) = sum of it over the groups that are removed (DepGraph, arXiv 2301.12900). The general term is the KL
divergence from the dense model, so that both count in nats. Needs weights, gradients and labels. Cost: two backward
passes per image, one image at a time.

Adapted: the paper prunes single weights of language models. Its G is an OBS error on an open-domain corpus, which
there is none of here: what a model knows is what it predicts (its Fisher information). The paper has lambda = .1 on
that other scale for 1/2, and takes from L' a gradient one training step of size alpha away,
g + 2 lambda alpha^2 G g h, where alpha^2 makes the general term all but vanish; here the term is expanded where the
weight is removed. Left out: the fine-tuning meanwhile, and a third-order term w^3 of the code.
"""

from __future__ import annotations

from torch import Tensor

from edgeprune import saliency
from edgeprune.criteria import Evidence
from edgeprune.types import Levels

NEEDS = ("weights", "gradients", "labels")


def score(evidence: Evidence) -> list[Levels]:
    slope, curvature = saliency.gradient_moments(evidence)
    _, general = saliency.gradient_moments(evidence, drawn=True)
    scores = {}
    for at in evidence.moments:
        parts = zip(saliency.group(evidence.model, at), slope[at], curvature[at], general[at], strict=True)
        importance = [importances(w.detach().double(), *own) for w, *own in parts]
        scores[at] = saliency.unit_sums(importance, evidence.sizes.unit_size(at))
    return saliency.levels(evidence, scores)


def importances(w: Tensor, slope: Tensor, curvature: Tensor, general: Tensor) -> Tensor:
    """Of single weights: sizes of what the refined loss changes by."""
    return (-w * slope + 0.5 * w.square() * (curvature + general)).abs()
