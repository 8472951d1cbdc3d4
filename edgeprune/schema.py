"""Check a document from elsewhere against a JSON Schema, as far as edgeprune's own schemas go; no dependency.

Texts with control characters are refused too: they would reach a terminal.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

KINDS: dict[str, Any] = {
    "object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int, "number": (int, float),
}  # fmt: skip
#: Everything that `problem` understands; a test holds the shipped schemas to it.
KEYWORDS = {
    "$ref", "type", "const", "enum", "required", "properties", "additionalProperties", "propertyNames", "items", "minItems",
    "maxItems", "uniqueItems", "minimum", "maximum", "exclusiveMinimum", "minLength", "pattern",
    "$schema", "$id", "$defs", "title", "description",
}  # fmt: skip


def problem(value: Any, schema: Mapping[str, Any], root: Mapping[str, Any] | None = None, at: str = "") -> str:
    """What is wrong with `value`, the first thing found, as "place: reason"; "" when nothing is.

    root: the schema that `$ref` refers into; the schema itself if None.
    """
    root = schema if root is None else root
    if "$ref" in schema:
        own: Any = root
        for part in str(schema["$ref"]).removeprefix("#/").split("/"):
            own = own[part]
        if found := problem(value, own, root, at):
            return found
    if reason := _own(value, schema):
        return f"{at or 'the document'}: {reason}"
    if isinstance(value, dict):
        names, known = schema.get("propertyNames"), schema.get("properties", {})
        others = schema.get("additionalProperties", True)
        for key, child in value.items():
            where = f"{at}.{key}" if at else key
            if reason := _text(key):
                return f"{at or 'the document'}: a key {reason}"
            if names is not None and (found := problem(key, names, root, where)):
                return found
            if key not in known and others is False:
                return f"{where}: unknown key"
            rule = known.get(key, others)
            if isinstance(rule, Mapping) and (found := problem(child, rule, root, where)):
                return found
    if isinstance(value, list) and "items" in schema:
        for i, child in enumerate(value):
            if found := problem(child, schema["items"], root, f"{at}[{i}]"):
                return found
    return ""


def _own(value: Any, schema: Mapping[str, Any]) -> str:
    """What is wrong with the value itself, without what is in it."""
    kinds = schema.get("type", ())
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        return f"must be {' or '.join(kinds)}, not {type(value).__name__}"
    if "const" in schema and (type(value), value) != (type(schema["const"]), schema["const"]):
        return f"must be {schema['const']!r}"
    if "enum" in schema and not any((type(value), value) == (type(one), one) for one in schema["enum"]):
        return f"must be one of {', '.join(map(repr, schema['enum']))}"
    if isinstance(value, str):
        return _text(value) or _length(len(value), schema.get("minLength", 0), math.inf, "characters") or (
            "" if re.search(schema.get("pattern", ""), value) else f"does not match {schema['pattern']}"
        )  # fmt: skip
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return _number(value, schema)
    if isinstance(value, list):
        if schema.get("uniqueItems") and len({repr(one) for one in value}) < len(value):
            return "has an item twice"
        return _length(len(value), schema.get("minItems", 0), schema.get("maxItems", math.inf), "items")
    if isinstance(value, dict) and (missing := [key for key in schema.get("required", ()) if key not in value]):
        return f"'{missing[0]}' is missing"
    return ""


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, KINDS[kind])


def _text(value: str) -> str:
    bad = next((c for c in value if (ord(c) < 32 and c != "\n") or ord(c) == 127 or "\ud800" <= c <= "\udfff"), "")
    return f"holds the control character U+{ord(bad):04X}" if bad else ""


def _length(count: int, least: float, most: float, what: str) -> str:
    return "" if least <= count <= most else f"has {count} {what}"


def _number(value: float, schema: Mapping[str, Any]) -> str:
    try:
        finite = math.isfinite(float(value))
    except OverflowError:
        finite = False
    if not finite:
        return "must be finite"
    if value < schema.get("minimum", -math.inf) or value > schema.get("maximum", math.inf):
        return f"{value} is out of range"
    return f"{value} is too small" if value <= schema.get("exclusiveMinimum", -math.inf) else ""
