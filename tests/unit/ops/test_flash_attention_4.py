"""FlashAttention-4 as operators, with the package's arithmetic replaced by its definition."""

import sys
from types import ModuleType

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from raytrain_adv.model import attention, files
from raytrain_adv.model.attention import FA4_ATTENTION, is_flash
from raytrain_adv.model.build import build
from raytrain_adv.ops.flash_attention_4 import flash_attn_func, flash_attn_varlen_func
from raytrain_adv.worker.trials.attention import try_attention
from tests.tiny_models import job_for, write_checkpoint

CPU = torch.device("cpu")


def weights(q, k, softmax_scale, cu_seqlens_q, window_size_left, softcap, **_others):
    """Return the softmax's weights [..., heads, time, time], its sums, and the cap's slope."""
    s = torch.einsum("...qhd,...khd->...hqk", q, repeated(k, q)) * softmax_scale
    bent = torch.tanh(s / softcap) if softcap else torch.zeros_like(s)
    s = bent * softcap if softcap else s
    time = torch.arange(q.shape[-3])
    seen = time[:, None] >= time
    if window_size_left is not None:
        seen &= time[:, None] - time <= window_size_left
    if cu_seqlens_q is not None:
        owner = torch.bucketize(time, cu_seqlens_q, right=True)
        seen &= owner[:, None] == owner
    s = s.masked_fill(~seen, float("-inf"))
    return s.softmax(-1), s.logsumexp(-1).contiguous(), (1 - bent**2) * softmax_scale


def repeated(x, q):
    return x.repeat_interleave(q.shape[-2] // x.shape[-2], -2)


def summed(x, like):
    return x.unflatten(-2, (like.shape[-2], -1)).sum(-2)


def forward(q, k, v, return_lse, causal, **options):
    p, sums, _ = weights(q, k, **options)
    output = torch.einsum("...hqk,...khd->...qhd", p, repeated(v, q))
    return output.contiguous(), sums, None, None, None


def backward(q, k, v, output, gradient, sums, causal, **options):
    p, again, slope = weights(q, k, **options)
    assert torch.equal(again, sums)
    dv = torch.einsum("...hqk,...qhd->...khd", p, gradient)
    dp = torch.einsum("...qhd,...khd->...hqk", gradient, repeated(v, q))
    ds = p * (dp - (gradient * output).sum(-1).transpose(-1, -2)[..., None]) * slope
    dq = torch.einsum("...hqk,...khd->...qhd", ds, repeated(k, q))
    dk = torch.einsum("...hqk,...qhd->...khd", ds, q)
    return dq, summed(dk, k), summed(dv, v)


@pytest.fixture(autouse=True)
def package(monkeypatch, tmp_path):
    interface = ModuleType("flash_attn.cute.interface")
    interface._flash_attn_fwd, interface._flash_attn_bwd = forward, backward
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)


def numbers(*shape):
    return torch.randn(*shape, requires_grad=True)


@pytest.mark.parametrize("packed", [False, True])
def test_operators_pass_torchs_checks(packed):
    rows = () if packed else (2,)
    inputs = numbers(*rows, 9, 4, 8), numbers(*rows, 9, 2, 8), numbers(*rows, 9, 2, 8)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32) if packed else None
    arguments = *inputs, bounds, 5 if packed else None, 0.3, 3, 20.0
    operator = torch.ops.raytrain_adv.flash_attn_4_forward
    torch.library.opcheck(operator, arguments, raise_exception=True)


def test_a_compiled_layer_stays_whole():
    torch._dynamo.reset()
    inputs = numbers(2, 9, 4, 8), numbers(2, 9, 2, 8), numbers(2, 9, 2, 8)

    def layer(q, k, v):
        return 2 * flash_attn_func(q + 1, k, v, softmax_scale=0.3)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = [
        [y, *torch.autograd.grad(y.sum(), inputs)] for y in (layer(*inputs), compiled(*inputs))
    ]
    torch.testing.assert_close(*results)


def test_packed_rows_are_those_of_each_alone():
    q, k, v = numbers(9, 4, 8), numbers(9, 2, 8), numbers(9, 2, 8)
    bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
    found = flash_attn_varlen_func(q, k, v, bounds, bounds, 5, 5, softmax_scale=0.3)
    alone = flash_attn_func(*(x[None, 4:] for x in (q, k, v)), softmax_scale=0.3)[0]
    torch.testing.assert_close(found[4:], alone)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mistral"])
def test_a_models_layers_use_it_and_the_trial_passes(kind, monkeypatch, tmp_path):
    monkeypatch.setattr(attention, "check_flash_package", lambda asked: None)
    job = job_for(write_checkpoint(kind, tmp_path / "m"), tmp_path, flash_attn="fa4")
    model = build(job)
    assert model.config._attn_implementation == FA4_ATTENTION and is_flash(model)
    assert "values off by" in try_attention(job, model, CPU, torch.float32)
    assert ALL_ATTENTION_FUNCTIONS[FA4_ATTENTION].kernel().flash_attn_func is flash_attn_func


def test_a_folder_that_packages_share_is_not_taken_for_another(tmp_path, monkeypatch):
    (tmp_path / "flash_attn/cute").mkdir(parents=True)
    monkeypatch.delitem(sys.modules, "flash_attn")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert files.has_package("fa4") and not files.has_package("fa2")
