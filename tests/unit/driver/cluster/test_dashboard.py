"""A dashboard that requires its token, as that of a Ray started by a launch does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import ray

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
    assert status(url, tmp_path).stdout.strip() == "the cluster has no runs"
    asked_not_to = status(url, tmp_path, RAY_AUTH_MODE="disabled")
    assert "The cluster requires its token" in asked_not_to.stderr
