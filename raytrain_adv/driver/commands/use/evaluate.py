"""`raytrain-adv evaluate`: finished models beside each other: loss, scores, tasks."""

import gc
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from raytrain_adv import tables
from raytrain_adv.config.job import JobConfig
from raytrain_adv.config.load import load as load_job
from raytrain_adv.data.batches.sequences import SequenceSet
from raytrain_adv.data.prepare import prepare
from raytrain_adv.driver.commands.use.generate import answer_all
from raytrain_adv.driver.commands.use.harness import Harness
from raytrain_adv.driver.commands.use.load import Loaded, device_named, job_from, load, short
from raytrain_adv.driver.commands.use.measures import (
    Figure,
    Rows,
    Score,
    alone,
    exact_match,
    losses,
    mean,
    same_tokens,
    score_named,
)
from raytrain_adv.driver.commands.use.prompts import PromptRow, read_prompts
from raytrain_adv.driver.commands.use.sampling import Sampling
from raytrain_adv.driver.commands.use.source import Source, find
from raytrain_adv.errors import JobError
from raytrain_adv.ops.loss import perplexity
from raytrain_adv.storage.atomic import write_atomic
from raytrain_adv.storage.metrics_file import FILE_NAME, best_step, read
from raytrain_adv.storage.storage import storage_errors
from raytrain_adv.tables import Text

EVALUATION = "evaluation.json"
LOSS, PERPLEXITY, SCORE = "held-out loss", "held-out perplexity", "score"


@dataclass(frozen=True)
class Wanted:
    """What is measured."""

    job: JobConfig | None
    """Whose held-out rows are evaluated; none evaluates no loss."""
    answers: list[PromptRow]
    score: Score
    score_name: str
    sampling: Sampling
    harness: Harness | None
    size: int
    """Prompts that are answered together."""


def start(
    sources: list[Source],
    sampling: Sampling,
    job: str,
    answers: Path | None,
    score: str,
    tasks: str,
    num_fewshot: int | None,
    limit: int | None,
    chat_template: bool,
    output: Path | None,
    batch_size: int,
    device: str,
    trust_remote_code: bool,
) -> None:
    """Check what is asked, cheapest first, then measure. Raises RaytrainAdvError."""
    if score and answers is None:
        fix = "give --answers FILE, with prompts and right answers"
        raise JobError("--score has nothing to score", f"--score {score}", fix)
    rows = read_prompts(answers) if answers is not None else []
    if without := [row.where for row in rows if row.reference is None]:
        found = f"{len(without)} of {len(rows)} rows, as {without[0]}"
        fix = "give each row its answer: output, answer, response, or a last assistant message"
        raise JobError(f"{answers} lacks answers to compare with", found, fix)
    function = score_named(score) if score else exact_match
    harness = Harness(tasks, num_fewshot, limit, chat_template) if tasks else None
    whose = load_job(job) if job else job_from(sources[0])
    if whose is None and not rows and harness is None:
        fix = "give --job FILE (whose held-out rows are taken), --answers FILE or --tasks NAMES"
        raise JobError("there is nothing to evaluate on", f"{sources[0].folder} is of no run", fix)
    named = score or "exact match"
    wanted = Wanted(whose, rows, function, named, sampling, harness, batch_size)
    folder = sources[0].run or Path()
    run(sources, wanted, device_named(device), output or folder / EVALUATION, trust_remote_code)


def held_out_of(job: JobConfig, is_needed: bool) -> SequenceSet | None:
    """Return the job's held-out rows, tokenized as for training. Raises JobError if there are none,
    and nothing else is measured; or its data cannot be read.
    """
    if not job.data.holds_rows_out:
        if not is_needed:
            return None
        fix = "give --answers FILE or --tasks NAMES, or --job with another file that has val_size"
        raise JobError("the run has held out no rows", f"{job.source}: val_size 0", fix)
    found = prepare(job, lambda sentence: None).eval
    return None if found is None else alone(found, job)


def run(
    sources: list[Source], wanted: Wanted, device: torch.device, output: Path, code: bool
) -> None:
    """Measure each model, print a table and write evaluation.json. Raises RaytrainAdvError."""
    console = Console(highlight=False, soft_wrap=True, stderr=True)
    others = bool(wanted.answers or wanted.harness)
    held_out = held_out_of(wanted.job, not others) if wanted.job is not None else None
    models: list[dict[str, Any]] = []
    firsts: dict[str, Rows] = {}
    first: Loaded | None = None
    for source in sources:
        loaded = load(source, device, "", code)
        console.print(f"loaded {loaded.words()}", style="dim", markup=False)
        if held_out is not None and first is not None:
            same_tokens(loaded, first)
        start = time.perf_counter()
        figures: dict[str, Figure] = {}
        if held_out is not None and wanted.job is not None:
            figures |= _losses(loaded, wanted.job, held_out, firsts)
        if wanted.answers:
            figures[SCORE] = _score(loaded, wanted, firsts, console)
        tasks = wanted.harness.run(loaded, wanted.size) if wanted.harness is not None else {}
        figures |= {name: Figure(value, error, 0) for name, (value, error) in tasks.items()}
        models.append(_described(loaded, figures, wanted.job, time.perf_counter() - start))
        first = first or replace(loaded, model=None)  # its tokenizer; the weights make room
        del loaded
        gc.collect()
    _show(models)
    _write(models, wanted, output)


def _losses(
    loaded: Loaded, job: JobConfig, held_out: SequenceSet, firsts: dict[str, Rows]
) -> dict[str, Figure]:
    sums, tokens = losses(loaded, job, held_out)
    loss = mean(sums, tokens, firsts.get(LOSS))
    firsts.setdefault(LOSS, sums)
    value = perplexity(loss.value)
    error = None if loss.error is None else value * loss.error
    return {LOSS: loss, PERPLEXITY: Figure(value, error, loss.num_rows)}


def _score(loaded: Loaded, wanted: Wanted, firsts: dict[str, Rows], console: Console) -> Figure:
    answers = answer_all(loaded, wanted.answers, wanted.sampling, wanted.size, console)
    pairs = zip(answers, wanted.answers, strict=True)
    scores = np.array([wanted.score(answer.text, row.reference or "") for answer, row in pairs])
    figure = mean(scores, np.ones(len(scores)), firsts.get(SCORE))
    firsts.setdefault(SCORE, scores)
    return figure


def _described(
    loaded: Loaded, figures: dict[str, Figure], job: JobConfig | None, seconds: float
) -> dict[str, Any]:
    source = loaded.source
    own = _own_loss(source, job) if LOSS in figures else None
    return {
        "folder": str(source.folder.absolute()),
        "form": source.form,
        "device": str(loaded.device),
        "figures": {name: asdict(figure) for name, figure in figures.items()},
        "loss_in_its_run": own,
        "seconds": round(seconds, 3),
    }


def _own_loss(source: Source, job: JobConfig | None) -> float | None:
    """Return the last held-out loss that the model's own run measured, on these rows; none for a
    model that the run measured otherwise: the one that was converted from what it trained.
    """
    own = job_from(source)
    is_same = own is not None and job is not None and own.flat() == job.flat()
    if not is_same or source.run is None or source.folder != find(str(source.run))[0].folder:
        return None
    rows = read(source.run / FILE_NAME)
    best = best_step(rows)
    found = [r["loss"] for r in rows if r["kind"] == "eval" and best in (None, r["step"])]
    return found[-1] if found else None


def _show(models: list[dict[str, Any]]) -> None:
    """Print a table: a column for each model, a line for each measure."""
    names = [short(Path(model["folder"])) for model in models]
    table = tables.columns("", *names, right=names)
    table.add_row(Text("stored as"), *(Text(model["form"]) for model in models))
    for name in models[0]["figures"]:
        figures = [Figure(**model["figures"][name]) for model in models]
        table.add_row(name, *(_with_error(f.value, f.error) for f in figures))
        if any(figure.difference is not None for figure in figures):
            cells = (_with_error(f.difference, f.difference_error, "+") for f in figures)
            table.add_row("  from the first", *cells)
        own = [model["loss_in_its_run"] for model in models]
        if name == LOSS and any(one is not None for one in own):
            table.add_row("  in its run", *("" if one is None else f"{one:.4f}" for one in own))
    tables.show(table)
    tables.show(Text("± is one standard error over rows; differences are taken row by row"))


def _with_error(value: float | None, error: float | None, sign: str = "") -> str:
    if value is None:
        return ""
    return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def _write(models: list[dict[str, Any]], wanted: Wanted, output: Path) -> None:
    found = {
        "format_version": 1,
        "time": time.time(),
        "job": wanted.job.source if wanted.job is not None else None,
        "score": wanted.score_name if wanted.answers else None,
        "sampling": wanted.sampling.model_dump() if wanted.answers else None,
        "models": models,
    }
    replaced = ", in place of an earlier one" if output.exists() else ""
    with storage_errors("The evaluation cannot be written", str(output)):
        write_atomic(output, json.dumps(found, indent=1) + "\n")
    print(f"wrote {output}{replaced}")
