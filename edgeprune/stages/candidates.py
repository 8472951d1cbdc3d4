"""Candidates: the models that a latency table is measured on, and the table that their measurements make.

Each is a model whose blocks all have one shape, so that fusion and caches are as in deployment: the first few blocks, or all
of a hierarchy. The table is fitted on plans of all blocks, which differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgeprune import vit
from edgeprune.compat import VisionTransformer
from edgeprune.config import Request
from edgeprune.console import Console
from edgeprune.latency import table
from edgeprune.stages import shapes
from edgeprune.types import PLAIN, Form, LatencyTable, Measurement, Shape, SubBlockKind

FITTING_PLANS = 8
LARGE_FITTING_PLANS = 4  # of a large model, whose exports take long: one of each kind that `shapes.random_shapes` draws
EMPTY, REDUCING, SHALLOW = "empty", "reducing", "shallow"  # the last is the first blocks, all dense


@dataclass
class Candidates:
    """ONNX files by name, and what each is."""

    sizes: vit.Anatomy
    grids: tuple[tuple[int, ...], ...]  # MLP widths per stage
    depth: int  # blocks of the models of few
    entries: Mapping[shapes.Entry, Path]
    patches: tuple[int, ...]  # numbers that plans may leave, ascending, all of them last; () = tokens stay
    files: dict[str, Path] = field(default_factory=dict)
    formed: Mapping[tuple[SubBlockKind, Form], Mapping[int, Path]] = field(default_factory=dict)  # by patches
    plans: dict[str, Shape] = field(default_factory=dict)
    few: set[str] = field(default_factory=set)  # which files are of the first `depth` blocks

    def tabulated(self, found: Mapping[str, Measurement], *, dense_ms: float, runtime: str, precision: str, threads: int) -> LatencyTable:  # fmt: skip
        """The table that measurements of all files make, whose anchor, the dense model, takes `dense_ms`."""
        found, times = self._of_sub_blocks(found), self.sizes.blocks / self.depth
        found |= {name: table.at_depth(found[name], found[SHALLOW], times) for name in self.few}
        return table.build_table(
            [self._stage(i, found) for i in range(len(self.sizes.stages))],
            found[EMPTY],
            {shape: found[name] for name, shape in self.plans.items()},
            dense_ms=dense_ms,
            runtime=runtime,
            precision=precision,
            threads=threads,
            fewer={count: (found[f"tokens{count}.attn"], found[f"tokens{count}.whole"]) for count in self.patches[:-1]},
            fewer_forms={
                at: {count: found[path.stem] for count, path in own.items()} for at, own in self.formed.items()
            },
            reducing=(shapes.reducing_shape(self.sizes), found[REDUCING]) if self.patches else None,
            patches=self.sizes.patches,
        )

    def _of_sub_blocks(self, found: Mapping[str, Measurement]) -> dict[str, Measurement]:
        """The same, models with fewer tokens as if what is no sub-block took what it does with all of them.

        What is saved there (in ONNX Runtime 1 % of DeiT-Ti, as soon as any token is dropped) is saved once, however many blocks
        there are: it is in the price of dropping, not in the sub-blocks' shares.
        """
        saved = {count: found[EMPTY].ratio - found[f"tokens{count}.none"].ratio for count in self.patches[:-1]}
        fewer = {f"tokens{count}.{kind}": ms for count, ms in saved.items() for kind in ("attn", "whole")}
        fewer |= {path.stem: saved[n] for own in self.formed.values() for n, path in own.items() if n in saved}
        more = {name: replace(found[name], ratio=found[name].ratio + ratio) for name, ratio in fewer.items()}
        return {**found, **more}

    def _stage(self, stage: int, found: Mapping[str, Measurement]) -> table.Measured:
        by_kind: dict[SubBlockKind, dict[Form, dict[int, Measurement]]] = {kind: {} for kind in vit.KINDS}
        for one in self.entries:
            if one.stage == stage:
                by_kind[one.kind].setdefault(one.form, {})[one.kept] = found[one.name]
        attn, mlp = by_kind["attn"], by_kind["mlp"]
        plain, own = (attn.pop(PLAIN), mlp.pop(PLAIN)), self.sizes.stages[stage]
        return table.Measured(
            own.blocks, own.heads, own.neurons, *plain, attn, mlp, own.head_dim, self.grids[stage]
        )  # fmt: skip


def make(request: Request, model: VisionTransformer, grids: tuple[tuple[int, ...], ...], out: Path, console: Console) -> Candidates:  # fmt: skip
    """Export all that the table of this dense model is measured on, with the dimensions that the request lets plans have."""
    sizes, few = vit.anatomy(model), shapes.shallow(model)
    large = shapes.is_large(sizes)
    depth, dims = len(few.blocks), vit.choosable(request.dims, sizes)
    if depth < sizes.blocks:
        console.say(
            f"what a sub-block costs is measured in the first {depth} of {sizes.blocks} blocks, and fitted on plans of all"
        )
    entries = shapes.shape_models(few, grids, out, console, large=large)
    entries |= shapes.form_models(few, grids, dims, out, console)
    patches = shapes.patch_counts(sizes) if "tokens" in dims else ()
    made = Candidates(sizes, grids, depth, entries, patches if len(patches) > 1 else ())
    made.files |= {entry.name: path for entry, path in entries.items()}
    if made.patches:
        # With few tokens it is weights that take the time, and those of a few blocks may fit a cache that all do not.
        made.files |= shapes.token_models(few if large else model, patches, out, console)
        made.formed = shapes.token_form_models(few if large else model, patches, dims, out, console)
        made.files |= {path.stem: path for own in made.formed.values() for path in own.values()}
        console.say(f"tokens: {', '.join(map(str, patches))} patches, beside {sizes.prefix} that always stay")
    if depth < sizes.blocks:
        made.few = set(made.files) if large else {entry.name for entry in entries}
    made.plans |= {f"plan{i}": shape for i, shape in enumerate(fitting(sizes, grids, request.seed, patches, dims))}
    whole: dict[str, Shape] = {**made.plans, EMPTY: ((0, 0),) * sizes.blocks}
    if made.patches:
        whole[REDUCING] = shapes.reducing_shape(sizes)
    if depth < sizes.blocks:
        made.files[SHALLOW] = out / f"{SHALLOW}.onnx"
        shapes.export_shape(few, sizes.shape[:depth], vit.anatomy(few), made.files[SHALLOW])
    with console.progress("plans that differ", len(whole), "exports") as advance:
        for name, shape in whole.items():
            made.files[name] = out / f"{name}.onnx"
            shapes.export_shape(model, shape, sizes, made.files[name], request.reducer)
            advance(1, "")
    return made


def fitting(
    sizes: vit.Anatomy, grids: Sequence[Sequence[int]], seed: int, patches: Sequence[int] = (), dims: Sequence[str] = ()
) -> list[Shape]:
    """Plans whose blocks differ, on which the table is fitted; none when there is one block."""
    count = LARGE_FITTING_PLANS if shapes.is_large(sizes) else FITTING_PLANS
    return shapes.random_shapes(count, sizes, grids, (seed, 0), patches, dims) if sizes.blocks > 1 else []
