"""python -m pytest tests/test_console.py

What a terminal shows while work goes on, and what anything else gets.
"""

from __future__ import annotations

import io
import time
from typing import Any

import pytest
from rich.console import Console as RichConsole

from edgeprune import console
from edgeprune.console import Console


def made(*, terminal: bool, quiet: bool = False) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    found = Console(quiet=quiet)
    found.rich = RichConsole(file=text, force_terminal=terminal, width=120, highlight=False, soft_wrap=True)
    return found, text


def wait_for(text: io.StringIO, *parts: str) -> None:
    """What a thread draws ten times a second is there soon, or on a busy machine later."""
    over = time.monotonic() + 30
    while not all(part in text.getvalue() for part in parts):
        assert time.monotonic() < over, text.getvalue()
        time.sleep(0.02)


def test_a_terminal_sees_what_how_far_and_how_long() -> None:
    shown, text = made(terminal=True)
    with shown.progress("corruptions", 10, "kinds") as advance:
        for _ in range(5):
            advance(1, "fog")
        wait_for(text, "corruptions", "5/10", "kinds/s", "eta", "fog")


def test_a_measurement_counts_its_seconds_and_rounds() -> None:
    shown, text = made(terminal=True)
    with shown.timing("timing", 30) as on_round:
        on_round(1, 1.0)
        on_round(64, 12.0)
        wait_for(text, "12/30", "round 64")


def test_what_has_no_end_in_sight_shows_that_it_goes_on() -> None:
    shown, text = made(terminal=True)
    with shown.busy("torch to ONNX"):
        wait_for(text, "torch to ONNX", "0:00:0")


@pytest.mark.parametrize("quiet", [True, False])
def test_elsewhere_there_are_plain_lines_or_none(monkeypatch: Any, quiet: bool) -> None:
    monkeypatch.setattr(console, "PLAIN_EVERY_S", 0.0)
    shown, text = made(terminal=False, quiet=quiet)
    with shown.timing("timing", 30) as on_round:
        on_round(3, 10.0)
    with shown.busy("torch to ONNX"):
        pass
    assert "\x1b" not in text.getvalue()
    assert text.getvalue().startswith("  timing: 10/30 s") is not quiet
    assert "torch to ONNX" not in text.getvalue()
