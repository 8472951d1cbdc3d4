"""Evaluation images without torch: folders and digits, read by PIL and preprocessed in numpy as timm does it.

`edgeprune validate` checks accuracy with this on devices that have no torch; builds read the same images
through `data.py`. A test holds both to the same pixels. PIL and scikit-learn are imported where they are used.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from edgeprune import extras
from edgeprune.archives import Archive, is_archive
from edgeprune.errors import UsageError, unknown

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 1 << 27  # of an image on its way to the model: 400 MB
MAX_CORRUPT = 0.01  # share of unreadable images above which a data set is refused
MOST_WAYS = 100  # that lead to a folder of images over links
DIGITS = 1797
DIGITS_TEST = 599  # of them; a fixed third, never trained on, whatever the seed
DIGITS_SOURCE = "scikit-learn digits"
DIVIDED = " (divided 80:20)"  # ends the name of a source without an evaluation part of its own
EVAL_SPLITS = ("validation", "val", "test")
SUFFIXES = (".png", ".jpg", ".jpeg")  # timm's: a build sees no others
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_PCT = 0.875  # timm's, where the configuration names none


class Digits:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 grey levels, as RGB images. UsageError without scikit-learn."""

    def __init__(self) -> None:
        extras.need("the digits data set", extras.DIGITS, "pip install scikit-learn")
        from sklearn.datasets import load_digits

        bunch = load_digits()
        self.pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
        self.labels = bunch.target

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        from PIL import Image

        return Image.fromarray(self.pixels[index]).convert("RGB"), int(self.labels[index])

    def split(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Indices to train on and to judge on; the same for every seed."""
        order = np.random.default_rng(0).permutation(len(self))
        return order[DIGITS_TEST:], order[:DIGITS_TEST]


def divide(count: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of `count` images divided 80:20: to train on, and to judge on (ascending)."""
    mixed = rng.permutation(np.arange(count))
    cut = count // 5
    return mixed[cut:], np.sort(mixed[:cut])


def domain(path: PurePath) -> str:
    """The domain that an image <domain>/<class>/* of a folder belongs to; UsageError for one that lies elsewhere."""
    parts = path.parts
    if len(parts) < 3:
        raise UsageError(f"'{path}' lies in no class of a domain; domains are read as DIR/<domain>/<class>/*")
    return parts[0]


def divide_domains(
    domains: Sequence[str], held_out: str, rng: np.random.Generator
) -> tuple[NDArray[np.int64], dict[str, NDArray[np.int64]]]:
    """Indices of images to train on, and of those to judge on by domain: a fifth of each, but all of `held_out`.

    domains: of every image. The held-out domain is the last.
    """
    of = np.asarray(domains)
    parts = {name: np.flatnonzero(of == name) for name in sorted(set(domains) - {held_out})}
    divided = {name: divide(len(own), rng) for name, own in parts.items()}
    train = np.concatenate([parts[name][rest] for name, (rest, _) in divided.items()])
    judged = {name: parts[name][kept_back] for name, (_, kept_back) in divided.items()}
    return train, {**judged, held_out: np.flatnonzero(of == held_out)}


def refuse_corrupt(corrupt: Mapping[str, str], total: int, what: str) -> None:
    """Raise UsageError when more than 1 % of `total` images are unreadable. corrupt: name -> reason."""
    if len(corrupt) > max(MAX_CORRUPT * total, 1):
        listed = "; ".join(f"{name} ({reason})" for name, reason in list(corrupt.items())[:3])
        raise UsageError(
            f"{len(corrupt)} of the {total} {what} images cannot be read, more than "
            f"{MAX_CORRUPT:.0%}: {listed}; repair or remove them"
        )


def check_links(folder: Path, follow: bool = False) -> None:
    """Raise UsageError for a link below `folder` that leads in circles or, unless `follow`, out of it; or for an image
    that is no file. Links to folders that hold links may multiply: no folder may be reached in more than `MOST_WAYS`.
    """
    root = os.path.realpath(folder)
    waiting: list[tuple[str, str, tuple[str, ...]]] = [(str(folder), root, ())]  # path, real path, where links were
    ways: Counter[str] = Counter()
    while waiting:
        path, real, through = waiting.pop()
        ways[real] += 1
        if ways[real] > MOST_WAYS:
            raise UsageError(f"'{real}' is reached over links in more than {MOST_WAYS} ways; remove some of the links")
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_symlink():
                    target = os.path.realpath(entry.path)
                    if not follow and not _below(target, root):
                        raise UsageError(
                            f"'{entry.path}' is a link to '{target}', outside '{folder}'; copy what it leads to, or give "
                            "--follow-links if you trust the folder"
                        )
                    if os.path.isdir(target):
                        if any(_below(place, target) for place in (*through, real)):
                            raise UsageError(f"'{entry.path}' is a link to a folder that it lies in; remove it")
                        waiting.append((entry.path, target, (*through, real)))
                        continue
                if entry.is_dir(follow_symlinks=False):
                    waiting.append((entry.path, os.path.join(real, entry.name), through))
                elif entry.name.lower().endswith(SUFFIXES) and not entry.is_file():
                    raise UsageError(f"'{entry.path}' is no regular file, or a link to nothing; remove it")


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(os.path.join(folder, ""))


#: An image, and the manifest's `preprocessing` -> what a model file takes.
Take = Callable[["Image.Image", Mapping[str, Any]], NDArray[Any]]


class Folder:
    """The image files below a folder, in timm's order. UsageError where there is none, or for links as `check_links`."""

    def __init__(self, root: Path, follow_links: bool = False) -> None:
        if not root.is_dir():
            raise UsageError(f"there is no folder '{root}'; give --data-dir an existing folder of images")
        check_links(root, follow_links)
        self.root = root

    def has(self, part: str) -> bool:
        return (self.root / part).is_dir()

    def files(self, part: str = "") -> list[PurePath]:
        """Relative to the folder; of one part of it alone, if that is named."""
        return [path.relative_to(self.root) for path in image_files(self.root / part)]

    def open(self, path: PurePath) -> BinaryIO:
        return (self.root / path).open("rb")


class Packed:
    """The same of an archive."""

    def __init__(self, root: Path) -> None:
        self.root, self.archive = root, Archive(root, SUFFIXES)
        self._files = [PurePosixPath(name) for name in sorted(self.archive.entries, key=natural)]

    def has(self, part: str) -> bool:
        return any(len(path.parts) > 1 and path.parts[0] == part for path in self._files)

    def files(self, part: str = "") -> list[PurePath]:
        return [path for path in self._files if not part or (len(path.parts) > 1 and path.parts[0] == part)]

    def open(self, path: PurePath) -> BinaryIO:
        return self.archive.read(str(path))


def tree(root: Path, follow_links: bool = False) -> Folder | Packed:
    """The images of a folder, or of a .zip or .tar. Raises UsageError for anything else."""
    return Packed(root) if is_archive(root) else Folder(root, follow_links)


@dataclass
class Evaluation:
    """Labelled images to judge an artifact on. Unreadable ones are noted in `corrupt` (name -> reason) and skipped."""

    source: str
    names: Sequence[str]
    labels: Sequence[int]
    read: Callable[[int], Image.Image]
    corrupt: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def batches(
        self, preprocessing: Mapping[str, Any], batch_size: int, take: Take | None = None
    ) -> Iterator[tuple[NDArray[Any], NDArray[np.int64]]]:
        """Pixels `[n, 3, height, width]`, or what `take` makes of images, and labels `[n]`, in order.

        Raises UsageError once over 1 % are unreadable.
        """
        from PIL import Image

        for start in range(0, len(self), batch_size):
            pixels, labels = [], []
            for i in range(start, min(start + batch_size, len(self))):
                try:
                    image = self.read(i)
                except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                    self.corrupt[self.names[i]] = str(error) or type(error).__name__
                    refuse_corrupt(self.corrupt, len(self), "evaluation")
                else:
                    pixels.append((take or preprocess)(image, preprocessing))
                    labels.append(self.labels[i])
            if pixels:
                yield np.stack(pixels), np.array(labels)


def for_artifact(
    manifest: Mapping[str, Any], data: str, data_dir: str, follow_links: bool = False
) -> Evaluation | None:
    """The images that `--data` and `--data-dir` name, labelled for the artifact; None when neither is given.

    Raises UsageError when the artifact's classes are not the data's, or there are no images.
    """
    if not data and not data_dir:
        return None
    if (data or "folder") not in ("digits", "folder"):
        raise UsageError(
            f"validate reads 'digits' or 'folder', not '{data}'; "
            "write the images to DIR/<class>/* and give --data-dir DIR"
        )
    if data == "digits":
        if data_dir:
            raise UsageError(f"the data set 'digits' is embedded and reads no '{data_dir}'; leave --data-dir out")
        if manifest["data"]["source"] != DIGITS_SOURCE:
            raise UsageError(
                f"the artifact was built on {manifest['data']['source']}, not on digits; "
                "give --data-dir DIR with images of its classes"
            )
        return _digits()
    if not data_dir:
        raise UsageError("the data set 'folder' needs --data-dir DIR")
    return _folder(Path(data_dir), manifest, follow_links)


def _digits() -> Evaluation:
    extras.need("reading images", extras.IMAGES, "pip install 'edgeprune[runtime]'")
    digits = Digits()
    _, chosen = digits.split()
    return Evaluation(
        DIGITS_SOURCE,
        names=[f"digit {i}" for i in chosen],
        labels=[int(digits.labels[i]) for i in chosen],
        read=lambda i: digits[int(chosen[i])][0],
    )


def _folder(folder: Path, manifest: Mapping[str, Any], follow_links: bool) -> Evaluation:
    """The evaluation part of an image folder; what was divided 80:20 at build is divided alike."""
    extras.need("reading images", extras.IMAGES, "pip install 'edgeprune[runtime]'")
    found = tree(folder, follow_links)
    if not manifest["classes"]:
        raise UsageError(
            f"the artifact names no classes, so the folders in '{folder}' cannot be matched to its logits; "
            "build it again on an image folder"
        )
    recorded = manifest["data"]
    divided = recorded["source"].endswith(DIVIDED)
    held_out = next((one["name"] for one in manifest.get("domains", ()) if one["held_out"]), "")
    of_domains = bool(held_out) and found.has(held_out)
    part = next((name for name in EVAL_SPLITS if found.has(name) and not of_domains), "")
    if not part and found.has("train") and not divided:
        raise UsageError(f"'{folder}' has training images only; add a folder {', '.join(EVAL_SPLITS[:-1])} or test")
    files = found.files(part)
    if not files:
        raise UsageError(f"'{folder / part}' holds no images ({', '.join(SUFFIXES)} in one folder per class)")
    index = {name: i for i, name in enumerate(manifest["classes"])}
    for path in files:
        if path.parent.name not in index or path.parent == PurePath(part):
            raise UsageError(
                f"the folder '{folder / path.parent}' is named after no class of the artifact "
                f"({_some(manifest['classes'])}); name each folder of images after its class"
            )
    where = f"folder '{folder / part}'"
    if divided and not part and of_domains == bool(held_out):
        chosen = _kept_back(files, held_out, recorded["seed"])
        if len(chosen) == recorded["evaluation"]:
            files = [files[i] for i in chosen]
            where += f" without domain '{held_out}'" * of_domains + DIVIDED
    return Evaluation(
        where,
        names=[str(folder / path) for path in files],
        labels=[index[path.parent.name] for path in files],
        read=lambda i: read_image(found.open(files[i])),
    )


def _kept_back(files: Sequence[PurePath], held_out: str, seed: int) -> NDArray[np.int64]:
    """Which of the files are those that a build with this seed kept back to judge on."""
    rng = np.random.default_rng(seed)
    if not held_out:
        return divide(len(files), rng)[1]
    _, judged = divide_domains([domain(path) for path in files], held_out, rng)
    return np.concatenate([own for name, own in judged.items() if name != held_out])


def _some(classes: Sequence[str]) -> str:
    return ", ".join(classes[:5]) + (f" and {len(classes) - 5} more" if len(classes) > 5 else "")


def image_files(folder: Path) -> list[Path]:
    """Every image below `folder`, in timm's order; the folder that an image lies in is its class."""
    found = [
        os.path.join(root, name)
        for root, _, names in os.walk(folder, topdown=False, followlinks=True)
        for name in names
        if os.path.splitext(name)[1].lower() in SUFFIXES
    ]
    return [Path(path) for path in sorted(found, key=natural)]


def natural(text: str) -> list[Any]:
    """Numbers by value: a2 before a10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text.lower())]


def read_image(file: BinaryIO) -> Image.Image:
    """The file as an RGB image; transparency is dropped, as at build."""
    from PIL import Image

    with file, Image.open(file) as image:
        return image.convert("RGB")


def preprocess(image: Image.Image, config: Mapping[str, Any]) -> NDArray[np.float32]:
    """An RGB image as the model's input `[3, height, width]`: timm's evaluation transform.

    config: the manifest's `preprocessing`: input_size, interpolation, crop_pct, mean, std. The image is resized
    so that it just covers input_size / crop_pct, cropped at the centre, and normalised. Raises UsageError for an
    interpolation that PIL does not know.
    """
    method, image = resampling(config), seen(image, config)
    crop = (int(config["input_size"][-2]), int(config["input_size"][-1]))
    height, width = resized((image.height, image.width), crop, config.get("crop_pct") or CROP_PCT)
    refuse_huge(image, height, width, crop, config)
    if (image.height, image.width) != (height, width):
        image = image.resize((width, height), method)
    pixels = centre(pixels_of(image), crop).transpose(2, 0, 1).astype(np.float32)
    mean, std = (np.array(config[key], dtype=np.float32).reshape(-1, 1, 1) for key in ("mean", "std"))
    normalised: NDArray[np.float32] = (pixels / np.float32(255) - mean) / std
    return normalised


def seen(image: Image.Image, config: Mapping[str, Any]) -> Image.Image:
    """The RGB image, or for a model of one channel the grey one."""
    return image.convert("L") if config["input_size"][0] == 1 else image


def pixels_of(image: Image.Image) -> NDArray[np.uint8]:
    """`[height, width, channels]`"""
    found = np.asarray(image, dtype=np.uint8)
    return found[..., None] if found.ndim == 2 else found


def picture(pixels: NDArray[np.uint8]) -> Image.Image:
    """The image of `[height, width, channels]`."""
    from PIL import Image

    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def resampling(config: Mapping[str, Any]) -> Image.Resampling:
    """PIL's name of the interpolation; UsageError for one that it does not know."""
    from PIL import Image

    if config["interpolation"] not in INTERPOLATIONS:
        raise unknown("interpolation", config["interpolation"], INTERPOLATIONS)
    return Image.Resampling[config["interpolation"].upper()]


def refuse_huge(image: Image.Image, height: int, width: int, crop: tuple[int, int], config: Mapping[str, Any]) -> None:
    """Raise UsageError for an image that would be resized to, or cropped from, more pixels than memory should hold."""
    if max(height * width, crop[0] * crop[1]) > MAX_PIXELS:
        raise UsageError(
            f"an image of {image.width} x {image.height} pixels would become {width} x {height} under the preprocessing "
            f"{dict(config)}; that is more than {MAX_PIXELS} pixels"
        )


def resized(size: tuple[int, int], crop: tuple[int, int], crop_pct: float) -> tuple[int, int]:
    """(height, width) that an image of `size` is resized to before the crop; rounded as torchvision and timm do."""
    height, width = size
    cover = (math.floor(crop[0] / crop_pct), math.floor(crop[1] / crop_pct))
    if cover[0] != cover[1]:
        ratio = min(height / cover[0], width / cover[1])
        return round(height / ratio), round(width / ratio)
    if width <= height:
        return int(cover[0] * height / width), cover[0]
    return cover[0], int(cover[0] * width / height)


def centre(pixels: NDArray[np.uint8], crop: tuple[int, int]) -> NDArray[np.uint8]:
    """The middle `crop` (height, width) of pixels `[height, width, channels]`; black where they are smaller."""
    short = [max(wanted - have, 0) for wanted, have in zip(crop, pixels.shape)]
    if any(short):
        pixels = np.pad(pixels, [*((s // 2, (s + 1) // 2) for s in short), (0, 0)])
    # Python's rounding of halves to even is torchvision's.
    top, left = (round((have - wanted) / 2) for have, wanted in zip(pixels.shape, crop))
    return pixels[top : top + crop[0], left : left + crop[1]]
