"""The chunked loss and its gradients are torch's, and the logits of all tokens never exist."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from raytrain_adv.ops.loss import linear_cross_entropy as ops
from raytrain_adv.ops.loss.linear_cross_entropy import (
    LogitMap,
    called_cross_entropy,
    linear_cross_entropy,
)
from tests.processes import interpreted

TOKENS, HIDDEN, VOCAB = 150, 24, 61
MAPS = [LogitMap(), LogitMap(scale=0.25), LogitMap(scale=2.0, softcap=3.0)]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Seven chunks of 22 tokens, the last of 18."""
    monkeypatch.setattr(ops, "CHUNK_BYTES", 1)
    monkeypatch.setattr(ops, "CHUNK_MULTIPLE", 22)


def factors(dtype, with_bias):
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
    weight = (0.3 * torch.randn(VOCAB, HIDDEN)).to(dtype).requires_grad_()
    bias = torch.randn(VOCAB).to(dtype).requires_grad_() if with_bias else None
    labels = torch.randint(0, VOCAB, (TOKENS,))
    labels[10:40] = -100
    return hidden, weight, bias, labels


def called(hidden, weight, bias, labels, logit_map):
    trained = [p for p in (weight, bias) if p is not None]
    return called_cross_entropy(
        hidden, labels, lambda x: F.linear(x, weight, bias), trained, VOCAB, logit_map
    )


def plain(hidden, weight, bias, labels, logit_map):
    logits = logit_map(F.linear(hidden, weight, bias).float())
    return F.cross_entropy(logits, labels, reduction="sum")


@pytest.mark.parametrize("form", [linear_cross_entropy, called])
@pytest.mark.parametrize("logit_map", MAPS)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_loss_and_gradients_are_torchs(form, logit_map, with_bias, dtype, rtol):
    """The factor is one that bf16 cannot hold: it must not be rounded before it multiplies."""
    hidden, weight, bias, labels = factors(dtype, with_bias)
    inputs = [t for t in (hidden, weight, bias) if t is not None]
    expected = plain(hidden, weight, bias, labels, logit_map)
    found = form(hidden, weight, bias, labels, logit_map)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    of_torch = torch.autograd.grad(expected * 0.3711, inputs)
    of_ours = torch.autograd.grad(found * 0.3711, inputs)
    for one, other in zip(of_ours, of_torch, strict=True):
        assert (one - other).float().norm() <= rtol * other.float().norm()


@pytest.mark.parametrize("form", [linear_cross_entropy, called])
def test_many_chunks_are_added_up_in_float32(form, monkeypatch):
    """150 chunks of one token in bf16: added up in bf16 the gradient would lie 1.2 % off."""
    monkeypatch.setattr(ops, "CHUNK_MULTIPLE", 1)
    hidden, weight, _, labels = factors(torch.bfloat16, False)
    exact = plain(hidden.double(), weight.double(), None, labels, LogitMap())
    (expected,) = torch.autograd.grad(exact, weight)
    (found,) = torch.autograd.grad(form(hidden, weight, None, labels, LogitMap()), weight)
    assert (found - expected).float().norm() <= 6e-3 * expected.float().norm()


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation gives back."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("form", [linear_cross_entropy, called])
def test_no_operation_makes_the_logits_of_all_tokens(form):
    hidden, weight, bias, labels = factors(torch.float32, True)
    with Largest() as seen:
        form(hidden, weight, bias, labels, MAPS[2]).backward()
    assert seen.numel <= max(22 * VOCAB, TOKENS * HIDDEN, VOCAB * HIDDEN) < TOKENS * VOCAB


@pytest.mark.parametrize("form", [linear_cross_entropy, called])
def test_without_gradients_only_the_loss_is_made(form):
    hidden, weight, bias, labels = factors(torch.float32, False)
    expected = plain(hidden, weight, bias, labels, MAPS[2])
    with torch.no_grad(), Largest() as seen:
        found = form(hidden, weight, bias, labels, MAPS[2])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    assert not found.requires_grad and seen.numel <= 22 * VOCAB + TOKENS


@pytest.mark.parametrize("form", [linear_cross_entropy, called])
def test_a_frozen_weight_gets_no_gradient_and_the_input_does(form):
    hidden, weight, _, labels = factors(torch.float32, False)
    weight.requires_grad_(False)
    form(hidden, weight, None, labels, LogitMap()).backward()
    assert weight.grad is None and hidden.grad.norm() > 0


@pytest.mark.parametrize("form", [linear_cross_entropy, called])
def test_tokens_without_labels_add_nothing(form):
    hidden, weight, _, labels = factors(torch.float32, False)
    loss = form(hidden, weight, None, torch.full_like(labels, -100), LogitMap())
    loss.backward()
    assert loss.item() == 0.0 and not hidden.grad.any() and not weight.grad.any()


def test_a_second_backward_pass_is_refused_in_place_of_a_wrong_gradient():
    hidden, weight, _, labels = factors(torch.float32, False)
    loss = linear_cross_entropy(hidden, weight, None, labels, LogitMap())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass only"):
        loss.backward()


def test_a_head_that_keeps_its_output_is_told_that_it_is_gone():
    """tanh needs its result in backward; the loss writes over it."""
    hidden, weight, _, labels = factors(torch.float32, False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        called_cross_entropy(
            hidden, labels, lambda x: (x @ weight.t()).tanh(), [weight], VOCAB, LogitMap()
        )


def test_chunks_hold_what_their_bytes_allow_and_are_about_as_long(monkeypatch):
    monkeypatch.undo()

    def lengths(tokens, vocab, itemsize):
        return [part.stop - part.start for part in ops.chunks(tokens, vocab, itemsize)]

    assert lengths(8192, 128256, 2) == [1664, 1664, 1664, 1664, 1536]
    assert lengths(2100, 128256, 2) == [1152, 948]
    assert lengths(1792, 128256, 2) == [1792] and lengths(1, 128256, 2) == [1]
    assert lengths(0, 128256, 2) == []
    assert set(lengths(8192, 262144, 2)[:-1]) == {896}
    assert set(lengths(4096, 10**9, 4)) == {ops.CHUNK_MULTIPLE}
    for tokens in range(1, 9000, 97):
        assert sum(lengths(tokens, 128256, 2)) == tokens
        assert max(lengths(tokens, 128256, 2)) * 128256 * 2 <= ops.CHUNK_BYTES


INTERPRETED = """
import torch
from raytrain_adv.ops.loss import linear_cross_entropy as ops
from raytrain_adv.ops.loss import linear_cross_entropy_kernel as kernel

torch.manual_seed(0)
for logit_map in (ops.LogitMap(), ops.LogitMap(2.0, 3.0)):
    x = 3 * torch.randn(5, 20000)
    labels = torch.tensor([0, 19999, -100, 7, 16384])
    expected, found, kept = x.clone(), x.clone(), x.clone()
    of_torch = ops.reference_softmax_gradient_(expected, labels, logit_map, True)
    arguments = labels, logit_map.scale, logit_map.softcap
    torch.testing.assert_close(kernel.launch(found, *arguments, True, -100), of_torch)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(kernel.launch(kept, *arguments, False, -100), of_torch)
    assert torch.equal(kept, x)
kernel.launch_scale(x, torch.tensor(0.3))
assert torch.equal(x, kept * torch.tensor(0.3))
"""


def test_the_triton_kernels_do_what_the_reference_does():
    """Interpreted on the CPU; tests/gpu has them compiled."""
    pytest.importorskip("triton", reason="PyTorch's CPU builds come without triton")
    interpreted(INTERPRETED)
