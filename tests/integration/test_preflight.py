"""Preflight on simulated clusters: real Ray nodes on one machine with declared GPUs and labels;
what their probes would find is given as data.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.placement_group import (
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from raytrain_adv import cli
from raytrain_adv.driver.cluster.nodes import (
    Node,
    alive_nodes,
    free_by_node,
    free_resources,
    release_workers,
    resolve_placement,
)
from raytrain_adv.driver.preflight import probe, table, verdicts
from raytrain_adv.driver.preflight.probe import Read, Reading, read_nodes
from raytrain_adv.driver.training import run, trainer
from raytrain_adv.errors import ClusterError
from raytrain_adv.hardware import package_versions
from raytrain_adv.transforms.applied import Transforms
from tests.integration.conftest import SETTINGS
from tests.readings import A100, H100, node_with, without

READINGS = {"H100": node_with(H100), "A100": node_with(A100), "": node_with()}


@pytest.fixture(scope="module")
def simulated() -> Iterator[Cluster]:
    """Start a head without GPU, a node that declares 2 H100 and one that declares 4 A100."""
    folder = Path(tempfile.mkdtemp(prefix="pf", dir="/tmp"))  # sockets' paths must be short
    (folder / "ray").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(folder))
        nodes = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}
        )
        add(nodes, "H100", 2)
        add(nodes, "A100", 4)
        for name, value in SETTINGS.items():
            patch.setenv(name, os.environ.get(name, value))
        ray.init(address=nodes.address, logging_level="ERROR", log_to_driver=False)
        yield nodes
        ray.shutdown()
        nodes.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def add(nodes: Cluster, kind: str, num_gpus: int) -> object:
    return nodes.add_node(
        num_cpus=4,
        num_gpus=num_gpus,
        labels={"ray.io/accelerator-type": kind},
        resources={f"accelerator_type:{kind}": 1},
    )


def by_kind(**readings: Reading | str) -> Read:
    """Return a way to read nodes that goes by the kind of GPU they declare."""
    known: Mapping[str, Reading | str] = {**READINGS, **readings}
    return lambda nodes: {node.node_id: known[node.accelerator] for node in nodes}


def id_of(kind: str) -> str:
    return next(node.node_id for node in alive_nodes() if node.accelerator == kind)


def test_an_fp8_job_is_placed_on_the_h100_node_only(simulated, make_job, tmp_path):
    def where(config: dict[str, Path]) -> None:
        """Note the worker's node; for this a worker need not import this file, or torch."""
        rank = ray.train.get_context().get_world_rank()
        (config["folder"] / f"rank_{rank}").write_text(ray.get_runtime_context().get_node_id())

    job = make_job(ray_num_workers=2, fp8=True, bf16=True)
    found = verdicts.check_nodes(resolve_placement(job), Transforms(job), by_kind())
    placement = verdicts.place(job, resolve_placement(job), found)
    assert placement.label_selector == {"ray.io/node-id": f"!in({id_of('A100')})"}
    config, scaling = {"folder": tmp_path}, trainer.scaling(job, placement)
    DataParallelTrainer(where, train_loop_config=config, scaling_config=scaling).fit()
    noted = [file.read_text() for file in tmp_path.glob("rank_*")]
    assert noted == [id_of("H100")] * 2


def test_a_worker_that_differs_from_what_was_accepted_ends_the_run_without_retries(
    simulated, make_job, tmp_path
):
    """Every node is said to have a torchao that the workers then do not find."""
    job = make_job(ray_num_workers=1, use_cpu=True, max_failures=3)
    other = node_with(torchao="9.9.9")
    with pytest.raises(ClusterError, match="other versions") as error:
        run.run(job, by_kind(**{"H100": other, "A100": other, "": other}))
    assert "(9.9.9 elsewhere)" in error.value.found
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["failure"]["exit_code"] == 4
    assert [node["used"] for node in report["preflight"]["nodes"]] == [True, True, True]


def test_too_many_workers_are_refused_at_once_and_nothing_is_reserved(simulated, make_job):
    job = make_job(ray_num_workers=4, fp8=True, bf16=True)
    before = len(placement_group_table())

    def seconds_until_refused() -> float:
        start = time.monotonic()
        placement = resolve_placement(job)
        found = verdicts.check_nodes(placement, Transforms(job), by_kind())
        with pytest.raises(ClusterError, match="FP8 requires Hopper") as error:
            verdicts.place(job, placement, found)
        assert "there is room for 2" in error.value.found
        return time.monotonic() - start

    assert min(seconds_until_refused() for _ in range(3)) < 3  # the machine may be busy
    assert len(placement_group_table()) == before


def test_a_node_without_torch_is_left_out(simulated, make_job):
    job = make_job(ray_num_workers=2)
    placement = resolve_placement(job)
    read = by_kind(H100=without("torch", READINGS["H100"]))
    found = verdicts.check_nodes(placement, [], read)
    assert verdicts.place(job, placement, found).avoided == (id_of("H100"),)
    assert "torch not available" in table.render(found)


def test_two_nodes_with_different_torchao_are_refused(simulated, make_job):
    job = make_job(ray_num_workers=6)
    placement = resolve_placement(job)
    found = verdicts.check_nodes(placement, [], by_kind(H100=node_with(H100, torchao="0.17.0")))
    with pytest.raises(ClusterError, match="Versions differ between the nodes") as error:
        verdicts.place(job, placement, found)
    assert "torchao 0.17.0 (0.18.0 elsewhere)" in error.value.found


def test_what_a_controller_reserved_is_free_once_it_died_before_its_workers_began(simulated):
    """Ray keeps a dead actor's placement groups until the job ends: the run waited forever."""

    class Controller:
        def reserve(self) -> list[int]:
            assert placement_group([{"GPU": 1}]).wait(300)
            return [os.getpid()]

    def num_free() -> float:
        return sum(node.get("GPU", 0) for node in free_by_node().values())

    def release_until(expected: float) -> None:
        end = time.monotonic() + 300
        while num_free() != expected:
            assert time.monotonic() < end, num_free()
            release_workers()
            time.sleep(0.2)

    remote = ray.remote(num_cpus=0)(Controller)
    dead, alive = remote.remote(), remote.remote()
    before = num_free()
    (killed,), _ = ray.get([dead.reserve.remote(), alive.reserve.remote()])
    os.kill(killed, signal.SIGKILL)
    release_until(before - 1)  # the living one's stays
    ray.kill(alive)
    release_until(before)


def test_the_real_probe_reads_every_node_though_all_of_it_is_reserved(simulated):
    whole = [{"CPU": 2}, {"CPU": 4, "GPU": 2}, {"CPU": 4, "GPU": 4}]
    reserved = placement_group(whole)
    assert reserved.wait(300)
    nodes = alive_nodes()
    readings = read_nodes(nodes)
    remove_placement_group(reserved)
    assert readings.keys() == {node.node_id for node in nodes}
    for reading in readings.values():
        assert isinstance(reading, Reading), reading
        assert reading.versions["torch"] == package_versions()["torch"]
        assert reading.code is not None


def test_a_wait_counts_only_the_nodes_that_may_be_used(simulated, make_job):
    job = make_job(ray_num_workers=2)
    anywhere = resolve_placement(job)
    on_h100 = dataclasses.replace(anywhere, avoided=(id_of("A100"),))
    nowhere = dataclasses.replace(anywhere, avoided=(id_of("A100"), id_of("H100")))
    assert free_resources(on_h100).get("GPU", 0.0) <= 2
    deadline = time.monotonic() + 300  # until Ray has what an earlier run held back
    while not free_resources(nowhere).get("CPU") and time.monotonic() < deadline:
        time.sleep(0.2)
    assert free_resources(nowhere).get("GPU", 0.0) == 0 < free_resources(nowhere)["CPU"]


def test_a_node_that_dies_during_the_probe_is_left_out_and_the_others_are_used(simulated, make_job):
    start = time.monotonic()
    doomed = add(simulated, "H200", 2)
    start_s = time.monotonic() - start  # of a node: two seconds, or more on a busy machine
    lost = id_of("H200")
    job = make_job(ray_num_workers=2, fp8=True, bf16=True)
    placement = resolve_placement(job)

    def read(nodes: Sequence[Node]) -> Mapping[str, Reading | str]:
        simulated.remove_node(doomed, allow_graceful=False)
        answers = read_nodes(nodes, timeout_s=5)
        assert isinstance(answers[lost], str)
        return {**by_kind(H200="")(nodes), lost: answers[lost]}

    start = time.monotonic()
    found = verdicts.check_nodes(placement, Transforms(job), read)
    assert time.monotonic() - start < 10 + 2 * start_s
    placed = verdicts.place(job, placement, found)
    assert lost in placed.avoided and id_of("H100") not in placed.avoided
    assert "did not answer" in table.render(found)


def test_a_probe_that_takes_too_long_is_no_hang(simulated, monkeypatch, tmp_path):
    slow = tmp_path / "slow.py"
    slow.write_text("import time; time.sleep(100)")
    monkeypatch.setattr(probe, "SCRIPT", slow)
    monkeypatch.setattr(probe, "SCRIPT_TIMEOUT_S", 100.0)
    waits, wait = [], ray.wait

    def noted(refs: list[ray.ObjectRef], timeout: float) -> object:
        waits.append(timeout)
        return wait(refs, timeout=timeout)

    monkeypatch.setattr(ray, "wait", noted)
    start = time.monotonic()
    readings = read_nodes(alive_nodes()[:1], timeout_s=2)
    # Ray may wake a fraction of a millisecond early, and is asked for the rest.
    assert time.monotonic() - start < 90 and max(waits) <= 2 and sum(waits[1:]) < 0.5
    assert list(readings.values()) == ["no answer within 2 s"]


def test_the_command_shows_the_nodes_and_with_a_job_refuses_gpus_that_are_not_there(
    simulated, job_file, capsys
):
    assert cli.main(["preflight"]) == 0
    assert f"torch {package_versions()['torch']}" in capsys.readouterr().out
    with_job = preflight_command(simulated, str(job_file(ray_num_workers=2)))
    shown, errors = with_job.communicate(timeout=600)
    assert with_job.returncode == 4, shown + errors
    assert "A node declares GPUs, and none is found on it" in errors
    assert "excluded" in shown and "fix:" in errors


def preflight_command(nodes: Cluster, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "raytrain_adv.cli", "preflight", *arguments],
        env={**os.environ, "RAY_ADDRESS": nodes.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
