"""Connecting to Ray, and counting its nodes, without starting Ray."""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import ray
import torch.distributed as dist
from ray._private import ray_constants, services
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._raylet import wait_for_persisted_port
from ray.train._internal import utils

from raytrain_adv.driver.cluster import nodes
from raytrain_adv.driver.cluster.connect import (
    AGENT_PORTS,
    connect,
    require_answer,
)
from raytrain_adv.driver.cluster.network import use_node_network
from raytrain_adv.driver.cluster.nodes import Node, startable_nodes
from raytrain_adv.errors import ClusterError, JobError, Stopped

CPU2 = {"CPU": 2.0}


def test_nodes_that_run_are_not_counted_again_among_those_an_autoscaler_may_start():
    """A job for twice the largest cluster would wait forever."""
    kinds = [Node("autoscaled big", CPU2, 3, "big"), Node("autoscaled one", CPU2, 1, "one")]
    alive = [Node("10.0.0.1", CPU2), Node("10.0.0.2", CPU2, group="one")]
    assert startable_nodes(kinds, alive) == kinds[:1]
    alive += [Node("10.0.0.3", CPU2, group="big")]
    assert [kind.count for kind in startable_nodes(kinds, alive)] == [2]


def test_a_cluster_that_does_not_answer_is_refused_at_once():
    """Ray itself would try for minutes; the quickest of three, as the machine may be busy."""
    assert min(seconds_until_refused() for _ in range(3)) < 5
    require_answer("local")
    require_answer("auto")


def seconds_until_refused():
    start = time.monotonic()
    with socket.socket() as bound:  # nothing listens on it, nor can start to
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        for one in (address, f"ray://{address}", "127.0.0.1:99999"):
            with pytest.raises(ClusterError, match="does not answer"):
                require_answer(one)
        bound.listen()  # a port is not what remains of a larger number
        with pytest.raises(ClusterError, match="is no port: at most 65535"):
            require_answer(f"127.0.0.1:{bound.getsockname()[1] + 2**16}")
    return time.monotonic() - start


@pytest.fixture
def ray_init(monkeypatch):
    """The arguments of ray.init, and the address at which Ray would listen."""
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


def test_a_ray_that_is_started_here_listens_on_loopback(ray_init, make_job):
    assert connect(make_job())
    assert ray_init["address"] == "local" and ray_init["node"] == "127.0.0.1"
    assert "dashboard_host" not in ray_init  # Ray's default is loopback, too
    assert ray_constants.ENABLE_RAY_CLUSTER  # as it was: a driver that joins a cluster needs it


def test_an_address_of_null_starts_a_ray_here_as_none_does(ray_init, make_job):
    """It joined any Ray of the machine, or started one that listened on every interface."""
    assert connect(make_job(ray_init_kwargs={"address": None}))
    assert ray_init["address"] == "local" and ray_init["node"] == "127.0.0.1"


def test_a_raylet_waits_for_no_agents_ports(ray_init, make_job, monkeypatch, tmp_path):
    """It aborts after 15 s, which its agents need for their imports on a busy machine."""
    started = []

    def start_raylet(redis_address, gcs_address, node_id, session_dir, **ports):
        started.append(ports)

    def init(**options):
        services.start_raylet("", "", "n1", session_dir=str(tmp_path), metrics_export_port=None)

    monkeypatch.setattr(services, "start_raylet", start_raylet)
    monkeypatch.setattr(ray, "init", init)
    assert connect(make_job())
    assert services.start_raylet is start_raylet  # as before
    (ports,) = started
    assert len(set(ports.values())) == 4 and all(ports.values())
    for option, name in AGENT_PORTS.items():
        assert wait_for_persisted_port(str(tmp_path), "n1", name, 1) == ports[option]


def test_a_ray_that_others_can_reach_needs_a_switch(ray_init, make_job, monkeypatch):
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", True)
    monkeypatch.setattr(services, "node_ip_address_from_perspective", lambda address: "10.0.0.1")
    monkeypatch.setenv(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, "1")
    connect(make_job(ray_init_kwargs={"dashboard_host": "0.0.0.0"}))
    assert ray_init["node"] == "10.0.0.1" and ray_init["dashboard_host"] == "0.0.0.0"
    monkeypatch.delenv(ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR)
    assert not connect(make_job(ray_init_kwargs={"address": "auto"}))
    assert ray_init["node"] == "10.0.0.1"


@pytest.mark.parametrize("starts", [True, False])
def test_the_token_that_ray_writes_is_readable_by_its_user_only(
    ray_init, make_job, monkeypatch, tmp_path, starts
):
    """Ray leaves it readable by everybody, also if it then fails to start."""
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


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (OSError("AF_UNIX path length cannot exceed 107 bytes"), "RAY_TMPDIR"),
        (PermissionError(13, "Permission denied", "/.ray"), "HOME"),
        (RuntimeError("Failed to write to temp file: /full/ray/s/port.tmp"), "with room"),
        (RuntimeError("Unknown keyword argument(s): nosuch"), "correct ray_init_kwargs"),
        (RuntimeError("the node timed out"), "overloaded"),
    ],
)
def test_a_ray_that_cannot_start_here_names_what_it_needs_and_no_cluster(
    ray_init, make_job, monkeypatch, error, fix
):
    """A long TMPDIR, or a HOME that is read-only, was answered with "check RAY_ADDRESS"."""

    def init(**options):
        raise error

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ClusterError, match="Ray cannot be started here") as raised:
        connect(make_job())
    assert fix in raised.value.fix and "RAY_ADDRESS" not in raised.value.fix


def test_a_job_submitted_with_a_secret_in_its_runtime_environment_is_refused(
    ray_init, make_job, monkeypatch
):
    env = {"env_vars": {"HF_TOKEN": "planted", "NCCL_DEBUG": "INFO"}}
    monkeypatch.setenv(RAY_JOB_CONFIG_JSON_ENV_VAR, json.dumps({"runtime_env": env}))
    with pytest.raises(JobError, match=r"runtime_env.env_vars.HF_TOKEN") as error:
        connect(make_job())
    assert "planted" not in str(error.value) and "Kubernetes" in error.value.fix
    assert "NCCL_DEBUG" not in str(error.value) and not ray_init


def test_waiting_for_room_ends_when_a_stop_is_requested(monkeypatch):
    """A Ctrl-C or `ray job stop` had no effect while no worker ran."""
    monkeypatch.setattr(nodes, "free_by_node", dict)
    monkeypatch.setattr(nodes, "scalable_nodes", lambda: [])
    placement = SimpleNamespace(bundle={"GPU": 1.0}, fewest=2, avoided=())
    lines, stops = [], iter([False, True])
    with pytest.raises(Stopped, match="stopped"):
        nodes.wait_for_room(placement, lines.append, poll_s=0.0, is_stopped=lambda: next(stops))
    assert lines[0].startswith("waiting for 2 GPU")


def test_a_process_group_listens_on_the_nodes_address_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch's store would listen on every interface, and asks nobody for a token; another process
    could take the port that Ray has chosen for it.
    """
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    rendezvous = importlib.import_module("torch.distributed.rendezvous")
    monkeypatch.setattr(rendezvous, "_create_c10d_store", None)
    monkeypatch.setattr(utils, "find_free_port", None)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    use_node_network()
    _, port = utils.get_address_and_port()
    with pytest.raises(OSError, match="in use"), socket.socket() as other:
        other.bind(("127.0.0.1", port))
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in group.items():
        monkeypatch.setenv(name, value)
    me = psutil.Process()
    before = set(me.net_connections("tcp"))
    dist.init_process_group("gloo", init_method="env://")
    try:
        opened = set(me.net_connections("tcp")) - before
        listening = [one.laddr for one in opened if one.status == psutil.CONN_LISTEN]
        assert port in [address.port for address in listening]
        assert {address.ip for address in listening} == {"127.0.0.1"}
    finally:
        dist.destroy_process_group()
        os.environ.pop("GLOO_SOCKET_IFNAME", None)
        os.environ.pop("NCCL_SOCKET_IFNAME", None)


ENDING = """
import atexit, time
def shutdown():
    print("closing", flush=True)
    time.sleep(2)
    print("closed", flush=True)
atexit.register(shutdown)
import ray, signal, sys
from raytrain_adv.driver.cluster import connect
ray.init = lambda **options: signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
connect.connect(None)
"""


TERMINATED = """
import faulthandler, ray, signal, sys
from raytrain_adv.driver.cluster import connect
def init(**options):
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(7))
    faulthandler.register(signal.SIGTERM, chain=True)
ray.init = init
connect.connect(None)
signal.raise_signal(signal.SIGTERM)
"""


def test_sigterm_prints_no_stack_and_starts_no_alarm():
    """Ray's handler in C++ aborted a sweep that took more than 3 s to end, with exit code -6."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    command = [sys.executable, "-c", TERMINATED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (7, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_ray_shuts_down_at_exit_ends_nothing(number):
    """Ray's handler would raise in the middle of it, and the end of a good run be a traceback."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with subprocess.Popen(
        [sys.executable, "-c", ENDING],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdout.readline() == "closing\n"
        process.send_signal(number)
        shown, errors = process.communicate(timeout=300)
    assert (process.returncode, shown, "Traceback" in errors) == (0, "closed\n", False), errors
