"""Latency-ranking: steps of all sub-blocks ranked by score per millisecond saved (after HALP, arXiv 2110.10811).

A step takes a sub-block from one width of the latency table to the next below that is faster; it ranks by

    (error after - error before) / (milliseconds before - milliseconds after)

and the lowest goes first, but never before one that is ahead of it in its own sub-block. HALP has the same two
quantities, a unit's score and its latency from a table, groups units that make a step of the latency together, and lets
better units of a layer stay longer, but it chooses by a knapsack; that one, over summed scores, `knapsack` solves
exactly. This is its greedy relaxation, which shows what the exact solution is worth. Without a floor: like the knapsack
it may empty a sub-block. Needs the criterion's errors alone. Cost: a sort.
"""

from __future__ import annotations

import numpy as np

from edgeprune.allocators import Choose, Task, slowest_within
from edgeprune.allocators.ranking import at, removals
from edgeprune.stitch import Choice
from edgeprune.types import FloatArray

NEEDS = ()


def prepare(task: Task) -> Choose:
    steps = [faster(costs) for costs in task.costs]
    worth = [per_ms(errors[own], costs[own]) for errors, costs, own in zip(task.errors, task.costs, steps, strict=True)]
    lost = removals(worth)

    def family(knob: float) -> Choice:
        return tuple(own[len(own) - 1 - int(gone)] for own, gone in zip(steps, at(lost, knob), strict=True))

    return lambda room_ms: slowest_within(task, family, room_ms)


def faster(costs: FloatArray) -> list[int]:
    """Of options that cost the same the largest, ascending."""
    return [j for j in range(len(costs)) if j == len(costs) - 1 or costs[j + 1] > costs[j]]


def per_ms(errors: FloatArray, costs: FloatArray) -> FloatArray:
    """Score per millisecond of the step down from each option but the first, the largest option first."""
    return np.asarray((np.diff(errors) / -np.diff(costs))[::-1])
