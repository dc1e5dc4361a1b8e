"""raytrain-adv dashboard: its files, the Rays it finds, and both servers as stand-ins."""

import configparser
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from raytrain_adv.cli import main
from raytrain_adv.driver.commands.dashboard import (
    DISCOVERED,
    Ports,
    servers,
    write_files,
    write_targets,
)
from tests.ports import held_port

SERVER = f"""#!{sys.executable}
import http.server, re, sys
text = " ".join(sys.argv)
if found := re.search(r"--config (\\S+)", text):
    text = open(found[1]).read()
port = int(re.search(r"(?:listen-address=127.0.0.1:|http_port = )(\\d+)", text)[1])
http.server.HTTPServer(("127.0.0.1", port), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


def ray_session(folder: Path, name: str, *targets: str, age_s: float = 0.0) -> None:
    path = folder / f"session_{name}" / DISCOVERED
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": targets}]))
    os.utime(path, (time.time() - age_s,) * 2)


def test_every_ray_that_runs_here_is_read_and_none_that_has_ended(tmp_path):
    ray_session(tmp_path, "a", "127.0.0.1:1", "127.0.0.1:2")
    ray_session(tmp_path, "b", "127.0.0.1:3")
    ray_session(tmp_path, "ended", "127.0.0.1:4", age_s=3600)
    (tmp_path / "session_latest").symlink_to("session_b")
    expected = ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"]
    assert write_targets(tmp_path, tmp_path) == expected
    assert json.loads((tmp_path / "targets.json").read_text()) == [{"targets": expected}]


def test_without_prometheus_the_error_names_both_ways_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = tmp_path / "dashboard"
    assert main(["dashboard", "--folder", str(folder), "--ray", str(tmp_path)]) == 4
    error = capsys.readouterr().err
    assert "apt install prometheus" in error and f"{folder}/compose.yaml" in error
    services = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
    assert services.keys() == {"prometheus", "grafana"}
    read = yaml.safe_load((folder / "prometheus.yml").read_text())["scrape_configs"][0]
    assert read["file_sd_configs"][0]["files"][0] == f"{folder}/targets.json"


def test_grafana_can_be_read_here_by_all_changed_by_nobody_and_asks_no_other_host(tmp_path):
    write_files(tmp_path, tmp_path, Ports(1, 2))
    keys = configparser.ConfigParser()
    keys.read(tmp_path / "grafana.ini")
    assert keys["server"]["http_addr"] == "127.0.0.1"
    assert keys["auth.anonymous"]["org_role"] == "Viewer"
    assert keys["security"].getboolean("disable_initial_admin_creation")
    assert not any(keys["analytics"].getboolean(key) for key in keys["analytics"])


def test_an_unpacked_grafana_is_started_with_its_own_pages(tmp_path, monkeypatch):
    program = tmp_path / "grafana" / "bin" / "grafana"
    (program.parents[1] / "public").mkdir(parents=True)
    program.parent.mkdir()
    program.write_text("")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    command = servers(tmp_path, Ports(1, 2))["grafana"]
    assert command[:4] == [str(program), "server", "--homepath", str(program.parents[1])]


@pytest.fixture
def ports() -> Iterator[dict[str, int]]:
    """Where the servers are to listen."""
    with held_port() as first, held_port() as second:
        yield {"prometheus": first, "grafana": second}


@pytest.mark.parametrize("name", ["prometheus", "grafana"])
def test_a_taken_port_is_an_error_with_the_option(tmp_path, monkeypatch, capsys, name, ports):
    install(tmp_path, monkeypatch)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        taken_one = {name: taken.getsockname()[1]}
        assert main(command(tmp_path, ports | taken_one)) == 4
    assert f"--{name}-port" in capsys.readouterr().err


def test_both_servers_run_until_they_are_stopped(tmp_path, monkeypatch, ports):
    install(tmp_path, monkeypatch)
    ray_session(tmp_path, "a", "127.0.0.1:1")
    words = [sys.executable, "-m", "raytrain_adv.cli", *command(tmp_path, ports)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as running:
        lines = iter(running.stdout.readline, "")
        seen = next(line for line in lines if line.startswith("reading"))
        assert "127.0.0.1:1" in seen
        for port in ports.values():
            socket.create_connection(("127.0.0.1", port)).close()
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=300) == 0
    for port in ports.values():
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))


def install(folder: Path, monkeypatch) -> None:
    """Put a stand-in of each server into PATH."""
    for name in ("prometheus", "grafana"):
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(SERVER)
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder / "bin"))


def command(folder: Path, ports: dict[str, int]) -> list[str]:
    options = [f"--{name}-port={port}" for name, port in ports.items()]
    return ["dashboard", "--folder", str(folder / "d"), "--ray", str(folder), *options]
