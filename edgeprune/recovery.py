"""Recovery without labels: what the survivors of a plan become, before any training.

`survivors` re-fits each layer on the dense model's own inputs (the weights OBS ends in).
`sequential` then walks the blocks in order and re-fits `proj` and `fc2` on the inputs that the
pruned model really sees, so that its residual stream meets the dense one again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

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
            _write(pruned.blocks[i], kind, weight, bias)
    return pruned


@torch.no_grad()
def sequential(dense: VisionTransformer, pruned: VisionTransformer, batches: Sequence[Tensor]) -> tuple[int, int]:
    """Re-fit `pruned` in place, block by block, on images `[n, channels, height, width]` per batch.

    Each sub-block's last layer is solved, by ridge least squares around its present weights, for the
    dense model's residual stream. The last quarter of the batches is held out: a solution that does
    not bring the stream closer there is dropped. Returns (accepted, tried).
    """
    wanted = [vit.embed(dense, images) for images in batches]
    have = [x.clone() for x in wanted]
    fit = max(1, len(batches) - max(1, round(HELD_OUT * len(batches))))
    accepted = tried = 0
    for full, small in zip(dense.blocks, pruned.blocks, strict=True):
        for kind in vit.KINDS:
            wanted = [_step(full, kind, x) for x in wanted]
            accepted += _refit(small, kind, have, wanted, fit)
            tried += 1
            have = [_step(small, kind, x) for x in have]
    return accepted, tried


def _step(block: Any, kind: SubBlockKind, x: Tensor) -> Tensor:
    """The residual stream after one sub-block."""
    return x + _scale(block, kind)(_call(block, kind, x))


def _call(block: Any, kind: SubBlockKind, x: Tensor) -> Tensor:
    norm = block.norm1 if kind == "attn" else block.norm2
    return _sub_block(block, kind)(norm(x))


def _scale(block: Any, kind: SubBlockKind) -> nn.Module:
    return block.ls1 if kind == "attn" else block.ls2


def _refit(block: Any, kind: SubBlockKind, have: list[Tensor], wanted: list[Tensor], fit: int) -> bool:
    """Solve one sub-block's last layer (or what stays of it, a bias); True if it held up on held-out images."""
    gain = getattr(_scale(block, kind), "gamma", torch.ones(()))
    if bool((gain.abs() < 1e-12).any()):  # LayerScale hides this sub-block: nothing to learn from its output
        return False
    inputs, outputs = _observe(block, kind, have)
    missing = [(w - x) / gain - y for w, x, y in zip(wanted, have, outputs, strict=True)]
    columns = inputs[0].shape[-1]
    moments = Moments()
    for z, m in zip(inputs[:fit], missing[:fit], strict=True):
        moments.add(torch.cat([z, m], -1))
    mean, covariance = moments.mean, moments.covariance
    change = torch.zeros(missing[0].shape[-1], columns, dtype=torch.float64)
    if columns:
        hessian = obs.damped(covariance[:columns, :columns], RIDGE)
        change = torch.linalg.solve(hessian, covariance[:columns, columns:]).T
    shift = mean[columns:] - change @ mean[:columns]
    before = after = 0.0
    for z, m in zip(inputs[fit:] or inputs, missing[fit:] or missing, strict=True):
        before += float((m * gain).square().sum())
        after += float(((m - z @ change.T.float() - shift.float()) * gain).square().sum())
    if not after < before:
        return False
    layer = _sub_block(block, kind) if columns == 0 else vit.output_layer(block, kind)
    layer.bias += shift.float()
    if columns:
        layer.weight += change.float()
    return True


def _observe(block: Any, kind: SubBlockKind, have: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs `[n, tokens, columns]` of the sub-block's last layer (no columns if removed) and the sub-block's outputs."""
    if isinstance(_sub_block(block, kind), vit.RemovedSubBlock):
        return [x[..., :0] for x in have], [_call(block, kind, x) for x in have]
    inputs: list[Tensor] = []
    hook = vit.output_layer(block, kind).register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    try:
        return inputs, [_call(block, kind, x) for x in have]
    finally:
        hook.remove()


def _sub_block(block: Any, kind: SubBlockKind) -> Any:
    return block.attn if kind == "attn" else block.mlp


def _write(block: Any, kind: SubBlockKind, weight: Tensor, bias: Tensor) -> None:
    sub = _sub_block(block, kind)
    if isinstance(sub, vit.RemovedSubBlock):
        sub.bias.copy_(bias)
    else:
        layer = vit.output_layer(block, kind)
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
