"""Run a function on several CPU ranks that talk over gloo, from within a test.

Their processes are forked from a server that has imported tests/preloaded.py: starting them costs
no seconds.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT_S = 900.0  # for ranks that wait for each other forever: a busy machine takes minutes


def server() -> ForkServerContext:
    """Return the context whose processes are forked from the server.

    With a GPU it imports nothing: libraries ask for the GPU as they are imported, and CUDA cannot
    be used in a process forked from one that has.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([] if torch.cuda.is_available() else ["tests.preloaded"])
    return context


def _rank(
    function: Callable[..., Any],
    rank: int,
    count: int,
    meeting: str,
    answer: Connection,
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=count
        )
        result = function(*args)
        dist.barrier()
        dist.destroy_process_group()
        answer.send_bytes(pickle.dumps((True, result)))
    except BaseException:
        answer.send_bytes(pickle.dumps((False, traceback.format_exc())))


def _answer(receive: Connection) -> tuple[bool, Any]:
    if not receive.poll(TIMEOUT_S):
        return False, f"no answer in {TIMEOUT_S:g} s"
    try:
        answer: tuple[bool, Any] = pickle.loads(receive.recv_bytes())
    except EOFError:
        return False, "the process died"
    return answer


def run_ranks(function: Callable[..., Any], count: int, folder: Path, *args: Any) -> list[Any]:
    """Call `function(*args)` on `count` ranks and return what each returned. `function` must be at
    the top of its module.
    """
    context = server()
    meeting = folder / f"meeting-{os.urandom(4).hex()}"
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    processes = [
        context.Process(target=_rank, args=(function, rank, count, str(meeting), end, args))
        for rank, (_, end) in enumerate(pipes)
    ]
    for process, (_, end) in zip(processes, pipes, strict=True):
        process.start()
        end.close()
    answers = [_answer(receive) for receive, _ in pipes]
    for process in processes:
        process.join(10)
        if process.is_alive():
            process.kill()
    failed = [f"rank {rank}:\n{text}" for rank, (fine, text) in enumerate(answers) if not fine]
    if failed:
        raise AssertionError("\n".join(failed))
    return [result for _, result in answers]
