"""The one place that imports timm, after making that work next to a CPU build of torch.

torchvision from the package index is a CUDA build. Beside a CPU torch its compiled operators do
not load, and its Python side then fails with "operator torchvision::nms does not exist". timm
needs neither operator, so declaring the two missing schemas is enough.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_LIBRARIES: list[torch.library.Library] = []  # a schema lives as long as its Library object


def heal_torchvision() -> list[str]:
    """Declare the torchvision operators that are absent; returns their names, [] when none was."""
    if _LIBRARIES:
        return []
    try:
        import torchvision  # noqa: F401  (loads the compiled operators where they fit)

        return []
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    except ImportError:
        return []
    # the failed import leaves half of torchvision behind; a second import must start afresh
    for name in [m for m in sys.modules if m == "torchvision" or m.startswith("torchvision.")]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "FRAGMENT")
    _LIBRARIES.append(library)
    missing = [name for name in _SCHEMAS if not hasattr(torch.ops.torchvision, name)]
    for name in missing:
        library.define(_SCHEMAS[name])
    return missing


heal_torchvision()

import timm  # noqa: E402
from timm.data import create_dataset, create_transform, resolve_model_data_config  # noqa: E402
from timm.layers import AttentionRope, GluMlp, LayerScale, Mlp, PatchEmbed, SwiGLU  # noqa: E402
from timm.models import adapt_input_conv  # noqa: E402
from timm.models.beit import Beit  # noqa: E402
from timm.models.deit import VisionTransformerDistilled  # noqa: E402
from timm.models.eva import Eva, EvaAttention, EvaBlock  # noqa: E402
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock  # noqa: E402
from timm.models.swin_transformer import WindowAttention as SwinAttention  # noqa: E402
from timm.models.vision_transformer import Attention, Block, VisionTransformer  # noqa: E402


def checkpoint_filter(model: torch.nn.Module) -> Callable[[dict[str, torch.Tensor], torch.nn.Module], Any]:
    """What timm does to weights from elsewhere before a model of this family takes them; the identity if it does nothing."""
    family = sys.modules[type(model).__module__]
    found: Callable[[dict[str, torch.Tensor], torch.nn.Module], Any]
    found = getattr(family, "checkpoint_filter_fn", lambda state, _: state)
    return found


__all__ = [
    "Attention",
    "AttentionRope",
    "Beit",
    "Block",
    "Eva",
    "EvaAttention",
    "EvaBlock",
    "GluMlp",
    "LayerScale",
    "Mlp",
    "PatchEmbed",
    "SwiGLU",
    "SwinAttention",
    "SwinTransformer",
    "SwinTransformerBlock",
    "VisionTransformer",
    "VisionTransformerDistilled",
    "adapt_input_conv",
    "checkpoint_filter",
    "create_dataset",
    "create_transform",
    "heal_torchvision",
    "resolve_model_data_config",
    "timm",
]
