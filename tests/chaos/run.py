"""Do one kill to a real run, let it end or continue it, and compare it with one left alone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from filelock import FileLock
from transformers import AutoConfig, AutoModelForCausalLM

from raytrain_adv.config import load
from raytrain_adv.storage.storage import Storage
from tests.chaos.cases import ALL_JOBS, COMMON, EVERY, ROWS, Case
from tests.conftest import tiny_keys, write_rows
from tests.processes import command_of, has_open
from tests.workers import events, rows, run_workers, stop_all

RESUME = "resume_from_checkpoint=true"
NAMED = {"raylet": "raylet", "gcs_server": "gcs_server", "controller": "TrainController"}
WORKER, TOKENIZER = "RayTrainWorker", "processes import main"
HANG_S = 900.0
ORPHANED_S = 90.0  # Ray's agents give a GCS that is gone 60 s, and end 61 to 63 s after a kill
MOST_LAUNCHES = 4


@dataclass
class Outcome:
    """What a kill has led to."""

    case: Case
    is_killed: bool = False
    reached: int = 0  # the last step logged when the process was killed
    lost: int = 0  # steps that were computed again
    exit_codes: list[int] = field(default_factory=list)
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """Return it as data."""
        case = self.case
        what = {"run": case.number, "job": case.job, "killed": case.target, "at": case.when}
        found = {"is_killed": self.is_killed, "reached": self.reached, "lost": self.lost}
        end = {"exit_codes": self.exit_codes, "seconds": round(self.seconds, 1)}
        return {**what, **found, **end, "problems": self.problems}


def job_files(folder: Path, kind: str, out: Path) -> Path:
    """Write a job's file, data and model under names in several scripts; return the job file."""
    folder.mkdir(parents=True)
    keys = tiny_keys(folder)
    model = folder / "modèle-模型"
    Path(keys["model_name_or_path"]).rename(model)
    given: dict[str, Any] = {"model_name_or_path": str(model), "output_dir": str(out)}
    given["dataset"] = str(write_rows(folder / "строки.json", ROWS.get(kind, 64)))
    if ALL_JOBS[kind].get("finetuning_type") == "lora":
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).save_pretrained(model)
        given["train_from_scratch"] = False
    path = folder / "задание.yaml"
    changed = ALL_JOBS[kind]
    owned = changed.get("sweep", {})
    all_keys = {**keys, **COMMON, **given, **changed}
    kept = {key: value for key, value in all_keys.items() if key not in owned}
    path.write_text(yaml.safe_dump(kept, allow_unicode=True))
    return path


@dataclass
class Launch:
    """A driver, and what marks the processes that it has started."""

    process: subprocess.Popen[bytes]
    session: str

    def left_running(self) -> list[str]:
        """Return the commands of processes that outlive their driver by ORPHANED_S."""
        end = time.monotonic() + ORPHANED_S
        while (found := family(self.session)) and time.monotonic() < end:
            time.sleep(0.5)
        return [command_of(process)[:80] for process in found]


@contextlib.contextmanager
def launched(job: Path, log: Path, *overrides: str) -> Iterator[Launch]:
    """Launch the job as a user does, with a Ray of its own; leave none of its processes."""
    session = tempfile.mkdtemp(prefix="rt", dir="/tmp")  # sockets' paths must be short
    cache = {"XDG_CACHE_HOME": str(job.parent / "cache"), "HF_HUB_OFFLINE": "1"}
    # On a machine that others use, workers would starve, and be killed for memory of others.
    cache |= {"RAY_worker_niceness": "0", "RAY_memory_monitor_refresh_ms": "0"}
    environment = {**os.environ, **cache, "RAY_TMPDIR": session, "CHAOS": session}
    command = [sys.executable, "-m", "raytrain_adv.launch", str(job), *overrides]
    with log.open("ab") as file:
        started = subprocess.Popen(
            command, stdout=file, stderr=file, env=environment, start_new_session=True
        )
        try:
            yield Launch(started, session)
        finally:
            for process in family(session):
                with contextlib.suppress(psutil.Error):
                    process.kill()
            started.wait()
            shutil.rmtree(session, ignore_errors=True)


def family(session: str) -> list[psutil.Process]:
    """Return the living processes of a launch, also those that have lost their parent."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_alive = process.status() != psutil.STATUS_ZOMBIE
            if is_alive and process.environ().get("CHAOS") == session:
                found.append(process)
    return found


def find_target(launch: int, target: str, log: Path) -> psutil.Process | None:
    """Return the process to kill, if it is there."""
    if target == "driver":
        return psutil.Process(launch)
    try:
        children = psutil.Process(launch).children(recursive=True)
    except psutil.Error:
        return None
    if target in ("raylet", "gcs_server"):
        return next((p for p in children if _name(p) == target), None)
    name = {**NAMED, "tokenizer": TOKENIZER}.get(target, WORKER)
    found = [p for p in children if name in command_of(p)]
    if name == WORKER and len(found) > 1:
        writing = [p for p in found if has_open(p, log)]  # rank 0 writes the log
        others = [p for p in found if p not in writing]
        found = writing if target == "rank 0" else others
    return found[0] if found else None


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""


def losses(out: Path) -> dict[int, float]:
    """Return step -> loss, exactly as logged, with a step that is logged twice as an error."""
    found: dict[int, float] = {}
    for row in rows(out):
        if row["kind"] == "train":
            assert row["step"] not in found, f"step {row['step']} is logged twice"
            found[row["step"]] = row["loss"]
    return found


def runs_of(out: Path) -> list[Path]:
    """Return the folders of the runs that an output_dir holds: itself, or a sweep's trials."""
    trials = sorted((out / "trials").glob("*/metrics.jsonl"))
    return [file.parent for file in trials] or [out]


def reached(out: Path) -> int:
    """Return the last step that any run of the folder has logged."""
    steps = [r["step"] for run in runs_of(out) for r in rows(run) if r["kind"] == "train"]
    return max(steps, default=0)


def has_come(case: Case, out: Path, launch: int) -> bool:
    """Whether the case's moment is here."""
    if case.moment == "step":
        return reached(out) >= case.step
    if case.moment == "writing a checkpoint":
        folders = list((out / "checkpoints").glob("*/step_*"))
        return any(not (folder / "manifest.json").exists() for folder in folders)
    if case.moment == "starting":
        return find_target(launch, "gcs_server", out) is not None
    if case.moment == "tokenizing":
        return find_target(launch, "tokenizer", out) is not None
    if case.moment == "workers starting":
        return find_target(launch, "controller", out) is not None
    if case.moment == "model written":
        return (out / "model").exists()
    if case.moment == "between trials":
        trials = (Storage.at(str(out)).read_json("sweep.json") or {}).get("trials", ())
        return any(trial["status"] == "done" for trial in trials)
    if case.moment == "resuming":
        return bool(events(out, "resume"))
    phase = {"exporting": "export", "loading the model": "model"}[case.moment]
    return any(row["message"] == phase for row in events(out, "phase"))


def hurt(case: Case, out: Path, launch: subprocess.Popen[bytes], outcome: Outcome) -> bool:
    """Wait for the moment and kill; return whether it was done before the run ended."""
    end, log = time.monotonic() + HANG_S, out / "metrics.jsonl"
    process: psutil.Process | None = None
    while launch.poll() is None and time.monotonic() < end:
        if process is None and case.moment == "exporting" and reached(out) > 1:
            process = find_target(launch.pid, case.target, log)  # an export is soon over
        if has_come(case, out, launch.pid):
            if case.moment in ("starting", "workers starting"):
                time.sleep(case.delay_s)
            outcome.reached = max(outcome.reached, reached(out))
            process = process or find_target(launch.pid, case.target, log)
            if process is not None:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGKILL)
                    return True
                return False
        time.sleep(0.02)
    return False


def waited(launch: subprocess.Popen[bytes], outcome: Outcome) -> bool:
    """Wait for a launch to end; return whether it was no hang."""
    try:
        outcome.exit_codes.append(launch.wait(HANG_S))
    except subprocess.TimeoutExpired:
        outcome.problems.append(f"launch {len(outcome.exit_codes) + 1} hung for {HANG_S:g} s")
        return False
    return True


def do(case: Case, folder: Path, whole: Path) -> Outcome:
    """Kill in one run, continue it until it is done, and compare it with `whole`."""
    outcome, began = Outcome(case), time.monotonic()
    out, log = folder / "saves_é" / "测试", folder / "output.txt"
    job = job_files(folder, case.job, out)
    kills = [case]
    if case.moment == "resuming":
        kills.insert(0, replace(case, moment="step", target="driver"))
    for number in range(MOST_LAUNCHES):
        with launched(job, log, *([RESUME] if number else [])) as launch:
            if kills and hurt(kills[0], out, launch.process, outcome):
                kills.pop(0)  # one that was not done is tried again: a Ray may not start
            if not waited(launch.process, outcome):
                break
            if left := launch.left_running():
                outcome.problems.append(f"left running: {left}")
        if outcome.exit_codes[-1] == 0:
            break
    outcome.is_killed = not kills
    outcome.seconds = time.monotonic() - began
    outcome.problems += differences(case, out, whole, outcome)
    said = log.read_text(errors="replace")
    if not outcome.is_killed:
        outcome.problems.append("the run ended before the moment came: nothing was killed")
    if "Traceback (most recent call last)" in said:
        outcome.problems.append("a traceback was printed")
    if outcome.exit_codes and outcome.exit_codes[0] > 0 and "fix:" not in said:
        outcome.problems.append(f"exit code {outcome.exit_codes[0]} without a word of what to do")
    return outcome


def differences(case: Case, out: Path, whole: Path, outcome: Outcome) -> list[str]:
    """Return how a run differs from the undisturbed one; no words where it does not."""
    found = []
    if not outcome.exit_codes or outcome.exit_codes[-1] != 0:
        return [f"it did not end well: exit codes {outcome.exit_codes}"]
    pairs = list(zip(runs_of(out), runs_of(whole), strict=True))
    for mine, other in pairs:
        try:
            if losses(mine) != losses(other):
                found.append(f"{mine.name}: losses differ from the undisturbed run's")
        except AssertionError as error:
            found.append(str(error))
        if model_files(mine) != model_files(other):
            found.append(f"{mine.name}: the exported model differs")
    starts = [row.get("resumed_from_step") or 0 for row in events(out, "plan")]
    if outcome.is_killed and case.job != "sweep" and len(starts) > 1:
        outcome.lost = max(outcome.reached - starts[1], 0)
        if outcome.lost >= 2 * EVERY:
            found.append(f"{outcome.lost} steps were lost, with save_steps: {EVERY}")
    return found


def model_files(run: Path) -> dict[str, str]:
    """Return file -> hash of the weights that a run exported; safetensors writes the metadata of a
    file in a random order.
    """
    found = {}
    for file in sorted(run.glob("model*/*.safetensors")):
        content = file.read_bytes()
        end = 8 + struct.unpack("<Q", content[:8])[0]
        header = json.dumps(json.loads(content[8:end]), sort_keys=True)
        digest = hashlib.sha256(header.encode() + content[end:])
        found[f"{file.parent.name}/{file.name}"] = digest.hexdigest()
    return found


def undisturbed(kind: str, folder: Path) -> Path:
    """Run a job with nothing killed, without Ray; return its output_dir. Made once, also if several
    processes need it.
    """
    out = folder / "saves_é" / "测试"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if (folder / "done").exists():
            return out
        job = load(job_files(folder, kind, out))
        if job.sweep is None:
            run_workers(2, folder / "задание.yaml")
        else:
            keys = yaml.safe_load((folder / "задание.yaml").read_text())
            del keys["sweep"]
            for trial in job.sweep.trials:
                own = {**keys, **trial.values, "output_dir": str(out / "trials" / trial.name)}
                path = folder / f"{trial.name}.yaml"
                path.write_text(yaml.safe_dump(own, allow_unicode=True))
                run_workers(1, path)
        stop_all()
        (folder / "done").touch()
    return out
