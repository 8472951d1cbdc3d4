"""A model that no family is for: its card's [anatomy] says under which names its parts go, and that is put to the test."""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from edgeprune.anatomies import _parts
from edgeprune.compat import Mlp, VisionTransformer
from edgeprune.errors import UsageError
from edgeprune.families import BLOCK_PARTS, MODEL_PARTS

OPTIONAL = ("cls_token", "reg_token", "pos_embed", "norm_pre", "norm", "fc_norm", "ls1", "ls2")
TOLERANCE = 1e-3  # of the greatest logit
STD = 0.15  # of the random weights that are tried: enough for every part to matter


class Described:
    """A family of one: what `anatomies.Family` is, from a card's table of parts and their names."""

    CLASSES: tuple[type[nn.Module], ...] = ()

    def __init__(self, table: Mapping[str, str]) -> None:
        self.table = table
        usual = {part: name for part, name in {**MODEL_PARTS, **BLOCK_PARTS}.items() if name not in table.values()}
        self.names = {**usual, **table}  # without what the card says is something else

    def obstacle(self, model: Any) -> str:
        owners = [(model, "the model", MODEL_PARTS)]
        if (blocks := self._part(model, "blocks")) is not None and len(blocks):
            owners.append((blocks[0], "block 0", BLOCK_PARTS))
        for owner, who, parts in owners:
            for part in parts:
                if self._part(owner, part) is None and (part in self.table or part not in OPTIONAL):
                    return f"{who} has no '{self.names.get(part, part)}', which the card's [anatomy] must name: {part} = \"...\""
        return ""

    def rewrite(self, model: Any) -> VisionTransformer:
        """Raises UsageError unless the model so described answers as the one that timm made, with random weights.

        A model on the meta device computes nothing: its sizes alone are asked for, and it is not put to the test.
        """
        try:
            made = self._rewrite(model)
            blocks: Any = made.blocks
            sizes = {(block.attn.num_heads, block.attn.head_dim, block.mlp.fc1.out_features) for block in blocks}
            if len(sizes) > 1:
                raise ValueError("its blocks differ in heads, their dimensions or neurons")
            if any(parameter.is_meta for parameter in model.parameters()):
                return made
            original = _randomised(model)
            trial: Any = self._rewrite(original).eval()
            theirs = original.state_dict()
            ours = self.rename(theirs)
            if set(ours) == set(theirs) and any(ours[name] is not theirs[name] for name in ours):
                raise ValueError("parts have each other's usual names, so weights would be taken for one another's")
            trial.load_state_dict(ours, strict=True, assign=True)
            size = (made.patch_embed.proj.in_channels, *made.patch_embed.img_size)
            images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                got, want = trial(images), original(images)
            off = float((got - want).abs().max() / want.abs().max())
        except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"the card's [anatomy] does not describe the model: {reason[:300]}") from error
        if not off <= TOLERANCE:
            raise UsageError(
                "the card's [anatomy] does not describe the model: with random weights, pre-norm blocks of these parts are off "
                f"by {off:.0%} of the greatest logit; what it computes takes a file in edgeprune/anatomies/ (see CONTRIBUTING.md)"
            )
        return made

    def rename(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        blocks, renamed = re.escape(self.names["blocks"]), {}
        for name, tensor in state.items():
            found = re.match(rf"{blocks}\.(\d+)\.(.*)", name)
            stem, own, parts = (f"blocks.{found[1]}.", found[2], BLOCK_PARTS) if found else ("", name, MODEL_PARTS)
            renamed[stem + self._canonical(own, parts)] = tensor
        for kind in ("weight", "bias"):
            renamed = _parts.joined(renamed, tuple(f"attn.{one}.{kind}" for one in "qkv"), f"attn.qkv.{kind}")
        return renamed

    def _canonical(self, name: str, parts: Mapping[str, str]) -> str:
        """`ffn.0.weight` -> `mlp.fc1.weight`."""
        for part, ours in parts.items():
            own = [one.strip() for one in self.names.get(part, "").split(",")]
            called = [ours] if len(own) == 1 else [f"attn.{one}" for one in "qkv"]
            for theirs, our in zip(own, called, strict=False):
                if name == theirs or name.startswith(f"{theirs}."):
                    return our + name[len(theirs) :]
        return name

    def _part(self, owner: Any, part: str) -> Any:
        """The part of a model or block, None if it has none; a list where three names are given."""
        try:
            found = operator.attrgetter(*(one.strip() for one in self.names[part].split(",")))(owner)
        except (AttributeError, KeyError):
            return None
        return list(found) if isinstance(found, tuple) else found

    def _rewrite(self, model: Any) -> VisionTransformer:
        stem = SimpleNamespace(**{part: self._part(model, part) for part in MODEL_PARTS if part != "blocks"})
        for part in ("norm_pre", "norm", "fc_norm"):
            setattr(stem, part, getattr(stem, part) or nn.Identity())
        for name in ("pos_drop", "head_drop"):
            setattr(stem, name, getattr(model, name, nn.Identity()))
        blocks = self._part(model, "blocks")
        stem.embed_dim = self._part(blocks[0], "norm1").weight.shape[0]
        stem.num_classes = getattr(stem.head, "out_features", 0)
        stem.num_prefix_tokens = sum(token.shape[1] for token in (stem.cls_token, stem.reg_token) if token is not None)
        stem.no_embed_class = stem.pos_embed is not None and stem.pos_embed.shape[1] == stem.patch_embed.num_patches
        stem.global_pool = getattr(model, "global_pool", "avg" if stem.cls_token is None else "token")
        stem.pretrained_cfg = stem.default_cfg = getattr(model, "pretrained_cfg", {})  # sizes and means, for the data
        return _parts.around(stem, [self._block(block) for block in blocks])

    def _block(self, block: Any) -> nn.Module:
        part = {name: self._part(block, name) for name in BLOCK_PARTS}
        with torch.device("meta"):
            mlp: Any = Mlp(part["fc1"].in_features, part["fc2"].in_features)
        mlp.fc1, mlp.act, mlp.fc2 = part["fc1"], part["act"], part["fc2"]
        first = part["qkv"][0] if isinstance(part["qkv"], list) else part["qkv"]
        old = SimpleNamespace(proj=part["proj"], num_heads=part["num_heads"])
        attn = _parts.attention(old, part["proj"].in_features // part["num_heads"], first.bias is not None)
        rest = SimpleNamespace(
            norm1=part["norm1"], norm2=part["norm2"], mlp=mlp, gamma_1=None, gamma_2=None,
            drop_path1=nn.Identity(), drop_path2=nn.Identity(),
        )  # fmt: skip
        made: Any = _parts.block(rest, attn)
        made.ls1, made.ls2 = part["ls1"] or nn.Identity(), part["ls2"] or nn.Identity()
        return made


@torch.no_grad()
def _randomised(model: Any) -> Any:
    """A copy in eval mode with random weights: fresh ones are zero in places, and hide what a part does."""
    own, generator = copy.deepcopy(model).eval(), torch.Generator().manual_seed(0)
    for parameter in own.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * STD
        parameter.copy_(parameter.mean() + noise if parameter.ndim < 2 else noise)
    return own
