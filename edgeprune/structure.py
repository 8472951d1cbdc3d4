"""The structure that a plan gives a dense model: what is kept of it, the ranks of its heads, int8 layers."""

from __future__ import annotations

from edgeprune import lowrank, quantisation, vit
from edgeprune.compat import VisionTransformer
from edgeprune.types import Plan


def of(dense: VisionTransformer, plan: Plan) -> VisionTransformer:
    """A copy of the dense model in the plan's structure.

    Weights are the dense model's where nothing but units and tokens go; of attentions of lower rank they mean nothing,
    and ranges of int8 layers are unknown. Raises UsageError when the plan does not fit the model.
    """
    return quantisation.mark(lowrank.mark(vit.slice_model(dense, plan), plan), plan)
