"""Reading rows from files and the Hub, each with the place a message can name."""

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytrain_adv import hub
from raytrain_adv.data.read import v1
from raytrain_adv.data.read.entries import FILE_TYPES, INFO_FILE, Entry
from raytrain_adv.errors import JobError
from raytrain_adv.text import nearest, plural


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a dataset as it was found."""

    where: str
    """File and line, or file and row."""
    values: Any
    """A dict of columns, unless the file is wrong."""
    progress: float
    """Share of its dataset that has been read, 0 to 1."""


@dataclass(frozen=True)
class Source:
    """A dataset that is ready to be read."""

    fingerprint: str
    """Hash of its contents."""
    rows: Callable[[], Iterator[Row]]


def open_source(entry: Entry, cache_dir: str | None) -> Source:
    """Find a dataset's files, or fetch it from the Hub, and hash its contents. Raises JobError for
    a missing, empty or unreadable source.
    """
    if entry.kind == "builtin":
        from raytrain_adv.data.read import orders, stdlib_docs  # few jobs need them

        made = {"orders": orders, "python_stdlib_docs": stdlib_docs}[entry.target]
        return Source(made.fingerprint(), made.rows)
    if entry.kind == "hub":
        return _open_hub(entry, cache_dir)
    files = data_files(Path(entry.target))
    return Source(_hash_files(files), lambda: read_files(files))


def data_files(path: Path) -> list[Path]:
    """List the data files at a path: itself, or the files of known types in a folder, sorted.
    Raises JobError if there are none, or one is empty.
    """
    if path.is_dir():
        inside = [p for p in sorted(path.iterdir()) if p.is_file() and p.name != INFO_FILE]
        files = [p for p in inside if p.suffix.lower() in FILE_TYPES]
        files = [p for p in files if p.suffix.lower() != ".txt"] or files  # notes about the others
        if not files:
            names = ", ".join(p.name for p in inside[:5]) or "an empty folder"
            fix = f"put {', '.join(FILE_TYPES)} files into it"
            raise JobError(f"The folder {path} contains no dataset", names, fix)
    else:
        files = [path]
    for file in files:
        _check_file(file)
    return files


def _check_file(file: Path) -> None:
    if not file.exists():
        siblings = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        near = nearest(file.name, siblings)
        other = "correct the name, or put the file there"
        fix = f"did you mean {file.parent / near}?" if near else other
        found = f"{plural(len(siblings), 'file')} in {file.parent}"
        raise JobError(f"The dataset file {file} does not exist", found, fix)
    if entries := v1.entries_in(file):
        raise v1.unread(str(file), entries, INFO_FILE)
    if file.suffix.lower() not in FILE_TYPES:
        what = f"The dataset file {file} is of a type that is not read"
        fix = f"convert it to one of {', '.join(FILE_TYPES)}"
        raise JobError(what, file.suffix or "no file name extension", fix)
    if file.stat().st_size == 0:
        raise _empty(file, "0 bytes")


def _empty(file: Path, found: str) -> JobError:
    return JobError(f"The dataset file {file} is empty", found, "give a file with rows")


def _hash_files(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.suffix.lower().encode())
        try:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        except OSError as error:
            what = f"The dataset file {file} cannot be read"
            raise JobError(what, str(error), "check its permissions") from error
    return digest.hexdigest()


def read_files(files: list[Path]) -> Iterator[Row]:
    """Yield the rows of data files, one after the other. Raises JobError at the first row that is
    broken.
    """
    readers = {
        ".json": _read_json,
        ".jsonl": _read_jsonl,
        ".parquet": _read_parquet,
        ".arrow": _read_arrow,
        ".csv": _read_csv,
        ".txt": _read_txt,
    }
    total, before = sum(file.stat().st_size for file in files), 0
    for file in files:
        size = file.stat().st_size
        for row in readers[file.suffix.lower()](file):
            yield Row(row.where, row.values, (before + row.progress * size) / total)
        before += size


def _read_jsonl(file: Path) -> Iterator[Row]:
    for number, line, share in _lines(file):
        if text := line.strip():
            try:
                values = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise _broken(file, number, str(error)) from error
            yield Row(f"{file}:{number}", values, share)


def _lines(file: Path) -> Iterator[tuple[int, str, float]]:
    """Yield each line's number, the line, and the share of the file read with it."""
    size, consumed = file.stat().st_size, 0
    with file.open("rb") as opened:
        for number, line in enumerate(opened, 1):
            consumed += len(line)
            yield number, _decode(file, line, number), consumed / size


def _decode(file: Path, data: bytes, line: int) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = line + data.count(b"\n", 0, error.start)
        found = f"line {at}: byte 0x{data[error.start]:02x}"
        raise JobError(f"{file} is not UTF-8 text", found, "save it as UTF-8") from error


def _broken(file: Path, line: int, message: str) -> JobError:
    return JobError(f"{file} is not valid JSON", f"line {line}: {message}", "correct that line")


def _read_json(file: Path) -> Iterator[Row]:
    """Read an array of rows, or rows one after the other, each with its line."""
    text = _decode(file, file.read_bytes(), 1)
    decoder, scanner = json.JSONDecoder(), _Scanner(file, text)
    one_line, number = "\n" not in text.strip(), 0
    in_array = scanner.skip_to_value() == "["
    if in_array:
        scanner.at += 1
        if scanner.skip_to_value() == "]":
            raise _empty(file, "an array without rows")
    while True:
        scanner.skip_to_value()
        line = scanner.line()
        try:
            values, scanner.at = decoder.raw_decode(text, scanner.at)
        except json.JSONDecodeError as error:
            raise _broken(file, error.lineno, error.msg) from error
        except (ValueError, RecursionError) as error:  # beyond Python's limits
            raise _broken(file, line, str(error)) from error
        number += 1
        place = f"{file}:{line}, row {number}" if one_line else f"{file}:{line}"
        yield Row(place, values, scanner.at / len(text))
        if scanner.ended(in_array):
            return


_REST_IS_BLANK = re.compile(r"\s*\Z")


class _Scanner:
    """A place in a JSON text, with its line number."""

    def __init__(self, file: Path, text: str) -> None:
        self.file, self.text, self.at = file, text, 0
        self._counted, self._line = 0, 1

    def skip_to_value(self) -> str:
        """Move past white space; return the character there."""
        while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
            self.at += 1
        if self.at == len(self.text):
            raise _broken(self.file, self.line(), "the file ends where a row was expected")
        return self.text[self.at]

    def line(self) -> int:
        """Return the line number of the place."""
        self._line += self.text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def ended(self, in_array: bool) -> bool:
        """Return whether the row before was the last; otherwise move to the next."""
        if _REST_IS_BLANK.match(self.text, self.at):
            if in_array:
                raise _broken(self.file, self.line(), "the array is not closed")
            return True
        found = self.skip_to_value()
        if not in_array:
            return False
        self.at += 1
        if found == "]" and _REST_IS_BLANK.match(self.text, self.at):
            return True
        if found != ",":
            expected = f"expected a comma or the end of the array, found {found!r}"
            raise _broken(self.file, self.line(), expected)
        return False


def _read_parquet(file: Path) -> Iterator[Row]:
    import pyarrow  # heavy, and needed for this file type alone
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        total, number = table.metadata.num_rows, 0
        if not total:
            raise _empty(file, "a table without rows")
        for batch in table.iter_batches(batch_size=1000):
            for values in batch.to_pylist():
                number += 1
                yield Row(f"{file} row {number}", values, number / total)
    except (pyarrow.ArrowException, OSError) as error:
        what = f"{file} is not a readable Parquet file"
        raise JobError(what, str(error), "write it again") from error


def _read_arrow(file: Path) -> Iterator[Row]:
    """Read what datasets writes: a stream of record batches, or a file of them."""
    import pyarrow

    try:
        with pyarrow.memory_map(str(file)) as opened:
            try:
                table = pyarrow.ipc.open_stream(opened).read_all()
            except pyarrow.ArrowInvalid:
                table = pyarrow.ipc.open_file(opened).read_all()
            table.validate(full=True)  # reading offsets beyond the data would end the process
            if not table.num_rows:
                raise _empty(file, "a table without rows")
            for number in range(table.num_rows):
                values = table.slice(number, 1).to_pylist()[0]
                yield Row(f"{file} row {number + 1}", values, (number + 1) / table.num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        what = f"{file} is not a readable Arrow file"
        raise JobError(what, str(error), "write it again") from error


def _read_csv(file: Path) -> Iterator[Row]:
    """Read rows of text under the names of the first line."""
    lines = _decode(file, file.read_bytes(), 1).splitlines(keepends=True)
    reader = csv.DictReader(lines)
    try:
        for values in reader:
            if None in values or None in values.values():
                found = f"line {reader.line_num}: other columns than the {len(values)} of line 1"
                raise JobError(f"{file} is not a table", found, "correct that line")
            yield Row(f"{file}:{reader.line_num}", values, reader.line_num / len(lines))
    except csv.Error as error:
        found = f"line {reader.line_num}: {error}"
        raise JobError(f"{file} is not valid CSV", found, "correct that line") from error
    if len(lines) < 2:
        raise _empty(file, "a line of names without rows")


def _read_txt(file: Path) -> Iterator[Row]:
    """Read a row of each line that has text."""
    for number, line, share in _lines(file):
        if text := line.rstrip("\r\n"):
            yield Row(f"{file}:{number}", {"text": text}, share)


def _open_hub(entry: Entry, cache_dir: str | None) -> Source:
    hub.require_dataset(entry.target, cache_dir)
    reason = hub.why_unreachable()
    import datasets  # takes seconds to import, and reads HF_HUB_OFFLINE as it is

    try:
        where = {"name": entry.subset, "data_dir": entry.folder, "split": entry.split}
        loaded = datasets.load_dataset(entry.target, cache_dir=cache_dir, **where)
    # The errors of datasets and huggingface_hub derive from these.
    except (OSError, ValueError, RuntimeError) as error:
        what = f"The dataset {entry.target} could not be loaded from the Hugging Face Hub"
        fix = "check its name, subset, split, the network and HF_TOKEN; or give a local file"
        raise JobError(what, reason or f"{type(error).__name__}: {error}"[:500], fix) from error
    total = len(loaded)

    def rows() -> Iterator[Row]:
        for number, values in enumerate(loaded, 1):
            yield Row(f"{entry.target} row {number}", values, number / total)

    return Source(str(loaded._fingerprint), rows)
