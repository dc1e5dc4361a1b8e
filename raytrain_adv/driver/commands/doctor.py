"""`raytrain-adv doctor`: find damage in a run's files, print what it means for a rerun, and repair
it with --fix. Without Ray.
"""

from __future__ import annotations

import re
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from raytrain_adv.checkpoint.folders import MANIFEST
from raytrain_adv.config.discovery import transform_types
from raytrain_adv.config.rules import switch
from raytrain_adv.driver.commands.damage import (
    MISSING,
    ROWS_LOST,
    SNAPSHOT,
    Seen,
    checkpoints,
    gaps,
    repeated,
    without_repeats,
    wrong_snapshot,
    wrong_with_model,
)
from raytrain_adv.driver.output import output_dir
from raytrain_adv.driver.output.output_dir import MODELS, RUN_FILE, Record
from raytrain_adv.driver.output.set_aside import FOLDER, SetAside
from raytrain_adv.driver.watch.stop import STOP_FILE
from raytrain_adv.errors import JobError, StorageError
from raytrain_adv.report import record
from raytrain_adv.storage import metrics_file
from raytrain_adv.storage.metrics_file import FILE_NAME
from raytrain_adv.storage.storage import Storage, storage_errors
from raytrain_adv.text import first_line, listed, plural

WIDTH = 100
FOLDING: dict[str, Any] = {
    "subsequent_indent": " " * 11,
    "break_long_words": False,
    "break_on_hyphens": False,
}
ROUNDS = 4
"""A repair may cause another finding: a snapshot names the checkpoint that was set aside."""
Repair = Callable[[SetAside], None]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    where: str
    what: str
    means: str
    """What it means for a rerun that resumes, or for a reader of the run."""
    fix: str
    """What --fix does about it; without a `repair`, what the user can do."""
    repair: Repair | None = None
    reopens: bool = False
    """Whether the repair makes a rerun continue a run that has ended."""


class Examined:
    """A run as its files are now, and what is wrong with them.

    Args:
        folder: output_dir.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = output_dir.record_of(folder)
        self.job: dict[str, Any] = self.run["job"] if self.run is not None else {}
        self.is_done = self.run is not None and self.run["status"] == "done"
        name = self.job.get("ray_run_name") or Path(self.job.get("output_dir") or folder).name
        base = self.job.get("ray_storage_path")
        self.storage = Storage.at(output_dir.storage_below(folder, base, name))
        self.own = Storage.at(str(folder))
        self.seen = checkpoints(self.storage)
        self.whole = [one for one in self.seen if not one.damage]
        self.limit: int | None = self.job.get("save_total_limit")
        self.findings = [*self._checkpoints(), *self._output()]

    def _checkpoints(self) -> Iterator[Finding]:
        for one in self.seen:
            if one.damage:
                yield self._damaged(one)
        for one in self.whole[self.limit or len(self.whole) :]:
            what = (
                f"a whole checkpoint, but save_total_limit: {self.limit} keeps newer ones: the run "
                "ended before deleting it"
            )
            means = "none: a rerun resumes from the newest; it uses disk space until the next one"
            yield _taken(self.storage, one.name, what, means, "set aside, for you to delete")
        for attempt in self.storage.folders():
            files = self.storage.folder(attempt).files() if attempt != FOLDER else ()
            for name in files:
                if name.endswith(".partial"):
                    yield _leftover(self.storage, f"{attempt}/{name}")
            if SNAPSHOT in files and (
                what := wrong_snapshot(self.storage, attempt, self.seen, self.limit)
            ):
                means = (
                    "none: a rerun has its own name in Ray, and resumes by the checkpoints' own "
                    f"files; under the name {attempt} Ray Train would not start again"
                )
                yield _taken(self.storage, f"{attempt}/{SNAPSHOT}", what, means)

    def _damaged(self, one: Seen) -> Finding:
        before = next((s for s in self.whole if s.step <= one.step), None)
        instead = f"step {before.step}" if before else "no step: no earlier one is whole"
        means = f"a rerun that resumes skips it, and can resume from {instead}"
        if one.folder.read_json(MANIFEST) is not None:
            means += "; save_total_limit may count it and delete a whole one instead"
        return _taken(self.storage, one.name, one.damage, means)

    def _output(self) -> Iterator[Finding]:
        if self.run is None:
            yield self._no_record()
        elif self.run["status"] == "running":
            yield Finding(
                str(self.folder / RUN_FILE),
                "its status is running, but no driver holds the folder's lock: it was killed",
                "none for a rerun that resumes; raytrain-adv status shows the run as running",
                "the status becomes failed",
                partial(self._note_failed, self.run),
            )
        yield from self._metrics()
        yield from self._report()
        for name in MODELS:
            yield from self._model(name)
        torn = re.compile(r"\..*\.(partial|old)|.*\.json\.partial")
        for name in sorted([*self.own.files(), *self.own.folders()]):
            if torn.fullmatch(name):
                yield _leftover(self.own, name)
            elif name == STOP_FILE:
                what = "somebody asked the run to stop, and it ended before it did so"
                yield _taken(self.own, name, what, "none: a rerun removes it when it starts")

    def _note_failed(self, run: Record, aside: SetAside) -> None:
        if (self.folder / RUN_FILE).exists():
            aside.copy(self.folder / RUN_FILE)
        self.own.write_json(RUN_FILE, {**run, "status": "failed", "time": time.time()})

    def _no_record(self) -> Finding:
        path = self.folder / RUN_FILE
        what = "it is torn, or lacks what a rerun reads from it" if path.exists() else MISSING
        means = (
            "without resume_from_checkpoint a rerun is refused; with it, the keys of another job "
            "are noticed only on the workers, and a run that has ended seems unfinished"
        )
        manifest = self.whole[0].folder.read_json(MANIFEST) if self.whole else None
        if manifest is None:
            fix = "no checkpoint identifies the run: start again with overwrite_output_dir: true"
            return Finding(str(path), what, means, fix)
        attempts = output_dir.attempts_in(self.storage)
        run = {key: manifest[key] for key in ("fingerprint", "job")} | {"attempts": attempts}
        fix = f"written from {self.whole[0].name}/{MANIFEST}, with {plural(attempts, 'attempt')}"
        return Finding(str(path), what, means, fix, partial(self._note_failed, run))

    def _metrics(self) -> Iterator[Finding]:
        path = self.folder / FILE_NAME
        if not path.exists():
            if self.whole:
                yield _gap(path, 1, self.whole[0].step, MISSING)
            return
        with storage_errors("The metrics cannot be read", str(path)):
            *lines, tail = path.read_bytes().split(b"\n")
        rows = [
            (n, metrics_file.parse_row(line)) for n, line in enumerate(lines, 1) if line.strip()
        ]
        good = [row for _, row in rows if row is not None]
        kept = without_repeats(good)
        repair = partial(_rewrite, path, kept)
        aside = "; the file as it was is set aside"
        if tail:
            what = f"its last line is torn, after {len(tail):,} bytes"
            means = "none: a rerun that resumes drops it too"
            yield Finding(str(path), what, means, f"the torn line is dropped{aside}", repair)
        if bad := [str(number) for number, row in rows if row is None]:
            what = f"lines that hold no row: {listed(bad)}"
            means = "none for the training; the rows of their steps are lost"
            yield Finding(str(path), what, means, f"the lines are dropped{aside}", repair)
        if len(kept) < len(good):
            what = f"steps that occur more than once: {listed(repeated(good))}"
            means = (
                "none for the training; the report's curve goes back and forth, and a rerun keeps "
                "the rows before the step it resumes from"
            )
            yield Finding(str(path), what, means, f"each step keeps its last row{aside}", repair)
        every = self.job.get("logging_steps")
        if isinstance(every, int) and every >= 1:
            reached = self.whole[0].step if self.whole else 0
            yield from (_gap(path, *ends) for ends in gaps(kept, every, reached))

    def _report(self) -> Iterator[Finding]:
        path = self.folder / record.FILE_NAME
        if path.exists():
            try:
                record.read(self.folder)
                return
            except StorageError as error:
                what = first_line(error.found.removeprefix(f"{path}: "))
            yield self._unmade(path.name, what, "a rerun stops at it: the run has ended")
        elif self.is_done:
            means = "a rerun stops at it: the run has ended, and has no report"
            yield self._unmade(path.name, MISSING, means)

    def _model(self, name: str) -> Iterator[Finding]:
        what = wrong_with_model(self.folder / name)
        # A sweep with keep_models: best deletes the models of its other trials.
        is_owed = self.is_done and self.folder.parent.name != "trials"
        is_owed = is_owed and bool(self.job.get("export_model", True))
        converts = any(self.job.get(switch(kind())) for kind in transform_types() if kind.converts)
        is_owed = is_owed and (name == "model" or converts)
        if what and (what != MISSING or is_owed):
            means = "it does not load, and a rerun leaves it so: the run has ended"
            yield self._unmade(name, what, means)

    def _unmade(self, name: str, what: str, means: str) -> Finding:
        """Return the finding of a file or folder that the end of a run writes, and that is missing
        or damaged.
        """
        if self.run is None or not self.is_done:
            return _taken(self.own, name, what, "none: a rerun that resumes writes it at its end")
        path, run = self.folder / name, self.run
        if not self.whole or self.whole[0].found is None or not self.whole[0].found.optimizer:
            fix = (
                "it cannot be made from a checkpoint: bring it back from a copy, or train again "
                "with overwrite_output_dir: true"
            )
            return Finding(str(path), what, means, fix)

        def repair(aside: SetAside) -> None:
            if path.exists():
                aside.take(self.own, name)
            self._note_failed(run, aside)

        fix = f"{RUN_FILE} gets the status failed: a rerun makes it from step {self.whole[0].step}"
        fix = f"set aside, and {fix}" if path.exists() else fix
        return Finding(str(path), what, means, fix, repair, reopens=True)


def show(folder: Path, fix: bool) -> bool:
    """Print what is wrong with a run and which checkpoint a rerun resumes from.

    Args:
        folder: the run's output_dir.
        fix: whether to repair it; otherwise nothing is changed.

    Returns:
        Whether nothing is wrong, or nothing any more.

    Raises:
        JobError: if there is no run there, or it is active.
        StorageError: if its files cannot be read or moved.
    """
    _require_run(folder)
    lock = FileLock(folder / output_dir.LOCK)
    with storage_errors("output_dir cannot be examined", str(folder)):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise JobError(
                "The run is still active (its driver holds the lock); nothing was changed",
                str(folder),
                f"raytrain-adv status {folder} shows it; stop it first, or wait for its end",
            ) from None
    try:
        return _show(folder, fix)
    finally:
        lock.release()


def _show(folder: Path, fix: bool) -> bool:
    with storage_errors("The run cannot be examined", str(folder)):
        found = Examined(folder)
    number = plural(len(found.findings), "finding") if found.findings else "nothing is wrong"
    print(f"{folder}: {number}")
    aside = SetAside(folder)
    shown: set[tuple[str, str]] = set()
    for _ in range(ROUNDS if fix else 1):
        new = [one for one in found.findings if (one.where, one.what) not in shown]
        for finding in new:
            shown.add((finding.where, finding.what))
            _print(len(shown), finding, fix)
        # Rewriting a file once repairs all that is wrong with its lines.
        repairs = dict.fromkeys(one.repair for one in new if one.repair is not None)
        if fix and repairs:
            for repair in repairs:
                repair(aside)
            found = Examined(folder)
    print(f"\n{_resumes(found, fix)}")
    for place in sorted(aside.places):
        print(f"Files were moved to {place}; delete it when you do not need it.")
    if found.findings and not fix:
        print(f"Nothing was changed. To repair it: raytrain-adv doctor {folder} --fix")
    elif found.findings:
        print(f"Not repaired: {', '.join(sorted({one.where for one in found.findings}))}")
    return not found.findings


def _print(number: int, finding: Finding, fix: bool) -> None:
    print(f"\n{number}. {finding.where}")
    label = "fixed" if fix and finding.repair else "--fix" if finding.repair else "to do"
    for name, text in (("found", finding.what), ("means", finding.means), (label, finding.fix)):
        # Not rich, which breaks long paths.
        print(textwrap.fill(f"   {name}   {text}", WIDTH, **FOLDING))


def _resumes(found: Examined, fix: bool) -> str:
    """Return from where a rerun with resume_from_checkpoint: true continues."""
    rerun = "A rerun with resume_from_checkpoint: true"
    if found.findings and not fix:
        rerun = f"Once repaired, a{rerun[1:]}"
    if found.is_done and not any(one.reopens for one in found.findings):
        overwrites = found.job.get("overwrite_output_dir")
        without = "deletes it (overwrite_output_dir: true)" if overwrites else "is refused"
        return (
            "The run has ended: it was trained to its last step. A rerun with "
            f"resume_from_checkpoint: true does nothing; one without {without}."
        )
    if not found.whole:
        none = f"there is no whole checkpoint in {found.storage.root}"
        return f"{rerun} starts at step 0: {none}."
    newest = found.whole[0]
    if newest.found is None or not newest.found.optimizer:
        only = f"{newest.folder.root} was written with save_only_model: true"
        return f"{rerun} is refused: {only}. raytrain-adv export writes its model."
    return f"{rerun} resumes from step {newest.step}: {newest.folder.root}"


def _require_run(folder: Path) -> None:
    if not folder.is_dir():
        raise JobError("There is no such run", f"{folder} is not a folder", "name an output_dir")
    if (folder / output_dir.SWEEP_FILE).exists():
        trials = sorted(path.name for path in (folder / "trials").glob("*") if path.is_dir())
        raise JobError(
            "This is the folder of a sweep, which has a run in each of its trials",
            ", ".join(trials) or "no trials",
            f"name one: raytrain-adv doctor {folder / 'trials' / (trials or ['NAME'])[0]}",
        )
    if not any((folder / name).exists() for name in output_dir.OURS):
        names = listed(sorted(path.name for path in folder.iterdir()), 8) or "nothing"
        raise JobError(
            "There is no run in this folder",
            f"{folder} contains {names}, and neither {RUN_FILE} nor another file of a run",
            "name the output_dir of a run",
        )


def _taken(root: Storage, name: str, what: str, means: str, fix: str = "set aside") -> Finding:
    """Return the finding of a file or folder below `root` that the repair sets aside."""
    return Finding(root.path(name), what, means, fix, partial(SetAside.take, root=root, name=name))


def _leftover(root: Storage, name: str) -> Finding:
    what = "it was still being written when the run ended"
    return _taken(root, name, what, "none: nothing reads it")


def _gap(path: Path, first: int, last: int, what: str = "") -> Finding:
    message = f"The rows of steps {first} to {last} are lost; the steps were done."

    def repair(aside: SetAside) -> None:
        row = {"kind": "event", "event": ROWS_LOST, "message": message, "time": time.time()}
        _replace(path, [*metrics_file.read(path), {**row, "first": first, "last": last}])

    return Finding(
        str(path),
        what or f"steps {first} to {last} have no row: a machine lost power, or lines were removed",
        "none for the training: the steps were done; their losses and times are lost",
        f"an event {ROWS_LOST} in the file records it",
        repair,
    )


def _rewrite(path: Path, rows: list[dict[str, Any]], aside: SetAside) -> None:
    aside.copy(path)
    _replace(path, rows)


def _replace(path: Path, rows: list[dict[str, Any]]) -> None:
    with storage_errors("The metrics cannot be written", str(path)):
        metrics_file.replace(path, rows)
