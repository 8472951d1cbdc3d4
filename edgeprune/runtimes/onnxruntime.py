"""ONNX Runtime on the CPU. It runs `model.onnx` itself, so it compiles nothing.

Its kernels (MLAS) choose the instruction set by cpuid and have no switch: a narrower CPU
cannot be imitated, and `cap_environment` says so.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune import errors, runtimes

#: int8 is a property of the model (QDQ nodes), not of the session.
PRECISIONS = ("fp32", "int8")
ENTRIES = {
    # Pruned and fine-tuned weights can be denormal, which slows some CPUs many times over.
    "session.set_denormal_as_zero": "1",
    # Threads spin within a run, as by default, but not after it: every session has its own
    # threads, and one that still spins for tens of ms steals the CPU from the next candidate.
    "session.force_spinning_stop": "1",
}
TYPES = {"tensor(float)": "float32", "tensor(uint8)": "uint8"}
#: Runs before those whose operators are timed.
WARM_RUNS = 3
_KERNEL = "_kernel_time"  # how the profiler's events around a node's computation end


def available() -> str:
    if importlib.util.find_spec("onnxruntime"):
        return ""
    return "onnxruntime is not installed; install it with: pip install onnxruntime"


def version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


def cap_environment(max_isa: str) -> dict[str, str] | None:
    return None


class OnnxRuntimeSession:
    """A session with the options edgeprune measures and recommends for deployment."""

    def __init__(self, session: Any, shape: tuple[int, ...], facts: dict[str, Any]) -> None:
        self._session = session
        [tensor] = session.get_inputs()
        self._input = tensor.name
        self._outputs = [session.get_outputs()[0].name]
        self.input_shape, self.input_type = shape, TYPES[tensor.type]
        self.facts = facts

    def run(self, x: NDArray[Any]) -> NDArray[Any]:
        output: NDArray[Any] = self._session.run(self._outputs, {self._input: x})[0]
        return output


def open(path: str, threads: int, precision: str) -> OnnxRuntimeSession:  # noqa: A001
    """Open an .onnx file on the CPU provider alone. Raises UsageError."""
    session, shape = _session(path, threads, precision)
    facts = {
        "precision": precision,
        "threads": session.get_session_options().intra_op_num_threads,
        "providers": session.get_providers(),
        "options": ENTRIES,
    }
    return OnnxRuntimeSession(session, shape, facts)


def operators(path: str, threads: int, precision: str, x: NDArray[Any], runs: int) -> list[dict[str, Any]]:
    """See `Runtime.operators`. `ms` is the median; ONNX Runtime does not name its kernels."""
    if runs < 1:
        raise errors.UsageError(f"operators cannot be timed in {runs} runs; use 1 or more")
    with tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
        session, _ = _session(path, threads, precision, profile=str(Path(folder) / "profile"))
        [feed] = [tensor.name for tensor in session.get_inputs()]
        for _ in range(WARM_RUNS + runs):
            session.run(None, {feed: x})
        try:
            events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:  # not written, or cut short by a full disk
            raise errors.StorageError(
                f"cannot write onnxruntime's profile to {folder}: {error}; set TMPDIR elsewhere"
            ) from error
    # A dict keeps the order of first execution; names may repeat, indices do not.
    times: dict[tuple[str, str], list[int]] = {}
    kinds: dict[tuple[str, str], str] = {}
    for event in sorted((e for e in events if e["name"].endswith(_KERNEL)), key=lambda e: int(e["ts"])):
        node = (event["name"].removesuffix(_KERNEL), event["args"].get("node_index", ""))
        times.setdefault(node, []).append(event["dur"])
        kinds[node] = event["args"]["op_name"]
    timed = {node: float(np.median(us[-runs:])) / 1e3 for node, us in times.items()}
    return [{"name": node[0], "operator": kinds[node], "kernel": "", "ms": ms} for node, ms in timed.items() if ms > 0]


def _session(path: str, threads: int, precision: str, profile: str = "") -> tuple[Any, tuple[int, ...]]:
    """An InferenceSession and the shape of its input, with the options edgeprune measures and recommends for deployment.

    profile: where to write an operator profile, as the start of a file name; "" = none.
    """
    import onnxruntime as ort

    if precision not in PRECISIONS:
        raise errors.UsageError(
            f"onnxruntime runs {' or '.join(PRECISIONS)} on a CPU, not {precision}; use --precision fp32"
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    for key, value in ENTRIES.items():
        options.add_session_config_entry(key, value)
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class of their own
        raise errors.UsageError(f"onnxruntime cannot open {path}: {error}") from error
    if len(session.get_inputs()) != 1:
        raise errors.UsageError(f"{path} has {len(session.get_inputs())} inputs; export it with one")
    shape, kind = session.get_inputs()[0].shape, session.get_inputs()[0].type
    if kind not in TYPES:
        raise errors.UsageError(f"{path} takes {kind} as input; export it with a float32 or uint8 input")
    sizes = [size if isinstance(size, int) and size > 0 else None for size in shape]
    said = session.get_modelmeta().custom_metadata_map.get(runtimes.BATCH, "")
    return session, runtimes.fixed(path, sizes, said)


def compile(onnx_path: Path, out_dir: Path, weights: str = "fp32") -> list[Path]:  # noqa: A001
    return []
