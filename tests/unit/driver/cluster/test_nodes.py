"""Where workers can run, from the nodes that a cluster has."""

from __future__ import annotations

from typing import Any

import pytest

from raytrain_adv.driver.cluster import nodes
from raytrain_adv.driver.cluster.nodes import Node, resolve_placement
from raytrain_adv.errors import JobError


@pytest.mark.parametrize(
    ("has", "changed"),
    [({"CPU": 8.0}, {}), ({"CPU": 8.0, "GPU": 8.0}, {"resources_per_worker": {"CPU": 2}})],
)
@pytest.mark.parametrize(("key", "value"), [("cuda_graph", True), ("fsdp_collectives", "copies")])
def test_what_is_for_gpus_is_refused_before_workers_start_without_one(
    make_job: Any,
    monkeypatch: pytest.MonkeyPatch,
    has: dict[str, float],
    changed: dict[str, Any],
    key: str,
    value: object,
) -> None:
    monkeypatch.setattr(nodes, "alive_nodes", lambda: [Node("10.0.0.1", has)])
    monkeypatch.setattr(nodes, "scalable_nodes", list)
    job = make_job(ray_num_workers=1, **changed)
    assert not resolve_placement(job).use_gpu
    with pytest.raises(JobError, match=f"{key}: ") as caught:
        resolve_placement(make_job(ray_num_workers=1, **{key: value}, **changed))
    assert caught.value.found == "no worker has a GPU"
