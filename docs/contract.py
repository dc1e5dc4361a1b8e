"""The pages of report.json and sweep.json: their fields, each with its sentence."""

from __future__ import annotations

import re
from typing import Any

from raytrain_adv.report import parts
from raytrain_adv.report.record import RunReport
from raytrain_adv.report.sweep_record import SweepReport, TrialReport

INNER: tuple[type[parts.Record], ...] = (
    parts.PreflightReport, parts.NodeReport, parts.TransformReport, parts.Start, parts.Sample,
    parts.Failure, parts.Variant, parts.Baseline,
)  # fmt: skip


def report_contract() -> str:
    """Return the document of report.json."""
    begin = "# report.json\n\nWhat a run leaves in `output_dir/report.json`."
    return _document(begin, RunReport, *INNER)


def sweep_contract() -> str:
    """Return the document of sweep.json."""
    begin = (
        "# sweep.json\n\nWhat a sweep leaves in `output_dir/sweep.json`, written whenever a trial "
        "begins or ends; each trial's folder has its own `report.json` (CONTRACT.md)."
    )
    return _document(begin, SweepReport, TrialReport)


def _document(begin: str, kind: type[parts.Record], *inner: type[parts.Record]) -> str:
    schema = kind.model_json_schema()
    made = (
        "Made by `python docs/generate.py`; the same as a JSON schema: "
        f"`{kind.__module__}.{kind.__name__}.model_json_schema()`."
    )
    tables = [_table(one.__name__, schema["$defs"][one.__name__]) for one in inner]
    return "\n\n".join([f"{begin} {made}", _table(kind.__name__, schema), *tables]) + "\n"


def _table(name: str, schema: dict[str, Any]) -> str:
    lines = [f"## {name}", "", " ".join(str(schema["description"]).split()), ""]
    lines += ["| field | type | |", "|---|---|---|"]
    for field, detail in schema["properties"].items():
        sentence = " ".join(str(detail["description"]).split())
        lines.append(f"| `{field}` | {_type(detail)} | {sentence} |")
    return "\n".join(lines)


def _type(detail: dict[str, Any]) -> str:
    """Return a JSON schema's type in words, as `list of [integer, number or null]`."""
    if "anyOf" in detail:
        return " or ".join(_type(option) for option in detail["anyOf"])
    if "$ref" in detail:
        name = re.sub(r".*/", "", detail["$ref"])
        return "value" if name == "JsonValue" else name
    if "const" in detail:
        return f"`{detail['const']}`"
    if "enum" in detail:
        return ", ".join(f"`{value}`" for value in detail["enum"])
    if "prefixItems" in detail:
        return f"[{', '.join(_type(item) for item in detail['prefixItems'])}]"
    if detail.get("type") == "array":
        return f"list of {_type(detail['items'])}"
    if detail.get("type") == "object":
        values = detail.get("additionalProperties")
        return f"object of {_type(values)}" if isinstance(values, dict) else "object"
    return str(detail["type"])
