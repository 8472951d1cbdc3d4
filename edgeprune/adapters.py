"""Low-rank adapters (LoRA, arXiv 2106.09685): W + alpha / r B A, where tuning changes A and B alone.

`attach` puts them beside the linear layers of every block and freezes the rest but the classifier; `save` writes what
was learnt, `merge` folds it into the weights. `rebuild` makes the tuned model of the dense one, its plan and that file:
a second task or latency then costs a plan and a small file. While attached, W + alpha / r B A is made anew at every
step, so that training takes as long as ever; what is saved is the optimizer's memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from edgeprune import vit, weightfile
from edgeprune.compat import VisionTransformer
from edgeprune.errors import UsageError
from edgeprune.types import Plan

RANK = 8
ALPHA = 16.0  # with the rank, LLM-Pruner's


class Adapter(nn.Module):
    """A weight `[outputs, inputs]` plus scale * B A; B is zero at first."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        drawn = torch.randn(rank, inputs, generator=generator) / inputs**0.5
        self.a = nn.Parameter(drawn.to(weight))
        self.b = nn.Parameter(weight.new_zeros(outputs, rank))
        self.scale = ALPHA / rank

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * (self.b @ self.a)


def attach(model: VisionTransformer, rank: int = RANK, seed: int = 0) -> None:
    """Adapters for queries, keys and values, `proj`, `fc1` and `fc2`; only they and the classifier remain trainable."""
    model.requires_grad_(False)
    for classifier in ("head", "head_dist"):  # DeiT's distilled models have two
        getattr(model, classifier, nn.Identity()).requires_grad_()
    generator = torch.Generator().manual_seed(seed)
    block: Any
    for block in model.blocks:
        for kind in vit.KINDS:
            sub = vit.sub_block(block, kind)
            if not isinstance(sub, vit.RemovedSubBlock):
                for layer in (vit.first_layer(sub, kind), vit.last_layer(sub, kind)):
                    parametrize.register_parametrization(layer, "weight", Adapter(layer.weight, rank, generator))


def attached(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that have an adapter, by name."""
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            yield name, module


def merge(model: VisionTransformer) -> None:
    """Fold the adapters into the weights: plain layers again, everything trainable."""
    for _, layer in list(attached(model)):
        parametrize.remove_parametrizations(layer, "weight")
    model.requires_grad_()


def save(model: VisionTransformer, dense: VisionTransformer, plan: Plan, path: Path) -> None:
    """Write what `model`, with its adapters attached, has that `dense` cut by `plan` has not.

    `LAYER.a` `[rank, inputs]` and `LAYER.b` `[outputs, rank]` of every adapter that learnt something, their common
    `scale`, and every other tensor that is not the dense model's, whole: the classifier, and more if the model was
    trained, polished or solved for before its adapters were.
    """
    found = {"scale": torch.zeros(())}  # of no adapter, where every sub-block is removed
    own = {k.replace("parametrizations.weight.original", "weight"): v for k, v in model.state_dict().items()}
    for name, layer in attached(model):
        adapter: Adapter = layer.parametrizations.weight[0]
        found["scale"] = torch.tensor(adapter.scale)
        if bool(adapter.b.any()):
            found |= {f"{name}.a": adapter.a.detach(), f"{name}.b": adapter.b.detach()}
    base = vit.slice_model(dense, plan).state_dict()
    found |= {k: own[k] for k, v in base.items() if not torch.equal(own[k], v)}
    save_file({k: v.contiguous() for k, v in found.items()}, path)


def rebuild(dense: VisionTransformer, plan: Plan, path: Path) -> VisionTransformer:
    """The tuned model, its adapters merged, of the dense model that it was cut from, its plan and what `save` wrote.

    Raises UsageError when the three do not belong together.
    """
    model = vit.slice_model(dense, plan)
    found = weightfile.read(path)
    if "scale" not in found:
        raise UsageError(f"'{path}' holds no adapters: it has no 'scale'; give what a build with --recovery lora wrote")
    scale = found.pop("scale")
    layers = [name.removesuffix(".a") for name in found if name.endswith(".a")]
    factors = {name: (found.pop(f"{name}.a"), found.pop(f"{name}.b", None)) for name in layers}
    state = {**model.state_dict(), **found}
    for name, (a, b) in factors.items():
        weight = state.get(f"{name}.weight")
        if b is None or weight is None or weight.shape != (len(b), a.shape[-1]) or b.shape[1:] != a.shape[:1]:
            raise UsageError(
                f"the adapter of {name} in '{path}' does not fit the plan; give the plan it was tuned with"
            )
        state[f"{name}.weight"] = weight + scale * (b @ a)
    weightfile.load(model, state, str(path))
    return model.eval()
