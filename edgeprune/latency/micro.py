"""ONNX models made for measurement: what the device can do at best, and a model in 8-bit integers.

The `onnx` package is imported when a function is called; no torch. The integer models are for latency:
they are calibrated just well enough to be sane, and nothing here says what accuracy they cost.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune import errors

#: (m, k, n) of the products whose best rate is the compute ceiling. A run takes 1 to 6 ms at 450 GFLOP/s: long
#: enough that handing work to threads is lost in it, short enough for many turns on slower devices too. Square and MLP-like, as which is fastest depends on the runtime, its tiles and the caches.
GEMMS: tuple[tuple[int, int, int], ...] = ((256, 1024, 1024), (768, 768, 768), (512, 768, 3072))
#: Weights of the memory-bound product. Several times the last level cache, since caches that do not
#: replace the oldest line first keep a part of what does not fit: 64 MB ran up to twice as fast as 128 beside one of 32.
STREAM_MB = 128
STREAM_ROWS = 2000  # no power of two: rows of such a size fall into the same few sets of a cache

OPSET, IR_VERSION = 17, 9  # what every runtime of the last years reads
#: Matrix products and convolutions. Integers between them too (additions, norms, softmax) made ViTs slower.
LINEAR = ("Conv", "Gemm", "MatMul")
UINT8 = 2  # as ONNX numbers element types
RANDOM_IMAGES = 4


def gemm(path: Path, m: int, k: int, n: int) -> None:
    """Write a model of one product `[1, m, k] x [k, n]`, fp32. Raises UsageError without onnx, StorageError."""
    onnx = _library("onnx", "making a model to measure")
    # The factor is constant, as a layer's weights are, so that runtimes lay it out for their kernels beforehand.
    factor = np.random.default_rng(0).random((k, n), dtype=np.float32) - 0.5
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "factor"], ["y"])],
        f"gemm{m}x{k}x{n}",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, m, k])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, m, n])],
        [onnx.numpy_helper.from_array(factor, "factor")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    _save(onnx, model, path)


def gemm_flops(m: int, k: int, n: int) -> int:
    """Floating-point operations of one run of `gemm`, two per multiply-add."""
    return 2 * m * k * n


def stream(path: Path, megabytes: int = STREAM_MB) -> None:
    """Write a model that reads `megabytes` (10^6 bytes) of weights and uses each once: a product of one row.

    Raises UsageError without onnx, StorageError.
    """
    gemm(path, 1, STREAM_ROWS, stream_bytes(megabytes) // (4 * STREAM_ROWS))


def stream_bytes(megabytes: int = STREAM_MB) -> int:
    """Bytes of weights that one run of `stream` reads; its input and output are negligible."""
    return megabytes * 1_000_000


def dynamic_int8(model: Path, path: Path) -> None:
    """Write `model` with int8 weights; its linear layers quantise their inputs as they run (ONNX Runtime's way).

    Raises UsageError without onnx or onnxruntime or for a bad model, StorageError.
    """
    quantization = _library("onnxruntime.quantization", "quantising a model")
    with _quantising(model) as proto:
        quantization.quantize_dynamic(
            proto,
            path,
            # A Gemm becomes a MatMul. No Conv: ONNX Runtime has no integer one with signed weights.
            op_types_to_quantize=["MatMul"],
            **_weights(quantization),
        )


def qdq_int8(model: Path, path: Path, images: NDArray[Any] | None = None, *, seed: int = 0) -> None:
    """Write `model` with int8 weights and activations (QDQ nodes), ranges being those seen on `images`.

    images: `[n, *input shape without batch]`, a few; without them random ones drawn from `seed`, which do for
    latency: ranges do not change it.
    Raises UsageError without onnx or onnxruntime or for a bad model, StorageError.
    """
    quantization = _library("onnxruntime.quantization", "quantising a model")
    if images is not None and not len(images):
        raise errors.UsageError("quantising a model needs at least 1 image to see the ranges; give a few")

    class Feeds(quantization.CalibrationDataReader):  # type: ignore[name-defined]
        def __init__(self, name: str, images: NDArray[Any], batch: int) -> None:
            self.feeds = ({name: np.repeat(image[None], batch, axis=0)} for image in images)

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            return next(self.feeds, None)

    with _quantising(model) as proto:
        source = proto.graph.input[0]
        first, *others = source.type.tensor_type.shape.dim
        batch = first.dim_value or 1
        if images is None:
            shape, rng = (RANDOM_IMAGES, *(size.dim_value for size in others)), np.random.default_rng(seed)
            raw = source.type.tensor_type.elem_type == UINT8
            images = (
                rng.integers(0, 256, shape, dtype=np.uint8) if raw else rng.standard_normal(shape, dtype=np.float32)
            )
        constants = {tensor.name for tensor in proto.graph.initializer}
        linear = [
            node.name
            for node in proto.graph.node
            # Products of two activations stay: attention's small ones cost more to quantise than they save.
            if node.op_type in LINEAR and node.name and node.input[1] in constants
        ]
        if not linear:  # an empty list would mean all nodes
            raise errors.UsageError(f"{model} has no linear layer with constant weights; leave int8 out")
        quantization.quantize_static(
            proto,
            path,
            Feeds(source.name, images, batch),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(LINEAR),
            nodes_to_quantize=linear,
            activation_type=quantization.QuantType.QUInt8,
            calibrate_method=quantization.CalibrationMethod.MinMax,
            **_weights(quantization),
        )


def _weights(quantization: Any) -> dict[str, Any]:
    """How weights are quantised: int8, a scale per channel.

    7 bits of them, as without VNNI the sum of two products of 8 bits saturates; it costs no time.
    """
    return {"weight_type": quantization.QuantType.QInt8, "per_channel": True, "reduce_range": True}


def _library(name: str, task: str) -> Any:
    """The package, which an edge device may not have. Raises UsageError."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = (error.name or name).partition(".")[0]
        raise errors.UsageError(f"{task} needs {missing}; install it with: pip install {missing}") from error


def _save(onnx: Any, model: Any, path: Path) -> None:
    try:
        onnx.save(model, path)
    except OSError as error:
        raise errors.StorageError(f"cannot write {path}: {error}") from error


@contextlib.contextmanager
def _quantising(path: Path) -> Iterator[Any]:
    """The model in memory, named throughout, in silence: stdout belongs to the command line's JSON.

    In memory, as the quantiser writes intermediate files beside a model that it is given as a path.
    """
    onnx = _library("onnx", "quantising a model")
    if not path.is_file():
        raise errors.StorageError(f"there is no model file {path}")
    logger, level = logging.root, logging.root.manager.disable
    silent = logging.NullHandler()  # without a handler, the first message would install one for good
    logger.addHandler(silent)
    logging.disable(logging.CRITICAL)
    try:
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
            model = onnx.load(path)
            for i, node in enumerate(model.graph.node):
                node.name = node.name or f"node{i}"
            yield model
    except OSError as error:
        raise errors.StorageError(f"cannot quantise {path}: {error}") from error
    except errors.EdgepruneError:
        raise
    except Exception as error:  # of protobuf, onnx and onnxruntime: they share no base class
        raise errors.UsageError(f"{path} cannot be quantised: {error}; leave int8 out") from error
    finally:
        logging.disable(level)
        logger.removeHandler(silent)
