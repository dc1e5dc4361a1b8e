"""Tasks of lm-evaluation-harness, as far as they need no harness; docs/use.md names what does."""

import pytest

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
