"""Reports: what a manifest says, for people. Reads manifests and nothing else."""

from __future__ import annotations

from typing import Any

#: Label, dense, pruned.
Row = tuple[str, str, str]


def rows(manifest: dict[str, Any]) -> list[Row]:
    """Dense against pruned, one line a fact, as text."""
    dense, pruned = manifest["dense"], manifest["pruned"]

    def ms(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f} ms"

    return [
        ("accuracy", f"{dense['accuracy']:.2f} %", f"{pruned['accuracy']:.2f} %"),
        ("latency p50", ms(dense["latency_ms"]["p50"]), ms(pruned["latency_ms"]["p50"])),
        ("latency p90", ms(dense["latency_ms"]["p90"]), ms(pruned["latency_ms"]["p90"])),
        ("speed-up", "1.00 x", f"{1 / pruned['ratio']:.2f} x"),
        ("parameters", f"{dense['params'] / 1e6:.2f} M", f"{pruned['params'] / 1e6:.2f} M"),
        ("multiply-adds", f"{dense['macs'] / 1e9:.3f} G", f"{pruned['macs'] / 1e9:.3f} G"),
        ("fp32 weights", f"{dense['params'] * 4 / 1e6:.1f} MB", f"{pruned['params'] * 4 / 1e6:.1f} MB"),
    ]


def verdict_line(manifest: dict[str, Any]) -> str:
    """One sentence: whether every gate passed."""
    verdicts = [check["verdict"] for check in manifest["checks"]]
    if "fail" in verdicts:
        return "FAIL: " + "; ".join(f"{c['name']}: {c['reason']}" for c in manifest["checks"] if c["verdict"] == "fail")
    if "inconclusive" in verdicts:
        return "INCONCLUSIVE: " + "; ".join(
            f"{c['name']}: {c['reason']}" for c in manifest["checks"] if c["verdict"] != "pass"
        )
    return "PASS: " + "; ".join(f"{c['name']}: {c['reason']}" for c in manifest["checks"])


def markdown(manifest: dict[str, Any]) -> str:
    """`report.md`: the short form."""
    request, pruned = manifest["request"], manifest["pruned"]
    low, high = pruned["latency_ci_ms"]
    lines = [
        f"# {manifest['model']} on {manifest['target']} at {request['latency']}",
        "",
        verdict_line(manifest),
        "",
        "| | dense | pruned |",
        "|---|---|---|",
        *(f"| {label} | {dense} | {small} |" for label, dense, small in rows(manifest)),
        "",
        f"Latency: {manifest['runtime']}, {manifest['precision']}, {manifest['threads']} threads, batch 1, on "
        f"{manifest['environment']['device']['cpu']}; 95 % interval {low:.2f} to {high:.2f} ms from "
        f"{pruned['latency_ms']['samples']} rounds, turn by turn with the dense model; predicted {pruned['predicted_ms']:.2f} ms. "
        f"Accuracy: {manifest['data']['evaluation']} images of {manifest['data']['source']}.",
        "",
        "| block | heads | neurons |",
        "|---|---|---|",
        *(f"| {i} | {heads} | {neurons} |" for i, (heads, neurons) in enumerate(manifest["shape"])),
        "",
        "| stage | seconds | |",
        "|---|---|---|",
        *(f"| {s['name']} | {s['seconds']:.1f} | {'cached' if s['cached'] else ''} |" for s in manifest["stages"]),
        "",
    ]
    return "\n".join(lines)


def comparison(manifests: list[dict[str, Any]]) -> str:
    """Several artifacts side by side, as Markdown."""
    lines = [
        "| artifact | verdict | limit | p50 | 95 % interval | speed-up | accuracy | drop | parameters |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for m in manifests:
        low, high = m["pruned"]["latency_ci_ms"]
        lines.append(
            f"| {m['model']} {m['target']} {m['request']['latency']} | {verdict_line(m).split(':')[0]} | {m['request']['latency_ms']:.2f} ms "
            f"| {m['pruned']['latency_ms']['p50']:.2f} ms | {low:.2f} to {high:.2f} ms | {1 / m['pruned']['ratio']:.2f} x "
            f"| {m['pruned']['accuracy']:.2f} % | {m['dense']['accuracy'] - m['pruned']['accuracy']:.2f} | {m['pruned']['params'] / 1e6:.2f} M |"
        )
    return "\n".join(lines)


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


def show_profile(document: dict[str, Any]) -> None:
    """The latency table of a profile, on stdout."""
    from rich.console import Console
    from rich.table import Table

    own = document["table"]
    out = Console(highlight=False, soft_wrap=True)
    out.print(f"{document['runtime']}, {own['precision']}, {own['threads']} threads: dense {own['dense_ms']:.2f} ms, of which "
              f"{own['base_ms']:.2f} ms always stay", markup=False)  # fmt: skip
    table = Table(title=f"one of {own['blocks']} blocks")
    for heading in ("sub-block", "kept", "ms", "share of dense"):
        table.add_column(heading, justify="right")
    for heads, ms in enumerate(own["attn_ms"]):
        table.add_row("attention", f"{heads} heads", f"{ms:.4f}", f"{ms / own['dense_ms']:.2%}")
    for width, ms in zip(own["mlp_widths"], own["mlp_ms"], strict=True):
        table.add_row("MLP", f"{width} neurons", f"{ms:.4f}", f"{ms / own['dense_ms']:.2%}")
    out.print(table)
