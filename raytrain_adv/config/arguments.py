"""The command line of a job: its file, key=value overrides, and --plan with its options."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from raytrain_adv.config.assumptions import Assumptions, assumptions
from raytrain_adv.config.problems import Problem, job_error
from raytrain_adv.config.sections import LARGEST
from raytrain_adv.redaction import is_secret_name

USAGE = """usage: {program} job.yaml {options}[key=value ...]

  job.yaml     the job: flat keys, those of LLaMA-Factory (`raytrain-adv schema` lists them)
  key=value    another value for a key, as YAML: learning_rate=1e-4 lr_scheduler_kwargs.min_lr=1e-6
{plan}  --workers N  plan for N workers, whatever ray_num_workers says
  --verbose    show the keys that have their default too
  --assume NAME=VALUE  of the cluster, for more workers than one node has: {names}"""
_PLAN = """  --plan       show what would be done, and the memory it takes; train nothing. With it:
"""


class Arguments(NamedTuple):
    """A parsed command line."""

    path: str
    overrides: list[str]
    plan_only: bool
    workers: int | None = None
    """Workers to plan for; none means those of the job."""
    verbose: bool = False
    """Whether the plan shows the keys that have their default."""
    assumed: Assumptions | None = None
    """The cluster to plan for; none where nothing is said of it."""


def parse(
    argv: Sequence[str], program: str = "python -m raytrain_adv.launch", *, plans: bool = False
) -> Arguments:
    """Return the parts of a job's command line.

    Args:
        argv: the arguments after the program's name.
        program: what the user typed, for the usage.
        plans: whether this command always plans, as `raytrain-adv plan` does.

    Raises:
        JobError: naming each argument that is none, and how it is written.
        SystemExit: after printing the usage, when it is asked for.
    """
    usage = _usage(program, plans)
    if "-h" in argv or "--help" in argv:
        print(usage)
        sys.exit(0)
    plan_only = plans or "--plan" in argv
    options, arguments, problems = _options(argv)
    assumed, wrong = assumptions(options["--assume"]) if "--assume" in options else (None, [])
    problems += wrong
    if not plan_only:
        problems += [
            Problem(f"{name} says how a plan is shown", f"write --plan too, or leave {name} out")
            for name in options
        ]
    overrides: list[str] = []
    paths: list[str] = []
    for place, argument in enumerate(arguments):
        if argument.startswith("-"):
            problems.append(_flag_problem(arguments, place))
        elif _is_value_of_flag(arguments, place):
            continue
        elif not paths and ("=" not in argument or _is_file(argument)):
            paths.append(argument)
        elif "=" in argument:
            overrides.append(argument)
        else:
            text = f"{argument!r} is neither key=value nor the only job file"
            problems.append(
                Problem(text, f"write {argument}=value, or put a value with spaces in quotes")
            )
    if not paths:
        problems.insert(0, Problem("no job file is named", usage.splitlines()[0]))
    if problems:
        raise job_error("The command line", problems)
    workers = options["--workers"][0] if "--workers" in options else None
    return Arguments(
        paths[0],
        overrides,
        plan_only,
        _count(workers) if workers is not None else None,
        "--verbose" in options,
        assumed,
    )


def _usage(program: str, plans: bool) -> str:
    options = "[--workers N] [--verbose] [--assume NAME=VALUE] "
    names = "\n".join(
        f"               {name} ({value:g})" for name, value in asdict(Assumptions()).items()
    )
    return USAGE.format(
        program=program,
        names=f"\n{names}",
        options=options if plans else "[--plan] ",
        plan="" if plans else _PLAN,
    )


def _options(argv: Sequence[str]) -> tuple[dict[str, list[str]], list[str], list[Problem]]:
    """Take the options off a command line: their values, the other arguments, what is wrong."""
    found: dict[str, list[str]] = {}
    others: list[str] = []
    problems: list[Problem] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if name == "--workers":
            if not equals:
                value = rest.pop(0) if rest and not _is_job_or_key(rest[0]) else ""
            found[name] = [value]
            if not _count(value):
                text = f"--workers {value[:80]!r}: it takes a number of workers"
                problems.append(Problem(text, f"write --workers N, N from 1 to {LARGEST}"))
        elif name == "--assume":
            if not equals:
                value = rest.pop(0) if rest and not rest[0].startswith("--") else ""
            found[name] = [*found.get(name, []), value]
        elif argument == "--verbose":
            found[argument] = []
        elif argument != "--plan":
            others.append(argument)
    return found, others, problems


def _count(text: str) -> int:
    """Return the whole number that is written, or 0 where it is none that can be counted with."""
    digits = text if text.isascii() and text.isdigit() and len(text) <= len(str(LARGEST)) else "0"
    return int(digits) if int(digits) <= LARGEST else 0


def _is_job_or_key(argument: str) -> bool:
    return argument.startswith("--") or "=" in argument or argument.endswith((".yaml", ".yml"))


def _flag_problem(arguments: Sequence[str], place: int) -> Problem:
    argument = arguments[place]
    key, equals, value = argument.lstrip("-").replace("-", "_").partition("=")
    if not equals:
        value = arguments[place + 1] if _is_value_of_flag(arguments, place + 1) else "true"
    else:
        value = argument.partition("=")[2]
    value = "..." if is_secret_name(key) else value
    fix = f"write {key}={value}" if key.isidentifier() else "write key=value"
    flag = argument.partition("=")[0]
    return Problem(f"{flag!r}: there is no such option; keys are written without dashes", fix)


def _is_value_of_flag(arguments: Sequence[str], place: int) -> bool:
    """Whether an argument is what a `--key value` flag would take: plain text after a flag."""
    if not 0 < place < len(arguments):
        return False
    before, argument = arguments[place - 1], arguments[place]
    looks_like_file = (
        argument.endswith((".yaml", ".yml")) or "=" in argument or argument.startswith("-")
    )
    return before.startswith("-") and "=" not in before and not looks_like_file


def _is_file(argument: str) -> bool:
    try:
        return Path(argument).is_file()
    except (OSError, ValueError):
        return False
