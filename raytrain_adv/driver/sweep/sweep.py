"""A sweep, seen from the driver: its folder, the cluster, trials under Ray Tune, the comparison."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import ray
from ray import tune

from raytrain_adv import text
from raytrain_adv.config.job import JobConfig
from raytrain_adv.config.sweep import NEVER, SWITCH, Sweep, Trial
from raytrain_adv.data.prepare import prepare
from raytrain_adv.driver.cluster import connect
from raytrain_adv.driver.output import output_dir
from raytrain_adv.driver.output.replace import Replaced
from raytrain_adv.driver.preflight import table
from raytrain_adv.driver.preflight.probe import Read, read_nodes
from raytrain_adv.driver.sweep import capacity
from raytrain_adv.driver.sweep.asha import DelayAwareAsha, Rungs
from raytrain_adv.driver.sweep.capacity import Room
from raytrain_adv.driver.sweep.progress import Progress
from raytrain_adv.driver.sweep.results import Results
from raytrain_adv.driver.sweep.trial import run_trial
from raytrain_adv.driver.training.failures import stopped
from raytrain_adv.driver.watch import head
from raytrain_adv.driver.watch.head import HeadWatch
from raytrain_adv.driver.watch.stop import tell
from raytrain_adv.errors import JobError, RaytrainAdvError, StorageError, TrainingError
from raytrain_adv.report.sweep_record import SweepReport
from raytrain_adv.report.sweep_table import render
from raytrain_adv.run.schedule import resolve_arithmetic
from raytrain_adv.storage import metrics_file
from raytrain_adv.storage.storage import Storage
from raytrain_adv.transforms.applied import Transforms

TRIALS = "trials"
OURS = (TRIALS, output_dir.SWEEP_FILE, "sweep.html", "best_job.yaml")
DRIVER_SHARE = 0.001
"""Of its node's own resource, which a trial's driver holds so as to be where the sweep is; it
reserves no CPU, so that trials cannot wait for each other's."""
# Tune's own messages, files and signal handler, in whose place stand this package's.
TUNE_SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def run(job: JobConfig, read: Read = read_nodes) -> None:
    """Run every trial of the job's sweep, and compare them.

    Args:
        job: the loaded job, with its sweep.
        read: says what the cluster's nodes are.

    Raises:
        RaytrainAdvError: in the house form; also when no trial succeeded.
    """
    folder = Path(job.output.output_dir)
    with output_dir.held(folder):
        results = Results(job, _swept(job), open_folder(job, folder))
        try:
            _run_trials(job, results, read)
            results.finish()
            if results.best is None:
                raise no_success(results.report)
        except BaseException as error:  # also Ctrl-C, and the SystemExit that Ray makes of SIGTERM
            shown = stopped(error) if isinstance(error, SystemExit) else error
            try:
                results.fail(shown)
            except StorageError as unwritten:  # beside what ended the sweep, not in its place
                print(f"\n{unwritten}")
            if results.report.finished_at is not None and any(
                t.status != "waiting" for t in results.report.trials
            ):
                print(f"\n{render(results.report)}")
            raise shown from error.__cause__
        print(f"\n{render(results.report)}")


def no_success(report: SweepReport) -> TrainingError:
    """Return the error of a sweep without a trial to call the best, with each trial's own."""
    lines = []
    for trial in report.trials:
        what, *more = (trial.error or "it has not run").splitlines()
        lines += [f"{trial.name} ({trial.status}): {what}", *(f"  {line.strip()}" for line in more)]
    return TrainingError(
        "No trial of the sweep succeeded",
        "\n".join(lines),
        "mend what the trials' errors name; then run again with resume_from_checkpoint: true, or "
        "overwrite_output_dir: true where keys have changed",
    )


def _swept(job: JobConfig) -> Sweep:
    if job.sweep is None:
        raise JobError("The job has no sweep section", job.source, "write sweep: into it")
    return job.sweep


def open_folder(job: JobConfig, folder: Path) -> Replaced:
    """Begin a folder, or go on with it; return what is to be deleted before trials are run.

    Raises:
        JobError: when it holds something that the job does not say what is to become of.
    """
    resume = job.output.resume_from_checkpoint is True
    trials = _swept(job).trials
    storages = [Storage.at(output_dir.storage_path(trial.job)) for trial in trials]
    replaced = Replaced(folder, OURS, storages, is_there=False)
    there = [name for name in output_dir.OURS if (folder / name).exists()]
    if there:
        raise JobError(
            "output_dir holds a single run, not a sweep",
            f"{folder}: {', '.join(there)}",
            "choose another output_dir",
        )
    there = [name for name in OURS if (folder / name).exists()]
    if job.output.overwrite_output_dir and not resume:
        for trial, storage in zip(trials, storages, strict=True):
            own = Path(trial.job.output.output_dir)
            output_dir.refuse_anothers(storage, own, has_run=output_dir.record_of(own) is not None)
            output_dir.refuse_to_delete_what_is_read(trial.job, replaced)
        replaced.is_there = bool(there) or any(storage.folders() for storage in storages)
        return replaced
    if there and not resume and _has_begun(folder):
        raise JobError(
            "output_dir holds a sweep already",
            f"{folder}: {', '.join(there)}",
            "set resume_from_checkpoint: true to go on with it, choose another output_dir, or set "
            "overwrite_output_dir: true to start anew (its trials are deleted)",
        )
    _refuse_other_jobs(trials)
    return replaced


def _has_begun(folder: Path) -> bool:
    """Whether a trial of the sweep that is there has left something. One whose Ray did not start
    has not, and is not in the way.
    """
    found = Storage.at(str(folder)).read_json(output_dir.SWEEP_FILE)
    waits = found is not None and found.get("best_job") is None
    return not waits or any((folder / TRIALS).glob("*/*"))


def _refuse_other_jobs(trials: Sequence[Trial]) -> None:
    """Raise where a trial's folder holds the run of a job with other keys outside of the sweep."""
    for trial in trials:
        folder = trial.job.output.output_dir
        record = Storage.at(folder).read_json(output_dir.RUN_FILE)
        if record is not None and record["fingerprint"] != trial.job.fingerprint():
            raise JobError(
                "output_dir holds a sweep of a job with other settings",
                "\n".join([folder, *trial.job.differences(record["job"])]),
                "restore these keys to go on with it, choose another output_dir, or set "
                "overwrite_output_dir: true to start anew (its trials are deleted)",
            )


def _run_trials(job: JobConfig, results: Results, read: Read) -> None:
    sweep = _swept(job)
    todo = [t for t in sweep.trials if not results.has_ended(t.name)]
    kept = len(sweep.trials) - len(todo)
    number = text.plural(len(sweep.trials), "trial")
    print(f"{number} that differ in {', '.join(sweep.keys)}, compared by {sweep.metric}")
    for note in job.notes:
        print(note)
    if kept:
        print(f"{kept} of them have ended before and are not run again")
    if not todo:
        return
    started_here = connect.connect(job)
    print("Ray started on this machine" if started_here else "joined Ray")
    print(f"dashboard: {connect.dashboard() or 'none (Ray was started without one)'}")
    with HeadWatch(head.address(), results.fail).watching():
        room = capacity.look_at(todo, started_here, read)
        print(table.render(room.found))
        total_steps = _prepare_data(todo, room)
        at_once = _at_once(sweep, room, len(todo))
        results.begin(at_once)
        print(f"{room.placement.note} for a trial; {at_once} at a time", flush=True)
        _tune(sweep, todo, at_once, total_steps, results)


def _prepare_data(trials: Sequence[Trial], room: Room) -> int:
    """Tokenize, once each, the data that trials share; return the steps of the longest trial.

    Raises:
        JobError: when a trial's keys do not fit its number of steps: nothing has been run yet.
    """
    num_sequences: dict[str, int] = {}
    steps: dict[str, int] = {}
    for trial in trials:
        job = trial.job
        key = f"{job.data.model_dump()} {job.model.model_dump()}"
        asked = job.ray.ray_num_workers
        workers = asked if isinstance(asked, int) else room.placement.num_workers
        try:
            if key not in num_sequences:
                num_sequences[key] = len(prepare(job, _say).train)
            steps[trial.name] = resolve_arithmetic(job, num_sequences[key], workers).total_steps
        except RaytrainAdvError as error:  # it is the trial's own: it will end in it, and say so
            _say(f"{trial.name}: {error.what}")
    for trial in trials:
        if trial.name in steps:
            _check_length(trial, steps[trial.name])
    return max(steps.values(), default=0)


def _check_length(trial: Trial, total_steps: int) -> None:
    try:
        Transforms(trial.job).check_length(total_steps)
    except JobError as error:
        raise JobError(error.what, f"trial {trial.name}: {error.found}", error.fix) from error


def _say(sentence: str) -> None:
    print(sentence, flush=True)


def _at_once(sweep: Sweep, room: Room, num_trials: int) -> int:
    asked = sweep.options.max_concurrent_trials
    if asked == "auto":
        return min(room.at_once, num_trials)
    if asked > room.at_once:
        print(f"max_concurrent_trials: {asked}, but there is room for {room.at_once} at a time")
    return min(asked, room.at_once, num_trials)


def _tune(
    sweep: Sweep, trials: Sequence[Trial], at_once: int, total_steps: int, results: Results
) -> None:
    for name, value in TUNE_SETTINGS.items():
        os.environ.setdefault(name, value)
    jobs = {t.name: t.job for t in trials}
    row = "train" if sweep.metric == "train_loss" else "eval"
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, jobs=jobs, cwd=os.getcwd(), row=row),
        {f"node:{ray.util.get_node_ip_address()}": DRIVER_SHARE},
    )
    # What Tune writes is needed by nobody: each trial's own folder says how far it is.
    with tempfile.TemporaryDirectory(prefix="raytrain_adv_sweep_") as scratch:
        tune.Tuner(
            trainable,
            param_space={"trial": tune.grid_search(list(jobs))},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=at_once,
                scheduler=_scheduler(sweep, total_steps, results),
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=scratch,
                callbacks=[Progress(results, len(trials))],
                failure_config=tune.FailureConfig(max_failures=0),
                verbose=0,
            ),
        ).fit()


def _scheduler(sweep: Sweep, total_steps: int, results: Results) -> DelayAwareAsha | None:
    if sweep.options.scheduler == "none":
        return None
    rungs = rungs_of(sweep, total_steps)
    for trial in sweep.trials:  # what was run before is compared with too
        if results.has_ended(trial.name):
            for row in metrics_file.read(Path(trial.job.output.output_dir) / "metrics.jsonl"):
                if row["kind"] == ("train" if sweep.metric == "train_loss" else "eval"):
                    rungs.judge(trial.name, row["step"], row.get("loss"))
    folders = {t.name: Path(t.job.output.output_dir) for t in sweep.trials}

    def stop(name: str, step: int, reason: str) -> None:
        tell(
            folders[name],
            "The sweep stopped this trial early: it had fallen behind the others",
            f"{'training' if sweep.metric == 'train_loss' else 'held-out'} {reason} (asha)",
            "scheduler: none runs every trial to its end; grace_steps gives each more time",
        )

    return DelayAwareAsha(rungs, stop)


def rungs_of(sweep: Sweep, total_steps: int) -> Rungs:
    """Return the steps at which asha compares a sweep's trials."""
    grace = sweep.options.grace_steps or math.ceil(total_steps / 10)
    switches = {t.name: t.job.flat().get(SWITCH) for t in sweep.trials}
    return Rungs(
        grace,
        sweep.options.reduction_factor,
        total_steps,
        {name: step for name, step in switches.items() if isinstance(step, int)},
        frozenset(name for name, step in switches.items() if step == NEVER),
    )
