"""FMP: units by which predictions are easily attacked go first, as a backdoor would use them (Huang and Bu, arXiv 2307.11565).

A screen for models of doubtful origin, not a way to make a good one smaller. Each unit is attacked alone, by a step of
the fast gradient sign method on its columns x of the input of `proj` or `fc2`, on 32 calibration images:

    x' = x + eps sign(dL/dx),    L = log( (1 - p_y) / p_y ), the log odds against the label y

with eps the root mean square of the sub-block's activations. How far the attack gets is the mean rise of L, to first
order eps times the sum of |dL/dx| over tokens and columns. The 4/64 of a sub-block's units for which that is most are
attacked indeed, one by one, and of these the 1/64 by which L rises most are suspicious: they go first, and cost
nothing. error(level) = sum of the first-order rises of the rest, so that next go those that an attack gets least from.
Sub-blocks of fewer than 64 units (heads, as a rule) have no suspects. Needs activations, gradients and labels. Cost:
a pass forward and back, then the rest of the model on 32 images for every unit that is attacked indeed.

Adapted: the authors' step is on the image, to change a unit's features, with a backward pass per unit: too much for the
thousands of neurons of a ViT. A step on the features themselves asks what the unit could do, whichever image triggers
it, and needs no activation to begin with, as a backdoor shows none. Theirs ranks by the accuracy that is left; on 32
images many units tie, and log odds tell them apart. The paper keeps all other units; an allocator cannot, hence their
order. A sub-block that the allocator leaves whole keeps its suspects. Fine-tuning on clean images should follow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgeprune import saliency, vit
from edgeprune.criteria import Evidence
from edgeprune.types import Levels, SubBlock

NEEDS = ("activations", "gradients", "labels")

ATTACKED = 32  # images, as many as the authors'
SUSPICIOUS = 64  # one unit of so many
CANDIDATES = 4  # times as many are attacked indeed


def score(evidence: Evidence) -> list[Levels]:
    parts = list(saliency.first(evidence, ATTACKED))
    pixels, labels = (torch.cat(own) for own in zip(*parts, strict=True))

    def total(logits: Tensor) -> Tensor:
        return log_odds(logits, labels).sum()

    found = saliency.features(evidence.model, pixels, evidence.moments, total)
    scores, steps = {}, {}
    for at, (_, gradients) in found.items():
        eps = saliency.input_norms(evidence, at).square().mean().sqrt().item()
        scores[at] = eps * saliency.of_columns(evidence, at, gradients.abs().sum((0, 1))) / len(pixels)
        count = CANDIDATES * (len(scores[at]) // SUSPICIOUS)
        units = scores[at].argsort(descending=True, stable=True)[:count].tolist()
        columns = [vit.columns((unit,), evidence.sizes.unit_size(at)) for unit in units]
        steps[at] = {unit: eps * gradients[..., own].sign() for unit, own in zip(units, columns, strict=True)}
    for at, rises in attack(evidence, pixels, labels, steps).items():
        worst = sorted(rises, key=lambda unit: -rises[unit])[: len(rises) // CANDIDATES]
        scores[at][worst] = 0.0
    return saliency.levels(evidence, scores)


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """Against the label, `[n]`. Unlike the cross entropy, it is not flat where the model is sure."""
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.logsumexp(1) - own


@torch.no_grad()
def attack(
    evidence: Evidence, pixels: Tensor, labels: Tensor, steps: dict[SubBlock, dict[int, Tensor]]
) -> dict[SubBlock, dict[int, float]]:
    """By how much the log odds rise when a unit's columns alone take their step `[n, tokens, columns]`."""
    model, places = evidence.model, list(evidence.moments)
    before = log_odds(model(pixels), labels)
    rises: dict[SubBlock, dict[int, float]] = {at: {} for at in places}
    stream = vit.embed(model, pixels)
    with evidence.console.progress("attacks", sum(map(len, steps.values())), "units") as advance:
        for i, (block, kind) in enumerate(places):
            weight, _ = evidence.layer((block, kind))
            stream = vit.walk(model, (block, kind), stream)
            for unit, step in steps[block, kind].items():
                change = step @ weight[:, vit.columns((unit,), evidence.sizes.unit_size((block, kind)))].T
                attacked = stream + vit.scale(model.blocks[block], kind)(change)
                for later, later_kind in places[i + 1 :]:
                    attacked = vit.walk(model, (later, later_kind), attacked)
                after = log_odds(vit.classify(model, attacked), labels)
                rises[block, kind][unit] = float((after - before).mean())
                advance(1, "")
    return rises
