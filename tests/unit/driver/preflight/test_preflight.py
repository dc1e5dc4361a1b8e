"""Verdicts on nodes, from readings given as data."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time

import pytest

from raytrain_adv.config.job import JobConfig
from raytrain_adv.driver.cluster.nodes import Node, Placement
from raytrain_adv.driver.plan.data import measure
from raytrain_adv.driver.plan.plan import RunPlan, resolve
from raytrain_adv.driver.preflight import memory, probe, versions
from raytrain_adv.driver.preflight import table as preflight_table
from raytrain_adv.driver.preflight import verdicts as preflight
from raytrain_adv.driver.preflight.probe import Reading, declared_reading
from raytrain_adv.driver.preflight.verdicts import Preflight, Verdict
from raytrain_adv.errors import ClusterError
from raytrain_adv.estimate.advice import Advice
from raytrain_adv.report.html import render
from raytrain_adv.report.parts import PreflightReport
from raytrain_adv.report.record import RunReport
from raytrain_adv.tables import WIDTH
from raytrain_adv.transforms.fp8 import Fp8
from tests.readings import A100, H100, H200, node_with, without

Answer = Reading | str | None


def requests(num_workers: int = 2, gpus: float = 1.0) -> Placement:
    bundle = {"GPU": gpus} if gpus else {"CPU": 1.0}
    return Placement(num_workers, bundle, gpus > 0, "")


def a_node(name: str, answer: Answer, gpus: float | None = None) -> Node:
    if gpus is None:
        gpus = len(answer.gpus) if isinstance(answer, Reading) else 2.0
    return Node(f"10.0.0.{name}", {"GPU": gpus, "CPU": 8.0}, node_id=f"id{name}")


def found_on(placement: Placement, *answers: Answer, rules=None) -> Preflight:
    rules = [Fp8(fp8=True)] if rules is None else rules
    verdicts = [
        preflight.judge(placement, rules, a_node(str(number), answer), answer)
        for number, answer in enumerate(answers, 1)
    ]
    return preflight.compare_versions(verdicts, placement.use_gpu)


@pytest.fixture
def job(make_job) -> JobConfig:
    return make_job(ray_num_workers=2)


@pytest.fixture
def auto(make_job) -> JobConfig:
    return make_job(ray_num_workers="auto")


def test_a_mixed_cluster_is_used_on_nodes_that_meet_the_rules(job):
    placement = requests(2)
    found = found_on(placement, node_with(H100), node_with(A100), node_with())
    assert [v.accepted for v in found.verdicts] == [True, False, False]
    placed = preflight.place(job, placement, found)
    assert placed.num_workers == 2 and placed.avoided == ("id2",)
    assert placed.label_selector == {"ray.io/node-id": "!in(id2)"}


def test_the_table_names_excluded_nodes_and_the_reason():
    table = preflight_table.render(
        found_on(requests(2), node_with(H100), node_with(A100), node_with())
    )
    assert max(map(len, table.splitlines())) <= WIDTH
    assert "2 x H100 80GB HBM3" in table and "2 workers" in table
    assert "10.0.0.2 excluded: FP8 requires Hopper architecture" in table
    assert "has no room for a worker" in table


def test_nothing_is_avoided_if_every_node_qualifies(job):
    found = found_on(requests(2), node_with(H100), node_with(H200, gib=139))
    assert preflight.place(job, requests(2), found).label_selector is None


def test_too_few_nodes_are_refused_with_the_rule_and_the_numbers(job):
    found = found_on(requests(4), node_with(H100), node_with(A100))
    with pytest.raises(ClusterError) as error:
        preflight.place(job, requests(4), found)
    assert error.value.what.startswith("FP8 requires Hopper architecture")
    assert "requested: 4 workers" in error.value.found
    assert "there is room for 2" in error.value.found
    assert "10.0.0.2, 2 x NVIDIA A100-SXM4-80GB" in error.value.found
    assert "fp8: false" in error.value.fix and "ray_num_workers to 2" in error.value.fix


def test_auto_takes_the_gpus_that_qualify(auto):
    found = found_on(requests(6), node_with(H100), node_with(H100), node_with(A100))
    placed = preflight.place(auto, requests(6), found)
    assert placed.num_workers == 4 and placed.note.startswith("4 workers")


def test_auto_is_refused_if_no_node_qualifies(auto):
    found = found_on(requests(2), node_with(A100))
    with pytest.raises(ClusterError, match="FP8 requires Hopper"):
        preflight.place(auto, requests(2), found)


def test_a_node_that_does_not_answer_is_excluded_by_name(job):
    found = found_on(requests(2), node_with(H100), "NodeDiedError: the node has died")
    assert preflight.place(job, requests(2), found).avoided == ("id2",)
    with pytest.raises(ClusterError, match="did not answer") as error:
        preflight.place(job, requests(4), found)
    assert "10.0.0.2" in error.value.found and "has died" in error.value.found


@pytest.mark.parametrize("package", ["torch", "transformers", "raytrain_adv"])
def test_a_node_without_a_package_that_every_job_needs_is_excluded(job, package):
    found = found_on(requests(2), node_with(H100), without(package, node_with(H100)))
    verdict = found.verdicts[1]
    assert verdict.refusal == f"{package} not available" and "10.0.0.2" in verdict.found
    assert preflight.place(job, requests(2), found).avoided == ("id2",)


def test_a_rule_of_a_transform_sees_the_nodes_versions_not_the_drivers():
    found = found_on(requests(2), without("torchao", node_with(H100)))
    assert found.verdicts[0].refusal.endswith("torchao not available")


@pytest.mark.parametrize("package", ["torch", "torchao", "transformers"])
def test_nodes_that_differ_in_a_decisive_version_are_not_used_together(job, package):
    found = found_on(requests(4), node_with(H100), node_with(H100, **{package: "0.17.0"}), rules=[])
    with pytest.raises(ClusterError, match="Versions differ between the nodes") as error:
        preflight.place(job, requests(4), found)
    assert f"10.0.0.2: {package} 0.17.0" in error.value.found


def test_one_worker_runs_on_the_nodes_that_agree(make_job):
    odd, same = node_with(H100, torchao="0.17.0"), node_with(H100)
    found = found_on(requests(1), odd, same, same)
    placed = preflight.place(make_job(ray_num_workers=1), requests(1), found)
    assert placed.avoided == ("id1",)


def test_auto_does_not_skip_a_node_because_of_its_versions(auto):
    found = found_on(requests(4), node_with(H100), node_with(H100, torch="2.11.0"))
    with pytest.raises(ClusterError, match="Versions differ"):
        preflight.place(auto, requests(4), found)


def test_another_code_of_this_package_is_refused(job):
    other = dataclasses.replace(node_with(H100), code="0123456789ab")
    found = found_on(requests(2), other)
    assert found.verdicts[0].refusal == "raytrain_adv differs from the driver's"
    assert versions.CODE in found.verdicts[0].found


def test_other_versions_that_differ_are_a_warning():
    found = found_on(requests(4), node_with(H100), node_with(H100, triton="3.6.0"))
    assert all(v.accepted for v in found.verdicts)
    assert len(found.warnings) == 1 and found.warnings[0].startswith("triton differs")
    assert "3.6.0 on 10.0.0.2" in found.warnings[0]


def test_a_node_that_declares_gpus_and_has_none_is_excluded():
    node = a_node("1", node_with(), gpus=2.0)
    verdict = preflight.judge(requests(2), [], node, node_with())
    assert verdict.refusal == "A node declares GPUs, and none is found on it"
    assert "NVML Shared Library Not Found" in verdict.found


def test_a_node_that_is_being_drained_is_excluded():
    node = dataclasses.replace(a_node("1", node_with(H100)), is_draining=True)
    assert preflight.judge(requests(2), [], node, node_with(H100)).refusal.endswith("drained")


def test_mig_slices_do_not_train_together():
    gpu = dataclasses.replace(node_with(H100).gpus[0], name=f"{H100} MIG 1g.10gb", is_mig=True)
    sliced = dataclasses.replace(node_with(H100), gpus=(gpu, gpu))
    assert found_on(requests(2), sliced).verdicts[0].refusal.startswith("MIG slices")
    assert found_on(requests(1), sliced).verdicts[0].accepted


def test_a_cpu_job_is_judged_by_the_host():
    found = found_on(requests(2, gpus=0), node_with(H100), node_with(), rules=[])
    assert all(v.accepted for v in found.verdicts)
    assert found.facts is not None and found.facts.device_type == "cpu"


def test_the_smallest_gpu_counts():
    found = found_on(requests(4), node_with(H200, gib=139), node_with(H100))
    assert found.facts is not None and found.facts.device_name == H100


def test_nodes_not_started_yet_are_judged_by_what_they_declare(job):
    placement = requests(2)
    verdicts = []
    for kind in ("H100", "A100", "X900"):
        resources = {"GPU": 8.0, f"accelerator_type:{kind}": 1.0}
        node = Node(f"autoscaled {kind}", resources, count=2)
        reading = declared_reading(node.accelerator, 8)
        verdicts.append(preflight.judge(placement, [Fp8(fp8=True)], node, reading))
    assert [v.accepted for v in verdicts] == [True, False, True]
    placed = preflight.place(job, placement, preflight.compare_versions(verdicts, True))
    assert placed.label_selector == {"ray.io/accelerator-type": "!in(A100)"}
    assert "if it has what it declares" in preflight_table.render(
        Preflight(tuple(verdicts), True, 0)
    )


def test_sixty_four_readings_are_judged_in_a_second(auto):
    answers = [node_with(H100, num_gpus=8) for _ in range(60)] + [node_with(A100)] * 4
    start = time.thread_time()
    placement = requests(488)
    found = found_on(placement, *answers)
    placed = preflight.place(auto, placement, found)
    table = preflight_table.render(found)
    assert time.thread_time() - start < 1
    assert placed.num_workers == 480 and len(placed.avoided) == 4
    assert "10.0.0.1 and 59 more" in table and "10.0.0.61 and 3 more excluded" in table


def plan_on(job: JobConfig, found: Preflight) -> RunPlan:
    data = measure(job, lambda sentence: None)
    return resolve(job, world_size=2, data=data, facts=found.facts)


def needing(plan: RunPlan, gib: float) -> RunPlan:
    memory = dataclasses.replace(plan.memory, total=gib)
    advice = {
        name: (Advice({"gradient_checkpointing": "full"}, 60.0, "twice"),) for name in plan.advice
    }
    return dataclasses.replace(plan, memory=memory, advice=advice)


def test_a_job_that_will_not_fit_is_refused_with_what_to_change(job):
    found = found_on(requests(2), node_with(H100), rules=[])
    plan = plan_on(job, found)
    assert memory.refuse_too_large(job, plan, found) == []
    with pytest.raises(ClusterError, match="will not fit") as error:
        memory.refuse_too_large(job, needing(plan, 120.0), found)
    assert "120.0 GiB" in error.value.found and H100 in error.value.found
    assert "gradient_checkpointing: full" in error.value.fix
    assert "force: true" in error.value.fix


def test_force_starts_a_job_that_will_not_fit(make_job):
    job = make_job(ray_num_workers=2, force=True)
    found = found_on(requests(2), node_with(H100), rules=[])
    warnings = memory.refuse_too_large(job, needing(plan_on(job, found), 120.0), found)
    assert len(warnings) == 1 and "force: true" in warnings[0]


def test_memory_that_something_else_uses_is_a_warning(job):
    found = found_on(requests(2), node_with(H100, free_gib=10), rules=[])
    warnings = memory.refuse_too_large(job, needing(plan_on(job, found), 50.0), found)
    assert len(warnings) == 2 and "10.0 GiB are free of 79.0" in warnings[0]


def test_the_report_keeps_every_node():
    found = found_on(requests(2), node_with(H100), node_with(A100), "NodeDiedError: gone")
    report = preflight_table.report(found)
    assert PreflightReport.model_validate_json(report.model_dump_json()) == report
    used, refused, silent = report.nodes
    assert used.used and used.gpus == (H100, H100) and used.compute_capability == "9.0"
    assert not refused.used and refused.reason.startswith("FP8 requires Hopper")
    assert silent.found == "NodeDiedError: gone" and silent.gpus == ()
    page = render(RunReport(status="done", preflight=report), [])
    assert f"2 x {A100}" in page and "FP8 requires Hopper" in page


def test_a_worker_with_other_versions_than_were_accepted_stops():
    here = versions.decisive(node_with().versions)
    versions.require(here)
    versions.require({})
    with pytest.raises(ClusterError, match="other versions") as error:
        versions.require({**here, "torchao": "0.17.0"})
    assert "0.17.0 elsewhere" in error.value.found


def test_the_probe_reads_this_node():
    reading = probe.parse(probe.run_script(probe.SCRIPT.read_text(), ["torch", "ray"], 60))
    here = node_with().versions
    assert reading.versions["torch"] == here["torch"]
    assert reading.versions["raytrain_adv"] == here["raytrain_adv"]
    assert reading.code is not None and reading.host_memory_bytes > 2**30


def test_the_probe_reads_a_node_that_has_nothing_installed():
    command = [sys.executable, "-I", "-S", "-c", probe.SCRIPT.read_text(), "torch", "torchao"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    reading = probe.parse(printed)
    assert reading.versions["torch"] is None and reading.versions["raytrain_adv"] is None
    assert reading.gpus == () and reading.gpu_error


def test_a_probe_that_hangs_is_stopped():
    with pytest.raises(RuntimeError, match="was stopped after"):
        probe.run_script("import time; time.sleep(60)", [], 0.5)


def test_a_probe_that_fails_gives_the_reason():
    with pytest.raises(RuntimeError, match="ValueError: broken"):
        probe.run_script("raise ValueError('broken')", [], 600)


def test_the_probes_script_makes_no_cuda_context_and_imports_no_torch():
    code = probe.SCRIPT.read_text() + "\nassert not {'torch', 'ray'} & set(sys.modules)\n"
    subprocess.run([sys.executable, "-c", code, "torch"], check=True, capture_output=True)


def test_readings_survive_json():
    printed = json.dumps(
        {
            "gpus": [
                {
                    "name": H100,
                    "compute_capability": [9, 0],
                    "total_bytes": 85520809984,
                    "free_bytes": 85000000000,
                    "is_mig": False,
                }
            ],
            "gpu_error": "",
            "driver_version": "580.95.05",
            "cuda_version": "13.0",
            "num_cores": 8,
            "host_memory_bytes": 1,
            "versions": {"torch": "2.11.0"},
            "code": "abc",
        }
    )
    facts = probe.parse(f"noise\n{printed}\n").facts("10.0.0.1", use_gpu=True)
    assert facts[0].compute_capability == (9, 0) and facts[0].node_ip == "10.0.0.1"


def test_a_node_without_room_is_not_refused():
    verdict = Verdict(a_node("1", node_with()), node_with(), 0)
    assert not verdict.accepted and verdict.reason == preflight.NO_ROOM
