"""A dashboard that requires its token, as that of a Ray started by a launch does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray

from raytrain_adv.driver.cluster import dashboard
from raytrain_adv.driver.commands.status import show
from raytrain_adv.errors import ClusterError
from tests.ports import held_port

TOKEN = "f" * 64


class Dashboard(BaseHTTPRequestHandler):
    """Answers as Ray's does, to those who show the token."""

    def do_GET(self) -> None:
        shown = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        version = {"version": "4", "ray_version": ray.__version__, "ray_commit": "x"}
        body = json.dumps({**version, "train_runs": []} if shown else {"error": "no"}).encode()
        self.send_response(200 if shown else 401)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Dashboard)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def status(url: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "raytrain_adv.cli", "status", "--address", url]
    plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    env = {**plain, "HOME": str(home), **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False)


def test_status_shows_this_users_token_to_this_machines_ray(url: str, tmp_path: Path) -> None:
    assert "The cluster requires its token" in status(url, tmp_path).stderr
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(TOKEN)
    assert status(url, tmp_path).stdout.startswith("the cluster runs nothing now")
    asked_not_to = status(url, tmp_path, RAY_AUTH_MODE="disabled")
    assert "The cluster requires its token" in asked_not_to.stderr


ON_THIS_MACHINE = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Dashboard(BaseHTTPRequestHandler):
    def do_GET(self):
        never = "runs" in self.path
        version = {"version": "4", "ray_version": sys.argv[3], "ray_commit": "x"}
        body = (sys.argv[4] if never else json.dumps(version)).encode()
        self.send_response(int(sys.argv[5]) if never else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

server = HTTPServer(("127.0.0.1", int(sys.argv[1].partition("=")[2]) + 3), Dashboard)
print("listens", flush=True)
server.serve_forever()
"""
ENTRY = {"name": "mine_001", "status": "RUNNING", "attempts": [], "start_time_ns": 1}
RUNS = json.dumps({"train_runs": [{**ENTRY, "run_settings": {}}]})


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    """Start what looks like Ray's dashboard, on another port than it was to have."""
    script = tmp_path / "ray" / "dashboard" / "dashboard.py"
    script.parent.mkdir(parents=True)
    script.write_text(ON_THIS_MACHINE)
    found: list[subprocess.Popen[str]] = []
    held = ExitStack()

    def start(answer: str, code: int) -> str:
        port = held.enter_context(held_port()) - 3
        options = [f"--port={port}", "--port-retries=9", ray.__version__, answer, str(code)]
        command = [sys.executable, str(script), *options]
        found.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert found[-1].stdout is not None and found[-1].stdout.readline() == "listens\n"
        return f"http://127.0.0.1:{port + 3}"

    yield start
    for process in found:
        process.kill()
        process.communicate()
    held.close()


def test_status_without_an_address_finds_the_launches_of_this_machine(
    started: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    urls = [started(RUNS, 200), started("gone", 404)]
    assert set(urls) <= set(dashboard.of_this_machine())
    monkeypatch.setattr(dashboard, "of_this_machine", lambda: urls)
    show(None, None)
    said = capsys.readouterr().out
    assert "mine_001" in said and "left out: The dashboard cannot list" in said
    monkeypatch.setattr(dashboard, "of_this_machine", lambda: [])
    show(None, None)
    assert capsys.readouterr().out.startswith("this machine runs nothing now; --address URL")


def test_a_cluster_on_which_nothing_has_run_is_no_error(
    started: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    never = "Train state data is not available. Please make sure Ray Train is running"
    show(started(never, 500), None)
    assert capsys.readouterr().out.startswith("the cluster runs nothing now\n")
    with pytest.raises(ClusterError, match="cannot list"):
        show(started("Train is not installed.", 500), None)
