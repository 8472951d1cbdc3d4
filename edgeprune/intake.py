"""Intake: how images enter a model file, and so what whoever runs it does to them before. Knows no torch.

Either normalised float32 pixels `[batch, channels, height, width]`, prepared by `images.preprocess`; or, where the
preprocessing is folded into the file, raw uint8 images `[batch, height, width, channels]` of one size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune import images
from edgeprune.errors import UsageError, unknown

AUTO = "auto"  # the size that the preprocessing resizes to: nothing is left of it but crop and normalisation
MOST = 1 << 14  # pixels of a side


@dataclass(frozen=True)
class Intake:
    """What one inference takes."""

    batch: int = 1  # images, which the latency is of
    dynamic: bool = False  # whether the file takes any other number too
    frame: tuple[int, int] | None = None  # height and width of raw images; None = normalised pixels

    @property
    def folded(self) -> bool:
        return self.frame is not None

    def facts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """For the manifest; config: its `preprocessing`."""
        channels, height, width = config["input_size"]
        shape = [*self.frame, channels] if self.frame else [channels, height, width]
        return {
            "batch": self.batch,
            "dynamic_batch": self.dynamic,
            "dtype": "uint8" if self.folded else "float32",
            "layout": "NHWC" if self.folded else "NCHW",
            "shape": [None if self.dynamic else self.batch, *shape],
            "preprocessing": "folded" if self.folded else "outside",
        }

    def take(self, image: images.Image.Image, config: Mapping[str, Any]) -> NDArray[Any]:
        """An RGB image as the file takes it, without the batch."""
        return framed(image, self.frame, config) if self.frame else images.preprocess(image, config)


def of_manifest(manifest: Mapping[str, Any]) -> Intake:
    """The intake of an artifact; older ones took one image of normalised pixels."""
    facts = manifest.get("input")
    if facts is None:
        return Intake()
    frame = (facts["shape"][1], facts["shape"][2]) if facts["preprocessing"] == "folded" else None
    return Intake(facts["batch"], facts["dynamic_batch"], frame)


def frame(text: str, config: Mapping[str, Any]) -> tuple[int, int] | None:
    """The size that a card or `--fold-preprocessing` asks for: None for "", `auto`, or HEIGHTxWIDTH. Raises UsageError."""
    if not text:
        return None
    if config["interpolation"] not in images.INTERPOLATIONS:
        raise unknown("interpolation", config["interpolation"], images.INTERPOLATIONS)
    crop, share = (config["input_size"][-2], config["input_size"][-1]), config.get("crop_pct") or images.CROP_PCT
    if share > 1:
        raise UsageError(f"a crop_pct of {share:g} pads images, which cannot be folded; set it to 1 or less, or leave "
                         "--fold-preprocessing out")  # fmt: skip
    if text == AUTO:
        return math.floor(crop[0] / share), math.floor(crop[1] / share)
    sides = re.fullmatch(r"([0-9]{1,6})x([0-9]{1,6})", text)
    if not sides or not all(1 <= int(side) <= MOST for side in sides.groups()):
        raise UsageError(
            f"--fold-preprocessing is a size in pixels, as in 480x640 (height x width), or {AUTO}; not '{text}'"
        )
    size = (int(sides[1]), int(sides[2]))
    if any(have < wanted for have, wanted in zip(images.resized(size, crop, share), crop, strict=True)):
        raise UsageError(f"images of {text} do not cover the model's input; give a size of about its proportions")
    return size


def framed(image: images.Image.Image, size: tuple[int, int], config: Mapping[str, Any]) -> NDArray[np.uint8]:
    """An image as a camera of that size would have it, `[height, width, channels]`: resized to cover it, and its centre."""
    image = images.seen(image, config)
    height, width = images.resized((image.height, image.width), size, 1.0)
    images.refuse_huge(image, height, width, size, config)
    if (image.height, image.width) != (height, width):
        image = image.resize((width, height), images.resampling(config))
    pixels = images.centre(images.pixels_of(image), size)
    return np.ascontiguousarray(pixels)
