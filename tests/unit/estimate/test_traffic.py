"""The plan for many workers: its bytes are those that really move."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_saver import save

from raytrain_adv.checkpoint.save import training_state
from raytrain_adv.checkpoint.staging import HostMemory, stage
from raytrain_adv.config.job import JobConfig
from raytrain_adv.driver.plan.plan import show
from raytrain_adv.estimate import limits as scale_limits
from raytrain_adv.estimate import traffic
from raytrain_adv.estimate.assumptions import Assumptions, assumptions
from raytrain_adv.estimate.flops import training_flops_per_token
from raytrain_adv.estimate.limits import Work
from raytrain_adv.model import parallel, weights
from raytrain_adv.model.build import build
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.fp8 import Fp8
from raytrain_adv.transforms.qat import Qat
from raytrain_adv.worker.optim import build_optimizer
from tests.conftest import ROOT
from tests.ranks import run_ranks
from tests.tiny_models import job_for, write_checkpoint

CPU = torch.device("cpu")
SIZES = {"hidden_size": 128, "intermediate_size": 200, "vocab_size": 300}
JOBS: dict[str, dict[str, Any]] = {
    "full": {"bf16": False},
    "bf16": {"bf16": True},
    "accumulated": {"bf16": False, "gradient_accumulation_steps": 2},
    "kept": {"bf16": False, "fsdp_reshard_after_forward": False},
    "recomputed": {"bf16": False, "gradient_checkpointing": "full"},
    "lora": {"bf16": True, "finetuning_type": "lora", "lora_rank": 6},
    "fp8": {"pure_bf16": True, "fp8": True, "fp8_min_features": 16, "fp8_allow_cpu": True}
    | {"fp8_enable_fsdp_float8_all_gather": True},
    "half": {"bf16": True, "fsdp_reduce_dtype": "bfloat16"},
    "hsdp": {"bf16": False, "fsdp_shard_size": 2, "ray_num_workers": 4},
}
COLLECTIVES = ("all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor")
COLLECTIVES += ("reduce_scatter_single", "all_reduce")
SMALL = 256
"""Bytes of an all-reduce that is a scalar or a list of scales, not gradients."""


def counted(names: dict[str, list[int]]) -> Callable[[], None]:
    """Count the bytes of the collectives that FSDP2 calls from now on; return what ends it."""
    originals = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}

    def counting(name: str) -> Callable[..., Any]:
        kind = name.split("_")[0] + "_" + name.split("_")[1]

        def call(*args: Any, **options: Any) -> Any:
            tensors = [t for t in (*args, *options.values()) if isinstance(t, torch.Tensor)]
            size = max(t.numel() * t.element_size() for t in tensors)
            if kind != "all_reduce" or size >= SMALL:
                names.setdefault(kind, []).append(size)
            return originals[name](*args, **options)

        return call

    for name in originals:
        setattr(dist, name, counting(name))

    def end() -> None:
        for name, original in originals.items():
            setattr(dist, name, original)

    return end


def step_of(job: JobConfig, folder: str) -> tuple[dict[str, list[int]], int]:
    """Train a step on this rank; return its collectives' bytes, and those of a checkpoint."""
    model = build(job)
    Transforms(job).prepare(model)
    parallel.shard(model, job, parallel.build_mesh(job, CPU))
    weights.materialize(model, CPU)
    weights.init_from_scratch(model, job, CPU)
    optimizer = build_optimizer(model, job)
    seen: dict[str, list[int]] = {}
    end = counted(seen)
    for _ in range(job.train.gradient_accumulation_steps):
        ids = torch.arange(32)[None]
        model(input_ids=ids, use_cache=False).logits.float().sum().backward()
    end()
    optimizer.step()
    path = Path(folder, f"{job.output.output_dir.replace('/', '_')}_{dist.get_world_size()}")
    save(stage(training_state(model, optimizer), HostMemory(print)), checkpoint_id=path)
    dist.barrier()
    return seen, sum(file.stat().st_size for file in path.iterdir())


def all_steps(jobs: dict[str, JobConfig], folder: str) -> dict[str, Any]:
    return {name: step_of(job, folder) for name, job in jobs.items()}


def jobs_in(folder: Path, names: tuple[str, ...]) -> dict[str, JobConfig]:
    model = write_checkpoint("llama", folder / "model", **SIZES)
    return {
        name: job_for(
            model,
            folder / name,
            **{"disable_gradient_checkpointing": name != "recomputed", **JOBS[name]},
        )
        for name in names
    }


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_bytes_are_those_of_real_collectives_and_checkpoints(tmp_path: Path, ranks: int) -> None:
    """On 4 ranks also as pairs with a copy each."""
    jobs = jobs_in(tmp_path, ("full", "lora", "fp8", "half") if ranks == 2 else (*JOBS,))
    found = run_ranks(all_steps, ranks, tmp_path, jobs, str(tmp_path))[0]
    for name, job in jobs.items():
        model = build(job)
        Transforms(job).prepare(model)
        moved = traffic.traffic(model, job, ranks)
        seen, stored = found[name]
        gathers, reductions = seen["all_gather"], seen["reduce_scatter"]
        assert (sum(gathers), len(gathers)) == (moved.gathered, moved.gathers), name
        assert (sum(reductions), len(reductions)) == (moved.reduced, moved.reductions), name
        between = seen.get("all_reduce", [])
        assert (sum(between), len(between)) == (moved.all_reduced, moved.all_reductions), name
        assert traffic.saved_bytes(model, job, ranks)[0] == pytest.approx(stored, rel=0.03), name


def results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / f"jobs/benchmarks/results/{name}.json").read_text())
    return found


def work(folder: Path, **keys: Any) -> Work:
    values = {"pure_bf16": True, "torch_compile": True, "train_from_scratch": True}
    values |= {"disable_gradient_checkpointing": True, "per_device_train_batch_size": 1, **keys}
    job = job_for(ROOT / "jobs/models/llama3-8b-shape", folder, **values)
    model = build(job)
    flops = training_flops_per_token(model, 8192)
    return Work(model, job, flops, 8192, 10**6, 100, "NVIDIA H100 80GB HBM3")


def test_speeds_are_those_that_were_measured() -> None:
    for mode, run in results("llama3_8b_bf16")["gradient_checkpointing"].items():
        assert traffic.MFU[mode] == pytest.approx(run["mfu_bf16"], abs=1e-3)
    runs = results("llama3_8b_fp8")["runs"]
    faster = runs["bf16"]["step_seconds"] / runs["fp8"]["step_seconds"]
    assert faster == pytest.approx(Fp8.speed, abs=0.005)
    runs = results("llama3_8b_qat")["runs"]
    slower = runs["bf16"]["step_seconds"] / runs["qat_int4"]["step_seconds"]
    assert slower == pytest.approx(Qat.speed, abs=0.005)


def test_a_step_measured_on_two_gpus_lies_between_the_bounds(tmp_path: Path) -> None:
    for name, keys in {"bf16": {}, "fp8": {"fp8": True}}.items():
        t = work(tmp_path / name, **keys).at(2, Assumptions()).times
        assert t.compute is not None
        measured = results("fp8_two_gpus")["runs"][name]["step_seconds"]
        assert max(t.compute, t.communication) <= measured <= t.compute + t.communication, name


def test_gathering_in_fp8_is_worth_it_below_a_bandwidth(tmp_path: Path) -> None:
    """On two H200s it was not, over NVLink (jobs/benchmarks/results/fsdp_collectives.json)."""
    fp8 = {"fp8": True, "fp8_enable_fsdp_float8_all_gather": True}
    eight = work(tmp_path, **fp8)
    assert eight.gain_of_gathering(2) == "", "as long as no transform has prepared the model"
    Transforms(eight.job).prepare(eight.model)
    text = eight.gain_of_gathering(8)
    assert text.startswith("16.1 GB are gathered a step instead of 30.0") and "NVLink" in text
    gains = [int(gain) for gain in re.findall(r"(\d+)% at", text)]
    assert gains[0] > 10 and gains[-1] == 0
    needed = re.search(r"fewer than (\d+) GB/s", text)
    assert needed is not None and 50 < int(needed[1]) < 150
    runs = results("fsdp_collectives")["two_gpus"]
    assert runs["fp8 all-gather"]["ms"] > runs["fp8"]["ms"]


def test_the_gather_of_the_8b_shape_is_the_one_counted_elsewhere(tmp_path: Path) -> None:
    eight = work(tmp_path)
    moved = traffic.traffic(eight.model, eight.job, 8)
    counted = results("fp8_all_gather")
    # It was counted while embedding and head were gathered in both directions.
    ends = sum(
        p.numel() * 2 for end in parallel.ends(eight.model, eight.job) for p in end.parameters()
    )
    assert (moved.gathered + ends) / 1e9 == pytest.approx(
        counted["gathered_gb_per_pass_of_the_8b_shape"]["bf16"], rel=1e-3
    )
    assert moved.reduced / 1e9 == pytest.approx(
        counted["reduced_gb_per_step_of_the_8b_shape"], rel=1e-3
    )


def test_rows_are_padded_to_all_workers(tmp_path: Path) -> None:
    job = job_for(write_checkpoint("llama", tmp_path / "model"), tmp_path)
    model = build(job)
    few, many = (sum(unit.gathered for unit in traffic.units(model, job, n)) for n in (2, 512))
    assert many > 5 * few


def test_a_copy_on_each_node_leaves_the_network_the_gradients_alone(tmp_path: Path) -> None:
    flat = work(tmp_path / "flat").at(512, Assumptions())
    hsdp = work(tmp_path / "hsdp", fsdp_shard_size=8, ray_num_workers=8).at(512, Assumptions())
    assert hsdp.times.latency < flat.times.latency / 3
    shard = hsdp.moved.reduced / 8
    assert hsdp.moved.all_reduced == pytest.approx(shard)
    assert hsdp.moved.received == pytest.approx(
        7 / 8 * (hsdp.moved.gathered + hsdp.moved.reduced) + 2 * 63 / 64 * shard
    )


def test_the_first_limit_is_named_with_its_workers_and_a_fix(tmp_path: Path) -> None:
    limits = work(tmp_path / "slow").limits(512, Assumptions(network_gb_s=20))
    assert [limit.workers for limit in limits] == sorted(limit.workers for limit in limits)
    assert "bytes over the network" in limits[0].what
    assert "fsdp_shard_size: 8" in limits[0].fix
    job = work(tmp_path / "slow")
    assert job.at(limits[0].workers, Assumptions(network_gb_s=20)).times.least_exposed
    before = job.at(limits[0].workers // 2, Assumptions(network_gb_s=20)).times
    assert before.least_exposed == 0


def test_slow_storage_is_the_first_limit_if_a_save_outlasts_its_interval(
    tmp_path: Path,
) -> None:
    first = work(tmp_path).limits(512, Assumptions(storage_gb_s=0.1))[0]
    assert "is not written" in first.what
    assert "raise save_steps" in first.fix


def test_the_head_follows_the_measured_lines() -> None:
    lines = results("start_up")["on_the_head"]
    for role, (base, each) in scale_limits.HEAD_FILES.items():
        found = lines[role]["open_files"]
        assert (base, each) == pytest.approx((found["base"], found["per_worker"]), abs=0.1)
    for line, name in (
        (scale_limits.HEAD_CPU_S, "cpu_s"),
        (scale_limits.HEAD_RSS_MIB, "rss_mib"),
    ):
        for place, part in enumerate(("base", "per_worker")):
            total = sum(lines[role][name][part] for role in ("gcs_server", "controller"))
            assert line[place] == pytest.approx(total, rel=0.02, abs=0.1)


def test_only_a_plan_for_more_than_one_node_shows_traffic(
    make_job: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    show(make_job(use_cpu=True), num_workers=8)
    assert "computed, not measured" not in capsys.readouterr().out
    show(make_job(use_cpu=True), num_workers=16)
    text = capsys.readouterr().out
    assert "16 workers on 2 nodes: computed, not measured" in text
    assert "not computed for CPUs" in text
    own = [line for line in text.splitlines() if "/" not in line]  # paths are as long as they are
    assert max(map(len, own)) <= 100
    show(make_job(), num_workers=16, assumed=Assumptions(gpus_per_node=4))
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "16 workers on 4 nodes" in text
    assert "gpus_per_node 4" in text
    assert "exposed communication" in text


def test_assumptions_are_read_from_the_command_line() -> None:
    read, problems = assumptions(["network_gb_s=80", "open_files=9"])
    assert read == Assumptions(network_gb_s=80, open_files=9) and not problems


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("network_gbs=3", "write network_gb_s"),
        ("storage_gb_s=fast", "it takes a number above 0"),
        ("storage_gb_s=0", "it takes a number above 0"),
        ("gpus_per_node=2.5", "a whole number"),
        ("", "there is no such assumption"),
    ],
)
def test_what_cannot_be_assumed_is_refused(wrong: str, message: str) -> None:
    _, problems = assumptions([wrong])
    assert message in problems[0].found() + problems[0].fix
