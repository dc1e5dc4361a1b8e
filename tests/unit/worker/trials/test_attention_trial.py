"""A flash attention that is not the one the model asks for does not train."""

import pytest
import torch

from raytrain_adv.errors import JobError
from raytrain_adv.model.attention import HUB_ATTENTION
from raytrain_adv.model.build import build
from raytrain_adv.worker.trials.attention import forms, try_attention
from tests.tiny_models import job_for, write_checkpoint
from tests.unit.model.test_attention import write_kernel
from tests.workers import losses, run_apart

CPU = torch.device("cpu")
KERNEL = """
import torch


def _seen(time, causal, window, device):
    back = torch.arange(time, device=device)[:, None] - torch.arange(time, device=device)
    seen = back >= 0 if causal else torch.ones_like(back, dtype=torch.bool)
    return seen & (back <= window[0]) if window[0] >= 0 else seen


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0
):
    share = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, *(x.repeat_interleave(share, 2) for x in (k, v))))
    scores = q @ k.transpose(-1, -2) * softmax_scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seen = _seen(q.shape[2], causal, window_size, q.device)
    weights = scores.masked_fill(~seen, float("-inf")).float().softmax(-1).to(q.dtype)
    weights = torch.nn.functional.dropout(weights, dropout_p)
    return (weights @ v).transpose(1, 2)


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options
):
    bounds = cu_seqlens_q.tolist()
    parts = [
        flash_attn_func(*(x[None, start:stop] for x in (q, k, v)), **options)[0]
        for start, stop in zip(bounds, bounds[1:])
    ]
    return torch.cat(parts)
"""
WRONG = {
    "tokens see those that follow": ("back >= 0 if causal", "back >= 0 if False"),
    "the sliding window is left out": ("if window[0] >= 0", "if False"),
    "scores are not capped": ("if softcap:", "if False:"),
    "packed conversations see each other": (
        "bounds = cu_seqlens_q.tolist()",
        "bounds = [0, len(q) // 2, len(q)]",
    ),
}


def tried(tmp_path, source, kind="llama", dtype=torch.float32, **config):
    kernel = write_kernel(tmp_path / "kernel", source)
    folder = write_checkpoint(kind, tmp_path / "m", **config)
    job = job_for(folder, tmp_path, flash_attn=f"hub:{kernel}")
    return try_attention(job, build(job), CPU, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "count"), [("llama", 1), ("gemma2", 2)])
def test_a_right_one_passes_in_every_form_that_layers_ask_for(tmp_path, kind, count, dtype):
    """Gemma 2 caps its scores, and every other layer has a window."""
    found = tried(tmp_path, KERNEL, kind, dtype)
    assert f"in {str(dtype)[6:]}, {count} form" in found and "values off by" in found


@pytest.mark.parametrize("what", WRONG)
def test_one_that_leaves_something_out_is_refused_by_what_it_is(tmp_path, what):
    with pytest.raises(JobError, match="does not compute the attention") as error:
        tried(tmp_path, KERNEL.replace(*WRONG[what]), "gemma2")
    assert error.value.found.endswith(f"its values are those where {what}")


def test_a_wrong_gradient_is_refused(tmp_path):
    halved = "(weights @ v).transpose(1, 2)"
    source = KERNEL.replace(halved, "(weights @ (v / 2 + v.detach() / 2)).transpose(1, 2)")
    with pytest.raises(JobError) as error:
        tried(tmp_path, source)
    (wrong,) = error.value.found.splitlines()[1:]
    assert wrong.startswith("the gradient of values off by 0.5, of which rounding explains")


def test_one_without_a_backward_pass_is_refused(tmp_path):
    with pytest.raises(JobError, match="it was made for inference") as error:
        tried(tmp_path, KERNEL.replace("(weights @ v)", "(weights @ v).detach()"))
    assert "it would cut the gradient of queries and the gradient of keys" in error.value.found


def test_one_that_cannot_do_what_the_model_asks_is_refused_in_words(tmp_path):
    """A TypeError of the kernel's own would come in the first step, with no word of what to do."""
    source = KERNEL.replace(", softcap=0.0", "").replace("if softcap:", "if False:")
    with pytest.raises(JobError, match="fails when Gemma2Attention calls it") as error:
        tried(tmp_path, source, "gemma2")
    assert "softcap" in error.value.found and "set flash_attn: disabled" in error.value.fix


def test_one_that_writes_over_its_input_is_refused(tmp_path):
    source = KERNEL.replace("    share = ", "    k.detach().mul_(2)\n    share = ")
    with pytest.raises(JobError) as error:
        tried(tmp_path, source)
    assert "overwrites queries, keys or values" in error.value.found


def test_values_of_another_dtype_are_refused(tmp_path):
    source = KERNEL.replace(
        "(weights @ v).transpose(1, 2)", "(weights @ v).transpose(1, 2).float()"
    )
    with pytest.raises(JobError) as error:
        tried(tmp_path, source, dtype=torch.bfloat16)
    assert "its values are float32" in error.value.found


@pytest.mark.parametrize("lacks", ["the argument", "the effect"])
def test_one_that_drops_nothing_is_refused_where_the_model_drops(tmp_path, lacks):
    source = KERNEL.replace("    weights = torch.nn.functional.dropout(weights, dropout_p)\n", "")
    if lacks == "the argument":
        source = source.replace("dropout_p=0.0, ", "")
    assert tried(tmp_path / "none", source)
    with pytest.raises(JobError) as error:
        tried(tmp_path / "some", source, attention_dropout=0.1)
    expected = "dropout_p" if lacks == "the argument" else "it drops nothing"
    assert expected in error.value.found


def test_a_model_whose_layers_are_not_known_takes_no_kernel(tmp_path):
    """GPT-NeoX keeps what it asks of attention under names of its own."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        attn_implementation="eager",
    )
    model = GPTNeoXForCausalLM(config)
    assert forms(model) == ({}, ["GPTNeoXAttention"])
    kernel = write_kernel(tmp_path / "kernel", KERNEL)
    folder = write_checkpoint("llama", tmp_path / "m")
    job = job_for(folder, tmp_path, flash_attn=f"hub:{kernel}")
    model.config._attn_implementation = HUB_ATTENTION
    with pytest.raises(JobError, match="cannot be tested in this model") as error:
        try_attention(job, model, CPU, torch.float32)
    assert "GPTNeoXAttention" in error.value.found


def test_a_wrong_kernel_ends_the_run_before_a_step(job_file, tmp_path):
    source = KERNEL.replace(*WRONG["tokens see those that follow"])
    kernel = write_kernel(tmp_path / "kernel", source)
    code, said = run_apart(job_file(flash_attn=f"hub:{kernel}"))
    assert code != 0 and "tokens see those that follow" in said
    assert not losses(tmp_path / "out")


def test_pytorchs_own_attention_is_not_tried(tmp_path):
    job = job_for(write_checkpoint("llama", tmp_path / "m"), tmp_path)
    assert try_attention(job, build(job), CPU, torch.float32) == ""


@pytest.mark.parametrize(
    "kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "mixtral"]
)
def test_every_layers_form_is_known(tmp_path, kind):
    job = job_for(write_checkpoint(kind, tmp_path / "m"), tmp_path)
    model = build(job)
    known, unknown = forms(model)
    (first, *others) = known
    assert unknown == []
    config = model.config.get_text_config()
    windows = kind in ("mistral", "gemma2", "gemma3_text")
    assert any(form.has_window for form in (first, *others)) == windows
    assert (first.heads, first.key_heads) == (
        config.num_attention_heads,
        config.num_key_value_heads,
    )
