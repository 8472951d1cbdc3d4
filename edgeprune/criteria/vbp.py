"""VBP: neurons matter as much as they vary after GELU (variance-based pruning, Berisha et al., arXiv 2507.12988).

Var(x_j) over all calibration tokens, x the input of `fc2`; neurons of all MLPs are ranked together. The paper leaves
attention alone, and so cannot reach high speed-ups. Here a head is the summed variance of its columns of `proj`'s
input. Variances after GELU and after attention have no common scale, so each kind is divided by its total:
error(level) = share of the variance of all MLPs (all attentions) of the model that is removed. All attentions together
thus count as much as all MLPs, which is our choice and no finding. Needs input statistics alone: no gradients, no
labels; costs nothing beyond them. The paper's other half, means folded into biases, is a recovery.
"""

from __future__ import annotations

from edgeprune import saliency, vit
from edgeprune.criteria import Evidence
from edgeprune.types import Levels

NEEDS = ("activations",)


def score(evidence: Evidence) -> list[Levels]:
    found = {at: saliency.of_columns(evidence, at, saliency.variances(evidence, at)) for at in evidence.moments}
    totals = {kind: sum(float(own.sum()) for at, own in found.items() if at[1] == kind) for kind in vit.KINDS}
    return saliency.levels(evidence, {at: own / max(totals[at[1]], 1e-300) for at, own in found.items()})
