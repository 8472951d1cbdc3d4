"""PQ: sub-blocks whose units are less alike are thinned more (SAP's PQ index, Diao et al., arXiv 2302.05601).

For the norms w of the d units of a sub-block, with p = 0.5, q = 1 and eta = 0,

    I(w) = 1 - d^(1/q - 1/p) ||w||_p / ||w||_q        m = d (1 + eta)^(q/(p - q)) (1 - I)^(pq/(q - p))

I is 0 where all are equal and near 1 where one has everything; m bounds how many must stay. The share 1 - m/d, times
gamma, is pruned, at most all. SAP has gamma = 1 and prunes again and again as it trains; here gamma is solved for the
budget, in one go, without SAP's cap on what a round may prune, so that a sub-block of very unequal units can go
entirely while one of equal units stays whole. SAP takes the index over single weights; here it is over what can be
removed, the norms of all weights of each unit that is still there. Needs weights alone. Cost: none.
"""

from __future__ import annotations

import numpy as np

from edgeprune import saliency, vit
from edgeprune.allocators import Choose, Task, by_ratios, spread
from edgeprune.compat import VisionTransformer
from edgeprune.types import FloatArray, SubBlock

NEEDS = ("weights",)
P, Q, ETA = 0.5, 1.0, 0.0


def prepare(task: Task) -> Choose:
    shares = np.array([1 - bound(norms) for norms in unit_norms(task)])
    return lambda room_ms: by_ratios(task, lambda knob: 1 - spread(shares, knob), room_ms)


def pq_index(norms: FloatArray, p: float = P, q: float = Q) -> float:
    """How unequal these are, 0 to 1; 0 for fewer than two, or if all are 0."""
    if len(norms) < 2 or not norms.any():
        return 0.0
    low, high = (np.mean(np.abs(norms) ** r) ** (1 / r) for r in (p, q))
    return float(np.clip(1 - low / high, 0, 1))


def bound(norms: FloatArray, p: float = P, q: float = Q, eta: float = ETA) -> float:
    """m / d: the share that must stay."""
    return float((1 + eta) ** (q / (p - q)) * (1 - pq_index(norms, p, q)) ** (p * q / (q - p)))


def gauge(model: VisionTransformer) -> dict[SubBlock, float]:
    """The PQ index of every sub-block of a dense model: how much of it could go, before anything is measured."""
    places = [(i, kind) for i in range(len(model.blocks)) for kind in vit.KINDS]
    return {at: pq_index(norms_of(model, at)) for at in places}


def norms_of(model: VisionTransformer, at: SubBlock) -> FloatArray:
    """Of all weights of each unit, `[units]`."""
    squares = [w.detach().square() for w in saliency.group(model, at)]
    norms: FloatArray = saliency.unit_sums(squares, vit.anatomy(model).unit_size(at)).sqrt().numpy()
    return norms


def unit_norms(task: Task) -> list[FloatArray]:
    """Of every sub-block, the norms of the units that are still there."""
    found = []
    for level, own in zip(task.levels, task.counts, strict=True):
        found.append(norms_of(task.model, (level.block, level.kind))[list(level.kept(own[-1]))])
    return found
