"""python -m pytest tests/latency/test_micro.py"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from edgeprune import errors, runtimes
from edgeprune.latency import micro

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
NAMES = [name for name in runtimes.names() if not runtimes.get(name).available()]


def logits(runtime: str, path: Path, precision: str, images: np.ndarray) -> np.ndarray:
    session = runtimes.get(runtime).open(str(path), 1, precision)
    return np.concatenate([np.array(session.run(image[None])) for image in images])


def counts(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """What a ViT has: a patch convolution, a Gemm, a product of activations, and a MatMul; its nodes have no names."""
    rng = np.random.default_rng(0)
    h = onnx.helper
    weights = {
        "conv": rng.standard_normal((16, 3, 4, 4)) / 7,
        "gemm": rng.standard_normal((32, 16)) / 4,  # transposed, as torch exports it
        "bias": rng.standard_normal(32),
        "head": rng.standard_normal((512, 5)) / 4,
    }
    constants = [onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()]
    shapes = {"rows": [16, 16], "flat": [1, 512]}
    constants += [onnx.numpy_helper.from_array(np.array(value), name) for name, value in shapes.items()]
    nodes = [
        h.make_node("Conv", ["pixels", "conv"], ["patches"], strides=[4, 4]),
        h.make_node("Reshape", ["patches", "rows"], ["tokens"]),
        h.make_node("Softmax", ["tokens"], ["scores"], axis=-1),
        h.make_node("MatMul", ["scores", "tokens"], ["mixed"]),
        h.make_node("Gemm", ["mixed", "gemm", "bias"], ["wide"], transB=1),
        h.make_node("Reshape", ["wide", "flat"], ["all"]),
        h.make_node("MatMul", ["all", "head"], ["logits"]),
    ]
    graph = h.make_graph(
        nodes, "network", [h.make_tensor_value_info("pixels", 1, [1, 3, 16, 16])],
        [h.make_tensor_value_info("logits", 1, [1, 5])], constants,
    )  # fmt: skip
    path = tmp_path / "network.onnx"
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_gemm_is_one_product_with_constant_weights(name: str, tmp_path: Path) -> None:
    path = tmp_path / "gemm.onnx"
    micro.gemm(path, 6, 32, 48)
    factor = onnx.numpy_helper.to_array(onnx.load(path).graph.initializer[0])
    assert factor.shape == (32, 48) and counts(path) == {"MatMul": 1}
    x = np.random.default_rng(1).standard_normal((1, 6, 32), dtype=np.float32)
    np.testing.assert_allclose(logits(name, path, "fp32", x), x @ factor, rtol=1e-4, atol=1e-4)


def test_what_a_run_takes_is_known(tmp_path: Path) -> None:
    assert micro.gemm_flops(2, 3, 5) == 60
    assert all(1e8 < micro.gemm_flops(*shape) < 1e10 for shape in micro.GEMMS)
    path = tmp_path / "stream.onnx"
    micro.stream(path, 3)
    model = onnx.load(path)
    assert model.graph.input[0].type.tensor_type.shape.dim[1].dim_value == 1
    assert len(model.graph.initializer[0].raw_data) == micro.stream_bytes(3) == 3_000_000
    assert micro.stream_bytes() == micro.STREAM_MB * 1_000_000


def test_dynamic_int8_quantises_every_linear_layer(network: Path) -> None:
    path = network.with_name("dynamic.onnx")
    micro.dynamic_int8(network, path)
    assert counts(path)["MatMulInteger"] == 2 and counts(path)["Gemm"] == 0
    assert counts(path)["MatMul"] == 1 and counts(path)["Conv"] == 1  # of activations; not supported
    images = np.random.default_rng(1).standard_normal((40, 3, 16, 16), dtype=np.float32)
    want, got = logits("onnxruntime", network, "fp32", images), logits("onnxruntime", path, "int8", images)
    assert (want.argmax(-1) == got.argmax(-1)).mean() >= 0.8 and not np.array_equal(want, got)


def test_qdq_int8_quantises_layers_with_weights(network: Path) -> None:
    path = network.with_name("qdq.onnx")
    images = np.random.default_rng(1).standard_normal((40, 3, 16, 16), dtype=np.float32)
    micro.qdq_int8(network, path, images[:4])
    producer = {name: node for node in onnx.load(path).graph.node for name in node.output}
    quantised = [
        node.op_type for node in onnx.load(path).graph.node
        if node.op_type in micro.LINEAR and all(
            name in producer and producer[name].op_type == "DequantizeLinear" for name in node.input[:2]
        )
    ]  # fmt: skip
    assert sorted(quantised) == ["Conv", "Gemm", "MatMul"]  # and not the product of activations
    want = logits("onnxruntime", network, "fp32", images)
    for name in NAMES:
        got = logits(name, path, "int8", images)
        assert (want.argmax(-1) == got.argmax(-1)).mean() >= 0.8 and not np.array_equal(want, got)


def test_random_images_come_from_the_seed(network: Path) -> None:
    paths = [network.with_name(f"qdq{i}.onnx") for i in range(3)]
    for path, seed in zip(paths, (3, 3, 4), strict=True):
        micro.qdq_int8(network, path, seed=seed)
    same, again, other = (path.read_bytes() for path in paths)
    assert same == again != other


def test_quantising_is_silent_and_leaves_one_file(network: Path, capfd: pytest.CaptureFixture[str]) -> None:
    handlers, level = list(logging.root.handlers), logging.root.manager.disable
    before = network.read_bytes()
    micro.dynamic_int8(network, network.with_name("a.onnx"))
    micro.qdq_int8(network, network.with_name("b.onnx"), np.zeros((1, 3, 16, 16), np.float32))
    assert sorted(path.name for path in network.parent.iterdir()) == ["a.onnx", "b.onnx", "network.onnx"]
    assert network.read_bytes() == before
    assert capfd.readouterr() == ("", "")
    assert logging.root.handlers == handlers and logging.root.manager.disable == level


def test_refusals_name_the_fix(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, junk = network.with_name("out.onnx"), network.with_name("junk.onnx")
    junk.write_bytes(b"junk")
    with pytest.raises(errors.UsageError, match="cannot be quantised"):
        micro.dynamic_int8(junk, out)
    with pytest.raises(errors.StorageError, match="no model file"):
        micro.dynamic_int8(network.with_name("none.onnx"), out)
    with pytest.raises(errors.UsageError, match="at least 1 image"):
        micro.qdq_int8(network, out, np.zeros((0, 3, 16, 16), np.float32))
    with pytest.raises(errors.StorageError, match="cannot write"):
        micro.gemm(network.parent / "nowhere" / "gemm.onnx", 2, 2, 2)
    with pytest.raises(errors.StorageError, match="cannot quantise"):
        micro.dynamic_int8(network, network.parent / "nowhere" / "out.onnx")
    model = onnx.load(network)
    del model.graph.initializer[:]
    model.graph.node[0].op_type = "Relu"
    linear = [node for node in model.graph.node if node.op_type in ("Relu", "Softmax")][:1]
    del model.graph.node[:], linear[0].input[1:], linear[0].attribute[:]
    model.graph.node.extend(linear)
    model.graph.output[0].name = linear[0].output[0]
    onnx.save(model, junk)
    with pytest.raises(errors.UsageError, match="no linear layer"):
        micro.qdq_int8(junk, out)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(errors.UsageError, match="pip install onnx"):
        micro.gemm(out, 2, 2, 2)
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)
    with pytest.raises(errors.UsageError, match="pip install onnxruntime"):
        micro.dynamic_int8(network, out)
    assert not out.exists()
