"""Follow metrics.jsonl while a worker, perhaps on another node, writes it."""

import os
from pathlib import Path
from typing import Any

from raytrain_adv.storage.metrics_file import parse_row


class FollowedFile:
    """Rows of the file as they come.

    A restarted worker puts a shorter file in its place: what was seen before is not given again,
    the steps that are computed again are.
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
            # Not there yet, or shared storage is away for a moment: the next call sees what this
            # one missed.
            return []
        fresh = [line for line in lines if hash(line) not in self._seen]
        self._seen.update(map(hash, fresh))
        rows = (parse_row(line) for line in fresh)
        return [row for row in rows if row is not None]

    def _new_lines(self) -> list[bytes]:
        # Opened anew each time: network file systems show what other nodes wrote to those who open.
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
