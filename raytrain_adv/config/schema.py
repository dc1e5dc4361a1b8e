"""The JSON schema of the job file, from the fields that load it: for editors and messages."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from raytrain_adv.config.job import section_types
from raytrain_adv.config.llamafactory.keys import LISTED, MAPPED, RENAMED, SAME
from raytrain_adv.config.llamafactory.sharding import SHARDING
from raytrain_adv.config.problems import show
from raytrain_adv.config.section import Section
from raytrain_adv.config.sections import LARGEST
from raytrain_adv.config.sweep import DISTRIBUTIONS, SET_BY_THE_SWEEP, SweepOptions

SPREADS = (
    "LLaMA-Factory's key: a file or mapping for DeepSpeed or FSDP, which runs as keys of FSDP2: "
    "what is sharded, offload to host memory, precision; a note tells which."
)
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schema() -> dict[str, Any]:
    """Return the JSON schema of the flat job file: each key's sentence, default and range."""
    properties: dict[str, Any] = {}
    required: list[str] = []
    for kind in section_types():
        properties.update(field_schemas(kind))
        required += [name for name, field in kind.model_fields.items() if field.is_required()]
    for key, (values, why, _) in SAME.items():
        sentence = f"LLaMA-Factory's key, accepted as it is: {why}."
        accepted = {"description": sentence, "enum": [*values, None], "deprecated": True}
        properties.setdefault(key, accepted)
    for key, why in LISTED.items():
        sentence = f"LLaMA-Factory's key; it has no effect here: {why}."
        properties.setdefault(key, {"description": sentence, "deprecated": True})
    for key, ours in RENAMED.items():
        if ours in properties:
            sentence = f"LLaMA-Factory's name of {ours}. {properties[ours]['description']}"
            properties[key] = properties[ours] | {"description": sentence, "deprecated": True}
    for key in SHARDING:
        properties[key] = {"description": SPREADS, "deprecated": True}
    for key, (value, runs_as, why) in MAPPED.items():
        names = " and ".join(f"{name}: {show(one)}" for name, one in runs_as.items())
        sentence = f"LLaMA-Factory's key; {show(value)} runs as {names}: {why}."
        mapped = {"description": sentence, "enum": [value, False, None], "deprecated": True}
        known = properties.setdefault(key, mapped)
        if value not in known.get("enum", [value]):
            properties[key] = known | {"enum": [*known["enum"], value]}
    properties["sweep"] = _sweep_schema(properties)
    return {
        "$schema": DIALECT,
        "title": "raytrain_adv job",
        "description": "One fine-tuning run, or with sweep several, in flat keys with "
        "LLaMA-Factory's names and defaults.",
        "type": "object",
        "additionalProperties": False,
        "required": [*required, "dataset"],
        "properties": properties,
    }


def _sweep_schema(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of the sweep section: its options, and any other key with values."""
    swept = {
        key: _values_schema(field)
        for key, field in properties.items()
        if key not in SET_BY_THE_SWEEP and not ("deprecated" in field and key not in RENAMED)
    }
    return {
        "description": "Keys of the job with values to try: a list, or a distribution to draw "
        "num_samples values from. Every combination is a trial, and the options set "
        "how trials are run and compared. null runs the job without the sweep.",
        "type": ["object", "null"],
        "additionalProperties": False,
        "properties": {**field_schemas(SweepOptions), **swept},
    }


def _values_schema(field: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a sweep accepts for a key: a list of its values, or a distribution."""
    value = {k: v for k, v in field.items() if k not in ("description", "default", "deprecated")}
    some = {"type": "array", "items": value, "minItems": 1}
    pair = {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}
    forms = [
        {
            "type": "object",
            "properties": {kind: some if kind == "choice" else pair},
            "required": [kind],
            "additionalProperties": False,
        }
        for kind in DISTRIBUTIONS
    ]
    return {"description": field.get("description", ""), "anyOf": [some, *forms]}


@cache
def field_schemas(kind: type[Section]) -> dict[str, Any]:
    """Return the schema of each key of a section, with all references resolved."""
    whole = kind.model_json_schema()
    definitions = whole.get("$defs", {})
    return {name: _tidy(field, definitions) for name, field in whole["properties"].items()}


def describe(field: Mapping[str, Any]) -> str:
    """Describe the values that a key's schema accepts, as `a whole number at least 1, or auto`."""
    if "anyOf" in field:
        return ", or ".join(dict.fromkeys(map(describe, field["anyOf"])))
    if "enum" in field:
        names = ("null" if value is None else str(value) for value in field["enum"])
        return f"one of {', '.join(names)}"
    if "const" in field:
        return str(field["const"])
    if isinstance(field.get("type"), list):
        return ", or ".join(_KINDS[kind] for kind in field["type"])
    words = _KINDS[field.get("type", "any")] + _range(field)
    if "minItems" in field and field["minItems"] == field.get("maxItems"):
        words += f" of {field['minItems']}"
    if field.get("type") == "array" and "items" in field:
        return f"{words} ({describe(field['items'])})"
    inner = field.get("additionalProperties")
    if isinstance(inner, dict):
        return f"{words} to {describe(inner)}"
    return words


_KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "array": "a list",
    "object": "a mapping",
    "null": "null",
    "any": "any value",
}
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
    "multipleOf": "a multiple of {}",
}


def _range(field: Mapping[str, Any]) -> str:
    bounds = [
        words.format(f"{field[key]:.10g}")
        for key, words in _BOUNDS.items()
        if key in field and field[key] < LARGEST
    ]
    return " " + " and ".join(bounds) if bounds else ""


def _tidy(node: Any, definitions: Mapping[str, Any]) -> Any:
    if isinstance(node, list):
        return [_tidy(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        target = definitions[node["$ref"].rsplit("/", 1)[-1]]
        return _tidy({**target, **{k: v for k, v in node.items() if k != "$ref"}}, definitions)
    # A property may be called title; pydantic's own titles are text.
    tidied = {
        key: _tidy(value, definitions)
        for key, value in node.items()
        if not (key == "title" and isinstance(value, str))
    }
    if isinstance(tidied.get("description"), str):
        tidied["description"] = " ".join(tidied["description"].split())
    return tidied
