"""Kill at random, print a row for each kill, and write the table.

python -m tests.chaos --runs 50 --seed 1 --out jobs/benchmarks/results/chaos.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from tests.chaos import cases, run


def main() -> int:
    """Return 0 if every run is bit for bit what it would have been without its kill."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rare", action="store_true", help="at moments that come once in a run")
    parser.add_argument("--gpus", action="store_true", help="FP8 all-gather on two GPUs alone")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of runs to repeat")
    parser.add_argument("--out", type=Path, help="file for the results")
    parser.add_argument("--whole", type=Path, help="folder to keep undisturbed runs in")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves no process
    found: list[dict[str, Any]] = []
    folder = Path(tempfile.mkdtemp(prefix="chaos"))
    command = f"python -m tests.chaos --runs {given.runs} --seed {given.seed}"
    command += " --rare" * given.rare + " --gpus" * given.gpus
    for case in cases.cases(given.seed, given.runs, given.rare, given.gpus):
        if given.only and case.number not in given.only:
            continue
        whole = run.undisturbed(case.job, (given.whole or folder / "whole") / case.job)
        outcome = run.do(case, folder / f"run-{case.number}", whole)
        found.append(outcome.row())
        print(json.dumps(found[-1]), flush=True)
        if given.out:
            made = {"command": command, "date": datetime.date.today().isoformat()}
            results = {**made, "cores": os.cpu_count(), "runs": found}
            given.out.write_text(json.dumps(results, indent=1) + "\n")
    hurt = [row for row in found if row["problems"]]
    killed = Counter(row["killed"] for row in found if row["is_killed"])
    print(f"{len(found)} runs, {len(hurt)} with problems; killed: {dict(killed)}")
    if hurt:
        print(f"their folders: {folder}")
    else:
        shutil.rmtree(folder)
    return 1 if hurt else 0


if __name__ == "__main__":
    sys.exit(main())
