"""What the user sees while work goes on: stages, reasons, progress. Everything goes to stderr.

A terminal gets live progress bars, anything else plain lines; rich honours NO_COLOR and dumb
terminals. With `quiet`, only warnings and the final result appear.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

#: Called with the units done since the last call and a short text; one per long loop.
Advance = Callable[[float, str], None]

PLAIN_EVERY_S = 15.0


class Console:
    """Prints stages, reasons and progress; the library's only way to talk to the user."""

    def __init__(self, *, quiet: bool = False, verbose: bool = False) -> None:
        self.rich = RichConsole(stderr=True, highlight=False, soft_wrap=True)
        self.quiet = quiet
        self.verbose = verbose

    def stage(self, text: str) -> None:
        if not self.quiet:
            self.rich.print(f"[bold]▸ {text}[/bold]")

    def say(self, text: str) -> None:
        """One line about what was found or chosen, with its reason."""
        if not self.quiet:
            self.rich.print(f"  {text}", markup=False)

    def detail(self, text: str) -> None:
        if self.verbose and not self.quiet:
            self.rich.print(f"    {text}", markup=False, style="dim")

    def warn(self, text: str) -> None:
        self.rich.print(f"  warning: {text}", markup=False, style="yellow")

    @contextmanager
    def progress(self, what: str, total: float, unit: str) -> Iterator[Advance]:
        """A bar on a terminal, a line every few seconds elsewhere; yields `advance(done, info)`."""
        if self.quiet:
            yield _ignore
        elif self.rich.is_terminal:
            columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(),
                       TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TextColumn("eta"), TimeRemainingColumn(),
                       TextColumn("{task.fields[info]}"))  # fmt: skip
            with Progress(*columns, console=self.rich, transient=True) as bar:
                task = bar.add_task(what, total=total, rate="", info="")
                start = time.monotonic()

                def advance(done: float, info: str = "") -> None:
                    so_far = bar.tasks[0].completed + done
                    rate = so_far / max(time.monotonic() - start, 1e-9)
                    bar.update(task, advance=done, rate=_rate(rate, unit), info=info)

                yield advance
        else:
            yield self._plain(what, total, unit)

    @contextmanager
    def timing(self, what: str, seconds: float) -> Iterator[Callable[[int, float], None]]:
        """Progress of a measurement that may take `seconds`: yields what `Clock.measure` takes as `on_round`."""
        with self.progress(what, seconds, "s") as advance:
            shown = 0.0

            def on_round(rounds: int, now: float) -> None:
                nonlocal shown
                advance(now - shown, f"round {rounds}")
                shown = now

            yield on_round

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """On a terminal, what goes on and for how long, where nobody can say how far it is; nothing elsewhere."""
        if self.quiet or not self.rich.is_terminal:
            yield
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=self.rich, transient=True) as bar:
            bar.add_task(what, total=None)
            yield

    def _plain(self, what: str, total: float, unit: str) -> Advance:
        start = last = time.monotonic()
        so_far = 0.0

        def advance(done: float, info: str = "") -> None:
            nonlocal so_far, last
            so_far += done
            now = time.monotonic()
            if now - last >= PLAIN_EVERY_S:
                last = now
                rate = so_far / (now - start)
                eta = max(total - so_far, 0.0) / rate if rate > 0 else float("inf")
                parts = (f"{what}: {so_far:.0f}/{total:.0f} {unit}", _rate(rate, unit), f"{eta:.0f} s left", info)
                self.say(", ".join(part for part in parts if part))

        return advance


def _rate(rate: float, unit: str) -> str:
    """Seconds pass at one a second, which nobody has to be told."""
    return "" if unit == "s" else f"{rate:.3g} {unit}/s"


def _ignore(done: float, info: str = "") -> None:
    """Progress that nobody sees."""


SILENT = Console(quiet=True)
