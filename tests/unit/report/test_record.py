import json
import pickle

import numpy as np
import pytest

from raytrain_adv.config import load
from raytrain_adv.errors import ClusterError, Stopped, StorageError
from raytrain_adv.report import build, record
from raytrain_adv.report.html import write_html
from raytrain_adv.report.parts import Record, Sample, TransformReport, fold_names
from raytrain_adv.report.record import RunReport, describe_failure
from raytrain_adv.report.summary import summary
from raytrain_adv.transforms import Change, Plan

CONTRACT = [
    "status",
    "error",
    "job",
    "world_size",
    "device",
    "versions",
    "steps",
    "train_loss",
    "eval_loss",
    "tokens_per_second_per_worker",
    "step_seconds",
    "peak_memory_gib",
    "predicted_memory_gib",
    "mfu_bf16",
    "restarts",
    "resumed_from_step",
    "transforms",
    "model_dir",
]


def test_report_has_every_field_of_the_contract_from_the_start(tmp_path):
    path = record.write(RunReport(status="running"), tmp_path)
    assert set(CONTRACT) <= set(json.loads(path.read_text()))


@pytest.mark.parametrize("name", ["base", "merged"])
def test_the_summary_lists_the_folder_that_is_written_beside_an_adapter(tmp_path, name):
    (tmp_path / "model").mkdir()
    report = RunReport(status="done", model_dir=str(tmp_path / "model"), model_gib=0.5)
    assert f"model-{name}" not in summary(report)
    (tmp_path / f"model-{name}").mkdir()
    (line,) = (one for one in summary(report).splitlines() if f"model-{name}" in one)
    assert line.split()[:2] == [name, str(tmp_path / f"model-{name}")]


def test_what_is_written_is_read_back(tmp_path):
    report = RunReport(
        status="done", train_loss=((1, 2.5),), timeline={"data": 1.5}, data={"rows": {"read": 3}}
    )
    record.write(report, tmp_path)
    assert record.read(tmp_path) == report


def test_numpy_and_nan_become_json(tmp_path):
    report = RunReport(
        status="done",
        train_loss=[(np.int64(1), np.float32(2.5)), (2, float("nan"))],
        data={"count": np.int64(3), "share": float("inf"), "edges": np.arange(2)},
        mfu_bf16=float("nan"),
    )
    written = json.loads(record.write(report, tmp_path).read_text(), parse_constant=pytest.fail)
    assert written["train_loss"] == [[1, 2.5], [2, None]]
    assert written["data"] == {"count": 3, "share": None, "edges": [0, 1]}
    assert written["mfu_bf16"] is None


def test_text_that_is_no_unicode_does_not_stop_the_report(tmp_path):
    report = RunReport(status="done", samples=[Sample(prompt="\ud800", answer="a")])
    assert json.loads(record.write(report, tmp_path).read_text())["samples"]


def test_a_field_that_is_not_in_the_contract_is_refused():
    with pytest.raises(ValueError, match="speed"):
        RunReport(status="done", speed=3)


def test_secrets_of_the_job_are_not_written(tmp_path):
    job = {"ray_init_kwargs": {"runtime_env": {"env_vars": {"HF_TOKEN": "s3cret"}}}}
    report = RunReport(
        status="done",
        job=job,
        command='launch job.yaml ray_init_kwargs={"_redis_password": "s3cret"}',
        overrides=('ray_init_kwargs={"_redis_password": "s3cret"}',),
    )
    assert "s3cret" not in record.write(report, tmp_path).read_text()


def test_the_key_value_arguments_of_the_command_are_recorded(job_file, monkeypatch):
    argv = ["launch.py", "job.yaml", "max_steps=2", "--plan", "seed=1", "--dir=x"]
    monkeypatch.setattr("sys.argv", argv)
    assert build.started(load(job_file()), "run").overrides == ("max_steps=2", "seed=1")


def test_an_error_that_repeats_a_secret_of_the_environment_is_written_without_it(
    tmp_path, monkeypatch
):
    """A library's message may hold one, in the page and in the record."""
    secret = 'planted<&"9'
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("SOME_KEY", "failed")  # too short to be one
    error = TypeError(f"401 for token {secret}")
    report = RunReport(status="failed", error=str(error), failure=describe_failure(error))
    for path in (record.write(report, tmp_path), write_html(report, tmp_path)):
        text = path.read_text()
        assert "planted" not in text and "401 for token (not shown)" in text and "failed" in text


def test_no_report_and_a_broken_one_are_storage_errors(tmp_path):
    with pytest.raises(StorageError, match="no report"):
        record.read(tmp_path)
    (tmp_path / "report.json").write_text('{"status": "finished"}')
    with pytest.raises(StorageError) as caught:
        record.read(tmp_path)
    assert "status" in caught.value.found


def test_writing_leaves_no_partial_file(tmp_path):
    record.write(RunReport(status="running"), tmp_path)
    record.write(RunReport(status="done"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_an_output_dir_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="report cannot be written"):
        record.write(RunReport(status="done"), tmp_path / "file")


def test_an_error_of_this_package_keeps_its_parts_and_exit_code():
    error = pickle.loads(pickle.dumps(ClusterError("No GPUs", "2 nodes", "add one")))
    error.rank = 1
    failure = describe_failure(error)
    assert (failure.what, failure.found, failure.fix) == ("No GPUs", "2 nodes", "add one")
    assert (failure.exit_code, failure.kind, failure.rank) == (4, "ClusterError", 1)
    assert not failure.trace


def test_a_foreign_error_is_named_by_its_type_and_has_its_traceback():
    try:
        raise KeyError("loss")
    except KeyError as error:
        failure = describe_failure(error)
    assert failure.what == "KeyError: 'loss'" and failure.rank is None
    assert 'raise KeyError("loss")' in failure.trace


def test_a_plan_is_counted_by_class_and_reason():
    plan = Plan(
        "lora",
        {f"layers.{i}.up": Change("Linear", "LoraLinear") for i in range(4)},
        {"lm_head": "output layer", "norm": "no linear"},
        ("A note.",),
    )
    report = TransformReport.of(plan)
    assert (report.changed, report.skipped) == (4, 2)
    assert report.changed_by_class == {"Linear -> LoraLinear": 4}
    assert report.changed_modules == ("layers.[0-3].up",)
    assert report.skipped_modules == {"output layer": ("lm_head",), "no linear": ("norm",)}


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        ([f"a.{i}.b" for i in (0, 1, 2, 8)], ("a.[0-2,8].b",)),
        (["a.3.b"], ("a.3.b",)),
        ([f"l.{i}.e.{j}" for i in range(2) for j in range(3)], ("l.[0-1].e.[0-2]",)),
        (["l.0.e.1", "l.1.e.0"], ("l.0.e.1", "l.1.e.0")),
        (["w1", "w2"], ("w1", "w2")),
    ],
)
def test_names_are_folded_where_the_numbers_are_a_full_grid(names, folded):
    assert fold_names(names) == folded


def test_every_field_of_the_contract_has_its_sentence():
    lacking = [
        f"{kind.__name__}.{name}"
        for kind in Record.__subclasses__()
        for name in kind.model_fields
        if not kind.sentence(name).endswith(".")
    ]
    assert lacking == []


@pytest.mark.parametrize("error", [Stopped("The run was stopped"), KeyboardInterrupt()])
def test_a_clean_stop_has_an_exit_code_of_its_own(error):
    assert describe_failure(error).exit_code == 130
