"""What a build says of itself in metadata.json, and what of that is not taken."""

from __future__ import annotations

import json
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from raytrain_adv.errors import JobError

FILE_NAME = "metadata.json"


def check(folder: Path) -> str:
    """Return the name under which the kernels package imports a build.

    Raises:
        JobError: when the build says nothing of itself, would fetch other kernels when loaded, or
            has a name that Python knows already: it would be imported in the place of that package.
    """
    for path in folder.rglob("*"):
        if not path.is_file() and (path.is_symlink() or not path.is_dir()):
            raise JobError(
                f"the kernel in {folder} holds what is no file",
                f"{path} is a link to {path.readlink()}" if path.is_symlink() else str(path),
                "take it out: a build is files and folders, and is copied to the workers",
            )
    metadata = _read(folder)
    depends = [str(one) for one in metadata["kernel-depends"]]
    if depends:
        raise JobError(
            f"the kernel in {folder} needs other kernels, which are not fetched for it",
            f"kernel-depends: {', '.join(depends)}",
            "name a kernel that stands alone",
        )
    name = str(metadata["id"])
    known = name in sys.stdlib_module_names or name in sys.builtin_module_names
    if not name.isidentifier() or known or PathFinder.find_spec(name) is not None:
        raise JobError(
            f"the kernel in {folder} cannot be imported under the id it has",
            f"{folder / FILE_NAME}: id {name!r} is "
            + ("that of an installed package" if name.isidentifier() else "no name in Python"),
            "give it an id of its own, as _my_kernel_cuda_1",
        )
    return name


def _read(folder: Path) -> dict[str, Any]:
    file = folder / FILE_NAME
    try:
        metadata = json.loads(file.read_text())
        return {
            "kernel-depends": list(metadata.get("kernel-depends", [])),
            "id": metadata["id"] + "",
        }
    except KeyError as error:
        found = f"it has no {error}"
    except (OSError, ValueError, AttributeError, TypeError) as error:
        found = str(error)
    raise JobError(
        f"a kernel's {FILE_NAME} cannot be read",
        f"{file}: {found}",
        'it needs id, name, version, license, backend and "python-depends"',
    )
