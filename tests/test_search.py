"""python -m pytest tests/test_search.py"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from edgeprune import criteria, obs, recovery, search
from edgeprune.errors import Infeasible
from edgeprune.solve import solve
from edgeprune.stitch import Choice, Database, Judge
from edgeprune.types import BlockPlan, Levels, Plan

COUNTS = [(0, 1, 2, 3), (0, 8, 16, 24)] * 3
DENSE = (3,) * 6


@pytest.fixture
def moments(tiny_vit: Any, make_images: Callable[..., Any]) -> dict[Any, Any]:
    batches = [(part, torch.zeros(len(part))) for part in make_images(32).split(8)]
    found = criteria.collect(tiny_vit, batches, 0, lambda *_: None, uses_loss=False)
    return {at: (own.mean, obs.damped(own.covariance)) for at, own in found.moments.items()}


@pytest.fixture
def database(tiny_vit: Any, moments: dict[Any, Any]) -> Database:
    rng = np.random.default_rng(0)
    levels = [
        Levels(i, kind, rng.permutation(units), np.zeros(units + 1))
        for i in range(3)
        for kind, units in (("attn", 3), ("mlp", 24))
    ]
    return Database(tiny_vit, levels, COUNTS, moments)


def model_of(database: Database, choice: Choice) -> Any:
    """The same choice by the way that a build takes: a plan, sliced and re-fitted."""
    kept = [level.kept(count[option]) for level, count, option in zip(database.levels, COUNTS, choice, strict=True)]
    plan = Plan(tuple(BlockPlan(kept[i], kept[i + 1]) for i in range(0, 6, 2)))
    return recovery.survivors(database.dense, plan, database.moments)


def choices(count: int) -> list[Choice]:
    rng = np.random.default_rng(1)
    return [tuple(int(o) for o in rng.integers(0, 4, 6)) for _ in range(count)] + [DENSE, (0,) * 6]


def test_a_stitched_model_is_the_pruned_model(database: Database, make_images: Callable[..., Any]) -> None:
    images = make_images(8, seed=3)
    judge = Judge(database, images)
    with torch.no_grad():
        wanted = database.dense(images).log_softmax(-1)
        for choice in choices(6):
            own = model_of(database, choice)(images).log_softmax(-1)
            want = float(F.kl_div(own, wanted, log_target=True, reduction="batchmean"))
            assert judge.divergence(choice) == pytest.approx(want, rel=1e-3, abs=1e-6)


def test_what_a_judge_holds_changes_nothing(database: Database, make_images: Callable[..., Any]) -> None:
    fresh, holding = Judge(database, make_images(8)), Judge(database, make_images(8))
    for choice in choices(8):
        holding.keep(choice)
        for at, option in itertools.product(range(6), (0, 2)):
            near = (*choice[:at], option, *choice[at + 1 :])
            assert holding.divergence(near) == pytest.approx(fresh.divergence(near), rel=1e-4, abs=1e-7)


def test_the_dense_model_is_left_alone(database: Database, make_images: Callable[..., Any]) -> None:
    before = {name: value.clone() for name, value in database.dense.state_dict().items()}
    judge = Judge(database, make_images(4))
    for choice in choices(4):
        judge.divergence(choice)
    assert judge.divergence(DENSE) == pytest.approx(0, abs=1e-6)
    after = database.dense.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


class Formula:
    """A judge whose divergence is a formula, with an interaction that no sum of errors has."""

    def __init__(self, shift: float = 0.0) -> None:
        self.asked: list[Choice] = []
        self.shift = shift

    def divergence(self, choice: Choice) -> float:
        self.asked.append(choice)
        pairs = sum(abs(a - b) for a, b in itertools.pairwise(choice))
        return float(sum((3 - option) ** 2 for option in choice) + 4 * pairs) + self.shift

    def keep(self, choice: Choice) -> None:
        pass


ERRORS = [np.array([9.0, 4.0, 1.0, 0.0]) * (1 + i % 2) for i in range(5)]
COSTS = [np.array([0.0, 1.0, 2.0, 4.0]) / (1 + i % 3) for i in range(5)]


@pytest.mark.parametrize("budget", [2.0, 4.0, 7.0])
def test_a_search_finds_what_brute_force_finds(budget: float) -> None:
    first, second = Formula(), Formula()
    found = search.improve(ERRORS, COSTS, budget, first, second, 20.0, 0)  # type: ignore[arg-type]
    every = itertools.product(range(4), repeat=5)
    feasible = [c for c in every if sum(cost[o] for cost, o in zip(COSTS, c, strict=True)) <= budget]
    best = min(Formula().divergence(c) for c in feasible)
    assert found.divergence <= best * 1.05
    assert found.divergence <= found.start
    for choice in first.asked + second.asked:
        assert sum(cost[o] for cost, o in zip(COSTS, choice, strict=True)) <= budget + 1e-9
    assert found.judged == len(set(first.asked)) == len(first.asked), "a choice is judged once"
    assert len(second.asked) <= search.FINALISTS + 1


def test_the_second_images_have_a_say() -> None:
    class Spoilt(Formula):
        def divergence(self, choice: Choice) -> float:
            return super().divergence(choice) + 1e3 * (choice != additive)

    additive = solve(ERRORS, COSTS, 4.0)
    found = search.improve(ERRORS, COSTS, 4.0, Formula(), Spoilt(), 0.5, 0)  # type: ignore[arg-type]
    assert found.choice == additive


def test_earlier_finds_are_starts_if_they_fit() -> None:
    judge = Formula()
    small, large = (1,) * 5, (3,) * 5
    search.improve(ERRORS, COSTS, 4.0, judge, Formula(), 0.0, 0, known=[small, large])  # type: ignore[arg-type]
    assert small in judge.asked and large not in judge.asked


def test_no_time_is_the_additive_optimum_and_no_room_is_an_error() -> None:
    found = search.improve(ERRORS, COSTS, 4.0, Formula(), Formula(), 0.0, 0)  # type: ignore[arg-type]
    assert found.choice == solve(ERRORS, COSTS, 4.0) and found.judged == 1
    with pytest.raises(Infeasible):
        search.improve(ERRORS, [cost + 1 for cost in COSTS], 4.0, Formula(), Formula(), 0.0, 0)  # type: ignore[arg-type]


def test_the_same_seed_finds_the_same() -> None:
    once, again = (search.improve(ERRORS, COSTS, 5.0, Formula(), Formula(), 20.0, 7) for _ in range(2))  # type: ignore[arg-type]
    assert once.choice == again.choice
