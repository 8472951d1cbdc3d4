"""EViT: as `cls`, but the last patch is what all dropped ones make together (Liang et al., arXiv 2202.07800).

The fused token is the mean of the dropped patches, weighted by their importance: what all patches weigh together less
what the kept ones do, so no index of the dropped is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgeprune.reducers import Reduction, Seen, importance, keep


def reduce(seen: Seen, patches: int) -> Reduction:
    weights = importance(seen)
    if patches >= weights.shape[1]:
        return lambda stream: stream
    chosen = weights.topk(patches - 1).indices
    kept = keep(chosen, seen.prefix)
    dropped = weights.scatter(1, chosen, 0.0)
    shares = (dropped / dropped.sum(1, keepdim=True).clamp_min(1e-12))[:, None]  # [n, 1, patches]

    def apply(stream: Tensor) -> Tensor:
        return torch.cat([kept(stream), shares.to(stream.dtype) @ stream[:, seen.prefix :]], 1)

    return apply
