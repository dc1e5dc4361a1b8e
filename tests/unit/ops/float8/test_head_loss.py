"""A head's loss is bf16's and its gradients are float8's rounding off; on a CPU too."""

import pytest
import torch

from raytrain_adv.ops.float8 import head_loss
from raytrain_adv.ops.float8.head_loss import Float8Head
from raytrain_adv.ops.loss import linear_cross_entropy as ops
from raytrain_adv.ops.loss.linear_cross_entropy import LogitMap, linear_cross_entropy

TOKENS, HIDDEN, VOCAB = 150, 32, 64
MAPS = [LogitMap(), LogitMap(scale=0.25), LogitMap(scale=2.0, softcap=3.0)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Three groups of 64 tokens, the last of 32 with ten of padding, in chunks of 16."""
    monkeypatch.setattr(ops, "CHUNK_BYTES", 1)
    monkeypatch.setattr(ops, "CHUNK_MULTIPLE", 16)
    monkeypatch.setattr(head_loss, "GROUP", 64)


def head_and_rows(bias=True, tokens=TOKENS):
    torch.manual_seed(0)
    head = Float8Head.from_float(torch.nn.Linear(HIDDEN, VOCAB, bias=bias, dtype=torch.bfloat16))
    labels = torch.randint(0, VOCAB, (tokens,))
    labels[10:40] = -100
    return head, torch.randn(tokens, HIDDEN).bfloat16().requires_grad_(), labels


def off(found, expected):
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("logit_map", MAPS)
@pytest.mark.parametrize("bias", [False, True])
def test_the_loss_is_bf16s_and_its_gradients_are_rounded(logit_map, bias):
    head, rows, labels = head_and_rows(bias)
    found = head.cross_entropy(rows, labels, logit_map)
    exact = linear_cross_entropy(rows, head.weight, head.bias, labels, logit_map)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=0)
    inputs = [rows, *head.parameters()]
    ours = torch.autograd.grad(found * 0.3711, inputs)
    exactly = torch.autograd.grad(exact * 0.3711, inputs)
    assert all(off(a, b) < 0.06 for a, b in zip(ours, exactly, strict=True))
    assert all(off(a, b) > 0.01 for a, b in zip(ours[:2], exactly, strict=False))


def test_tokens_without_labels_and_padding_add_nothing():
    head, rows, labels = head_and_rows()
    alone = head.cross_entropy(rows[:37], labels[:37], LogitMap())
    more = torch.cat([labels[:37], torch.full((TOKENS - 37,), -100)])
    found = head.cross_entropy(rows, more, LogitMap())
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(found, rows)
    assert not gradient[37:].any() and gradient[:10].any()


def test_a_frozen_head_costs_no_product_of_its_gradient_and_evaluation_none_in_float8():
    head, rows, labels = head_and_rows()
    head.requires_grad_(False)

    def products():
        with torch.profiler.profile() as seen:
            loss = head.cross_entropy(rows, labels, LogitMap())
        return loss, sum(e.count for e in seen.key_averages() if e.key == "aten::_scaled_mm")

    loss, count = products()
    assert count == 10  # chunks of 16 in 160 padded tokens
    loss.backward()
    assert rows.grad is not None and head.weight.grad is None
    with torch.no_grad():
        evaluated, count = products()
    assert count == 0 and float(evaluated) == float(loss.detach())
    assert torch.equal(head(rows), torch.nn.functional.linear(rows, head.weight, head.bias))


def test_a_value_that_is_no_number_reaches_the_loss():
    head, rows, labels = head_and_rows()
    with torch.no_grad():
        rows[3, 3] = float("nan")
        assert head.cross_entropy(rows, labels, LogitMap()).isnan()
