"""LoRA: what is left stays as it was, and tuning trains low-rank adapters beside it alone (arXiv 2106.09685).

W' = W + alpha / r B A for queries, keys and values, `proj`, `fc1` and `fc2` of every block; A and B and the classifier
are trained, the rest is frozen, and at the end B A is folded into W (`edgeprune.adapters`). LLM-Pruner (arXiv 2305.11627)
and LoRAPrune (arXiv 2305.18403) recover like this; before tuning they leave the weights alone, and so does this. The
artifact then has `adapters.safetensors`: with the dense weights and the plan, all that one pruned model needs, as in SLS
(arXiv 2407.14330). Needs nothing, costs nothing before tuning. Adapted: the paper's adapters are for attention alone.
"""

from __future__ import annotations

from edgeprune import vit
from edgeprune.compat import VisionTransformer
from edgeprune.recoveries import Damage

NEEDS = ()
TUNES = "adapters"


def recover(damage: Damage) -> VisionTransformer:
    return vit.slice_model(damage.model, damage.plan)
