"""One Ray for the tests that do not stop theirs, and the command on it in the tests' own process:
Ray, and a process that imports what a driver imports, take longer to start than most jobs to train.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

from raytrain_adv import launch as command
from raytrain_adv.driver.cluster import connect

Launch = Callable[..., subprocess.CompletedProcess[str]]
# As on a Ray that the driver starts itself; without the process that only a dashboard asks.
SETTINGS = {
    **connect.RAY_SETTINGS,
    **connect.LOCAL_SETTINGS,
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
}


@pytest.fixture(scope="session")
def two_cpus() -> Iterator[str]:
    """Start a Ray of two CPUs, without a dashboard; return its address."""
    folder = Path(tempfile.mkdtemp(prefix="rt", dir="/tmp"))  # sockets' paths must be short
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**SETTINGS, "RAY_TMPDIR": str(folder)}.items():
            patch.setenv(name, value)
        node = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}
        )
    yield node.address
    node.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def joined(two_cpus: str) -> Iterator[None]:
    """Make this process a driver on that Ray for as long as a file's tests run."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        ray.init(address=two_cpus, logging_level="ERROR", log_to_driver=False)
        patch.setattr(connect, "started", {ray._private.worker._global_node})
        yield
        ray.shutdown()


@pytest.fixture
def launch(joined: None, capsys: pytest.CaptureFixture[str]) -> Launch:
    """Run `python -m raytrain_adv.launch` on that Ray, in this process; return what a process of
    its own would leave.
    """

    def run(job: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        handler = signal.getsignal(signal.SIGINT)
        try:
            code = command.main([os.fspath(job), *overrides])
        finally:
            signal.signal(signal.SIGINT, handler)  # Ray Train puts its own in the place
        said = capsys.readouterr()
        return subprocess.CompletedProcess([os.fspath(job)], code, said.out, said.err)

    return run
