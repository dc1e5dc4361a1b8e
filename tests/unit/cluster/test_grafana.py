"""The board of Grafana against the metrics that exist, and against Prometheus itself."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.train.v2._internal.metrics.controller import ControllerMetrics
from ray.train.v2._internal.metrics.worker import WorkerMetrics

from raytrain_adv.driver.commands.dashboard import BOARD, Ports, write_files
from raytrain_adv.driver.training.prometheus import EXPORTED
from tests.ports import held_port

LABELS = (
    'run="a",rank="0",transform="qat",ray_train_run_name="a",ray_train_controller_state="RUNNING"'
)


def test_the_dashboard_asks_only_for_what_is_exported():
    """Ours are those that a run exports (tests/integration/test_submit.py asks one); Ray Train's
    are those of its package."""
    text = BOARD.read_text()
    board: dict[str, Any] = json.loads(text)
    asked = " ".join(queries())
    shown = set(re.findall(r"ray_raytrain_adv_\w+", text))
    assert shown == {f"ray_{name}" for name in EXPORTED}
    trains = {
        f"ray_{value}"
        for of in (ControllerMetrics, WorkerMetrics)
        for value in vars(of).values()
        if isinstance(value, str) and value.startswith("train_")
    }
    used = {name for name in re.findall(r"ray_train_\w+", asked) if not is_tag(name)}
    assert used and used <= trains
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_board_is_one_in_grafanas_own_schema():
    """Read and written again by Grafana's package it is the same; keys that it does not know are
    lost. `definition` is the query once more, which Grafana's editor writes.
    """
    schema = pytest.importorskip(
        "grafana_foundation_sdk.models.dashboard", reason="pip install grafana-foundation-sdk"
    )
    plugins = pytest.importorskip("grafana_foundation_sdk.cog.plugins")
    encoder = pytest.importorskip("grafana_foundation_sdk.cog.encoder")
    plugins.register_default_plugins()
    board = json.loads(BOARD.read_text())
    for variable in board["templating"]["list"]:
        variable.pop("definition", None)
    again = json.loads(encoder.JSONEncoder().encode(schema.Dashboard.from_json(board)))
    assert missing(board, again) == []


def missing(expected: Any, found: Any, place: str = "") -> list[str]:
    """Return where `found` lacks what is in `expected`."""
    if isinstance(expected, dict) and isinstance(found, dict):
        pairs = [(key, value, found.get(key)) for key, value in expected.items()]
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = [("*", *pair) for pair in zip(expected, found, strict=True)]
    else:
        return [] if expected == found else [place]
    return [at for key, *pair in pairs for at in missing(*pair, f"{place}/{key}")]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="apt install prometheus")
def test_prometheus_answers_each_query_of_the_board_and_takes_the_configuration(tmp_path):
    """Each metric is there once, with the value 7."""
    write_files(tmp_path, tmp_path / "ray", Ports(9090, 3000))
    promtool("check", "config", "--syntax-only", f"{tmp_path}/prometheus.yml")
    asked = [re.sub(r"\$\w+", ".*", query) for query in queries()]
    names = {n for query in asked for n in re.findall(r"(ray_\w+)(?=[{)])", query)}
    now = int(time.time()) - 60
    samples = [f"{name}{{{LABELS}}} 7 {now}\n" for name in sorted(names) if not is_tag(name)]
    (tmp_path / "samples").write_text("".join(samples) + "# EOF\n")
    promtool("tsdb", "create-blocks-from", "openmetrics", f"{tmp_path}/samples", f"{tmp_path}/data")
    with prometheus(tmp_path) as ask:
        for query in asked:
            (found,) = ask(query, now)
            assert found["value"][1] == "7", query


def queries() -> list[str]:
    """What the board's panels ask."""
    panels = json.loads(BOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def promtool(*arguments: str) -> None:
    subprocess.run(["promtool", *arguments], check=True, capture_output=True)


@contextlib.contextmanager
def prometheus(folder: Path) -> Iterator[Callable[[str, int], list[Any]]]:
    """Run Prometheus on the blocks in `folder`/data; give what asks it."""
    (folder / "own.yml").write_text("{}")
    held = contextlib.ExitStack()
    address = f"127.0.0.1:{held.enter_context(held_port())}"
    command = ["prometheus", f"--config.file={folder}/own.yml", f"--web.listen-address={address}"]
    server = subprocess.Popen(
        [*command, f"--storage.tsdb.path={folder}/data"], stderr=subprocess.DEVNULL
    )

    def ask(query: str, at: int) -> list[Any]:
        asked = urllib.parse.urlencode({"query": query, "time": at})
        with urllib.request.urlopen(f"http://{address}/api/v1/query?{asked}") as answer:
            return list(json.load(answer)["data"]["result"])

    try:
        for _ in range(300):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://{address}/-/ready").close()
                break
            time.sleep(0.1)
        yield ask
    finally:
        server.kill()
        server.wait()
        held.close()


def is_tag(name: str) -> bool:
    """Whether it is a tag that Ray Train puts on its metrics; one has the name of its metric."""
    return name == "ray_train_run_name"
