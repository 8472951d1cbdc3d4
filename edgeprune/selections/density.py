"""Density: the hard images of every concept, more of complex concepts (Abbas et al., arXiv 2401.04578).

Concepts are clusters j of unit features e_i of the dense model, with unit centroids c_j. With d = 1 - cosine,

    d_intra(j) = mean over the members i of j of d(e_i, c_j)
    d_inter(j) = mean over the 20 nearest other centroids of d(c_j, c_k)
    P(j) = exp(d_intra(j) d_inter(j) / T) / sum_k exp(d_intra(k) d_inter(k) / T),   T = 0.1

A cluster gives P(j) * count images, or the nearest numbers to these that it and the others have (`selections.quotas`,
the paper's quadratic programme, solved exactly): the least similar to its centroid first.

Needs activations: one forward pass over all training images, then k-means; no labels. Adapted: the paper prunes
hundreds of millions of captioned images, de-duplicates them first (not done here: duplicates count as often as they
are there), and has 500 clusters; here it is the square root of the number of images, up to 500, from one run of k-means
on unit vectors. Hard images are also mislabelled and broken ones. At a few hundred images of a million this is far
beyond the shares for which the paper shows a gain (a quarter and more): measure before you trust it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeprune.selections import Counts, Pool, quotas
from edgeprune.types import FloatArray

#: Vectors `[n, d]` of length 1, or about to be.
Vectors = NDArray[np.floating[Any]]

NEEDS = ("activations",)
CLUSTERS = 500  # at most
NEIGHBOURS = 20
TEMPERATURE = 0.1


def choose(pool: Pool, left: Counts, count: int) -> Counts:
    left = left[np.isfinite(pool.features[left]).all(1)]
    features = unit(pool.features[left])
    members = clusters(features, pool.seed)
    groups = [np.flatnonzero(members == j) for j in np.unique(members)]
    centroids = unit(np.stack([features[own].mean(0) for own in groups]))
    sizes = np.array([len(own) for own in groups])
    taken = quotas(count * shares(features, groups, centroids), sizes, count)
    kept = [
        own[np.argsort(features[own] @ centroid, kind="stable")[:quota]]
        for own, centroid, quota in zip(groups, centroids, taken, strict=True)
    ]
    return left[np.concatenate(kept)]


def shares(features: Vectors, groups: list[Counts], centroids: Vectors) -> FloatArray:
    """P(j): which share of the images each cluster gives. groups: the members of each; centroids: `[clusters, d]`."""
    intra = np.array([1 - (features[own] @ centroid).mean() for own, centroid in zip(groups, centroids, strict=True)])
    apart = 1 - centroids @ centroids.T
    np.fill_diagonal(apart, np.inf)
    near = np.sort(apart, axis=1)[:, : min(NEIGHBOURS, len(groups) - 1)]
    inter = near.mean(1) if near.size else np.zeros(len(groups))
    powers = intra * inter / TEMPERATURE
    weights = np.exp(powers - powers.max())
    return weights / weights.sum()


def clusters(features: Vectors, seed: int) -> Counts:
    """The cluster of each image `[n]`."""
    from sklearn.cluster import KMeans

    wanted = min(CLUSTERS, round(len(features) ** 0.5))
    return np.asarray(KMeans(wanted, n_init=1, random_state=seed).fit_predict(features), dtype=np.int64)


def unit(vectors: Vectors) -> Vectors:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
