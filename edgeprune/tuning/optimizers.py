"""What steps the weights of a model that is tuned.

AdamW (Loshchilov and Hutter, arXiv 1711.05101), or for the matrices of the blocks Muon (Jordan et al., 2024, in the form
of Liu et al., arXiv 2502.16982): the momentum of a matrix is brought near the closest orthogonal one before it is
stepped by, at the size that a step of AdamW has, so that one learning rate serves both.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgeprune.compat import VisionTransformer
from edgeprune.errors import UsageError


def create(model: VisionTransformer, name: str, rate: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """The optimisers, by a name of `config.OPTIMIZERS`, of all weights that are trained; vectors, as biases, do not decay.

    Raises UsageError for Muon where torch is older than 2.9.
    """
    matrices = _matrices(model) if name == "muon" else []
    apart = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
    decay, plain = [p for p in rest if p.ndim >= 2], [p for p in rest if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=rate)]
    if matrices:
        if not hasattr(torch.optim, "Muon"):
            raise UsageError(
                f'Muon needs torch 2.9 or later, this is {torch.__version__}: set [finetune] optimizer to "adamw"'
            )
        found.append(torch.optim.Muon(matrices, lr=rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    return found


def _matrices(model: VisionTransformer) -> list[Tensor]:
    """Weights of linear layers of the blocks, but for those without any unit."""
    layers = [module for module in model.blocks.modules() if isinstance(module, nn.Linear)]
    return [layer.weight for layer in layers if layer.weight.requires_grad and layer.weight.numel()]
