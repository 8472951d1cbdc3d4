"""Checkpoints of a tuning: all that the next step depends on, so that a killed one goes on as if it had not been.

<folder>/step-N.safetensors    weights of student, optimiser, moving average and best
<folder>/state.json            sealed, written last: everything else, and the hash of the tensors
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from edgeprune import artifact, sealed
from edgeprune.console import SILENT, Console

STATE = "state.json"
EVERY_S = 60.0
SHARE = 0.05  # of the time that saving may take, where models are large


@dataclass
class Checkpoint:
    """Where a tuning keeps its state, and when it is time to."""

    folder: Path
    console: Console = SILENT
    key: str = ""  # of what is tuned, where the folder does not say: a checkpoint of something else is not used
    last: float = field(default_factory=time.monotonic)
    took_s: float = 0.0

    def due(self) -> bool:
        """Whether enough time has passed since the last one."""
        return time.monotonic() - self.last >= max(EVERY_S, self.took_s / SHARE)

    def save(self, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Replace the checkpoint; a process killed meanwhile leaves the old one or the new. Raises OSError."""
        start = time.monotonic()
        self.folder.mkdir(exist_ok=True)
        name = f"step-{facts['lessons']}-{facts['phase']}.safetensors"
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, self.folder / name)
        sealed.write(
            self.folder / STATE,
            {**facts, "key": self.key, "tensors": name, "hash": artifact.sha256(self.folder / name)},
        )
        for path in self.folder.iterdir():
            if path.name not in (STATE, name):
                path.unlink()
        self.last = time.monotonic()
        self.took_s = self.last - start

    def load(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """What was saved; None when there is nothing, or it is damaged, which is said."""
        try:
            facts = sealed.read(self.folder / STATE)
            if facts["key"] != self.key:
                raise sealed.Damaged("it is of another training, with other data, options or code")
            path = self.folder / str(facts["tensors"])
            if artifact.sha256(path) != facts["hash"]:
                raise sealed.Damaged(f"{path.name} is not as it was written")
            return facts, load_file(path)
        except FileNotFoundError:
            return None
        except (sealed.Damaged, OSError) as error:
            self.console.warn(f"the checkpoint of the interrupted tuning cannot be used, it starts anew: {error}")
            return None


def part(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one part, without its name."""
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}


def named(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one part, under its name."""
    return {f"{name}/{key}": value for key, value in tensors.items()}
