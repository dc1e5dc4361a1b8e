"""The console script `raytrain-adv`. Commands import what they need: help and refusals of a command
line load neither torch nor Ray.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from raytrain_adv import __version__
from raytrain_adv.command_line import (
    JOB,
    QAT_KEYS,
    Address,
    Assume,
    Job,
    Line,
    LockFile,
    Overrides,
    Verbose,
    Workers,
    argument,
    exists,
    flag,
    job_line,
    no_option,
    option,
)
from raytrain_adv.config import JobConfig, compatibility, load
from raytrain_adv.config import explain as features
from raytrain_adv.config import schema as schemas
from raytrain_adv.config.problems import Problem, job_error
from raytrain_adv.config.rules import check_workers
from raytrain_adv.errors import EXIT_DONE, EXIT_NOT_MENDED, JobError, RaytrainAdvError, StorageError
from raytrain_adv.library_noise import quieten
from raytrain_adv.redaction import hide_environment
from raytrain_adv.text import nearest
from raytrain_adv.worker.preconditions import check_files

EXIT_INTERRUPTED = 130
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
KEYS = {**SETTINGS, "ignore_unknown_options": True}
"""Of commands that take key=value: unknown options are refused by `job_line`, all at once."""
app = typer.Typer(
    name="raytrain-adv",
    add_completion=False,
    rich_markup_mode=None,
    context_settings=SETTINGS,
)
kernels = typer.Typer(
    help="Pin a job's kernels for a cluster without internet.",
    rich_markup_mode=None,
    context_settings=SETTINGS,
)
app.add_typer(kernels, name="kernels")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit code. Errors are printed as text."""
    quieten()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except RaytrainAdvError as error:
        _print_error(str(error))
        return error.exit_code
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("raytrain_adv"):
            raise
        fix = "activate the environment (. .venv/bin/activate), or pip install -e ."
        _print_error(f"{error.name} is not installed for {sys.executable}\n  fix:   {fix}")
        return RaytrainAdvError.exit_code
    except KeyboardInterrupt:
        if arguments[:1] == ["launch"]:
            resume = "Set resume_from_checkpoint: true to continue from the last checkpoint."
            _print_error(f"Stopped. {resume}")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader has closed, as in `raytrain-adv schema | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE


def _run(arguments: list[str]) -> int:
    words = {"help": "--help", "version": "--version"}
    arguments = [words.get(word, word) for word in arguments[:1]] + arguments[1:]
    if arguments in ([], ["kernels"]):
        arguments.append("--help")
    command = typer.main.get_group(app)
    if arguments[0] not in command.commands and not arguments[0].startswith("-"):
        raise _no_command(arguments[0], list(command.commands))
    # Typer's own main() would turn errors and interrupts into its own messages and exit codes.
    try:
        with command.make_context("raytrain-adv", arguments) as context:
            return command.invoke(context) or EXIT_DONE
    except typer.Exit as end:
        return end.exit_code
    except TyperException as error:
        problem = Problem(error.format_message(), f"see raytrain-adv {arguments[0]} --help")
        raise job_error("The command line", [problem]) from None


def _no_command(word: str, known: Sequence[str]) -> JobError:
    similar = nearest(word, known)
    if word.endswith((".yaml", ".yml")):
        fix = f"write raytrain-adv launch {word}"
    else:
        fix = f"write {similar}" if similar else f"write one of {', '.join(known)} first"
    return job_error("The command line", [Problem(f"{word!r} is not a command", fix)])


def _print_error(text: str) -> None:
    """Print to stderr whatever its encoding is able to show."""
    encoding = sys.stderr.encoding or "utf-8"
    shown = hide_environment(text).encode(encoding, "backslashreplace").decode(encoding)
    print(f"\n{shown}", file=sys.stderr)


def _load(context: typer.Context, job: str, overrides: Sequence[str] | None) -> JobConfig:
    line = job_line(context, [job, *(overrides or ())])
    return load(line.path, line.overrides)


def _show_plan(line: Line, verbose: bool) -> None:
    job = load(line.path, line.overrides)
    check_workers(job, line.workers)
    from raytrain_adv.driver.plan.plan import show

    show(job, line.workers, verbose, line.assumed)


def _train(job: JobConfig) -> None:
    if not _has_ended(job):
        check_files(job)
    if job.sweep is not None:
        from raytrain_adv.driver.sweep import sweep

        sweep.run(job)
    else:
        from raytrain_adv.driver.training import trainer

        trainer.run(job)


def _has_ended(job: JobConfig) -> bool:
    """Whether the job has ended: a rerun then shows its report, even if its files are gone."""
    if job.output.resume_from_checkpoint is not True:
        return False
    from raytrain_adv.driver.output import output_dir

    return output_dir.has_ended(Path(job.output.output_dir))


@app.command(context_settings=KEYS)
def launch(
    context: typer.Context,
    job: Job,
    overrides: Overrides = None,
    plan: Annotated[bool, flag("--plan", "Show what the job would do; train nothing.")] = False,
    workers: Workers = None,
    verbose: Verbose = False,
    assume: Assume = None,
) -> None:
    """Run a job."""
    given = {"--workers": workers is not None, "--verbose": verbose, "--assume": assume}
    problems = [
        Problem(f"{name} changes only a plan", f"add --plan, or leave {name} out")
        for name, is_given in given.items()
        if is_given and not plan
    ]
    line = job_line(context, [job, *(overrides or ())], workers, assume, problems)
    if plan:
        _show_plan(line, verbose)
    else:
        _train(load(line.path, line.overrides))


@app.command(context_settings=KEYS)
def submit(
    context: typer.Context,
    job: Job,
    overrides: Overrides = None,
    address: Address = None,
    runtime_env: Annotated[
        str | None, option("FILE", "What is uploaded. Default: jobs/runtime_env.yaml.")
    ] = None,
) -> int:
    """Run a job on a running cluster, and follow its log.

    Uploads this folder (without checkpoints, data and environments), runs the job there, prints its
    log to the end, and exits with its exit code. Ctrl-C stops the job, with a checkpoint.
    output_dir must be an absolute path on storage of the cluster.
    """
    if "--plan" in (job, *(overrides or ())):
        problem = Problem("submit does not plan", "write raytrain-adv plan job.yaml")
        raise job_error("The command line", [problem])
    line = job_line(context, [job, *(overrides or ())])
    from raytrain_adv.driver.commands import submit

    return submit.submit(line.path, line.overrides, address, runtime_env)


@app.command()
def status(
    run: Annotated[str | None, argument("RUN", "Its name or output_dir. Default: all.")] = None,
    address: Address = None,
) -> None:
    """Show the runs of a cluster, or one of them."""
    from raytrain_adv.driver.commands import status

    status.show(address, run)


@app.command()
def doctor(
    run: Annotated[Path, argument("RUN", "Its output_dir; its checkpoints may lie elsewhere.")],
    fix: Annotated[
        bool, flag("--fix", "Repair it. Nothing is deleted: files are moved to RUN/set-aside.")
    ] = False,
) -> int:
    """Find damage in a run's files, and repair it.

    Prints what each finding means for a rerun with resume_from_checkpoint: true, and the checkpoint
    from which it resumes. The run must not be active.

    Exit code: 0 if nothing is wrong (any more), 5 if something is, 2 if there is no such run or it
    is active.
    """
    from raytrain_adv.driver.commands import doctor

    return EXIT_DONE if doctor.show(run, fix) else EXIT_NOT_MENDED


@app.command(context_settings=KEYS)
def plan(
    context: typer.Context,
    job: Job,
    overrides: Overrides = None,
    workers: Workers = None,
    verbose: Verbose = False,
    assume: Assume = None,
) -> None:
    """Show what a job would do, its memory, and its limits on many workers."""
    _show_plan(job_line(context, [job, *(overrides or ())], workers, assume), verbose)


@app.command(context_settings=KEYS)
def preflight(
    context: typer.Context, job: Annotated[str | None, JOB] = None, overrides: Overrides = None
) -> None:
    """Check the cluster's nodes, for a job or for any."""
    loaded = _load(context, job, overrides) if job is not None else None
    if loaded is not None:
        check_files(loaded)
    from raytrain_adv.driver.commands import preflight

    preflight.show(loaded)


@kernels.command(context_settings=KEYS)
def lock(
    context: typer.Context,
    job: Job,
    overrides: Overrides = None,
    output: Annotated[Path, option("FILE", "The lock file.")] = Path("kernels.lock.json"),
    torch: Annotated[str | None, option("X.Y", "PyTorch on the workers, if not as here.")] = None,
    cuda: Annotated[str | None, option("X.Y|cpu", "CUDA there, if not as here.")] = None,
) -> None:
    """Pin a job's kernels in a lock file."""
    loaded = _load(context, job, overrides)
    from raytrain_adv.driver.commands import kernels

    kernels.lock(loaded, output, torch, cuda)


@kernels.command()
def fetch(file: LockFile) -> None:
    """Download the files of a lock file next to it."""
    from raytrain_adv.driver.commands import kernels

    kernels.fetch(file)


@kernels.command()
def verify(file: LockFile) -> None:
    """Compare the downloaded files with their lock file."""
    from raytrain_adv.driver.commands import kernels

    kernels.verify(file)


@app.command(context_settings=KEYS)
def export(
    context: typer.Context,
    source: Annotated[str, argument("RUN|MODEL", "A run's output_dir, or a model folder.")],
    overrides: Annotated[list[str] | None, argument("key=value", QAT_KEYS)] = None,
    checkpoint: Annotated[str, option("STEP", "step_N, or a path. Default: the newest.")] = "",
    output: Annotated[str, option("DIR", "The new folder. Default for a run: in RUN.")] = "",
    merge: Annotated[bool, flag("--merge", "Merge a LoRA adapter into its base.")] = False,
) -> None:
    """Export a checkpoint's model, or quantize a model folder.

    RUN: writes model, and with QAT model-quantized. The run's keys apply, unless QAT keys given
    here replace them. With --merge it writes one model after LoRA; a quantized base becomes bf16.

    MODEL: a Hugging Face folder, quantized without training (PTQ); needs --output and
    enable_qat=true.
    """
    problems, sources, keys = list[Problem](), list[str](), list[str]()
    given = [source, *(overrides or ())]
    for place, text in enumerate(given):
        if text.startswith("-"):
            problems.append(no_option(context, given, place))
        elif "=" in text and not exists(text, folder=True):
            keys.append(text)
        else:
            sources.append(text)
    if len(sources) != 1:
        found = f"{len(sources)} folders are named: {', '.join(sources) or 'none'}"
        problems.append(Problem(found, "name one: a run's output_dir or a model folder"))
    if problems:
        raise job_error("The command line", problems)
    from raytrain_adv.driver.commands import export

    export.run(sources[0], checkpoint, output, keys, merge)


@app.command()
def explain(
    feature: Annotated[list[str] | None, argument("FEATURE", "Default: the whole matrix.")] = None,
    check: Annotated[Path | None, option("PAGE", "Compare a Markdown page's matrix.")] = None,
    write: Annotated[Path | None, option("PAGE", "Update a Markdown page's matrix.")] = None,
) -> None:
    """Describe a feature and what it can be combined with."""
    page = check or write
    if page is None:
        print(features.explain(" ".join(feature)) if feature else compatibility.table())
        return
    if feature or (check and write):
        problem = Problem("explain takes one page and nothing else", "see raytrain-adv explain -h")
        raise job_error("The command line", [problem])
    try:
        old = page.read_text()
        new = compatibility.renewed(old)
        if write:
            page.write_text(new)
            return
    except (OSError, ValueError) as error:
        raise StorageError("The page cannot be read or written", str(error), "name one") from None
    if new != old:
        raise JobError(
            f"The compatibility matrix in {page} is stale",
            "it differs from the features' own rules",
            f"raytrain-adv explain --write {page}",
        )


@app.command()
def schema(
    output: Annotated[Path | None, option("FILE", "Write it there.", "--output", "-o")] = None,
) -> None:
    """Print the JSON schema of the job file."""
    text = json.dumps(schemas.schema(), indent=2) + "\n"
    if output is None:
        print(text, end="")
        return
    try:
        output.write_text(text)
    except (OSError, ValueError) as error:
        fix = "name a file in a folder you can write"
        raise StorageError("The schema cannot be written", str(error), fix) from None


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        print(f"raytrain-adv {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    """Fine-tune Hugging Face language models on Ray: FP8, QAT and Hub kernels."""


if __name__ == "__main__":
    sys.exit(main())
