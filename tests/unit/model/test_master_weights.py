"""One worker computes in bf16 on float32 parameters as FSDP2 does, to the bit."""

from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from raytrain_adv.config import JobConfig
from raytrain_adv.dtensor import local_part, plain_name
from raytrain_adv.model import parallel
from raytrain_adv.model.build import build
from raytrain_adv.model.master_weights import cast_in_forward
from raytrain_adv.model.weights import load_pretrained, materialize
from tests.ranks import run_ranks
from tests.tiny_models import job_for, write_checkpoint

CPU = torch.device("cpu")


def trained(job: JobConfig) -> tuple[PreTrainedModel, list[dict[str, torch.Tensor]]]:
    """Return a model after two passes, and its loss and gradients after each."""
    model = build(job)
    parallel.shard(model, job, parallel.build_mesh(job, CPU))
    materialize(model, CPU)
    load_pretrained(model, job, CPU)
    tokens, found = torch.arange(32).reshape(2, 16), []
    for _ in range(2):  # the second adds to the gradients of the first
        loss = model(input_ids=tokens, use_cache=False).logits.float().square().mean()
        loss.backward()
        gradients = {plain_name(n): local_part(p.grad).clone() for n, p in model.named_parameters()}
        found.append({"loss": loss.detach(), **gradients})
    return model, found


def _compare(folder: Path) -> dict[str, str]:
    answers = {}
    for kind in ("llama-tied", "mixtral"):
        for mode in ("none", "full", "selective"):
            keys = {"bf16": True, "gradient_checkpointing": mode}
            job = job_for(folder / kind, folder, **keys)
            model, ours = trained(job)
            plain, parallel.needs_fsdp = parallel.needs_fsdp, lambda *_: True
            other, theirs = trained(job)
            parallel.needs_fsdp = plain
            assert isinstance(other, FSDPModule) and not isinstance(model, FSDPModule)
            same = all(
                a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
                for a, b in zip(ours, theirs, strict=True)
            )
            dtypes = {p.dtype for p in model.parameters()}
            answers[f"{kind} {mode}"] = f"{same} {dtypes}"
    assert dist.get_world_size() == 1
    return answers


def test_losses_and_gradients_are_those_of_fsdp2(tmp_path: Path) -> None:
    for kind in ("llama-tied", "mixtral"):
        write_checkpoint(kind, tmp_path / kind)
    (answers,) = run_ranks(_compare, 1, tmp_path, tmp_path)
    assert set(answers.values()) == {"True {torch.float32}"}, answers


def test_a_process_alone_computes_in_bf16_as_one_of_a_group_does(tmp_path: Path) -> None:
    write_checkpoint("llama-tied", tmp_path / "llama-tied")
    for keys in ({"bf16": True}, {"pure_bf16": True}):
        job = job_for(tmp_path / "llama-tied", tmp_path, **keys)
        (expected,) = run_ranks(_passes, 1, tmp_path, job)
        for ours, theirs in zip(trained(job)[1], expected, strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours), keys


def _passes(job: JobConfig) -> list[dict[str, torch.Tensor]]:
    assert dist.is_initialized()
    return trained(job)[1]


def _compile(folder: Path) -> dict[str, tuple[int, int, bool]]:
    """Return graph breaks, graphs and whether numbers are the eager ones, of each mode."""
    plain: Any = nn.Module.compile
    nn.Module.compile = partialmethod(plain, backend="aot_eager")  # type: ignore[method-assign]
    found = {}
    for mode in ("none", "full", "selective"):
        keys = {"bf16": True, "gradient_checkpointing": mode, "loss_kernel": "torch"}
        _, eager = trained(job_for(folder / "llama", folder, **keys))
        torch._dynamo.reset()
        counters.clear()
        _, ours = trained(job_for(folder / "llama", folder, torch_compile=True, **keys))
        same = all(torch.equal(a[n], b[n]) for a, b in zip(ours, eager, strict=True) for n in a)
        breaks, graphs = counters["graph_break"].total(), counters["stats"]["unique_graphs"]
        found[mode] = breaks, graphs, same
    return found


def test_compiled_layers_are_whole_graphs_with_the_same_numbers(tmp_path: Path) -> None:
    write_checkpoint("llama", tmp_path / "llama")
    (found,) = run_ranks(_compile, 1, tmp_path, tmp_path)
    assert found == dict.fromkeys(("none", "full", "selective"), (0, 1, True))


def test_parameters_are_back_after_a_pass_that_fails() -> None:
    class Fails(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert self.weight.dtype == torch.bfloat16
            raise ValueError("in the middle")

    module = Fails(4, 4)
    weight = module.weight
    cast_in_forward(module, torch.bfloat16, lambda p: p is module.bias)
    with pytest.raises(ValueError, match="in the middle"):
        module(torch.zeros(1, 4))
    assert module.weight is weight and weight.dtype == torch.float32
