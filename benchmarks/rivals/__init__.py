"""The methods that `benchmarks/accuracy.py` compares. One file per method; its `METHODS` maps names to makers.

A method is prepared once per seed, `prepare(task)`, and then asked for models, `model(aim_ms, target_ms)`: the
best it can make that it believes takes `aim_ms`. Every method is given the same dense model, calibration images,
labels and latency table; what it uses of them is its own affair. This file holds what several methods share.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeprune import vit
from edgeprune.compat import VisionTransformer
from edgeprune.config import Request
from edgeprune.data import Batch, Splits
from edgeprune.errors import unknown
from edgeprune.types import BlockPlan, LatencyTable, Plan, SubBlockKind

#: (heads, head_dim, neurons) of every block; 0 heads or neurons = the sub-block is gone; a fourth number where tokens
#: go: the patches that stay. All that latency depends on.
Shape = tuple[tuple[int, ...], ...]
#: A sub-block: block index and kind.
SubBlock = tuple[int, SubBlockKind]

TOLERANCE = 0.02  # of the target latency: how close every method's measured latency must come
SHARES = 16  # a knob is first tried at so many places, as it may not be monotone, and then halved
HALVINGS = 6


@dataclass(frozen=True)
class Inputs:
    """What the last layer of a sub-block sees over all calibration tokens; float64, uncentred."""

    mean: Tensor  # [inputs]
    second: Tensor  # [inputs, inputs]: mean of x x^T

    @property
    def variance(self) -> Tensor:
        """`[inputs]`"""
        return self.second.diagonal() - self.mean.square()


@dataclass
class Task:
    """What every method is given for one seed; statistics that several of them use are computed once, when asked for."""

    request: Request  # edgeprune's own, with the seed and the recorded profile
    model: VisionTransformer
    sizes: vit.Anatomy
    splits: Splits
    table: LatencyTable
    cache: Path

    @property
    def seed(self) -> int:
        return self.request.seed

    @cached_property
    def batches(self) -> list[Batch]:
        """The calibration images with their labels."""
        return list(self.splits.calibration.batches(self.request.card.calibration.batch_size))

    @cached_property
    @torch.no_grad()
    def inputs(self) -> dict[SubBlock, Inputs]:
        """Of every `attn.proj` and `mlp.fc2`."""
        count = 0
        sums: dict[SubBlock, tuple[Tensor, Tensor]] = {}
        hooks = []
        for at in sub_blocks(self.sizes):

            def add(_: Any, x: tuple[Tensor, ...], at: SubBlock = at) -> None:
                flat = x[0].flatten(0, -2)
                mean, second = flat.sum(0, dtype=torch.float64), (flat.T @ flat).double()
                sums[at] = (sums[at][0] + mean, sums[at][1] + second) if at in sums else (mean, second)

            hooks.append(layer(self.model, at).register_forward_pre_hook(add))
        for pixels, _ in self.batches:
            self.model(pixels)
            count += len(pixels) * self.sizes.only.tokens
        for hook in hooks:
            hook.remove()
        return {at: Inputs(mean / count, second / count) for at, (mean, second) in sums.items()}

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """Of the mean cross entropy over all calibration images, by parameter name."""
        totals = {name: torch.zeros_like(p) for name, p in self.model.named_parameters()}
        images = sum(len(labels) for _, labels in self.batches)
        for pixels, labels in self.batches:
            loss = F.cross_entropy(self.model(pixels), labels, reduction="sum") / images
            found = torch.autograd.grad(loss, list(self.model.parameters()))
            for name, gradient in zip(totals, found, strict=True):
                totals[name] += gradient
        return totals

    @torch.no_grad()
    def loss(self, model: nn.Module, images: int) -> float:
        """Mean cross entropy on the first calibration images."""
        pixels = torch.cat([x for x, _ in self.batches])[:images]
        labels = torch.cat([y for _, y in self.batches])[:images]
        return float(F.cross_entropy(model(pixels), labels))


class Rival(Protocol):
    def prepare(self, task: Task) -> None:
        """Statistics that every budget shares."""

    def model(self, aim_ms: float, target_ms: float) -> VisionTransformer:
        """A model of about `aim_ms`, on the way to one that is measured at `target_ms`; the fastest there is if that is slower.

        Two calls with the same arguments give the same model. Raises Infeasible when there is none at all.
        """


def makers() -> dict[str, Callable[[], Rival]]:
    """All methods by name."""
    found: dict[str, Callable[[], Rival]] = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        found |= importlib.import_module(f"{__name__}.{module.name}").METHODS
    return found


def make(name: str) -> Rival:
    known = makers()
    if name not in known:
        raise unknown("method", name, known)
    return known[name]()


# Shapes -------------------------------------------------------------------------------------


def shape_of(model: Any) -> Shape:
    """Read from the modules, whoever made the model."""
    return tuple(
        (
            getattr(block.attn, "num_heads", 0),
            getattr(block.attn, "head_dim", 0),
            block.mlp.fc1.out_features if hasattr(block.mlp, "fc1") else 0,
            *([block.patches] if isinstance(block, vit.ReducingBlock) else []),
        )
        for block in model.blocks
    )


def predict_ms(task: Task, shape: Shape) -> float:
    """What the table says, interpolated where heads are narrower than the dense ones or widths are off its grid."""
    table, total = task.table, task.table.base_ms
    if all(row == (task.sizes.only.heads, task.sizes.only.head_dim, task.sizes.only.neurons) for row in shape):
        return table.dense_ms
    for heads, head_dim, neurons in shape:
        total += float(
            np.interp(
                heads * head_dim / task.sizes.only.head_dim,
                range(len(table.stages[0].attn_ms)),
                table.stages[0].attn_ms,
            )
        )
        total += float(np.interp(neurons, table.stages[0].mlp_widths, table.stages[0].mlp_ms))
    return total


def fits(task: Task, model: VisionTransformer, aim_ms: float) -> bool:
    return predict_ms(task, shape_of(model)) <= aim_ms


def sub_blocks(sizes: vit.Anatomy) -> list[SubBlock]:
    return [(i, kind) for i in range(sizes.blocks) for kind in vit.KINDS]


def layer(model: Any, at: SubBlock) -> nn.Linear:
    """`attn.proj` or `mlp.fc2`."""
    return vit.output_layer(model.blocks[at[0]], at[1])


def ending(model: Any, at: SubBlock) -> Any:
    """What holds a sliced sub-block's output bias: its last layer, or what is left of a removed one."""
    sub = vit.sub_block(model.blocks[at[0]], at[1])
    return sub if isinstance(sub, vit.RemovedSubBlock) else vit.last_layer(sub, at[1])


def plan_of(kept: Mapping[SubBlock, Any], sizes: vit.Anatomy) -> Plan:
    """From the units kept in every sub-block, in any order."""
    rows = [[tuple(sorted(int(u) for u in kept[i, kind])) for kind in vit.KINDS] for i in range(sizes.blocks)]
    return Plan(tuple(BlockPlan(heads, neurons) for heads, neurons in rows))


def units_of(plan: Plan, at: SubBlock) -> tuple[int, ...]:
    return plan.blocks[at[0]].heads if at[1] == "attn" else plan.blocks[at[0]].neurons


@torch.no_grad()
def slice_with_means(task: Task, plan: Plan) -> VisionTransformer:
    """The sliced model with b += W_pruned mu: what is removed is replaced by its mean."""
    model = vit.slice_model(task.model, plan)
    for at in sub_blocks(task.sizes):
        gone = sorted(set(range(task.sizes.units(at))) - set(units_of(plan, at)))
        if gone:
            columns = vit.columns(tuple(gone), task.sizes.unit_size(at))
            last = layer(task.model, at)
            lost = last.weight.double()[:, columns] @ task.inputs[at].mean[columns]
            ending(model, at).bias.copy_(last.bias.double() + lost)
    return model


def rounded(task: Task, neurons: float) -> int:
    """The nearest MLP width that suits the CPU's vectors."""
    step = task.request.target.neuron_step
    return min(int(neurons / step + 0.5) * step, task.sizes.only.neurons)


# Knobs --------------------------------------------------------------------------------------


class ByShare:
    """A method with a knob: the share of the model that it keeps, 0 to 1. The table says where to turn it."""

    task: Task
    setting = 0  # of whatever else there is to set

    def at(self, share: float) -> VisionTransformer:
        """The model at this setting."""
        raise NotImplementedError

    def prepare(self, task: Task) -> None:
        self.task = task
        self.predicted: dict[tuple[int, float], float] = {}

    def model(self, aim_ms: float, target_ms: float) -> VisionTransformer:
        """At the largest share that the table predicts within `aim_ms`."""
        coarse = [i / SHARES for i in range(SHARES + 1)]
        fitting = [share for share in coarse if self.predict_ms(share) <= aim_ms]
        if not fitting:
            return self.at(min(coarse, key=self.predict_ms))
        low, high = max(fitting), max(fitting) + 1 / SHARES
        for _ in range(HALVINGS if low < 1 else 0):
            middle = (low + high) / 2
            low, high = (middle, high) if self.predict_ms(middle) <= aim_ms else (low, middle)
        return self.at(low)

    def predict_ms(self, share: float) -> float:
        key = self.setting, share
        if key not in self.predicted:
            self.predicted[key] = predict_ms(self.task, shape_of(self.at(share)))
        return self.predicted[key]
