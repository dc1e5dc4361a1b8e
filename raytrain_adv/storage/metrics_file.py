"""metrics.jsonl, the log of a run: one JSON object per line, appended by rank 0."""

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from raytrain_adv.redaction import hide_environment
from raytrain_adv.storage.atomic import write_atomic
from raytrain_adv.storage.storage import storage_errors

FILE_NAME = "metrics.jsonl"
Scalar = str | int | float | bool | None


class MetricsFile:
    """Rank 0's log of the run: rows of kind train, eval and event.

    A killed process loses no row. There is no fsync, which would stall training on network storage:
    a machine that loses power may lose the last rows. A resume_step continues the existing file,
    None starts a new one. Rows of later steps and a torn last line are dropped atomically, and an
    event `resume` is appended (unless the file was empty). Raises StorageError.
    """

    def __init__(self, path: str | Path, resume_step: int | None) -> None:
        self.path = Path(path)
        with self._errors():
            kept, num_dropped = _rows_to_keep(self.path, resume_step)
            replace(self.path, kept)
            self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        if resume_step is not None and kept:
            message = _resume_message(resume_step, num_dropped)
            self.event("resume", message, step=resume_step, num_dropped=num_dropped)

    def append(self, row: Mapping[str, object]) -> None:
        """Write `plain_row` of a row, with `time` if it lacks it. Raises StorageError."""
        line = json.dumps({"time": round(time.time(), 3)} | plain_row(row), allow_nan=False) + "\n"
        data = (hide_environment(line) if row.get("kind") == "event" else line).encode()
        with self._errors():
            while data:
                data = data[os.write(self._fd, data) :]

    def _errors(self) -> AbstractContextManager[None]:
        return storage_errors("The metrics of the run cannot be written", str(self.path))

    def event(self, event: str, message: str, **details: Scalar) -> None:
        """Write a row of kind event: a slug, a sentence, and numbers for those who want them."""
        self.append({"kind": "event", "event": event, "message": message, **details})

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "MetricsFile":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def plain_row(row: Mapping[str, object]) -> dict[str, Any]:
    """Return plain scalars; NaN and infinity are None, named in `non_finite`. Raises TypeError."""
    plain: dict[str, Any] = {}
    non_finite: dict[str, str] = {}
    for key, value in row.items():
        scalar = _scalar(key, value)
        if isinstance(scalar, float) and not math.isfinite(scalar):
            non_finite[key] = str(scalar)
            scalar = None
        plain[key] = scalar
    if non_finite:
        plain["non_finite"] = non_finite
    return plain


def read(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of the file, in order; none if it does not exist. A torn last line is left
    out; an event `unreadable_line` replaces any other that is not a row.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    # Whatever follows the last newline is still being written, or was torn.
    return [
        _parsed(number, line) for number, line in enumerate(lines[:-1], start=1) if line.strip()
    ]


def best_step(rows: Iterable[Mapping[str, Any]]) -> int | None:
    """Return the step whose model load_best_model_at_end took at the end of the run; none if it was
    not so, or the run was continued since.
    """
    found: int | None = None
    for row in rows:
        if row.get("event") in ("best", "resume"):
            found = int(row["step"]) if row["event"] == "best" else None
    return found


def parse_row(line: bytes) -> dict[str, Any] | None:
    """Return one line of the file as a row, or None if it is not one."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("kind"), str) else None


def _parsed(number: int, line: bytes) -> dict[str, Any]:
    message = f"Line {number} of {FILE_NAME} is not a row and was left out."
    unreadable = {"kind": "event", "event": "unreadable_line", "message": message}
    return parse_row(line) or unreadable


def _scalar(key: str, value: object) -> Scalar:
    # By duck typing: numpy and torch scalars have item(), and this module imports neither.
    item = getattr(value, "item", None)
    scalar = item() if callable(item) else value
    if scalar is None or isinstance(scalar, str | int | float | bool):
        return scalar
    raise TypeError(f"{key} is not a scalar: {type(value).__name__}")


def _rows_to_keep(path: Path, resume_step: int | None) -> tuple[list[dict[str, Any]], int]:
    if resume_step is None:
        return [], 0
    rows = read(path)
    kept = [row for row in rows if row["kind"] == "event" or row.get("step", 0) <= resume_step]
    return kept, len(rows) - len(kept)


def replace(path: Path, rows: list[dict[str, Any]]) -> None:
    """Replace the file's rows; a kill leaves either the old file or the new one."""
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


def _resume_message(step: int, num_dropped: int) -> str:
    if not num_dropped:
        return f"Resumed from step {step}."
    rows = "1 later row is" if num_dropped == 1 else f"{num_dropped} later rows are"
    return f"Resumed from step {step}; {rows} computed again."


class FollowedFile:
    """The rows of a file that a worker, perhaps on another node, is writing. A restarted worker
    replaces the file by a shorter one: only rows of recomputed steps come again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._identity: tuple[int, int] | None = None
        self._offset = 0
        self._seen: set[int] = set()

    def new_rows(self) -> list[dict[str, Any]]:
        """Return the rows completed since the last call; a half-written last line waits."""
        try:
            lines = self._new_lines()
        except OSError:
            # Not there yet, or shared storage is briefly away: the next call returns its rows.
            return []
        fresh = [line for line in lines if hash(line) not in self._seen]
        self._seen.update(map(hash, fresh))
        return [row for row in map(parse_row, fresh) if row is not None]

    def _new_lines(self) -> list[bytes]:
        # Opened every time: network file systems show other nodes' writes only at open.
        with self._path.open("rb") as file:
            status = os.fstat(file.fileno())
            identity = (status.st_dev, status.st_ino)
            if identity != self._identity or status.st_size < self._offset:
                self._identity, self._offset = identity, 0
            file.seek(self._offset)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._offset += end
        return data[:end].splitlines()
