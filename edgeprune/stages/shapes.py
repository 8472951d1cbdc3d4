"""Shapes: ONNX files of models whose blocks are all alike, for the latency table. Latency depends on shapes alone.

Exporting takes seconds per model. MLP widths differ in nothing but one dimension, so one export with a
marker width, a number that is no other size in the graph, is cut to every width of the grid.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from edgeprune import vit
from edgeprune.compat import VisionTransformer
from edgeprune.console import Console
from edgeprune.stages import export, simplify


def shape_models(model: VisionTransformer, grid: tuple[int, ...], folder: Path, console: Console) -> dict[str, Path]:
    """ONNX files of full-depth models whose blocks are all alike: `heads0`.., `neurons0`.., dense excluded.

    Exporting takes seconds per model. MLP widths differ in nothing but one dimension, so one export with
    a marker width, a number that is no other size in the graph, is cut to every width of the grid.
    """
    sizes = vit.anatomy(model)
    paths: dict[str, Path] = {}
    shapes = {f"heads{h}": (h, sizes.neurons) for h in range(sizes.heads)}
    marker = marker_width(sizes)
    shapes.update({f"neurons{w}": (sizes.heads, w) for w in grid[:-1] if w == 0 or w > marker})
    with console.progress("shape models", len(shapes) + 1, "exports") as advance:
        for name, shape in shapes.items():
            paths[name] = folder / f"{name}.onnx"
            _export(model, shape, sizes, paths[name])
            advance(1, "")
        marked = folder / "marked.onnx"
        _export(model, (sizes.heads, marker), sizes, marked)
        advance(1, "")
    for width in (w for w in grid[1:-1] if w <= marker):
        paths[f"neurons{width}"] = folder / f"neurons{width}.onnx"
        onnx.save(cut(onnx.load(marked), marker, width), paths[f"neurons{width}"])
    marked.unlink()
    return paths


def _export(model: VisionTransformer, shape: tuple[int, int], sizes: vit.Anatomy, path: Path) -> None:
    exported = path.with_suffix(".exported")
    export.to_onnx(vit.slice_model(model, vit.plan_of_shape((shape,) * sizes.blocks)), sizes.image, exported)
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
