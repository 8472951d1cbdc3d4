"""Random: the first images in the order that the seed draws.

Every training image is as likely as every other: unbiased, and what all methods are compared with.
Needs nothing; costs nothing.
"""

from __future__ import annotations

from edgeprune.selections import Counts, Pool

NEEDS = ()


def choose(pool: Pool, left: Counts, count: int) -> Counts:
    return left[:count]
