"""Values as JSON and tensors, for checkpoints: what a coach knows, without pickle."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgeprune.types import BlockPlan, Plan, to_json


def freeze(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON; tensors in it go to `tensors`, which may hold others. Raises TypeError for what cannot be kept."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [freeze(one, tensors) for one in value]}
    if isinstance(value, dict):
        return {"dict": [[freeze(key, tensors), freeze(one, tensors)] for key, one in value.items()]}
    if isinstance(value, Tensor):
        name = _add(tensors, value.detach())
        grad = _add(tensors, value.grad) if value.is_leaf and value.grad is not None else None
        return {"tensor": name, "leaf": value.is_leaf and value.requires_grad, "grad": grad}
    if isinstance(value, np.ndarray):
        return {"array": _add(tensors, torch.from_numpy(value.copy()))}
    if isinstance(value, torch.Generator):
        return {"generator": _add(tensors, value.get_state())}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, Plan):
        return {"plan": to_json(value)}
    raise TypeError(f"a {type(value).__name__} cannot be a part of a checkpoint")


def thaw(document: Any, tensors: dict[str, Tensor]) -> Any:
    """What was frozen: equal, but with no object in two places, and no history of what tensors were computed from."""
    if not isinstance(document, dict):
        return document
    [kind, *_] = document
    own = document[kind]
    if kind in ("list", "tuple"):
        values = [thaw(one, tensors) for one in own]
        return values if kind == "list" else tuple(values)
    if kind == "dict":
        return {thaw(key, tensors): thaw(one, tensors) for key, one in own}
    if kind == "tensor":
        value = tensors[own].clone().requires_grad_(document["leaf"])
        value.grad = None if document["grad"] is None else tensors[document["grad"]].clone()
        return value
    if kind == "array":
        return tensors[own].numpy().copy()
    if kind == "generator":
        generator = torch.Generator()
        generator.set_state(tensors[own])
        return generator
    if kind == "range":
        return range(*own)
    blocks = (BlockPlan(tuple(b["heads"]), tuple(b["neurons"]), b["patches"]) for b in own["blocks"])
    return Plan(tuple(blocks), own["reducer"])


def _add(tensors: dict[str, Tensor], value: Tensor) -> str:
    name = f"frozen/{len(tensors)}"
    tensors[name] = value.clone()  # no two may share memory in a file
    return name
