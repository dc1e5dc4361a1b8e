"""Kernels on the Hub: from a name to a commit, a build and its files in the Hub client's cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from raytrain_adv.errors import JobError
from raytrain_adv.kernels import variants
from raytrain_adv.kernels.source import Wanted
from raytrain_adv.kernels.variants import Target

if TYPE_CHECKING:
    from huggingface_hub import HfApi


class NoBuild(JobError):
    """A kernel that is there, and not for the machines it is asked for."""


KIND = "kernel"
"""The Hub's kind of repository, beside model and dataset."""
Answer = TypeVar("Answer")


def cached(wanted: Wanted, commit: str, variant: str | None, target: Target | None) -> Path | None:
    """Return a build that an earlier download has left in the cache; nothing is asked of the Hub.

    Args:
        wanted: the kernel.
        commit: its commit.
        variant: the build; none chooses for the target.
        target: what it has to fit; none is content with the variant.
    """
    from huggingface_hub import snapshot_download

    try:
        root = snapshot_download(
            wanted.source,
            repo_type=KIND,
            revision=commit,
            cache_dir=_cache(),
            local_files_only=True,
        )
    except (OSError, ValueError):  # it is not there, or not whole
        return None
    builds = Path(root) / "build"
    names = [p.name for p in builds.iterdir()] if builds.is_dir() else []
    name = chosen(names, variant, target)
    if name is None or not (builds / name / "metadata.json").is_file():
        return None
    return builds / name


def chosen(names: Sequence[str], variant: str | None, target: Target | None) -> str | None:
    """Return the build to take of those there are; none where it is not there or does not fit.

    Args:
        names: of the builds.
        variant: the one to take; none chooses.
        target: what it has to fit; none takes any.
    """
    if variant is not None:
        names = [name for name in names if name == variant]
    if target is None:
        return next(iter(names), None)
    return variants.choose(names, target)


def commit_of(wanted: Wanted) -> str:
    """Ask the Hub for the commit that a version, a branch or a bare name stands for; a bare name is
    the newest version.

    Raises:
        JobError: when the Hub cannot be reached, or has no such repository, version or revision.
    """
    if wanted.commit is not None:
        return wanted.commit
    refs = _asked(wanted, lambda api: api.list_repo_refs(wanted.source, repo_type=KIND))
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


def download(wanted: Wanted, commit: str, variant: str | None, target: Target | None) -> Path:
    """Bring a build into the cache and return its folder there.

    Raises:
        JobError: when the Hub cannot be reached, or has no build for the target.
    """
    found = _asked(
        wanted,
        lambda api: list(
            api.list_repo_tree(wanted.source, path_in_repo="build", repo_type=KIND, revision=commit)
        ),
    )
    names = sorted({Path(entry.path).name for entry in found})
    name = chosen(names, variant, target)
    if name is None:
        raise no_build(wanted.asked, names, target or variant)
    root = _asked(
        wanted,
        lambda api: api.snapshot_download(
            wanted.source,
            repo_type=KIND,
            revision=commit,
            allow_patterns=[f"build/{name}/*"],
            ignore_patterns=["*.pyc"],
            cache_dir=_cache(),
        ),
    )
    return Path(str(root)) / "build" / name


def trusted(wanted: Wanted, trust: Sequence[str]) -> str:
    """Return why a publisher may be trusted: the job says so, or the Hub marks it.

    Raises:
        JobError: when neither does, or the Hub cannot be asked.
    """
    publisher = wanted.source.partition("/")[0]
    if publisher in trust or wanted.source in trust:
        return "named in kernels_trust"
    overview = _asked(wanted, lambda api: api.get_organization_overview(publisher))
    if getattr(overview, "trustedKernelPublisher", False):
        return "marked by the Hub as a trusted publisher of kernels"
    raise JobError(
        f"{publisher} is not a publisher that the Hub trusts with kernels",
        f"{wanted.source}: its code would run in every worker",
        f"read that code, then set kernels_trust: [{publisher}]",
    )


def no_build(name: str, names: Sequence[str], target: Target | str | None) -> NoBuild:
    """Return the error for a kernel without a build for the target."""
    return NoBuild(
        f"{name} has no build for {target or 'any machine'}",
        f"it has {', '.join(names) or 'none'}",
        "name another version of it, or leave it out; builds are named by framework, backend and "
        "system, as torch-cuda (any PyTorch) or torch211-cxx11-cu130-x86_64-linux",
    )


def _cache() -> str | None:
    return os.environ.get("KERNELS_CACHE")


def _asked(wanted: Wanted, ask: Callable[[HfApi], Answer]) -> Answer:
    """Return the Hub's answer.

    Raises:
        JobError: when there is none; the Hub's own words are in it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    # httpx's or httpx2's HTTPError, as the client has it.
    unreachable: Any = HfHubHTTPError.__bases__[0]
    try:
        return ask(HfApi(library_name="raytrain_adv"))
    except RepositoryNotFoundError as error:
        raise JobError(
            f"kernel not found: there is no kernel {wanted.source} on the Hub",
            _first_line(error),
            "correct its name, or set HF_TOKEN if the repository is private",
        ) from error
    except OfflineModeIsEnabled as error:
        raise _unreachable(wanted, "HF_HUB_OFFLINE is set, and its files are not here") from error
    except (unreachable, OSError, ValueError) as error:
        raise _unreachable(wanted, _first_line(error)) from error


def _unreachable(wanted: Wanted, found: str) -> JobError:
    return JobError(
        f"{wanted.source} cannot be read from the Hub",
        found,
        "on a machine that reaches it: raytrain-adv kernels lock job.yaml, then raytrain-adv "
        "kernels fetch kernels.lock.json;\nbring both along and set kernels_lock: "
        "kernels.lock.json, or name a folder with path",
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
