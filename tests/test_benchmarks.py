"""python -m pytest tests/test_benchmarks.py"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_model(path: Path, width: int) -> str:
    """One linear layer, width -> width."""
    h = onnx.helper
    weight = onnx.numpy_helper.from_array(np.eye(width, dtype=np.float32), "w")
    x, y = (h.make_tensor_value_info(name, 1, [1, width]) for name in "xy")
    graph = h.make_graph([h.make_node("MatMul", ["x", "w"], ["y"])], "tiny", [x], [y], [weight])
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=9), path)
    return str(path)


def test_clock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    clock = script("clock")
    models = [write_model(tmp_path / "a.onnx", 256), write_model(tmp_path / "b.onnx", 128)]
    result = tmp_path / "result.json"
    options = ["--rounds", "10", "--repeats", "2", "--threads", "1", "--load", "0.2", "--json", str(result)]
    clock.main(["--models", *models, *options])
    out = capsys.readouterr().out
    assert all(f"\n{method} " in out for method in clock.METHODS) and len(clock.METHODS) == 4
    assert "A a.onnx, B b.onnx; 10 timed runs" in out and "1 threads" in out and "cpus_used" in out
    raw = json.loads(result.read_text())
    for method in clock.METHODS:
        estimates = raw["estimates"][method]
        assert len(estimates) == 2 and all(e["ratio"] > 0 and e["ms"] > 0 for e in estimates)
        assert [len(samples) for e in estimates for samples in e["samples_ms"]] == [10] * 4


def test_clock_refuses_what_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        script("clock").main(["--repeats", "1"])
    assert "--repeats 2 or more" in capsys.readouterr().err
