"""python -m pytest tests/test_compat.py

Who may import whom, and what must not be loaded.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import edgeprune

PACKAGE = Path(edgeprune.__file__).parent

#: From the command line down; a module imports from its own row or from rows below it.
ROWS = (
    ("__main__",),
    ("cli",),
    ("fleet",),
    ("train",),
    ("api",),
    ("pipeline",),
    ("footprint", "stages", "publish"),
    ("schedules",),
    ("tuning",),
    ("allocators", "recoveries"),
    ("criteria", "saliency", "gates", "calibration", "recovery", "runtimes", "vit", "latency", "solve", "data", "images", "artifact", "report", "checks",
     "recheck", "regression", "inspection", "corruptions", "provenance", "ci", "obs", "search", "stitch", "polish", "adapters", "selections", "reducers", "cache", "numerics", "tasks", "neighbours", "adapting", "intake", "folding", "resampling", "weightfile", "quantisation", "lowrank", "structure", "products", "attention"),
    ("config",),
    ("anatomies",),
    ("compat", "console", "methods", "shelf"),
    ("types", "extras", "modules", "families", "sealed", "schema", "onnxfile", "archives"),
    ("errors",),
)  # fmt: skip
ROW = {name: i for i, row in enumerate(ROWS) for name in row}
MODULES = sorted(PACKAGE.rglob("*.py"))


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


class Imports(ast.NodeVisitor):
    """Every import of a file, those inside functions too; those for type checkers alone are left out."""

    def __init__(self) -> None:
        self.lazy: list[str] = []
        self.eager: list[str] = []
        self.depth = 0

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.unparse(node.test):
            self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    def visit_Import(self, node: ast.Import) -> None:
        self.found(*(alias.name for alias in node.names))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, "relative imports hide who imports whom"
        self.found(*(f"{node.module}.{alias.name}" for alias in node.names))

    def found(self, *names: str) -> None:
        (self.lazy if self.depth else self.eager).extend(names)


def imports(path: Path) -> Imports:
    visitor = Imports()
    visitor.visit(ast.parse(path.read_text(encoding="utf-8")))
    return visitor


def area(path: Path) -> str:
    """`edgeprune/stages/prune.py` -> `stages`; `edgeprune/vit.py` -> `vit`."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def own(names: list[str]) -> set[str]:
    """The areas of edgeprune among imported names; names of the package itself (`__version__`) are none."""
    parts = {name.split(".")[1] for name in names if name.startswith("edgeprune.")}
    return {p for p in parts if (PACKAGE / p).is_dir() or (PACKAGE / f"{p}.py").is_file()}


def test_every_module_has_a_row() -> None:
    assert {area(path) for path in MODULES} - {"__init__"} <= set(ROW)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    here = area(path)
    if here == "__init__":
        assert not own(imports(path).eager)
        return
    found = imports(path)
    upward = {name for name in own(found.eager + found.lazy) if ROW[name] < ROW[here]}
    assert not upward, f"{here} imports {', '.join(sorted(upward))} from above itself"


def test_the_check_sees_imports_inside_functions() -> None:
    found = imports(PACKAGE / "cli.py")
    assert "api" in own(found.lazy) and "api" not in own(found.eager)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_compat_imports_timm_and_torchvision(path: Path) -> None:
    found = imports(path)
    outside = {name.split(".")[0] for name in found.eager + found.lazy}
    if path.name == "compat.py":
        assert {"timm", "torchvision"} <= outside
    else:
        assert not outside & {"timm", "torchvision"}


@pytest.mark.parametrize(
    "name",
    [
        "types",
        "errors",
        "extras",
        "solve",
        "config",
        "artifact",
        "console",
        "api",
        "checks",
        "images",
        "intake",
        "neighbours",
        "resampling",
    ],
)
def test_what_a_device_needs_imports_no_torch(name: str) -> None:
    found = imports(PACKAGE / f"{name}.py")
    assert not {n.split(".")[0] for n in found.eager} & {"torch", "timm", "onnx", "onnxruntime", "openvino"}


def test_importing_edgeprune_loads_nothing_heavy() -> None:
    heavy = "('torch', 'onnx', 'numpy', 'timm', 'onnxruntime', 'openvino', 'sklearn')"
    result = run(f"import sys, edgeprune, edgeprune.cli; sys.exit(str([m for m in {heavy} if m in sys.modules] or ''))")
    assert result.stderr.strip() == ""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0), (["--version"], 0), (["build", "--help"], 0), (["validate", "--help"], 0),
        (["targets"], 0), (["targets", "show", "cpu-avx2"], 0), (["models"], 0), (["methods"], 0),
        (["validate", "/nowhere"], 2), (["report", "/nowhere"], 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)  # fmt: skip
def test_commands_of_an_edge_device_load_no_torch(arguments: list[str], code: int) -> None:
    """In one process: run the command, then look at what was loaded."""
    program = (
        "import sys, edgeprune.cli as c\n"
        f"sys.argv = ['edgeprune', *{arguments!r}]\n"
        "try: c.main()\n"
        "except SystemExit as stop: code = stop.code\n"
        "print('LOADED', code or 0, [m for m in ('torch', 'timm') if m in sys.modules])\n"
    )
    result = run(program)
    assert result.stdout.splitlines()[-1] == f"LOADED {code} []", result.stderr


def test_help_loads_no_numpy_either() -> None:
    result = run(
        "import sys, edgeprune.cli as c\nsys.argv = ['edgeprune', '--help']\n"
        "try: c.main()\nexcept SystemExit: pass\n"
        "sys.exit('numpy' in sys.modules or 'onnx' in sys.modules)"
    )
    assert result.returncode == 0


def test_timm_imports_beside_whatever_torchvision_there_is() -> None:
    """In a fresh process, with warnings as errors of ours; a second healing finds nothing to do."""
    result = run(
        "import importlib.util, edgeprune.vit, torch\n"
        "from edgeprune import compat\n"
        "assert compat.heal_torchvision() == []\n"
        "assert compat.timm.is_model('vit_tiny_patch16_224')\n"
        "if importlib.util.find_spec('torchvision'):\n"
        "    import torchvision.transforms\n"
        "    assert hasattr(torch.ops.torchvision, 'nms')\n"
        "print('fine')"
    )
    assert result.stdout.strip() == "fine", result.stderr


def test_healing_says_what_it_declared() -> None:
    from edgeprune import compat

    assert compat.heal_torchvision() == []  # already done on import
    assert set(compat._SCHEMAS) == {"nms", "qnms"}
