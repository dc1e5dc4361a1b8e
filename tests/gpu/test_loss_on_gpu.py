"""The loss kernels against plain logits on a GPU: eager, in compiled models, with FP8 and LoRA."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from raytrain_adv import hardware
from raytrain_adv.model import parallel, weights
from raytrain_adv.model.build import build
from raytrain_adv.ops.loss import linear_cross_entropy as ops
from raytrain_adv.ops.loss.function import loss_function
from raytrain_adv.ops.loss.head import BACKENDS, loss_of
from raytrain_adv.ops.loss.linear_cross_entropy import LogitMap, called_cross_entropy
from raytrain_adv.run.run import local_run
from raytrain_adv.transforms.applied import Transforms
from raytrain_adv.worker.trials.loss import check_loss
from tests.tiny_models import job_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
MAPS = [LogitMap(), LogitMap(scale=0.25), LogitMap(scale=2.0, softcap=3.0)]
KERNELS = ["chunked", "cut_cross_entropy", "liger"]
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}


def factors(dtype, tokens=700, hidden=256, vocab=33000):
    torch.manual_seed(0)
    states = torch.randn(tokens, hidden, device="cuda").to(dtype).requires_grad_()
    weight = (0.1 * torch.randn(vocab, hidden, device="cuda")).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), device="cuda")
    labels[100:300] = -100
    return states, weight, labels


def gradients(loss, *inputs):
    return torch.autograd.grad(loss * 0.3711, inputs)


def called(states, weight, bias, labels, logit_map):
    return called_cross_entropy(
        states, labels, lambda x: F.linear(x, weight), [weight], len(weight), logit_map
    )


FORMS = {**BACKENDS, "called": called}


@pytest.mark.parametrize("kernel", FORMS)
@pytest.mark.parametrize("logit_map", MAPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_chunks", [1, 6, 44])
def test_loss_and_gradients_are_those_of_plain_logits(
    kernel, logit_map, dtype, num_chunks, monkeypatch
):
    """44 chunks are added up in float32."""
    if kernel == "cut_cross_entropy" and dtype == torch.float32:
        pytest.skip("its backward pass is for half precision; config refuses the rest")
    if kernel in ("cut_cross_entropy", "liger") and num_chunks > 1:
        pytest.skip("it cuts its chunks itself")
    monkeypatch.setattr(ops, "CHUNK_BYTES", 1)
    monkeypatch.setattr(ops, "CHUNK_MULTIPLE", -(-700 // num_chunks))
    states, weight, labels = factors(dtype)
    exact = logit_map(F.linear(states.double(), weight.double()))
    expected = F.cross_entropy(exact, labels, reduction="sum")
    found = FORMS[kernel](states, weight, None, labels, logit_map)
    rtol = 1e-5 if dtype == torch.float32 else 2e-3
    assert found.item() == pytest.approx(expected.item(), rel=rtol)
    allowed = 1e-4 if dtype == torch.float32 else 1.5e-2
    if kernel == "cut_cross_entropy":
        allowed = 4e-2  # it adds gradients up in bf16: 3.2 % measured on an H200
    of_torch = gradients(expected, states, weight)
    for one, other in zip(gradients(found, states, weight), of_torch, strict=True):
        assert (one - other).float().norm() <= allowed * other.float().norm(), kernel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [31, 16384, 50257, 128256])
@pytest.mark.parametrize("logit_map", MAPS)
def test_the_kernel_writes_what_the_reference_writes(dtype, vocab, logit_map):
    torch.manual_seed(0)
    x = (3 * torch.randn(40, vocab, device="cuda")).to(dtype)
    labels = torch.randint(0, vocab, (40,), device="cuda")
    labels[7], labels[8], labels[9] = -100, 0, vocab - 1
    expected, found = x.clone(), x.clone()
    of_torch = ops.reference_softmax_gradient_(expected, labels, logit_map, True)
    losses = ops.softmax_gradient_(found, labels, logit_map, True)
    torch.testing.assert_close(losses, of_torch, rtol=1e-4, atol=1e-4)
    rtol = {torch.float32: 1e-4, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-6)
    assert not found[7].any()
    kept = x.clone()
    torch.testing.assert_close(ops.softmax_gradient_(kept, labels, logit_map, False), losses)
    assert torch.equal(kept, x)


def test_a_gradient_is_scaled_in_float32():
    x = torch.randn(10_001, device="cuda", dtype=torch.bfloat16)
    factor = torch.tensor(0.3711, device="cuda")
    expected = (x.float() * factor).bfloat16()
    ops.scale_(x, factor)
    assert torch.equal(x, expected)


def test_the_chunked_loss_of_an_8b_head_takes_a_gib_and_a_half_at_most():
    """8,192 tokens, hidden 4,096, vocabulary 128,256, bf16: over the hidden states' own size."""
    states, weight, labels = factors(torch.bfloat16, 8192, 4096, 128256)
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    (BACKENDS["chunked"](states, weight, None, labels, LogitMap()) * 0.5).backward()
    assert (torch.cuda.max_memory_allocated() - held) / 2**30 <= 1.5
    assert weight.grad is not None and states.grad is not None


def trained(folder: Path, **keys):
    """Return a tiny model on the GPU, as train() makes it, and the job's plans, checked."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    job = job_for(folder, folder / "job", train_from_scratch=True, **keys)
    device = torch.device("cuda")
    torch._dynamo.reset()
    facts = hardware.detect(device)
    Transforms(job).check(facts)
    model = build(job)
    plans = Transforms(job).prepare(model, facts)
    parallel.shard(model, job, None)
    weights.materialize(model, device)
    weights.init_from_scratch(model, job, device)
    Transforms(job).initialize(model, plans, 0)
    return model, check_loss(job, model, local_run(job, device), plans), job


def losses_of(model, job, steps=4):
    loss_sum = loss_function(model, job.parallel.torch_compile)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    torch.manual_seed(0)
    ids = torch.randint(0, LLAMA["vocab_size"], (2, 1024), device="cuda")
    labels = ids.roll(-1, 1)
    labels[:, :100] = -100
    found = []
    for _ in range(steps):
        loss = loss_sum(model, {"input_ids": ids}, labels) / labels.ne(-100).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_a_model_trains_as_with_plain_logits_and_fp8_stays_on(tmp_path, kernel, compiled, fp8):
    keys = {"pure_bf16": True, "torch_compile": compiled, "disable_gradient_checkpointing": True}
    if fp8:
        keys |= {"fp8": True, "fp8_min_features": 16}
    plain, _, job = trained(tmp_path / "torch", loss_kernel="torch", **keys)
    ours, plans, _ = trained(tmp_path / kernel, loss_kernel=kernel, **keys)
    assert "on 64 random tokens" in plans["loss_kernel"].notes[-1]
    expected, found = losses_of(plain, job), losses_of(ours, job)
    assert expected[-1] < expected[0] - 0.1
    assert found == pytest.approx(expected, rel=5e-3)
    if fp8:
        kinds = {type(m).__name__ for m in ours.modules()}
        assert "Float8Linear" in kinds and len(plans["fp8"].changes) == 14


def test_fp8_on_the_head_stays_on_in_the_chunked_loss():
    """Put on the head by hand: the transform leaves it out."""
    from torchao.float8 import Float8LinearConfig

    from raytrain_adv.ops.float8.linear import Float8Linear

    torch.manual_seed(0)
    head = torch.nn.Linear(256, 4096, bias=False, device="cuda", dtype=torch.bfloat16)
    config = Float8LinearConfig.from_recipe_name("tensorwise")
    eight = Float8Linear.from_float(head, config)
    states, _, labels = factors(torch.bfloat16, 704, 256, 4096)
    ops_of = [eight.weight]
    found = called_cross_entropy(states, labels, eight, ops_of, 4096, LogitMap())
    expected = F.cross_entropy(eight(states).float(), labels, reduction="sum")
    in_bf16 = F.cross_entropy(F.linear(states, head.weight).float(), labels, reduction="sum")
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert abs(found.item() / in_bf16.item() - 1) > 1e-5
    pairs = (gradients(expected, states, eight.weight), gradients(found, states, eight.weight))
    for other, one in zip(*pairs, strict=True):
        assert (one - other).float().norm() <= 2e-2 * other.float().norm()


def test_lora_on_the_head_trains_as_with_plain_logits(tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    source = tmp_path / "source"
    config = AutoConfig.for_model(**LLAMA)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(source)
    lora = {"finetuning_type": "lora", "lora_target": "q_proj,lm_head", "bf16": True}
    found = {}
    for kernel in ("torch", "chunked"):
        job = job_for(source, tmp_path / kernel, loss_kernel=kernel, **lora)
        device = torch.device("cuda")
        model = build(job)
        plans = Transforms(job).prepare(model, hardware.detect(device))
        weights.materialize(model, device)
        weights.load_pretrained(model, job, device)
        Transforms(job).initialize(model, plans, 0)
        model.to(torch.bfloat16)
        check_loss(job, model, local_run(job, device), plans)
        if kernel == "chunked":
            assert not loss_of(model.lm_head).reads_weight
        found[kernel] = losses_of(model, job)
    assert found["torch"][-1] < found["torch"][0]
    assert found["chunked"] == pytest.approx(found["torch"], rel=2e-3)
