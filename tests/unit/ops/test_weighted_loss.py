"""Losses that weigh tokens, by LLaMA-Factory's formulas."""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from raytrain_adv.ops.loss.function import (
    CHUNK_TOKENS,
    dft_sum,
    distill_loss,
    divergence_sum,
    eaft_sum,
    in_chunks,
)


def case(tokens):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, 30, generator=generator).requires_grad_()
    labels = torch.randint(0, 30, (tokens,), generator=generator)
    labels[::5] = -100
    return logits, labels


def test_dft_weighs_by_the_probability_and_its_gradient_is_that_of_the_probability():
    """p log(1/p) with p constant has the gradient of -p."""
    logits, labels = case(20)
    ours = dft_sum(logits, labels)
    (gradient,) = torch.autograd.grad(ours, logits)
    valid = labels != -100
    p = logits.softmax(-1)[valid].gather(1, labels[valid, None])
    assert torch.allclose(ours, (-p.log() * p).sum())
    (expected,) = torch.autograd.grad(-p.sum(), logits)
    assert torch.allclose(gradient, expected, atol=1e-6)


def test_eaft_weighs_by_the_entropy_of_the_twenty_likeliest_tokens():
    logits, labels = case(20)
    top = logits.detach().topk(20).values.softmax(-1)
    weight = (-(top * top.log()).sum(-1) / 3.0) ** 2.0
    each = F.cross_entropy(logits, labels, reduction="none")
    assert torch.allclose(eaft_sum(2.0)(logits, labels), (each * weight).sum())
    flat = torch.zeros(1, 30)
    found = eaft_sum(1.0)(flat, torch.tensor([3])).item()
    assert math.isclose(found, math.log(30) * math.log(20) / 3.0, rel_tol=1e-5)


def test_chunks_change_neither_loss_nor_gradient():
    logits, labels = case(2 * CHUNK_TOKENS + 7)
    whole, parts = dft_sum(logits, labels), in_chunks(dft_sum, logits, labels)
    assert torch.allclose(whole, parts)
    (a,), (b,) = (torch.autograd.grad(loss, logits) for loss in (whole, parts))
    assert torch.allclose(a, b)


class Answers(torch.nn.Module):
    """A model that answers with given logits [sequences, time, vocabulary]."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, **_):
        return SimpleNamespace(logits=self.logits)


def test_distillation_is_the_divergence_from_the_teacher_and_its_share_is_mixed_in():
    logits, labels = case(20)
    teacher, student = Answers(torch.randn(1, 20, 30)), Answers(logits.detach().view(1, 20, 30))
    valid = labels != -100
    p, q = (m.logits[0, valid].softmax(-1) for m in (teacher, student))
    wanted = (p * (p / q).log()).sum()
    assert torch.allclose(distill_loss(teacher, 1.0)(student, {}, labels[None]), wanted)
    mixed = distill_loss(teacher, 0.25)(student, {}, labels[None])
    own = F.cross_entropy(logits, labels, reduction="sum")
    assert torch.allclose(mixed, 0.25 * wanted + 0.75 * own)
    mixed.backward()
    assert teacher.logits.grad is None and student.logits.grad[0, valid].abs().min() > 0
    assert divergence_sum(logits, logits, labels).item() == 0
