"""The nouns of edgeprune: frozen dataclasses that import nothing heavier than numpy.

A `Plan` says which heads and neurons of each block are kept. A `Measurement` is a candidate timed
turn by turn with an anchor (the dense model). A `LatencyTable` holds what every sub-block shape
costs on one device, in one runtime, at one precision and thread count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
SubBlockKind = Literal["attn", "mlp"]
#: A sub-block: block index and kind.
SubBlock = tuple[int, SubBlockKind]
#: (low, high) of a layer's inputs.
Range = tuple[float, float]
#: Those of the first and the last layer of sub-blocks.
Ranges = Mapping[SubBlock, tuple[Range, Range]]
Verdict = Literal["pass", "fail", "inconclusive"]
#: How a shape says which sub-blocks of a block are int8: the sum of these.
INT8: dict[SubBlockKind, int] = {"attn": 1, "mlp": 2}
#: Which tokens go on where a plan drops some, unless it says so; one of `edgeprune.reducers`.
REDUCER = "cls"


@dataclass(frozen=True)
class Target:
    """A device class: what its CPU must offer, and how models run on it. One file in `targets/`."""

    name: str
    description: str
    machine: tuple[str, ...]  # accepted values of platform.machine()
    cpu_flags: tuple[str, ...]  # instruction sets the CPU must have, as /proc/cpuinfo names them
    max_isa: str  # the widest instruction set the device has, in oneDNN's names; "" = no cap
    runtimes: tuple[str, ...]  # in order of preference on ties
    precisions: tuple[str, ...]
    threads: int  # 0 = all that this process may use
    neuron_step: int  # MLP widths are multiples of this (SIMD width)
    quantile: str  # the latency quantile that is gated: p50, p90 or p99


@dataclass(frozen=True)
class Form:
    """How a sub-block that stays computes."""

    int8: bool = False
    rank: int | None = None  # of its heads; None: the dimensions that they have

    def __str__(self) -> str:
        """Its name: `plain`, `int8`, `rank16` or `int8.rank16`."""
        return ".".join([*(["int8"] if self.int8 else []), *([f"rank{self.rank}"] if self.rank else [])]) or "plain"

    @classmethod
    def named(cls, name: str) -> Form:
        """The form of this name. Raises ValueError where there is none."""
        ranks = [part[4:] for part in name.split(".") if part.startswith("rank")]
        found = cls("int8" in name.split("."), int(ranks[0]) if ranks else None)
        if str(found) != name or (found.rank or 1) < 1:
            raise ValueError(f"{name!r} is no form of a sub-block")
        return found


PLAIN = Form()


@dataclass(frozen=True)
class BlockPlan:
    """What one block keeps: indices into the dense block's heads and MLP neurons, ascending, and how many patch tokens.

    Tokens go after the attention, before the MLP. Prefix tokens (class, distillation, registers) always stay.
    """

    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    patches: int | None = None  # None: all that came in
    int8: tuple[SubBlockKind, ...] = ()  # whose linear layers are int8, see `edgeprune.quantisation`
    rank: int | None = None  # dimensions of its heads, see `edgeprune.lowrank`; None: those of the dense model

    @property
    def row(self) -> tuple[int, ...]:
        """Its part of the plan's shape."""
        bits = sum(INT8[kind] for kind in self.int8)
        row = (len(self.heads), len(self.neurons), self.patches or 0, bits, self.rank or 0)
        return row[: max([2, *(i + 1 for i, value in enumerate(row) if value)])]


@dataclass(frozen=True)
class Plan:
    """What is kept, block by block. `()` for heads or neurons removes the sub-block but its bias."""

    blocks: tuple[BlockPlan, ...]
    reducer: str = REDUCER  # which patches those are, see `edgeprune.reducers`

    @property
    def shape(self) -> Shape:
        return tuple(block.row for block in self.blocks)

    @property
    def quantised(self) -> bool:
        """Whether any sub-block is int8."""
        return any(block.int8 for block in self.blocks)


#: (heads, neurons, patches that stay, which sub-blocks are int8 as the sum of `INT8`, rank of its heads) of every block:
#: all that latency depends on. From the third on, 0 is as in the dense model; zeros at the end are left out.
Shape = tuple[tuple[int, ...], ...]


def left(row: Sequence[int]) -> int | None:
    """How many patches stay after a block of this row of a shape; None = all that came in."""
    return row[2] or None if len(row) > 2 else None


def rank(row: Sequence[int]) -> int | None:
    """How many dimensions the heads of a block of this row have; None = those of the dense model."""
    return row[4] or None if len(row) > 4 else None


def int8(row: Sequence[int]) -> tuple[SubBlockKind, ...]:
    """Which sub-blocks of a block of this row are int8."""
    return tuple(kind for kind, bit in INT8.items() if len(row) > 3 and row[3] & bit)


@dataclass(frozen=True)
class Quiet:
    """The anchor on the quiet device, and how ratios shift when the device is slower than that.

    A slower device does not slow all models alike: a candidate of ratio r at quiet is at
    r * (1 + slope * (1 - r) * x) when the anchor takes a share x longer (see `statistics.fit_slope`).
    """

    ms: float
    slope: float = 0.5  # where nothing better is known; about what one virtual machine showed in two runtimes

    @classmethod
    def of(cls, profile: Mapping[str, Any], runtime: str) -> Quiet:
        """From a profile document."""
        return cls(profile["anchor_ms"][runtime], profile["anchor"]["slope"])


@dataclass(frozen=True)
class Measurement:
    """A candidate and the anchor, timed in the same rounds in random order.

    Shapes: `samples_ms` and `anchor_ms` are `[rounds that count]`, row i of both from the same part of one round.
    `ratio` is the median of per-round ratios, each as it would be on the quiet device; `ratio_ci` its 95 %
    bootstrap interval, widened by `doubt`: the correction itself. Rounds in which the machine was disturbed do not
    count; where it was never calm, its calmest do and `calm` is False.
    """

    name: str
    samples_ms: FloatArray
    anchor_ms: FloatArray
    ratio: float
    ratio_ci: tuple[float, float]
    raw_ms: FloatArray  # [2, all rounds]: candidate and anchor, in order of time
    waited_ms: FloatArray  # [2, all rounds]: how long their threads waited for a CPU meanwhile
    level_ms: FloatArray  # [all rounds]: the anchor's running median at that time; inf = unknown
    doubt: float = 0.0  # share of the ratio
    calm: bool = True


@dataclass(frozen=True)
class Prices:
    """Milliseconds of one sub-block of each shape, in any of `blocks` blocks in a row whose dense sizes are alike.

    Entry 0 is 0.0: a removed sub-block.
    """

    blocks: int
    attn_ms: FloatArray  # [heads + 1], attn_ms[h]: one attention sub-block with h heads
    mlp_widths: tuple[int, ...]  # ascending, from 0 to the dense width
    mlp_ms: FloatArray  # [len(mlp_widths)]
    attn_forms: Mapping[Form, FloatArray] = field(default_factory=dict)  # as `attn_ms`, of other forms than plain
    mlp_forms: Mapping[Form, FloatArray] = field(default_factory=dict)

    def of(self, kind: SubBlockKind) -> tuple[tuple[int, ...], FloatArray]:
        """How many units a sub-block may keep, ascending, and the milliseconds of each."""
        return (tuple(range(len(self.attn_ms))), self.attn_ms) if kind == "attn" else (self.mlp_widths, self.mlp_ms)

    def forms(self, kind: SubBlockKind) -> Mapping[Form, FloatArray]:
        """The milliseconds of each in every other form that was measured."""
        return self.attn_forms if kind == "attn" else self.mlp_forms

    @property
    def ranks(self) -> tuple[int, ...]:
        """That heads may have, ascending, lower than what they have; () = not measured."""
        return tuple(sorted({form.rank for form in self.attn_forms if form.rank}))

    def ms(self, kind: SubBlockKind, units: int, form: Form) -> float:
        """The price of a sub-block that keeps so many units. Raises ValueError for what was not measured."""
        every, prices = self.of(kind)
        if form != PLAIN:
            if form not in self.forms(kind):
                raise ValueError(f"{kind} in the form {form} was not measured")
            prices = self.forms(kind)[form]
        return float(prices[every.index(units)])


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of every sub-block shape, on one device, runtime, precision and thread count.

    A pruned model's latency is `base_ms` plus, per block, the prices of its attention and its MLP. A plain ViT has
    one stage, a hierarchy such as Swin several. The dense and the empty model are not predicted: they were measured.
    With fewer patch tokens, a sub-block costs a share of that, and where they go another `reduce_ms`.
    """

    runtime: str
    precision: str
    threads: int
    base_ms: float  # stem, head, norms and biases that always stay; also what blocks unlike each other cost more
    stages: tuple[Prices, ...]
    dense_ms: float  # the anchor's latency on this device
    empty_ms: float  # with every sub-block removed: the least there is
    samples: int  # rounds behind each entry
    repaired: tuple[str, ...] = ()  # entries made monotone by isotonic regression, in words
    fit: Mapping[str, float] = field(default_factory=dict)  # how sums of prices became latencies of whole plans
    patches: tuple[int, ...] = ()  # ascending to all there are; () = tokens were not measured
    attn_share: FloatArray = field(default_factory=lambda: np.ones(1))  # [len(patches)] of attn_ms, the last 1
    mlp_share: FloatArray = field(default_factory=lambda: np.ones(1))  # [len(patches)] of mlp_ms, the last 1
    attn_form_share: Mapping[Form, FloatArray] = field(default_factory=dict)  # as `attn_share`, of other forms
    mlp_form_share: Mapping[Form, FloatArray] = field(default_factory=dict)
    reduce_ms: float = 0.0

    @property
    def by_block(self) -> tuple[Prices, ...]:
        """The prices of every block."""
        return tuple(own for own in self.stages for _ in range(own.blocks))

    @property
    def int8(self) -> bool:
        """Whether int8 sub-blocks were measured."""
        return all(Form(int8=True) in own.forms(kind) for own in self.stages for kind in INT8)

    def form_share(self, kind: SubBlockKind, form: Form, stage: int | None = None) -> float:
        """Of the milliseconds of all dense sub-blocks of a kind (in one stage), what they take in a form.

        1 where they take none that could be measured.
        """
        stages = self.stages if stage is None else self.stages[stage : stage + 1]
        formed = sum(float(own.blocks * own.forms(kind)[form][-1]) for own in stages)
        plain = sum(float(own.blocks * own.of(kind)[1][-1]) for own in stages)
        return formed / plain if plain > 0 else 1.0

    @property
    def ranked(self) -> bool:
        """Whether attentions of lower rank were measured."""
        return any(own.ranks for own in self.stages)

    def share(self, kind: SubBlockKind, form: Form = PLAIN) -> FloatArray:
        """`[len(patches)]`: of the price of such a sub-block, with so many patches; the plain one's where it has none."""
        plain, others = (
            (self.attn_share, self.attn_form_share) if kind == "attn" else (self.mlp_share, self.mlp_form_share)
        )
        return others.get(form, plain)

    def priced(self, dims: Sequence[str]) -> tuple[str, ...]:
        """Of what a plan may choose, what this table has prices of."""
        without = {"tokens": len(self.patches) < 2, "qk": not self.ranked, "precision": not self.int8}
        return tuple(dim for dim in dims if not without.get(dim))

    @property
    def dense(self) -> Shape:
        return tuple((len(own.attn_ms) - 1, own.mlp_widths[-1]) for own in self.by_block)

    def predict_ms(self, shape: Shape) -> float:
        """Latency in milliseconds of a model of this shape."""
        if tuple(shape) == self.dense:
            return self.dense_ms
        if set(shape) == {(0, 0)}:
            return self.empty_ms
        total, level = self.base_ms, -1
        for row, own in zip(shape, self.by_block):  # Python 3.9 on devices has no strict=
            quantised, patches = int8(row), left(row)
            form = Form("attn" in quantised, rank(row))
            total += own.ms("attn", row[0], form) * self.share("attn", form)[level]
            if patches is not None:
                level = self.patches.index(patches)
                total += self.reduce_ms
            form = Form("mlp" in quantised)
            total += own.ms("mlp", row[1], form) * self.share("mlp", form)[level]
        return float(total)


@dataclass(frozen=True)
class Check:
    """One gate: a value, its limit and the verdict, with the reason in words."""

    name: str
    value: float | None  # None when it could not be measured
    limit: float
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class Levels:
    """One sub-block's pruning levels: level k removes the first k units of `order`.

    `errors[k]` is the error of level k (errors[0] == 0), non-decreasing, comparable across
    sub-blocks. Units are heads (attn) or neurons (mlp).
    """

    block: int
    kind: SubBlockKind
    order: NDArray[np.int64]  # [units]
    errors: FloatArray  # [units + 1]

    @property
    def at(self) -> SubBlock:
        return self.block, self.kind

    def kept(self, count: int) -> tuple[int, ...]:
        """The units that survive when `count` are kept, ascending."""
        return tuple(sorted(int(u) for u in self.order[len(self.order) - count :]))


@dataclass(frozen=True)
class Latency:
    """A requested latency as the user wrote it: milliseconds, or a fraction of the dense latency."""

    text: str
    ms: float | None = None
    fraction: float | None = None

    def limit_ms(self, dense_ms: float) -> float:
        """The limit in milliseconds for a dense model that takes `dense_ms`."""
        return self.ms if self.ms is not None else float(self.fraction or 0) * dense_ms


def to_json(value: Any) -> Any:
    """Dataclasses, arrays and tuples as what `json` can write."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: to_json(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_json(v) for v in value]
    return value
