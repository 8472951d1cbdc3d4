"""int8 by edgeprune, by NNCF and by ONNX Runtime's dynamic quantisation: accuracy and measured latency of the dense model.

    python benchmarks/int8.py --model cifar10 --data-dir DIR     (NNCF: pip install nncf)
    python benchmarks/int8.py --model digits

All start from the same simplified ONNX and the same calibration images (NNCF from the first 300), and are timed turn by turn with it in the
product's clock. edgeprune's model has every linear layer of every block in int8, which its plans choose sub-block by
sub-block. -> results/int8-MODEL.md
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import accuracy
import numpy as np
import torch

from edgeprune import checks, pipeline, quantisation, structure, vit
from edgeprune.config import Request
from edgeprune.console import Console
from edgeprune.latency import choose, device
from edgeprune.latency.clock import COPIES
from edgeprune.stages import baseline, export, simplify
from edgeprune.types import INT8

NNCF_IMAGES = 300  # what its documentation advises
SECONDS = 60.0


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    accuracy.shared(parser, model="digits", target="cpu-avx512-vnni", threads=0, runtime="")
    parser.add_argument("--out", type=Path, default=accuracy.HERE / "results")
    options = parser.parse_args(argv)
    with accuracy.full(options) as request, tempfile.TemporaryDirectory(prefix="edgeprune-") as folder:
        done = pipeline.run_stages(pipeline.PIPELINE[:1], request, options.cache_dir, console=Console())
        dense, anchor = baseline.load(request, done["baseline"].folder), done["baseline"].folder / "dense.onnx"
        files: dict[str, dict[str, Path]] = {name: {} for name in choose.eligible(request.conditions, Console())}
        for name, (runtimes, make) in WAYS.items():
            path = Path(folder) / f"{name}.onnx"
            try:
                made = make(dense, anchor, path)
            except ImportError as error:
                print(f"{name} is left out: {error}")
                continue
            for runtime in set(runtimes) & set(files):
                files[runtime][name] = made
        threads, _ = device.usable_threads(options.threads)
        lines = [
            f"{request.card.name}, {device.cpu_model()}, {threads} thread{'s' if threads > 1 else ''}; top-1 with its 95 % interval; "
            "milliseconds relative to fp32 in the same runtime, turn by turn, with their 95 % interval.", "",
            "| int8 by | runtime | accuracy | latency | rounds |", "|---|---|---|---|---|",
        ]  # fmt: skip
        for runtime, paths in files.items():
            lines += judged(request, dense, anchor, paths, runtime, threads, options.images)
    text = "\n".join(lines) + "\n"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"int8-{request.card.name}.md").write_text(text)
    print(text)


def judged(
    request: Request,
    dense: baseline.Dense,
    anchor: Path,
    paths: dict[str, Path],
    runtime: str,
    threads: int,
    count: int,
) -> list[str]:
    """A row per model in this runtime."""
    images = accuracy.spaced(dense.splits.evaluation, count)
    pixels, labels = (torch.cat(part).numpy() for part in zip(*images.batches(accuracy.BATCH), strict=True))
    rows = []
    with choose.clock(request.conditions, runtime, threads) as clock:
        clock.load("fp32", anchor, COPIES)
        for name, path in paths.items():
            clock.load(name, path, COPIES)
        measured = clock.measure(list(paths), "fp32", ci=0.005, min_rounds=60, budget_s=SECONDS)
        for name in ("fp32", *paths):
            right = int((clock.predict(name, pixels).argmax(-1) == labels).sum())
            low, high = checks.wilson(right, len(labels))
            cells = [name, runtime, f"{100 * right / len(labels):.2f} % [{low:.2f}, {high:.2f}]"]
            if name == "fp32":
                cells += [f"1 ({float(np.median(measured[next(iter(paths))].anchor_ms)):.3f} ms)", ""]
            else:
                own = measured[name]
                cells += [
                    f"{own.ratio:.3f} [{own.ratio_ci[0]:.3f}, {own.ratio_ci[1]:.3f}]",
                    f"{len(own.samples_ms)}" + ("" if own.calm else ", busy machine"),
                ]
            rows.append(f"| {' | '.join(cells)} |")
            print(rows[-1], flush=True)
    return rows


def ours(dense: baseline.Dense, anchor: Path, out: Path) -> Path:
    """Every linear layer of every block, ranges from all calibration images, nothing tuned."""
    both = sum(INT8.values())
    plan = vit.plan_of_shape(tuple((*row, 0, both) for row in dense.sizes.shape))
    model = structure.of(dense.model, plan)
    quantisation.calibrate(model, (pixels for pixels, _ in dense.splits.calibration.batches(64)))
    exported = out.with_suffix(".exported")
    export.to_onnx(model, dense.sizes.image, exported)
    simplify.simplify(exported, out, model)
    return out


def nncf(dense: baseline.Dense, anchor: Path, out: Path) -> Path:
    """Its post-training quantisation as advised for transformers, of OpenVINO's own representation."""
    import nncf as library
    import openvino

    images = dense.splits.calibration.take(NNCF_IMAGES)
    samples = [pixels.numpy() for pixels, _ in images.batches(1)]
    quantised = library.quantize(
        openvino.Core().read_model(anchor), library.Dataset(samples),
        model_type=library.ModelType.TRANSFORMER, subset_size=len(samples),
    )  # fmt: skip
    path = out.with_suffix(".xml")
    openvino.save_model(quantised, path, compress_to_fp16=False)
    return path


def dynamic(dense: baseline.Dense, anchor: Path, out: Path) -> Path:
    """ONNX Runtime's own: weights in int8, ranges of inputs from every image anew."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(anchor, out, weight_type=QuantType.QInt8, per_channel=True)
    return out


#: By name: the runtimes that can run it, and what writes the model and says where.
WAYS: dict[str, tuple[tuple[str, ...], Callable[[baseline.Dense, Path, Path], Path]]] = {
    "edgeprune": (("onnxruntime", "openvino"), ours),
    "NNCF": (("openvino",), nncf),
    "dynamic": (("onnxruntime",), dynamic),
}


if __name__ == "__main__":
    main()
