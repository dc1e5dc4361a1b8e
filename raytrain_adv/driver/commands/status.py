"""`raytrain-adv status`: the runs of a cluster, or one of them: attempts, workers, last step, logs.

Combines Ray's dashboard with what a run has written into its output_dir.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from raytrain_adv import tables, text
from raytrain_adv.checkpoint import folders
from raytrain_adv.driver.cluster import dashboard
from raytrain_adv.driver.output.output_dir import is_held, runs_in
from raytrain_adv.driver.output.replaced import RUN_FILE, storage_below
from raytrain_adv.errors import ClusterError, JobError, StorageError
from raytrain_adv.storage.metrics_file import FILE_NAME, read
from raytrain_adv.storage.storage import Storage

Entry = Mapping[str, Any]  # a run, attempt or worker, as Ray Train's state has it (ray 2.60)
NUM_HERE = 5  # runs of this folder that are listed when none is running
DIED = "died"  # of a run that no driver holds, and that did not write how it ended
ENDED = ("finished", "errored", "aborted")  # Ray Train's states of a run that is over
HEADS = ("run", "status", "workers", "step", "loss", "tokens/s/worker", "restarts", "output_dir")


@dataclass(frozen=True)
class Written:
    """What a run has written into its output_dir so far."""

    status: str  # running, done, stopped or failed, as its driver wrote it; or DIED
    progress: str  # steps done, of how many
    loss: float | None
    rate: float | None  # tokens per second and worker
    restarts: int | None
    row_at: float | None  # when the last row was written, unix seconds
    message: str  # the message of its last event
    committed: int | None = None  # the step of its newest complete checkpoint

    @property
    def figures(self) -> tuple[str, str, str]:
        """Its loss, rate and restarts as text."""
        return text.loss(self.loss), text.rate(self.rate), text.count(self.restarts)


class Run:
    """A run that the cluster knows; `output_dir` is None for another program's run."""

    def __init__(self, entry: Entry) -> None:
        config = entry["run_settings"].get("train_loop_config") or {}
        self.entry = entry
        self.name = str(config.get("run", entry["name"]))
        self.names = (self.name, entry["name"])
        self.status = str(entry["status"]).lower()
        self.output_dir = Path(config["marker"]).parent if config.get("marker") else None
        self.attempts: Sequence[Entry] = entry["attempts"]


def show(address: str | None, run: str | None) -> None:
    """Print the cluster's runs, or one: by its name, its attempt's, or its output_dir, which needs
    no cluster. Raises ClusterError, and JobError if there is no such run.
    """
    folder = _folder(run)
    lines = list(_of_folder(folder)) if folder is not None else []
    if folder is not None and dashboard.named(address) is None:
        print("\n".join([*lines, "no --address: Ray was not queried"]))
        return
    url = dashboard.named(address)
    is_above = run is not None and folder is None and bool(runs_in(Path(run)))
    urls = [url] if url else [] if is_above else dashboard.of_this_machine()
    runs = _runs_at(urls)
    if run is None:
        where = "the cluster" if url else "this machine"
        more = "" if url else "; --address URL names a cluster"
        print(_table(runs) if runs else "\n".join([f"{where} runs nothing now{more}", *_ended()]))
        return
    place = folder.absolute() if folder is not None else Path()
    chosen = [one for one in runs if run in one.names or one.output_dir == place]
    if not chosen and is_above:
        print("\n".join([f"{run} is not the folder of a run; the last ones in it:", *_ended(run)]))
        return
    if not chosen and folder is None:
        raise JobError(
            f"{'The cluster' if url else 'This machine'} has no run {run!r}",
            f"its runs: {', '.join(sorted({one.name for one in runs})) or 'none'}",
            "name one of them, an output_dir that can be read from here, or a cluster by --address",
        )
    for one in chosen:
        lines += [*([""] if lines else []), *_details(one, files=folder is None)]
    print("\n".join(lines))


def _runs_at(urls: Sequence[str]) -> list[Run]:
    """Return the runs of all these clusters that answer; at least one must, if there is any."""
    runs: list[Run] = []
    errors: list[ClusterError] = []
    for url in urls:
        try:
            runs += map(Run, dashboard.train_runs(dashboard.connect(url)))
        except ClusterError as error:
            errors.append(error)
    if errors and len(errors) == len(urls):
        raise errors[0]
    for silent in errors:
        print(f"left out: {silent.what} ({silent.found})")
    return runs


def _folder(run: str | None) -> Path | None:
    """Return the output_dir that a run was named by; None for another name."""
    try:
        return Path(run) if run is not None and (Path(run) / RUN_FILE).exists() else None
    except OSError:  # longer than a file's name can be
        return None


def written(folder: Path | None) -> Written | None:
    """Return what a run has written; None if its output_dir cannot be read from here."""
    record = Storage.at(str(folder)).read_json(RUN_FILE) if folder and folder.is_dir() else None
    if folder is None or record is None:
        return None
    rows = read(folder / FILE_NAME)
    last: Entry = next((row for row in reversed(rows) if row["kind"] == "train"), {})
    plan: Entry = next((row for row in reversed(rows) if row.get("event") == "plan"), {})
    messages = [str(row["message"]) for row in rows if row["kind"] == "event" and "message" in row]
    step, total = last.get("step", plan.get("resumed_from_step") or 0), plan.get("total_steps")
    status = str(record.get("status", "unknown"))
    return Written(
        status=DIED if status == "running" and not is_held(folder) else status,
        progress=f"{step}/{total}" if total else str(step),
        loss=last.get("loss"),
        rate=last.get("tokens_per_second_per_worker"),
        restarts=plan.get("restarts"),
        row_at=rows[-1].get("time") if rows else None,
        message=messages[-1] if messages else "",
        committed=_committed(folder, record),
    )


def _committed(folder: Path, record: Entry) -> int | None:
    """Return the step of a run's newest complete checkpoint; None if it has none, or it is not
    readable from here.
    """
    job = record.get("job") or {}
    name = job.get("ray_run_name") or folder.absolute().name
    place = storage_below(folder, job.get("ray_storage_path"), name)
    with contextlib.suppress(StorageError, OSError):
        found = folders.newest(Storage.at(place))
        return found.progress.step if found is not None else None
    return None


def _ended(place: str = "") -> Iterator[str]:
    """Yield what the last runs in a folder were, and how to see one."""
    here = runs_in(Path(place))[:NUM_HERE]
    for folder in here:
        found = written(folder)
        if found is not None and found.row_at is not None:
            step, ago = f"step {found.progress}, loss {found.figures[0]}", _ago(found.row_at)
            yield f"  {folder}: {found.status}, {step}, {ago}"
    name = here[0] if here else "OUTPUT_DIR"
    yield f"a run that has ended: raytrain-adv status {name}"


def _table(runs: Sequence[Run]) -> str:
    view, note = tables.columns(*HEADS), ""
    for run in runs:
        found, place = written(run.output_dir), str(run.output_dir or text.MISSING)
        num_workers = len(run.attempts[-1]["workers"]) if run.attempts else 0
        state = found.status if found and run.status in ENDED else run.status
        figures = (found.progress, *found.figures) if found else (text.MISSING,) * 4
        view.add_row(*map(Text, (run.name, state, str(num_workers), *figures, place)))
        if found is None:
            note = "\n-: output_dir cannot be read from here; ray job logs prints the run's log"
    return tables.plain(view, width=1000) + note


def _of_folder(folder: Path) -> Iterator[str]:
    found = written(folder)
    if found is None:
        yield f"{folder}: cannot be read from here"
        return
    loss, rate, restarts = found.figures
    yield f"{folder}: {found.status}"
    if found.status == DIED:
        yield f"  its driver ended without a report; repair it: raytrain-adv doctor {folder} --fix"
    yield f"  step      {found.progress}, loss {loss}, {rate} tokens/s/worker"
    if found.committed is not None:
        yield f"  saved     step {found.committed}, the newest complete checkpoint"
    yield f"  restarts  {restarts}"
    if found.row_at is not None:
        message = f": {found.message}" if found.message else ""
        yield f"  last row  {_ago(found.row_at)}{message}"
    for name in (FILE_NAME, "report.html", "model"):
        if (folder / name).exists():
            yield f"  {name.partition('.')[0].ljust(9)} {folder / name}"


def _details(run: Run, files: bool) -> Iterator[str]:
    yield f"{run.name}: {run.status}, in Ray {run.entry['name']}"
    yield from _detail(run.entry, "  ")
    if run.output_dir is not None and files:
        yield from (f"  {line}" for line in _of_folder(run.output_dir))
    if job := (run.entry.get("job_details") or {}).get("submission_id"):
        yield f"  job       {job} (ray job logs --follow {job})"
    yield f"  started   {_ago(run.entry['start_time_ns'] / 1e9)}"
    if log := run.entry.get("controller_log_file_path"):
        yield f"  log       {log}"
    for number, attempt in enumerate(run.attempts, start=1):
        since = _ago(attempt["start_time_ns"] / 1e9)
        yield f"  workers, start {number}: {str(attempt['status']).lower()}, {since}"
        yield from _detail(attempt, "    ")
        for worker in attempt["workers"]:
            yield from _worker(worker)


def _detail(entry: Entry, indent: str) -> Iterator[str]:
    if detail := str(entry.get("status_detail") or "").strip():
        yield indent + detail.splitlines()[-1]


def _worker(worker: Entry) -> Iterator[str]:
    gpus = f", GPU {', '.join(map(str, worker['gpu_ids']))}" if worker["gpu_ids"] else ""
    state = f"{str(worker.get('status') or 'unknown').lower()}, node {worker['node_ip']}"
    yield f"    rank {worker['world_rank']}: {state}, pid {worker['pid']}{gpus}"
    if worker.get("log_file_path"):
        yield f"      {worker['log_file_path']}"


def _ago(since: float) -> str:
    return f"{text.clock(max(time.time() - since, 0.0))} ago"
