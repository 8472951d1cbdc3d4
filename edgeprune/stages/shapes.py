"""Shapes: ONNX files of models whose blocks are all alike, for the latency table. Latency depends on shapes alone.

Exporting takes seconds per model. MLP widths differ in nothing but one dimension, so one export with a
marker width, a number that is no other size in the graph, is cut to every width of the grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from edgeprune import vit
from edgeprune.compat import VisionTransformer
from edgeprune.console import Console
from edgeprune.stages import export, simplify
from edgeprune.types import Shape

REMOVED = 0.1  # share of sub-blocks that a random plan leaves out entirely


def shape_models(model: VisionTransformer, grid: tuple[int, ...], folder: Path, console: Console) -> dict[str, Path]:
    """ONNX files of full-depth models whose blocks are all alike: `heads0`.., `neurons0`.., dense excluded."""
    sizes = vit.anatomy(model)
    paths: dict[str, Path] = {}
    with console.progress("shape models", sizes.heads + 1, "exports") as advance:
        for heads in range(sizes.heads):
            paths[f"heads{heads}"] = folder / f"heads{heads}.onnx"
            export_shape(model, ((heads, sizes.neurons),) * sizes.blocks, sizes, paths[f"heads{heads}"])
            advance(1, "")
        for width, path in width_models(model, grid[:-1], folder).items():
            paths[f"neurons{width}"] = path
        advance(1, "")
    return paths


def width_models(model: VisionTransformer, widths: Sequence[int], folder: Path) -> dict[int, Path]:
    """ONNX files of full-depth models with all heads and these MLP widths in every block, by width."""
    sizes = vit.anatomy(model)
    marker = marker_width(sizes)
    paths = {width: folder / f"neurons{width}.onnx" for width in widths}
    for width in (w for w in widths if w == 0 or w > marker):
        export_shape(model, ((sizes.heads, width),) * sizes.blocks, sizes, paths[width])
    marked = folder / "marked.onnx"
    export_shape(model, ((sizes.heads, marker),) * sizes.blocks, sizes, marked)
    for width in (w for w in widths if 0 < w <= marker):
        onnx.save(cut(onnx.load(marked), marker, width), paths[width])
    marked.unlink()
    return paths


def random_shapes(count: int, sizes: vit.Anatomy, widths: Sequence[int], seed: Sequence[int]) -> list[Shape]:
    """`count` plans, from nearly dense to nearly empty: every block has heads and a width of its own."""
    rng = np.random.default_rng(seed)
    plans: list[Shape] = []
    for level in rng.permutation(np.linspace(0.15, 0.95, count)):  # what a plan keeps, on average
        kept_heads = rng.binomial(sizes.heads, level, size=sizes.blocks)
        share = np.clip(rng.normal(level, 0.25, size=sizes.blocks), 0, 1)
        kept_widths = np.asarray(widths)[np.round(share * (len(widths) - 1)).astype(int)]
        kept_heads[rng.random(sizes.blocks) < REMOVED] = 0
        kept_widths[rng.random(sizes.blocks) < REMOVED] = 0
        plans.append(tuple(zip(kept_heads.tolist(), kept_widths.tolist(), strict=True)))
    return plans


def export_shape(model: VisionTransformer, shape: Shape, sizes: vit.Anatomy, path: Path) -> None:
    """Write a simplified ONNX of `model` cut to `shape`."""
    exported = path.with_suffix(".exported")
    export.to_onnx(vit.slice_model(model, vit.plan_of_shape(shape)), sizes.image, exported)
    simplify.simplify(exported, path)
    exported.unlink()


def marker_width(sizes: vit.Anatomy) -> int:
    """The greatest prime below the dense MLP width; no other size of a ViT is a large prime."""
    taken = {sizes.tokens, sizes.tokens - 1, sizes.width, 3 * sizes.width, sizes.num_classes, *sizes.image}
    for number in range(sizes.neurons - 1, 1, -1):
        if number not in taken and all(number % d for d in range(2, int(number**0.5) + 1)):
            return number
    raise ValueError(f"there is no prime below {sizes.neurons}")


def cut(model: onnx.ModelProto, marker: int, width: int) -> onnx.ModelProto:
    """Cut every weight dimension of size `marker` to `width`, which is at most `marker`."""
    if width > marker:
        raise ValueError(f"a model of width {marker} cannot be cut to {width}")
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if marker in values.shape:
            part = values[tuple(slice(width) if size == marker else slice(None) for size in values.shape)]
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(part), tensor.name))
        elif values.dtype == np.int64 and marker in values:
            raise ValueError(f"'{tensor.name}' holds the marker width {marker} as a value")
    del model.graph.value_info[:]
    return model
