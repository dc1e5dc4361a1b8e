"""`raytrain-adv dashboard`: Prometheus and Grafana on this machine, with this package's board."""

import json
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from raytrain_adv.errors import ClusterError
from raytrain_adv.storage.atomic import write_atomic

BOARD = Path(__file__).with_name("board.json")
DISCOVERED = "prom_metrics_service_discovery.json"
FRESH_S = 60.0
"""Ray writes its list of nodes every 5 s (ray 2.60); an older one is of a Ray that has ended."""
REFRESH_S = 5.0
START_S = 60.0
HOMES = ("/usr/share/grafana", "/usr/local/share/grafana", "/opt/grafana")
IMAGES = {"prometheus": "prom/prometheus:v2.53.2", "grafana": "grafana/grafana:11.2.0"}


@dataclass(frozen=True)
class Ports:
    """Where the two servers listen, on this machine's loopback alone."""

    prometheus: int
    grafana: int


@click.command("dashboard")
@click.option("--folder", type=click.Path(path_type=Path), metavar="DIR",
              default=Path("~/.cache/raytrain_adv/dashboard"), show_default=True,
              help="Where configuration and recorded metrics are kept.")  # fmt: skip
@click.option("--ray", "ray_folder", type=click.Path(path_type=Path), default=Path("/tmp/ray"),
              metavar="DIR", show_default=True, help="Ray's --temp-dir.")  # fmt: skip
@click.option("--prometheus-port", type=int, default=9090, show_default=True)
@click.option("--grafana-port", type=int, default=3000, show_default=True)
@click.option("--write-only", is_flag=True, help="Write the files, and start nothing.")
def dashboard_command(
    folder: Path, ray_folder: Path, prometheus_port: int, grafana_port: int, write_only: bool
) -> None:
    """Show the runs of this machine in Grafana, until Ctrl-C.

    Starts Prometheus and Grafana if they are installed; a compose file is written for Docker or
    Podman. Both listen on 127.0.0.1 alone. On Kubernetes, see cluster/README.md.
    """
    folder, ports = folder.expanduser().absolute(), Ports(prometheus_port, grafana_port)
    write_files(folder, ray_folder, ports)
    write_targets(folder, ray_folder)
    commands = servers(folder, ports)
    print(f"configuration  {folder}")
    if write_only:
        return
    if "prometheus" not in commands:
        grafana = commands.get("grafana", ["not in PATH either"])[0]
        raise ClusterError(
            "Prometheus is not installed here",
            f"no prometheus in PATH; Grafana: {grafana}",
            f"apt install prometheus, or: docker compose -f {folder}/compose.yaml up",
        )
    run(folder, ray_folder, commands, ports)


def servers(folder: Path, ports: Ports) -> dict[str, list[str]]:
    """Return the commands of the servers that are installed here."""
    found = {}
    if program := shutil.which("prometheus"):
        found["prometheus"] = [
            program, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{ports.prometheus}",
        ]  # fmt: skip
    program = shutil.which("grafana") or shutil.which("grafana-server")
    if program:
        # A release that is unpacked somewhere has its pages beside bin/.
        homes = [Path(program).resolve().parents[1], *map(Path, HOMES)]
        home = next((home for home in homes if (home / "public").is_dir()), homes[0])
        word = ["server"] if Path(program).name == "grafana" else []
        found["grafana"] = [program, *word, "--homepath", str(home)]
        found["grafana"] += ["--config", f"{folder}/grafana.ini"]
    return found


def write_files(folder: Path, ray_folder: Path, ports: Ports) -> None:
    """Write the configuration of both servers, the board, and a compose file for containers."""
    address, provisioning = f"http://127.0.0.1:{ports.prometheus}", folder / "provisioning"
    # Every Ray here while this command runs; in containers the one that started last.
    lists = [str(folder / "targets.json"), str(ray_folder / DISCOVERED)]
    jobs = [{"job_name": "ray", "file_sd_configs": [{"files": lists}]}]
    board = {"name": "raytrain_adv", "type": "file", "options": {"path": str(folder / "boards")}}
    source = {"name": "Prometheus", "type": "prometheus", "access": "proxy", "url": address}
    services: dict[str, dict[str, Any]] = {
        "prometheus": {
            "command": [
                f"--config.file={folder}/prometheus.yml",
                f"--web.listen-address=127.0.0.1:{ports.prometheus}",
            ],
        },
        "grafana": {"environment": {"GF_PATHS_CONFIG": f"{folder}/grafana.ini"}},
    }
    mounted = [f"{folder}:{folder}", f"{ray_folder}:{ray_folder}:ro"]
    own: dict[str, Any] = {"network_mode": "host", "user": "0", "volumes": mounted}
    compose = {name: {"image": IMAGES[name], **own, **more} for name, more in services.items()}
    # JSON is YAML, and needs no library here.
    files = {
        "prometheus.yml": _json({"global": {"scrape_interval": "5s"}, "scrape_configs": jobs}),
        "provisioning/dashboards/raytrain_adv.yaml": _json({"apiVersion": 1, "providers": [board]}),
        "provisioning/datasources/prometheus.yaml": _json(
            {"apiVersion": 1, "datasources": [{**source, "isDefault": True}]}
        ),
        "boards/raytrain_adv.json": BOARD.read_text(),
        "compose.yaml": _json({"services": compose}),
        "grafana.ini": "\n".join(
            [
                "[server]", "http_addr = 127.0.0.1", f"http_port = {ports.grafana}",
                "[paths]", f"data = {folder}/grafana", f"logs = {folder}/grafana",
                f"provisioning = {provisioning}",
                "[auth.anonymous]", "enabled = true", "org_role = Viewer",
                # Nobody logs in: without this there is an administrator with a known password.
                "[security]", "disable_initial_admin_creation = true",
                "[analytics]", "reporting_enabled = false", "check_for_updates = false",
                "check_for_plugin_updates = false",
                "[dashboards]", f"default_home_dashboard_path = {folder}/boards/raytrain_adv.json",
                "",
            ]
        ),
    }  # fmt: skip
    for name, text in files.items():
        write_atomic(folder / name, text)


def _json(value: object) -> str:
    return json.dumps(value, indent=2) + "\n"


def write_targets(folder: Path, ray_folder: Path) -> list[str]:
    """Write what Prometheus reads: the nodes of every Ray on this machine; return host:port."""
    found: dict[str, None] = {}
    for path in sorted(ray_folder.glob(f"session_*/{DISCOVERED}")):
        if path.parent.is_symlink() or time.time() - path.stat().st_mtime > FRESH_S:
            continue
        for group in json.loads(path.read_text() or "[]"):
            found |= dict.fromkeys(group["targets"])
    write_atomic(folder / "targets.json", _json([{"targets": list(found)}]))
    return list(found)


def run(folder: Path, ray_folder: Path, commands: Mapping[str, list[str]], ports: Ports) -> None:
    """Run the servers until Ctrl-C, SIGTERM or until one ends. Raises ClusterError if one cannot
    start.
    """
    with ExitStack() as running:
        processes = {
            name: running.enter_context(_started(folder, name, commands[name], port))
            for name, port in (("prometheus", ports.prometheus), ("grafana", ports.grafana))
            if name in commands
        }
        print(f"Prometheus     http://127.0.0.1:{ports.prometheus}/graph")
        if "grafana" in processes:
            print(f"Grafana        http://127.0.0.1:{ports.grafana}/d/raytrain-adv")
        else:
            print(
                "Grafana        not installed (https://grafana.com/grafana/download); or: docker "
                f"compose -f {folder}/compose.yaml up grafana"
            )
        print("Ctrl-C stops them.", flush=True)
        shown: list[str] | None = None
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            while not any(process.poll() is not None for process in processes.values()):
                targets = write_targets(folder, ray_folder)
                if targets != shown:
                    words = ", ".join(targets) or "nothing: no Ray runs"
                    print(f"reading        {words}", flush=True)
                shown = targets
                time.sleep(REFRESH_S)
        except KeyboardInterrupt:
            return
        finally:
            signal.signal(signal.SIGTERM, before)
        ended = next(name for name, process in processes.items() if process.poll() is not None)
        raise _not_running(folder, ended)


@contextmanager
def _started(
    folder: Path, name: str, command: list[str], port: int
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server, wait until it listens, and stop it at the end."""
    if _is_taken(port):
        what, fix = f"Port {port} is taken", f"choose another one with --{name}-port"
        raise ClusterError(what, f"{name} would listen there", fix)
    with open(folder / f"{name}.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, process_group=0)
    try:
        end = time.monotonic() + START_S
        while not _is_taken(port):
            if process.poll() is not None or time.monotonic() > end:
                raise _not_running(folder, name)
            time.sleep(0.2)
        yield process
    finally:
        process.terminate()
        process.wait()


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _not_running(folder: Path, name: str) -> ClusterError:
    log = folder / f"{name}.log"
    last = "\n".join(log.read_text(errors="replace").splitlines()[-3:])
    return ClusterError(f"{name} has ended, or does not start", last, f"see {log}")
