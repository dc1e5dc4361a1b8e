"""Connect to Ray: join a cluster or start Ray on this machine, with the settings a run needs."""

import atexit
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants, services
from ray._private.authentication.authentication_utils import is_token_auth_enabled
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._raylet import (  # type: ignore[attr-defined] # its stub lacks them
    DASHBOARD_AGENT_LISTEN_PORT_NAME,
    METRICS_AGENT_PORT_NAME,
    METRICS_EXPORT_PORT_NAME,
    RUNTIME_ENV_AGENT_PORT_NAME,
    persist_port,
)

from raytrain_adv.config.job import CPU_WORKERS, JobConfig
from raytrain_adv.errors import ClusterError
from raytrain_adv.imports import interrupt_later
from raytrain_adv.redaction import refuse_submitted
from raytrain_adv.text import of_error

# Each is set only if the user has not set it (ray 2.60).
RAY_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # detects a worker's death in 0.5 s, not 2 s
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # every print appears twice otherwise
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # ray_worker changes to the driver's folder
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",  # without it the dashboard does not list the run
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning about the coming default
    "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0",  # Ray Train's own value for its controller
    # A raylet warns at four times as many processes. A sweep exceeds that on a machine with few
    # cores: its trials' drivers and controllers reserve no CPU and wait most of the time.
    "RAY_worker_maximum_startup_concurrency": str(max(os.cpu_count() or 1, 16)),
}
# For a Ray that the driver starts.
LOCAL_SETTINGS = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # its one node is never preempted
    "RAY_preload_python_modules": "raytrain_adv.driver.cluster.preload",
}
PRELOADED = ("raytrain_adv", "ray", "torch", "transformers")
NUM_OTHERS = 4  # processes that wait besides those for workers: Ray Train's, and one to spare
# For a run whose number of workers may change: the nodes were free when the number was chosen.
ELASTIC_SETTINGS = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"}
# Arguments of start_raylet -> what Ray calls the port in the name of its file.
AGENT_PORTS = {
    "metrics_agent_port": METRICS_AGENT_PORT_NAME,
    "metrics_export_port": METRICS_EXPORT_PORT_NAME,
    "dashboard_agent_listen_port": DASHBOARD_AGENT_LISTEN_PORT_NAME,
    "runtime_env_agent_port": RUNTIME_ENV_AGENT_PORT_NAME,
}
FIX = "check RAY_ADDRESS and ray_init_kwargs; remove both to start Ray on this machine"
FOLDERS = (
    "Ray needs a folder whose path has at most 39 characters (RAY_TMPDIR, else TMPDIR, else /tmp), "
    "and ~/.ray for its token: have RAY_TMPDIR and HOME name folders with room, where this user "
    "can write"
)
CONNECT_TIMEOUT_S = 5.0
started = set[Any]()  # the node of each Ray that this process started


def connect(job: JobConfig | None) -> bool:
    """Join the cluster that ray_init_kwargs or RAY_ADDRESS names, or start one; return whether one
    was started. Raises ClusterError, and JobError if a submitted runtime environment has a secret.
    """
    refuse_submitted(os.environ.get(RAY_JOB_CONFIG_JSON_ENV_VAR))
    options: dict[str, Any] = {
        "logging_level": "ERROR",
        "log_to_driver": False,
        **((job.ray.ray_init_kwargs if job is not None else None) or {}),
    }
    # Without an address ray.init would join any cluster that happens to run on this machine.
    address = options.get("address") or os.environ.get("RAY_ADDRESS") or "local"
    options["address"] = address
    for name, value in _settings(options, job).items():
        os.environ.setdefault(name, value)
    if ray.is_initialized():
        return is_own()
    require_answer(str(address))
    token = Path.home() / ".ray" / "auth_token"
    had_token = token.exists()
    try:
        with (
            _on_loopback(address == "local"),
            _agents_at_ports(address == "local"),
            _in_own_process_group(_num_waiting(job)),
        ):
            ray.init(**options)
    except Exception as error:  # Ray raises plain Exceptions too, as when a node is slow (2.60)
        raise _cannot_connect(str(address), error) from error
    finally:
        if not had_token and token.exists():
            token.chmod(0o600)  # Ray has just written it, readable by everybody (ray 2.60)
    _handle_sigterm_in_python()
    atexit.register(_ignore_signals)
    if address == "local":
        started.add(ray._private.worker._global_node)
    return bool(address == "local")


def is_own() -> bool:
    """Return whether this process started the Ray that it is connected to."""
    node = ray._private.worker._global_node
    return node is not None and node in started


def _handle_sigterm_in_python() -> None:
    """Give SIGTERM to its handler in Python alone. Ray's core puts one of its own before it, which
    prints a stack and aborts the process 3 s later (ray 2.60: absl's failure handler, its alarm).
    """
    handler = signal.getsignal(signal.SIGTERM)
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _ignore_signals() -> None:
    """Let Ray's own shutdown at exit, which comes after this, end in peace: all is done, and a
    signal would show as a traceback in the middle of it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _cannot_connect(address: str, error: Exception) -> ClusterError:
    found = of_error(error)
    if address != "local":
        fix = f"{FIX}; if the cluster requires a token, set RAY_AUTH_MODE=token"
        return ClusterError("The Ray cluster cannot be joined", f"address: {address}; {found}", fix)
    fix = "correct ray_init_kwargs, or the RAY_ variables of the environment"
    if isinstance(error, OSError) or "Failed to write" in found:
        fix = FOLDERS
    elif "timed out" in str(error):
        fix = "the machine may be overloaded: try again"
    return ClusterError("Ray cannot be started here", found, fix)


@contextmanager
def _on_loopback(is_local: bool) -> Iterator[None]:
    """Make a Ray that is started here listen on 127.0.0.1 only, unless the user set Ray's switch.

    Ray would listen on every interface, for nodes that might join. Its own switch is meant for
    other systems, and is read when ray is imported (ray 2.60, services.py). Remove when ray.init
    has an option for it.
    """
    before, switch = ray_constants.ENABLE_RAY_CLUSTER, ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    if not is_local or switch in os.environ:
        return (yield)
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[switch] = "0"  # for Ray's own processes, such as the dashboard
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        del os.environ[switch]


@contextmanager
def _agents_at_ports(is_local: bool) -> Iterator[None]:
    """Give the agents of a Ray that starts their ports, which they would choose and write to files.

    A raylet waits 15 s for these files and then aborts; on a machine that is busy the agents take
    longer to import what they need. No setting raises that (ray 2.60, node_manager.cc:
    WaitForDashboardAgentPorts). Remove when agent_register_timeout_ms counts there.
    """
    if not is_local:
        return (yield)
    start = services.start_raylet

    def start_with_ports(*args: Any, **options: Any) -> Any:
        given = signature(start).bind(*args, **options)
        place = given.arguments["session_dir"], given.arguments["node_id"]
        with ExitStack() as taken:
            for option, name in AGENT_PORTS.items():
                if not options.get(option):
                    free = taken.enter_context(socket.create_server(("127.0.0.1", 0)))
                    options[option] = free.getsockname()[1]
                persist_port(*place, name, options[option])
        return start(*args, **options)

    services.start_raylet = start_with_ports
    try:
        yield
    finally:
        services.start_raylet = start


@contextmanager
def _in_own_process_group(num_waiting: int) -> Iterator[None]:
    """Start Ray's processes in another process group than the driver's.

    A SIGTERM to the driver's group, as `timeout` and batch systems send it, would end them while
    the driver waits for the last checkpoint; Ray protects them from SIGINT only (ray 2.60,
    services.py). The kernel still ends them with the driver. Remove when Ray does this.

    Ray would start one for each core that waits for work, and imports what workers do (preload.py),
    which is 0.3 GiB each: `num_waiting` are enough.
    """
    original = services.ConsolePopen

    class Grouped(original):  # type: ignore[misc, valid-type] # ray is Any to mypy
        def __init__(self, command: Sequence[str], **options: Any) -> None:
            # Ray forks by preexec_fn. Python would drop an exception in its hooks around the fork,
            # and logging's would keep its lock: a thread that imports would wait for it forever.
            with interrupt_later():
                fewer = [_fewer(one, num_waiting) for one in command]
                super().__init__(fewer, process_group=0, **options)

    services.ConsolePopen = Grouped
    try:
        yield
    finally:
        services.ConsolePopen = original


def _fewer(argument: str, num_waiting: int) -> str:
    name, _, number = argument.partition("=")
    if name != "--num_prestart_python_workers":
        return argument
    return f"{name}={min(int(number), num_waiting)}"


def _num_waiting(job: JobConfig | None) -> int:
    """Return how many processes of a Ray that starts here should wait for work."""
    workers = job.ray.ray_num_workers if job is not None else 0
    if workers == "auto":
        workers = len([*Path("/dev").glob("nvidia[0-9]*")]) or CPU_WORKERS
    return NUM_OTHERS + (workers if isinstance(workers, int) else max(workers))


def _settings(options: Mapping[str, Any], job: JobConfig | None) -> dict[str, str]:
    """Return the environment variables that Ray's processes inherit, of ray.init's arguments."""
    is_local = options["address"] == "local"
    settings = RAY_SETTINGS | (LOCAL_SETTINGS if is_local else {})
    # What waits is taken only by a process without environment variables (OwnNodePolicy). Each that
    # starts later would import all that too, also those of Ray that need none of it.
    is_taken = job is not None and not (job.sweep or job.ray.ends or options.get("runtime_env"))
    if is_local and not (is_taken and not any(map(_is_shadowed, PRELOADED))):
        del settings["RAY_preload_python_modules"]
    if is_local and options.get("include_dashboard") is False:
        del settings["RAY_TRAIN_ENABLE_STATE_TRACKING"]  # only the dashboard reads it
    if job is not None:
        settings["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(job.parallel.ddp_timeout)
        settings |= ELASTIC_SETTINGS if job.ray.ends else {}
    return settings


def _is_shadowed(package: str) -> bool:
    """Return whether the driver has a package of its folder, that of `python -m` or of its script.

    A process that waits has no such folder on its path: Ray adds it with the job, after preload.py
    has imported the installed package of that name.
    """
    folders = {"", os.getcwd(), os.path.dirname(os.path.realpath(sys.argv[0]))}
    path = sys.path.copy()
    if (first := next((entry for entry in path if entry in folders), None)) is not None:
        path.remove(first)
    specs = [
        next(filter(None, (finder.find_spec(package, of) for finder in sys.meta_path)), None)
        for of in (sys.path, path)
    ]
    here, there = (spec and spec.origin for spec in specs)
    return here != there


def require_answer(address: str) -> None:
    """Raise ClusterError unless something listens at host:port or ray://host:port; Ray itself would
    try for minutes. Other forms of an address, such as local and auto, are not checked.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        if int(port) >= 2**16:  # glibc takes the rest of a division by it
            raise OSError(f"{port} is no port: at most {2**16 - 1}")
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        what, found = "The Ray cluster does not answer", f"address: {address}; {error}"
        raise ClusterError(what, found, f"check that the head node runs; {FIX}") from error


def describe_dashboard() -> str:
    """Return the address of the cluster's dashboard, and whether it requires a token."""
    url = ray._private.worker.get_dashboard_url()  # ray.init returns it only if it started Ray
    if not url:
        logs = ray._private.worker._global_node.get_logs_dir_path()
        return f"none (Ray was started without one, or it did not start: {logs}/dashboard.log)"
    # Ray 2.60 enables this when it starts with RAY_AUTH_MODE unset.
    token = " (asks for the token that `ray get-auth-token` prints)"
    return f"http://{url}{token if is_token_auth_enabled() else ''}"
