"""python -m pytest tests/test_search.py"""

from __future__ import annotations

import copy
import itertools
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from edgeprune import criteria, obs, recovery, search, vit
from edgeprune.errors import Infeasible
from edgeprune.solve import solve
from edgeprune.stitch import Choice, Database, Judge, RefitJudge
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


def space(budget_ms: float) -> search.Space:
    return search.Space(ERRORS, COSTS, budget_ms)


def improve(budget_ms: float, first: Any, second: Any, seconds: float, seed: int = 0, **options: Any) -> search.Found:
    return search.improve(space(budget_ms), first, second, seconds, seed, **options)


@pytest.mark.parametrize("budget", [2.0, 4.0, 7.0])
def test_a_search_finds_what_brute_force_finds(budget: float) -> None:
    first, second = Formula(), Formula()
    found = improve(budget, first, second, 20.0)
    feasible = [c for c in itertools.product(range(4), repeat=5) if space(budget).cost(c) <= budget]
    best = min(Formula().divergence(c) for c in feasible)
    assert found.divergence <= best * 1.05
    assert found.divergence <= found.start
    for choice in first.asked + second.asked:
        assert space(budget).cost(choice) <= budget + 1e-9
    assert found.stitched == len(set(first.asked)) and found.refitted == len(set(second.asked))


def test_what_is_refitted_decides() -> None:
    class Spoilt(Formula):
        def divergence(self, choice: Choice) -> float:
            return super().divergence(choice) + 1e3 * (choice != additive)

    additive = solve(ERRORS, COSTS, 4.0)
    assert improve(4.0, Formula(), Spoilt(), 0.5).choice == additive


def test_earlier_finds_are_starts_if_they_fit() -> None:
    judge = Formula()
    small, large = (1,) * 5, (3,) * 5
    improve(4.0, judge, Formula(), 0.0, known=[small, large])
    assert small in judge.asked and large not in judge.asked


class Slow(Formula):
    """A judge on whose clock every new choice takes ten seconds."""

    now = 0.0

    def divergence(self, choice: Choice) -> float:
        Slow.now += 10.0 * (choice not in self.asked)
        return super().divergence(choice)


def test_starts_of_a_model_that_is_slow_to_judge_take_no_longer_than_the_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """But the likeliest one is re-fitted beside the least sum of errors."""
    monkeypatch.setattr(search, "time", types.SimpleNamespace(monotonic=lambda: Slow.now))
    starts = [solve(ERRORS, COSTS, 4.0), *itertools.product((1, 2), repeat=5)]
    stitched, refitted = Formula(), Slow()
    found = improve(4.0, stitched, refitted, 15.0, known=starts[1:])
    likeliest = min(set(stitched.asked), key=lambda choice: (Formula().divergence(choice), choice))
    assert refitted.asked == [starts[0], likeliest] and found.refitted == 2
    assert found.choice == likeliest
    assert improve(4.0, Slow(), Formula(), 15.0, known=starts[1:]).stitched == 2


def test_nothing_is_judged_where_nothing_is_left_to_gain() -> None:
    additive = solve(ERRORS, COSTS, 4.0)
    first, second = (Formula(-Formula().divergence(additive)) for _ in range(2))
    found = improve(4.0, first, second, 20.0, known=[(1,) * 5])
    assert found.choice == additive and first.asked == second.asked == [additive]


def test_no_time_is_the_best_start_and_no_room_is_an_error() -> None:
    found = improve(4.0, Formula(), Formula(), 0.0)
    assert found.choice == solve(ERRORS, COSTS, 4.0) and found.stitched == found.refitted == 1
    with pytest.raises(Infeasible):
        improve(-1.0, Formula(), Formula(), 0.0)


def test_one_option_is_no_choice() -> None:
    """What is pruned further may have sub-blocks that are gone."""
    narrow = search.Space([np.array([0.0]), *ERRORS[1:]], [np.array([0.0]), *COSTS[1:]], 4.0)
    for choice in search.climb(
        narrow, [(0,) * 5], Formula(), time.monotonic(), 0.3, np.random.default_rng(0), lambda *_: None
    ):  # type: ignore[arg-type]
        assert choice[0] == 0 and narrow.cost(choice) <= 4.0


def test_the_same_seed_finds_the_same() -> None:
    once, again = (improve(5.0, Formula(), Formula(), 20.0, 7) for _ in range(2))
    assert once.choice == again.choice


# Re-fitted ------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_refitting_judge_does_what_the_refit_does(database: Database, make_images: Callable[..., Any]) -> None:
    """The loop of `recovery.sequential`, on the pruned model itself, without first layers and second solutions."""
    parts = [make_images(12, seed=4), make_images(6, seed=5)]
    judge, dense = RefitJudge(database, *parts), database.dense
    for choice in [(3, 2, 1, 3, 2, 1), (1, 1, 1, 1, 1, 1), (2, 3, 3, 1, 2, 2)]:
        pruned = model_of(database, choice)
        wanted = have = [vit.embed(dense, part) for part in parts]
        for full, small in zip(dense.blocks, pruned.blocks, strict=True):
            for kind in vit.KINDS:
                wanted = [vit.step(full, kind, x) for x in wanted]
                ones = [torch.ones(x.shape[:2]) for x in have]
                sub = vit.sub_block(small, kind)
                have = recovery.refit_sub_block(recovery.Place(small, kind, sub), have, wanted, ones, 1, False)[1]
        recovery.refit_head(pruned, pruned.head, have, [vit.classify(dense, x) for x in wanted], 1, False)
        own, want = (model(parts[1]).log_softmax(-1) for model in (pruned, dense))
        divergence = float(F.kl_div(own, want, log_target=True, reduction="batchmean"))
        assert judge.divergence(choice) == pytest.approx(divergence, rel=1e-3, abs=1e-6)


def test_what_a_refitting_judge_holds_changes_nothing(database: Database, make_images: Callable[..., Any]) -> None:
    first, second = make_images(12, seed=4), make_images(6, seed=5)
    holding, fresh = RefitJudge(database, first, second), RefitJudge(database, first, second)
    for choice in [*choices(4), (3, 0, 0, 0, 2, 0)]:
        holding.keep(choice)
        for at, option in itertools.product(range(6), (0, 2)):
            near = (*choice[:at], option, *choice[at + 1 :])
            assert holding.divergence(near) == pytest.approx(fresh.divergence(near), rel=1e-3, abs=1e-6)


def test_the_classifier_is_refitted_only_if_it_helps(tiny_vit: Any, make_images: Callable[..., Any]) -> None:
    images = list(make_images(32).split(8))
    wanted = [tiny_vit(x).detach() for x in images]
    have = [list(vit.streams(tiny_vit, x))[-2].detach() for x in images]
    head = copy.deepcopy(tiny_vit.head)
    accepted, logits = recovery.refit_head(tiny_vit, head, have, wanted, 3)
    assert not accepted and torch.equal(head.weight, tiny_vit.head.weight)  # nothing is missing
    torch.testing.assert_close(torch.cat(logits), torch.cat(wanted), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        head.bias += 3 * torch.arange(5)
    accepted, logits = recovery.refit_head(tiny_vit, head, have, wanted, 3)
    assert accepted
    torch.testing.assert_close(torch.cat(logits), torch.cat(wanted), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(head.bias, tiny_vit.head.bias, rtol=1e-2, atol=1e-2)
