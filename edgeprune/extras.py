"""Optional packages: what is missing is named, with the command that installs it, before anything is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from edgeprune.errors import UsageError

#: What a build imports besides the runtime it measures: module -> package.
BUILD = {
    "torch": "torch", "timm": "timm", "onnx": "onnx", "onnxscript": "onnxscript", "onnxsim": "onnxsim",
    "safetensors": "safetensors", "PIL": "pillow", "sklearn": "scikit-learn",
}  # fmt: skip
REPORT = {"jinja2": "jinja2", "plotly": "plotly"}
PROVENANCE = {
    "cyclonedx": "cyclonedx-python-lib", "in_toto_attestation": "in-toto-attestation", "packaging": "packaging",
    "packageurl": "packageurl-python",
}  # fmt: skip
IMAGES = {"PIL": "pillow"}
ACCELERATE = {"accelerate": "accelerate"}
DIGITS = {"sklearn": "scikit-learn"}


def missing(packages: Mapping[str, str]) -> list[str]:
    """The names of the packages (module -> package) whose modules cannot be found; imports nothing."""
    return [name for module, name in packages.items() if importlib.util.find_spec(module) is None]


def need(what: str, packages: Mapping[str, str], fix: str) -> None:
    """Raise UsageError unless all `packages` are installed: `what` ("building") needs them, `fix` installs them."""
    if names := missing(packages):
        them = "it" if len(names) == 1 else "them"
        raise UsageError(f"{what} needs {', '.join(names)} (not installed); install {them} with: {fix}")


def need_build_packages(what: str = "building") -> None:
    """Raise UsageError unless everything that a build imports is installed."""
    need(what, BUILD | REPORT | PROVENANCE, "pip install 'edgeprune[build]'")
