"""Common corruptions in the manner of ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261), generated, not downloaded.

Each takes an RGB image `[height, width, 3]` of uint8, a random generator and a severity from 1 to 5, and returns such
an image. Strengths are the paper's, given for 224 pixels; what is a length is scaled to the image. Its glass blur,
elastic transform, snow and frost are not among them. They are not the paper's files: compare models with each other,
not with published numbers.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Image8 = NDArray[np.uint8]
PAPER_PIXELS = 224


def corrupt(kind: str, image: Image8, rng: np.random.Generator, severity: int) -> Image8:
    """The image under the corruption `kind`, one of `KINDS`."""
    return KINDS[kind](image, rng, severity)


def _bytes(unit: NDArray[np.float64]) -> Image8:
    """From 0..1, whatever lies beyond is clipped."""
    return np.round(255 * np.clip(unit, 0, 1)).astype(np.uint8)


def _length(image: Image8, pixels: float) -> float:
    """A length that is `pixels` in an image of 224."""
    return pixels * min(image.shape[:2]) / PAPER_PIXELS


def gaussian_noise(image: Image8, rng: np.random.Generator, severity: int) -> Image8:
    deviation = (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    return _bytes(image / 255 + rng.normal(0, deviation, image.shape))


def shot_noise(image: Image8, rng: np.random.Generator, severity: int) -> Image8:
    photons = (60, 25, 12, 5, 3)[severity - 1]
    return _bytes(rng.poisson(image / 255 * photons) / photons)


def impulse_noise(image: Image8, rng: np.random.Generator, severity: int) -> Image8:
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    drawn = rng.random(image.shape)
    return np.where(drawn < share / 2, 0, np.where(drawn < share, 255, image)).astype(np.uint8)


def gaussian_blur(image: Image8, rng: np.random.Generator, severity: int) -> Image8:
    from PIL import Image, ImageFilter

    radius = _length(image, (1, 2, 3, 4, 6)[severity - 1])
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def motion_blur(image: Image8, rng: np.random.Generator, severity: int) -> Image8:
    """The mean of copies along a straight line of random direction."""
    length, angle = _length(image, (10, 15, 20, 25, 30)[severity - 1]), rng.uniform(0, np.pi)
    steps = np.linspace(-length / 2, length / 2, max(int(np.ceil(length)), 2))
    rows, columns = (np.round(steps * along).astype(int) for along in (np.sin(angle), np.cos(angle)))
    edge = int(max(np.abs(rows).max(), np.abs(columns).max()))
    padded = np.pad(image.astype(float), ((edge, edge), (edge, edge), (0, 0)), mode="edge")
    height, width = image.shape[:2]
    moved = [
        padded[edge + r : edge + r + height, edge + c : edge + c + width] for r, c in zip(rows, columns, strict=True)
    ]
    return _bytes(np.mean(moved, axis=0) / 255)


def zoom_blur(image: Image8, rng: np.random.Generator, severity: int) -> Image8:
    """The mean of copies enlarged about the centre."""
    from PIL import Image

    most = (1.11, 1.16, 1.21, 1.26, 1.33)[severity - 1]
    height, width = image.shape[:2]
    source, copies = Image.fromarray(image), [image.astype(float)]
    for zoom in np.linspace(1, most, 8)[1:]:
        left, top = width * (1 - 1 / zoom) / 2, height * (1 - 1 / zoom) / 2
        box = (left, top, width - left, height - top)
        copies.append(np.asarray(source.resize((width, height), Image.Resampling.BILINEAR, box=box), dtype=float))
    return _bytes(np.mean(copies, axis=0) / 255)


def fog(image: Image8, rng: np.random.Generator, severity: int) -> Image8:
    """Cloud of random grids, each twice as fine and, by the second number, weaker than the one before."""
    from PIL import Image

    thick, decay = ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))[severity - 1]
    height, width = image.shape[:2]
    cloud = np.zeros((height, width))
    cells, weight = 2, 1.0
    while cells <= min(height, width):
        grid = Image.fromarray(rng.random((cells, cells)).astype(np.float32))
        cloud += weight * np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC))
        cells, weight = 2 * cells, weight / decay
    cloud = (cloud - cloud.min()) / max(float(np.ptp(cloud)), 1e-9)
    brightest = float(image.max()) / 255
    return _bytes((image / 255 + thick * cloud[..., None]) * brightest / (brightest + thick))


def brightness(image: Image8, rng: np.random.Generator, severity: int) -> Image8:
    """Added to the value of hue, saturation, value: every channel grows by the same factor."""
    unit = image / 255
    value = unit.max(-1, keepdims=True)
    brighter = np.clip(value + 0.1 * severity, 0, 1)
    return _bytes(np.where(value > 0, unit * brighter / np.maximum(value, 1e-9), brighter))


def contrast(image: Image8, rng: np.random.Generator, severity: int) -> Image8:
    left = (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1]
    unit = image / 255
    mean = unit.mean((0, 1), keepdims=True)
    return _bytes((unit - mean) * left + mean)


def pixelate(image: Image8, rng: np.random.Generator, severity: int) -> Image8:
    from PIL import Image

    share = (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1]
    height, width = image.shape[:2]
    small = Image.fromarray(image).resize(
        (max(int(width * share), 1), max(int(height * share), 1)), Image.Resampling.BOX
    )
    return np.asarray(small.resize((width, height), Image.Resampling.NEAREST))


def jpeg_compression(image: Image8, rng: np.random.Generator, severity: int) -> Image8:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=(25, 18, 15, 10, 7)[severity - 1])
    with Image.open(buffer) as read:
        return np.asarray(read.convert("RGB"))


#: By name, in the paper's order: noise, blur, weather, digital.
KINDS: dict[str, Callable[[Image8, np.random.Generator, int], Image8]] = {
    function.__name__.replace("_", " "): function
    for function in (
        gaussian_noise, shot_noise, impulse_noise, gaussian_blur, motion_blur, zoom_blur, fog, brightness, contrast,
        pixelate, jpeg_compression,
    )
}  # fmt: skip
