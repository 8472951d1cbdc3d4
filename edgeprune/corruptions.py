"""The fifteen common corruptions of ImageNet-C (Hendrycks and Dietterich, arXiv 1903.12261), generated, not downloaded.

Each takes an RGB image `[height, width, 3]` of uint8, a random generator and a severity from 1 to 5, and returns such
an image. Strengths are the paper's, given for 224 pixels; what is a length is scaled to the image. Frost is drawn, where
the paper lays photographs over the image, and elastic transform grows evenly. They are not the paper's files: compare
models with each other, not with published numbers.
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


def defocus_blur(image: Image8, rng: np.random.Generator, severity: int) -> Image8:
    """The mean over a disc, its edge softened."""
    from scipy.ndimage import convolve, gaussian_filter

    pixels, soft = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[severity - 1]
    radius = _length(image, pixels)
    reach = np.arange(-int(np.ceil(radius)), int(np.ceil(radius)) + 1)
    # A pixel at the rim counts as far as the disc covers it: small images have radii below one pixel.
    disc = np.clip(radius + 0.5 - np.hypot(*np.meshgrid(reach, reach)), 0, 1)
    disc = gaussian_filter(disc, soft, mode="constant")
    return _bytes(convolve(image / 255, (disc / disc.sum())[..., None], mode="nearest"))


def glass_blur(image: Image8, rng: np.random.Generator, severity: int) -> Image8:
    """Pixels come from near places, each from its own; blurred before and after."""
    from scipy.ndimage import gaussian_filter

    deviation, reach, times = ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[severity - 1]
    deviation, most = _length(image, deviation), _length(image, reach)
    seen = gaussian_filter(image / 255, (deviation, deviation, 0))
    for _ in range(times):
        seen = _fetched(seen, rng.uniform(-most, most, (2, *image.shape[:2])))
    return _bytes(gaussian_filter(seen, (deviation, deviation, 0)))


def _fetched(values: NDArray[np.float64], by: NDArray[np.float64]) -> NDArray[np.float64]:
    """Every pixel's value comes from `by` `[2, height, width]` pixels beside it, rows first."""
    from scipy.ndimage import map_coordinates

    places = np.indices(values.shape[:2]) + by
    return np.stack([map_coordinates(one, places, order=1, mode="nearest") for one in values.transpose(2, 0, 1)], -1)


def motion_blur(image: Image8, rng: np.random.Generator, severity: int) -> Image8:
    length = _length(image, (10, 15, 20, 25, 30)[severity - 1])
    return _bytes(_smeared(image / 255, length, rng.uniform(0, np.pi)))


def _smeared(values: NDArray[np.float64], length: float, angle: float) -> NDArray[np.float64]:
    """The mean of copies along a straight line of so many pixels."""
    steps = np.linspace(-length / 2, length / 2, max(int(np.ceil(length)), 2))
    rows, columns = (np.round(steps * along).astype(int) for along in (np.sin(angle), np.cos(angle)))
    edge = int(max(np.abs(rows).max(), np.abs(columns).max()))
    padded = np.pad(values, ((edge, edge), (edge, edge), *((0, 0),) * (values.ndim - 2)), mode="edge")
    height, width = values.shape[:2]
    moved = [
        padded[edge + r : edge + r + height, edge + c : edge + c + width] for r, c in zip(rows, columns, strict=True)
    ]
    return np.mean(moved, axis=0)


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


def snow(image: Image8, rng: np.random.Generator, severity: int) -> Image8:
    """Flakes smeared along the wind over a paler picture: the brightest of enlarged noise."""
    from PIL import Image

    mean, deviation, size, least, smear, colour = (
        (0.1, 0.3, 3.0, 0.5, 10, 0.8), (0.2, 0.3, 2.0, 0.5, 12, 0.7), (0.55, 0.3, 4.0, 0.9, 12, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 0.65), (0.55, 0.3, 2.5, 0.85, 12, 0.55),
    )[severity - 1]  # fmt: skip
    height, width = image.shape[:2]
    flake = max(_length(image, size), 1.0)
    coarse = rng.normal(mean, deviation, (int(np.ceil(height / flake)), int(np.ceil(width / flake))))
    grown = Image.fromarray(coarse.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
    flakes = np.array(grown, dtype=float)
    flakes[flakes < least] = 0
    flakes = _smeared(np.clip(flakes, 0, 1), _length(image, smear), rng.uniform(np.pi / 4, 3 * np.pi / 4))
    unit = image / 255
    pale = np.maximum(unit, unit.mean(-1, keepdims=True) * 1.5 + 0.5)
    return _bytes(colour * unit + (1 - colour) * pale + (flakes + np.rot90(flakes, 2))[..., None])


def frost(image: Image8, rng: np.random.Generator, severity: int) -> Image8:
    """Bright ridges of a cloud, as ice grows along lines, over a darker picture."""
    left, ice = ((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[severity - 1]
    ridges = (1 - np.abs(2 * _cloud(image, rng, decay=1.6) - 1)) ** 2
    return _bytes(left * image / 255 + ice * ridges[..., None] * np.array([0.85, 0.93, 1.0]))


def fog(image: Image8, rng: np.random.Generator, severity: int) -> Image8:
    thick, decay = ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))[severity - 1]
    brightest = float(image.max()) / 255
    cloud = _cloud(image, rng, decay)
    return _bytes((image / 255 + thick * cloud[..., None]) * brightest / (brightest + thick))


def _cloud(image: Image8, rng: np.random.Generator, decay: float) -> NDArray[np.float64]:
    """`[height, width]` from 0 to 1: the sum of random grids, each twice as fine and `decay` times weaker than the last."""
    from PIL import Image

    height, width = image.shape[:2]
    cloud = np.zeros((height, width))
    cells, weight = 2, 1.0
    while cells <= min(height, width):
        grid = Image.fromarray(rng.random((cells, cells)).astype(np.float32))
        cloud += weight * np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC))
        cells, weight = 2 * cells, weight / decay
    return (cloud - cloud.min()) / max(float(np.ptp(cloud)), 1e-9)


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


def elastic_transform(image: Image8, rng: np.random.Generator, severity: int) -> Image8:
    """Every pixel comes from a little beside its place, near ones from the same side."""
    from scipy.ndimage import gaussian_filter

    most, smooth = _length(image, (3.0, 4.5, 6.0, 8.0, 10.0)[severity - 1]), _length(image, 6.0)
    by = gaussian_filter(rng.uniform(-1, 1, (2, *image.shape[:2])), (0, smooth, smooth))
    return _bytes(_fetched(image / 255, by * most / max(float(np.abs(by).max()), 1e-9)))


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
        gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur, snow, frost, fog,
        brightness, contrast, elastic_transform, pixelate, jpeg_compression,
    )
}  # fmt: skip
