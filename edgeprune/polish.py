"""Polishing: block by block, gradient descent on what the refit cannot solve for in closed form. No labels.

A block's own weights (norms, queries, keys, values, both layers of the MLP) are trained so that its residual stream
comes closer to the dense model's, on the inputs that the pruned model gives it, with tokens weighed as in
`recovery`: the objective of SPDY's Global AdaPrune (arXiv 2201.13096), but one block at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from edgeprune import recovery, vit
from edgeprune.compat import VisionTransformer
from edgeprune.reducers import Reduction
from edgeprune.shelf import MEMORY, Shelf
from edgeprune.types import SubBlock

LEARNING_RATE = 3e-4  # of Adam; falls to 0 along a cosine


def polish(
    dense: VisionTransformer,
    pruned: VisionTransformer,
    batches: Sequence[Tensor],
    weights: Mapping[SubBlock, Sequence[Tensor]] | None,
    passes: int,
    advance: Callable[[float, str], None] = lambda amount, note: None,
    shelf: Shelf = MEMORY,
) -> tuple[int, int]:
    """Train every block of `pruned` in place, `passes` times over images `[n, channels, height, width]` per batch.

    weights: how much each token counts, per sub-block and batch `[n, tokens]` (all alike if None). The last quarter of
    the batches takes no part and decides: a block that does not come closer to the dense stream there stays as it
    was, as does one that drops tokens. The classifier is solved again at last. `advance(1, "")` is called after every block.
    `shelf`: where residual streams wait. Returns (accepted, tried), of blocks.
    """
    fit = recovery.fitted(batches)
    with torch.no_grad():
        have = shelf.keep(vit.embed(pruned, images) for images in batches)
        wanted = shelf.keep(vit.embed(dense, images) for images in batches)
    accepted = 0
    so_far: list[Reduction] = [vit.as_it_is for _ in have]
    for i, (full, small) in enumerate(zip(dense.blocks, pruned.blocks, strict=True)):
        with torch.no_grad():
            wanted = shelf.keep(full(x) for x in wanted)
        if isinstance(small, vit.ReducingBlock):
            with torch.no_grad():
                own: list[Reduction] = []

                def run(x: Tensor, small: vit.ReducingBlock = small, own: list[Reduction] = own) -> Tensor:
                    after, reduction = small.run(x)
                    own.append(reduction)
                    return after

                have = shelf.keep(run(x) for x in have)
            so_far = [vit.chained(first, second) for first, second in zip(so_far, own, strict=True)]
        else:
            reduced = shelf.keep(r(x) for r, x in zip(so_far, wanted, strict=True))
            counted = [torch.ones(x.shape[:2]) for x in reduced]
            if weights is not None:
                counted = [vit.reduced_rows(part, r) for part, r in zip(weights[i, "mlp"], so_far, strict=True)]
            accepted += _polish_block(small, have, reduced, counted, fit, passes)
            with torch.no_grad():
                have = shelf.keep(small(x) for x in have)
        advance(1, "")
    if recovery.has_plain_head(pruned):
        with torch.no_grad():
            logits = [vit.classify(dense, x) for x in wanted]
        recovery.refit_head(pruned, cast(nn.Linear, pruned.head), have, logits, fit)
    return accepted, len(pruned.blocks)


def _polish_block(
    block: nn.Module,
    have: Sequence[Tensor],
    wanted: Sequence[Tensor],
    weights: Sequence[Tensor],
    fit: int,
    passes: int,
) -> bool:
    """Whether the block, trained on the first `fit` batches, comes closer to `wanted` on the others; else it is put back."""
    parameters = list(block.parameters())
    if not parameters:
        return False
    judged = slice(fit, None) if fit < len(have) else slice(None)
    held_out = list(zip(have[judged], wanted[judged], weights[judged], strict=True))
    before, best = copy.deepcopy(block.state_dict()), _mean_distance(block, held_out)
    steps = passes * fit
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        at = step % fit
        optimizer.zero_grad(set_to_none=True)
        _distance(block(have[at]), wanted[at], weights[at]).backward()
        optimizer.step()
        schedule.step()
    for parameter in parameters:
        parameter.grad = None
    if _mean_distance(block, held_out) < best:
        return True
    block.load_state_dict(before)
    return False


@torch.no_grad()
def _mean_distance(block: nn.Module, batches: Sequence[tuple[Tensor, Tensor, Tensor]]) -> float:
    return sum(float(_distance(block(x), w, c)) for x, w, c in batches) / len(batches)


def _distance(have: Tensor, wanted: Tensor, weights: Tensor) -> Tensor:
    """Weighted ||have - wanted||^2 / ||wanted||^2 over the tokens `[n, tokens, width]`."""
    off, all_ = ((x.square().sum(-1) * weights).sum() for x in (have - wanted, wanted))
    return off / all_
