"""The report's plots, as plotly figures in JSON. Numbers in, figures out; colours of text and grid are the page's.

A figure is None where there is nothing to draw.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

#: Told apart without colours too: by marker, dash or position. Readable on light and dark paper.
DENSE, PRUNED, THIRD, FAINT = "#8a8f98", "#d9622b", "#3b82c4", "rgba(138,143,152,0.25)"
SYMBOLS = {"PASS": "circle", "FAIL": "x", "INCONCLUSIVE": "diamond-open"}
Figure = str


def figure(traces: Sequence[Any], *, height: int = 340, **layout: Any) -> Figure:
    """A plotly figure as JSON; plotly checks every name and value."""
    import plotly.graph_objects as go

    made = go.Figure(data=list(traces), layout={"template": {}, "height": height, **layout})
    text: str = made.to_json(engine="json")
    return json.dumps(json.loads(text))


def _go() -> Any:
    import plotly.graph_objects as go

    return go


def pareto(
    points: Sequence[Mapping[str, Any]], dense: Sequence[Mapping[str, Any]], limit_ms: float | None
) -> Figure | None:
    """Accuracy against latency: `points` (name, ms, ci, accuracy, verdict) and the dense models (name, ms, accuracy)."""
    go = _go()
    measured, dense = ([p for p in some if p["ms"] is not None] for some in (points, dense))
    front, best = [], float("-inf")
    for p in sorted([*measured, *dense], key=lambda p: (p["ms"], -p["accuracy"])):
        if p["accuracy"] > best:
            front.append(p)
            best = p["accuracy"]
    if not front:
        return None
    traces = [
        go.Scatter(
            x=[p["ms"] for p in front], y=[p["accuracy"] for p in front], mode="lines", name="Pareto front",
            line={"color": THIRD, "dash": "dot", "shape": "hv"}, hoverinfo="skip",
        ),
        go.Scatter(
            x=[p["ms"] for p in dense], y=[p["accuracy"] for p in dense], mode="markers", name="dense",
            text=[p["name"] for p in dense], marker={"color": DENSE, "size": 12, "symbol": "square"},
            hovertemplate="%{text}<br>%{x:.2f} ms, %{y:.2f} %<extra>dense</extra>",
        ),
        go.Scatter(
            x=[p["ms"] for p in measured], y=[p["accuracy"] for p in measured], mode="markers", name="pruned",
            text=[f"{p['name']}: {p['verdict']}" for p in measured],
            error_x={
                "type": "data", "symmetric": False, "color": PRUNED,
                "array": [p["ci"][1] - p["ms"] for p in measured], "arrayminus": [p["ms"] - p["ci"][0] for p in measured],
            },
            marker={"color": PRUNED, "size": 12, "symbol": [SYMBOLS[p["verdict"]] for p in measured]},
            hovertemplate="%{text}<br>%{x:.2f} ms, %{y:.2f} %<extra>pruned</extra>",
        ),
    ]  # fmt: skip
    shapes = []
    if limit_ms is not None:
        shapes.append({"type": "line", "x0": limit_ms, "x1": limit_ms, "y0": 0, "y1": 1, "yref": "paper", "line": {"color": PRUNED, "dash": "dash", "width": 1}})  # fmt: skip
    return figure(traces, shapes=shapes, xaxis={"title": {"text": "latency p50, ms"}, "rangemode": "tozero"}, yaxis={"title": {"text": "accuracy, %"}})  # fmt: skip


def heads(kept: Sequence[Sequence[int]], total: Sequence[int]) -> Figure:
    """Which heads of which block are kept: one cell each; none where a block has no such head."""
    pairs = list(zip(kept, total, strict=True))
    rows = [[None if head >= there else int(head in block) for block, there in pairs] for head in range(max(total))]
    text = [["" if cell is None else "kept" if cell else "removed" for cell in row] for row in rows]
    trace = _go().Heatmap(
        z=rows, text=text, xgap=2, ygap=2, showscale=False, zmin=0, zmax=1, colorscale=[[0, FAINT], [1, PRUNED]],
        hovertemplate="block %{x}, head %{y}: %{text}<extra></extra>",
    )  # fmt: skip
    return figure([trace], height=120 + 24 * min(max(total), 12), xaxis={"title": {"text": "block"}, "dtick": 1}, yaxis={"title": {"text": "head"}, "dtick": 1})  # fmt: skip


def kept_bars(name: str, kept: Sequence[int], total: Sequence[int]) -> Figure:
    """How many of something each block keeps, on the dense model's."""
    go, blocks = _go(), list(range(len(kept)))
    shares = [f"{100 * k / t:.0f} %" if t else "–" for k, t in zip(kept, total, strict=True)]
    traces = [
        go.Bar(x=blocks, y=list(total), name="dense", marker={"color": FAINT}, hovertemplate="block %{x}: %{y}<extra>dense</extra>"),
        go.Bar(x=blocks, y=list(kept), name="kept", text=shares, textposition="none", marker={"color": PRUNED},
               hovertemplate="block %{x}: %{y} " + name + ", %{text}<extra>kept</extra>"),
    ]  # fmt: skip
    return figure(traces, height=280, barmode="overlay", xaxis={"title": {"text": "block"}, "dtick": 1}, yaxis={"title": {"text": name}})  # fmt: skip


def where(table: Mapping[str, Any]) -> Figure:
    """What share of the dense model's time attention, MLPs and everything else take."""
    dense = table["dense_ms"]
    parts = {
        "attention": sum(stage["blocks"] * stage["attn_ms"][-1] for stage in table["stages"]),
        "MLP": sum(stage["blocks"] * stage["mlp_ms"][-1] for stage in table["stages"]),
    }
    parts["everything else"] = max(dense - sum(parts.values()), 0.0)
    traces = [
        _go().Bar(y=["dense"], x=[ms], name=name, orientation="h", marker={"color": color},
                  hovertemplate=f"{name}: %{{x:.3f}} ms ({ms / dense:.0%})<extra></extra>")
        for (name, ms), color in zip(parts.items(), (PRUNED, THIRD, DENSE), strict=True)
    ]  # fmt: skip
    return figure(traces, height=190, barmode="stack", xaxis={"title": {"text": "ms"}}, yaxis={"showticklabels": False})


def staircase(table: Mapping[str, Any]) -> Figure:
    """What one sub-block costs at each width it may keep: heads as their share, neurons as theirs."""
    go, traces = _go(), []
    for number, stage in enumerate(table["stages"]):
        attn, widths, mlp = stage["attn_ms"], stage["mlp_widths"], stage["mlp_ms"]
        most, marker = max(len(attn) - 1, 1), {"symbol": number}
        names = [f"{kind} {number}" if len(table["stages"]) > 1 else kind for kind in ("attention", "MLP")]
        traces += [
            go.Scatter(x=[100 * h / most for h in range(len(attn))], y=attn, name=names[0], mode="lines+markers", line={"color": PRUNED}, marker=marker,
                       text=[f"{h} heads" for h in range(len(attn))], hovertemplate=f"%{{text}}: %{{y:.4f}} ms<extra>{names[0]}</extra>"),
            go.Scatter(x=[100 * w / widths[-1] for w in widths], y=mlp, name=names[1], mode="lines+markers", line={"color": THIRD, "dash": "dash"}, marker=marker,
                       text=[f"{w} neurons" for w in widths], hovertemplate=f"%{{text}}: %{{y:.4f}} ms<extra>{names[1]}</extra>"),
        ]  # fmt: skip
    return figure(traces, xaxis={"title": {"text": "kept, % of the dense block"}}, yaxis={"title": {"text": "ms per sub-block"}, "rangemode": "tozero"})  # fmt: skip


def roofline(survey: Mapping[str, Any] | None) -> Figure | None:
    """GFLOP/s of every sub-block shape against its intensity, below what the device can do."""
    if not survey or not survey["ceilings"]:
        return None
    go, rows = _go(), [row for row in survey["sub_blocks"] if "gflops" in row]
    top, slope = survey["ceilings"]["gflops"], survey["ceilings"]["gb_per_s"]
    least = min([row["intensity"] for row in rows] + [top / slope]) / 2
    most = max([row["intensity"] for row in rows] + [top / slope]) * 2
    ceiling = [least, top / slope, most]
    traces = [
        go.Scatter(x=ceiling, y=[min(top, slope * x) for x in ceiling], mode="lines", name="ceiling", line={"color": DENSE},
                   hovertemplate="%{y:.0f} GFLOP/s at most<extra></extra>")
    ]  # fmt: skip
    for kind, color, symbol in (("attention", PRUNED, "circle"), ("MLP", THIRD, "triangle-up")):
        own = [row for row in rows if row["kind"] == kind]
        traces.append(go.Scatter(
            x=[row["intensity"] for row in own], y=[row["gflops"] for row in own], mode="markers", name=kind,
            marker={"color": color, "symbol": symbol, "size": 9},
            text=[f"{row['kept']}: {row['share_of_ceiling']:.0%} of the ceiling, bound by {row['bound']}" for row in own],
            hovertemplate="%{text}<br>%{y:.0f} GFLOP/s<extra>" + kind + "</extra>",
        ))  # fmt: skip
    return figure(traces, xaxis={"type": "log", "title": {"text": "FLOP per byte"}}, yaxis={"type": "log", "title": {"text": "GFLOP/s"}})  # fmt: skip


def predicted(points: Sequence[tuple[str, float, float, Sequence[float]]]) -> Figure | None:
    """Predicted against measured milliseconds: (name, predicted, measured, interval)."""
    if not points:
        return None
    go = _go()
    most = 1.08 * max(max(p[1], p[3][1]) for p in points)
    traces = [
        go.Scatter(x=[0, most], y=[0, most], mode="lines", name="equal", line={"color": DENSE, "dash": "dot"}, hoverinfo="skip"),
        go.Scatter(
            x=[p[1] for p in points], y=[p[2] for p in points], mode="markers", name="measured",
            marker={"color": PRUNED, "size": 10}, text=[f"{p[0]}: {100 * (p[2] / p[1] - 1):+.1f} %" for p in points],
            error_y={"type": "data", "symmetric": False, "color": PRUNED,
                     "array": [p[3][1] - p[2] for p in points], "arrayminus": [p[2] - p[3][0] for p in points]},
            hovertemplate="%{text}<br>predicted %{x:.2f} ms, measured %{y:.2f} ms<extra></extra>",
        ),
    ]  # fmt: skip
    return figure(traces, xaxis={"title": {"text": "predicted, ms"}}, yaxis={"title": {"text": "measured, ms"}})


def classes(rows: Sequence[Mapping[str, Any]], most: int = 40) -> Figure | None:
    """The change in accuracy of each class, the largest losses first; at most `most`, the table has them all."""
    shown = sorted(rows, key=lambda row: row["pruned"] - row["dense"])
    shown = shown if len(shown) <= most else [*shown[: most // 2], *shown[-most // 2 :]]
    if not shown:
        return None
    change = [row["pruned"] - row["dense"] for row in shown]
    trace = _go().Bar(
        x=change, y=[row["name"] for row in shown], orientation="h", marker={"color": [PRUNED if c < 0 else THIRD for c in change]},
        text=[f"{row['dense']:.1f} → {row['pruned']:.1f} % of {row['images']} images" for row in shown], textposition="none",
        hovertemplate="%{y}: %{x:+.2f} points<br>%{text}<extra></extra>",
    )  # fmt: skip
    return figure([trace], height=110 + 22 * len(shown), xaxis={"title": {"text": "change, points"}}, yaxis={"type": "category", "autorange": "reversed"})  # fmt: skip


def reliability(calibration: Mapping[str, Any]) -> Figure:
    """How often a model is right when it says it is this sure."""
    go = _go()
    traces = [
        go.Scatter(
            x=[0, 100],
            y=[0, 100],
            mode="lines",
            name="calibrated",
            line={"color": DENSE, "dash": "dot"},
            hoverinfo="skip",
        )
    ]
    for name, color, dash in (("dense", DENSE, "solid"), ("pruned", PRUNED, "dash")):
        bins = calibration[name]["bins"]
        traces.append(go.Scatter(
            x=[100 * b["confidence"] for b in bins], y=[100 * b["accuracy"] for b in bins], name=name, mode="lines+markers",
            line={"color": color, "dash": dash}, text=[f"{b['images']} images" for b in bins],
            hovertemplate="says %{x:.1f} %, right %{y:.1f} %<br>%{text}<extra>" + name + "</extra>",
        ))  # fmt: skip
    return figure(traces, xaxis={"title": {"text": "confidence, %"}, "range": [0, 102]}, yaxis={"title": {"text": "accuracy, %"}, "range": [0, 102]})  # fmt: skip


def pairs(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Accuracy of both models side by side, by `name`."""
    if not rows:
        return None
    traces = [
        _go().Bar(x=[row["name"] for row in rows], y=[row[model] for row in rows], name=model, marker={"color": color},
                  hovertemplate="%{x}: %{y:.1f} %<extra>" + model + "</extra>")
        for model, color in (("dense", DENSE), ("pruned", PRUNED))
    ]  # fmt: skip
    return figure(traces, barmode="group", xaxis={"tickangle": -45, "type": "category"}, yaxis={"title": {"text": "accuracy, %"}, "range": [0, 102]})  # fmt: skip


def geometry(blocks: Sequence[Mapping[str, float]]) -> Figure:
    """Angle to the dense model's features after each block, and the ratio of norms on the right axis."""
    go, at = _go(), list(range(len(blocks)))
    traces = [
        go.Scatter(x=at, y=[b["degrees"] for b in blocks], name="angle", mode="lines+markers", line={"color": PRUNED},
                   hovertemplate="block %{x}: %{y:.1f}°<extra>angle</extra>"),
        go.Scatter(x=at, y=[b["norm"] for b in blocks], name="norm, pruned / dense", mode="lines+markers", yaxis="y2", line={"color": THIRD, "dash": "dash"},
                   hovertemplate="block %{x}: %{y:.3f}<extra>norm</extra>"),
    ]  # fmt: skip
    return figure(
        traces, xaxis={"title": {"text": "after block"}, "dtick": 1}, yaxis={"title": {"text": "angle, degrees"}, "rangemode": "tozero"},
        yaxis2={"title": {"text": "norm ratio"}, "overlaying": "y", "side": "right", "showgrid": False},
    )  # fmt: skip


def stages(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Seconds of each stage, in order."""
    trace = _go().Bar(
        x=[row["seconds"] for row in rows], y=[row["name"] for row in rows], orientation="h",
        marker={"color": [DENSE if row["cached"] else PRUNED for row in rows]},
        text=["done before" if row["cached"] else "done now" for row in rows], textposition="none",
        hovertemplate="%{y}: %{x:.1f} s, %{text}<extra></extra>",
    )  # fmt: skip
    return figure([trace], height=110 + 24 * len(rows), xaxis={"title": {"text": "seconds"}}, yaxis={"type": "category", "autorange": "reversed"})  # fmt: skip
