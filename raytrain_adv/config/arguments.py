"""The command line of a job: its file, key=value overrides, and --plan."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from raytrain_adv.config.problems import Problem, is_secret, job_error

USAGE = """usage: {program} job.yaml [--plan] [key=value ...]

  job.yaml    the job: flat keys, those of LLaMA-Factory (`raytrain-adv schema` lists them)
  key=value   another value for a key, as YAML: learning_rate=1e-4 lr_scheduler_kwargs.min_lr=1e-6
  --plan      show what would be done, and the memory it takes; train nothing"""


class Arguments(NamedTuple):
    """A parsed command line."""

    path: str
    overrides: list[str]
    plan_only: bool


def parse(argv: Sequence[str], program: str = "python -m raytrain_adv.launch") -> Arguments:
    """Return the parts of a job's command line.

    Raises:
        JobError: naming each argument that is none, and how it is written.
        SystemExit: after printing the usage, when it is asked for.
    """
    usage = USAGE.format(program=program)
    if "-h" in argv or "--help" in argv:
        print(usage)
        sys.exit(0)
    problems: list[Problem] = []
    overrides: list[str] = []
    paths: list[str] = []
    arguments = [argument for argument in argv if argument != "--plan"]
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
    return Arguments(paths[0], overrides, "--plan" in argv)


def _flag_problem(arguments: Sequence[str], place: int) -> Problem:
    argument = arguments[place]
    key, equals, value = argument.lstrip("-").replace("-", "_").partition("=")
    if not equals:
        value = arguments[place + 1] if _is_value_of_flag(arguments, place + 1) else "true"
    else:
        value = argument.partition("=")[2]
    value = "..." if is_secret(key) else value
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
