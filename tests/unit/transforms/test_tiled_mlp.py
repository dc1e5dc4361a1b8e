"""An MLP on tiles: the same values, gradients within rounding, and no more kept than its input."""

import copy
from functools import partialmethod

import pytest
import torch

from raytrain_adv import hardware
from raytrain_adv.errors import JobError
from raytrain_adv.model import parallel, weights
from raytrain_adv.model.build import build
from raytrain_adv.ops.tiles import Tiles
from raytrain_adv.transforms.applied import Transforms
from tests.tiny_models import job_for, write_checkpoint

CPU = hardware.detect("cpu")
DEVICE = torch.device("cpu")
TOKENS = torch.arange(80).reshape(2, 40)

LORA = {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all"}


def on_worker(folder, kind="llama", **keys):
    """Return a job's model as a worker trains it, and the plans."""
    torch._dynamo.reset()
    checkpoint = write_checkpoint(kind, folder / "model")
    job = job_for(checkpoint, folder, **{"loss_kernel": "torch", **keys})
    model, transforms = build(job), Transforms(job)
    plans = transforms.prepare(model, CPU)
    plans = transforms.install(model, plans, DEVICE, parallel.compute_dtype(job))
    parallel.shard(model, job, None)
    weights.materialize(model, DEVICE)
    weights.load_pretrained(model, job, DEVICE)
    transforms.initialize(model, plans, 1)
    return model, plans


def passed(model):
    """Return logits and gradients."""
    logits = model(input_ids=TOKENS, use_cache=False).logits
    logits.float().square().mean().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def require_alike(folder, tolerance, kind="llama", **keys):
    expected, whole = passed(on_worker(folder, kind, **keys)[0])
    model, plans = on_worker(folder, kind, tiled_mlp=16, **keys)
    assert len(plans["tiled_mlp"].changes) == 2
    found, tiled = passed(model)
    assert torch.equal(found, expected)
    assert tiled.keys() == whole.keys() and whole
    for name, gradient in whole.items():
        error = (tiled[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error <= tolerance, (name, float(error))


@pytest.mark.parametrize("kind", ["llama", "gemma2", "phi3", "qwen3"])
def test_values_are_equal_and_gradients_within_rounding(tmp_path, kind):
    require_alike(tmp_path, 1e-5, kind)


@pytest.mark.parametrize("mode", ["none", "selective"])
def test_other_ways_of_checkpointing_give_the_same(tmp_path, mode):
    require_alike(tmp_path, 1e-5, gradient_checkpointing=mode)


def test_gradients_in_bf16_differ_by_its_rounding(tmp_path):
    require_alike(tmp_path, 2**-7, pure_bf16=True)


def test_adapters_are_trained_through_tiles(tmp_path):
    model, _ = on_worker(tmp_path, tiled_mlp=16, **LORA)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p += 0.1
    whole = copy.deepcopy(model)
    for module in whole.modules():
        if "tiles" in vars(module):
            module.forward = vars(module)["tiles"].forward
    expected, found = passed(whole), passed(model)
    assert torch.equal(found[0], expected[0])
    of_mlps = [name for name in expected[1] if ".mlp." in name]
    assert len(of_mlps) == 12
    for name in of_mlps:
        torch.testing.assert_close(found[1][name], expected[1][name])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_layer_is_one_graph_and_computes_an_mlp_again_on_tiles_alone(
    backend, tmp_path, monkeypatch
):
    compile_layer = partialmethod(torch.nn.Module.compile, backend=backend)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_layer)
    calls = []
    model, _ = on_worker(tmp_path, tiled_mlp=16, torch_compile=True)
    for module in model.modules():
        if (tiles := vars(module).get("tiles")) is not None:
            compute = tiles.compute
            tiles.compute = lambda x, c=compute: calls.append(x.shape[1]) or c(x)
    torch._dynamo.utils.counters.clear()
    logits, found = passed(model)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert calls == [16] * 2 * 2 * 5  # forward, and backward: layers of 80 tokens
    expected_logits, expected = passed(on_worker(tmp_path)[0])
    torch.testing.assert_close(logits, expected_logits)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


def test_backward_keeps_the_input_and_no_inner_activation(tmp_path):
    model, _ = on_worker(tmp_path, tiled_mlp=16, gradient_checkpointing="none")
    mlp = next(module for module in model.modules() if "tiles" in vars(module))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mlp(torch.randn(2, 40, 32, requires_grad=True))
    assert [t.shape for t in kept if not isinstance(t, torch.nn.Parameter) and t.ndim] == [(80, 32)]


def test_few_tokens_are_computed_whole(tmp_path):
    model, _ = on_worker(tmp_path, tiled_mlp=96)
    assert torch.equal(passed(model)[0], passed(on_worker(tmp_path)[0])[0])
    tiles = Tiles(torch.nn.Linear(2, 2), lambda x: x, 256)
    assert [part.stop - part.start for part in tiles.parts(700)] == [256, 256, 188]


def test_blocks_of_experts_stay_whole_by_name_and_a_model_of_them_alone_is_refused(tmp_path):
    checkpoint = write_checkpoint("deepseek_v3", tmp_path / "model")
    job = job_for(checkpoint, tmp_path, tiled_mlp=16)
    plan = Transforms(job).prepare(build(job), CPU)["tiled_mlp"]
    assert list(plan.changes) == ["model.layers.0.mlp"]
    assert plan.skipped == {"model.layers.1.mlp": "it routes tokens to experts"}
    checkpoint = write_checkpoint("mixtral", tmp_path / "other")
    job = job_for(checkpoint, tmp_path, tiled_mlp=16)
    with pytest.raises(JobError, match="tiled_mlp is enabled but would not change any module"):
        Transforms(job).prepare(build(job), CPU)


def test_an_mlp_that_mixes_tokens_is_refused_before_training(tmp_path, monkeypatch):
    job = job_for(write_checkpoint("llama", tmp_path / "model"), tmp_path, tiled_mlp=16)
    model, transforms = build(job), Transforms(job)
    kind = type(model.model.layers[0].mlp)
    own = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: own(self, x - x.mean(1, keepdim=True)))
    plans = transforms.prepare(model, CPU)
    with pytest.raises(JobError, match="tiled_mlp does not compute what LlamaMLP does"):
        transforms.install(model, plans, DEVICE, torch.float32)


def test_dropout_is_refused_with_a_reason(tmp_path):
    job = job_for(write_checkpoint("gpt2", tmp_path / "model"), tmp_path, tiled_mlp=16)
    with pytest.raises(JobError) as refused:
        Transforms(job).prepare(build(job), CPU)
    reason = "it has dropout (transformer.h.0.mlp.dropout), which backward would draw again"
    assert reason in refused.value.found


def test_an_mlp_without_a_trial_is_refused(tmp_path):
    checkpoint = write_checkpoint("gpt2", tmp_path / "model", resid_pdrop=0.0)
    job = job_for(checkpoint, tmp_path, tiled_mlp=16)
    model, transforms = build(job), Transforms(job)
    with pytest.raises(JobError, match="tiled_mlp cannot be tested in GPT2MLP"):
        transforms.install(model, transforms.prepare(model, CPU), DEVICE, torch.float32)


@pytest.mark.parametrize("tokens", [1, 0, 8, 17, 16.5])
def test_a_number_that_is_no_tile_is_refused(tmp_path, tokens):
    """1 and 0 are numbers here, not true and false."""
    with pytest.raises(JobError, match="a whole number at least 16 and a multiple of 16"):
        job_for("none", tmp_path, tiled_mlp=tokens)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_scales_of_several_tokens_are_refused(tmp_path, recipe):
    keys = {"fp8": True, "fp8_allow_cpu": True, "tiled_mlp": True}
    with pytest.raises(JobError, match="scales of several tokens would be those of a tile"):
        job_for("none", tmp_path, fp8_recipe=recipe, **keys)


def test_scales_of_several_tokens_are_refused_on_a_stored_base_too(tmp_path):
    keys = {"finetuning_type": "lora", "quantization_bit": 8, "quantization_type": "fp8"}
    with pytest.raises(JobError, match="scales of several tokens would be those of a tile"):
        job_for("none", tmp_path, tiled_mlp=True, **keys)
    job_for("none", tmp_path, tiled_mlp=True, quantization_products="dequantized", **keys)


def test_products_in_8_bits_with_exact_weight_gradients_are_tiled(tmp_path):
    keys = {"fp8": True, "fp8_allow_cpu": True, "fp8_min_features": 16, "pure_bf16": True}
    require_alike(tmp_path, 2**-6, fp8_recipe="rowwise_with_gw_hp", **keys)
