"""What a worker does before it trains."""

import pytest
import torch

from raytrain_adv.driver.training.worker_entry import _device


@pytest.mark.parametrize(("written", "number"), [("3", 3), ("2,4", 2), ("", 5), ("many", 5)])
def test_a_worker_on_cpu_computes_with_the_cores_that_ray_gave_it(monkeypatch, written, number):
    """PyTorch, imported before Ray wrote their number, took every core of the host."""
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", written)
    try:
        torch.set_num_threads(5)
        assert _device(use_gpu=False) == torch.device("cpu")
        assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(before)
