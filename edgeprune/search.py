"""Search beyond the additive model: which choice of levels diverges least, when all sub-blocks are changed at once.

Sums of errors ignore that one sub-block can make up for another, or needs it. So candidates are stitched and
judged by the KL divergence they really have on calibration images. Two kinds of moves propose them: errors times
random coefficients, solved again (SPDY, arXiv 2201.13096, section 3.2), and an exchange of latency between two
sub-blocks (DarwinLM, arXiv 2502.07780, with the latency table in place of "same type"). First, candidates are judged
as they are stitched, which is quick; the best few, and what is found from there, as they are once re-fitted to their
own inputs, on other images: a plan that looks worse may recover better.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgeprune.solve import BUCKETS as FULL
from edgeprune.solve import Tokens, solve, solve_jointly, taken
from edgeprune.stitch import Choice, Judge
from edgeprune.types import FloatArray

FINALISTS = 8  # stitched choices that are re-fitted
STITCHED = 0.2  # share of the time for choices that are not
MUTATED = 0.25  # share of the coefficients that a proposal draws anew
SPREAD = 1.0  # standard deviation of their logarithm
STALE = 200  # proposals in a row without a new choice after which there is nothing left to find
NEGLIGIBLE = 1e-5  # nats of divergence below which nothing is left to gain
LAST_RESORT = 1e3  # times all errors together: what an option costs that a start shall not take
BUCKETS = 2_000  # for proposals; the budget is kept whatever the number


@dataclass(frozen=True)
class Found:
    """What a search ends with."""

    choice: Choice
    start: float  # divergence of the additive optimum, re-fitted, in nats
    divergence: float  # of the choice found
    stitched: int  # how many choices were judged as they were
    refitted: int  # and how many re-fitted
    seconds: float


@dataclass(frozen=True)
class Space:
    """What can be chosen: errors and costs `[options of sub-block i]`, the budget in the costs' milliseconds."""

    errors: Sequence[FloatArray]
    costs: Sequence[FloatArray]
    budget_ms: float
    tokens: Tokens | None = None  # where tokens are chosen too; costs are then those with all of them
    #: Narrower questions: per sub-block `[options]`, which options each allows.
    narrower: Sequence[Sequence[NDArray[np.bool_]]] = ()

    def cost(self, choice: Sequence[int]) -> float:
        return float(sum(cost[option] for cost, option in zip(self.contexts(choice), choice, strict=True)))

    def contexts(self, choice: Sequence[int]) -> list[FloatArray]:
        """What the options of each sub-block would cost with the tokens that this choice leaves to it, `[options]`."""
        if self.tokens is None:
            return list(self.costs)
        pairs = zip(self.costs, self._levels(choice), strict=True)
        return [taken(cost, self.tokens, at, level) for at, (cost, level) in enumerate(pairs)]

    def _levels(self, choice: Sequence[int]) -> list[int]:
        """At which level tokens come in, per sub-block."""
        assert self.tokens is not None
        found = [self.tokens.top]
        for drops, option in zip(self.tokens.drops, choice, strict=True):
            found.append(drops[option] if drops[option] >= 0 else found[-1])
        return found[:-1]

    def legal(self, choice: Sequence[int]) -> Choice:
        """The same without drops to a level that is not below the one before."""
        if self.tokens is None:
            return tuple(choice)
        made, level = [], self.tokens.top
        for drops, plain, option in zip(self.tokens.drops, self.tokens.plain, choice, strict=True):
            option = plain[option] if drops[option] >= level else option
            level = drops[option] if drops[option] >= 0 else level
            made.append(option)
        return tuple(made)

    def alike(self, at: int, option: int) -> NDArray[np.bool_]:
        """Which options of sub-block `at` leave as many tokens as this one, `[options]`."""
        if self.tokens is None:
            return np.ones(len(self.costs[at]), dtype=bool)
        return np.asarray(self.tokens.drops[at]) == self.tokens.drops[at][option]

    def solve(self, coefficients: FloatArray | None = None, buckets: int = FULL) -> Choice:
        """The least sum of errors, each times its sub-block's coefficient, those of dropping tokens times the last."""
        weights = np.ones(len(self.errors) + 1) if coefficients is None else coefficients
        weighed = [c * e for c, e in zip(weights[:-1], self.errors, strict=True)]
        if self.tokens is None:
            return solve(weighed, self.costs, self.budget_ms, buckets=buckets)
        tokens = replace(self.tokens, errors=[weights[-1] * own for own in self.tokens.errors])
        return solve_jointly(weighed, self.costs, tokens, self.budget_ms, buckets=buckets)

    def starts(self) -> list[Choice]:
        """The least sum of errors, and that of each narrower question: who may choose more must not end with less."""
        penalty = LAST_RESORT * (1 + sum(float(own.max()) for own in self.errors))
        found = [self.solve()]
        for allowed in self.narrower:
            errors = [error + penalty * ~own for error, own in zip(self.errors, allowed, strict=True)]
            found.append(replace(self, errors=errors).solve())
        return found


def improve(
    space: Space,
    stitched: Judge,
    refitted: Judge,
    seconds: float,
    seed: int,
    *,
    known: Sequence[Choice] = (),
    advance: Callable[[float, str], None] = lambda amount, note: None,
) -> Found:
    """The choice with the least divergence found within about `seconds`, its table cost within the budget.

    known: good choices of earlier searches, the latest last; those within the budget are starts too. Raises Infeasible when no
    choice is within the budget.
    """
    began = time.monotonic()
    rng = np.random.default_rng(seed)
    additive, *simpler = space.starts()
    starts = [additive, *(choice for choice in reversed(known) if space.cost(choice) <= space.budget_ms), *simpler]
    quick = climb(space, starts, stitched, began, STITCHED * seconds, rng, advance)
    finalists = {*starts, *sorted(quick, key=quick.__getitem__)[:FINALISTS]}
    ranked = sorted(finalists, key=lambda choice: (quick.get(choice, math.inf), choice))
    final = climb(space, [additive, *ranked], refitted, began, seconds, rng, advance)
    winner = min(final, key=final.__getitem__)
    return Found(winner, final[additive], final[winner], len(quick), len(final), time.monotonic() - began)


def climb(
    space: Space,
    starts: Sequence[Choice],
    judge: Judge,
    began: float,
    seconds: float,
    rng: np.random.Generator,
    advance: Callable[[float, str], None],
) -> dict[Choice, float]:
    """Divergence in nats of the starts, in their order, and of proposals, each near the best so far.

    Until `seconds` after `began`, but of the first two starts at least, or until there is nothing left to find or to gain.
    """
    found: dict[Choice, float] = {}

    def late() -> bool:
        return time.monotonic() - began >= seconds

    for choice in dict.fromkeys(starts):
        found[choice] = judge.divergence(choice)
        if found[choice] <= NEGLIGIBLE or (len(found) > 1 and late()):
            break
    best = min(found, key=found.__getitem__)
    judge.keep(best)
    coefficients = np.ones(len(space.errors) + 1)
    stale, last = 0, time.monotonic()
    while stale < STALE and found[best] > NEGLIGIBLE and not late():
        mutated = coefficients
        if rng.random() < 0.5:
            mutated = _mutate(coefficients, rng)
            choice = space.solve(mutated, BUCKETS)
        else:
            choice = exchange(space, best, rng)
        stale = stale + 1 if choice in found else 0
        if stale:
            continue
        found[choice] = judge.divergence(choice)
        if found[choice] < found[best]:
            best, coefficients = choice, mutated
            judge.keep(best)
        advance(time.monotonic() - last, f"{len(found)} judged, {found[best]:.4f} nats")
        last = time.monotonic()
    return found


def exchange(space: Space, choice: Choice, rng: np.random.Generator) -> Choice:
    """A neighbour within the budget: one sub-block at another level, another giving or taking the latency.

    After the two, whatever latency is left goes where it lowers the summed errors most.
    """
    first, second = rng.choice(len(choice), size=2, replace=False)
    changed = list(choice)
    changed[first] = _other(space, first, choice[first], rng)
    new = list(space.legal(changed))
    costs = space.contexts(new)[second]
    room = space.budget_ms - (space.cost(new) - costs[new[second]])
    fitting = np.flatnonzero((costs <= room) & space.alike(second, new[second]))
    if not len(fitting):
        return choice
    new[second] = int(fitting[space.errors[second][fitting].argmin()])
    return _fill(space, new)


def _fill(space: Space, choice: Sequence[int]) -> Choice:
    new = list(choice)
    costs = space.contexts(new)
    while True:
        room = space.budget_ms - space.cost(new)
        gains = []
        for i, at in enumerate(new):
            fitting = np.flatnonzero((costs[i] <= costs[i][at] + room) & space.alike(i, at))
            option = int(fitting[space.errors[i][fitting].argmin()])
            gains.append((float(space.errors[i][at] - space.errors[i][option]), i, option))
        gain, i, option = max(gains)
        if gain <= 0:
            return tuple(new)
        new[i] = option


def _other(space: Space, at: int, option: int, rng: np.random.Generator) -> int:
    """Another option of sub-block `at`: other units, near ones more often, or another number of tokens that stay.

    The same if there is no other.
    """
    alike = space.alike(at, option)
    if space.tokens is not None and not alike.all() and rng.random() < 0.5:
        plain = np.asarray(space.tokens.plain[at])
        others = np.flatnonzero(~alike & (plain == plain[option]))
        return int(rng.choice(others)) if len(others) else option
    others = np.array([other for other in np.flatnonzero(alike) if other != option])
    if not len(others):
        return option
    weights = 1.0 / np.abs(others - option)
    return int(rng.choice(others, p=weights / weights.sum()))


def _mutate(coefficients: FloatArray, rng: np.random.Generator) -> FloatArray:
    count = max(1, round(MUTATED * len(coefficients)))
    drawn = rng.choice(len(coefficients), size=count, replace=False)
    new = coefficients.copy()
    new[drawn] = np.exp(SPREAD * rng.standard_normal(count))
    return new
