"""What criteria share in which a unit's worth is one number.

A unit is a group of weights that can only go together (DepGraph, arXiv 2301.12900): a neuron is its row and bias of
`fc1` and its column of `fc2`; a head is its rows and biases of queries, keys and values and its columns of `proj`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from edgeprune import vit
from edgeprune.compat import VisionTransformer
from edgeprune.criteria import SCORED, Evidence, SubBlock, make_levels
from edgeprune.types import Levels, SubBlockKind


def levels(evidence: Evidence, scores: Mapping[SubBlock, Tensor]) -> list[Levels]:
    """Least salient units first; a level's error is the sum of what it removes. scores: `[units]` per sub-block, at least 0."""
    made = []
    for at in evidence.moments:
        own = scores[at].double().numpy()
        order = own.argsort(kind="stable")
        errors = torch.cat([torch.zeros(1).double(), scores[at].double()[torch.from_numpy(order)].cumsum(0)])
        made.append(make_levels(at, order.tolist(), errors.numpy()))
    return made


def group(model: VisionTransformer, at: SubBlock) -> list[Tensor]:
    """The tensors that hold a sub-block's units: first layer's weight, its bias where there is one, last layer's weight."""
    sub = vit.sub_block(model.blocks[at[0]], at[1])
    first, last = vit.first_layer(sub, at[1]), vit.last_layer(sub, at[1])
    return [tensor for tensor in (first.weight, first.bias, last.weight) if tensor is not None]


def unit_sums(parts: Sequence[Tensor], kind: SubBlockKind, unit_size: int) -> Tensor:
    """`[units]`: sums over each unit of tensors that are shaped like those of `group`."""
    *first, last = (part.detach().double() for part in parts)
    rows = sum((part if part.ndim == 1 else part.sum(1) for part in first), torch.zeros(()).double())
    if kind == "attn":
        rows = rows.reshape(3, -1).sum(0)
    return (rows + last.sum(0)).reshape(-1, unit_size).sum(1)


def of_weights(evidence: Evidence, value: Callable[[Tensor], Tensor]) -> dict[SubBlock, Tensor]:
    """`[units]` per sub-block: `value(w)`, shaped like the weights w, summed over each unit's."""
    model, size = evidence.model, evidence.sizes.unit_size
    return {at: unit_sums([value(w.detach()) for w in group(model, at)], at[1], size(at[1])) for at in evidence.moments}


def of_gradients(
    evidence: Evidence, value: Callable[[Tensor, Tensor], Tensor], images: int = SCORED
) -> dict[SubBlock, Tensor]:
    """The same of `value(w, g)`, where g is the gradient of the mean cross entropy with the labels of so many images."""
    model, size = evidence.model, evidence.sizes.unit_size
    means = mean_gradients(evidence, images)
    pairs = {at: zip(group(model, at), means[at], strict=True) for at in evidence.moments}
    return {at: unit_sums([value(w.detach(), g) for w, g in own], at[1], size(at[1])) for at, own in pairs.items()}


def of_columns(evidence: Evidence, at: SubBlock, columns: Tensor) -> Tensor:
    """`[units]`: sums over each unit's input columns of the last layer, of a value per column."""
    return columns.detach().double().reshape(-1, evidence.sizes.unit_size(at[1])).sum(1)


def mean_gradients(evidence: Evidence, images: int = SCORED) -> dict[SubBlock, list[Tensor]]:
    """Of the mean cross entropy with the labels, shaped like `group`."""
    totals: dict[SubBlock, list[Tensor]] = {}
    count = 0
    for found, size in gradients(evidence, images):
        count += size
        for at, tensors in found.items():
            before = totals.get(at) or [torch.zeros_like(g) for g in tensors]
            totals[at] = [total + size * g for total, g in zip(before, tensors, strict=True)]
    return {at: [total / count for total in tensors] for at, tensors in totals.items()}


def gradients(
    evidence: Evidence, images: int = SCORED, *, each: bool = False
) -> Iterator[tuple[dict[SubBlock, list[Tensor]], int]]:
    """Gradients of the mean cross entropy with the labels, shaped like `group`, and of how many images: a batch, or `each`.

    No more than the first `images` calibration images are looked at.
    """
    parts = {at: group(evidence.model, at) for at in evidence.moments}
    flat = [tensor for tensors in parts.values() for tensor in tensors]
    left = images
    with evidence.console.progress("gradients", min(images, evidence.images), "images") as advance:
        for pixels, labels in evidence.batches():
            pixels, labels = pixels[:left], labels[:left]
            left -= len(labels)
            size = 1 if each else len(labels)
            for x, y in zip(pixels.split(size), labels.split(size), strict=True):
                found = iter(torch.autograd.grad(F.cross_entropy(evidence.model(x), y), flat))
                yield {at: [next(found) for _ in tensors] for at, tensors in parts.items()}, len(y)
                advance(len(y), "")
            if not left:
                return
