"""Provenance: how an artifact came to be (in-toto statement, SLSA predicate) and of which software (CycloneDX SBOM).

Both are unsigned: whoever signs artifacts signs `provenance.json` (`cosign attest-blob --statement`, for example).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from typing import Any

STATEMENT = "provenance.json"
SBOM = "sbom.cdx.json"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:edgeprune:build:1"
BUILDER = "urn:edgeprune:command-line"
#: What of the manifest the user chose, and what the build found out by itself.
ASKED = (
    "model", "architecture", "target", "request", "method", "criterion", "allocator", "schedule", "recovery", "dims", "reducer",
    "precision", "selection", "seed",
)  # fmt: skip
FOUND = ("runtime", "threads", "environment", "key")


def statement(manifest: Mapping[str, Any], materials: Mapping[str, str]) -> str:
    """An in-toto statement (v1) whose subjects are the manifest's files, with a SLSA provenance predicate (v1).

    materials: sha256 by name of what went in, the dense model's weights above all. The library checks the statement.
    """
    from google.protobuf.json_format import MessageToDict
    from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
    from in_toto_attestation.v1.statement import Statement

    def described(name: str, sha256: str) -> Any:
        return ResourceDescriptor(name=name, digest={"sha256": sha256}).pb

    packages = [{"uri": _purl(one), "name": _name(one)} for one in installed()]
    given = [{"name": name, "digest": {"sha256": sha256}} for name, sha256 in materials.items()]
    predicate = {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": {name: manifest[name] for name in ASKED if name in manifest},
            "internalParameters": {name: manifest[name] for name in FOUND},
            "resolvedDependencies": given + packages,
        },
        "runDetails": {
            "builder": {"id": BUILDER, "version": {"edgeprune": manifest["environment"]["edgeprune"]}},
            "metadata": {"invocationId": manifest["key"]},
        },
    }
    made = Statement(
        [described(name, facts["sha256"]) for name, facts in manifest["files"].items()], PREDICATE, predicate
    )
    made.validate()
    return json.dumps(MessageToDict(made.pb), indent=1)


def sbom(manifest: Mapping[str, Any]) -> str:
    """A CycloneDX 1.6 bill of materials: edgeprune, its build packages and all that they need, as installed here."""
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6
    from packageurl import PackageURL

    found = installed()
    components = {
        _name(one): Component(
            name=_name(one), version=one.version, type=ComponentType.LIBRARY, bom_ref=_purl(one),
            purl=PackageURL("pypi", name=_name(one), version=one.version),
        )
        for one in found
    }  # fmt: skip
    bom = Bom(serial_number=uuid.uuid5(uuid.NAMESPACE_URL, f"edgeprune:{manifest['key']}"))
    name = f"{manifest['model']}-{manifest['target']}-{manifest['request']['latency']}"
    subject = Component(
        name=name, version=manifest["key"][:16], type=ComponentType.MACHINE_LEARNING_MODEL, bom_ref=name
    )
    python = Component(
        name="python", version=manifest["environment"]["python"], type=ComponentType.PLATFORM, bom_ref="python"
    )
    bom.metadata.component = subject
    for component in (python, *components.values()):
        bom.components.add(component)
    bom.register_dependency(subject, [python, components["edgeprune"]] if "edgeprune" in components else [python])
    for one in found:
        bom.register_dependency(
            components[_name(one)], [components[needed] for needed in _needs(one) if needed in components]
        )
    return JsonV1Dot6(bom).output_as_string(indent=1)


def installed() -> list[Distribution]:
    """edgeprune with what `edgeprune[build]` needs, and what those need in turn, where it is installed; by name."""
    found: dict[str, Distribution] = {}
    waiting = ["edgeprune"]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:  # for another system, or a checkout that was never installed
            continue
        waiting += _needs(found[name])
    return [found[name] for name in sorted(found)]


def _needs(one: Distribution) -> Iterable[str]:
    """Names of the packages it needs here; of edgeprune, those of a build too."""
    from packaging.requirements import InvalidRequirement, Requirement
    from packaging.utils import canonicalize_name

    names = []
    extras = ("", "build") if _name(one) == "edgeprune" else ("",)
    for text in one.requires or ():
        try:
            needed = Requirement(text)
        except InvalidRequirement:
            continue
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
            names.append(str(canonicalize_name(needed.name)))
    return names


def _name(one: Distribution) -> str:
    from packaging.utils import canonicalize_name

    return str(canonicalize_name(one.metadata["Name"]))


def _purl(one: Distribution) -> str:
    from packageurl import PackageURL

    return str(PackageURL("pypi", name=_name(one), version=one.version))
