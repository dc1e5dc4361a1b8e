"""Find each kernel that a job names, pin it, and copy its files to where workers load them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from raytrain_adv.errors import JobError, StorageError
from raytrain_adv.kernels import lock as locks
from raytrain_adv.kernels import variants
from raytrain_adv.kernels.lock import Locked, Use
from raytrain_adv.kernels.source import Wanted
from raytrain_adv.kernels.variants import Target
from raytrain_adv.storage.atomic import atomic_folder
from raytrain_adv.text import first_line, plural

if TYPE_CHECKING:
    from huggingface_hub import HfApi

KIND = "kernel"  # the Hub's type of repository for kernels, next to model and dataset
Answer = TypeVar("Answer")


class NoBuild(JobError):
    """A kernel that exists, but not for the machines that need it."""


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
    """Where to look for kernels."""

    target: Target | None  # what builds must fit; None accepts any, for a plan made elsewhere
    given: Path | None = None  # the job's lock file, from which nothing may differ
    own: Path | None = None
    """The lock file in output_dir, which an earlier start of this run may have left."""
    trust: tuple[str, ...] = ()


def find(wanted: Wanted, place: Place) -> Build:
    """Return a kernel's build: the one this run had before, the job's locked one, or a new one.
    Raises JobError when it is missing, does not fit, or differs from the lock.
    """
    if place.own is not None and place.own.is_file():
        locked = locks.read(place.own).of(wanted)
        folder = _fetched_folder(place.own, locked)
        if locked is not None and folder is not None:
            _require_fit(locked, place.target)
            return Build(wanted, locked, folder)
    if place.given is not None:
        return _as_locked(wanted, place.given, place.target)
    if wanted.is_local:
        folder, commit = _local_folder(wanted, place.target), None
        trust = "a folder named in the job"
    else:
        folder, commit, trust = _from_hub(wanted, place)
    variants.python_name(folder)
    locked = Locked(
        source=wanted.source,
        asked=wanted.asked,
        commit=commit,
        variant=folder.name if variants.is_build(folder.name) else "as-it-is",
        files=locks.digests(folder),
        trust=trust,
    )
    return Build(wanted, locked, folder)


def fetch(
    every: Sequence[Wanted],
    place: Place,
    file: Path,
    say: Callable[[str], None],
    use: Use = "layers",
) -> None:
    """Find the kernels of one use and copy their files next to a lock file, which keeps those of
    another use. Raises JobError when one cannot be found, or differs from the lock; StorageError
    when the files cannot be written.
    """
    before = locks.read(file).kernels if file.is_file() else ()
    kernels = [one for one in before if one.use != use]
    for wanted in every:
        build = find(wanted, place)
        if place.given is not None and place.given.is_file():
            _require_locked(build, place.given, file)
        relative = _copy(build, file)
        kernels.append(build.locked.model_copy(update={"folder": relative, "use": use}))
        if kernels[-1] not in before:
            files = plural(len(build.locked.files), "file")
            say(f"kernel {build.name}: {files} of {build.locked.variant}")
    kernels.sort(key=lambda one: one.use, reverse=True)
    if tuple(kernels) != before:
        locks.write(kernels, file)


def bring(wanted: Wanted, locked: Locked, file: Path) -> None:
    """Copy one locked kernel's files next to its lock file, and record their folder in it. Raises
    JobError when the files are not available, or differ from the lock.
    """
    source = _fetched_folder(file, locked)
    if source is None or locks.differences(locked, source):
        if wanted.is_local:
            root = wanted.folder.absolute()
            builds = (base / locked.variant for base in (root / "build", root))
            source = next((build for build in builds if build.is_dir()), root)
        else:
            source = _files_of(wanted, locked.commit or "", locked.variant, None)
    locks.require_same(locked, source, file)
    moved = locked.model_copy(update={"folder": _copy(Build(wanted, locked, source), file)})
    locks.write((moved if one == locked else one for one in locks.read(file).kernels), file)


def _copy(build: Build, file: Path) -> str:
    """Copy a build next to the lock file, unless it is there; return its folder from there."""
    name = f"{build.wanted.label.replace('/', '--')}-{build.locked.digest[:12]}"
    relative = Path(locks.FOLDER, name, build.locked.variant)
    folder = file.parent.absolute() / relative
    if folder != build.folder.absolute() and locks.differences(build.locked, folder):
        ignored = shutil.ignore_patterns("__pycache__")
        try:
            with atomic_folder(folder) as partial:
                shutil.copytree(build.folder, partial, ignore=ignored, dirs_exist_ok=True)
        except OSError as error:
            raise StorageError(
                "The files of a kernel cannot be written",
                f"{folder}: {error.strerror or error}",
                "free space, or choose a folder that can be written to",
            ) from None
        locks.require_same(build.locked, folder, file)
    return str(relative)


def _fetched_folder(file: Path, locked: Locked | None) -> Path | None:
    """Return the folder next to a lock file that has the kernel's files, if there is one."""
    folder = file.parent / locked.folder if locked and locked.folder else None
    return folder if folder is not None and folder.is_dir() else None


def _require_locked(build: Build, given: Path, own: Path) -> None:
    """Refuse to continue with a kernel that the job's lock file no longer has."""
    locked = require_in(build.wanted, given)
    if locked.files != build.locked.files:
        raise JobError(
            f"{build.wanted.asked} differs from the lock file of the job",
            f"the run began with {build.locked.at} ({own}); {given} has {locked.at}",
            "restore the lock file that the run began with, or begin a new run in another "
            "output_dir",
        )


def require_in(wanted: Wanted, file: Path) -> Locked:
    """Return a kernel's entry in a lock file. Raises JobError when it has none."""
    lock = locks.read(file)
    locked = lock.of(wanted)
    if locked is None:
        has = ", ".join(k.asked + (f" ({k.commit[:7]})" if k.commit else "") for k in lock.kernels)
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
    folder = _fetched_folder(file, locked)
    if folder is None and wanted.is_local:
        folder = _local_folder(wanted, target)
    if folder is None:
        folder = _files_of(wanted, locked.commit or "", locked.variant, target)
    locks.require_same(locked, folder, file)
    variants.python_name(folder)
    return Build(wanted, locked, folder)


def _require_fit(locked: Locked, target: Target | None) -> None:
    if variants.is_build(locked.variant) and _chosen([locked.variant], None, target) is None:
        raise _no_build(f"{locked.source}, as it is locked,", [locked.variant], target)


def local_build(wanted: Wanted, target: Target) -> Path | None:
    """Return the build in a local kernel's folder; None if the folder is not on this machine."""
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
            f"{root} {'is a file' if root.exists() else 'does not exist'}",
            "correct its path in the job; relative ones count from the folder you launch in",
        )
    if (root / "metadata.json").is_file():
        if variants.is_build(root.name) and _chosen([root.name], None, target) is None:
            raise _no_build(wanted.source, [root.name], target)
        return root
    names: list[str] = []
    for base in (root / "build", root):
        here = [p.name for p in base.iterdir() if p.is_dir()] if base.is_dir() else []
        builds = sorted(name for name in here if variants.is_build(name))
        names += builds
        if (chosen := _chosen(builds, None, target)) is not None:
            return base / chosen
    raise _no_build(wanted.source, sorted(names), target)


def _chosen(names: Sequence[str], variant: str | None, target: Target | None) -> str | None:
    """Return the build to use: the given variant, or one for the target; None accepts any."""
    if variant is not None:
        names = [name for name in names if name == variant]
    return next(iter(names), None) if target is None else variants.choose(names, target)


def _no_build(name: str, names: Sequence[str], target: Target | str | None) -> NoBuild:
    return NoBuild(
        f"{name} has no build for {target or 'any machine'}",
        f"it has {', '.join(names) or 'none'}",
        "name another version of it, or leave it out; builds are named by framework, backend and "
        "system, as torch-cuda (any PyTorch) or torch211-cxx11-cu130-x86_64-linux",
    )


def _from_hub(wanted: Wanted, place: Place) -> tuple[Path, str, str]:
    """Return folder, commit and why the publisher is trusted. A cached commit needs no network."""
    folder = _cached(wanted, wanted.commit, None, place.target) if wanted.commit else None
    if folder is not None and wanted.commit is not None:
        trust = "from the cache by its commit; the Hub was not asked about its publisher"
        return folder, wanted.commit, trust
    commit = _commit_of(wanted)
    trust = _trusted(wanted, place.trust)
    return _download(wanted, commit, None, place.target), commit, trust


def _files_of(wanted: Wanted, commit: str, variant: str, target: Target | None) -> Path:
    return _cached(wanted, commit, variant, target) or _download(wanted, commit, variant, target)


def _cached(wanted: Wanted, commit: str, variant: str | None, target: Target | None) -> Path | None:
    """Return a build from the Hub client's cache without asking the Hub; None if it lacks it."""
    from huggingface_hub import snapshot_download

    cache = os.environ.get("KERNELS_CACHE")
    try:
        root = snapshot_download(
            wanted.source, repo_type=KIND, revision=commit, cache_dir=cache, local_files_only=True
        )
    except (OSError, ValueError):  # missing or incomplete
        return None
    builds = Path(root) / "build"
    names = [p.name for p in builds.iterdir()] if builds.is_dir() else []
    name = _chosen(names, variant, target)
    if name is None or not (builds / name / "metadata.json").is_file():
        return None
    return builds / name


def _commit_of(wanted: Wanted) -> str:
    """Ask the Hub for the commit of a version, a branch or a bare name: its newest version."""
    if wanted.commit is not None:
        return wanted.commit
    refs = _ask(wanted, lambda api: api.list_repo_refs(wanted.source, repo_type=KIND))
    every = {ref.name: ref.target_commit for ref in (*refs.branches, *refs.tags)}
    numbers = {int(n[1:]): c for n, c in every.items() if n[0] == "v" and n[1:].isdigit()}
    if wanted.version is not None:
        commit = numbers.get(wanted.version)
    elif wanted.revision is not None:
        commit = every.get(wanted.revision)
    else:
        commit = numbers[max(numbers)] if numbers else every.get("main")
    if commit is None:
        raise JobError(
            f"{wanted.source} has no {wanted.asked.partition('@')[2] or 'version'}",
            f"it has {', '.join(sorted(every)) or 'no branches'}",
            "name one of these, or a commit of 40 digits",
        )
    return commit


def _download(wanted: Wanted, commit: str, variant: str | None, target: Target | None) -> Path:
    """Download a build into the Hub client's cache and return its folder there."""
    where: dict[str, Any] = {"repo_type": KIND, "revision": commit}
    found = _ask(wanted, lambda api: [*api.list_repo_tree(wanted.source, "build", **where)])
    names = sorted({Path(entry.path).name for entry in found})
    name = _chosen(names, variant, target)
    if name is None:
        raise _no_build(wanted.asked, names, target or variant)
    where |= {"allow_patterns": [f"build/{name}/*"], "ignore_patterns": ["*.pyc"]}
    where["cache_dir"] = os.environ.get("KERNELS_CACHE")
    root = _ask(wanted, lambda api: api.snapshot_download(wanted.source, **where))
    return Path(str(root)) / "build" / name


def _trusted(wanted: Wanted, trust: Sequence[str]) -> str:
    """Return why a publisher is trusted: by the job, or by the Hub."""
    publisher = wanted.source.partition("/")[0]
    if publisher in trust or wanted.source in trust:
        return "named in kernels_trust"
    overview = _ask(wanted, lambda api: api.get_organization_overview(publisher))
    if getattr(overview, "trustedKernelPublisher", False):
        return "marked by the Hub as a trusted publisher of kernels"
    raise JobError(
        f"{publisher} is not a publisher that the Hub trusts with kernels",
        f"{wanted.source}: its code would run in every worker",
        f"read that code, then set kernels_trust: [{publisher}]",
    )


def _ask(wanted: Wanted, question: Callable[[HfApi], Answer]) -> Answer:
    """Return the Hub's answer, or raise a JobError with the Hub's own message."""
    from huggingface_hub import HfApi, errors

    # httpx's or httpx2's HTTPError, as the client has it.
    unreachable: Any = errors.HfHubHTTPError.__bases__[0]
    try:
        return question(HfApi(library_name="raytrain_adv"))
    except errors.RepositoryNotFoundError as error:
        raise JobError(
            f"kernel not found: there is no kernel {wanted.source} on the Hub",
            first_line(error),
            "correct its name, or set HF_TOKEN if the repository is private",
        ) from error
    except (errors.OfflineModeIsEnabled, unreachable, OSError, ValueError) as error:
        offline = isinstance(error, errors.OfflineModeIsEnabled)
        raise JobError(
            f"{wanted.source} cannot be read from the Hub",
            "HF_HUB_OFFLINE is set, and its files are not here" if offline else first_line(error),
            "on a machine that reaches it: raytrain-adv kernels lock job.yaml, then raytrain-adv "
            "kernels fetch kernels.lock.json;\ncopy both here and set kernels_lock: "
            "kernels.lock.json, or name a folder with path",
        ) from error
