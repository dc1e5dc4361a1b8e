"""Find each kernel that a job asks for, pin it, and put its files where workers load them from."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from raytrain_adv.errors import JobError, StorageError
from raytrain_adv.kernels import hub, metadata, variants
from raytrain_adv.kernels import lock as locks
from raytrain_adv.kernels.lock import Locked, Use
from raytrain_adv.kernels.source import Wanted
from raytrain_adv.kernels.variants import Target


@dataclass(frozen=True)
class Build:
    """A kernel's files, found and pinned."""

    wanted: Wanted
    locked: Locked
    folder: Path

    @property
    def name(self) -> str:
        """The kernel with its commit, or the hash of its files, for plans and reports."""
        return f"{self.wanted.label}@{self.locked.at}"


@dataclass(frozen=True)
class Place:
    """Where kernels are looked for."""

    target: Target | None
    """What builds have to fit; none takes any, for a plan made elsewhere."""
    given: Path | None = None
    """Lock file of the job, from which nothing may differ."""
    own: Path | None = None
    """Lock file in output_dir, which an earlier start of this run may have left."""
    trust: tuple[str, ...] = ()


def find(wanted: Wanted, place: Place) -> Build:
    """Return a kernel's build: as the job's lock file says, as this run had it before, or new.

    Raises:
        JobError: when it is not there, does not fit, or is not what was locked.
    """
    if place.own is not None and place.own.is_file():
        locked = locks.read(place.own).of(wanted)
        folder = _beside(place.own, locked)
        if locked is not None and folder is not None:
            _require_fit(locked, place.target)
            return Build(wanted, locked, folder)
    if place.given is not None:
        return _as_locked(wanted, place.given, place.target)
    return _local(wanted, place.target) if wanted.is_local else _from_hub(wanted, place)


def fetch(
    every: Sequence[Wanted],
    place: Place,
    file: Path,
    say: Callable[[str], None],
    use: Use = "layers",
) -> None:
    """Find the kernels of one use, put their files beside a lock file, and write it; those of
    another use that it has stay in it.

    Raises:
        JobError: when one cannot be found, or is not what was locked.
        StorageError: when the files cannot be written.
    """
    before = locks.read(file).kernels if file.is_file() else ()
    kernels = [one for one in before if one.use != use]
    for wanted in every:
        build = find(wanted, place)
        if place.given is not None and place.given.is_file():
            _require_the_locked(build, place.given, file)
        folder = _placed(build, file)
        relative = str(folder.relative_to(file.parent))
        kernels.append(build.locked.model_copy(update={"folder": relative, "use": use}))
        if kernels[-1] not in before:
            say(f"kernel {build.name}: {len(build.locked.files)} files of {build.locked.variant}")
    kernels.sort(key=lambda one: one.use, reverse=True)
    if tuple(kernels) != before:
        locks.write(kernels, file)


def bring(wanted: Wanted, locked: Locked, file: Path) -> None:
    """Put one locked kernel's files beside its lock file, and note there where they are.

    Args:
        wanted: the kernel, by the commit that is locked.
        locked: what the lock file says of it.
        file: the lock file.

    Raises:
        JobError: when they cannot be had, or are not those locked.
    """
    source = _beside(file, locked)
    if source is None or locks.differences(locked, source):
        source = wanted.folder.absolute() if wanted.is_local else None
        for folder in (source / "build", source) if source is not None else ():
            if (folder / locked.variant).is_dir():
                source = folder / locked.variant
                break
    if source is None:
        commit = locked.commit or ""
        source = hub.cached(wanted, commit, locked.variant, None) or hub.download(
            wanted, commit, locked.variant, None
        )
    locks.require_same(locked, source, file)
    folder = _placed(Build(wanted, locked, source), file)
    moved = locked.model_copy(update={"folder": str(folder.relative_to(file.parent))})
    every = tuple(moved if one == locked else one for one in locks.read(file).kernels)
    locks.write(every, file)


def _placed(build: Build, file: Path) -> Path:
    """Copy a build beside the lock file, in one move, unless it is there; return its folder."""
    name = f"{build.wanted.label.replace('/', '--')}-{build.locked.digest[:12]}"
    folder = file.parent.absolute() / locks.FOLDER / name / build.locked.variant
    if folder == build.folder.absolute() or not locks.differences(build.locked, folder):
        return file.parent / folder.relative_to(file.parent.absolute())
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(build.folder, partial, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        raise StorageError(
            "The files of a kernel cannot be written",
            f"{folder}: {error.strerror or error}",
            "free space, or choose a folder that can be written to",
        ) from None
    locks.require_same(build.locked, folder, file)
    return file.parent / folder.relative_to(file.parent.absolute())


def _beside(file: Path, locked: Locked | None) -> Path | None:
    """Return the folder of files that a lock file has beside it; none where it has none."""
    if locked is None or locked.folder is None:
        return None
    folder = file.parent / locked.folder
    return folder if folder.is_dir() else None


def _require_the_locked(build: Build, given: Path, own: Path) -> None:
    """Refuse to go on with what a run has pinned where the job's lock file says another by now."""
    locked = require_in(build.wanted, given)
    if locked.files != build.locked.files:
        raise JobError(
            f"{build.wanted.asked} is not what the lock file of the job says",
            f"the run began with {build.locked.at} ({own}); {given} has {locked.at}",
            "put the lock file back that the run began with, or begin a new run in another "
            "output_dir",
        )


def require_in(wanted: Wanted, file: Path) -> Locked:
    """Return what a lock file says of a kernel.

    Raises:
        JobError: when it has nothing of it.
    """
    locked = locks.read(file).of(wanted)
    if locked is None:
        has = ", ".join(
            k.asked + (f" ({k.commit[:7]})" if k.commit else "") for k in locks.read(file).kernels
        )
        raise JobError(
            f"{wanted.asked} is not in the lock file of the job",
            f"{file} has {has or 'no kernels'}",
            f"add it with raytrain-adv kernels lock job.yaml --output {file}, or take it out of "
            "the job",
        )
    return locked


def _as_locked(wanted: Wanted, file: Path, target: Target | None) -> Build:
    locked = require_in(wanted, file)
    _require_fit(locked, target)
    folder = _beside(file, locked)
    if folder is None and wanted.is_local:
        folder = _local_folder(wanted, target)
    if folder is None:
        commit = locked.commit or ""
        folder = hub.cached(wanted, commit, locked.variant, target) or hub.download(
            wanted, commit, locked.variant, target
        )
    locks.require_same(locked, folder, file)
    metadata.check(folder)
    return Build(wanted, locked, folder)


def _require_fit(locked: Locked, target: Target | None) -> None:
    if target is None:
        return
    if variants.is_build(locked.variant) and variants.choose([locked.variant], target) is None:
        raise hub.no_build(f"{locked.source}, as it is locked,", [locked.variant], target)


def _from_hub(wanted: Wanted, place: Place) -> Build:
    commit = wanted.commit
    folder = hub.cached(wanted, commit, None, place.target) if commit is not None else None
    if folder is not None:
        trust = "from the cache by its commit; the Hub was not asked about its publisher"
    else:
        commit = hub.commit_of(wanted)
        trust = hub.trusted(wanted, place.trust)
        folder = hub.download(wanted, commit, None, place.target)
    metadata.check(folder)
    return Build(wanted, _pin(wanted, folder, commit, trust), folder)


def _local(wanted: Wanted, target: Target | None) -> Build:
    folder = _local_folder(wanted, target)
    metadata.check(folder)
    return Build(wanted, _pin(wanted, folder, None, "a folder named in the job"), folder)


def _pin(wanted: Wanted, folder: Path, commit: str | None, trust: str) -> Locked:
    return Locked(
        source=wanted.source,
        asked=wanted.asked,
        commit=commit,
        variant=folder.name if variants.is_build(folder.name) else "as-it-is",
        files=locks.digests(folder),
        trust=trust,
    )


def local_build(wanted: Wanted, target: Target) -> Path | None:
    """Return the build in a local kernel's folder; none where the folder is not on this machine."""
    try:
        return _local_folder(wanted, target)
    except JobError:
        return None


def _local_folder(wanted: Wanted, target: Target | None) -> Path:
    """Return the build in a local kernel's folder: in build/, in the folder, or the folder."""
    root = wanted.folder.absolute()
    if not root.is_dir():
        raise JobError(
            f"kernel not found: there is no kernel folder {wanted.source}",
            f"{root} is {'a file' if root.exists() else 'not there'}",
            "correct its path in the job; relative ones count from the folder you launch in",
        )
    if (root / "metadata.json").is_file():
        if variants.is_build(root.name) and hub.chosen([root.name], None, target) is None:
            raise hub.no_build(wanted.source, [root.name], target)
        return root
    names: list[str] = []
    for base in (root / "build", root):
        here = [p.name for p in base.iterdir() if p.is_dir()] if base.is_dir() else []
        builds = sorted(name for name in here if variants.is_build(name))
        names += builds
        chosen = hub.chosen(builds, None, target)
        if chosen is not None:
            return base / chosen
    raise hub.no_build(wanted.source, sorted(names), target)
