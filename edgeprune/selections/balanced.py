"""Balanced: as many images of every class, drawn by the seed.

A class of K gets count / K; one that has fewer gives all, and the others share the rest alike (`selections.quotas`).
Left-over images go to the classes that come first in the drawn order.

Needs labels, and nothing of the images where the data set lists its labels; else every image is read once. The statistics
of a balanced sample are those of another distribution than the data's where classes are uneven: that is the point, and
it lowers the weight of frequent classes in every criterion.
"""

from __future__ import annotations

import numpy as np

from edgeprune.selections import Counts, Pool, quotas

NEEDS = ("labels",)


def choose(pool: Pool, left: Counts, count: int) -> Counts:
    left = left[pool.labels[left] >= 0]
    labels, first = np.unique(pool.labels[left], return_index=True)
    groups = [left[pool.labels[left] == label] for label in labels[np.argsort(first)]]
    sizes = np.array([len(own) for own in groups])
    taken = quotas(np.full(len(groups), count / len(groups)), sizes, count)
    return np.concatenate([own[:quota] for own, quota in zip(groups, taken, strict=True)])
