"""Progress of a long preparation: a bar on a terminal, otherwise a line every few seconds."""

import sys
import time
from collections.abc import Callable

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

Say = Callable[[str], None]
SECONDS_BETWEEN_LINES = 5.0


class RowProgress:
    """Context in which rows are tokenized."""

    def __init__(self, name: str, say: Say) -> None:
        self.name, self.say = name, say
        self.bar: Progress | None = None
        self.last_line = time.monotonic()

    def __enter__(self) -> "RowProgress":
        if sys.stdout.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, transient=True)
            self.bar.add_task(f"Tokenizing {self.name}", total=1.0)
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, num_rows: int, share: float) -> None:
        """Show that `num_rows` rows, `share` of the dataset (0 to 1), are done."""
        if self.bar is not None:
            text = f"Tokenizing {self.name} ({num_rows:,} rows)"
            self.bar.update(self.bar.task_ids[0], completed=share, description=text)
        elif time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            self.say(f"Tokenizing {self.name}: {num_rows:,} rows, {share:.0%}")
