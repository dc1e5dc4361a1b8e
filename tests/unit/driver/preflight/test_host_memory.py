"""Host memory of a run on a node: in the plan, and compared with what preflight found."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest

from raytrain_adv.config.job import JobConfig
from raytrain_adv.driver.cluster.nodes import Node, Placement
from raytrain_adv.driver.plan.data import measure
from raytrain_adv.driver.plan.plan import RunPlan, render, resolve, show
from raytrain_adv.driver.preflight import memory as preflight_memory
from raytrain_adv.driver.preflight import probe
from raytrain_adv.driver.preflight import verdicts as preflight
from raytrain_adv.driver.preflight.probe import Reading
from raytrain_adv.driver.preflight.verdicts import Preflight
from raytrain_adv.errors import ClusterError
from raytrain_adv.estimate.memory import HostNeed
from raytrain_adv.estimate.sizes import HostCopies
from raytrain_adv.text import GIB
from tests.readings import H100, node_with


def found_on(*readings: Reading, workers: int = 2) -> Preflight:
    placement = Placement(workers * len(readings), {"GPU": 1.0}, True, "")
    verdicts = [
        preflight.judge(
            placement, [], Node(f"10.0.0.{n}", {"GPU": float(workers)}, node_id=f"{n}"), reading
        )
        for n, reading in enumerate(readings, 1)
    ]
    return preflight.compare_versions(verdicts, True)


def keeping(job: JobConfig, found: Preflight, gib: float, workers: int = 2) -> RunPlan:
    """Return a plan whose workers keep copies of this many GiB."""
    data = measure(job, lambda sentence: None)
    plan = resolve(job, world_size=workers, data=data, facts=found.facts)
    memory = dataclasses.replace(plan.memory, copies=HostCopies(gib, 0.0))
    need = HostNeed.of(memory, plan.host.workers)
    return dataclasses.replace(plan, memory=memory, host=need)


def of_memory(gib: int, free: int) -> Reading:
    reading = node_with(H100)
    return dataclasses.replace(reading, host_memory_bytes=gib * GIB, host_free_bytes=free * GIB)


@pytest.fixture
def job(make_job: Any) -> JobConfig:
    made: JobConfig = make_job(ray_num_workers=2)
    return made


def test_copies_with_room_to_be_locked_give_no_warning(job: JobConfig) -> None:
    found = found_on(of_memory(512, 500))
    assert preflight_memory.refuse_too_large(job, keeping(job, found, 125.0), found) == []


def test_copies_of_more_than_half_of_what_is_free_are_a_warning(job: JobConfig) -> None:
    found = found_on(of_memory(512, 500), of_memory(512, 400))
    (warning,) = preflight_memory.refuse_too_large(job, keeping(job, found, 126.0), found)
    assert "node 10.0.0.2: 126.0 GiB per worker, 252.0 GiB on a node of 2" in warning
    assert "half of the 400.0 GiB" in warning and "not page-locked" in warning
    assert "1 other node" in warning


def test_memory_that_something_else_uses_is_a_warning(job: JobConfig) -> None:
    found = found_on(of_memory(512, 100))
    (warning,) = preflight_memory.refuse_too_large(job, keeping(job, found, 60.0), found)
    assert "100.0 GiB of 512.0 are free" in warning


def test_more_than_a_node_has_is_refused_with_what_needs_less(job: JobConfig) -> None:
    found = found_on(of_memory(512, 500))
    with pytest.raises(ClusterError, match="host memory") as error:
        preflight_memory.refuse_too_large(job, keeping(job, found, 257.0), found)
    assert "514.0 GiB on a node of 2" in error.value.found
    assert "it has 512.0 GiB" in error.value.found
    assert "save_only_model: true" in error.value.fix and "force: true" in error.value.fix


def test_force_starts_it_anyway(make_job: Any) -> None:
    job, found = make_job(ray_num_workers=2, force=True), found_on(of_memory(512, 500))
    (warning,) = preflight_memory.refuse_too_large(job, keeping(job, found, 257.0), found)
    assert "force: true" in warning


def test_workers_that_are_spread_share_no_node(make_job: Any) -> None:
    found = found_on(of_memory(512, 500), of_memory(512, 500))
    for strategy, most in {"PACK": 2, "SPREAD": 1, "STRICT_SPREAD": 1}.items():
        job = make_job(ray_num_workers=2, placement_strategy=strategy)
        assert preflight_memory.workers_on(found.verdicts[0], job, 2, found) == most


def test_the_plan_shows_the_memory_of_copies_per_worker_and_node(
    job: JobConfig,
) -> None:
    found = found_on(of_memory(512, 500))
    text = re.sub(r"\s+", " ", render(keeping(job, found, 50.0)))
    assert "50.0 GiB per worker, 100.0 GiB on a node of 2" in text
    assert "page-locked where a node has 200.0 GiB free (this node has 512)" in text
    text = re.sub(r"\s+", " ", render(keeping(job, found, 200.0)))
    assert "not page-locked on this node of 512 GiB" in text
    text = re.sub(r"\s+", " ", render(keeping(job, found, 300.0)))
    assert "does not fit: this node has 512 GiB of host memory" in text


def test_a_plan_for_many_workers_shows_the_memory_of_a_full_node(
    make_job: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostCopies, "of", lambda model, job, world_size: HostCopies(8.0, 0.0))
    show(make_job(), num_workers=16)
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "8.0 GiB per worker, 64.0 GiB on a node of 8" in text
    assert "page-locked where a node has 128.0 GiB free, twice the copies" in text


def test_a_probe_reads_the_free_memory() -> None:
    printed = probe.run_script(probe.SCRIPT.read_text(), ["torch"], 20)
    reading = probe.parse(printed)
    assert 0 < json.loads(printed)["host_free_bytes"] <= reading.host_memory_bytes
