"""PIL's resizing as matrices: images of one fixed size are resized by two products with constants.

ONNX's Resize is no way to do the same: with `antialias` ONNX Runtime 1.31 differs from PIL by up to 6 levels of 255, and
OpenVINO 2026.4 ignores that attribute. These matrices are what PIL computes with: filters widened by the scale, cut off
at the border and normalised, the horizontal pass first and rounded to whole levels between both.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def matrix(size: int, to: int, interpolation: str) -> NDArray[np.float32]:
    """`[to, size]`: what each of `to` pixels in a row takes of `size` pixels. interpolation: a name of `images.INTERPOLATIONS`."""
    scale = size / to
    found = np.zeros((to, size))
    if interpolation == "nearest":
        places = np.cumsum([0.5 * scale, *[scale] * (to - 1)])  # one by one, rounding errors and all
        found[np.arange(to), np.minimum(places.astype(int), size - 1)] = 1
        return found.astype(np.float32)
    support, weigh = FILTERS[interpolation]
    wide = max(scale, 1.0)
    for i in range(to):
        centre = (i + 0.5) * scale
        first = max(int(centre - support * wide + 0.5), 0)
        last = min(int(centre + support * wide + 0.5), size)
        own = weigh((np.arange(first, last, dtype=np.float64) - centre + 0.5) / wide)
        found[i, first:last] = own / own.sum()
    return found.astype(np.float32)


def _box(x: FloatArray) -> FloatArray:
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def _bilinear(x: FloatArray) -> FloatArray:
    return np.maximum(1 - np.abs(x), 0)


def _hamming(x: FloatArray) -> FloatArray:
    found: FloatArray = np.where(np.abs(x) < 1, np.sinc(x) * (0.54 + 0.46 * np.cos(math.pi * x)), 0)
    return found


def _bicubic(x: FloatArray) -> FloatArray:
    """Keys' kernel with a = -0.5."""
    x = np.abs(x)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    found: FloatArray = np.where(x < 1, near, np.where(x < 2, far, 0))
    return found


def _lanczos(x: FloatArray) -> FloatArray:
    found: FloatArray = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
    return found


#: Interpolation -> half its width in pixels, and its weights by distance.
FILTERS = {
    "box": (0.5, _box),
    "bilinear": (1.0, _bilinear),
    "hamming": (1.0, _hamming),
    "bicubic": (2.0, _bicubic),
    "lanczos": (3.0, _lanczos),
}
