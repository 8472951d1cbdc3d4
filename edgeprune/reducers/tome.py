"""ToMe: like patches are merged, not dropped (Bolya et al., arXiv 2210.09461).

Patches are split alternately in two sets. Each of the second finds the patch of the first whose key (mean over heads) is
most like its own (cosine); the pairs most alike are merged into their mean. Static: a matrix of zeros and ones, rows
scaled to sum to 1, in the place of the paper's scatter. At most half of the patches go at once; where more must, it is
done again. Left out: sizes of merged tokens, in means of merged ones and in later attention (log size), as blocks here
pass on nothing but the stream.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from edgeprune.reducers import Reduction, Seen


def reduce(seen: Seen, patches: int) -> Reduction:
    keys = F.normalize(seen.keys.mean(1)[:, seen.prefix :], dim=-1)
    matrix = merging(keys, patches)

    def apply(stream: Tensor) -> Tensor:
        return torch.cat([stream[:, : seen.prefix], matrix.to(stream.dtype) @ stream[:, seen.prefix :]], 1)

    return apply


def merging(keys: Tensor, patches: int) -> Tensor:
    """How much of each patch is in each merged one, `[n, patches, all]`, from unit keys `[n, all, head_dim]`."""
    count = keys.shape[1]
    matrix = torch.eye(count, dtype=keys.dtype, device=keys.device).expand(keys.shape[0], -1, -1)
    while matrix.shape[1] > patches:
        gone = min(matrix.shape[1] - patches, matrix.shape[1] // 2)
        step = _step(F.normalize(matrix @ keys, dim=-1), gone)
        matrix = step @ matrix
    return matrix


def _step(keys: Tensor, gone: int) -> Tensor:
    """One bipartite matching that merges `gone` patches, at most half: `[n, all - gone, all]`."""
    first, second = keys[:, 0::2], keys[:, 1::2]
    if gone > second.shape[1]:
        raise ValueError(f"{gone} patches cannot go at once from {keys.shape[1]}")
    alike = second @ first.transpose(1, 2)
    best, into = alike.max(2)
    order = best.topk(best.shape[1]).indices
    merged, stay = order[:, :gone], order[:, gone:].sort(1).values
    eye = torch.eye(keys.shape[1], dtype=keys.dtype, device=keys.device)
    kept = eye[0::2].expand(keys.shape[0], -1, -1).clone()  # [n, first, all]
    sources = eye[1::2][merged]  # [n, gone, all]
    where = F.one_hot(into.gather(1, merged), first.shape[1]).to(keys.dtype)  # [n, gone, first]
    kept = kept + where.transpose(1, 2) @ sources
    kept = kept / kept.sum(2, keepdim=True)
    return torch.cat([kept, eye[1::2][stay]], 1)
