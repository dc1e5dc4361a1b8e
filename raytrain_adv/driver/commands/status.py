"""`raytrain-adv status`: the runs of a cluster, or one of them: attempts, workers, last step, logs.

Combines Ray's dashboard with what a run has written into its output_dir.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.job_submission import JobSubmissionClient
from rich.console import Console
from rich.table import Table

from raytrain_adv import text
from raytrain_adv.driver.cluster import dashboard
from raytrain_adv.driver.output.output_dir import RUN_FILE
from raytrain_adv.errors import JobError
from raytrain_adv.storage.metrics_file import FILE_NAME, read
from raytrain_adv.storage.storage import Storage

Entry = Mapping[str, Any]
"""A run, attempt or worker, as Ray Train's state has it (ray 2.60)."""
HEADS = ("run", "status", "workers", "step", "loss", "tokens/s/worker", "restarts", "output_dir")
UNSEEN = "-"


@dataclass(frozen=True)
class Written:
    """What a run has written into its output_dir so far."""

    status: str
    """running, done or failed, as its driver last wrote it."""
    step: int = 0
    total_steps: int | None = None
    loss: float | None = None
    rate: float | None = None
    """Tokens per second and worker."""
    restarts: int | None = None
    row_at: float | None = None
    """When the last row was written, unix seconds."""
    message: str = ""
    """The message of its last event."""

    @property
    def progress(self) -> str:
        """Steps done, of how many."""
        return f"{self.step}/{self.total_steps}" if self.total_steps else str(self.step)


def show(address: str | None, run: str | None) -> None:
    """Print the runs that the cluster knows, or one of them: by its name, its attempt's, or its
    output_dir, which needs no cluster.

    Raises:
        ClusterError: when the cluster does not answer.
        JobError: when there is no such run.
    """
    folder = _folder(run)
    if folder is not None and dashboard.named(address) is None:
        print("\n".join([*of_folder(folder), "no --address: Ray was not queried"]))
        return
    client = dashboard.connect(address)
    runs = dashboard.train_runs(client)
    if run is None:
        print("\n".join(table(runs)) if runs else "the cluster has no runs")
        return
    chosen = [one for one in runs if run in names(one) or (folder and is_in(one, folder))]
    if not chosen and folder is None:
        known = sorted({run_of(one) for one in runs})
        raise JobError(
            f"The cluster has no run {run!r}",
            f"its runs: {', '.join(known) or 'none'}",
            "name one of them, or an output_dir that can be read from here",
        )
    lines = of_folder(folder) if folder is not None else []
    for one in chosen:
        lines += [*([""] if lines else []), *details(one, client, files=folder is None)]
    print("\n".join(lines))


def _folder(run: str | None) -> Path | None:
    """Return the output_dir that a run was named by; None for another name."""
    if run is None:
        return None
    try:
        return Path(run) if (Path(run) / RUN_FILE).exists() else None
    except OSError:  # longer than a file's name can be
        return None


def names(run: Entry) -> set[str]:
    """Return the names of a run: its own, and its attempt's in Ray."""
    return {run_of(run), str(run["name"])}


def is_in(run: Entry, folder: Path) -> bool:
    """Whether the run's output_dir is this folder."""
    place = output_dir(run)
    return place is not None and Path(place) == folder.absolute()


def _loop_config(run: Entry) -> Entry:
    return run["run_settings"].get("train_loop_config") or {}


def run_of(run: Entry) -> str:
    """Return the run's name; for another program's run, Ray's."""
    return str(_loop_config(run).get("run", run["name"]))


def output_dir(run: Entry) -> str | None:
    """Return the run's output_dir; None for a run that is not ours."""
    marker = _loop_config(run).get("marker")
    return str(Path(marker).parent) if marker else None


def workers_of(run: Entry) -> Sequence[Entry]:
    """Return the workers of the last attempt."""
    attempts = run["attempts"]
    return attempts[-1]["workers"] if attempts else ()


def written(folder: str | None) -> Written | None:
    """Return what a run has written; None if its output_dir cannot be read from here."""
    record = Storage.at(folder).read_json(RUN_FILE) if folder and Path(folder).is_dir() else None
    if folder is None or record is None:
        return None
    rows = read(Path(folder) / FILE_NAME)
    trained = [row for row in rows if row["kind"] == "train"]
    plans = [row for row in rows if row.get("event") == "plan"]
    messages = [str(row["message"]) for row in rows if row["kind"] == "event" and "message" in row]
    last: Entry = trained[-1] if trained else {}
    begun: Entry = plans[-1] if plans else {}
    return Written(
        status=str(record.get("status", "unknown")),
        step=last.get("step", begun.get("resumed_from_step") or 0),
        total_steps=begun.get("total_steps"),
        loss=last.get("loss"),
        rate=last.get("tokens_per_second_per_worker"),
        restarts=begun.get("restarts"),
        row_at=rows[-1].get("time") if rows else None,
        message=messages[-1] if messages else "",
    )


def table(runs: Sequence[Entry]) -> list[str]:
    """Return a line for each run, below their heads."""
    rows = [_row(run) for run in runs]
    view = Table(*HEADS, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        view.add_row(*row)
    console = Console(width=1000, highlight=False, markup=False, color_system=None)
    with console.capture() as lines_shown:
        console.print(view)
    lines = lines_shown.get().splitlines()
    if any(row[3] == UNSEEN for row in rows):
        lines.append("-: output_dir cannot be read from here; ray job logs prints the run's log")
    return [line.rstrip() for line in lines]


def _row(run: Entry) -> tuple[str, ...]:
    place = output_dir(run)
    found = written(place)
    head = (run_of(run), str(run["status"]).lower(), str(len(workers_of(run))))
    if found is None:
        return (*head, *(UNSEEN,) * 4, place or UNSEEN)
    return (*head, found.progress, *_figures(found), place or UNSEEN)


def _figures(found: Written) -> tuple[str, str, str]:
    loss = f"{found.loss:.4f}" if found.loss is not None else UNSEEN
    rate = f"{found.rate:,.0f}" if found.rate is not None else UNSEEN
    return loss, rate, str(found.restarts) if found.restarts is not None else UNSEEN


def of_folder(folder: Path) -> list[str]:
    """Return what a run's own files show."""
    found = written(str(folder))
    if found is None:
        return [f"{folder}: cannot be read from here"]
    loss, rate, restarts = _figures(found)
    lines = [
        f"{folder}: {found.status}",
        f"  step      {found.progress}, loss {loss}, {rate} tokens/s/worker",
        f"  restarts  {restarts}",
    ]
    if found.row_at is not None:
        age = text.clock(max(time.time() - found.row_at, 0.0))
        lines.append(f"  last row  {age} ago{f': {found.message}' if found.message else ''}")
    lines += [
        f"  {name.partition('.')[0].ljust(9)} {folder / name}"
        for name in (FILE_NAME, "report.html", "model")
        if (folder / name).exists()
    ]
    return lines


def details(run: Entry, client: JobSubmissionClient, files: bool) -> list[str]:
    """Return all about a run: what it has written, its attempts, workers and logs."""
    place = output_dir(run)
    lines = [f"{run_of(run)}: {str(run['status']).lower()}, in Ray {run['name']}"]
    if run.get("status_detail"):
        lines.append(f"  {str(run['status_detail']).strip().splitlines()[-1]}")
    if place is not None and files:
        lines += [f"  {line}" for line in of_folder(Path(place))]
    job = (run.get("job_details") or {}).get("submission_id")
    if job:
        lines.append(f"  job       {job} (ray job logs --follow {job})")
    lines.append(f"  started   {_ago(run['start_time_ns'])} ago")
    if run.get("controller_log_file_path"):
        lines.append(f"  log       {run['controller_log_file_path']}")
    for number, attempt in enumerate(run["attempts"], start=1):
        lines += _attempt(number, attempt)
    return lines


def _attempt(number: int, attempt: Entry) -> list[str]:
    status = str(attempt["status"]).lower()
    lines = [f"  workers, start {number}: {status}, {_ago(attempt['start_time_ns'])} ago"]
    if attempt.get("status_detail"):
        lines.append(f"    {str(attempt['status_detail']).strip().splitlines()[-1]}")
    for worker in attempt["workers"]:
        gpus = f", GPU {', '.join(map(str, worker['gpu_ids']))}" if worker["gpu_ids"] else ""
        state = str(worker.get("status") or "unknown").lower()
        lines.append(
            f"    rank {worker['world_rank']}: {state}, node {worker['node_ip']}, "
            f"pid {worker['pid']}{gpus}"
        )
        if worker.get("log_file_path"):
            lines.append(f"      {worker['log_file_path']}")
    return lines


def _ago(start_ns: int) -> str:
    return str(text.clock(max(time.time() - start_ns / 1e9, 0.0)))
