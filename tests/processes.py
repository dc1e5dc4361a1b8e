"""What a process of a run is, while it may end at any moment, and programs in their own process."""

from __future__ import annotations

import os
import subprocess
import sys
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


def interpreted(program: str, *arguments: str) -> str:
    """Return what a program prints whose Triton kernels are interpreted on the CPU."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
