"""Fisher: structured OBS order, and the error each level is expected to cause in the model's output.

For a level that changes a layer by (dW, db), with labels y drawn from the model's own softmax and g_t
the gradient of -log p(y) at the layer's output for token t,

    error(level) = mean over images of ( sum_t g_t . (dW x_t + db) )^2

which is twice the KL divergence to second order (the Fisher information along the change). One
backward pass scores every level of every sub-block. Needs weights, activations and gradients, no
labels. Between the grid widths, where no one may stop, errors are interpolated.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from edgeprune import obs, products, vit
from edgeprune.criteria import SCORED, Evidence, grid_levels, obs_orders, observe
from edgeprune.types import Levels, SubBlock

NEEDS = ("weights", "activations", "gradients", "loss")
CHANGES_BYTES = 3 << 30  # weight changes held at once, all of a DeiT-B; what does not fit takes another backward pass


def score(evidence: Evidence) -> list[Levels]:
    orders = {at: order for at, (order, _, _) in obs_orders(evidence).items()}
    levels = []
    for group in _groups(evidence):
        changes = {at: _changes(evidence, at, orders[at]) for at in group}
        errors = _fisher(evidence, changes)
        for at in group:
            levels.append(grid_levels(evidence, at, orders[at], errors[at]))
    return sorted(levels, key=lambda level: (level.block, level.kind))


def _groups(evidence: Evidence) -> list[list[SubBlock]]:
    groups: list[list[SubBlock]] = [[]]
    held = 0
    for at in evidence.moments:
        size = 4 * evidence.layer(at)[0].numel() * len(evidence.grid(at))
        if groups[-1] and held + size > CHANGES_BYTES:
            groups.append([])
            held = 0
        groups[-1].append(at)
        held += size
    return groups


def _changes(evidence: Evidence, at: SubBlock, order: list[int]) -> tuple[Tensor, Tensor]:
    """(dW `[levels, width * inputs]`, db `[levels, width]`), float32; level 0 keeps everything."""
    weight, bias = evidence.layer(at)
    moments, unit_size = evidence.moments[at], evidence.sizes.unit_size(at)
    hessian, mean = obs.damped(moments.covariance), moments.mean
    dws, dbs = [], []
    last_first = vit.columns(tuple(reversed(order)), unit_size)
    counts = [unit_size * kept for kept in reversed(evidence.grid(at))]
    for count, (new, new_bias) in zip(counts, obs.refits(weight, bias, mean, hessian, last_first, counts), strict=True):
        change = -weight.double()
        change[:, last_first[:count]] += new
        dws.append(change.flatten().float())
        dbs.append((new_bias - bias).float())
    return torch.stack(dws), torch.stack(dbs)


@products.rounded()
def _fisher(evidence: Evidence, changes: dict[SubBlock, tuple[Tensor, Tensor]]) -> dict[SubBlock, np.ndarray]:
    generator = torch.Generator().manual_seed(evidence.seed)
    totals = {at: torch.zeros(len(dw), dtype=torch.float64) for at, (dw, _) in changes.items()}
    count = 0
    with evidence.console.progress("Fisher errors", min(SCORED, evidence.images), "images") as advance:
        for pixels, _ in evidence.batches():
            inputs, gradients = observe(evidence.model, pixels, list(changes), generator)
            for at, (dw, db) in changes.items():
                with products.layers():
                    per_image = products.wide(torch.einsum("ntc,ntd->ncd", gradients[at], inputs[at])).flatten(1)
                change = per_image @ dw.T + gradients[at].sum(1) @ db.T  # [images, levels]
                totals[at] += change.double().square().sum(0)
            count += len(pixels)
            advance(len(pixels), "")
            if count >= SCORED:
                break
    return {at: (total / count).numpy() for at, total in totals.items()}
