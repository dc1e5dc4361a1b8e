"""What commands take: their arguments and options, and the command line of a job."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from raytrain_adv.config.problems import Problem, job_error
from raytrain_adv.config.sections import LARGEST
from raytrain_adv.estimate.assumptions import Assumptions, assumptions
from raytrain_adv.redaction import is_secret_name
from raytrain_adv.text import nearest


def option(metavar: str, text: str, *names: str) -> Any:
    """Declare an option with a value."""
    return typer.Option(*names, metavar=metavar, help=text)


def flag(name: str, text: str) -> Any:
    """Declare an option without a value."""
    return typer.Option(name, help=text)


def argument(metavar: str, text: str) -> Any:
    """Declare a positional argument."""
    return typer.Argument(metavar=metavar, help=text, show_default=False)


ASSUMED = ", ".join(f"{name} ({value:g})" for name, value in asdict(Assumptions()).items())
KEY_VALUE = (
    "Other values for its keys, as YAML: learning_rate=1e-4 lr_scheduler_kwargs.min_lr=1e-6."
)
QAT_KEYS = (
    "enable_qat=true qat_weight_dtype=int4 qat_activation_dtype=int8 qat_group_size=32 "
    "qat_quantize_embedding=false qat_exclude=down_proj"
)
DASHBOARD = "Default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or http://127.0.0.1:8265."
JOB = argument("job.yaml", "The job file; `raytrain-adv schema` lists its keys.")
Job = Annotated[str, JOB]
Overrides = Annotated[list[str] | None, argument("key=value", KEY_VALUE)]
Workers = Annotated[str | None, option("N", "Plan for N workers instead of ray_num_workers.")]
Verbose = Annotated[bool, flag("--verbose", "Show the keys at their defaults too.")]
Assume = Annotated[
    list[str] | None, option("NAME=VALUE", f"A property of a cluster of several nodes: {ASSUMED}.")
]
Address = Annotated[str | None, option("URL", f"The cluster's dashboard. {DASHBOARD}")]
LockFile = Annotated[Path, argument("FILE", "The lock file.")]


class Line(NamedTuple):
    """The parsed command line of a job."""

    path: str
    overrides: list[str]
    workers: int | None
    """Workers to plan for; None for those of the job."""
    assumed: Assumptions | None
    """The cluster to plan for; None if no --assume was given."""


def job_line(
    context: typer.Context,
    arguments: Sequence[str],
    workers: str | None = None,
    assume: Sequence[str] | None = None,
    problems: Sequence[Problem] = (),
) -> Line:
    """Return the parts of a job's command line.

    Raises:
        JobError: naming each wrong argument, and how it is written; `problems` come first.
    """
    assumed, wrong = assumptions(assume) if assume else (None, [])
    found, overrides, paths = [*problems, *wrong], list[str](), list[str]()
    if workers is not None and not _count(workers):
        if _is_job_or_key(workers):  # the number is missing
            arguments, workers = [workers, *arguments], ""
        text = f"--workers {workers[:80]!r}: it takes a number of workers"
        found.append(Problem(text, f"write --workers N, N from 1 to {LARGEST}"))
    for place, argument in enumerate(arguments):
        if argument.startswith("-"):
            found.append(no_option(context, arguments, place))
        elif _is_value_of_flag(arguments, place):
            continue
        elif not paths and ("=" not in argument or exists(argument)):
            paths.append(argument)
        elif "=" in argument:
            overrides.append(argument)
        else:
            text = f"{argument!r} is neither key=value nor the only job file"
            fix = f"write {argument}=value, or put a value with spaces in quotes"
            found.append(Problem(text, fix))
    if not paths:
        fix = f"write {context.command_path} job.yaml [key=value ...]"
        found.insert(0, Problem("no job file is named", fix))
    if found:
        raise job_error("The command line", found)
    return Line(paths[0], overrides, _count(workers) if workers else None, assumed)


def no_option(context: typer.Context, arguments: Sequence[str], place: int) -> Problem:
    """Return the problem of an unknown option: the nearest one, or how a key is written."""
    flag, equals, value = arguments[place].partition("=")
    options = [name for option in context.command.params for name in option.opts if name[0] == "-"]
    similar = nearest(flag, options, cutoff=0.8)
    key = flag.lstrip("-").replace("-", "_")
    if not equals:
        value = arguments[place + 1] if _is_value_of_flag(arguments, place + 1) else "true"
    if is_secret_name(key):
        value = "..."
    fix = similar or (f"{key}={value}" if key.isidentifier() else "key=value")
    return Problem(
        f"{flag!r}: there is no such option; keys are written without dashes", f"write {fix}"
    )


def _count(text: str) -> int:
    """Return a number of workers, or 0 for a text that is not one."""
    digits = text if text.isascii() and text.isdigit() and len(text) <= len(str(LARGEST)) else "0"
    return int(digits) if int(digits) <= LARGEST else 0


def _is_job_or_key(argument: str) -> bool:
    return "=" in argument or argument.endswith((".yaml", ".yml"))


def _is_value_of_flag(arguments: Sequence[str], place: int) -> bool:
    """Whether an argument could be the value in `--key value`: plain text after a flag."""
    if not 0 < place < len(arguments):
        return False
    before, argument = arguments[place - 1], arguments[place]
    is_plain = not argument.startswith("-") and not _is_job_or_key(argument)
    return is_plain and before.startswith("-") and "=" not in before


def exists(argument: str, folder: bool = False) -> bool:
    """Whether an argument is the path of a file, or of a folder."""
    try:
        return Path(argument).is_dir() if folder else Path(argument).is_file()
    except (OSError, ValueError):
        return False
