"""Which passes are recorded as CUDA graphs, and what a recording that is wrong leads to."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import masking_utils

from raytrain_adv.errors import JobError, TrainingError
from raytrain_adv.estimate.launches import why_no_graph
from raytrain_adv.model.build import build
from raytrain_adv.model.packing import known_unpacked
from raytrain_adv.worker.graph import WARM_UP, Passes, Recorded
from tests.tiny_models import job_for, write_checkpoint


class Replayed:
    """A graph on a CPU: it computes what was recorded, or with `off` something else."""

    def __init__(self, passes: Passes, off: float = 0.0) -> None:
        self.passes, self.off, self.replays = passes, off, 0
        self.recorded: Any = None

    def replay(self) -> None:
        self.replays += 1
        r = self.recorded
        r.loss.copy_(self.passes._run(r.inputs, r.labels, r.scale) + self.off)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.drop, self.head = nn.Embedding(50, 8), nn.Dropout(0.2), nn.Linear(8, 50)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.table(ids)))


def summed(model: nn.Module, inputs: Any, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(inputs["input_ids"]).flatten(0, 1), labels.flatten())


@pytest.fixture
def said() -> list[str]:
    return []


def passes_of(said: list[str], tmp_path: Any, off: float = 0.0, **keys: Any) -> Passes:
    torch.manual_seed(0)
    job = job_for(write_checkpoint("llama-tied", tmp_path / "m"), tmp_path, **keys)
    run: Any = SimpleNamespace(
        device=torch.device("cuda"), say=lambda text, event: said.append(text)
    )
    passes = Passes(job, run, Model(), summed)
    passes.allow("")

    def capture(inputs: Any, labels: torch.Tensor, scale: float) -> Recorded:
        own = {k: v.clone() for k, v in inputs.items()}
        trained = passes.model.parameters()
        passes.buffers = passes.buffers or {p: torch.zeros_like(p) for p in trained}
        graph: Any = Replayed(passes, off)
        loss = torch.zeros(())
        graph.recorded = Recorded(graph, own, labels.clone(), torch.tensor(scale), loss)
        return graph.recorded

    passes._capture = capture  # type: ignore[method-assign]
    return passes


def train(passes: Passes, steps: int, lengths: tuple[int, ...] = (6,), plain: bool = False) -> Any:
    """Return the losses and gradients of steps of two passes each."""
    found = []
    for step in range(steps):
        for number in range(2):
            torch.manual_seed(1000 + 10 * step + number)
            size = (2, lengths[(step + number) % len(lengths)])
            ids, labels = torch.randint(0, 50, size), torch.randint(0, 50, size)
            loss = passes({"input_ids": ids}, labels, 0.5, 10 * step + number, (), plain)
            found.append(loss.clone())
        found += [p.grad.clone() for p in passes.model.parameters() if p.grad is not None]
        passes.model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("lengths", [(6,), (6, 4)])
def test_recorded_passes_train_as_plain_ones(said, tmp_path, lengths):
    """Random values and accumulated gradients too."""
    expected = train(passes_of([], tmp_path), 10, lengths, plain=True)
    passes = passes_of(said, tmp_path)
    assert all(map(torch.equal, train(passes, 10, lengths), expected))
    graphs = [recorded.graph for recorded in passes.recorded.values()]
    assert len(graphs) == len(lengths) and all(graph.replays > 1 for graph in graphs)
    assert said[0].startswith("CUDA graph: passes of 2 x 6 tokens are replayed; equal to the plain")
    assert (
        passes.summary == f"{len(lengths)} kind{'s' * (len(lengths) > 1)} of passes recorded "
        "and replayed"
    )


def test_a_recording_that_computes_something_else_is_not_used(said, tmp_path):
    expected = train(passes_of([], tmp_path), 6, plain=True)
    passes = passes_of(said, tmp_path, off=0.5)
    assert all(map(torch.equal, train(passes, 6), expected))
    assert not passes.recorded and not passes.buffers
    assert "a recorded pass differs from the plain one by" in said[0] and said[0] in (
        f"CUDA graph: {passes.summary}"
    )


def test_a_job_that_requires_a_graph_stops_where_there_can_be_none(said, tmp_path):
    passes = passes_of(said, tmp_path, off=0.5, cuda_graph=True)
    with pytest.raises(JobError, match="cuda_graph: true, but") as refused:
        train(passes, 6)
    assert "differs from the plain one" in refused.value.found
    with pytest.raises(JobError, match="cuda_graph: true, but"):
        passes.allow("2 workers exchange weights and gradients within a pass")


def test_a_pass_is_recorded_once_it_has_come_often_enough(said, tmp_path):
    passes = passes_of(said, tmp_path)
    train(passes, 1, lengths=(3, 4, 5))
    assert not said and set(passes.seen.values()) == {1} and WARM_UP > 1


def test_a_feature_that_begins_makes_recordings_of_their_own(said, tmp_path):
    passes = passes_of(said, tmp_path)
    for on in (False, True):
        ids = torch.zeros((1, 4), dtype=torch.int64)
        for _ in range(WARM_UP + 2):
            passes({"input_ids": ids}, ids, 1.0, 0, (on,), False)
            passes.model.zero_grad(set_to_none=True)
        assert [kind[0] for kind in passes.recorded] == [(on,)]
    passes.close()
    assert passes.summary == "2 kinds of passes recorded and replayed" and not passes.buffers


def test_a_run_too_short_for_recordings_reports_that(said, tmp_path):
    passes = passes_of(said, tmp_path)
    train(passes, 1)
    passes.close()
    assert passes.summary == "passes are not recorded: none came often enough"


def test_a_loss_that_depends_on_no_trained_parameter_is_an_error(said, tmp_path):
    passes = passes_of(said, tmp_path)
    passes.model.requires_grad_(False)
    with pytest.raises(TrainingError, match="No gradient reaches any parameter"):
        train(passes, 1)


class BackwardOfItsOwn(torch.autograd.Function):
    """As Reformer's: multiplies the gradient by a parameter that forward had cast."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0].reshape(1, -1).bfloat16() @ torch.ones(gradients[0].numel(), 1)


def test_a_backward_pass_that_mixes_dtypes_is_an_error(said, tmp_path):
    passes = passes_of(said, tmp_path)
    computed = passes.loss_sum
    passes.loss_sum = lambda *given: BackwardOfItsOwn.apply(computed(*given))
    with pytest.raises(TrainingError, match="The backward pass of Model fails in float32"):
        train(passes, 1)


@pytest.mark.parametrize(
    ("keys", "workers", "reason"),
    [
        ({"bf16": True}, 1, ""),
        ({"bf16": True}, 2, "2 workers exchange weights and gradients within a pass"),
        ({"cuda_graph": False}, 1, "cuda_graph: false"),
        ({"fsdp_cpu_offload": True}, 1, "fsdp_cpu_offload: true"),
        ({"neftune_noise_alpha": 5.0}, 1, "NEFTune prepares each batch on the host"),
        ({"use_cpu": True}, 1, "use_cpu: true"),
    ],
)
def test_the_plan_knows_why_passes_are_not_recorded(tmp_path, keys, workers, reason):
    folder = write_checkpoint("llama-tied", tmp_path / "m")
    job = job_for(folder, tmp_path, **{"use_cpu": False, **keys})
    assert why_no_graph(build(job), job, workers, 64) == reason


def test_transformers_looks_for_packed_rows_only_where_there_may_be_some():
    search, positions = masking_utils.find_packed_sequence_indices, torch.tensor([[0, 1, 0, 1]])
    with known_unpacked({"input_ids": positions}):
        assert masking_utils.find_packed_sequence_indices(positions) is None
        assert not masking_utils.is_tracing(positions)
    with known_unpacked({"input_ids": positions, "position_ids": positions}):
        assert masking_utils.find_packed_sequence_indices(positions) is not None
    assert masking_utils.find_packed_sequence_indices is search
