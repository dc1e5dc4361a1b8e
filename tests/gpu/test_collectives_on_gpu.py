"""FSDP2 by copies between two GPUs: NCCL's numbers to the bit, through steps and evaluations."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from raytrain_adv.config.job import JobConfig
from raytrain_adv.dtensor import gather, reshard
from raytrain_adv.model import parallel, weights
from raytrain_adv.model.build import build
from raytrain_adv.ops.peer_copies import held_gib
from raytrain_adv.run.run import local_run
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.worker.optim import build_optimizer
from raytrain_adv.worker.trials.collectives import choose
from tests.ranks import run_ranks
from tests.tiny_models import job_for, write_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
SIZES = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 1001}
JOBS: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": True},
    "pure_bf16": {"pure_bf16": True},
    "kept": {"pure_bf16": True, "fsdp_reshard_after_forward": False},
    "recomputed": {"bf16": True, "gradient_checkpointing": "full"},
    "lora": {"bf16": True, "finetuning_type": "lora", "lora_rank": 6, "lora_target": "all"},
    "qlora": {"bf16": True, "finetuning_type": "lora", "lora_rank": 6, "quantization_bit": 4},
    "fp8": {"pure_bf16": True, "fp8": True, "fp8_min_features": 16}
    | {"fp8_enable_fsdp_float8_all_gather": True},
    "float32": {"bf16": False},
}


def steps_of(job: JobConfig) -> tuple[list[float], dict[str, Any], bool]:
    """Return losses of steps with an evaluation between, the weights, whether copies were used."""
    torch.manual_seed(0)
    run = local_run(job)
    mesh = parallel.build_mesh(job, run.device)
    model = build(job)
    transforms = Transforms(job)
    plans = transforms.prepare(model)
    copies, _ = choose(job, run, mesh)
    parallel.shard(model, job, mesh, copies)
    weights.materialize(model, run.device)
    weights.load_pretrained(model, job, run.device)
    transforms.initialize(model, plans, 0)
    optimizer, losses = build_optimizer(model, job), []
    transforms.after_step(model)
    for step in range(6):
        numbers = torch.Generator().manual_seed(2 * step + run.rank)
        ids = torch.randint(0, 1000, (2, 64), generator=numbers).to(run.device)
        if step % 2:
            with torch.no_grad():
                losses.append(model(input_ids=ids, labels=ids, use_cache=False).loss.item())
            reshard(model)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        transforms.after_step(model)
        losses.append(loss.item())
    whole = {n: gather(p).cpu() for n, p in model.named_parameters() if p.requires_grad}
    return losses, whole, copies


def both(jobs: list[JobConfig], port: int) -> list[Any]:
    dist.destroy_process_group()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [*map(steps_of, jobs), held_gib()]


@pytest.mark.parametrize("name", JOBS)
def test_copies_give_the_numbers_of_nccl(name: str, tmp_path: Path) -> None:
    tied = "llama-tied" if name == "recomputed" else "llama"
    model = write_checkpoint(tied, tmp_path / "model", **SIZES)
    keys = {"disable_gradient_checkpointing": name != "recomputed", **JOBS[name]}
    jobs = [
        job_for(model, tmp_path / way, fsdp_collectives=way, **keys) for way in ("nccl", "copies")
    ]
    for found in run_ranks(both, 2, tmp_path, jobs, 29733 + list(JOBS).index(name)):
        (losses, whole, used), (own_losses, own, own_used), held = found
        assert (used, own_used) == (False, True) and held > 0
        assert losses == own_losses
        assert all(torch.equal(whole[n], own[n]) for n in whole) and len(whole) == len(own)
