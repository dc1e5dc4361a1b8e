"""What happens where Ray's head can no longer be reached: with sockets, without Ray."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import pytest

from raytrain_adv.driver.watch import nodes as head_watch
from raytrain_adv.driver.watch.nodes import HeadWatch
from raytrain_adv.errors import ClusterError

DRIVER = """
import pathlib, socket, sys, time
from raytrain_adv.driver.watch import nodes as head_watch
head_watch.LOST_AFTER_S = head_watch.EVERY_S = 0.05
head = socket.create_server(("127.0.0.1", 0))
address = f"127.0.0.1:{head.getsockname()[1]}"
told = pathlib.Path(sys.argv[1])
watch = head_watch.HeadWatch(address, lambda error: told.write_text(error.what))
with watch.watching():
    head.close()
    time.sleep(60)
"""


@contextlib.contextmanager
def listening():
    with socket.create_server(("127.0.0.1", 0)) as head:
        yield head, f"127.0.0.1:{head.getsockname()[1]}"


@pytest.fixture
def ended(monkeypatch):
    """The exit codes that the process would have ended with."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(head_watch, "EVERY_S", 0.02)
    monkeypatch.setattr(head_watch, "LOST_AFTER_S", 0.1)
    return codes


def test_a_run_whose_head_is_gone_is_written_down_and_ends_with_its_exit_code(tmp_path):
    told = tmp_path / "told"
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, told], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 3, done.stderr
    assert told.read_text() == "Ray's head node is gone"
    assert "no answer at 127.0.0.1" in done.stderr and "fix:" in done.stderr


def test_a_head_that_is_there_or_never_was_is_left_alone(ended):
    with listening() as (_, address):
        watch = HeadWatch(address, pytest.fail)
        with watch.watching():
            watch.wait()
            time.sleep(0.4)
    with socket.socket() as bound:  # nothing listens on it, nor can start to
        bound.bind(("127.0.0.1", 0))
        never = HeadWatch(f"127.0.0.1:{bound.getsockname()[1]}", pytest.fail)
        with never.watching():
            never.wait()
            time.sleep(0.4)
    assert ended == []


@pytest.fixture
def noticed(monkeypatch):
    """Is set once the watch knows a process of Ray, and has read where its logs are."""
    event = threading.Event()
    monkeypatch.setattr(head_watch, "_log_folder", lambda command: event.set() or "")
    return event


def test_a_report_that_cannot_be_written_does_not_keep_the_process(ended, capsys):
    def leave(error):
        raise OSError("disk full")

    with contextlib.suppress(OSError):
        HeadWatch("127.0.0.1:1", leave)._end()
    assert ended == [3] and "Ray's head node is gone" in capsys.readouterr().err


@pytest.mark.parametrize("name", head_watch.STARTED)
def test_a_process_of_ray_that_ends_while_ray_starts_ends_the_launch(
    name, tmp_path, monkeypatch, capfd, noticed
):
    """Ray itself would end the driver after a minute, with exit code 1 and no report.

    A Ray that this process started earlier, such as in another test, is not the one watched.
    """
    codes, recorded = [], []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(head_watch, "START_EVERY_S", 0.02)
    program = shutil.copy(shutil.which("sleep"), tmp_path / name)
    with subprocess.Popen([program, "60"]) as earlier:
        with head_watch.watching_start(recorded.append), subprocess.Popen([program, "60"]) as child:
            assert noticed.wait(120) and not codes
            child.kill()
            deadline = time.monotonic() + 120
            while not codes and time.monotonic() < deadline:
                time.sleep(0.02)
        earlier.kill()
    assert codes[0] == 4 and isinstance(recorded[0], ClusterError)
    assert f"{name}, process {child.pid}" in capfd.readouterr().err


def test_a_process_of_ray_that_ends_later_is_told_as_such(tmp_path, monkeypatch, capfd, noticed):
    """A raylet killed during a run left exit code 1 and no word: the chaos suite found it."""
    codes, recorded = [], []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(head_watch, "START_EVERY_S", 0.02)
    program = shutil.copy(shutil.which("sleep"), tmp_path / "raylet")
    watching = head_watch.watching_start(recorded.append)
    with watching as started, subprocess.Popen([program, "60"]) as child:
        assert noticed.wait(120)
        started.set()
        child.kill()
        deadline = time.monotonic() + 120
        while not codes and time.monotonic() < deadline:
            time.sleep(0.02)
    assert codes[0] == 3 and "Ray on this machine is gone" in str(recorded[0])
    assert "resume_from_checkpoint: true" in capfd.readouterr().err


def test_counts_of_failures_are_not_the_last_words_of_a_raylet(tmp_path):
    line = "[2026-11-29 02:43:11,001 I 12 12] (raylet) raylet.cc:5: [state-dump] - failed: 0\n"
    (tmp_path / "raylet.out").write_text(line)
    assert head_watch.last_words(tmp_path, "raylet") == ""


def test_the_last_words_of_a_process_of_ray_are_quoted(tmp_path):
    (tmp_path / "raylet.out").write_text(
        "[2026-11-29 02:43:11,001 I 12 12] (raylet) main.cc:1: starting\n"
        "[2026-11-29 02:43:12,001 C 12 12] (raylet) store.cc:7: No space left on device\n"
        "[2026-11-29 02:43:12,002 I 12 12] (raylet) main.cc:9: bye\n"
    )
    (tmp_path / "raylet.err").write_text("")
    assert head_watch._log_folder(["/x/raylet", f"--log_dir={tmp_path}"]) == str(tmp_path)
    assert head_watch._log_folder(["x", "--session-dir", "/s"]) == "/s/logs"
    error = head_watch._ended_at_start("raylet", 12, str(tmp_path))
    assert "raylet.out" in error.found and "store.cc:7: No space left on device" in error.found
    assert str(tmp_path) in error.fix and "memory" not in error.fix
    assert "memory" in head_watch._ended_at_start("gcs_server", 13, str(tmp_path)).fix


START = """
import contextlib, os, sys
from raytrain_adv.driver.watch.nodes import watching_start
with contextlib.suppress(ValueError), watching_start(print) as has_started:
    if sys.argv[1] == "raises":
        raise ValueError
    if sys.argv[1] == "runs":
        has_started.set()
        import psutil, time
        end = time.monotonic() + 120
        while psutil.Process().children() and time.monotonic() < end:  # the word's shell
            time.sleep(0.05)
    os._exit(1)  # as Ray's core worker does
"""


@pytest.mark.parametrize(("how", "is_told"), [("ends", True), ("raises", False), ("runs", False)])
def test_a_process_that_ray_ends_from_cpp_while_it_starts_leaves_a_word(how, is_told):
    done = subprocess.run(
        [sys.executable, "-c", START, how], capture_output=True, text=True, timeout=300
    )
    assert ("this process was ended while it started" in done.stderr) is is_told
    assert ("fix:" in done.stderr) is is_told
