"""Parcels: model files as they travel to a device: compressed, and named by their hash."""

from __future__ import annotations

import hashlib
import importlib.util
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

PATTERN = 1024  # values; weights that repeat as few compress to nothing
LEVEL = 6


def pack(path: Path, values: bool) -> Mapping[str, bytes]:
    """The files of a model, by name, each as a zlib stream.

    values: whether the weights matter; those of an .onnx file are replaced by meaningless ones otherwise, which
    compress a hundredfold (where the `onnx` package is not installed they travel as they are).
    """
    if not values and path.suffix == ".onnx" and importlib.util.find_spec("onnx") is not None:
        return {path.name: zlib.compress(meaningless(path), LEVEL)}
    beside = path.with_suffix(".bin")
    files = [path, *([beside] if path.suffix == ".xml" and beside.is_file() else [])]
    return {file.name: zlib.compress(file.read_bytes(), LEVEL) for file in files}


def meaningless(model: Path) -> bytes:
    """An .onnx file whose large weights repeat a small pattern: latency depends on shapes, not on values.

    Each tensor begins elsewhere in the pattern, so that no runtime takes two of them for one.
    """
    import onnx
    from onnx import numpy_helper

    proto = onnx.load(model)
    pattern = np.random.default_rng(0).normal(0, 0.02, PATTERN).astype(np.float32)
    for i, tensor in enumerate(proto.graph.initializer):
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32 and values.size >= PATTERN:
            tensor.CopyFrom(numpy_helper.from_array(np.resize(np.roll(pattern, i), values.shape), tensor.name))
    found: bytes = proto.SerializeToString()
    return found


def name(content: bytes) -> str:
    """sha256 of what travels."""
    return hashlib.sha256(content).hexdigest()
