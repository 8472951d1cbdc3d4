"""python -m pytest tests/latency/test_survey.py"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import small

from edgeprune import config, errors, runtimes
from edgeprune.console import SILENT
from edgeprune.latency import survey
from edgeprune.report import profiling

onnx = pytest.importorskip("onnx")
NAMES = [name for name in runtimes.names() if not runtimes.get(name).available()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two linear layers with a ReLU, 256 -> 512 -> 10."""
    path = tmp_path_factory.mktemp("survey") / "model.onnx"
    rng, h = np.random.default_rng(0), onnx.helper
    weights = [
        onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in (("w", (256, 512)), ("v", (512, 10)))
    ]
    nodes = [
        h.make_node("MatMul", ["x", "w"], ["a"]), h.make_node("Relu", ["a"], ["b"]), h.make_node("MatMul", ["b", "v"], ["y"]),
    ]  # fmt: skip
    x, y = h.make_tensor_value_info("x", 1, [1, 256]), h.make_tensor_value_info("y", 1, [1, 10])
    graph = h.make_graph(nodes, "tiny", [x], [y], weights)
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.fixture(scope="module")
def under(tmp_path_factory: pytest.TempPathFactory) -> config.Conditions:
    path = tmp_path_factory.mktemp("target") / "here.toml"
    path.write_text(small.TARGET)
    return config.Conditions(config.load_target(str(path)))


@pytest.fixture(scope="module")
def document(model: Path, under: config.Conditions) -> dict[str, Any]:
    with small.quick():
        return survey.survey_file(model, under, SILENT)


def test_a_file_is_surveyed_in_every_runtime_and_precision(document: dict[str, Any]) -> None:
    found = document["survey"]
    assert found["left_out"] == []
    assert (found["threads"], document["file"]["name"]) == (1, "model.onnx")
    low, high = found["latency_ms"]["ci"]
    assert 0 < low <= found["latency_ms"]["p50"] <= high, "an interval of its own, not the model's ratio to itself"
    assert high > low
    assert found["latency_ms"]["quiet"] <= found["latency_ms"]["p50"] * 1.001
    assert {row["runtime"] for row in found["precisions"]} == set(NAMES)
    assert found["precisions"][0] == {
        **found["precisions"][0],
        "precision": "fp32",
        "runtime": document["runtime"],
        "ratio": 1.0,
    }
    assert {row["precision"] for row in found["precisions"]} == {"fp32", "int8 dynamic", "int8 QDQ"}
    assert sum(row["share"] for row in found["operators"]) == pytest.approx(1)
    assert found["ceilings"]["gflops"] == max(row["gflops"] for row in found["ceilings"]["gemms"]) > 0.1
    assert found["ceilings"]["gb_per_s"] > 0.1
    assert found["threads_scaling"] == [{"threads": 1, "speedup": 1.0, "ci": [1.0, 1.0], "efficiency": 1.0}]
    assert found["noise"]["rounds"] >= 9


def test_the_report_of_a_file_says_all_of_it(document: dict[str, Any]) -> None:
    text = profiling.markdown(document)
    for title in (
        "Latency",
        "Operators",
        "What this device can do",
        "Thread scaling",
        "Runtimes and precisions",
        "Noise while surveying",
    ):
        assert f"## {title}\n" in text
    assert "Latency table" not in text
    assert all(len(line) < 4000 and "None" not in line and "nan" not in line for line in text.splitlines())


def test_what_cannot_be_made_is_named(model: Path, under: config.Conditions) -> None:
    """On a device without the onnx package: no ceilings and no int8, and that is said; the rest is there."""
    with small.quick(), mock.patch.dict(sys.modules, {"onnx": None}):
        found = survey.survey_file(model, under, SILENT)["survey"]
    assert found["ceilings"] is None
    assert len(found["left_out"]) == 2
    assert all("pip install onnx" in reason for reason in found["left_out"])
    assert {row["precision"] for row in found["precisions"]} == {"fp32"}
    assert "Left out: int8" in profiling.markdown({**found, "file": {"name": "m"}, "device": {"cpu": "x"},
                                                   "target": {"name": "t"}, "survey": found})  # fmt: skip


def test_a_missing_runtime_is_refused(model: Path, under: config.Conditions) -> None:
    other = config.Conditions(under.target, runtime="tensorflow")
    with pytest.raises(errors.UsageError, match="unknown runtime"):
        survey.survey_file(model, other, SILENT)


def test_nodes_are_summed_by_operator_and_kernel() -> None:
    nodes = [
        {"name": "a", "operator": "MatMul", "kernel": "x", "ms": 1.0},
        {"name": "b", "operator": "Gelu", "kernel": "", "ms": 4.0},
        {"name": "c", "operator": "MatMul", "kernel": "x", "ms": 2.0},
        {"name": "d", "operator": "MatMul", "kernel": "y", "ms": 1.0},
    ]
    assert survey.by_operator(nodes) == [
        {"operator": "Gelu", "kernel": "", "count": 1, "ms": 4.0, "share": 0.5},
        {"operator": "MatMul", "kernel": "x", "count": 2, "ms": 3.0, "share": 0.375},
        {"operator": "MatMul", "kernel": "y", "count": 1, "ms": 1.0, "share": 0.125},
    ]
