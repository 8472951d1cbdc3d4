"""python -m pytest tests/latency/test_roofline.py"""

from __future__ import annotations

import json

import pytest

from edgeprune import errors
from edgeprune.latency.roofline import Cost, achieved, attention, ceiling_ms, mlp


def test_costs_counted_by_hand() -> None:
    # 2 tokens, 3 wide, 1 head of 4: qkv 2 x 3 x 12, scores and sum 2 x 2 x 4 each, projection 2 x 4 x 3.
    assert attention(2, 3, 1, 4) == Cost(2 * (72 + 16 + 16 + 24), 4 * (3 * 12 + 12 + 4 * 3 + 3 + 2 * 2 * 3))
    assert mlp(2, 3, 5) == Cost(2 * (30 + 30), 4 * (15 + 5 + 15 + 3 + 2 * 2 * 3))
    assert attention(2, 3, 0, 4) == mlp(2, 3, 0) == Cost(0, 0)


@pytest.mark.parametrize("heads", [0, 1, 3])
@pytest.mark.parametrize("neurons", [0, 8, 768])
def test_flops_are_twice_the_macs_of_a_model(heads: int, neurons: int) -> None:
    vit = pytest.importorskip("edgeprune.vit")
    model = vit.create("vit_tiny_patch16_224", {"depth": 2}, 10)
    sizes = vit.anatomy(model)
    outside = vit.macs(sizes, ((0, 0), (0, 0)))
    blocks = vit.macs(sizes, ((heads, neurons), (0, neurons))) - outside
    kept = (
        attention(sizes.only.tokens, sizes.only.width, heads, sizes.only.head_dim),
        mlp(sizes.only.tokens, sizes.only.width, neurons),
    )
    assert kept[0].flops + 2 * kept[1].flops == 2 * blocks


def test_bytes_are_those_of_the_parameters_and_the_stream() -> None:
    vit = pytest.importorskip("edgeprune.vit")
    model = vit.create("vit_tiny_patch16_224", {"depth": 1}, 10)
    sizes, block = vit.anatomy(model), model.blocks[0]
    stream = 2 * sizes.only.tokens * sizes.only.width
    cost = attention(sizes.only.tokens, sizes.only.width, sizes.only.heads, sizes.only.head_dim)
    assert cost.bytes == 4 * (vit.parameters(block.attn) + stream)
    assert mlp(sizes.only.tokens, sizes.only.width, sizes.only.neurons).bytes == 4 * (
        vit.parameters(block.mlp) + stream
    )


def test_the_ceiling_is_the_slower_of_computing_and_moving() -> None:
    cost = Cost(flops=4_000_000, bytes=1_000_000)
    assert ceiling_ms(cost, gflops=100, gb_per_s=1000) == pytest.approx(0.04)
    assert ceiling_ms(cost, gflops=1e6, gb_per_s=10) == pytest.approx(0.1)


def test_what_was_achieved() -> None:
    cost = Cost(flops=4_000_000, bytes=1_000_000)
    rate = achieved(cost, 0.08, gflops=100, gb_per_s=1000)
    assert rate == pytest.approx(
        {"gflop": 0.004, "gflops": 50, "intensity": 4, "bound": "compute", "share_of_ceiling": 0.5}
    )
    assert achieved(cost, 0.2, gflops=100, gb_per_s=10)["bound"] == "memory"
    assert achieved(cost, 0.2, gflops=100, gb_per_s=10)["share_of_ceiling"] == pytest.approx(0.5)
    removed = achieved(Cost(0, 0), 0.1, gflops=100, gb_per_s=10)
    assert removed["gflops"] == removed["intensity"] == removed["share_of_ceiling"] == 0
    json.dumps([rate, removed], allow_nan=False)


@pytest.mark.parametrize(("ms", "gflops", "gb_per_s"), [(0, 1, 1), (1, 0, 1), (1, 1, -1), (float("nan"), 1, 1)])
def test_what_is_not_positive_is_refused(ms: float, gflops: float, gb_per_s: float) -> None:
    with pytest.raises(errors.UsageError):
        achieved(Cost(1, 1), ms, gflops, gb_per_s)
