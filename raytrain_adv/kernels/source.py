"""Read kernel_name: its entries in one form, and what is wrong with them."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_serializer

from raytrain_adv.config.problems import Problem, show
from raytrain_adv.config.section import Text
from raytrain_adv.documented import Documented
from raytrain_adv.text import first_line

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")


class KernelEntry(Documented, BaseModel):
    """One entry of kernel_name, written out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    repo: Text | None = None
    """Repository of kernels on the Hub, as kernels-community/activation."""
    path: Text | None = None
    """Folder of a kernel, instead of repo."""
    revision: Text | None = None
    """Commit, branch or tag of repo."""
    version: Annotated[int, Field(ge=0, le=10**6)] | None = None
    """Version of repo, the N of its branch vN."""
    layers: dict[Text, Text] = Field(default_factory=dict)
    """Which layer of the kernel replaces which modules, as {RMSNorm: LigerRMSNorm}; empty uses all
    that fit."""

    @model_serializer
    def as_written(self) -> dict[str, Any]:
        """Return the keys that are given."""
        return {key: getattr(self, key) for key in type(self).model_fields if getattr(self, key)}


@dataclass(frozen=True)
class Wanted:
    """A kernel that the job names."""

    source: str  # name on the Hub, or path of a folder
    is_local: bool
    revision: str | None = None
    version: int | None = None
    layers: dict[str, str] = field(default_factory=dict, hash=False)
    """Site -> layer of the kernel; empty leaves the choice to the kernel's layers."""

    @property
    def asked(self) -> str:
        """The kernel on one line."""
        at = f"v{self.version}" if self.version is not None else self.revision
        return f"{self.source}@{at}" if at else self.source

    @property
    def label(self) -> str:
        """Short name for plans: of a folder its last part, of a repository all."""
        return Path(self.source).name if self.is_local else self.source

    @property
    def folder(self) -> Path:
        """A local kernel's folder."""
        return Path(self.source).expanduser()

    @property
    def commit(self) -> str | None:
        """The commit, if the job names one."""
        pinned = self.revision is not None and COMMIT.fullmatch(self.revision)
        return self.revision if pinned else None


def read(given: str | KernelEntry | list[str | KernelEntry] | None) -> tuple[Wanted, ...]:
    """Return the kernels in kernel_name, in its order."""
    if given is None:
        return ()
    entries = given if isinstance(given, list) else [given]
    return tuple(of_name(e) if isinstance(e, str) else _of_entry(e) for e in entries)


def of_name(name: str) -> Wanted:
    """Return the kernel of a line: owner/name, owner/name@version, or a folder."""
    name = name.strip()
    if looks_like_path(name):
        return Wanted(name, is_local=True)
    source, _, at = name.partition("@")
    if version := re.fullmatch(r"v(\d{1,6})", at):
        return Wanted(source, is_local=False, version=int(version[1]))
    return Wanted(source, is_local=False, revision=at or None)


def _of_entry(entry: KernelEntry) -> Wanted:
    layers = dict(entry.layers)
    if entry.path is not None:
        return Wanted(entry.path, is_local=True, layers=layers)
    return Wanted(entry.repo or "", False, entry.revision, entry.version, layers)


def looks_like_path(name: str) -> bool:
    """Return whether a name begins like a path, has more than one slash, or is a folder here."""
    if name.startswith(("/", "./", "../", "~")):
        return True
    return name.partition("@")[0].count("/") > 1 or (bool(name) and os.path.isdir(name))


def why_not(given: object) -> str:
    """Return what is wrong with the first malformed entry; empty if there is none."""
    for entry in given if isinstance(given, list) else [given]:
        try:
            if isinstance(entry, dict):
                KernelEntry.model_validate(entry)
        except ValidationError as error:
            first = error.errors()[0]
            return f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
    return ""


def problems(given: str | KernelEntry | list[str | KernelEntry] | None) -> Iterable[Problem]:
    """Find entries that name no kernel, or two."""
    key = "kernel_name"
    for entry in given if isinstance(given, list) else [given]:
        if isinstance(entry, KernelEntry):
            if (entry.repo is None) == (entry.path is None):
                text = "an entry names its kernel by repo or by path"
                yield Problem(text, "give one of the two", key)
                continue
            if entry.path is not None and (entry.revision or entry.version is not None):
                text = f"{show(entry.path)} is a folder, which has no version or revision"
                yield Problem(text, "delete version and revision", key)
            if entry.revision is not None and entry.version is not None:
                text = "version and revision both select the files"
                yield Problem(text, "keep one of them", key)
    for one in read(given):
        if one.is_local:
            yield from path_problems(one.source, key)
        if not one.is_local and not HUB_NAME.fullmatch(one.source):
            text = f"{show(one.source)} is neither a folder nor a name on the Hub"
            yield Problem(text, "write owner/name, as kernels-community/activation", key)


def path_problems(path: str, key: str) -> Iterable[Problem]:
    """Find a path that is invalid, or begins with an unknown user."""
    try:
        Path(path).expanduser().exists()
    except (OSError, RuntimeError, ValueError) as error:
        text = f"{show(path)} is not a path: {first_line(error)[:80]}"
        yield Problem(text, "give the path of a folder", key)
