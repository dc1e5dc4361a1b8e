"""Reports of other trainers, replayed here: each is a run or a collective that went wrong there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from raytrain_adv.config import load
from raytrain_adv.dtensor import local_part
from raytrain_adv.errors import JobError
from raytrain_adv.export.folder import NewFolder
from raytrain_adv.export.model_folder import write_adapter
from raytrain_adv.model import parallel, weights
from raytrain_adv.model.adapter import load_adapter
from raytrain_adv.model.build import build
from raytrain_adv.ops.loss import linear_cross_entropy
from raytrain_adv.ops.loss.function import loss_function
from raytrain_adv.run.run import local_run
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.transforms.lora import is_adapter
from raytrain_adv.worker.install import install
from tests.ranks import run_ranks
from tests.workers import losses, run_workers

CPU = torch.device("cpu")


def change_config(folder: str, **changed: Any) -> None:
    path = Path(folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


def with_weights(folder: str) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)


def sharded(job: Any) -> Any:
    """Build the job's model over the ranks, with its features."""
    run = local_run(job)
    model = build(job)
    transforms = Transforms(job)
    plans = install(run, transforms, model, transforms.prepare(model, _facts(), 64))
    parallel.shard(model, job, parallel.build_mesh(job, CPU))
    weights.materialize(model, CPU, CPU)
    if job.model.train_from_scratch:
        weights.init_from_scratch(model, job, CPU)
    else:
        weights.load_pretrained(model, job, CPU)
    transforms.initialize(model, plans, 0)
    return model


def _facts() -> Any:
    from raytrain_adv import hardware

    return hardware.detect(CPU)


def test_a_packed_length_that_is_no_multiple_of_8_trains_as_unpacked_rows(job_file, keys, tmp_path):
    """LLaMA-Factory#10782: positions of 1234 tokens met inputs of 1240."""
    change_config(keys["model_name_or_path"], attention_dropout=0.0)
    one = {"max_steps": 1, "cutoff_len": 83, "max_samples": 12}
    packed = {**one, "packing": True, "neat_packing": True, "flash_attn": "sdpa"}
    packed["output_dir"] = str(tmp_path / "packed")
    sequences = _num_sequences(load(job_file("p.yaml", **packed)))
    assert sequences < 12
    run_workers(
        1,
        job_file("plain.yaml", **one, per_device_train_batch_size=12),
        job_file("p.yaml", **packed, per_device_train_batch_size=sequences),
    )
    assert losses(tmp_path / "packed")[1] == pytest.approx(losses(tmp_path / "out")[1], rel=2e-5)


def _num_sequences(job: Any) -> int:
    from raytrain_adv.data.prepare import prepare

    return len(prepare(job, lambda text: None).train)


def test_a_run_resumed_at_an_epochs_end_and_inside_the_next_skips_and_repeats_nothing(
    job_file, tmp_path
):
    """verl#7401 lost an epoch, accelerate#4071 trained epoch 0's order again."""
    epochs = {"max_steps": -1, "num_train_epochs": 3, "max_samples": 16}
    epochs |= {"save_strategy": "steps", "save_steps": 4, "per_device_train_batch_size": 4}
    whole = tmp_path / "whole"
    run_workers(1, job_file("whole.yaml", **epochs, output_dir=str(whole)))
    assert list(losses(whole)) == list(range(1, 13))  # 4 steps an epoch
    for every in (4, 3):  # at the end of epoch 1, and one step before it
        out = tmp_path / f"part-{every}"
        keys = {**epochs, "save_steps": every, "output_dir": str(out)}
        run_workers(1, job_file("first.yaml", **keys))
        for step in (8, 9, 12):
            (out / f"checkpoints/local/step_{step:08d}/manifest.json").unlink(missing_ok=True)
        if every == 3:
            (out / "checkpoints/local/step_00000006/manifest.json").unlink()
        again = {**keys, "resume_from_checkpoint": True}
        (figures,) = run_workers(1, job_file("again.yaml", **again))
        assert figures["resumed_from_step"] == every and figures["steps"] == 12
        assert losses(out) == losses(whole)


def test_a_head_that_is_tied_in_the_config_alone_stays_tied(job_file, keys, tmp_path):
    """AutoModel#2571: sharded from random weights, the head left the embedding at the first resumed
    step."""
    change_config(keys["model_name_or_path"], tie_word_embeddings=True)
    whole, out = tmp_path / "whole", tmp_path / "out"
    often = {"save_strategy": "steps", "save_steps": 3}
    run_workers(2, job_file("w.yaml", **often, output_dir=str(whole)), job_file("a.yaml", **often))
    (out / "checkpoints/local/step_00000006/manifest.json").unlink()
    run_workers(2, job_file("b.yaml", **often, resume_from_checkpoint=True))
    assert losses(out) == losses(whole)
    with safe_open(out / "model" / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def adapters_by_rank(path: str, folder: Path) -> list[str]:
    """Fill each rank's part of the adapters with its own number, save, and load into another."""
    job = load(path)
    model = sharded(job)
    rank = dist.get_rank()
    mine = [p for name, p in model.named_parameters() if is_adapter(name)]
    for parameter in mine:
        local_part(parameter.data).fill_(rank + 1)
    new = NewFolder(folder, CPU)
    write_adapter(model, job, new)
    new.publish()
    for parameter in mine:
        parameter.data.zero_()
    load_adapter(model, folder)
    loaded = [local_part(p.data) for p in mine]
    return [str(t.shape) for t in loaded if t.numel() and not bool((t == rank + 1).all())]


def test_an_adapter_holds_every_ranks_part(job_file, keys, tmp_path):
    """accelerate#4206: the file held rank 0's slice, and rank 1 loaded zeros."""
    with_weights(keys["model_name_or_path"])
    lora = {"finetuning_type": "lora", "lora_rank": 8, "train_from_scratch": False, "use_cpu": True}
    path = str(job_file(**lora))
    assert run_ranks(adapters_by_rank, 2, tmp_path, path, tmp_path / "adapter") == [[], []]
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        values = {float(v) for key in list(file.keys()) for v in file.get_tensor(key).unique()}
    assert values == {1.0, 2.0}


class Gathers(TorchDispatchMode):
    """Counts all-gathers; FSDP2 gathers the parameters of one module in one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "allgather" in str(func).replace("_", "")
        return func(*args, **(kwargs or {}))


def gathers(path: str, chunk: int) -> tuple[int, float]:
    """Return how often a pass forward and backward gathers anything, and its loss."""
    linear_cross_entropy.chunk_tokens = lambda *sizes: chunk
    job = load(path)
    model = sharded(job)
    loss_sum = loss_function(model, False)
    torch.manual_seed(0)
    inputs = {"input_ids": torch.randint(0, 100, (4, 64))}
    with Gathers() as seen:
        loss = loss_sum(model, inputs, inputs["input_ids"])
        loss.backward()
    return seen.count, float(loss)


def test_a_loss_in_chunks_gathers_the_head_no_more_often(job_file, keys, tmp_path):
    """TRL#6077: 2 chunks gathered the head twice, 16 chunks 16 times."""
    path = str(job_file(loss_kernel="chunked", use_cpu=True))
    few, many = (run_ranks(gathers, 2, tmp_path, path, size) for size in (256, 16))
    assert few[0][0] == many[0][0] > 0
    assert few[0][1] == pytest.approx(many[0][1], rel=1e-5)


def test_an_adapter_of_other_sizes_or_a_damaged_one_is_an_error(job_file, keys, tmp_path):
    """One row would have been copied to all of them."""
    with_weights(keys["model_name_or_path"])
    lora = {"finetuning_type": "lora", "lora_rank": 8, "train_from_scratch": False, "use_cpu": True}
    job, folder = load(job_file(**lora)), tmp_path / "adapter"
    model = sharded(job)
    new = NewFolder(folder, CPU)
    write_adapter(model, job, new)
    new.publish()
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name][:1].contiguous()}, file)
    with pytest.raises(JobError, match="other adapters"):
        load_adapter(model, folder)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(JobError, match="cannot be read"):
        load_adapter(model, folder)
