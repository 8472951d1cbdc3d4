"""Refit: least squares on the survivors' inputs, block by block on what the pruned model really sees, classifier included.

First on the dense model's own inputs, with means folded into biases; then first layers are solved for what the dense
units see and last layers for the dense residual stream, each accepted only where held-out images agree; at last the
classifier for the logits (`edgeprune.recovery`). Needs activations, no labels. Cost: about two passes over the
calibration images and three solutions per block.
"""

from __future__ import annotations

from edgeprune import products, recovery, vit
from edgeprune.compat import VisionTransformer
from edgeprune.recoveries import Damage

NEEDS = ("weights", "activations")
TUNES = "weights"


def recover(damage: Damage) -> VisionTransformer:
    pruned = recovery.survivors(damage.model, damage.plan, damage.found.moments)
    recovery.lower_ranks(vit.anatomy(damage.model), pruned, damage.plan, damage.found)
    same = damage.model is damage.dense  # the units of a model that was trained since are no longer the dense model's
    plan = damage.plan if same else None
    found = damage.found
    with products.rounded():
        accepted, tried = recovery.sequential(damage.dense, pruned, found.batches, found.weights, plan, found.shelf)
    damage.console.say(
        f"refit on the pruned model's own inputs: {accepted} of {tried} sub-blocks came closer on held-out images"
    )
    return pruned
