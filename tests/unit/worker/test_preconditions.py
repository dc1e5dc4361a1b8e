"""What is wrong with a job's files is said before Ray, and before torch is imported."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raytrain_adv.config import load
from raytrain_adv.errors import JobError
from raytrain_adv.worker.preconditions import check_files

LAUNCH = """
import sys
from raytrain_adv import launch
code = launch.main(sys.argv[1:])
print(code, sorted({"torch", "ray"} & sys.modules.keys()))
"""


def test_sound_files_are_not_in_the_way(make_job: Any) -> None:
    for changed in ({}, {"val_size": 63}, {"val_size": 0.1}, {"template": "phi"}):
        check_files(make_job(**changed))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model_name_or_path": "/nowhere/tiny/model"}, "there is no model folder /nowhere/tiny"),
        ({"train_from_scratch": False}, "holds no weights"),
        ({"template": "gemma"}, "Template gemma does not fit this model's tokenizer"),
        ({"val_size": 64}, "val_size leaves no rows to train on or none to evaluate"),
        ({"val_size": 0.001}, "val_size leaves no rows to train on or none to evaluate"),
        ({"val_size": 20, "max_samples": 20}, "val_size: 20 of 20 rows"),
        ({"flash_attn": "fa3"}, "flash_attn: fa3 needs the package flash-attn-3"),
        ({"dataset": "/nowhere/rows.json"}, "Dataset /nowhere/rows.json was not found"),
    ],
)
def test_what_files_make_impossible_is_refused_before_ray_and_torch(
    job_file: Any, changed: dict[str, Any], said: str
) -> None:
    path = job_file(**changed)
    with pytest.raises(JobError, match=said.partition(" /")[0]):
        check_files(load(path))


def test_a_launch_with_a_wrong_path_imports_neither_torch_nor_ray(job_file: Any) -> None:
    path = job_file(model_name_or_path="/nowhere/tiny/model")
    command = [sys.executable, "-c", LAUNCH, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "2 []"
    assert "there is no model folder /nowhere/tiny/model" in done.stderr


def test_a_tokenizer_without_a_chat_template_is_refused_early(make_job: Any) -> None:
    job = make_job()
    folder = Path(job.model.model_name_or_path)
    for file in folder.glob("*.jinja"):
        file.unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(JobError, match="has no chat template, and the job names none"):
        check_files(job)
    data = job.data.model_copy(update={"template": "alpaca"})
    check_files(dataclasses.replace(job, data=data))


def test_a_trials_own_wrong_file_is_left_to_the_trial(make_job: Any) -> None:
    keys = {"val_size": 8, "save_strategy": "steps"}
    check_files(make_job(**keys, sweep={"template": ["gemma", "phi"]}))
    check_files(make_job(**keys, sweep={"template": ["gemma", "chatml"]}))  # each said of its own
    with pytest.raises(JobError, match="Template chatml does not fit"):
        check_files(make_job(**keys, template="chatml", sweep={"weight_decay": [0.0, 0.1]}))
