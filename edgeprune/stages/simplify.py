"""Simplify: the exported graph through onnxsim, and what comes out is compared with torch once more.

Writes `model.onnx` and `simplify.json` (operators before and after, greatest difference, top-1 agreement).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import onnx
from torch import nn

from edgeprune import quantisation
from edgeprune.config import Request
from edgeprune.console import Console
from edgeprune.stages import export


def run(request: Request, read: Mapping[str, Path], out: Path, console: Console) -> None:
    dense, model = export.deployable(request, read)
    before, after = simplify(read["export"] / "exported.onnx", out / "model.onnx", model)
    facts = export.compare(model, out / "model.onnx", *export.check_images(dense, export.CHECK_IMAGES))
    console.say(f"onnxsim: {sum(before.values())} operators before, {sum(after.values())} after; {export.words(facts)}")
    changed = {op: (before[op], after[op]) for op in sorted({*before, *after}) if before[op] != after[op]}
    for op, (old, new) in changed.items():
        console.detail(f"{op}: {old} -> {new}")
    (out / "simplify.json").write_text(json.dumps({"before": before, "after": after, **facts}))


def simplify(source: Path, target: Path, model: nn.Module | None = None) -> tuple[Counter[str], Counter[str]]:
    """Write the simplified graph, in which the int8 layers of `model`, of which it is, become int8.

    Returns operator counts before and after. What the graph computes is not looked at.
    """
    import onnxsim

    exported = onnx.load(source)
    [source_input] = exported.graph.input
    shape = [size.dim_value or 2 for size in source_input.type.tensor_type.shape.dim]  # of the images it is compared on
    simplified, _ = onnxsim.simplify(exported, test_input_shapes={source_input.name: shape})
    if model is not None:
        quantisation.insert(simplified, model)
    onnx.checker.check_model(simplified)
    onnx.helper.set_model_props(simplified, {one.key: one.value for one in exported.metadata_props})
    onnx.save(simplified, target)
    return _operators(exported), _operators(simplified)


def _operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)
