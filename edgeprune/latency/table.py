"""The latency table: what one sub-block of each shape costs, from measurements of whole models.

Most measured candidates are the model's first blocks (see `at_depth`; all of them in a hierarchy), where all blocks of one
stage have one shape. Differences between candidates, divided by the number of blocks, are the price of a sub-block. What
such prices miss, e.g. that kernels for many shapes evict each other, or that more blocks fit into no cache, is fitted on
some plans at full depth whose blocks all differ. Numpy only; how the candidates were made is
not known here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from edgeprune import errors
from edgeprune.types import (
    PLAIN,
    FloatArray,
    Form,
    LatencyTable,
    Measurement,
    Prices,
    Shape,
    SubBlockKind,
    left,
    to_json,
)

MOST_BLOCKS = 512
SURPLUS_PLANS = 6  # from which a third number is fitted: with four, noise would decide what forms cost
SHARES = ("attn_share", "mlp_share")
FORM_SHARES = ("attn_form_share", "mlp_form_share")
TOKENS = {"patches", *SHARES, *FORM_SHARES, "reduce_ms"}  # fields that a table without tokens may leave out
FORMS = ("attn_forms", "mlp_forms")  # and those of a stage without int8 or lower ranks


@dataclass(frozen=True)
class Measured:
    """What was measured of one stage, whose blocks all had one shape, beside the dense others; and its dense sizes.

    attn: by heads kept, fewer than all, 0 among them, with the dense MLP; heads between are interpolated.
    mlp: by neurons kept, 0 and more, with all heads; widths: those that the table shall have, () = the measured ones.
    """

    blocks: int
    heads: int
    neurons: int
    attn: Mapping[int, Measurement]
    mlp: Mapping[int, Measurement]
    attn_forms: Mapping[Form, Mapping[int, Measurement]] = field(
        default_factory=dict
    )  # some sizes, the dense among them
    mlp_forms: Mapping[Form, Mapping[int, Measurement]] = field(default_factory=dict)
    head_dim: int = 0
    widths: tuple[int, ...] = ()


def build_table(
    stages: Sequence[Measured],
    empty: Measurement,
    plans: Mapping[Shape, Measurement],
    *,
    dense_ms: float,
    runtime: str,
    precision: str,
    threads: int,
    fewer: Mapping[int, tuple[Measurement, Measurement]] | None = None,
    fewer_forms: Mapping[tuple[SubBlockKind, Form], Mapping[int, Measurement]] | None = None,
    reducing: tuple[Shape, Measurement] | None = None,
    patches: int = 0,
) -> LatencyTable:
    """Turn measurements of uniform models into a table.

    empty: every sub-block removed. plans: by shape, some whose blocks differ; {} = sums of prices are taken as they are.
    The anchor of every measurement is the dense model; it need not be among them: its ratio is 1.
    dense_ms: the anchor's latency on this device. A dense shape is predicted as exactly that.
    fewer: by patch tokens, fewer than the `patches` of the model: all attention and no MLP, and the whole model;
    fewer_forms: all attention or all MLPs alone, in int8 or of the lowest rank, by some numbers, `patches` among them.
    reducing: a shape that drops tokens once per number of patches, from which the price of dropping is taken.
    Raises UsageError when an entry is missing.
    """
    repaired: list[str] = []
    priced = tuple(
        _stage(own, dense_ms, f" in stage {i}" if len(stages) > 1 else "", repaired) for i, own in enumerate(stages)
    )
    parts = [
        m
        for own in stages
        for kind in (own.attn, own.mlp, *own.attn_forms.values(), *own.mlp_forms.values())
        for m in kind.values()
    ]
    prices = LatencyTable(
        runtime=runtime,
        precision=precision,
        threads=threads,
        base_ms=float(dense_ms - sum(own.blocks * (own.attn_ms[-1] + own.mlp_ms[-1]) for own in priced)),
        stages=priced,
        dense_ms=float(dense_ms),
        empty_ms=float(empty.ratio * dense_ms),
        samples=min(len(m.samples_ms) for m in [*parts, *plans.values()]),
        repaired=tuple(repaired),
    )

    def with_tokens(prices: LatencyTable) -> LatencyTable:
        if not fewer:
            return prices
        prices = _with_tokens(prices, fewer, stages[0].mlp[0], empty, patches)
        prices = _with_form_shares(prices, fewer_forms or {}, empty, stages[0].head_dim)
        return _with_drops(prices, *reducing) if reducing else prices

    # What always stays is another after the fit, and so is what models with fewer tokens leave for their sub-blocks.
    plans_ms = {shape: measurement.ratio * dense_ms for shape, measurement in plans.items()}
    return with_tokens(fitted(with_tokens(prices), plans_ms))


def at_depth(measurement: Measurement, dense: Measurement, times: float) -> Measurement:
    """What a model of a few blocks says of one with `times` as many; dense: the model of as many dense blocks.

    What a change of those blocks saves is saved `times` over; the anchor is the dense model of all blocks. The interval
    stays that of the few.
    """
    return replace(measurement, ratio=1 + times * (measurement.ratio - dense.ratio))


def _stage(own: Measured, dense_ms: float, where: str, repaired: list[str]) -> Prices:
    """Appends to `repaired`. Raises UsageError."""
    if 0 not in own.attn or 0 not in own.mlp:
        what = "the MLP with 0 neurons" if 0 in own.attn else "attention with 0 heads"
        raise errors.UsageError(f"a latency table needs every entry; {what}{where} was not measured: profile again")
    words = (f"attention with {{}} heads{where}", f"MLP with {{}} neurons{where}")
    counts, attn_ms = _prices(own.attn, own.heads, own.blocks, dense_ms, words[0], repaired)
    widths, mlp_ms = _prices(own.mlp, own.neurons, own.blocks, dense_ms, words[1], repaired)
    if counts[-1] != own.heads or widths[-1] != own.neurons:
        raise errors.UsageError(
            f"heads {counts} or MLP widths {widths}{where} exceed the dense {own.heads} and {own.neurons}"
        )
    every, grid = tuple(range(own.heads + 1)), own.widths or widths
    attn_ms, mlp_ms = np.interp(every, counts, attn_ms), np.interp(grid, widths, mlp_ms)

    def of_form(
        measured: Mapping[int, Measurement], none: Measurement, sizes: Sequence[int], plain: FloatArray
    ) -> FloatArray:
        ms = {size: max((one.ratio - none.ratio) * dense_ms / own.blocks, 0.0) for size, one in measured.items()}
        return _on_lines(ms, sizes, plain)

    attn_forms = {form: of_form(some, own.attn[0], every, attn_ms) for form, some in own.attn_forms.items()}
    mlp_forms = {form: of_form(some, own.mlp[0], grid, mlp_ms) for form, some in own.mlp_forms.items()}
    return Prices(own.blocks, attn_ms, grid, mlp_ms, attn_forms, mlp_forms)


def _on_lines(measured: Mapping[int, float], sizes: Sequence[int], plain: FloatArray) -> FloatArray:
    """Milliseconds of a sub-block of a form, of each of `sizes`, from those of some; from one, in proportion to the plain."""
    counts = sorted(measured)
    ms = isotonic([0.0, *(measured[n] for n in counts)])
    if len(counts) == 1:
        return np.asarray(ms[1] * plain / max(plain[sizes.index(counts[0])], 1e-12))
    # Rounding inputs costs the same at every size: the line between the two smallest goes on below them, not to zero.
    found = np.interp(sizes, counts, ms[1:])
    slope, below = (ms[2] - ms[1]) / (counts[1] - counts[0]), np.asarray(sizes) < counts[0]
    found[below] = np.maximum(ms[1] + slope * (np.asarray(sizes)[below] - counts[0]), 0.0)
    found[0] = 0.0
    return isotonic(found)


def _with_tokens(
    prices: LatencyTable,
    fewer: Mapping[int, tuple[Measurement, Measurement]],
    no_mlp: Measurement,
    empty: Measurement,
    patches: int,
) -> LatencyTable:
    """Shares of what a sub-block costs with all tokens: of attention by what all of it alone costs with fewer, of MLPs so
    that the whole model with fewer is predicted as it was measured.
    """
    counts, (own,) = sorted(fewer), prices.stages
    attn, mlp = (own.blocks * ms[-1] for ms in (own.attn_ms, own.mlp_ms))
    ratios = [(fewer[count][0].ratio - empty.ratio) / (no_mlp.ratio - empty.ratio) for count in counts]
    attn_share = isotonic(np.clip([*ratios, 1.0], 0.0, 1.0))
    left_ms = [fewer[count][1].ratio * prices.dense_ms - prices.base_ms for count in counts]
    shares = [(ms - share * attn) / max(mlp, 1e-12) for ms, share in zip(left_ms, attn_share)]
    return replace(
        prices, patches=(*counts, patches), attn_share=attn_share,
        mlp_share=isotonic(np.clip([*shares, 1.0], 0.0, 1.0)),
    )  # fmt: skip


def _with_drops(prices: LatencyTable, shape: Shape, measured: Measurement) -> LatencyTable:
    """The price of dropping tokens, zero or more, so that a shape that drops some is predicted as it was measured."""
    prices = replace(prices, reduce_ms=0.0)
    extra = measured.ratio * prices.dense_ms - prices.predict_ms(shape)
    return replace(prices, reduce_ms=max(float(extra) / sum(left(row) is not None for row in shape), 0.0))


def _with_form_shares(
    prices: LatencyTable,
    fewer: Mapping[tuple[SubBlockKind, Form], Mapping[int, Measurement]],
    empty: Measurement,
    head_dim: int,
) -> LatencyTable:
    """The same with the shares of other forms.

    Few are measured, at few numbers of patches: what they say is by how much the share of a form is above or below the
    plain one. That of ranks is taken to go along a line to the lowest, and int8 with a rank to have both factors.
    """
    factors: dict[tuple[SubBlockKind, Form], FloatArray] = {}
    for (kind, form), own in fewer.items():
        counts, whole = sorted(own), own[prices.patches[-1]].ratio - empty.ratio
        plain = np.interp(counts, prices.patches, prices.share(kind))
        found = [(own[count].ratio - empty.ratio) / whole for count in counts]
        factors[kind, form] = np.interp(prices.patches, counts, found / np.maximum(plain, 1e-9))
    lowest = min((form.rank for _, form in factors if form.rank), default=0)

    def share(kind: SubBlockKind, form: Form) -> FloatArray:
        factor = factors.get((kind, Form(int8=True)), 1.0) if form.int8 else 1.0
        if form.rank and lowest:
            way = (head_dim - form.rank) / (head_dim - lowest)
            factor = factor * (1 + way * (factors[kind, Form(rank=lowest)] - 1))
        found: FloatArray = np.append((prices.share(kind) * factor)[:-1], 1.0)
        return isotonic(np.clip(found, 0.0, 1.0))

    (stage,) = prices.stages
    return replace(
        prices,
        attn_form_share={form: share("attn", form) for form in stage.attn_forms},
        mlp_form_share={form: share("mlp", form) for form in stage.mlp_forms},
    )


def fitted(prices: LatencyTable, plans: Mapping[Shape, float]) -> LatencyTable:
    """The table scaled and shifted so that its predictions of `plans` (milliseconds by shape) err least, relatively.

    Least squares of relative errors; with fewer than 3 plans only shifted, with none unchanged. Where some of
    `SURPLUS_PLANS` or more have int8 sub-blocks or lower ranks, each such sub-block also costs a surplus, zero or more:
    prices of forms come from models of one form, and kernels of several evict each other.
    """
    if not plans:
        return prices
    summed = np.array([prices.predict_ms(shape) for shape in plans])
    found = np.array(list(plans.values()))
    dearer = _scaled(prices, 0.0, 1.0, 1.0)
    formed = np.array([dearer.predict_ms(shape) for shape in plans]) - summed
    shift, scale, surplus = float(np.mean(found - summed)), 1.0, 0.0
    if len(plans) >= 3:
        shift, scale = _least_squares([np.ones_like(summed), summed], found)
    if len(plans) >= SURPLUS_PLANS and formed.any():
        dearest = _least_squares([np.ones_like(summed), summed, formed], found)
        if dearest[-1] >= 0:
            shift, scale, surplus = dearest
    before, after = summed / found - 1, (shift + scale * summed + surplus * formed) / found - 1
    return replace(
        _scaled(prices, shift, scale, surplus),
        fit={
            "plans": len(plans), "shift_ms": shift, "scale": scale, "surplus_ms": surplus,
            "median_error_before": float(np.median(np.abs(before))), "median_error": float(np.median(np.abs(after))),
        },
    )  # fmt: skip


def _least_squares(columns: Sequence[FloatArray], found: FloatArray) -> list[float]:
    """What of each column, summed, is nearest to 1 in proportion to `found`."""
    weights: list[float] = np.linalg.lstsq(np.stack(columns, axis=1) / found[:, None], np.ones_like(found), rcond=None)[
        0
    ].tolist()
    return weights


def _scaled(prices: LatencyTable, shift: float, scale: float, surplus: float) -> LatencyTable:
    """All prices times `scale`, what always stays plus `shift`, each sub-block of a form plus `surplus`, all in milliseconds."""

    def dearer(forms: Mapping[Form, FloatArray]) -> dict[Form, FloatArray]:
        return {form: scale * ms + surplus * (np.arange(len(ms)) > 0) for form, ms in forms.items()}

    stages = tuple(
        replace(own, attn_ms=scale * own.attn_ms, mlp_ms=scale * own.mlp_ms,
                attn_forms=dearer(own.attn_forms), mlp_forms=dearer(own.mlp_forms)) for own in prices.stages
    )  # fmt: skip
    return replace(prices, base_ms=shift + scale * prices.base_ms, stages=stages, reduce_ms=scale * prices.reduce_ms)


def _prices(
    measured: Mapping[int, Measurement],
    dense: int,
    blocks: int,
    dense_ms: float,
    words: str,
    repaired: list[str],
) -> tuple[tuple[int, ...], FloatArray]:
    """Sizes, ascending, and the milliseconds of one sub-block of each; entry 0 is 0. Appends to `repaired`."""
    ratios = {size: measurement.ratio for size, measurement in measured.items()} | {dense: 1.0}
    sizes = tuple(sorted(ratios))
    raw = np.array([ratios[size] for size in sizes]) * dense_ms / blocks
    # A larger sub-block that times faster is noise, or a lucky width that a solver can have at the price
    # of the smaller one: pooling gives both the same price.
    monotone = isotonic(raw)
    for size, before, after in zip(sizes, raw - raw[0], monotone - monotone[0], strict=True):
        if not np.isclose(before, after, rtol=0, atol=1e-9):
            repaired.append(f"{words.format(size)}: {before:.4f} ms became {after:.4f} ms per block")
    return sizes, monotone - monotone[0]


def isotonic(values: ArrayLike) -> FloatArray:
    """The closest non-decreasing sequence in least squares (pool adjacent violators). `[n]` -> `[n]`."""
    means: list[float] = []
    counts: list[int] = []
    for value in np.asarray(values, dtype=np.float64):
        means.append(float(value))
        counts.append(1)
        while len(means) > 1 and means[-2] > means[-1]:
            mean, count = means.pop(), counts.pop()
            total = counts[-1] + count
            means[-1] = (means[-1] * counts[-1] + mean * count) / total
            counts[-1] = total
    return np.repeat(means, counts)


def _check_tokens(table: LatencyTable) -> None:
    if not all(type(count) is int and count > 0 for count in table.patches):
        raise ValueError("numbers of patches must be whole and above zero")
    if list(table.patches) != sorted(set(table.patches)):
        raise ValueError("numbers of patches must ascend")
    named = {"attn_share": table.attn_share, "mlp_share": table.mlp_share}
    for name in FORM_SHARES:
        named |= {f"{name} of {form}": shares for form, shares in getattr(table, name).items()}
    for name, shares in named.items():
        if shares.shape != (len(table.patches),) or not ((shares >= 0) & (shares <= 1)).all() or shares[-1] != 1:
            raise ValueError(f"{name} must have a share from 0 to 1 for every number of patches, and end with 1")
        if (np.diff(shares) < 0).any():
            raise ValueError(f"{name} must ascend")
    if not 0 <= float(table.reduce_ms) < float("inf"):
        raise ValueError("reduce_ms must not be below zero")


def table_to_json(table: LatencyTable) -> dict[str, Any]:
    """The table as what `json` can write."""
    document: dict[str, Any] = to_json(table)
    return document


def table_from_json(document: Mapping[str, Any]) -> LatencyTable:
    """The table that `table_to_json` wrote. Raises UsageError for a document that is not one."""
    fields = set(LatencyTable.__dataclass_fields__)
    if wrong := sorted((fields ^ set(document)) - TOKENS):
        raise errors.UsageError(f"this is not a latency table (missing or unknown: {', '.join(wrong)}); profile again")
    try:
        table = _read(document)
    except (TypeError, ValueError, OverflowError) as error:
        raise errors.UsageError(f"this latency table is damaged ({error}); profile again") from error
    return table


def _read(document: Mapping[str, Any]) -> LatencyTable:
    """Raises TypeError or ValueError for values that no table has."""
    table = LatencyTable(
        **{
            **document,
            "stages": tuple(_read_stage(own) for own in document["stages"]),
            "repaired": tuple(document["repaired"]),
            **{key: np.array(document[key], dtype=np.float64) for key in SHARES if key in document},
            **{key: _read_forms(document.get(key, {})) for key in FORM_SHARES},
            "patches": tuple(document.get("patches", ())),
        }
    )
    if (
        table.patches
        or any(getattr(table, key) for key in FORM_SHARES)
        or any(len(getattr(table, key)) != 1 for key in SHARES)
    ):
        _check_tokens(table)
    if not table.stages:
        raise ValueError("it has no stages")
    for name in ("dense_ms", "empty_ms"):
        if not 0 < float(getattr(table, name)) < float("inf"):
            raise ValueError(f"{name} must be above zero and finite")
    if not isinstance(table.runtime, str) or not isinstance(table.precision, str):
        raise ValueError("runtime and precision must be texts")
    if not np.isfinite(float(table.base_ms)):
        raise ValueError("base_ms must be finite")
    if type(table.threads) is not int or table.threads < 1:
        raise ValueError("threads must be a whole number of at least 1")
    return table


def _read_stage(document: Mapping[str, Any]) -> Prices:
    """Raises TypeError or ValueError for values that no table has."""
    fields = set(Prices.__dataclass_fields__)
    if not isinstance(document, Mapping) or (fields ^ set(document)) - set(FORMS):
        raise ValueError(f"a stage must have {', '.join(Prices.__dataclass_fields__)}")
    own = Prices(
        **{
            **document,
            **{name: np.array(document[name], dtype=np.float64) for name in ("attn_ms", "mlp_ms")},
            **{name: _read_forms(document.get(name, {})) for name in FORMS},
            "mlp_widths": tuple(document["mlp_widths"]),
        }
    )
    if type(own.blocks) is not int or not 1 <= own.blocks <= MOST_BLOCKS:
        raise ValueError(f"blocks must be a whole number from 1 to {MOST_BLOCKS}")
    if len(own.mlp_widths) != len(own.mlp_ms):
        raise ValueError("more or fewer MLP prices than widths")
    if not all(type(width) is int for width in own.mlp_widths) or own.mlp_widths[:1] != (0,):
        raise ValueError("the MLP widths must be whole numbers from 0")
    if list(own.mlp_widths) != sorted(set(own.mlp_widths)):
        raise ValueError("the MLP widths must ascend")
    named = {"attn_ms": own.attn_ms, "mlp_ms": own.mlp_ms}
    for name, like in zip(FORMS, (own.attn_ms, own.mlp_ms)):
        named |= {f"{name} of {form}": ms for form, ms in getattr(own, name).items()}
        if any(len(ms) != len(like) for ms in getattr(own, name).values()):
            raise ValueError(f"{name} have more or fewer prices than {name.replace('_forms', '_ms')}")
    for name, ms in named.items():
        if ms.ndim != 1 or len(ms) < 2 or not np.isfinite(ms).all() or (np.diff(ms) < 0).any() or ms[0] != 0:
            raise ValueError(f"{name} must be finite, ascend and begin with 0")
    return own


def _read_forms(document: Any) -> dict[Form, FloatArray]:
    """By form, what is written by the forms' names. Raises TypeError or ValueError."""
    if not isinstance(document, Mapping):
        raise ValueError("forms must be a table")
    found = {Form.named(name): np.array(values, dtype=np.float64) for name, values in document.items()}
    if PLAIN in found:
        raise ValueError("forms must be others than plain")
    return found
