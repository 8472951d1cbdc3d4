"""Magnitude: a unit matters as much as the squared norm of its columns in `proj` or `fc2`.

error(level) = sum of ||W_S||^2 over the removed units / ||W||^2. Needs weights alone; the baseline
that every other criterion must beat.
"""

from __future__ import annotations

from torch import Tensor

from edgeprune import saliency
from edgeprune.criteria import Evidence
from edgeprune.types import Levels, SubBlock

NEEDS = ("weights",)


def score(evidence: Evidence) -> list[Levels]:
    return saliency.levels(evidence, {at: _shares(evidence, at) for at in evidence.moments})


def _shares(evidence: Evidence, at: SubBlock) -> Tensor:
    norms = saliency.of_columns(evidence, at, evidence.layer(at)[0].double().square().sum(0))
    return norms / norms.sum().clamp_min(1e-300)
