"""What a submitted job uploads, what is refused before, and how signals are handled."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import yaml

from raytrain_adv.config import load
from raytrain_adv.driver.commands import submit
from raytrain_adv.driver.commands.status import Run, _table, show, written
from raytrain_adv.driver.output.output_dir import held
from raytrain_adv.driver.watch.stop import StopRequest, handle_signals
from raytrain_adv.errors import JobError
from raytrain_adv.storage.metrics_file import MetricsFile
from tests.conftest import ROOT


@pytest.fixture
def project(tmp_path, job_file, monkeypatch) -> Path:
    folder = tmp_path / "project"
    for name in ("model", ".git", "saves", "data", "checkpoints"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file.json").write_text("{}")
    (folder / "model" / "model.safetensors").write_bytes(bytes(10))
    (folder / "rows.json").write_text("[]")
    (folder / "job.yaml").write_text(job_file(output_dir="/shared/out").read_text())
    monkeypatch.chdir(folder)
    return folder


def uploaded(folder: Path) -> list[str]:
    env = submit.runtime_env(None, folder)
    files = submit.uploaded_files(folder, env["excludes"])
    return sorted(str(file.relative_to(folder)) for file in files)


def refused(folder: Path, **keys: object) -> str:
    changed = {**yaml.safe_load((folder / "job.yaml").read_text()), **keys}
    (folder / "job.yaml").write_text(yaml.safe_dump(changed))
    job = load("job.yaml", [])
    files = submit.uploaded_files(folder, submit.runtime_env(None, folder)["excludes"])
    with pytest.raises(JobError) as error:
        submit.refuse_what_stays_behind(job, "job.yaml", folder, files)
    return str(error.value)


def test_the_folder_is_uploaded_without_checkpoints_data_and_history(project):
    assert uploaded(project) == ["job.yaml", "model/file.json", "rows.json"]


def test_the_shipped_file_reports_what_the_default_is():
    shipped = yaml.safe_load((ROOT / submit.DEFAULT_ENV).read_text())
    assert shipped["excludes"] == list(submit.EXCLUDES)
    assert shipped["env_vars"] == submit.ENV_VARS


def test_this_project_is_uploaded_with_all_that_its_jobs_name():
    files = submit.uploaded_files(ROOT, list(submit.EXCLUDES))
    there = {str(file.relative_to(ROOT)) for file in files}
    assert {"jobs/quickstart.yaml", "jobs/models/tiny-llama/config.json"} <= there
    assert "raytrain_adv/launch.py" in there
    assert not any(name.startswith((".git/", ".venv/", "saves/")) for name in there)


def test_what_the_job_needs_and_would_not_be_there_is_refused(project):
    assert "model.safetensors" in refused(project, model_name_or_path="model")
    assert "data/file.json" in refused(project, dataset="data/file.json")


def test_a_relative_output_dir_is_refused_before_anything_is_sent(project):
    assert "output_dir: saves/x" in refused(project, output_dir="saves/x")


def test_a_job_file_outside_the_folder_is_refused(project, job_file):
    outside = job_file("outside.yaml", output_dir="/shared/out")
    job = load(str(outside), [])
    with pytest.raises(JobError, match="the job file"):
        submit.refuse_what_stays_behind(job, str(outside), project, [])


@pytest.mark.parametrize(
    ("env", "override", "key"),
    [
        ({"env_vars": {"HF_TOKEN": "planted"}}, "max_steps=1", "HF_TOKEN"),
        ({"env_vars": {"AWS_SECRET_ACCESS_KEY": "planted"}}, "max_steps=1", "AWS_SECRET"),
        ({}, "ray_init_kwargs={runtime_env: {env_vars: {X: planted}}}", "ray_init_kwargs"),
        ({}, "ray_init_kwargs._redis_password=planted", "_redis_password"),
    ],
)
def test_a_secret_that_ray_would_show_is_refused_without_repeating_it(env, override, key):
    with pytest.raises(JobError) as error:
        submit.refuse_secrets(env, [override])
    assert key in str(error.value) and "planted" not in str(error.value)


@pytest.mark.parametrize("text", ["- a", "excludes: all", "{"])
def test_a_runtime_environment_that_is_none_is_refused(project, text):
    (project / "env.yaml").write_text(text)
    with pytest.raises(JobError, match="runtime environment"):
        submit.runtime_env("env.yaml", project)


def test_the_first_signal_asks_the_workers_and_the_second_ends_the_driver(tmp_path):
    said: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    with handle_signals(tmp_path, said.append):
        assert not StopRequest(tmp_path).is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert StopRequest(tmp_path).is_set() and "stop requested" in said[0]
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGINT)
    assert not StopRequest(tmp_path).is_set()
    assert signal.getsignal(signal.SIGTERM) is before


def test_status_reads_a_run_s_own_files(tmp_path):
    assert written(tmp_path) is None
    (tmp_path / "run.json").write_text('{"status": "running"}')
    with MetricsFile(tmp_path / "metrics.jsonl", resume_step=None) as file:
        file.event("plan", "the run in numbers", total_steps=9, restarts=1)
        file.append({"kind": "train", "step": 4, "loss": 2.5, "tokens_per_second_per_worker": 7.0})
        file.event("phase", "checkpoints")
    with held(tmp_path):
        found = written(tmp_path)
    assert (
        found is not None
        and found.status == "running"
        and found.progress == "4/9"
        and found.loss == 2.5
    )
    assert found.restarts == 1 and found.message == "checkpoints"


@pytest.mark.parametrize(("status", "shown"), [("running", "died"), ("stopped", "stopped")])
def test_a_run_whose_driver_is_gone_is_not_running_for_ever(tmp_path, capsys, status, shown):
    with held(tmp_path):
        (tmp_path / "run.json").write_text(json.dumps({"status": status}))
    show(None, str(tmp_path))
    said = capsys.readouterr().out
    assert f"{tmp_path}: {shown}" in said
    assert ("doctor" in said) is (shown == "died")


@pytest.mark.parametrize(
    ("ray", "own", "shown"),
    [
        ("ERRORED", "stopped", "stopped"),
        ("ABORTED", "failed", "failed"),
        ("RUNNING", "x", "running"),
    ],
)
def test_the_table_of_runs_agrees_with_their_reports(tmp_path, ray, own, shown):
    (tmp_path / "run.json").write_text(json.dumps({"status": own}))
    config = {"run": "mine", "marker": str(tmp_path / "run.json")}
    settings = {"train_loop_config": config}
    entry = {"name": "mine_001", "status": ray, "run_settings": settings, "attempts": []}
    assert f" {shown} " in _table([Run(entry)])
