"""python -m pytest tests/latency/test_table.py"""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest

from edgeprune import errors
from edgeprune.latency.table import Measured, at_depth, build_table, isotonic, table_from_json, table_to_json
from edgeprune.types import Form, LatencyTable, Measurement, Shape


def measured(ms: float, dense_ms: float = 12.0, rounds: int = 50) -> Measurement:
    ratio = ms / dense_ms
    return Measurement(
        "m",
        np.full(rounds, ms),
        np.full(rounds, dense_ms),
        ratio,
        (ratio, ratio),
        np.full((2, rounds), ms),
        np.zeros((2, rounds)),
        np.full(rounds, dense_ms),
    )


def table(attn: dict[int, float], mlp: dict[int, float], plans: dict[Shape, float] | None = None) -> LatencyTable:
    """4 blocks, 3 heads, 64 neurons, dense 12 ms; arguments are milliseconds of whole models."""
    stage = Measured(4, 3, 64, *({kept: measured(ms) for kept, ms in own.items()} for own in (attn, mlp)))
    return build_table(
        [stage], measured(EMPTY), {shape: measured(ms) for shape, ms in (plans or {}).items()}, dense_ms=12.0, runtime="null", precision="fp32", threads=1,
    )  # fmt: skip


EMPTY = 2.5
ATTN = {0: 8.0, 1: 9.2, 2: 10.8}  # dense 12: the sub-block costs 1 ms
MLP = {0: 6.0, 16: 8.0, 32: 10.0}  # dense 12: the sub-block costs 1.5 ms


def test_prices_are_differences_of_whole_models_per_block() -> None:
    made = table(ATTN, MLP)
    [stage] = made.stages
    np.testing.assert_allclose(stage.attn_ms, [0, 0.3, 0.7, 1.0])
    np.testing.assert_allclose(stage.mlp_ms, [0, 0.5, 1.0, 1.5])
    assert stage.mlp_widths == (0, 16, 32, 64)
    assert made.base_ms == pytest.approx(2.0)
    assert (made.samples, made.repaired) == (50, ())


def test_a_kind_that_takes_no_time_has_no_share() -> None:
    """On a busy machine the model without it may come out as slow as the dense one."""
    int8 = Form(int8=True)
    own = Measured(
        4, 3, 64, {0: measured(12.0)}, {0: measured(6.0)}, {int8: {3: measured(12.5)}}, {int8: {64: measured(9.0)}}
    )
    made = build_table([own], measured(EMPTY), {}, dense_ms=12.0, runtime="null", precision="fp32", threads=1)
    assert made.form_share("attn", int8) == 1.0
    assert made.form_share("mlp", int8) == made.form_share("mlp", int8, 0) == pytest.approx(0.5)


def test_a_surplus_takes_plans_enough() -> None:
    """Four plans are fitted by two numbers; a third would be made of their noise."""
    int8 = Form(int8=True)
    own = Measured(
        4, 3, 64, {0: measured(8.0)}, {0: measured(6.0)}, {int8: {3: measured(11.0)}}, {int8: {64: measured(9.0)}}
    )

    def of(count: int) -> LatencyTable:
        rng = np.random.default_rng(0)
        plans: dict[Shape, float] = {
            tuple((3, 64, 0, 2 * (b < i)) for b in range(4)): 12.0 - 0.5 * i + float(rng.uniform(0, 0.4))
            for i in range(4)
        }
        plans |= {((n, 64),) * 4: 8.0 + 4 / 3 * n for n in range(1, 3)}
        few = dict(itertools.islice(plans.items(), count))
        return build_table(
            [own], measured(EMPTY), {shape: measured(ms) for shape, ms in few.items()}, dense_ms=12.0, runtime="null",
            precision="fp32", threads=1,
        )  # fmt: skip

    assert of(4).fit["surplus_ms"] == 0 < of(6).fit["surplus_ms"]


def test_the_first_blocks_speak_for_all() -> None:
    """A model of 12 blocks, 2 ms beside them and 1 + 1.5 ms each, is measured by 4 of them, and has the same prices."""

    def whole(attn: float, mlp: float, blocks: int = 12) -> Measurement:
        return measured(2 + blocks * (attn + mlp), 32.0)

    def table_of(four: bool) -> LatencyTable:
        def one(attn: float, mlp: float) -> Measurement:
            return at_depth(whole(attn, mlp, 4), whole(1, 1.5, 4), 3.0) if four else whole(attn, mlp)

        own = Measured(12, 2, 64, {0: one(0, 1.5), 1: one(0.6, 1.5)}, {0: one(1, 0), 32: one(1, 0.9)})
        return build_table([own], measured(2, 32.0), {}, dense_ms=32.0, runtime="null", precision="fp32", threads=1)

    for name in ("attn_ms", "mlp_ms"):
        got, want = (getattr(table_of(four).stages[0], name) for four in (True, False))
        np.testing.assert_allclose(got, want, err_msg=name)
    assert table_of(True).base_ms == pytest.approx(2.0)


def test_every_measured_model_is_predicted_and_the_dense_one_exactly() -> None:
    made = table(ATTN, MLP)
    assert made.predict_ms(((3, 64),) * 4) == pytest.approx(12.0, abs=1e-12)
    for h, ms in ATTN.items():
        assert made.predict_ms(((h, 64),) * 4) == pytest.approx(ms)
    for w, ms in MLP.items():
        assert made.predict_ms(((3, w),) * 4) == pytest.approx(ms)


def test_a_slower_smaller_shape_is_repaired_and_reported() -> None:
    made = table({0: 8.0, 1: 10.8, 2: 9.2}, MLP)
    np.testing.assert_allclose(made.stages[0].attn_ms, [0, 0.5, 0.5, 1.0])
    assert made.repaired == (
        "attention with 1 heads: 0.7000 ms became 0.5000 ms per block",
        "attention with 2 heads: 0.3000 ms became 0.5000 ms per block",
    )


def test_heads_between_those_measured_are_interpolated() -> None:
    np.testing.assert_allclose(table({0: 8.0, 2: 10.0}, MLP).stages[0].attn_ms, [0, 0.25, 0.5, 1.0])


def test_widths_between_those_measured_are_interpolated() -> None:
    parts = ({0: measured(8.0)}, {0: measured(6.0), 32: measured(10.0)})
    made = build_table(
        [Measured(4, 3, 64, *parts, widths=(0, 16, 32, 48, 64))], measured(EMPTY), {}, dense_ms=12.0, runtime="null",
        precision="fp32", threads=1,
    )  # fmt: skip
    assert made.stages[0].mlp_widths == (0, 16, 32, 48, 64)
    np.testing.assert_allclose(made.stages[0].mlp_ms, [0, 0.5, 1.0, 1.25, 1.5])


def test_every_stage_has_prices_of_its_own() -> None:
    """Two stages, of 1 and 3 blocks: each is priced by models in which the other is dense."""
    first = Measured(1, 2, 16, {0: measured(11.0), 1: measured(11.4)}, {0: measured(10.0)})
    second = Measured(3, 4, 32, {0: measured(9.0), 2: measured(10.5)}, {0: measured(6.0), 16: measured(9.0)})
    made = build_table([first, second], measured(EMPTY), {}, dense_ms=12.0, runtime="null", precision="fp32", threads=1)
    for own, attn, mlp in zip(
        made.stages, ([0, 0.4, 1.0], [0, 0.25, 0.5, 0.75, 1.0]), ([0, 2.0], [0, 1.0, 2.0]), strict=True
    ):
        np.testing.assert_allclose(own.attn_ms, attn)
        np.testing.assert_allclose(own.mlp_ms, mlp)
    assert made.base_ms == pytest.approx(12 - 3 - 9)
    dense: Shape = ((2, 16), (4, 32), (4, 32), (4, 32))
    assert made.dense == dense and made.predict_ms(dense) == 12.0
    assert made.predict_ms(((1, 0), (4, 16), (0, 32), (2, 32))) == pytest.approx(0.4 + 2.0 + 2.0 + 2.5)
    again = table_from_json(json.loads(json.dumps(table_to_json(made))))
    assert table_to_json(again) == table_to_json(made)


MIXED: list[Shape] = [
    ((0, 16), (1, 32), (2, 64), (3, 0)),
    ((3, 64), (3, 64), (2, 32), (1, 16)),
    ((0, 0), (1, 0), (0, 16), (0, 32)),
    ((1, 64), (3, 16), (0, 64), (2, 0)),
]


def test_plans_whose_blocks_differ_shift_and_scale_the_prices() -> None:
    """Measurements that are exactly 0.2 ms + 1.1 times the sum of prices are then predicted exactly."""
    plain = table(ATTN, MLP)
    made = table(ATTN, MLP, {shape: 0.2 + 1.1 * plain.predict_ms(shape) for shape in MIXED})
    assert made.fit["scale"] == pytest.approx(1.1)
    assert made.fit["shift_ms"] == pytest.approx(0.2)
    assert made.fit["median_error"] < 1e-9 < made.fit["median_error_before"]
    held_out = ((2, 0), (0, 64), (1, 32), (3, 16))
    assert made.predict_ms(held_out) == pytest.approx(0.2 + 1.1 * plain.predict_ms(held_out))


def test_the_dense_and_the_empty_model_are_as_measured_however_plans_are_fitted() -> None:
    made = table(ATTN, MLP, {shape: 1.0 + table(ATTN, MLP).predict_ms(shape) for shape in MIXED})
    assert made.predict_ms(((3, 64),) * 4) == 12.0
    assert made.predict_ms(((0, 0),) * 4) == EMPTY
    assert made.base_ms == pytest.approx(3.0)


@pytest.mark.parametrize("count", [1, 2])
def test_few_plans_only_shift(count: int) -> None:
    plain = table(ATTN, MLP)
    made = table(ATTN, MLP, {shape: 0.5 + plain.predict_ms(shape) for shape in MIXED[:count]})
    assert (made.fit["scale"], made.fit["shift_ms"]) == (1.0, pytest.approx(0.5))
    np.testing.assert_array_equal(made.stages[0].attn_ms, plain.stages[0].attn_ms)


def test_without_plans_sums_of_prices_are_taken_as_they_are() -> None:
    assert table(ATTN, MLP).fit == {}


@pytest.mark.parametrize(("attn", "mlp"), [({1: 8.0, 2: 9.0}, MLP), (ATTN, {16: 8.0})])
def test_a_missing_entry_is_refused(attn: dict[int, float], mlp: dict[int, float]) -> None:
    with pytest.raises(errors.UsageError, match="not measured"):
        table(attn, mlp)


def test_sizes_beyond_the_dense_model_are_refused() -> None:
    with pytest.raises(errors.UsageError, match="exceed"):
        table(ATTN, {**MLP, 128: 13.0})


def test_isotonic_is_the_least_squares_optimum() -> None:
    """Brute force: every way to cut 5 values into blocks of equal price."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        values = rng.integers(0, 9, 5).astype(float)
        best = np.inf
        for cuts in itertools.product([False, True], repeat=4):
            label = np.cumsum([0, *cuts])
            fit = np.array([values[label == k].mean() for k in label])
            if (np.diff(fit) >= 0).all():
                best = min(best, float(((fit - values) ** 2).sum()))
        found = isotonic(values)
        assert (np.diff(found) >= 0).all()
        assert ((found - values) ** 2).sum() == pytest.approx(best, abs=1e-9)


def test_round_trip_through_json() -> None:
    made = table({0: 8.0, 1: 10.8, 2: 9.2}, MLP, dict.fromkeys(MIXED, 7.0))
    again = table_from_json(json.loads(json.dumps(table_to_json(made))))
    assert table_to_json(again) == table_to_json(made)
    assert again.predict_ms(((1, 16),) * 4) == made.predict_ms(((1, 16),) * 4)


def test_something_else_is_not_a_table() -> None:
    with pytest.raises(errors.UsageError, match="not a latency table"):
        table_from_json({"runtime": "x"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"stages": []}, "no stages"),
        ({"stages": 5}, "not iterable"),
        ({"stages": [5]}, "a stage must have blocks, attn_ms"),
        ({"stages": [{"blocks": 4}]}, "a stage must have blocks, attn_ms"),
        ({"dense_ms": 0}, "dense_ms must be above zero"),
        ({"dense_ms": "5x"}, "could not convert"),
        ({"base_ms": float("inf")}, "base_ms must be finite"),
        ({"threads": 0}, "threads must be a whole number"),
    ],
)
def test_a_damaged_table_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(errors.UsageError, match="this latency table is damaged .*" + says):
        table_from_json({**table_to_json(table(ATTN, MLP)), **change})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"attn_ms": "x"}, "could not convert"),
        ({"attn_ms": [0.0, -1.0, 2.0, 3.0]}, "attn_ms must be finite, ascend"),
        ({"mlp_ms": [0.0, 0.5, float("nan"), 1.5]}, "mlp_ms must be finite"),
        ({"mlp_ms": [0.0, 0.5]}, "more or fewer MLP prices than widths"),
        ({"mlp_widths": [0, 32, 16, 64]}, "the MLP widths must ascend"),
        ({"mlp_widths": [8, 16, 32, 64]}, "whole numbers from 0"),
        ({"blocks": 4.5}, "blocks must be a whole number from 1 to 512"),
        ({"blocks": 10**9}, "blocks must be a whole number from 1 to 512"),
    ],
)
def test_a_damaged_stage_is_refused(change: dict[str, Any], says: str) -> None:
    document = table_to_json(table(ATTN, MLP))
    with pytest.raises(errors.UsageError, match="this latency table is damaged .*" + says):
        table_from_json({**document, "stages": [{**document["stages"][0], **change}]})
