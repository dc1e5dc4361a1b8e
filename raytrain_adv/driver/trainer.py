"""One launch, seen from the driver: output folder, cluster, data, plan, fit, report."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer

from raytrain_adv.config.job import JobConfig
from raytrain_adv.driver import cluster, output
from raytrain_adv.driver.cluster import Placement
from raytrain_adv.driver.console import Console, summary
from raytrain_adv.driver.failures import StopWhenRetryCannotHelp, stopped, translated
from raytrain_adv.driver.output import Output
from raytrain_adv.driver.plan import RunPlan, render_brief, resolve
from raytrain_adv.driver.ray_worker import STARTS, ray_worker
from raytrain_adv.errors import StorageError
from raytrain_adv.report import record
from raytrain_adv.report.build import failed, finished, started
from raytrain_adv.report.html import write_html
from raytrain_adv.report.record import RunReport
from raytrain_adv.worker import trackers
from raytrain_adv.worker.data import PreparedData, prepare


def run(job: JobConfig) -> None:
    """Run the job to its end: train, export, report.

    Raises:
        RaytrainAdvError: in the house form; its exit_code is the process's.
    """
    with output.held(Path(job.output.output_dir)):
        place = output.open_output(job)
        if place.finished:
            print("This job has already run to its end here; nothing was done.\n")
            print(summary(record.read(place.folder)))
            return
        with Console(place.folder) as console:
            report = _run_in(job, place, console)
        print(summary(report))


def _run_in(job: JobConfig, place: Output, console: Console) -> RunReport:
    timeline: dict[str, float] = {}
    report = started(job, output.run_name(job))
    try:
        placement, plan = _prepare(job, console, timeline)
        report = started(job, output.run_name(job), placement.num_workers, plan.memory)
        record.write(report, place.folder)
        start = time.perf_counter()
        result = fit(job, place, placement, console)
        timeline["training"] = time.perf_counter() - start
        report = finished(report, result, timeline, place.folder)
    except BaseException as error:  # also Ctrl-C, and the SystemExit that Ray makes of SIGTERM
        shown = stopped(error) if isinstance(error, SystemExit) else error
        report = failed(report, shown, timeline, place.folder)
        try:
            _leave(job, place, report)
        except StorageError as unwritten:  # beside what ended the run, not in its place
            console.say(f"\n{unwritten}")
        raise shown from error.__cause__
    _leave(job, place, report)
    return report


def _leave(job: JobConfig, place: Output, report: RunReport) -> None:
    """Write what stays of the run: its report, and how it ended."""
    record.write(report, place.folder)
    write_html(report, place.folder, plots=job.output.plot_loss)
    place.note(job, report.status, int(place.attempt.rpartition("_")[2]))


def _prepare(
    job: JobConfig, console: Console, timeline: dict[str, float]
) -> tuple[Placement, RunPlan]:
    """Tokenise the data while Ray starts; then settle where the job runs, and show the plan."""
    trackers.check(job.output.report_to)
    start = time.perf_counter()
    with ThreadPoolExecutor(max_workers=1) as pool:
        data: Future[PreparedData] = pool.submit(prepare, job, console.say)
        started_here = cluster.connect(job)
        console.say(
            "Ray started on this machine" if started_here else f"joined Ray at {_address()}"
        )
        placement = cluster.settle(job, started_here)
        timeline["Ray"] = time.perf_counter() - start
        prepared = data.result()
    # Only what the data took longer than Ray: both went on at the same time.
    timeline["data"] = time.perf_counter() - start - timeline["Ray"]
    start = time.perf_counter()
    plan = resolve(job, world_size=placement.num_workers, data=prepared)
    console.say(placement.note)
    console.say(render_brief(plan))
    timeline["plan"] = time.perf_counter() - start
    cluster.wait_for_room(placement, console.say)
    return placement, plan


def _address() -> str:
    return str(ray.get_runtime_context().gcs_address)


def fit(job: JobConfig, place: Output, placement: Placement, console: Console) -> dict[str, Any]:
    """Run the workers to the end; return rank 0's figures.

    Raises:
        RaytrainAdvError: the workers' own error, or what became of them.
    """
    resume = place.resume
    deaths_left = job.ray.max_failures if job.ray.max_failures >= 0 else 10**6
    attempt = place.attempt
    while True:
        trainer = _trainer(job, place, placement, attempt, resume)
        try:
            result = trainer.fit()
            return dict(result.return_value)
        except TrainingFailedError as error:
            raise translated(error) from error
        except (
            RayActorError
        ) as error:  # the controller: Ray restarts workers, but nobody restarts it
            if deaths_left == 0:
                raise translated(error) from error
            deaths_left -= 1
            console.say("Ray Train's controller died; starting again from the last checkpoint")
            _clear_up(place, attempt)
            cluster.wait_for_room(placement, console.say)
            attempt, resume = f"{attempt}r", resume or True


def _clear_up(place: Output, attempt: str) -> None:
    """Release what the workers of an attempt held, where they got as far as saying what it is."""
    start = place.storage.folder(attempt).read_json(STARTS)
    if start is not None and start["placement_group"] is not None:
        cluster.release(start["placement_group"])


def _trainer(
    job: JobConfig, place: Output, placement: Placement, attempt: str, resume: bool | str
) -> TorchTrainer:
    shares_gpu = 0 < placement.bundle.get("GPU", 0.0) < 1
    backend = "cpu:gloo,cuda:nccl" if placement.use_gpu and not shares_gpu else "gloo"
    return TorchTrainer(
        ray_worker,
        train_loop_config={
            "job": job,
            "storage_path": place.storage_path,
            "attempt": attempt,
            "resume": resume,
            "use_gpu": placement.use_gpu,
            "marker": str(place.folder.absolute() / output.RUN_FILE),
        },
        torch_config=TorchConfig(backend=backend, timeout_s=job.parallel.ddp_timeout),
        scaling_config=ScalingConfig(
            num_workers=placement.num_workers,
            use_gpu=placement.use_gpu,
            resources_per_worker=placement.bundle,
            placement_strategy=job.ray.placement_strategy,
        ),
        run_config=RunConfig(
            name=attempt,
            storage_path=place.storage_path,
            failure_config=FailureConfig(max_failures=job.ray.max_failures),
            callbacks=[StopWhenRetryCannotHelp()],
        ),
    )
