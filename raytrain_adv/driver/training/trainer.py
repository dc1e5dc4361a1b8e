"""One launch, seen from the driver: output folder, cluster, data, plan, fit, report."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback

from raytrain_adv import hardware
from raytrain_adv.checkpoint.save import AGAIN
from raytrain_adv.config.job import JobConfig
from raytrain_adv.data.prepare import PreparedData, prepare
from raytrain_adv.driver.cluster import connect
from raytrain_adv.driver.cluster.elastic import KeepsTheBatch
from raytrain_adv.driver.cluster.node_network import NodeNetwork
from raytrain_adv.driver.cluster.placement import Placement
from raytrain_adv.driver.cluster.waiting import wait_for_room
from raytrain_adv.driver.output import output_dir
from raytrain_adv.driver.output.output_dir import Output
from raytrain_adv.driver.plan.plan import RunPlan, render_brief, resolve
from raytrain_adv.driver.preflight import (
    host_memory,
    table,
    verdicts,
)
from raytrain_adv.driver.preflight.probe import Read, read_nodes
from raytrain_adv.driver.training.console import Console, summary
from raytrain_adv.driver.training.failures import (
    StopWhenRetryCannotHelp,
    TellTheNextStart,
    leave_word,
    stopped,
    translated,
)
from raytrain_adv.driver.training.twin import beside_its_twin, twins
from raytrain_adv.driver.training.worker_entry import STARTS, ray_worker
from raytrain_adv.driver.watch import head as head_watch
from raytrain_adv.driver.watch.hang import WatchForHangs
from raytrain_adv.driver.watch.head import HeadWatch
from raytrain_adv.driver.watch.nodes import NodeWatch, usable
from raytrain_adv.driver.watch.notice import ListenForSigterm
from raytrain_adv.driver.watch.stop import StopWhenTold, asking, is_asked
from raytrain_adv.errors import StorageError, Terminated
from raytrain_adv.report import record
from raytrain_adv.report.build import against, failed, finished, planned, started
from raytrain_adv.report.html import write_html
from raytrain_adv.report.parts import PreflightReport
from raytrain_adv.report.record import RunReport
from raytrain_adv.run import trackers
from raytrain_adv.transforms.applied import enabled
from raytrain_adv.worker.install import fetch


class Trainer(TorchTrainer):  # type: ignore[misc] # ray is Any to mypy
    """Ray's trainer without its actor for ray.data's datasets, for which workers would wait 2 s and
    more though there are none (ray 2.60; remove when Ray starts it only where datasets are given),
    and which leaves SIGINT to the driver: Ray's own handler ends the workers where they are,
    without a checkpoint (ray 2.60, data_parallel_trainer.py). What finds workers that hang is asked
    first, so that what deals with their errors sees those it gives them.
    """

    elastic: KeepsTheBatch | None = None
    """What decides on the number of workers, where it may change."""

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        if self.elastic is not None:
            arguments["scaling_policy"] = self.elastic
        return super()._initialize_and_run_controller(**arguments)

    def _create_default_callbacks(self) -> list[Any]:
        callbacks = super()._create_default_callbacks()
        kept = [one for one in callbacks if not isinstance(one, DatasetsCallback)]
        return sorted(kept, key=lambda one: not isinstance(one, WatchForHangs))

    def _register_sigint_handler(self, controller: Any) -> None:
        """Register none."""


def run(job: JobConfig, read: Read = read_nodes) -> None:
    """Run the job to its end: train, export, report.

    Args:
        job: the loaded job.
        read: says what the cluster's nodes are.

    Raises:
        RaytrainAdvError: in the house form; its exit_code is the process's.
    """
    folder = Path(job.output.output_dir)
    first = list(twins(job))
    if first:
        with output_dir.held(folder):
            output_dir.decided(job)  # refused now, not hours later
    for twin in first:
        print(f"First, to compare with, without the feature, in {twin.output.output_dir}:\n")
        run(twin, read)
        print()
    job = beside_its_twin(job)
    with output_dir.held(folder):
        place = output_dir.open_output(job)
        if place.finished:
            print("This job has already run to its end here; nothing was done.\n")
            print(summary(record.read(place.folder)))
            return
        with Console(place.folder) as console:
            report = _run_in(job, place, console, read)
        print(summary(report))


def _run_in(job: JobConfig, place: Output, console: Console, read: Read) -> RunReport:
    timeline: dict[str, float] = {}
    nodes: list[PreflightReport] = []
    report = started(job, job.run_name)
    for note in report.notes:
        console.say(note)

    def fail(error: BaseException) -> None:
        if place.replaced.is_there:
            console.say(f"\n{place.replaced.keep()}")
            return
        ended = failed(report, error, timeline, place.folder)
        ended = ended.model_copy(update={"preflight": nodes[-1] if nodes else None})
        try:
            _leave(job, place, ended)
        except StorageError as unwritten:  # beside what ended the run, not in its place
            console.say(f"\n{unwritten}")

    try:
        with ExitStack() as watched:
            placement, plan, head = _prepare(job, console, timeline, nodes, read, watched, fail)
            place.begin(job, console.say)
            report = planned(report, placement.fewest, plan.memory, plan.transforms)
            report = report.model_copy(update={"preflight": nodes[-1]})
            record.write(report, place.folder)
            start = time.perf_counter()
            watch = NodeWatch(placement, usable(placement), console.say)
            with asking(place.folder, console.say), watch.watching():
                result = fit(job, place, placement, console, head)
            timeline["training"] = time.perf_counter() - start
        report = against(finished(report, result, timeline, place.folder), job)
    except BaseException as error:  # also Ctrl-C, and the SystemExit that Ray makes of SIGTERM
        shown = stopped(error) if isinstance(error, SystemExit) else error
        fail(shown)
        raise shown from error.__cause__
    _leave(job, place, report)
    return report


def _leave(job: JobConfig, place: Output, report: RunReport) -> None:
    """Write what stays of the run: its report, and how it ended."""
    record.write(report, place.folder)
    write_html(report, place.folder, plots=job.output.plot_loss)
    place.note(job, report.status, place.number)


def _prepare(
    job: JobConfig,
    console: Console,
    timeline: dict[str, float],
    nodes: list[PreflightReport],
    read: Read,
    watched: ExitStack,
    leave: Callable[[BaseException], None],
) -> tuple[Placement, RunPlan, HeadWatch]:
    """Tokenize the data while Ray starts and the nodes are probed; settle where the job runs, and
    show the plan. `timeline` and `nodes` are filled in for the report, also of a refused run. The
    head is watched from here on, until `watched` is left; `leave` notes how the run ended if it is
    gone.
    """
    trackers.check(job.output.report_to)
    if job.output.compare_with is not None:
        record.read(job.output.compare_with)  # its absence is said now, not at the end
    start = time.perf_counter()
    data = _in_background(lambda: prepare(job, console.say))
    started_here = connect.connect(job)
    console.say(
        "Ray started on this machine" if started_here else f"joined Ray at {head_watch.address()}"
    )
    console.say(f"dashboard: {connect.dashboard()}")
    head = HeadWatch(head_watch.address(), leave)
    watched.enter_context(head.watching())
    placement = connect.settle(job, started_here)
    timeline["Ray"] = time.perf_counter() - start
    found = verdicts.look_at(placement, enabled(job), read)
    nodes.append(table.report(found))
    console.say(table.render(found))
    placement = verdicts.settled(job, placement, found)
    timeline["preflight"] = time.perf_counter() - start - timeline["Ray"]
    prepared = data.result()
    # Data is tokenized while Ray starts and nodes are probed; what it takes longer is waited for.
    timeline["wait for data"] = (
        time.perf_counter() - start - timeline["Ray"] - timeline["preflight"]
    )
    start = time.perf_counter()
    fetch(job, found.facts or hardware.detect(), console.say)
    plan = resolve(job, world_size=placement.fewest, data=prepared, facts=found.facts)
    console.say(placement.note)
    console.say(render_brief(plan))
    too_large = verdicts.refuse_too_large(job, plan, found)
    for warning in (*too_large, *host_memory.refuse_too_large(job, plan, found)):
        console.say(f"warning: {warning}")
    timeline["plan"] = time.perf_counter() - start
    wait_for_room(placement, console.say)
    console.say("starting the workers: they import PyTorch and join each other")
    return placement, plan, head


def _in_background(work: Callable[[], PreparedData]) -> Future[PreparedData]:
    """Begin the work on a thread that nothing waits for: a refusal comes at once, and the process
    then ends, which an executor's threads would not let it.
    """
    future: Future[PreparedData] = Future()

    def do() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # it is raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=do, name="data", daemon=True).start()
    return future


def fit(
    job: JobConfig, place: Output, placement: Placement, console: Console, head: HeadWatch
) -> dict[str, Any]:
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
            shown = translated(error)
            keeps = job.output.save_strategy != "no" and not job.output.save_only_model
            goes_on = isinstance(shown, Terminated) and keeps and not is_asked(place.folder)
            if not goes_on:
                raise shown from error
            why = f"{shown.what}: {shown.found}"  # no failure: max_failures does not count it
        except RayActorError as error:
            # The controller: Ray restarts workers, but nobody restarts it.
            head.wait()
            if deaths_left == 0:
                raise translated(error) from error
            deaths_left -= 1
            why = "Ray Train's controller died"
            _clear_up(place, attempt)
        console.say(f"{why}; starting again from the last checkpoint")
        wait_for_room(placement, console.say, given_up=lambda: is_asked(place.folder))
        attempt, resume = f"{attempt}{AGAIN}", resume or True
        leave_word(place.storage.folder(attempt), why)


def _clear_up(place: Output, attempt: str) -> None:
    """Release what the workers of an attempt held, where they got as far as saying what it is."""
    start = place.storage.folder(attempt).read_json(STARTS)
    if start is not None and start["placement_group"] is not None:
        connect.release(start["placement_group"])


def _trainer(
    job: JobConfig, place: Output, placement: Placement, attempt: str, resume: bool | str
) -> Trainer:
    shares_gpu = 0 < placement.bundle.get("GPU", 0.0) < 1
    backend = "cpu:gloo,cuda:nccl" if placement.use_gpu and not shares_gpu else "gloo"
    trainer = Trainer(
        ray_worker,
        train_loop_config={
            "job": job,
            "run": job.run_name,
            "storage_path": place.storage_path,
            "attempt": attempt,
            "resume": resume,
            "use_gpu": placement.use_gpu,
            "versions": placement.versions,
            "folder": os.getcwd(),
            "marker": str(place.folder.absolute() / output_dir.RUN_FILE),
        },
        torch_config=NodeNetwork(backend=backend, timeout_s=job.parallel.ddp_timeout),
        scaling_config=scaling(job, placement),
        run_config=RunConfig(
            name=attempt,
            storage_path=place.storage_path,
            failure_config=FailureConfig(max_failures=job.ray.max_failures),
            callbacks=_callbacks(job, place, attempt),
        ),
    )
    if placement.numbers:
        strategy = job.ray.placement_strategy
        trainer.elastic = KeepsTheBatch(scaling(job, placement), placement, strategy)
    return trainer


def _callbacks(job: JobConfig, place: Output, attempt: str) -> list[Any]:
    """Return what looks after the run in Ray Train's controller."""
    callbacks = [
        ListenForSigterm(),
        TellTheNextStart(place.storage_path, attempt),
        StopWhenRetryCannotHelp(),
        StopWhenTold(place.folder),
    ]
    if job.ray.step_timeout is not None:
        callbacks.append(WatchForHangs(job.ray.step_timeout))
    return callbacks


def scaling(job: JobConfig, placement: Placement) -> ScalingConfig:
    """Return what Ray Train is asked for: how many workers, what each reserves, and where."""
    return ScalingConfig(
        num_workers=(placement.fewest, placement.num_workers)
        if placement.numbers
        else placement.num_workers,
        use_gpu=placement.use_gpu,
        resources_per_worker=placement.bundle,
        placement_strategy=job.ray.placement_strategy,
        label_selector=placement.label_selector,
    )
