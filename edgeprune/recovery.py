"""Recovery without labels: what the survivors of a plan become, before any training.

`survivors` re-fits each layer on the dense model's own inputs (the weights OBS ends in).
`sequential` then walks the blocks in order and re-fits `proj` and `fc2` on the inputs that the
pruned model really sees, so that its residual stream meets the dense one again; at last the classifier,
so that its logits do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
    stream closer there is dropped. Then the classifier, for the dense model's logits. Returns (accepted, tried).
    """
    wanted = [vit.embed(dense, images) for images in batches]
    have = [x.clone() for x in wanted]
    fit = max(1, len(batches) - max(1, round(HELD_OUT * len(batches))))
    accepted = tried = 0
    for i, (full, small) in enumerate(zip(dense.blocks, pruned.blocks, strict=True)):
        for kind in vit.KINDS:
            wanted = [vit.step(full, kind, x) for x in wanted]
            counted = [torch.ones(x.shape[:2]) for x in have] if weights is None else weights[i, kind]
            sub = vit.sub_block(small, kind)
            better, have = refit_sub_block(small, kind, sub, have, wanted, counted, fit)
            accepted += better
            tried += 1
    if has_plain_head(pruned):
        logits = [vit.classify(dense, x) for x in wanted]
        accepted += refit_head(pruned, cast(nn.Linear, pruned.head), have, logits, fit)[0]
        tried += 1
    return accepted, tried


@torch.no_grad()
def refit_sub_block(
    block: Any,
    kind: SubBlockKind,
    sub: Any,
    have: list[Tensor],
    wanted: list[Tensor],
    weights: Sequence[Tensor],
    fit: int,
) -> tuple[bool, list[Tensor]]:
    """Solve the last layer (or what stays of it, a bias) of `sub`, in the place of one of the block's sub-blocks.

    have, wanted: residual streams before `sub` and as they should be after it, `[n, tokens, width]` per batch;
    weights: how much each token counts, `[n, tokens]`. The first `fit` batches are fitted; `sub` is changed if the
    solution holds up on the others. Returns whether it did, and the streams after `sub`.
    """
    gain = getattr(vit.scale(block, kind), "gamma", torch.ones(()))
    inputs, outputs = _observe(block, kind, sub, have)
    if bool((gain.abs() < 1e-12).any()):  # LayerScale hides this sub-block: nothing to learn from its output
        return False, [x + y * gain for x, y in zip(have, outputs, strict=True)]
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
    better = [m - z @ change.T.float() - shift.float() for z, m in zip(inputs, missing, strict=True)]
    judged = slice(fit, None) if fit < len(have) else slice(None)
    if not _distance(better[judged], gain, weights[judged]) < _distance(missing[judged], gain, weights[judged]):
        return False, [x + y * gain for x, y in zip(have, outputs, strict=True)]
    layer = sub if columns == 0 else vit.last_layer(sub, kind)
    layer.bias += shift.float()
    if columns:
        layer.weight += change.float()
    return True, [w - m * gain for w, m in zip(wanted, better, strict=True)]


def _distance(missing: Sequence[Tensor], gain: Tensor, weights: Sequence[Tensor]) -> float:
    return sum(float((m * gain).square().sum(-1).mul(w).sum()) for m, w in zip(missing, weights, strict=True))


def has_plain_head(model: VisionTransformer) -> bool:
    """Whether one linear layer makes the logits; DeiT's distilled models average two, embedding models have none."""
    return type(model) is VisionTransformer and isinstance(model.head, nn.Linear)


@torch.no_grad()
def refit_head(
    model: VisionTransformer, head: nn.Linear, have: Sequence[Tensor], wanted: Sequence[Tensor], fit: int
) -> tuple[bool, list[Tensor]]:
    """Solve `head`, in the place of the model's, for the logits `wanted` `[n, classes]` per batch.

    have: residual streams after the last block. The first `fit` batches are fitted, by ridge least squares around
    the present weights; `head` is changed if the predicted classes of the others diverge less. Returns whether it
    was, and the logits.
    """
    read = [vit.features(model, x) for x in have]
    now = [head(z) for z in read]
    inputs = read[0].shape[-1]
    moments = Moments()
    for z, logits, w in zip(read[:fit], now[:fit], wanted[:fit], strict=True):
        moments.add(torch.cat([z, w - logits], -1))
    mean, covariance = moments.mean, moments.covariance
    change = torch.linalg.solve(obs.damped(covariance[:inputs, :inputs], RIDGE), covariance[:inputs, inputs:]).T
    shift = mean[inputs:] - change @ mean[:inputs]
    better = [logits + z @ change.T.float() + shift.float() for z, logits in zip(read, now, strict=True)]
    judged = slice(fit, None) if fit < len(have) else slice(None)
    if not _divergence(better[judged], wanted[judged]) < _divergence(now[judged], wanted[judged]):
        return False, now
    head.weight.add_(change.float())
    head.bias.add_(shift.float())
    return True, better


def _divergence(own: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    pairs = zip(own, wanted, strict=True)
    return sum(
        float(F.kl_div(o.log_softmax(-1), w.log_softmax(-1), log_target=True, reduction="sum")) for o, w in pairs
    )


def _observe(block: Any, kind: SubBlockKind, sub: Any, have: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Inputs `[n, tokens, columns]` of the last layer of `sub` (no columns if removed) and the outputs of `sub`."""
    if isinstance(sub, vit.RemovedSubBlock):
        return [x[..., :0] for x in have], [vit.call(block, kind, x, sub) for x in have]
    inputs: list[Tensor] = []
    hook = vit.last_layer(sub, kind).register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    try:
        return inputs, [vit.call(block, kind, x, sub) for x in have]
    finally:
        hook.remove()
