"""python -m pytest tests/runtimes/test_runtimes.py"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from edgeprune import errors, runtimes
from edgeprune.latency.clock import Clock

onnx = pytest.importorskip("onnx")
NAMES = [name for name in runtimes.names() if not runtimes.get(name).available()]
HEAVY = {"torch", "timm", "onnx", "openvino_telemetry.backend"}


def write_model(path: Path, batch: int | str = 1, hidden: int = 64) -> Path:
    """Two linear layers with a ReLU, 32 -> `hidden` -> 10."""
    rng = np.random.default_rng(0)
    weights = [
        onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in (("w", (32, hidden)), ("v", (hidden, 10)))
    ]
    h = onnx.helper
    nodes = [
        h.make_node("MatMul", ["x", "w"], ["a"]),
        h.make_node("Relu", ["a"], ["b"]),
        h.make_node("MatMul", ["b", "v"], ["y"]),
    ]
    x = h.make_tensor_value_info("x", 1, [batch, 32])
    y = h.make_tensor_value_info("y", 1, [batch, 10])
    graph = h.make_graph(nodes, "tiny", [x], [y], weights)
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=9), path)
    return path


def expected(path: Path, x: np.ndarray) -> np.ndarray:
    w, v = (onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer)
    return np.maximum(x @ w, 0) @ v


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model.onnx")


def test_the_file_name_is_the_name() -> None:
    assert runtimes.names() == ["onnxruntime", "openvino"]
    with pytest.raises(errors.UsageError, match="did you mean 'openvino'"):
        runtimes.get("openvion")


def test_runtime_modules_are_light() -> None:
    code = (
        "import sys; from edgeprune import runtimes; [runtimes.get(n) for n in runtimes.names()];"
        "print({'numpy', 'edgeprune.errors'} <= set(sys.modules),"
        " {'onnxruntime', 'openvino', 'torch', 'onnx'} & set(sys.modules))"
    )
    root = Path(__file__).resolve().parents[2]
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert out.stdout.strip() == "True set()"


@pytest.mark.parametrize("name", NAMES)
def test_the_worker_runs_measures_and_stays_light(name: str, model: Path) -> None:
    with Clock(name, threads=1) as clock:
        facts = clock.load("m", model)
        assert facts["precision"] == "fp32" and facts["threads"] == 1
        clock.load("same", model)
        x = np.random.default_rng(1).standard_normal((70, 32), dtype=np.float32)
        np.testing.assert_allclose(clock.predict("m", x), expected(model, x), rtol=1e-4, atol=1e-4)
        same = clock.measure(["same"], "m", max_rounds=60, budget_s=10)["same"]
        assert 0.3 < same.ratio < 3
        assert not HEAVY & set(clock.modules())
        assert set(NAMES) & set(clock.modules()) == {name}


@pytest.mark.parametrize("name", NAMES)
def test_an_idle_worker_does_not_spin(name: str, model: Path) -> None:
    with Clock(name, threads=2) as clock:
        clock.load("m", model)
        clock.measure(["m"], "m", max_rounds=20)
        stat = Path(f"/proc/{clock.info['pid']}/stat")
        if not stat.exists():
            pytest.skip("needs /proc")

        def cpu_ticks() -> int:
            fields = stat.read_text().rsplit(")", 1)[1].split()
            return int(fields[11]) + int(fields[12])

        before = cpu_ticks()
        time.sleep(0.5)
        assert cpu_ticks() - before <= 5  # of about 100 that two spinning threads would take


@pytest.mark.parametrize("name", NAMES)
def test_bad_models_are_refused(name: str, tmp_path: Path) -> None:
    runtime = runtimes.get(name)
    dynamic = write_model(tmp_path / "dynamic.onnx", batch="n")
    with pytest.raises(errors.UsageError, match=r"dynamic input .* export it with batch 1"):
        runtime.open(str(dynamic), 1, "fp32")
    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"junk")
    with pytest.raises(errors.UsageError, match="cannot open"):
        runtime.open(str(junk), 1, "fp32")
    with pytest.raises(errors.UsageError, match="fp7"):
        runtime.open(str(junk), 1, "fp7")


def test_onnxruntime_compiles_nothing_and_cannot_be_capped(model: Path, tmp_path: Path) -> None:
    runtime = runtimes.get("onnxruntime")
    assert runtime.compile(model, tmp_path) == []
    assert runtime.cap_environment("AVX2") is None


@pytest.mark.skipif("openvino" not in NAMES, reason="openvino is not installed")
def test_openvino_compiles_and_runs_its_own_format(model: Path, tmp_path: Path) -> None:
    files = runtimes.get("openvino").compile(model, tmp_path)
    assert [file.name for file in files] == ["model.xml", "model.bin"]
    assert all(file.is_file() for file in files)
    x = np.ones((2, 32), np.float32)
    with Clock("openvino", threads=1) as clock:
        facts = clock.load("ir", files[0])
        np.testing.assert_allclose(clock.predict("ir", x), expected(model, x), rtol=1e-4, atol=1e-4)
    assert facts["precision_hint"] == "f32" and facts["denormals_flushed"] and facts["streams"] == 1


@pytest.mark.skipif("openvino" not in NAMES, reason="openvino is not installed")
def test_openvino_obeys_the_cap(model: Path) -> None:
    with Clock("openvino", threads=1, max_isa="SSE41") as clock:
        facts = clock.load("m", model)
    assert not any("avx" in kernel for kernel in facts["kernels"])
    assert all("mlas" in kernel for kernel in facts["uncapped"])


@pytest.mark.parametrize("name", NAMES)
def test_operators_are_timed_as_they_are_executed(name: str, model: Path) -> None:
    with Clock(name, threads=1) as clock:
        clock.load("m", model)
        operators = clock.operators("m", runs=6)
        clock.unload("m")
        with pytest.raises(errors.UsageError, match="loaded model"):
            clock.operators("m")
        wide = clock.load("wide", write_model(model.with_name("wide.onnx"), hidden=20_000))
        nodes = clock.operators("wide", runs=6)
        assert clock.operators("wide", runs=1)
        with pytest.raises(errors.UsageError, match="0 runs"):
            clock.operators("wide", runs=0)
    assert wide["precision"] == "fp32"
    for node in [*operators, *nodes]:
        assert set(node) == {"name", "operator", "kernel", "ms"}
        assert node["name"] and node["operator"] and 0 < node["ms"] < 1000
    # 3 nodes in the file; the ReLU is fused in OpenVINO, which adds a reorder or two.
    assert 2 <= len(nodes) <= 6
    products = [node for node in nodes if node["operator"] in ("MatMul", "Gemm", "FusedGemm", "FullyConnected")]
    assert len(products) == 2 and sum(node["ms"] for node in products) > 0.5 * sum(node["ms"] for node in nodes)
    assert len({node["name"] for node in nodes}) == len(nodes)
    assert all(bool(node["kernel"]) == (name == "openvino") for node in nodes)


@pytest.mark.parametrize("name", NAMES)
def test_operators_open_the_model_as_open_does(name: str, model: Path) -> None:
    runtime, x = runtimes.get(name), np.ones((1, 32), np.float32)
    with pytest.raises(errors.UsageError, match="fp7"):
        runtime.operators(str(model), 1, "fp7", x, 1)
    with pytest.raises(errors.UsageError, match="cannot open"):
        runtime.operators(str(model.with_name("none.onnx")), 1, "fp32", x, 1)
