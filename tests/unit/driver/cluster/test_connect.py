"""What a cluster can hold, as values: no Ray is started."""

import json
import os
import socket
import time
from types import SimpleNamespace

import pytest
import ray
from ray._private import ray_constants, services
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from raytrain_adv.driver.cluster import waiting
from raytrain_adv.driver.cluster.connect import Node, connect, require_answer, still_to_start
from raytrain_adv.errors import ClusterError, JobError, Stopped

CPU2 = {"CPU": 2.0}


def test_nodes_that_run_are_not_counted_again_among_those_an_autoscaler_may_start():
    """A job for twice the largest cluster would wait for ever."""
    kinds = [Node("autoscaled big", CPU2, 3, "big"), Node("autoscaled one", CPU2, 1, "one")]
    alive = [Node("10.0.0.1", CPU2), Node("10.0.0.2", CPU2, group="one")]
    assert still_to_start(kinds, alive) == kinds[:1]
    alive += [Node("10.0.0.3", CPU2, group="big")]
    assert [kind.count for kind in still_to_start(kinds, alive)] == [2]


def test_a_cluster_that_does_not_answer_is_said_at_once():
    """Ray itself would try for minutes."""
    start = time.monotonic()
    with socket.socket() as held:  # nobody listens on it, nor can begin to
        held.bind(("127.0.0.1", 0))
        nobodys = f"127.0.0.1:{held.getsockname()[1]}"
        for address in (nobodys, f"ray://{nobodys}", "127.0.0.1:99999"):
            with pytest.raises(ClusterError, match="does not answer"):
                require_answer(address)
    assert time.monotonic() - start < 5
    require_answer("local")
    require_answer("auto")


@pytest.fixture
def asked_of_ray(monkeypatch):
    """What ray.init is given, and the address at which a Ray started then listens."""
    found: dict[str, object] = {}

    def init(**options):
        found.update(options, node=services.get_node_ip_address())

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    for name in ("RAY_ADDRESS", ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)  # connect adds to it, for Ray's processes
    yield found
    os.environ.clear()
    os.environ.update(before)


def test_a_ray_that_is_started_here_listens_on_loopback(asked_of_ray, make_job):
    assert connect(make_job())
    assert asked_of_ray["address"] == "local" and asked_of_ray["node"] == "127.0.0.1"
    assert "dashboard_host" not in asked_of_ray  # Ray's default is loopback, too
    assert ray_constants.ENABLE_RAY_CLUSTER  # as it was: a driver that joins a cluster needs it


def test_a_ray_for_others_is_asked_for_by_name(asked_of_ray, make_job, monkeypatch):
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    monkeypatch.setattr(services, "node_ip_address_from_perspective", lambda address: "10.0.0.1")
    monkeypatch.setenv(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "1")
    connect(make_job(ray_init_kwargs={"dashboard_host": "0.0.0.0"}))
    assert asked_of_ray["node"] == "10.0.0.1" and asked_of_ray["dashboard_host"] == "0.0.0.0"
    monkeypatch.delenv(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR)
    assert not connect(make_job(ray_init_kwargs={"address": "auto"}))
    assert asked_of_ray["node"] == "10.0.0.1"


@pytest.mark.parametrize("starts", [True, False])
def test_the_token_that_ray_makes_is_its_users_alone(
    asked_of_ray, make_job, monkeypatch, tmp_path, starts
):
    """Ray leaves it for everybody to read, also where it does not start after that."""
    token = tmp_path / ".ray" / "auth_token"

    def init(**options):
        token.parent.mkdir()
        token.write_text("secret")
        token.chmod(0o644)
        if not starts:
            raise RuntimeError("the node timed out")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("HOME", str(tmp_path))
    if starts:
        connect(make_job())
    else:
        with pytest.raises(ClusterError, match="Ray cannot be started here"):
            connect(make_job())
    assert token.stat().st_mode & 0o777 == 0o600


def test_a_job_submitted_with_a_secret_in_its_runtime_environment_is_refused(
    asked_of_ray, make_job, monkeypatch
):
    env = {"env_vars": {"HF_TOKEN": "planted", "NCCL_DEBUG": "INFO"}}
    monkeypatch.setenv(RAY_JOB_CONFIG_JSON_ENV_VAR, json.dumps({"runtime_env": env}))
    with pytest.raises(JobError, match=r"runtime_env.env_vars.HF_TOKEN") as error:
        connect(make_job())
    assert "planted" not in str(error.value) and "Kubernetes" in error.value.fix
    assert "NCCL_DEBUG" not in str(error.value) and not asked_of_ray


def test_waiting_for_room_ends_when_the_run_is_told_to_stop(monkeypatch):
    """One Ctrl-C, or `ray job stop`, was not heard while no worker ran."""
    monkeypatch.setattr(waiting, "free", lambda placement: {})
    monkeypatch.setattr(waiting, "scalable_nodes", lambda: [])
    placement = SimpleNamespace(bundle={"GPU": 1.0}, fewest=2)
    said, asked = [], iter([False, True])
    with pytest.raises(Stopped, match="stopped"):
        waiting.wait_for_room(placement, said.append, poll_s=0.0, given_up=lambda: next(asked))
    assert said[0].startswith("waiting for 2 GPU")
