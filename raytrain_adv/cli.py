"""The command line: `raytrain-adv COMMAND`, and `python -m raytrain_adv.launch` for one of them."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from raytrain_adv import __version__, errors
from raytrain_adv.config import JobConfig, load
from raytrain_adv.config.problems import ON_COMMAND_LINE, Problem, command_error, job_error
from raytrain_adv.config.rules import check_workers
from raytrain_adv.config.sections import LARGEST
from raytrain_adv.driver.commands.dashboard import dashboard_command
from raytrain_adv.driver.commands.formats import export_command
from raytrain_adv.driver.commands.reference import REFERENCE
from raytrain_adv.driver.commands.use.commands import COMMANDS
from raytrain_adv.errors import EXIT_DONE, RaytrainAdvError
from raytrain_adv.estimate.assumptions import Assumptions, assumptions
from raytrain_adv.imports import few_collections
from raytrain_adv.redaction import hide, hide_environment, is_secret_name
from raytrain_adv.storage.user_cache import keep_bytecode
from raytrain_adv.streams import open_closed_streams, outlast_the_reader
from raytrain_adv.text import clean, nearest
from raytrain_adv.worker.preconditions import check_files

Command = Callable[..., Any]
MODULE = "python -m raytrain_adv.launch"
HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
JOB = {**HELP, "ignore_unknown_options": True}  # job_arguments says how --learning-rate is written


def main(argv: Sequence[str] | None = None, program: str = "raytrain-adv") -> int:
    """Run one command, by default this process's, and return its exit code; print errors as text.
    `program` is the name in usage lines; MODULE is the command `launch` alone.
    """
    open_closed_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        command = launch if program == MODULE else _command_of(arguments)
        code = command.main(arguments, program, standalone_mode=False)
        return code if isinstance(code, int) else EXIT_DONE
    except click.UsageError as error:
        fix = f"{error.ctx.command_path if error.ctx else program} --help lists what it takes"
        return _refuse(command_error(" ".join(error.format_message().split()), fix))
    except RaytrainAdvError as error:
        return _refuse(error)
    except ModuleNotFoundError as error:
        cause: BaseException | None = error
        while isinstance(cause, ModuleNotFoundError) and cause.name is None:
            cause = cause.__cause__  # transformers raises one of its own, without the name
        name = cause.name if isinstance(cause, ModuleNotFoundError) else None
        if name is None or name.startswith("raytrain_adv"):
            raise
        fix = "activate the environment (. .venv/bin/activate), or pip install -e ."
        what = f"{name} is not installed for {sys.executable}"
        return _refuse(RaytrainAdvError(what, "", fix))
    except BrokenPipeError:  # the reader has seen enough, as in `raytrain-adv schema | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_DONE
    except (KeyboardInterrupt, click.Abort):
        sys.stderr.write(errors.STOPPED)
        return errors.EXIT_STOPPED


def _refuse(error: RaytrainAdvError) -> int:
    """Print an error in whatever encoding stderr has, and return its exit code. It may quote files
    of others: what is a secret by its form is left out, as are control characters.
    """
    encoding = sys.stderr.encoding or "utf-8"
    shown = clean(hide(hide_environment(str(error))))
    print(f"\n{shown.encode(encoding, 'backslashreplace').decode(encoding)}", file=sys.stderr)
    return error.exit_code


_LLAMAFACTORY = {
    "train": "launch", "eval": "evaluate", "api": "chat", "webchat": "chat", "webui": "dashboard",
    "env": "doctor", "sft": "launch",
}  # fmt: skip
"""Commands of llamafactory-cli, and of its v1 -> those here."""


def _command_of(arguments: list[str]) -> click.Group:
    if not arguments or arguments[0] == "help":
        arguments[:] = ["--help"]
    word = arguments[0]
    if not word.startswith("-") and word not in app.commands:
        near = _LLAMAFACTORY.get(word) or nearest(word, app.commands)
        fix = f"did you mean {near}?" if near else f"write one of {', '.join(app.commands)} first"
        if word.endswith((".yaml", ".yml")):
            fix = f"write raytrain-adv launch {word}"
        raise command_error(f"{word!r} is not a command", fix)
    return app


@click.group(context_settings=HELP)
@click.version_option(__version__, prog_name="raytrain-adv", message="%(prog)s %(version)s")
def app() -> None:
    """Fine-tune Hugging Face language models on Ray, from one YAML file."""


def job_options(command: Command) -> Command:
    """Take a job file and key=value overrides, in any order."""
    text = "job.yaml [key=value]..."
    return click.argument("arguments", nargs=-1, metavar=text, type=click.UNPROCESSED)(command)


def plan_options(command: Command) -> Command:
    """Take the options of a printed plan."""
    names = ", ".join(f"{name} ({value:g})" for name, value in asdict(Assumptions()).items())
    count = click.IntRange(1, LARGEST)
    for option in (
        click.option("--assume", multiple=True, metavar="NAME=VALUE", help=f"A figure of the "
                     f"cluster, for more workers than one node has: {names}."),
        click.option("--verbose", is_flag=True, help="Show keys at their defaults too."),
        click.option("--workers", type=count, metavar="N", help="Plan for N workers instead of "
                     "ray_num_workers."),
    ):  # fmt: skip
        command = option(command)
    return command


def job_arguments(arguments: Sequence[str], program: str) -> tuple[str, list[str]]:
    """Return the job file and the key=value overrides, or raise a JobError for other arguments."""
    paths: list[str] = []
    overrides: list[str] = []
    problems: list[Problem] = []
    for place, argument in enumerate(arguments):
        if argument.startswith("-"):
            problems.append(_dashed_key(arguments, place))
        elif _is_value_of_flag(arguments, place):
            continue
        elif not paths and ("=" not in argument or os.path.isfile(argument)):
            paths.append(argument)
        elif "=" in argument:
            overrides.append(argument)
        else:
            fix = f"write {argument}=value, or put a value with spaces in quotes"
            problems.append(Problem(f"{argument!r} is neither key=value nor the job file", fix))
    if not paths:
        usage = f"usage: {program} job.yaml [key=value]..."
        problems.insert(0, Problem("no job file is named", usage))
    if problems:
        raise job_error(ON_COMMAND_LINE, problems)
    return paths[0], overrides


def _dashed_key(arguments: Sequence[str], place: int) -> Problem:
    """Describe `--learning-rate 1e-4`, without its value if that is secret."""
    flag, equals, value = arguments[place].partition("=")
    key = flag.lstrip("-").replace("-", "_")
    if not equals:
        value = arguments[place + 1] if _is_value_of_flag(arguments, place + 1) else "true"
    value = "..." if is_secret_name(key) else value
    fix = f"write {key}={value}" if key.isidentifier() else "write key=value"
    return Problem(f"{flag!r}: there is no such option; keys are written without dashes", fix)


def _is_value_of_flag(arguments: Sequence[str], place: int) -> bool:
    """Whether an argument is what a `--key value` flag would take: plain text after a flag."""
    if not 0 < place < len(arguments):
        return False
    before, argument = arguments[place - 1], arguments[place]
    is_other = "=" in argument or argument.startswith("-") or argument.endswith((".yaml", ".yml"))
    return before.startswith("-") and "=" not in before and not is_other


def _load(arguments: Sequence[str]) -> JobConfig:
    return load(*job_arguments(arguments, click.get_current_context().command_path))


def _show_plan(job: JobConfig, workers: int | None, verbose: bool, assume: Sequence[str]) -> None:
    assumed, problems = assumptions(assume) if assume else (None, [])
    if problems:
        raise job_error(ON_COMMAND_LINE, problems)
    check_workers(job, workers)
    with few_collections():
        from raytrain_adv.driver.plan.plan import show

    show(job, workers, verbose, assumed)


@app.command(context_settings=JOB)
@job_options
@click.option("--plan", is_flag=True, help="Show what the job would do, and train nothing.")
@plan_options
def launch(arguments: tuple[str, ...], plan: bool, **options: Any) -> None:
    """Run a job.

    job.yaml has flat keys, those of LLaMA-Factory; `raytrain-adv schema` lists them. key=value
    changes a key, as YAML: learning_rate=1e-4 lr_scheduler_kwargs.min_lr=1e-6.
    --workers, --verbose and --assume need --plan.

    Exit codes: 0 done, 2 the job file or what it names, 3 training failed, 4 the cluster refused,
    6 done but not uploaded, 130 stopped by Ctrl-C or SIGTERM.
    """
    began = time.time()
    given = [f"--{name}" for name, value in options.items() if value]
    if given and not plan:
        raise command_error(f"{', '.join(given)}: only a plan takes it", "write --plan too")
    job = _load(arguments)
    if kept := keep_bytecode():
        click.echo(kept)
    if plan:
        return _show_plan(job, **options)
    from raytrain_adv.driver.output import output_dir

    resumes = job.output.resume_from_checkpoint is True
    if not (resumes and output_dir.has_ended(Path(job.output.output_dir))):
        check_files(job)  # a finished job prints its summary, with or without its files
    with few_collections():
        if job.sweep is not None:
            from raytrain_adv.driver.sweep.sweep import run
        else:
            from raytrain_adv.driver.training.run import run
    outlast_the_reader()
    run(job, began=began)


@app.command(context_settings=JOB)
@job_options
@plan_options
def plan(arguments: tuple[str, ...], **options: Any) -> None:
    """Show what a job would do, and its memory."""
    _show_plan(_load(arguments), **options)


@app.command(context_settings=JOB)
@job_options
@click.option("--rows", type=click.IntRange(1, 1000), default=3, help="Rows to show (default: 3).")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write a page too.")
def data(arguments: tuple[str, ...], rows: int, html: Path | None) -> None:
    """Show rows as the model will see them, what is trained, and which are cut or left out."""
    check_files(job := _load(arguments))
    from raytrain_adv.driver.commands.data import show

    show(job, rows, html)


ADDRESS = click.option("--address", metavar="URL", help="The cluster's dashboard; by default "
                       "RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or this machine's.")  # fmt: skip


@app.command(context_settings=JOB)
@job_options
@ADDRESS
@click.option("--runtime-env", metavar="FILE", help="Files to upload, and the environment there; "
              "by default jobs/runtime_env.yaml.")  # fmt: skip
def submit(arguments: tuple[str, ...], address: str | None, runtime_env: str | None) -> int:
    """Run a job on a running cluster, and follow its log.

    Uploads this folder without checkpoints, data and environments. The job's exit code becomes this
    command's. Ctrl-C stops the job, with a checkpoint. output_dir must be an absolute path on
    storage of the cluster.
    """
    if "--plan" in arguments:
        raise command_error("a plan is made on this machine", "write raytrain-adv plan job.yaml")
    path, overrides = job_arguments(arguments, "raytrain-adv submit")
    from raytrain_adv.driver.commands.submit import submit

    return submit(path, overrides, address, runtime_env)


@app.command()
@ADDRESS
@click.argument("run", required=False)
def status(address: str | None, run: str | None) -> None:
    """List the runs of a cluster, or show one.

    RUN is a run's name, or its output_dir.
    """
    from raytrain_adv.driver.commands.status import show

    show(address, run)


@app.command()
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.option("--fix", is_flag=True, help="Repair what can be repaired. Nothing is deleted: "
              "what is removed is in RUN/set-aside afterward.")  # fmt: skip
def doctor(run: Path | None, fix: bool) -> int:
    """Check the files of a run, and repair them.

    Prints what is wrong in RUN, an output_dir, and what a rerun does. RUN must not be running.
    Exit codes: 0 nothing is wrong or all is repaired, 5 something is wrong, 2 there is no such run
    or it is running.
    """
    if run is None:
        from raytrain_adv.driver.output.output_dir import runs_in
        from raytrain_adv.text import listed

        here = listed(list(map(str, runs_in(Path()))), 5) or "none in this folder"
        raise command_error(
            f"no run is named; the last ones: {here}", "raytrain-adv doctor OUTPUT_DIR"
        )
    from raytrain_adv.driver.commands.doctor import show

    return EXIT_DONE if show(run, fix) else errors.EXIT_NOT_MENDED


@app.command(context_settings=JOB)
@click.argument("arguments", nargs=-1, metavar="[job.yaml [key=value]...]", type=click.UNPROCESSED)
def preflight(arguments: tuple[str, ...]) -> None:
    """Check the cluster's nodes, for a job or for any."""
    job = _load(arguments) if arguments else None
    if job is not None:
        check_files(job)
    from raytrain_adv.driver.commands.preflight import show

    show(job)


@app.group(no_args_is_help=False)
def kernels() -> None:
    """Pin a job's kernels, for a cluster without internet."""


@kernels.command(context_settings=JOB)
@job_options
@click.option("--output", type=click.Path(path_type=Path), default="kernels.lock.json")
@click.option("--torch", metavar="X.Y", help="PyTorch's version on the workers.")
@click.option("--cuda", metavar="X.Y|cpu", help="CUDA's version on the workers.")
def lock(arguments: tuple[str, ...], output: Path, torch: str | None, cuda: str | None) -> None:
    """Write the lock file of a job's kernels."""
    job = _load(arguments)
    from raytrain_adv.driver.commands import kernels

    kernels.lock(job, output, torch, cuda)


@kernels.command()
@click.argument("file", type=click.Path(path_type=Path))
def fetch(file: Path) -> None:
    """Download the files of a lock file."""
    from raytrain_adv.driver.commands import kernels

    kernels.fetch(file)


@kernels.command()
@click.argument("file", type=click.Path(path_type=Path))
def verify(file: Path) -> None:
    """Compare the files of a lock file with it."""
    from raytrain_adv.driver.commands import kernels

    kernels.verify(file)


@app.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option("--html", type=click.Path(path_type=Path), default=Path("compared.html"),
              metavar="FILE", help="The page (default: compared.html).")  # fmt: skip
def report(runs: tuple[Path, ...], html: Path) -> None:
    """Compare runs: their curves, and the keys and results in which they differ.

    RUN is a run's output_dir; of one alone its report.html is written again, with what it has
    reached so far. The page opens from disk and loads nothing.
    """
    from raytrain_adv.report import compared, record
    from raytrain_adv.report.html import write_html
    from raytrain_adv.report.summary import summary

    if len(runs) == 1:
        found = record.read(runs[0])
        print(summary(found))
        print(f"\nwrote {write_html(found, runs[0])}")
        return
    read = compared.read_runs(runs)
    print(compared.render_text(read))
    record.write_text(compared.render(read), html)
    print(f"\nwrote {html}")


for _command in (*COMMANDS, *REFERENCE, dashboard_command, export_command):
    app.add_command(_command)

if __name__ == "__main__":
    sys.exit(main())
