"""Uniform: the same share of every sub-block is kept; the control of every allocator.

    kept_i = r n_i

with one ratio r for all, as large as the budget allows. Shares are rounded to the options of the latency table, and the
room that rounding leaves goes to those that were rounded down. Looks at nothing. Cost: none.
"""

from __future__ import annotations

import numpy as np

from edgeprune.allocators import Choose, Task, by_ratios

NEEDS = ()


def prepare(task: Task) -> Choose:
    return lambda room_ms: by_ratios(task, lambda knob: np.full(len(task.counts), 1 - knob), room_ms)
