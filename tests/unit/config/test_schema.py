"""The schema accepts what the loader accepts, and says what each key means."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from raytrain_adv.config import load
from raytrain_adv.config.job import section_types
from raytrain_adv.config.schema import describe, field_schemas, schema

ROOT = Path(__file__).parents[3]
NO_JOB = {"runtime_env.yaml"}
JOBS = sorted(path for path in (ROOT / "jobs").rglob("*.yaml") if path.name not in NO_JOB)
SMALLEST = {"model_name_or_path": "org/model", "output_dir": "saves/run", "dataset": "rows.jsonl"}


@functools.cache
def validator() -> jsonschema.Draft202012Validator:
    """Return what validates by the schema, itself checked once: that takes a second."""
    jsonschema.Draft202012Validator.check_schema(schema())
    return jsonschema.Draft202012Validator(schema())


def is_valid(keys: dict[str, Any]) -> bool:
    return validator().is_valid({**SMALLEST, **keys})


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())


def test_there_are_jobs_to_check() -> None:
    assert JOBS


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.stem)
def test_every_shipped_job_loads_and_fits_the_schema(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    load(os.path.relpath(path))
    validator().validate(yaml.safe_load(path.read_text()))


def test_every_key_has_its_sentence() -> None:
    properties = schema()["properties"]
    without = [key for key, field in properties.items() if len(field.get("description", "")) < 10]
    assert without == []
    assert all("\n" not in field["description"] for field in properties.values())


def test_an_editor_shows_a_sentence_for_each_key_of_each_job() -> None:
    properties = schema()["properties"]
    for path in JOBS:
        for key in yaml.safe_load(path.read_text()):
            assert properties[key]["description"].rstrip().endswith((".", ").")), key


def test_nothing_has_to_be_looked_up_outside_a_keys_own_entry() -> None:
    assert "$ref" not in json.dumps(schema())


def test_every_key_of_every_section_is_in_the_schema() -> None:
    owned = {key for kind in section_types() for key in kind.model_fields}
    assert owned <= set(schema()["properties"])


def test_no_two_sections_own_one_key() -> None:
    keys = [key for kind in section_types() for key in kind.model_fields]
    assert len(keys) == len(set(keys))


def test_defaults_are_in_the_schema_and_fit_it() -> None:
    properties = schema()["properties"]
    assert properties["learning_rate"]["default"] == 5e-5
    for kind in section_types():
        for key in kind.model_fields:
            if not kind.model_fields[key].is_required():
                assert "default" in properties[key], key
                assert is_valid({key: kind.default(key)}), key


@pytest.mark.parametrize(
    "keys",
    [
        {"lerning_rate": 1e-4},
        {"learning_rate": 0},
        {"optim": "sgd"},
        {"max_steps": 0},
        {"max_steps": -2},
        {"bf16": "yes"},
        {"gradient_accumulation_steps": 1.5},
        {"do_train": False},
        {"report_to": ["tensorbord"]},
    ],
)
def test_what_the_loader_refuses_the_schema_refuses(keys: dict[str, Any]) -> None:
    assert not is_valid(keys)


@pytest.mark.parametrize(
    "keys",
    [
        {"do_train": True},
        {"dataloader_num_workers": 4},
        {"evaluation_strategy": "steps"},
        {"ray_num_workers": "auto"},
        {"ray_num_workers": 4},
        {"ray_num_workers": [2, 8], "max_failures": 3},
        {"gradient_checkpointing": "selective"},
        {"gradient_checkpointing": False},
        {"dataset": ["a", "b"]},
        {"resources_per_worker": {"GPU": 1, "CPU": 8}},
        {"max_steps": -1},
    ],
)
def test_what_the_loader_accepts_the_schema_accepts(keys: dict[str, Any]) -> None:
    assert is_valid(keys)


def test_a_missing_model_is_refused() -> None:
    keys = {"output_dir": "saves/run", "dataset": "rows.jsonl"}
    assert not validator().is_valid(keys)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("learning_rate", "a number above 0"),
        (
            "ray_num_workers",
            "a whole number at least 1, or auto, or a list of 2 (a whole number at least 1)",
        ),
        ("bf16", "true or false"),
        ("warmup_ratio", "a number at least 0 and at most 1, or null"),
        ("tiled_mlp", "true or false, or a whole number at least 16 and a multiple of 16"),
    ],
)
def test_what_a_key_accepts_is_said_in_words(key: str, words: str) -> None:
    fields = {
        name: field for kind in section_types() for name, field in field_schemas(kind).items()
    }
    assert describe(fields[key]) == words
