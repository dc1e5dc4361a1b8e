"""`raytrain-adv generate`: the answers to a file of prompts, as JSON lines."""

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from raytrain_adv.driver.commands.use.answer import Answer, in_batches, prompt_ids
from raytrain_adv.driver.commands.use.load import Loaded
from raytrain_adv.driver.commands.use.prompts import PromptRow
from raytrain_adv.driver.commands.use.sampling import Sampling
from raytrain_adv.errors import JobError
from raytrain_adv.storage.atomic import write_atomic
from raytrain_adv.storage.storage import storage_errors
from raytrain_adv.text import plural, rate


def refuse_existing(output: Path, overwrites: bool) -> None:
    """Refuse a file that is there already, before a model is loaded. Raises JobError."""
    if output.exists() and not overwrites:
        fix = "name another file, or give --overwrite; a file is never continued"
        raise JobError(f"{output} exists already", f"{output.stat().st_size:,} bytes", fix)
    if not output.absolute().parent.is_dir():
        found = f"there is no folder {output.absolute().parent}"
        raise JobError(f"{output} cannot be written", found, "create it, or name another file")


def run(loaded: Loaded, rows: list[PromptRow], output: Path, sampling: Sampling, size: int) -> None:
    """Answer each prompt, and write the answers in the prompts' order. Raises RaytrainAdvError."""
    console = Console(highlight=False, soft_wrap=True, stderr=True)
    console.print(f"loaded {loaded.words()}", style="dim", markup=False)
    console.print(sampling.words(), style="dim", markup=False)
    start = time.perf_counter()
    answers = answer_all(loaded, rows, sampling, size, console)
    text = "".join(
        json.dumps(_line(*both), ensure_ascii=False) + "\n"
        for both in zip(rows, answers, strict=True)
    )
    with storage_errors("The answers cannot be written", str(output)):
        write_atomic(output, text)
    seconds = time.perf_counter() - start
    tokens = sum(answer.num_tokens for answer in answers)
    cut = sum(not answer.is_whole for answer in answers)
    speed = f"{tokens:,} tokens, {rate(tokens / seconds)} a second"
    print(f"wrote {plural(len(answers), 'answer')} to {output} ({speed})")
    if cut:
        limit = f"max_new_tokens ({sampling.max_new_tokens:,})"
        print(f"{plural(cut, 'answer')} ended by {limit}")


def answer_all(
    loaded: Loaded, rows: list[PromptRow], sampling: Sampling, size: int, console: Console
) -> list[Answer]:
    """Return the answers to all prompts, in their order, and show how far it is."""
    ids = [prompt_ids(loaded, row.messages, sampling.enable_thinking, row.tools) for row in rows]
    found: dict[int, Answer] = {}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as shown:
        bar = shown.add_task("answers", total=len(rows))

        def done(number: int, answer: Answer) -> None:
            found[number] = answer
            shown.advance(bar)

        in_batches(loaded, ids, sampling, size, done)
    return [found[number] for number in range(len(rows))]


def _line(row: PromptRow, answer: Answer) -> dict[str, Any]:
    """Return a line of the file: the conversation, its answer, and how that ended."""
    return {
        "messages": row.messages,
        **({"tools": row.tools} if row.tools else {}),
        "answer": answer.text,
        **({"reference": row.reference} if row.reference is not None else {}),
        "finish_reason": "stop" if answer.is_whole else "length",
        "num_prompt_tokens": answer.num_prompt_tokens,
        "num_tokens": answer.num_tokens,
    }
