"""Recovery without labels: what the survivors of a plan become, before any training.

`survivors` re-fits each layer on the dense model's own inputs (the weights OBS ends in).
`sequential` then walks the blocks in order and re-fits `proj` and `fc2` on the inputs that the
pruned model really sees, so that its residual stream meets the dense one again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
        for kind, units in (("attn", keep.heads), ("mlp", keep.neurons)):
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


def _step(block: nn.Module, kind: SubBlockKind, x: Tensor) -> Tensor:
    """The residual stream after one sub-block."""
    return x + _scale(block, kind)(_call(block, kind, x))


def _call(block: nn.Module, kind: SubBlockKind, x: Tensor) -> Tensor:
    norm, sub = (block.norm1, block.attn) if kind == "attn" else (block.norm2, block.mlp)
    return sub(norm(x))  # type: ignore[operator, no-any-return]


def _scale(block: nn.Module, kind: SubBlockKind) -> nn.Module:
    return block.ls1 if kind == "attn" else block.ls2  # type: ignore[return-value]


def _refit(block: nn.Module, kind: SubBlockKind, have: list[Tensor], wanted: list[Tensor], fit: int) -> bool:
    gain = getattr(_scale(block, kind), "gamma", torch.ones(()))
    if bool((gain.abs() < 1e-12).any()):
        return False
    sub = block.attn if kind == "attn" else block.mlp
    removed = isinstance(sub, vit.RemovedSubBlock)
    inputs: list[Tensor] = []
    hook = (
        None if removed else vit.output_layer(block, kind).register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    )
    missing = [(w - x) / gain - _call(block, kind, x) for w, x in zip(wanted, have, strict=True)]
    if hook is not None:
        hook.remove()
    moments = Moments()
    width = missing[0].shape[-1]
    columns = 0 if removed else inputs[0].shape[-1]
    joint = [m if removed else torch.cat([z, m], -1) for z, m in zip(inputs or missing, missing, strict=True)]
    for x in joint[:fit]:
        moments.add(x)
    mean, covariance = moments.mean, moments.covariance
    if removed:
        change, shift = torch.zeros(width, 0, dtype=torch.float64), mean
    else:
        hessian = obs.damped(covariance[:columns, :columns], RIDGE)
        change = torch.linalg.solve(hessian, covariance[:columns, columns:]).T
        shift = mean[columns:] - change @ mean[:columns]
    before = after = 0.0
    for i in range(fit, len(joint)) if fit < len(joint) else range(len(joint)):
        correction = shift.float() + (0 if removed else inputs[i] @ change.T.float())
        before += float(((missing[i]) * gain).square().sum())
        after += float(((missing[i] - correction) * gain).square().sum())
    if not after < before:
        return False
    if removed:
        sub.bias += shift.to(sub.bias.dtype)  # type: ignore[operator, union-attr]
    else:
        layer = vit.output_layer(block, kind)
        layer.weight += change.to(layer.weight.dtype)
        layer.bias += shift.to(layer.bias.dtype)
    return True


def _write(block: nn.Module, kind: SubBlockKind, weight: Tensor, bias: Tensor) -> None:
    sub = block.attn if kind == "attn" else block.mlp
    if isinstance(sub, vit.RemovedSubBlock):
        sub.bias.copy_(bias)
    else:
        layer = vit.output_layer(block, kind)
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
