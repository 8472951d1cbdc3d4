"""What int8 costs in accuracy, for allocators that choose it.

The error of a sub-block with int8 layers is measured: twice the KL divergence (the scale of the criterion `fisher`) of
the dense model with that one sub-block int8, on calibration images; it adds to the error of what is removed from it.
"""

from __future__ import annotations

from dataclasses import replace

from edgeprune import quantisation
from edgeprune.allocators import Task
from edgeprune.allocators._tokens import FISHER
from edgeprune.stitch import Judge


def ranged(task: Task) -> Task:
    """The same with the ranges of the dense model's inputs."""
    with task.console.busy("ranges of activations"):
        return replace(task, ranges=quantisation.dense_ranges(task.model, task.found.batches))


def weighed(task: Task, judge: Judge) -> Task:
    """The same with the error of int8 in those options that are int8; `judge` measures stitched models of the task."""
    judge.keep(task.dense)
    errors = []
    with task.console.progress("int8 errors", len(task.levels), "sub-blocks") as advance:
        for at, (error, counts, int8) in enumerate(zip(task.errors, task.counts, task.int8, strict=True)):
            own = error.copy()
            if any(int8):
                most = max(range(len(int8)), key=lambda i: (int8[i], counts[i], -i))  # the first of the whole ones
                choice = (*task.dense[:at], most, *task.dense[at + 1 :])
                own[list(int8)] += FISHER * judge.divergence(choice)
            errors.append(own)
            advance(1, f"block {task.levels[at].block}")
    return replace(task, errors=errors)
