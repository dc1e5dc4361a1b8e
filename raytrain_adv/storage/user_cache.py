"""Folders of this package in the user's cache folder, and code that is kept there."""

import os
import sys
import tempfile
from importlib.util import cache_from_source, find_spec
from pathlib import Path

from raytrain_adv.errors import JobError


def user_cache(name: str) -> Path:
    """Return a folder of this package in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "raytrain_adv" / name


def folder_of_code(name: str, what: str, variable: str) -> Path:
    """Return a folder of code that this user alone can write, made if it is missing; `variable`
    names another one. Raises JobError if others can write there, OSError if this user cannot.
    """
    folder = user_cache(name)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    with tempfile.TemporaryFile(dir=folder):  # a folder that is there may be read-only, or full
        pass
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise JobError(
            f"{what} would be read from a folder that others can write",
            f"{folder}: owner {found.st_uid}, mode {found.st_mode & 0o777:o}; this user is "
            f"{os.getuid()}",
            f"chmod 700 {folder}, or name another folder in {variable}",
        )
    return folder


def keep_bytecode() -> str:
    """Have this process, and those that it starts, keep Python's bytecode in the user's cache
    folder if PyTorch has none and may get none; return a sentence, or nothing. Raises JobError as
    `folder_of_code`.

    Images set PYTHONDONTWRITEBYTECODE. Driver, controller and workers, which start one after
    another, each compile thousands of files then: on an H200's host 15 s of an import of 16 s.
    """
    variable, found = "PYTHONPYCACHEPREFIX", find_spec("torch")
    if found is None or found.origin is None or sys.pycache_prefix is not None:
        return ""
    bytecode = Path(cache_from_source(found.origin))
    may_write = not sys.dont_write_bytecode and os.access(found.origin, os.W_OK)
    if bytecode.exists() or may_write:
        return ""
    try:
        folder = folder_of_code("bytecode", "Python's bytecode", variable)
    except OSError as error:
        return f"every process compiles PyTorch's Python code, as no bytecode is kept: {error}"
    os.environ[variable] = sys.pycache_prefix = str(folder)
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    return f"Python's bytecode is kept in {folder}: PyTorch was installed without it"
