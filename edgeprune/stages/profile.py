"""Profile: what every sub-block shape costs on this device, in the runtime that will run.

Models of each shape, see `candidates`, are timed turn by turn with the dense model. Writes `profile.json` and `samples.npz`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgeprune import artifact, runtimes, vit
from edgeprune.config import Request
from edgeprune.console import Console
from edgeprune.errors import TargetUnavailable, UsageError, unknown
from edgeprune.latency import choose, device, devices, memory, table
from edgeprune.latency.clock import COPIES, Clock
from edgeprune.latency.machine import Machine, here
from edgeprune.latency.statistics import FEWEST_CALM, QUANTILES, fit_slope, half_width, judged, quiet_ms, undisturbed
from edgeprune.stages import baseline, candidates
from edgeprune.types import Form, LatencyTable, Measurement, Quiet, to_json

TABLE_SECONDS = 60.0
TABLE_PATIENCE = 1.6  # how much longer where too few rounds are as quiet as the quietest
MIN_ROUNDS = 60
FEWEST = 20  # rounds, whatever they take: with nine, prices of a BEiT-B had intervals of up to ± 40 % on a busy machine
TABLE_BYTES = 6 << 30
SCHEMA = "edgeprune.profile/1"

#: Measurements by name that were timed in the same rounds, the anchor among them.
Group = dict[str, Measurement]


def run(request: Request, read: Mapping[str, Path], out: Path, console: Console) -> None:
    dense = baseline.load(request, read["baseline"])
    if request.profile is not None:
        adopt(request, dense.sizes, request.profile, out, console)
        return
    anchor = read["baseline"] / "dense.onnx"
    machine = devices.machine(request.device)
    threads, why = machine.usable_threads(request.threads or request.target.threads)
    console.say(f"threads: {threads} ({why})")
    runtime, times = choose.fastest(
        request.conditions, dict.fromkeys(choose.eligible(request.conditions, console), anchor), threads
    )
    console.say(f"runtime: {runtime}, {choose.why(request.conditions, runtime, times)}")
    grids = vit.grids(dense.sizes, request.target.neuron_step)
    for i, (grid, stage) in enumerate(zip(grids, dense.sizes.stages, strict=True)):
        console.say(f"grid{'' if len(grids) == 1 else f' of stage {i}'}: 0 to {stage.heads} heads, {len(grid)} MLP widths"
                    f"{grid_words(dense.sizes, grid, request.target.neuron_step)}")  # fmt: skip
    made = candidates.make(request, dense.model, grids, out, console)
    with choose.clock(request.conditions, runtime, threads, console) as clock:
        asked = {key: value for key, value in clock.info.items() if key != "pid"}
        at = {"at": machine.url} if machine.url else {}
        of = memory.key(anchor, machine.fingerprint, {**asked, **machine.conditions, **at})
        known = memory.recall(out.parent, of)
        room = table_room(machine.memory) if request.table_bytes is None else request.table_bytes
        groups = measure(clock, anchor, grouped(made.files, room), known, console)
        worker = {"info": clock.info, "dense": clock.facts["dense"]}
    for path in made.files.values():
        path.unlink()
    groups, quiet, how = settle(groups, known, request.seed, console)
    dense_ms = quiet.ms
    firsts = [next(iter(group.values())) for group in groups]
    measured = {name: measurement for group in groups for name, measurement in group.items()}
    if all(first.calm for first in firsts):
        memory.remember(out.parent, of, dense_ms)
    anchor_samples = np.concatenate([first.anchor_ms for first in firsts])
    built = made.tabulated(measured, dense_ms=dense_ms, runtime=runtime, precision=request.precision, threads=threads)
    tell(built, measured, worker, request, dense.sizes, console)
    console.say(f"the dense model's {dense_ms:.2f} ms are {how}")
    document = {
        "schema": SCHEMA,
        "device": machine.fingerprint,
        "conditions": machine.conditions,
        "target": request.target,
        "runtime": runtime,
        "anchor_ms": {name: dense_ms * ratio for name, ratio in times.items()},
        "anchor": {
            **{
                name: dense_ms * float(np.quantile(anchor_samples, q) / np.median(anchor_samples))
                for name, q in QUANTILES.items()
            },
            "samples": len(anchor_samples),
            "how": how,
            "slope": quiet.slope,
        },
        "model": describe(request, dense.sizes),
        "worker": worker,
        "reducer": request.reducer if built.patches else "",
        "depth": made.depth,  # blocks of the models in `ratios` that are of a few
        "table": table.table_to_json(built),
        "ratios": {name: {"ratio": m.ratio, "ci": m.ratio_ci} for name, m in measured.items()},
    }
    (out / "profile.json").write_text(json.dumps(to_json(document), indent=1))
    samples: dict[str, Any] = {}  # [2, rounds]: of the model, and of the dense one beside it
    for name, m in measured.items():
        samples |= {name: m.raw_ms, f"{name}.waited": m.waited_ms}
    np.savez_compressed(out / "samples.npz", **samples)


def grid_words(sizes: vit.Anatomy, grid: tuple[int, ...], step: int) -> str:
    """Of which steps a grid of MLP widths is, or why it has none."""
    if sizes.whole_mlp:
        return f": {vit.WHOLE_MLPS}"
    most = vit.MAX_WIDTHS if len(sizes.stages) == 1 else vit.MAX_STAGE_WIDTHS
    return f" in steps of {grid[1]} neurons (SIMD step {step}, at most {most} widths)"


def describe(request: Request, sizes: vit.Anatomy) -> dict[str, Any]:
    """What of the model a latency table depends on."""
    stages = [
        {name: value for name, value in asdict(stage).items() if name != "window" or value} for stage in sizes.stages
    ]
    return {
        "architecture": request.card.architecture, "batch": request.card.deploy.batch, "classes": sizes.num_classes,
        **(stages[0] if len(stages) == 1 else {"stages": stages}),
        **({"dynamic_batch": True} if request.card.deploy.dynamic_batch else {}),
        **({"folded": request.card.deploy.fold_preprocessing} if request.card.deploy.fold_preprocessing else {}),
        **({"attention": "positional"} if sizes.positional else {}),
        **({"mlp": "whole"} if sizes.whole_mlp else {}),
        **({"gated": True} if sizes.gated else {}),
    }  # fmt: skip


def adopt(request: Request, sizes: vit.Anatomy, path: Path, out: Path, console: Console) -> None:
    """Take the recorded profile in `path` instead of measuring; UsageError when it is of something else."""
    document = artifact.read_json(path)
    if document.get("schema") != SCHEMA:
        raise UsageError(
            f"{path} is not a profile of schema {SCHEMA}; write one with `edgeprune profile --export FILE`"
        )
    try:
        recorded = table.table_from_json(document["table"])
        found = {
            "target": document["target"]["name"], "precision": recorded.precision,
            **{f"model's {key}": value for key, value in document["model"].items() if key != "architecture"},
        }  # fmt: skip
        cpu = str(document["device"]["cpu"])
        float(document["anchor"]["slope"])
        if not isinstance(document["anchor"]["samples"], int) or document["anchor"]["samples"] < 0:
            raise ValueError("the anchor's samples are no number of them")
        positive = [document["anchor"][name] for name in QUANTILES] + list(document["anchor_ms"].values())
        if not all(isinstance(ms, (int, float)) and 0 < ms < float("inf") for ms in positive):
            raise ValueError("a latency of the anchor is no positive number")
        str(document["worker"]["info"]["version"])
        here().same(document)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise UsageError(
            f"{path}: the profile is damaged ({type(error).__name__}: {error}); record it again"
        ) from error
    if recorded.runtime not in runtimes.names():
        raise unknown(f"runtime in {path}:", recorded.runtime, runtimes.names())
    if reason := runtimes.get(recorded.runtime).available():
        raise TargetUnavailable(reason)
    wanted = {
        "target": request.target.name, "precision": request.precision,
        **{f"model's {key}": value for key, value in describe(request, sizes).items() if key != "architecture"},
    }  # fmt: skip
    wrong = [
        f"{key} is {found.get(key)}, not {wanted.get(key)}"
        for key in dict.fromkeys([*wanted, *found])
        if found.get(key) != wanted.get(key)
    ]
    if request.runtime not in ("", recorded.runtime):
        wrong.append(f"runtime is {recorded.runtime}, not {request.runtime}")
    if request.threads not in (0, recorded.threads):
        wrong.append(f"threads are {recorded.threads}, not {request.threads}")
    if recorded.dense != sizes.shape:
        parts = ", then ".join(f"{s.blocks} blocks with {s.heads} heads and {s.neurons} neurons" for s in sizes.stages)
        wrong.append(f"table is not of {parts}")
    if "tokens" in request.dims and recorded.patches and document.get("reducer") != request.reducer:
        wrong.append(f"tokens were dropped by the reducer '{document.get('reducer')}', not '{request.reducer}'")
    if wrong:
        raise UsageError(f"{path} was recorded for something else: its {'; its '.join(wrong)}")
    if recorded.runtime not in document["anchor_ms"]:
        raise UsageError(f"{path}: the profile is damaged: it has no anchor_ms of {recorded.runtime}; record it again")
    console.say(
        f"profile recorded on {cpu}, {recorded.runtime}, {recorded.threads} threads: dense {recorded.dense_ms:.2f} ms"
    )
    if "precision" in request.dims and not recorded.int8:
        console.warn(
            "it was recorded without int8, so the plan has none; record it again with --dims that have precision"
        )
    if "qk" in vit.choosable(request.dims, sizes) and not recorded.ranked:
        console.warn(
            "it was recorded without ranks of heads, so the plan lowers none; record it again with --dims that have qk"
        )
    if "tokens" in request.dims and not recorded.patches:
        console.warn(
            "it was recorded without tokens, so the plan drops none; record it again with --dims that have them"
        )
    if not devices.machine(request.device).same(document):
        console.warn(
            "that is another device: the latency of what is built is predicted, not validated; run `edgeprune validate` there"
        )
    (out / "profile.json").write_text(json.dumps(document, indent=1))


def refuse_recorded(document: Mapping[str, Any], what: str, machine: Machine) -> None:
    """Raise UsageError when the profile is another device's."""
    if not machine.same(document):
        raise UsageError(
            f"the profile is of {document['device'].get('cpu', 'another device')}: this machine cannot {what} for it"
        )


def table_room(free: int | None) -> float:
    """Bytes that the models of a table may take at once: half of what is free, None = unknown, and no more than
    `TABLE_BYTES`: more at once saves few measurements of the anchor.
    """
    return TABLE_BYTES if free is None else min(free / 2, TABLE_BYTES)


def grouped(models: Mapping[str, Path], room: float) -> list[dict[str, Path]]:
    """The models in groups that fit into `room` bytes once they are loaded; one alone may take more."""
    groups: list[dict[str, Path]] = []
    left = 0.0
    for name, path in models.items():
        takes = device.LOADED * path.stat().st_size
        if not groups or takes > left:
            groups.append({})
            left = room
        groups[-1][name] = path
        left -= takes
    return groups


def measure(
    clock: Clock, anchor: Path, groups: Sequence[Mapping[str, Path]], known: memory.Remembered | None, console: Console
) -> list[Group]:
    """Time all shape models turn by turn with the dense model, longer where the device is slower than it was known.

    A group is loaded at a time, and gets its share of the time. The dense model is in all of them.
    """
    clock.load("dense", anchor, COPIES, values=False)
    total, found = sum(map(len, groups)), []
    if len(groups) > 1:
        console.say(
            f"the table's {total} models are measured in {len(groups)} groups: more do not fit into memory at once"
        )
    with choose.watched(clock, console):
        for group in groups:
            for name, path in group.items():
                clock.load(name, path, values=False)
            seconds = TABLE_SECONDS * len(group) / total
            with console.timing("latency table", seconds) as on_round:
                found.append(clock.measure(
                    list(group), "dense", ci=0.007, min_rounds=MIN_ROUNDS, budget_s=seconds,
                    quiet=Quiet(known.ms) if known else None, settle=True, patience=TABLE_PATIENCE, fewest=FEWEST,
                    on_round=on_round,
                ))  # fmt: skip
            for name in group:
                clock.unload(name)
    return found


def settle(
    groups: Sequence[Group], known: memory.Remembered | None, seed: int, console: Console
) -> tuple[list[Group], Quiet, str]:
    """The anchor's quiet latency, how it was found, and the measurements as they are at that."""
    firsts = [next(iter(group.values())) for group in groups]
    raw, waited = (np.concatenate([getattr(m, which)[1] for m in firsts]) for which in ("raw_ms", "waited_ms"))
    good = undisturbed(raw, waited)
    if good.sum() < FEWEST_CALM:  # at_quiet tells of it, and nothing measured here will be called quiet
        good[:] = True
    own_ms, how = quiet_ms(raw[good])
    if known is not None and known.ms < own_ms:
        again = at_quiet(groups, known.ms, seed)
        if all(measurement.calm for group in again[0] for measurement in group.values()):
            return *again, f"what this device has reached on {known.when}; this time {own_ms:.3f} ms"
        console.warn(
            f"this device is {own_ms / known.ms - 1:.0%} slower than it was on {known.when} (dense {known.ms:.2f} ms), all the time: "
            f"these latencies are of a slow machine; profile again with --rebuild when it is quiet"
        )
    settled, quiet = at_quiet(groups, own_ms, seed)
    every = [measurement for group in settled for measurement in group.values()]
    if restless := [measurement for measurement in every if not measurement.calm]:
        console.warn(
            f"this machine is busy: for {len(restless)} of {len(every)} models hardly a round was undisturbed, so their calmest "
            "count, and the table is less exact than it says; profile again with --rebuild when the machine is quiet"
        )
    return settled, quiet, how


def at_quiet(groups: Sequence[Group], dense_ms: float, seed: int) -> tuple[list[Group], Quiet]:
    """The same measurements, counting only rounds as calm as the anchor at `dense_ms`."""
    quiet = Quiet(dense_ms, fit_slope([m for group in groups for m in group.values()], dense_ms))

    def again(m: Measurement) -> Measurement:
        return judged(m.name, m.raw_ms, m.waited_ms, m.level_ms, seed=seed, quiet=quiet)

    return [{name: again(m) for name, m in group.items()} for group in groups], quiet


def tell(
    built: LatencyTable, measured: Mapping[str, Measurement], worker: Mapping[str, Any], request: Request,
    sizes: vit.Anatomy, console: Console,
) -> None:  # fmt: skip
    """Print what the table says, what was repaired in it, and what it does not prove."""
    for repaired in built.repaired:
        console.detail(f"made monotone: {repaired}")
    each = [
        f"a head costs {own.attn_ms[-1] / stage.heads * 1e3:.0f} µs, 8 neurons {own.mlp_ms[-1] / stage.neurons * 8e3:.1f} µs"
        + (f" in stage {i}" if len(sizes.stages) > 1 else "")
        for i, (own, stage) in enumerate(zip(built.stages, sizes.stages, strict=True))
    ]
    console.say(
        f"dense {built.dense_ms:.2f} ms: {', '.join(each)}, what always stays {built.base_ms:.2f} ms "
        f"({built.samples} rounds, widest interval ± {max(map(half_width, measured.values())):.1%})"
    )
    if len(built.patches) > 1:
        half = min(range(len(built.patches)), key=lambda i: abs(built.patches[i] - built.patches[-1] / 2))
        console.say(
            f"with {built.patches[half]} of {built.patches[-1]} patches, attention costs {built.attn_share[half]:.0%} and the MLP "
            f"{built.mlp_share[half]:.0%} of that; dropping the others {built.reduce_ms * 1e3:.0f} µs, once"
        )
    for i, own in enumerate(built.stages):
        where = f" in stage {i}" if len(built.stages) > 1 else ""
        if built.int8:
            shares = [built.form_share(kind, Form(int8=True), i) for kind in vit.KINDS]
            console.say(f"with int8 layers, attention costs {shares[0]:.0%} and the MLP {shares[1]:.0%} of that{where}"
                        + ("" if min(shares) < 1 else ": int8 does not pay here"))  # fmt: skip
        if own.ranks:
            lower = [f"{built.form_share('attn', Form(rank=r), i):.0%} with {r}" for r in own.ranks]
            dims = sizes.stages[i].head_dim
            console.say(f"heads of fewer dimensions than {dims} make attention cost {', '.join(lower)}{where}")
    if uncapped := worker["dense"].get("uncapped"):
        kernels = ", ".join(f"{count} {kernel}" for kernel, count in uncapped.items())
        console.warn(
            f"this CPU has wider instructions than {request.target.max_isa}; {built.runtime} is held to it but for "
            f"{kernels}, so a true {request.target.name} device may be slower: run `edgeprune validate` there"
        )


def read_profile(folder: Path) -> tuple[dict[str, Any], LatencyTable]:
    """The profile document and its table."""
    document = artifact.read_json(folder / "profile.json")
    return document, table.table_from_json(document["table"])
