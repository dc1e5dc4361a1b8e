"""Tokenizing in several processes.

Each is a separate Python interpreter that reads chunks from its standard input and writes results
to its standard output. multiprocessing is not used: its workers run the user's main module again,
or are forked from a process in which the threads of torch and Ray are running.
"""

import os
import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any

from transformers import PreTrainedTokenizerBase

from raytrain_adv.data.read.formats import Layout
from raytrain_adv.data.tokens.tokenize import Chunk, RawRow, Recipe, Tokenizer
from raytrain_adv.errors import RaytrainAdvError, TrainingError, quieten

Task = tuple[list[RawRow], Layout, float]
"""Rows, their layout, and the share of the datasets read with them."""


def tokenize_here(tasks: Iterator[Task], tokenizer: Tokenizer) -> Iterator[tuple[Chunk, float]]:
    """Tokenize chunk by chunk in this process; the tokenizer runs its own threads."""
    for rows, layout, share in tasks:
        yield tokenizer(rows, layout), share


def tokenize_in_processes(
    tasks: Iterator[Task], tokenizer: PreTrainedTokenizerBase, recipe: Recipe, num_processes: int
) -> Iterator[tuple[Chunk, float]]:
    """Tokenize in processes; results come in the order of the tasks."""
    opening = pickle.dumps((tokenizer, recipe))
    own = threading.local()
    children: list[subprocess.Popen[bytes]] = []

    def work(rows: list[RawRow], layout: Layout) -> Chunk:
        if not hasattr(own, "child"):
            own.child = _start(opening)
            children.append(own.child)
        return _ask(own.child, (rows, layout))

    pool = ThreadPoolExecutor(num_processes)
    pending: deque[tuple[Future[Chunk], float]] = deque()
    try:
        for rows, layout, share in tasks:
            pending.append((pool.submit(work, rows, layout), share))
            if len(pending) > 2 * num_processes:
                future, done = pending.popleft()
                yield future.result(), done
        for future, done in pending:
            yield future.result(), done
    finally:
        for child in list(children):
            child.kill()
        pool.shutdown(cancel_futures=True)
        for child in children:
            child.communicate()


def _start(opening: bytes) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "TOKENIZERS_PARALLELISM": "false",
    }
    program = (
        f"from {quieten.__module__} import quieten; quieten()\nfrom {__name__} import main; main()"
    )
    command = [sys.executable, "-c", program]
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment)
    try:
        _pipes(child)[0].write(opening)
    except BrokenPipeError as error:
        raise _ended(child) from error
    return child


def _ask(child: subprocess.Popen[bytes], task: Any) -> Chunk:
    tasks, answers = _pipes(child)
    try:
        pickle.dump(task, tasks)
        tasks.flush()
        answer = pickle.load(answers)
    except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
        raise _ended(child) from error
    if isinstance(answer, RaytrainAdvError):
        raise answer
    if not isinstance(answer, Chunk):
        fix = "report this with the dataset's first rows"
        raise TrainingError("A process that tokenizes failed", str(answer), fix)
    return answer


def _pipes(child: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    if child.stdin is None or child.stdout is None:
        raise TypeError("a process that tokenizes was started without pipes")
    return child.stdin, child.stdout


def _ended(child: subprocess.Popen[bytes]) -> TrainingError:
    return TrainingError(
        "A process that tokenizes ended before its work was done",
        f"exit code {child.wait()} (negative: killed by that signal; -9 is most often memory)",
        "lower preprocessing_num_workers",
    )


def main() -> None:
    """Answer requests on standard input until they end: one of the processes."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # prints must not mix with the answers
    if (opening := _next(requests)) is None:
        return
    tokenizer = Tokenizer(*opening)
    while (request := _next(requests)) is not None:
        try:
            answer: Any = tokenizer(*request)
        except RaytrainAdvError as error:
            answer = error
        try:
            pickle.dump(answer, answers)
            answers.flush()
        except BrokenPipeError:
            os._exit(0)  # nobody reads: Python would try again, and print a traceback


def _next(requests: IO[bytes]) -> Any:
    """Return a request; none once the process that asks has ended, perhaps while it wrote one."""
    try:
        return pickle.load(requests)
    except (EOFError, pickle.UnpicklingError):
        return None
