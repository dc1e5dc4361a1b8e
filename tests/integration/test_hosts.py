"""A Ray cluster of several hosts, each with its own address: gloo between them, a host that is cut
off in mid-run, and one that comes back.
"""

from __future__ import annotations

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

import pytest

from raytrain_adv.errors import EXIT_STOPPED
from raytrain_adv.report import record
from tests.conftest import ROOT
from tests.hosts import Host, Network, unavailable
from tests.workers import losses, run_workers

PORT = "6379"
SAVE_STEPS = 10
MORE_STEPS = 15
JOINED = "This command will now block"
"""What `ray start --block` says once the node has joined."""
WAIT_S = 300.0
# Ray's own are set for networks that are away for a minute (ray 2.60).
QUICK_TO_NOTICE = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1500",
    "RAY_health_check_failure_threshold": "5",
}


class Hosts:
    """A head without CPUs and two hosts with one each."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.network, self.folder = network, folder
        self.head, self.first, self.second = network.hosts
        self.environment = {
            **os.environ,
            **QUICK_TO_NOTICE,
            "RAY_ADDRESS": f"{self.head.address}:{PORT}",
            "PYTHONPATH": str(ROOT),
        }

    def start(self) -> None:
        """Start the cluster."""
        self.join(self.head, "--head", "--port", PORT, "--num-cpus", "0")
        for host in (self.first, self.second):
            self.join(host, "--address", self.environment["RAY_ADDRESS"], "--num-cpus", "1")

    def join(self, host: Host, *arguments: str) -> None:
        """Start Ray on a host; Ray gives up after 30 s, which a busy machine may take."""
        for _ in range(3):
            log = self.folder / f"{host.address}.log"
            command = [f"{Path(sys.executable).parent}/ray", "start", "--block", *arguments]
            command += ["--node-ip-address", host.address, "--include-log-monitor", "false"]
            command += ["--object-store-memory", "80000000"]
            command += ["--temp-dir", tempfile.mkdtemp(dir=self.folder)]
            with log.open("w") as said:
                options = {"env": self.environment, "stdout": said, "stderr": said}
                node = host.start(command, **options)
            wait_for(lambda: JOINED in log.read_text() or node.poll() is not None)  # noqa: B023 # called here
            if node.poll() is None:
                return
        raise AssertionError(log.read_text())

    def launch(self, job: Path, log: Path) -> subprocess.Popen[str]:
        """Start the driver on the head."""
        command = [sys.executable, "-m", "raytrain_adv.launch", str(job)]
        with log.open("w") as said:
            return self.head.start(
                command, env=self.environment, stdout=said, stderr=subprocess.STDOUT
            )


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if reason := unavailable():
        pytest.skip(f"several hosts were not run: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="rh", dir="/tmp"))  # Ray's sockets lie in it: short
    network = Network(3)
    try:
        cluster = Hosts(network, folder)
        cluster.start()
        yield cluster
    finally:
        network.close()
        shutil.rmtree(folder, ignore_errors=True)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.1)


def last_step(out: Path) -> int:
    return max(losses(out), default=0) if (out / "metrics.jsonl").exists() else 0


@pytest.mark.slow
def test_a_run_over_hosts_goes_on_without_one_that_is_cut_off_and_grows_when_it_is_back(
    hosts, job_file, tmp_path
):
    """Over gloo between two hosts; the loss is that of two workers throughout, no step is there
    twice, and no more steps are lost than lie between two checkpoints."""
    keys = {"use_cpu": True, "bf16": False, "lr_scheduler_type": "constant", "export_model": False}
    keys |= {"save_strategy": "steps", "save_steps": SAVE_STEPS, "save_total_limit": 2}
    elastic = {"ray_num_workers": [1, 2], "max_failures": 2, "max_steps": 100_000}
    out, log = tmp_path / "out", tmp_path / "log"
    driver = hosts.launch(job_file(**keys, **elastic), log)

    def wait(condition: Callable[[], bool]) -> None:
        wait_for(lambda: condition() or driver.poll() is not None)
        assert driver.poll() is None, log.read_text()

    wait(lambda: f"checkpoint of step {SAVE_STEPS} committed" in log.read_text())
    hosts.network.cut_off(hosts.second)
    wait(lambda: f"node {hosts.second.address} was lost" in log.read_text())
    reached = last_step(out)
    hosts.second.power_off()
    hosts.network.reconnect(hosts.second)
    hosts.join(hosts.second, "--address", hosts.environment["RAY_ADDRESS"], "--num-cpus", "1")
    wait(lambda: log.read_text().count("workers on nodes ") > 1)  # in the plural
    grown = last_step(out)
    wait(lambda: last_step(out) > grown + MORE_STEPS)
    os.kill(driver.pid, signal.SIGTERM)
    assert driver.wait(WAIT_S) == EXIT_STOPPED and "The run was stopped" in log.read_text()

    report = record.read(out)
    assert [start.workers for start in report.starts] == [2, 1, 2]
    lost, back = report.starts[1], report.starts[2]
    assert set(report.starts[0].nodes) == {hosts.first.address, hosts.second.address}
    assert lost.nodes == (hosts.first.address,) and lost.lost == (hosts.second.address,)
    assert SAVE_STEPS <= lost.step <= reached < lost.step + 2 * SAVE_STEPS  # one was being written
    assert back.step % SAVE_STEPS == 0 and set(back.nodes) == set(report.starts[0].nodes)
    assert "Starts of the workers" in (out / "report.html").read_text()

    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= back.step + MORE_STEPS
    alone = {"output_dir": str(tmp_path / "whole"), "max_steps": len(steps)}
    run_workers(2, job_file("whole.yaml", **{**keys, **alone, "save_strategy": "no"}))
    undisturbed = losses(tmp_path / "whole")
    assert losses(out) == pytest.approx(undisturbed, rel=1e-4)
