"""Bias: what is removed is replaced by its mean, as FLAP has it (arXiv 2312.11983) and VBP (arXiv 2507.12988).

b' = b + W_S mu_S for the removed input columns S of `proj` and `fc2`; no weight changes. Needs activations, no labels:
the means that calibration found. Cost: nothing beside calibration. Left out: where the criterion asks for the loss,
tokens are weighed by it, and so are these means; FLAP and VBP count all tokens alike. FLAP's code overwrites the bias,
as LLaMA has none; here it is added.
"""

from __future__ import annotations

import torch

from edgeprune import vit
from edgeprune.compat import VisionTransformer
from edgeprune.recoveries import Damage, cut

NEEDS = ("weights", "activations")
TUNES = "weights"


@torch.no_grad()
def recover(damage: Damage) -> VisionTransformer:
    pruned = vit.slice_model(damage.model, damage.plan)
    for (i, kind), kept, gone in cut(damage):
        layer, (mean, _) = vit.output_layer(damage.model.blocks[i], kind), damage.found.moments[i, kind]
        bias = layer.bias.double() + layer.weight.double()[:, gone] @ mean[gone]
        vit.write_output(vit.sub_block(pruned.blocks[i], kind), kind, layer.weight[:, kept], bias)
    return pruned
