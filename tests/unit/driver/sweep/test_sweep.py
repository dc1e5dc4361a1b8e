"""A sweep from the driver: room on the cluster, early stopping, its folder, its results."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from raytrain_adv.config import JobConfig, load
from raytrain_adv.driver.cluster.nodes import Node, Placement
from raytrain_adv.driver.output.replaced import Replaced
from raytrain_adv.driver.plan.text import sweep_view as view
from raytrain_adv.driver.sweep import sweep
from raytrain_adv.driver.sweep.asha import DelayAwareAsha, Rungs
from raytrain_adv.driver.sweep.results import Progress, Results
from raytrain_adv.driver.sweep.sweep import trials_at_once
from raytrain_adv.driver.training.job_message import JobMessage
from raytrain_adv.driver.watch.stop import (
    StopOnRequest,
    StoppedBySweep,
    clear_trial_stop,
    request_trial_stop,
)
from raytrain_adv.errors import ClusterError, JobError
from raytrain_adv.report import record, sweep_record
from raytrain_adv.report.parts import Failure
from raytrain_adv.report.record import RunReport
from raytrain_adv.report.sweep_html import render_text
from raytrain_adv.report.sweep_record import SweepReport
from raytrain_adv.tables import plain

SWEEP = {"learning_rate": [1e-3, 1e-2, 1e-1]}


@pytest.fixture
def swept(make_job: Callable[..., Any]) -> Callable[..., JobConfig]:
    """Load a job that sweeps over the learning rate."""

    def make(section: dict[str, Any] | None = None, **changed: Any) -> JobConfig:
        job: JobConfig = make_job(
            sweep=section or SWEEP, learning_rate=None, **{"val_size": 8, **changed}
        )
        return job

    return make


@pytest.fixture
def job_file(tmp_path: Path, keys: dict[str, Any]) -> Callable[..., Path]:
    """Write a job file with these keys changed; a key that is None is omitted."""

    def write(name: str = "job.yaml", **changed: Any) -> Path:
        path = tmp_path / name
        given = {k: v for k, v in {**keys, **changed}.items() if v is not None}
        path.write_text(yaml.safe_dump(given))
        return path

    return write


def read_sweep(folder: Path) -> SweepReport:
    return SweepReport.model_validate_json((folder / sweep_record.FILE_NAME).read_bytes())


def results_of(job: JobConfig) -> Results:
    assert job.sweep is not None
    replaced = Replaced(Path(job.output.output_dir), sweep.OURS, [], None)
    return Results(job, job.sweep, replaced, 0.0)


def leave(job: JobConfig, index: int, loss: float | None, **changed: Any) -> str:
    """Leave the report of a trial, as its run would; return its name."""
    assert job.sweep is not None
    trial = job.sweep.trials[index]
    losses = () if loss is None else ((6, loss),)
    done = RunReport(
        **{"status": "done", "steps": 6, "total_steps": 6, "eval_loss": losses, **changed}
    )
    record.write(done, trial.job.output.output_dir)
    return trial.name


def placement(workers: int, **bundle: float) -> Placement:
    return Placement(workers, bundle, "GPU" in bundle, "")


@pytest.mark.parametrize(
    ("nodes", "workers", "strategy", "at_once"),
    [
        ([8], 1, "PACK", 8),
        ([8], 4, "PACK", 2),
        ([8], 3, "PACK", 2),
        ([8, 8], 3, "PACK", 5),
        ([8, 8], 3, "STRICT_PACK", 4),
        ([8, 4], 2, "STRICT_SPREAD", 4),
        ([8, 2, 2], 2, "STRICT_SPREAD", 4),
        ([8], 8, "PACK", 1),
    ],
)
def test_as_many_trials_run_as_fit_completely(
    nodes: list[int], workers: int, strategy: str, at_once: int
) -> None:
    there = [Node(f"n{i}", {"GPU": float(gpus)}) for i, gpus in enumerate(nodes)]
    assert trials_at_once(there, placement(workers, GPU=1.0), strategy) == at_once


def test_nodes_of_one_kind_are_counted_as_often_as_there_are() -> None:
    there = [Node("autoscaled gpus", {"GPU": 8.0}, count=3)]
    assert trials_at_once(there, placement(8, GPU=1.0), "PACK") == 3


def test_a_trial_is_not_judged_before_its_own_switch() -> None:
    """However bad its value: before its switch it was another model."""
    rungs = Rungs(10, 2, 1000, {"late": 200})
    for step in range(10, 210, 10):
        assert rungs.judge("early", step, 1.0) is None
        assert rungs.judge("late", step, 99.0) is None
    assert rungs.first_judged("late") == 210
    assert rungs.judge("early", 320, 1.0) is None
    assert "at step 320" in str(rungs.judge("late", 320, 99.0))


def test_a_trial_is_not_compared_at_a_rung_before_its_switch() -> None:
    """An evaluation after the switch does not count at a rung before it."""
    rungs = Rungs(10, 4, 1000, {"late": 35})
    rungs.judge("late", 50, 1.0)
    assert all("late" not in at_rung for at_rung in rungs.values.values())
    assert rungs.judge("other", 40, 5.0) is None


def test_the_best_continue_and_the_rest_are_stopped() -> None:
    rungs = Rungs(10, 3, 100, {})
    assert [rungs.judge(f"t{n}", 10, float(n)) for n in (3, 2, 1)] == [None] * 3
    assert rungs.judge("t4", 10, 4.0) is not None


def test_a_trial_that_repeats_steps_is_compared_once_at_a_rung() -> None:
    rungs = Rungs(10, 3, 100, {})
    rungs.judge("good", 10, 1.0)
    rungs.judge("restarted", 30, 0.5)
    assert rungs.judge("restarted", 20, 9.0) is None
    assert rungs.judge("restarted", 30, 9.0) is None


def test_a_stopped_trial_is_not_judged_again() -> None:
    rungs = Rungs(10, 3, 100, {})
    rungs.judge("good", 10, 1.0)
    assert rungs.judge("bad", 10, 2.0) is not None
    assert rungs.judge("bad", 30, 0.1) is None
    assert "bad" not in rungs.values[30]


def test_a_loss_that_is_not_finite_is_the_worst() -> None:
    rungs = Rungs(10, 3, 100, {})
    assert rungs.judge("first", 10, math.nan) is None
    assert rungs.judge("second", 10, 8.0) is None
    assert rungs.judge("third", 10, None) is not None


def test_the_reference_without_quantization_is_neither_judged_nor_compared_with() -> None:
    rungs = Rungs(10, 3, 100, {}, frozenset(["never"]))
    rungs.judge("never", 10, 0.0)
    assert rungs.judge("a", 10, 5.0) is None
    assert rungs.judge("never", 30, 99.0) is None


def test_no_rung_lies_at_the_end_of_the_run() -> None:
    assert list(Rungs(10, 3, 90, {}).values) == [10, 30]


def test_the_scheduler_requests_a_stop_and_lets_the_trials_process_end_itself() -> None:
    stopped: list[tuple[str, int]] = []
    rungs = Rungs(10, 3, 100, {})
    asha = DelayAwareAsha(rungs, lambda name, step, reason: stopped.append((name, step)))

    class Trial:
        def __init__(self, name: str) -> None:
            self.config = {"trial": name}

    good, bad = Trial("good"), Trial("bad")
    for trial, value in ((good, 1.0), (bad, 2.0)):
        answer = asha.on_trial_result(None, trial, {"step": 12, "value": value})
        assert answer == "CONTINUE"
    assert asha.on_trial_result(None, bad, {"ended": True}) == "CONTINUE"
    assert stopped == [("bad", 12)]


def test_the_first_rung_is_a_tenth_of_the_longest_trial(swept: Callable[..., JobConfig]) -> None:
    section = {**SWEEP, "scheduler": "asha"}
    job = swept(section, eval_strategy="steps", eval_steps=2)
    assert job.sweep is not None
    assert list(sweep.rungs_of(job.sweep, 300, "eval").values) == [30, 90, 270]


def test_a_delay_beyond_the_last_epoch_is_refused_before_a_trial_is_run(
    swept: Callable[..., JobConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "prepare", lambda job, say: SimpleNamespace(train=range(10)))
    room: Any = SimpleNamespace(placement=placement(1, CPU=1))
    keys = {"enable_qat": True, "max_steps": -1, "num_train_epochs": 2.0}
    job = swept({"fake_quant_after_n_steps": [0, 9, 40]}, **keys)
    assert job.sweep is not None
    with pytest.raises(JobError) as caught:
        sweep._prepare_data(job.sweep.trials, room)
    assert "trial fake_quant_after_n_steps=40: " in caught.value.found
    assert sweep._prepare_data(job.sweep.trials[:2], room) > 9


def test_a_run_ends_at_its_next_report_after_a_stop_request(tmp_path: Path) -> None:
    callback = StopOnRequest(tmp_path)
    callback.after_report(None, [{}], None)
    request_trial_stop(tmp_path, "stopped", "it fell behind", "wait")
    with pytest.raises(StoppedBySweep, match="it fell behind"):
        callback.after_report(None, [{}], None)
    clear_trial_stop(tmp_path)
    callback.after_report(None, [{}], None)


@pytest.mark.parametrize(
    ("last", "is_stopped"),
    [
        ({"kind": "train", "step": 19}, True),
        ({"kind": "train", "step": 20}, False),
        ({"kind": "event", "event": "early_stop", "step": 10}, False),
    ],
)
def test_a_trial_that_has_done_its_steps_is_not_stopped(
    tmp_path: Path, last: dict[str, Any], is_stopped: bool
) -> None:
    plan = {"kind": "event", "event": "plan", "total_steps": 20}
    rows = [plan, {"kind": "train", "step": 10}, last]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    request_trial_stop(tmp_path, "stopped", "it fell behind", "wait")
    expected = pytest.raises(StoppedBySweep) if is_stopped else contextlib.nullcontext()
    with expected:
        StopOnRequest(tmp_path).after_report(None, [{}], None)


def test_a_stopped_trial_has_the_failure_kind_of_its_report() -> None:
    assert record.describe_failure(StoppedBySweep("x")).kind == sweep_record.STOPPED


def test_the_best_job_is_ready_to_run(swept: Callable[..., JobConfig], tmp_path: Path) -> None:
    job = swept(overwrite_output_dir=True, ray_run_name="mine")
    results = results_of(job)
    for index, loss in enumerate((3.0, 2.0, None)):
        results.ended(leave(job, index, loss), None)
    results.finish()
    assert results.best is not None and results.best.name == "learning_rate=0.01"
    best = load(tmp_path / "out" / "best_job.yaml")
    assert best.sweep is None and best.train.learning_rate == 1e-2
    assert best.output.output_dir == str(tmp_path / "out" / "best")
    assert best.output.overwrite_output_dir is True and best.ray.ray_run_name == "mine"
    assert best.fingerprint() == job.sweep.trials[1].job.fingerprint()  # type: ignore[union-attr]


BEST_KEPT = {
    "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2,
    "save_strategy": "steps",
}  # fmt: skip


def test_trials_are_compared_by_the_loss_of_the_model_that_each_exports(
    swept: Callable[..., JobConfig], tmp_path: Path
) -> None:
    job = swept(**BEST_KEPT)
    results = results_of(job)
    curves = {0: ((2, 3.0), (4, 2.5)), 1: ((2, 1.0), (4, 9.0)), 2: ((2, 2.0), (4, 2.0))}
    for index, curve in curves.items():
        best = min(curve, key=lambda point: point[1])[0]
        results.ended(leave(job, index, None, eval_loss=curve, best_step=best), None)
    results.finish()
    found = read_sweep(tmp_path / "out")
    assert found.best == "learning_rate=0.01"
    assert [t.metric for t in found.trials] == [2.5, 1.0, 2.0]
    assert [t.eval_loss for t in found.trials] == [2.5, 9.0, 2.0]
    by = "eval_loss of the model that each exports (load_best_model_at_end)"
    assert found.notes[-1] == f"Trials are compared by {by}."
    assert job.sweep is not None and by in plain(view(job.sweep))
    shown = render_text(found)
    assert "eval loss as exported" in shown and "9.0000" in shown


def test_a_training_loss_is_that_of_the_exported_step(swept: Callable[..., JobConfig]) -> None:
    job = swept({**SWEEP, "metric": "train_loss"}, **BEST_KEPT)
    losses = {"train_loss": ((1, 5.0), (3, 4.0), (5, 1.0)), "eval_loss": ((4, 2.0), (6, 3.0))}
    results = results_of(job)
    results.ended(leave(job, 0, None, best_step=4, **losses), None)
    assert results.report.trials[0].metric == 4.0 and results.report.trials[0].train_loss == 1.0


def test_without_a_best_model_trials_are_compared_by_their_last(
    swept: Callable[..., JobConfig], tmp_path: Path
) -> None:
    job = swept()
    results = results_of(job)
    results.ended(leave(job, 0, None, eval_loss=((2, 1.0), (6, 3.0))), None)
    results.finish()
    found = read_sweep(tmp_path / "out")
    assert found.trials[0].metric == 3.0 and found.notes == job.notes
    assert "as exported" not in render_text(found)


def test_asha_compares_trials_that_export_their_best_by_that(
    swept: Callable[..., JobConfig],
) -> None:
    job = swept({**SWEEP, "scheduler": "asha", "grace_steps": 4}, **BEST_KEPT)
    assert job.sweep is not None
    first, second = (trial.name for trial in job.sweep.trials[:2])
    for kind, is_stopped in (("eval", False), ("train", True)):
        rungs = sweep.rungs_of(job.sweep, 100, kind)
        assert rungs.judge(first, 4, 2.0) is None
        assert rungs.judge(second, 0, 0.5) is None  # before the first step: never exported
        assert rungs.judge(second, 2, 1.0) is None
        assert (rungs.judge(second, 4, 3.0) is not None) == is_stopped
        assert rungs.values[4][second] == (3.0 if is_stopped else 1.0)


def test_how_trials_end_is_in_the_table(swept: Callable[..., JobConfig], tmp_path: Path) -> None:
    job = swept()
    results = results_of(job)
    results.ended(leave(job, 0, 3.0), None)
    failure = Failure(kind=sweep_record.STOPPED, what="The sweep stopped it", exit_code=3)
    stopped = leave(job, 1, 2.0, status="failed", error="The sweep stopped it", failure=failure)
    results.ended(stopped, None)
    dead = leave(job, 2, None, status="running")
    results.started(dead)
    results.ended(dead, RuntimeError("The actor died\nout of memory"))
    results.finish()
    found = read_sweep(tmp_path / "out")
    assert [t.status for t in found.trials] == ["done", "stopped", "failed"]
    assert [t.metric for t in found.trials] == [3.0, None, None]
    assert found.trials[2].error == "out of memory"
    assert found.best == "learning_rate=0.001" and found.status == "done"


def test_keep_models_best_keeps_one_model_and_every_report(
    swept: Callable[..., JobConfig], tmp_path: Path
) -> None:
    job = swept({**SWEEP, "keep_models": "best"})
    assert job.sweep is not None
    results = results_of(job)
    for index, loss in enumerate((3.0, 2.0, 2.5)):
        folder = Path(job.sweep.trials[index].job.output.output_dir)
        for made in ("model", "model-base", "model-quantized", "checkpoints/run_001"):
            (folder / made).mkdir(parents=True)
        results.ended(leave(job, index, loss, model_dir=str(folder / "model")), None)
    kept = [path.parent.name for path in (tmp_path / "out").glob("trials/*/model*")]
    assert kept == ["learning_rate=0.01"] * 3
    assert len(list((tmp_path / "out").glob("trials/*/report.json"))) == 3
    assert [t.model_dir is None for t in results.report.trials] == [True, False, True]
    assert results_of(job).report.trial("learning_rate=0.1").model_dir is None


def test_a_trial_without_a_finite_value_has_failed(swept: Callable[..., JobConfig]) -> None:
    job = swept()
    results = results_of(job)
    for index in range(3):
        results.ended(leave(job, index, math.nan), None)
    results.finish()
    assert results.best is None
    error = sweep.no_success(results.report)
    assert str(error).count("without a finite value of eval_loss") == 3
    assert error.exit_code == 3


def test_only_trials_that_ended_are_not_run_again(swept: Callable[..., JobConfig]) -> None:
    early = {"eval_strategy": "steps", "eval_steps": 2, "resume_from_checkpoint": True}
    job = swept({**SWEEP, "scheduler": "asha"}, **early)
    failure = Failure(kind=sweep_record.STOPPED, what="The sweep stopped it", exit_code=3)
    names = [
        leave(job, 0, 3.0),
        leave(job, 1, 2.0, status="failed", error="x", failure=failure),
        leave(job, 2, None, status="running"),
    ]
    results = results_of(job)
    assert [results.has_ended(name) for name in names] == [True, True, False]
    assert results.report.trial(names[2]).status == "waiting"
    to_their_end = results_of(swept(**early))
    assert [to_their_end.has_ended(name) for name in names] == [True, False, False]


def test_a_folder_with_a_sweep_is_refused_unless_the_job_resumes_or_overwrites_it(
    swept: Callable[..., JobConfig], tmp_path: Path
) -> None:
    job, folder = swept(), tmp_path / "out"
    leave(job, 0, 3.0)
    with pytest.raises(JobError, match="resume_from_checkpoint: true"):
        sweep.open_folder(job, folder)
    sweep.open_folder(swept(resume_from_checkpoint=True), folder)
    assert (folder / "trials" / "learning_rate=0.001").exists()


@pytest.mark.parametrize("deletes", [False, True])
def test_overwriting_keeps_or_deletes_a_sweep_when_trials_begin_and_not_before(
    deletes: bool,
    swept: Callable[..., JobConfig],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "out"
    results_of(swept()).ended(leave(swept(), 0, 3.0), None)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {"sweep.json", "report.json"} <= {path.name for path in before}
    again = swept(overwrite_output_dir=True, delete_previous_run=deletes)
    replaced = sweep.open_folder(again, folder)
    results = Results(again, again.sweep, replaced, 0.0)  # type: ignore[arg-type]
    assert not any(results.has_ended(trial.name) for trial in again.sweep.trials)  # type: ignore[union-attr]
    results.fail(ClusterError("no node has a GPU"))
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert " is unchanged: " in capsys.readouterr().out
    results.begin(1)
    assert ("deleted what" if deletes else "moved the earlier run") in capsys.readouterr().out
    left = {"sweep.json", "sweep.html"} | (set() if deletes else {"previous"})
    assert {path.name for path in folder.iterdir()} == left
    if not deletes:
        kept = folder / "previous" / "1"
        moved = {kept / path.relative_to(folder): data for path, data in before.items()}
        assert {path: path.read_bytes() for path in moved} == moved
    assert read_sweep(folder).status == "running"


def test_no_trial_runs_once_its_sweep_has_failed(
    swept: Callable[..., JobConfig], tmp_path: Path
) -> None:
    """A later launch continues it; what has ended stays as it is."""
    job = swept()
    results = results_of(job)
    results.begin(2)
    ended, running, *_ = (trial.name for trial in job.sweep.trials)  # type: ignore[union-attr]
    results.started(ended)
    results.ended(leave(job, 0, 3.0), None)
    results.started(running)
    leave(job, 1, None, status="running")
    results.fail(ClusterError("Ray's head is gone"))
    found = read_sweep(tmp_path / "out")
    assert found.status == "failed" and found.trial(ended).status == "done"
    assert found.trial(running).status == "waiting"


def test_a_sweep_in_which_no_trial_began_can_be_replaced(
    swept: Callable[..., JobConfig], tmp_path: Path
) -> None:
    job, folder = swept(), tmp_path / "out"
    folder.mkdir()
    results_of(job).fail(ClusterError("Ray cannot be started here"))
    assert {path.name for path in folder.iterdir()} == {"sweep.json", "sweep.html"}
    sweep.open_folder(job, folder)
    sweep.open_folder(swept({"learning_rate": [1e-4, 1e-3]}), folder)
    leave(job, 1, None, status="failed")
    with pytest.raises(JobError, match="output_dir holds a sweep already"):
        sweep.open_folder(job, folder)


def test_a_sweep_with_other_fixed_keys_is_not_continued(
    swept: Callable[..., JobConfig], tmp_path: Path
) -> None:
    job = swept()
    assert job.sweep is not None
    trial = job.sweep.trials[1].job
    run = {"fingerprint": trial.fingerprint(), "job": trial.flat()}
    folder = Path(trial.output.output_dir)
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(run))
    sweep.open_folder(swept(resume_from_checkpoint=True), tmp_path / "out")
    more = {"learning_rate": [1e-1, 1e-2, 1.0]}
    sweep.open_folder(swept(more, resume_from_checkpoint=True), tmp_path / "out")
    with pytest.raises(JobError, match=r"weight_decay: 0\.0 then, 0\.5 now"):
        sweep.open_folder(swept(resume_from_checkpoint=True, weight_decay=0.5), tmp_path / "out")


def test_a_folder_with_a_single_run_is_refused_for_a_sweep(
    swept: Callable[..., JobConfig], tmp_path: Path
) -> None:
    record.write(RunReport(status="done"), tmp_path / "out")
    for changed in ({}, {"resume_from_checkpoint": True}, {"overwrite_output_dir": True}):
        with pytest.raises(JobError, match="a single run"):
            sweep.open_folder(swept(**changed), tmp_path / "out")


def test_the_plan_shows_every_trial(swept: Callable[..., JobConfig]) -> None:
    job = swept()
    assert job.sweep is not None
    shown = plain(view(job.sweep))
    assert "3 trials, the lowest eval_loss is the best" in shown
    assert [line.strip() for line in shown.splitlines()[2:5]] == ["0.001", "0.01", "0.1"]


def test_a_trial_s_line_has_step_loss_and_time_left_without_evaluations() -> None:
    from raytrain_adv.driver.sweep.results import describe_result
    from raytrain_adv.driver.sweep.trial import where_it_is
    from raytrain_adv.driver.training.console import Progress

    progress = Progress()
    progress.take({"kind": "event", "event": "phase", "message": "model"})
    assert describe_result(where_it_is(progress)) == "step 0, model"
    progress.take({"kind": "event", "event": "plan", "total_steps": 200})
    progress.take({"kind": "event", "event": "phase", "message": "training"})
    for step, at in ((10, 100.0), (20, 110.0)):
        progress.take({"kind": "train", "step": step, "loss": 2.5, "time": at, "step_s": 1.0})
    assert describe_result(where_it_is(progress)) == "step 20 of 200, loss 2.5000, 3:00 left"
    assert describe_result({"step": 20, "value": None, "total_steps": 200}).endswith("loss -")
    assert describe_result({"ended": True}) == ""


def test_a_submitted_sweep_has_counts_the_best_and_the_running_trials_as_its_message(
    swept: Callable[..., JobConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(JobMessage, "tell", lambda self, message: told.append(message))
    job = swept()
    found = results_of(job)
    progress = Progress(found, 3)
    first, second, third = (
        SimpleNamespace(config={"trial": t.name}, get_error=lambda: RuntimeError("it died"))
        for t in job.sweep.trials  # type: ignore[union-attr]
    )
    progress.on_trial_start(trial=first)
    progress.on_trial_result(trial=first, result={"step": 5, "total_steps": 9, "loss": 2.5})
    name = first.config["trial"]
    assert told[-1] == f"0 of 3 trials ended; {name}: step 5 of 9, loss 2.5000"
    leave(job, 0, 1.5)
    progress.on_trial_complete(trial=first)
    progress.on_trial_start(trial=second)
    best = f"best eval_loss 1.5000 ({name})"
    assert told[-1] == f"1 of 3 trials ended, {best}; {second.config['trial']}: started"
    progress.on_trial_error(trial=second)
    progress.on_trial_start(trial=third)
    assert told[-1].startswith(f"2 of 3 trials ended, 1 failed, {best}; {third.config['trial']}")
