"""The board of Grafana against the metrics that exist."""

from __future__ import annotations

import json
import re
from typing import Any

from ray.train.v2._internal.metrics.controller import ControllerMetrics
from ray.train.v2._internal.metrics.worker import WorkerMetrics

from raytrain_adv.driver.commands.dashboard import BOARD
from raytrain_adv.driver.training.prometheus import EXPORTED


def test_the_dashboard_asks_only_for_what_is_exported():
    """Ours are those that a run exports (tests/integration/test_submit.py asks one); Ray Train's
    are those of its package."""
    text = BOARD.read_text()
    board: dict[str, Any] = json.loads(text)
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    asked = " ".join(target["expr"] for panel in panels for target in panel["targets"])
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


def is_tag(name: str) -> bool:
    """Whether it is a tag that Ray Train puts on its metrics; one has the name of its metric."""
    return name == "ray_train_run_name"
