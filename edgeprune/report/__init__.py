"""Reports: what a manifest says, for people. Reads manifests and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgeprune.types import INT8, int8, left, rank

#: Label, dense, pruned.
Row = tuple[str, str, str]


def digits(value: float) -> str:
    """Milliseconds as text, without the unit: three digits below 1 ms."""
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def ms(value: float | None) -> str:
    """Milliseconds as text; a dash for what was not measured."""
    return "–" if value is None else f"{digits(value)} ms"


def rows(manifest: dict[str, Any]) -> list[Row]:
    """Dense against pruned, one line a fact, as text."""
    dense, pruned = manifest["dense"], manifest["pruned"]

    embedded = manifest.get("features")
    similar = [] if embedded is None else [
        ("cosine to dense, mean", "1.0000", f"{embedded['cosine']['mean']:.4f}"),
        ("cosine to dense, 1 % are below", "1.0000", f"{embedded['cosine']['p1']:.4f}"),
        ("k-NN accuracy in the dense index", f"{dense['accuracy']:.2f} %", f"{embedded['in_dense_index']:.2f} %"),
    ]  # fmt: skip
    return [
        (accuracy(manifest), f"{dense['accuracy']:.2f} %", f"{pruned['accuracy']:.2f} %"),
        *similar,
        ("latency p50", ms(dense["latency_ms"]["p50"]), ms(pruned["latency_ms"]["p50"])),
        ("latency p90", ms(dense["latency_ms"]["p90"]), ms(pruned["latency_ms"]["p90"])),
        ("speed-up", "1.00 x", f"{1 / pruned['ratio']:.2f} x"),
        ("parameters", f"{dense['params'] / 1e6:.2f} M", f"{pruned['params'] / 1e6:.2f} M"),
        ("multiply-adds", f"{dense['macs'] / 1e9:.3f} G", f"{pruned['macs'] / 1e9:.3f} G"),
        ("fp32 weights", f"{dense['params'] * 4 / 1e6:.1f} MB", f"{pruned['params'] * 4 / 1e6:.1f} MB"),
    ]


def served(manifest: Mapping[str, Any]) -> str:
    """What one inference takes, in words."""
    facts = manifest.get("input", {"batch": 1, "dynamic_batch": False, "preprocessing": "outside"})
    words = f"batch {facts['batch']}" + " (others work too)" * facts["dynamic_batch"]
    if facts["preprocessing"] == "folded":
        words += f", preprocessing of raw {facts['shape'][1]}x{facts['shape'][2]} images included"
    return words + ", fp16 weights" * (manifest.get("weights") == "fp16")


def accuracy(manifest: Mapping[str, Any]) -> str:
    """What the manifest's accuracy is of."""
    return "k-NN accuracy" if "features" in manifest else "accuracy"


def word(checks: Sequence[Mapping[str, Any]]) -> str:
    """The verdict on all gates in one word: PASS, FAIL or INCONCLUSIVE."""
    verdicts = {check["verdict"] for check in checks}
    return "FAIL" if "fail" in verdicts else "INCONCLUSIVE" if "inconclusive" in verdicts else "PASS"


def verdict_line(manifest: Mapping[str, Any]) -> str:
    """One sentence: whether every gate passed."""
    found = word(manifest["checks"])
    shown = {"FAIL": {"fail"}, "INCONCLUSIVE": {"inconclusive"}, "PASS": {"pass"}}[found]
    return f"{found}: " + "; ".join(f"{c['name']}: {c['reason']}" for c in manifest["checks"] if c["verdict"] in shown)


def markdown(manifest: dict[str, Any]) -> str:
    """`report.md`: the short form."""
    request, pruned = manifest["request"], manifest["pruned"]
    shape = manifest["shape"]
    columns = ["heads", "neurons", *(["patches"] if any(map(left, shape)) else []), *(["int8"] if any(map(int8, shape)) else []), *(["rank"] if any(map(rank, shape)) else [])]  # fmt: skip
    lines = [
        f"# {manifest['model']} on {manifest['target']} at {request['latency']}",
        "",
        verdict_line(manifest),
        "",
        "| | dense | pruned |",
        "|---|---|---|",
        *(f"| {label} | {dense} | {small} |" for label, dense, small in rows(manifest)),
        "",
        f"Latency: {manifest['runtime']}, {manifest['precision']}, {manifest['threads']} threads, {served(manifest)}, on "
        f"{manifest['device']['cpu']}; {interval(pruned)}. "
        f"{accuracy(manifest)[:1].upper()}{accuracy(manifest)[1:]}: {manifest['data']['evaluation']} images of {manifest['data']['source']}. {method(manifest).capitalize()}.",
        "",
        *domains(manifest),
        f"| block | {' | '.join(columns)} |",
        "|---" * (1 + len(columns)) + "|",
        *(_plan_row(i, row, columns) for i, row in enumerate(shape)),
        "",
        "| stage | seconds | |",
        "|---|---|---|",
        *(f"| {s['name']} | {s['seconds']:.1f} | {'cached' if s['cached'] else ''} |" for s in manifest["stages"]),
        "",
    ]
    return "\n".join(lines)


def _plan_row(block: int, row: list[int], columns: Sequence[str]) -> str:
    """Heads and neurons of a block; in a plan with such, how many patches go on from here, and which parts are int8."""
    cells = {
        "heads": row[0],
        "neurons": row[1],
        "patches": left(row) or "",
        "int8": ", ".join(int8(row)),
        "rank": rank(row) or "",
    }
    return f"| {block} | {' | '.join(str(cells[name]) for name in columns)} |"


def domains(manifest: dict[str, Any]) -> list[str]:
    """Accuracy by domain, as a table in Markdown; nothing where the data set has none."""
    if "domains" not in manifest:
        return []
    lines = ["| domain | images | dense, 95 % interval | pruned, 95 % interval |", "|---|---|---|---|"]
    for found in manifest["domains"]:
        name = found["name"] + (" (held out: never trained on)" if found["held_out"] else "")
        both = [
            f"{found[m]:.2f} %, {found[f'{m}_ci'][0]:.2f} to {found[f'{m}_ci'][1]:.2f}" for m in ("dense", "pruned")
        ]
        lines.append(f"| {name} | {found['images']} | {both[0]} | {both[1]} |")
    return [*lines, ""]


def method(manifest: dict[str, Any]) -> str:
    """The method, and its parts, in words."""
    parts = ", ".join(f"{kind} {manifest[kind]}" for kind in ("criterion", "allocator", "schedule", "recovery"))
    return f"method {manifest['method']} ({parts}; chooses {', '.join(manifest['dims'])}{_int8_words(manifest)})"


def _int8_words(manifest: Mapping[str, Any]) -> str:
    """Whether int8 pays, in words; "" where it could not be chosen."""
    if "int8" not in manifest:
        return ""
    attn, mlp = (manifest["int8"][kind] for kind in INT8)
    count = sum(len(int8(row)) for row in manifest["shape"])
    return f"; int8 was measured at {attn:.0%} of fp32's time in attention and {mlp:.0%} in MLPs: {count or 'no'} sub-blocks have it"


def interval(pruned: dict[str, Any]) -> str:
    """How the artifact's latency is known, in words."""
    if pruned["latency_ci_ms"] is None:
        return f"predicted {pruned['predicted_ms']:.2f} ms from another device's profile, not measured"
    low, high = pruned["latency_ci_ms"]
    return (
        f"95 % interval {digits(low)} to {ms(high)} from {pruned['latency_ms']['samples']} rounds, "
        f"turn by turn with the dense model; predicted {pruned['predicted_ms']:.2f} ms"
    )


def comparison_rows(manifests: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """Several artifacts side by side: the headings, then one row each."""
    rows: list[tuple[str, ...]] = [
        ("artifact", "method", "verdict", "limit", "p50", "95 % interval", "speed-up", "accuracy", "drop", "parameters")
    ]
    for m in manifests:
        low, high = m["pruned"]["latency_ci_ms"] or (None, None)
        rows.append((
            f"{m['model']} {m['target']} {m['request']['latency']}", m.get("method", m["criterion"]), word(m["checks"]),
            ms(m["request"]["latency_ms"]), ms(m["pruned"]["latency_ms"]["p50"]), f"{ms(low)} to {ms(high)}",
            f"{1 / m['pruned']['ratio']:.2f} x", f"{m['pruned']['accuracy']:.2f} %",
            f"{m['dense']['accuracy'] - m['pruned']['accuracy']:.2f}", f"{m['pruned']['params'] / 1e6:.2f} M",
        ))  # fmt: skip
    return rows


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as a table in Markdown, the headings first."""
    head, *others = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *others]


def comparison(manifests: Sequence[Mapping[str, Any]]) -> str:
    """Several artifacts side by side, as Markdown; of two, also what changed from the first to the second."""
    from edgeprune.report import changes

    lines = table(comparison_rows(manifests))
    lines += [f"\n{note}" for note in changes.comparable(manifests)]
    if len(manifests) == 2:
        head = ("from the first to the second", "before", "after", "change", "")
        lines += ["", *table([head, *(change.row for change in changes.between(*manifests))])]
    return "\n".join(lines)


def summary(manifests: Sequence[Mapping[str, Any]]) -> str:
    """What a build found, for GitHub's step summary."""
    lines = ["## edgeprune build", "", *table(comparison_rows(manifests)), ""]
    for m in manifests:
        lines.append(f"- **{m['model']} {m['target']} {m['request']['latency']}**: {verdict_line(m)}")
    return "\n".join(lines)


def document(folders: Sequence[Any], manifests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The manifests with their folders; of two, what changed from the first to the second."""
    from edgeprune.report import changes

    found: dict[str, Any] = {
        "artifacts": [{"path": str(f), "manifest": m} for f, m in zip(folders, manifests, strict=True)]
    }
    if len(manifests) == 2:
        found["changes"] = [vars(change) for change in changes.between(*manifests)]
    return found


def show(manifest: dict[str, Any], folder: str) -> None:
    """The summary table of a finished build, on stdout."""
    from rich.console import Console
    from rich.table import Table

    out = Console(highlight=False, soft_wrap=True)
    table = Table(
        title=f"{manifest['model']} on {manifest['target']} at {manifest['request']['latency']} ({manifest['runtime']})"
    )
    for heading in ("", "dense", "pruned"):
        table.add_column(heading, justify="left" if not heading else "right")
    for row in rows(manifest):
        table.add_row(*row)
    out.print(table)
    out.print(
        "stages: "
        + ", ".join(
            f"{s['name']} {s['seconds']:.0f} s{' (cached)' if s['cached'] else ''}" for s in manifest["stages"]
        ),
        markup=False,
    )
    out.print(f"{verdict_line(manifest)}\n{folder}", markup=False)
