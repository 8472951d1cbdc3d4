"""What criteria share in which a unit's worth is one number.

A unit is a group of weights that can only go together (DepGraph, arXiv 2301.12900): a neuron is its row and bias of
`fc1` and its column of `fc2`; a head is its rows and biases of queries, keys and values and its columns of `proj`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from edgeprune import tasks, vit
from edgeprune.compat import VisionTransformer
from edgeprune.criteria import SCORED, Evidence, make_levels
from edgeprune.data import Batch
from edgeprune.types import Levels, SubBlock


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


def unit_sums(parts: Sequence[Tensor], unit_size: int) -> Tensor:
    """`[units]`: sums over each unit of tensors that are shaped like those of `group`."""
    *first, last = (part.detach().double() for part in parts)
    rows = sum((part if part.ndim == 1 else part.sum(1) for part in first), torch.zeros(()).double())
    rows = rows.reshape(-1, last.shape[1]).sum(0)  # of queries, keys and values, or of neurons and their gates
    return (rows + last.sum(0)).reshape(-1, unit_size).sum(1)


def of_weights(evidence: Evidence, value: Callable[[Tensor], Tensor]) -> dict[SubBlock, Tensor]:
    """`[units]` per sub-block: `value(w)`, shaped like the weights w, summed over each unit's."""
    model, size = evidence.model, evidence.sizes.unit_size
    return {at: unit_sums([value(w.detach()) for w in group(model, at)], size(at)) for at in evidence.moments}


def of_gradients(
    evidence: Evidence, value: Callable[[Tensor, Tensor], Tensor], images: int = SCORED
) -> dict[SubBlock, Tensor]:
    """The same of `value(w, g)`, where g is the gradient of the mean cross entropy with the labels of so many images."""
    return of_pairs(evidence, mean_gradients(evidence, images), value)


def of_pairs(
    evidence: Evidence, others: Mapping[SubBlock, Sequence[Tensor]], value: Callable[[Tensor, Tensor], Tensor]
) -> dict[SubBlock, Tensor]:
    """The same of `value(w, other)` for any other tensors that are shaped like `group`."""
    model, size = evidence.model, evidence.sizes.unit_size
    pairs = {at: zip(group(model, at), others[at], strict=True) for at in evidence.moments}
    return {at: unit_sums([value(w.detach(), o) for w, o in own], size(at)) for at, own in pairs.items()}


def of_columns(evidence: Evidence, at: SubBlock, columns: Tensor) -> Tensor:
    """`[units]`: sums over each unit's input columns of the last layer, of a value per column."""
    return columns.detach().double().reshape(-1, evidence.sizes.unit_size(at)).sum(1)


def variances(evidence: Evidence, at: SubBlock) -> Tensor:
    """`[inputs]`: variances of the last layer's inputs over all calibration tokens."""
    return evidence.moments[at].covariance.diagonal().clamp_min(0)


def input_norms(evidence: Evidence, at: SubBlock) -> Tensor:
    """`[inputs]`: root mean squares of the last layer's inputs, the ||x|| of many papers / sqrt(calibration tokens)."""
    return (variances(evidence, at) + evidence.moments[at].mean.square()).sqrt()


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


def gradient_moments(
    evidence: Evidence, images: int = SCORED, *, drawn: bool = False
) -> tuple[dict[SubBlock, list[Tensor]], dict[SubBlock, list[Tensor]]]:
    """Means of single images' gradients, and of their squares, shaped like `group`; `drawn` as in `gradients`."""
    first, second = (
        {at: [torch.zeros_like(w) for w in group(evidence.model, at)] for at in evidence.moments} for _ in range(2)
    )
    count = 0  # of those that could be read
    for found, size in gradients(evidence, images, each=True, drawn=drawn):
        count += size
        for at, tensors in found.items():
            for total, squares, g in zip(first[at], second[at], tensors, strict=True):
                total.add_(g)
                squares.addcmul_(g, g)
    for tensors in (*first.values(), *second.values()):
        for total in tensors:
            total.div_(count)
    return first, second


def gradients(
    evidence: Evidence, images: int = SCORED, *, each: bool = False, drawn: bool = False
) -> Iterator[tuple[dict[SubBlock, list[Tensor]], int]]:
    """Gradients of the mean cross entropy with the labels, shaped like `group`, and of how many images: a batch, or `each`.

    With `drawn`, labels are drawn from the model's own softmax, and the given ones are not looked at.
    No more than the first `images` calibration images are looked at.
    """
    generator = torch.Generator().manual_seed(evidence.seed)
    parts = {at: group(evidence.model, at) for at in evidence.moments}
    flat = [tensor for tensors in parts.values() for tensor in tensors]
    with evidence.console.progress("gradients", min(images, evidence.images), "images") as advance:
        for pixels, labels in first(evidence, images):
            size = 1 if each else len(labels)
            for x, y in zip(pixels.split(size), labels.split(size), strict=True):
                logits = evidence.model(x)
                if drawn:
                    loss = tasks.surprise(logits, tasks.of(evidence.model), generator) / len(y)
                else:
                    loss = F.cross_entropy(logits, y)
                found = iter(torch.autograd.grad(loss, flat))
                yield {at: [next(found) for _ in tensors] for at, tensors in parts.items()}, len(y)
                advance(len(y), "")


def first(evidence: Evidence, images: int = SCORED) -> Iterator[Batch]:
    """No more than so many calibration images with their labels, in batches."""
    for pixels, labels in evidence.batches():
        yield pixels[:images], labels[:images]
        images -= len(labels)
        if images <= 0:
            return


def features(
    model: VisionTransformer, pixels: Tensor, places: Iterable[SubBlock], value: Callable[[Tensor], Tensor]
) -> dict[SubBlock, tuple[Tensor, Tensor]]:
    """Inputs of the layers that end these sub-blocks, and gradients there of `value(logits)`; both `[n, tokens, inputs]`."""
    inputs: dict[SubBlock, Tensor] = {}
    hooks = []
    for at in places:

        def keep(_: object, x: tuple[Tensor, ...], at: SubBlock = at) -> None:
            inputs[at] = x[0]

        hooks.append(vit.output_layer(model.blocks[at[0]], at[1]).register_forward_pre_hook(keep))
    try:
        gradients = torch.autograd.grad(value(model(pixels)), list(inputs.values()))
    finally:
        for hook in hooks:
            hook.remove()
    return {at: (x.detach(), g) for (at, x), g in zip(inputs.items(), gradients, strict=True)}
