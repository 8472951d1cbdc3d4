"""What a Vision Transformer is: units, slicing, running; of timm's VisionTransformer, which `anatomies` makes of others.

A block holds two prunable sub-blocks, attention and MLP, each ending in a linear layer that writes
to the residual stream: `attn.proj` and `mlp.fc2`. The units of a sub-block are slices of that
layer's input: a head is `head_dim` columns of `proj`, a neuron one column of `fc2`. The residual
width is never pruned. A removed sub-block leaves its bias behind and costs nothing else.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from edgeprune import anatomies, families, modules, products, reducers
from edgeprune.anatomies import MergingBlock, PositionalAttention, WindowAttention
from edgeprune.compat import GluMlp, PatchEmbed, VisionTransformer, timm
from edgeprune.config import WIDTHS
from edgeprune.errors import UsageError, first_line, unknown
from edgeprune.reducers import Reduction, Seen
from edgeprune.types import REDUCER, BlockPlan, Plan, Shape, SubBlock, SubBlockKind, int8, left, rank

KINDS: tuple[SubBlockKind, SubBlockKind] = ("attn", "mlp")
MOST, MOST_BLOCKS = 1 << 16, 512  # of any number in a card's or plan's [kwargs]; larger ones would fill the memory
WHOLE_MLPS = "a norm inside the MLP couples its neurons by their mean and variance, so an MLP stays or goes as a whole"
ALL_TOKENS_STAY = "attention of this model depends on where its tokens are, so all of them stay"
WHOLE_HEADS = "queries and keys of this model are normed or turned before they meet, so its heads keep their dimensions"
MAX_WIDTHS, MAX_STAGE_WIDTHS = 24, 8  # MLP widths that are measured, besides 0; where there are several stages, of each


@dataclass(frozen=True)
class Stage:
    """Blocks in a row that are all of one size, in the dense model."""

    blocks: int
    heads: int
    head_dim: int
    neurons: int
    width: int
    tokens: int
    window: int = 0  # how many tokens attend to each other; 0 = all of them

    @property
    def attended(self) -> int:
        """How many tokens each token attends to."""
        return self.window or self.tokens


@dataclass(frozen=True)
class Anatomy:
    """The sizes that pruning, tables and reports need; of the dense model. A plain ViT has one stage, Swin four."""

    stages: tuple[Stage, ...]
    image: tuple[int, int, int]  # channels, height, width
    num_classes: int
    prefix: int = 1  # tokens that are no patches: class, distillation, registers
    gated: bool = False  # whether a neuron has two rows of `fc1`, one of which gates the other (SwiGLU)
    whole_mlp: bool = False  # whether a norm over the neurons couples them, so that an MLP stays or goes as a whole
    positional: bool = False  # whether attention depends on where its tokens are, so that all of them stay
    bilinear: bool = (
        True  # whether scores are products of what queries and keys read, so that heads may have fewer dimensions
    )

    @property
    def only(self) -> Stage:
        """The stage of a plain ViT. Raises ValueError for a hierarchy."""
        (stage,) = self.stages
        return stage

    @property
    def by_block(self) -> tuple[Stage, ...]:
        """The stage of every block."""
        return tuple(stage for stage in self.stages for _ in range(stage.blocks))

    @property
    def blocks(self) -> int:
        return sum(stage.blocks for stage in self.stages)

    @property
    def streamed(self) -> int:
        """How many numbers the residual streams of one image have, before the first sub-block and after each."""
        first = self.stages[0]
        return first.tokens * first.width + sum(2 * s.blocks * s.tokens * s.width for s in self.stages)

    @property
    def patches(self) -> int:
        """That come into the first block."""
        return self.stages[0].tokens - self.prefix

    @property
    def shape(self) -> Shape:
        return tuple((stage.heads, stage.neurons) for stage in self.by_block)

    def units(self, at: SubBlock) -> int:
        """How many units a dense sub-block has: heads or neurons."""
        stage = self.by_block[at[0]]
        return stage.heads if at[1] == "attn" else stage.neurons

    def row_groups(self, kind: SubBlockKind) -> int:
        """How many rows of the first layer belong to one input column of the last: queries, keys and values; gates."""
        return 3 if kind == "attn" else 2 if self.gated else 1

    def unit_size(self, at: SubBlock) -> int:
        """How many input columns of `proj` or `fc2` one unit spans."""
        return self.by_block[at[0]].head_dim if at[1] == "attn" else 1


class RemovedSubBlock(nn.Module):
    """What stays of a removed sub-block: its bias, broadcast over the tokens."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.bias


class ReducingBlock(nn.Module):
    """A block after whose attention only so many patch tokens go on; the parts and their names are the block's own."""

    attn: Any
    norm1: nn.Module
    ls1: nn.Module

    def __init__(self, block: nn.Module, prefix: int, patches: int, reducer: str) -> None:
        super().__init__()
        self._modules.update(block._modules)
        self.prefix, self.patches, self.reducer = prefix, patches, reducer

    def forward(self, stream: Tensor) -> Tensor:
        return self.run(stream)[0]

    def run(self, stream: Tensor) -> tuple[Tensor, Reduction]:
        """The residual stream after the block, and what became of its tokens."""
        written, queries, keys = attend(self.attn, self.norm1(stream))
        stream = stream + self.ls1(written)
        seen = Seen(stream, queries, keys, self.prefix)
        reduction = reducers.get(self.reducer).reduce(seen, self.patches)
        return step(self, "mlp", reduction(stream)), reduction

    def reduction(self, before: Tensor, after: Tensor) -> Reduction:
        """What becomes of the tokens, from the residual stream `[n, tokens, width]` before and after the attention."""
        return reduction(self.attn, self.norm1(before), after, self.prefix, self.patches, self.reducer)


def reduction(attn: Any, normed: Tensor, after: Tensor, prefix: int, patches: int, reducer: str) -> Reduction:
    """What becomes of the tokens after an attention that read `normed` and led to the residual stream `after`."""
    with products.layers():
        queries, keys, _ = map(products.wide, _heads(attn, normed))
    return reducers.get(reducer).reduce(Seen(after, queries * attn.scale, keys, prefix), patches)


def attend(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """timm's `Attention.forward`, and the scaled queries and the keys `[n, heads, tokens, head_dim]` on the way."""
    queries, keys, values = _heads(attn, x)
    mixed = nn.functional.scaled_dot_product_attention(queries, keys, values)
    return attn.proj(mixed.transpose(1, 2).flatten(2)), queries * attn.scale, keys


def _heads(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[n, heads, tokens, head_dim]`."""
    split = attn.qkv(x).reshape(*x.shape[:2], 3, attn.num_heads, attn.head_dim)
    queries, keys, values = split.permute(2, 0, 3, 1, 4).unbind(0)
    return attn.q_norm(queries), attn.k_norm(keys), values


def grids(sizes: Anatomy, step: int) -> tuple[tuple[int, ...], ...]:
    """The MLP widths a plan may choose, per stage: those of `neuron_grid`, or none and all."""
    if sizes.whole_mlp:
        return tuple((0, stage.neurons) for stage in sizes.stages)
    most = MAX_WIDTHS if len(sizes.stages) == 1 else MAX_STAGE_WIDTHS
    return tuple(neuron_grid(stage.neurons, step, most) for stage in sizes.stages)


def neuron_grid(neurons: int, step: int, most: int = MAX_WIDTHS) -> tuple[int, ...]:
    """The MLP widths a plan may choose: 0, multiples of the SIMD-friendly `step`, and the dense width.

    The step doubles until at most so many widths remain, so that all of them can be measured.
    """
    while neurons / step > most:
        step *= 2
    return tuple(sorted({*range(0, neurons, step), neurons}))


def create(
    architecture: str,
    kwargs: dict[str, Any],
    num_classes: int,
    anatomy: Mapping[str, str] | None = None,
    *,
    pretrained: bool = False,
) -> VisionTransformer:
    """A dense timm ViT in eval mode, its `proj` and `fc2` with a bias (zero where timm had none).

    `num_classes` 0 leaves the number to timm. anatomy: what a card says of a model that edgeprune does not know.

    Raises UsageError for a name timm does not know, arguments the model refuses, and models whose
    blocks are not the plain pre-norm blocks that this version can slice.
    """
    hub = architecture.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    if not hub and not timm.is_model(architecture.split(".")[0]):
        raise unknown("model", architecture, timm.list_models([f"*{part}*" for part in families.PARTS]))
    check_kwargs(architecture, kwargs)
    if num_classes:
        kwargs = {**kwargs, "num_classes": num_classes}
    on_meta = functools.partial(_on_meta, architecture, kwargs)
    if not hub:
        _check_early(on_meta, architecture, anatomy or {})
    try:
        model: Any = timm.create_model(architecture, pretrained=pretrained, **kwargs)
    except OSError as error:
        raise UsageError(
            f"the weights of '{architecture}' cannot be fetched ({first_line(error)}); give a file with --weights"
        ) from error
    except Exception as error:  # whatever its layers make of strange sizes
        raise UsageError(
            f"timm cannot make '{architecture}' with {kwargs or 'no arguments'}: {first_line(error)}"
        ) from error
    made: Any = anatomies.canonical(model, check_anatomy(model, architecture, anatomy or {}))
    made.as_timm = on_meta
    before = set(made.state_dict())
    block: Any
    for block in made.blocks:
        for kind in KINDS:
            layer = output_layer(block, kind)
            if layer.bias is None:
                layer.bias = nn.Parameter(torch.zeros(layer.out_features))
    made.added_biases = frozenset(set(made.state_dict()) - before)  # what foreign weights may lack
    return cast(VisionTransformer, made)


def _on_meta(architecture: str, kwargs: dict[str, Any]) -> nn.Module:
    """timm's model without weights."""
    with torch.device("meta"):
        return timm.create_model(architecture, **kwargs)


def _check_early(on_meta: Callable[[], nn.Module], architecture: str, anatomy: Mapping[str, str]) -> None:
    """`check_anatomy` without making any weights, which takes minutes for a large model; what fails otherwise fails later."""
    try:
        model = on_meta()
    except Exception:
        return
    check_anatomy(model, architecture, anatomy)


def check_kwargs(architecture: str, kwargs: dict[str, Any]) -> None:
    """Raise UsageError for what is no argument of the model itself: cards and plans come from elsewhere.

    timm takes others with them, such as a checkpoint that it would unpickle.
    """
    known = {key for cls in anatomies.classes() for key in inspect.signature(cls.__init__).parameters} - {"self"}
    for key, value in kwargs.items():
        if key not in known:
            raise UsageError(f"timm cannot make '{architecture}' with {kwargs}: {unknown('argument', key, known)}")
        plain = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(one, (bool, int, float, str)) or one is None for one in plain):
            raise UsageError(
                f"the argument '{key}' in [kwargs] must be a number, a text, true or false, or a list of them"
            )
        most = MOST_BLOCKS if key == "depth" else MOST
        if any(isinstance(one, (int, float)) and not -most <= one <= most for one in plain):
            raise UsageError(f"the argument '{key}' in [kwargs] is beyond {most}: {str(value)[:40]}")


def check_anatomy(model: Any, name: str, anatomy: Mapping[str, str]) -> anatomies.Family:
    """The family of a timm model; raises UsageError, saying what and where, unless every block is one we can slice."""
    family = anatomies.find(model, anatomy)
    nearest = (
        f"the nearest model that is tested is '{families.nearest(name)}' (`edgeprune models --supported` lists them)"
    )
    if family is None:
        known = ", ".join(cls.__name__ for cls in anatomies.classes())
        raise UsageError(
            f"'{name}' is a {type(model).__name__}; edgeprune prunes timm's {known}; {nearest}; "
            "if its blocks are a plain ViT's under other names, the card's [anatomy] can say so"
        )
    if obstacle := family.obstacle(model) or ("" if anatomy else _odd_patches(model)):
        raise UsageError(f"'{name}' cannot be sliced: {obstacle}; {nearest}")
    return family


def _odd_patches(model: Any) -> str:
    """What is wrong with how patches are made, in words; "" if one convolution makes them."""
    patches = model.patch_embed
    if isinstance(patches, PatchEmbed) and isinstance(patches.proj, nn.Conv2d):
        return ""
    return f"its patches come from a {type(patches).__name__}, not from one convolution"


def anatomy(model: VisionTransformer) -> Anatomy:
    """The sizes of a dense model."""
    height, width = model.patch_embed.img_size
    stages: list[Stage] = []
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    block: Any
    for block in model.blocks:
        if stages and not isinstance(block, MergingBlock):
            stages[-1] = replace(stages[-1], blocks=stages[-1].blocks + 1)
            continue
        attn = block.attn
        if isinstance(block, MergingBlock):
            tokens = block.merge.tokens
        window = attn.window if isinstance(attn, WindowAttention) else 0
        stages.append(
            Stage(1, attn.num_heads, attn.head_dim, block.mlp.fc2.in_features, attn.proj.out_features, tokens, window)
        )
    return Anatomy(
        stages=tuple(stages),
        image=(model.patch_embed.proj.in_channels, height, width),
        num_classes=model.num_classes,
        prefix=model.num_prefix_tokens,
        gated=isinstance(block.mlp, GluMlp),
        whole_mlp=not isinstance(block.mlp.norm, nn.Identity),
        positional=isinstance(block.attn, PositionalAttention),
        bilinear=not isinstance(block.attn, PositionalAttention) and isinstance(block.attn.q_norm, nn.Identity),
    )


def sub_block(block: Any, kind: SubBlockKind) -> Any:
    """Attention or MLP."""
    return block.attn if kind == "attn" else block.mlp


def output_layer(block: Any, kind: SubBlockKind) -> nn.Linear:
    """The linear layer that writes the sub-block's result to the residual stream."""
    return last_layer(sub_block(block, kind), kind)


def last_layer(sub: Any, kind: SubBlockKind) -> nn.Linear:
    """The last layer of an attention or MLP that is not removed."""
    return cast(nn.Linear, sub.proj if kind == "attn" else sub.fc2)


def first_layer(sub: Any, kind: SubBlockKind) -> nn.Linear:
    """The first layer of an attention or MLP that is not removed: queries, keys and values, or `fc1`."""
    return cast(nn.Linear, sub.qkv if kind == "attn" else sub.fc1)


def first_rows(at: SubBlock, units: tuple[int, ...], sizes: Anatomy) -> Tensor:
    """The rows of a dense sub-block's first layer that belong to these units, in the order that slicing leaves."""
    kept, groups = columns(units, sizes.unit_size(at)), torch.arange(sizes.row_groups(at[1]))
    return (groups[:, None] * (sizes.units(at) * sizes.unit_size(at)) + kept).flatten()


def hidden(block: Any, kind: SubBlockKind, stream: Tensor, rows: Tensor) -> Tensor:
    """What these rows of a dense sub-block's first layer make of the residual stream, `[n, tokens, rows]`."""
    layer = first_layer(sub_block(block, kind), kind)
    normed = (block.norm1 if kind == "attn" else block.norm2)(stream)
    bias = None if layer.bias is None else layer.bias[rows]
    with products.layers():
        return products.wide(nn.functional.linear(normed, layer.weight[rows], bias))


@torch.no_grad()
def write_output(sub: Any, kind: SubBlockKind, weight: Tensor, bias: Tensor) -> None:
    """Set weight `[width, inputs]` and bias `[width]` of the layer that ends a sub-block; a removed one has but a bias."""
    if isinstance(sub, RemovedSubBlock):
        sub.bias.copy_(bias)
    else:
        layer = last_layer(sub, kind)
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)


# Slicing ------------------------------------------------------------------------------------


def dense_plan(sizes: Anatomy) -> Plan:
    """The plan that keeps everything."""
    return plan_of_shape(sizes.shape)


def plan_of_shape(shape: Shape, reducer: str = REDUCER) -> Plan:
    """A plan with this shape that keeps the first units; for models whose speed is all that matters."""
    return Plan(
        tuple(BlockPlan(tuple(range(row[0])), tuple(range(row[1])), left(row), int8(row), rank(row)) for row in shape),
        reducer,
    )


def columns(units: tuple[int, ...], unit_size: int) -> Tensor:
    """The input columns of `proj` or `fc2` that these units span, as an index tensor `[units * unit_size]`."""
    starts = torch.tensor(units, dtype=torch.long)[:, None] * unit_size
    return (starts + torch.arange(unit_size)).flatten()


def slice_model(model: VisionTransformer, plan: Plan) -> VisionTransformer:
    """A copy of a dense model that keeps only the plan's heads, neurons and tokens; plain modules, static shapes.

    Where all tokens stay, its output is the dense model's with the removed columns of `proj` and `fc2` set to zero.
    Raises UsageError when the plan does not fit the model.
    """
    sizes = anatomy(model)
    check_plan(plan, sizes)
    model = copy.deepcopy(model)
    block: Any
    for i, (block, keep, stage) in enumerate(zip(model.blocks, plan.blocks, sizes.by_block, strict=True)):
        if len(keep.heads) < stage.heads:
            block.attn = slice_sub_block(block, (i, "attn"), keep.heads, sizes)
        if len(keep.neurons) < stage.neurons:
            block.mlp = slice_sub_block(block, (i, "mlp"), keep.neurons, sizes)
        if not keep.heads:
            block.norm1 = nn.Identity()
        if not keep.neurons:
            block.norm2 = nn.Identity()
        if keep.patches is not None:
            model.blocks[i] = ReducingBlock(block, sizes.prefix, keep.patches, plan.reducer)
    return model


def slice_sub_block(block: Any, at: SubBlock, units: tuple[int, ...], sizes: Anatomy) -> Any:
    """A copy of a dense block's attention or MLP that keeps only these units, ascending; the block is left alone."""
    kind = at[1]
    if not units:
        return RemovedSubBlock(output_layer(block, kind).bias)
    sub = copy.deepcopy(sub_block(block, kind))
    kept = columns(units, sizes.unit_size(at))
    rows = first_rows(at, units, sizes)
    if kind == "attn":
        sub.qkv, sub.proj = linear(sub.qkv, rows=rows), linear(sub.proj, cols=kept)
        sub.num_heads, sub.attn_dim = len(units), len(kept)
        if isinstance(sub, PositionalAttention):
            sub.keep_heads(units)
    else:
        sub.fc1, sub.fc2 = linear(sub.fc1, rows=rows), linear(sub.fc2, cols=kept)
    return sub


@torch.no_grad()
def silence(model: VisionTransformer) -> VisionTransformer:
    """Make the rows of the first layers zero, in place, whose units nothing reads; the model, whose output stays, is returned.

    What such units would compute is no part of any criterion's norms, means or variances.
    """
    sizes = anatomy(model)
    for i, block in enumerate(model.blocks):
        for kind in KINDS:
            read = output_layer(block, kind).weight.abs().sum(0).view(sizes.units((i, kind)), -1).sum(1) > 0
            rows = first_rows((i, kind), tuple((~read).nonzero().flatten().tolist()), sizes)
            layer = first_layer(sub_block(block, kind), kind)
            for own in (layer.weight, layer.bias):
                if own is not None:
                    own[rows] = 0.0
    return model


@torch.no_grad()
def in_dense_shape(dense: VisionTransformer, plan: Plan, pruned: VisionTransformer) -> VisionTransformer:
    """A pruned model as a dense one in which removed units say nothing and nothing reads them; its output is the pruned model's.

    What was removed is thus worth nothing to every criterion, and goes first when more is pruned.
    """
    sizes = anatomy(dense)
    state = pruned.state_dict()
    own = copy.deepcopy(dense)
    shared = {k: v for k, v in state.items() if k in (full := own.state_dict()) and v.shape == full[k].shape}
    own.load_state_dict(shared, strict=False)
    block: Any
    for i, (block, small, keep) in enumerate(zip(own.blocks, pruned.blocks, plan.blocks, strict=True)):
        for kind in KINDS:
            units = keep.heads if kind == "attn" else keep.neurons
            if len(units) == sizes.units((i, kind)):
                continue
            sub = sub_block(small, kind)
            layer, kept = output_layer(block, kind), columns(units, sizes.unit_size((i, kind)))
            weight = torch.zeros_like(layer.weight)
            if not units:
                write_output(sub_block(block, kind), kind, weight, sub.bias)
                continue
            weight[:, kept] = output_layer(small, kind).weight
            write_output(sub_block(block, kind), kind, weight, output_layer(small, kind).bias)
            rows = first_rows((i, kind), units, sizes)
            into, source = first_layer(sub_block(block, kind), kind), first_layer(sub, kind)
            into.weight[rows] = source.weight
            if into.bias is not None:
                into.bias[rows] = source.bias
            if kind == "attn" and isinstance(sub, PositionalAttention):
                sub_block(block, kind).write_heads(units, sub)
    return silence(own)


def check_plan(plan: Plan, sizes: Anatomy) -> None:
    """Raise UsageError unless the plan names existing units, ascending, for every block."""
    if len(plan.blocks) != sizes.blocks:
        raise UsageError(f"the plan has {len(plan.blocks)} blocks, the model {sizes.blocks}")
    for i, (block, stage) in enumerate(zip(plan.blocks, sizes.by_block, strict=True)):
        for what, units, count in (("heads", block.heads, stage.heads), ("neurons", block.neurons, stage.neurons)):
            if list(units) != sorted(set(units)) or (units and not 0 <= units[0] <= units[-1] < count):
                raise UsageError(f"block {i} of the plan: {what} must be ascending numbers from 0 to {count - 1}")
        if sizes.whole_mlp and 0 < len(block.neurons) < stage.neurons:
            raise UsageError(
                f"block {i} of the plan keeps {len(block.neurons)} of {stage.neurons} neurons; {WHOLE_MLPS}"
            )
    staying = sizes.patches
    for i, block in enumerate(plan.blocks):
        for kind in block.int8:
            if not (block.heads if kind == "attn" else block.neurons):
                raise UsageError(f"block {i} of the plan has int8 for its {kind}, which is removed")
        if block.rank is not None:
            if not sizes.bilinear:
                raise UsageError(f"block {i} of the plan has a rank; {WHOLE_HEADS}")
            if not block.heads or not 1 <= block.rank < sizes.by_block[i].head_dim:
                raise UsageError(
                    f"block {i} of the plan: a rank must be a number from 1 to {sizes.by_block[i].head_dim - 1}, of heads that stay"
                )
        if block.patches is not None:
            if sizes.positional:
                raise UsageError(f"block {i} of the plan drops tokens; {ALL_TOKENS_STAY}")
            if not 1 <= block.patches <= staying:
                raise UsageError(
                    f"block {i} of the plan: patches must be a number from 1 to {staying}, those that came in"
                )
            if not block.heads:
                raise UsageError(f"block {i} of the plan drops tokens, but has no attention to choose them by")
            staying = block.patches
    if staying < sizes.patches:
        modules.check("reducer", plan.reducer)


def linear(layer: nn.Linear, *, rows: Tensor | None = None, cols: Tensor | None = None) -> nn.Linear:
    weight: Tensor = layer.weight.detach()
    bias: Tensor | None = layer.bias
    if rows is not None:
        weight = weight[rows]
        bias = None if bias is None else bias[rows]
    if cols is not None:
        weight = weight[:, cols]
    sliced = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=weight.dtype)
    sliced.weight = nn.Parameter(weight.clone())
    if bias is not None:
        sliced.bias = nn.Parameter(bias.detach().clone())
    return sliced


# Running ------------------------------------------------------------------------------------


def embed(model: VisionTransformer, images: Tensor) -> Tensor:
    """`[n, channels, height, width]` -> the residual stream before block 0, `[n, tokens, width]`."""
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))


def entered(block: Any, stream: Tensor) -> Tensor:
    """The residual stream as a block's sub-blocks see it: at the first block of a later stage, patches are merged."""
    return block.merge(stream) if isinstance(block, MergingBlock) else stream


def step(block: Any, kind: SubBlockKind, stream: Tensor, sub: Any = None) -> Tensor:
    """The residual stream, `entered` into the block, after one sub-block of it, or after `sub` in its place."""
    return stream + scale(block, kind)(call(block, kind, stream, sub))


def walk(model: VisionTransformer, at: SubBlock, stream: Tensor) -> Tensor:
    """The residual stream after one sub-block more."""
    block = model.blocks[at[0]]
    return step(block, at[1], entered(block, stream) if at[1] == "attn" else stream)


def call(block: Any, kind: SubBlockKind, stream: Tensor, sub: Any = None) -> Tensor:
    """What the sub-block, or `sub` in its place, makes of the residual stream, before LayerScale."""
    sub = sub_block(block, kind) if sub is None else sub
    if isinstance(sub, RemovedSubBlock):
        return sub(stream)
    with products.layers():
        return products.wide(sub((block.norm1 if kind == "attn" else block.norm2)(stream)))


def scale(block: Any, kind: SubBlockKind) -> nn.Module:
    """LayerScale, or the identity."""
    return block.ls1 if kind == "attn" else block.ls2


def classify(model: VisionTransformer, stream: Tensor) -> Tensor:
    """The residual stream after the last block -> logits `[n, classes]`."""
    return model.forward_head(model.norm(stream))


def features(model: VisionTransformer, stream: Tensor) -> Tensor:
    """The residual stream after the last block -> what the classifier reads, `[n, features]`."""
    return model.forward_head(model.norm(stream), pre_logits=True)


def summary(model: VisionTransformer, stream: Tensor) -> Tensor:
    """The class token of a residual stream, or the mean of the patches where the model classifies by that, `[n, width]`."""
    return stream[:, 0] if model.global_pool == "token" else stream[:, model.num_prefix_tokens :].mean(1)


def streams(model: VisionTransformer, images: Tensor) -> Iterator[Tensor]:
    """The residual stream after each block, `[n, tokens, width]`, then the logits `[n, classes]`."""
    yield from (stream for stream, _ in reduced_streams(model, images))


def reduced_streams(model: VisionTransformer, images: Tensor) -> Iterator[tuple[Tensor, Reduction]]:
    """The same, each with what became of the tokens so far: applied to a dense model's stream, it can be compared."""
    x = embed(model, images)
    so_far: Reduction = as_it_is
    for block in model.blocks:
        with products.layers():
            if isinstance(block, ReducingBlock):
                x, own = block.run(x)
                so_far = chained(so_far, own)
            else:
                x = block(x)
        yield x, so_far
    yield classify(model, x), so_far


def chained(first: Reduction, second: Reduction) -> Reduction:
    """One reduction after the other."""
    return lambda stream: second(first(stream))


def as_it_is(stream: Tensor) -> Tensor:
    """The reduction that keeps every token."""
    return stream


def reduced_rows(values: Tensor, reduction: Reduction) -> Tensor:
    """The same for a number per token, `[n, tokens]`."""
    return reduction(values[..., None])[..., 0]


# Size ---------------------------------------------------------------------------------------


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def impossible(sizes: Anatomy) -> dict[str, str]:
    """What a plan of this model cannot choose, and why."""
    found = {"tokens": ALL_TOKENS_STAY} if sizes.positional else {}
    return found if sizes.bilinear else {**found, "qk": WHOLE_HEADS}


def choosable(dims: tuple[str, ...], sizes: Anatomy) -> tuple[str, ...]:
    """Of what a plan shall choose, what it can.

    Raises UsageError where what cannot be was asked for by name, which is whenever not all widths are chosen.
    """
    cannot = impossible(sizes)
    possible = tuple(name for name in dims if name not in cannot)
    for name in dims:
        if name in cannot and not set(WIDTHS) <= set(dims):
            raise UsageError(
                f"{cannot[name]}; choose --dims {','.join(possible or WIDTHS)}, without a method that needs {name}"
            )
    return possible


def macs(sizes: Anatomy, shape: Shape) -> int:
    """Multiply-adds of one image through a model of this shape (linear layers, attention, stem, head)."""
    channels, height, width = sizes.image
    first, last = sizes.stages[0], sizes.stages[-1]
    total = channels * height * width * first.width + last.width * sizes.num_classes
    for before, after in itertools.pairwise(sizes.stages):
        total += after.tokens * 4 * before.width * after.width
    fewer: int | None = None  # tokens, where some have gone
    for row, stage in zip(shape, sizes.by_block, strict=True):
        heads, neurons = row[:2]
        c, d, n = stage.width, rank(row) or stage.head_dim, fewer or stage.tokens
        total += n * c * heads * d * 4 + 2 * n * (stage.window or n) * heads * d
        patches = left(row)
        fewer = fewer if patches is None else sizes.prefix + patches
        total += (1 + sizes.row_groups("mlp")) * (fewer or n) * c * neurons
    return total
