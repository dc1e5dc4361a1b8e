"""The doctor's look at output_dir: run.json, metrics.jsonl, report.json, models, what kills leave
behind.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from raytrain_adv.checkpoint.folders import MANIFEST
from raytrain_adv.config.discovery import transform_types
from raytrain_adv.driver.commands.doctor_storage import Seen, leftover
from raytrain_adv.driver.commands.finding import Finding, SetAside
from raytrain_adv.driver.output.output_dir import MODELS, RUN_FILE, Record, attempts_in
from raytrain_adv.driver.watch.stop import STOP_FILE
from raytrain_adv.errors import JobError, StorageError
from raytrain_adv.model.weight_files import CheckpointFiles
from raytrain_adv.report import record
from raytrain_adv.storage import metrics_file
from raytrain_adv.storage.metrics_file import FILE_NAME, parse_row, replace
from raytrain_adv.storage.storage import Storage, storage_errors
from raytrain_adv.text import plural

ROWS_LOST = "rows_lost"
"""The event that says which steps have no row."""
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
MISSING = "it is missing"


def examine(
    folder: Path, storage: Storage, run: Record | None, seen: Sequence[Seen]
) -> list[Finding]:
    """Return what is wrong with output_dir.

    Args:
        folder: output_dir.
        storage: of the run's checkpoints.
        run: its run.json, if that is sound.
        seen: the run's checkpoints.
    """
    whole = [one for one in seen if not one.damage]
    findings = [_lost(folder, storage, whole)] if run is None else []
    if run is not None and run["status"] == "running":
        findings.append(_killed(folder, run))
    findings += _metrics(folder, run, whole)
    findings += _report(folder, run, whole)
    findings += [f for name in MODELS for f in _model(folder, name, run, whole)]
    own = Storage.at(str(folder))
    torn = re.compile(r"\..*\.(partial|old)|.*\.json\.partial")
    for name in sorted([*own.files(), *own.folders()]):
        if torn.fullmatch(name):
            findings.append(leftover(own, name))
        elif name == STOP_FILE:
            asked = "somebody asked the run to stop, and it ended before it did so"
            none = "none: a rerun takes it away as it starts"
            take = partial(SetAside.take, root=own, name=name)
            findings.append(Finding(own.path(name), asked, none, "set aside", take))
    return findings


def _note(folder: Path, run: Record, status: str) -> None:
    Storage.at(str(folder)).write_json(RUN_FILE, {**run, "status": status, "time": time.time()})


def _killed(folder: Path, run: Record) -> Finding:
    def mend(aside: SetAside) -> None:
        aside.copy(folder / RUN_FILE)
        _note(folder, run, "failed")

    return Finding(
        str(folder / RUN_FILE),
        "it says that the run goes on, and no driver holds the folder: it was killed",
        "none for a rerun that resumes; raytrain-adv status shows the run as running",
        "the run is noted as failed",
        mend,
    )


def _lost(folder: Path, storage: Storage, whole: Sequence[Seen]) -> Finding:
    """Return the finding of a run.json that is missing or torn."""
    path = folder / RUN_FILE
    what = "it is torn, or lacks what a rerun asks it for" if path.exists() else MISSING
    means = (
        "without resume_from_checkpoint a rerun is refused; with it, another job's keys are found "
        "out only once the workers run, and a run that has ended is taken for one that has not"
    )
    manifest = whole[0].folder.read_json(MANIFEST) if whole else None
    if manifest is None:
        way_out = "no checkpoint says whose the run was: start anew with overwrite_output_dir: true"
        return Finding(str(path), what, means, way_out)
    attempts = attempts_in(storage)

    def mend(aside: SetAside) -> None:
        if path.exists():
            aside.copy(path)
        run = {"fingerprint": manifest["fingerprint"], "attempts": attempts}
        _note(folder, {**run, "job": manifest["job"]}, "failed")

    fix = f"written anew from {whole[0].name}/{MANIFEST}, with {plural(attempts, 'attempt')}"
    return Finding(str(path), what, means, fix, mend)


def _metrics(folder: Path, run: Record | None, whole: Sequence[Seen]) -> list[Finding]:
    path = folder / FILE_NAME
    if not path.exists():
        return [_gap(path, 1, whole[0].step, MISSING)] if whole else []
    with storage_errors("The metrics cannot be read", str(path)):
        *lines, tail = path.read_bytes().split(b"\n")
    rows = [(number, parse_row(line)) for number, line in enumerate(lines, start=1) if line.strip()]
    bad = [number for number, row in rows if row is None]
    good = [row for _, row in rows if row is not None]
    kept = without_repeats(good)

    def rewrite(aside: SetAside) -> None:
        aside.copy(path)
        with storage_errors("The metrics cannot be written", str(path)):
            replace(path, kept)

    wrong = []
    if tail:
        what = f"its last line is torn, after {len(tail):,} bytes"
        means = "none: a rerun that resumes drops it too"
        wrong.append((what, means, "the torn line is dropped"))
    if bad:
        what = f"lines that hold no row: {_listed(bad)}"
        means = "none for the training; the rows of their steps are lost"
        wrong.append((what, means, "the lines are dropped"))
    if len(kept) < len(good):
        what = f"steps that stand there more than once: {_listed(repeated(good))}"
        means = (
            "none for the training; the report's curve goes back and forth, and a rerun keeps what "
            "lies before the step it resumes from"
        )
        wrong.append((what, means, "the last row of each step is kept"))
    findings = [
        Finding(str(path), what, means, f"{fix}; the file as it was is set aside", rewrite)
        for what, means, fix in wrong
    ]
    return findings + _gaps(path, kept, run, whole)


def _listed(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - 5:,} more" if len(numbers) > 5 else ""
    return ", ".join(map(str, numbers[:5])) + more


def without_repeats(rows: Sequence[Record]) -> list[dict[str, Any]]:
    """Return the rows without those whose kind and step come again later; events all stay."""
    last = {(row["kind"], row.get("step")): number for number, row in enumerate(rows)}
    return [
        dict(row)
        for number, row in enumerate(rows)
        if row["kind"] == "event" or last[row["kind"], row.get("step")] == number
    ]


def repeated(rows: Sequence[Record]) -> list[int]:
    """Return the steps that have more than one row of a kind."""
    found = Counter((row["kind"], row["step"]) for row in rows if "step" in row)
    return sorted({step for (kind, step), n in found.items() if n > 1 and kind != "event"})


def gaps(rows: Sequence[Record], every: int, reached: int) -> list[tuple[int, int]]:
    """Return the (first, last) steps that have no training row, where there should be one.

    Args:
        rows: of metrics.jsonl.
        every: logging_steps; where rows stand further apart before or after, it was larger then.
        reached: a step that the run has certainly got to.
    """
    said = {row.get("first") for row in rows if row.get("event") == ROWS_LOST}
    starts = [row.get("resumed_from_step") or 0 for row in rows if row.get("event") == "plan"]
    steps = [row["step"] for row in rows if row["kind"] == "train" and "step" in row]
    steps = [*starts[:1], *steps] if starts else [0, *steps]
    apart = [after - before for before, after in pairwise(steps)]
    found = []
    for place, distance in enumerate(apart):
        beside = [*apart[max(place - 1, 0) : place], *apart[place + 1 : place + 2]]
        if distance > max(every, *beside, 0):
            found.append((steps[place] + 1, steps[place + 1] - 1))
    if reached - reached % every > steps[-1]:
        found.append((steps[-1] + 1, reached - reached % every))
    return [one for one in found if one[0] not in said]


def _gaps(
    path: Path, rows: Sequence[Record], run: Record | None, whole: Sequence[Seen]
) -> list[Finding]:
    every = run["job"].get("logging_steps") if run is not None else None
    if not isinstance(every, int) or every < 1:
        return []
    reached = whole[0].step if whole else 0
    return [_gap(path, first, last) for first, last in gaps(rows, every, reached)]


def _gap(path: Path, first: int, last: int, what: str = "") -> Finding:
    message = f"The rows of steps {first} to {last} are lost; the steps were done."

    def mend(aside: SetAside) -> None:
        row = {"kind": "event", "event": ROWS_LOST, "message": message, "time": time.time()}
        rows = metrics_file.read(path)
        with storage_errors("The metrics cannot be written", str(path)):
            replace(path, [*rows, {**row, "first": first, "last": last}])

    return Finding(
        str(path),
        what or f"steps {first} to {last} have no row: a machine lost power, or lines were removed",
        "none for the training: the steps were done; their losses and times are lost",
        f"an event {ROWS_LOST} in the file says so",
        mend,
    )


def _unmade(
    folder: Path, name: str, what: str, means: str, run: Record, whole: Sequence[Seen]
) -> Finding:
    """Return the finding of something that a run which has ended should have left, and has not."""
    path = folder / name
    if not whole or whole[0].found is None or not whole[0].found.optimizer:
        fix = (
            "no checkpoint can be resumed that it could be made from: bring it back from a copy, "
            "or train anew with overwrite_output_dir: true"
        )
        return Finding(str(path), what, means, fix)

    def mend(aside: SetAside) -> None:
        if path.exists():
            aside.take(Storage.at(str(folder)), name)
        aside.copy(folder / RUN_FILE)
        _note(folder, run, "failed")

    fix = f"{RUN_FILE} notes the run as failed: a rerun makes it anew from step {whole[0].step}"
    fix = f"set aside, and {fix}" if path.exists() else fix
    return Finding(str(path), what, means, fix, mend, reopens=True)


def _report(folder: Path, run: Record | None, whole: Sequence[Seen]) -> list[Finding]:
    path = folder / record.FILE_NAME
    is_done = run is not None and run["status"] == "done"
    if not path.exists():
        if run is None or not is_done:
            return []
        what, means = MISSING, "a rerun stops at it: the run has ended, and has no report"
    else:
        try:
            record.read(folder)
            return []
        except StorageError as error:
            what = error.found.removeprefix(f"{path}: ").splitlines()[0]
        means = "a rerun stops at it: the run has ended" if is_done else "none: it is written anew"
    if run is None or not is_done:
        take = partial(SetAside.take, root=Storage.at(str(folder)), name=path.name)
        return [Finding(str(path), what, means, "set aside", take)]
    return [_unmade(folder, path.name, what, means, run, whole)]


def _model(folder: Path, name: str, run: Record | None, whole: Sequence[Seen]) -> list[Finding]:
    path = folder / name
    what = wrong_with_model(path)
    if not what or (what == MISSING and not _is_owed(folder, name, run)):
        return []
    if run is None or run["status"] != "done":
        means = "none: a rerun that resumes writes it anew at its end; it does not load as it is"
        take = partial(SetAside.take, root=Storage.at(str(folder)), name=name)
        return [Finding(str(path), what, means, "set aside", take)]
    means = "it does not load, and a rerun leaves it so: the run has ended"
    return [_unmade(folder, name, what, means, run, whole)]


def _is_owed(folder: Path, name: str, run: Record | None) -> bool:
    """Whether a run that has ended should have left this folder; a sweep with keep_models: best
    deletes those of its other trials.
    """
    if run is None or run["status"] != "done" or folder.parent.name == "trials":
        return False
    job = run["job"]
    return bool(job.get("export_model", True)) and (name == "model" or _is_converted(name, job))


def _is_converted(name: str, job: Mapping[str, Any]) -> bool:
    """Whether a feature of the job writes this folder at export."""
    return any(
        kind.model_validate({key: job[key] for key in kind.model_fields if key in job}).enabled
        for kind in transform_types()
        if name == f"model-{kind.converts}"
    )


def wrong_with_model(path: Path) -> str:
    """Return what is wrong with a folder of a model, an adapter, or both; empty if nothing."""
    if not path.exists():
        return MISSING
    names = {file.name for file in path.iterdir()}
    is_adapter = bool(names & set(ADAPTER))
    if is_adapter:
        absent = sorted(set(ADAPTER) - names)
        if absent:
            return f"{absent[0]} is missing"
        try:
            with safe_open(path / ADAPTER[1], framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{ADAPTER[1]} cannot be read: {error}"
        if "config.json" not in names:
            return ""
    if "config.json" not in names:
        return "config.json is missing"
    try:
        with CheckpointFiles(path):
            return ""
    except JobError as error:
        return f"{error.what.removeprefix(f'{path} ').removeprefix(f'{path}/')}: {error.found}"
