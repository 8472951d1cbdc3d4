"""What dropping tokens costs in accuracy, for allocators that choose it.

The error of dropping to
a count at a block is measured: twice the KL divergence (the scale of the criterion `fisher`) of the dense model with
that one drop, on calibration images.
"""

from __future__ import annotations

import numpy as np

from edgeprune.allocators import Task
from edgeprune.solve import Tokens
from edgeprune.stitch import Judge
from edgeprune.types import FloatArray

FISHER = 2.0  # times KL: what `fisher` calls the error


def tokens(task: Task, judge: Judge) -> Tokens | None:
    """What the solver must know of the drops; None where there are none. `judge` measures stitched models of the task."""
    if not task.drops:
        return None
    kinds = [list(zip(counts, own, strict=True)) for counts, own in zip(task.counts, task.every_form, strict=True)]
    plain = [tuple(map(own.index, own)) for own in kinds]  # options without drops come first
    return Tokens(task.token_shares, task.drops, drop_errors(task, judge), plain, task.table.reduce_ms)


def drop_errors(task: Task, judge: Judge) -> list[FloatArray]:
    """Per sub-block `[levels]`: the error of dropping to so many patches there and nowhere else; falls along the levels."""
    judge.keep(task.dense)
    found = []
    with task.console.progress("token drops", (len(task.table.patches) - 1) * task.sizes.blocks, "drops") as advance:
        for at, (counts, drops) in enumerate(zip(task.counts, task.drops, strict=True)):
            own = np.zeros(len(task.table.patches))
            for level in range(len(own) - 1):
                options = [i for i, drop in enumerate(drops) if drop == level and counts[i] == max(counts)]
                if options:
                    choice = (*task.dense[:at], options[0], *task.dense[at + 1 :])
                    own[level] = FISHER * judge.divergence(choice)
            found.append(np.maximum.accumulate(own[::-1])[::-1])
            if task.levels[at].kind == "attn":
                advance(len(own) - 1, f"block {task.levels[at].block}")
    return found
