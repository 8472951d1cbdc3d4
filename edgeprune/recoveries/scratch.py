"""Scratch: the pruned shape with fresh random weights, the control of "Rethinking the value of network pruning" (arXiv 1810.05270).

Every parameter, embeddings and classifier included, is drawn anew by timm's own initialisation, under the seed; nothing
of the dense model is left but the shape. Needs nothing, costs nothing, and is worth nothing before it is tuned: the
paper trains for as many epochs as the dense model had (Scratch-E) or as much computation (Scratch-B), so give as many
with --epochs. Adapted: tuning is the same distillation from the dense model that every recovery gets, not training on
labels. Weights are drawn in dense shape and then cut, the dimensions of heads of lower rank too: the same where timm draws them at a fixed scale, as it does
unless the model's `weight_init` asks for a scale by layer width.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from edgeprune import lowrank, vit
from edgeprune.compat import VisionTransformer
from edgeprune.errors import UsageError
from edgeprune.recoveries import Damage

NEEDS = ()
TUNES = "weights"


def recover(damage: Damage) -> VisionTransformer:
    fresh = copy.deepcopy(damage.model)
    initialise(fresh, damage.seed)
    return lowrank.mark(vit.slice_model(fresh, damage.plan), damage.plan)


@torch.no_grad()
def initialise(model: VisionTransformer, seed: int) -> None:
    """Draw every parameter anew, in place. Raises UsageError for one that timm leaves as it is."""
    for parameter in model.parameters():
        parameter.fill_(torch.nan)  # so that what nobody initialises is seen
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module: Any
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        model.init_weights()
    left = [name for name, parameter in model.named_parameters() if bool(parameter.isnan().any())]
    if left:
        raise UsageError(f"--recovery scratch: timm does not initialise {', '.join(left[:4])} of this model")
