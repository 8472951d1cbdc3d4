"""`report.html`: one file that loads nothing. Reads an artifact's documents and nothing else; builds nothing.

The sections of `artifact_page` are in `templates/artifact.html`, their plots in `figures.py`.
"""

from __future__ import annotations

import base64
import gzip
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgeprune import __version__, extras, methods, report
from edgeprune.artifact import check_files, read_json
from edgeprune.checks import wilson
from edgeprune.errors import UsageError
from edgeprune.report import changes, figures, profiling

FILE = "report.html"
FACTS = "report.json"  # what the page shows beyond the manifest
SCHEMA = "edgeprune.report/1"
SECTIONS = {
    "verdict": "Verdict", "compare": "Dense against pruned", "pareto": "Accuracy and latency", "plan": "What is kept", "device": "Device",
    "predicted": "Predicted and measured", "classes": "Classes", "flips": "Flipped images", "calibration": "Calibration",
    "robustness": "Corruptions", "domains": "Domains", "geometry": "Features", "stages": "Stages", "reproduce": "Reproduce",
}  # fmt: skip
NO_COUNT = "–"


def read(folder: Path, manifest: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """`facts`, `plan` and `profile` of an artifact directory; with a manifest, only if they have its hashes.

    Raises UsageError for an artifact that was built before there was a report.json.
    """
    names = (FACTS, "plan.json", "profile.json")
    if manifest is not None:
        check_files(folder, dict(manifest), names)
    facts, plan, profile = (read_json(folder / name) for name in names)
    if facts.get("schema") != SCHEMA:
        raise UsageError(f"{folder / FACTS} is not of schema {SCHEMA}; build the artifact again with this edgeprune")
    return {"facts": facts, "plan": plan, "profile": profile}


def artifact_page(manifest: Mapping[str, Any], documents: Mapping[str, Any]) -> str:
    """The page of one artifact, as HTML. documents: what `read` returns."""
    facts, plan, profile = documents["facts"], documents["plan"], documents["profile"]
    survey = facts["survey"] or profile.get("survey")
    robust = facts["robustness"]
    return _render(
        "artifact.html",
        title=f"{manifest['model']} on {manifest['target']} at {manifest['request']['latency']}",
        sections=[(anchor, name) for anchor, name in SECTIONS.items() if anchor != "verdict"],
        manifest=manifest,
        facts=facts,
        word=report.word(manifest["checks"]),
        headline=_headline(manifest),
        compare=_compare(manifest, facts),
        compare_notes=_compare_notes(manifest, facts),
        pareto=figures.pareto(facts["family"], [dense_point(manifest), *facts["siblings"]], manifest["request"]["latency_ms"]),
        family=[_family_row(point) for point in facts["family"]]
        + [
            (f"dense {point['name']}", report.ms(point["ms"]), NO_COUNT, _percent(point["accuracy"]), "")
            for point in (dense_point(manifest), *facts["siblings"])
        ],
        pareto_notes=facts["siblings_notes"],
        plan=_plan_figures(plan, profile),
        plan_rows=_plan_rows(manifest, plan, profile),
        device=_device(manifest, profile),
        where=figures.where(profile["table"]),
        staircase=figures.staircase(profile["table"]),
        roofline=figures.roofline(survey),
        no_roofline="it was built from a recorded profile, which has none" if survey is None else "; ".join(survey["left_out"]),
        device_tables=[s for s in profiling.sections({**profile, "survey": survey}) if s.rows],
        **_predicted(facts["family"], profile),
        classes=figures.classes(facts["classes"]),
        class_rows=[
            (row["name"], row["images"], _percent(row["dense"]), _percent(row["pruned"]), _interval(row["pruned_ci"]), f"{row['pruned'] - row['dense']:+.2f}")
            for row in facts["classes"]
        ],
        flips_line=_flips_line(facts),
        reliability=figures.reliability(facts["calibration"]),
        calibration_rows=[
            (name, *(text.format(facts["calibration"][model][key]) for model in ("dense", "pruned")))
            for name, key, text in (
                ("expected calibration error", "ece", "{:.2f} %"), ("Brier score of the likeliest class", "brier", "{:.4f}"),
                ("negative log-likelihood", "nll", "{:.4f} nats"),
            )
        ],
        robustness=figures.pairs([{**robust["clean"], "name": "clean"}, *robust["kinds"]] if robust["kinds"] else []),
        robustness_rows=[
            (name, _percent(row["dense"]), _percent(row["pruned"]), f"{row['drop']:.2f}", _interval(row["drop_ci"], "{:.2f}"))
            for name, row in ([("clean", robust["clean"]), *((k["name"], k) for k in robust["kinds"]), ("all corruptions", robust["all"])] if robust["kinds"] else [])
        ],
        robustness_line=_robustness_line(robust),
        domains=figures.pairs(manifest.get("domains", ())),
        domain_rows=[
            (
                row["name"] + " (held out)" * row["held_out"], row["images"], _percent(row["dense"]), _interval(row["dense_ci"]),
                _percent(row["pruned"]), _interval(row["pruned_ci"]),
            )
            for row in manifest.get("domains", ())
        ],
        geometry=figures.geometry(facts["geometry"]["blocks"]),
        geometry_label=f"How far the features after each block turn away from the dense model's, and how their norm changes; token by token, {facts['geometry']['images']} images.",
        geometry_rows=[(i, f"{b['degrees']:.2f}", f"{b['norm']:.4f}") for i, b in enumerate(facts["geometry"]["blocks"])],
        stages=figures.stages(manifest["stages"]),
        stage_rows=[(s["name"], f"{s['seconds']:.1f}", "done before" if s["cached"] else "") for s in manifest["stages"]],
        command=command(manifest),
        reproduce=_reproduce(manifest),
    )  # fmt: skip


def dense_point(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The dense model that an artifact was made from, as a point between latency (ms, may be None) and accuracy (%)."""
    dense = manifest["dense"]
    return {"name": manifest["architecture"], "ms": dense["latency_ms"]["p50"], "accuracy": dense["accuracy"]}


def comparison_page(artifacts: Sequence[tuple[Path, Mapping[str, Any]]]) -> str:
    """The page of several artifacts (folder, manifest): one front, the dense models as baselines, one table."""
    manifests = [manifest for _, manifest in artifacts]
    points = [
        {
            "name": folder.name, "ms": m["pruned"]["latency_ms"]["p50"], "ci": m["pruned"]["latency_ci_ms"],
            "accuracy": m["pruned"]["accuracy"], "verdict": report.word(m["checks"]),
        }
        for folder, m in artifacts
    ]  # fmt: skip
    dense = {
        (m["architecture"], m["model"], m["dense"]["latency_ms"]["p50"]): {
            **dense_point(m),
            "name": f"{m['model']} ({m['architecture']})",
        }
        for m in manifests
    }
    head, *rows = report.comparison_rows(manifests)
    found = changes.between(manifests[0], manifests[1]) if len(manifests) == 2 else []
    sections = [("pareto", "Accuracy and latency"), ("artifacts", "Artifacts")]
    sections += [("changes", "Changes")] * bool(found) + [("verdicts", "Gates")]
    return _render(
        "comparison.html",
        title=f"{len(artifacts)} artifacts",
        sections=sections,
        pareto=figures.pareto(points, list(dense.values()), None),
        notes=changes.comparable(manifests),
        headings=head,
        rows=rows,
        changes=[change.row for change in found],
        gated=[(folder.name, m["checks"]) for folder, m in artifacts],
    )


def command(manifest: Mapping[str, Any]) -> str:
    """The build command, as far as the manifest knows it: not where the data lay, nor a card's own file."""
    asked = manifest["request"]
    words = ["edgeprune", "build", manifest["model"], "--target", manifest["target"], "--latency", asked["latency"]]
    words += ["--quantile", asked["quantile"], "--seed", str(manifest["seed"]), "--threads", str(manifest["threads"])]
    words += ["--runtime", manifest["runtime"], "--precision", manifest["precision"]]
    if asked["max_drop"] is not None:
        words += ["--max-drop", f"{asked['max_drop']:g}"]
    words += _deployed(manifest) + ["--task", "features"] * ("features" in manifest)
    if len(asked["epochs"]) == 1:
        words += ["--epochs", f"{asked['epochs'][0]:g}"]
    if asked["search_seconds"] is not None:
        words += ["--search-seconds", f"{asked['search_seconds']:g}"]
    words += ["--polish", str(asked["polish"])] * bool(asked["polish"]) + ["--gradual"] * asked["gradual"]
    words += ["--method", manifest["method"], "--dims", ",".join(manifest["dims"]), "--reducer", manifest["reducer"]]
    known = {method.name: method for method in methods.METHODS}.get(manifest["method"])
    for kind in ("criterion", "allocator", "schedule", "recovery"):
        if getattr(known, kind, None) != manifest[kind]:
            words += [f"--{kind}", manifest[kind]]
    if "selection" in manifest:
        words += ["--selection", manifest["selection"]["name"], "--tune-on", f"{manifest['selection']['tune_on']:g}"]
    return shlex.join(words)


def _deployed(manifest: Mapping[str, Any]) -> list[str]:
    """The options that say what the files take and hold, where they are not the usual ones."""
    facts, size = manifest.get("input"), manifest.get("image_size")
    words = ["--image-size", size] if size else []
    if facts is not None:
        words += ["--batch", str(facts["batch"])] * (facts["batch"] != 1) + ["--dynamic-batch"] * facts["dynamic_batch"]
        if facts["preprocessing"] == "folded":
            words += ["--fold-preprocessing", f"{facts['shape'][1]}x{facts['shape'][2]}"]
    return words + ["--ir-precision", "fp16"] * (manifest.get("weights") == "fp16")


def _render(template: str, **values: Any) -> str:
    """The template, with plotly inside; everything that is not markup of ours is escaped."""
    extras.need("the HTML report", extras.REPORT, "pip install 'edgeprune[report]'")
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("edgeprune.report"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    # Within a script element, only "<" could end it.
    environment.filters["embedded"] = lambda text: Markup(text.replace("<", "\\u003c"))
    packed = base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()  # 1.9 MB instead of 4.8
    return environment.get_template(template).render(version=__version__, plotly=packed, **values)


def _percent(value: float) -> str:
    return f"{value:.2f} %"


def _interval(ends: Sequence[float] | None, text: str = "{:.2f}") -> str:
    return NO_COUNT if ends is None else f"{text.format(ends[0])} to {text.format(ends[1])}"


def _ms_interval(ends: Sequence[float] | None) -> str:
    return NO_COUNT if ends is None else f"{report.ms(ends[0])} to {report.ms(ends[1])}"


def _headline(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    pruned, accuracy = manifest["pruned"], manifest["accuracy"]
    p50 = pruned["latency_ms"]["p50"]
    return [
        ("latency p50", report.ms(p50) if p50 is not None else f"predicted {pruned['predicted_ms']:.2f} ms"),
        ("limit", report.ms(manifest["request"]["latency_ms"])),
        ("speed-up", f"{1 / pruned['ratio']:.2f} x"),
        (report.accuracy(manifest), _percent(accuracy["pruned"])),
        ("drop", f"{accuracy['dense'] - accuracy['pruned']:.2f} points"),
    ]


def _compare(manifest: Mapping[str, Any], facts: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Dense, pruned and the change, one row a fact."""
    dense, pruned, accuracy = manifest["dense"], manifest["pruned"], manifest["accuracy"]
    images = accuracy["images"]

    def judged(share: float) -> str:
        return f"{share:.2f} % ({_interval(wilson(round(share * images / 100), images))})"

    rows: list[tuple[str, ...]]

    def less(a: float | None, b: float | None) -> str:
        return NO_COUNT if a is None or b is None or a <= 0 else f"{100 * (b / a - 1):+.1f} %"

    rows = [
        (f"{report.accuracy(manifest)} (95 % interval)", judged(accuracy["dense"]), judged(accuracy["pruned"]),
         f"{accuracy['pruned'] - accuracy['dense']:+.2f} points ({_interval([0.0 - end for end in reversed(accuracy['drop_ci'])], '{:+.2f}')})"),
        ("agreement of both", "", f"{accuracy['agreement']:.2f} %", ""),
    ]  # fmt: skip
    if embedded := manifest.get("features"):
        cosine = embedded["cosine"]
        rows += [
            ("cosine to the dense embeddings", "1.0000", f"{cosine['mean']:.4f} on average, 1 % of the images below {cosine['p1']:.4f}", ""),
            ("k-NN accuracy among the dense model's embeddings", _percent(accuracy["dense"]), _percent(embedded["in_dense_index"]), ""),
        ]  # fmt: skip
    for quantile in ("p50", "p90", "p99"):
        a, b = dense["latency_ms"].get(quantile), pruned["latency_ms"][quantile]
        more = f" ({_ms_interval(pruned['latency_ci_ms'])})" if quantile == "p50" and pruned["latency_ci_ms"] else ""
        rows.append((f"latency {quantile}", report.ms(a), report.ms(b) + more, less(a, b)))
    for name, key, unit, digits in (
        ("parameters", "params", 1e6, "{:.2f} M"),
        ("multiply-adds", "macs", 1e9, "{:.3f} G"),
    ):
        rows.append(
            (name, digits.format(dense[key] / unit), digits.format(pruned[key] / unit), less(dense[key], pruned[key]))
        )
    size = facts["bytes"]
    rows.append(
        ("model files", _megabytes(size["dense"]), _megabytes(size["pruned"]), less(size["dense"], size["pruned"]))
    )
    used = facts["resources"]
    if used:
        a, b = used["dense"]["peak_bytes"], used["pruned"]["peak_bytes"]
        rows.append(("peak memory", _megabytes(a), _megabytes(b), less(a, b)))
        a, b = used["dense"]["joules"], used["pruned"]["joules"]
        rows.append(
            ("energy per image", *(NO_COUNT if j is None else f"{1000 * j:.1f} mJ" for j in (a, b)), less(a, b))
        )
    return rows


def _compare_notes(manifest: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    used = facts["resources"]
    notes = [
        f"{manifest['runtime']} {manifest['worker']['version']}, {manifest['precision']}, {manifest['threads']} threads, {report.served(manifest)}, on "
        f"{manifest['device']['cpu']}; {report.interval(dict(manifest['pruned']))}. Accuracy: "
        f"{manifest['accuracy']['images']} images of {manifest['data']['source']}. A dash: too few samples, or not shown by this system."
    ]  # fmt: skip
    if not used:
        notes.append("No memory and no energy: the profile is of another device.")
        return notes
    if (bare := used["pruned"]["runtime_bytes"]) is not None:
        notes.append(
            f"Peak memory is that of a process which runs the model alone; {_megabytes(bare)} of it without any model."
        )
    if used["pruned"]["joules"] is None:
        notes.append(
            "No energy: this system lets this user read no RAPL counter (/sys/class/powercap/intel-rapl:*/energy_uj)."
        )
    else:
        notes.append(
            f"Energy: RAPL's CPU packages over {used['pruned']['joules_images']} images, idle power and other work included."
        )
    return notes


def _megabytes(count: int | None) -> str:
    return NO_COUNT if count is None else f"{count / 1e6:.1f} MB"


def _family_row(point: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    return (
        point["name"],
        report.ms(point["ms"]),
        _ms_interval(point["ci"]),
        _percent(point["accuracy"]),
        point["verdict"],
    )


def _plan_figures(plan: Mapping[str, Any], profile: Mapping[str, Any]) -> list[tuple[str, str]]:
    blocks, (heads, neurons) = plan["blocks"], zip(*dense_shape(profile), strict=True)
    found = [
        (figures.heads([block["heads"] for block in blocks], heads), "Heads: filled ones are kept."),
        (figures.kept_bars("neurons", [len(block["neurons"]) for block in blocks], neurons), "MLP neurons kept per block."),
    ]  # fmt: skip
    if passing := patches(plan, profile):
        most = profile["table"]["patches"][-1]
        found.append((figures.kept_bars("patches", passing, [most] * len(blocks)), "Patches that each block leaves."))
    return found


def dense_shape(profile: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Heads and neurons of every block of the dense model."""
    stages = profile["table"]["stages"]
    return [(len(own["attn_ms"]) - 1, own["mlp_widths"][-1]) for own in stages for _ in range(own["blocks"])]


def patches(plan: Mapping[str, Any], profile: Mapping[str, Any]) -> list[int]:
    """How many patch tokens each block leaves; empty where every block leaves all. One that names none has what came in."""
    if not any("patches" in block for block in plan["blocks"]):
        return []
    now, seen = int(profile["table"]["patches"][-1]), []
    for block in plan["blocks"]:
        now = int(block.get("patches", now))
        seen.append(now)
    return seen


def _plan_rows(
    manifest: Mapping[str, Any], plan: Mapping[str, Any], profile: Mapping[str, Any]
) -> list[tuple[Any, ...]]:
    passing = patches(plan, profile)
    return [
        (
            i, f"{len(block['heads'])} of {heads}" + (f" of rank {block['rank']}" if "rank" in block else ""), f"{len(block['neurons'])} of {neurons}",
            f"{passing[i]} of {profile['table']['patches'][-1]}" if passing else "all",
            manifest["precision"] + "".join(f", {kind} int8" for kind in block.get("int8", ())),
        )
        for i, (block, (heads, neurons)) in enumerate(zip(plan["blocks"], dense_shape(profile), strict=True))
    ]  # fmt: skip


def _device(manifest: Mapping[str, Any], profile: Mapping[str, Any]) -> str:
    device, table = profile["device"], profile["table"]
    cpus = f", {device['cpus']} CPUs" if "cpus" in device else ""  # a recorded profile need not say everything
    system = " ".join(str(device[key]) for key in ("system", "machine") if key in device)
    how = profile["anchor"].get("how", "as it was recorded")
    return (
        f"{device['cpu']}{cpus}{f', {system}' if system else ''}; target {profile['target']['name']}; "
        f"{table['runtime']}, {table['precision']}, {table['threads']} threads. Dense {table['dense_ms']:.2f} ms: "
        f"{how}. Table of {table['samples']} rounds per entry."
    )


def _predicted(family: Sequence[Mapping[str, Any]], profile: Mapping[str, Any]) -> dict[str, Any]:
    points = [(p["name"], p["predicted_ms"], p["ms"], p["ci"]) for p in family if p["ms"] is not None]
    held_out = profile.get("check", {}).get("plans", ())
    points += [(f"held-out plan {i}", p["predicted_ms"], p["measured_ms"], p["ci_ms"]) for i, p in enumerate(held_out)]
    fit = profile["table"]["fit"]
    label = "The latency table's prediction against what was measured of the finished artifact, with its 95 % interval."
    if fit:
        label += f" The table's own median error on {fit['plans']} plans of mixed shapes: {fit['median_error']:.1%}."
    rows = [
        (name, report.ms(a), report.ms(b), _ms_interval(ci), f"{100 * (b / a - 1):+.1f} %") for name, a, b, ci in points
    ]
    return {"predicted": figures.predicted(points), "predicted_rows": rows, "predicted_label": label}


def _flips_line(facts: Mapping[str, Any]) -> str:
    found = facts["flips"]
    return (
        f"Of {facts['images']} images, {found['lost']} were lost and {found['gained']} gained; on {found['otherwise_wrong']} more the two "
        "models are wrong in different ways. Shown are those of which the dense model was surest."
    )


def _robustness_line(robust: Mapping[str, Any]) -> str:
    if not robust["kinds"]:
        return f"Not measured: {robust['left_out']}."
    return (
        f"In the manner of ImageNet-C, generated: {len(robust['kinds'])} kinds at severity {robust['severity']} of 5, {robust['images']} images "
        "each, the same for both models."
    )


def _reproduce(manifest: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    environment = manifest["environment"]
    flat = [
        ("key of the build", manifest["key"]), ("edgeprune", environment["edgeprune"]), ("its code", environment["code"]),
        ("python", environment["python"]), ("system", environment["system"]), ("seed", str(manifest["seed"])),
        ("data", manifest["data"]["source"]), ("method", report.method(dict(manifest))),
        ("SBOM", manifest["provenance"]["sbom"]), ("provenance", manifest["provenance"]["statement"]),
    ]  # fmt: skip
    files = [(name, f"{facts['bytes']:,} bytes, sha256 {facts['sha256']}") for name, facts in manifest["files"].items()]
    return [
        ("Facts", flat),
        ("Versions", [(name, found or "not installed") for name, found in environment["versions"].items()]),
        ("Device", [(name, str(value)) for name, value in environment["device"].items()]),
        ("Files", files),
    ]
