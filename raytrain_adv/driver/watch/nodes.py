"""Report nodes that are lost or that join, and end a run whose head node is lost.

Ray itself ends the driver's process 60 s after the head's loss, with exit code 1 and no report (ray
2.60, rpc_client.h), and its calls block signals until then.
"""

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import psutil
import ray
from ray.exceptions import RayError

from raytrain_adv.driver.cluster.nodes import Node, Placement, alive_nodes
from raytrain_adv.errors import ClusterError, HeadLost, RaytrainAdvError
from raytrain_adv.redaction import hide_environment
from raytrain_adv.text import plural

JOIN_S = 3.0


@contextlib.contextmanager
def poll(name: str, check: Callable[[], None], every_s: float) -> Iterator[None]:
    """Call `check`, which must not raise, on a thread every few seconds while the block runs."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(every_s):
            check()

    thread = threading.Thread(target=repeat, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=JOIN_S)


EVERY_S, START_EVERY_S = 2.0, 0.2
FATAL = re.compile(
    r"\b[EFC] \d|[Ff]atal|Check failed|[Ee]rror|terminate called|[Cc]annot|[Ff]ailed"
)
"""What the line has by which a process of Ray explains its end (2.60)."""
STATE_DUMP = "[state-dump]"  # counts of a raylet, of which some are of what failed
_BOILERPLATE = re.compile(r"An unexpected system state.*?fix it\. ")
MOST_READ, MOST_QUOTED = 200, 400  # lines of a log, and characters of one
STARTED = ("gcs_server", "raylet")  # names of Ray's processes, without which it cannot start (2.60)
ENDED_BY_RAY = ClusterError(
    "Ray cannot be started here: this process was ended while it started",
    "a process of Ray ended before it, which ends this one too, or it was killed itself",
    "run the job again; Ray's logs are in session_latest/logs of Ray's folder, /tmp/ray by default",
)
LOST_AFTER_S = 45.0
"""Seconds without an answer after which the run ends. If the head returns earlier and its state is
stored outside it (Ray's GCS fault tolerance), the run continues."""
TIMEOUT_S = 3.0


class HeadWatch:
    """Checks on a thread of the driver that the head's GCS at host:port can be reached. If not,
    `record` records how the run ended, without calling Ray, and the process ends.
    """

    def __init__(self, address: str, record: Callable[[BaseException], None]) -> None:
        self._address = address
        self._record = record
        self._is_watching = False
        self._last_answer = 0.0

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while the block runs.

        Not in a sweep's trials, which run outside the main thread: the sweep's own driver watches.
        Nor if the head cannot be reached from here at the start, such as behind a ray:// address.
        """
        is_main = threading.current_thread() is threading.main_thread()
        if not is_main or not self._answers():
            yield
            return
        self._is_watching, self._last_answer = True, time.monotonic()
        with poll("head watch", self._check, EVERY_S):
            yield

    def wait(self) -> None:
        """Return when the head can be reached; the watch may end the process before that."""
        while self._is_watching and not self._answers():
            time.sleep(EVERY_S)

    def _check(self) -> None:
        if self._answers():
            self._last_answer = time.monotonic()
        elif time.monotonic() - self._last_answer >= LOST_AFTER_S:
            self._end()

    def _answers(self) -> bool:
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=TIMEOUT_S).close()
        except OSError:
            return False
        return True

    def _end(self) -> None:
        error = HeadLost(
            "Ray's head node is gone",
            f"no answer at {self._address} for {LOST_AFTER_S:g} s; Ray then ends every worker",
            "start the cluster again, and run the job again with resume_from_checkpoint: true",
        )
        _end_process(error, self._record)


def _end_process(error: RaytrainAdvError, record: Callable[[BaseException], None]) -> None:
    try:
        record(error)
    finally:
        print(f"\n{hide_environment(str(error))}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.exit_code)


def _has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextlib.contextmanager
def watching_start(record: Callable[[BaseException], None]) -> Iterator[threading.Event]:
    """Watch Ray's own processes while the block starts Ray here, and runs on it once the yielded
    event is set: if one ends, `record` records how the launch ended, without calling Ray, and the
    process ends. Ray would end it with exit code 1 and no message (2.60).
    """
    has_started = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield has_started
        return
    epitaph = Epitaph(ENDED_BY_RAY)
    earlier = set(psutil.Process().children())
    known: dict[psutil.Process, str] = {}
    logs = ""

    def check() -> None:
        nonlocal logs
        if has_started.is_set():
            epitaph.drop()
        children = set[psutil.Process]()
        with contextlib.suppress(psutil.Error):  # one ends while it is looked at
            children = set(psutil.Process().children())
        for child in children - earlier:
            with contextlib.suppress(psutil.Error):
                if child.name() in STARTED and child not in known:
                    known[child] = child.name()
                    logs = _log_folder(child.cmdline()) or logs
        for child, name in known.items():
            if _has_ended(child):
                epitaph.drop()
                ended = _ended_later if has_started.is_set() else _ended_at_start
                _end_process(ended(name, child.pid, logs), record)

    try:
        with poll("start watch", check, START_EVERY_S):
            yield has_started
    finally:
        epitaph.drop()


class Epitaph:
    """Has a shell print an error if this process ends before `drop`: by itself it may be unable to.
    Ray's core worker ends it from C++, sooner than any watch looks, if the raylet does not answer.
    """

    def __init__(self, error: RaytrainAdvError) -> None:
        script = 'read -r word || printf "\\n%s\\n" "$0" >&2'
        command = ["/bin/sh", "-c", script, str(error)]
        self._shell = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        self._lock = threading.Lock()

    def drop(self) -> None:
        """Print nothing any more."""
        with self._lock, contextlib.suppress(OSError):  # someone killed the shell
            if self._shell.returncode is None:
                self._shell.communicate(b"dropped\n")


def _log_folder(command: Sequence[str]) -> str:
    """Return the folder of Ray's logs from the command line of one of its processes (2.60)."""
    for part, after in zip(command, [*command[1:], ""], strict=False):  # a zombie has no command
        key, _, value = part.lstrip("-").partition("=")
        key = key.replace("-", "_")
        if key == "log_dir":
            return value or after
        if key == "session_dir":
            return f"{value or after}/logs"
    return ""


def _ended_at_start(name: str, pid: int, logs: str) -> ClusterError:
    """Return why one of Ray's processes ended while Ray started, with its last message."""
    folder = logs or "session_latest/logs of Ray's folder, /tmp/ray by default"
    cause = last_words(Path(logs), name) if logs else ""
    found = f"{name}, process {pid}, {cause or 'without a word in its log'}"
    overloaded = "the machine may be overloaded: try again" if "imed out" in cause else ""
    fix = f"{overloaded or 'correct what it names'}; Ray's logs are in {folder}"
    if not cause:
        fix = f"the kernel may have ended it for memory (dmesg); Ray's logs are in {folder}"
    return ClusterError("Ray cannot be started here: one of its processes ended", found, fix)


def _ended_later(name: str, pid: int, logs: str) -> HeadLost:
    """Return that one of Ray's processes ended during a run, with its last message."""
    cause = last_words(Path(logs), name) if logs else ""
    return HeadLost(
        "Ray on this machine is gone: one of its processes ended",
        f"{name}, process {pid}, {cause or 'without a word: it was killed, perhaps for memory'}",
        "run the job again with resume_from_checkpoint: true",
    )


def last_words(logs: Path, name: str) -> str:
    """Return the last message of a Ray process about its end, from its logs; empty without one."""
    for kind in ("err", "out"):
        with contextlib.suppress(OSError):
            with (logs / f"{name}.{kind}").open(encoding="utf-8", errors="replace") as file:
                lines = [line.strip() for line in deque(file, MOST_READ)]
            found = [one for one in lines if FATAL.search(one) and STATE_DUMP not in one]
            if found:
                words = found[-1].partition(") ")[2] or found[-1]
                return f"wrote into {name}.{kind}: {_BOILERPLATE.sub('', words)[:MOST_QUOTED]}"
    return ""


def head_address() -> str:
    """Return host:port of the GCS that this process has joined."""
    return str(ray.get_runtime_context().gcs_address)


class NodeWatch:
    """Reports on a thread of the driver nodes that are lost or that join; Ray does not."""

    def __init__(
        self, placement: Placement, nodes: Mapping[str, Node], say: Callable[[str], None]
    ) -> None:
        self._placement = placement
        self._say = say
        self._known = nodes

    def watching(self) -> AbstractContextManager[None]:
        """Report changes while the block runs."""
        return poll("node watch", self._check, EVERY_S / 2)

    def _check(self) -> None:
        # If the head does not answer, HeadWatch ends the run.
        with contextlib.suppress(RayError):
            self.compare(usable_nodes(self._placement))

    def compare(self, now: Mapping[str, Node]) -> None:
        """Report how these nodes, by their ids, differ from those of the last call."""
        room = sum(node.num_fitting(self._placement.bundle) for node in now.values())
        workers = plural(room, "worker")
        if room < self._placement.fewest:
            workers += f", the run waits for {self._placement.fewest}"
        for key in (key for key in self._known if key not in now):
            address = self._known[key].address
            self._say(f"node {address} was lost; the remaining nodes fit {workers}")
        for key in (key for key in now if key not in self._known):
            self._say(f"node {now[key].address} has joined; there is room for {workers}")
        self._known = now


def usable_nodes(placement: Placement) -> dict[str, Node]:
    """Return id -> node for each alive node where workers may run."""
    return {
        node.node_id: node
        for node in alive_nodes()
        if node.num_fitting(placement.bundle) and node.node_id not in placement.avoided
    }
