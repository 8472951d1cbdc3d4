"""Roofline: how near the dense model's sub-blocks are to what this device can do, and how noisy it is; for the report.

The shorter form of `edgeprune profile`'s survey: no thread scaling, no other runtimes. Writes `survey.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from edgeprune.config import Request
from edgeprune.console import Console
from edgeprune.latency import survey
from edgeprune.stages import profile
from edgeprune.types import to_json


def run(request: Request, read: Mapping[str, Path], out: Path, console: Console) -> None:
    document, table = profile.read_profile(read["profile"])
    facts = survey.survey(
        read["baseline"] / "dense.onnx", request.conditions, table.runtime, table.threads, console,
        table=table, sizes=document["model"], compare=False,
    )  # fmt: skip
    (out / "survey.json").write_text(json.dumps(to_json(facts), indent=1))
