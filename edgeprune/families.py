"""The timm names that are tested to prune, export, run in both runtimes and reload, by family. Imports nothing heavy.

Others of the same classes work as well; what cannot be sliced is refused by `vit.check_anatomy`, with the reason.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

from edgeprune.errors import unknown

FAMILIES: dict[str, tuple[str, ...]] = {
    "ViT": (
        "vit_tiny_patch16_224", "vit_small_patch16_224", "vit_small_patch32_224", "vit_base_patch8_224",
        "vit_base_patch16_224", "vit_base_patch16_224_miil", "vit_base_patch16_gap_224", "vit_small_patch16_36x1_224",
        "vit_base_patch16_plus_240", "flexivit_small", "test_vit", "test_vit2", "test_vit3",
    ),
    "ViT with registers": (
        "vit_little_patch16_reg4_gap_256", "vit_wee_patch16_reg1_gap_256", "vit_so150m_patch16_reg4_gap_256",
    ),
    "DeiT": (
        "deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224",
        "deit_tiny_distilled_patch16_224", "deit_small_distilled_patch16_224",
    ),
    "DeiT III": ("deit3_small_patch16_224", "deit3_medium_patch16_224", "deit3_base_patch16_224"),
    "DINOv2": (
        "vit_small_patch14_dinov2", "vit_base_patch14_dinov2", "vit_small_patch14_reg4_dinov2",
        "vit_giant_patch14_dinov2", "vit_giant_patch14_reg4_dinov2",
    ),
    "CLIP": (
        "vit_base_patch16_clip_224", "vit_base_patch32_clip_224", "vit_base_patch16_clip_quickgelu_224",
        "vit_xsmall_patch16_clip_224",
    ),
    "SigLIP": ("vit_base_patch16_siglip_224", "vit_base_patch16_siglip_gap_224", "vit_so400m_patch14_siglip_224"),
    "InternViT": ("vit_intern300m_patch14_448",),
    "AIMv2": ("aimv2_large_patch14_224",),
    "EVA": ("eva_giant_patch14_224", "eva_giant_patch14_clip_224"),
    "EVA-02": (
        "eva02_tiny_patch14_224", "eva02_small_patch14_224", "eva02_tiny_patch14_336", "eva02_base_patch14_224",
        "eva02_large_patch14_448",
    ),
    "DINOv3": ("vit_small_patch16_dinov3", "vit_base_patch16_dinov3", "vit_small_plus_patch16_dinov3"),
    "ViT with rotary embedding": (
        "vit_small_patch16_rope_224", "vit_medium_patch16_rope_reg1_gap_256", "vit_mediumd_patch16_rope_reg1_gap_256",
    ),
    "Perception Encoder": ("vit_pe_core_tiny_patch16_384", "vit_pe_core_base_patch16_224"),
    "BEiT": ("beit_base_patch16_224", "beit_large_patch16_224"),
    "BEiTv2": ("beitv2_base_patch16_224", "beitv2_large_patch16_224"),
    "Swin": (
        "swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224", "swin_base_patch4_window7_224",
        "swin_large_patch4_window7_224", "swin_base_patch4_window12_384", "swin_s3_tiny_224",
    ),
}  # fmt: skip

#: Of their names and those of their relatives; whatever has none of these is no model that edgeprune could prune.
PARTS = ("vit", "deit", "eva", "beit", "aim", "swin")

#: What a card's [anatomy] may name, and what timm's VisionTransformer calls it, in the model and in a block.
MODEL_PARTS = {
    name: name
    for name in ("patch_embed", "cls_token", "reg_token", "pos_embed", "norm_pre", "blocks", "norm", "fc_norm", "head")
}
BLOCK_PARTS = {
    "norm1": "norm1", "qkv": "attn.qkv", "num_heads": "attn.num_heads", "proj": "attn.proj", "ls1": "ls1",
    "norm2": "norm2", "fc1": "mlp.fc1", "act": "mlp.act", "fc2": "mlp.fc2", "ls2": "ls2",
}  # fmt: skip

NAMES = tuple(name for names in FAMILIES.values() for name in names)


def odd_part(anatomy: Mapping[str, object]) -> str:
    """What is wrong with a card's [anatomy], in words; "" if nothing."""
    known = {**MODEL_PARTS, **BLOCK_PARTS}
    for part, name in anatomy.items():
        if part not in known:
            return str(unknown("part", part, known))
        if not isinstance(name, str) or not re.fullmatch(r"\w+(\.\w+)*(, *\w+(\.\w+)*){0,2}", name):
            return f"'{part}' must be a name like 'mlp.fc1', not {str(name)[:40]!r}"
    return ""


def nearest(name: str) -> str:
    """The tested name that is most like this one, of its own family if there is one."""
    first = _first(name)
    own = [tested for tested in NAMES if _first(tested) == first]
    own = own or [tested for tested in NAMES if first.startswith(_first(tested))]  # swinv2: Swin
    own = own or [tested for tested in (*FAMILIES["ViT"], *FAMILIES["DeiT"]) if _first(tested) in ("vit", "deit")]
    return difflib.get_close_matches(name.split(".")[0], own, n=1, cutoff=0.0)[0]


def _first(name: str) -> str:
    """`eva02` of `eva02_tiny_patch14_224`."""
    return name.split("_")[0]


def listing() -> str:
    """What `edgeprune models --supported` prints."""
    lines = []
    for family, names in FAMILIES.items():
        lines += [family, *(f"  {name}" for name in names)]
    return "\n".join(lines)
