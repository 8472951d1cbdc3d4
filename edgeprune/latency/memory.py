"""Memory: how fast the anchor has been on this device at its quietest, kept beside the cached profiles.

A profile taken while the device is slow for all of its minutes cannot know it; the next one can.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "quietest.json"


@dataclass(frozen=True)
class Remembered:
    """The anchor's quiet latency in milliseconds, and when it was measured."""

    ms: float
    when: str


def key(anchor: Path, device: Mapping[str, Any], conditions: Mapping[str, Any]) -> str:
    """What the anchor's latency depends on: the model, the device, and the worker's runtime, threads, precision and cap."""
    facts = [hashlib.sha256(anchor.read_bytes()).hexdigest(), dict(device), dict(conditions)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def recall(folder: Path, of: str) -> Remembered | None:
    """What is remembered in `folder` under a `key`; None when nothing is, or it cannot be read."""
    try:
        entry = json.loads((folder / FILE).read_text(encoding="utf-8"))[of]
        found = Remembered(float(entry["ms"]), str(entry["when"]))
        return found if 0 < found.ms < float("inf") else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(folder: Path, of: str, ms: float) -> None:
    """Keep a quieter latency than was known; the file is replaced whole."""
    known = recall(folder, of)
    if known is not None and known.ms <= ms:
        return
    try:
        entries = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        entries = {}
    entries = entries if isinstance(entries, dict) else {}
    entries[of] = {"ms": ms, "when": time.strftime("%Y-%m-%d %H:%M")}
    handle, name = tempfile.mkstemp(prefix=f".{FILE}-", dir=folder)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(entries, file, indent=1)
    os.replace(name, folder / FILE)
