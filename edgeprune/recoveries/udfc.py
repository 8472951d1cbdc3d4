"""UDFC: without any data, what is removed becomes a linear mix of what is kept (arXiv 2308.07209).

A removed neuron j gets s = argmin ||m_j - M s||^2 + lambda ||s||^2 = (M^T M + lambda I)^-1 M^T m_j, where the columns
of M are the kept neurons' rows of `fc1` with their biases and m_j its own; its column of `fc2` is added to the kept
ones, column i with s_i. Heads alike on the rows of their values and the columns of `proj`, where a mix may take from
every kept head. A sub-block that is removed as a whole has nothing to mix, and keeps its bias. Needs the weights
alone. Cost: one solution per sub-block.

Adapted: the paper folds the batch normalisation that follows a convolution into its rows; a ViT has none, but the
gain and shift of the LayerNorm before them, which is folded in instead. Then ||m_j - M s||^2 is the mean squared error
before the activation if the normalised inputs are white. GELU stands between, which no mix of its inputs passes through
unchanged, as the paper's ReLU; and heads are mixed as if all attended alike. lambda is a share of the mean diagonal of M^T M.
Quantisation, the paper's other half, is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgeprune import obs, vit
from edgeprune.compat import VisionTransformer
from edgeprune.recoveries import Damage, cut
from edgeprune.recovery import RIDGE
from edgeprune.types import SubBlockKind

NEEDS = ("weights",)
TUNES = "weights"


@torch.no_grad()
def recover(damage: Damage) -> VisionTransformer:
    pruned = vit.slice_model(damage.model, damage.plan)
    for (i, kind), kept, gone in cut(damage):
        if len(kept):
            block: Any = damage.model.blocks[i]
            every, layer = rows(block, kind), vit.output_layer(block, kind)
            weight = layer.weight.double()
            weight = weight[:, kept] + weight[:, gone] @ mix(every[kept], every[gone]).T
            vit.write_output(vit.sub_block(pruned.blocks[i], kind), kind, weight, layer.bias)
    return pruned


def rows(block: Any, kind: SubBlockKind) -> Tensor:
    """What makes each input column of the last layer, `[columns, width + 1]`: weights of the normalised stream, and a bias."""
    layer, norm = vit.first_layer(vit.sub_block(block, kind), kind), block.norm1 if kind == "attn" else block.norm2
    weight = layer.weight.double()
    bias = torch.zeros(len(weight)).double() if layer.bias is None else layer.bias.double()
    if getattr(norm, "bias", None) is not None:
        bias = bias + weight @ norm.bias.double()
    if norm.weight is not None:
        weight = weight * norm.weight.double()
    every = torch.cat([weight, bias[:, None]], 1)
    columns = vit.output_layer(block, kind).in_features
    return every[-columns:]  # of queries, keys and values the last; of gates and what they gate the latter


def mix(kept: Tensor, gone: Tensor) -> Tensor:
    """How much of each kept row a removed row is, `[kept, gone]`; both arguments `[rows, columns]`."""
    return torch.linalg.solve(obs.damped(kept @ kept.T, RIDGE), kept @ gone.T)
