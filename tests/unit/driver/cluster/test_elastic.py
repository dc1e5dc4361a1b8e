"""How many workers an elastic run has on which nodes, and the messages about them."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from raytrain_adv.config import load
from raytrain_adv.config.job import numbers
from raytrain_adv.driver.cluster import nodes as cluster
from raytrain_adv.driver.cluster.elastic import BatchPreservingPolicy, largest_fitting
from raytrain_adv.driver.cluster.network import find_interface
from raytrain_adv.driver.cluster.nodes import Node, Placement
from raytrain_adv.driver.plan.plan import show
from raytrain_adv.driver.preflight.verdicts import place
from raytrain_adv.driver.training.trainer import scaling
from raytrain_adv.driver.training.worker_entry import describe_start, require_shared_storage
from raytrain_adv.driver.watch.nodes import NodeWatch
from raytrain_adv.errors import ClusterError, JobError
from raytrain_adv.run.run import Run, SilentReporter
from raytrain_adv.storage.storage import Storage
from tests.readings import A100, H100, node_with
from tests.unit.driver.preflight.test_preflight import found_on

ELASTIC = {
    "ray_num_workers": [2, 8],
    "max_failures": -1,
    "save_strategy": "steps",
    "gradient_accumulation_steps": 3,
}


def on_gpus(*counts: int) -> list[Node]:
    return [
        Node(f"10.0.0.{i}", {"GPU": n}, node_id=f"id{i}") for i, n in enumerate(counts, start=1)
    ]


def requests(*numbers: int) -> Placement:
    return Placement(numbers[-1], {"GPU": 1.0}, True, "", numbers=numbers)


def test_the_numbers_of_workers_are_those_that_keep_the_batch(make_job):
    assert numbers(make_job(**ELASTIC)) == (2, 3, 4, 6, 8)
    assert numbers(make_job(**ELASTIC, fsdp_shard_size=2)) == (2, 4, 6, 8)
    assert numbers(make_job(**ELASTIC, sequence_parallel_size=2)) == (2, 4, 6, 8)
    assert numbers(make_job(ray_num_workers=8)) == ()


def test_as_many_run_as_fit_and_the_batch_divides_by():
    assert largest_fitting(on_gpus(4, 3), requests(2, 4, 8), "PACK") == 4
    assert largest_fitting(on_gpus(8, 8), requests(2, 4, 8), "PACK") == 8
    assert largest_fitting(on_gpus(1), requests(2, 4, 8), "PACK") == 0
    assert largest_fitting(on_gpus(8, 1, 1), requests(2, 4, 8), "STRICT_SPREAD") == 2
    assert largest_fitting(on_gpus(4, 4), requests(2, 4, 8), "STRICT_PACK") == 4


def test_neither_excluded_nodes_nor_what_other_jobs_use_are_counted(make_job, monkeypatch):
    """Ray's own policy counts both, and requests their workers in vain again and again."""
    job = make_job(**ELASTIC)
    placed = dataclasses.replace(requests(2, 4, 8), avoided=("id3",))
    policy = BatchPreservingPolicy(scaling(job, placed), placed, "PACK")
    free = {"id1": {"GPU": 1.0}, "id2": {"GPU": 4.0}, "id3": {"GPU": 4.0}}
    monkeypatch.setattr(cluster, "alive_nodes", lambda: on_gpus(4, 4, 4))
    monkeypatch.setattr(cluster, "free_by_node", lambda: free)
    assert policy._count_possible_workers({}) == 4
    policy._own["id1"] += 3  # this run's own
    assert policy._count_possible_workers({}) == 8
    policy.before_controller_execute_resize_decision(None)
    assert policy._count_possible_workers({}) == 4


def test_a_cluster_that_fits_the_fewest_is_enough_and_wrong_nodes_are_excluded(make_job):
    job = make_job(**ELASTIC)
    placed = place(
        job,
        requests(*numbers(job)),
        found_on(requests(*numbers(job)), node_with(H100, 4), node_with(A100, 4)),
    )
    assert placed.avoided == ("id2",) and placed.fewest == 2 and placed.num_workers == 8
    assert placed.note.startswith("2 or 3 or 4 or 6 or 8 workers")
    assert scaling(job, placed).num_workers == (2, 8)
    with pytest.raises(ClusterError, match="2 workers at least"):
        place(job, requests(*numbers(job)), found_on(requests(*numbers(job)), node_with(A100, 4)))


def test_the_plan_is_for_the_fewest_and_names_the_others(make_job, capsys):
    show(make_job(**ELASTIC))
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 workers (the fewest of ray_num_workers" in printed
    assert "2 per worker x 12 passes x 2 workers = 48 sequences" in printed
    assert "with 8 workers: the same in 3 passes, at most" in printed
    assert "ray_num_workers [2, 8]" in printed


def test_a_job_with_a_range_of_workers_is_written_and_read_unchanged(make_job, tmp_path):
    job = make_job(**ELASTIC)
    (tmp_path / "again.yaml").write_text(json.dumps(job.given()))
    assert load(tmp_path / "again.yaml").flat() == job.flat()


def test_lost_and_joined_nodes_are_reported_with_the_remaining_room():
    nodes = {node.node_id: node for node in on_gpus(2, 2)}
    sentences: list[str] = []
    watch = NodeWatch(requests(4, 8), nodes, sentences.append)
    watch.compare({"id1": nodes["id1"]})
    watch.compare(nodes)
    assert sentences == [
        "node 10.0.0.2 was lost; the remaining nodes fit 2 workers, the run waits for 4",
        "node 10.0.0.2 has joined; there is room for 4 workers",
    ]


def test_a_start_names_its_nodes_and_those_that_were_lost():
    event = describe_start({"b": "10.0.0.2"}, {"b": "10.0.0.2", "c": "10.0.0.3"}, alive={"a", "b"})
    assert event["message"] == "workers on node 10.0.0.2; lost: node 10.0.0.3"
    assert (event["nodes"], event["lost"]) == ("10.0.0.2", "10.0.0.3")


def test_gloo_takes_the_interface_that_has_the_nodes_address():
    addresses = {"lo": ["127.0.0.1", "::1"], "eth0": ["192.0.2.2"], "ib0": ["10.0.0.1"]}
    assert find_interface("10.0.0.1", addresses) == "ib0"
    assert find_interface("127.0.0.2", addresses) == ""


def test_a_worker_that_does_not_see_rank_0s_files_is_refused(tmp_path, monkeypatch):
    """Its shards would stay on its own disk, and no checkpoint would be complete."""
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.2")
    storage = Storage.at(str(tmp_path))
    run = Run(torch.device("cpu"), storage, "out_001", SilentReporter())
    with pytest.raises(JobError, match=r"not seen by rank 0 on node 10\.0\.0\.2"):
        require_shared_storage(run, patience_s=0.0)
    storage.folder("out_001").make()
    storage.folder("out_001").write_json("starts.json", {"starts": 1})
    require_shared_storage(run)
