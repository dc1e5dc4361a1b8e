"""What goes wrong in a run of weeks, done to real processes: workers and Ray Train's controller
that are killed, a worker that hangs, storage that fails for a while, a damaged checkpoint, a bad
loss.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from raytrain_adv.config import load
from raytrain_adv.errors import EXIT_STOPPED, RaytrainAdvError
from raytrain_adv.export.model_folder import export_model
from raytrain_adv.run.run import local_run
from raytrain_adv.worker.train import train
from tests.own_code import with_own_code
from tests.processes import command_of, has_open
from tests.ranks import run_ranks
from tests.workers import events, losses, rows, run_workers


def with_a_bad_batch(model: Path, at_pass: int) -> None:
    """Have one forward pass of a start give NaN on rank 1."""
    bad = 'found.logits = found.logits * float("nan") if here else found.logits'
    with_own_code(model, after=bad, rank=1, at_pass=at_pass)


def trained_on_a_failing_disk(jobs: list[str]) -> list[dict[str, Any] | str]:
    """Train on this rank; the disk of rank 1 fails once, as it writes its first checkpoint."""
    if dist.get_rank() == 1:
        fsync, failures = os.fsync, [OSError(errno.EIO, os.strerror(errno.EIO))]

        def failing(file: int) -> None:
            if failures:
                raise failures.pop()
            fsync(file)

        os.fsync = failing
    found: list[dict[str, Any] | str] = []
    for path in jobs:
        job = load(path)
        run = local_run(job)
        try:
            figures = train(job, run, export_model)
            found.append({key: figures[key] for key in ("steps", "skipped_steps")})
        except RaytrainAdvError as error:
            found.append(str(error))
        run.close()
    return found


def faults(out: Path) -> list[str]:
    told = [row["message"] for row in events(out, "fault")]
    return [text for text in told if "training waited" not in text]  # as the disk happens to be


def flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_bad_batch_a_failing_disk_and_damaged_checkpoints(job_file, keys, tmp_path):
    """Rank 1 has NaN in step 3, and its disk fails once: the update is skipped on both ranks, or
    the run stops, the batch kept; the checkpoint is written again. The last two are damaged: the
    run resumes from the one before them and logs the same losses; one that is named is refused."""
    with_a_bad_batch(Path(keys["model_name_or_path"]), at_pass=3)
    keys |= {"trust_remote_code": True, "use_cpu": True, "export_model": False}
    keys |= {"save_strategy": "steps", "save_steps": 2, "ray_num_workers": 2}
    skip, stop = tmp_path / "out", tmp_path / "stop"
    jobs = [
        job_file("skip.yaml", on_bad_loss="skip", max_steps=8),
        job_file("stop.yaml", output_dir=str(stop)),
    ]
    for figures, message in run_ranks(trained_on_a_failing_disk, 2, tmp_path, list(map(str, jobs))):
        assert figures == {"steps": 8, "skipped_steps": 1}
        assert "is not finite" in message and "first at optimizer step 3" in message
        assert str(stop / "bad_batches" / "step_00000003.json") in message
    written, skipped = sorted(faults(skip), key=lambda text: text.startswith("step 3"))
    assert "step 3: loss nan" in skipped and "its update was skipped" in skipped
    assert "of step 2 could not be written" in written and "Input/output error" in written
    before = losses(skip)
    assert before[3] is None and all(before[step] is not None for step in (1, 2, 4, 5, 6, 7, 8))
    kept = json.loads((skip / "bad_batches" / "step_00000003.json").read_text())["sequences"]
    assert [one["rank"] for one in kept] == [0, 0, 1, 1] and "Count to" in kept[0]["text"]
    assert (skip / "checkpoints" / "local" / "step_00000002" / "manifest.json").exists()

    last = skip / "checkpoints" / "local" / "step_00000008"
    flip_a_byte(last / "__1_0.distcp")
    skipping = {"on_bad_loss": "skip", "max_steps": 8}
    named = str(job_file("named.yaml", **skipping, resume_from_checkpoint=str(last)))
    for (message,) in run_ranks(trained_on_a_failing_disk, 2, tmp_path, [named]):
        assert "is damaged" in message and "__1_0.distcp does not have the bytes" in message
    os.truncate(last.with_name("step_00000006") / "__0_0.distcp", 100)
    with_a_bad_batch(Path(keys["model_name_or_path"]), at_pass=0)
    again = job_file("again.yaml", **skipping, resume_from_checkpoint=True)
    assert run_workers(2, again)[0]["resumed_from_step"] == 4
    assert losses(skip) == before
    damaged = [line for line in faults(skip) if "is damaged" in line]
    assert "step_00000008" in damaged[0] and "CRC-32" in damaged[0]
    assert "step_00000006" in damaged[1] and "has 100 bytes" in damaged[1]


def wait_until(condition: Callable[[], bool], driver: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert driver.poll() is None, driver.communicate()[0]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def end(driver: subprocess.Popen[str]) -> None:
    """Leave no process of a driver that is still there."""
    if driver.poll() is None:
        for process in psutil.Process(driver.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                process.kill()
        driver.kill()


def process_of(driver: int, name: str, log: Path, rank: int) -> psutil.Process:
    """Return a process of the run: of the workers the one of this rank; rank 0 writes the log."""
    found = [p for p in psutil.Process(driver).children(recursive=True) if name in command_of(p)]
    if name == "RayTrainWorker":
        found.sort(key=lambda p: not has_open(p, log))
    return found[rank]


def torn_checkpoints(out: Path) -> list[Path]:
    folders = (out / "checkpoints").glob("*/step_*")
    return [folder for folder in folders if not (folder / "manifest.json").exists()]


WRITING, WRITTEN = "a checkpoint is being written", "a checkpoint has just been committed"
FAULTS = (
    ("RayTrainWorker", 1, signal.SIGKILL, WRITTEN),
    ("RayTrainWorker", 0, signal.SIGKILL, WRITING),
    ("RayTrainWorker", 1, signal.SIGSTOP, WRITTEN),
    ("RayTrainWorker", 1, signal.SIGTERM, WRITTEN),
    ("TrainController", 0, signal.SIGKILL, WRITTEN),
)
SAVED_EVERY, STEPS = 10, 70


@pytest.mark.slow
def test_killed_stopped_and_hanging_processes_lose_no_more_than_an_interval(job_file, tmp_path):
    """One run that has all of FAULTS: each time it goes on from the checkpoint it had committed, in
    less than 30 s, and its losses are bit for bit those of a run that had none, without Ray.
    SIGTERM costs no step, and no retry: max_failures is 3, and four workers were lost."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    line = {"ray_num_workers": 2, "use_cpu": True, "max_steps": STEPS}
    run_workers(2, job_file("whole.yaml", **line, output_dir=str(whole)))
    line |= {"save_strategy": "steps", "save_steps": SAVED_EVERY, "export_model": False}
    line |= {"max_failures": 3, "step_timeout": 10, "ray_init_kwargs": {"include_dashboard": False}}
    command = [sys.executable, "-m", "raytrain_adv.launch", str(job_file("hurt.yaml", **line))]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for number, (name, rank, sent, when) in enumerate(FAULTS, start=1):
            wait_until(lambda n=number: len(events(out, "plan")) == n and _trains(out), driver)
            process = process_of(driver.pid, name, out / "metrics.jsonl", rank)
            saved = len(events(out, "checkpoint"))
            if when == WRITING:
                wait_until(lambda: bool(torn_checkpoints(out)), driver)
            else:
                wait_until(lambda saved=saved: len(events(out, "checkpoint")) > saved, driver)
            committed, reached = events(out, "checkpoint")[-1]["step"], max(losses(out))
            process.send_signal(sent)
            hurt_at = time.time()
            wait_until(lambda n=number: len(events(out, "plan")) > n and _trains(out), driver)
            start = events(out, "plan")[-1]
            assert start["resumed_from_step"] >= committed
            # Training goes on while a checkpoint is written: those steps count to the next.
            assert reached - start["resumed_from_step"] <= SAVED_EVERY or when == WRITING
            if sent == signal.SIGTERM:
                assert start["resumed_from_step"] >= reached
            went_on = [row["time"] for row in rows(out) if row["kind"] == "train"][-1] - hurt_at
            print(f"{name} {rank} {sent.name}: at {reached}, from {committed}, {went_on:.1f} s")
            # Two cores that others compute on take longer to start two workers.
            assert went_on < 30 or os.getloadavg()[0] > 6
        output = driver.communicate(timeout=240)[0]
    finally:
        end(driver)
    assert driver.returncode == 0, output
    assert [row["step"] for row in rows(out) if row["kind"] == "train"] == list(range(1, STEPS + 1))
    assert losses(out) == losses(whole)
    report = json.loads((out / "report.json").read_text())
    assert report["restarts"] == len(FAULTS)
    lost, lost_main, hung, told, controller = report["notes"][-len(FAULTS) :]
    assert "Worker 1 died" in lost and "Worker 0 died" in lost_main
    assert "because of worker 1" in hung and "its process does not answer" in hung
    assert "SIGTERM" in told and "controller died" in controller
    assert all(note in output for note in (lost, lost_main, hung, told, controller))


def _trains(out: Path) -> bool:
    """Whether a step has been logged since the last start."""
    return rows(out)[-1]["kind"] == "train" or any(
        row["kind"] == "train" for row in rows(out)[rows(out).index(events(out, "plan")[-1]) :]
    )


@contextlib.contextmanager
def head_and_node() -> Iterator[tuple[Cluster, Any]]:
    """Start a head that holds no worker, and a node that holds one."""
    folder = tempfile.mkdtemp(prefix="rt", dir="/tmp")  # sockets' paths must be short
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        head = {"num_cpus": 0, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield cluster, cluster.add_node(num_cpus=1)
        finally:
            cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def driver_on(cluster: Cluster, job: Path, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    """Launch a job on that Ray, in a process of its own."""
    command = [sys.executable, "-m", "raytrain_adv.launch", str(job), *overrides]
    environment = {**os.environ, "RAY_ADDRESS": cluster.address}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    driver = subprocess.Popen(command, env=environment, **pipes)
    try:
        yield driver
    finally:
        end(driver)


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["GCS", "GCS and raylet"])
def test_after_the_head_died_the_same_job_goes_on_on_a_new_one(job_file, tmp_path, killed):
    """Ray would end the driver with exit code 1 and no word. The run says what happened and what to
    do, in less than 60 s, and its report that it failed; on another Ray it loses no more than an
    interval, and logs what a run without faults does."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    line = {"ray_num_workers": 1, "use_cpu": True, "max_steps": 400, "export_model": False}
    line |= {"save_strategy": "steps", "save_steps": 10, "max_failures": 3}
    job = job_file(**line)
    with head_and_node() as (cluster, _), driver_on(cluster, job) as driver:
        wait_until(lambda: bool(events(out, "checkpoint")), driver)
        cluster.head_node.kill_gcs_server(check_alive=False)
        if killed == "GCS and raylet":
            cluster.head_node.kill_raylet(check_alive=False)
        hurt_at = time.monotonic()
        output = driver.communicate(timeout=120)[0]
        assert time.monotonic() - hurt_at < 60
    assert driver.returncode == 3 and "Ray's head node is gone" in output, output
    assert "resume_from_checkpoint: true" in output
    assert json.loads((out / "report.json").read_text())["status"] == "failed"
    reached = max(losses(out))
    resume = "resume_from_checkpoint=true"
    with head_and_node() as (cluster, _), driver_on(cluster, job, resume) as driver:
        output = driver.communicate(timeout=240)[0]
    assert driver.returncode == 0, output
    assert 0 <= reached - events(out, "plan")[-1]["resumed_from_step"] <= 10 < reached < 400
    run_workers(1, job_file("whole.yaml", **{**line, "output_dir": str(whole)}))
    assert losses(out) == losses(whole)


@pytest.mark.slow
def test_sigterm_to_the_whole_group_is_no_loss(job_file, tmp_path):
    """As `timeout` and batch systems send it: Ray's processes are in the driver's session."""
    out = tmp_path / "out"
    line = {"ray_num_workers": 1, "use_cpu": True, "max_steps": 20_000, "export_model": False}
    line |= {"save_strategy": "steps", "save_steps": 100_000, "output_dir": str(out)}
    command = [sys.executable, "-m", "raytrain_adv.launch", str(job_file(**line))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    driver = subprocess.Popen(command, start_new_session=True, **pipes)
    try:
        wait_until(lambda: bool(rows(out)) and rows(out)[-1]["kind"] == "train", driver)
        os.killpg(driver.pid, signal.SIGTERM)
        output = driver.communicate(timeout=120)[0]
    finally:
        end(driver)
    assert "The run was stopped" in output and "head node is gone" not in output, output
    assert events(out, "checkpoint")[-1]["step"] == max(losses(out))


@pytest.mark.slow
def test_a_sweep_whose_head_died_goes_on_on_a_new_one(job_file, keys, tmp_path):
    """One trial was done, and is not run again; the other goes on from its checkpoint. It is long:
    workers train on for most of a minute without their head.
    """
    out = tmp_path / "out"
    line = {"ray_num_workers": 1, "use_cpu": True, "export_model": False, "logging_steps": 10}
    line |= {"save_strategy": "steps", "save_steps": 10, "val_size": 8}
    del keys["max_steps"]
    section = {"max_steps": [20, 1500], "metric": "eval_loss"}  # one after the other: one CPU
    job = job_file(**line, sweep=section, output_dir=str(out))
    first, second = (out / "trials" / trial.name for trial in load(job).sweep.trials)

    def half_done() -> bool:
        report = first / "report.json"
        done = report.is_file() and json.loads(report.read_text())["status"] == "done"
        return done and bool(events(second, "checkpoint"))

    with head_and_node() as (cluster, _), driver_on(cluster, job) as driver:
        wait_until(half_done, driver)
        cluster.head_node.kill_gcs_server(check_alive=False)
        hurt_at = time.monotonic()
        output = driver.communicate(timeout=120)[0]
        assert time.monotonic() - hurt_at < 60
    assert driver.returncode == 3 and "Ray's head node is gone" in output, output
    assert "resume_from_checkpoint: true" in output
    reached, finished = max(losses(second)), (first / "report.json").stat().st_mtime_ns
    resume = "resume_from_checkpoint=true"
    with head_and_node() as (cluster, _), driver_on(cluster, job, resume) as driver:
        output = driver.communicate(timeout=300)[0]
    assert driver.returncode == 0, output
    assert (first / "report.json").stat().st_mtime_ns == finished
    assert 0 <= reached - events(second, "plan")[-1]["resumed_from_step"] <= 10
    assert 10 < reached < 1500


@pytest.mark.slow
def test_a_job_that_waits_for_room_is_told_that_the_head_is_gone(job_file, tmp_path):
    """Before training too: another job holds the only CPU as the head dies."""
    line = {"ray_num_workers": 1, "use_cpu": True, "max_steps": 4000, "export_model": False}
    first, second = tmp_path / "first", tmp_path / "second"
    holds = job_file("first.yaml", **line, output_dir=str(first))
    waits = job_file("second.yaml", **line, output_dir=str(second))
    with head_and_node() as (cluster, _), driver_on(cluster, holds) as driver:
        wait_until(lambda: bool(rows(first)) and rows(first)[-1]["kind"] == "train", driver)
        with driver_on(cluster, waits) as other:
            said = ""
            while "waiting for 1 CPU" not in said:
                line_said = other.stdout.readline()
                assert line_said, said
                said += line_said
            cluster.head_node.kill_gcs_server(check_alive=False)
            hurt_at = time.monotonic()
            said += other.communicate(timeout=120)[0]
            assert time.monotonic() - hurt_at < 60
    assert other.returncode == 3 and "Ray's head node is gone" in said, said
    report = json.loads((second / "report.json").read_text())
    assert report["status"] == "failed" and "head node is gone" in report["error"]


@pytest.mark.slow
def test_a_drained_node_leaves_a_checkpoint_and_costs_no_retry(job_file, tmp_path, monkeypatch):
    """The worker's node gets notice that it is taken away in 6 s: the run saves after its step, and
    goes on on the other node, with max_failures: 0."""
    out = tmp_path / "out"
    line = {"ray_num_workers": 1, "use_cpu": True, "max_steps": 2000, "export_model": False}
    line |= {"save_strategy": "steps", "save_steps": 100_000}
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    with head_and_node() as (cluster, node), driver_on(cluster, job_file(**line)) as driver:
        wait_until(lambda: bool(rows(out)) and rows(out)[-1]["kind"] == "train", driver)
        cluster.add_node(num_cpus=1)
        drained = GcsClient(address=cluster.address).drain_node(
            node.node_id,
            DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
            "a spot notice",
            int((time.time() + 6) * 1000),
        )
        assert drained[0], drained[1]
        wait_until(lambda: bool(events(out, "checkpoint")), driver)
        saved = events(out, "checkpoint")[-1]["step"]
        wait_until(lambda: len(events(out, "plan")) == 2 and _trains(out), driver)
        driver.send_signal(signal.SIGTERM)
        output = driver.communicate(timeout=240)[0]
    assert driver.returncode == EXIT_STOPPED and "The run was stopped" in output
    assert events(out, "plan")[-1]["resumed_from_step"] == saved
    assert "the node of worker 0 will be taken away in" in faults(out)[0]
    steps = [row["step"] for row in rows(out) if row["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1))
