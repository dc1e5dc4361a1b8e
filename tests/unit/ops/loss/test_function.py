import torch
import torch.nn.functional as F

from raytrain_adv.ops.loss import function
from raytrain_adv.ops.loss.function import chunked_cross_entropy_sum, cross_entropy_sum


def test_chunked_loss_and_gradient_equal_the_whole(monkeypatch):
    monkeypatch.setattr(function, "CHUNK_TOKENS", 16)
    torch.manual_seed(0)
    labels = torch.randint(0, 50, (70,))
    labels[::3] = -100
    whole = torch.randn(70, 50, requires_grad=True)
    parts = whole.detach().clone().requires_grad_()
    a, b = cross_entropy_sum(whole, labels), chunked_cross_entropy_sum(parts, labels)
    a.backward()
    b.backward()
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(whole.grad, parts.grad)
    torch.testing.assert_close(a, F.cross_entropy(whole, labels, reduction="sum"))


def test_tokens_without_a_label_add_nothing():
    logits = torch.randn(8, 5)
    assert cross_entropy_sum(logits, torch.full((8,), -100)).item() == 0.0
