"""`raytrain-adv doctor`: find damage in a run's files, and repair it with --fix; without Ray."""

import re
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from raytrain_adv.checkpoint import folders
from raytrain_adv.checkpoint.load import PlainReader
from raytrain_adv.config.job import transform_types
from raytrain_adv.config.rules import switch
from raytrain_adv.driver.output import output_dir
from raytrain_adv.driver.output.output_dir import MODELS, WEIGHTS, Record
from raytrain_adv.driver.output.replaced import RUN_FILE, storage_below
from raytrain_adv.driver.watch.stop import STOP_FILE
from raytrain_adv.errors import JobError, StorageError
from raytrain_adv.model.weight_files import CheckpointFiles
from raytrain_adv.report import record
from raytrain_adv.storage import metrics_file
from raytrain_adv.storage.storage import Storage, storage_errors
from raytrain_adv.text import first_line, listed, plural

ROUNDS = 4  # a repair may cause a finding: a snapshot names the checkpoint that was set aside
ROWS_LOST = "rows_lost"  # the event that records which steps have no row
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
MISSING = "it is missing"
SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's state (2.60), which a kill may truncate
WRAP = textwrap.TextWrapper(100, subsequent_indent=" " * 11, break_on_hyphens=False)
WRAP.break_long_words = False  # a path stays whole, which rich does not do
ASIDE = "set-aside"
LEFTOVER = ("it was still being written when the run ended", "none: nothing reads it")
UNFINISHED = re.compile(r"\..*\.(partial|old)|.*\.json\.partial")


class SetAside:
    """Moves files out of a run into a folder of output_dir, or at the root of other storage."""

    def __init__(self, output: Path) -> None:
        self.output = Storage.at(str(output))
        self.stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09d}"
        self.places: set[str] = set()

    def take(self, root: Storage, name: str, copy: bool = False) -> None:
        """Move a file or folder below `root`; or copy, as it was found, one that is rewritten."""
        source = root.path(name)
        is_inside = root.is_local and Path(source).is_relative_to(self.output.root)
        base = self.output if is_inside else root
        place = base.folder(ASIDE, self.stamp)
        target = place.path(source.removeprefix(base.root).lstrip("/"))
        if copy and (Path(target).exists() or not Path(source).exists()):
            return
        Storage(base.filesystem, target.rpartition("/")[0]).make()
        self.places.add(place.root)
        if copy:
            with storage_errors("A file cannot be set aside", source):
                shutil.copy2(source, target)
        else:
            root.move(name, target)


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, and what it means for a rerun or a reader of the run."""

    where: str
    what: str
    means: str
    fix: str  # what --fix does about it; without a `repair`, what the user can do
    repair: Callable[[SetAside], None] | None = None
    reopens: bool = False  # a rerun then continues a run that has ended


class Seen:
    """A checkpoint's folder, and what is wrong with it."""

    def __init__(self, step: int, attempt: str, folder: Storage) -> None:
        self.step, self.attempt, self.folder = step, attempt, folder
        self.name = f"{attempt}/{folder.root.rpartition('/')[2]}"
        self.manifest = folder.read_json(folders.MANIFEST)
        self.damage = self._unsound(self.manifest) if self.manifest else self._unfinished()

    def _unfinished(self) -> str:
        if folders.DAMAGED in self.folder.files():
            return "a run found that its files are not what was written"
        if folders.MANIFEST in self.folder.files():
            return f"its {folders.MANIFEST} is torn"
        return f"no {folders.MANIFEST}: it was still being written when the run ended"

    def _unsound(self, manifest: dict[str, Any]) -> str:
        form = manifest.get("format")
        if form != folders.FORMAT:
            return f"it is of format {form}; this version reads {folders.FORMAT}"
        if folders.read_manifest(self.folder) is None:
            return f"its {folders.MANIFEST} is not a checkpoint's"
        try:
            if folders.find(self.folder) is not None and self.folder.is_local:
                PlainReader(self.folder.root)
        except (StorageError, OSError) as error:
            return error.found if isinstance(error, StorageError) else str(error)
        wrong = folders.wrong_sizes(self.folder, manifest)
        return wrong or folders.wrong_bytes(self.folder, rank=0, world_size=1)


class Examined:
    """A run as its files in output_dir are now, and what is wrong with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run = output_dir.record_of(folder)
        self.job: dict[str, Any] = self.run["job"] if self.run is not None else {}
        self.is_done = self.run is not None and self.run["status"] == "done"
        name = self.job.get("ray_run_name") or Path(self.job.get("output_dir") or folder).name
        base = self.job.get("ray_storage_path")
        self.storage = Storage.at(storage_below(folder, base, name))
        self.own = Storage.at(str(folder))
        self.seen = [Seen(*one) for one in folders.all_folders(self.storage)]
        self.whole = [one for one in self.seen if not one.damage]
        self.resumable = bool(self.whole and (self.whole[0].manifest or {})["optimizer"])
        self.limit: int | None = self.job.get("save_total_limit")
        self.findings = [*self._checkpoints(), *self._output()]

    def _checkpoints(self) -> Iterator[Finding]:
        for one in self.seen:
            if one.damage:
                before = next((s for s in self.whole if s.step <= one.step), None)
                instead = f"step {before.step}" if before else "no step: no earlier one is whole"
                means = f"a rerun that resumes skips it, and can resume from {instead}"
                if one.manifest is not None:
                    means += "; save_total_limit may count it and delete a whole one instead"
                yield _taken(self.storage, one.name, one.damage, means)
        for one in self.whole[self.limit or len(self.whole) :]:
            what = f"whole, but save_total_limit: {self.limit} keeps newer ones"
            means = "none: a rerun resumes from the newest; it uses disk space until the next one"
            yield _taken(self.storage, one.name, what, means, "set aside, for you to delete")
        for attempt in self.storage.folders():
            files = self.storage.folder(attempt).files() if attempt != ASIDE else ()
            for name in files:
                if name.endswith(".partial"):
                    yield _taken(self.storage, f"{attempt}/{name}", *LEFTOVER)
            if SNAPSHOT in files and (what := self._wrong_snapshot(attempt)):
                means = f"none: a rerun has its own name in Ray; under {attempt} it would not start"
                yield _taken(self.storage, f"{attempt}/{SNAPSHOT}", what, means)

    def _wrong_snapshot(self, attempt: str) -> str:
        """Return what is wrong with Ray's snapshot; it may name what save_total_limit deleted."""
        folder = self.storage.folder(attempt)
        try:
            results = (folder.read_json(SNAPSHOT) or {})["checkpoint_results"]
            names = [str(one["checkpoint_dir_name"]) for one in results]
        except (KeyError, TypeError):
            return "it is torn, or not what Ray writes"
        steps = {name: (int(re.sub(r"\D", "", name) or 0), attempt) for name in names}
        known = sorted({(one.step, one.attempt) for one in self.seen} | set(steps.values()))
        unpruned, there = known[-self.limit :] if self.limit else known, folder.folders()
        gone = [name for name in names if name not in there and steps[name] in unpruned]
        cause = "which something other than the run removed"
        return f"it names {', '.join(gone)}, {cause}" if gone else ""

    def _output(self) -> Iterator[Finding]:
        yield from self._record()
        yield from self._metrics()
        yield from self._ending()
        for name in sorted([*self.own.files(), *self.own.folders()]):
            if UNFINISHED.fullmatch(name):
                yield _taken(self.own, name, *LEFTOVER)
            elif name == STOP_FILE:
                what = "someone asked the run to stop, and it ended before it did so"
                yield _taken(self.own, name, what, "none: a rerun removes it when it starts")

    def _note_failed(self, run: Record, aside: SetAside) -> None:
        aside.take(self.own, RUN_FILE, copy=True)
        self.own.write_json(RUN_FILE, {**run, "status": "failed", "time": time.time()})

    def _record(self) -> Iterator[Finding]:
        path, run, fix = self.folder / RUN_FILE, self.run, "the status becomes failed"
        if run is not None and run["status"] != "running":
            return
        if run is not None:
            what = "its status is running, but no driver holds the folder's lock: it was killed"
            means = "none for a rerun that resumes; raytrain-adv status shows the run as running"
        else:
            what = "it is torn, or lacks what a rerun reads from it" if path.exists() else MISSING
            means = "a rerun is refused, or with resume_from_checkpoint notices other keys late"
            fix = "no checkpoint identifies the run: start again with overwrite_output_dir: true"
        if run is None and self.whole and (manifest := self.whole[0].manifest):
            num = output_dir.attempts_in(self.storage)
            run = {key: manifest[key] for key in ("fingerprint", "job")} | {"attempts": num}
            fix = f"written from {self.whole[0].name}'s manifest, with {plural(num, 'attempt')}"
        repair = partial(self._note_failed, run) if run is not None else None
        yield Finding(str(path), what, means, fix, repair)

    def _metrics(self) -> Iterator[Finding]:
        path = self.folder / metrics_file.FILE_NAME
        is_there = path.exists()
        with storage_errors("The metrics cannot be read", str(path)):
            *lines, tail = path.read_bytes().split(b"\n") if is_there else [b""]
        rows = {n: metrics_file.parse_row(line) for n, line in enumerate(lines, 1) if line.strip()}
        good = [row for row in rows.values() if row is not None]
        newest = {(row["kind"], row.get("step")): n for n, row in enumerate(good)}
        others = {n for n, row in enumerate(good) if newest[row["kind"], row.get("step")] != n}
        repeated = {n for n in others if good[n]["kind"] != "event"}
        kept = [row for n, row in enumerate(good) if n not in repeated]
        found = [] if is_there else [MISSING for _ in self.whole[:1]]
        if tail:
            found.append(f"its last line is torn, after {len(tail):,} bytes")
        if bad := [str(number) for number, row in rows.items() if row is None]:
            found.append(f"lines that hold no row: {listed(bad)}")
        if repeated:
            steps = sorted({good[n].get("step", 0) for n in repeated})
            found.append(f"steps that occur more than once: {listed(list(map(str, steps)))}")
        gaps = self._gaps(kept) if is_there else [(1, one.step) for one in self.whole[:1]]
        for first, last in gaps:
            if is_there:
                found.append(f"steps {first} to {last} have no row: lost power, or lines removed")
            message = f"The rows of steps {first} to {last} are lost; the steps were done."
            row = {"kind": "event", "event": ROWS_LOST, "message": message, "time": time.time()}
            kept.append({**row, "first": first, "last": last})

        def repair(aside: SetAside) -> None:
            aside.take(self.own, path.name, copy=True)
            with storage_errors("The metrics cannot be written", str(path)):
                metrics_file.replace(path, kept)

        means = "none for the training; the report's curve lacks rows, or goes back and forth"
        fix = f"rewritten with one row a step, and an event {ROWS_LOST} for each gap"
        fix += "; the file as it was is set aside" if is_there else ""
        yield from (Finding(str(path), what, means, fix, repair) for what in found)

    def _gaps(self, rows: Sequence[Record]) -> list[tuple[int, int]]:
        """Return the (first, last) steps that have no training row and should have one."""
        reached = self.whole[0].step if self.whole else 0
        every = self.job.get("logging_steps")
        if not isinstance(every, int) or every < 1:
            return []
        noted = {row.get("first") for row in rows if row.get("event") == ROWS_LOST}
        starts = [row.get("resumed_from_step") or 0 for row in rows if row.get("event") == "plan"]
        trained = [row["step"] for row in rows if row["kind"] == "train" and "step" in row]
        steps = [*(starts[:1] or [0]), *trained]
        apart = [after - before for before, after in pairwise(steps)]
        found = []
        for n, distance in enumerate(apart):
            # logging_steps was larger if rows lie further apart before or after.
            if distance > max([every, *apart[max(n - 1, 0) : n], *apart[n + 1 : n + 2]]):
                found.append((steps[n] + 1, steps[n + 1] - 1))
        found.append((steps[-1] + 1, reached - reached % every))
        return [(first, last) for first, last in found if first <= last and first not in noted]

    def _ending(self) -> Iterator[Finding]:
        """Yield what the end of a run writes, and is missing or damaged."""
        wrong = {record.FILE_NAME: _wrong_with_report(self.folder)}
        wrong |= {name: _wrong_with_model(self.folder / name) for name in WEIGHTS}
        owed = {record.FILE_NAME} if self.is_done else set()
        # A sweep with keep_models: best deletes the models of its other trials.
        has_models = self.job.get("export_model", True) and self.folder.parent.name != "trials"
        if self.is_done and has_models:
            converters = [switch(kind()) for kind in transform_types() if kind.converts]
            owed |= set(MODELS if any(map(self.job.get, converters)) else MODELS[:1])
        for name, what in wrong.items():
            if what and (what != MISSING or name in owed):
                yield self._unmade(name, what)

    def _unmade(self, name: str, what: str) -> Finding:
        run, path = self.run, self.folder / name
        if run is None or not self.is_done:
            return _taken(self.own, name, what, "none: a rerun that resumes writes it at its end")
        means = "a rerun leaves it so: the run has ended"
        if not self.resumable:
            fix = "bring it back from a copy, or train again with overwrite_output_dir: true"
            return Finding(str(path), what, means, f"no checkpoint can restore it: {fix}")

        def repair(aside: SetAside) -> None:
            if path.exists():
                aside.take(self.own, name)
            self._note_failed(run, aside)

        fix = "set aside, and " if path.exists() else ""
        fix += f"{RUN_FILE} gets the status failed: a rerun makes it from step {self.whole[0].step}"
        return Finding(str(path), what, means, fix, repair, reopens=True)

    def resumes(self, fix: bool) -> str:
        """Return from where a rerun with resume_from_checkpoint: true continues."""
        rerun = "A rerun with resume_from_checkpoint: true"
        if self.findings and not fix:
            rerun = f"Once repaired, a{rerun[1:]}"
        if self.is_done and not any(one.reopens for one in self.findings):
            overwrites = self.job.get("overwrite_output_dir")
            without = "keeps it in previous, and starts again" if overwrites else "is refused"
            ended = "The run has ended: it was trained to its last step."
            return f"{ended} {rerun} does nothing; one without {without}."
        if not self.whole:
            return f"{rerun} starts at step 0: no whole checkpoint is in {self.storage.root}."
        newest = self.whole[0]
        if not self.resumable:
            only = f"{newest.folder.root} was written with save_only_model: true"
            return f"{rerun} is refused: {only}. raytrain-adv export writes its model."
        return f"{rerun} resumes from step {newest.step}: {newest.folder.root}"


def show(folder: Path, fix: bool) -> bool:
    """Print what is wrong with a run, and repair it if `fix`. Return whether nothing is wrong now.
    Raises JobError if there is no run there or it is active, StorageError if its files cannot be
    read.
    """
    _require_run(folder)
    active = JobError(
        "The run is still active (its driver holds the lock); nothing was changed",
        str(folder),
        f"raytrain-adv status {folder} shows it; stop it first, or wait for its end",
    )
    with output_dir.held(folder, active):
        with storage_errors("The run cannot be examined", str(folder)):
            found, aside = Examined(folder), SetAside(folder)
        number = len(found.findings)
        print(f"{folder}: {plural(number, 'finding') if number else 'nothing is wrong'}")
        shown: set[tuple[str, str]] = set()
        for _ in range(ROUNDS if fix else 1):
            new = [one for one in found.findings if (one.where, one.what) not in shown]
            for one in new:
                shown.add((one.where, one.what))
                label = "to do" if one.repair is None else "fixed" if fix else "--fix"
                print(f"\n{len(shown)}. {one.where}")
                for name, text in (("found", one.what), ("means", one.means), (label, one.fix)):
                    print(WRAP.fill(f"   {name}   {text}"))
            # Rewriting a file once repairs all that is wrong with its lines.
            repairs = dict.fromkeys(one.repair for one in new if one.repair is not None)
            if fix and repairs:
                for repair in repairs:
                    repair(aside)
                found = Examined(folder)
        print(f"\n{found.resumes(fix)}")
        for place in sorted(aside.places):
            print(f"Files were moved to {place}; delete it when you do not need it.")
        if found.findings and not fix:
            print(f"Nothing was changed. To repair it: raytrain-adv doctor {folder} --fix")
        elif found.findings:
            print(f"Not repaired: {', '.join(sorted({one.where for one in found.findings}))}")
        return not found.findings


def _require_run(folder: Path) -> None:
    if not folder.is_dir():
        raise JobError("There is no such run", f"{folder} is not a folder", "name an output_dir")
    if (folder / output_dir.SWEEP_FILE).exists():
        trials = sorted(path.name for path in (folder / "trials").glob("*") if path.is_dir())
        fix = f"name one: raytrain-adv doctor {folder / 'trials' / (trials or ['NAME'])[0]}"
        what = "This is the folder of a sweep, which has a run in each of its trials"
        raise JobError(what, ", ".join(trials) or "no trials", fix)
    if not (folder / RUN_FILE).exists() and not output_dir.left_in(folder):
        names = listed(sorted(path.name for path in folder.iterdir()), 8) or "nothing"
        found = f"{folder} contains {names}, and neither {RUN_FILE} nor another file of a run"
        runs = listed(list(map(str, output_dir.runs_in(folder))), 8)
        fix = f"name one of the runs in it: {runs}" if runs else "name the output_dir of a run"
        raise JobError("There is no run in this folder", found, fix)


def _taken(root: Storage, name: str, what: str, means: str, fix: str = "set aside") -> Finding:
    return Finding(root.path(name), what, means, fix, partial(SetAside.take, root=root, name=name))


def _wrong_with_report(folder: Path) -> str:
    path = folder / record.FILE_NAME
    try:
        return "" if path.exists() and record.read(folder) else MISSING
    except StorageError as error:
        return first_line(error.found.removeprefix(f"{path}: "))


def _wrong_with_model(path: Path) -> str:
    """Return what is wrong with a folder of a model, an adapter, or both; empty if nothing."""
    if not path.exists():
        return MISSING
    names = {file.name for file in path.iterdir()}
    has_adapter = not names.isdisjoint(ADAPTER)
    if absent := sorted({*(ADAPTER if has_adapter else ["config.json"])} - names):
        return f"{absent[0]} is missing"
    try:
        if has_adapter:
            with safe_open(path / ADAPTER[1], framework="pt"):
                pass
        if "config.json" in names:
            with CheckpointFiles(path):
                pass
    except (OSError, SafetensorError) as error:
        return f"{ADAPTER[1]} cannot be read: {error}"
    except JobError as error:
        return f"{error.what.removeprefix(f'{path} ').removeprefix(f'{path}/')}: {error.found}"
    return ""
