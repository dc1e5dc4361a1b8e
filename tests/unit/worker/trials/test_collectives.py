"""Which collectives FSDP2 gets, and what is said about it; the copies are tests/gpu's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from raytrain_adv.errors import JobError, TrainingError
from raytrain_adv.ops import peer_copies
from raytrain_adv.worker.trials import collectives
from tests.tiny_models import job_for, write_checkpoint

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


class Mesh:
    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def size(self) -> int:
        return self.ranks

    def get_group(self, name: str) -> Any:
        return SimpleNamespace(ranks=self.ranks)


def asked(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    places: list[tuple[str, int]],
    device: torch.device = GPU,
    ranks: int = 2,
    failure: Exception | None = None,
    can_read: bool = True,
    **keys: Any,
) -> tuple[bool, list[str]]:
    said: list[str] = []
    run: Any = SimpleNamespace(
        device=device,
        say=lambda text, event: said.append(text),
        gather=lambda value: places if isinstance(value, tuple) else [value] * ranks,
    )

    def check(*_: Any) -> None:
        if failure is not None:
            raise failure

    monkeypatch.setattr(peer_copies, "check", check)
    monkeypatch.setattr(peer_copies, "readable", lambda *_: can_read)
    monkeypatch.setattr(collectives.dist, "get_process_group_ranks", lambda g: range(g.ranks))
    monkeypatch.setattr(collectives.dist, "get_world_size", lambda g: g.ranks)
    job = job_for(write_checkpoint("llama", folder / "model"), folder, **keys)
    mesh: Any = Mesh(ranks)
    used, found = collectives.choose(job, run, mesh)
    assert [f"collectives: {found}"] == said or not said
    return used, said


ONE_HOST = [("a", 0), ("a", 1)]
NOT: dict[str, tuple[dict[str, Any], str]] = {
    "hosts": ({"places": [("a", 0), ("b", 0)]}, "several hosts"),
    "one GPU": ({"places": [("a", 0), ("a", 0)]}, "workers share a GPU"),
    "no access": ({"can_read": False}, "cannot read each other's memory"),
    "fails": ({"failure": RuntimeError("pidfd_getfd: not permitted\nmore")}, "not permitted"),
    "differs": ({"failure": ValueError("an all-gather gave other numbers")}, "other numbers"),
}


def test_gpus_of_one_host_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used, said = asked(tmp_path, monkeypatch, ONE_HOST)
    assert used and said == [
        "collectives: copies between 2 GPUs of a host, NCCL's numbers to the bit"
    ]


@pytest.mark.parametrize("name", NOT)
def test_nccl_is_used_with_the_reason(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed, reason = NOT[name]
    given = {"places": ONE_HOST, **changed}
    used, said = asked(tmp_path, monkeypatch, **given)
    assert not used and said[0].startswith("collectives: NCCL (") and reason in said[0]
    with pytest.raises(TrainingError, match="copies is not possible here") as refused:
        asked(tmp_path, monkeypatch, fsdp_collectives="copies", **given)
    assert reason in str(refused.value)


@pytest.mark.parametrize(
    "given", [{"ranks": 1}, {"device": CPU}, {"fsdp_collectives": "nccl"}], ids=str
)
def test_nothing_is_tried_where_there_is_no_choice(
    given: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert asked(tmp_path, monkeypatch, ONE_HOST, **given) == (False, [])


def test_offloaded_states_travel_by_nccl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used, said = asked(tmp_path, monkeypatch, ONE_HOST, fsdp_cpu_offload=True)
    assert not used and said == ["collectives: NCCL (fsdp_cpu_offload: true)"]


def test_one_worker_has_nothing_to_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an error: an elastic run may come down to one."""
    given = {"ranks": 1, "fsdp_collectives": "copies"}
    assert asked(tmp_path, monkeypatch, ONE_HOST, **given) == (False, [])


def test_copies_on_a_cpu_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match="on the CPU"):
        asked(tmp_path, monkeypatch, ONE_HOST, device=CPU, fsdp_collectives="copies")
    for key in ("use_cpu", "fsdp_cpu_offload"):
        with pytest.raises(JobError, match=f"fsdp_collectives and {key}: copies are between GPUs"):
            given = {"fsdp_collectives": "copies", key: True}
            asked(tmp_path, monkeypatch, ONE_HOST, **given)
