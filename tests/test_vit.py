"""python -m pytest tests/test_vit.py"""

from __future__ import annotations

import copy
import itertools
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from edgeprune import vit, weightfile
from edgeprune.errors import UsageError
from edgeprune.types import BlockPlan, Plan

BLOCKS, HEADS, NEURONS = 3, 3, 24

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", {}),
    "layer scale": ("vit_tiny_patch16_224", {"init_values": 0.1}),
    "qk norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
    "no qkv bias": ("vit_tiny_patch16_224", {"qkv_bias": False}),
    "no proj bias": ("vit_tiny_patch16_224", {"proj_bias": False}),
    "average pooling": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 4}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
}


def subsets(count: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Any subset of `range(count)`, ascending; nothing and everything are drawn often."""
    everything = tuple(range(count))
    some = st.sets(st.integers(0, count - 1)).map(lambda units: tuple(sorted(units)))
    return st.one_of(st.just(()), st.just(everything), some)


plans = st.lists(
    st.builds(BlockPlan, heads=subsets(HEADS), neurons=subsets(NEURONS)), min_size=BLOCKS, max_size=BLOCKS
).map(lambda blocks: Plan(tuple(blocks)))

HARSH = Plan((BlockPlan((1,), (3, 7)), BlockPlan((), (0, 23)), BlockPlan((0, 2), ())))


@torch.no_grad()
def masked(model: Any, plan: Plan) -> Any:
    """The oracle: the dense model with the removed columns of `proj` and `fc2` set to zero."""
    model = copy.deepcopy(model)
    for block, keep in zip(model.blocks, plan.blocks, strict=True):
        head_dim = block.attn.proj.in_features // HEADS
        for head in set(range(HEADS)) - set(keep.heads):
            block.attn.proj.weight[:, head * head_dim : (head + 1) * head_dim] = 0
        for neuron in set(range(NEURONS)) - set(keep.neurons):
            block.mlp.fc2.weight[:, neuron] = 0
    return model


@pytest.fixture(scope="session")
def variants(make_vit: Callable[..., Any]) -> dict[str, Any]:
    return {name: make_vit(architecture, double=True, **kwargs) for name, (architecture, kwargs) in VARIANTS.items()}


# Slicing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=15, deadline=None)
@given(plan=plans)
@torch.no_grad()
def test_slicing_equals_zeroed_columns(
    variants: dict[str, Any], make_images: Callable[..., Any], variant: str, plan: Plan
) -> None:
    dense, images = variants[variant], make_images(2, double=True)
    sliced = vit.slice_model(dense, plan)
    torch.testing.assert_close(sliced(images), masked(dense, plan)(images), rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=10, deadline=None)
@given(plan=plans)
@torch.no_grad()
def test_a_pruned_model_in_dense_shape_is_the_same_model(
    variants: dict[str, Any], make_images: Callable[..., Any], variant: str, plan: Plan
) -> None:
    dense, images = variants[variant], make_images(2, double=True)
    sliced = vit.slice_model(dense, plan)
    for parameter in sliced.parameters():
        parameter.add_(0.01 * torch.randn_like(parameter))  # as tuning would
    back = vit.in_dense_shape(dense, plan, sliced)
    assert vit.anatomy(back) == vit.anatomy(dense)
    torch.testing.assert_close(back(images), sliced(images), rtol=0, atol=1e-9)
    torch.testing.assert_close(vit.slice_model(back, plan)(images), sliced(images), rtol=0, atol=1e-9)


@torch.no_grad()
def test_removed_units_say_nothing(tiny_vit: Any, make_images: Callable[..., Any]) -> None:
    """So that norms and variances of what is gone are in no criterion's totals."""
    back: Any = vit.in_dense_shape(tiny_vit, HARSH, vit.slice_model(tiny_vit, HARSH))
    seen: dict[tuple[int, str], torch.Tensor] = {}
    for i, block in enumerate(back.blocks):
        for kind in vit.KINDS:
            layer = vit.output_layer(block, kind)
            layer.register_forward_pre_hook(lambda _, x, at=(i, kind): seen.update({at: x[0]}))
    back(make_images(2))
    for i, keep in enumerate(HARSH.blocks):
        for kind, units in (("attn", keep.heads), ("mlp", keep.neurons)):
            size = 16 if kind == "attn" else 1
            said = seen[i, kind].flatten(0, 1).abs().sum(0).view(-1, size).sum(1)
            assert [u for u in range(len(said)) if said[u] > 0] == list(units)


@torch.no_grad()
def test_the_oracle_sees_a_wrong_slice(tiny_vit64: Any, make_images: Callable[..., Any]) -> None:
    """One head exchanged for another moves the logits by far more than the oracle's tolerance."""
    other = Plan((BlockPlan((0,), (3, 7)), *HARSH.blocks[1:]))
    images = make_images(2, double=True)
    difference = vit.slice_model(tiny_vit64, other)(images) - masked(tiny_vit64, HARSH)(images)
    assert difference.abs().max() > 1e-3


def test_slicing_leaves_the_dense_model_alone(tiny_vit: Any, make_images: Callable[..., Any]) -> None:
    before = {k: v.clone() for k, v in tiny_vit.state_dict().items()}
    sliced = vit.slice_model(tiny_vit, HARSH)
    with torch.no_grad():
        for parameter in sliced.parameters():
            parameter.zero_()
    assert all(torch.equal(before[k], v) for k, v in tiny_vit.state_dict().items())


def test_gradients_flow_through_a_sliced_model(tiny_vit: Any, make_images: Callable[..., Any]) -> None:
    sliced = vit.slice_model(tiny_vit, HARSH)
    sliced(make_images(2)).square().sum().backward()
    silent = [name for name, p in sliced.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_a_removed_sub_block_leaves_a_bias_alone(tiny_vit: Any) -> None:
    sliced = vit.slice_model(tiny_vit, HARSH)
    attn, mlp = sliced.blocks[1], sliced.blocks[2]
    assert {k: tuple(v.shape) for k, v in attn.attn.named_parameters()} == {"bias": (48,)}
    assert {k: tuple(v.shape) for k, v in mlp.mlp.named_parameters()} == {"bias": (48,)}
    assert torch.equal(attn.attn.bias, tiny_vit.blocks[1].attn.proj.bias)
    assert torch.equal(mlp.mlp.bias, tiny_vit.blocks[2].mlp.fc2.bias)
    assert not list(attn.norm1.parameters()) and not list(mlp.norm2.parameters())
    assert not [m for m in attn.attn.modules() if isinstance(m, nn.Linear)]


def test_sliced_shapes_are_smaller(tiny_vit: Any) -> None:
    block = vit.slice_model(tiny_vit, HARSH).blocks[0]
    assert tuple(block.attn.qkv.weight.shape) == (3 * 16, 48)
    assert tuple(block.attn.proj.weight.shape) == (48, 16)
    assert tuple(block.mlp.fc1.weight.shape) == (2, 48)
    assert tuple(block.mlp.fc2.weight.shape) == (48, 2)


def test_the_dense_plan_changes_nothing(tiny_vit64: Any, make_images: Callable[..., Any]) -> None:
    plan = vit.dense_plan(vit.anatomy(tiny_vit64))
    assert plan.shape == ((HEADS, NEURONS),) * BLOCKS == vit.anatomy(tiny_vit64).shape
    images = make_images(2, double=True)
    assert torch.equal(vit.slice_model(tiny_vit64, plan)(images), tiny_vit64(images))


def test_plan_of_shape_has_that_shape() -> None:
    assert vit.plan_of_shape(((2, 5), (0, 0))).shape == ((2, 5), (0, 0))


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (Plan(HARSH.blocks[:2]), "2 blocks, the model 3"),
        (Plan((BlockPlan((0, 3), ()), *HARSH.blocks[1:])), "block 0 of the plan: heads"),
        (Plan((BlockPlan((1, 0), ()), *HARSH.blocks[1:])), "block 0 of the plan: heads"),
        (Plan((HARSH.blocks[0], BlockPlan((), (2, 2)), HARSH.blocks[2])), "block 1 of the plan: neurons"),
        (Plan((HARSH.blocks[0], BlockPlan((), (-1, 2)), HARSH.blocks[2])), "block 1 of the plan: neurons"),
        (Plan((*HARSH.blocks[:2], BlockPlan((), (24,)))), "block 2 of the plan: neurons"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(tiny_vit: Any, plan: Plan, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        vit.slice_model(tiny_vit, plan)


@settings(max_examples=30, deadline=None)
@given(units=subsets(5), size=st.integers(1, 4))
def test_columns(units: tuple[int, ...], size: int) -> None:
    assert vit.columns(units, size).tolist() == [u * size + i for u in units for i in range(size)]


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_streams_end_in_the_models_own_logits(
    variants: dict[str, Any], make_images: Callable[..., Any], variant: str
) -> None:
    model, images = variants[variant], make_images(2, double=True)
    *hidden, logits = vit.streams(model, images)
    assert len(hidden) == BLOCKS
    torch.testing.assert_close(logits, model(images), rtol=0, atol=1e-12)
    torch.testing.assert_close(model.norm(hidden[-1]), model.forward_features(images), rtol=0, atol=1e-12)


# Anatomy ------------------------------------------------------------------------------------


def test_anatomy(tiny_vit: Any) -> None:
    sizes = vit.anatomy(tiny_vit)
    assert (sizes.blocks, sizes.only.heads, sizes.only.head_dim, sizes.only.neurons) == (BLOCKS, HEADS, 16, NEURONS)
    assert (sizes.only.width, sizes.only.tokens, sizes.image, sizes.num_classes) == (48, 17, (3, 32, 32), 5)
    assert (sizes.units((0, "attn")), sizes.unit_size((0, "attn"))) == (HEADS, 16)
    assert (sizes.units((0, "mlp")), sizes.unit_size((0, "mlp"))) == (NEURONS, 1)


def test_tokens_count_registers_and_the_distillation_token(variants: dict[str, Any]) -> None:
    tokens = {name: vit.anatomy(model).only.tokens for name, model in variants.items()}
    assert (tokens["registers"], tokens["distilled"], tokens["average pooling"]) == (21, 18, 16)


@pytest.mark.parametrize(
    ("architecture", "kwargs", "says"),
    [
        ("swinv2_tiny_window8_256", {}, "SwinTransformerV2"),
        ("vit_small_patch16_18x2_224", {}, "block 0 has ParallelThingsBlock, where several attentions"),
        ("vit_tiny_patch16_224", {"scale_attn_norm": True}, "a norm inside"),
    ],
)
def test_what_cannot_be_sliced_is_refused_with_the_reason(
    architecture: str, kwargs: dict[str, Any], says: str, tiny_kwargs: dict[str, Any]
) -> None:
    small = {} if architecture.startswith("swin") else {**tiny_kwargs, "depth": 1}
    with pytest.raises(UsageError, match=says) as error:
        vit.create(architecture, {**small, **kwargs}, 5)
    assert architecture in str(error.value)


def test_an_unknown_model_gets_a_suggestion() -> None:
    with pytest.raises(UsageError, match="did you mean 'vit_tiny_patch16_224'"):
        vit.create("vit_tiny_patch16_225", {}, 5)


@pytest.mark.parametrize("kwargs", [{"num_heads": 5}, {"nonsense": 1}])
def test_arguments_that_timm_refuses_are_named(kwargs: dict[str, Any], tiny_kwargs: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="timm cannot make 'vit_tiny_patch16_224' with .*" + next(iter(kwargs))):
        vit.create("vit_tiny_patch16_224", {**tiny_kwargs, **kwargs}, 5)


def test_create_adds_zero_biases_and_leaves_the_class_count_to_timm(tiny_kwargs: dict[str, Any]) -> None:
    model = vit.create("vit_tiny_patch16_224", {**tiny_kwargs, "proj_bias": False}, 0)
    assert model.num_classes == 1000 and not model.training
    for block in model.blocks:
        assert block.attn.proj.bias.abs().sum() == 0 and block.mlp.fc2.bias.abs().sum() == 0


# Weights ------------------------------------------------------------------------------------


def save(state: dict[str, torch.Tensor], path: Path) -> Path:
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    return path


class Payload:
    """Pickles as a call that makes a folder: what a malicious weights file would do, harmlessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["torch.save", "pickle", "old torch.save"])
def test_code_in_a_pth_is_refused_and_does_not_run(tmp_path: Path, how: str) -> None:
    path, victim = tmp_path / "evil.pth", tmp_path / "victim"
    content = {"a": torch.ones(2), "payload": Payload(victim)}
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch.save")
    with pytest.raises(UsageError, match=r"evil\.pth.*"):
        weightfile.read(path)
    assert not victim.exists()
    pickle.loads(pickle.dumps(Payload(victim)))  # noqa: S301  (the payload works where it is let in)
    assert victim.exists()


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"model": s}])
def test_a_pth_state_dict_is_read(tiny_vit: Any, tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    torch.save(wrap(tiny_vit.state_dict()), tmp_path / "w.pth")
    state = weightfile.read(tmp_path / "w.pth")
    assert all(torch.equal(state[k], v) for k, v in tiny_vit.state_dict().items())


def test_the_prefix_of_data_parallel_is_dropped(tmp_path: Path) -> None:
    torch.save({"module.a": torch.ones(1)}, tmp_path / "w.pth")
    assert list(weightfile.read(tmp_path / "w.pth")) == ["a"]


def test_half_precision_is_read_as_float32(tmp_path: Path) -> None:
    path = save({"a": torch.tensor([0.5, 1.25]).half(), "b": torch.tensor([3])}, tmp_path / "w.safetensors")
    state = weightfile.read(path)
    assert state["a"].dtype == torch.float32 and state["a"].tolist() == [0.5, 1.25]
    assert state["b"].dtype == torch.int64


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("content", [b"", b"this is no weights file", b"\x80\x02}", b"PK\x03\x04 broken", bytes(100)])
def test_what_is_no_weights_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=name):
        weightfile.read(tmp_path / name)


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=40))
def test_no_bytes_make_read_weights_fail_otherwise(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.pth"
    path.write_bytes(content)
    with pytest.raises(UsageError):
        weightfile.read(path)


@pytest.mark.parametrize("content", [{"epoch": 3}, [torch.ones(1)], {}, torch.ones(3)])
def test_a_pth_without_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UsageError, match="holds no state_dict"):
        weightfile.read(tmp_path / "w.pth")


def test_a_missing_weights_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.pth' does not exist"):
        weightfile.read(tmp_path / "nowhere.pth")


def test_misfits_are_named(tiny_vit: Any) -> None:
    state = dict(tiny_vit.state_dict())
    state["head.weight"] = torch.zeros(7, 48)
    del state["norm.weight"]
    state["surplus"] = torch.zeros(1)
    with pytest.raises(UsageError) as error:
        weightfile.load(tiny_vit, state, "w.pth")
    for part in ("'w.pth'", "head.weight is (7, 48), the model wants (5, 48)", "norm.weight is missing", "surplus is unknown"):  # fmt: skip
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["patch_embed.proj.bias", "blocks.0.attn.proj.bias", "blocks.2.mlp.fc2.bias"])
def test_a_missing_bias_is_missing(tiny_vit: Any, name: str) -> None:
    """Strict also for biases: without it the model would keep whatever it was initialised with."""
    state = {k: v for k, v in tiny_vit.state_dict().items() if k != name}
    with torch.no_grad():
        tiny_vit.get_parameter(name).fill_(99.0)
    with pytest.raises(UsageError, match=f"{name} is missing"):
        weightfile.load(tiny_vit, state, "w.pth")


def test_weights_of_an_architecture_without_bias_load(tiny_kwargs: dict[str, Any]) -> None:
    """The biases that `create` adds are not in such a file."""
    model = vit.create("vit_tiny_patch16_224", {**tiny_kwargs, "proj_bias": False}, 5)
    state = {k: v for k, v in model.state_dict().items() if not k.endswith(("attn.proj.bias", "fc2.bias"))}
    state["head.bias"] = torch.full((5,), 2.0)
    weightfile.load(model, state, "w.pth")
    assert model.head.bias.tolist() == [2.0] * 5


def test_many_misfits_are_counted(tiny_vit: Any) -> None:
    with pytest.raises(UsageError, match=r"and \d+ more"):
        weightfile.load(tiny_vit, {"a": torch.zeros(1)}, "w.pth")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tiny_vit: Any, value: float) -> None:
    state = {k: v.clone() for k, v in tiny_vit.state_dict().items()}
    state["blocks.1.mlp.fc1.weight"][0, 0] = value
    with pytest.raises(UsageError, match=r"NaN or infinity in blocks\.1\.mlp\.fc1\.weight"):
        weightfile.load(tiny_vit, state, "w.pth")


# Size ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [HARSH, vit.plan_of_shape(((3, 24),) * 3), vit.plan_of_shape(((0, 0),) * 3)])
@torch.no_grad()
def test_macs_equal_what_torch_counts(tiny_vit: Any, make_images: Callable[..., Any], plan: Plan) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    sliced = vit.slice_model(tiny_vit, plan)
    for block in sliced.blocks:
        if hasattr(block.attn, "fused_attn"):
            block.attn.fused_attn = False  # torch does not count its fused CPU kernel
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sliced(make_images(1))
    assert 2 * vit.macs(vit.anatomy(tiny_vit), plan.shape) == counter.get_total_flops()


def test_parameters_by_hand(tiny_vit: Any) -> None:
    stem = 48 * 3 * 8 * 8 + 48 + 48 + 17 * 48
    block = 2 * 2 * 48 + (48 * 144 + 144) + (48 * 48 + 48) + (48 * 24 + 24) + (24 * 48 + 48)
    assert vit.parameters(tiny_vit) == stem + 3 * block + 2 * 48 + 48 * 5 + 5


# Grid ---------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(neurons=st.integers(1, 8192), step=st.sampled_from([1, 8, 16]))
def test_neuron_grid(neurons: int, step: int) -> None:
    grid = vit.neuron_grid(neurons, step)
    assert grid[0] == 0 and grid[-1] == neurons
    assert list(grid) == sorted(set(grid)) and len(grid) <= vit.MAX_WIDTHS + 1
    assert all(width % step == 0 for width in grid[:-1])
    assert len({b - a for a, b in itertools.pairwise(grid[:-1])}) <= 1  # even steps but for the last


def test_neuron_grid_of_deit_tiny() -> None:
    assert vit.neuron_grid(768, 8) == tuple(range(0, 769, 32))
    assert vit.neuron_grid(24, 8) == (0, 8, 16, 24)
    assert vit.neuron_grid(20, 8) == (0, 8, 16, 20)
