"""Adapting weights from elsewhere to a model of another image size or number of channels, as timm does it for its own."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from edgeprune.compat import adapt_input_conv, checkpoint_filter

STEM = "patch_embed.proj.weight"
RGB = 3


def _target(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """The model as timm has it, without weights, for tensors in timm's names; as it is for those in its own."""
    own, named = model.state_dict(), getattr(model, "timm_shapes", {})
    if any(name in named and name not in own for name in state):
        theirs: nn.Module = cast(Any, model).as_timm()
        return theirs
    return model


def adapt(model: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors as the model takes them, and what was done to them, in words.

    Position embeddings (or tables) are resampled to the model's grid, weights for RGB images summed or repeated for
    another number of channels. What does not fit even then is returned as it came, to be refused by name.
    """
    target = _target(model, state)
    own = target.state_dict()
    if all(name in state and state[name].shape == value.shape for name, value in own.items()):
        return state, []
    stem, found = state.get(STEM), dict(state)
    done = []
    if stem is not None and STEM in own and stem.ndim == 4:
        wanted = own[STEM].shape
        if stem.shape[2:] != wanted[2:]:  # other patches make another model
            return state, []
        if stem.shape[1] != wanted[1] and stem.shape[1] == RGB:
            found[STEM] = adapt_input_conv(wanted[1], stem)
            done.append(f"weights for RGB images made ones for {wanted[1]} channel{'s' * (wanted[1] > 1)}")
    try:
        found = checkpoint_filter(target)(found, target)
    except Exception:  # whatever it makes of tensors that are not what their names say; loading names them
        return state, []
    added = getattr(target, "added_biases", ())
    missing = [name for name in own if name not in found and name not in added]
    if missing or any(name not in own or own[name].shape != value.shape for name, value in found.items()):
        return state, []
    for name, value in found.items():
        before = state.get(name)
        if before is not None and before.shape != value.shape and name != STEM:
            done.append(f"{name} resampled from {tuple(before.shape)} to {tuple(value.shape)}")
    return found, done
