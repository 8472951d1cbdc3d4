"""Unit-ranking: of all units of all sub-blocks the one with the lowest score goes first, heads and neurons alike.

As `ranking`, with its floors, but by scores as they are: for criteria that have made heads and neurons comparable
themselves, as FLAP's z-scores (its "AL-AM", arXiv 2312.11983), HESSO's normalised mix (arXiv 2409.09085) and VBP's shares
do. FLAP's code counts a head as so many neurons in the budget; here the budget is the measured latency. Needs scores on
one scale for all sub-blocks, and nothing else. Cost: a sort.
"""

from __future__ import annotations

from edgeprune.allocators import Choose, Task
from edgeprune.allocators.ranking import ranked

NEEDS = ()


def prepare(task: Task) -> Choose:
    return ranked(task, [task.scores(i) for i in range(len(task.levels))])
