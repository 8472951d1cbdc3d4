"""LoRAPrune: Taylor with gradients that low-rank adapters tell of, while they are trained (Zhang et al., arXiv 2305.18403).

For a weight W with an adapter BA, and g_A, g_B the gradients of a batch's cross entropy with the labels, a step of
size 1 would change W + BA by -g~ with

    g~ = g_B A + B g_A - g_B g_A,      s = sum over the unit's weights of ( g~ (W + BA) )^2

s is made of the rows of queries, keys, values and `fc1`, and of the columns of `proj` and `fc2`; each of these
matrices has its s divided by its L2 norm over units, and a unit adds up its own. After every batch
S = .9 S + .1 s, then the adapters take a step of AdamW, over at most 256 calibration images; error(level) = sum of S
over the removed units. Adapters (`edgeprune.adapters`) are in a copy of the model, and gone afterwards. Needs weights,
gradients and labels. Cost: one backward pass per image, and a copy of the model.

Squares are the paper's, divisions by norms its code's, which has sizes in place of squares. Adapted: the paper tunes
and prunes turn by turn for an epoch or more, so that its adapters have learnt when they are asked; here B leaves
zero with the first batch, and g~ is at first g A'A, the gradient seen through A. Not here: exempt first and last
layers. The paper's memory is not saved: adapters that are shared with tuning make W + BA anew, gradient and all.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from edgeprune import adapters, saliency, vit
from edgeprune.compat import VisionTransformer
from edgeprune.criteria import SCORED, Evidence
from edgeprune.types import Levels, SubBlock

NEEDS = ("weights", "gradients", "labels")

DECAY = 0.9  # of the moving average
RATE = 1e-3  # of learning: entries of BA stay an order below those of W


def score(evidence: Evidence) -> list[Levels]:
    model = copy.deepcopy(evidence.model)
    adapters.attach(model, seed=evidence.seed)
    trained = [factor for _, layer in adapters.attached(model) for factor in factors(layer)]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    averages = {at: torch.zeros(evidence.sizes.units(at)).double() for at in evidence.moments}
    with evidence.console.progress("adapters", min(SCORED, evidence.images), "images") as advance:
        for pixels, labels in saliency.first(evidence):
            optimizer.zero_grad()
            F.cross_entropy(model(pixels), labels).backward()
            for at, average in averages.items():
                averages[at] = DECAY * average + (1 - DECAY) * importance(model, at, evidence.sizes.unit_size(at))
            optimizer.step()
            advance(len(pixels), "")
    return saliency.levels(evidence, averages)


def factors(layer: Any) -> tuple[Tensor, Tensor]:
    """A `[rank, inputs]` and B `[outputs, rank]` of a layer's adapter."""
    adapter = layer.parametrizations.weight[0]
    return adapter.a, adapter.b


@torch.no_grad()
def importance(model: VisionTransformer, at: SubBlock, unit_size: int) -> Tensor:
    """`[units]`, from the gradients that the adapters have now."""
    sub = vit.sub_block(model.blocks[at[0]], at[1])
    columns = _squares(vit.last_layer(sub, at[1])).sum(0)
    rows = _squares(vit.first_layer(sub, at[1])).sum(1).reshape(-1, len(columns))
    units = torch.cat([rows, columns[None]]).unflatten(1, (-1, unit_size)).sum(2)  # [matrices, units]
    return (units / units.norm(dim=1, keepdim=True).clamp_min(1e-300)).sum(0)


def _squares(layer: Any) -> Tensor:
    """Shaped like the layer's weight."""
    a, b = (factor.double() for factor in factors(layer))
    g_a, g_b = (factor.grad.double() for factor in factors(layer) if factor.grad is not None)
    return ((g_b @ a + b @ g_a - g_b @ g_a) * layer.weight.double()).square()
