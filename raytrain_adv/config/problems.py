"""Collect the problems of a job file, and report them in one message."""

import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from raytrain_adv.errors import JobError
from raytrain_adv.redaction import HIDDEN, hide, is_secret_name
from raytrain_adv.text import plural

MAX_SHOWN = 60
"""Further problems are counted, not listed."""
MAX_PATH = 300
ON_COMMAND_LINE = "The command line"

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_short.maxlist = _short.maxdict = 6
_short.maxlevel = 3


@dataclass(frozen=True)
class Problem:
    """One error in the job: what was found, and how to fix it."""

    text: str
    fix: str = ""
    key: str = ""
    """The key; empty for a problem of the whole file."""
    where: str = ""
    """Place in the file or on the command line, as `line 7`."""

    @property
    def keys(self) -> list[str]:
        """The keys of a contradiction, which `key` names as `packing and neat_packing`."""
        return self.key.split(" and ")

    def found(self) -> str:
        """Return its line in the message."""
        return ": ".join(part for part in (self.where, self.key, self.text) if part)

    def at(self, where: str) -> "Problem":
        """Return this problem with its place, unless it already has one."""
        return self if self.where else replace(self, where=where)


def show(value: Any, key: str = "") -> str:
    """Return a value as YAML, shortened; the value of a secret's key is hidden."""
    if value is not None and is_secret_name(key):
        return HIDDEN
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of more than 60 digits"
    if isinstance(value, int | float):
        return str(value)
    # Hide before shortening too: half a secret has no known form.
    return printable(hide(_short.repr(hide(value) if isinstance(value, str) else value)))


def printable(text: str) -> str:
    """Return the text on one line, with unprintable characters as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def job_error(source: str, problems: Iterable[Problem]) -> JobError:
    """Return one error that lists every problem, then every fix."""
    every = list(problems)
    listed = every[:MAX_SHOWN]
    remedies: dict[str, dict[str, None]] = {}
    for problem in listed:
        if problem.fix:
            remedies.setdefault(problem.fix, {}).update({problem.key: None} if problem.key else {})
    found = [printable(hide(problem.found())) for problem in listed]
    if len(every) > len(listed):
        found.append(f"and {len(every) - len(listed)} more")
    named = (f"{', '.join(keys)}: {fix}" if keys else fix for fix, keys in remedies.items())
    fixes = "\n".join(printable(hide(fix)) for fix in named)
    name, number = printable(hide(source)[:MAX_PATH]), plural(len(every), "problem")
    return JobError(f"{name} cannot be run as written ({number})", "\n".join(found), fixes)


def command_error(text: str, fix: str, key: str = "") -> JobError:
    """Return the error of a command line with one problem."""
    return job_error(ON_COMMAND_LINE, [Problem(text, fix, key)])
