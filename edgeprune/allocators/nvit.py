"""NViT: step by step, what costs least accuracy for the latency it saves (Yang et al., arXiv 2110.04869).

The whole way from all to nothing, one step of the latency table at a time, always the one of lowest

    score(step) / mean score - eta * saved(step) / mean saved

with means over the steps that are next in each sub-block, and the score as the criterion has it (`nvit`: (sum g w)^2).
Every budget is a stop on that way. As published, a small sub-block gets no credit for the latency it saves (at most two
heads or 16 neurons) and goes by its score alone; here that holds for the last width of the table too. The paper's eta
is a constant of one model and one GPU, so here both terms are shares of their means and eta is 1. It takes gradients
afresh while it trains and shrinks (here scores stay as they are, unless a schedule asks again), and prunes the residual
width and that of q, k and v too, which are not options here. Needs the criterion's errors alone. Cost: milliseconds.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgeprune.allocators import Choose, Task, slowest_within
from edgeprune.allocators.ranking import at

NEEDS = ()
ETA = 1.0
NO_CREDIT = {"attn": 2, "mlp": 16}  # units of a sub-block that is small


def prepare(task: Task) -> Choose:
    stops = way(task)
    return lambda room_ms: slowest_within(task, lambda knob: tuple(int(i) for i in at(stops, knob)), room_ms)


def way(task: Task) -> NDArray[np.int64]:
    """`[stops, sub-blocks]`: the options taken, from all kept to nothing."""
    options = list(task.dense)
    stops = [list(options)]
    while any(options):
        left = [i for i, option in enumerate(options) if option]
        lost = np.array([task.errors[i][options[i] - 1] - task.errors[i][options[i]] for i in left])
        saved = np.array([task.costs[i][options[i]] - task.costs[i][options[i] - 1] for i in left])
        credit = np.array([not _small(task, i, options[i]) for i in left])
        score = lost / max(lost.mean(), 1e-300) - ETA * credit * saved / max(saved.mean(), 1e-300)
        options[left[int(score.argmin())]] -= 1
        stops.append(list(options))
    return np.array(stops)


def _small(task: Task, i: int, option: int) -> bool:
    return option == 1 or task.counts[i][option] <= NO_CREDIT[task.levels[i].kind]
