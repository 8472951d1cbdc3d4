"""Recovery without labels: what the survivors of a plan become, before any training.

`survivors` re-fits each layer on the dense model's own inputs (the weights OBS ends in).
`sequential` then walks the blocks in order and re-fits `proj` and `fc2` on the inputs that the
pruned model really sees, so that its residual stream meets the dense one again; at last the classifier,
so that its logits do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from edgeprune import anatomies, lowrank, obs, products, tasks, vit
from edgeprune.calibration import Calibration
from edgeprune.compat import VisionTransformer
from edgeprune.obs import Moments
from edgeprune.reducers import Reduction
from edgeprune.shelf import MEMORY, Item, Kept, Shelf
from edgeprune.types import Plan, SubBlock, SubBlockKind

RIDGE = 1e-2  # of the mean diagonal; the pull towards the weights that are already there
HELD_OUT = 0.25  # share of the images that only decide whether a re-fit is accepted


@dataclass(frozen=True)
class Place:
    """An attention or MLP, `sub`, and the block in which it stands, or stands in for the block's own."""

    block: Any
    kind: SubBlockKind
    sub: Any


def fitted(batches: Sequence[Tensor]) -> int:
    """How many batches, the first, are fitted to; the others decide."""
    return max(1, len(batches) - max(1, round(HELD_OUT * len(batches))))


@torch.no_grad()
def survivors(
    dense: VisionTransformer, plan: Plan, moments: Mapping[SubBlock, tuple[Tensor, Tensor]]
) -> VisionTransformer:
    """The sliced model with every pruned layer re-fitted; moments hold (mean, damped covariance) per layer."""
    sizes = vit.anatomy(dense)
    pruned = vit.slice_model(dense, plan)
    for i, keep in enumerate(plan.blocks):
        for kind in vit.KINDS:
            units = keep.heads if kind == "attn" else keep.neurons
            if len(units) == sizes.units((i, kind)):
                continue
            layer = vit.output_layer(dense.blocks[i], kind)
            mean, hessian = moments[i, kind]
            kept = vit.columns(units, sizes.unit_size((i, kind)))
            weight, bias = obs.refit(layer.weight, layer.bias, mean, hessian, kept)
            vit.write_output(vit.sub_block(pruned.blocks[i], kind), kind, weight, bias)
    return pruned


def lower_ranks(sizes: vit.Anatomy, pruned: VisionTransformer, plan: Plan, found: Calibration) -> VisionTransformer:
    """Give the heads of a sliced model the plan's ranks, in place, for what the dense model reads; returns the model.

    Heads that have them already are left alone.
    """
    for i, keep in enumerate(plan.blocks):
        attn: Any = vit.sub_block(pruned.blocks[i], "attn")
        if keep.rank is not None and attn.head_dim != keep.rank:
            mixed = lowrank.of_heads(found.moments[i, "attn"], keep.heads, sizes.by_block[i].head_dim)
            lowrank.reduce(attn, keep.rank, found.inputs[i], mixed)
    return pruned


@torch.no_grad()
def sequential(
    dense: VisionTransformer,
    pruned: VisionTransformer,
    batches: Sequence[Tensor],
    weights: Mapping[SubBlock, Sequence[Tensor]] | None = None,
    plan: Plan | None = None,
    shelf: Shelf = MEMORY,
) -> tuple[int, int]:
    """Re-fit `pruned` in place, block by block, on images `[n, channels, height, width]` per batch.

    With the plan by which `pruned` was cut from `dense`, each sub-block's first layer is solved for what the dense
    model's units see; then its last layer for the dense residual stream; at last the classifier for the logits.
    All by ridge least squares around the present weights. weights: how much each token counts, per sub-block and
    batch `[n, tokens]` (all alike if None). The last quarter of the batches decides: a solution of the others that
    does not come closer there is dropped; one that does is solved again with all. `shelf`: where what is known of each
    batch waits (about seven times its residual stream, and inputs of a layer). Returns (accepted, tried), of last
    layers and the classifier.
    """
    sizes = vit.anatomy(dense)
    wanted = shelf.keep(vit.embed(dense, images) for images in batches)
    have = wanted  # neither is changed in place
    so_far: list[Reduction] = [
        vit.as_it_is for _ in have
    ]  # what became of the tokens of each batch; the dense model keeps all
    fit = fitted(batches)
    accepted = tried = 0
    for i, (full, small) in enumerate(zip(dense.blocks, pruned.blocks, strict=True)):
        if isinstance(full, anatomies.MergingBlock):
            same, wanted = have is wanted, shelf.keep(vit.entered(full, x) for x in wanted)
            have = wanted if same else shelf.keep(vit.entered(small, x) for x in have)
        for kind in vit.KINDS:
            units = () if plan is None else plan.blocks[i].heads if kind == "attn" else plan.blocks[i].neurons
            counted = [torch.ones(x.shape[:2]) for x in have]
            if weights is not None:
                counted = [vit.reduced_rows(own, r) for own, r in zip(weights[i, kind], so_far, strict=True)]
            place = Place(small, kind, vit.sub_block(small, kind))
            if units and (kind == "mlp" or place.sub.head_dim == vit.sub_block(full, "attn").head_dim):
                rows = vit.first_rows((i, kind), units, sizes)
                hidden = shelf.keep(r(vit.hidden(full, kind, x, rows)) for x, r in zip(wanted, so_far, strict=True))
                refit_first(place, have, hidden, counted, fit, shelf)
                del hidden
            wanted = shelf.keep(vit.step(full, kind, x) for x in wanted)
            before = have
            whole = all(r is vit.as_it_is for r in so_far)
            reduced = wanted if whole else shelf.keep(r(x) for x, r in zip(wanted, so_far, strict=True))
            better, have = refit_sub_block(place, have, reduced, counted, fit, shelf=shelf)
            del reduced
            if kind == "attn" and isinstance(small, vit.ReducingBlock):
                own = [small.reduction(x, after) for x, after in zip(before, have, strict=True)]
                have = shelf.keep(r(x) for r, x in zip(own, have, strict=True))
                so_far = [vit.chained(first, second) for first, second in zip(so_far, own, strict=True)]
            accepted += better
            tried += 1
    if has_plain_head(pruned):
        logits = [vit.classify(dense, x) for x in wanted]
        accepted += refit_head(pruned, cast(nn.Linear, pruned.head), have, logits, fit)[0]
        tried += 1
    return accepted, tried


@torch.no_grad()
def refit_first(
    place: Place,
    have: Sequence[Tensor],
    wanted: Sequence[Tensor],
    weights: Sequence[Tensor],
    fit: int,
    shelf: Shelf = MEMORY,
) -> bool:
    """Solve the first layer at `place` (queries, keys and values, or fc1).

    have: residual streams `[n, tokens, width]` per batch; wanted: what the layer should make of them, `[n, tokens,
    rows]`. The rest as in `refit_sub_block`.
    """
    block, kind = place.block, place.kind
    layer = vit.first_layer(place.sub, kind)
    inputs = shelf.keep((block.norm1 if kind == "attn" else block.norm2)(x) for x in have)
    missing = shelf.keep(w - layer(z) for w, z in zip(wanted, inputs, strict=True))
    solved = _solve(inputs, missing, weights, fit, True, _squares)
    if solved is None:
        return False
    change, shift = solved
    layer.weight.add_(change)
    if layer.bias is not None:
        layer.bias.add_(shift)
    return True


@torch.no_grad()
def refit_sub_block(
    place: Place,
    have: Sequence[Tensor],
    wanted: Sequence[Tensor],
    weights: Sequence[Tensor],
    fit: int,
    again: bool = True,
    shelf: Shelf = MEMORY,
) -> tuple[bool, Sequence[Tensor]]:
    """Solve the last layer (or what stays of it, a bias) at `place`.

    have, wanted: residual streams before the sub-block and as they should be after it, `[n, tokens, width]` per batch;
    weights: how much each token counts, `[n, tokens]`. The layer is changed if what the first `fit` batches say holds
    up on the others. Returns whether it did, and the streams after the sub-block.
    """
    block, kind, sub = place.block, place.kind, place.sub
    gain = getattr(vit.scale(block, kind), "gamma", torch.ones(()))
    inputs, outputs = _observe(place, have, shelf)
    solved = None
    if not bool((gain.abs() < 1e-12).any()):  # else LayerScale hides it: nothing to learn from its output
        missing = shelf.keep((w - x) / gain - y for w, x, y in zip(wanted, have, outputs, strict=True))
        solved = _solve(inputs, missing, weights, fit, again, lambda m, w: _squares((x * gain for x in m), w))
    if solved is None:
        return False, shelf.keep(x + y * gain for x, y in zip(have, outputs, strict=True))
    change, shift = solved
    if change.shape[1]:
        layer = vit.last_layer(sub, kind)
        layer.weight.add_(change)
        layer.bias.add_(shift)
    else:
        sub.bias += shift
    return True, shelf.keep(w - m * gain for w, m in zip(wanted, _left(missing, inputs, *solved), strict=True))


def _solve(
    inputs: Sequence[Tensor],
    missing: Sequence[Tensor],
    weights: Sequence[Tensor],
    fit: int,
    again: bool,
    judge: Callable[[Iterable[Tensor], Sequence[Tensor]], float],
) -> tuple[Tensor, Tensor] | None:
    """Ridge least squares of `missing` `[..., outputs]` on `inputs` `[..., columns]`, per batch.

    The first `fit` batches are solved; None if `judge(missing, weights)` is not lower on the others. Otherwise all
    are if `again`, unless the others are still to judge by: change `[outputs, columns]`, shift `[outputs]`.
    """
    judged = slice(fit, None) if fit < len(inputs) else slice(None)
    columns = inputs[0].shape[-1]
    seen = Moments(columns)

    def take(part: slice) -> None:
        for z, m, w in zip(inputs[part], missing[part], weights[part], strict=True):
            seen.add(torch.cat([z, m], -1), w)

    take(slice(0, fit))
    change, shift = _ridge(seen, columns)
    if not judge(_left(missing[judged], inputs[judged], change, shift), weights[judged]) < judge(
        missing[judged], weights[judged]
    ):
        return None
    if again:
        take(slice(fit, None))
        change, shift = _ridge(seen, columns)
    return change, shift


def _left(missing: Sequence[Tensor], inputs: Sequence[Tensor], change: Tensor, shift: Tensor) -> Iterator[Tensor]:
    """What a solution leaves missing, batch by batch."""
    return (m - z @ change.T - shift for m, z in zip(missing, inputs, strict=True))


def _ridge(seen: Moments, columns: int) -> tuple[Tensor, Tensor]:
    """Change `[outputs, columns]` and shift `[outputs]` from the moments of inputs and what is missing, side by side."""
    mean, covariance = seen.mean, seen.covariance
    change = torch.zeros(len(mean) - columns, columns, dtype=torch.float64)
    if columns:
        hessian = obs.damped(covariance[:, :columns], RIDGE)
        change = torch.linalg.solve(hessian, covariance[:, columns:]).T
    return change.float(), (mean[columns:] - change @ mean[:columns]).float()


def _squares(missing: Iterable[Tensor], weights: Sequence[Tensor]) -> float:
    return sum(float(m.square().sum(-1).mul(w).sum()) for m, w in zip(missing, weights, strict=True))


def has_plain_head(model: VisionTransformer) -> bool:
    """Whether one linear layer makes the logits; DeiT's distilled models average two, embedding models have none."""
    return type(model) is VisionTransformer and isinstance(model.head, nn.Linear)


@torch.no_grad()
def refit_head(
    model: VisionTransformer,
    head: nn.Linear,
    have: Sequence[Tensor],
    wanted: Sequence[Tensor],
    fit: int,
    again: bool = True,
) -> tuple[bool, Sequence[Tensor]]:
    """Solve `head`, in the place of the model's, for the logits `wanted` `[n, classes]` per batch.

    have: residual streams after the last block. `head` is changed if what the first `fit` batches say makes the
    predicted classes of the others diverge less. Returns whether it was, and the logits.
    """
    read = [vit.features(model, x) for x in have]
    now = [head(z) for z in read]
    missing = [w - logits for w, logits in zip(wanted, now, strict=True)]
    judged = wanted[fit:] if fit < len(wanted) else wanted

    def diverged(left: Iterable[Tensor], _: Sequence[Tensor]) -> float:
        return _divergence([w - m for w, m in zip(judged, left, strict=True)], judged, tasks.of(model))

    solved = _solve(read, missing, [torch.ones(len(z)) for z in read], fit, again, diverged)
    if solved is None:
        return False, now
    change, shift = solved
    head.weight.add_(change)
    head.bias.add_(shift)
    return True, [w - m for w, m in zip(wanted, _left(missing, read, *solved), strict=True)]


def _divergence(own: Sequence[Tensor], wanted: Sequence[Tensor], task: str) -> float:
    return sum(float(tasks.divergence(o, w, task)) for o, w in zip(own, wanted, strict=True))


def _observe(place: Place, have: Sequence[Tensor], shelf: Shelf) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Inputs `[n, tokens, columns]` of the last layer (no columns if removed) and the outputs of the sub-block."""
    block, kind, sub = place.block, place.kind, place.sub
    if isinstance(sub, vit.RemovedSubBlock):
        none = [x.new_empty(*x.shape[:-1], 0) for x in have]  # no view: it would hold on to the stream
        return none, shelf.keep(vit.call(block, kind, x, sub) for x in have)
    inputs: list[Item] = []
    hook = vit.last_layer(sub, kind).register_forward_pre_hook(
        lambda _, x: inputs.append(shelf.put(products.wide(x[0])))
    )
    try:
        outputs = shelf.keep(vit.call(block, kind, x, sub) for x in have)
        return Kept(inputs), outputs
    finally:
        hook.remove()
