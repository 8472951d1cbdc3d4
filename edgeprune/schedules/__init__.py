"""When units go. One file per schedule; the file name is its name.

A schedule is a module with one function, `coach(training) -> Coach`, for a training of the dense-shaped model before
anything is cut: the coach opens and shuts the model's gates, may add a penalty, and at the end knows its `plan()`.
What is shut is then cut, calibrated, pruned to the measured latency and tuned as ever; the schedule takes `SHARE` of
the epochs of fine-tuning, which has the rest. `one-shot` has no such training. `NEEDS` names what is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, cast

from edgeprune import modules
from edgeprune.compat import VisionTransformer
from edgeprune.config import Recipe
from edgeprune.console import Console
from edgeprune.data import Batch
from edgeprune.errors import UsageError
from edgeprune.gates import Gates
from edgeprune.tuning.coach import Coach
from edgeprune.types import LatencyTable, Levels, Plan

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
    allocate: Callable[
        [list[Levels], float], Plan
    ]  # the allocator's plan from these levels within so many milliseconds
    batches: Callable[[], Iterator[Batch]]  # calibration images with labels
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


def share(recipe: Recipe, part: float, schedule: str) -> Recipe:
    """The recipe with a part of its epochs. Raises UsageError when there are none to share."""
    if sum(recipe.epochs) <= 0:
        raise UsageError(
            f"the schedule '{schedule}' trains, but 0 epochs were asked for; give --epochs, or --schedule one-shot"
        )
    return replace(recipe, epochs=tuple(part * epochs for epochs in recipe.epochs))
