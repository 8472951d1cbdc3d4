"""Files of weights: read without running any code that is in them, loaded strictly or refused by name."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgeprune.errors import StorageError, UsageError, first_line

#: What older files have besides weights; it follows from the architecture.
FOLLOWING = (".relative_position_index", ".attn_mask")


def read(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of a .pth read without running any code; float32.

    Raises StorageError for a file that cannot be read, UsageError for one that holds no weights
    or holds pickled code.
    """
    if not path.is_file():
        raise UsageError(f"weights file '{path}' does not exist; give a .safetensors or .pth file")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            refuse_compressed(path)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about pickle protocols: what matters is said below
                state = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise UsageError(f"'{path}' is not a safetensors file: {first_line(error)}") from error
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"'{path}' holds pickled code or is not a weights file; edgeprune never runs code from a file: "
            "save the state_dict alone, best as .safetensors"
        ) from error
    except UsageError:
        raise
    except OSError as error:
        raise StorageError(f"weights file '{path}' cannot be read: {error.strerror or error}") from error
    except Exception as error:  # whatever else torch finds in a file that it cannot read
        raise UsageError(f"'{path}' is not a weights file: {first_line(error)}") from error
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise UsageError(f"'{path}' holds no state_dict (a mapping of names to tensors)")
    state = {str(k).removeprefix("module."): v for k, v in state.items()}
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


def write(model: nn.Module, path: Path) -> None:
    """All tensors of the model as a .safetensors file. Raises OSError."""
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)


def refuse_compressed(path: Path) -> None:
    """Raise UsageError for a zip archive that is larger unpacked than packed: torch stores, and never compresses."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    size = path.stat().st_size
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or sum(e.file_size for e in entries) > size:
        raise UsageError(
            f"'{path}' is a compressed archive of {sum(e.file_size for e in entries)} bytes in {size}; torch writes none, "
            "so it is not unpacked: save the state_dict again, best as .safetensors"
        )


def load(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load strictly, in the model's own names or in timm's; raises UsageError naming the tensors that do not fit."""
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    timm_shapes: dict[str, torch.Size] = getattr(model, "timm_shapes", own)
    if any(name in timm_shapes and name not in own for name in state):
        state = {name: tensor for name, tensor in state.items() if not name.endswith(FOLLOWING)}
        _check_fit(state, timm_shapes, source)
        state = cast(Any, model).rename(state)
    added: Iterable[str] = getattr(model, "added_biases", ())
    state = {**{k: torch.zeros(own[k]) for k in added if k in own}, **state}
    _check_fit(state, own, source)
    broken = [k for k, v in state.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    if broken:
        raise UsageError(f"the weights in '{source}' hold NaN or infinity in {', '.join(broken[:4])}")
    model.load_state_dict(state, strict=True)


def _check_fit(state: dict[str, Tensor], shapes: dict[str, torch.Size], source: str) -> None:
    misfits = [f"{k} is {tuple(state[k].shape)}, the model wants {tuple(shape)}"
               for k, shape in shapes.items() if k in state and state[k].shape != shape]  # fmt: skip
    misfits += [f"{k} is missing" for k in shapes if k not in state]
    misfits += [f"{k} is unknown to the model" for k in state if k not in shapes]
    if misfits:
        more = f", and {len(misfits) - 4} more" if len(misfits) > 4 else ""
        raise UsageError(
            f"the weights in '{source}' do not fit the architecture: {'; '.join(misfits[:4])}{more}; "
            "give weights of this architecture, or change architecture and [kwargs] in the card"
        )
