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
def test_cuda_graph_true_is_refused_before_workers_start_without_a_gpu(
    make_job: Any, monkeypatch: pytest.MonkeyPatch, has: dict[str, float], changed: dict[str, Any]
) -> None:
    monkeypatch.setattr(nodes, "alive_nodes", lambda: [Node("10.0.0.1", has)])
    monkeypatch.setattr(nodes, "scalable_nodes", list)
    job = make_job(ray_num_workers=1, **changed)
    assert not resolve_placement(job, False).use_gpu
    with pytest.raises(JobError, match="cuda_graph: true") as caught:
        resolve_placement(make_job(ray_num_workers=1, cuda_graph=True, **changed), False)
    assert caught.value.found == "no worker has a GPU"
