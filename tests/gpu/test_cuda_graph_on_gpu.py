"""Recorded passes on a GPU: the plain passes' numbers, and what a recording that fails leaves."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from raytrain_adv.ops.adamw import ClippingAdamW
from raytrain_adv.worker.graph import Passes
from tests.tiny_models import job_for, write_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
GPU = torch.device("cuda", 0)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.drop = nn.Embedding(100, 64), nn.Dropout(0.1)
        self.head = nn.Linear(64, 100)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.table(ids)))


def summed(model: nn.Module, inputs: Any, labels: torch.Tensor) -> torch.Tensor:
    logits = model(inputs["input_ids"]).flatten(0, 1)
    return F.cross_entropy(logits, labels.flatten(), reduction="sum")


def waits(model: nn.Module, inputs: Any, labels: torch.Tensor) -> torch.Tensor:
    loss = summed(model, inputs, labels)
    return loss if loss.item() > 0 else loss * 2


def losses(tmp_path: Any, loss_sum: Any, off: str, lengths: tuple[int, ...]) -> Any:
    """Return the losses of eight steps of two passes, and the passes."""
    torch.manual_seed(0)
    job = job_for(write_checkpoint("llama-tied", tmp_path / "m"), tmp_path)
    run: Any = SimpleNamespace(device=GPU, say=lambda text, event: print(text))
    model = Model().to(GPU)
    passes = Passes(job, run, model, loss_sum)
    passes.allow(off)
    optimizer, found = ClippingAdamW(model.parameters(), lr=1e-2), []
    for step in range(8):
        total = torch.zeros((), device=GPU)
        for number in range(2):
            numbers = torch.Generator().manual_seed(10 * step + number)
            size = (2, lengths[(step + number) % len(lengths)])
            ids, labels = (torch.randint(0, 100, size, generator=numbers).to(GPU) for _ in "12")
            total += passes({"input_ids": ids}, labels, 1 / 64, 100 * step + number, (), False)
        found.append(total.item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return found, passes


@pytest.mark.parametrize("lengths", [(32,), (32, 16)])
def test_recorded_passes_train_as_plain_ones_bit_for_bit(tmp_path, lengths):
    """Dropout draws the same values, a second pass adds to the first's gradients."""
    expected, _ = losses(tmp_path, summed, "for comparison", lengths)
    found, passes = losses(tmp_path, summed, "", lengths)
    assert found == expected and len(passes.recorded) == len(lengths)


def test_training_goes_on_where_a_pass_waits_for_the_gpu(tmp_path):
    """A recording that failed must not keep dropout from drawing numbers."""
    expected, _ = losses(tmp_path, summed, "for comparison", (32,))
    found, passes = losses(tmp_path, waits, "", (32,))
    assert found == expected and not passes.recorded
    assert "not permitted when stream is capturing" in passes.summary
