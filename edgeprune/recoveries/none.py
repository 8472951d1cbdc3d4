"""None: what is left stays as it was; the control of every recovery.

Needs nothing, costs nothing.
"""

from __future__ import annotations

from edgeprune import vit
from edgeprune.compat import VisionTransformer
from edgeprune.recoveries import Damage

NEEDS = ()
TUNES = "weights"


def recover(damage: Damage) -> VisionTransformer:
    return vit.slice_model(damage.model, damage.plan)
