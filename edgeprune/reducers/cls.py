"""CLS: the patches stay that the class token attends to most (EViT, Liang et al., arXiv 2202.07800, without its fused token).

Importance is the softmax row of the class token (and of a distillation token or registers) over all tokens, averaged
over heads: one query row, so that fused attention stays fused. A model without prefix tokens takes the mean attention
that a patch receives from all, which needs the whole matrix. TopK and Gather in the graph.
"""

from __future__ import annotations

from edgeprune.reducers import Reduction, Seen, importance, keep


def reduce(seen: Seen, patches: int) -> Reduction:
    return keep(importance(seen).topk(patches).indices, seen.prefix)
