"""python -m pytest tests/test_solve.py"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeprune.errors import Infeasible
from edgeprune.solve import BUCKETS, solve

Tables = list[tuple[list[float], list[float]]]

options = st.tuples(st.floats(0, 10, allow_subnormal=False), st.one_of(st.just(0.0), st.floats(1e-4, 5)))
tables: st.SearchStrategy[Tables] = st.lists(
    st.lists(options, min_size=1, max_size=5).map(lambda rows: ([e for e, _ in rows], [c for _, c in rows])),
    min_size=1,
    max_size=4,
)


def arrays(table: Tables) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return [np.array(e) for e, _ in table], [np.array(c) for _, c in table]


def total(columns: Sequence[np.ndarray], picked: Sequence[int]) -> float:
    return math.fsum(float(column[i]) for column, i in zip(columns, picked, strict=True))


def brute_force(errors: list[np.ndarray], costs: list[np.ndarray], budget: float) -> float:
    """The least error of any choice within the budget; infinity when there is none."""
    choices = itertools.product(*(range(len(e)) for e in errors))
    return min((total(errors, c) for c in choices if total(costs, c) <= budget), default=math.inf)


@settings(max_examples=150, deadline=None)
@given(table=tables, share=st.integers(0, 1100).map(lambda n: n / 1000))
def test_equals_brute_force_up_to_rounding(table: Tables, share: float) -> None:
    errors, costs = arrays(table)
    cheapest, dearest = sum(c.min() for c in costs), sum(c.max() for c in costs)
    budget = float(cheapest + share * (dearest - cheapest))
    picked = solve(errors, costs, budget)
    assert total(costs, picked) <= budget + 1e-9
    rounding = len(costs) * max(budget - cheapest, 0.0) / BUCKETS
    assert total(errors, picked) <= brute_force(errors, costs, budget - rounding - 1e-9) + 1e-9
    assert total(errors, picked) >= brute_force(errors, costs, budget + 1e-9) - 1e-9


@settings(max_examples=50, deadline=None)
@given(table=tables, buckets=st.integers(1, 50))
def test_coarse_buckets_never_overrun_the_budget(table: Tables, buckets: int) -> None:
    errors, costs = arrays(table)
    budget = float(sum(c.mean() for c in costs))
    assert total(costs, solve(errors, costs, budget, buckets=buckets)) <= budget + 1e-9


@settings(max_examples=50, deadline=None)
@given(table=tables, short=st.floats(1e-6, 3))
def test_less_than_the_cheapest_is_infeasible(table: Tables, short: float) -> None:
    errors, costs = arrays(table)
    cheapest = sum(c.min() for c in costs)
    with pytest.raises(Infeasible, match="cannot be reached"):
        solve(errors, costs, float(cheapest) - short)


def test_infeasible_names_both_numbers() -> None:
    with pytest.raises(Infeasible, match=r"1\.500 ms cannot be reached: .* 3\.000 ms remain"):
        solve([np.array([1.0, 0.0])] * 3, [np.array([1.0, 2.0])] * 3, 1.5)


@settings(max_examples=80, deadline=None)
@given(table=tables)
def test_a_budget_of_exactly_the_cheapest_choice(table: Tables) -> None:
    errors, costs = arrays(table)
    budget = float(np.array([c.min() for c in costs]).sum())
    picked = solve(errors, costs, budget)
    assert total(costs, picked) <= budget + 1e-9
    assert total(errors, picked) <= brute_force(errors, costs, budget) + 1e-9


def test_a_generous_budget_takes_the_best_of_each() -> None:
    errors, costs = [np.array([5.0, 1.0, 0.0]), np.array([0.5, 2.0])], [np.array([0.0, 1.0, 9.0]), np.array([3.0, 0.0])]
    assert solve(errors, costs, 100.0) == (2, 0)


def test_exactly_affordable_options_are_taken() -> None:
    """A cost of exactly n buckets stays n, however the division is rounded."""
    for count, cost in ((4, 0.1), (5, 0.3), (8, 1.7), (10, 0.7)):
        assert solve([np.array([1.0, 0.0])] * count, [np.array([0.0, cost])] * count, cost * count) == (1,) * count


def test_zero_cost_options_are_free() -> None:
    errors = [np.array([3.0, 1.0, 2.0])] * 2
    costs = [np.zeros(3)] * 2
    assert solve(errors, costs, 0.0) == (1, 1)
    assert solve(errors, costs, 1.0) == (1, 1)


def test_the_greedy_choice_is_not_the_best() -> None:
    """The option with the best gain per millisecond leads astray; the exact solver is not led."""
    errors = [np.array([10.0, 4.0, 0.0]), np.array([10.0, 3.0])]
    costs = [np.array([0.0, 1.0, 2.0]), np.array([0.0, 2.0])]
    assert solve(errors, costs, 2.0) == (2, 0)
    assert solve(errors, costs, 3.01) == (1, 1)


@settings(max_examples=20, deadline=None)
@given(table=tables, share=st.integers(0, 1000).map(lambda n: n / 1000))
def test_the_same_input_gives_the_same_choice(table: Tables, share: float) -> None:
    errors, costs = arrays(table)
    low, high = sum(c.min() for c in costs), sum(c.max() for c in costs)
    budget = float(low + share * (high - low))
    assert solve(errors, costs, budget) == solve([e.copy() for e in errors], [c.copy() for c in costs], budget)


def test_a_larger_budget_is_never_worse() -> None:
    rng = np.random.default_rng(0)
    costs = [np.sort(rng.random(6)) for _ in range(5)]
    errors = [np.sort(rng.random(6))[::-1] for _ in range(5)]
    low, high = sum(c[0] for c in costs), sum(c[-1] for c in costs)
    found = [total(errors, solve(errors, costs, float(b))) for b in np.linspace(low, high, 12)]
    assert all(b <= a + 1e-2 for a, b in itertools.pairwise(found)) and found[-1] < found[0]
