"""What the doctor finds wrong with a run, and where it puts what it takes out."""

from __future__ import annotations

import posixpath
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from raytrain_adv.storage.storage import Storage, storage_errors

FOLDER = "set-aside"
"""Where things go that are taken out; a folder in it for each time."""


class SetAside:
    """Takes things out of a run without deleting them.

    Args:
        output: output_dir. What lies in it goes to its set-aside, what lies in storage elsewhere
            to one at the storage's root.
    """

    def __init__(self, output: Path) -> None:
        self.output = Storage.at(str(output))
        self.stamp = time.strftime("%Y%m%d-%H%M%S")
        number = 1
        while self.stamp in self.output.folder(FOLDER).folders():
            number += 1
            self.stamp = f"{self.stamp.partition('_')[0]}_{number}"
        self.places: set[str] = set()
        """The folders that hold what was taken out."""

    def take(self, root: Storage, name: str) -> None:
        """Move a file or folder, named by its path below `root`."""
        root.move(name, self._target(root, name))

    def copy(self, path: Path) -> None:
        """Keep a copy of a file of output_dir, which is then written anew."""
        target = Path(self._target(self.output, path.name))
        with storage_errors("A file cannot be set aside", str(path)):
            if not target.exists():  # the one that was found, not what mending has made of it
                shutil.copy2(path, target)

    def _target(self, root: Storage, name: str) -> str:
        source = root.path(name)
        inside = root.is_local and Path(source).is_relative_to(self.output.root)
        base = self.output if inside else root
        place = base.folder(FOLDER, self.stamp)
        target = place.path(posixpath.relpath(source, base.root))
        Storage(base.filesystem, posixpath.dirname(target)).make()
        self.places.add(place.root)
        return target


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    where: str
    what: str
    means: str
    """What it means for a rerun that resumes, or for who reads the run."""
    mending: str
    """What --fix does about it; where there is no `mend`, what the user can do."""
    mend: Callable[[SetAside], None] | None = None
    reopens: bool = False
    """Whether mending it has a rerun go on with a run that has ended."""
