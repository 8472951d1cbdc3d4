"""How much of every sub-block is kept. One file per allocator; the file name is its name.

An allocator is a module with one function, `prepare(task)`, which returns `choose(room_ms) -> Choice`: for every
sub-block which of its options is taken, with a summed cost in the measured latency table of at most `room_ms`
milliseconds. What all budgets share is done in `prepare`. Raises Infeasible when nothing is cheap enough. Which units
stay is the criterion's order; `NEEDS` names what else is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np

from edgeprune import modules, vit
from edgeprune.calibration import Calibration
from edgeprune.compat import VisionTransformer
from edgeprune.console import Console
from edgeprune.errors import Infeasible
from edgeprune.stitch import Choice
from edgeprune.types import BlockPlan, FloatArray, LatencyTable, Levels, Plan, Shape

DEFAULT = "search"
HALVINGS = 30  # of a knob's interval: finer than any table's steps

Choose = Callable[[float], Choice]


@dataclass(frozen=True)
class Task:
    """What an allocator chooses from. Sub-blocks are in the order attn 0, mlp 0, attn 1, ..."""

    levels: list[Levels]
    errors: list[FloatArray]  # per sub-block `[options]`
    costs: list[FloatArray]  # per sub-block `[options]`, in milliseconds
    counts: list[tuple[int, ...]]  # per sub-block: how many units each option keeps, ascending from 0
    table: LatencyTable
    model: VisionTransformer  # what is pruned, in dense shape
    teacher: VisionTransformer  # what it shall stay close to
    found: Calibration
    seconds: float  # for those that search; 0 = not at all
    seed: int
    console: Console

    @property
    def sizes(self) -> vit.Anatomy:
        return vit.anatomy(self.model)

    @property
    def dense(self) -> Choice:
        """The choice that keeps all that is there."""
        return tuple(len(own) - 1 for own in self.counts)

    def cost(self, choice: Sequence[int]) -> float:
        """In milliseconds."""
        return float(sum(cost[option] for cost, option in zip(self.costs, choice, strict=True)))

    def nearest(self, kept: Sequence[float]) -> Choice:
        """The options that keep about so many units of every sub-block."""
        pairs = zip(self.counts, kept, strict=True)
        return tuple(int(np.abs(np.asarray(own) - count).argmin()) for own, count in pairs)

    def scores(self, at: int) -> FloatArray:
        """What each unit of sub-block `at` is worth, in the order in which units go: `[units]`."""
        return np.diff(self.levels[at].errors)

    def plan(self, choice: Sequence[int]) -> Plan:
        parts = zip(self.levels, self.counts, choice, strict=True)
        kept = [level.kept(own[option]) for level, own, option in parts]
        return Plan(tuple(BlockPlan(kept[i], kept[i + 1]) for i in range(0, len(kept), 2)))


class Allocator(Protocol):
    __name__: str
    __doc__: str | None
    NEEDS: tuple[str, ...]

    def prepare(self, task: Task) -> Choose: ...


def names() -> list[str]:
    return modules.names("allocator")


def get(name: str) -> Allocator:
    """The allocator module; UsageError with "did you mean" for an unknown name."""
    return cast(Allocator, modules.get("allocator", name))


def task(
    found: Calibration,
    table: LatencyTable,
    bounds: Shape,
    model: VisionTransformer,
    teacher: VisionTransformer,
    seconds: float,
    seed: int,
    console: Console,
) -> Task:
    """bounds: the (heads, neurons) that each block still has; nothing above them is an option. Else as in `Task`."""
    errors, costs, counts = options(found.levels, table, bounds)
    return Task(found.levels, errors, costs, counts, table, model, teacher, found, seconds, seed, console)


def options(
    levels: list[Levels], table: LatencyTable, bounds: Shape
) -> tuple[list[FloatArray], list[FloatArray], list[tuple[int, ...]]]:
    """Per sub-block: errors and costs `[options]` in milliseconds, and how many units each option keeps."""
    errors, costs, counts = [], [], []
    for level in levels:
        attn = level.kind == "attn"
        grid = tuple(range(len(table.attn_ms))) if attn else table.mlp_widths
        grid = tuple(kept for kept in grid if kept <= bounds[level.block][0 if attn else 1])
        errors.append(np.array([level.errors[len(level.order) - kept] for kept in grid]))
        costs.append(np.asarray(table.attn_ms if attn else table.mlp_ms)[: len(grid)])
        counts.append(grid)
    return errors, costs, counts


def slowest_within(task: Task, family: Callable[[float], Choice], room_ms: float) -> Choice:
    """Of a family of choices, from all kept at 0 to nothing at 1, the first that is within `room_ms`, by bisection.

    Costs must fall along it. Raises Infeasible when even the last is above.
    """
    best = family(1.0)
    if task.cost(best) > room_ms:
        raise Infeasible(
            f"{room_ms:.3f} ms cannot be reached: the least that can be kept takes {task.cost(best):.3f} ms"
        )
    if task.cost(first := family(0.0)) <= room_ms:
        return first
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        choice = family(middle)
        if task.cost(choice) <= room_ms:
            best, high = choice, middle
        else:
            low = middle
    return best
