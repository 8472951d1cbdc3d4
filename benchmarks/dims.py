"""What a plan may choose, on and off: widths, tokens, ranks of heads, int8, all together, and which tokens stay.

    python benchmarks/dims.py --model cifar10 --data-dir DIR --tune-steps 400
    python benchmarks/dims.py --quick                       a tiny model, one speed-up: it shows that all of it runs

Rows, contract and options are those of methods.py: what `edgeprune build --dims ...` makes, measured within its limit,
one-shot and after the same tuning. -> results/dims.md and plots
"""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import accuracy
import methods
import tables

from edgeprune import config
from edgeprune.errors import UsageError

#: By name, what of the request is changed.
VARIANTS: dict[str, dict[str, Any]] = {
    "widths": {"dims": config.WIDTHS},
    "widths, tokens": {"dims": (*config.WIDTHS, "tokens")},
    "widths, ranks": {"dims": (*config.WIDTHS, "qk")},
    "joint": {"dims": config.DIMS},
    "joint, evit": {"dims": config.DIMS, "reducer": "evit"},
    "joint, zero-tprune": {"dims": config.DIMS, "reducer": "zero-tprune"},
    "joint, tome": {"dims": config.DIMS, "reducer": "tome"},
    "widths, int8": {"dims": (*config.WIDTHS, "precision")},
    "all": {"dims": config.EVERY_DIM},
    "tokens alone": {"dims": ("tokens",)},
    "int8 alone": {"dims": ("precision",)},
    "no depth": {"dims": ("heads", "mlp", "tokens", "qk")},
    "no heads": {"dims": ("mlp", "depth", "tokens", "qk")},
    "no mlp": {"dims": ("heads", "depth", "tokens", "qk")},
}
QUICK = "widths;joint;all"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", help="names or patterns, separated by ; or , (default: all)")
    options = methods.arguments(parser, argv, "dims")
    with accuracy.quick(options) if options.quick else accuracy.full(options) as request:
        variants = chosen(options.variants or (QUICK if options.quick else "*"))
        every = {dim for own in variants.values() for dim in own["dims"]} | set(config.DIMS)
        request = replace(request, dims=tuple(dim for dim in config.EVERY_DIM if dim in every))  # what the table has
        methods.run(request, options, variants)
    tables.main(["--results", str(options.results), "--label", options.label, "--out", str(options.results.parent)])


def chosen(patterns: str) -> dict[str, dict[str, Any]]:
    """Variants by name or pattern. Raises UsageError for a pattern that matches nothing."""
    split = patterns.split(";" if ";" in patterns else ",")
    for pattern in split:
        if not fnmatch.filter(VARIANTS, pattern):
            raise UsageError(f"there is no variant '{pattern}'; known: {'; '.join(VARIANTS)}")
    return {name: own for name, own in VARIANTS.items() if any(fnmatch.fnmatch(name, pattern) for pattern in split)}


if __name__ == "__main__":
    main()
