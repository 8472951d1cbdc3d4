"""Inspection: where a pruned model differs from its dense one. Numbers for the report; pure numpy.

Works on what both models say of the same images, in the runtime that will run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.checks import Answers, drop_interval, wilson
from edgeprune.neighbours import Predictor

BINS = 10  # of confidence, in a reliability diagram
MODELS = ("dense", "pruned")


@dataclass(frozen=True)
class Predictions:
    """What the dense and the pruned model say of n images. Where there are two rows: dense, pruned."""

    places: NDArray[np.int64]  # [n]: positions among the evaluation images
    labels: NDArray[np.int64]  # [n]
    top: NDArray[np.int64]  # [2, n]: the likeliest class
    confidence: NDArray[np.float64]  # [2, n]: its probability
    likelihood: NDArray[np.float64]  # [2, n]: the probability of the label

    @property
    def right(self) -> NDArray[np.bool_]:
        """[2, n]"""
        found: NDArray[np.bool_] = self.top == self.labels
        return found

    @property
    def answers(self) -> Answers:
        dense, pruned = self.right
        return dense, pruned, self.top[0] == self.top[1]


def predictions(
    clock: Predictor, dense: str, pruned: str, batches: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]
) -> Predictions:
    """Both loaded models on every image: batches of places `[n]`, pixels `[n, channels, height, width]`, labels `[n]`."""
    rows: list[Predictions] = []
    for places, pixels, labels in batches:
        shares = np.stack([_softmax(clock.predict(name, pixels)) for name in (dense, pruned)])
        own = np.arange(len(labels))
        rows.append(
            Predictions(places, labels, shares.argmax(-1), shares.max(-1), shares[:, own, labels])  # [2, n] each
        )
    return joined(rows)


def joined(parts: Sequence[Predictions]) -> Predictions:
    """All images of all parts."""
    return Predictions(
        *(np.concatenate([getattr(part, name) for part in parts], axis=-1) for name in Predictions.__dataclass_fields__)
    )


def save(parts: Mapping[str, Predictions], path: Path) -> None:
    """The predictions of every part (a domain, or "" for all) as one .npz."""
    arrays = {f"{i}.{name}": getattr(part, name) for i, part in enumerate(parts.values()) for name in vars(part)}
    np.savez_compressed(path, parts=np.array(list(parts)), **arrays)


def load(path: Path) -> dict[str, Predictions]:
    """What `save` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        return {
            str(part): Predictions(*(arrays[f"{i}.{name}"] for name in Predictions.__dataclass_fields__))
            for i, part in enumerate(arrays["parts"])
        }


def per_class(said: Predictions, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Of every class with images: how many, and how many percent of them each model names rightly."""
    rows = []
    for label in np.unique(said.labels):
        mine = said.labels == label
        dense, pruned = (int(row[mine].sum()) for row in said.right)
        total = int(mine.sum())
        rows.append({
            "name": classes[label] if label < len(classes) else str(int(label)), "images": total,
            "dense": 100 * dense / total, "pruned": 100 * pruned / total, "pruned_ci": list(wilson(pruned, total)),
        })  # fmt: skip
    return rows


def calibration(said: Predictions) -> dict[str, Any]:
    """Of each model: expected calibration error (Naeini et al. 2015, percent), Brier score of the likeliest class,
    negative log-likelihood (nats), and the bins of the reliability diagram."""
    found = {}
    for i, model in enumerate(MODELS):
        confidence, right = said.confidence[i], said.right[i].astype(float)
        at = np.minimum((confidence * BINS).astype(int), BINS - 1)
        bins = [
            {"confidence": float(confidence[at == b].mean()), "accuracy": float(right[at == b].mean()), "images": int((at == b).sum())}
            for b in range(BINS) if (at == b).any()
        ]  # fmt: skip
        gaps = [row["images"] * abs(row["confidence"] - row["accuracy"]) for row in bins]
        found[model] = {
            "ece": 100 * float(sum(gaps)) / len(right),
            "brier": float(((confidence - right) ** 2).mean()),
            "nll": float(-np.log(np.maximum(said.likelihood[i], 1e-12)).mean()),
            "bins": bins,
        }
    return found


def flips(said: Predictions, most: int) -> dict[str, Any]:
    """How many images were lost (dense right, pruned wrong), gained, or changed from one wrong class to another, and
    `most` examples of each of the first two: indices into `said`, those of which the dense model was surest first."""
    dense, pruned, same = said.answers
    lost, gained = np.flatnonzero(dense & ~pruned), np.flatnonzero(~dense & pruned)
    surest = [
        list(map(int, rows[np.argsort(-said.confidence[0, rows], kind="stable")][:most])) for rows in (lost, gained)
    ]
    return {
        "lost": len(lost),
        "gained": len(gained),
        "otherwise_wrong": int((~dense & ~pruned & ~same).sum()),
        "examples": {"lost": surest[0], "gained": surest[1]},
    }


def paired(dense: NDArray[Any], pruned: NDArray[Any]) -> dict[str, Any]:
    """Both models on the same n images `[n]`, right (1) or wrong (0): percent right, and the drop in points with its 95 % interval."""
    drop = dense.astype(float) - pruned
    return {
        "images": len(drop),
        "dense": 100 * float(dense.mean()),
        "pruned": 100 * float(pruned.mean()),
        "drop": 100 * float(drop.mean()),
        "drop_ci": [100 * bound for bound in drop_interval(drop)],
    }


def angles(dense: NDArray[np.float32], pruned: NDArray[np.float32]) -> tuple[float, float]:
    """Mean angle in degrees between features `[n, dim]`, and the mean ratio of their norms, pruned over dense."""
    a, b = dense.astype(np.float64), pruned.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
    cosines = (a * b).sum(-1) / np.maximum(norms[0] * norms[1], 1e-12)
    degrees = np.degrees(np.arccos(np.clip(cosines, -1, 1)))
    return float(degrees.mean()), float((norms[1] / np.maximum(norms[0], 1e-12)).mean())


def _softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    shares: NDArray[np.float64] = shifted / shifted.sum(-1, keepdims=True)
    return shares
