"""Folding: the preprocessing as a part of an ONNX graph, which then takes raw uint8 images of one size.

What PIL and timm do to such an image (resize, centre crop, normalise) becomes two products with constants and a
multiply-add (`resampling`); a value may be one level of 255 off where PIL's fixed-point sums round the other way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeprune import images, resampling
from edgeprune.errors import EdgepruneError

PREFIX = "preprocessing."
OPSET, IR_VERSION = 20, 10
MOST_LEVELS = 1.01


def fold(model: onnx.ModelProto, frame: tuple[int, int], config: Mapping[str, Any]) -> None:
    """Change a model of one input `[batch, channels, height, width]` to take `[batch, *frame, channels]` uint8, in place.

    config: the preprocessing, as in the manifest.
    """
    [source] = model.graph.input
    first, *_ = source.type.tensor_type.shape.dim
    channels, *crop = (int(size) for size in config["input_size"])
    name, wanted = source.name, f"{PREFIX}pixels"
    for node in model.graph.node:
        for i, own in enumerate(node.input):
            if own == name:
                node.input[i] = wanted
    constants: dict[str, NDArray[Any]] = {}
    nodes = _nodes(name, wanted, frame, (crop[0], crop[1]), config, constants)
    batch: Any = first.dim_param or first.dim_value
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info(name, TensorProto.UINT8, [batch, *frame, channels]))
    for i, node in enumerate(nodes):
        model.graph.node.insert(i, node)
    model.graph.initializer.extend(numpy_helper.from_array(value, PREFIX + key) for key, value in constants.items())


def alone(frame: tuple[int, int], config: Mapping[str, Any], batch: int | str = 1) -> onnx.ModelProto:
    """A model of nothing but the preprocessing: `pixels` `[batch, *frame, channels]` uint8 -> `out`, float32."""
    shape = [batch, *config["input_size"]]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["pixels"], ["out"])], "preprocessing",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, shape)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    fold(model, frame, config)
    return model


def check(raw: NDArray[np.uint8], config: Mapping[str, Any]) -> NDArray[np.float32]:
    """What the graph makes of raw images `[n, height, width, channels]`, `[n, channels, height, width]`, in ONNX Runtime.

    Raises EdgepruneError where that is more than one level of 255 from what `images.preprocess` makes of them.
    """
    import onnxruntime

    model = alone((raw.shape[1], raw.shape[2]), config, "batch")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: NDArray[np.float32] = session.run(None, {"pixels": raw})[0]
    wanted = np.stack([images.preprocess(images.picture(one), config) for one in raw])
    levels = 255 * np.array(config["std"], np.float32).reshape(1, -1, 1, 1) * np.abs(found - wanted)
    if not levels.max() < MOST_LEVELS:
        raise EdgepruneError(
            f"the folded preprocessing is {levels.max():.1f} levels of 255 from PIL's; leave --fold-preprocessing out"
        )
    return found


def _nodes(
    name: str, wanted: str, frame: tuple[int, int], crop: tuple[int, int], config: Mapping[str, Any],
    constants: dict[str, NDArray[Any]],
) -> list[onnx.NodeProto]:  # fmt: skip
    """From `name` to `wanted`; what they need beside is put into `constants`."""
    nodes: list[onnx.NodeProto] = []
    at = name

    def then(operator: str, *others: str, **attributes: Any) -> None:
        nonlocal at
        to = f"{PREFIX}{len(nodes)}"
        inputs = [PREFIX + other if other in constants else other for other in others]
        nodes.append(helper.make_node(operator, [at if one == "." else one for one in inputs], [to], **attributes))
        nodes[-1].name, at = to, to

    size = images.resized(frame, crop, config.get("crop_pct") or images.CROP_PCT)
    corner = [round((have - want) / 2) for have, want in zip(size, crop, strict=True)]
    taken = [slice(start, start + want) for start, want in zip(corner, crop, strict=True)]
    then("Transpose", ".", perm=[0, 3, 1, 2])
    rows, columns = (
        resampling.matrix(frame[i], size[i], config["interpolation"])[taken[i]] if size[i] != frame[i] else None
        for i in (0, 1)
    )
    if rows is None or columns is None:  # a matrix makes no more than the crop; else it is a slice
        axes = [i for i, own in enumerate((rows, columns)) if own is None]
        constants["starts"] = np.array([corner[i] for i in axes], np.int64)
        constants["ends"] = np.array([corner[i] + crop[i] for i in axes], np.int64)
        constants["axes"] = np.array([2 + i for i in axes], np.int64)
        then("Slice", ".", "starts", "ends", "axes")
    then("Cast", ".", to=TensorProto.FLOAT)
    if rows is not None or columns is not None:
        constants["half"], constants["black"], constants["white"] = (np.array(v, np.float32) for v in (0.5, 0, 255))
    for key, own in (("columns", columns), ("rows", rows)):
        if own is None:
            continue
        constants[key] = own.T.copy() if key == "columns" else own
        then("MatMul", *((".", key) if key == "columns" else (key, ".")))
        then("Add", ".", "half")
        then("Floor", ".")
        then("Clip", ".", "black", "white")
    mean, std = (np.array(config[key], np.float32).reshape(1, -1, 1, 1) for key in ("mean", "std"))
    constants["scale"], constants["shift"] = 1 / (np.float32(255) * std), -mean / std
    then("Mul", ".", "scale")
    nodes.append(helper.make_node("Add", [at, f"{PREFIX}shift"], [wanted], name=wanted))
    return nodes
