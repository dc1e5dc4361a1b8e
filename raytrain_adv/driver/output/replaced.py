"""The earlier run, or sweep, that a new one in output_dir replaces: kept, or deleted."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from raytrain_adv.errors import JobError, StorageError
from raytrain_adv.kernels import lock as locks
from raytrain_adv.storage.storage import Storage, storage_errors

RUN_FILE = "run.json"
ADAPTER = "adapter_config.json"
OWNER = "owner.json"  # in storage outside of output_dir: the output_dir of the checkpoints there
ASIDE = f".{locks.FILE_NAME}.replaced"  # the old run's lock file while new kernels are pinned
PREVIOUS = "previous"  # folder of kept runs, in output_dir and below ray_storage_path


@dataclass
class Replaced:
    """What a new run, or sweep, replaces in output_dir, once its workers can be started."""

    folder: Path
    names: tuple[str, ...]  # its files and folders there
    storages: Sequence[Storage]  # its checkpoints
    base: str | None  # the job's ray_storage_path
    is_there: bool = False  # whether there is something to lose that is still in its place
    deletes: bool = False  # delete_previous_run

    def clear(self) -> str:
        """Move it away or delete it, but not kernels that the new run has pinned; return a message.
        Raises StorageError.
        """
        there = [name for name in self.names if (self.folder / name).exists()]
        own = [Storage.at(str(self.folder / name)) for name in self.names]
        elsewhere = [s for s in self.storages if s.folders() and not any(holds(o, s) for o in own)]
        what = ", ".join(there + [storage.root for storage in elsewhere])
        with storage_errors(f"{self._key} could not be followed", str(self.folder)):
            self.is_there = False  # a failure from here on leaves part of it in its place
            if self.deletes:
                self._delete()
                return f"{self._key}: deleted what {self.folder} held: {what}"
            target = self._move(elsewhere)
        return f"{self._key}: moved the earlier run in {self.folder} to {target}: {what}"

    @property
    def _key(self) -> str:
        return "delete_previous_run" if self.deletes else "overwrite_output_dir"

    def _delete(self) -> None:
        for storage in self.storages:
            storage.delete()
            if storage.folders():
                raise OSError(f"{storage.root} is still there")
        for name in self.names:
            if name not in (locks.FILE_NAME, locks.FOLDER):
                _remove(self.folder / name)
        pinned = _text(self.folder / locks.FILE_NAME)
        for path in (self.folder / locks.FOLDER).glob("*"):
            if path.name not in pinned:
                _remove(path)
        (self.folder / ASIDE).unlink(missing_ok=True)

    def _move(self, elsewhere: Sequence[Storage]) -> Path:
        number = 1
        while (self.folder / PREVIOUS / str(number)).exists() or (
            elsewhere and Storage.at(self._kept(number)).folders()
        ):
            number += 1
        target = self.folder / PREVIOUS / str(number)
        target.mkdir(parents=True)
        # A kill between two moves leaves a part in its place, which the next launch moves too.
        for storage in elsewhere:
            kept, (parent, _, name) = Storage.at(self._kept(number)), storage.root.rpartition("/")
            kept.make()
            Storage(storage.filesystem, parent).move(name, kept.path(name))
            kept.folder(name).write_json(OWNER, {"output_dir": str(target.resolve())})
        pinned, own = _text(self.folder / locks.FILE_NAME), _text(self.folder / ASIDE)
        for path in (self.folder / locks.FOLDER).glob("*"):
            place = target / locks.FOLDER / path.name
            if path.name not in pinned:
                place.parent.mkdir(exist_ok=True)
                path.rename(place)
            elif path.name in own:
                shutil.copytree(path, place)
        for name in self.names:
            if name not in (locks.FILE_NAME, locks.FOLDER) and (self.folder / name).exists():
                (self.folder / name).rename(target / name)
        if own:
            (self.folder / ASIDE).rename(target / locks.FILE_NAME)
        for path in (target / RUN_FILE, *target.glob(f"trials/*/{RUN_FILE}")):
            self._readdress(path, number, bool(elsewhere))
        for path in (p for above in ("", "trials/*/") for p in target.glob(f"{above}*/{ADAPTER}")):
            self._readdress_base(path, target)
        return target

    def _kept(self, number: int) -> str:
        """Return where checkpoints outside of output_dir are kept."""
        label = f"{PREVIOUS}/{self.folder.absolute().name}-{number}"
        return storage_below(self.folder, self.base, label)

    def _readdress(self, path: Path, number: int, is_elsewhere: bool) -> None:
        """Write into a kept run.json where that run is now, for export, doctor and a resume."""
        record = Storage.at(str(path.parent)).read_json(path.name)
        if record is None or not isinstance(record.get("job"), dict):
            return
        job = record["job"] | {"output_dir": str(path.parent)}
        if is_elsewhere:
            job["ray_run_name"] = job.get("ray_run_name") or self.folder.absolute().name
            job["ray_storage_path"] = self._kept(number)
        Storage.at(str(path.parent)).write_json(path.name, {**record, "job": job})

    def _readdress_base(self, path: Path, target: Path) -> None:
        """Write into a kept adapter where the base that it belongs to is now."""
        own = Storage.at(str(path.parent))
        config = own.read_json(path.name) or {}
        base = Path(config.get("base_model_name_or_path") or "")
        for place in (self.folder.absolute(), self.folder.resolve()):
            if base.is_relative_to(place) and (kept := target / base.relative_to(place)).exists():
                config["base_model_name_or_path"] = str(kept.absolute())
                own.write_json(path.name, config)
                return

    def keep(self) -> str:
        """Restore it as it was found; return a message."""
        put_back(self.folder)
        why = f"{self._key} replaces its content once the new run is accepted"
        return f"{self.folder} is unchanged: {why}"

    def refuse_to_replace(self, key: str, value: str | None) -> None:
        """Raise JobError if a job's `key` names, by a path or URI, what would be replaced."""
        named = _storage_of(value)
        if named is None:
            return
        places = [Storage.at(str(self.folder / name)) for name in self.names]
        if any(holds(place, named) for place in (*places, *self.storages)):
            raise JobError(
                f"{key} names what {self._key} would replace",
                f"{key}: {value}, of the run in output_dir: {self.folder}",
                "choose another output_dir, or move it elsewhere first",
            )


def storage_below(folder: Path, base: str | None, name: str) -> str:
    """Return where the checkpoints of the run `name` are, with the ray_storage_path `base`."""
    if base is None:
        return str(folder.absolute() / "checkpoints")
    if "://" not in base:
        return str(Path(base).absolute() / name)
    uri = urlsplit(base)  # the query holds connection options
    return urlunsplit(uri._replace(path=f"{uri.path.rstrip('/')}/{name}"))


def put_back(folder: Path) -> None:
    """Restore the old run's lock file, also after a launch that was killed."""
    if (folder / ASIDE).exists():
        (folder / ASIDE).replace(folder / locks.FILE_NAME)


def is_inside(storage: Storage, folder: Path) -> bool:
    """Whether a storage lies in a folder."""
    return holds(Storage.at(str(folder)), storage)


def holds(place: Storage, other: Storage) -> bool:
    """Whether a place is, or contains, another one."""
    if place.is_local and other.is_local:
        return Path(other.root).resolve().is_relative_to(Path(place.root).resolve())
    same = place.filesystem == other.filesystem
    return same and f"{other.root}/".startswith(f"{place.root.rstrip('/')}/")


def _storage_of(value: str | None) -> Storage | None:
    """Return the place that a key's value names; None if it names none that exists."""
    if value is None:
        return None
    if "://" not in value and not Path(value).exists():
        return None
    try:
        return Storage.at(value)
    except StorageError:
        return None


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
