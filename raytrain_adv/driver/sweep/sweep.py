"""A sweep on the driver: its folder, the cluster, trials under Ray Tune, the comparison."""

import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import ray
from ray import tune
from ray.exceptions import OutOfMemoryError

from raytrain_adv.config.job import JobConfig
from raytrain_adv.config.sweep import NEVER, SWITCH, Sweep, Trial
from raytrain_adv.data.prepare import prepare
from raytrain_adv.driver.cluster import connect
from raytrain_adv.driver.cluster.nodes import Node, Placement, resolve_placement
from raytrain_adv.driver.output import output_dir
from raytrain_adv.driver.output.replaced import RUN_FILE, Replaced
from raytrain_adv.driver.preflight import table, verdicts
from raytrain_adv.driver.preflight.probe import Read, read_nodes
from raytrain_adv.driver.preflight.verdicts import Preflight
from raytrain_adv.driver.sweep.asha import DelayAwareAsha, Rungs
from raytrain_adv.driver.sweep.results import Progress, Results
from raytrain_adv.driver.sweep.trial import run_trial
from raytrain_adv.driver.training.failures import memory_found
from raytrain_adv.driver.watch.nodes import HeadWatch, head_address, watching_start
from raytrain_adv.driver.watch.stop import request_trial_stop
from raytrain_adv.errors import (
    ClusterError,
    JobError,
    RaytrainAdvError,
    StorageError,
    TrainingError,
    stop_error,
)
from raytrain_adv.report.sweep_html import render_text as render
from raytrain_adv.report.sweep_record import SweepReport, ranked_by
from raytrain_adv.run.schedule import resolve_arithmetic
from raytrain_adv.storage import metrics_file
from raytrain_adv.storage.storage import Storage
from raytrain_adv.text import plural
from raytrain_adv.transforms.applied import Transforms

TRIALS = "trials"
OR_ELSE = (
    "choose another output_dir, or set overwrite_output_dir: true to start again (its trials are "
    "kept in output_dir/previous)"
)
OURS = (TRIALS, output_dir.SWEEP_FILE, "sweep.html", "best_job.yaml")
DRIVER_SHARE = 0.001
"""Share of its node's own resource that a trial's driver reserves, to run where the sweep does. It
reserves no CPU, so that trials cannot wait for each other's."""
# Turn off Tune's own messages, files and signal handler; this package has its own.
TUNE_SETTINGS = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def run(job: JobConfig, read: Read = read_nodes, began: float | None = None) -> None:
    """Run the sweep's trials and compare them. Raises RaytrainAdvError, also if none succeeded.
    `began` is when the command did, in unix seconds; now if none.
    """
    folder = Path(job.output.output_dir)
    with output_dir.held(folder):
        results = Results(job, _sweep(job), open_folder(job, folder), began or time.time())
        try:
            _run_trials(job, results, read)
            results.finish()
            if results.best is None:
                raise no_success(results.report)
        except BaseException as error:  # noqa: BLE001 # also Ctrl-C, Ray's SystemExit on SIGTERM
            shown = stop_error() if isinstance(error, SystemExit) else error
            try:
                results.fail(shown)
            except StorageError as unwritten:  # reported in addition to what ended the sweep
                print(f"\n{unwritten}")
            has_begun = any(t.status != "waiting" for t in results.report.trials)
            if results.report.finished_at is not None and has_begun:
                print(f"\n{render(results.report)}")
            raise shown from error.__cause__
        print(f"\n{render(results.report)}")


def no_success(report: SweepReport) -> TrainingError:
    """Return the error of a sweep in which no trial succeeded, with each trial's own."""
    lines = []
    for trial in report.trials:
        what, *more = (trial.error or "it has not run").splitlines()
        lines += [f"{trial.name} ({trial.status}): {what}", *(f"  {line.strip()}" for line in more)]
    return TrainingError(
        "No trial of the sweep succeeded",
        "\n".join(lines),
        "fix the trials' errors; then run again with resume_from_checkpoint: true, or with "
        "overwrite_output_dir: true if keys have changed",
    )


def _sweep(job: JobConfig) -> Sweep:
    if job.sweep is None:
        raise JobError("The job has no sweep section", job.source, "add a sweep: section")
    return job.sweep


def open_folder(job: JobConfig, folder: Path) -> Replaced:
    """Begin or continue a sweep's folder; return what a start replaces. Raises JobError."""
    resume = job.output.resume_from_checkpoint is True
    trials = _sweep(job).trials
    storages = [Storage.at(output_dir.storage_path(trial.job)) for trial in trials]
    replaced = Replaced(folder, OURS, storages, job.ray.ray_storage_path)
    replaced.deletes = job.output.delete_previous_run
    there = [name for name in OURS if (folder / name).exists()]
    if run := output_dir.left_in(folder):
        raise JobError(
            "output_dir holds a single run, not a sweep",
            f"{folder}: {', '.join(run)}",
            "choose another output_dir",
        )
    sweep = Storage.at(str(folder)).read_json(output_dir.SWEEP_FILE)
    if job.output.overwrite_output_dir and not resume:
        for trial, storage in zip(trials, storages, strict=True):
            own = Path(trial.job.output.output_dir)
            output_dir.refuse_anothers(storage, own, has_run=output_dir.record_of(own) is not None)
            output_dir.refuse_to_replace_what_is_read(trial.job, replaced)
        replaced.is_there = bool(there) or any(storage.folders() for storage in storages)
        if replaced.is_there:
            output_dir.describe_replacement(replaced, owned=sweep is not None)
        return replaced
    # If Ray did not start, no trial has written something, and the folder can be used again.
    has_results = sweep is None or sweep.get("best_job") is not None
    if there and not resume and (has_results or any((folder / TRIALS).glob("*/*"))):
        raise JobError(
            "output_dir holds a sweep already",
            f"{folder}: {', '.join(there)}",
            f"set resume_from_checkpoint: true to continue it, {OR_ELSE}",
        )
    _refuse_other_jobs(trials)
    return replaced


def _refuse_other_jobs(trials: Sequence[Trial]) -> None:
    for trial in trials:
        folder = trial.job.output.output_dir
        record = Storage.at(folder).read_json(RUN_FILE)
        if record is not None and record["fingerprint"] != trial.job.fingerprint():
            raise JobError(
                "output_dir holds a sweep of a job with other settings",
                "\n".join([folder, *trial.job.differences(record["job"])]),
                f"restore these keys to continue it, {OR_ELSE}",
            )


def _run_trials(job: JobConfig, results: Results, read: Read) -> None:
    sweep = _sweep(job)
    todo = [t for t in sweep.trials if not results.has_ended(t.name)]
    number = plural(len(sweep.trials), "trial")
    print(f"{number} that differ in {', '.join(sweep.keys)}, compared by {ranked_by(sweep)}")
    for note in job.notes:
        print(note)
    if num_kept := len(sweep.trials) - len(todo):
        print(f"{num_kept} of them have already ended and are not run again")
    if not todo:
        return
    with ExitStack() as watched:
        has_started = watched.enter_context(watching_start(results.fail))
        print("Ray started on this machine" if connect.connect(job) else "joined Ray")
        print(f"dashboard: {connect.describe_dashboard()}")
        has_started.set()
        watched.enter_context(HeadWatch(head_address(), results.fail).watching())
        room = find_room(todo, read)
        print(table.render(room.found))
        total_steps = _prepare_data(todo, room)
        at_once = min(room.at_once, len(todo))
        requested = sweep.options.max_concurrent_trials
        if requested != "auto":
            at_once = min(at_once, requested)
            if requested > room.at_once:
                most = f"only {room.at_once} fit at a time"
                print(f"max_concurrent_trials: {requested}, but {most}")
        results.begin(at_once)
        print(f"{room.placement.note} for a trial; {at_once} at a time", flush=True)
        _tune(sweep, todo, at_once, total_steps, results)


def _prepare_data(trials: Sequence[Trial], room: "Room") -> int:
    """Tokenize each of the trials' data sets once; return the steps of the longest trial."""
    say = partial(print, flush=True)
    num_sequences: dict[str, int] = {}
    steps: dict[str, int] = {}
    for trial in trials:
        job = trial.job
        key = f"{job.data.model_dump()} {job.model.model_dump()}"
        requested = job.ray.ray_num_workers
        workers = requested if isinstance(requested, int) else room.placement.num_workers
        try:
            if key not in num_sequences:
                num_sequences[key] = len(prepare(job, say).train)
            steps[trial.name] = resolve_arithmetic(job, num_sequences[key], workers).total_steps
        except RaytrainAdvError as error:  # the trial itself will end with it
            say(f"{trial.name}: {error.what}")
    for trial in (t for t in trials if t.name in steps):
        try:
            Transforms(trial.job).check_length(steps[trial.name])
        except JobError as error:
            raise JobError(error.what, f"trial {trial.name}: {error.found}", error.fix) from error
    return max(steps.values(), default=0)


def _tune(
    sweep: Sweep, trials: Sequence[Trial], at_once: int, total_steps: int, results: Results
) -> None:
    for name, value in TUNE_SETTINGS.items():
        os.environ.setdefault(name, value)
    jobs = {t.name: t.job for t in trials}
    kind = "train" if sweep.metric == "train_loss" else "eval"
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, jobs=jobs, cwd=os.getcwd(), row=kind),
        {f"node:{ray.util.get_node_ip_address()}": DRIVER_SHARE},
    )
    # Tune's files are not needed: each trial's own folder has its progress.
    with tempfile.TemporaryDirectory(prefix="raytrain_adv_sweep_") as scratch, name_low_memory():
        tune.Tuner(
            trainable,
            param_space={"trial": tune.grid_search(list(jobs))},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=at_once,
                scheduler=_scheduler(sweep, total_steps, results, kind),
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


@contextmanager
def name_low_memory() -> Iterator[None]:
    """Turn Tune's error for a trial that Ray's memory monitor has killed into a TrainingError: Tune
    takes it for a mistake of its own, with pages of text, and ends (ray 2.60).
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error.__cause__, OutOfMemoryError):
            raise
        raise TrainingError(
            "The sweep ended: a node ran low on memory, and Ray killed a trial's process there",
            memory_found(error.__cause__),
            "free memory there, or set max_concurrent_trials lower; then run again with "
            "resume_from_checkpoint: true",
        ) from error


def _scheduler(
    sweep: Sweep, total_steps: int, results: Results, kind: str
) -> DelayAwareAsha | None:
    """Return the scheduler, which compares losses in rows of this kind of metrics.jsonl."""
    if sweep.options.scheduler == "none":
        return None
    rungs = rungs_of(sweep, total_steps, kind)
    folders = {t.name: Path(t.job.output.output_dir) for t in sweep.trials}
    for name, folder in folders.items():  # trials of an earlier launch are compared too
        if results.has_ended(name):
            for row in metrics_file.read(folder / metrics_file.FILE_NAME):
                if row["kind"] == kind:
                    rungs.judge(name, row["step"], row.get("loss"))
    which = {"train": "training", "eval": "held-out"}[kind]

    def stop(name: str, step: int, reason: str) -> None:
        request_trial_stop(
            folders[name],
            "The sweep stopped this trial early: it was worse than the others",
            f"{which} {reason} (asha)",
            "scheduler: none runs every trial to its end; grace_steps gives each more time",
        )

    return DelayAwareAsha(rungs, stop)


def rungs_of(sweep: Sweep, total_steps: int, kind: str) -> Rungs:
    """Return the steps at which asha compares a sweep's trials, by losses of this kind of rows."""
    grace = sweep.options.grace_steps or math.ceil(total_steps / 10)
    switches = {t.name: t.job.flat().get(SWITCH) for t in sweep.trials}
    by_loss = {
        t.name: t.job.output.load_best_model_at_end
        and t.job.output.metric_for_best_model.endswith("loss")
        for t in sweep.trials
    }
    return Rungs(
        grace,
        sweep.options.reduction_factor,
        total_steps,
        {name: step for name, step in switches.items() if isinstance(step, int)},
        frozenset(name for name, step in switches.items() if step == NEVER),
        frozenset(name for name, is_kept in by_loss.items() if is_kept and kind == "eval"),
    )


@dataclass(frozen=True)
class Room:
    """The cluster's room for the trials."""

    at_once: int  # trials that fit at the same time
    found: Preflight  # the nodes, as checked for the first trial that can run
    placement: Placement  # that trial's placement


def find_room(trials: Sequence[Trial], read: Read) -> Room:
    """Check the placements, probing once for equal ones. Raises ClusterError if none can run."""
    rooms: list[Room] = []
    errors: list[ClusterError] = []
    jobs: dict[str, JobConfig] = {}
    for trial in trials:
        jobs.setdefault(_request(trial.job), trial.job)
    for job in jobs.values():
        try:
            rooms.append(_room(job, read))
        except ClusterError as error:
            errors.append(error)
    if not rooms:
        raise errors[0]
    return replace(rooms[0], at_once=min(room.at_once for room in rooms))


def _request(job: JobConfig) -> str:
    ray = {k: v for k, v in job.ray.model_dump().items() if k != "ray_run_name"}
    transforms = [t.model_dump() for t in job.transforms]
    return json.dumps([ray, job.parallel.use_cpu, transforms], default=str, sort_keys=True)


def _room(job: JobConfig, read: Read) -> Room:
    placement = resolve_placement(job)
    found = verdicts.check_nodes(placement, list(Transforms(job)), read)
    placement = verdicts.place(job, placement, found)
    nodes = [verdict.node for verdict in found.accepted]
    at_once = trials_at_once(nodes, placement, job.ray.placement_strategy)
    return Room(at_once, found, placement)


def trials_at_once(nodes: Sequence[Node], placement: Placement, strategy: str) -> int:
    """Return how many trials fit on these nodes; a trial's driver reserves nothing. At least 1."""
    fits = [node.num_fitting(placement.bundle) for node in nodes for _ in range(node.count)]
    workers = placement.num_workers
    if strategy == "STRICT_PACK":
        return max(sum(number // workers for number in fits), 1)
    if strategy == "STRICT_SPREAD":
        # Each trial takes one place on as many nodes as it has workers.
        number = 1
        while sum(min(fit, number + 1) for fit in fits) >= (number + 1) * workers:
            number += 1
        return number
    return max(sum(fits) // workers, 1)
