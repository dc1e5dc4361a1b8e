"""A submitted job and its user's Ctrl-C: stopped, left running, or said to be out of reach."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from ray.job_submission import JobStatus

from raytrain_adv.driver.commands import submit
from raytrain_adv.errors import ClusterError


class Cluster:
    """A dashboard whose job prints a line and runs until it is stopped."""

    def __init__(self, **failing: Exception) -> None:
        self.failing, self.called, self.stopped = failing, [], False

    def _call(self, name: str) -> None:
        self.called.append(name)
        if name in self.failing:
            raise self.failing[name]

    def submit_job(self, **request: object) -> None:
        self._call("submit_job")
        if "while submitting" in request:
            os.kill(os.getpid(), signal.SIGINT)

    def stop_job(self, name: str) -> None:
        self._call("stop_job")
        self.stopped = True

    async def tail_job_logs(self, name: str):
        yield "training\n"
        if not self.stopped:
            os.kill(os.getpid(), signal.SIGINT)
        yield "training\n"

    def get_job_status(self, name: str) -> JobStatus:
        return JobStatus.STOPPED if self.stopped else JobStatus.RUNNING

    def get_job_info(self, name: str) -> SimpleNamespace:
        self._call("get_job_info")
        return SimpleNamespace(status=self.get_job_status(name), driver_exit_code=None)


@pytest.mark.parametrize("request_", [{}, {"while submitting": True}])
def test_ctrl_c_stops_the_job(request_, capsys):
    cluster = Cluster()
    assert submit.follow(cluster, "job", request_) == submit.EXIT_STOPPED
    assert cluster.called == ["submit_job", "stop_job", "get_job_info"]
    assert "the job was stopped" in capsys.readouterr().out


def test_ctrl_c_stops_the_job_where_a_shell_ignores_it():
    """`submit &` in a script: the shell starts it with SIGINT ignored."""
    code = "from tests.unit.driver.commands.test_submit_follow import *; import sys\n"
    code += "sys.exit(submit.follow(Cluster(), 'job', {}))"
    script = f'{sys.executable} -c "$CODE" & wait $!'
    done = subprocess.run(
        ["sh", "-c", script],
        env={**os.environ, "CODE": code},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == submit.EXIT_STOPPED, done.stderr
    assert "the job was stopped" in done.stdout


@pytest.mark.parametrize("call", ["submit_job", "stop_job", "get_job_info"])
@pytest.mark.parametrize("error", [RuntimeError("status code 500"), ConnectionError("no route")])
def test_a_dashboard_that_does_not_answer_is_an_error_with_a_way_out(call, error):
    with pytest.raises(ClusterError) as raised:
        submit.follow(Cluster(**{call: error}), "job", {})
    assert str(error) in raised.value.found
    assert raised.value.fix


def test_the_signal_handler_is_put_back():
    before = signal.getsignal(signal.SIGINT)
    submit.follow(Cluster(), "job", {})
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_that_was_stopped_on_the_cluster_did_not_fail(capsys):
    """Its driver ends with a code of its own; Ray calls every code but 0 a failure."""
    cluster = Cluster()
    cluster.stopped = True
    ended = SimpleNamespace(status=JobStatus.FAILED, driver_exit_code=130, message="exit code 130")
    cluster.get_job_info = lambda name: ended
    assert submit.follow(cluster, "job", {}) == submit.EXIT_STOPPED
    assert "failed" not in capsys.readouterr().out
