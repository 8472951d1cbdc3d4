"""Wanda: sizes of weights times norms of what they multiply (Sun et al., arXiv 2306.11695).

error(level) = sum over the removed columns j of `proj` or `fc2` of sum_i |W_ij| ||x_j||: Wanda-sp, the form by units
that FLAP compares with (arXiv 2312.11983). ||x_j|| is the root mean square over calibration tokens: the root of their
number, which all have in common, is left out, and sums over i stand for means, as `proj` and `fc2` have equally many
rows. Wanda-sp compares within a layer, and keeps the same share of each: that is an allocator's part. Here sums stay
as they are. Needs weights and input statistics; no gradients, no labels; costs nothing beyond them.
"""

from __future__ import annotations

from torch import Tensor

from edgeprune import saliency
from edgeprune.criteria import Evidence
from edgeprune.types import Levels, SubBlock

NEEDS = ("weights", "activations")


def score(evidence: Evidence) -> list[Levels]:
    def columns(at: SubBlock) -> Tensor:
        return evidence.layer(at)[0].double().abs().sum(0) * saliency.input_norms(evidence, at)

    return saliency.levels(evidence, {at: saliency.of_columns(evidence, at, columns(at)) for at in evidence.moments})
