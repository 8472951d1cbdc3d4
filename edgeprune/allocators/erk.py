"""ERK: wide layers are thinned more than narrow ones (Erdos-Renyi-kernel; with random units arXiv 2202.02643).

    density_i = min(1, e (n_in + n_out) / (n_in n_out))

where a layer connects n_in with n_out. What both layers of a sub-block share are its hidden units (the columns of
queries, keys or values; neurons), so n_in is the residual width and n_out the hidden width that is there, and both
layers get the same density. e is solved for the budget with what is clipped at 1 counted in, which redistributes the
excess of full layers as published. The paper draws single weights by these densities; here they are shares of units. A
ViT whose blocks are alike has but two densities, attention's above the MLP's. Looks at nothing but widths. Cost: none.
"""

from __future__ import annotations

import numpy as np

from edgeprune.allocators import Choose, Task, by_ratios, spread
from edgeprune.types import FloatArray

NEEDS = ()


def prepare(task: Task) -> Choose:
    sizes = task.sizes
    hidden = [own[-1] * sizes.unit_size(level.at) for level, own in zip(task.levels, task.counts, strict=True)]
    widths = [sizes.by_block[level.block].width for level in task.levels]
    raw = densities(np.array(widths), np.array(hidden))
    return lambda room_ms: by_ratios(task, lambda knob: spread(raw, 1 - knob), room_ms)


def densities(width: FloatArray | int, hidden: FloatArray) -> FloatArray:
    """`[sub-blocks]`, before scaling; 0 where nothing is there."""
    return np.where(hidden > 0, (width + hidden) / (width * np.maximum(hidden, 1)), 0.0)
