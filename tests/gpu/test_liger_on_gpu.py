"""Liger's layers on a GPU: models train as without them, eager and compiled, with FP8 and LoRA."""

import pytest
import torch

from raytrain_adv import hardware
from raytrain_adv.model import parallel, weights
from raytrain_adv.model.build import build
from raytrain_adv.ops.loss.function import loss_function
from raytrain_adv.transforms.applied import Transforms
from tests.tiny_models import job_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
LAYERS = {"rms_norm": True, "swiglu": True, "rope": True}
FORMS = {
    "eager": {},
    "compiled": {"torch_compile": True},
    "fp8": {"fp8": True, "fp8_min_features": 16},
    "fp8, compiled": {"fp8": True, "fp8_min_features": 16, "torch_compile": True},
}


@pytest.fixture
def llama(tmp_path):
    """A checkpoint in which no two weights are alike."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def losses(llama, folder, steps=4, **keys):
    """Return a few losses, and the plans of the job's transforms."""
    job = job_for(llama, folder, disable_gradient_checkpointing=True, **keys)
    device, dtype = torch.device("cuda"), torch.bfloat16
    torch._dynamo.reset()
    model = build(job)
    plans = Transforms(job).install(
        model, Transforms(job).prepare(model, hardware.detect(device)), device, dtype
    )
    parallel.shard(model, job, None)
    weights.materialize(model, device)
    weights.load_pretrained(model, job, device)
    Transforms(job).initialize(model, plans, 0)
    model.to(dtype)
    loss_sum = loss_function(model, job.parallel.torch_compile)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    torch.manual_seed(0)
    ids = torch.randint(0, 1024, (2, 512), device=device)
    found = []
    for _ in range(steps):
        loss = loss_sum(model, {"input_ids": ids}, ids.roll(-1, 1)) / ids.numel()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found, plans


@pytest.mark.parametrize("form", FORMS)
def test_losses_are_those_without_liger(llama, tmp_path, form):
    keys = {"pure_bf16": True, **FORMS[form]}
    expected, _ = losses(llama, tmp_path / "plain", **keys)
    found, plans = losses(llama, tmp_path / "liger", use_liger_kernel=LAYERS, **keys)
    assert len(plans["liger"].changes) == 5 + 2 + 2
    assert sum("on cuda in bfloat16" in note for note in plans["liger"].notes) == 3
    assert expected[-1] < expected[0] - 0.1
    assert found == pytest.approx(expected, rel=5e-3)


def test_adapters_stay_on(llama, tmp_path):
    keys = {"finetuning_type": "lora", "bf16": True}
    expected, _ = losses(llama, tmp_path / "plain", **keys)
    found, _ = losses(llama, tmp_path / "liger", use_liger_kernel=LAYERS, **keys)
    assert expected[-1] < expected[0] and found == pytest.approx(expected, rel=2e-3)
