"""OBS: the optimal weight update for the dense model's own inputs, as ZipLM has it (arXiv 2302.04089, equation 3).

What the successive updates of the optimal brain surgeon end in, solved at once: W' = argmin ||(W' - W) X||^2 over the
kept columns, X not centred, biases untouched. Needs activations. Cost: one Cholesky per layer.
"""

from __future__ import annotations

from edgeprune import recovery
from edgeprune.calibration import uncentred
from edgeprune.compat import VisionTransformer
from edgeprune.recoveries import Damage

NEEDS = ("weights", "activations")
TUNES = "weights"


def recover(damage: Damage) -> VisionTransformer:
    return recovery.survivors(damage.model, damage.plan, uncentred(damage.found.moments))
