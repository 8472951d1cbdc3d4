"""Simplify: the exported graph through onnxsim, which must vouch for the result.

Writes `model.onnx` and `simplify.json` (operators before and after).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import onnx

from edgeprune.config import Request
from edgeprune.console import Console
from edgeprune.errors import EdgepruneError


def run(request: Request, read: Mapping[str, Path], out: Path, console: Console) -> None:
    before, after = simplify(read["export"] / "exported.onnx", out / "model.onnx")
    console.say(f"onnxsim: {sum(before.values())} operators before, {sum(after.values())} after, result checked")
    changed = {op: (before[op], after[op]) for op in sorted({*before, *after}) if before[op] != after[op]}
    for op, (old, new) in changed.items():
        console.detail(f"{op}: {old} -> {new}")
    (out / "simplify.json").write_text(json.dumps({"before": before, "after": after}))


def simplify(source: Path, target: Path) -> tuple[Counter[str], Counter[str]]:
    """Write the simplified graph; returns operator counts before and after.

    Raises EdgepruneError when onnxsim's own comparison of the two graphs fails.
    """
    import onnxsim

    model = onnx.load(source)
    [source_input] = model.graph.input
    shape = [size.dim_value or 2 for size in source_input.type.tensor_type.shape.dim]  # of the images it is compared on
    simplified, ok = onnxsim.simplify(model, test_input_shapes={source_input.name: shape})
    if not ok:
        raise EdgepruneError(f"onnxsim could not confirm that the simplified '{source.name}' computes the same")
    onnx.checker.check_model(simplified)
    onnx.helper.set_model_props(simplified, {one.key: one.value for one in model.metadata_props})
    onnx.save(simplified, target)
    return _operators(model), _operators(simplified)


def _operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)
