"""What a process of a run is, while it may end at any moment."""

from __future__ import annotations

from pathlib import Path

import psutil


def command_of(process: psutil.Process) -> str:
    """Return a process's command line; empty if it has just ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def has_open(process: psutil.Process, file: Path) -> bool:
    """Whether a process has this file open; one that has just ended has none."""
    try:
        return str(file) in [opened.path for opened in process.open_files()]
    except psutil.Error:
        return False
