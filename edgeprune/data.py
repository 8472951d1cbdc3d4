"""Data sets and transforms, through timm.data; training, calibration and evaluation images are disjoint.

`digits` is scikit-learn's handwritten digits: real data, embedded, no network. Every other name
goes to timm's `create_dataset` (`folder`, `torch/cifar10`, `hfds/...`).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from edgeprune.compat import create_dataset, create_transform, resolve_model_data_config
from edgeprune.config import DataSpec, ModelSpec
from edgeprune.console import Console
from edgeprune.errors import StorageError, UsageError, first_line, unknown
from edgeprune.images import (
    DIGITS_SOURCE,
    DIVIDED,
    EVAL_SPLITS,
    Digits,
    Folder,
    Packed,
    divide,
    divide_domains,
    domain,
    natural,
    read_image,
    refuse_corrupt,
    tree,
)
from edgeprune.intake import Intake

#: (images `[n, channels, height, width]` float32, labels `[n]` int64)
Batch = tuple[Tensor, Tensor]

CHOSEN = "chosen.npz"
CHANNELS = (1, 3)  # of images that can be read: grey or RGB


@dataclass(frozen=True)
class Corrupt:
    """An image that could not be read, in place of its tensor."""

    name: str
    reason: str


@dataclass
class Images(Dataset[Any]):
    """A part of a data set under one transform. Unreadable images are noted in `corrupt` and skipped."""

    source: Any
    indices: np.ndarray
    transform: Any
    what: str
    corrupt: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> tuple[Tensor, int] | Corrupt:
        index = int(self.indices[i])
        try:
            image, label = self._read(index)
            return self.transform(image), int(label)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reader: Any = getattr(self.source, "reader", None)
            name = reader.filename(index, absolute=True) if hasattr(reader, "filename") else f"image {index}"
            return Corrupt(str(name), str(error) or type(error).__name__)

    def _read(self, index: int) -> tuple[Any, int]:
        reader = getattr(self.source, "reader", None)
        if reader is None:
            image, label = self.source[index]
            return image, label
        file, label = reader[index][:2]  # not source[index]: timm replaces an unreadable image by its neighbour
        if isinstance(file, Image.Image):
            return file.convert("RGB"), label
        return read_image(file), label

    def note(self, bad: Corrupt) -> None:
        """Count an unreadable image; raises UsageError once more than 1 % are."""
        self.corrupt[bad.name] = bad.reason
        refuse_corrupt(self.corrupt, len(self), self.what)

    def batches(self, batch_size: int, *, shuffle_seed: int | None = None, workers: int = 0) -> Iterator[Batch]:
        """Batches of readable images; in order, or in an order drawn from `shuffle_seed`."""
        order = np.arange(len(self))
        if shuffle_seed is not None:
            order = np.random.default_rng(shuffle_seed).permutation(len(self))
        for _, batch in self.placed(order, batch_size, workers):
            yield batch

    def placed(self, order: np.ndarray, batch_size: int, workers: int = 0) -> Iterator[tuple[np.ndarray, Batch]]:
        """Batches of the readable ones among the images at these positions, each with its own positions `[n]`."""
        sampler = _Order(order)
        loader = DataLoader(self, batch_size=batch_size, sampler=sampler, num_workers=workers, collate_fn=list)
        for start, items in zip(range(0, len(order), batch_size), loader, strict=True):
            places = order[start : start + len(items)]
            good = [(place, item) for place, item in zip(places, items, strict=True) if not isinstance(item, Corrupt)]
            for item in items:
                if isinstance(item, Corrupt):
                    self.note(item)
            if good:
                pixels = torch.stack([image for _, (image, _) in good])
                yield np.array([place for place, _ in good]), (pixels, torch.tensor([label for _, (_, label) in good]))

    def listed_labels(self) -> np.ndarray | None:
        """The labels `[n]` where the data set lists them; None where the images must be read for them."""
        listed = getattr(self.source, "labels", getattr(self.source, "targets", None))
        if (samples := getattr(getattr(self.source, "reader", None), "samples", None)) is not None:
            listed = [label for _, label in samples]
        return None if listed is None else np.asarray(listed, dtype=np.int64)[self.indices]

    def with_transform(self, transform: Any) -> Images:
        return Images(self.source, self.indices, transform, self.what, self.corrupt)

    def served(self, intake: Intake, config: Mapping[str, Any]) -> Images:
        """The same as a model file takes them; their transform may be the torch model's already."""
        if not intake.folded:
            return self
        return self.with_transform(lambda image: torch.from_numpy(intake.take(image, config)))

    def take(self, count: int) -> Images:
        return Images(self.source, self.indices[:count], self.transform, self.what, self.corrupt)

    def drop(self, count: int) -> Images:
        return Images(self.source, self.indices[count:], self.transform, self.what, self.corrupt)


class _Order(Sampler[int]):
    def __init__(self, order: np.ndarray) -> None:
        self.order = order

    def __iter__(self) -> Iterator[int]:
        return iter(int(i) for i in self.order)

    def __len__(self) -> int:
        return len(self.order)


class Unpacked:
    """The images of an archive, or of one part of it, as timm reads a folder: each is labelled by the folder it lies in."""

    def __init__(self, packed: Packed, part: str = "") -> None:
        files = packed.files(part)
        if stray := next((path for path in files if path.parent == PurePath(part)), None):
            raise UsageError(f"'{packed.root / stray}' lies in no folder that names its class")
        self.root, self.archive, self.reader = packed.root, packed.archive, self
        names = sorted({path.parent.name for path in files}, key=natural)
        self.class_to_idx = {name: i for i, name in enumerate(names)}
        self.samples = [(str(path), self.class_to_idx[path.parent.name]) for path in files]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        name, label = self.samples[index]
        return self.archive.read(name), label

    def filename(self, index: int, absolute: bool = False) -> str:
        name = self.samples[index][0]
        return str(self.root / name) if absolute else name


@dataclass(frozen=True)
class Chosen:
    """Which images calibrate and which are tuned on: indices into the training images of the data set."""

    calibration: NDArray[np.int64]
    train: NDArray[np.int64]

    def save(self, folder: Path) -> None:
        np.savez(folder / CHOSEN, calibration=self.calibration, train=self.train)

    @staticmethod
    def find(folder: Path) -> Chosen | None:
        """What was saved there; None where nothing was chosen."""
        if not (folder / CHOSEN).is_file():
            return None
        with np.load(folder / CHOSEN, allow_pickle=False) as arrays:
            return Chosen(arrays["calibration"], arrays["train"])


@dataclass(frozen=True)
class Splits:
    """Three disjoint parts of one data set, under the evaluation transform."""

    train: Images
    calibration: Images
    evaluation: Images
    classes: tuple[str, ...]
    seed: int
    source: str
    #: What is judged of each domain, the held-out one at last: `evaluation` is all but that; empty without domains.
    domains: Mapping[str, Images] = field(default_factory=dict)
    chosen: Chosen | None = None  # what a selection chose; None = drawn by the seed

    def report(self, folder: Path, console: Console) -> None:
        """Name the unreadable images met so far, and write them to `folder/unreadable.json` for the manifest."""
        parts = (self.train, self.calibration, self.evaluation, *self.domains.values())
        unreadable = {name: reason for part in parts for name, reason in part.corrupt.items()}
        for name, reason in sorted(unreadable.items()):
            console.warn(f"{name} cannot be read and is skipped: {reason}")
        (folder / "unreadable.json").write_text(json.dumps(sorted(unreadable)))

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest records of the data."""
        return {
            "source": self.source,
            "train": len(self.train),
            "calibration": len(self.calibration),
            "evaluation": len(self.evaluation),
            "seed": self.seed,
        }


def transform_config(spec: ModelSpec, model: Any) -> dict[str, Any]:
    """timm's data config of the model, with what the card overrides."""
    config: dict[str, Any] = dict(resolve_model_data_config(model))
    image = model.patch_embed.img_size
    channels = int(model.patch_embed.proj.in_channels)
    if channels not in CHANNELS:
        raise UsageError(f"'{spec.architecture}' takes {channels} channels, and edgeprune reads images in RGB or grey: "
                         "set [kwargs] in_chans to 3 or 1")  # fmt: skip
    config["input_size"] = (channels, *image)
    config.update({k: v for k, v in vars(spec.transforms).items() if v})
    for key in ("mean", "std"):
        if channels == 1 and len(config[key]) > 1:  # of RGB weights that were made ones for grey images
            config[key] = (float(np.mean(config[key])),)
    return config


@dataclass(frozen=True)
class Grey:
    """A transform for models of one channel: it sees grey images."""

    transform: Any

    def __call__(self, image: Image.Image) -> Any:
        return self.transform(image.convert("L"))


def eval_transform(config: dict[str, Any], size: int | None = None) -> Any:
    size_config = config if size is None else {**config, "input_size": (config["input_size"][0], size, size)}
    return _seen(create_transform(**_known(size_config), is_training=False), config)


def train_transform(config: dict[str, Any], augment: dict[str, Any], size: int | None = None) -> Any:
    """timm's training transform with the card's `augment` table; the evaluation transform if it is empty."""
    if not augment:
        return eval_transform(config, size)
    size_config = config if size is None else {**config, "input_size": (config["input_size"][0], size, size)}
    try:
        return _seen(create_transform(**_known(size_config), is_training=True, **augment), config)
    except TypeError as error:
        raise UsageError(f"the card's 'augment' table does not fit timm.data.create_transform: {error}") from error


def _seen(transform: Any, config: Mapping[str, Any]) -> Any:
    return Grey(transform) if config["input_size"][0] == 1 else transform


def _known(config: dict[str, Any]) -> dict[str, Any]:
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct")
    return {k: config[k] for k in keys if k in config}


def load_splits(spec: ModelSpec, config: dict[str, Any], seed: int, chosen: Chosen | None = None) -> Splits:
    """Training, calibration and evaluation images of the card's data set.

    Calibration images are drawn from the training images and taken out of them, or are as `chosen`. A folder without
    an evaluation part is divided 80:20 by the seed; so is each domain but the held-out one. Raises UsageError for an
    empty or unknown data set, or when there are too few training images to calibrate on.
    """
    transform = eval_transform(config)
    rng = np.random.default_rng(seed)
    judged: dict[str, NDArray[np.int64]] = {}
    if spec.data.name == "digits":
        digits = Digits()
        train, kept_back = digits.split()
        sources: tuple[Any, np.ndarray, Any, np.ndarray] = (digits, train, digits, kept_back)
        classes = tuple(str(i) for i in range(10))
        where = DIGITS_SOURCE
    elif spec.data.held_out_domain:
        sources, judged, classes, where = _domain_sources(spec.data, rng)
    else:
        sources, classes, where = _timm_sources(spec.data, rng)
    train_source, train, eval_source, evaluation = sources
    train = rng.permutation(train)
    count = spec.calibration.images
    if len(train) <= count:
        raise UsageError(f"{where} has {len(train)} training images, but the card sets {count} aside for calibration; "
                         "lower [calibration] images")  # fmt: skip
    calibrating, training = (chosen.calibration, chosen.train) if chosen else (train[:count], train[count:])
    return Splits(
        train=Images(train_source, training, transform, "training"),
        calibration=Images(train_source, calibrating, transform, "calibration"),
        evaluation=Images(eval_source, evaluation, transform, "evaluation"),
        classes=classes,
        seed=seed,
        source=where,
        domains={name: Images(eval_source, own, transform, f"'{name}'") for name, own in judged.items()},
        chosen=chosen,
    )


def check_classes(splits: Splits, num_classes: int) -> None:
    """Raise UsageError unless the data has as many classes as the model."""
    if not num_classes:
        raise UsageError("the model has no classifier: add --task features to prune it as an embedding model, or set num_classes "
                         "in the card and give weights that were trained with it")  # fmt: skip
    if splits.classes and len(splits.classes) != num_classes:
        raise UsageError(f"{splits.source} has {len(splits.classes)} classes, the model {num_classes}; "
                         "set num_classes in the card or point --data-dir elsewhere")  # fmt: skip


def _timm_sources(
    data: DataSpec, rng: np.random.Generator
) -> tuple[tuple[Any, np.ndarray, Any, np.ndarray], tuple[str, ...], str]:
    where = f"{data.name} data set" + (f" in '{data.dir}'" if data.dir else "")
    split, found = data.eval_split, _tree(data)
    if found is not None:
        parts = (split, *(s for s in EVAL_SPLITS if s != split))
        split = next((s for s in parts if found.has(s)), "")
        if split and not found.has(data.train_split):
            # timm would read the whole folder instead, evaluation images included
            raise UsageError(
                f"'{data.dir}' has a folder '{split}' but no folder '{data.train_split}'; add the training images"
            )
    train = _create(data, data.train_split, where, found)
    evaluation = _create(data, split, where, found) if split else train
    indices = np.arange(len(train))
    if split:
        chosen = (train, indices, evaluation, np.arange(len(evaluation)))
    else:
        rest, kept_back = divide(len(train), rng)
        chosen = (train, rest, train, kept_back)
        where += DIVIDED
    classes = _classes(train)
    if split and classes and _classes(evaluation) not in ((), classes):
        raise UsageError(f"{where}: the class folders of '{data.train_split}' and '{split}' differ")
    return chosen, classes, where


def _tree(data: DataSpec) -> Folder | Packed | None:
    """Where the data set is a folder or an archive: its files. Raises UsageError where it should be and is not."""
    of_folders = data.name == "folder"
    if (of_folders or data.name.startswith("torch/")) and not data.dir:
        raise UsageError(f"the data set '{data.name}' needs --data-dir DIR")
    if data.name.startswith("torch/") and not Path(data.dir).is_dir():
        raise UsageError(f"there is no folder '{data.dir}'; give --data-dir an existing folder of images")
    return tree(Path(data.dir), data.follow_links) if of_folders else None


def _domain_sources(
    data: DataSpec, rng: np.random.Generator
) -> tuple[tuple[Any, np.ndarray, Any, np.ndarray], dict[str, NDArray[np.int64]], tuple[str, ...], str]:
    """DIR/<domain>/<class>/*: what is trained on, the ordinary evaluation part, and what is judged of each domain."""
    found = _tree(data)
    where, held_out = f"folder data set in '{data.dir}'", data.held_out_domain
    source = _create(data, "", where, found)
    root = Path(data.dir)
    samples = [(Path(file), label) for file, label in source.reader.samples]
    domains = [domain(file.relative_to(root) if root.is_dir() else file) for file, _ in samples]
    names, classes = sorted(set(domains)), _classes(source)
    if len(names) < 2:
        raise UsageError(f"'{data.dir}' has one domain only ({names[0]}); holding one out needs two, as "
                         "DIR/<domain>/<class>/*")  # fmt: skip
    if held_out not in names:
        raise unknown("domain", held_out, names)
    own = {name: frozenset(label for (_, label), of in zip(samples, domains) if of == name) for name in names}
    usual = Counter(own.values()).most_common(1)[0][0]
    if odd := next((name for name in names if own[name] != usual), ""):
        differing = ", ".join(classes[label] for label in sorted(own[odd] ^ usual)[:5])
        like = next(name for name in names if own[name] == usual)
        raise UsageError(f"the domain '{odd}' has other classes than '{like}' ({differing}); all domains need the same")
    train, judged = divide_domains(domains, held_out, rng)
    if small := next((name for name, indices in judged.items() if not len(indices)), ""):
        raise UsageError(f"the domain '{small}' has fewer than 5 images; a fifth of them is kept back to judge on")
    evaluation = np.concatenate([indices for name, indices in judged.items() if name != held_out])
    return (source, train, source, evaluation), judged, classes, f"{where} without domain '{held_out}'{DIVIDED}"


def _create(data: DataSpec, split: str, where: str, found: Folder | Packed | None) -> Any:
    name = "" if data.name == "folder" else data.name
    if isinstance(found, Packed):
        return _filled(Unpacked(found, split if found.has(split) else ""), where)
    try:
        dataset = create_dataset(name, root=data.dir or None, split=split)
    except ImportError as error:
        raise UsageError(f"the data set '{data.name}' needs a package that is missing: {error}") from error
    except (RuntimeError, AssertionError, ValueError, KeyError) as error:
        raise UsageError(f"{where}: {first_line(error)}") from error
    except OSError as error:
        raise StorageError(f"{where} cannot be read: {error}") from error
    return _filled(dataset, where)


def _filled(dataset: Any, where: str) -> Any:
    if len(dataset) == 0:
        raise UsageError(f"{where} holds no images")
    return dataset


def _classes(dataset: Any) -> tuple[str, ...]:
    reader = getattr(dataset, "reader", None)
    mapping = getattr(reader, "class_to_idx", None) or getattr(dataset, "class_to_idx", None)
    if mapping:
        return tuple(sorted(mapping, key=mapping.__getitem__))
    return tuple(getattr(dataset, "classes", ()))
