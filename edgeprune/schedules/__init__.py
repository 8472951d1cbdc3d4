"""When units go. One file per schedule; the file name is its name.

A schedule is a module with one function, `coach(training) -> Coach`, for a training of the dense-shaped model before
anything is cut: the coach opens and shuts the model's gates, may add a penalty, and at the end knows its `plan()`.
What is shut is then cut, calibrated, pruned to the measured latency and tuned as ever; the schedule takes `SHARE` of
the epochs of fine-tuning, which has the rest. `one-shot` has no such training. `NEEDS` names what is looked at.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from edgeprune import modules, saliency, vit
from edgeprune.allocators import between
from edgeprune.compat import VisionTransformer
from edgeprune.config import Recipe
from edgeprune.console import Console
from edgeprune.data import Batch
from edgeprune.errors import Infeasible
from edgeprune.gates import Gates, plan_of, units_of
from edgeprune.tuning.coach import Coach
from edgeprune.types import LatencyTable, Levels, Plan, SubBlock

DEFAULT = "one-shot"
SHARE = 0.5  # of the epochs of fine-tuning


@dataclass(frozen=True)
class Training:
    """What a coach has to work with."""

    model: VisionTransformer  # the one that is trained, in dense shape, under its gates
    gates: Gates
    teacher: VisionTransformer
    table: LatencyTable
    target_ms: float  # what the table shall predict of the plan at the end
    score: Callable[[], list[Levels]]  # the criterion, of the model as it now is; shut units are worth nothing
    #: The allocator's plan from these levels within so many milliseconds, with no more per block than the bounds, if any.
    allocate: Callable[..., Plan]
    batches: Callable[[], Iterator[Batch]]  # the calibration images that the criterion sees, with labels
    labelled: Callable[[], Iterator[Batch]]  # all calibration images, with labels; read anew each time
    seed: int
    console: Console

    def cubic_ms(self, progress: float) -> float:
        """The latency asked for at this share of the way, 0 to 1: quickly down at first, slowly at the end.

        Zhu and Gupta's s_f + (s_i - s_f)(1 - t)^3 (arXiv 1710.01878, equation 1), with milliseconds for sparsity.
        """
        left = (1 - min(max(progress, 0.0), 1.0)) ** 3
        return self.target_ms + (self.table.dense_ms - self.target_ms) * left


class Planned(Coach):
    """A coach that ends with a plan."""

    def __init__(self, training: Training) -> None:
        self.training = training

    def state(self) -> dict[str, Any]:
        return {**vars(self), "training": None, "gates": self.training.gates.values}

    def restore(self, state: dict[str, Any]) -> None:
        own = {name: value for name, value in state.items() if name not in ("training", "gates")}
        self.training.gates.values = state["gates"]
        vars(self).update(own)

    def plan(self) -> Plan:
        """What is kept; the table predicts it within the training's target."""
        raise NotImplementedError


class Schedule(Protocol):
    __name__: str
    __doc__: str | None
    NEEDS: tuple[str, ...]

    def coach(self, training: Training) -> Planned: ...


def names() -> list[str]:
    return modules.names("schedule")


def get(name: str) -> Schedule:
    """The schedule module; UsageError with "did you mean" for an unknown name."""
    return cast(Schedule, modules.get("schedule", name))


def due(step: int, steps: int, updates: int, last: float = 1.0) -> float | None:
    """At `updates` evenly spread steps of the first share `last`: how far on the way it is, above 0 up to 1; else None."""
    end = max(1, math.floor(steps * last))
    every = max(1, end // updates)
    if step >= end or step % every:
        return None
    return min(1.0, (step // every + 1) / max(1, math.ceil(end / every)))


def over(step: int, steps: int, part: float) -> bool:
    """Whether this share of the steps is behind; at the last step always."""
    return step >= min(math.floor(part * steps), steps - 1)


def allocate_open(training: Training, budget_ms: float) -> Plan:
    """The allocator's plan as though all gates were open: what is shut is judged like the rest."""
    gates, values = training.gates, training.gates.values
    gates.values = {at: torch.ones(gates.sizes.units(at)) for at in values}
    try:
        return training.allocate(training.score(), budget_ms)
    finally:
        gates.values = values


def best(plan: Plan, worth: Mapping[SubBlock, Tensor]) -> Plan:
    """As many units of every sub-block as in the plan, those that are worth most."""
    order = {at: own.detach().argsort(descending=True, stable=True).tolist() for at, own in worth.items()}
    return plan_of({at: order[at][: len(units)] for at, units in units_of(plan).items()})


def widest(training: Training, worth: Mapping[SubBlock, Tensor]) -> Plan:
    """The slowest plan within the target that keeps the units worth most, whatever their sub-block.

    Numbers of units are rounded to those in the table. Raises Infeasible when even nothing at all is too slow.
    """
    table = training.table
    ranks = torch.cat([own.detach().cpu() for own in worth.values()]).argsort(descending=True, stable=True).argsort()
    places = dict(zip(worth, ranks.split([len(own) for own in worth.values()]), strict=True))
    grids = {at: np.array(table.by_block[at[0]].of(at[1])[0]) for at in worth}

    def plan(count: int) -> Plan:
        kept = {}
        for at, own in places.items():
            left = grids[at][np.abs(grids[at] - int((own < count).sum())).argmin()]
            kept[at] = own.argsort()[:left].tolist()
        return plan_of(kept)

    if (least := table.predict_ms(plan(0).shape)) > training.target_ms:
        raise Infeasible(f"{training.target_ms:.3f} ms cannot be reached: without any unit it is {least:.3f} ms")
    slow = range(1, len(ranks) + 1)
    return plan(bisect.bisect_right(slow, training.target_ms, key=lambda count: table.predict_ms(plan(count).shape)))


def milliseconds(table: LatencyTable, units: Mapping[SubBlock, Tensor]) -> Tensor:
    """What the table says of so many units per sub-block (scalars), linear between its entries, with gradients."""
    parts = [between(*table.by_block[block].of(kind), count) for (block, kind), count in units.items()]
    return torch.stack(parts).sum() + table.base_ms


def squares(model: VisionTransformer, at: SubBlock) -> Tensor:
    """`[units]`: the squared norm of each unit's weights, biases too, with gradients; 0 where nothing reads it."""
    *first, last = (part.square() for part in saliency.group(model, at))
    sizes = vit.anatomy(model)
    count = sizes.units(at)
    rows = [part.reshape(sizes.row_groups(at[1]), count, -1).sum((0, 2)) for part in first]
    read = last.reshape(len(last), count, -1).sum((0, 2))
    return torch.stack([*rows, read]).sum(0) * (read > 0)


@torch.no_grad()
def scale_columns(gates: Gates, factors: Mapping[SubBlock, Tensor]) -> None:
    """Multiply each unit's columns of the last layer by its factor, factors `[units]` per sub-block."""
    for (i, kind), own in factors.items():
        weight = vit.output_layer(gates.model.blocks[i], kind).weight
        weight.mul_(own.repeat_interleave(gates.sizes.unit_size((i, kind))).to(weight))


def fold(gates: Gates, plan: Plan) -> None:
    """Multiply the gates into the weights behind them, then open what the plan keeps and shut the rest."""
    scale_columns(gates, gates.values)
    gates.keep(plan)


def share(recipe: Recipe, part: float) -> Recipe:
    """The recipe with a part of its epochs."""
    return replace(recipe, epochs=tuple(part * epochs for epochs in recipe.epochs))
