"""OpenVINO on the CPU: opens .onnx or .xml, and compiles to .xml and .bin.

The instruction set can be capped, so that an AVX-512 host times what an AVX2 device would run. The cap
is oneDNN's and OpenVINO's own kernels obey it; kernels that do not are listed in `facts["uncapped"]`.
OpenVINO's telemetry is kept out: importing it would otherwise fork a sender in the measuring process.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune import errors, runtimes

#: What each precision asks of the plugin. int8 is a property of the model; the rest of it stays f32.
HINTS = {"fp32": "f32", "int8": "f32", "bf16": "bf16", "fp16": "f16"}
TYPES = {"f32": "float32", "u8": "uint8"}
CAP_VARIABLE = "ONEDNN_MAX_CPU_ISA"
#: How many times `operators` compiles a model, and the runs before the timed ones of each.
REPEATS, WARM_RUNS = 4, 2


def available() -> str:
    if importlib.util.find_spec("openvino"):
        return ""
    return "openvino is not installed; install it with: pip install openvino"


def version() -> str:
    return str(_library().__version__)


def cap_environment(max_isa: str) -> dict[str, str] | None:
    return {CAP_VARIABLE: max_isa}


class OpenVinoSession:
    """One infer request. `run` returns a view of the request's output tensor."""

    def __init__(self, compiled: Any, shape: tuple[int, ...], facts: dict[str, Any]) -> None:
        self._request = compiled.create_infer_request()
        self.input_shape = shape
        self.input_type = TYPES[compiled.inputs[0].element_type.get_type_name()]
        self.facts = facts

    def run(self, x: NDArray[Any]) -> NDArray[Any]:
        output: NDArray[Any] = self._request.infer([x], share_inputs=True, share_outputs=True)[0]
        return output


def open(path: str, threads: int, precision: str) -> OpenVinoSession:  # noqa: A001
    """Open an .onnx or .xml file. Raises UsageError, or TargetUnavailable when asked too much of the CPU."""
    return OpenVinoSession(*_compiled(path, threads, precision))


def operators(path: str, threads: int, precision: str, x: NDArray[Any], runs: int) -> list[dict[str, Any]]:
    """See `Runtime.operators`. `ms` is the median over up to 4 groups of runs of a group's mean."""
    if runs < 1:
        raise errors.UsageError(f"operators cannot be timed in {runs} runs; use 1 or more")
    # The plugin reports the mean of all runs since it compiled the model, the slow first one too, in
    # whole µs. A group is the difference of two such means, exact to (WARM_RUNS + n) / n µs; a median
    # takes several groups, and only a model compiled anew starts to count from 0.
    groups = []
    for part in np.array_split(range(runs), min(runs, REPEATS)):
        nodes, us = _profiled(path, threads, precision, x, len(part))
        groups.append(us)  # nodes may be named differently each time, but come in one order
    return [{**node, "ms": float(us) / 1e3} for node, us in zip(nodes, np.median(groups, axis=0)) if us > 0]


def _profiled(
    path: str, threads: int, precision: str, x: NDArray[Any], runs: int
) -> tuple[list[dict[str, Any]], NDArray[np.float64]]:
    """The nodes of a model compiled for this, and each one's mean µs over `runs` runs after warm ones."""
    compiled, _, _ = _compiled(path, threads, precision, {"PERF_COUNT": True})
    request = compiled.create_infer_request()
    totals = []
    for done, more in ((0, WARM_RUNS), (WARM_RUNS, runs)):
        for _ in range(more):
            request.infer([x], share_inputs=True, share_outputs=True)
        info = request.get_profiling_info()
        totals.append(np.array([(done + more) * (node.real_time.total_seconds() * 1e6) for node in info]))
    nodes = [{"name": node.node_name, "operator": node.node_type, "kernel": node.exec_type} for node in info]
    return nodes, (totals[1] - totals[0]) / runs


def _compiled(
    path: str, threads: int, precision: str, extra: dict[str, Any] | None = None
) -> tuple[Any, tuple[int, ...], dict[str, Any]]:
    """The compiled model, the shape of its input and its facts, with the options edgeprune measures and recommends, and `extra` ones."""
    if precision not in HINTS:
        raise errors.UsageError(f"openvino has no precision {precision}; known: {', '.join(HINTS)}")
    core = _library().Core()
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        # Without this an AMX or AVX512_BF16 host silently runs f32 models in bf16.
        "INFERENCE_PRECISION_HINT": HINTS[precision],
        "CPU_DENORMALS_OPTIMIZATION": True,
        **(extra or {}),
    }
    try:
        model = core.read_model(path)
        if len(model.inputs) != 1:
            raise errors.UsageError(f"{path} has {len(model.inputs)} inputs; export it with one")
        if (kind := model.inputs[0].element_type.get_type_name()) not in TYPES:
            raise errors.UsageError(f"{path} takes {kind} as input; export it with a float32 or uint8 input")
        sizes = [size.get_length() if size.is_static else None for size in model.inputs[0].partial_shape]
        shape = runtimes.fixed(path, sizes, _said(model, runtimes.BATCH))
        compiled = core.compile_model(model, "CPU", options)
    except RuntimeError as error:
        raise errors.UsageError(f"openvino cannot open {path}: {error}") from error
    facts = _facts(compiled, precision)
    if facts["threads"] != threads:
        raise errors.TargetUnavailable(
            f"openvino took {facts['threads']} threads when asked for {threads}; use --threads {facts['threads']}"
        )
    if facts["precision_hint"] != HINTS[precision]:
        raise errors.TargetUnavailable(
            f"openvino was asked for {HINTS[precision]} and runs {facts['precision_hint']} on this CPU; use --precision fp32"
        )
    return compiled, shape, facts


def _said(model: Any, key: str) -> str:
    """What the file's metadata says, "" = nothing. Of ONNX files OpenVINO keeps it under "framework"; of its own, so do we."""
    path = ["framework", key]
    return str(model.get_rt_info(path).astype(str)) if model.has_rt_info(path) else ""


def compile(onnx_path: Path, out_dir: Path, weights: str = "fp32") -> list[Path]:  # noqa: A001
    """Write `<stem>.xml` and `.bin`, fp32 weights kept as they are or rounded to fp16. Raises UsageError or StorageError.

    What the ONNX says in its metadata, the IR says too; class names also where OpenVINO's Model API looks for them.
    """
    ov = _library()
    xml = out_dir / f"{onnx_path.stem}.xml"
    try:
        model = ov.Core().read_model(onnx_path)
    except RuntimeError as error:
        raise errors.UsageError(f"openvino cannot read {onnx_path}: {error}") from error
    try:
        if names := _said(model, "classes"):
            labels = " ".join(name.replace(" ", "_") for name in json.loads(names))
            model.set_rt_info(labels, ["model_info", "labels"])
        ov.save_model(model, xml, compress_to_fp16=weights == "fp16")
    except (OSError, RuntimeError) as error:
        raise errors.StorageError(f"cannot write {xml}: {error}") from error
    return [xml, xml.with_suffix(".bin")]


def _library() -> Any:
    """The openvino package, imported without its telemetry.

    With it, every import tries to reach Google Analytics from a fork of a process that already has
    threads; the fork can deadlock and outlive us. Without the package OpenVINO uses its own stub.
    """
    if "openvino" not in sys.modules:
        sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import openvino

    return openvino


def _facts(compiled: Any, precision: str) -> dict[str, Any]:
    """What is in force: properties, and how many ops run on which kernel (`layer kernel_precision`)."""
    kernels: Counter[str] = Counter()
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = {key: _text(value) for key, value in op.get_rt_info().items()}
        if info["layerType"] not in ("Input", "Output", "Const"):
            kernels[f"{info['layerType']} {info['primitiveType']}"] += 1
    cap = os.environ.get(CAP_VARIABLE, "")
    # MLAS, which OpenVINO also carries, asks cpuid itself.
    uncapped = {kernel: n for kernel, n in kernels.items() if cap and "mlas" in kernel}
    return {
        "precision": precision,
        "precision_hint": _text(compiled.get_property("INFERENCE_PRECISION_HINT").to_string()),
        "threads": compiled.get_property("INFERENCE_NUM_THREADS"),
        "streams": compiled.get_property("NUM_STREAMS"),
        "denormals_flushed": bool(compiled.get_property("CPU_DENORMALS_OPTIMIZATION")),
        "pinned": bool(compiled.get_property("ENABLE_CPU_PINNING")),
        "isa": _isa(compiled),
        "kernels": dict(sorted(kernels.items())),
        "uncapped": uncapped,
    }


def _isa(compiled: Any) -> str:
    """The instruction set in words, e.g. "Intel AVX2"; "" where this OpenVINO does not tell."""
    try:
        requirements = str(compiled.get_property("RUNTIME_REQUIREMENTS"))
    except RuntimeError:  # older than 2026
        return ""
    return dict(pair.split("=", 1) for pair in requirements.split(";") if "=" in pair).get("isa", "")


def _text(value: Any) -> str:
    """An OVAny or a plain value as a string."""
    return str(getattr(value, "value", value))
