"""The documentation's table of messages: each is raised in its situation, on driver and worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytrain_adv import hardware
from raytrain_adv.driver.cluster.nodes import Node, Placement
from raytrain_adv.driver.preflight import verdicts
from raytrain_adv.driver.preflight.probe import Reading
from raytrain_adv.errors import ClusterError, JobError, TrainingError
from raytrain_adv.export.model_folder import export_model
from raytrain_adv.kernels import fetch
from raytrain_adv.kernels.source import Wanted
from raytrain_adv.run.run import local_run
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.worker.train import train
from tests.readings import A100, H100, node_with, without

ROOT = Path(__file__).parents[2]
FP8 = {"fp8": True, "bf16": True}
QAT = {"enable_qat": True, "qat_weight_dtype": "int2"}
KERNELS = {"use_kernels": True, "kernel_name": "jobs/kernels/llama_layers"}
ROWS = dict(
    (cells[0].strip(), cells[2].strip())
    for cells in (
        line.strip("|").split("|")
        for line in (ROOT / "docs" / "troubleshooting.md")
        .read_text()
        .partition("## Messages")[2]
        .partition("## Where to look")[0]
        .splitlines()
        if line.startswith("|") and "---" not in line and "| message" not in line
    )
)
"""Message -> what helps, as docs/troubleshooting.md has them."""
NODES: dict[str, tuple[Reading, dict[str, Any]]] = {
    "FP8 requires PyTorch 2.11+": (node_with(H100, torch="2.6.0"), FP8),
    "FP8 requires Hopper architecture": (node_with(A100), FP8),
    "torchao not available": (without("torchao", node_with(H100)), FP8),
    "kernels package not available": (without("kernels", node_with(H100)), KERNELS),
}
BROUGHT_ABOUT = {
    *NODES,
    "kernel not found",
    "the loss has risen",
    "The loss or the gradient norm is not finite",
}
"""Messages that the tests below look for."""


def holds(message: str, what: str, fix: str) -> None:
    """Check a message of the table against an error's text."""
    assert message in what, what
    assert ROWS[message] in fix, fix
    assert message in BROUGHT_ABOUT


@pytest.mark.parametrize("message", NODES)
def test_the_driver_reports_it_of_a_node_as_probed(
    make_job: Callable[..., Any], message: str
) -> None:
    reading, keys = NODES[message]
    placement = Placement(1, {"GPU": 1.0}, True, "")
    node = Node("10.0.0.7", {"GPU": 2.0, "CPU": 8.0}, node_id="id7")
    verdict = verdicts.judge(placement, Transforms(make_job(**keys)), node, reading)
    holds(message, verdict.refusal, verdict.fix)
    assert "10.0.0.7" in verdict.found


def test_qat_without_torchao_is_refused_too(make_job: Callable[..., Any]) -> None:
    reading = without("torchao", node_with(H100))
    (facts, *_) = reading.facts("10.0.0.7", True)
    with pytest.raises(ClusterError) as caught:
        Transforms(make_job(**QAT)).check(facts)
    holds("torchao not available", caught.value.what, caught.value.fix)


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("FP8 requires Hopper architecture", {}),
        ("FP8 requires Hopper architecture", {"compute_capability": (8, 9)}),
        ("FP8 requires PyTorch 2.11+", {"torch": "2.6.0+cu124"}),
    ],
)
def test_a_worker_reports_it_of_itself(
    make_job: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    message: str,
    changed: dict[str, Any],
) -> None:
    """On this machine without a GPU as it is; with what another one would read in its place."""
    facts = hardware.detect("cpu")
    if changed:
        changed = dict(changed)
        versions = {**facts.versions, "torch": changed.pop("torch", facts.versions["torch"])}
        facts = replace(facts, device_type="cuda", versions=versions, **changed)
        monkeypatch.setattr(hardware, "detect", lambda device=None: facts)
    job = make_job(**FP8)
    with pytest.raises(ClusterError) as caught:
        train(job, local_run(job), export_model)
    holds(message, caught.value.what, caught.value.fix)


WORKER = """
import json, sys
from raytrain_adv.config import load
from raytrain_adv.errors import RaytrainAdvError
from raytrain_adv.export.model_folder import export_model
from raytrain_adv.run.run import local_run
from raytrain_adv.worker.train import train

for path in sys.argv[1:]:
    job = load(path)
    try:
        train(job, local_run(job), export_model)
    except RaytrainAdvError as error:
        print("REFUSED " + json.dumps([error.what, error.found, error.fix]))
"""


def test_a_worker_on_which_the_packages_are_not_installed_reports_it(
    job_file: Callable[..., Path], tmp_path: Path
) -> None:
    """A process whose packages are this environment's but for torchao and kernels."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(next(p for p in sys.path if p.endswith("site-packages"))).iterdir():
        name = entry.name.partition("-")[0].partition(".")[0]
        if name not in ("torchao", "kernels", "__pycache__") and entry.suffix != ".pth":
            (packages / entry.name).symlink_to(entry)
    allowed = {"fp8": True, "fp8_allow_cpu": True, "fp8_min_features": 16}
    jobs = [job_file(f"{n}.yaml", **keys) for n, keys in enumerate((allowed, QAT, KERNELS))]
    answer = subprocess.run(
        [sys.executable, "-S", "-c", WORKER, *map(str, jobs)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{packages}"},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in answer.stdout.splitlines() if line.startswith("REFUSED ")]
    assert len(lines) == 3, answer.stdout + answer.stderr
    fp8, qat, kernels = (json.loads(line.removeprefix("REFUSED ")) for line in lines)
    for what, found, fix in (fp8, qat):
        holds("torchao not available", what, fix)
        assert "torchao is not installed" in found
    holds("kernels package not available", kernels[0], kernels[2])


def test_torchao_that_is_installed_and_broken_is_not_available(
    make_job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)  # what Python does for a failed import
    job = make_job(fp8=True, fp8_allow_cpu=True)
    with pytest.raises(ClusterError, match="FP8 needs torchao: torchao not available") as caught:
        Transforms(job).check(hardware.detect("cpu"))
    assert "cannot be imported" in caught.value.found and "set fp8: false" in caught.value.fix


def test_a_kernel_that_is_not_there_is_not_found() -> None:
    """In a folder; tests/unit/kernels/test_fetch.py asks a Hub."""
    with pytest.raises(JobError) as caught:
        fetch.find(Wanted("./no-such-kernel", is_local=True), fetch.Place(target=None))
    holds("kernel not found", caught.value.what, caught.value.fix)


def told(folder: Path) -> list[str]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["message"] for row in rows if row.get("kind") == "event"]


def test_a_loss_that_rises_after_the_switch_points_to_the_delay(
    make_job: Callable[..., Any], tmp_path: Path
) -> None:
    keys = {
        **QAT,
        "qat_group_size": None,
        "qat_quantize_embedding": True,
        "fake_quant_after_n_steps": 6,
    }
    rises = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 400, "learning_rate": 5.0}
    # Later windows of ten losses are judged too: the first is noisy, as the rate is high.
    job = make_job(**keys, **rises, max_steps=38, export_model=False)
    train(job, local_run(job), export_model)
    (line,) = [line for line in told(tmp_path / "out") if "the loss has risen" in line]
    holds("the loss has risen", line, line)
    assert "with QAT" in line and "(now 6)" in line


@pytest.mark.parametrize("delay", [None, 2])
def test_a_loss_that_is_not_finite_under_qat_points_to_the_delay(
    make_job: Callable[..., Any], delay: int | None
) -> None:
    keys = {**QAT, "fake_quant_after_n_steps": delay, "max_grad_norm": 0.0, "max_steps": 8}
    job = make_job(**keys, learning_rate=1.0e30, optim="adamw_torch", lr_scheduler_type="constant")
    with pytest.raises(TrainingError) as caught:
        train(job, local_run(job), export_model)
    message = "The loss or the gradient norm is not finite"
    if delay is None:
        holds(message, caught.value.what, caught.value.fix)
    else:  # it was not finite before fake quantization began: that is not its fault
        assert message in caught.value.what
        assert "fake_quant_after_n_steps" not in caught.value.fix


def test_every_row_of_the_table_was_brought_about() -> None:
    assert set(ROWS) == BROUGHT_ABOUT
