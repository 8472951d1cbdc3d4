"""k-nearest neighbours: embedding models as classifiers, so that they can be judged like any other. Pure numpy.

A reference, embedded by the same model, names the classes: each of the k nearest by cosine votes for its own with
weight exp(cosine / 0.07), as in the protocol of DINO (arXiv 2104.14294, appendix F). The votes' logarithms are what a
classifier's logits are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeprune.errors import StorageError, UsageError

FILE = "reference.npy"  # in an artifact
TEMPERATURE = 0.07
FAINT = 1e-6  # votes, in sum, for the classes that no neighbour has


class Predictor(Protocol):
    """What answers for loaded models: a `Clock`, or a `Judge` around one."""

    def predict(self, name: str, images: NDArray[Any]) -> NDArray[Any]: ...


@dataclass(frozen=True)
class Reference:
    """Images whose classes are known, as one model sees them.

    Embeddings are of length 1, less their mean, which changes all cosines of a query alike, and so no vote: what is left
    tells images apart, and float16 holds that even where all point nearly the same way.
    """

    labels: NDArray[np.int64]  # [n]
    embeddings: NDArray[np.float32]  # [n, dimensions]
    neighbours: int
    classes: int

    def logits(self, unit: NDArray[np.float32]) -> NDArray[np.float32]:
        """`[m, classes]`: the logarithms of the votes for embeddings `[m, dimensions]` of length 1."""
        count = min(self.neighbours, len(self.labels))
        cosines = unit @ self.embeddings.T
        nearest = np.argpartition(-cosines, count - 1, axis=-1)[:, :count]
        near = np.take_along_axis(cosines, nearest, -1).astype(np.float64)
        weights = np.exp((near - near.max(-1, keepdims=True)) / TEMPERATURE)
        votes = np.full((len(unit), self.classes), FAINT / self.classes)
        np.add.at(votes, (np.arange(len(unit))[:, None], self.labels[nearest]), weights)
        found: NDArray[np.float32] = np.log(votes).astype(np.float32)
        return found


class Judge:
    """Loaded embedding models that answer with classes, each by its own reference."""

    def __init__(self, clock: Predictor, references: Mapping[str, Reference]) -> None:
        self.clock, self.references = clock, references
        #: What each model said so far, `[n, dimensions]` of length 1, batch by batch.
        self.said: dict[str, list[NDArray[np.float32]]] = {name: [] for name in references}

    def predict(self, name: str, images: NDArray[Any]) -> NDArray[np.float32]:
        """Logits `[n, classes]` of images as the model takes them."""
        unit = normalised(self.clock.predict(name, images))
        self.said[name].append(unit)
        return self.references[name].logits(unit)

    def embeddings(self, name: str) -> NDArray[np.float32]:
        """All that a model said so far, `[n, dimensions]`."""
        return np.concatenate(self.said[name])


def refer(
    clock: Predictor,
    names: Iterable[str],
    batches: Iterable[tuple[NDArray[Any], NDArray[np.int64]]],
    neighbours: int,
    classes: int,
) -> dict[str, Reference]:
    """The references of loaded models on the same labelled images. Raises UsageError for labels beyond the classes."""
    names, labels = list(names), []
    seen: dict[str, list[NDArray[np.float32]]] = {name: [] for name in names}
    for pixels, own in batches:
        if own.size and not 0 <= int(own.min()) <= int(own.max()) < classes:
            raise UsageError(f"a reference image has the label {int(own.max())}, and the data set {classes} classes")
        labels.append(own)
        for name in names:
            seen[name].append(normalised(clock.predict(name, pixels)))
    every = np.concatenate(labels).astype(np.int64)
    return {name: Reference(every, centred(np.concatenate(seen[name])), neighbours, classes) for name in names}


def centred(unit: NDArray[np.float32]) -> NDArray[np.float32]:
    """Less their mean, and rounded as they are kept: what is judged now is what will be judged on a device."""
    found: NDArray[np.float32] = (unit - unit.mean(0)).astype(np.float16).astype(np.float32)
    return found


def normalised(embeddings: NDArray[Any]) -> NDArray[np.float32]:
    """`[n, dimensions]` of length 1."""
    lengths = np.linalg.norm(embeddings.astype(np.float32), axis=-1, keepdims=True)
    unit: NDArray[np.float32] = embeddings.astype(np.float32) / np.maximum(lengths, 1e-12)
    return unit


def save(reference: Reference, path: Path) -> None:
    """As one array of (label, embedding), float16."""
    width = reference.embeddings.shape[1]
    rows = np.zeros(len(reference.labels), dtype=[("label", "<i4"), ("embedding", "<f2", (width,))])
    rows["label"], rows["embedding"] = reference.labels, reference.embeddings
    np.save(path, rows, allow_pickle=False)


def load(path: Path, neighbours: int, classes: int) -> Reference:
    """What `save` wrote. Raises UsageError for what is no reference, StorageError for what cannot be read."""
    try:
        rows = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: its header cannot claim more than there is
        labels, embeddings = rows["label"].astype(np.int64), rows["embedding"].astype(np.float32)
        if embeddings.ndim != 2 or not len(labels) or not np.isfinite(embeddings).all():
            raise ValueError("no embeddings")
        if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            raise ValueError(f"labels from {labels.min()} to {labels.max()} of {classes} classes")
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, TypeError, IndexError, KeyError, EOFError) as error:
        raise UsageError(f"{path} holds no reference embeddings: {error}; build the artifact again") from error
    return Reference(labels, embeddings, neighbours, classes)
