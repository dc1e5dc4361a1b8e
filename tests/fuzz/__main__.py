"""Fuzz in processes with limits, and list what was found.

python -m tests.fuzz                    all targets, as often as each says
python -m tests.fuzz data --count 50    one target
python -m tests.fuzz data --only 17     one mutation again, with its traceback
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from random import Random
from typing import Any

COUNTS = {
    "jobs": 10_000,
    "data": 500,
    "checkpoints": 400,
    "plans": 150,
    "tokenizers": 300,
    "templates": 300,
    "adapters": 200,
    "kernels": 150,
    "states": 200,
}
"""How many mutations of each kind of file; the class of that name reads them."""
MOST_S, MOST_BYTES = 10.0, 2 * 2**30
"""Processor seconds and memory that one mutated file may take."""
MOST_WALL_S = 300.0  # on a machine that others use
PACKAGE = "raytrain_adv"


class Slow(BaseException):
    """A mutated file took too long."""


def child(target: str, seed: int, first: int, count: int) -> None:
    """Read mutated files one after another; print a line of JSON for each that goes wrong."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    from raytrain_adv.errors import RaytrainAdvError
    from tests.fuzz import targets

    targets.shorten_limits()
    kind = getattr(targets, target.capitalize())
    home = Path(tempfile.mkdtemp(prefix="fuzz"))
    os.environ["XDG_CACHE_HOME"] = str(home / "cache")
    once = kind(home)

    def expire(*_: Any) -> None:
        raise Slow(f"more than {MOST_S:g} s of processor time")

    signal.signal(signal.SIGPROF, expire)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MOST_BYTES, resource.RLIM_INFINITY))
    for number in range(first, first + count):
        print(json.dumps({"at": number}), file=out, flush=True)
        folder = home / "case"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        os.chdir(folder)
        wrong = ""
        try:
            signal.setitimer(signal.ITIMER_PROF, MOST_S)
            once(Random(f"{seed}/{target}/{number}"), folder)
        except RaytrainAdvError as error:
            str(error).encode()
        except BaseException as error:  # each kind is a finding
            signal.setitimer(signal.ITIMER_PROF, 0)
            wrong = described(error)
            if count == 1:
                traceback.print_exc()
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        if list(home.rglob("RAN")):
            wrong = "code of the file ran"
            for mark in home.rglob("RAN"):
                mark.unlink()
        if wrong:
            print(json.dumps({"at": number, "wrong": wrong}), file=out, flush=True)
    os.chdir("/")
    if count > 1:
        shutil.rmtree(home, ignore_errors=True)
    print(json.dumps({"done": True}), file=out, flush=True)


def described(error: BaseException) -> str:
    """Return the error with the innermost place of the package: one kind of finding."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f"/{PACKAGE}/" in f.filename]
    last = own[-1] if own else frames[-1]
    place = f"{last.filename.rpartition(PACKAGE)[2]}:{last.lineno}"
    return f"{type(error).__name__} at {place}: {str(error)[:160]}"


def fuzz(target: str, seed: int, first: int, count: int) -> dict[int, str]:
    """Fuzz a target in as many processes as it ends; return number -> what went wrong."""
    found: dict[int, str] = {}
    at, last = first - 1, first + count - 1
    while at < last:
        command = [sys.executable, "-m", "tests.fuzz", target, "--child"]
        command += ["--seed", str(seed), "--only", str(at + 1), "--count", str(last - at)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_hear, args=(process, answers), daemon=True).start()
        done = False
        while not done:
            try:
                line = answers.get(timeout=MOST_WALL_S)
            except queue.Empty:
                found[at] = f"no answer in {MOST_WALL_S:g} s"
                process.kill()
                break
            if line is None:
                break
            row = json.loads(line)
            done, at = "done" in row, row.get("at", at)
            if "wrong" in row:
                found[at] = row["wrong"]
                print(f"{target} {at}: {row['wrong']}", flush=True)
        process.wait()
        if done:
            break
        found.setdefault(at, f"the process died with exit code {process.returncode}")
        print(f"{target} {at}: {found[at]}", flush=True)
        if at < first:
            break  # it has not begun
    return found


def _hear(process: subprocess.Popen[str], answers: queue.Queue[str | None]) -> None:
    assert process.stdout is not None  # it is a pipe
    for line in process.stdout:
        answers.put(line)
    answers.put(None)


def main() -> int:
    """Return 0 if nothing was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int)
    parser.add_argument("--only", type=int)
    parser.add_argument("--child", action="store_true")
    given = parser.parse_args()
    if given.child:
        child(given.targets[0], given.seed, given.only, given.count)
        return 0
    if given.only is not None:
        child(given.targets[0], given.seed, given.only, 1)
        return 0
    num_found = 0
    for target in given.targets or COUNTS:
        count, began = given.count or COUNTS[target], time.monotonic()
        found = fuzz(target, given.seed, 1, count)
        num_found += len(found)
        seconds = time.monotonic() - began
        print(f"{target}: {count} mutations in {seconds:.0f} s, {len(found)} findings", flush=True)
    return 1 if num_found else 0


if __name__ == "__main__":
    sys.exit(main())
