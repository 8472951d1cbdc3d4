"""Roofline: what the sub-blocks of a Vision Transformer must compute and move at least, in fp32.

Against a machine's ceilings, FLOP per second and bytes per second, this says how much of a measured time
is inevitable there. A removed sub-block costs nothing but its bias, which is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgeprune import errors

BYTES = 4  # of a float


@dataclass(frozen=True)
class Cost:
    """What one run takes: floating-point operations, and bytes that move at least once."""

    flops: int  # two per multiply-add of matrix products; norms, softmax and GELU are not counted
    bytes: int  # weights and biases, input and output activations; what lies between them may stay in a cache


def attention(tokens: int, width: int, heads: int, head_dim: int, batch: int = 1, window: int = 0) -> Cost:
    """Attention of `heads` heads, `[batch, tokens, width]` -> the same: qkv, scores, weighted sum, projection.

    window: how many tokens attend to each other, 0 = all.
    """
    inner = heads * head_dim
    if not inner:
        return Cost(0, 0)
    projections = 4 * tokens * width * inner  # query, key, value and the output's
    scores = 2 * tokens * (window or tokens) * inner  # and the sum weighted with them
    weights = 4 * width * inner + 3 * inner + width
    return Cost(2 * batch * (projections + scores), BYTES * (weights + 2 * batch * tokens * width))


def mlp(tokens: int, width: int, neurons: int, batch: int = 1) -> Cost:
    """An MLP of `neurons` hidden neurons, `[batch, tokens, width]` -> the same: fc1 and fc2."""
    if not neurons:
        return Cost(0, 0)
    weights = 2 * width * neurons + neurons + width
    return Cost(2 * batch * (2 * tokens * width * neurons), BYTES * (weights + 2 * batch * tokens * width))


def ceiling_ms(cost: Cost, gflops: float, gb_per_s: float) -> float:
    """The least milliseconds that a machine of `gflops` 10^9 FLOP/s and `gb_per_s` 10^9 bytes/s can take.

    Raises UsageError for a ceiling that is not positive.
    """
    return max(_compute_ms(cost, gflops), _memory_ms(cost, gb_per_s))


def achieved(cost: Cost, ms: float, gflops: float, gb_per_s: float) -> dict[str, Any]:
    """What a sub-block that took `ms` made of a machine of `gflops` and `gb_per_s`; JSON types only.

    `gflop` (10^9 operations), `gflops` (10^9 per second), `intensity` (operations per byte),
    `bound` ("compute" or "memory": what sets its ceiling), `share_of_ceiling` (1 = nothing to gain; more means that
    the ceilings were measured under a heavier load). Raises UsageError unless `ms` and the ceilings are positive.
    """
    if not ms > 0:
        raise errors.UsageError(f"a sub-block of {ms:g} ms has no rate; leave it out")
    compute_bound = _compute_ms(cost, gflops) >= _memory_ms(cost, gb_per_s)
    return {
        "gflop": cost.flops / 1e9,
        "gflops": cost.flops / ms / 1e6,
        "intensity": cost.flops / cost.bytes if cost.bytes else 0.0,
        "bound": "compute" if compute_bound else "memory",
        "share_of_ceiling": ceiling_ms(cost, gflops, gb_per_s) / ms,
    }


def _compute_ms(cost: Cost, gflops: float) -> float:
    return cost.flops / _positive(gflops, "GFLOP/s") / 1e6


def _memory_ms(cost: Cost, gb_per_s: float) -> float:
    return cost.bytes / _positive(gb_per_s, "GB/s") / 1e6


def _positive(ceiling: float, unit: str) -> float:
    if not ceiling > 0:
        raise errors.UsageError(f"a ceiling of {ceiling:g} {unit} is not one; measure it again")
    return ceiling
