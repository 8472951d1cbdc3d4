"""How much a head, a neuron, a sub-block matters. One file per criterion; the file name is its name.

A criterion is a module with one function, `score(evidence) -> list[Levels]`: for every sub-block the
order in which units go, and the error of every level. Errors are compared across sub-blocks by the
search, so they must share a scale. The weights of the survivors are re-fitted afterwards whatever
the criterion (edgeprune.obs.refit).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor

from edgeprune import obs, vit
from edgeprune.compat import VisionTransformer
from edgeprune.console import Console
from edgeprune.data import Batch
from edgeprune.errors import unknown
from edgeprune.obs import Moments
from edgeprune.types import Levels, SubBlockKind

#: A sub-block: block index and kind.
SubBlock = tuple[int, SubBlockKind]

DEFAULT = "fisher"


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at: the dense model, input moments, and calibration images."""

    model: VisionTransformer
    sizes: vit.Anatomy
    moments: dict[SubBlock, Moments]
    batches: Callable[[], Iterator[Batch]]  # calibration images; labels must not be used
    images: int
    neuron_grid: tuple[int, ...]  # the MLP widths that the search may choose, ascending from 0
    seed: int
    console: Console

    def layer(self, at: SubBlock) -> tuple[Tensor, Tensor]:
        """Weight `[width, inputs]` and bias `[width]` of the layer that ends the sub-block, detached."""
        layer = vit.output_layer(self.model.blocks[at[0]], at[1])
        return layer.weight.detach(), layer.bias.detach()

    def grid(self, kind: SubBlockKind) -> tuple[int, ...]:
        """How many units may be kept, ascending."""
        return tuple(range(self.sizes.heads + 1)) if kind == "attn" else self.neuron_grid


class Criterion(Protocol):
    __name__: str
    __doc__: str | None

    def score(self, evidence: Evidence) -> list[Levels]: ...


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(name: str) -> Criterion:
    """The criterion module; UsageError with "did you mean" for an unknown name."""
    if name not in names():
        raise unknown("criterion", name, names())
    return cast(Criterion, importlib.import_module(f"{__name__}.{name}"))


def obs_order(evidence: Evidence, at: SubBlock) -> tuple[list[int], list[float], float]:
    """OBS removal order and errors of one sub-block, and the error of removing all of it."""
    weight, _ = evidence.layer(at)
    hessian = obs.damped(evidence.moments[at].covariance)
    order, errors = obs.removal_order(weight, hessian, evidence.sizes.unit_size(at[1]))
    w = weight.double()
    return order, errors, float(((w @ hessian) * w).sum())


def make_levels(at: SubBlock, order: list[int], errors: np.ndarray) -> Levels:
    """Levels with errors made non-decreasing: a level can be no better than one that removes less."""
    errors = np.array(errors, dtype=np.float64)
    errors[0] = 0.0
    errors = np.maximum.accumulate(errors)
    return Levels(at[0], at[1], np.asarray(order, dtype=np.int64), errors)


@torch.no_grad()
def collect_moments(
    model: VisionTransformer, batches: Iterator[Batch], advance: Callable[[float, str], None]
) -> dict[SubBlock, Moments]:
    """Mean and covariance of the inputs of every `attn.proj` and `mlp.fc2`, over all calibration tokens."""
    moments: dict[SubBlock, Moments] = {}
    hooks = []
    for i, block in enumerate(model.blocks):
        for kind in vit.KINDS:
            moments[i, kind] = own = Moments()
            layer = vit.output_layer(block, kind)
            hooks.append(layer.register_forward_pre_hook(lambda _, inputs, own=own: own.add(inputs[0])))
    try:
        for pixels, _ in batches:
            model(pixels)
            advance(len(pixels), "")
    finally:
        for hook in hooks:
            hook.remove()
    return moments
