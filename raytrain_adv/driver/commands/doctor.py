"""`raytrain-adv doctor`: what is wrong with the files of a run, what that means for a rerun that
resumes, and, with --fix, mending it. Without Ray.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from raytrain_adv.driver.commands import doctor_output, doctor_storage
from raytrain_adv.driver.commands.doctor_storage import Seen
from raytrain_adv.driver.commands.finding import Finding, SetAside
from raytrain_adv.driver.output.output_dir import (
    LOCK,
    OURS,
    RUN_FILE,
    Record,
    record_of,
    storage_below,
)
from raytrain_adv.errors import JobError
from raytrain_adv.storage.storage import Storage, storage_errors
from raytrain_adv.text import plural

WIDTH = 100
ROUNDS = 4
"""Mending one thing may bring up another: a snapshot names the checkpoint that was set aside."""


@dataclass(frozen=True)
class Examined:
    """A run as its files are now."""

    run: Record | None
    """run.json, where it is sound."""
    storage: Storage
    seen: Sequence[Seen]
    findings: Sequence[Finding]


def show(folder: Path, fix: bool) -> bool:
    """Print what is wrong with a run and which checkpoint a rerun resumes from; mend it where that
    is asked for.

    Args:
        folder: the run's output_dir.
        fix: whether to mend it; otherwise nothing is changed.

    Returns:
        Whether nothing is wrong, or nothing any more.

    Raises:
        JobError: when there is no run there, or it is alive.
        StorageError: when its files cannot be read or moved.
    """
    _require_run(folder)
    with _held(folder):
        with storage_errors("The run cannot be examined", str(folder)):
            found = examine(folder)
        number = plural(len(found.findings), "finding") if found.findings else "nothing is wrong"
        print(f"{folder}: {number}")
        aside = SetAside(folder)
        told: list[tuple[str, str]] = []
        for _ in range(ROUNDS if fix else 1):
            new = [f for f in found.findings if (f.where, f.what) not in told]
            for finding in new:
                told.append((finding.where, finding.what))
                print(_told(len(told), finding, fix))
            if fix and any(finding.mend for finding in new):
                _mend(new, aside)
                found = examine(folder)
        print("\n" + _paragraph(_resumes(found, fix)))
        for place in sorted(aside.places):
            print(
                _paragraph(f"What was taken out is in {place}; delete it when you do not need it.")
            )
        if found.findings and not fix:
            print(f"Nothing was changed. To mend it: raytrain-adv doctor {folder} --fix")
        elif found.findings:
            print(f"Not mended: {', '.join(sorted({one.where for one in found.findings}))}")
    return not found.findings


def examine(folder: Path) -> Examined:
    """Look at the run in a folder, and at its checkpoints."""
    run = record_of(folder)
    job = run["job"] if run is not None else {}
    name = job.get("ray_run_name") or Path(job.get("output_dir") or folder).name
    storage = Storage.at(storage_below(folder, job.get("ray_storage_path"), name))
    seen = doctor_storage.checkpoints(storage)
    findings = [
        *doctor_storage.examine(storage, seen, job.get("save_total_limit")),
        *doctor_output.examine(folder, storage, run, seen),
    ]
    return Examined(run, storage, seen, findings)


def _mend(findings: Sequence[Finding], aside: SetAside) -> None:
    done = []
    for finding in findings:
        # One rewriting of a file mends all that is wrong with its lines.
        if finding.mend is not None and finding.mend not in done:
            finding.mend(aside)
            done.append(finding.mend)


def _require_run(folder: Path) -> None:
    if not folder.is_dir():
        raise JobError("There is no such run", f"{folder} is no folder", "name an output_dir")
    if (folder / "sweep.json").exists():
        trials = sorted(path.name for path in (folder / "trials").glob("*") if path.is_dir())
        raise JobError(
            "This is the folder of a sweep, which has a run in each of its trials",
            ", ".join(trials) or "no trials",
            f"name one: raytrain-adv doctor {folder / 'trials' / (trials or ['NAME'])[0]}",
        )
    if not any((folder / name).exists() for name in OURS):
        held = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise JobError(
            "There is no run in this folder",
            f"{folder} holds {held}, and neither {RUN_FILE} nor anything else of a run's",
            "name the output_dir of a run",
        )


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold the folder as a driver does; the lock of one that has died holds nobody up."""
    lock = FileLock(folder / LOCK)
    with storage_errors("output_dir cannot be examined", str(folder)):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise JobError(
                "The run is alive: a driver holds its folder, and nothing was touched",
                str(folder),
                f"see it with raytrain-adv status {folder}; stop it first, or wait for its end",
            ) from None
    try:
        yield
    finally:
        lock.release()


def _told(number: int, finding: Finding, fix: bool) -> str:
    label = "mended" if fix and finding.mend else "--fix" if finding.mend else "to do"
    lines = [f"\n{number}. {finding.where}"]
    for name, text in (("found", finding.what), ("means", finding.means), (label, finding.mending)):
        lines.append(_paragraph(f"   {name.ljust(7)} {text}", indent=" " * 11))
    return "\n".join(lines)


def _paragraph(text: str, indent: str = "") -> str:
    """Fold a text; paths stay whole."""
    return textwrap.fill(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _resumes(found: Examined, fix: bool) -> str:
    """Say what a rerun with resume_from_checkpoint: true goes on from."""
    with_key = "A rerun with resume_from_checkpoint: true"
    if found.findings and not fix:
        with_key = f"Once mended, {with_key[0].lower()}{with_key[1:]}"
    whole = next((one for one in found.seen if not one.damage), None)
    is_done = found.run is not None and found.run["status"] == "done"
    if is_done and not any(one.reopens for one in found.findings):
        overwrites = found.run is not None and found.run["job"].get("overwrite_output_dir")
        without = "deletes it (overwrite_output_dir: true)" if overwrites else "is refused"
        return (
            "The run has ended: it was trained to its last step. A rerun with "
            f"resume_from_checkpoint: true does nothing; one without {without}."
        )
    if whole is None or whole.found is None:
        none = f"there is no whole checkpoint in {found.storage.root}"
        return f"{with_key} starts at step 0: {none}."
    if not whole.found.optimizer:
        only = f"{whole.folder.root} was written with save_only_model: true"
        return f"{with_key} is refused: {only}. raytrain-adv export writes its model."
    return f"{with_key} goes on from step {whole.step}: {whole.folder.root}"
