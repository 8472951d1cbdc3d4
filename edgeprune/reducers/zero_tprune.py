"""Zero-TPrune: important patches by PageRank on the attention graph, then of like ones one goes (Wang et al., arXiv 2305.17328).

    s <- A^T s   from s = 1 / tokens, a few times per head;   importance = sqrt(mean over heads of s^2)

Half of the patches that must go are the least important. The rest fall in two groups, every other one by rank: of the
less important group those go whose key (mean over heads) is most like one of the other group. Needs the whole
attention matrix at the blocks that reduce. Left out: leaving heads aside by the variance of their s.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from edgeprune.reducers import Reduction, Seen, keep

ITERATIONS = 5  # the paper: tens in early layers, one in late ones; after 5 the order hardly moves


def reduce(seen: Seen, patches: int) -> Reduction:
    important = page_rank(seen.attention())[:, seen.prefix :]
    ranked = important.topk(important.shape[1]).indices
    gone = ranked.shape[1] - patches
    alike_gone = min(gone - gone // 2, patches)  # the second group cannot lose more than it has
    left = ranked[:, : patches + alike_gone]
    first, second = left[:, 0::2], left[:, 1::2]
    keys = F.normalize(seen.keys.mean(1)[:, seen.prefix :], dim=-1)
    alike = (_rows(keys, second) @ _rows(keys, first).transpose(1, 2)).amax(2)  # [n, second]
    unlike = alike.topk(second.shape[1] - alike_gone, largest=False).indices
    return keep(torch.cat([first, second.gather(1, unlike)], 1), seen.prefix)


def page_rank(attention: Tensor) -> Tensor:
    """`[n, heads, tokens, tokens]` -> importance `[n, tokens]`."""
    rank = torch.full_like(attention[..., :1], 1 / attention.shape[-1])
    for _ in range(ITERATIONS):
        rank = attention.transpose(-2, -1) @ rank
    return rank[..., 0].square().mean(1).sqrt()


def _rows(values: Tensor, index: Tensor) -> Tensor:
    return values.gather(1, index[:, :, None].expand(-1, -1, values.shape[-1]))
