"""Take files out of a run without deleting them."""

from __future__ import annotations

import posixpath
import shutil
import time
from pathlib import Path

from raytrain_adv.storage.storage import Storage, storage_errors

FOLDER = "set-aside"
"""Holds what was taken out, in one folder per time."""


class SetAside:
    """Takes files and folders out of a run without deleting them.

    Args:
        output: output_dir. Its files go to its set-aside folder, those of storage elsewhere to one
            at the root of that storage.
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
        """Keep a copy of a file of output_dir, which is then rewritten."""
        target = Path(self._target(self.output, path.name))
        with storage_errors("A file cannot be set aside", str(path)):
            if not target.exists():  # keep the file as found, not as already repaired
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
