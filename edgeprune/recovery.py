"""Recovery without labels: what the survivors of a plan become, before any training.

`survivors` re-fits each layer on the dense model's own inputs (the weights OBS ends in).
`sequential` then walks the blocks in order and re-fits `proj` and `fc2` on the inputs that the
pruned model really sees, so that its residual stream meets the dense one again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from edgeprune import obs, vit
from edgeprune.compat import VisionTransformer
from edgeprune.obs import Moments
from edgeprune.types import Plan, SubBlockKind

RIDGE = 1e-2  # of the mean diagonal; the pull towards the weights that are already there
HELD_OUT = 0.25  # share of the images that only decide whether a re-fit is accepted


@torch.no_grad()
def survivors(
    dense: VisionTransformer, plan: Plan, moments: Mapping[tuple[int, SubBlockKind], tuple[Tensor, Tensor]]
) -> VisionTransformer:
    """The sliced model with every pruned layer re-fitted; moments hold (mean, damped covariance) per layer."""
    sizes = vit.anatomy(dense)
    pruned = vit.slice_model(dense, plan)
    for i, keep in enumerate(plan.blocks):
        for kind in vit.KINDS:
            units = keep.heads if kind == "attn" else keep.neurons
            if len(units) == sizes.units(kind):
                continue
            layer = vit.output_layer(dense.blocks[i], kind)
            mean, hessian = moments[i, kind]
            kept = vit.columns(units, sizes.unit_size(kind))
            weight, bias = obs.refit(layer.weight, layer.bias, mean, hessian, kept)
            vit.write_output(vit.sub_block(pruned.blocks[i], kind), kind, weight, bias)
    return pruned


@torch.no_grad()
def sequential(
    dense: VisionTransformer,
    pruned: VisionTransformer,
    batches: Sequence[Tensor],
    weights: Mapping[tuple[int, SubBlockKind], Sequence[Tensor]] | None = None,
) -> tuple[int, int]:
    """Re-fit `pruned` in place, block by block, on images `[n, channels, height, width]` per batch.

    Each sub-block's last layer is solved, by ridge least squares around its present weights, for the
    dense model's residual stream. weights: how much each token counts, per sub-block and batch `[n, tokens]`
    (all alike if None). The last quarter of the batches is held out: a solution that does not bring the
    stream closer there is dropped. Returns (accepted, tried).
    """
    wanted = [vit.embed(dense, images) for images in batches]
    have = [x.clone() for x in wanted]
    fit = max(1, len(batches) - max(1, round(HELD_OUT * len(batches))))
    accepted = tried = 0
    for i, (full, small) in enumerate(zip(dense.blocks, pruned.blocks, strict=True)):
        for kind in vit.KINDS:
            wanted = [vit.step(full, kind, x) for x in wanted]
            counted = [torch.ones(x.shape[:2]) for x in have] if weights is None else weights[i, kind]
            accepted += _refit(small, kind, have, wanted, counted, fit)
            tried += 1
            have = [vit.step(small, kind, x) for x in have]
    return accepted, tried


def _refit(
    block: Any, kind: SubBlockKind, have: list[Tensor], wanted: list[Tensor], weights: Sequence[Tensor], fit: int
) -> bool:
    """Solve one sub-block's last layer (or what stays of it, a bias); True if it held up on held-out images."""
    gain = getattr(vit.scale(block, kind), "gamma", torch.ones(()))
    if bool((gain.abs() < 1e-12).any()):  # LayerScale hides this sub-block: nothing to learn from its output
        return False
    inputs, outputs = _observe(block, kind, have)
    missing = [(w - x) / gain - y for w, x, y in zip(wanted, have, outputs, strict=True)]
    columns = inputs[0].shape[-1]
    moments = Moments()
    for z, m, w in zip(inputs[:fit], missing[:fit], weights[:fit], strict=True):
        moments.add(torch.cat([z, m], -1), w)
    mean, covariance = moments.mean, moments.covariance
    change = torch.zeros(missing[0].shape[-1], columns, dtype=torch.float64)
    if columns:
        hessian = obs.damped(covariance[:columns, :columns], RIDGE)
        change = torch.linalg.solve(hessian, covariance[:columns, columns:]).T
    shift = mean[columns:] - change @ mean[:columns]
    before = after = 0.0
    for z, m, w in list(zip(inputs, missing, weights, strict=True))[fit:] or [(inputs[0], missing[0], weights[0])]:
        before += float((m * gain).square().sum(-1).mul(w).sum())
        after += float(((m - z @ change.T.float() - shift.float()) * gain).square().sum(-1).mul(w).sum())
    if not after < before:
        return False
    layer = vit.sub_block(block, kind) if columns == 0 else vit.output_layer(block, kind)
    layer.bias += shift.float()
    if columns:
        layer.weight += change.float()
    return True


def _observe(block: Any, kind: SubBlockKind, have: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs `[n, tokens, columns]` of the sub-block's last layer (no columns if removed) and the sub-block's outputs."""
    if isinstance(vit.sub_block(block, kind), vit.RemovedSubBlock):
        return [x[..., :0] for x in have], [vit.call(block, kind, x) for x in have]
    inputs: list[Tensor] = []
    hook = vit.output_layer(block, kind).register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    try:
        return inputs, [vit.call(block, kind, x) for x in have]
    finally:
        hook.remove()
