"""A run on the driver: output folder, preparation, Ray Train's workers, report."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from raytrain_adv.config.job import JobConfig
from raytrain_adv.driver.output import output_dir, upload
from raytrain_adv.driver.output.output_dir import Output
from raytrain_adv.driver.preflight.probe import Read, read_nodes
from raytrain_adv.driver.training.console import Console
from raytrain_adv.driver.training.start import Progress, start_ray
from raytrain_adv.errors import StorageError, stop_error
from raytrain_adv.report import record
from raytrain_adv.report.build import against, failed, finished, planned, started
from raytrain_adv.report.card import write_cards
from raytrain_adv.report.html import write_html
from raytrain_adv.report.record import RunReport
from raytrain_adv.report.summary import summary
from raytrain_adv.transforms.applied import Transforms


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
    progress = Progress(began)
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
            head = start_ray(job, console.say, progress, watched, fail)
            # What these import has been imported while Ray started.
            from raytrain_adv.driver.training.prepare import prepare_run
            from raytrain_adv.driver.training.trainer import train

            progress.end("imports")
            placement, plan = prepare_run(job, read, console.say, progress)
            place.begin(job, console.say)
            report = planned(report, placement.fewest, plan.memory, plan.transforms)
            report = report.model_copy(update={"preflight": progress.preflight})
            record.write(report, place.folder)
            result = train(job, place, placement, console, head)
        progress.end("training")
        report = against(finished(report, result, progress.timeline, place.folder), job)
    except BaseException as error:  # noqa: BLE001 # also Ctrl-C, Ray's SystemExit on SIGTERM
        shown = stop_error() if isinstance(error, SystemExit) else error
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
