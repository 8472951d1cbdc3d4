"""Magnitude: a unit matters as much as the squared norm of its columns in `proj` or `fc2`.

error(level) = sum of ||W_S||^2 over the removed units / ||W||^2. Needs weights alone; the baseline
that every other criterion must beat.
"""

from __future__ import annotations

import numpy as np

from edgeprune.criteria import Evidence, make_levels
from edgeprune.types import Levels

NEEDS = ("weights",)


def score(evidence: Evidence) -> list[Levels]:
    levels = []
    for at in evidence.moments:
        weight, _ = evidence.layer(at)
        norms = weight.square().sum(0).reshape(-1, evidence.sizes.unit_size(at[1])).sum(1).double().numpy()
        order = np.argsort(norms, kind="stable")
        errors = np.concatenate([[0.0], np.cumsum(norms[order])]) / max(norms.sum(), 1e-300)
        levels.append(make_levels(at, [int(u) for u in order], errors))
    return levels
