"""Memory: how fast the anchor has been on this device at its quietest, kept beside the cached profiles.

A profile taken while the device is slow for all of its minutes cannot know it; the next one can.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeprune import sealed

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
        entry = _entries(folder)[of]
        found = Remembered(float(entry["ms"]), str(entry["when"]))
        return found if 0 < found.ms < float("inf") else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remember(folder: Path, of: str, ms: float) -> None:
    """Keep a quieter latency than was known; the file is replaced whole."""
    known = recall(folder, of)
    if known is not None and known.ms <= ms:
        return
    entries = {**_entries(folder), of: {"ms": ms, "when": time.strftime("%Y-%m-%d %H:%M")}}
    sealed.write(folder / FILE, entries)


def _entries(folder: Path) -> dict[str, Any]:
    """What is remembered; nothing where the file is missing or damaged: the next profile remembers anew."""
    try:
        return sealed.read(folder / FILE)
    except (OSError, sealed.Damaged):
        return {}
