"""Errors + costs + budget -> the cheapest choice: an exact multiple-choice knapsack; numpy only.

Knows nothing of models or devices: sub-block i offers options, option j costs `costs[i][j]`
milliseconds and has error `errors[i][j]`. The dynamic programme is SPDY's (arXiv 2201.13096,
section 3.1) with two repairs: excess costs are rounded up, so a budget is never overrun, and
feasibility is tested exactly before anything is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeprune.errors import Infeasible
from edgeprune.types import FloatArray

BUCKETS = 10_000


def solve(
    errors: Sequence[FloatArray], costs: Sequence[FloatArray], budget_ms: float, *, buckets: int = BUCKETS
) -> tuple[int, ...]:
    """One option per sub-block that minimises the sum of errors with the sum of costs <= budget_ms.

    Shapes: `errors[i]` and `costs[i]` are `[options of sub-block i]`, costs in milliseconds.
    Optimal up to rounding each cost up by less than `slack / buckets`, where slack is the budget less the
    cheapest choice. Raises Infeasible when even the cheapest choice is above the budget.
    """
    cheapest = np.array([cost.min() for cost in costs])
    slack = budget_ms - cheapest.sum()
    if slack < 0:
        raise Infeasible(
            f"{budget_ms:.3f} ms cannot be reached: with every option at its cheapest {cheapest.sum():.3f} ms remain"
        )
    bucket = slack / buckets
    best = np.zeros(buckets + 1)  # best[b]: least error of the sub-blocks so far within b buckets
    choices = []
    for error, cost, floor in zip(errors, costs, cheapest, strict=True):
        excess = _buckets(cost - floor, bucket, buckets)
        candidates = np.full((len(cost), buckets + 1), np.inf)
        for option, shift in enumerate(excess):
            if shift <= buckets:
                candidates[option, shift:] = best[: buckets + 1 - shift] + error[option]
        choice = candidates.argmin(axis=0)
        best = np.take_along_axis(candidates, choice[None], axis=0)[0]
        choices.append((choice, excess))
    left, picked = buckets, []
    for choice, excess in reversed(choices):
        option = int(choice[left])
        picked.append(option)
        left -= int(excess[option])
    return tuple(reversed(picked))


def _buckets(excess: FloatArray, bucket: float, buckets: int) -> np.ndarray:
    """Costs above the cheapest option in whole buckets, rounded up; zero stays zero."""
    if bucket <= 0:
        return np.where(excess > 0, buckets + 1, 0)
    counted = np.ceil(excess / bucket * (1 - 1e-12))  # an excess of exactly n buckets is n, not n + 1
    return np.minimum(counted, buckets + 1).astype(np.int64)
