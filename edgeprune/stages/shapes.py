"""Shapes: ONNX files of models whose blocks are all alike, or all those of a stage, for the latency table.
Latency depends on shapes alone.

Exporting takes seconds per model. Models that differ in one size are therefore cut from one export whose size is a
marker, a number that is no other size in the graph: MLP widths, heads, tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn

from edgeprune import lowrank, quantisation, structure, vit
from edgeprune.compat import VisionTransformer
from edgeprune.console import Console
from edgeprune.stages import export, simplify
from edgeprune.types import INT8, PLAIN, REDUCER, Form, Shape, SubBlockKind, left

MAX_STAGE_HEADS = 6  # numbers of heads that are measured in each of several stages or of a large model, about
MAX_LARGE_WIDTHS = 8  # MLP widths that are measured of a large model, about; sizes between are interpolated
LARGE_MACS = 8e9  # multiply-adds from which a model is large: each of its shapes takes seconds to make, load and time
SHALLOW = 4  # blocks of the models that are measured: three times the rounds that twelve would leave time for
MOST_DIMENSIONS = 8  # of a shape; longer lists of numbers in a graph are places of tokens
FEWEST_MARKED = 5  # heads of a marker; smaller numbers are axes and the like
INT8_SIZES = 3  # of each kind of sub-block that are measured in int8, at most
RANK_SIZES = 2  # numbers of heads that are measured with each lower rank, at most
FORM_TOKENS = (1, 3)  # which of the lower numbers of patches are measured with int8 and the lowest rank
REMOVED = 0.1  # share of sub-blocks that a random plan leaves out entirely


#: Size in a graph -> which places of a dimension of that size stay.
Kept = Mapping[int, NDArray[np.int64]]


@dataclass(frozen=True)
class Entry:
    """A model of the latency table: all blocks of one stage keep so many units of one kind, all else is dense."""

    stage: int
    kind: SubBlockKind
    kept: int
    form: Form = PLAIN

    @property
    def name(self) -> str:
        where = f"stage{self.stage}." if self.stage else ""
        form = "" if self.form == PLAIN else f".{self.form}"
        return f"{where}{'heads' if self.kind == 'attn' else 'neurons'}{self.kept}{form}"


def is_large(sizes: vit.Anatomy) -> bool:
    """Whether fewer sizes are measured, as each takes long."""
    return vit.macs(sizes, sizes.shape) >= LARGE_MACS


def depth(sizes: vit.Anatomy) -> int:
    """Blocks of the models that are measured: a few where all are of one stage, else all."""
    return min(SHALLOW, sizes.blocks) if len(sizes.stages) == 1 else sizes.blocks


def shallow(model: VisionTransformer) -> VisionTransformer:
    """The model of the first `depth` blocks; the model itself where these are all."""
    sizes = vit.anatomy(model)
    if depth(sizes) == sizes.blocks:
        return model
    few: Any = copy.deepcopy(model)
    few.blocks = few.blocks[: depth(sizes)]
    return few


def head_counts(sizes: vit.Anatomy, stage: int, large: bool) -> tuple[int, ...]:
    """The numbers of heads, fewer than all, that are measured: every one, or about `MAX_STAGE_HEADS`."""
    heads = sizes.stages[stage].heads
    step = -(-heads // MAX_STAGE_HEADS) if len(sizes.stages) > 1 or large else 1
    return tuple(range(0, heads, step))


def measured_widths(grid: Sequence[int], large: bool) -> tuple[int, ...]:
    """The MLP widths of a stage's grid, less than the dense one, that are measured: all, or about `MAX_LARGE_WIDTHS`."""
    step = -(-(len(grid) - 1) // MAX_LARGE_WIDTHS) if large else 1
    return tuple(grid[:-1:step])


def with_stage(sizes: vit.Anatomy, stage: int, row: tuple[int, ...]) -> Shape:
    """The dense shape but for the blocks of one stage, which all have this row."""
    parts = [row if i == stage else (own.heads, own.neurons) for i, own in enumerate(sizes.stages)]
    return tuple(part for part, own in zip(parts, sizes.stages, strict=True) for _ in range(own.blocks))


def shape_models(
    model: VisionTransformer, grids: Sequence[tuple[int, ...]], folder: Path, console: Console, *, large: bool = False
) -> dict[Entry, Path]:
    """ONNX files of models that differ from this one in one stage; grids: MLP widths per stage; large: fewer sizes."""
    sizes = vit.anatomy(model)
    paths: dict[Entry, Path] = {}
    counts = [head_counts(sizes, i, large) for i in range(len(sizes.stages))]
    with console.progress("shape models", sum(map(len, counts)) + len(counts), "exports") as advance:
        for i, grid in enumerate(grids):
            for heads, path in head_models(model, i, counts[i], folder).items():
                paths[Entry(i, "attn", heads)] = path
            advance(len(counts[i]), "")
            for width, path in width_models(model, i, measured_widths(grid, large), folder).items():
                paths[Entry(i, "mlp", width)] = path
            advance(1, "")
    return paths


def form_models(
    model: VisionTransformer, grids: Sequence[tuple[int, ...]], dims: Sequence[str], folder: Path, console: Console
) -> dict[Entry, Path]:
    """ONNX files of models in which every sub-block of one kind in one stage has a form, all else is dense.

    Of a few sizes per kind, as their prices lie on lines.
    """
    sizes = vit.anatomy(model)
    entries: list[Entry] = []
    for i, (grid, stage) in enumerate(zip(grids, sizes.stages, strict=True)):
        heads = range(1, stage.heads + 1)
        for form in forms(dims, stage.head_dim):
            entries += [Entry(i, "attn", n, form) for n in _spread(heads, RANK_SIZES if form.rank else INT8_SIZES)]
        if "precision" in dims:
            entries += [Entry(i, "mlp", n, Form(int8=True)) for n in _spread(grid[1:], INT8_SIZES)]
    alike: dict[Any, list[Entry]] = {}  # those that differ in nothing but the rank
    for one in entries:
        alike.setdefault((one.stage, one.kind, one.kept, one.form.int8, one.form.rank is None), []).append(one)
    paths: dict[Entry, Path] = {}
    with console.progress("int8 and lower ranks", len(entries), "models") as advance:
        for group in alike.values():
            paths |= _of_forms(model, group, folder)
            advance(len(group), "")
    return {entry: paths[entry] for entry in entries}


def _of_forms(model: VisionTransformer, group: Sequence[Entry], folder: Path) -> dict[Entry, Path]:
    """ONNX files of entries that differ in nothing but the rank, cut from one export where that has a marker."""
    sizes, first = vit.anatomy(model), group[0]
    stage = sizes.stages[first.stage]
    paths = {entry: folder / f"{entry.name}.onnx" for entry in group}

    def made(form: Form, path: Path) -> None:
        units = (first.kept, stage.neurons) if first.kind == "attn" else (stage.heads, first.kept)
        export_shape(model, with_stage(sizes, first.stage, _formed(*units, first.kind, form)), sizes, path)

    marker = rank_marker(sizes, first.stage, first.kept, other_sizes(model)) if group[1:] else 0
    if not marker:
        for entry, path in paths.items():
            made(entry.form, path)
        return paths
    marked = folder / "marked.onnx"
    made(Form(first.form.int8, marker), marked)
    for entry, path in paths.items():
        assert entry.form.rank is not None
        onnx.save(cut(onnx.load(marked), kept_ranks(first.kept, marker, entry.form.rank), values=True), path)
    marked.unlink()
    return paths


def rank_marker(sizes: vit.Anatomy, stage: int, heads: int, others: Sequence[int] = ()) -> int:
    """The greatest rank below all dimensions of a head that is no other size in the graph, as what follows from it with
    so many heads; 0 where there is none above the ranks that are offered.
    """
    own = sizes.stages[stage]
    taken = {*range(FEWEST_MARKED), *_other_sizes(sizes, others)}
    taken |= {n for s in sizes.stages for n in (s.neurons, *head_sizes(s, s.heads))}
    taken |= {heads, -(-own.tokens // own.attended) * heads}
    highest = lowrank.ranks(own.head_dim)[:-1][-1:]
    for rank in range(own.head_dim - 1, max(highest, default=own.head_dim), -1):
        if not taken & {rank, heads * rank, 3 * heads * rank}:
            return rank
    return 0


def kept_ranks(heads: int, marker: int, rank: int) -> Kept:
    """What of a model whose heads have `marker` dimensions is one whose heads have the first `rank`."""
    found = {}
    for outer in (1, heads, 3 * heads):
        every = np.arange(outer * marker).reshape(outer, marker)
        found[outer * marker] = every[:, :rank].flatten()
    return found


def forms(dims: Sequence[str], head_dim: int) -> list[Form]:
    """All but the plain one that an attention with heads of so many dimensions may have, where `dims` may be chosen."""
    lower = [None, *(lowrank.ranks(head_dim)[:-1] if "qk" in dims else ())]
    every = [Form(eight, rank) for eight in (False, True)[: 1 + ("precision" in dims)] for rank in lower]
    return [form for form in every if form != PLAIN]


def _formed(heads: int, neurons: int, kind: SubBlockKind, form: Form) -> tuple[int, ...]:
    """A row of a shape whose sub-blocks of one kind have this form."""
    return (heads, neurons, 0, INT8[kind] if form.int8 else 0, form.rank or 0)


def _spread(every: Sequence[int], most: int) -> list[int]:
    """Of sizes, ascending: at most so many, from one of the smaller to the last."""
    return sorted({every[round(share * (len(every) - 1))] for share in np.linspace(0.2, 1.0, most)})


def head_models(model: VisionTransformer, stage: int, counts: Sequence[int], folder: Path) -> dict[int, Path]:
    """ONNX files of models with these numbers of heads in every block of a stage, fewer than all, by number."""
    sizes = vit.anatomy(model)
    neurons = sizes.stages[stage].neurons
    marker = head_marker(sizes, stage, other_sizes(model))
    paths = {heads: folder / f"{Entry(stage, 'attn', heads).name}.onnx" for heads in counts}
    for heads in (h for h in counts if h == 0 or not h < marker):
        export_shape(model, with_stage(sizes, stage, (heads, neurons)), sizes, paths[heads])
    if not any(0 < heads < marker for heads in counts):
        return paths
    marked = folder / "marked.onnx"
    export_shape(model, with_stage(sizes, stage, (marker, neurons)), sizes, marked)
    for heads in (h for h in counts if 0 < h < marker):
        kept = kept_heads(sizes.stages[stage], marker, heads)
        onnx.save(cut(onnx.load(marked), kept, values=True), paths[heads])
    marked.unlink()
    return paths


def head_sizes(stage: vit.Stage, heads: int) -> tuple[int, ...]:
    """The sizes in a graph that follow from the number of heads."""
    inner, windows = heads * stage.head_dim, -(-stage.tokens // stage.attended)
    return heads, inner, 3 * inner, windows * heads


def kept_heads(stage: vit.Stage, marker: int, heads: int) -> Kept:
    """What of a model with `marker` heads is one with the first `heads`: each size that follows from their number."""
    groups = (1, stage.head_dim, 3 * stage.head_dim, head_sizes(stage, 1)[-1])  # numbers per head ...
    outer = (1, 1, 3, groups[-1])  # ... of which so many lie further apart than heads do
    found = {}
    for size, parts in zip(groups, outer, strict=True):
        every = np.arange(marker * size).reshape(parts, marker, size // parts)
        found[marker * size] = every[:, :heads].flatten()
    return found


def head_marker(sizes: vit.Anatomy, stage: int, others: Sequence[int] = ()) -> int:
    """The most heads below all whose sizes are no others in the graph; 0 where there are too few heads to save an export."""
    own = sizes.stages[stage]
    if own.window and own.tokens % own.window:
        return 0  # padded: how many windows there are is not known here
    taken = {*range(FEWEST_MARKED), *_other_sizes(sizes, others)}
    taken |= {
        n for i, s in enumerate(sizes.stages) for n in (s.neurons, *(head_sizes(s, s.heads) if i != stage else ()))
    }
    for heads in range(own.heads - 1, FEWEST_MARKED - 1, -1):
        if not taken & set(head_sizes(own, heads)):
            return heads
    return 0


def width_models(model: VisionTransformer, stage: int, widths: Sequence[int], folder: Path) -> dict[int, Path]:
    """ONNX files of models with all heads and these MLP widths in every block of a stage, by width."""
    sizes = vit.anatomy(model)
    heads = sizes.stages[stage].heads
    marker = (
        0 if sizes.gated or sizes.whole_mlp else marker_width(sizes, stage, other_sizes(model))
    )  # a gated layer has twice the width, and splits it
    paths = {width: folder / f"{Entry(stage, 'mlp', width).name}.onnx" for width in widths}
    for width in (w for w in widths if w == 0 or w > marker):
        export_shape(model, with_stage(sizes, stage, (heads, width)), sizes, paths[width])
    if not marker:
        return paths
    marked = folder / "marked.onnx"
    export_shape(model, with_stage(sizes, stage, (heads, marker)), sizes, marked)
    for width in (w for w in widths if 0 < w <= marker):
        onnx.save(cut(onnx.load(marked), {marker: np.arange(width)}), paths[width])
    marked.unlink()
    return paths


TOKEN_SHARES = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85)  # of all tokens, about; in the last block few are needed
LARGE_TOKEN_SHARES = (0.1, 0.4, 0.7)  # of a large model: each is timed, and judged at every block


def patch_counts(sizes: vit.Anatomy) -> tuple[int, ...]:
    """How many patches a plan may leave, ascending, all of them last; with the prefix they are multiples of 8."""
    shares = LARGE_TOKEN_SHARES if is_large(sizes) else TOKEN_SHARES
    counts = {max(8 * round(share * sizes.only.tokens / 8), 8) - sizes.prefix for share in shares}
    return (*sorted(count for count in counts if 0 < count < sizes.patches), sizes.patches)


class FirstTokens(nn.Module):
    """In the place of timm's patch dropout: a model that never had more tokens than these."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : self.count]


def reducing_shape(sizes: vit.Anatomy) -> Shape:
    """The shape that drops tokens as often as it can, from the first block on."""
    *fewer, _ = patch_counts(sizes)
    dense = (sizes.only.heads, sizes.only.neurons)
    drops: list[tuple[int, ...]] = [(*dense, count) for count in fewer[::-1]]
    return (*drops, *[dense] * sizes.blocks)[: sizes.blocks]


def token_models(model: VisionTransformer, patches: Sequence[int], folder: Path, console: Console) -> dict[str, Path]:
    """ONNX files with fewer patches from the start: `tokens<patches>.attn` without MLPs, `.whole` with all there is, `.none`
    without any sub-block.

    patches: the numbers that plans may leave, ascending, all of them last.
    """
    stage, fewer = vit.anatomy(model).only, patches[:-1]
    paths: dict[str, Path] = {}
    short = copy.deepcopy(model)
    with console.progress("token models", 3 * len(fewer), "models") as advance:
        for name, row in (("none", (0, 0)), ("attn", (stage.heads, 0)), ("whole", (stage.heads, stage.neurons))):
            paths |= {path.stem: path for path in _with_patches(short, row, fewer, name, folder).values()}
            advance(len(fewer), "")
    return paths


def token_form_models(
    model: VisionTransformer, patches: Sequence[int], dims: Sequence[str], folder: Path, console: Console
) -> dict[tuple[SubBlockKind, Form], dict[int, Path]]:
    """ONNX files with some of the numbers of patches from the start, all of them last, `tokens<patches>.<kind>.<form>`:
    every sub-block of the kind int8, or every head of the lowest rank, and none of the other kind.
    """
    stage, fewer = vit.anatomy(model).only, patches[:-1]
    wanted: list[tuple[SubBlockKind, Form]] = []
    if "qk" in dims:
        wanted += [("attn", Form(rank=rank)) for rank in lowrank.ranks(stage.head_dim)[:1] if rank < stage.head_dim]
    if "precision" in dims:
        wanted += [("attn", Form(int8=True)), ("mlp", Form(int8=True))]
    counts = [*(fewer[i] for i in FORM_TOKENS if i < len(fewer)), *patches[-1:]]
    paths: dict[tuple[SubBlockKind, Form], dict[int, Path]] = {}
    short = copy.deepcopy(model)
    with console.progress("token models of forms", len(wanted) * len(counts), "models") as advance:
        for kind, form in wanted if len(counts) > 1 else ():
            units = (stage.heads, 0) if kind == "attn" else (0, stage.neurons)
            paths[kind, form] = _with_patches(short, _formed(*units, kind, form), counts, f"{kind}.{form}", folder)
            advance(len(counts), "")
    return paths


def _with_patches(short: Any, row: tuple[int, ...], counts: Sequence[int], name: str, folder: Path) -> dict[int, Path]:
    """ONNX files `tokens<patches>.<name>` of models whose blocks all have this row and that have so many patches from the
    start, by number; those below a marker are cut from one. `short`: a copy of the model, which is changed.
    """
    sizes = vit.anatomy(short)
    stage = sizes.only
    taken = {stage.neurons, *head_sizes(stage, stage.heads), *_other_sizes(sizes, other_sizes(short))}
    taken |= {n * lower for lower in lowrank.ranks(stage.head_dim) for n in (1, stage.heads, 3 * stage.heads)}
    marker = next((n for n in range(stage.tokens - 1, FEWEST_MARKED, -1) if n not in taken), 0)
    marked = folder / "marked.onnx"

    def made(tokens: int, path: Path) -> None:
        short.patch_drop = FirstTokens(tokens)
        export_shape(short, (row,) * sizes.blocks, sizes, path)

    paths = {patches: folder / f"tokens{patches}.{name}.onnx" for patches in counts}
    for patches, path in paths.items():
        if (tokens := sizes.prefix + patches) > marker:
            made(tokens, path)
            continue
        if not marked.exists():
            made(marker, marked)
        onnx.save(cut(onnx.load(marked), {marker: np.arange(tokens)}, values=True), path)
    marked.unlink(missing_ok=True)
    return paths


def random_shapes(
    count: int,
    sizes: vit.Anatomy,
    grids: Sequence[Sequence[int]],
    seed: Sequence[int],
    patches: Sequence[int] = (),
    dims: Sequence[str] = (),
) -> list[Shape]:
    """`count` plans, from nearly dense to nearly empty: every block has heads and a width of its own, one of its stage's.

    With numbers of patches, ascending, every other plan drops tokens at one or two blocks; of every other pair
    of plans about half of the sub-blocks are int8 and most heads of lower rank, where `dims` have precision and qk.
    """
    heads = [stage.heads for stage in sizes.by_block]
    widths = [grid for grid, stage in zip(grids, sizes.stages, strict=True) for _ in range(stage.blocks)]
    rng = np.random.default_rng(seed)
    plans: list[Shape] = []
    for level in rng.permutation(np.linspace(0.15, 0.95, count)):  # what a plan keeps, on average
        kept_heads = rng.binomial(heads, level)
        share = np.clip(rng.normal(level, 0.25, size=sizes.blocks), 0, 1)
        kept_widths = np.array([own[round(s * (len(own) - 1))] for own, s in zip(widths, share, strict=True)])
        kept_heads[rng.random(sizes.blocks) < REMOVED] = 0
        kept_widths[rng.random(sizes.blocks) < REMOVED] = 0
        rows: list[tuple[int, ...]] = list(zip(kept_heads.tolist(), kept_widths.tolist(), strict=True))
        with_attention = np.flatnonzero(kept_heads)
        if len(patches) > 1 and len(plans) % 2 and len(with_attention):
            drops = min(int(rng.integers(1, 3)), len(patches) - 1, len(with_attention))
            where = np.sort(rng.choice(with_attention, drops, replace=False))
            left = np.sort(rng.choice(np.asarray(patches[:-1]), drops, replace=False))[::-1]
            for i, kept in zip(where.tolist(), left.tolist(), strict=True):
                rows[i] = (*rows[i], kept)
        if len(plans) // 2 % 2:
            rows = [_some_forms(row, stage, rng, dims) for row, stage in zip(rows, sizes.by_block, strict=True)]
        plans.append(tuple(rows))
    return plans


def _some_forms(
    row: tuple[int, ...], stage: vit.Stage, rng: np.random.Generator, dims: Sequence[str]
) -> tuple[int, ...]:
    """The same row of a shape with each sub-block that it keeps int8 or not, by a coin, and its heads of any rank."""
    bits = rank = 0
    if "precision" in dims:
        bits = sum(INT8[kind] for kind, units in zip(vit.KINDS, row, strict=False) if units and rng.random() < 0.5)
    if "qk" in dims and row[0]:
        rank = int(rng.choice([0, *lowrank.ranks(stage.head_dim)[:-1]]))
    return vit.plan_of_shape(((*row[:2], left(row) or 0, bits, rank),)).shape[0]


def export_shape(
    model: VisionTransformer, shape: Shape, sizes: vit.Anatomy, path: Path, reducer: str = REDUCER
) -> None:
    """Write a simplified ONNX of `model` cut to `shape`, whose tokens, if any, go by the reducer."""
    exported, made = path.with_suffix(".exported"), structure.of(model, vit.plan_of_shape(shape, reducer))
    quantisation.pretend(made)
    export.to_onnx(made, sizes.image, exported)
    simplify.simplify(exported, path, made)
    exported.unlink()


def marker_width(sizes: vit.Anatomy, stage: int, others: Sequence[int] = ()) -> int:
    """The greatest prime below a stage's MLP width; no other size of a ViT is a large prime, and it is none of `others`."""
    return _prime_below(sizes.stages[stage].neurons, _other_sizes(sizes, others))


def other_sizes(model: VisionTransformer) -> tuple[int, ...]:
    """Sizes of a graph that how it is deployed brings: of raw images, and of a batch, whole and cut into windows."""
    asked, stages = export.how(model).intake, vit.anatomy(model).stages
    windows = {-(-own.tokens // own.attended) for own in stages}
    return (*(asked.frame or ()), asked.batch, *(asked.batch * count for count in windows))


def _other_sizes(sizes: vit.Anatomy, others: Sequence[int]) -> set[int]:
    """Sizes of a graph besides heads and neurons."""
    taken = {sizes.num_classes, *sizes.image, *others}
    for own in sizes.stages:
        taken |= {own.tokens, own.tokens - sizes.prefix, own.width, 3 * own.width, own.head_dim, own.attended}
    return taken


def _prime_below(number: int, taken: set[int]) -> int:
    for prime in range(number - 1, 1, -1):
        if prime not in taken and all(prime % d for d in range(2, int(prime**0.5) + 1)):
            return prime
    raise ValueError(f"there is no prime below {number}")


def cut(model: onnx.ModelProto, kept: Kept, *, values: bool = False) -> onnx.ModelProto:
    """Cut every weight dimension whose size is a key of `kept`, a marker, to the places that stay.

    With `values`, numbers in constants that may be shapes are replaced likewise; without, they are refused.
    """
    for marker, places in kept.items():
        if len(places) and places.max() >= marker:
            raise ValueError(f"a model of size {marker} cannot be cut to {len(places)}")
    for tensor in model.graph.initializer:
        found = numpy_helper.to_array(tensor)
        if found.dtype != np.int64:
            for axis, size in enumerate(found.shape):
                if size in kept:
                    found = found.take(kept[size], axis)
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(found), tensor.name))
        elif found.size <= MOST_DIMENSIONS and np.isin(found, list(kept)).any():
            if not values:
                raise ValueError(f"'{tensor.name}' holds a marker of {list(kept)} as a value")
            shape = [len(kept[n]) if n in kept else n for n in found.flatten().tolist()]
            tensor.CopyFrom(numpy_helper.from_array(np.array(shape, np.int64).reshape(found.shape), tensor.name))
    del model.graph.value_info[:]
    return model
