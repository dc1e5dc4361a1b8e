"""Gathering by copies, with peers that are other buffers of this process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from raytrain_adv.ops.peer_copies import GATHERED_BUFFERS, PeerAllGather, Pool

CPU = torch.device("cpu")


class Handle:
    def __init__(self, rank: int, buffers: list[torch.Tensor], waits: list[Any]) -> None:
        self.rank, self.world_size, self.buffers, self.waits = rank, len(buffers), buffers, waits

    def barrier(self, channel: int = 0, timeout_ms: int = 0) -> None:
        self.waits.append(timeout_ms)

    def get_buffer(
        self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype, offset: int
    ) -> torch.Tensor:
        return self.buffers[rank].view(dtype)[offset : offset + sizes[0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.uint8])
def test_a_rank_gets_each_peers_part_between_two_barriers(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, count, waits = 3, 8, list[Any]()
    shards = [torch.arange(count).to(dtype) + 10 * rank for rank in range(ranks)]
    buffers = [torch.zeros(256, dtype=torch.uint8) for _ in range(ranks)]
    for rank, shard in enumerate(shards):
        buffers[rank].view(dtype)[rank * count : (rank + 1) * count] = shard
    for rank in range(ranks):
        pool = Pool(None, GATHERED_BUFFERS, 7)  # type: ignore[arg-type]
        handle = Handle(rank, buffers, waits)
        monkeypatch.setattr(pool, "take", lambda *_, found=(buffers[rank], handle): found)
        gathering = PeerAllGather(pool)
        whole = gathering.allocate((ranks * count,), dtype=dtype, device=CPU)
        gathering(whole, whole[rank * count : (rank + 1) * count], None)
    assert all(torch.equal(b.view(dtype)[: ranks * count], torch.cat(shards)) for b in buffers)
    assert waits == [7000, 7000] * ranks
