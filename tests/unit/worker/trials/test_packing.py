"""Packed conversations are kept apart in the way that a model takes, or the job is refused."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from raytrain_adv.errors import TrainingError
from raytrain_adv.model import parallel
from raytrain_adv.model.build import build, decoder_layers
from raytrain_adv.model.packing import hand_masks
from raytrain_adv.model.weights import load_pretrained, materialize
from raytrain_adv.run.run import local_run
from raytrain_adv.worker.trials import packing
from raytrain_adv.worker.trials.packing import check_packing
from tests.families import tiny_model
from tests.ranks import run_ranks
from tests.tiny_models import job_for

APART = {
    "llama": "positions",
    "mixtral": "positions",
    "gemma3_text": "positions",
    "gpt_oss": "masks",
    "roberta": "masks",  # its positions begin after that of padding
}
ONCE_EACH = {
    "lfm2": ["model.layers.0.conv"],
    "falcon_h1": ["model.layers.0.mamba", "model.layers.1.mamba"],
    "mamba2": ["backbone.layers.0.mixer", "backbone.layers.1.mixer"],  # takes no position ids
    "bloom": ["transformer.h.0.self_attention", "transformer.h.1.self_attention"],
}
"""Kinds that mix -> the modules that are called once for each conversation."""
MIXING = ("xlm", "trocr")


def tried(kind, tmp_path, **keys):
    job = job_for("none", tmp_path, neat_packing=True, use_cpu=True, **keys)
    model = tiny_model(kind)
    return model, check_packing(job, model, local_run(job))


@pytest.mark.parametrize(("kind", "expected"), APART.items())
def test_a_packed_conversation_has_the_logits_that_it_has_alone(kind, expected, tmp_path):
    model, way = tried(kind, tmp_path)
    assert way == expected
    assert all(p.grad is None for p in model.parameters()) and model.training
    first, second = torch.arange(9)[None], torch.arange(20, 40)[None]
    positions = torch.cat([torch.arange(9), torch.arange(20)])[None]
    model.eval()  # RoBERTa drops
    with torch.no_grad():
        packed = model(
            input_ids=torch.cat([first, second], 1), position_ids=positions, use_cache=False
        ).logits
        alone = model(input_ids=second).logits
    torch.testing.assert_close(packed[:, 9:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "modules"), ONCE_EACH.items())
def test_what_mixes_conversations_is_called_once_for_each(kind, modules, tmp_path):
    model, way = tried(kind, tmp_path)
    assert way == "apart"
    assert [name for name, m in model.named_modules() if "forward" in vars(m)] == modules
    ids = [torch.arange(9)[None], torch.arange(20, 40)[None], torch.arange(50, 55)[None]]
    positions = torch.cat([torch.arange(one.shape[1]) for one in ids])[None]
    packed = model(input_ids=torch.cat(ids, 1), position_ids=positions, use_cache=False).logits
    packed[:, 9:29].float().square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    alone = model(input_ids=ids[1], use_cache=False).logits
    torch.testing.assert_close(packed[:, 9:29], alone, rtol=1e-4, atol=1e-5)
    alone.float().square().sum().backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-4)


def test_compiled_and_recomputed_layers_call_them_once_for_each(tmp_path):
    ids, results = torch.arange(48)[None], []
    positions = torch.cat([torch.arange(n) for n in (9, 20, 19)])[None]
    for layers_of in (lambda layer: layer, checkpoint_wrapper):
        model = tiny_model("lfm2")
        for fqn, layer in decoder_layers(model):
            model.set_submodule(fqn, layers_of(layer))
            if layers_of is checkpoint_wrapper:
                model.get_submodule(fqn).compile(backend="aot_eager")
        job = job_for("none", tmp_path, neat_packing=True, use_cpu=True)
        assert check_packing(job, model, local_run(job)) == "apart"
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        logits.square().sum().backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        results.append((logits.detach(), norm))
    torch.testing.assert_close(results[0], results[1])


def packed_logits(folder: Path) -> torch.Tensor:
    """Return a sharded model's logits of three packed conversations, called once for each."""
    job = job_for(folder, folder.parent / f"job{dist.get_rank()}", neat_packing=True, use_cpu=True)
    model, cpu = build(job), torch.device("cpu")
    parallel.shard(model, job, parallel.build_mesh(job, cpu))
    materialize(model, cpu)
    load_pretrained(model, job, cpu)
    assert check_packing(job, model, local_run(job)) == "apart"
    positions = torch.cat([torch.arange(n) for n in (9, 20, 19)])[None]
    ids = torch.arange(48)[None]
    return model(input_ids=ids, position_ids=positions, use_cache=False).logits.detach()


def test_ranks_with_shards_call_them_once_for_each_too(tmp_path):
    tiny_model("lfm2").save_pretrained(tmp_path / "model")
    (alone,) = run_ranks(packed_logits, 1, tmp_path, tmp_path / "model")
    for found in run_ranks(packed_logits, 2, tmp_path, tmp_path / "model"):
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MIXING)
def test_a_model_that_mixes_packed_conversations_is_refused_by_name(kind, tmp_path):
    with pytest.raises(TrainingError, match="neat_packing") as refusal:
        tried(kind, tmp_path)
    assert type(tiny_model(kind)).__name__ in refusal.value.what
    assert "packing: false and neat_packing: false" in refusal.value.fix


def test_without_neat_packing_nothing_is_tried(tmp_path):
    job = job_for("none", tmp_path, packing=True, use_cpu=True)
    assert check_packing(job, tiny_model("mamba2"), local_run(job)) == "positions"


def test_masks_from_outside_keep_windows():
    model = tiny_model("gpt_oss").eval()
    ids = torch.arange(40)[None]
    with torch.no_grad():
        plain = model(input_ids=ids, position_ids=ids, use_cache=False).logits
        hand_masks(model, torch.float32)
        assert torch.equal(model(input_ids=ids, position_ids=ids, use_cache=False).logits, plain)


def fail_alone(folder):
    def compare(rows, dtype):
        if dist.get_rank() == 1:
            raise ValueError("a bad day")
        dist.all_reduce(torch.ones(1))  # as FSDP2 gathers
        return []

    packing._compare, packing.WAIT_S = compare, 1.0
    tried("llama", folder / str(dist.get_rank()), ray_num_workers=2)


def test_a_trial_that_fails_on_one_rank_does_not_wait_for_the_others(tmp_path):
    with pytest.raises(AssertionError) as failed:
        run_ranks(fail_alone, 2, tmp_path, tmp_path)
    _, second = str(failed.value).split("\nrank 1:\n")
    assert "could not be tried: rank 1 failed alone" in second
    assert "ValueError: a bad day; no other rank failed within 1 s" in second
