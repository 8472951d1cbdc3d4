"""Knapsack: the choice with the least sum of errors, exactly, by SPDY's dynamic programme (arXiv 2201.13096, section 3.1).

Needs the criterion's errors alone, on one scale for all sub-blocks. Cost: milliseconds.
"""

from __future__ import annotations

from functools import partial

from edgeprune.allocators import Choose, Task
from edgeprune.solve import solve

NEEDS = ()


def prepare(task: Task) -> Choose:
    return partial(solve, task.errors, task.costs)
