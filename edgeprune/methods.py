"""Methods: named combinations of a criterion, an allocator, a schedule and a recovery. Imports nothing heavy.

Every method gets the same measured latency table, the same calibration images, budget and contract; only its four parts
differ. `METHODS` is the list; the parts explain themselves in their files.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgeprune import modules
from edgeprune.errors import unknown

DEFAULT = "edgeprune"


@dataclass(frozen=True)
class Method:
    """Four parts and what they are together."""

    name: str
    criterion: str
    allocator: str
    schedule: str
    recovery: str
    about: str  # the paper, and what of it is left out

    @property
    def parts(self) -> dict[str, str]:
        return {kind: getattr(self, kind) for kind in modules.KINDS}


METHODS = (
    Method("edgeprune", "fisher", "search", "one-shot", "refit", "the default"),
    Method("knapsack", "fisher", "knapsack", "one-shot", "refit", "the default without its search: seconds instead of a minute"),
    Method("magnitude", "magnitude", "knapsack", "one-shot", "none", "the least sum of squared weights; the control"),
    Method("gradual", "magnitude", "knapsack", "gradual", "none", "To prune or not to prune (arXiv 1710.01878)"),
)  # fmt: skip

#: Methods that are not here, and what of them is.
ABSENT: dict[str, str] = {}


def get(name: str) -> Method:
    """The method; UsageError with "did you mean" for an unknown name."""
    found = {method.name: method for method in METHODS}
    if name not in found:
        raise unknown("method", name, found)
    return found[name]


def listing() -> str:
    """What `edgeprune methods` prints: methods, the parts of every kind, and what is not here."""
    lines = [f"{'method':14} {'criterion':12} {'allocator':12} {'schedule':14} {'recovery':10}"]
    lines += [
        f"{m.name:14} {m.criterion:12} {m.allocator:12} {m.schedule:14} {m.recovery:10} {m.about}" for m in METHODS
    ]
    for kind in modules.KINDS:
        lines += ["", f"{kind} (--{kind})"]
        lines += [f"  {name:14} {modules.summary(kind, name)}" for name in modules.names(kind)]
    if ABSENT:
        lines += ["", "not here"] + [f"  {name:14} {why}" for name, why in ABSENT.items()]
    return "\n".join(lines)


def describe(name: str) -> str:
    """All about one method or part: what it is made of, looks at and costs. Raises UsageError for an unknown name."""
    methods = {method.name: method for method in METHODS}
    parts = [(kind, name) for kind in modules.KINDS if name in modules.names(kind)]
    if name not in methods and not parts:
        if name in ABSENT:
            return f"{name}: {ABSENT[name]}"
        everything = {*methods, *ABSENT, *(part for kind in modules.KINDS for part in modules.names(kind))}
        raise unknown("method", name, everything)
    lines = []
    if name in methods:
        method = methods[name]
        lines.append(f"method {name}: {method.about}")
        parts = [*method.parts.items(), *(part for part in parts if part not in method.parts.items())]
    for kind, part in parts:
        looks = ", ".join(modules.needs(kind, part)) or "nothing"
        lines += ["", f"{kind} {part} (looks at {looks})"]
        lines += [f"  {line}".rstrip() for line in modules.doc(kind, part).split("\n")]
    return "\n".join(lines).strip()
