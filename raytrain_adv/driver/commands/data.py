"""`raytrain-adv data job.yaml`: rows as the model will see them, and what they are trained on."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from raytrain_adv import text
from raytrain_adv.config.job import JobConfig
from raytrain_adv.data.prepare import prepare
from raytrain_adv.data.shown import ShownRow, shown_rows
from raytrain_adv.report.html import page
from raytrain_adv.report.record import write_text

NUM_NAMED = 5
"""Rows that are left out, and cut ones, that are named; the page names more."""


def show(job: JobConfig, number: int, html: Path | None) -> None:
    """Print the first rows and the statistics of a job's data; write a page of them. Raises
    JobError if the data cannot be trained on, StorageError if the page cannot be written.
    """
    console = Console(highlight=False, soft_wrap=True, markup=False)
    marks = "green, the rest is dim" if console.color_system else "between >> and <<"
    prepared = prepare(job, lambda sentence: console.print(sentence, style="dim"))
    rows = shown_rows(job, number)
    if rows:
        console.print(f"\nText that is trained (has a loss) is {marks}.")
    for row in rows:
        console.print()
        _print_row(console, row)
    for title, numbers, counts in _sets(prepared.stats):
        if numbers:
            console.print()
            _print_set(console, title, numbers, counts, prepared.stats["cutoff_len"])
    if html is not None:
        write_text(_document(job, rows, prepared.stats), html)
        console.print(f"\nwrote {html}")


def _sets(stats: dict[str, Any]) -> list[tuple[str, dict[str, Any] | None, dict[str, Any]]]:
    return [
        ("Training data", stats["train"], stats["rows"]),
        ("Evaluation data", stats["eval"], stats["eval_rows"] or {}),
    ]


def _print_row(console: Console, row: ShownRow) -> None:
    numbers = f"{row.num_tokens:,} tokens, loss on {row.num_trained:,}"
    if row.num_before > row.num_tokens:
        numbers += f", cut from {row.num_before:,}"
    console.print(Text.assemble((row.where, "bold"), f"  {numbers}"))
    console.print(Text(" -> ".join(row.roles), style="dim"))
    if not console.color_system:  # a pipe, a file, NO_COLOR
        console.print(row.marked())
        return
    shown = Text()
    for token in row.tokens:
        style = "green" if token.is_trained else "dim"
        shown.append(token.text, f"bold {style}" if token.is_special else style)
    console.print(shown)


def _print_set(
    console: Console, title: str, numbers: dict[str, Any], rows: dict[str, Any], cutoff: int
) -> None:
    console.print(title, style="bold")
    lengths = ", ".join(f"{name} {value:,.0f}" for name, value in numbers["lengths"].items())
    trained = numbers["label_tokens"] / numbers["tokens"]
    lines = [
        f"{text.plural(numbers['rows'], 'conversation')} in "
        f"{text.plural(numbers['sequences'], 'sequence')}",
        f"{numbers['tokens']:,} tokens, loss on {numbers['label_tokens']:,} ({trained:.0%})",
        f"tokens per conversation: {lengths}",
    ]
    if rows.get("truncated"):
        lines.append(f"{text.plural(rows['truncated'], 'row')} cut at cutoff_len ({cutoff})")
        lines += [f"  {c['where']}: {c['tokens']:,}" for c in rows["cut_examples"][:NUM_NAMED]]
    if rows.get("unusable"):
        lines.append(f"{rows['unusable']:,} of {rows['read']:,} rows are left out")
        lines += [f"  {n:,} x {reason}" for reason, n in rows["unusable_reasons"].items()]
        examples = rows["unusable_examples"][:NUM_NAMED]
        lines += [f"  {one['where']}: {one['reason']}" for one in examples]
    for line in lines:
        console.print(f"  {line}")


def _document(job: JobConfig, rows: list[ShownRow], stats: dict[str, Any]) -> str:
    names = job.data.dataset or ""
    return page(
        "rows.html.j2",
        title="Rows",
        subtitle=[
            names if isinstance(names, str) else ", ".join(names),
            job.model.model_name_or_path,
            f"template {job.data.template}" if job.data.template else "the tokenizer's template",
        ],
        rows=rows,
        sets=_sets(stats),
        cutoff_len=stats["cutoff_len"],
    )
