"""Errors + costs + budget -> the cheapest choice: an exact multiple-choice knapsack; numpy only.

Knows nothing of models or devices: sub-block i offers options, option j costs `costs[i][j]`
milliseconds and has error `errors[i][j]`. The dynamic programme is SPDY's (arXiv 2201.13096,
section 3.1) with two repairs: excess costs are rounded up, so a budget is never overrun, and
feasibility is tested exactly before anything is rounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Tokens:
    """How patch tokens change what sub-blocks cost. A level is an index into ascending counts, the last of them all.

    An option of a sub-block may take the tokens from any level above down to one of its own.
    """

    shares: Sequence[FloatArray]  # per sub-block `[levels, options]`: of its costs with so many tokens; the last are 1
    drops: Sequence[Sequence[int]]  # per sub-block `[options]`: the level that is left, -1 = as many as came in
    errors: Sequence[FloatArray]  # per sub-block `[levels]`: of dropping to that level there; the last is 0
    plain: Sequence[Sequence[int]]  # per sub-block `[options]`: the option with the same units that drops nothing
    reduce_ms: float  # what dropping takes

    @property
    def top(self) -> int:
        return len(self.shares[0]) - 1


def solve_jointly(
    errors: Sequence[FloatArray],
    costs: Sequence[FloatArray],
    tokens: Tokens,
    budget_ms: float,
    *,
    buckets: int = BUCKETS,
) -> tuple[int, ...]:
    """As `solve`, with the number of tokens as a second state: widths and the token schedule at once, exactly.

    `costs` are those with all tokens. Dropping from level s to t at a sub-block adds its `errors[t] - errors[s]`, so
    that the sum over a schedule is that of its last drop where sub-blocks agree. Optimal up to rounding each cost up
    by less than `budget / buckets`. Raises Infeasible when nothing is within the budget.
    """
    levels = tokens.top + 1
    bucket = max(budget_ms, 0.0) / buckets
    best = np.full((levels, buckets + 1), np.inf)  # best[s, b]: least error so far, at level s within b buckets
    best[tokens.top] = 0.0
    trail = []
    for at, (error, cost) in enumerate(zip(errors, costs, strict=True)):
        new = np.full_like(best, np.inf)
        origin = np.zeros((levels, buckets + 1), dtype=np.int32)  # level before * options + option
        shifts = np.zeros((levels, len(cost)), dtype=np.int64)
        for before in range(levels):
            if not np.isfinite(best[before, -1]):
                continue
            shifts[before] = _buckets(taken(cost, tokens, at, before), bucket, buckets)
            for option, drop in enumerate(tokens.drops[at]):
                shift, after = int(shifts[before, option]), before if drop < 0 else drop
                if shift > buckets or drop >= before:
                    continue
                added = error[option] + (tokens.errors[at][drop] - tokens.errors[at][before] if drop >= 0 else 0.0)
                candidate = best[before, : buckets + 1 - shift] + added
                better = candidate < new[after, shift:]
                np.copyto(new[after, shift:], candidate, where=better)
                origin[after, shift:][better] = before * len(cost) + option
        best = new
        trail.append((origin, shifts))
    if not np.isfinite(best[:, -1]).any():
        raise Infeasible(f"{budget_ms:.3f} ms cannot be reached with these widths and numbers of tokens")
    level, left, picked = int(best[:, -1].argmin()), buckets, []
    for origin, shifts in reversed(trail):
        level, option = divmod(int(origin[level, left]), shifts.shape[1])
        picked.append(option)
        left -= int(shifts[level, option])
    return tuple(reversed(picked))


def taken(cost: FloatArray, tokens: Tokens, at: int, level: int) -> FloatArray:
    """Milliseconds of the options of sub-block `at` where so many tokens come in."""
    return cost * tokens.shares[at][level] + tokens.reduce_ms * (np.asarray(tokens.drops[at]) >= 0)


def _buckets(excess: FloatArray, bucket: float, buckets: int) -> np.ndarray:
    """Costs above the cheapest option in whole buckets, rounded up; zero stays zero."""
    if bucket <= 0:
        return np.where(excess > 0, buckets + 1, 0)
    counted = np.ceil(excess / bucket * (1 - 1e-12))  # an excess of exactly n buckets is n, not n + 1
    return np.minimum(counted, buckets + 1).astype(np.int64)
