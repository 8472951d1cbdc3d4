"""How much a head, a neuron, a sub-block matters. One file per criterion; the file name is its name.

A criterion is a module with one function, `score(evidence) -> list[Levels]`: for every sub-block the
order in which units go, and the error of every level. Errors are compared across sub-blocks by the
allocator, so they must share a scale. `NEEDS` names what it looks at: weights, activations, gradients, labels, or
"loss", which asks for statistics that know the loss: tokens weighed by their gradients, and the covariance of the
gradients. Where a unit's worth is one number, `edgeprune.saliency` has all that a criterion shares with others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from edgeprune import modules, numerics, obs, products, tasks, vit
from edgeprune.compat import VisionTransformer
from edgeprune.console import Console
from edgeprune.data import Batch
from edgeprune.obs import Moments
from edgeprune.types import Levels, SubBlock

DEFAULT = "fisher"

SCORED = 256  # images on which levels are scored, at most: on cifar10 no better plans came from 512
FLOOR = 0.2  # what a token counts that the loss does not feel; tokens count 1 on average


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at: the dense model, statistics of its layers, and calibration images."""

    model: VisionTransformer
    sizes: vit.Anatomy
    moments: dict[SubBlock, Moments]
    gradients: dict[SubBlock, Tensor]  # covariance of the output gradients `[width, width]`; empty without the loss
    batches: Callable[[], Iterator[Batch]]  # calibration images, with labels for a criterion that names them in NEEDS
    images: int
    neuron_grids: tuple[tuple[int, ...], ...]  # the MLP widths that the search may choose, ascending from 0, per stage
    seed: int
    console: Console

    def layer(self, at: SubBlock) -> tuple[Tensor, Tensor]:
        """Weight `[width, inputs]` and bias `[width]` of the layer that ends the sub-block, detached."""
        layer = vit.output_layer(self.model.blocks[at[0]], at[1])
        return layer.weight.detach(), layer.bias.detach()

    def grid(self, at: SubBlock) -> tuple[int, ...]:
        """How many units may be kept, ascending."""
        if at[1] == "attn":
            return tuple(range(self.sizes.units(at) + 1))
        return self.neuron_grids[self.sizes.stages.index(self.sizes.by_block[at[0]])]


class Criterion(Protocol):
    __name__: str
    __doc__: str | None
    NEEDS: tuple[str, ...]

    def score(self, evidence: Evidence) -> list[Levels]: ...


def names() -> list[str]:
    return modules.names("criterion")


def get(name: str) -> Criterion:
    """The criterion module; UsageError with "did you mean" for an unknown name."""
    return cast(Criterion, modules.get("criterion", name))


def uses_loss(criterion: Criterion) -> bool:
    """Whether it asks for statistics that know the loss."""
    return "loss" in criterion.NEEDS


def score(criterion: Criterion, evidence: Evidence) -> list[Levels]:
    """The criterion's levels, one per sub-block in order; units that a schedule has already cut off go first and cost nothing."""
    found = {level.at: level for level in criterion.score(evidence)}
    return [_dead_first(evidence, found[at]) for at in evidence.moments]


def _dead_first(evidence: Evidence, levels: Levels) -> Levels:
    weight, _ = evidence.layer(levels.at)
    used = weight.abs().sum(0).reshape(-1, evidence.sizes.unit_size(levels.at)).sum(1) > 0
    dead = ~used.numpy()[levels.order]
    if not dead.any():
        return levels
    first = np.argsort(~dead, kind="stable")
    costs = np.where(dead, 0.0, np.diff(levels.errors))[first]
    return replace(levels, order=levels.order[first], errors=np.concatenate([[0.0], np.cumsum(costs)]))


def obs_order(evidence: Evidence, at: SubBlock) -> tuple[list[int], list[float], float]:
    """OBS removal order and errors of one sub-block, and the error of removing all of it."""
    weight, _ = evidence.layer(at)
    hessian = obs.damped(evidence.moments[at].covariance)
    w = weight.double()
    if at in evidence.gradients:
        w = obs.loss_rows(w, evidence.gradients[at])
    order, errors = obs.removal_order(w, hessian, evidence.sizes.unit_size(at))
    return order, errors, float(((w @ hessian) * w).sum())


def obs_orders(evidence: Evidence) -> dict[SubBlock, tuple[list[int], list[float], float]]:
    """`obs_order` of every sub-block."""
    found = {}
    with evidence.console.progress("OBS", len(evidence.moments), "sub-blocks") as advance:
        for at in evidence.moments:
            found[at] = obs_order(evidence, at)
            advance(1, "")
    return found


def make_levels(at: SubBlock, order: list[int], errors: np.ndarray) -> Levels:
    """Levels with errors made non-decreasing: a level can be no better than one that removes less."""
    errors = np.array(errors, dtype=np.float64)
    errors[0] = 0.0
    errors = np.maximum.accumulate(errors)
    return Levels(at[0], at[1], np.asarray(order, dtype=np.int64), errors)


def grid_levels(evidence: Evidence, at: SubBlock, order: list[int], errors: np.ndarray) -> Levels:
    """Levels from errors `[grid]` at the numbers of units that may be kept, most kept first; interpolated between."""
    units = evidence.sizes.units(at)
    removed = [units - kept for kept in reversed(evidence.grid(at))]
    return make_levels(at, order, np.interp(np.arange(units + 1), removed, np.maximum.accumulate(errors)))


@dataclass(frozen=True)
class Statistics:
    """What the layers that end sub-blocks see on calibration images, and what the loss makes of it."""

    moments: dict[SubBlock, Moments]
    gradients: dict[SubBlock, Tensor]  # covariance of the output gradients `[width, width]`, float64
    weights: dict[SubBlock, list[Tensor]]  # how much each token counts, per batch `[n, tokens]`


def collect(
    model: VisionTransformer,
    batches: Iterable[Batch],
    seed: int,
    advance: Callable[[float, str], None],
    *,
    uses_loss: bool,
) -> Statistics:
    """Mean and covariance of the inputs of every `attn.proj` and `mlp.fc2`, over all calibration tokens.

    With the loss, a token counts as much as the squared gradient of -log p(y) at the layer's output, with y drawn
    from the model's own softmax (never a label), beside a floor that all tokens share. Images count alike, or
    the few that a good model is unsure of would decide everything. So tokens that nothing reads any more (all
    but the class token in the last block) do not shape its weights, and neither do outliers that the loss ignores.
    """
    places = [(i, kind) for i in range(len(model.blocks)) for kind in vit.KINDS]
    found = Statistics({at: Moments() for at in places}, {}, {at: [] for at in places} if uses_loss else {})
    generator = torch.Generator().manual_seed(seed)
    seen = 0
    for pixels, _ in batches:
        inputs, gradients = observe(model, pixels, places, generator if uses_loss else None)
        seen += inputs[places[0]][..., 0].numel()
        for at in places:
            weights = None
            if uses_loss:
                g = gradients[at]
                felt = torch.linalg.vector_norm(g, dim=-1).square()
                scale = felt.mean(1, keepdim=True).clamp_min(1e-30)
                weights = FLOOR + (1 - FLOOR) * felt / scale
                found.weights[at].append(weights)
                g = (g / scale.sqrt()[..., None]).flatten(0, 1)
                found.gradients[at] = found.gradients.get(at, 0) + (g.T @ g).double()
            found.moments[at].add(inputs[at], weights)
        advance(len(pixels), "")
    return replace(found, gradients={at: total / seen for at, total in found.gradients.items()})


def observe(
    model: VisionTransformer, pixels: Tensor, places: Sequence[SubBlock], generator: torch.Generator | None
) -> tuple[dict[SubBlock, Tensor], dict[SubBlock, Tensor]]:
    """Inputs `[n, tokens, inputs]` of the layers that end these sub-blocks and, with a generator, gradients
    `[n, tokens, width]` of -log p(y) at their outputs, y drawn from the model's softmax (see `tasks.surprise`)."""
    inputs: dict[SubBlock, Tensor] = {}
    outputs: dict[SubBlock, Tensor] = {}
    hooks = []
    for at in places:

        def keep(_: object, x: tuple[Tensor, ...], y: Tensor, at: SubBlock = at) -> None:
            inputs[at], outputs[at] = products.wide(x[0].detach()), y

        hooks.append(vit.output_layer(model.blocks[at[0]], at[1]).register_forward_hook(keep))
    try:
        with torch.set_grad_enabled(generator is not None), products.rounded():
            *_, logits = vit.streams(model, pixels)
            numerics.refuse_not_finite(model, pixels, logits.detach(), "calibrate", "its weights are broken there")
            if generator is None:
                return inputs, {}
            loss = tasks.surprise(logits, tasks.of(model), generator)
            gradients = torch.autograd.grad(loss, [outputs[at] for at in places])
    finally:
        for hook in hooks:
            hook.remove()
    return inputs, {at: products.wide(gradient) for at, gradient in zip(places, gradients, strict=True)}
