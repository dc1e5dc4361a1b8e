"""raytrain-adv submit and status against a running cluster that asks for its token."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from raytrain_adv.driver.training.prometheus import EXPORTED
from tests.conftest import ROOT
from tests.own_code import with_own_code
from tests.workers import losses

RAYTRAIN_ADV = [sys.executable, "-m", "raytrain_adv.cli"]
START_TIMEOUT_S = 240.0
STEPS = 5000


@dataclass
class Cluster:
    """A head node of its own, that asks for a token."""

    environment: dict[str, str]
    dashboard: str
    metrics: str
    logs: Path

    def call(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*RAYTRAIN_ADV, *arguments, "--address", self.dashboard],
            **{"cwd": cwd, "env": self.environment, "timeout": 300},
            capture_output=True,
            text=True,
        )

    def exported(self) -> dict[str, str]:
        """The metrics that the node exports right now: name -> its last line."""
        with urllib.request.urlopen(self.metrics) as answer:
            lines = answer.read().decode().splitlines()
        return {re.split(r"[ {]", line)[0]: line for line in lines if not line.startswith("#")}

    def workers_logs(self) -> list[str]:
        """What Ray's dashboard shows as the logs of Ray's workers."""
        return [path.read_text() for path in self.logs.glob("worker-*")]

    def message(self) -> str:
        """The status message of the job that runs, as the dashboard shows it."""
        token = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        request = urllib.request.Request(f"{self.dashboard}/api/jobs/", headers=token)
        with urllib.request.urlopen(request) as answer:
            return next(
                (str(j["message"]) for j in json.load(answer) if j["status"] == "RUNNING"), ""
            )


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    folder = tempfile.mkdtemp(prefix="ra_", dir="/tmp")  # short: Ray's sockets lie in it
    token = secrets.token_hex(16)
    gcs, dashboard, metrics, agent, client = free_ports(5)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    }
    environment.pop("RAY_ADDRESS", None)
    command = ["ray", "start", "--head", "--block", "--temp-dir", folder, "--num-cpus", "3"]
    command += ["--port", str(gcs), "--dashboard-port", str(dashboard)]
    command += ["--metrics-export-port", str(metrics), "--object-store-memory", "100000000"]
    command += ["--dashboard-agent-listen-port", str(agent), "--ray-client-server-port"]
    command.append(str(client))
    with open(Path(folder) / "head.log", "w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        found = Cluster(
            environment,
            f"http://127.0.0.1:{dashboard}",
            f"http://127.0.0.1:{metrics}/metrics",
            Path(folder) / "session_latest" / "logs",
        )
        wait_for(lambda: answers(f"{found.dashboard}/api/version", token) or died(head, folder))
        yield found
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on, and that the system gives to nobody who asks for any:
    tests run beside each other.
    """
    ports: set[int] = set()
    while len(ports) < count:
        port = random.SystemRandom().randrange(20_000, 32_768)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            ports.add(port)
    return list(ports)


def died(head: subprocess.Popen[bytes], folder: str) -> bool:
    assert head.poll() is None, (Path(folder) / "head.log").read_text()
    return False


def answers(url: str, token: str) -> bool:
    try:
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
        return bool(urllib.request.urlopen(request, timeout=5).status == 200)
    except (OSError, urllib.error.URLError):
        return False


def wait_for(condition: Callable[[], bool], timeout_s: float = START_TIMEOUT_S) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


@pytest.fixture
def project(tmp_path, keys, monkeypatch) -> Path:
    """A folder as a user has it: job, model and rows by relative paths, and a checkpoint."""
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.move(keys["model_name_or_path"], folder / "model")
    # A step waits as for a GPU: the run lasts, and leaves the CPU to what is asked of it meanwhile.
    with_own_code(folder / "model", before="__import__('time').sleep(0.2)")
    shutil.move(keys["dataset"], folder / "rows.json")
    (folder / "saves").mkdir()
    (folder / "saves" / "model.safetensors").write_bytes(bytes(1000))
    changed = {"model_name_or_path": "model", "dataset": "rows.json", "output_dir": "saves/out"}
    changed |= {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1000, "bf16": False}
    changed |= {"ray_num_workers": 2, "use_cpu": True, "enable_qat": True}
    changed |= {"fake_quant_after_n_steps": 15, "loss_kernel": "torch", "trust_remote_code": True}
    (folder / "job.yaml").write_text(yaml.safe_dump({**keys, **changed}))
    return folder


def rows(out: Path) -> dict[int, float]:
    return losses(out) if (out / "metrics.jsonl").exists() else {}


@pytest.mark.slow  # three minutes: a Ray with a dashboard, and three jobs on it
def test_a_submitted_job_is_seen_and_stopped_with_a_checkpoint(cluster, project, tmp_path):
    """What a run exports, what status says of it, Ctrl-C with a checkpoint; exit codes of jobs
    that are stopped and that run to their end.
    """
    out = tmp_path / "out"
    command = ["submit", "job.yaml", f"output_dir={out}", "--address", cluster.dashboard]
    submitted = subprocess.Popen(
        [*RAYTRAIN_ADV, *command],
        **{"cwd": project, "env": cluster.environment, "text": True},
        stdout=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(lambda: len(rows(out)) > 20 or submitted.poll() is not None)
    assert submitted.poll() is None, submitted.communicate()[0]
    names = {f"ray_{name}" for name in EXPORTED} - {"ray_raytrain_adv_mfu_bf16"}  # none on a CPU
    wait_for(lambda: names <= cluster.exported().keys(), timeout_s=40)
    wait_for(lambda: cluster.exported()["ray_raytrain_adv_transform_on"].endswith(" 1.0"))
    figures = cluster.exported()["ray_raytrain_adv_transform_on"]
    assert 'transform="qat"' in figures and 'run="out"' in figures and 'rank="' in figures
    wait_for(lambda: f"/{STEPS}, loss " in cluster.message(), timeout_s=40)
    assert cluster.message().endswith(" left")
    wait_for(lambda: any(f"/{STEPS}  epoch" in text for text in cluster.workers_logs()), 40)
    hidden = ("Failed to load", "<enum '")
    assert not any(words in text for text in cluster.workers_logs() for words in hidden)
    seen = cluster.call("status", "out", cwd=tmp_path).stdout
    submitted.send_signal(signal.SIGINT)
    log = submitted.communicate(timeout=120)[0]
    assert submitted.returncode == 130, log
    assert re.search(rf"step +10/{STEPS}", log) and "The run was stopped" in log

    assert "out: running" in seen and f"/{STEPS}, loss" in seen
    assert "rank 0: alive" in seen and "rank 1: alive" in seen and "controller" in seen
    last = max(rows(out))
    manifest = next((out / "checkpoints").glob(f"*/step_{last:08d}/manifest.json"))
    assert json.loads(manifest.read_text())["progress"]["step"] == last
    assert json.loads((out / "report.json").read_text())["status"] == "stopped"

    listed = cluster.call("status", cwd=tmp_path).stdout
    assert re.search(rf"out +stopped .*{last}/{STEPS}", listed), listed
    short = ("max_steps=2", "fake_quant_after_n_steps=1", "ray_num_workers=1")
    done = cluster.call(*command[:2], f"output_dir={tmp_path / 'short'}", *short, cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "short" / "model" / "model.safetensors").exists()


@pytest.mark.slow  # a minute beside the others
def test_a_submitted_job_that_the_cluster_cannot_run_reports_it_with_its_exit_code(
    cluster, project, tmp_path
):
    changed = (f"output_dir={tmp_path / 'out'}", "ray_num_workers=64")
    refused = cluster.call("submit", "job.yaml", *changed, cwd=project)
    assert refused.returncode == 4 and "64 workers" in refused.stdout, refused.stdout


@pytest.mark.slow  # a minute beside the others
def test_a_submitted_sweep_tells_how_many_trials_have_ended_and_where_one_is(
    cluster, project, tmp_path
):
    job = yaml.safe_load((project / "job.yaml").read_text()) | {"ray_num_workers": 1}
    job |= {"max_steps": 300, "val_size": 4, "sweep": {"seed": [1, 2], "max_concurrent_trials": 1}}
    (project / "sweep.yaml").write_text(yaml.safe_dump(job))
    command = ["submit", "sweep.yaml", f"output_dir={tmp_path / 'out'}", "--address"]
    submitted = subprocess.Popen(
        [*RAYTRAIN_ADV, *command, cluster.dashboard], cwd=project, env=cluster.environment
    )
    told = r"0 of 2 trials ended; .+: step \d+ of 300, loss [\d.]+, "
    wait_for(lambda: submitted.poll() is not None or re.match(told, cluster.message()), 400)
    assert submitted.poll() is None
    submitted.send_signal(signal.SIGINT)
    submitted.communicate(timeout=120)
