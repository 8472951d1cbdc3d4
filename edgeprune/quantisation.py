"""int8: linear layers with 8-bit inputs and weights, as torch computes them, and as an ONNX graph says them (QDQ).

Both linear layers of a sub-block are int8, or none. Inputs are uint8 with one scale and zero point, from the range that
errs least on calibration images; weights are symmetric with a scale per output, of 7 bits: without VNNI a runtime adds
two products in 16 bits, which 8 times 8 bits overflow. torch rounds as the runtime does and passes gradients straight
through (Jacob et al., arXiv 1712.05877), so tuning such a model is quantisation-aware. Weights are kept in float32.
The graph has QuantizeLinear and DequantizeLinear around each layer, which ONNX Runtime and OpenVINO both fuse into int8
kernels, so one file is right for both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgeprune import vit
from edgeprune.compat import VisionTransformer
from edgeprune.errors import EdgepruneError
from edgeprune.types import Plan, Range, Ranges, SubBlockKind

LEVELS = 255  # of an input, above zero
INT32 = 2**31 - 1
MOST_OFFSET = 2**30  # of a bias: what is multiplied and added up has room beside it
HIGHEST = 63  # of a weight: 2 products of 255 * 64 are what 16 bits hold
SHRINKS = np.linspace(1.0, 0.4, 13)  # shares of the observed range that are tried
SAMPLED = 1 << 14  # inputs of a layer per batch that tell which share errs least


class Int8Linear(nn.Linear):
    """A linear layer that rounds its inputs and weights to 8 bits. Until its range is known, what it says is NaN."""

    low: Tensor
    high: Tensor
    exact = False  # whether it computes in float instead

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        self.weight, self.bias = layer.weight, layer.bias
        self.register_buffer("low", torch.tensor(float("nan")))
        self.register_buffer("high", torch.tensor(float("nan")))

    def forward(self, x: Tensor) -> Tensor:
        if self.exact:
            return super().forward(x)
        if bool(self.low.isnan()):
            return super().forward(x) * self.low
        scale, zero = self.input_scale()
        x = torch.fake_quantize_per_tensor_affine(x.float(), float(scale), int(zero), 0, LEVELS)
        scales = self.weight_scales()
        none = torch.zeros(len(scales), dtype=torch.int32, device=scales.device)
        weight = torch.fake_quantize_per_channel_affine(self.weight, scales, none, 0, -HIGHEST, HIGHEST)
        return nn.functional.linear(x, weight, self.bias)

    def set_range(self, low: float, high: float) -> None:
        """Zero is always within, so that it is exact."""
        self.low.fill_(min(low, 0.0))
        self.high.fill_(max(high, 0.0))

    def input_scale(self) -> tuple[np.float32, np.uint8]:
        """Scale and zero point of its inputs."""
        return _affine(float(self.low), float(self.high))

    def weight_scales(self) -> Tensor:
        """`[outputs]`, float32."""
        return self.weight.detach().abs().amax(1).clamp_min(1e-12) / HIGHEST


def _affine(low: float, high: float) -> tuple[np.float32, np.uint8]:
    scale = np.float32(max((high - low) / LEVELS, 1e-12))
    return scale, np.uint8(np.clip(np.rint(-low / scale), 0, LEVELS))


def mark(model: VisionTransformer, plan: Plan) -> VisionTransformer:
    """Make the linear layers of the plan's int8 sub-blocks int8, in place, of unknown ranges; returns the model."""
    for block, keep in zip(model.blocks, plan.blocks, strict=True):
        for kind in keep.int8:
            convert(vit.sub_block(block, kind), kind)
    return model


def convert(sub: Any, kind: SubBlockKind) -> list[Int8Linear]:
    """Make the linear layers of an attention or MLP int8, in place; returns them: the first and the last."""
    names = ("qkv", "proj") if kind == "attn" else ("fc1", "fc2")
    for name in names:
        setattr(sub, name, Int8Linear(getattr(sub, name)))
    return [getattr(sub, name) for name in names]


def layers(model: nn.Module) -> dict[str, Int8Linear]:
    """Those that are int8, by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Int8Linear)}


@contextlib.contextmanager
def exactly(model: nn.Module) -> Iterator[None]:
    """The model in float, for as long as the context lasts."""
    found = layers(model).values()
    for layer in found:
        layer.exact = True
    try:
        yield
    finally:
        for layer in found:
            layer.exact = False


@torch.no_grad()
def observe(model: nn.Module, watched: Mapping[Any, nn.Module], batches: Iterable[Tensor]) -> dict[Any, Range]:
    """The range of the inputs of each watched layer of `model` that errs least, by key, on images `[n, channels, height, width]`.

    Of the range that was seen and smaller ones: the least mean squared error of rounded inputs, those that are cut off
    among them.
    """
    seen: dict[Any, list[NDArray[np.float32]]] = {key: [] for key in watched}

    def watch(key: Any, x: Tensor) -> None:
        flat = x.detach().flatten().float()
        stride = max(1, len(flat) // SAMPLED)
        seen[key].append(torch.cat([flat[::stride], flat.min()[None], flat.max()[None]]).numpy())

    hooks = [layer.register_forward_pre_hook(lambda _, x, key=key: watch(key, x[0])) for key, layer in watched.items()]
    try:
        with exactly(model):
            for images in batches:
                model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return {key: _least_error(np.concatenate(values)) for key, values in seen.items()}


def _least_error(values: NDArray[np.float32]) -> Range:
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    found = {}
    for share in SHRINKS:
        scale, zero = _affine(share * low, share * high)
        rounded = (np.clip(np.rint(values / scale) + zero, 0, LEVELS) - zero) * scale
        found[float(share)] = float(np.square(rounded - values, dtype=np.float64).mean())
    best = min(found, key=found.__getitem__)
    return best * low, best * high


def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the ranges of all int8 layers by what they see, in float, of images `[n, channels, height, width]`."""
    found = layers(model)
    if found:
        for name, own in observe(model, found, batches).items():
            found[name].set_range(*own)


def control(
    model: VisionTransformer, batches: Iterable[Tensor], judge: Callable[[VisionTransformer], float]
) -> tuple[float, float, float]:
    """Accuracy control of a model that was tuned since its ranges were set: ranges anew, kept where they serve better.

    judge: how far a model is from the dense one, on other images. Returns that in float, in int8 before and after.
    """
    found = layers(model)
    old = {name: (float(layer.low), float(layer.high)) for name, layer in found.items()}
    with exactly(model):
        exact = judge(model)
    before = judge(model)
    calibrate(model, batches)
    after = judge(model)
    if not after < before:
        for name, own in old.items():
            found[name].set_range(*own)
    return exact, before, min(before, after)


def pretend(model: nn.Module) -> None:
    """Set any range: of models whose speed is all that matters."""
    for layer in layers(model).values():
        layer.set_range(-4.0, 4.0)


def dense_ranges(model: VisionTransformer, batches: Iterable[Tensor]) -> Ranges:
    """Ranges of the inputs of the first and the last layer of every sub-block."""
    watched: dict[tuple[int, SubBlockKind, int], nn.Module] = {}
    for i, block in enumerate(model.blocks):
        for kind in vit.KINDS:
            sub = vit.sub_block(block, kind)
            watched[i, kind, 0], watched[i, kind, 1] = vit.first_layer(sub, kind), vit.last_layer(sub, kind)
    found = observe(model, watched, batches)
    return {(i, kind): (found[i, kind, 0], found[i, kind, 1]) for i, kind, last in watched if last}


# ONNX ---------------------------------------------------------------------------------------


def insert(proto: Any, model: nn.Module) -> None:
    """Make the int8 layers of `model` int8 in its ONNX `ModelProto`, in place; that of a model without any is left alone.

    Layers are found by their weights. A bias becomes integers of 32 bits in steps of input scale times weight scale: with
    one in float, ONNX Runtime computes the whole product in float, which takes 2 to 3 times as long as without int8.
    Raises EdgepruneError for a layer that is not there.
    """
    import onnx
    from onnx import helper, numpy_helper

    wanted = layers(model)
    if not wanted:
        return
    graph, make = proto.graph, helper.make_node
    floats = {t.name: numpy_helper.to_array(t) for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    weights = {name: value for name, value in floats.items() if value.ndim == 2}
    products = [n for n in graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in weights]
    made: dict[str, list[Any]] = {}  # by what a product makes: what goes before it
    for name, layer in wanted.items():
        weight = layer.weight.detach().numpy()
        node, flipped = _product(products, weights, weight, set(made), name)
        (scale, zero), scales = layer.input_scale(), layer.weight_scales().numpy()
        integers = np.clip(np.rint(weight / scales[:, None]), -HIGHEST, HIGHEST).astype(np.int8)
        constants = {
            "weight": integers.T if flipped else integers,
            "scales": scales,
            "zeros": np.zeros(len(scales), np.int8),
            "scale": np.array(scale, np.float32),
            "zero": np.array(zero, np.uint8),
        }
        pair, triple, biases = (
            [f"{name}.{key}" for key in keys]
            for keys in (("scale", "zero"), ("weight", "scales", "zeros"), ("offsets", "steps", "none"))
        )
        made[node.output[0]] = [
            make("QuantizeLinear", [node.input[0], *pair], [f"{name}.q"], f"{name}.quantise"),
            make("DequantizeLinear", [f"{name}.q", *pair], [f"{name}.x"], f"{name}.inputs"),
            make("DequantizeLinear", triple, [f"{name}.w"], f"{name}.weights", axis=1 if flipped else 0),
        ]
        node.input[0], node.input[1] = f"{name}.x", f"{name}.w"
        if (place := _bias(graph.node, node, floats)) is not None:
            adding, at = place
            steps = scale * scales
            offsets = np.rint(floats[adding.input[at]].astype(np.float64) / steps)
            constants |= {
                "offsets": np.clip(offsets, -MOST_OFFSET, MOST_OFFSET).astype(np.int32),
                "steps": steps,
                "none": np.zeros(len(steps), np.int32),
            }
            made[node.output[0]].append(make("DequantizeLinear", biases, [f"{name}.b"], f"{name}.biases", axis=0))
            adding.input[at] = f"{name}.b"
        graph.initializer.extend(
            numpy_helper.from_array(np.ascontiguousarray(value), f"{name}.{key}") for key, value in constants.items()
        )
    ordered = [one for node in graph.node for one in (*made.get(node.output[0], ()), node)]
    kept = [type(node).FromString(node.SerializeToString()) for node in ordered]
    del graph.node[:]
    graph.node.extend(kept)
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)


def _bias(nodes: Iterable[Any], product: Any, floats: Mapping[str, NDArray[Any]]) -> tuple[Any, int] | None:
    """The node that adds a bias to a product, itself or the only one after it, and which of its inputs is that bias."""
    if len(product.input) > 2:
        return product, 2
    after = [node for node in nodes if product.output[0] in node.input]
    if [node.op_type for node in after] != ["Add"]:
        return None
    at = 1 - list(after[0].input).index(product.output[0])
    value = floats.get(after[0].input[at])
    return None if value is None or value.ndim != 1 else (after[0], at)


def _product(
    products: list[Any], weights: Mapping[str, NDArray[Any]], weight: NDArray[Any], taken: set[str], name: str
) -> tuple[Any, bool]:
    """The node that multiplies by these weights `[outputs, inputs]`, and whether it holds them transposed."""
    for node in products:
        if node.output[0] in taken:
            continue
        transposed = any(one.name == "transB" and one.i for one in node.attribute)
        own = weights[node.input[1]]
        flipped = not transposed
        if np.array_equal(own, weight.T if flipped else weight):
            return node, flipped
    raise EdgepruneError(f"the layer '{name}' is not in the exported graph, so it cannot be made int8")
