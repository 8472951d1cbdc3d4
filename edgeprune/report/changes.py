"""Changes: what is better or worse in one artifact than in another; two builds side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edgeprune.checks import wilson
from edgeprune.report import ms


@dataclass(frozen=True)
class Change:
    """One fact in both builds; `judged` is "better", "worse", "same" (their intervals overlap) or "" (not judged)."""

    name: str
    before: str
    after: str
    change: str
    judged: str

    @property
    def row(self) -> tuple[str, str, str, str, str]:
        return self.name, self.before, self.after, self.change, self.judged


def between(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Facts of two manifests, the gated ones first. Latencies and accuracies are judged by their 95 % intervals."""
    found = [_latency(before, after), _accuracy(before, after)]
    a, b = before["pruned"], after["pruned"]
    for quantile in ("p90", "p99"):
        found.append(_plain(f"latency {quantile}", a["latency_ms"][quantile], b["latency_ms"][quantile], "", 1))
    found.append(
        _plain(
            "dense latency p50",
            before["dense"]["latency_ms"]["p50"],
            after["dense"]["latency_ms"]["p50"],
            "{:.2f} ms",
            1,
        )
    )
    found.append(_plain("parameters", a["params"], b["params"], "{:.2f} M", 1e6))
    found.append(_plain("multiply-adds", a["macs"], b["macs"], "{:.3f} G", 1e9))
    for name, key in (("model", "entry"), ("runtime", "runtime"), ("method", "method")):
        found.append(_text(name, str(before[key]), str(after[key])))
    versions = [manifest["environment"]["versions"] for manifest in (before, after)]
    for name in sorted({*versions[0], *versions[1]}):
        old, new = (own.get(name) or "–" for own in versions)
        if old != new:
            found.append(_text(name, old, new))
    return found


def comparable(manifests: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why latencies or accuracies of these manifests may not be compared, in sentences; empty when they may."""
    notes = []
    for what, key in (
        ("devices", lambda m: m["device"]), ("thread counts", lambda m: m["threads"]),
        ("inputs", lambda m: repr(m.get("input"))),
        ("data sets", lambda m: (m["data"]["source"], m["accuracy"]["images"])),
    ):  # fmt: skip
        if any(key(m) != key(manifests[0]) for m in manifests[1:]):
            spoilt = "accuracies" if what == "data sets" else "latencies"
            notes.append(f"These artifacts are of different {what}: their {spoilt} do not compare.")
    return notes


def _judge(a: Sequence[float] | None, b: Sequence[float] | None, *, less_is_better: bool) -> str:
    if a is None or b is None:
        return ""
    if b[0] <= a[1] and a[0] <= b[1]:
        return "same"
    return "better" if (b[1] < a[0]) == less_is_better else "worse"


def _latency(before: Mapping[str, Any], after: Mapping[str, Any]) -> Change:
    a, b = before["pruned"], after["pruned"]
    texts = [
        "–"
        if own["latency_ci_ms"] is None
        else f"{ms(own['latency_ms']['p50'])} ({ms(own['latency_ci_ms'][0])} to {ms(own['latency_ci_ms'][1])})"
        for own in (a, b)
    ]
    judged = _judge(a["latency_ci_ms"], b["latency_ci_ms"], less_is_better=True)
    return Change("latency p50", texts[0], texts[1], _percent(a["latency_ms"]["p50"], b["latency_ms"]["p50"]), judged)


def _accuracy(before: Mapping[str, Any], after: Mapping[str, Any]) -> Change:
    ends, texts = [], []
    for own in (before, after):
        share, images = own["pruned"]["accuracy"], own["accuracy"]["images"]
        low, high = wilson(round(share * images / 100), images)
        ends.append((low, high))
        texts.append(f"{share:.2f} % ({low:.2f} to {high:.2f})")
    points = after["pruned"]["accuracy"] - before["pruned"]["accuracy"]
    return Change(
        "accuracy", texts[0], texts[1], f"{points:+.2f} points", _judge(ends[0], ends[1], less_is_better=False)
    )


def _plain(name: str, a: float | None, b: float | None, text: str, unit: float) -> Change:
    """`text` formats a value divided by `unit`; "" = milliseconds."""
    texts = ["–" if value is None else text.format(value / unit) if text else ms(value) for value in (a, b)]
    return Change(name, texts[0], texts[1], _percent(a, b), "")


def _text(name: str, a: str, b: str) -> Change:
    return Change(name, a, b, "" if a == b else "changed", "")


def _percent(a: float | None, b: float | None) -> str:
    return "–" if not a or b is None else f"{100 * (b / a - 1):+.1f} %"
