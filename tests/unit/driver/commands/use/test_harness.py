"""Tasks of lm-evaluation-harness; a whole one if the harness is installed."""

import json

import pytest
import yaml

from raytrain_adv.cli import main
from raytrain_adv.driver.commands.use.harness import _figures, _name
from raytrain_adv.errors import JobError


def test_a_task_file_is_named_without_running_what_it_names(tmp_path):
    (tmp_path / "a.yaml").write_text("task: counting\nprocess_docs: !function utils.nothing\n")
    assert _name(tmp_path / "a.yaml") == "counting"
    (tmp_path / "b.yaml").write_text("dataset_path: json\n")
    with pytest.raises(JobError, match="names no task"):
        _name(tmp_path / "b.yaml")


def test_each_metric_has_its_standard_error_or_none():
    found = {
        "arc": {
            "alias": "arc",
            "acc,none": 0.5,
            "acc_stderr,none": 0.1,
            "exact_match,strict": 0.2,
            "exact_match_stderr,strict": "N/A",
            "sample_len": 12,
        }
    }
    wanted = {"arc acc": (0.5, 0.1), "arc exact_match (strict)": (0.2, None)}
    assert _figures(found) == wanted


def test_a_local_task_is_run_on_both_models_of_a_run_without_a_network(
    runs, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("lm_eval", reason="pip install 'raytrain-adv[eval]'")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    row = {"question": "one", "choices": ["two", "three"], "answer": 0}
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    task = {
        "task": "counting",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    output = tmp_path / "figures.json"
    tasks = ["--tasks", str(tmp_path / "task.yaml"), "-o", str(output), "--device", "cpu"]
    assert main(["evaluate", str(runs["qat"]), *tasks]) == 0
    (line,) = [one for one in capsys.readouterr().out.splitlines() if "counting acc" in one]
    assert line.count("±") == 2
