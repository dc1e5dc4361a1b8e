"""What is wrong with a job file: collected one by one, shown to the user as one message."""

import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from raytrain_adv.errors import JobError
from raytrain_adv.redaction import HIDDEN, hide, is_secret_name

MAX_SHOWN = 60
"""Problems beyond this many are counted, not listed."""
MAX_PATH = 300

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80
_short.maxlist = _short.maxdict = 6
_short.maxlevel = 3


@dataclass(frozen=True)
class Problem:
    """One thing wrong with the job: what was found, and what to do about it."""

    text: str
    fix: str = ""
    key: str = ""
    """The key it is about; empty when it is about the file."""
    where: str = ""
    """Place in the file or on the command line, as `line 7`."""

    def found(self) -> str:
        """Return the line of the message that says what was found."""
        return ": ".join(part for part in (self.where, self.key, self.text) if part)

    def at(self, where: str) -> "Problem":
        """Return this problem with its place filled in, unless it has one already."""
        return self if self.where else replace(self, where=where)


def show(value: Any, key: str = "") -> str:
    """Return a value as one would write it in YAML, shortened; never the value of a key that holds
    a secret."""
    if value is not None and is_secret_name(key):
        return HIDDEN
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and value.bit_length() > 200:
        return "a number of more than 60 digits"
    if isinstance(value, int | float):
        return str(value)
    # Hidden before it is shortened, too: half a secret has no known form.
    return printable(hide(_short.repr(hide(value) if isinstance(value, str) else value)))


def printable(text: str) -> str:
    """Return the text on one line, with what no terminal can print written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def job_error(source: str, problems: Iterable[Problem]) -> JobError:
    """Return one error that lists every problem, and below them what to do about each."""
    every = list(problems)
    listed = every[:MAX_SHOWN]
    remedies: dict[str, list[str]] = {}
    for problem in listed:
        if problem.fix:
            keys = remedies.setdefault(problem.fix, [])
            if problem.key and problem.key not in keys:
                keys.append(problem.key)
    found = [printable(hide(problem.found())) for problem in listed]
    if len(every) > len(listed):
        found.append(f"and {len(every) - len(listed)} more")
    fixes = [
        printable(hide(f"{', '.join(keys)}: {fix}" if keys else fix))
        for fix, keys in remedies.items()
    ]
    count = "1 problem" if len(every) == 1 else f"{len(every)} problems"
    what = f"{printable(hide(source)[:MAX_PATH])} cannot be run as written ({count})"
    return JobError(what, "\n".join(found), "\n".join(fixes))
