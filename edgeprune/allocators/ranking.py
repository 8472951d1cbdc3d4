"""Ranking: of all units of all sub-blocks the one that is worth least per weight goes first (Global MP, arXiv 2209.14624).

    worth = score / number of weights,   removed = the k units worth least, over all sub-blocks, k as small as the budget allows

Global magnitude pruning ranks single weights; here whole units go, which makes a model faster, by the mean over their
weights, or a head, which has 2 head_dim times the weights of a neuron, would outlast every neuron. A unit never goes
before those that the criterion has ahead of it in its own sub-block. As in the paper a floor stops layers from
collapsing: the last tenth of a sub-block (at least one option of the table) is ranked behind everything else. It is
touched only when the budget cannot be met otherwise, and then in the same ranking, until sub-blocks are gone entirely.
Scores that are no sums over weights belong to `unit-ranking`. Needs scores on one scale for all sub-blocks, and nothing
else. Cost: a sort.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgeprune.allocators import Choose, Task, slowest_within
from edgeprune.types import FloatArray

NEEDS = ()
FLOOR = 0.1  # share of a sub-block that stays as long as anything else can go


def prepare(task: Task) -> Choose:
    sizes = task.sizes
    weights = [  # of a unit: into it, as queries, keys and values or as a neuron and its gate, and out of it
        (sizes.row_groups(level.kind) + 1) * sizes.unit_size(level.at) * sizes.by_block[level.block].width
        for level in task.levels
    ]
    return ranked(task, [task.scores(i) / count for i, count in enumerate(weights)])


def ranked(task: Task, worth: Sequence[FloatArray]) -> Choose:
    """By what each unit is worth, `[units]` per sub-block in the order in which they go."""
    left = [own[len(own) - counts[-1] :] for own, counts in zip(worth, task.counts, strict=True)]
    lost = removals(left, [floor(own) for own in task.counts])
    there = np.array([own[-1] for own in task.counts])
    return lambda room_ms: slowest_within(task, lambda knob: task.nearest((there - at(lost, knob)).tolist()), room_ms)


def floor(counts: Sequence[int]) -> int:
    """The fewest units that a sub-block with these options keeps as long as anything else can go."""
    return next(count for count in counts if count >= FLOOR * counts[-1])


def removals(worth: Sequence[FloatArray], floors: Sequence[int] | None = None) -> NDArray[np.int64]:
    """`[items + 1, sub-blocks]`: how many items each sub-block has lost after each removal, the least worth first.

    worth: `[items]` per sub-block in the order in which they go; none goes before one ahead of it. The last `floors[i]`
    items of sub-block i go when all others have.
    """
    ranked = []
    for i, (own, last) in enumerate(zip(worth, floors or [0] * len(worth), strict=True)):
        parts = np.split(own, [len(own) - last])
        ranked += [(k, wait, i) for k, part in enumerate(parts) for wait in np.maximum.accumulate(part).tolist()]
    order = np.array([i for _, _, i in sorted(ranked)], dtype=np.int64)
    return np.concatenate([np.zeros((1, len(worth))), np.cumsum(np.eye(len(worth))[order], 0)]).astype(np.int64)


def at(path: NDArray[np.int64], knob: float) -> NDArray[np.int64]:
    """The stop of a path that is this share of the way along it."""
    return path[round(knob * (len(path) - 1))]
