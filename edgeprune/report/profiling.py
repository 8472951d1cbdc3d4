"""The profiling report: a profile document for people, the same on the terminal and as `profile.md`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Section:
    """A table with a title, and a sentence or two below it."""

    title: str
    headings: tuple[str, ...] = ()
    rows: Sequence[tuple[str, ...]] = ()
    notes: Sequence[str] = ()


def markdown(document: dict[str, Any]) -> str:
    """`profile.md`."""
    lines = [f"# {_title(document)}", ""]
    for section in sections(document):
        lines += [f"## {section.title}", ""]
        if section.rows:
            lines += ["| " + " | ".join(section.headings) + " |", "|" + "---|" * len(section.headings)]
            lines += ["| " + " | ".join(row) + " |" for row in section.rows] + [""]
        lines += [*(f"{note}\n" for note in section.notes)]
    return "\n".join(lines)


def show(document: dict[str, Any]) -> None:
    """The same on stdout."""
    from rich.console import Console
    from rich.table import Table

    out = Console(highlight=False, soft_wrap=True)
    out.print(_title(document), style="bold", markup=False)
    for section in sections(document):
        table = Table(title=section.title, title_justify="left")
        for i, heading in enumerate(section.headings):
            table.add_column(heading, justify="right" if i else "left")
        for row in section.rows:
            table.add_row(*row)
        if section.rows:
            out.print(table)
        for note in section.notes:
            out.print(note, markup=False)


def sections(document: dict[str, Any]) -> Iterator[Section]:
    """What there is to say, most important first."""
    table, survey = document.get("table"), document.get("survey")
    if survey is not None:
        yield _latency(document, survey)
    if table is not None:
        yield _where(table, survey)
        yield _staircase(table, survey)
    if survey is not None:
        yield _operators(survey)
        if survey["ceilings"]:
            yield _ceilings(survey["ceilings"])
        yield _threads(survey)
        yield _precisions(survey)
        yield _noise(survey)
    if "check" in document:
        yield _check(document["check"])


def _title(document: dict[str, Any]) -> str:
    what = document["file"]["name"] if "file" in document else document["model"]["architecture"]
    survey = document.get("survey") or document["table"]
    return (
        f"{what} on {document['device']['cpu']}: {document['runtime']}, {survey['threads']} threads, "
        f"target {document['target']['name']}"
    )


def _latency(document: dict[str, Any], survey: dict[str, Any]) -> Section:
    found = survey["latency_ms"]
    low, high = found["ci"]
    rows = [(name, _ms(found[name])) for name in ("p50", "p90", "p99")] + [("at its quietest", _ms(found["quiet"]))]
    size = f"batch {document['model']['batch']}" if "model" in document else "one inference"
    notes = [
        f"{found['samples']} samples, {size}; 95 % interval of p50 {low:.3f} to {high:.3f} ms; at its quietest: {found['how']}."
    ]
    if "anchor" in document:
        anchor = document["anchor"]
        notes.append(
            f"The latency table stands on {anchor['p50']:.3f} ms: {anchor['how']}, of {anchor['samples']} in all. "
            f"Where the device is slower, small models lose more: slope {anchor['slope']:.2f}. A dash: too few samples."
        )
    return Section("Latency of the dense model" if "table" in document else "Latency", ("", "ms"), rows, notes)


def in_stage(table: Mapping[str, Any], number: int) -> str:
    """Which stage, in words; "" where there is but one."""
    return f" in stage {number}" if len(table["stages"]) > 1 else ""


def _where(table: dict[str, Any], survey: dict[str, Any] | None) -> Section:
    """Sub-blocks of the dense model, and how near they are to the ceiling."""
    dense = rest = table["dense_ms"]
    rows, each = [], []
    for number, stage in enumerate(table["stages"]):
        blocks, where = stage["blocks"], in_stage(table, number)
        for kind, ms in (("attention", stage["attn_ms"][-1]), ("MLP", stage["mlp_ms"][-1])):
            listed: list[dict[str, Any]] = survey["sub_blocks"] if survey else []
            row = next((r for r in listed if (r["kind"], r.get("stage", 0)) == (kind, number)), {})
            gflops = (
                (f"{row['gflops']:.0f}", f"{row['share_of_ceiling']:.0%}", row["bound"])
                if "gflops" in row else ("–", "–", "–")
            )  # fmt: skip
            rows.append(
                (f"{kind}{where}, {blocks} of them", _ms(blocks * ms), f"{blocks * ms / dense:.1%}", _ms(ms), *gflops)
            )
            rest -= blocks * ms
        head, neurons = (
            stage["attn_ms"][-1] / (len(stage["attn_ms"]) - 1),
            stage["mlp_ms"][-1] / stage["mlp_widths"][-1],
        )
        each.append(f"a head costs {1e3 * head:.0f} µs per block on average, 8 neurons {8e3 * neurons:.2f} µs{where}")
    rows.append(("everything else", _ms(rest), f"{rest / dense:.1%}", "", "", "", ""))
    told = "; ".join(each)
    notes = [
        f"What always stays is priced at {table['base_ms']:.3f} ms in pruned models, where blocks of many shapes cost a little more.",
        f"{told[0].upper()}{told[1:]} ({table['samples']} rounds per entry).",
    ]
    if fit := table["fit"]:
        surplus = (
            f", and {1e3 * fit['surplus_ms']:.0f} µs for each sub-block of a form" if fit.get("surplus_ms") else ""
        )
        notes.append(
            f"Fitted on {fit['plans']} plans whose blocks all differ: prices times {fit['scale']:.3f}, plus {1e3 * fit['shift_ms']:.0f} µs{surplus}; "
            f"median error {fit['median_error_before']:.1%} before, {fit['median_error']:.1%} after. Empty model: {table['empty_ms']:.3f} ms."
        )
    if table["repaired"]:
        notes.append(f"Made monotone: {'; '.join(table['repaired'])}.")
    headings = ("where the time goes", "ms in all", "share", "ms each", "GFLOP/s", "of the ceiling", "bound by")
    return Section("Sub-blocks", headings, rows, notes)


def _staircase(table: dict[str, Any], survey: dict[str, Any] | None) -> Section:
    """Every price of the table, with the marginal cost of its step."""
    rows = []
    for number, stage in enumerate(table["stages"]):
        where, attn, mlp, widths = in_stage(table, number), stage["attn_ms"], stage["mlp_ms"], stage["mlp_widths"]
        for heads, ms in enumerate(attn):
            step = f"{1e3 * (ms - attn[heads - 1]):.1f} µs per head" if heads else ""
            rows.append((f"attention{where}", f"{heads} heads", f"{ms:.4f}", step))
        for i, (width, ms) in enumerate(zip(widths, mlp, strict=True)):
            step = f"{8e3 * (ms - mlp[i - 1]) / (width - widths[i - 1]):.2f} µs per 8 neurons" if i else ""
            rows.append((f"MLP{where}", f"{width} neurons", f"{ms:.4f}", step))
        for kind, prices, sizes in (("attention", attn, range(len(attn))), ("MLP", mlp, widths)):
            unit = "heads" if kind == "attention" else "neurons"
            for form, every in (stage.get("attn_forms" if kind == "attention" else "mlp_forms") or {}).items():
                for size, ms, plain in list(zip(sizes, every, prices))[1:]:
                    rows.append((f"{kind}{where}, {form}", f"{size} {unit}", f"{ms:.4f}", f"{ms / plain:.2f} of the plain one" if plain else ""))  # fmt: skip
    notes = []
    if any(stage.get("attn_forms") for stage in table["stages"]):
        notes.append("int8 and lower ranks were measured at some sizes; between them a price is on a line.")
    if table.get("patches"):  # an older table has none
        for count, attn, mlp in zip(table["patches"], table["attn_share"], table["mlp_share"], strict=True):
            rows.append(("tokens", f"{count} patches", "", f"attention {attn:.1%}, MLP {mlp:.1%} of its price"))
        for kind, key in (("attention", "attn_form_share"), ("MLP", "mlp_form_share")):
            for form, shares in (table.get(key) or {}).items():
                told = ", ".join(f"{share:.1%} with {count}" for count, share in zip(table["patches"], shares))
                rows.append(("tokens", f"{kind}, {form}", "", told))
        notes.append(f"Dropping tokens takes {1e3 * table['reduce_ms']:.1f} µs where it happens.")
    off_grid = (survey or {}).get("off_grid") or []
    if len(off_grid) > 1:
        first = off_grid[0]
        told = ", ".join(f"{row['width']}: {row['ms'] / first['ms'] - 1:+.1%}" for row in off_grid[1:])
        notes.append(
            f"Widths beside the SIMD grid, the whole model against the same with {first['width']} neurons in every block: {told}."
        )
    return Section("Latency table, per block", ("sub-block", "kept", "ms", "marginal cost"), rows, notes)


def _operators(survey: dict[str, Any]) -> Section:
    rows = [
        (row["operator"], row["kernel"] or "–", str(row["count"]), f"{row['ms']:.3f}", f"{row['share']:.1%}")
        for row in survey["operators"]
    ]
    notes = ["From the runtime's own profiler, after fusion; profiling slows the model, so shares say more than times."]
    if any(row["operator"] == "Subgraph" for row in survey["operators"]):
        notes.append("Subgraph: what OpenVINO fuses into one kernel, elementwise operators and parts of attention.")
    return Section("Operators", ("operator", "kernel", "count", "ms", "share"), rows, notes)


def _ceilings(ceilings: dict[str, Any]) -> Section:
    rows = [
        (f"matrix product {row['m']} x {row['k']} x {row['n']}", f"{row['gflops']:.0f} GFLOP/s", f"{row['ms']:.3f}")
        for row in ceilings["gemms"]
    ]
    rows.append(("weights read once from memory", f"{ceilings['gb_per_s']:.1f} GB/s", ""))
    notes = ["The ceilings of the roofline: fp32, same runtime, threads and instruction set, timed in the same rounds."]
    if ceilings["uncapped"]:
        notes.append(
            "The matrix products ran in kernels that the instruction set cap does not reach: a true device's ceiling is lower."
        )
    return Section("What this device can do", ("", "rate", "ms"), rows, notes)


def _threads(survey: dict[str, Any]) -> Section:
    rows = [
        (str(row["threads"]), f"{row['speedup']:.2f} x", f"{row['ci'][0]:.2f} to {row['ci'][1]:.2f}", f"{row['efficiency']:.0%}")
        for row in survey["threads_scaling"]
    ]  # fmt: skip
    return Section("Thread scaling", ("threads", "speed-up", "95 % interval", "efficiency"), rows)


def _precisions(survey: dict[str, Any]) -> Section:
    rows = [
        (
            f"{row['runtime']}, {row['precision']}",
            f"{row['ratio']:.2f}",
            f"{row['ci'][0]:.2f} to {row['ci'][1]:.2f}",
            str(row["rounds"]),
        )
        for row in survey["precisions"]
    ]
    notes = [f"Left out: {reason}." for reason in survey["left_out"]]
    if not rows:
        notes.insert(0, "There is nothing to compare with: one runtime, one precision.")
    headings = ("runtime and precision", f"times as long as {survey['runtime']}'s fp32", "95 % interval", "rounds")
    return Section("Runtimes and precisions", headings, rows, notes)


def _noise(survey: dict[str, Any]) -> Section:
    noise = survey["noise"]

    def number(name: str, text: str) -> str:
        return "–" if noise.get(name) is None else text.format(noise[name])

    rows = [
        ("rounds, and those that waited for a CPU", f"{noise['rounds']}, {noise['disturbed_rounds']}"),
        ("coefficient of variation", number("cv", "{:.1%}")),
        ("drift, last quarter against first", number("drift", "{:+.1%}")),
        ("slowest against fastest stretch", number("slowest_over_fastest_stretch", "{:.2f} x")),
        ("p90 against p50", number("p90_over_p50", "{:.2f} x")),
        ("autocorrelation of neighbouring rounds", number("autocorrelation", "{:.2f}")),
        ("context switches, voluntary", number("voluntary_switches_per_s", "{:.0f} /s")),
        ("context switches, involuntary", number("involuntary_switches_per_s", "{:.0f} /s")),
        ("other work on the machine", number("others_cpus", "{:.2f} CPUs")),
        ("stolen by the hypervisor", number("steal_share", "{:.1%}")),
        ("throttled for heat", number("throttled", "{:.0f} times")),
        ("throttled by the control group's quota", number("quota_throttled", "{:.0f} times")),
        ("clock rate", number("mhz", "{:.0f} MHz")),
        ("temperature", number("temperature_c", "{:.0f} °C")),
    ]
    notes = [f"{sentence[0].upper()}{sentence[1:]}." for sentence in noise["disturbances"]]
    return Section(
        "Noise while surveying",
        ("", ""),
        rows,
        [*notes, "A dash: this system does not show it, or there were too few rounds."],
    )


def _check(check: dict[str, Any]) -> Section:
    rows = [
        (
            f"{sum(row[0] for row in plan['shape'])} heads, {sum(row[1] for row in plan['shape'])} neurons",
            _ms(plan["predicted_ms"]),
            _ms(plan["measured_ms"]),
            f"{plan['ci_ms'][0]:.3f} to {plan['ci_ms'][1]:.3f}",
            f"{plan['error']:+.1%}",
        )
        for plan in check["plans"]
    ]
    notes = [
        f"Magnitude of the error: median {check['median']:.1%}, 90 % within {check['p90']:.1%}, at most {check['max']:.1%}; "
        f"mean {check['bias']:+.1%}; {check['rounds']} rounds."
    ]
    if not check["calm"]:
        notes.append("The machine was never as quiet as when the table was measured: repeat with --rebuild.")
    headings = ("held-out random plan", "predicted", "measured", "95 % interval", "error")
    return Section("Predicted against measured", headings, rows, notes)


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
