"""CFSP: how large a part a neuron has in the weights of its MLP, times its activations (Wang et al., arXiv 2409.13199).

The fine-grained half of the paper, for neuron j of W1 = `fc1`, W2 = `fc2`, and x the input of `fc2`:

    score_j = ||x_j|| mean_i ( |W2_ij| ||x_j|| / sum_k |W2_ik| ||x_k||  +  |W1_ji| / sum_k |W1_ki| )

error(level) = sum of the scores of what is removed; ||x_j|| is a root mean square over tokens. Adapted: a ViT has no
gate projection. The authors' code divides by sums over i, not over neurons k, after which the mean over i is the same
for all neurons and ||x_j|| alone is left; dividing by what all neurons have in a row i lets weights count. The paper
prunes no heads: here the values' rows take the place of `fc1`, `proj` that of `fc2`, and a head is the sum of its
columns. Scores rank within a sub-block; what each block keeps is the coarse-grained half, an allocator's. Needs weights
and input statistics; no gradients, no labels; costs nothing beyond them.
"""

from __future__ import annotations

from torch import Tensor

from edgeprune import saliency
from edgeprune.criteria import Evidence
from edgeprune.types import Levels, SubBlock

NEEDS = ("weights", "activations")


def score(evidence: Evidence) -> list[Levels]:
    scores = {at: saliency.of_columns(evidence, at, _columns(evidence, at)) for at in evidence.moments}
    return saliency.levels(evidence, scores)


def _columns(evidence: Evidence, at: SubBlock) -> Tensor:
    """Scores `[inputs]` of the columns of the last layer."""
    norms = saliency.input_norms(evidence, at)
    last = evidence.layer(at)[0].double().abs() * norms
    first = saliency.group(evidence.model, at)[0].detach().double().abs()[-len(norms) :]  # of qkv, the values
    return (_shares(last) + _shares(first.T)).mean(0) * norms


def _shares(parts: Tensor) -> Tensor:
    """`[rows, inputs]`, each row divided by its sum."""
    return parts / parts.sum(1, keepdim=True).clamp_min(1e-300)
