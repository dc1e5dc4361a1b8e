"""The plan for many workers: its bytes are those that really move, its limits those it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_saver import save

from raytrain_adv.config.job import JobConfig
from raytrain_adv.driver import scale
from raytrain_adv.transforms.apply import prepare_all
from raytrain_adv.worker import parallel, weights
from raytrain_adv.worker.checkpoint import training_state
from raytrain_adv.worker.model import build
from raytrain_adv.worker.optim import build_optimizer
from raytrain_adv.worker.staging import staged
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
    "hsdp": {"bf16": False, "fsdp_shard_size": 2},
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
            if kind != "all_reduce" or size > SMALL:
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
    prepare_all(job, model)
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
    save(staged(training_state(model, optimizer)), checkpoint_id=path)
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


@pytest.mark.parametrize("ranks", [2, 4])
def test_bytes_are_those_of_real_collectives_and_checkpoints(tmp_path: Path, ranks: int) -> None:
    """On 4 ranks as pairs that hold a copy each, too."""
    jobs = jobs_in(tmp_path, ("full", "lora", "fp8") if ranks == 2 else (*JOBS,))
    found = run_ranks(all_steps, ranks, tmp_path, jobs, str(tmp_path))[0]
    for name, job in jobs.items():
        model = build(job)
        prepare_all(job, model)
        moved = scale.traffic(model, job, ranks)
        seen, stored = found[name]
        gathers, reductions = seen["all_gather"], seen["reduce_scatter"]
        assert (sum(gathers), len(gathers)) == (moved.gathered, moved.gathers), name
        assert (sum(reductions), len(reductions)) == (moved.reduced, moved.reductions), name
        between = seen.get("all_reduce", [])
        assert (sum(between), len(between)) == (moved.all_reduced, moved.all_reductions), name
        assert scale.saved_bytes(model, job, ranks)[0] == pytest.approx(stored, rel=0.03), name
