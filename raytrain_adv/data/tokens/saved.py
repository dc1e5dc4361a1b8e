"""Rows that LLaMA-Factory tokenized and saved: the folder that its tokenized_path names."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytrain_adv.data.tokens import cache
from raytrain_adv.data.tokens.datasets import NUM_EXAMPLES
from raytrain_adv.data.tokens.tokenize import Chunk, reasons
from raytrain_adv.errors import JobError
from raytrain_adv.ops.loss import IGNORE
from raytrain_adv.text import plural

STATE, PARTS = "state.json", "dataset_dict.json"
"""Files of a saved dataset, and of several in one folder, by `datasets`."""
ROWS = 1000
"""Rows that are read at a time."""


@dataclass(frozen=True)
class Saved:
    """One saved dataset."""

    folder: Path
    cutoff_len: int

    def key(self) -> str:
        """Hash what decides the rows: the state that was saved, the files' sizes, cutoff_len."""
        sizes = sorted((f.name, f.stat().st_size) for f in self.folder.glob("*.arrow"))
        state = (self.folder / STATE).read_text("utf-8")
        decisive = [cache.VERSION, "saved", state, sizes, self.cutoff_len]
        return hashlib.sha256(json.dumps(decisive).encode()).hexdigest()[:32]

    def build(self, writer: cache.CacheWriter) -> dict[str, Any]:
        """Copy the rows into `writer`; return the counts. Raises JobError if the folder cannot be
        read, has other columns, or no row can be used.
        """
        read = used = 0
        unusable: list[tuple[str, str]] = []
        for number, ids, labels in self._rows():
            read += 1
            if reason := self._why_not(ids, labels):
                unusable.append((f"{self.folder}, row {number + 1}", reason))
                continue
            used += 1
            trained = labels != IGNORE
            edges = np.flatnonzero(np.diff(trained.astype(np.int8), prepend=np.int8(0)) == 1)
            starts = np.array([edges[-1]], np.int32)
            length = np.array([len(ids)], np.int64)
            writer.append(Chunk(ids.astype(np.int32), trained, length, starts, num_read=1))
        if not used:
            found = f"{read} rows read; {unusable[0][1] if unusable else 'it is empty'}"
            fix = "tokenize it again, or name another folder and let dataset be tokenized here"
            raise JobError(f"No row of {self.folder} can be trained on", found, fix)
        examples = [{"where": w, "reason": r} for w, r in unusable[:NUM_EXAMPLES]]
        counts: dict[str, Any] = {"read": read, "used": used, "with_control_tokens": 0}
        counts |= {"unusable": len(unusable), "unusable_reasons": reasons(unusable)}
        return {**counts, "truncated": 0, "cut_examples": [], "unusable_examples": examples}

    def _why_not(self, ids: NDArray[Any], labels: NDArray[Any]) -> str:
        trained = labels != IGNORE
        if len(ids) > self.cutoff_len:
            return f"it has {plural(len(ids), 'token')}, and cutoff_len is {self.cutoff_len}"
        if len(labels) != len(ids) or (labels[trained] != ids[trained]).any():
            return "its labels are not its tokens"
        return "" if trained.any() else "it has no label"

    def _rows(self) -> Iterator[tuple[int, NDArray[Any], NDArray[Any]]]:
        import datasets

        try:
            found = datasets.load_from_disk(str(self.folder))
        except (OSError, ValueError) as error:
            fix = "save it again, or name another folder"
            raise JobError(
                f"tokenized_path: {self.folder} cannot be read", str(error), fix
            ) from error
        columns = set(found.column_names)
        if not {"input_ids", "labels"} <= columns or "position_ids" in columns:
            packed = (
                "its rows are packed" if "position_ids" in columns else "not input_ids and labels"
            )
            what = f"tokenized_path: {self.folder} has rows of another kind"
            fix = "tokenize it for stage sft with packing: false; this package packs by itself"
            raise JobError(what, f"columns {', '.join(sorted(columns))}: {packed}", fix)
        rows = found.select_columns(["input_ids", "labels"]).with_format("numpy")
        number = 0
        for batch in rows.iter(ROWS):
            for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
                yield number, np.asarray(ids), np.asarray(labels)
                number += 1


def find_saved(tokenized_path: str | None, cutoff_len: int) -> dict[str, Saved]:
    """Return the saved datasets of a folder by their names, `train` if it holds one alone; none if
    it is a cache of this package, or new.
    """
    folder = Path(tokenized_path) if tokenized_path else None
    if folder is None or not folder.is_dir():
        return {}
    if (folder / STATE).is_file() and not (folder / PARTS).is_file():
        return {"train": Saved(folder, cutoff_len)}
    parts = {path.parent.name: path.parent for path in sorted(folder.glob(f"*/{STATE}"))}
    return {name: Saved(path, cutoff_len) for name, path in parts.items()}
