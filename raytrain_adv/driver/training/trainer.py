"""A run on the driver: output folder, preparation, Ray Train's workers, report."""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback

from raytrain_adv.checkpoint.folders import AGAIN
from raytrain_adv.config.job import JobConfig
from raytrain_adv.driver.cluster.connect import NodeNetwork
from raytrain_adv.driver.cluster.elastic import BatchPreservingPolicy
from raytrain_adv.driver.cluster.nodes import Placement, release_workers, wait_for_room
from raytrain_adv.driver.output import output_dir, upload
from raytrain_adv.driver.output.output_dir import Output
from raytrain_adv.driver.output.replaced import RUN_FILE
from raytrain_adv.driver.preflight.probe import Read, read_nodes
from raytrain_adv.driver.training import failures
from raytrain_adv.driver.training.console import Console
from raytrain_adv.driver.training.prepare import Progress, prepare_run
from raytrain_adv.driver.training.worker_entry import ray_worker
from raytrain_adv.driver.watch import stop
from raytrain_adv.driver.watch.hang import HangWatch
from raytrain_adv.driver.watch.nodes import HeadWatch, NodeWatch, usable_nodes
from raytrain_adv.errors import StorageError, Terminated
from raytrain_adv.report import record
from raytrain_adv.report.build import against, failed, finished, planned, started
from raytrain_adv.report.card import write_cards
from raytrain_adv.report.html import write_html
from raytrain_adv.report.record import RunReport
from raytrain_adv.report.summary import summary
from raytrain_adv.text import ascii_name
from raytrain_adv.transforms.applied import Transforms


class Trainer(TorchTrainer):  # type: ignore[misc] # ray is Any to mypy
    """Ray's trainer with three changes (ray 2.60).

    - No actor for ray.data's datasets, for which workers would wait 2 s and more without having
      any. Remove when Ray starts it only for datasets.
    - SIGINT stays with the driver: Ray's own handler ends the workers without a checkpoint
      (data_parallel_trainer.py).
    - HangWatch runs before the callbacks that handle the errors it sets.
    """

    elastic: BatchPreservingPolicy | None = None  # decides the number of workers, if it may change

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        if self.elastic is not None:
            arguments["scaling_policy"] = self.elastic
        return super()._initialize_and_run_controller(**arguments)

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        kept = [one for one in callbacks if not isinstance(one, DatasetsCallback)]
        return sorted(kept, key=lambda one: not isinstance(one, HangWatch))

    def _register_sigint_handler(self, controller: Any) -> None:
        """Register none."""


def run(job: JobConfig, read: Read = read_nodes, began: float | None = None) -> None:
    """Run the job to its end: train, export, report. Raises RaytrainAdvError with its exit_code.
    `began` is when the command did, in unix seconds; now if none.
    """
    began = began or time.time()
    folder = Path(job.output.output_dir)
    twins = list(Transforms(job).twins())
    if twins:
        with output_dir.held(folder):
            output_dir.decided(job)  # refused now, not hours later
    for twin in twins:
        print(f"First, the run without the feature to compare with: {twin.output.output_dir}\n")
        run(twin, read, began)
        print()
        began = time.time()
    if twins and job.output.compare_with is None:
        compared = {"compare_with": twins[0].output.output_dir}
        job = replace(job, output=job.output.model_copy(update=compared))
    with output_dir.held(folder):
        place = output_dir.open_output(job)
        if place.finished:
            print("This job has already finished here; nothing was done.\n")
            report = publish(job, place.folder, record.read(place.folder), print)
            print(summary(report))
            upload.refuse_incomplete(report)
            return
        with Console(place.folder, began=began) as console:
            report = _run_in(job, place, console, read, began)
        print(summary(report))
        upload.refuse_incomplete(report)


def _run_in(job: JobConfig, place: Output, console: Console, read: Read, began: float) -> RunReport:
    progress = Progress({"imports": time.time() - began})
    report = started(job, job.run_name, began)
    if place.remark and not place.replaced.is_there:
        report = report.model_copy(update={"notes": (*report.notes, place.remark)})
    for note in report.notes:
        console.say(note)

    def fail(error: BaseException) -> None:
        if place.replaced.is_there:
            console.say(f"\n{place.replaced.keep()}")
            return
        ended = failed(report, error, progress.timeline, place.folder)
        try:
            _finish(job, place, ended.model_copy(update={"preflight": progress.preflight}))
        except StorageError as unwritten:  # reported in addition to what ended the run
            console.say(f"\n{unwritten}")

    try:
        with ExitStack() as watched:
            placement, plan, head = prepare_run(job, read, console.say, progress, watched, fail)
            place.begin(job, console.say)
            report = planned(report, placement.fewest, plan.memory, plan.transforms)
            report = report.model_copy(update={"preflight": progress.preflight})
            record.write(report, place.folder)
            start = time.perf_counter()
            watch = NodeWatch(placement, usable_nodes(placement), console.say)
            with stop.handle_signals(place.folder, console.say), watch.watching():
                result = fit(job, place, placement, console, head)
            progress.timeline["training"] = time.perf_counter() - start
        report = against(finished(report, result, progress.timeline, place.folder), job)
    except BaseException as error:  # noqa: BLE001 # also Ctrl-C, Ray's SystemExit on SIGTERM
        shown = failures.stop_error() if isinstance(error, SystemExit) else error
        fail(shown)
        raise shown from error.__cause__
    _finish(job, place, report)
    return publish(job, place.folder, report, console.say)


def publish(
    job: JobConfig, folder: Path, report: RunReport, say: Callable[[str], None]
) -> RunReport:
    """Write the finished run's model cards, and upload its models if the job says so; return the
    report, written again if anything was uploaded. What fails is reported: the run stays done.
    """
    try:
        write_cards(report, job)
        if (told := upload.upload(job, report, say)) is not report:
            record.write(told, folder)
            write_html(told, folder, plots=job.output.plot_loss)
        return told
    except StorageError as error:
        say(str(error))
        return report


def _finish(job: JobConfig, place: Output, report: RunReport) -> None:
    try:
        record.write(report, place.folder)
        write_html(report, place.folder, plots=job.output.plot_loss)
    finally:
        place.note(job, report.status, place.number)


def fit(
    job: JobConfig, place: Output, placement: Placement, console: Console, head: HeadWatch
) -> dict[str, Any]:
    """Run the workers to the end; return rank 0's figures. Raises RaytrainAdvError."""
    attempt, resume = place.attempt, place.resume
    deaths_left = job.ray.max_failures if job.ray.max_failures >= 0 else 10**6
    saves = job.output.save_strategy != "no" and not job.output.save_only_model

    def is_stopped() -> bool:
        return (place.folder / stop.STOP_FILE).exists()

    while True:
        try:
            result = _trainer(job, place, placement, attempt, resume).fit()
            return dict(result.return_value)
        except TrainingFailedError as error:
            shown = failures.translate(error)
            if not isinstance(shown, Terminated) or is_stopped() or not saves:
                raise shown from error
            why = f"{shown.what}: {shown.found}"  # not a failure: max_failures does not count it
        except failures.DIED as error:
            # The controller has died: Ray restarts workers, but not their controller.
            head.wait()
            if deaths_left == 0:
                raise failures.translate(error) from error
            deaths_left -= 1
            why = failures.translate(error).what
            release_workers()
        console.say(f"{why}; starting again from the last checkpoint")
        wait_for_room(placement, console.say, is_stopped=is_stopped)
        attempt, resume = f"{attempt}{AGAIN}", resume or True
        failures.write_restart_reason(place.storage.folder(attempt), why)


def _trainer(
    job: JobConfig, place: Output, placement: Placement, attempt: str, resume: bool | str
) -> Trainer:
    shares_gpu = 0 < placement.bundle.get("GPU", 0.0) < 1
    backend = "cpu:gloo,cuda:nccl" if placement.use_gpu and not shares_gpu else "gloo"
    callbacks = [
        stop.CatchSigterm(),
        failures.RecordRestartReason(place.storage_path, attempt),
        failures.StopWhenRetryCannotHelp(),
        stop.StopOnRequest(place.folder),
    ]
    if job.ray.step_timeout is not None:
        callbacks.append(HangWatch(job.ray.step_timeout))
    trainer = Trainer(
        ray_worker,
        train_loop_config={
            "job": job,
            "run": ascii_name(job.run_name),
            "storage_path": place.storage_path,
            "attempt": attempt,
            "resume": resume,
            "use_gpu": placement.use_gpu,
            "versions": placement.versions,
            "folder": os.getcwd(),
            "marker": str(place.folder.absolute() / RUN_FILE),
        },
        torch_config=NodeNetwork(backend=backend, timeout_s=job.parallel.ddp_timeout),
        scaling_config=scaling(job, placement),
        run_config=RunConfig(
            name=attempt,
            storage_path=place.storage_path,
            failure_config=FailureConfig(max_failures=job.ray.max_failures),
            callbacks=callbacks,
        ),
    )
    if placement.numbers:
        config, strategy = scaling(job, placement), job.ray.placement_strategy
        trainer.elastic = BatchPreservingPolicy(config, placement, strategy)
    return trainer


def scaling(job: JobConfig, placement: Placement) -> ScalingConfig:
    """Return the request to Ray Train: the number of workers, their resources, and their nodes."""
    most = placement.num_workers
    return ScalingConfig(
        num_workers=(placement.fewest, most) if placement.numbers else most,
        use_gpu=placement.use_gpu,
        resources_per_worker=placement.bundle,
        placement_strategy=job.ray.placement_strategy,
        label_selector=placement.label_selector,
    )
