import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from raytrain_adv.errors import StorageError
from raytrain_adv.storage.metrics_file import MetricsFile, read


def write_rows(path, steps, resume_step=None):
    with MetricsFile(path, resume_step) as file:
        file.event("plan", "The run in numbers.", total_steps=9)
        for step in steps:
            file.append({"kind": "train", "step": step, "loss": 1.0 / step})


def train_steps(path):
    return [row["step"] for row in read(path) if row["kind"] == "train"]


def test_numbers_of_numpy_and_torch_become_plain(tmp_path):
    with MetricsFile(tmp_path / "m.jsonl", None) as file:
        file.append(
            {"kind": "train", "step": np.int64(1), "loss": torch.tensor(2.5), "lr": np.float32(0.5)}
        )
    (row,) = read(tmp_path / "m.jsonl")
    assert (row["step"], row["loss"], row["lr"]) == (1, 2.5, 0.5)
    assert row["time"] > 0


def test_nan_becomes_null_and_is_named(tmp_path):
    with MetricsFile(tmp_path / "m.jsonl", None) as file:
        file.append({"kind": "train", "step": 1, "loss": float("nan"), "grad_norm": float("inf")})
    line = (tmp_path / "m.jsonl").read_text()
    row = json.loads(line, parse_constant=pytest.fail)
    assert row["loss"] is None
    assert row["non_finite"] == {"loss": "nan", "grad_norm": "inf"}


def test_a_value_that_is_no_scalar_is_refused_by_its_key(tmp_path):
    with MetricsFile(tmp_path / "m.jsonl", None) as file, pytest.raises(TypeError, match="loss"):
        file.append({"kind": "train", "step": 1, "loss": [1.0]})


def test_resume_drops_later_rows_and_keeps_events(tmp_path):
    path = tmp_path / "m.jsonl"
    write_rows(path, [1, 2, 3, 4])
    write_rows(path, [3, 4, 5], resume_step=2)
    assert train_steps(path) == [1, 2, 3, 4, 5]
    resumes = [row for row in read(path) if row.get("event") == "resume"]
    assert [(row["step"], row["num_dropped"]) for row in resumes] == [(2, 2)]


def test_resume_drops_a_torn_last_line(tmp_path):
    path = tmp_path / "m.jsonl"
    write_rows(path, [1, 2])
    with path.open("a") as file:
        file.write('{"kind": "train", "step": 2, "lo')
    assert train_steps(path) == [1, 2]
    write_rows(path, [3], resume_step=2)
    assert train_steps(path) == [1, 2, 3]


def test_a_new_run_starts_a_new_log(tmp_path):
    write_rows(tmp_path / "m.jsonl", [1, 2])
    write_rows(tmp_path / "m.jsonl", [1])
    assert train_steps(tmp_path / "m.jsonl") == [1]
    assert "resume" not in [row.get("event") for row in read(tmp_path / "m.jsonl")]


def test_a_run_that_resumes_without_a_log_has_no_resume_event(tmp_path):
    write_rows(tmp_path / "m.jsonl", [3], resume_step=2)
    assert "resume" not in [row.get("event") for row in read(tmp_path / "m.jsonl")]


def test_a_broken_line_in_the_middle_is_named_not_lost(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"kind": "train", "step": 1}\n\x00\x00garbage\n{"kind": "train", "step": 2}\n')
    rows = read(path)
    assert [row.get("step") for row in rows] == [1, None, 2]
    assert "Line 2" in rows[1]["message"]


def test_no_file_has_no_rows(tmp_path):
    assert read(tmp_path / "m.jsonl") == []


def test_a_killed_process_loses_no_row(tmp_path):
    code = (
        "import sys, os, signal; from raytrain_adv.storage.metrics_file import MetricsFile\n"
        "file = MetricsFile(sys.argv[1], None)\n"
        "for step in range(50): file.append({'kind': 'train', 'step': step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.jsonl")], check=False)
    assert done.returncode == -signal.SIGKILL
    assert train_steps(tmp_path / "m.jsonl") == list(range(50))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full (Linux)")
def test_a_full_disk_is_a_storage_error_that_names_the_file(tmp_path):
    file = MetricsFile(tmp_path / "m.jsonl", None)
    os.dup2(os.open("/dev/full", os.O_WRONLY), file._fd)
    with pytest.raises(StorageError) as caught:
        file.append({"kind": "train", "step": 1})
    assert "m.jsonl" in caught.value.found
