"""What int8 and lower ranks cost in accuracy, for allocators that choose them.

The error of a form that a sub-block may take is measured: twice the KL divergence (the scale of the criterion `fisher`)
of the dense model with that one sub-block in that form, on calibration images; it adds to the error of what is removed.
"""

from __future__ import annotations

from dataclasses import replace

from edgeprune import quantisation
from edgeprune.allocators import Task
from edgeprune.allocators._tokens import FISHER
from edgeprune.stitch import Judge
from edgeprune.types import PLAIN


def observed(task: Task) -> Task:
    """The same with the ranges of the dense model's inputs, where sub-blocks may be int8."""
    if not any(form.int8 for own in task.forms for form in own):
        return task
    with task.console.busy("ranges of activations"):
        return replace(task, ranges=quantisation.dense_ranges(task.model, task.found.batches))


def weighed(task: Task, judge: Judge) -> Task:
    """The same with the error of each form in the options that have it; `judge` measures stitched models of the task."""
    judge.keep(task.dense)
    errors = []
    with task.console.progress("forms", len(task.levels), "sub-blocks") as advance:
        for at, (error, counts, forms) in enumerate(zip(task.errors, task.counts, task.forms, strict=True)):
            own = error.copy()
            for form in dict.fromkeys(form for form in forms if form != PLAIN):
                options = [i for i, one in enumerate(forms) if one == form]
                most = max(options, key=lambda i: counts[i])  # the first of the whole ones: it drops no tokens
                choice = (*task.dense[:at], most, *task.dense[at + 1 :])
                own[options] += FISHER * judge.divergence(choice)
            errors.append(own)
            advance(1, f"block {task.levels[at].block}")
    return replace(task, errors=errors)


def count(task: Task) -> int:
    """How many models `weighed` judges."""
    return sum(len({form for form in own if form != PLAIN}) for own in task.forms)
