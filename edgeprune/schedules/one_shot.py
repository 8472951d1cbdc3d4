"""One-shot: everything goes at once, from the dense model as it came; all epochs are left for fine-tuning.

Needs nothing, costs nothing.
"""

from __future__ import annotations

from edgeprune.schedules import Planned, Training

NEEDS = ()


def coach(training: Training) -> Planned:
    raise NotImplementedError("one-shot has no training before the cut")
